"""Steps in which widths may change, and targets that they are too coarse for.

A choice never costs more than its target, and gives back what still fits. So it misses by less than the smallest step
that it took; where widths keep to multiples, that may be much.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from oto.optim.select import TOLERANCE
from oto.optim.target import Counts, Measure, Target, shown


@dataclass(frozen=True, eq=False)
class Steps:
    """What each node group keeps, and how that may change; all of shape ``(groups,)``.

    Attributes:
        counts: Atoms that are kept.
        multiples: What a kept count is a multiple of, unless nothing goes.
        finest: What it would be a multiple of if nobody asked for more.
        most: Atoms that there are.
        ties: The number of the tie of each group; those of one tie keep the same count.
    """

    counts: Counts
    multiples: Counts
    finest: Counts
    most: Counts
    ties: Counts

    def costs(self, measure: Measure, by: Counts) -> dict[int, float]:
        """What it costs if one tie keeps a step more, by its first group; steps as large as ``by``."""
        more = np.minimum(self.most, self.counts + by)
        found: dict[int, float] = {}
        for group in np.flatnonzero(more > self.counts):
            if self.ties[group] not in self.ties[list(found)]:
                after = np.where(self.ties == self.ties[group], more, self.counts)
                found[int(group)] = measure(after) - measure(self.counts)
        return found


def missed(target: Target, steps: Steps) -> tuple[int, str] | None:
    """The node group of the largest step, and what to say, if a target is missed by more than it may be.

    By 1 % of the full cost it may be missed, and by a step as it would be if nobody asked for multiples. Milliseconds
    have steps of their own.
    """
    measure, full, goal = target.measure, target.full, target.goal
    now = measure(steps.counts)
    if goal - now <= TOLERANCE * full or target.name == "target_latency_ms":
        return None
    own = steps.costs(measure, steps.finest)
    if goal - now <= max(own.values(), default=np.inf):
        return None
    ups = steps.costs(measure, steps.multiples)
    coarse = max(ups, key=lambda group: ups[group])
    above = min([full, *(now + step for step in ups.values() if now + step > goal)])
    return coarse, (
        f"{target}, but steps are coarse: {shown(now)} ({now / full:.1%}) are the nearest below it,"
        f" {shown(above)} ({above / full:.1%}) above\n"
        f"  step    {ups[coarse] / full:.1%} of the {target.unit}: {{}}\n"
        f"  to fix  ask for {target.asking(now)} or {target.asking(above)}, or for smaller multiples"
    )
