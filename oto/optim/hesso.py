"""HESSO: hybrid efficient structured sparse optimizer (arXiv 2409.09085, algorithm 1).

After ``start_pruning_step`` ordinary steps, pruning runs in periods. A period begins by choosing, over all node groups
together, the least salient zero-invariant groups (ZIGs) that are not pruned yet. They are *redundant*: they take part
in every step like all others, and are scaled after it so that they arrive at exactly zero with the last step of the
period. From then on they are *pruned*. When the last period is over, training goes on with the rest.

Where we differ from the released code, and why:

* The update is that of a real torch optimizer. Released Adam starts its moments at ``g`` and ``g^2`` and still corrects
  them for a start at zero, so it is not Adam.
* Groups are chosen at the first step of a period, before its update, from the parameters and gradients of that moment;
  all T steps of the period shrink them. Released code chooses at the second step, so that T - 1 are left.
* Scores decide which groups go. Released code passes its choice through ``setdiff1d``, which sorts by index.
* The sign of the cosine, the gradient and the norms: see :mod:`oto.optim.saliency`.
* Periods share the steps and the groups evenly (each count differs by one at most). Released code floors both, leaves
  the remaining groups to the last period, and divides by zero if ``pruning_steps < pruning_periods``; here that
  raises ``TargetError``.
* ``int(N * target_group_sparsity)`` ZIGs are at zero in the end, not fewer: what ``group_divisible`` rounds away in one
  node group is taken from another, so the count falls short by ``group_divisible - 1`` at most. A target that leaves a
  node group with fewer than its ``min_kept`` atoms raises ``TargetError`` before training. Released code lets layers
  drop to one channel, and lowers the target silently.
* Redundant atoms are scaled where they lie, also behind a concatenation. Released code scales the whole slice there.
* Momentum and first moments of pruned entries are zeroed, and every piece of state survives a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from oto.errors import NothingPrunableError, TargetError
from oto.groups.node_group import NodeGroup
from oto.optim.base import SparseOptimizer
from oto.optim.plan import FREE, PRUNED, REDUNDANT
from oto.optim.saliency import Saliency, Weights, resolve, score
from oto.optim.schedule import Schedule, Steps
from oto.optim.select import reachable, select
from oto.optim.wrapped import Base, Named, Params


class HESSO(SparseOptimizer):
    """Train and prune at once; see the module docstring for the algorithm.

    With ``target_group_sparsity=0`` every step is, bit for bit, that of the wrapped optimizer. Steps are calls of
    ``step()``; under gradient accumulation, updates rather than micro-batches.

    Args:
        params: ``model.named_parameters()``, or parameter groups with names, as in :class:`SparseOptimizer`.
        node_groups: Node groups of the model.
        start_pruning_step: Number of ordinary steps before pruning; a float in [0, 1] is a share of ``total_steps``.
        pruning_steps: Number of steps over which pruning is spread; at least ``pruning_periods``, or a share likewise.
        pruning_periods: How many times groups are chosen.
        total_steps: Number of steps that training takes, if anything is a share of it.
        target_group_sparsity: Share of the prunable ZIGs to bring to zero, in [0, 1).
        saliency: Name of a criterion, a function (see :data:`oto.optim.Saliency`), or a mapping from these to weights.
            By default the five criteria of :mod:`oto.optim.saliency` count alike.
        group_divisible: A node group that loses atoms keeps a multiple of this many.
        names: Names for the parameters, where ``params`` or a ``base`` instance has none.
        variant: The name of an optimizer of ``torch.optim``, in any case.
        base: Used instead of ``variant``: an optimizer, an optimizer class, or a function of parameter groups.
        lr: Learning rate; SGD needs one. This and the next four are left to torch's defaults if ``None``.
        first_momentum: ``momentum`` of SGD, the first of Adam's ``betas``.
        second_momentum: The second of Adam's ``betas``.
        dampening: As in SGD.
        weight_decay: As in the wrapped optimizer.
        **keywords: Further keywords of the wrapped optimizer, such as ``foreach``, ``fused`` or ``nesterov``.

    Raises:
        TargetError: The target or the schedule cannot be reached; the message says what can.
        NothingPrunableError: There is a target, but no node group may lose an atom.
        OptionError: An option is missing, or the wrapped optimizer has none of that name.
        UnknownParameterError: A parameter has no name, or a prunable node group names one that is not in ``params``.
        NonFiniteParameterError: A parameter holds NaN or infinity.

    Example:
        >>> from oto.groups.node_group import NodeGroup, Slice
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> rows = (Slice("0.weight", 0, ()), Slice("0.bias", 0, ()))
        >>> hidden = NodeGroup("0.weight", 8, slices=(*rows, Slice("2.weight", 1, ())), zeros=rows)
        >>> optimizer = HESSO(
        ...     model.named_parameters(), [hidden], lr=0.1, start_pruning_step=1, pruning_steps=4, pruning_periods=2
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
        start_pruning_step: Steps,
        pruning_steps: Steps,
        pruning_periods: int = 10,
        total_steps: Steps | None = None,
        target_group_sparsity: float = 0.5,
        saliency: Weights | str | Saliency | None = None,
        group_divisible: int = 1,
        names: Named | None = None,
        variant: str = "sgd",
        base: Base | None = None,
        lr: float | Tensor | None = None,
        first_momentum: float | None = None,
        second_momentum: float | None = None,
        dampening: float | None = None,
        weight_decay: float | None = None,
        **keywords: Any,
    ) -> None:
        self.schedule = Schedule.of(start_pruning_step, pruning_steps, pruning_periods, total_steps)
        self.criteria = resolve(saliency)
        self.group_divisible = group_divisible
        self.target_group_sparsity = target_group_sparsity
        super().__init__(
            params,
            node_groups,
            names=names,
            variant=variant,
            base=base,
            first_momentum=first_momentum,
            second_momentum=second_momentum,
            dampening=dampening,
            lr=lr,
            weight_decay=weight_decay,
            **keywords,
        )
        self._check_target()

    def describe_setup(self) -> dict[str, Any]:
        """Schedule, target and choice."""
        return super().describe_setup() | {
            "target_group_sparsity": self.target_group_sparsity,
            "group_divisible": self.group_divisible,
            "saliency": {getattr(score, "__name__", type(score).__name__): w for score, w in self.criteria},
        }

    @property
    def target(self) -> int:
        """Number of ZIGs to bring to zero."""
        return int(self.num_atoms * self.target_group_sparsity)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Descend on every parameter, then shrink the redundant groups and keep the pruned ones at zero.

        Args:
            closure: Evaluates the model again and returns the loss; run once, with gradients enabled.

        Returns:
            The loss, if there is a closure.

        Raises:
            NonFiniteParameterError: A period begins, and a parameter or gradient holds NaN or infinity.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.is_probe():
            self.descend()
            return loss

        n = self.clock
        if n == 0 and self.target:
            self.refuse_sparse_gradients()  # rather than when the first period begins
        if self.schedule.starts_period(n):
            self._choose_redundant(n)
        self.descend()  # x <- x - lr * d, redundant groups included
        if self.schedule.ends_period(n):
            self.commit()
        else:
            self.scale_redundant_(self.schedule.factor(n))
        self.zero_pruned_()
        self.clock = n + 1
        return loss

    def _choose_redundant(self, step: int) -> None:
        """Mark the ZIGs of lowest saliency, over all node groups, up to this period's quota."""
        period = self.schedule.period(step)
        assert period is not None
        if not self.target:
            return
        pruned = self.atoms == PRUNED
        entries = list(self.entries())
        scores = score(entries, ~pruned, self.criteria)
        self.check_finite(entries, scores)
        chosen = select(
            scores.masked_fill(pruned, -torch.inf),
            [group.size for group in self.node_groups],
            [group.min_kept for group in self.node_groups],
            self.schedule.quota(period, self.target),
            self.group_divisible,
        )
        self.atoms = torch.where(pruned, PRUNED, torch.where(chosen, REDUNDANT, FREE)).to(torch.uint8)

    def _check_target(self) -> None:
        share, divisible = self.target_group_sparsity, self.group_divisible
        if not 0 <= share < 1:
            raise TargetError(f"target_group_sparsity is {share}; it is the share of groups to remove, in [0, 1)")
        if divisible < 1:
            raise TargetError(f"group_divisible is {divisible}; it is at least 1")
        if not share:
            return
        if not self.node_groups:
            raise NothingPrunableError(
                f"target_group_sparsity is {share}, but no node group may lose an atom; oto.explain() says why"
            )
        sizes, least = [g.size for g in self.node_groups], [g.min_kept for g in self.node_groups]
        most = reachable(sizes, least, divisible)
        if self.target > most:
            raise TargetError(
                f"target_group_sparsity={share} asks for {self.target} of {self.num_atoms} groups, but only {most} may "
                f"go: every node group keeps its least number of atoms, rounded up to a multiple of {divisible}\n"
                f"  to fix  ask for {most / self.num_atoms:.4g} or less, or lower the minimum or group_divisible"
            )
