"""A model whose groups are rows of one matrix, and what HSPG and DHSPG must do on it, written as the papers have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from oto.groups.node_group import NodeGroup, Slice
from oto.optim import SparseOptimizer


class Rows(nn.Module):
    """Groups are the rows of ``x``; shape ``(groups, entries)``, float64."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x.clone())


def rows(size: int) -> list[NodeGroup]:
    piece = (Slice("x", 0, ()),)
    return [NodeGroup("x", size, slices=piece, zeros=piece)]


def quadratic(seed: int, groups: int = 12, entries: int = 5) -> tuple[Tensor, Tensor]:
    """Curvatures in (0, 1] and minimizers of ``f(x) = Σ h (x - a)² / 2``; half of the groups are near zero."""
    source = torch.Generator().manual_seed(seed)
    h = torch.rand(groups, entries, generator=source, dtype=torch.float64) * 0.9 + 0.1
    a = torch.randn(groups, entries, generator=source, dtype=torch.float64)
    a[::2] *= 0.02
    return h, a


def descend(
    kind: Callable[..., SparseOptimizer],
    x: Tensor,
    gradient: Callable[[Tensor, int], Tensor],
    steps: int,
    **options: Any,
) -> tuple[SparseOptimizer, list[Tensor]]:
    """The optimizer after so many steps from ``x``, and what ``x`` was after each of them."""
    model = Rows(x)
    optimizer = kind(model.named_parameters(), rows(len(x)), **options)
    seen = []
    for t in range(steps):
        model.x.grad = gradient(model.x.detach(), t)
        optimizer.step()
        seen.append(model.x.detach().clone())
    return optimizer, seen


def noisy(h: Tensor, a: Tensor, noise: float = 0.05) -> Callable[[Tensor, int], Tensor]:
    """The gradient of the quadratic, as a batch would show it."""

    def gradient(x: Tensor, t: int) -> Tensor:
        source = torch.Generator().manual_seed(t)
        return h * (x - a) + noise * torch.randn(x.shape, generator=source, dtype=x.dtype)

    return gradient
