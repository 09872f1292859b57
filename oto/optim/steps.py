"""Steps in which widths may change, and targets that they are too coarse for.

A choice never costs more than its target, and gives back what still fits. So it misses by less than the smallest step
that it took; where widths keep to multiples, that may be much.
"""

from __future__ import annotations

from collections.abc import Callable
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
        """What it costs if one tie keeps a step more (or less, where ``by`` is negative), by its first group."""
        after = np.minimum(self.most, self.counts + by)
        found: dict[int, float] = {}
        for group in np.flatnonzero((after != self.counts) & (after > 0)):
            if self.ties[group] not in self.ties[list(found)]:
                other = np.where(self.ties == self.ties[group], after, self.counts)
                found[int(group)] = abs(measure(other) - measure(self.counts))
        return found


def missed(target: Target, steps: Steps, choose: Callable[[float], float]) -> tuple[int, str] | None:
    """The node group of the largest step, and what to say, if a target is missed by more than it may be.

    By 1 % of the full cost it may be missed, by the smallest step that is allowed, and by any step as it would be if
    nobody asked for multiples. Milliseconds have steps of their own.

    Args:
        choose: What a choice for another goal would leave.
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
