"""HESSO: hybrid efficient structured sparse optimizer (arXiv 2409.09085, algorithm 1).

After ``start_pruning_step`` ordinary steps, pruning runs in periods. A period begins by choosing, over all node groups
together, the least salient zero-invariant groups (ZIGs) that are not pruned yet. They are *redundant*: they take part
in every step like all others, and are scaled after it so that they reach exactly zero at the last step of the period.
From then on they are *pruned*. After the last period, training continues with the rest.

Where we differ from the released code, and why:

* The update is that of a real torch optimizer. Released Adam starts its moments at ``g`` and ``g^2`` and still corrects
  them for a start at zero, so it is not Adam.
* Groups are chosen at the first step of a period, before its update, from the parameters and gradients of that moment;
  all T steps of the period shrink them. Released code chooses at the second step, so only T - 1 steps shrink.
* What goes is chosen by :mod:`oto.optim.choice`, the same for every optimizer: for a target in MACs, parameters, bytes,
  milliseconds or groups, with known costs, from averages over many batches, and by default no layer collapses. The
  published choice is a share of groups, and one ranking of all groups by scores of one batch:
  ``hesso(saliency="hesso", target_group_sparsity=...)``. Released code lets layers drop to one channel, passes
  its choice through ``setdiff1d``, which sorts by index, and silently misses the target by what ``group_divisible``
  rounds away.
* Periods have equally many steps, and the first ones remove most of the cost (Zhu and Gupta, arXiv 1710.01878), so that
  more steps are left for the rest to adapt. Released code floors both, leaves the remaining groups to the last period,
  and divides by zero if ``pruning_steps < pruning_periods``; here that raises ``TargetError``.
* Only redundant atoms are scaled, also behind a concatenation. Released code scales the whole slice there.
* Momentum and first moments of pruned entries are zeroed, and every piece of state survives a checkpoint.
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
    """Prune while training; see the module docstring for the algorithm.

    With ``target_macs=1.0`` every step is, bit for bit, that of the wrapped optimizer. Steps are calls of
    ``step()``: with gradient accumulation, updates rather than micro-batches.

    Args:
        params: ``model.named_parameters()``, or parameter groups with names, as in :class:`SparseOptimizer`.
        node_groups: Node groups of the model.
        target_macs, target_params, target_bytes: The most that may remain: a float in (0, 1] is a share, an integer the
            number itself.
        target_latency_ms: Milliseconds of a forward pass on the example input.
        target_group_sparsity: Share of the prunable ZIGs to bring to zero, in [0, 1).
        target_kept: What each node group keeps of its atoms, by names or globs of parameters: a share, or a number.
            Groups that none of them names stay whole. Exactly one target is given.
        scope, min_kept, group_divisible, align, saliency, normalize, within, by_cost, average_steps: Which ZIGs go, see
            :meth:`oto.optim.Choice.of`. ``saliency="hesso"`` chooses as published.
        start_pruning_step: Number of ordinary steps before pruning; a float in [0, 1] is a share of ``total_steps``.
        pruning_steps: Number of steps over which pruning is spread, at least ``pruning_periods``; or a share.
        pruning_periods: How many times groups are chosen; by default 5, or as many as there are pruning steps.
        pruning_exponent: How early most of it goes, see :class:`Schedule`: 3 by default; 1, evenly, as published.
        total_steps: Number of steps that training takes; needed if anything is a share of it.
        compensate: ``"affine"``, ``"ridge"`` or ``"bias"``: after each choice, what stays takes over what goes, by a
            least-squares fit over ``batches``; see :mod:`oto.optim.fold`. Only if :class:`oto.OTO` makes the optimizer.
        batches: The data of that fit: inputs as for ``OTO``, or anything if ``loss`` is given. They are kept in memory.
        loss: A function of the model and a batch that calls the model.
        costs: Costs of the network; needed for all targets except ``target_group_sparsity``.
        latency: Milliseconds as a function of what is kept; needed for ``target_latency_ms``.
        names: Names for the parameters, where ``params`` or a ``base`` instance has none.
        variant: The name of an optimizer of ``torch.optim``, in any case.
        base: Used instead of ``variant``: an optimizer, an optimizer class, or a function of parameter groups.
        base_options: Keywords of ``base`` that no optimizer of torch has, as a mapping. They may be given
            directly too, but then no type checker knows them.
        lr: Learning rate; SGD needs one. ``None``, here and below, is the default of the wrapped optimizer.
        first_momentum: ``momentum`` of SGD, the first of Adam's ``betas``.
        second_momentum: The second of Adam's ``betas``.
        dampening: As in SGD.
        weight_decay: As in the wrapped optimizer.
        momentum, betas, eps, nesterov, foreach, fused, ...: Further keywords of the wrapped optimizer.

    Raises:
        TargetError: The target or the schedule cannot be reached; the message says what can.
        NothingPrunableError: There is a target, but no node group may lose an atom.
        OptionError: An option is missing, or the wrapped optimizer has none of that name.
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
