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
"""Which entries of a parameter are read as zero."""


class Zeroed(nn.Module):
    """Runs a model with replacements for its parameters: zeroed ones, or ones that would reveal a mistake.

    Each replacement is made for the call that reads it, so they do not take as much memory as a copy of the model.

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
        """Context manager in which all code reads the replacements."""
        with _Reading(self, self._names()):
            yield

    def missed(self) -> bool:
        """Whether code may have read the original parameters, as scripted code does, which cannot be intercepted."""
        return not self.gone.keys() <= self.read

    def written(self) -> Zeroed:
        """A copy of the model that holds the replacements; it works for any code."""
        other = Zeroed(copied(self.model, {}), {}, {})
        parameters = dict(other.model.named_parameters(remove_duplicate=False))
        for names in self._names().values():
            parameters[names[0]].data = self.other(parameters[names[0]], names)
        return other

    def _names(self) -> dict[int, list[str]]:
        """The names of the parameters with replacements, by id; a parameter may have several names."""
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
    """Passes the replacements to torch functions in place of the parameters."""

    def __init__(self, zeroed: Zeroed, names: Mapping[int, Sequence[str]]) -> None:
        super().__init__()
        self.zeroed, self.names = zeroed, names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ == "__set__":
            return func(*args, **kwargs)
        if func.__name__ == "__get__":  # most attributes (shape, device, requires_grad) read no entries
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
