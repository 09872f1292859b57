"""A copy of the model on which adaptations are tried one after the other: changed in place, run, and put back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any

from torch import Tensor, nn

from oto.slim.copying import closed_over
from oto.slim.edits import Edits, attribute, edited
from oto.slim.pruned_shapes import parameter_like
from oto.trace.snapshot import Snapshot, content_of, modules_of, surroundings


@dataclass(frozen=True, eq=False)
class Copy:
    """A copy of the model that is changed in place, and put back.

    Attributes:
        found: Snapshot of what it holds.
        holders: See :func:`_holders`.
        kinds: The class of each module.
        is_swappable: Whether its tensors can be swapped for others; else each try has a copy of its own.
    """

    model: nn.Module
    found: Snapshot
    holders: Mapping[int, list[tuple[Any, Any]]]
    kinds: list[tuple[nn.Module, type[nn.Module]]]
    is_swappable: bool

    @classmethod
    def of(cls, model: nn.Module, dummy_input: Any) -> Copy:
        holders, kinds = _holders(model), [(module, type(module)) for module in modules_of(model)]
        return cls(model, Snapshot(model, dummy_input), holders, kinds, not _holds_elsewhere(model, holders))

    def edited(self, edits: Edits, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The copy with its tensors replaced and its modules edited, until it is put back."""
        for module, kind in self.kinds:  # an encoder in which a layer was swapped has a different class
            if type(module) is not kind:
                module.__class__ = kind
        try:
            for name, new in tensors.items():
                old = attribute(self.model, name)
                kept = parameter_like(old, new) if isinstance(old, nn.Parameter) else new
                for holder, key in self.holders[id(old)]:
                    holder[key] = kept
            return edited(self.model, edits)
        except BaseException:
            self.found.put_back()
            raise


def _holders(model: nn.Module) -> dict[int, list[tuple[Any, Any]]]:
    """For each tensor, by its id, the dicts and lists of modules that hold it, each with the key or index."""
    found: dict[int, list[tuple[Any, Any]]] = {}
    for module in modules_of(model):
        held = vars(module)
        lists = [value for value in held.values() if type(value) in (list, dict)]
        for holder in (held, *lists):
            for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
                if isinstance(value, Tensor):
                    found.setdefault(id(value), []).append((holder, key))
    return found


def _holds_elsewhere(model: nn.Module, holders: Mapping[int, Any]) -> bool:
    """Whether functions, objects or nested containers of a model also hold tensors of it."""
    known = {id(holder) for places in holders.values() for holder, _ in places}
    return any(
        isinstance(value, Tensor) and id(value) in holders
        for holder in surroundings(model)
        if id(holder) not in known
        for value in _content(holder)
    )


def _content(holder: Any) -> Iterable[Any]:
    if isinstance(holder, FunctionType):
        return closed_over(holder).values()
    if isinstance(holder, dict | list | deque | CellType):
        return content_of(holder).values()
    return holder if isinstance(holder, tuple | set | frozenset) else getattr(holder, "__dict__", {}).values()
