"""Numbers that modules hold, as attributes or inside objects and containers, and how to set one of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from enum import Enum
from types import ModuleType
from typing import Any, TypeAlias

from torch import Tensor, nn

from oto.errors import EmitterError

Key: TypeAlias = tuple[str | int, ...]
"""The path from a module to a number: names of attributes, keys of mappings, indices of sequences."""

EVERY = {*vars(nn.Module()), "_oto_origin"}  # what every module holds


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_data(value: Any) -> bool:
    """Whether a value is data of its holder; enum members, functions, classes and modules are shared in the process."""
    return not (isinstance(value, nn.Module | Tensor | str | bytes | type | Enum | ModuleType) or callable(value))


LARGEST = 2**24
"""The largest value that a number may be set to, unless it is larger already."""


def set_number(module: nn.Module, key: Key, value: int | float) -> None:
    """Set a number that a module holds; containers on the path to it are replaced by the module's own copies.

    Raises:
        EmitterError: There is no number at that place, or one of another type; a forged file may claim anything.
    """
    try:
        if key[0] in EVERY:
            raise KeyError(key[0])
        made = _with(vars(module)[key[0]], key[1:], value)  # type: ignore[index]
    except (KeyError, IndexError, TypeError, ValueError) as failure:
        way = ".".join(map(str, key))
        raise EmitterError(f"{type(module).__name__} holds no number {way!r} that may be {value!r}") from failure
    setattr(module, str(key[0]), made)


def _with(held: Any, key: Key, value: int | float) -> Any:
    """``held`` with a new number at the end of the path, which leads through data, never through class attributes.

    Raises:
        KeyError, IndexError, TypeError, ValueError: The path ends early, or leads to something else.
    """
    if not key:
        if held is not None and not (is_number(held) and isinstance(value, float) == isinstance(held, float)):
            raise TypeError(f"{held!r} is no such number")
        if isinstance(value, int) and abs(value) > max(abs(held or 0), LARGEST):
            raise ValueError(f"{value} is too large")
        return value
    first, rest = key[0], key[1:]
    if not is_data(held):
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
