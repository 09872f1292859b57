"""Size attributes: the numbers in a class's modules that state sizes, and their values in a thinner model.

A size in a ``forward`` comes from a tensor, which is already thinner, or from an attribute of the module, of a config
or list that it holds, or of an enclosing module. The search finds out which attribute it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from oto.axes.terms import Term, resolve, size_of
from oto.errors import EmitterError
from oto.slim.numbers import EVERY, Key, is_data, is_number
from oto.slim.pruned_shapes import PrunedShapes


@dataclass(frozen=True)
class AttributePlace:
    """A number that a module holds."""

    module: str
    key: Key


@dataclass(frozen=True)
class SizeAttribute:
    """The dimension that an attribute follows from.

    Attributes:
        term: The dimension that gets thinner.
        value: The number in the full model.
        power: Exponent ``p`` in ``value * (full / kept) ** p``; -1 for a size.
    """

    term: Term
    value: int | float
    power: float = -1.0

    def now(self, pruned: PrunedShapes) -> int | float:
        """The value in the thinner model.

        Raises:
            EmitterError: The value would have to be a fraction.
        """
        if not isinstance(self.value, int):
            return float(self.value * self.ratio(pruned) ** self.power)
        number, rest = divmod(self.value * pruned.count(self.term), size_of(self.term))
        if rest:
            raise EmitterError(f"what the class states as {self.value} would no longer be a whole number")
        return number

    def ratio(self, pruned: PrunedShapes) -> float:
        """The full size of the term over its kept size."""
        return size_of(self.term) / pruned.count(self.term)


def numbers(module: nn.Module) -> Iterator[tuple[Key, int | float]]:
    """The numbers that a module holds: its own first, then those in objects and containers; private names come last."""
    own = [(name, value) for name, value in vars(module).items() if name not in EVERY]
    own.sort(key=lambda pair: pair[0].startswith("_"))
    for name, value in own:
        if is_number(value):
            yield (name,), value
    for name, value in own:
        yield from _inside(value, (name,), 3)


def _inside(value: Any, key: Key, depth: int) -> Iterator[tuple[Key, int | float]]:
    if not depth or not is_data(value):
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
        if is_number(v):
            yield (*key, k), v
    for k, v in items:
        yield from _inside(v, (*key, k), depth - 1)


def changed(term: Term, pruned: PrunedShapes) -> bool:
    """Whether a dimension gets thinner."""
    return pruned.count(resolve(term)) != size_of(term)
