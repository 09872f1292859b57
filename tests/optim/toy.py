"""A small network with convolutions, norms and a classifier, and its node groups written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oto.groups.node_group import NodeGroup, Slice
from oto.optim import HESSO

START, STEPS, PERIODS = 2, 6, 3  # periods: steps 2-3, 4-5, 6-7
END = START + STEPS
SIZES = (8, 6)  # atoms of the two node groups: 14 in all


@dataclass(frozen=True)
class QuietGroup(NodeGroup):
    """A node group whose pruned entries have no gradient once everything that reads them is zero too."""

    quiet: bool = True


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    # GELU is 0 at 0 but has a slope there, so zeroed channels keep getting gradients
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.Conv2d(8, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    ).to(dtype)


def groups(kind: type[NodeGroup] = NodeGroup, **options: Any) -> list[NodeGroup]:
    first = tuple(Slice(name, 0, ()) for name in ("0.weight", "0.bias", "1.weight", "1.bias"))
    second = tuple(Slice(name, 0, ()) for name in ("3.weight", "4.weight", "4.bias"))
    classes = tuple(Slice(name, 0, ()) for name in ("8.weight", "8.bias"))
    return [
        kind("0.weight", 8, slices=(*first, Slice("3.weight", 1, ())), zeros=first, **options),
        kind("3.weight", 6, slices=(*second, Slice("8.weight", 1, ())), zeros=second, **options),
        kind("8.weight", 4, slices=classes, reason="output of the model"),
    ]


def hesso(model: nn.Module, node_groups: list[NodeGroup] | None = None, **options: Any) -> HESSO:
    options = {
        "start_pruning_step": START,
        "pruning_steps": STEPS,
        "pruning_periods": PERIODS,
        "lr": 0.1,
        "pruning_exponent": 1,
    } | options
    if not any(name.startswith("target_") for name in options):
        options["target_group_sparsity"] = 0.5
    if "params" not in options:
        options["params"] = model.named_parameters()
    return HESSO(node_groups=groups() if node_groups is None else node_groups, **options)


def backward(model: nn.Module, step: int) -> Tensor:
    """Loss and gradients on the batch of ``step``."""
    source = torch.Generator().manual_seed(step)
    p = next(model.parameters())
    x = torch.randn(5, 3, 8, 8, generator=source).to(p.device, p.dtype)
    y = torch.randint(4, (5,), generator=source).to(p.device)
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, then: Callable[[int], None] = lambda n: None
) -> None:
    for n in steps:
        backward(model, n)
        optimizer.step()
        then(n)


def zero_atoms(model: nn.Module, node_groups: list[NodeGroup] | None = None) -> list[Tensor]:
    """For every prunable node group, which atoms have all of their ``zeros`` entries at exactly zero."""
    parameters = dict(model.named_parameters())
    found = []
    for group in node_groups or groups():
        if group.prunable:
            rows = [
                (piece.of(parameters[piece.parameter]) == 0).reshape(group.size, -1).all(1) for piece in group.zeros
            ]
            found.append(torch.stack(rows).all(0))
    return found


def count_zeros(model: nn.Module, node_groups: list[NodeGroup] | None = None) -> int:
    return int(sum(own.sum() for own in zero_atoms(model, node_groups)))


def assert_same(left: nn.Module, right: nn.Module) -> None:
    for (name, a), b in zip(left.state_dict().items(), right.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
