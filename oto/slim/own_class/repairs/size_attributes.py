"""Set the attributes that may state a size: those of that value, in the module or in one around it.

Example: ``self.heads`` is 12 and the view needs 9 heads, so it is set to 9.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from oto.slim.own_class.attributes import AttributePlace, SizeAttribute
from oto.slim.own_class.candidates import Candidates
from oto.slim.own_class.situation import Proposal, Situation

_TRIES = 16
"""Most candidates for one call. The right one is among the first few; the others only have the same value."""

Key: TypeAlias = tuple[tuple[AttributePlace, int | float], ...]


def named(at: Situation) -> Iterator[Proposal]:
    """Set the attributes that the numbers of the call are known to come from, in all repeated blocks."""
    candidates = Candidates(at)
    tried: set[Key] = set()
    for siblings in at.spreads:
        for chosen in candidates.named():
            yield from _new(at, candidates.everywhere(chosen, siblings, False), tried, is_guess=False)


def proposals(at: Situation) -> Iterator[Proposal]:
    """Set attributes that may state the size that is wrong, in all repeated blocks."""
    candidates = Candidates(at)
    tried: set[Key] = set()
    for siblings in at.spreads:
        for chosen, again in candidates.others():
            yield from _new(at, candidates.everywhere(chosen, siblings, again), tried, is_guess=True)
            if len(tried) == _TRIES:
                return


def _new(
    at: Situation, made: dict[AttributePlace, SizeAttribute], tried: set[Key], is_guess: bool
) -> Iterator[Proposal]:
    """The proposal of these sizes, unless it was tried or is part of the adaptation already."""
    sizes = at.adaptation.sizes
    key = tuple(sorted(((p, at.pruned.count(s.term) * s.value) for p, s in made.items()), key=repr))
    made = {place: size for place, size in made.items() if sizes.get(place) != size}
    if made and key not in tried:
        tried.add(key)
        restates = bool(made.keys() & sizes.keys())
        yield Proposal(at.adaptation.with_sizes(made), _said(made), is_guess=is_guess, restates=restates)


def _said(made: dict[AttributePlace, SizeAttribute]) -> str:
    first, *others = made
    names = ".".join(map(str, first.key))
    if not others:
        return f"the attribute {names} of {first.module or 'the model'} states the size"
    return f"the attribute {names} of {first.module or 'the model'} and {len(others)} others state the size"
