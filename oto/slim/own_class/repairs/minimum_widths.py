"""A width with which the class does not run, or does something else: groups keep more of their atoms.

It may divide by a width over a number of heads, which is nothing once there are fewer entries than heads. Or it
compares two widths, and takes another way where they happen to be equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from oto.slim.own_class.repairs.whole import met, met_by
from oto.slim.own_class.situation import Proposal, Situation
from oto.slim.own_class.trials import THIN

_PARTS = (64, 32, 16, 8, 4, 2)
"""Parts of a group, one of which it keeps; the smallest that does is within a factor of two of what the class needs."""


def proposals(at: Situation) -> Iterator[Proposal]:
    """Groups that the call meets keep a part of their atoms, the smallest first."""
    if at.divergence.failure is None and at.trial.kind not in THIN:
        return
    together, before = at.adaptation.tied_to(met(at)), at.adaptation.minimum
    groups = {name: group for name, group in at.trials.free.items() if name in together}
    for part in _PARTS:
        least = {name: max(-(-group.size // part), before.get(name, 1)) for name, group in groups.items()}
        new = {**before, **{name: n for name, n in least.items() if n > 1}}
        if new != before:
            # with one more, too: what only some sizes suit has no least one
            more: Mapping[str, int] = {name: min(n + 1, groups[name].size) for name, n in least.items()}
            first = next(iter(least))
            reason = f"{first} keeps {least[first]} of {groups[first].size} in any case"
            yield Proposal(at.adaptation.with_minimum(new), reason, must_pass=True, counts=(least, more))


def another_size(at: Situation) -> Iterator[Proposal]:
    """At given counts, a group that the call meets keeps one step more than is left, of atoms that are zero."""
    left = at.trials.at_least(at.adaptation.minimum)
    for met_here in dict.fromkeys(met_by(at, at.index)):
        together = at.adaptation.tied_to([met_here]) & left.keys()
        more = {name: len(left[name]) + at.trials.free[name].divisor for name in together}
        if all(n < at.trials.free[name].size for name, n in more.items()):
            reason = f"{met_here} keeps {more[met_here]} of {at.trials.free[met_here].size}, some of them zero"
            yield Proposal(at.adaptation.with_minimum(more), reason, must_pass=True)
