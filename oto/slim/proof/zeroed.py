"""Run a model as if some of its entries were zero, without copying it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from oto._torch import tree_map_only
from oto.groups import Slice
from oto.slim.copying import copied

Gone = Sequence[tuple[Slice, NDArray[np.int64]]]
"""Entries that are read as zero."""


class Zeroed(nn.Module):
    """Runs a model with other tensors in place of its parameters: zeroed, or such that a mistake shows. Each is made by
    the call that reads it, so there is one at a time: a copy would take as much memory as the model.

    Args:
        gone: For parameters by name, the entries that are read as zero.
        instead: Tensors to read in place of parameters that lose nothing.

    Attributes:
        read: Parameters that have been replaced in a call so far.
    """

    def __init__(self, model: nn.Module, gone: Mapping[str, Gone], instead: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model, self.gone, self.instead = model, dict(gone), dict(instead)
        self.read: set[str] = set()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.reading():
            return self.model(*args, **kwargs)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While inside, all code reads the replacements."""
        with _Reading(self, self._names()):
            yield

    def missed(self) -> bool:
        """Whether code may have read the original parameters, as scripted code does, whose calls cannot be seen."""
        return not self.gone.keys() <= self.read

    def written(self) -> Zeroed:
        """The same for any code: a copy of the model with the replacements in it."""
        other = Zeroed(copied(self.model, {}), {}, {})
        parameters = dict(other.model.named_parameters(remove_duplicate=False))
        for names in self._names().values():
            parameters[names[0]].data = self.other(parameters[names[0]], names)
        return other

    def _names(self) -> dict[int, list[str]]:
        """The parameters with replacements, by their ids: one may have several names."""
        ids = {name: id(p) for name, p in self.model.named_parameters(remove_duplicate=False)}
        names: dict[int, list[str]] = {}
        for name in dict.fromkeys([*self.instead, *self.gone]):
            names.setdefault(ids[name], []).append(name)
        return names

    def other(self, parameter: Tensor, names: Sequence[str]) -> Tensor:
        instead = [self.instead[name] for name in names if name in self.instead]
        made = instead[0] if instead else parameter.detach()
        made = made.clone() if any(name in self.gone for name in names) else made
        for name in names:
            for piece, entries in self.gone.get(name, ()):
                piece.of(made).index_fill_(0, torch.from_numpy(entries).to(made.device), 0)
        return made


class _Reading(TorchFunctionMode):
    """Hands the replacements to torch functions in place of parameters."""

    def __init__(self, zeroed: Zeroed, names: Mapping[int, Sequence[str]]) -> None:
        super().__init__()
        self.zeroed, self.names = zeroed, names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ == "__set__":
            return func(*args, **kwargs)
        if func.__name__ == "__get__":  # most attributes read no entries: shape, device, requires_grad
            found = func(*args, **kwargs)
            if not isinstance(found, Tensor):
                return found
        args, kwargs = tree_map_only(nn.Parameter, self._other, (args, kwargs))
        return func(*args, **kwargs)

    def _other(self, parameter: nn.Parameter) -> Tensor:
        names = self.names.get(id(parameter))
        if names is None:
            return parameter
        self.zeroed.read.update(names)
        return self.zeroed.other(parameter, names)
