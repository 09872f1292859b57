"""The steps in which widths change, and targets for which they are too coarse.

A choice never costs more than its target, and returns what still fits. So it misses the target by less than its
smallest step. If widths have to be multiples, that may be a lot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from oto.optim.select import TOLERANCE
from oto.optim.target import Counts, Measure, Target, shown


@dataclass(frozen=True, eq=False)
class Steps:
    """What each node group keeps, and in which steps that changes; all of shape ``(groups,)``.

    Attributes:
        counts: Atoms that are kept.
        multiples: What a kept count is a multiple of, unless nothing goes.
        finest: What it would be a multiple of without requests by the user.
        most: Atoms of the group.
        ties: The number of the tie of each group; those of one tie keep the same count.
    """

    counts: Counts
    multiples: Counts
    finest: Counts
    most: Counts
    ties: Counts

    def costs(self, measure: Measure, by: Counts) -> dict[int, float]:
        """By the first group of each tie: what one more step costs, or saves if ``by`` is negative."""
        after = np.minimum(self.most, self.counts + by)
        found: dict[int, float] = {}
        for group in np.flatnonzero((after != self.counts) & (after > 0)):
            if self.ties[group] not in self.ties[list(found)]:
                other = np.where(self.ties == self.ties[group], after, self.counts)
                found[int(group)] = abs(measure(other) - measure(self.counts))
        return found


def missed(target: Target, steps: Steps, choose: Callable[[float], float]) -> tuple[int, str] | None:
    """If a target is missed by too much: the node group of the largest step, and the message.

    It may be missed by 1 % of the full cost, by the smallest step allowed, and by any step as it would be without
    requested multiples. Targets in milliseconds are not checked.

    Args:
        choose: Gives the cost that a choice for a different goal would leave.
    """
    measure, full, goal = target.measure, target.full, target.goal
    now = measure(steps.counts)
    if goal - now <= TOLERANCE * full or target.name == "target_latency_ms":
        return None
    ups, own = (steps.costs(measure, by) for by in (steps.multiples, steps.finest))
    downs = steps.costs(measure, -steps.multiples)
    if goal - now <= max(min([*ups.values(), *downs.values()]), *own.values()):
        return None
    coarse = max(ups, key=lambda group: ups[group])
    above = min([full, *(now + step for step in ups.values() if now + step > goal)])
    while goal < (nearer := choose(float(np.nextafter(above, 0)))) < above:
        above = nearer
    return coarse, (
        f"{target}, but steps are coarse: {shown(now)} ({now / full:.1%}) are the nearest below it,"
        f" {shown(above)} ({above / full:.1%}) above\n"
        f"  step    {ups[coarse] / full:.1%} of the {target.unit}: {{}}\n"
        f"  to fix  ask for {target.asking(now)} or {target.asking(above)}, or for smaller multiples"
    )
