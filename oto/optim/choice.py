"""What to give up: a target, how importance is measured, and limits. The same for every sparse optimizer.

A paper's own file says *how* chosen groups reach zero; how many there are and which is decided here, from scores
(:mod:`oto.optim.saliency`), costs (:mod:`oto.optim.target`) and limits (:mod:`oto.optim.select`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oto.errors import (
    CollapseWarning,
    NoGradientError,
    NoGradientWarning,
    NothingPrunableError,
    OptionError,
    TargetError,
    some,
    users_level,
)
from oto.groups.align import Align, multiples
from oto.groups.cost import Costs
from oto.groups.layout import atoms_per_step, settled, ties_of
from oto.groups.node_group import NodeGroup
from oto.groups.policy import MinKept, atoms_of, called, frozen_part, keep_at_least
from oto.optim.saliency import (
    CRITERIA,
    FROM_WEIGHTS,
    NORMALISE,
    OF_THE_LOSS,
    WITHIN_GROUPS,
    Entries,
    Saliency,
    Weights,
    any_gradient,
    importance,
    indistinct,
    raw_scores,
    resolve,
    shared_out,
)
from oto.optim.select import least_kept, select
from oto.optim.steps import Steps, missed
from oto.optim.target import Counts, Measure, Target

log = logging.getLogger(__name__)

FLOOR = 0.2
"""No node group falls below this share of its atoms, unless the target cannot be met otherwise."""

FAR = 0.1
"""A goal that steps would miss by more than this share of the full cost is no goal met: then groups of finer steps may
fall below the floor."""


@dataclass(frozen=True, eq=False)
class Choice:
    """Which zero-invariant groups (ZIGs) go.

    Attributes:
        groups: The prunable node groups.
        target: How much is to be left.
        criteria: Saliency criteria and how much each counts.
        normalise: What a criterion is divided by, a key of :data:`oto.optim.saliency.NORMALISE`.
        within: The criterion of weights by which the importance of a node group is shared out among its atoms, or
            ``None`` where each has its own.
        everywhere: Whether that is so in all node groups, or only in those that a convolution reads.
        by_cost: How much costs count beside scores, see :mod:`oto.optim.select`; 0 is not at all.
        scope: ``"global"``: all node groups are compared; ``"local"``: all lose the same share of their atoms.
        divisible: A node group that loses atoms keeps a multiple of this many.
        align: What the sizes of tensor dimensions are multiples of, as it was asked.
        multiples: What the kept count of each node group that loses atoms is a multiple of, for all these reasons.
        average_steps: Criteria that look at gradients are averaged over this many steps before a choice.
        least: Atoms that each node group keeps in any case.
        floor: Atoms that each keeps unless the target asks for more.
        full: Atoms that each had in the full network; ``groups`` has fewer once the model was shrunk.
    """

    groups: tuple[NodeGroup, ...]
    target: Target
    criteria: tuple[tuple[Saliency, float], ...]
    normalise: str
    within: Saliency | None
    everywhere: bool
    by_cost: float
    scope: str
    divisible: int
    align: Align
    multiples: Counts
    average_steps: int
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
        scope: str = "global",
        min_kept: MinKept | None = None,
        group_divisible: int = 1,
        align: Align | None = None,
        saliency: Weights | str | Saliency | None = None,
        normalise: str | None = None,
        within: str | Saliency | None = None,
        by_cost: float | None = None,
        average_steps: int | None = None,
    ) -> Choice:
        """Read the options that all sparse optimizers share.

        Args:
            node_groups: Node groups of the model; those that are not prunable are left alone.
            target: The keywords of :meth:`Target.of`.
            costs, latency: See :meth:`Target.of`.
            scope: ``"global"`` or ``"local"``.
            min_kept: Atoms that every node group keeps, an int; or the share of its atoms that it keeps, a float; or a
                mapping from names or globs of parameters to either. By default, and where a mapping says nothing, a
                fifth as far as the target allows.
            group_divisible: A node group that loses atoms keeps a multiple of this many *atoms*, be they channels or
                heads.
            align: A dimension of a weight that gets smaller keeps a *size* (heads times their width) that is a multiple
                of this: a number for all; a mapping from names or globs of parameters to numbers; or ``"gguf"`` (rows
                of 32), ``"gguf-k"`` (rows of 256), ``"marlin"`` (rows of 128, other dimensions of 64), ``"cuda"`` (8).
                Heads are free where their width is such a multiple already. By default 1; ``OTO`` takes 8 where the
                parameters are on a CUDA device.
            saliency: Name of a criterion, a function (see :data:`oto.optim.Saliency`), or a mapping from these to
                weights. ``"hesso"`` stands for all that HESSO does as published: its five criteria, of a single batch,
                each divided by its norm over all groups, blind to cost and to the width of a layer.
            normalise, by_cost: See the attributes. By default 1 for the cost, and no normalisation, if ``saliency`` is
                in the unit of the loss as the two Taylor terms are; else scores are divided by their means over each
                node group, and costs do not count: a magnitude per MAC empties layers that stand beside each other.
            within: Where it is given, importance is shared out in all node groups; ``"none"``: each atom has the score
                that was measured for it. By default ``"path_norm"`` in those that a convolution over images reads,
                if nothing is said about ``saliency``, and else ``"none"``.
            average_steps: See the attributes; 1 for ``saliency="hesso"``.

        Raises:
            TargetError: An option means nothing, or the target cannot be reached; or it is missed by more than 1 %
                of the full cost, because widths keep to multiples.
            OptionError: ``align`` is no positive number and no preset.
            UnknownParameterError: A glob of ``align`` or ``min_kept`` matches nothing.
            NothingPrunableError: There is a target, but no node group may lose an atom.
        """
        published, node_groups = isinstance(saliency, str) and saliency == "hesso", tuple(node_groups)
        groups = [group for group in node_groups if group.prunable and group.size]
        if min_kept is not None:  # a group that may lose nothing stays in the list, which costs are counted over
            asked_for = keep_at_least(groups, min_kept)
            groups = list(settled(g if g.prunable else replace(g, min_kept=g.size, reason=None) for g in asked_for))
        sizes = np.array([group.size for group in groups], dtype=np.int64)
        criteria = tuple(resolve(DEFAULT if saliency is None else saliency))
        comparable = all(criterion in OF_THE_LOSS for criterion, _ in criteria)
        _check(scope, group_divisible, normalise, within, by_cost, average_steps)
        align = 1 if align is None else align
        weights = None if costs is None else costs.weights
        by_name = dict(
            zip((g.name for g in node_groups), multiples(node_groups, align, weights, group_divisible), strict=True)
        )
        divisors = [by_name[group.name] for group in groups]
        named, whole = target.get("target_kept"), [group for group in node_groups if not group.prunable]
        wanted = as_named(named, groups, divisors, whole) if isinstance(named, Mapping) else None
        asked = Target.of(target, sizes, costs, latency, wanted)
        least = [least_kept(g.size, g.min_kept, d) for g, d in zip(groups, divisors, strict=True)]
        everywhere = min_kept is not None and not isinstance(min_kept, Mapping)  # a limit of the user for every group
        soft = 0.0 if published or everywhere else FLOOR
        floor = [
            least_kept(g.size, max(g.min_kept, int(np.ceil(soft * g.size))), d)
            for g, d in zip(groups, divisors, strict=True)
        ]
        if wanted is not None:  # then nothing is left to choose but which atoms
            least = floor = wanted.tolist()
        self = cls(
            tuple(groups),
            asked,
            criteria,
            normalise or ("all" if published else "none" if comparable else "mean"),
            _within(within or (WITHIN if saliency is None else "none")),
            within is not None,
            (BY_COST if comparable else 0.0) if by_cost is None else by_cost,
            scope,
            group_divisible,
            align,
            np.array(divisors, dtype=np.int64),
            (1 if published else AVERAGE_STEPS) if average_steps is None else average_steps,
            np.array(least, dtype=np.int64),
            np.array(floor, dtype=np.int64),
            sizes,
        )
        if asked.wants_less:
            coarse = any(divisor > group.divisor for divisor, group in zip(divisors, groups, strict=True))
            frozen = frozen_part(whole)
            if not groups or (self.least >= sizes).all():
                raise NothingPrunableError(
                    f"{asked}, but no node group may lose an atom\n"
                    "  to fix  oto.explain() says why"
                    + (f"; or lower min_kept={min_kept!r}" if min_kept is not None else "")
                    + (f"; or a smaller align={align!r}" if align != 1 else "")
                    + (f"; or a smaller {group_divisible=}" if group_divisible != 1 else "")
                    + (f"\n{frozen}" if frozen else "")
                )
            asked.require_reachable(self.least, sizes, frozen)
            if coarse:
                alive = torch.ones(int(sizes.sum()), dtype=torch.bool)  # what can be reached is no matter of scores
                self.require_near(~self.select(alive.float(), alive), alive.float())
        return self

    @property
    def sizes(self) -> list[int]:
        """Atoms of each node group."""
        return [group.size for group in self.groups]

    @cached_property
    def _ties(self) -> Counts | None:
        """For each node group the number of its tie; ``None`` if no two are tied."""
        ties = ties_of(self.groups)
        return ties if len(set(ties.tolist())) < len(ties) else None

    @cached_property
    def _per(self) -> Counts:
        """How many atoms each node group keeps for each that its tie counts."""
        return atoms_per_step(self.groups)

    @cached_property
    def _tied_measure(self) -> Measure:
        return self.target.measure if self._ties is None else self.target.measure.tied(self._ties, self._per)

    @property
    def averaged(self) -> list[Saliency]:
        """The criteria that look at gradients."""
        return [criterion for criterion, _ in self.criteria if criterion not in FROM_WEIGHTS]

    def scores(self, entries: Sequence[Entries], alive: Tensor, averages: Mapping[Saliency, Tensor]) -> Tensor:
        """Importance of every atom, shape ``(N,)``.

        Args:
            entries: The entries of every node group.
            alive: Whether an atom is still unpruned, bool, shape ``(N,)``.
            averages: Criteria that need not be computed, shape ``(N,)`` each.
        """
        raw = [averages[c] if c in averages else raw_scores(entries, c, alive.device) for c, _ in self.criteria]
        scores = importance(raw, [weight for _, weight in self.criteria], alive, self.sizes, self.normalise)
        if self.within is None:
            return scores
        by = raw_scores(entries, self.within, alive.device)
        shares = torch.cat(
            [torch.full((n,), self.everywhere or e.convolved) for e, n in zip(entries, self.sizes, strict=True)]
        )
        return torch.where(shares.to(alive.device), shared_out(scores, by, alive, self.sizes), scores)

    def require_gradients(
        self, entries: Sequence[Entries], alive: Tensor, averages: Mapping[Saliency, Tensor], remedy: str
    ) -> None:
        """Refuse to choose by gradients where there are none; tell of node groups that none reaches.

        Synchronises, so it belongs to steps that choose.

        Args:
            entries: The entries of every node group, with the gradients of now.
            alive: Whether an atom is still unpruned, bool, shape ``(N,)``.
            averages: All criteria that look at gradients, shape ``(N,)`` each.
            remedy: What to do where there are none at all.

        Raises:
            NoGradientError: No such criterion tells any two atoms of a node group apart, and every gradient is zero.
        """
        if not averages:
            return
        blind = indistinct(list(averages.values()), alive, self.sizes).tolist()
        if not any(blind):
            return
        several = [int(own.sum()) > 1 for own in alive.cpu().split_with_sizes(self.sizes)]
        if blind == several and not any_gradient(entries):
            raise NoGradientError(
                "every gradient of the prunable groups is zero or missing\n"
                f"  effect  {some(map(_name, averages))} cannot tell what matters, so nothing was chosen\n"
                f"  to fix  {remedy}"
            )
        names = [group.name for group, none in zip(self.groups, blind, strict=True) if none]
        warnings.warn(
            f"no gradient tells the atoms of {some(names)} apart\n"
            "  effect  all their scores are alike, so they go first, in the order of their indices\n"
            "  to fix  keep what is not trained whole (skip_patterns), freeze it before OTO(...), or choose by weights:"
            " saliency='magnitude'",
            NoGradientWarning,
            stacklevel=users_level(),
        )

    def select(self, scores: Tensor, alive: Tensor, share: float = 1.0) -> Tensor:
        """The atoms that go, bool, shape ``(N,)``, on the CPU.

        Args:
            scores: Importance of every atom, shape ``(N,)``.
            alive: Which atoms are left, bool, shape ``(N,)``.
            share: How much of the way to the target to go.
        """
        values, left = scores.double().cpu().numpy(), alive.cpu().numpy()
        sizes = np.array(self.sizes, dtype=np.int64)
        goal = self.target.after(share)
        by_cost = self.by_cost
        if self.scope == "local":
            values, by_cost = _rank(values, left, sizes, self.full), 0.0
        worth = None
        if self.normalise in WITHIN_GROUPS:  # a score of 1 is worth what an average atom of the full group costs
            worth = self.target.measure.marginal(self.full, np.ones_like(sizes)) ** by_cost
        found: list[tuple[float, Tensor]] = []
        for least in self._floors(goal):  # a lower one only where steps are too coarse to come near the goal above it
            chosen = torch.from_numpy(select(
                values, left, sizes, least, self._tied_measure, goal, self.multiples, by_cost, worth,
                self.scope != "local", self._ties, self._per,
            ))  # fmt: skip
            found.append((goal - self.target.measure(self._counts(alive.cpu() & ~chosen)), chosen))
            if 0 <= found[-1][0] <= FAR * self.target.full or self.scope == "local":
                break
        return min(found, key=lambda tried: (tried[0] < 0, abs(tried[0])))[1]

    def kept_of(
        self, model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor] | None
    ) -> dict[str, int]:
        """How many atoms of each node group the choice would leave now, if it were made in one go.

        Args:
            model: Its gradients and buffers are written to.
            batches: Batches over which criteria that look at gradients are averaged.
            loss: Takes the model and a batch, and returns the loss.

        Raises:
            NoGradientError: It has no gradient, and the choice goes by gradients.
        """
        left = self._counts(self.left_of(model, batches, loss))
        return dict(zip((group.name for group in self.groups), left.tolist(), strict=True))

    def left_of(
        self, model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor] | None
    ) -> Tensor:
        """Which atoms that is, bool, shape ``(N,)``; the same otherwise."""
        parameters = dict(model.named_parameters(remove_duplicate=False))

        def entries() -> list[Entries]:
            return [Entries.of(group, parameters) for group in self.groups]

        alive = torch.ones(sum(self.sizes), dtype=torch.bool)
        sums = [torch.zeros(len(alive)) for _ in self.averaged]
        with torch.random.fork_rng():
            for batch in batches:
                if loss is None:
                    raise OptionError(
                        "batches are given without a loss\n  to fix  pass loss=, a function of the model and a batch,"
                        " such as lambda model, batch: cross_entropy(model(batch[0]), batch[1])"
                    )
                model.zero_grad()
                loss(model, batch).backward()
                with torch.no_grad():
                    sums = [
                        s + raw_scores(entries(), c, alive.device) for s, c in zip(sums, self.averaged, strict=True)
                    ]
        with torch.no_grad():
            averages = dict(zip(self.averaged, sums, strict=True))
            remedy = "pass batches= and a loss= that has a gradient (a model is no teacher of itself)"
            self.require_gradients(entries(), alive, averages, remedy)
            scores = self.scores(entries(), alive, averages)
        left = ~self.select(scores, alive)
        self.require_near(left, scores)
        self.warn_of_collapse(left)
        return left

    def _floors(self, goal: float) -> Iterator[Counts]:
        """Floors on the way from ``floor`` to ``least``, as far as they allow for the goal, the highest first."""
        for halvings in range(8):
            between = self.least + (self.floor - self.least) // 2**halvings
            floor: Counts = np.minimum(-(-between // self.multiples) * self.multiples, self.full)
            if (between == self.least).all():
                break
            if self.target.measure(floor) <= goal:
                yield floor
        yield self.least

    def require_near(self, left: Tensor, scores: Tensor) -> None:
        """Refuse a target that widths cannot come near to, because they change in large steps.

        Args:
            left: What a choice of now leaves, bool, shape ``(N,)``.
            scores: What it was made from, shape ``(N,)``.

        Raises:
            TargetError: It is missed by more than 1 % of the full cost, because widths keep to multiples.
        """
        if text := self._missed(left, scores):
            raise TargetError(text)

    def warn_of_miss(self, left: Tensor) -> None:
        """Tell of it where training has made the choice."""
        if text := self._missed(left, torch.ones(len(left))):
            warnings.warn(text, CollapseWarning, stacklevel=users_level())

    def _missed(self, left: Tensor, scores: Tensor) -> str | None:
        if self.scope == "local":  # all groups lose the same share, so none may take the odd step alone
            return None
        ties = np.arange(len(self.groups)) if self._ties is None else self._ties
        own = np.lcm([group.divisor for group in self.groups], self._per)

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

    def _counts(self, left: Tensor) -> Counts:
        return np.array([int(own.sum()) for own in left.cpu().split_with_sizes(self.sizes)], dtype=np.int64)

    def warn_of_collapse(self, left: Tensor) -> None:
        """Name the node groups that fell below the floor because the target could not be met otherwise."""
        counts = self._counts(left).tolist()
        thin = [
            f"{group.name} ({count} of {full})"
            for group, count, floor, full in zip(self.groups, counts, self.floor, self.full, strict=True)
            if count < floor
        ]
        if thin:
            warnings.warn(
                f"{self.target} leaves less than {FLOOR:.0%} of {some(thin)}\n"
                "  effect  so thin a layer may cost more accuracy than the target suggests\n"
                "  to fix  prune less, or keep more of these with min_kept={'name or glob': share}",
                CollapseWarning,
                stacklevel=users_level(),
            )

    def describe(self) -> dict[str, Any]:
        """The options as plain values, for a checkpoint to be compared by."""
        layout: dict[str, list[int]] = {}  # for each tie how many groups it has, and the divisor of their counts
        for group in self.groups:
            if group.tie is not None or group.divisor > 1:
                many, _ = layout.get(group.tie or group.name, (0, 0))
                layout[group.tie or group.name] = [many + 1, group.divisor]
        return (
            {
                self.target.name: self.target.asked,
                "scope": self.scope,
                "group_divisible": self.divisible,
                "min_kept": [group.min_kept for group in self.groups],
                "saliency": {_name(c): weight for c, weight in self.criteria},
                "normalise": self.normalise,
                "within": None if self.within is None else [_name(self.within), self.everywhere],
                "by_cost": self.by_cost,
            }
            | ({"layout": layout} if layout else {})
            | ({} if self.align == 1 else {"align": self.multiples.tolist()})
        )


def as_named(
    kept: Mapping[str, float], groups: Sequence[NodeGroup], divisors: Sequence[int], whole: Sequence[NodeGroup] = ()
) -> Counts:
    """How many atoms each node group keeps, where that is said by names: ``target_kept``.

    Args:
        kept: Names or globs of parameters or groups, each with a number of atoms or a share of them. Shares are rounded
            up, to whole atoms and to the divisor; of several the greatest counts; what none names stays whole.
        groups, divisors: The prunable node groups, and what their kept counts are multiples of.
        whole: The other ones.

    Raises:
        TargetError: A number means nothing, is less than the group keeps anyway, or decides nothing.
        UnknownParameterError: A name or glob matches nothing.
    """
    by = {group.name: divisor for group, divisor in zip(groups, divisors, strict=True)}
    asked: dict[str, dict[str, int]] = {}  # by pattern, what each of its groups would keep
    for pattern, number in kept.items():
        if isinstance(number, int | float) and not number > 0:
            raise TargetError(f"target_kept is {number!r} for {pattern!r}; something of every group is kept")
        atoms = {g: atoms_of(number, g.size, "target_kept") for g in called(pattern, [*groups, *whole])}
        _require_so_many(pattern, number, atoms)
        asked[pattern] = {g.name: least_kept(g.size, n, by[g.name]) for g, n in atoms.items() if g.name in by}
        _require_free(pattern, [g for g, n in atoms.items() if g.name not in by and n < g.size], asked[pattern])
    own = {g.name: max((some_[g.name] for some_ in asked.values() if g.name in some_), default=g.size) for g in groups}
    shares: dict[str | None, float] = {}  # by tie
    for group in groups:
        shares[group.tie] = max(shares.get(group.tie, 0), own[group.name] / group.size)
    counts = {g.name: own[g.name] if g.tie is None else round(shares[g.tie] * g.size) for g in groups}
    _require_followed(asked, counts, groups)
    return np.array(list(counts.values()), dtype=np.int64)


def _require_so_many(pattern: str, number: float, named: Collection[NodeGroup]) -> None:
    """Refuse a number of channels for what has fewer heads, or groups of channels."""
    if isinstance(number, int) and all(group.size < number for group in named):
        group = max(named, key=lambda group: group.size)
        raise TargetError(
            f"target_kept asks {pattern!r} to keep {number}, but {group.name} has {group.size} atoms"
            + (f" ({group.factor})" if group.factor else "")
            + "\n  effect  nothing of it would go\n"
            f"  to fix  ask for a share, such as 0.5, or a number below {group.size}"
        )


def _require_free(pattern: str, held: Sequence[NodeGroup], free: Mapping[str, int]) -> None:
    if held and not free:
        raise TargetError(
            f"target_kept names {pattern!r}, and what it matches stays whole:"
            f" {held[0].name}, because {held[0].reason}\n"
            "  effect  nothing of it could go\n"
            "  to fix  leave it out; oto.explain() says what may be done about what stays whole"
        )


def _require_followed(
    asked: Mapping[str, Mapping[str, int]], counts: Mapping[str, int], groups: Sequence[NodeGroup]
) -> None:
    """Refuse what would be asked for in vain."""
    for pattern, wanted in asked.items():
        if wanted and all(counts[name] > n for name, n in wanted.items()):
            name, n = next(iter(wanted.items()))
            tie = next(group.tie for group in groups if group.name == name)
            others = [
                g.name for g in groups if tie is not None and g.tie == tie and counts[g.name] > n and g.name != name
            ]
            raise TargetError(
                f"target_kept asks {name} to keep {n} by {pattern!r}, but it would keep {counts[name]}: by another name"
                " or glob, or since it is to have as many as groups that keep more (layout)\n"
                f"  effect  {pattern!r} decides nothing\n"
                "  to fix  name what keeps less apart from what keeps more"
                + (f"; and alike all that is tied to it: {some(others)}" if others else "")
            )
    for group in groups:
        if counts[group.name] < group.min_kept:
            raise TargetError(
                f"target_kept leaves {counts[group.name]} of the {group.size} atoms of {group.name}, min_kept"
                f" {group.min_kept}\n  to fix  lower min_kept, or ask for {group.min_kept / group.size:.2g} or more"
            )


DEFAULT: Weights = {"taylor_second_order": 1.0}
"""Half the mean of ``<x, g>^2`` over many batches: how much the loss rises without the group, with the empirical
Fisher matrix in the place of the Hessian (as in Optimal Brain Damage). In the unit of the loss, so that importance in
one layer can be compared with that in another, and divided by a cost."""

WITHIN = "path_norm"
"""How the importance of a node group is shared out among its atoms. The sum over a group is measured well by a dozen
batches; that of a single atom is not, and weights say more about it. That was measured on convolutional networks; in an
encoder of sentences it is the other way round (`docs/benchmarks/rivals.md`)."""

FROM_MAGNITUDE: dict[str, Any] = {"saliency": "magnitude"}
"""The choice where there are no gradients."""

BY_COST = 1.0

AVERAGE_STEPS = 32


def _name(criterion: Saliency) -> str:
    return getattr(criterion, "__name__", type(criterion).__name__)


def _within(criterion: str | Saliency) -> Saliency | None:
    if isinstance(criterion, str):
        return None if criterion == "none" else CRITERIA[criterion]
    return criterion


def _check(
    scope: str, group_divisible: int, normalise: str | None, within: str | Saliency | None, by_cost: float | None,
    average_steps: int | None,
) -> None:  # fmt: skip
    if scope not in ("global", "local"):
        raise TargetError(f"scope is {scope!r}; it is 'global' or 'local'")
    if group_divisible < 1:
        raise TargetError(f"group_divisible is {group_divisible}; it is at least 1")
    if normalise is not None and normalise not in NORMALISE:
        raise TargetError(f"normalise is {normalise!r}; it is one of {', '.join(NORMALISE)}")
    shares = ["none", *(_name(criterion) for criterion in FROM_WEIGHTS)]
    if isinstance(within, str) and within not in shares:
        raise TargetError(f"within is {within!r}; it is one of {', '.join(shares)}, or a function of weights")
    if by_cost is not None and not by_cost >= 0:
        raise TargetError(f"by_cost is {by_cost}; it is an exponent, at least 0")
    if average_steps is not None and average_steps < 1:
        raise TargetError(f"average_steps is {average_steps}; it is at least 1, the step of the choice")


def _rank(
    values: np.ndarray[Any, Any], left: np.ndarray[Any, Any], sizes: Counts, full: Counts
) -> np.ndarray[Any, Any]:
    """For each atom the share of its full node group that is gone once it goes, in the order of the values."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((np.arange(len(values)), np.where(left, values, -np.inf), group))
    place = np.empty(len(values), dtype=np.int64)
    place[order] = np.arange(len(values)) - (np.cumsum(sizes) - sizes)[group]
    return (place + 1 + (full - sizes)[group]) / full[group]
