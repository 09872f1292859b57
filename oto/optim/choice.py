"""Choose what to remove, from a target, a measure of importance, and limits. Shared by all sparse optimizers.

    choice = Choice.of(groups, {"target_macs": 0.5}, costs=costs, min_kept=0.2)
    gone = choice.select(scores, alive)   # bool, an entry for each atom

Each paper's own file defines *how* chosen groups reach zero. How many are chosen, and which, is decided here, from
scores (:mod:`oto.optim.saliency`), costs (:mod:`oto.optim.target`) and limits (:mod:`oto.optim.select`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Unpack, cast

import numpy as np
import torch
from torch import Tensor

from oto.errors import CollapseWarning, NothingPrunableError, TargetError, some, users_level
from oto.groups.align import Align
from oto.groups.cost import Costs
from oto.groups.layout import atoms_per_step, ties_of
from oto.groups.node_group import NodeGroup
from oto.groups.policy import MinKept, held_part
from oto.optim.criteria import Criteria, published, read_criteria
from oto.optim.kept import as_named
from oto.optim.limits import FLOOR, align_of, divisors_of, least_of, least_staying, prunable, staying_of
from oto.optim.options import ChoiceOptions, names_of, refuse_unknown
from oto.optim.saliency import WITHIN_GROUPS, name_of
from oto.optim.select import select
from oto.optim.steps import Steps, missed
from oto.optim.target import Counts, Measure, Target
from oto.renamed import up_to_date

FAR = 0.1
"""If a choice stays below the goal by more than this share of the full cost, since widths change in coarse steps, node
groups with finer steps may fall below the floor."""


CHEAPER = (0.5, 1.0, 2.0, 8.0)
"""If one of several segments must stay, it is the most important one. If the target cannot be met with it, importance
is divided by cost to each of these powers in turn; the last attempt keeps the cheapest segment."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Choice(Criteria):
    """How the zero-invariant groups (ZIGs) to remove are chosen.

    Attributes:
        groups: The prunable node groups.
        target: How much may remain.
        scope: ``"global"``: all node groups are compared; ``"local"``: all lose the same share of their atoms.
        divisible: A node group that loses atoms keeps a multiple of this many.
        align: The multiples for sizes of tensor dimensions, as the user gave them.
        multiples: For each node group, the number that its kept count must be a multiple of if it loses atoms, from
            ``divisible``, ``align`` and the group's own divisor. Like the following, int64 of shape ``(groups,)``.
        least: Atoms that each node group keeps in any case.
        floor: Atoms that each node group keeps unless the target cannot be met otherwise.
        full: Atoms of each node group in the full network; ``groups`` has fewer once the model was shrunk.
        criteria, normalize, within, everywhere, by_cost, average_steps: As in :class:`oto.optim.criteria.Criteria`.
    """

    groups: tuple[NodeGroup, ...]
    target: Target
    scope: str
    divisible: int
    align: Align
    multiples: Counts
    least: Counts
    floor: Counts
    full: Counts

    @classmethod
    def of(
        cls,
        node_groups: Iterable[NodeGroup],
        target: Mapping[str, Any],
        *,
        costs: Costs | None = None,
        latency: Measure | None = None,
        **options: Unpack[ChoiceOptions],
    ) -> Choice:
        """Make a choice from the options that all sparse optimizers share.

        Args:
            node_groups: Node groups of the model; those that are not prunable are left out.
            target: The keywords of :meth:`Target.of`.
            costs, latency: See :meth:`Target.of`.
            **options: Those of :class:`oto.optim.options.ChoiceOptions`.

        Raises:
            TargetError: An option is invalid; the target cannot be reached; or it is missed by more than 1 % of the
                full cost because widths have to be multiples.
            OptionError: ``align`` is neither a positive number nor a preset; or an option is unknown.
            UnknownParameterError: A glob of ``align``, ``min_kept`` or ``target_kept`` matches nothing.
            NothingPrunableError: There is a target, but no node group may lose an atom.
        """
        refuse_unknown(options, names_of(ChoiceOptions), "Choice")
        options = cast(ChoiceOptions, up_to_date(options))
        node_groups, min_kept = tuple(node_groups), options.get("min_kept")
        groups = prunable(node_groups, min_kept)
        sizes, criteria = np.array([group.size for group in groups], dtype=np.int64), read_criteria(options)
        divisors = divisors_of(node_groups, groups, options, costs)
        whole, named = [group for group in node_groups if not group.prunable], target.get("target_kept")
        wanted = as_named(named, groups, divisors, whole) if isinstance(named, Mapping) else None
        asked = Target.of(target, sizes, costs, latency, wanted)
        # a user's limit for every group replaces our floor, and so do named counts
        soft = 0.0 if published(options) or not (min_kept is None or isinstance(min_kept, Mapping)) else FLOOR
        self = cls(
            **criteria,
            groups=groups,
            target=asked,
            scope=options.get("scope", "global"),
            divisible=options.get("group_divisible", 1),
            align=align_of(options),
            multiples=np.array(divisors, dtype=np.int64),
            least=least_of(groups, divisors) if wanted is None else wanted,
            floor=least_of(groups, divisors, soft) if wanted is None else wanted,
            full=sizes,
        )
        if asked.wants_less:
            self._require_possible(min_kept, held_part(whole))
        return self

    def _require_possible(self, min_kept: MinKept | None, held: str | None) -> None:
        """Raise an error if the target cannot be met, whatever the scores.

        Args:
            held: Lines about what stays whole because it is frozen, or because the user requested it.
        """
        if (self.least >= self.full).all():
            raise NothingPrunableError(
                f"{self.target}, but no node group may lose an atom\n"
                "  to fix  oto.explain() says why"
                + (f"; or lower min_kept={min_kept!r}" if min_kept is not None else "")
                + (f"; or a smaller align={self.align!r}" if self.align != 1 else "")
                + (f"; or a smaller group_divisible={self.divisible}" if self.divisible != 1 else "")
                + (f"\n{held}" if held else "")
            )
        self.target.require_reachable(least_staying(self.groups, self.least, self.target.measure), held)
        if any(self.multiples > [group.divisor for group in self.groups]):
            alive = torch.ones(int(self.full.sum()), dtype=torch.bool)
            self.require_near(~self.select(alive.float(), alive), alive.float())

    @property
    def sizes(self) -> list[int]:
        """Atoms of each node group."""
        return [group.size for group in self.groups]

    @cached_property
    def tied(self) -> tuple[Counts, Counts]:
        """For each node group, the index of its tie (an untied group has its own), and how many of its atoms one step
        of the tie is."""
        ties = ties_of(self.groups)
        if len(set(ties.tolist())) < len(ties):
            return ties, atoms_per_step(self.groups)
        return np.arange(len(ties)), np.ones(len(ties), dtype=np.int64)

    @property
    def has_ties(self) -> bool:
        """Whether any two node groups are tied."""
        ties, _ = self.tied
        return len(ties) > 0 and int(ties.max()) + 1 < len(ties)

    @cached_property
    def tied_measure(self) -> Measure:
        """The cost as a function of one count per tie."""
        return self.target.measure.tied(*self.tied) if self.has_ties else self.target.measure

    def lowest(self, counts: Counts) -> Counts:
        """The minimum number of atoms that each node group keeps on the way from the given counts to the goal."""
        if self.scope == "local":  # all lose the same share, so the final counts are known
            alive = torch.ones(sum(self.sizes), dtype=torch.bool)
            kept: Counts = np.minimum(self._counts(~self.select(alive.float(), alive)), counts)
            return kept
        left = np.repeat(counts > 0, self.sizes)  # a segment has one atom; the first ones of each set stay
        staying = staying_of(self.groups, np.zeros(len(left)), left)
        lowest: Counts = np.maximum(next(self._floors(self.target.goal)), staying)
        return lowest

    def select(self, scores: Tensor, alive: Tensor, share: float = 1.0) -> Tensor:
        """The atoms to remove, bool, shape ``(N,)``, on the CPU.

        Args:
            scores: Importance of every atom, shape ``(N,)``.
            alive: Which atoms remain, bool, shape ``(N,)``.
            share: The share of the total cost reduction to reach now, in (0, 1].
        """
        values, left = scores.double().cpu().numpy(), alive.cpu().numpy()
        sizes = np.array(self.sizes, dtype=np.int64)
        goal = self.target.after(share)
        by_cost = self.by_cost
        if self.scope == "local":
            values, by_cost = _rank(values, left, sizes, self.full), 0.0
        worth = None
        if self.normalize in WITHIN_GROUPS:  # a score of 1 is worth what an average atom of the full group costs
            worth = self.target.measure.marginal(self.full, np.ones_like(sizes)) ** by_cost
        found: list[tuple[float, Tensor]] = []
        for least, staying in self._limits(goal, values, left):
            chosen = torch.from_numpy(
                select(
                    values,
                    left,
                    sizes,
                    np.maximum(least, staying),
                    self.tied_measure,
                    goal,
                    self.multiples,
                    by_cost,
                    worth,
                    self.scope != "local",
                    *(self.tied if self.has_ties else (None, None)),
                )
            )
            found.append((goal - self.target.measure(self._counts(alive.cpu() & ~chosen)), chosen))
            if 0 <= found[-1][0] <= FAR * self.target.full or self.scope == "local":
                break
        return min(found, key=lambda tried: (tried[0] < 0, abs(tried[0])))[1]

    def _limits(
        self, goal: float, values: np.ndarray[Any, Any], left: np.ndarray[Any, Any]
    ) -> Iterator[tuple[Counts, Counts]]:
        """Pairs to try in turn: floors, and the segments that must stay.

        The segments are the best of each set at first, and cheaper ones if the goal cannot be met with these. Lower
        floors are only needed if widths change in steps too coarse to come near the goal with higher ones.
        """
        staying = staying_of(self.groups, values, left)
        for least in self._floors(goal):
            yield least, staying
        least, before = self.least, staying
        if not staying.any() or self.target.measure(np.maximum(least, staying)) <= goal:
            return
        saves = np.repeat(self.target.measure.marginal(self.full, np.ones_like(self.full)), self.sizes)
        for prices in (*(values / np.maximum(saves, 1e-12) ** power for power in CHEAPER), -saves):
            staying = staying_of(self.groups, prices, left)
            if (staying != before).any():
                yield least, staying
            before = staying

    def _floors(self, goal: float) -> Iterator[Counts]:
        """Floors between ``floor`` and ``least`` with which the goal can be met, the highest first."""
        for halvings in range(8):
            between = self.least + (self.floor - self.least) // 2**halvings
            floor: Counts = np.minimum(-(-between // self.multiples) * self.multiples, self.full)
            if (between == self.least).all():
                break
            if self.target.measure(floor) <= goal:
                yield floor
        yield self.least

    def require_near(self, left: Tensor, scores: Tensor) -> None:
        """Raise an error if the choice is far below the target, because widths change in large steps.

        Args:
            left: The atoms that the choice keeps, bool, shape ``(N,)``.
            scores: The scores it was made from, shape ``(N,)``.

        Raises:
            TargetError: The target is missed by more than 1 % of the full cost because widths have to be multiples.
        """
        if text := self._missed(left, scores):
            raise TargetError(text)

    def warn_of_miss(self, left: Tensor) -> None:
        """:meth:`require_near` as a warning, for a choice that is made during training."""
        if text := self._missed(left, torch.ones(len(left))):
            warnings.warn(text, CollapseWarning, stacklevel=users_level())

    def _missed(self, left: Tensor, scores: Tensor) -> str | None:
        if self.scope == "local":  # all groups lose the same share, so none may take a further step alone
            return None
        ties, per = self.tied
        own = np.lcm([group.divisor for group in self.groups], per)

        def choose(goal: float) -> float:
            other = replace(self, target=replace(self.target, goal=goal))
            return self.target.measure(self._counts(~other.select(scores, torch.ones(len(left), dtype=torch.bool))))

        found = missed(self.target, Steps(self._counts(left), self.multiples, own, self.full, ties), choose)
        if found is None:
            return None
        coarse, text = found
        return text.format(
            f"{self.groups[coarse].name} keeps multiples of {self.multiples[coarse]} of its {self.full[coarse]} atoms"
            f" (align={self.align!r}, group_divisible={self.divisible})"
        )

    def counts(self, left: Tensor) -> dict[str, int]:
        """The number of remaining atoms of each node group, by name.

        Args:
            left: The atoms that remain, bool, shape ``(N,)``.
        """
        return dict(zip((group.name for group in self.groups), self._counts(left).tolist(), strict=True))

    def costing(self, left: Tensor) -> Tensor:
        """The remaining atoms whose node group has a cost. Groups inside a removed segment have none.

        Args:
            left: The atoms that are not pruned, bool, shape ``(N,)``.
        """
        if not any(group.segment for group in self.groups):
            return left
        counts = self._counts(left)
        costs = np.repeat(self.target.measure.marginal(counts, counts) > 0, self.sizes)
        return left & torch.from_numpy(costs).to(left.device)

    def _counts(self, left: Tensor) -> Counts:
        return np.array([int(own.sum()) for own in left.cpu().split_with_sizes(self.sizes)], dtype=np.int64)

    def warn_of_collapse(self, left: Tensor) -> None:
        """Warn about node groups below the floor, as the target could not be met otherwise."""
        counts = self._counts(left).tolist()
        pruned = [
            f"{group.name} ({count} of {full})"
            for group, count, floor, full in zip(self.groups, counts, self.floor, self.full, strict=True)
            if group.size and count < floor  # a group without atoms was removed with a segment
        ]
        if pruned:
            warnings.warn(
                f"{self.target} leaves less than {FLOOR:.0%} of {some(pruned)}\n"
                "  effect  so thin a layer may cost more accuracy than the target suggests\n"
                "  to fix  prune less, or keep more of these with min_kept={'name or glob': share}",
                CollapseWarning,
                stacklevel=users_level(),
            )

    def describe(self) -> dict[str, Any]:
        """The options as plain values, to compare with those in a checkpoint."""
        layout = _layout(self.groups)
        return (
            {
                self.target.name: self.target.asked,
                "scope": self.scope,
                "group_divisible": self.divisible,
                "min_kept": [group.min_kept for group in self.groups],
                "saliency": {name_of(c): weight for c, weight in self.criteria},
                "normalize": self.normalize,
                "within": None if self.within is None else [name_of(self.within), self.everywhere],
                "by_cost": self.by_cost,
            }
            | ({"layout": layout} if layout else {})
            | ({} if self.align == 1 else {"align": self.multiples.tolist()})
        )


def _layout(groups: Iterable[NodeGroup]) -> dict[str, list[int]]:
    """For each tie, and each untied group with a divisor: the number of groups, and the divisor of their counts."""
    layout: dict[str, list[int]] = {}
    for group in groups:
        if group.tie is not None or group.divisor > 1:
            many, _ = layout.get(group.tie or group.name, (0, 0))
            layout[group.tie or group.name] = [many + 1, group.divisor]
    return layout


def _rank(
    values: np.ndarray[Any, Any], left: np.ndarray[Any, Any], sizes: Counts, full: Counts
) -> np.ndarray[Any, Any]:
    """For each atom, the share of its full node group that is removed once it and all atoms with lower values are."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    place = places(np.where(left, values, -np.inf), sizes)
    return (place + 1 + (full - sizes)[group]) / full[group]


def places(values: np.ndarray[Any, Any], sizes: Counts) -> Counts:
    """For each atom, the number of atoms in its node group with a lower value; among equal values the first is lowest.

    >>> places(np.array([3.0, 1.0, 2.0, 5.0, 5.0]), np.array([3, 2]))
    array([2, 0, 1, 0, 1])
    """
    group = np.repeat(np.arange(len(sizes)), sizes)
    place = np.empty(len(values), dtype=np.int64)
    place[np.lexsort((np.arange(len(values)), values, group))] = (
        np.arange(len(values)) - (np.cumsum(sizes) - sizes)[group]
    )
    return place
