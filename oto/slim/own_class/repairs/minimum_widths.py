"""Keep more atoms of a group, where the class fails or takes a different path at some widths.

It may divide by ``width // heads``, which is zero once there are fewer entries than heads. Or it compares two widths
and takes a different path where they happen to be equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from oto.slim.own_class.repairs.whole import met, met_by
from oto.slim.own_class.situation import Proposal, Situation
from oto.slim.own_class.trials import THIN

_PARTS = (64, 32, 16, 8, 4, 2)
"""Denominators of the fraction that a group keeps; the first that works is within a factor of two of the least one."""


def proposals(at: Situation) -> Iterator[Proposal]:
    """Keep a minimum of atoms in the groups that the call meets, the smallest first."""
    if at.divergence.failure is None and at.trial.kind not in THIN:
        return
    together, before = at.adaptation.tied_to(met(at)), at.adaptation.minimum
    groups = {name: group for name, group in at.trials.free.items() if name in together}
    for part in _PARTS:
        least = {name: max(-(-group.size // part), before.get(name, 1)) for name, group in groups.items()}
        new = {**before, **{name: n for name, n in least.items() if n > 1}}
        if new != before:
            # also tried with one more: if only some sizes work, a minimum does not help
            more: Mapping[str, int] = {name: min(n + 1, groups[name].size) for name, n in least.items()}
            first = next(iter(least))
            reason = f"{first} keeps at least {least[first]} of {groups[first].size}"
            yield Proposal(at.adaptation.with_minimum(new), reason, must_pass=True, counts=(least, more))


def another_size(at: Situation) -> Iterator[Proposal]:
    """At given counts, let a group that the call meets keep one more step of atoms, which are zero."""
    left = at.trials.at_least(at.adaptation.minimum)
    for met_here in dict.fromkeys(met_by(at, at.index)):
        together = at.adaptation.tied_to([met_here]) & left.keys()
        more = {name: len(left[name]) + at.trials.free[name].divisor for name in together}
        if all(n < at.trials.free[name].size for name, n in more.items()):
            reason = f"{met_here} keeps {more[met_here]} of {at.trials.free[met_here].size}, some of them zero"
            yield Proposal(at.adaptation.with_minimum(more), reason, must_pass=True)
