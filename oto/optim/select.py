"""Choose the atoms to remove, from scores, a measure of cost and limits. Shared by all sparse optimizers.

The choice reduces the cost to a goal and loses as little importance as possible. The thinner the layers around an atom
are, the less its removal saves. Atoms are removed in the order of their price::

    price of an atom  =  worth of its node group · score / (what the network saves without it) ^ by_cost

With ``by_cost = 1`` and scores in the unit of the loss, this is the greedy solution of a knapsack problem: the least
loss per saved cost. With ``by_cost = 0``, scores are compared directly.

The computation consists of a few sorts over all atoms at once. Sorts are stable, and among equal scores the first atom
of the first node group is chosen, so all ranks of a distributed run with the same scores choose the same atoms.

Node groups may be *tied*: they lose equally many atoms, each its least important ones. For the choice, a tie is a
single group whose atoms have the mean importance, and the mean savings, of those of its groups.

With ``divisible = d > 1``, atoms are removed from a node group in *units*: the first unit brings the kept count to a
multiple of ``d``, every further one has ``d`` atoms. A unit is as important as its most important atom.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from oto.optim.target import Counts, Measure

NEAR, REFINEMENTS = 0.005, 8
"""A choice this near to its goal, as a share of the goal, is not refined; the number of refinements of others, and of
node groups that each of them tries."""

TOLERANCE, COMBINATIONS, TRIED = 0.01, 4096, 12
"""A choice of coarse units that misses its goal by more than ``TOLERANCE``, as a share of the full cost, is improved.
If there are at most ``COMBINATIONS`` combinations of widths, all are tried; else moves between ``TRIED`` groups, half
with the largest and half with the smallest steps."""

ROUNDS = 16
"""Number of times that prices are recomputed between the start cost and the goal."""


def least_kept(size: int, min_kept: int, divisible: int) -> int:
    """Minimum number of atoms that a node group of ``size`` atoms keeps.

    >>> least_kept(10, 3, 1), least_kept(10, 3, 4), least_kept(3, 1, 4)
    (3, 4, 3)
    """
    units = -(-max(min_kept, 1) // divisible)
    return min(units * divisible, size)


@dataclass(frozen=True, eq=False)
class Units:
    """The units that may be removed. Those of a node group are removed in the order of their scores, the lowest first.

    Attributes:
        group: The node group of each unit, or the tie.
        size: Atoms of each unit, in each group of a tie.
        score: The highest score in each unit, increasing within a node group; the mean over a tie.
        price: The score times the worth of its node group; the mean over a tie.
        order: All remaining atoms, node group after node group, with increasing scores within each.
    """

    group: NDArray[np.int64]
    size: NDArray[np.int64]
    score: NDArray[np.float64]
    price: NDArray[np.float64]
    order: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        scores: NDArray[np.float64],
        left: NDArray[np.bool_],
        sizes: Counts,
        divisible: Counts,
        worth: NDArray[np.float64],
    ) -> Units:
        atoms = np.flatnonzero(left)
        group = np.repeat(np.arange(len(sizes)), sizes)[atoms]
        by_score = np.lexsort((atoms, scores[atoms], group))
        order, group = atoms[by_score], group[by_score]
        count = np.bincount(group, minlength=len(sizes))
        first = (np.cumsum(count) - count)[group]
        rank = np.arange(len(order)) - first  # number of atoms of the same group that are removed before it
        by = divisible[group]
        gone = count[group] - by * ((count[group] - rank - 1) // by)  # removed atoms of the group, including its unit
        last = np.flatnonzero(gone == rank + 1)
        begins = np.concatenate([[True], group[last][1:] != group[last][:-1]]) if len(last) else np.zeros(0, bool)
        ends = rank[last] + 1
        sized = np.where(begins, ends, ends - np.concatenate([[0], ends[:-1]]))
        score = scores[order][last].astype(np.float64)
        return cls(group[last], sized, score, score * worth[group[last]], order)

    def tied(self, ties: Counts, per: Counts) -> Units:
        """The units of ties. All groups of a tie have the same units, of ``per`` atoms per step of the tie."""
        first = np.searchsorted(self.group, np.arange(len(ties)))
        place = np.stack([ties[self.group], np.arange(len(self.group)) - first[self.group]])  # tie and position in it
        (group, _), one, number = np.unique(place, axis=1, return_index=True, return_inverse=True)
        number = number.reshape(-1)
        many = np.bincount(number, minlength=len(one))
        own = per[self.group]
        score, price = (np.bincount(number, x * own, minlength=len(one)) / many for x in (self.score, self.price))
        return Units(group, (self.size // own)[one], score, price, self.order)


@dataclass(frozen=True, eq=False)
class Limits:
    """The limits of each node group, or of each tie of ``many`` node groups. Shapes ``(groups,)``.

    Attributes:
        counts: Remaining atoms.
        sizes: Atoms, including those that were removed before.
        least: Minimum number of atoms to keep.
        many: Number of node groups; 1 without ties.
    """

    counts: Counts
    sizes: Counts
    least: Counts
    many: Counts

    @classmethod
    def of(cls, left: NDArray[np.bool_], sizes: Counts, least: Counts) -> Limits:
        """The limits of node groups without ties."""
        groups = np.arange(len(sizes))
        counts = np.bincount(np.repeat(groups, sizes)[left], minlength=len(sizes))
        return cls(counts, sizes, least, np.ones(len(sizes), dtype=np.int64))

    def tied(self, ties: Counts, per: Counts) -> Limits:
        """The limits of ties, whose groups keep ``per`` atoms per step of the tie."""
        one, numbers = np.unique(ties, return_index=True)[1], np.bincount(ties)
        counts, sizes, least = self.counts // per, self.sizes // per, -(-self.least // per)
        if (counts != counts[one][ties]).any():
            raise ValueError("groups of one tie have another number of atoms left")
        most = np.array([least[ties == tie].max() for tie in range(len(one))], dtype=np.int64)
        return Limits(counts[one], sizes[one], most, numbers)


@dataclass(frozen=True, eq=False)
class Task:
    """A choice to be made.

    Attributes:
        units: The units to choose from.
        limits: The limits of each node group or tie.
        measure: The cost as a function of counts.
        goal: The cost to reach.
        by_cost: The exponent of the cost in the price.
        may_go: Whether a unit may be removed: its group still keeps its minimum, and the cost decreases.
        lost: The importance that is lost with a unit: its score times the number of node groups in its tie.
    """

    units: Units
    limits: Limits
    measure: Measure
    goal: float
    by_cost: float
    may_go: NDArray[np.bool_]
    lost: NDArray[np.float64]

    @classmethod
    def of(cls, units: Units, limits: Limits, measure: Measure, goal: float, by_cost: float) -> Task:
        saves = measure.marginal(limits.sizes, np.ones_like(limits.sizes)) > 0
        left = limits.counts[units.group] - _running(units.size, units.group)
        may_go = (left >= limits.least[units.group]) & saves[units.group]
        return cls(units, limits, measure, goal, by_cost, may_go, units.score * limits.many[units.group])


@dataclass(eq=False)
class State:
    """The choice so far: which units are removed, and how many atoms each node group (or tie) keeps."""

    taken: NDArray[np.bool_]
    counts: Counts


def select(
    scores: NDArray[np.float64],
    left: NDArray[np.bool_],
    sizes: Counts,
    least: Counts,
    measure: Measure,
    goal: float,
    divisible: int | Counts = 1,
    by_cost: float = 1.0,
    worth: NDArray[np.float64] | None = None,
    fill: bool = True,
    ties: Counts | None = None,
    per: Counts | None = None,
) -> NDArray[np.bool_]:
    """Choose the atoms to remove, such that the cost is at most ``goal`` and as little importance as possible is lost.

    Args:
        scores: Importance of every atom, node group after node group, shape ``(N,)``; higher is kept.
        left: Which atoms remain, bool, shape ``(N,)``. The others are removed already, and are not chosen again.
        sizes: Atoms of each node group, shape ``(groups,)``; their sum is N.
        least: Minimum number of atoms of each node group, shape ``(groups,)``.
        measure: The cost as a function of the counts of node groups; or of ties, if there are any.
        goal: The cost to reach. If ``least`` does not permit that, all atoms are removed that may be.
        divisible: The kept count of a node group that loses atoms is a multiple of this; one number, or one for each.
        by_cost: How much costs count: the exponent in the price of an atom.
        worth: Factors for the scores of each node group, shape ``(groups,)``; 1 by default.
        fill: Come as near to the goal as units permit: after the last removal, return units that still fit, the most
            important first, and swap coarse units for finer ones.
        ties: The index of each node group's tie, shape ``(groups,)``. Divided by ``per``, the sizes, divisors and
            remaining counts of a tie's groups are equal, and so are the kept counts.
        per: The number of atoms of each node group in one step of its tie, shape ``(groups,)``; 1 by default.

    Returns:
        Boolean array, shape ``(N,)``: the atoms to remove.

    Example:
        >>> from oto.groups.cost import Polynomial
        >>> macs = Polynomial({(0,): 10, (0, 1): 5}, 2)  # 10 a + 5 ab
        >>> scores, sizes = np.array([3.0, 1.0, 2.0, 0.5, 0.1]), np.array([3, 2])
        >>> select(scores, np.ones(5, bool), sizes, np.array([1, 1]), macs, 40)
        array([False,  True, False, False, False])
    """
    groups = len(sizes)
    by = np.broadcast_to(np.asarray(divisible, dtype=np.int64), groups)
    units = Units.of(scores, left, sizes, by, np.ones(groups) if worth is None else worth)
    limits = Limits.of(left, sizes, least)
    if ties is not None:
        per = np.ones_like(sizes) if per is None else per
        units, limits = units.tied(ties, per), limits.tied(ties, per)
    task = Task.of(units, limits, measure, goal, by_cost)
    state = State(np.zeros(len(units.group), dtype=bool), limits.counts)
    descend(task, state)
    if fill:
        give_back(task, state)
        refine(task, state)
        if (units.size > 1).any() or (per is not None and (per > 1).any()):
            bring_nearer(task, state, TOLERANCE * measure(limits.sizes))
    gone = _sum(np.flatnonzero(state.taken), units, len(limits.sizes))
    return _lowest(units.order, sizes, gone if ties is None or per is None else gone[ties] * per)


def _lowest(order: NDArray[np.int64], sizes: Counts, gone: Counts) -> NDArray[np.bool_]:
    """The first ``gone`` atoms of each node group in an order, bool, shape ``(N,)``."""
    group = np.repeat(np.arange(len(sizes)), sizes)[order]
    first = np.searchsorted(group, np.arange(len(sizes)))
    chosen = np.zeros(int(sizes.sum()), dtype=bool)
    chosen[order[np.arange(len(order)) - first[group] < gone[group]]] = True
    return chosen


def descend(task: Task, state: State) -> None:
    """Remove units, the lowest price first, until the goal is met. Prices are recomputed ``ROUNDS`` times."""
    start = task.measure(state.counts)
    for way in range(1, ROUNDS + 1) if task.by_cost else [ROUNDS]:
        goal = task.goal if way == ROUNDS else start - (start - task.goal) * way / ROUNDS
        going = _fewest(_queue(task, state), task.units, state.counts, task.measure, goal)
        state.taken[going] = True
        state.counts = state.counts - _sum(going, task.units, len(state.counts))


def _queue(task: Task, state: State, without: int = -1) -> NDArray[np.int64]:
    """The units that may be removed next, the lowest price first, except those of the node group ``without``."""
    units, counts = task.units, state.counts
    rest = np.flatnonzero(task.may_go & ~state.taken & (units.group != without))
    price = units.price[rest]
    if task.by_cost:
        each = task.measure.marginal(counts, np.minimum(counts, 1)) / task.limits.many
        with np.errstate(over="ignore"):  # a unit that saves nothing has an infinite price
            price = price / (np.maximum(each, np.finfo(float).tiny) ** task.by_cost)[units.group[rest]]
    return rest[np.argsort(price, kind="stable")]


def refine(task: Task, state: State) -> None:
    """If units are coarse, return one of the most costly that were removed last, and remove cheaper ones instead."""
    start = task.measure(task.limits.counts)
    for _ in range(REFINEMENTS if task.by_cost else 0):
        slack = task.goal - task.measure(state.counts)
        last = _last(state.taken, task.units, len(state.counts))
        if slack <= NEAR * task.goal or (last < 0).all():
            return
        most = task.lost[state.taken].sum() * slack / (start - task.goal)  # at most the average loss per saved cost
        best = min(_swaps(task, state, last, most), key=lambda tried: tried[:2], default=None)
        if best is None or best[0] >= slack:
            return
        _, group, going, state.counts = best
        state.taken[last[group]], state.taken[going] = False, True
        give_back(task, state)


def _swaps(
    task: Task, state: State, last: NDArray[np.int64], most: float
) -> Iterator[tuple[float, int, NDArray[np.int64], Counts]]:
    """Possible swaps of the last unit of one group for others.

    Args:
        last: For each group, the unit that was removed last, or -1.
        most: How much more importance may be lost.

    Yields:
        The distance to the goal, the group whose last unit returns, the units removed instead, and the kept counts.
    """
    units, counts = task.units, state.counts
    back = np.where(last >= 0, units.size[last], 0)
    dearest = np.argsort(task.measure.marginal(counts, -back), kind="stable")[:REFINEMENTS]
    for group in dearest[last[dearest] >= 0]:
        more = counts + np.where(np.arange(len(counts)) == group, back, 0)
        going = _fewest(_queue(task, state, int(group)), units, more, task.measure, task.goal)
        after = more - _sum(going, units, len(counts))
        more_lost = float(task.lost[going].sum() - task.lost[last[group]])
        if task.measure(after) <= task.goal and more_lost <= most:
            yield task.goal - task.measure(after), int(group), going, after


def _running(sizes: NDArray[np.int64], group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Cumulative sums of ``sizes`` within each node group."""
    total = np.cumsum(sizes)
    begins = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]])) if len(group) else np.zeros(0, int)
    lengths = np.diff(np.concatenate([begins, [len(group)]]))
    running: NDArray[np.int64] = total - np.repeat(total[begins] - sizes[begins], lengths)
    return running


