"""A class that is made from a config."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


class Config:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(vars(self))


class FFN(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Net(nn.Module):
    """Blocks whose inner width is ``inner``, or four times the width if that is unset; ``words`` has the same value."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.width % config.step:
            raise ValueError("width")
        inner = getattr(config, "inner", None) or 4 * config.width
        self.words = nn.Embedding(config.words, config.width)
        self.blocks = nn.ModuleList([FFN(config.width, inner) for _ in range(config.depth)])

    def forward(self, ids):
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return x


def config(**values: Any) -> Config:
    return Config(**{"words": 16, "inner": 16, "width": 4, "step": 2, "depth": 2} | values)
