"""Check whether the steps in which widths change are too coarse for a target.

A choice never costs more than its target, and keeps all that still fits. So it misses the target by less than its
smallest step. If widths must be multiples, that can be much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from oto.optim.select import TOLERANCE
from oto.optim.target import Counts, Measure, Target, shown


@dataclass(frozen=True, eq=False)
class Steps:
    """The kept count of each node group, and the steps in which it can change; all of shape ``(groups,)``.

    Attributes:
        counts: Number of kept atoms.
        multiples: The number that a kept count is a multiple of, unless all atoms are kept.
        finest: The same number without multiples that the user requested.
        most: Number of atoms in the full network.
        ties: The index of each group's tie; groups of one tie change together.
    """

    counts: Counts
    multiples: Counts
    finest: Counts
    most: Counts
    ties: Counts

    def costs(self, measure: Measure, by: Counts) -> dict[int, float]:
        """The change of the cost, without its sign, if each tie keeps ``by`` more atoms; by the first group of the tie.

        Args:
            by: The number of atoms, shape ``(groups,)``; negative for fewer.
        """
        after = np.minimum(self.most, self.counts + by)
        found: dict[int, float] = {}
        for group in np.flatnonzero((after != self.counts) & (after > 0)):
            if self.ties[group] not in self.ties[list(found)]:
                other = np.where(self.ties == self.ties[group], after, self.counts)
                found[int(group)] = abs(measure(other) - measure(self.counts))
        return found


def missed(target: Target, steps: Steps, choose: Callable[[float], float]) -> tuple[int, str] | None:
    """The node group with the largest step and a message, if a target is missed by too much; else ``None``.

    Missing it is accepted by up to 1 % of the full cost, by up to the smallest possible step, and by up to the largest
    step without requested multiples. Targets in milliseconds are not checked.

    Args:
        choose: Returns the cost that a choice for a different goal would leave.
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
