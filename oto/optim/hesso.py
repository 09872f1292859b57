"""HESSO: hybrid efficient structured sparse optimizer (arXiv 2409.09085, algorithm 1).

After ``start_pruning_step`` ordinary steps, pruning runs in periods. At the beginning of a period, the least salient
zero-invariant groups (ZIGs) that are not pruned yet are chosen among all node groups. They are *redundant*: the wrapped
optimizer updates them like all others, and each step then scales them such that they reach exactly zero at the last
step of the period. From then on they are *pruned*. After the last period, training continues with the others.

Where we differ from the released code, and why:

* The update is that of a torch optimizer. Released Adam starts its moments at ``g`` and ``g^2`` and still corrects them
  for a start at zero, so it is not Adam.
* Groups are chosen at the first step of a period, before its update, from the current parameters and gradients; all T
  steps of the period shrink them. Released code chooses at the second step, so only T - 1 steps shrink.
* Groups are chosen by :mod:`oto.optim.choice`, which all optimizers share: for a target in MACs, parameters, bytes,
  milliseconds or groups, with known costs, from averages over many batches; by default no layer collapses. The
  published choice is a share of groups, and one ranking of all groups by scores of one batch:
  ``hesso(saliency="hesso", target_group_sparsity=...)``. Released code lets layers shrink to one channel, passes its
  choice through ``setdiff1d``, which sorts by index, and misses the target without notice by what ``group_divisible``
  rounds off.
* Periods have (nearly) equally many steps, and the first ones remove most of the cost (Zhu and Gupta, arXiv
  1710.01878), so that more steps are left in which the remaining groups can adapt. Released code rounds down the number
  of steps and of groups per period, removes the remaining groups in the last period, and divides by zero if
  ``pruning_steps < pruning_periods``; here that raises ``TargetError``.
* Only redundant atoms are scaled, also after a concatenation. Released code scales the whole slice there.
* Momentum and first moments of pruned entries are zeroed, and all state is in checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Unpack

from oto.groups.cost import Costs
from oto.groups.node_group import NodeGroup
from oto.optim.base import SparseOptimizer
from oto.optim.options import HESSOOptions
from oto.optim.setup import read
from oto.optim.target import Measure
from oto.optim.wrapped import Params


class HESSO(SparseOptimizer):
    """Prune during training; see the module docstring for the algorithm.

    With ``target_macs=1.0`` every step is bitwise equal to that of the wrapped optimizer. Steps are calls of
    ``step()``: with gradient accumulation, updates rather than micro-batches.

    Args:
        params: ``model.named_parameters()``, or parameter groups with names, as in :class:`SparseOptimizer`.
        node_groups: Node groups of the model.
        target_macs, target_params, target_bytes: The maximum that may remain: a float in (0, 1] is a share, an integer
            the number itself. Exactly one target is given.
        target_latency_ms: Maximum milliseconds of a forward pass on the example input.
        target_group_sparsity: Share of the prunable ZIGs to bring to zero, in [0, 1).
        target_kept: The atoms that node groups keep, by names or globs of parameters: a share, or a number. Groups that
            none of them matches stay whole.
        scope, min_kept, group_divisible, align, saliency, normalize, within, by_cost, average_steps: How ZIGs are
            chosen, see :class:`oto.optim.options.ChoiceOptions`. ``saliency="hesso"`` chooses as published.
        start_pruning_step: Number of ordinary steps before pruning; a float in [0, 1] is a share of ``total_steps``.
        pruning_steps: Number of steps over which pruning is spread, at least ``pruning_periods``; or a share.
        pruning_periods: How many times groups are chosen; by default 5, or as many as there are pruning steps.
        pruning_exponent: How much more the first periods remove than the last ones, see :class:`Schedule`: 3 by
            default; 1, evenly, with ``saliency="hesso"``, as published.
        total_steps: Number of steps that training takes; needed if any option is a share of it.
        compensate: ``"affine"``, ``"ridge"`` or ``"bias"``: after each choice, the remaining atoms compensate for the
            chosen ones, by a least-squares fit over ``batches``; see :mod:`oto.optim.fold`. Only if :class:`oto.OTO`
            makes the optimizer.
        batches: The data of that fit: inputs as for ``OTO``, or anything if ``loss`` is given. They are kept in memory.
        loss: A function of the model and a batch that calls the model.
        costs: Costs of the network; needed for all targets except ``target_group_sparsity``.
        latency: Milliseconds as a function of the kept counts; needed for ``target_latency_ms``.
        names: Named parameters, for ``params`` or a ``base`` instance without names.
        variant: The name of an optimizer of ``torch.optim``, in any case.
        base: Used instead of ``variant``: an optimizer, an optimizer class, or a function of parameter groups.
        base_options: Keywords of ``base`` that no optimizer of torch has, as a mapping. They may also be given
            directly, but type checkers do not know them.
        lr: Learning rate; SGD needs one. ``None``, here and below, is the default of the wrapped optimizer.
        first_momentum: ``momentum`` of SGD, the first of Adam's ``betas``.
        second_momentum: The second of Adam's ``betas``.
        dampening: As in SGD.
        weight_decay: As in the wrapped optimizer.
        momentum, betas, eps, nesterov, foreach, fused, ...: Further keywords of the wrapped optimizer.

    Raises:
        TargetError: The target or the schedule cannot be reached; the message says what can.
        NothingPrunableError: There is a target, but no node group may lose an atom.
        OptionError: An option is missing, or unknown to the wrapped optimizer.
        UnknownParameterError: A parameter has no name, or a prunable node group names one that is not in ``params``.
        NonFiniteParameterError: A parameter holds NaN or infinity.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> from oto.groups.node_group import NodeGroup, Slice
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> rows = (Slice("0.weight", 0, ()), Slice("0.bias", 0, ()))
        >>> hidden = NodeGroup("0.weight", 8, slices=(*rows, Slice("2.weight", 1, ())), zeros=rows)
        >>> optimizer = HESSO(
        ...     model.named_parameters(), [hidden], lr=0.1, target_group_sparsity=0.5,
        ...     start_pruning_step=1, pruning_steps=4, pruning_periods=2,
        ... )
        >>> for _ in range(6):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(5, 3)).square().sum().backward()
        ...     optimizer.step()
        >>> optimizer.sparsity, int((model[0].weight == 0).all(1).sum())
        (0.5, 4)
    """

    def __init__(
        self,
        params: Params,
        node_groups: Iterable[NodeGroup],
        *,
        costs: Costs | None = None,
        latency: Measure | None = None,
        **options: Unpack[HESSOOptions],
    ) -> None:
        choice, schedule, wrapped = read(options, node_groups, costs, latency)
        super().__init__(params, choice, schedule, **wrapped)

    def sparse_step(self, t: int) -> None:
        """Choose if a period begins, descend, shrink the redundant atoms, keep the pruned ones at zero."""
        self.observe(self.schedule.until_choice(t))
        if self.schedule.starts_period(t):
            self.choose_redundant(self.schedule.share(t))
        self.descend()  # x <- x - lr * d, redundant groups included
        if self.schedule.ends_period(t):
            self.commit()
        else:
            self.scale_redundant_(self.schedule.factor(t))
        self.zero_pruned_()
