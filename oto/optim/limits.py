"""The limits of node groups: the minimum number of atoms, and the number that a kept count must be a multiple of.

Example: of 10 atoms with ``min_kept=3`` at least 3 are kept, and with ``align=4`` at least 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from oto.groups.align import Align, multiples
from oto.groups.cost import Costs
from oto.groups.layout import settled
from oto.groups.node_group import NodeGroup
from oto.groups.policy import MinKept, keep_at_least
from oto.optim.options import ChoiceOptions
from oto.optim.select import least_kept
from oto.optim.target import Counts

FLOOR = 0.2
"""No node group falls below this share of its atoms unless the target cannot be met otherwise."""


def prunable(node_groups: Sequence[NodeGroup], min_kept: MinKept | None) -> tuple[NodeGroup, ...]:
    """The node groups that may lose atoms, with their minimums.

    A group that may lose none only because of ``min_kept`` is included, since costs are functions of these groups.

    Raises:
        TargetError: ``min_kept`` is invalid.
        UnknownParameterError: A name in ``min_kept`` matches nothing.
    """
    groups = tuple(group for group in node_groups if group.prunable and group.size)
    if min_kept is None:
        return groups
    asked = keep_at_least(groups, min_kept)
    return tuple(settled(g if g.prunable else replace(g, min_kept=g.size, reason=None) for g in asked))


def align_of(options: ChoiceOptions) -> Align:
    """The option ``align``, 1 by default."""
    align = options.get("align")
    return 1 if align is None else align


def divisors_of(
    node_groups: Sequence[NodeGroup], groups: Sequence[NodeGroup], options: ChoiceOptions, costs: Costs | None
) -> list[int]:
    """For each of ``groups``, the number that its kept count must be a multiple of if it loses atoms.

    Args:
        node_groups: All node groups of the model.

    Raises:
        OptionError: ``align`` is invalid.
        UnknownParameterError: A name in ``align`` matches nothing.
    """
    weights = None if costs is None else costs.weights
    every = multiples(node_groups, align_of(options), weights, options.get("group_divisible", 1))
    by = {group.name: own for group, own in zip(node_groups, every, strict=True)}
    return [by[group.name] for group in groups]


def least_of(groups: Sequence[NodeGroup], divisors: Sequence[int], share: float = 0.0) -> Counts:
    """The minimum number of atoms of each node group, shape ``(groups,)``: ``min_kept``, or a share if that is more.

    Segments have no such minimum of their own; how many are kept depends on their sets (:func:`staying_of`).
    """
    least = [max(group.min_kept, int(np.ceil(share * group.size))) for group in groups]
    sized = zip(groups, least, divisors, strict=True)
    kept = [group.min_kept if group.segment else least_kept(group.size, own, by) for group, own, by in sized]
    return np.array(kept, dtype=np.int64)


def staying_of(groups: Sequence[NodeGroup], scores: NDArray[np.float64], left: NDArray[np.bool_]) -> Counts:
    """The segments that must stay, as counts, shape ``(groups,)``: the most important ones of each set.

    Args:
        scores: Importance of every atom, shape ``(N,)``.
        left: Whether an atom is left, bool, shape ``(N,)``.
    """
    sets: dict[str, list[int]] = {}
    numbers: dict[str, int] = {}
    first = np.cumsum([0, *(group.size for group in groups)])
    for i, group in enumerate(groups):
        for name, number in group.among:
            sets.setdefault(name, []).append(i)
            numbers[name] = number
    beside = _beside(groups)
    there = [group.size > 0 and bool(left[first[i]]) for i, group in enumerate(groups)]

    def worth(i: int) -> float:
        return float(sum(scores[first[j]] for j in beside[i] if there[j]))

    staying = np.zeros(len(groups), dtype=np.int64)
    for name, members in sets.items():
        members = [i for i in members if there[i]]
        for i in sorted(members, key=lambda i: (-worth(i), i))[: numbers[name]]:
            staying[beside[i]] = 1
    return staying


def _beside(groups: Sequence[NodeGroup]) -> list[list[int]]:
    """For each node group, the indices of the segments that are removed together with it, including itself."""
    ties: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        if group.segment and group.tie is not None:
            ties.setdefault(group.tie, []).append(i)
    return [ties.get(group.tie or "", [i]) if group.segment else [i] for i, group in enumerate(groups)]


def least_staying(groups: Sequence[NodeGroup], least: Counts, measure: Callable[[Counts], float]) -> Counts:
    """``least`` with the cheapest segments that must stay, shape ``(groups,)``: a lower bound of every choice.

    If several sets share segments, only the first counts, since one segment may be enough for all of them.

    Args:
        least: The minimum number of atoms of each node group; 0 for a segment.
        measure: The cost of counts.
    """
    sets: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        for name, _ in group.among:
            sets.setdefault(name, []).append(i)
    taken, apart = set[int](), set[str]()
    for name, members in sets.items():
        if taken.isdisjoint(members):
            taken.update(members)
            apart.add(name)
    if not taken:
        return least
    first, together = np.cumsum([0, *(group.size for group in groups)]), _beside(groups)
    cheap = np.zeros(first[-1])
    for i in taken:
        beside = least.copy()
        beside[together[i]] = 1
        cheap[first[i]] = -measure(beside)
    alone = [replace(g, among=tuple((name, n) for name, n in g.among if name in apart)) for g in groups]
    staying: Counts = np.maximum(least, staying_of(alone, cheap, np.ones(len(cheap), dtype=bool)))
    return staying
