"""Networks for tests of families, and a short run of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oto import OTO
from oto.family import Family

STEPS, FREEZE = 9, 3


class Net(nn.Module):
    """Convolutions with batch norms, two branches that are added, dropout, a classifier."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.norm2 = nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.norm3 = nn.Conv2d(12, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.drop, self.fc = nn.Dropout(dropout), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)) + self.norm3(self.conv3(x)))
        return self.fc(self.drop(x.mean((2, 3))))


class Plain(nn.Module):
    """Without batch norms, so that a batch may be cut in two."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 14), nn.GELU(), nn.Linear(14, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def family_of(model: nn.Module, example: Any, **options: Any) -> Family:
    options = {
        "targets": [0.75, 0.5],
        "lr": 0.05,
        "first_momentum": 0.9,
        "total_steps": STEPS,
        "freeze_step": FREEZE,
        "ramp_steps": 2,
        "average_steps": 2,
        **options,
    }
    made: Family = OTO(model, example).family(**options)
    return made


def batch(step: int, shape: tuple[int, ...] = (8, 3, 8, 8), dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    """The batch of a step: the same for everybody."""
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(shape, generator=draw, dtype=dtype)
    return x, torch.arange(shape[0]) % 4


def train(family: Family, steps: range = range(STEPS), **shape: Any) -> None:
    family.model.train()
    for step in steps:
        x, y = batch(step, **shape)
        family.step(lambda net, x=x: net(x), lambda output, y=y: F.cross_entropy(output, y))


def trained(dropout: float = 0.0, **options: Any) -> Family:
    """A family of :class:`Net` in float64, trained to its end."""
    torch.manual_seed(0)
    family = family_of(Net(dropout).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64), **options)
    train(family, dtype=torch.float64)
    return family
