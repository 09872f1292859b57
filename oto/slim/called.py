"""What modules take and give in the run that is analyzed, so that no other run is needed to know it.

Shapes are kept in place of tensors: what a call holds may be large, or written to later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from oto._torch import DisableTorchFunction

PLAIN = (int, float, str, bool, type(None))
"""Classes of values that are kept as they are."""

OTHER = object()
"""In place of what is neither a tensor, nor plain, nor a tuple or list of these."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What is known of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Taken:
    """A call of a module, with a :class:`Shape` in place of each tensor."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any


class Calls:
    """The calls of each module, by its first path, in the run that was watched last."""

    def __init__(self) -> None:
        self.found: dict[str, list[Taken]] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """While inside, every module is watched; what an earlier run showed is forgotten, as it may have failed."""
        self.found = {}
        handles = [
            module.register_forward_hook(partial(self._see, path), with_kwargs=True)
            for path, module in model.named_modules()
            if path
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, path: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        with DisableTorchFunction():  # our own looks at tensors are no calls of the model
            named = {name: _shape(x) for name, x in kwargs.items()}
            self.found.setdefault(path, []).append(Taken(tuple(map(_shape, args)), named, _shape(result)))


def _shape(x: Any) -> Any:
    if isinstance(x, Tensor):
        return OTHER if x.is_nested else Shape(tuple(x.shape), x.dtype)
    if type(x) in (tuple, list):
        return type(x)(map(_shape, x))
    return x if isinstance(x, PLAIN) else OTHER
