"""What a thinner model of the user's own class needs, as one frozen value; the search replaces it, never mutates it.

Example: ``hidden`` of ``mlp`` is set to the thinner width, the count of a norm is folded into its weight, and one
``view`` is overridden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from oto.axes.terms import Term
from oto.slim.own_class.attributes import AttributePlace, SizeAttribute
from oto.slim.pruned_shapes import PrunedShapes

Tie = tuple[str, ...]
"""Names of groups that have to keep the same number of atoms."""


@dataclass(frozen=True)
class Rescale:
    """How a parameter changes when a count is folded into it: ``(p + offset) · ratio ** power - offset``.

    Attributes:
        name: The parameter.
        term: The dimension that gets thinner; ``ratio`` is its full size over its kept size.
    """

    name: str
    term: Term
    power: float
    offset: float = 0.0

    def of(self, tensor: Tensor, pruned: PrunedShapes) -> Tensor:
        factor = SizeAttribute(self.term, 1.0).ratio(pruned) ** self.power
        return tensor if factor == 1 else ((tensor.double() + self.offset) * factor - self.offset).to(tensor.dtype)


@dataclass(frozen=True, eq=False)
class Folded:
    """How the count that a norm or a mean divides by is folded into what follows it.

    Attributes:
        scales: Parameters that the count is folded into.
        scalars: Numbers among the arguments of calls that change, by the index of the call.
    """

    scales: tuple[Rescale, ...]
    scalars: Mapping[int, SizeAttribute]


@dataclass(frozen=True)
class Adaptation:
    """What a thinner model of the class needs.

    Attributes:
        sizes: Size attributes: numbers that modules hold, and the terms that they follow from.
        folded: Norms and means whose count is folded into weights, by the index of the call.
        overrides: Calls to override, by their index; for each, the positions of the numbers to state even where they
            do not change.
        ties: Groups that keep the same number of atoms.
        minimum: How many atoms groups must keep for the class to run.
        whole: Groups that stay whole, each with the index of the call that is the reason.
    """

    sizes: Mapping[AttributePlace, SizeAttribute] = field(default_factory=dict)
    folded: Mapping[int, Folded] = field(default_factory=dict)
    overrides: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    ties: tuple[Tie, ...] = ()
    minimum: Mapping[str, int] = field(default_factory=dict)
    whole: Mapping[str, int | None] = field(default_factory=dict)

    def with_sizes(self, sizes: Mapping[AttributePlace, SizeAttribute]) -> Adaptation:
        return replace(self, sizes={**self.sizes, **sizes})

    def with_folded(self, folded: Mapping[int, Folded], sizes: Mapping[AttributePlace, SizeAttribute]) -> Adaptation:
        return replace(self.with_sizes(sizes), folded={**self.folded, **folded})

    def with_overrides(self, overrides: Mapping[int, tuple[int, ...]]) -> Adaptation:
        return replace(self, overrides={**self.overrides, **overrides})

    def with_ties(self, ties: Iterable[Tie]) -> Adaptation:
        return replace(self, ties=merged([*self.ties, *ties]))

    def with_minimum(self, minimum: Mapping[str, int]) -> Adaptation:
        return replace(self, minimum={**self.minimum, **minimum})

    def with_whole(self, new: Mapping[str, int | None]) -> Adaptation:
        """Keep more groups whole, together with all groups tied to them."""
        whole = dict(new) | dict(self.whole)
        for tie in self.ties:
            stays = next((name for name in tie if name in whole), None)
            if stays is not None:
                whole = {**dict.fromkeys(tie, whole[stays]), **whole}
        return replace(self, whole=whole)

    def tied_to(self, names: Iterable[str]) -> set[str]:
        """The named groups and all groups tied to them."""
        found = set(names)
        for tie in self.ties:
            if found & set(tie):
                found |= set(tie)
        return found

    @property
    def scales(self) -> dict[str, list[Rescale]]:
        """How each parameter is rescaled."""
        found: dict[str, list[Rescale]] = {}
        for one in self.folded.values():
            for scale in one.scales:
                found.setdefault(scale.name, []).append(scale)
        return found

    @property
    def scalars(self) -> dict[int, SizeAttribute]:
        """Numbers among the arguments of calls that a folded count changes."""
        return {index: number for one in self.folded.values() for index, number in one.scalars.items()}

    @property
    def unfolded(self) -> Adaptation:
        """The same adaptation with calls overridden instead of their counts folded, so that no parameter changes."""
        if not self.folded:
            return self
        numbers = list(self.scalars.values())
        sizes = {place: size for place, size in self.sizes.items() if not any(size is one for one in numbers)}
        overrides = dict.fromkeys(self.folded, ()) | dict(self.overrides)
        return replace(self, folded={}, sizes=sizes, overrides=overrides)


def merged(ties: Sequence[Tie]) -> tuple[Tie, ...]:
    """Merge ties that share a group."""
    found: list[Tie] = []
    for tie in ties:
        touching = [other for other in found if set(other) & set(tie)]
        found = [other for other in found if other not in touching]
        found.append(tuple(dict.fromkeys(name for other in (*touching, tie) for name in other)))
    return tuple(sorted(found))
