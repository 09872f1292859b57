"""Which atoms go: scores, a measure of cost and limits -> a choice. Shared by every sparse optimizer.

The choice looks for the least importance lost that brings the cost down to a goal. An atom wins what the network
would save without it, and that falls as the layers around it get thinner. So atoms go in the order of their price::

    price of an atom  =  worth of its node group · score / (what the network saves without it) ^ by_cost

With ``by_cost = 1`` and scores in the unit of the loss this is the greedy solution of a knapsack: the least loss for the
cost won. With ``by_cost = 0`` scores are compared as they are.

Everything is a handful of sorts over all atoms at once. Sorts are stable and ties fall to the first atom of the first
node group, so every rank of a distributed run that has the same scores chooses the same atoms.

With ``divisible = d > 1`` atoms leave a node group in *units*: the first unit brings the kept count to a multiple of
``d``, every further one holds ``d`` atoms. A unit is as important as the most important atom that it holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oto.optim.target import Counts, Measure

NEAR = 0.005
"""A choice that is this near to its goal, as a share of it, is not refined."""

ROUNDS = 16
"""How often prices are set anew on the way from one cost to another."""


def least_kept(size: int, min_kept: int, divisible: int) -> int:
    """Least number of atoms that a node group of ``size`` atoms keeps.

    >>> least_kept(10, 3, 1), least_kept(10, 3, 4), least_kept(3, 1, 4)
    (3, 4, 3)
    """
    units = -(-max(min_kept, 1) // divisible)
    return min(units * divisible, size)


@dataclass(frozen=True, eq=False)
class Units:
    """What may go next, unit after unit: rising scores inside a node group, which units leave in this order.

    Attributes:
        group: The node group of each unit.
        size: Atoms of each unit.
        score: The highest score in each unit, rising inside a node group.
        order: All atoms that are left, node group after node group, rising scores inside.
    """

    group: NDArray[np.int64]
    size: NDArray[np.int64]
    score: NDArray[np.float64]
    order: NDArray[np.int64]

    @classmethod
    def of(cls, scores: NDArray[np.float64], left: NDArray[np.bool_], sizes: Counts, divisible: int) -> Units:
        atoms = np.flatnonzero(left)
        group = np.repeat(np.arange(len(sizes)), sizes)[atoms]
        by_score = np.lexsort((atoms, scores[atoms], group))
        order, group = atoms[by_score], group[by_score]
        count = np.bincount(group, minlength=len(sizes))
        first = (np.cumsum(count) - count)[group]
        rank = np.arange(len(order)) - first  # so many of the same group go before this one
        gone = count[group] - divisible * ((count[group] - rank - 1) // divisible)  # when this one's unit is gone
        last = np.flatnonzero(gone == rank + 1)
        begins = np.concatenate([[True], group[last][1:] != group[last][:-1]]) if len(last) else np.zeros(0, bool)
        ends = rank[last] + 1
        sized = np.where(begins, ends, ends - np.concatenate([[0], ends[:-1]]))
        return cls(group[last], sized, scores[order][last].astype(np.float64), order)


def select(
    scores: NDArray[np.float64],
    left: NDArray[np.bool_],
    sizes: Counts,
    least: Counts,
    measure: Measure,
    goal: float,
    divisible: int = 1,
    by_cost: float = 1.0,
    worth: NDArray[np.float64] | None = None,
) -> NDArray[np.bool_]:
    """Choose the atoms to go, so that what is left costs at most ``goal`` and as little importance as possible is lost.

    Args:
        scores: Importance of every atom, node group after node group, shape ``(N,)``; higher is kept.
        left: Which atoms are left, bool, shape ``(N,)``. The others are gone, and not chosen again.
        sizes: Atoms of each node group in the full network; their sum is N.
        least: Least number of atoms that each keeps.
        measure: The cost as a function of the counts.
        goal: The cost to come down to. If ``least`` forbids that, everything goes that may.
        divisible: The kept count of a node group that loses atoms is a multiple of this.
        by_cost: How much costs count: the exponent in the price of an atom.
        worth: What the scores of each node group are multiplied with, shape ``(groups,)``; 1 by default.

    Returns:
        Boolean array, shape ``(N,)``: the atoms that go. None is chosen without need: what still fits under the goal
        once the last unit is gone is given back, most important first.

    Example:
        >>> from oto.groups.cost import Polynomial
        >>> macs = Polynomial({(0,): 10, (0, 1): 5}, 2)  # 10 a + 5 ab
        >>> scores, sizes = np.array([3.0, 1.0, 2.0, 0.5, 0.1]), np.array([3, 2])
        >>> select(scores, np.ones(5, bool), sizes, np.array([1, 1]), macs, 40)
        array([False,  True, False, False, False])
    """
    units = Units.of(scores, left, sizes, divisible)
    full = measure.marginal(sizes, np.ones_like(sizes))
    worth = np.ones(len(sizes)) if worth is None else worth
    counts = np.bincount(np.repeat(np.arange(len(sizes)), sizes)[left], minlength=len(sizes))
    taken = np.zeros(len(units.group), dtype=bool)
    start = measure(counts)
    # a unit may go if its group keeps its least; units go in order, so the sums run inside each group
    before = _running(units.size, units.group)
    # what saves nothing is kept
    open_ = (counts[units.group] - before >= least[units.group]) & (full > 0)[units.group]
    for way in range(1, ROUNDS + 1) if by_cost else [ROUNDS]:
        now = goal if way == ROUNDS else start - (start - goal) * way / ROUNDS
        if measure(counts) <= now:
            continue
        rest = np.flatnonzero(open_ & ~taken)
        price = units.score[rest] * worth[units.group[rest]]
        if by_cost:
            saves = measure.marginal(counts, np.minimum(counts, 1))
            price = price / (np.maximum(saves, np.finfo(float).tiny) ** by_cost)[units.group[rest]]
        queue = rest[np.argsort(price, kind="stable")]
        few, many = 0, len(queue)
        while few < many:  # the fewest units whose removal is enough
            middle = (few + many) // 2
            enough = measure(counts - _sum(queue[:middle], units, len(sizes))) <= now
            few, many = (few, middle) if enough else (middle + 1, many)
        taken[queue[:few]] = True
        counts = counts - _sum(queue[:few], units, len(sizes))
    _give_back(taken, units, counts, measure, goal)
    _refine(taken, open_, units, counts, measure, goal)
    gone = np.bincount(units.group[taken], units.size[taken], minlength=len(sizes)).astype(np.int64)
    group = np.repeat(np.arange(len(sizes)), sizes)[units.order]
    first = np.searchsorted(group, np.arange(len(sizes)))
    chosen = np.zeros(len(scores), dtype=bool)
    chosen[units.order[np.arange(len(units.order)) - first[group] < gone[group]]] = True
    return chosen


def _running(sizes: NDArray[np.int64], group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums of ``sizes`` up to and with each unit, starting anew with each node group."""
    total = np.cumsum(sizes)
    begins = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]])) if len(group) else np.zeros(0, int)
    lengths = np.diff(np.concatenate([begins, [len(group)]]))
    running: NDArray[np.int64] = total - np.repeat(total[begins] - sizes[begins], lengths)
    return running


