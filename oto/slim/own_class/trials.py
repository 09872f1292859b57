"""Choose which groups are thinner in each try, and by how much: an adaptation must work for any training result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from oto.axes.terms import Axis, Term, axes_of, resolve
from oto.groups import Kept, NodeGroup, Partition
from oto.nn import functional as full_count
from oto.slim.own_class.adaptation import Adaptation
from oto.slim.own_class.blocks import family
from oto.slim.pruned_shapes import PrunedShapes, pruned_shapes

_PART = 16
""":attr:`Kind.THINNEST` keeps one atom in this many of each group; with fewer a model does not learn."""
_ROW = 8
"""Row sizes must be multiples of this for a kernel of grouped products: 16 bytes of 16-bit entries."""


class Kind(Enum):
    """The kinds of tries, each described in a sentence."""

    ALL = "every group is thinner, each by a different number"
    ADAPTED_WHOLE = "groups whose sizes attributes or overrides state are whole, all others are thinner"
    SOME = "some kinds of groups are thinner, different ones in each block, and all others are whole"
    HALF = "a random half of the groups is thinner"
    THINNEST = "a sixteenth of every group is kept"
    THINNEST_AROUND = "groups whose sizes attributes or overrides state are whole, a sixteenth of all others is kept"
    GIVEN = "the counts that training left"


THIN = (Kind.THINNEST_AROUND, Kind.THINNEST)
"""The last tries. All others pass by then, so a divergence here is not a size that could be stated."""


@dataclass(frozen=True)
class Trial:
    """One choice of thinner groups; ``turn`` numbers the tries of :attr:`Kind.SOME`."""

    kind: Kind
    turn: int = 0

    @property
    def seed(self) -> int:
        return len(Kind) * self.turn + list(Kind).index(self.kind)

    def __str__(self) -> str:
        return self.kind.value


@dataclass(eq=False)
class Trials:
    """The tries for a model.

    Attributes:
        given: The atoms to keep, if known; then there is no other try.
    """

    partition: Partition
    groups: Sequence[NodeGroup]
    given: Kept | None = None
    _made: dict[object, PrunedShapes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names: dict[Axis, str] = {axis: name for name, axis in self.partition.axes.items()}
        self.free = {g.name: g for g in self.groups if g.prunable and g.size > 1}

    def of(self, adaptation: Adaptation) -> list[Trial]:
        """The tries that an adaptation has to pass, in order.

        There are fewer if no attribute is set and no call is overridden: nothing can go wrong then where whole and
        thinner groups meet.
        """
        if self.given is not None:
            return [Trial(Kind.GIVEN)]
        if not adaptation.sizes and not adaptation.overrides:
            return [Trial(kind) for kind in (Kind.ALL, Kind.HALF, Kind.THINNEST)]
        turns = [Trial(Kind.SOME, turn) for turn in range(self._turns(adaptation))]
        return [Trial(Kind.ALL), Trial(Kind.ADAPTED_WHOLE), *turns, *map(Trial, THIN)]

    def prune(self, adaptation: Adaptation, trial: Trial, counts: Mapping[str, int] | None = None) -> PrunedShapes:
        """The pruned shapes of a try; tied groups keep the same number of atoms.

        Args:
            counts: Numbers of atoms for some groups, in place of the random ones.
        """
        if self.given is not None:
            return pruned_shapes(self.partition, self.at_least(adaptation.minimum))
        stays = frozenset(self.staying(adaptation, trial))
        limits = tuple(sorted(adaptation.whole)), tuple(sorted(adaptation.minimum.items()))
        key = trial, stays, adaptation.ties, limits, tuple(sorted((counts or {}).items()))
        if key not in self._made:
            if len(self._made) > _REMEMBERED:
                self._made.clear()
            self._made[key] = pruned_shapes(self.partition, self._kept(adaptation, trial, stays, counts or {}))
        return self._made[key]

    def at_least(self, minimum: Mapping[str, int]) -> Kept:
        """The given atoms, plus zero atoms where a group would keep fewer than its minimum."""
        kept = dict(self.given or {})
        for name, least in minimum.items():
            zero = np.setdiff1d(np.arange(self.free[name].size), kept[name])
            kept[name] = np.sort(np.concatenate([kept[name], zero[: max(least - len(kept[name]), 0)]]))
        return kept

    def _kept(
        self, adaptation: Adaptation, trial: Trial, stays: Iterable[str], counts: Mapping[str, int]
    ) -> dict[str, NDArray[np.int64]]:
        leader = {name: tie[0] for tie in adaptation.ties for name in tie}
        kept: dict[str, NDArray[np.int64]] = {}
        for i, (name, group) in enumerate(self.free.items()):
            first = leader.get(name, name)
            if name in adaptation.whole or first in stays:
                continue
            if first != name and first in kept:
                kept[name] = kept[first]
                continue
            draw = np.random.default_rng((trial.seed, i))
            least = min(max(group.min_kept, adaptation.minimum.get(name, 0)), group.size)
            if name in self.in_rows and group.size > _ROW:
                step = int(np.lcm(_ROW, group.divisor))
                kept[name] = np.arange(step * draw.integers(1, max(1, (group.size - 1) // step), endpoint=True))
                continue
            atoms = _atoms(group, trial.kind, least, draw)
            if name in counts:
                atoms = -(-counts[name] // group.divisor) * group.divisor
            kept[name] = np.arange(atoms)
        return kept

    def staying(self, adaptation: Adaptation, trial: Trial) -> set[str]:
        """The groups that stay whole in a try."""
        if trial.kind is Kind.HALF:
            draw = np.random.default_rng(trial.seed)
            return {name for name in self.free if draw.random() < 0.5}
        if trial.kind in (Kind.ADAPTED_WHOLE, Kind.THINNEST_AROUND):
            return self.stated(adaptation) | self.overridden(adaptation)
        if trial.kind is Kind.SOME:
            return self.free.keys() - self._some(adaptation, trial.turn)
        return set()

    def stated(self, adaptation: Adaptation) -> set[str]:
        """Groups whose sizes are stated by attributes."""
        return self.in_terms(adaptation, (size.term for size in adaptation.sizes.values()))

    def overridden(self, adaptation: Adaptation) -> set[str]:
        """Groups whose sizes are stated by overridden calls."""
        rewrites = self.partition.found.tape.rewrites
        found = [rewrites[index] for index in adaptation.overrides if index in rewrites]
        return self.in_terms(adaptation, (term for rewrite in found for term in rewrite.terms))

    def in_terms(self, adaptation: Adaptation, terms: Iterable[Term]) -> set[str]:
        """The groups that some terms are made of, and all groups tied to them."""
        return adaptation.tied_to(
            self.names[axis] for term in terms for axis in axes_of(resolve(term)) if axis in self.names
        )

    def _families(self, adaptation: Adaptation) -> dict[str, list[str]]:
        """The groups that may get thinner, by their name without block numbers; those with stated sizes come first."""
        adapted = self.stated(adaptation) | self.overridden(adaptation)
        found: dict[str, list[str]] = {}
        for name in sorted(self.free, key=lambda name: name not in adapted):
            if name not in adaptation.whole:
                found.setdefault(family(name), []).append(name)
        return found

    def _turns(self, adaptation: Adaptation) -> int:
        """The number of tries until each kind of group was thinner while any other kind was whole, in some block."""
        families = self._families(adaptation)
        columns = 2 * max(len(families) - 1, 0).bit_length()
        blocks = max(map(len, families.values()), default=1)
        return max(min(columns, 2), -(-columns // blocks))

    def _some(self, adaptation: Adaptation, turn: int) -> set[str]:
        """The thinner groups. Kinds are numbered, and each block selects them by a different bit of that number."""
        families = list(self._families(adaptation).values())
        columns = 2 * max(len(families) - 1, 1).bit_length()
        turns = self._turns(adaptation)
        chosen: set[str] = set()
        for number, names in enumerate(families):
            for block, name in enumerate(names):
                bit, side = divmod((block * turns + turn) % columns, 2)
                if number >> bit & 1 == side:
                    chosen.add(name)
        return chosen

    def changing(self, terms: Iterable[Term], pruned: PrunedShapes) -> Iterator[str]:
        """The groups in some dimensions that get thinner."""
        for term in terms:
            for axis in axes_of(resolve(term)):
                if axis in self.names and axis in pruned.counts and pruned.counts[axis] != axis.size:
                    yield self.names[axis]

    @cached_property
    def in_rows(self) -> set[str]:
        """Groups in operands whose rows a kernel needs in multiples of 16 bytes; other widths are padded for it."""
        rewrites = self.partition.found.tape.rewrites.values()
        terms = [term for rewrite in rewrites if rewrite.op is full_count.grouped_mm for term in rewrite.terms]
        return {self.names[axis] for term in terms for axis in axes_of(resolve(term)) if axis in self.names}


_REMEMBERED = 64
"""How many pruned shapes are cached: as many as a round of tries needs. Each holds a mask for every group."""


def _atoms(group: NodeGroup, kind: Kind, least: int, draw: np.random.Generator) -> int:
    """How many atoms a group keeps: a multiple of its divisor."""
    step, size = group.divisor, group.size
    if kind in THIN:
        atoms = max(least, -(-size // _PART))
    elif kind in (Kind.ALL, Kind.SOME):  # later tries keep a single atom, which may broadcast or be squeezed away
        first = -(-max(least, 2 if size > 2 else 1) // step)
        atoms = step * int(draw.integers(first, max(first, (size - 1) // step), endpoint=True))
    else:
        atoms = int(draw.integers(least, size, endpoint=True))
    return -(-atoms // step) * step
