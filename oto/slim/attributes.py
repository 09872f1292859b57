"""Where a class states its sizes: integers that its modules hold, and what they have to be in a thinner model.

A size in a ``forward`` comes from a tensor, which is thinner by itself, or from an attribute: of the module, of a
configuration that it holds, of a list, of a module around it. Which attribute it is, :mod:`oto.slim.own_class` finds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any, TypeAlias

from torch import Tensor, nn

from oto.axes.terms import Term, resolve
from oto.axes.terms import size as size_of
from oto.errors import EmitterError
from oto.slim.plan import Thinning

Key: TypeAlias = tuple[str | int, ...]
"""The way from a module to a number: names of attributes, keys of mappings, places in sequences."""


@dataclass(frozen=True)
class Place:
    """A number that a module holds."""

    module: str
    key: Key


@dataclass(frozen=True)
class SizeAttribute:
    """What the number in a place follows from.

    Attributes:
        term: The dimension that gets thinner.
        value: The number in the full model.
        power: Exponent ``p`` in ``value * (full / kept) ** p``; -1 for a size.
    """

    term: Term
    value: int | float
    power: float = -1.0

    def now(self, thin: Thinning) -> int | float:
        """What it is to be.

        Raises:
            EmitterError: It would have to be a fraction.
        """
        if not isinstance(self.value, int):
            return float(self.value * self.ratio(thin) ** self.power)
        number, rest = divmod(self.value * thin.count(self.term), size_of(self.term))
        if rest:
            raise EmitterError(f"what the class states as {self.value} would be no whole number any more")
        return number

    def ratio(self, thin: Thinning) -> float:
        """How many times thinner the term is."""
        return size_of(self.term) / thin.count(self.term)


_EVERY = {*vars(nn.Module()), "_oto_origin"}  # what every module holds


def numbers(module: nn.Module) -> Iterator[tuple[Key, int | float]]:
    """The numbers that a module holds, its own first, then those of what it holds; private ones last."""
    own = [(name, value) for name, value in vars(module).items() if name not in _EVERY]
    own.sort(key=lambda pair: pair[0].startswith("_"))
    for name, value in own:
        if _is_number(value):
            yield (name,), value
    for name, value in own:
        yield from _inside(value, (name,), 3)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_data(value: Any) -> bool:
    """Whether a value belongs to who holds it: members of enums, functions, classes and modules are the process's."""
    return not (isinstance(value, nn.Module | Tensor | str | bytes | type | Enum | ModuleType) or callable(value))


def _inside(value: Any, key: Key, depth: int) -> Iterator[tuple[Key, int | float]]:
    if not depth or not _is_data(value):
        return
    items: list[tuple[str | int, Any]]
    if isinstance(value, Mapping):
        items = [(k, v) for k, v in value.items() if isinstance(k, str)]
    elif isinstance(value, list | tuple):
        items = list(enumerate(value[:64]))
    elif hasattr(value, "__dict__"):
        items = [(k, v) for k, v in vars(value).items() if not k.startswith("__")]
    else:
        return
    for k, v in items:
        if _is_number(v):
            yield (*key, k), v
    for k, v in items:
        yield from _inside(v, (*key, k), depth - 1)


LARGEST = 2**24
"""What a number may become in any case, and if it is larger, as much as it is."""


def state_(module: nn.Module, key: Key, value: int | float) -> None:
    """Make a number that a module holds another one; what lies on the way to it becomes the module's own copy.

    Raises:
        EmitterError: It holds no number there, or one of another kind; a file may say so.
    """
    try:
        if key[0] in _EVERY:
            raise KeyError(key[0])
        made = _with(vars(module)[key[0]], key[1:], value)  # type: ignore[index]
    except (KeyError, IndexError, TypeError, ValueError) as failure:
        way = ".".join(map(str, key))
        raise EmitterError(f"{type(module).__name__} holds no number {way!r} that may be {value!r}") from failure
    setattr(module, str(key[0]), made)


def _with(held: Any, key: Key, value: int | float) -> Any:
    """``held`` with another number at the end of the way, which leads through data and no attribute of a class.

    Raises:
        KeyError, IndexError, TypeError, ValueError: The way ends before, or leads to something else.
    """
    if not key:
        if held is not None and not (_is_number(held) and isinstance(value, float) == isinstance(held, float)):
            raise TypeError(f"{held!r} is no such number")
        if isinstance(value, int) and abs(value) > max(abs(held or 0), LARGEST):
            raise ValueError(f"{value} is too large")
        return value
    first, rest = key[0], key[1:]
    if not _is_data(held):
        raise TypeError(f"{type(held).__name__} is shared")
    if isinstance(held, tuple):
        items = list(held)
        items[_place(first)] = _with(items[_place(first)], rest, value)
        return type(held)(*items) if hasattr(held, "_fields") else tuple(items)
    made = copy.copy(held)
    own: Any = made if isinstance(held, Mapping | list) else vars(made)
    there: Any = held if isinstance(held, Mapping | list) else vars(held)
    if own is there:
        raise TypeError(f"{type(held).__name__} is shared")
    if isinstance(held, list):
        first = _place(first)
    elif first not in there:
        raise KeyError(first)
    own[first] = _with(there[first], rest, value)
    return made


def _place(key: str | int) -> int:
    if not isinstance(key, int):
        raise TypeError(f"{key!r} is no place")
    return key


def changed(term: Term, thin: Thinning) -> bool:
    """Whether a dimension gets thinner."""
    return thin.count(resolve(term)) != size_of(term)
