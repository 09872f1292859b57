"""HSPG: half-space stochastic projected gradient (Only Train Once, NeurIPS 2021, arXiv 2107.07467, algorithm 2).

It minimizes ``Ψ(x) = f(x) + λ Σ_g ||x_g||``, the sum over zero-invariant groups (ZIGs), in two stages::

    stage 1, from start_pruning_step on:    x_g <- x_g - α (∇f_g + λ x_g / ||x_g||)      for every group
    stage 2, from half_space_step on:       x̂_g  = x_g - α (∇f_g + λ x_g / ||x_g||)      for every group not at zero
                                            x_g <- 0      if <x̂_g, x_g> < ε ||x_g||²     it left its half-space
                                            x_g <- x̂_g    otherwise
    groups at zero stay there; entries that belong to no group take the ordinary step

Why a projection does not increase the loss: outside of the half-space ``<∇Ψ_g, x_g> > (1 - ε) ||x_g||² / α`` holds, so
the direction towards zero is a descent direction of Ψ. If the gradient has the Lipschitz constant L, the projection
lowers Ψ by at least ``(1 - ε) / α - L / 2`` times ``||x_g||²``.

Where we differ from the paper and its released code, and why:

* The target is met exactly (see :mod:`oto.optim.half_space`): penalty and projection stop there, the groups furthest
  outside are removed first, and the choice adds what is missing in the last period. As published, λ and ε determine how
  many groups are removed, and only ``upper_group_sparsity`` limits them.
* ``∇f`` is replaced by the direction of any torch optimizer, with its momentum and preconditioner; the penalty is
  applied after its step. The paper's optimizer is plain SGD, for which this is the same.
* Steps before ``start_pruning_step`` are ordinary. The paper penalizes from the first step on; here that is
  ``start_pruning_step=0``.
* ``x_g / ||x_g||`` is 0 for a group at zero; released code divides by ``||x_g|| + 1e-6`` in stage 1.
* ε is constant. Released code for BERT raises ε of linear layers while the sparsity does not increase.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from oto.errors import OptionError
from oto.groups.cost import Costs
from oto.groups.node_group import NodeGroup
from oto.optim.half_space import HalfSpace
from oto.optim.options import HSPGOptions, PenaltyOptions, besides
from oto.optim.target import Measure
from oto.optim.wrapped import Params


class HSPG(HalfSpace):
    """Penalize the norms of all groups, and project those that leave their half-spaces; see the module docstring.

    With ``target_macs=1.0`` every step is bitwise equal to that of the wrapped optimizer.

    Args:
        params: As in :class:`HESSO`, like all options that are not named here.
        node_groups: Node groups of the model.
        lmbda: λ of the penalty, or a function from the step to λ; by default 1e-3, and 1e-2 over Adam and AdamW. If no
            gradient opposes it, the norm of a group decreases by αλ per step, so λ must suit the number of steps:
            ``progress`` reports how many groups left their half-spaces, and how many had to be chosen in the end.
        epsilon: ε of the half-spaces, in [0, 1); 0.95 by default. A number, or one for each kind of group
            (``{"conv": 0.9, "linear": 0.0, "norm": 0.0}``).
        half_space_step: The step at which stage 2 begins; a float in [0, 1] is a share of ``total_steps``. By default
            after a quarter of the pruning steps.
        upper_group_sparsity: The original's name for ``target_group_sparsity``.
        start_pruning_step: The step at which stage 1 begins.
        pruning_steps: Number of steps over which groups are removed.
        pruning_periods: Number of periods, by default 10. At the beginning of each, the removed groups are read back
            from the device; in the last one, the choice removes what is still missing for the target.
        total_steps: As in :class:`HESSO`.

    Raises:
        OptionError: An option is invalid, or the wrapped optimizer has no learning rate.
        TargetError: ``half_space_step`` lies outside of pruning, or as in :class:`HESSO`.
    """

    def __init__(
        self,
        params: Params,
        node_groups: Iterable[NodeGroup],
        *,
        costs: Costs | None = None,
        latency: Measure | None = None,
        **options: Unpack[HSPGOptions],
    ) -> None:
        lmbda, upper = options.get("lmbda"), options.get("upper_group_sparsity")
        if not callable(lmbda) and lmbda is not None and not lmbda >= 0:
            raise OptionError(
                f"lmbda is {lmbda}; it is the weight of a penalty, at least 0\n  to fix  such as lmbda=1e-3"
            )
        if upper is not None:
            if options.get("target_group_sparsity") is not None:
                raise OptionError(
                    "upper_group_sparsity and target_group_sparsity are the same\n"
                    "  effect  nothing was made\n  to fix  give one of them"
                )
            options["target_group_sparsity"] = upper
        self.asked_lmbda = lmbda
        super().__init__(params, node_groups, costs=costs, latency=latency, **besides(options, PenaltyOptions))

    def lmbda(self, t: int) -> float:
        """λ at step ``t``."""
        asked = self.asked_lmbda
        if asked is None:
            return self.default_lmbda
        return asked(t) if callable(asked) else asked

    @property
    def least_lmbda(self) -> float:
        """λ when the penalty begins."""
        return self.lmbda(self.schedule.start)

    def sparse_step(self, t: int) -> None:
        """Descend, penalize all groups that may still be removed, and project those that left their half-spaces."""
        self.observe(self.last_period - t if t <= self.last_period else None)
        if self.schedule.starts_period(t):
            self.begin_period(t)
        x = self.penalized(t)
        if x is None:
            self.descend()
        else:
            x.remember_()
            self.descend()  # x̂_g = x_g - α d_g
            if t < self.half_space_step:
                x.shrink_(self.lmbda(t), self.open())  # x̂_g -= α λ x_g / ||x_g||
            else:
                inner = x.shrink_dot_(self.lmbda(t), self.open())  # the same, and <x̂_g, x_g>
                self.project_(inner / x.sq - x.epsilon)  # x̂_g = 0 if <x̂_g, x_g> < ε ||x_g||²
        self.end_step(t)

    def describe_setup(self) -> dict[str, Any]:
        """As in :class:`HESSO`, with λ and the half-spaces."""
        name = getattr(self.asked_lmbda, "__name__", type(self.asked_lmbda).__name__)
        return super().describe_setup() | {"lmbda": name if callable(self.asked_lmbda) else self.lmbda(0)}
