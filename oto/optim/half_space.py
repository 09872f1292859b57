"""The common part of HSPG and DHSPG: a penalty on group norms, projection by half-spaces, and an exactly met target.

Let ``x`` be the entries of a group before a step, and ``x̂`` those after it. One step is::

    x̂ <- the wrapped optimizer's step from x
    x̂ <- x̂ - α λ x / ||x||                  the penalty; α is the wrapped optimizer's learning rate
    x̂ <- 0      if <x̂, x> < ε ||x||²        the step left the half-space {z : <z, x> >= ε ||x||²}

A group that is set to zero in this way stays at zero.

Neither paper limits the number of groups: every group that leaves its half-space is removed. Here a target is met
exactly, so

* penalty and projection stop at the target, and are not applied if nothing has to be removed. A node group that may
  lose no more atoms (because of a floor, a multiple, or the target) is no longer penalized. How much may still be
  removed is known at every step (:mod:`oto.optim.budget`); which groups were removed is read back from the device only
  at the beginning of a period.
* if several groups leave their half-spaces in one step, those that are furthest outside, by ``<x̂, x> / ||x||² - ε``,
  are removed first, and only as many as the target allows. Released HSPG picks them at random, and uses the wrong
  number (``n * (trial - upper)``, the excess, instead of the remaining room).
* in the last period, the groups that are still missing for the target are chosen, and shrunk to exactly zero as in
  HESSO. ``progress`` and ``history`` report how many groups were removed in which way.

The penalty is applied after the wrapped optimizer's step, so it does not enter momentum or preconditioner. A group that
is at zero without having been projected has no penalty, and no half-space to leave. Frozen parameters are not
penalized, but are set to zero with their group.

Memory: one copy of the penalized entries, in their own dtype; an entry that belongs to several groups is copied for
each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from oto.errors import OptionError, TargetError
from oto.groups.cost import Costs
from oto.groups.node_group import NodeGroup
from oto.optim.budget import Budget, rest
from oto.optim.copied import Copied, are_alike
from oto.optim.entries import Place, Rate, Rows, is_here, zero_
from oto.optim.hesso import HESSO
from oto.optim.options import HalfSpaceOptions, ProjectionOptions, besides
from oto.optim.plan import PRUNED, REDUNDANT, Plan
from oto.optim.schedule import Progress, count_steps
from oto.optim.setup import schedule_of
from oto.optim.target import Measure
from oto.optim.wrapped import Params
from oto.shards import any_sharded

PERIODS = 10
"""The default number of periods. At the start of each, the removed groups are read back from the device; in the last
one, the groups that are still missing for the target are chosen."""

KINDS = ("conv", "linear", "norm")
"""The kinds of node groups: the largest tensor that they zero has three dimensions or more, two, or one."""

Epsilon = float | Mapping[str, float]


@dataclass(eq=False)
class Penalized:
    """The penalized groups, with their values before a step.

    Attributes:
        copied: Their entries, and a copy of their values before the wrapped optimizer's step.
        rates: The learning rate of each place on this process, at this step; 0 where it is frozen.
        everywhere: The learning rates of all tensors, including those that only other processes have.
        epsilon: ε of every atom, shape ``(N,)``.
        sq, norm: ``||x_g||²`` and ``||x_g||`` before the step, shape ``(N,)``.
    """

    copied: Copied
    rates: Sequence[Rate]
    epsilon: Tensor
    everywhere: Sequence[Rate] = ()
    sq: Tensor = field(default_factory=lambda: torch.empty(0))
    norm: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def rows(self) -> Rows:
        """The entries of the groups."""
        return self.copied.rows

    def remember_(self) -> None:
        """Copy the entries before the step, and compute their norms."""
        self.sq = self.copied.remember_()
        self.norm = self.sq.sqrt()
        self.epsilon = self.epsilon.to(self.sq)

    def shrink_(self, lmbda: float | Tensor, which: Tensor) -> None:
        """Apply the penalty, ``x̂_g -= α λ_g x_g / ||x_g||``.

        Args:
            lmbda: λ: one number, or one for every atom.
            which: The atoms to penalize, bool, shape ``(N,)``.
        """
        self.copied.subtract_(self._per_norm(lmbda, which), self.rates)

    def shrink_dot_(self, lmbda: float | Tensor, which: Tensor) -> Tensor:
        """:meth:`shrink_`, then return ``<x̂_g, x_g>``, shape ``(N,)``; both in one pass over the entries."""
        return self.copied.subtract_dot_(self._per_norm(lmbda, which), self.rates)

    def _per_norm(self, lmbda: float | Tensor, which: Tensor) -> Tensor:
        return torch.where(which & (self.norm > 0), lmbda / self.norm, 0)

    def moved(self) -> tuple[Tensor, Tensor]:
        """``<x̂_g - x_g, x_g>`` and ``||x̂_g - x_g||²``, shape ``(N,)``."""
        return self.copied.moved()

    def rate(self) -> Tensor:
        """The learning rate of every group, shape ``(N,)``: the mean over its slices, weighted by ``||x||²``.

        Call it before the wrapped optimizer's step.
        """
        if are_alike(self.everywhere):  # considers all tensors, so that every process takes the same branch
            return torch.ones_like(self.norm) * self.everywhere[0]
        return self.rows.sq_norm(self.rates) / self.sq.clamp_min(torch.finfo(self.sq.dtype).tiny)


class HalfSpace(HESSO):
    """A sparse optimizer that removes groups when they leave their half-spaces; see the module docstring.

    Args:
        params, node_groups: As in :class:`HESSO`, like all options that are not named here.
        epsilon: ε of the half-spaces, in [0, 1): with 0 the fewest groups leave. A number, or one for each kind of
            group (``{"conv": 0.9, "linear": 0.0, "norm": 0.0}``); kinds that are left out have the default.
        half_space_step: The first step that projects; a float in [0, 1] is a share of ``total_steps``.
        start_pruning_step, pruning_steps, total_steps: As in :class:`HESSO`.
        pruning_periods: Number of periods, at least 2. At the beginning of each, the removed groups are read back from
            the device; in the last one, the choice removes what is still missing for the target. By default 10, or as
            many as there are pruning steps.

    Raises:
        OptionError: An option is invalid, or the wrapped optimizer has no learning rate.
        TargetError: ``half_space_step`` lies outside of pruning, or as in :class:`HESSO`.
    """

    EPSILON: float = 0.95
    fold_at_choice = False  # readers compensate in the last period, for the groups that are removed by the choice
    WAIT: int = 1  # by default, projection begins after this many quarters of the pruning steps
    WHO: str = "all groups that may go are penalized"

    _penalized: tuple[Plan, Penalized | None] | None = None
    _budget: tuple[Tensor, Budget | None] | None = None
    _went: tuple[Tensor, Rows, list[Place]] | None = None

    def __init__(
        self,
        params: Params,
        node_groups: Iterable[NodeGroup],
        *,
        costs: Costs | None = None,
        latency: Measure | None = None,
        **options: Unpack[HalfSpaceOptions],
    ) -> None:
        if "pruning_exponent" in options:
            raise OptionError(
                f"pruning_exponent has no effect on {type(self).__name__}: groups go when they leave half-spaces\n"
                "  effect  nothing was made\n  to fix  leave it out"
            )
        asked, first = schedule_of(options), options.get("half_space_step")
        if options.get("pruning_periods") is None:
            asked = replace(asked, periods=max(min(PERIODS, asked.steps), 1))
        self.epsilon = epsilons(options.get("epsilon"), self.EPSILON)
        self.half_space_step = asked.start + asked.steps * self.WAIT // 4
        if first is not None:
            self.half_space_step = count_steps("half_space_step", first, options.get("total_steps"))
        own = besides(options, ProjectionOptions) | {
            "start_pruning_step": asked.start, "pruning_steps": asked.steps, "pruning_periods": asked.periods,
        }  # fmt: skip
        super().__init__(params, node_groups, costs=costs, latency=latency, **own)
        require_sound(self)

    # The steps of the papers -----------------------------------------------------------------------------------------

    def penalized(self, t: int) -> Penalized | None:
        """The groups to penalize at step ``t``; ``None`` if there are none, or before or after the penalty."""
        if not self.choice.target.wants_less or not self.schedule.start <= t < self.last_period:
            self._penalized = self._went = None  # frees the copy of the entries
            return None
        plan = self._plan()
        if self._penalized is None or self._penalized[0] is not plan:
            former = None if self._penalized is None else self._penalized[1]
            self._penalized = (plan, self._find_penalized(None if former is None else former.copied))
        found = self._penalized[1]
        if found is not None:
            rows, groups = found.rows, self.param_groups
            found.rates, found.everywhere = rates_of(groups, rows.names), rates_of(groups, rows.tensors)
        return found

    def open(self) -> Tensor:
        """Which atoms may still be removed, bool, shape ``(N,)``."""
        alive, budget = self._may_go(), self.budget()
        return alive if budget is None else alive & budget.open(self._gone())

    def project_(self, further_out: Tensor) -> None:
        """Mark groups outside of their half-spaces as pruned, the furthest first, as many as the target allows.

        Args:
            further_out: ``<x̂_g, x_g> / ||x_g||² - ε``, shape ``(N,)``: a group below 0 has left its half-space.
        """
        going = (further_out < 0) & self._may_go()
        if is_here(going) and not going.any():
            return
        budget = self.budget()
        if budget is not None:
            going = budget.allowed(going, further_out, self._gone())
        self.atoms = torch.where(going, PRUNED, self.atoms).to(torch.uint8)

    def begin_period(self, t: int) -> None:
        """Read back which groups were removed; at the start of the last period, choose what is still missing."""
        if not self.choice.target.wants_less:
            return
        self._settle()
        if t == self.last_period:
            self._record_cost()
            self.choose_rest()
            self._settle()
            self.begin_fold()
        elif t > self.schedule.start:
            self._record_cost()

    def end_step(self, t: int) -> None:
        """Shrink the chosen groups, as HESSO does, and keep pruned groups at zero."""
        if self.choice.target.wants_less and self.schedule.starts_period(t):
            self.zero_moments_()  # otherwise momentum from earlier gradients would move the groups just read back
        if t >= self.last_period:
            if self.schedule.ends_period(t):
                self.commit()
            else:
                self.scale_redundant_(self.schedule.factor(t))
        self.zero_pruned_()
        found = None if self._penalized is None else self._penalized[1]
        if found is not None and self.atoms is not self.settled:
            self._keep_at_zero(found.rows)

    def _keep_at_zero(self, rows: Rows) -> None:
        """Zero the groups that were removed since the atoms were last read back."""
        if not is_here(self.atoms):
            rows.zero_(self._gone())
            return
        if self._went is None or self._went[0] is not self.atoms or self._went[1] is not rows:
            self._went = self.atoms, rows, rows.among(self._gone())
        zero_(self._went[2])

    def plan(self) -> str:
        """A printable text: what happens at which step, and by how much the penalty shortens a norm in total."""
        schedule, last = self.schedule, self.last_period
        if not self.choice.target.wants_less:
            return super().plan()
        rows = [
            (0, schedule.start, "ordinary steps"),
            (schedule.start, last, self.WHO),
            (self.half_space_step, last, "those that leave their half-spaces go to zero, as many as the target allows"),
            (last, schedule.end, "what is missing by then is chosen, and shrinks to zero"),
        ]
        parts = [(f"steps {first}–{end - 1}", what) for first, end, what in rows if first < end]
        width = max(len(when) for when, _ in parts)
        end = super().plan().splitlines()[-1]
        steps = [f"{when.ljust(width)}  {what}" for when, what in parts]
        return "\n".join([str(self.choice.target), *steps, self._reach(), end])

    def _reach(self) -> str:
        """A line from which a user can see whether λ suits the number of steps. Synchronizes."""
        rate, steps = float(self.param_groups[0]["lr"]), self.last_period - self.schedule.start
        taken = rate * self.least_lmbda * steps
        text = (
            f"penalty: at this learning rate ({rate:.3g}) λ = {self.least_lmbda:.3g} takes {taken:.3g} of a norm in"
            f" {steps} steps, if no gradient holds it"
        )
        parameters = self.parameters()
        if any_sharded(parameters.values()):  # a plan is printed by one process, which cannot wait for the others
            return f"{text}; norms are spread over processes"
        entries = Rows.of(self.node_groups, [None] * len(self.node_groups), parameters, device=self.atoms.device)
        return f"{text}; the median norm is {float(entries.sq_norm().sqrt().median()):.3g}"

    # The choice ------------------------------------------------------------------------------------------------------

    @property
    def last_period(self) -> int:
        """The first step of the last period."""
        return self.schedule.bounds(self.schedule.periods - 1)[0]

    def choose_rest(self) -> None:
        """Mark the groups as redundant that are still missing for the target, by the scores of the choice."""
        alive = self.atoms != PRUNED
        if rest(self.choice, torch.ones(self.num_atoms), alive).any():
            chosen = rest(self.choice, self.scores(), alive)
        else:
            chosen = torch.zeros(self.num_atoms, dtype=torch.bool)
        self.mark_redundant(chosen)

    def commit(self) -> None:
        """As in HESSO, and count these groups as removed by the choice."""
        self.param_groups[0]["oto_by_choice"] += sum(int((own == REDUNDANT).sum()) for own in self._codes())
        super().commit()
        self._settle()

    @property
    def ways(self) -> dict[str, int]:
        """The number of groups that are pruned by half-spaces, and by the choice."""
        chosen: int = self.param_groups[0]["oto_by_choice"]
        return {"by half-space": self.num_pruned - chosen, "by choice": chosen}

    @property
    def progress(self) -> Progress:
        """As in :class:`HESSO`, with the number of groups that were removed in each way."""
        return replace(super().progress, ways=self.ways)

    def _record_cost(self) -> None:
        super()._record_cost()
        self.record(**self.ways)

    @property
    def is_over_adam(self) -> bool:
        """Whether Adam or AdamW is wrapped, whose steps do not get shorter with the gradient."""
        return isinstance(self.base, torch.optim.Adam | torch.optim.AdamW)

    @property
    def default_lmbda(self) -> float:
        """The default λ."""
        return 1e-2 if self.is_over_adam else 1e-3

    @property
    def least_lmbda(self) -> float:
        """The smallest λ of a penalized group when the penalty begins."""
        raise NotImplementedError

    # State -----------------------------------------------------------------------------------------------------------

    @property
    def settled(self) -> Tensor:
        """The state of every atom when it was last read back."""
        atoms: Tensor = self.param_groups[0]["oto_settled"]
        return atoms

    def state_dict(self) -> dict[str, Any]:
        """As in :class:`HESSO`."""
        saved = super().state_dict()
        # a distributed checkpoint is loaded into these tensors in place, so the two must not share memory
        first = saved["param_groups"][0]
        first["oto_settled"] = first["oto_settled"].clone()
        return saved

    def describe_setup(self) -> dict[str, Any]:
        """As in :class:`HESSO`, with the half-spaces."""
        return super().describe_setup() | {"epsilon": self.epsilon, "half_space_step": self.half_space_step}

    def budget(self) -> Budget | None:
        """What may be removed, by the counts last read back; ``None`` if there is no limit."""
        counts: Tensor = self.param_groups[0]["oto_counts"]
        if self._budget is None or self._budget[0] is not counts:
            self._budget = counts, Budget.of(self.choice, *np.array(counts.tolist())).to(self.atoms.device)
        return self._budget[1]

    def _fill_state(self) -> None:
        super()._fill_state()
        first = self.param_groups[0]
        first.setdefault("oto_by_choice", 0)
        if "oto_settled" not in first or "oto_counts" not in first:
            self._settle()
        elif torch.equal(first["oto_settled"], first["oto_atoms"]):  # most likely one tensor when it was saved
            first["oto_settled"] = first["oto_atoms"]

    def _settle(self) -> None:
        """Read the atoms back from the device; the next steps use their current state."""
        counts = [int((own != PRUNED).sum()) for own in self._codes()]
        # for each node group: how many atoms it has, and how many of them the model has lost since by shrinking
        number = torch.tensor([counts, [0] * len(counts)], dtype=torch.int64)
        self.param_groups[0] |= {"oto_settled": self.atoms, "oto_counts": number}

    def _keep_atoms(self, left: Tensor) -> None:
        settled = self.settled[left]
        lost = [int(own.sum()) for own in (self._gone() & ~left).split_with_sizes(self.choice.sizes)]
        super()._keep_atoms(left)
        counts, before = self.param_groups[0]["oto_counts"]
        number = torch.stack([counts, before + torch.tensor(lost, device=before.device)])
        self.param_groups[0] |= {"oto_settled": settled, "oto_counts": number}

    def _may_go(self) -> Tensor:
        """Which atoms may be penalized, regardless of the target; bool, shape ``(N,)``."""
        return self.atoms != PRUNED

    def _gone(self) -> Tensor:
        """Which atoms were removed since they were last read back, bool, shape ``(N,)``."""
        return (self.atoms == PRUNED) & (self.settled != PRUNED)

    def _find_penalized(self, former: Copied | None) -> Penalized | None:
        """The groups to penalize, or ``None`` if, by the counts last read back, none may be removed.

        Args:
            former: The last copy, whose memory is reused.
        """
        rows, budget, device = self._penalized_rows(self._codes(self.settled)), self.budget(), self.atoms.device
        none = torch.zeros(self.num_atoms, dtype=torch.bool, device=device)
        if not any(map(len, rows)) or not (budget is None or budget.open(none).any()):
            return None
        whole = [None if len(own) == group.size else own for group, own in zip(self.node_groups, rows, strict=True)]
        parameters, sizes = self.parameters(), torch.tensor(self.choice.sizes)
        entries = Rows.of(self.node_groups, whole, parameters, in_blocks=True, device=device)
        own = [self.epsilon[kind] for kind in kinds_of(self.node_groups, parameters)]
        epsilon = torch.tensor(own, dtype=torch.float64).repeat_interleave(sizes)
        return Penalized(Copied(entries, former), (), epsilon)

    def _penalized_rows(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """For each node group, the indices of the atoms to penalize, by the states last read back."""
        return [(own != PRUNED).nonzero()[:, 0] for own in codes]


def require_sound(optimizer: HalfSpace) -> None:
    """Check that there is a learning rate, and that the schedule lets groups leave their half-spaces.

    Raises:
        OptionError: There is no learning rate.
        TargetError: The schedule has fewer than two periods, or ``half_space_step`` lies outside of them.
    """
    if any("lr" not in group for group in optimizer.param_groups):
        raise OptionError(
            f"{type(optimizer.base).__name__} has no learning rate (lr) in its parameter groups\n"
            "  effect  a penalty could not be counted beside its steps\n"
            "  to fix  wrap an optimizer that has one, or take oto.hesso(...)"
        )
    if not optimizer.choice.target.wants_less:
        return
    schedule, last = optimizer.schedule, optimizer.last_period
    if schedule.periods < 2:
        raise TargetError(
            f"pruning_periods is {schedule.periods}; {type(optimizer).__name__} needs 2, for the last one belongs to"
            " the choice\n  to fix  at least 2 periods and 2 pruning_steps"
        )
    if not schedule.start <= optimizer.half_space_step < last:
        raise TargetError(
            f"half_space_step is {optimizer.half_space_step}, and groups leave by half-spaces in steps"
            f" {schedule.start}–{last - 1}\n"
            "  effect  none would, and all would go by the choice, as in HESSO\n"
            "  to fix  a step among these, or longer pruning (pruning_steps)"
        )


def kinds_of(node_groups: Sequence[NodeGroup], parameters: Mapping[str, Tensor]) -> list[str]:
    """The kind of each node group, one of :data:`KINDS`."""
    most = [max((parameters[piece.parameter].dim() for piece in group.zeros), default=0) for group in node_groups]
    return [KINDS[0] if dims > 2 else KINDS[1] if dims == 2 else KINDS[2] for dims in most]


def rates_of(param_groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Rate]:
    """The current learning rate of each of these parameters; 0 if it is frozen."""
    rates: dict[str, Rate] = {}
    for group in param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            rates[name] = group["lr"] if p.requires_grad else 0.0
    return [rates[name] for name in names]


def epsilons(asked: Epsilon | None, default: float) -> dict[str, float]:
    """ε for each kind of group.

    Raises:
        OptionError: A number lies outside of [0, 1), or a kind is unknown.
    """
    own = dict(asked) if isinstance(asked, Mapping) else {} if asked is None else dict.fromkeys(KINDS, asked)
    unknown = [kind for kind in own if kind not in KINDS]
    if unknown or not all(0 <= number < 1 for number in own.values()):
        raise OptionError(
            f"epsilon is {asked!r}; it is a number in [0, 1), or one for some of {', '.join(KINDS)}\n"
            "  effect  nothing was made\n  to fix  such as epsilon=0.95, or epsilon={'linear': 0.0}"
        )
    return {kind: float(own.get(kind, default)) for kind in KINDS}