def _sum(queue: NDArray[np.int64], units: Units, groups: int) -> Counts:
    return np.bincount(units.group[queue], units.size[queue], minlength=groups).astype(np.int64)


def _fewest(queue: NDArray[np.int64], units: Units, counts: Counts, measure: Measure, goal: float) -> NDArray[np.int64]:
    """The fewest units from the front of a queue that reach the goal; all of them if none do."""
    few, many = 0, len(queue)
    while few < many:
        middle = (few + many) // 2
        enough = measure(counts - _sum(queue[:middle], units, len(counts))) <= goal
        few, many = (few, middle) if enough else (middle + 1, many)
    return queue[:few]


def _last(taken: NDArray[np.bool_], units: Units, groups: int) -> NDArray[np.int64]:
    """For each group, the unit that was removed last, -1 if none was."""
    last = np.full(groups, -1)
    chosen = np.flatnonzero(taken)
    last[units.group[chosen]] = chosen  # units of a group are in order, so the last one written is the last removed
    return last


def give_back(task: Task, state: State) -> None:
    """Return units, the most important first, as long as the cost does not exceed the goal."""
    units, measure = task.units, task.measure
    while state.taken.any():
        last = _last(state.taken, units, len(state.counts))
        size = np.where(last >= 0, units.size[last], 0)
        adds = -measure.marginal(state.counts, -size)
        fits = (last >= 0) & (adds <= task.goal - measure(state.counts))
        if not fits.any():
            return
        best = np.flatnonzero(fits)[np.argmax(units.score[last[fits]])]
        state.taken[last[best]] = False
        state.counts = state.counts + np.where(np.arange(len(size)) == best, size, 0)