def _sum(queue: NDArray[np.int64], units: Units, groups: int) -> Counts:
    return np.bincount(units.group[queue], units.size[queue], minlength=groups).astype(np.int64)


def _refine(
    taken: NDArray[np.bool_], open_: NDArray[np.bool_], units: Units, counts: Counts, measure: Measure, goal: float
) -> None:
    """Where units are coarse: swap the dearest of the last ones for one that just meets the goal."""
    groups = np.arange(len(counts))
    for _ in range(len(counts)):
        slack = goal - measure(counts)
        if slack <= NEAR * goal or not taken.any():
            return
        chosen, free = np.flatnonzero(taken), np.flatnonzero(open_ & ~taken)
        last, following = np.full(len(counts), -1), np.full(len(counts), -1)
        last[units.group[chosen]] = chosen
        following[units.group[free[::-1]]] = free[::-1]
        back = np.where(last >= 0, units.size[last], 0)
        best: tuple[float, int, int] | None = None
        for group in groups[last >= 0]:  # this one comes back, and another goes
            more = counts + np.where(groups == group, back, 0)
            need = measure(more) - goal
            out = np.where((following >= 0) & (groups != group), units.size[following], 0)
            over = measure.marginal(more, out) - need
            over[(out == 0) | (over < 0)] = np.inf
            if len(over) and over.min() < (slack if best is None else best[0]):
                best = float(over.min()), int(group), int(over.argmin())
        if best is None:
            return
        _, group, other = best
        counts[group] += back[group]
        counts[other] -= units.size[following[other]]
        taken[last[group]], taken[following[other]] = False, True


def _give_back(taken: NDArray[np.bool_], units: Units, counts: Counts, measure: Measure, goal: float) -> None:
    """Take units back, the most important first, as long as the cost stays under the goal."""
    groups = len(counts)
    while taken.any():
        last = np.full(groups, -1)
        chosen = np.flatnonzero(taken)
        last[units.group[chosen]] = chosen  # units of a group lie in order, so the last one written is the last to go
        size = np.where(last >= 0, units.size[last], 0)
        adds = -measure.marginal(counts, -size)
        fits = (last >= 0) & (adds <= goal - measure(counts))
        if not fits.any():
            return
        best = np.flatnonzero(fits)[np.argmax(units.score[last[fits]])]
        taken[last[best]] = False
        counts[best] += size[best]
