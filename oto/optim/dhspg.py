"""DHSPG: dual half-space projected gradient (OTOv2, ICLR 2023, arXiv 2303.06862, section 4, algorithm 2).

At ``partition_step``, the zero-invariant groups (ZIGs) to remove are separated, once, from those that stay. Only the
former are penalized, each with its own λ, and projected when they leave their half-spaces::

    at partition_step:   G_p <- the groups to remove, G_np <- the others
    every step:          x̂ = x - α G                           for all groups; G is the wrapped optimizer's direction
    for g in G_p, from partition_step until the target is met:
        λ_g = λ
        if <x_g, G_g> < 0 and t >= warm_up_steps:              the step makes ||x_g|| grow
            lo = -<x_g, G_g> / ||x_g||                         the lowest λ for which it shrinks, to first order
            hi = -||G_g||² ||x_g|| / <x_g, G_g>                the highest for which f still decreases, to first order
            λ_g = min(max(amplify · lo, λ), coeff · λ),        but (lo + hi) / 2 if that reaches hi
        x̂_g -= α λ_g x_g / ||x_g||
        x̂_g <- 0   if t >= half_space_step and <x̂_g, x_g> < ε ||x_g||²
    groups at zero stay there

``lo <= hi`` is the Cauchy–Schwarz inequality, ``<x, G>² <= ||x||² ||G||²``.

Where we differ from the released code, and why:

* G_p is chosen by :mod:`oto.optim.choice` for the target, in any unit, from averages over many batches. The published
  score uses one batch: the cosine between ``x`` and the gradient, and the inverse of the mean magnitude.
  ``dhspg(saliency="dhspg", target_group_sparsity=...)`` chooses by it. In that case G_p exceeds the target by
  ``tolerance_group_sparsity``, and the groups that leave their half-spaces first are removed. Otherwise G_p is exactly
  what the target requires, and there is no tolerance.
* The target is met exactly, see :mod:`oto.optim.half_space`. Released code stops once the target is passed.
* G is the wrapped optimizer's update: ``(x - x̂) / α``. With AdamW this includes its weight decay, which released code
  leaves out of the angle. ``saliency="dhspg"`` uses the angle of the plain gradient.
* If the slices of a group have different learning rates, α is their mean, weighted by ``||x||²``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor

from oto.errors import OptionError
from oto.groups.cost import Costs
from oto.groups.node_group import NodeGroup
from oto.optim.budget import Budget, rest
from oto.optim.choice import Choice
from oto.optim.half_space import HalfSpace
from oto.optim.options import DHSPGOptions, PartitionOptions, besides
from oto.optim.plan import PRUNED, REDUNDANT, rows_of
from oto.optim.schedule import START, count_steps
from oto.optim.target import Measure
from oto.optim.wrapped import Params

TOLERANCE = 0.05
"""The default share of all groups by which G_p exceeds the target, if it is chosen as published."""


class DHSPG(HalfSpace):
    """Penalize the groups to remove, and project those that leave their half-spaces; see the module docstring.

    With ``target_macs=1.0`` every step is, bit for bit, that of the wrapped optimizer.

    Args:
        params: As in :class:`HESSO`, like all options that are not named here. ``saliency="dhspg"`` chooses as
            published.
        node_groups: Node groups of the model.
        lmbda: The lowest λ; by default 1e-3, and 1e-2 over Adam and AdamW.
        lmbda_amplify: Factor by which λ exceeds the lowest value for which a group shrinks; by default 2, and 20 over
            Adam and AdamW.
        hat_lmbda_coeff: The highest λ, in multiples of ``lmbda``; by default 10, and 1000 over Adam and AdamW.
        epsilon: ε of the half-spaces, in [0, 1); 0.95 by default. A number, or one for each kind of group.
        partition_step: The step at which the groups are separated; the original's name for ``start_pruning_step``.
        half_space_step: The first step that projects; by default that of the partition.
        warm_up_steps: Before this step, every λ is the lowest one; 0 by default.
        tolerance_group_sparsity: Only with ``saliency="dhspg"``: the share of all groups by which G_p exceeds the
            target; by default 0.05.
        start_pruning_step: The step at which the groups are separated and the penalty begins.
        pruning_steps: Number of steps over which groups are removed.
        pruning_periods: Number of periods, by default 10. At the beginning of each, the removed groups are read back
            from the device; in the last one, the choice removes what is still missing for the target.
        total_steps: As in :class:`HESSO`. Any number of steps may be a float in [0, 1], a share of these.

    Raises:
        OptionError: An option is invalid or has no effect, or the wrapped optimizer has no learning rate.
        TargetError: ``half_space_step`` lies outside of pruning, or as in :class:`HESSO`.
    """

    def __init__(
        self,
        params: Params,
        node_groups: Iterable[NodeGroup],
        *,
        costs: Costs | None = None,
        latency: Measure | None = None,
        **options: Unpack[DHSPGOptions],
    ) -> None:
        starts = [
            step for step in (options.get("partition_step"), options.get("start_pruning_step")) if step is not None
        ]
        if len(starts) > 1:
            raise OptionError(
                "partition_step and start_pruning_step are the same\n"
                "  effect  nothing was made\n  to fix  give one of them"
            )
        self.published = options.get("saliency") == "dhspg"
        self.asked_penalty = options.get("lmbda"), options.get("lmbda_amplify"), options.get("hat_lmbda_coeff")
        tolerance, warm_up = options.get("tolerance_group_sparsity"), options.get("warm_up_steps")
        self._check(*self.asked_penalty, tolerance)
        self.tolerance = tolerance if tolerance is not None else TOLERANCE if self.published else 0.0
        total = options.get("total_steps")
        self.warm_up_steps = 0 if warm_up is None else count_steps("warm_up_steps", warm_up, total)
        own = besides(options, PartitionOptions) | {"start_pruning_step": starts[0] if starts else START}
        super().__init__(params, node_groups, costs=costs, latency=latency, **own)

    def _check(self, lmbda: float | None, amplify: float | None, coeff: float | None, tolerance: float | None) -> None:
        low = lmbda is not None and not lmbda >= 0
        if low or any(number is not None and not number >= 1 for number in (amplify, coeff)):
            raise OptionError(
                f"lmbda={lmbda}, lmbda_amplify={amplify}, hat_lmbda_coeff={coeff}: a penalty is not negative, and the"
                " others are at least 1\n  effect  nothing was made\n  to fix  leave them out"
            )
        if tolerance is not None and not self.published:
            raise OptionError(
                f"tolerance_group_sparsity={tolerance} has no effect: the choice says exactly what goes\n"
                "  effect  nothing was made\n  to fix  leave it out, or choose as published: saliency='dhspg'"
            )
        if tolerance is not None and not 0 <= tolerance < 1:
            raise OptionError(
                f"tolerance_group_sparsity is {tolerance}; it is a share of groups, in [0, 1)\n  to fix  such as 0.05"
            )

    WAIT = 0
    WHO = "the groups to go are chosen at the first of them, and penalized from then on"

    @property
    def least_lmbda(self) -> float:
        """The lowest λ."""
        return self.penalty[0]

    @property
    def penalty(self) -> tuple[float, float, float]:
        """The values of ``lmbda``, ``lmbda_amplify`` and ``hat_lmbda_coeff``, with their defaults."""
        defaults = (self.default_lmbda, *((20.0, 1e3) if self.is_over_adam else (2.0, 10.0)))
        lmbda, amplify, coeff = (d if own is None else own for own, d in zip(self.asked_penalty, defaults, strict=True))
        return lmbda, amplify, coeff

    def sparse_step(self, t: int) -> None:
        """Partition once; descend, penalize the groups to remove, and project those that left their half-spaces."""
        self.observe(self.schedule.start - t if t <= self.schedule.start else None)
        if self.schedule.starts_period(t):
            if t == self.schedule.start:
                self.partition()
            self.begin_period(t)
        x = self.penalized(t)
        if x is None:
            self.descend()
        else:
            x.remember_()
            rate = x.rate()
            self.descend()  # x̂_g = x_g - α G_g
            along, moved_sq = x.moved()  # -α <x_g, G_g> and α² ||G_g||²
            lmbda, which = self.lmbdas(along, moved_sq, x.norm, rate, t), self.open()
            x.shrink_(lmbda, which)  # x̂_g -= α λ_g x_g / ||x_g||
            if t >= self.half_space_step:
                inner = x.sq + along - rate * lmbda * which * x.norm  # <x̂_g, x_g>
                self.project_(inner / x.sq - x.epsilon)  # x̂_g = 0 if <x̂_g, x_g> < ε ||x_g||²
        self.end_step(t)

    def lmbdas(self, along: Tensor, moved_sq: Tensor, norm: Tensor, rate: Tensor, t: int) -> Tensor:
        """λ of every group, shape ``(N,)``, in the interval in which the group shrinks and the loss decreases.

        Args:
            along: ``-α <x_g, G_g>``; if it is positive, the wrapped optimizer's step makes the group grow.
            moved_sq: ``α² ||G_g||²``.
            norm: ``||x_g||``.
            rate: α of every group.
            t: The step; before ``warm_up_steps``, every λ is the lowest one.
        """
        lmbda, amplify, coeff = self.penalty
        if t < self.warm_up_steps:
            return torch.full_like(norm, lmbda)
        tiny = torch.finfo(norm.dtype).tiny
        low = along / (rate * norm).clamp_min(tiny)
        high = moved_sq * norm / (rate * along.clamp_min(tiny)).clamp_min(tiny)
        own = (amplify * low).clamp(lmbda, lmbda * coeff)
        own = torch.where(own >= high, (low + high) / 2, own)
        return torch.where((along > 0) & (rate > 0), own, lmbda)

    def partition(self) -> None:
        """Mark G_p as redundant: the groups that the choice removes, and as published, a tolerance more."""
        if not self.choice.target.wants_less:
            return
        if not self.tolerance:
            self.choose_redundant(1.0)
            return
        self._record_cost()
        self.mark_redundant(self.wider.select(self.scores(), self.atoms != PRUNED), final=False)

    @property
    def wider(self) -> Choice:
        """The choice with a goal that is lowered by the tolerance."""
        target = self.choice.target
        goal = max(target.goal - self.tolerance * target.full, 0.001 * target.full)
        if target.name == "target_group_sparsity" and not isinstance(target.asked, Mapping):
            atoms = int(target.full)
            goal = atoms - int(atoms * min(target.asked + self.tolerance, 0.999))
        return replace(self.choice, target=replace(target, goal=goal))

    def choose_rest(self) -> None:
        """Keep the part of G_p redundant that is not at zero yet.

        As published, keep only as much redundant as is still missing for the target, the least important groups first.
        """
        if not self.tolerance:
            return
        alive, ones = self.atoms != PRUNED, torch.ones(self.num_atoms)
        chosen = torch.zeros(self.num_atoms, dtype=torch.bool)
        if rest(self.choice, ones, alive).any():
            scores = self.scores()
            others = scores - scores.amin() + scores.amax() - scores.amin() + 1  # above all of G_p
            chosen = rest(self.choice, torch.where(self.atoms == REDUNDANT, scores - scores.amin(), others), alive)
        self.mark_redundant(chosen)

    def budget(self) -> Budget | None:
        """As in :class:`HalfSpace` if G_p exceeds the target; otherwise ``None``, since all of G_p is removed."""
        return super().budget() if self.tolerance else None

    def _may_go(self) -> Tensor:
        return self.atoms == REDUNDANT

    def _penalized_rows(self, codes: Sequence[Tensor]) -> list[Tensor]:
        return [rows_of(own, REDUNDANT) for own in codes]

    def describe_setup(self) -> dict[str, Any]:
        """As in :class:`HESSO`, with λ, the half-spaces and the tolerance."""
        return super().describe_setup() | {
            "lmbda": list(self.penalty),
            "warm_up_steps": self.warm_up_steps,
            "tolerance_group_sparsity": self.tolerance,
        }