def bring_nearer(task: Task, state: State, near: float) -> None:
    """If units are so coarse that the goal is missed, return units of one group and remove others instead.

    Among the choices within ``near`` of the goal, the one is taken that loses the least importance; if there is none,
    the one nearest to the goal.
    """
    units, groups = task.units, len(state.counts)
    many = np.bincount(units.group[task.may_go], minlength=groups) + 1
    few = float(np.prod(many.astype(np.float64))) <= COMBINATIONS
    for _ in range(1 if few else REFINEMENTS):
        slack, best = task.goal - task.measure(state.counts), None
        if slack <= near:
            return
        full = state.counts + _sum(np.flatnonzero(state.taken), units, groups)
        for going in _combinations(units, task.may_go, many) if few else _moves(task, state):
            after = full - _sum(going, units, groups)
            left = task.goal - task.measure(after)
            if 0 <= left < slack:
                rank = (max(left - near, 0.0), float(task.lost[going].sum()))
                best = min(best or (rank, going, after), (rank, going, after), key=lambda tried: tried[0])
        if best is None:
            return
        state.taken[:] = False
        state.taken[best[1]] = True
        state.counts = best[2]


def _combinations(units: Units, may_go: NDArray[np.bool_], many: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """All sets of units that can be removed."""
    own = [np.flatnonzero((units.group == i) & may_go) for i in range(len(many))]
    for numbers in product(*map(range, many.tolist())):
        yield np.concatenate([queue[:n] for queue, n in zip(own, numbers, strict=True)])


def _moves(task: Task, state: State) -> Iterator[NDArray[np.int64]]:
    """The removed units if the last units of one group return, and another group, or all others, lose the fewest units
    needed."""
    units, counts, measure, taken, may_go = task.units, state.counts, task.measure, state.taken, task.may_go
    groups = np.unique(units.group[may_go])
    largest = np.zeros_like(counts)
    np.maximum.at(largest, units.group, units.size)
    steps = measure.marginal(counts, np.minimum(counts, largest))
    by_step = groups[np.argsort(steps[groups], kind="stable")]
    some = dict.fromkeys([*by_step[: TRIED // 2].tolist(), *by_step[-TRIED // 2 :].tolist()])
    rest = np.flatnonzero(may_go & ~taken)
    rest = rest[np.argsort(units.price[rest], kind="stable")]
    for i in some:
        own, others = np.flatnonzero((units.group == i) & taken), rest[units.group[rest] != i]
        queues = [others, *(others[units.group[others] == j] for j in some if j != i)]
        for n in range(1, min(len(own), TRIED) + 1):
            more = counts + _sum(own[-n:], units, len(counts))
            without = np.setdiff1d(np.flatnonzero(taken), own[-n:])
            for queue in queues:
                yield np.concatenate([without, _fewest(queue, units, more, measure, task.goal)])
