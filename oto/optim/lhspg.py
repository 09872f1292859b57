"""LHSPG: LoRA half-space projected gradient (LoRAShear, arXiv 2310.18356, section 3.3, algorithm 2).

A frozen weight ``x`` and its adapter ``γ B A`` are one operator. At the beginning of a period, the least salient groups
are chosen. In each of its ``T`` steps ``t``::

    A, B <- a step of the wrapped optimizer
    for each redundant group g:
        x̂_g = [x + γ B A]_g - λ_g x_g / ||x_g||,    B_g <- 0       λ_g = ||x_g|| / (T - t)
        x_g <- 0      if <x̂_g, x_g> <= ε ||x_g||²                  it left its half-space
        x_g <- x̂_g    otherwise
    groups at zero stay there; all others are trained through A and B

If the adapter does not move, λ_g shortens the group by the same length at every step, and it is zero after the last.

Where we differ from the paper and its released code, and why:

* The paper does not define λ_g. Here it reduces the norm linearly to zero over the period. Whatever the adapter adds,
  what remains when the period ends is set to zero.
* The paper does not define ε either; here it is 0: a group that shrinks as planned has
  ``<x̂, x> / ||x||² = 1 - 1 / (T - t)``, so a larger ε would project it early, in the last ``1 / (1 - ε)`` steps.
* Which groups are removed in which period is determined by the library's choice and targets. The paper removes equally
  many groups in each period. The default criterion is the norm of ``x + γ B A`` over the mean of the node group, since
  most weights of a group are frozen and have no gradient. Criteria that use gradients get that of the product of the
  factors, if there is one.
* Important groups keep their adapters. The paper merges ``B A`` into them at the end of each period; then the slim
  model would have no adapters to save, though the merged model is the same. The adapters of redundant groups are
  merged, as in the paper.
* Atoms may be rows or columns. Attention heads remove columns of ``x`` and of ``A``; then ``A_g <- 0``.
* If a weight or a factor is read twice (tied embeddings), or an adapter is of a different kind, its rows of ``B`` are
  ordinary entries of the group.
* All other entries that a group zeroes (norms, biases, layers without an adapter, including trained ones) are a part
  of ``x_g``.
* Merging ignores the dropout of an adapter, which is active only during training.
* Released LHSPG has no half-spaces and no λ: it scales the rows of ``x`` and of ``B``.

Memory: one copy of the redundant entries, and one product ``B A`` at a time.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from oto.errors import OptionError
from oto.groups.adapters import Adapter
from oto.groups.cost import Costs
from oto.groups.node_group import NodeGroup
from oto.optim.composed import Composed
from oto.optim.copied import Copied
from oto.optim.entries import Rows
from oto.optim.hesso import HESSO
from oto.optim.options import LHSPGOptions, OperatorOptions, besides
from oto.optim.plan import REDUNDANT, Plan, rows_of
from oto.optim.saliency import Entries
from oto.optim.sums import Sums
from oto.optim.target import Measure
from oto.optim.wrapped import Params


class LHSPG(HESSO):
    """Prune a frozen model while its adapters are trained; see the module docstring for the algorithm.

    With ``target_macs=1.0`` every step is bitwise equal to that of the wrapped optimizer.

    Args:
        params: As in :class:`HESSO`, including frozen parameters, and so are all options that are not named here. By
            default ``saliency="magnitude"``, of the weights with their adapters.
        node_groups: Node groups of the model; those of frozen weights must be prunable, ranks of adapters must not be.
        adapters: The adapters, as :func:`oto.groups.adapters.adapters` finds them.
        epsilon: ε of the half-spaces, in [0, 1).

    Raises:
        OptionError: ``epsilon`` lies outside of [0, 1).
        TargetError, NothingPrunableError, UnknownParameterError, NonFiniteParameterError: As in :class:`HESSO`.
    """

    _redundant: tuple[Plan, Copied] | None = None

    def __init__(
        self,
        params: Params,
        node_groups: Iterable[NodeGroup],
        *,
        adapters: Sequence[Adapter] = (),
        costs: Costs | None = None,
        latency: Measure | None = None,
        **options: Unpack[LHSPGOptions],
    ) -> None:
        epsilon = options.get("epsilon", 0.0)
        if not 0 <= epsilon < 1:
            raise OptionError(
                f"epsilon is {epsilon!r}; it is a number in [0, 1)\n  effect  nothing was made\n  to fix  leave it out"
            )
        self.epsilon = float(epsilon)
        self.composed = Composed(tuple(adapters))
        if options.get("saliency") is None:
            options["saliency"] = "magnitude"
        super().__init__(params, node_groups, costs=costs, latency=latency, **besides(options, OperatorOptions))

    def sparse_step(self, t: int) -> None:
        """Choose if a period begins, descend, shrink and project redundant operators, keep pruned ones at zero."""
        self.observe(self.schedule.until_choice(t))
        if self.schedule.starts_period(t):
            self.choose_redundant(self.schedule.share(t))
            self.absorb_()  # so that x_g is the whole operator
        x = self.redundant()
        if not x.rows:
            self.descend()
        else:
            sq = x.remember_()
            self.descend()  # A, B <- A, B - α d
            self.absorb_()  # x̂_g = [x + γ B A]_g, B_g <- 0
            per_norm = torch.full_like(sq, 1 - self.schedule.factor(t))  # λ_g / ||x_g|| = 1 / (T - t)
            inner = x.subtract_dot_(per_norm, [1.0] * len(x.rows.places))  # x̂_g -= λ_g x_g / ||x_g||
            x.rows.zero_(inner <= self.epsilon * sq)  # x_g = 0 if <x̂_g, x_g> <= ε ||x_g||²
        if self.schedule.ends_period(t):
            self.commit()
        self.zero_pruned_()

    def absorb_(self) -> None:
        """Merge the adapters' part of redundant atoms into the weights."""
        rows = [rows_of(own, REDUNDANT) for own in self._codes()]
        self.composed.absorb_(self.node_groups, rows, self.parameters())

    def redundant(self) -> Copied:
        """The entries of the redundant groups with all adapters merged, and a copy of them."""
        plan = self._plan()
        if self._redundant is None or self._redundant[0] is not plan:
            rows = [rows_of(own, REDUNDANT) for own in self._codes()]
            groups = [self.composed.operators(group) for group in self.node_groups]
            entries = Rows.of(groups, rows, self.parameters(), in_blocks=True, device=self.atoms.device)
            self._redundant = plan, Copied(entries, None if self._redundant is None else self._redundant[1])
        return self._redundant[1]

    def entries_of(self, group: NodeGroup, parameters: Mapping[str, Tensor], maximized: Container[str]) -> Entries:
        """As in :class:`HESSO`, with a weight and its adapters as one."""
        return self.composed.entries_of(group, parameters, maximized)

    def sums(self, parameters: Mapping[str, Tensor], maximized: Container[str]) -> Sums:
        """As in :class:`HESSO`, with a weight and its adapters as one."""
        return self.composed.sums(self.computed_groups(), parameters, maximized, self.atoms.device)

    def describe_setup(self) -> dict[str, Any]:
        """As in :class:`HESSO`, with ε."""
        return super().describe_setup() | {"epsilon": self.epsilon}
