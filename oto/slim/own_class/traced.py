"""Integers that remember which attributes they came from.

While the full model runs once, each integer that one of its modules holds is a :class:`TracedInt`. Arithmetic keeps the
places, so a size that reaches a torch function still knows which attributes it came from, in
``x.view(b, t, self.heads, -1)`` and ``self.width // self.heads`` alike. A conversion (``int(...)``, a float in between)
loses them; then the search has to try attributes with that value.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from oto.slim.numbers import set_number
from oto.slim.own_class.attributes import AttributePlace, numbers


class TracedInt(int):
    """An integer with the places that it came from; ``direct`` if it is the unchanged value of one of them."""

    places: frozenset[AttributePlace]
    direct: bool

    @classmethod
    def of(cls, value: int, places: frozenset[AttributePlace], direct: bool = False) -> TracedInt:
        made = cls(value)
        made.places, made.direct = places, direct
        return made

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)

    def __deepcopy__(self, memo: Any) -> int:
        return self


def _arithmetic(function: Callable[[int, int], Any], reflected: bool) -> Callable[[TracedInt, Any], Any]:
    def run(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        result = function(int(other), int(self)) if reflected else function(int(self), int(other))
        if type(result) is not int:
            return result
        return TracedInt.of(result, self.places | places_of(other))

    return run


for _name in ("add", "sub", "mul", "floordiv", "mod", "pow"):
    setattr(TracedInt, f"__{_name}__", _arithmetic(getattr(operator, _name), False))
    setattr(TracedInt, f"__r{_name}__", _arithmetic(getattr(operator, _name), True))
setattr(TracedInt, "__neg__", lambda self: TracedInt.of(-int(self), self.places))  # noqa: B010


def places_of(number: Any) -> frozenset[AttributePlace]:
    """The places that a number came from; empty if unknown."""
    return number.places if isinstance(number, TracedInt) else frozenset()


@contextmanager
def traced(model: nn.Module, skip: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Context manager in which every integer above one that a module holds remembers its place.

    Args:
        skip: Tells which modules are left alone.
    """
    held: list[tuple[nn.Module, str, Any]] = []
    try:
        for path, module in model.named_modules():
            if skip(module):
                continue
            for key, value in list(numbers(module)):
                if type(value) is int and value > 1:
                    held.append((module, str(key[0]), vars(module)[str(key[0])]))  # containers around it are copied
                    set_number(module, key, TracedInt.of(value, frozenset([AttributePlace(path, key)]), direct=True))
        yield
    finally:
        for module, name, before in reversed(held):
            setattr(module, name, before)
