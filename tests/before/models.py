"""The networks that `write.py` wrote slim forms and optimizer states of. They stay as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from oto import OTO
from tests.slim import toy


class Attends(nn.Module):
    """States its sizes in attributes and calls: its slim form changes both."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width)
        x = self.norm(x + self.out(mixed))
        return x + self.mlp(x)


class Convolves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.head = nn.Conv2d(8, 12, 3, stride=2), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(self.bn(self.conv1(x)).relu()).relu().mean((2, 3)))


def attends() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Attends().eval(), torch.randn(2, 6, 16)


def convolves() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Convolves().eval(), torch.randn(2, 3, 9, 9)


def states() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return toy.Net(toy.config()).eval(), torch.arange(8).reshape(2, 4)


MODELS = {"attends": attends, "convolves": convolves, "states": states}
ARTIFACTS = {  # the folder: model, emitter
    "config": ("states", "config"),
    "module": ("attends", "module"),
    "graph": ("attends", "graph"),
    "recording": ("convolves", "recording"),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "hesso": {"variant": "adamw"},
    "hesso_cric": {"variant": "sgd", "momentum": 0.9, "sampling_steps": 3},
}
STEPS, STOP = 12, 7


def training(kind: str) -> tuple[nn.Module, Any]:
    """A network and its optimizer, before the first step."""
    model, x = convolves()
    oto = OTO(model.train(), x)
    return model, getattr(oto, kind)(
        **OPTIMIZERS[kind], lr=1e-2, target_group_sparsity=0.5, start_pruning_step=2, pruning_steps=8, pruning_periods=2
    )


def train(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    """Steps on data that hang on the step alone."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(4, 3, 9, 9, generator=generator), torch.randint(5, (4,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
