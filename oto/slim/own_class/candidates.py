"""Find attributes that may state the wrong size in a call, likeliest first."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from torch import nn

from oto.axes.terms import Term, resolve, size_of
from oto.slim.own_class.attributes import AttributePlace, SizeAttribute, changed
from oto.slim.own_class.blocks import ancestors, moved
from oto.slim.own_class.layers import stock
from oto.slim.own_class.rescale import sizes_in
from oto.slim.own_class.situation import Situation

_NEAR = (0, 1, 2, 3, -1, -2)
"""Offsets of the nearby calls whose tensors are examined: with a wrong size, the class may have skipped a call."""
_PER_SIZE = 3
"""How many attributes are combined for each size of a call; further ones have the same value by chance."""
_SIZES = 3
"""How many sizes of a call have their attributes combined: a view of heads states two, or three with the width."""
_OF_A_KIND = 8
"""The limit on candidates of each less likely kind, so that all of them together take only a few runs."""


@dataclass(frozen=True)
class StatedSize:
    """The ``nth`` size among the arguments of a call, or the factors ``begin:end`` of it."""

    nth: int
    begin: int | None = None
    end: int | None = None

    def part(self, begin: int, end: int) -> StatedSize:
        return StatedSize(self.nth, begin, end)


@dataclass(frozen=True)
class TensorDim:
    """``width`` adjacent dimensions, or one factor of one, of the ``nth`` tensor of the call ``back`` calls earlier."""

    back: int
    nth: int
    dim: int
    width: int
    factor: int | None = None


Label: TypeAlias = StatedSize | TensorDim
"""Identifies a size of a call, so that it can be found at the same call in other blocks."""
Choice: TypeAlias = tuple[AttributePlace, Label]


def term_of(situation: Situation, index: int, label: Label) -> Term | None:
    """The term that a label denotes at a call; ``None`` if the call has no such size."""
    if isinstance(label, StatedSize):
        rewrite = situation.rewrite_of(index)
        sizes = [x.term for x in sizes_in((rewrite.args, dict(rewrite.kwargs)))] if rewrite else []
        term = sizes[label.nth] if label.nth < len(sizes) else None
        return resolve(term)[label.begin : label.end] if term is not None and label.end is not None else term
    nodes = situation.bench.graph.nodes
    if not 0 <= index - label.back < len(nodes):
        return None
    node = nodes[index - label.back]
    values = [*node.inputs(), *(v for v in node.outputs if v is not None)]
    operands = situation.bench.partition.found.operands
    terms = operands[values[label.nth]].terms if label.nth < len(values) else ()
    adjacent = terms[label.dim : label.dim + label.width]
    if len(adjacent) != label.width:
        return None
    if label.factor is None:
        return tuple(f for t in adjacent for f in t)
    factors = resolve(adjacent[0])
    return factors[label.factor : label.factor + 1] if label.factor < len(factors) else None


@dataclass(frozen=True, eq=False)
class Candidates:
    """The attributes that may state the wrong size in a call."""

    at: Situation

    def named(self) -> Iterator[Sequence[Choice]]:
        """The attributes that the call's numbers are known to come from, each with the size that it states."""
        named = set().union(*self.at.bench.calls.stating(self.at.index).values()) - self.at.adaptation.sizes.keys()
        if not named:
            return
        direct = [[c for c in self.places(*sized, True) if c[0] in named][:1] for sized in self.stated]
        if any(direct):
            yield [choice for option in direct for choice in option]
        for sized in self.stated:
            yield from (pair for pair in self._factors_of(*sized) if {place for place, _ in pair} <= named)
            yield from ([choice] for choice in self.places(*sized, True, True) if choice[0] in named)
        yield from ([choice] for sized in self._near for choice in self.places(*sized, True) if choice[0] in named)

    def others(self) -> Iterator[tuple[Sequence[Choice], bool]]:
        """Attributes with the right value to set together, and whether attributes already set may change too."""
        for chosen in (*self._combined(), *self._single(), *self._factors(), *self._parts()):
            yield chosen, False
        for chosen in self._anew():
            yield chosen, True

    # --- where, and of what size --------------------------------------------------------------------------------------

    @cached_property
    def paths(self) -> list[str]:
        """The calling module, and the modules whose code was running when an exception was raised."""
        failure, near = self.at.divergence.failure, self.at.node.module
        found = [near]
        for frame, _ in reversed(list(traceback.walk_tb(failure.__traceback__))) if failure is not None else ():
            me = frame.f_locals.get("self")
            if isinstance(me, nn.Module) and stock(me) is None:
                alike = [path for path, module in self.at.bench.modules.items() if type(module) is type(me)]
                found += sorted(alike, key=lambda path: -len(set(ancestors(path)) & set(ancestors(near))))[:1]
        return list(dict.fromkeys(found))[:3]

    @cached_property
    def stated(self) -> list[tuple[Label, Term]]:
        """The sizes among the call's arguments that get smaller."""
        rewrite = self.at.rewrite
        terms = [x.term for x in sizes_in((rewrite.args, dict(rewrite.kwargs)))] if rewrite else []
        return [(StatedSize(i), term) for i, term in enumerate(terms) if changed(term, self.at.pruned)]

    @cached_property
    def dims(self) -> list[tuple[Label, Term]]:
        """The sizes of tensors of nearby calls, products of two adjacent sizes, and their factors."""
        found: list[tuple[Label, Term]] = []
        factors: list[tuple[Label, Term]] = []
        nodes, operands = self.at.bench.graph.nodes, self.at.bench.partition.found.operands
        for back in _NEAR:
            if not 0 <= self.at.index - back < len(nodes):
                continue
            node = nodes[self.at.index - back]
            for i, value in enumerate([*node.inputs(), *(v for v in node.outputs if v is not None)]):
                terms = operands[value].terms
                for width in (1, 2):
                    for d in range(len(terms) - width + 1):
                        found.append((TensorDim(back, i, d, width), tuple(f for t in terms[d : d + width] for f in t)))
                for d, whole in enumerate(map(resolve, terms)):
                    made = [(TensorDim(back, i, d, 1, f), whole[f : f + 1]) for f in range(len(whole))]
                    factors += made if len(made) > 1 else []
        return found + factors

    def places(self, label: Label, term: Term, far: bool, part: bool = False) -> list[Choice]:
        """Attributes whose value is the size of a term or, with ``part``, a divisor of it that stays a whole number.

        Args:
            far: Include attributes of enclosing modules.
        """
        size, now = size_of(term), self.at.pruned.count(term)
        found = [
            (AttributePlace(holder, key), value)
            for path in self.paths
            for holder in (ancestors(path) if far else [path])
            for key, value in self.at.bench.numbers(holder)
            if isinstance(value, int) and value > 1
        ]
        fits = [
            place
            for place, value in found
            if (value < size and size % value == 0 and value * now % size == 0 if part else value == size)
        ]
        return [(place, label) for place in fits]

    # --- kinds of candidates ------------------------------------------------------------------------------------------

    @property
    def _near(self) -> list[tuple[Label, Term]]:
        return [(label, term) for label, term in self.dims if changed(term, self.at.pruned)]

    def _combined(self) -> Sequence[Sequence[Choice]]:
        """An attribute of the module for each size that the call states, or for a subset of them."""
        options = [[None, *self.places(label, term, False)][: 1 + _PER_SIZE] for label, term in self.stated[:_SIZES]]
        combined = [[o for o in c if o is not None] for c in itertools.product(*options) if any(c)]
        return sorted(combined, key=lambda chosen: -len(chosen))

    def _single(self) -> Sequence[Sequence[Choice]]:
        """One attribute of the module, of what it holds, or of an enclosing module, for any nearby size; each once."""
        found: dict[tuple[AttributePlace, Term], Sequence[Choice]] = {}
        for far in (False, True):
            for label, term in (*self.stated, *self._near):
                for place, _ in self.places(label, term, far):
                    found.setdefault((place, resolve(term)), [(place, label)])
        own = sorted(found.values(), key=self._is_held_inside)
        return own[:_OF_A_KIND]

    def _is_held_inside(self, chosen: Sequence[Choice]) -> bool:
        """Whether an attribute is in an object that the module holds, such as a config, or in an enclosing module."""
        ((place, _),) = chosen
        return len(place.key) > 1 or place.module not in self.paths

    def _factors(self) -> Sequence[Sequence[Choice]]:
        """Pairs of attributes whose product is a size that the call states."""
        return [c for label, term in self.stated[:_SIZES] for c in self._factors_of(label, term)][:_OF_A_KIND]

    def _factors_of(self, label: Label, term: Term) -> Iterator[Sequence[Choice]]:
        whole = resolve(term)
        assert isinstance(label, StatedSize)
        for at in range(1, len(whole)):
            sides = [(label.part(a, b), whole[a:b]) for a, b in ((0, at), (at, len(whole)))]
            gone = [side for side in sides if changed(side[1], self.at.pruned)]
            yield from itertools.product(*(self.places(*side, False)[:_PER_SIZE] for side in gone))

    def _parts(self) -> Sequence[Sequence[Choice]]:
        """Attributes that divide a size of the call."""
        return [[o] for label, term in self.stated for o in self.places(label, term, False, True)][:_OF_A_KIND]

    def _anew(self) -> Iterator[Sequence[Choice]]:
        """Attributes already set, with another term of the same full size: the first may have matched by chance."""
        sizes = self.at.adaptation.sizes
        mine = sorted((place for place in sizes if place.module in self.paths), key=repr)
        for label, term in self.dims:
            for place in mine:
                if size_of(term) == sizes[place].value and sizes[place].term != term:
                    yield [(place, label)]

    # --- in all blocks ------------------------------------------------------------------------------------------------

    def everywhere(
        self, chosen: Sequence[Choice], siblings: Sequence[int], again: bool
    ) -> dict[AttributePlace, SizeAttribute]:
        """The same attributes in all repeated blocks; attributes already set change only with ``again``."""
        made: dict[AttributePlace, SizeAttribute] = {}
        index, home, modules = self.at.index, self.at.node.module, self.at.bench.modules
        for place, label in chosen:
            here, value = term_of(self.at, index, label), self.at.held(place.module)[place.key]
            assert here is not None
            made[place] = SizeAttribute(here, value)
            for sibling in siblings:
                there = moved(place.module, home, self.at.bench.graph.nodes[sibling].module)
                term = term_of(self.at, sibling, label)
                if sibling == index or there is None or there not in modules or term is None:
                    continue
                other = AttributePlace(there, place.key)
                held = self.at.held(there).get(place.key)
                alike = held is not None and held * size_of(here) == value * size_of(term)
                if (
                    held is not None
                    and alike
                    and other not in made
                    and (again or other not in self.at.adaptation.sizes)
                ):
                    made[other] = SizeAttribute(term, held)
        return made
