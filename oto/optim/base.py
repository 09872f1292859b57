"""The base class of all sparse optimizers: the order of operations in a step, and writing zeros.

A :class:`SparseOptimizer` is a ``torch.optim.Optimizer`` around another one, which always makes the update
(:mod:`oto.optim.wrapper`). State that a checkpoint must hold is in its first parameter group
(:mod:`oto.optim.checkpointed`). Everything else is derived from that state, and rebuilt when it or the storage of a
parameter changes. So no parameter is referenced outside of ``param_groups``; parameters are found by name and position.
The atoms to remove are chosen in :mod:`oto.optim.choosing`, and the remaining ones may compensate for them
(:mod:`oto.optim.compensating`).

After pruning, writing zeros is the only extra cost of a step: one pass over the pruned entries, whatever the wrapped
optimizer does. If node groups are proved to be *quiet*, most of these writes are skipped (see :meth:`zero_pruned_`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oto._torch import holder
from oto.errors import ShrinkError, UnknownParameterError, some
from oto.groups.node_group import NodeGroup
from oto.optim.choice import Choice
from oto.optim.choosing import Choosing
from oto.optim.entries import Rows, place_of, zero_
from oto.optim.followed import CHECK_STEPS, Followed
from oto.optim.options import BaseOptions
from oto.optim.plan import PRUNED, REDUNDANT, Plan, rows_of
from oto.optim.refusals import require_own_state, require_parameters
from oto.optim.schedule import Schedule
from oto.optim.shrink import Moved, follow, renamed_in, sliced_state
from oto.optim.state import left_like
from oto.optim.wrapped import Params, inside, keeps_own_state
from oto.shards import address

ELEMENTWISE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""Optimizers that leave an entry at zero when it, its gradients and its moments are zero."""

DIVISORS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
"""State that an update is divided by. It cannot move an entry, so it is not cleared: MKL's square root takes ten times
as long for an exact zero, which would slow down the loops of Adam and AdamW by half."""


class SparseOptimizer(Choosing):
    """A torch optimizer that wraps another one and acts on node groups.

    Subclasses define :meth:`sparse_step`.

    Args:
        params: ``model.named_parameters()``, or parameter groups (dicts) whose ``params`` are named pairs or come with
            ``param_names``. Include frozen parameters, or their node groups cannot be zeroed.
        choice: The node groups, and how the atoms to remove are chosen.
        schedule: When they are removed.
        names: Named parameters, for ``params`` or a ``base`` instance without names.
        variant: The name of an optimizer of ``torch.optim``, in any case. ``"sgd"`` needs ``lr``.
        base: Used instead of ``variant``: an optimizer, an optimizer class, or a function that takes parameter groups.
        base_options: Keywords of ``base`` that no optimizer of torch has; they may also be given directly.
        first_momentum: ``momentum`` of SGD, the first of Adam's ``betas``.
        second_momentum: The second of Adam's ``betas``.
        dampening: As in SGD.
        lr, weight_decay, foreach, fused, ...: For the wrapped optimizer; ``None`` is its default.

    Attributes:
        history: Numbers by step, oldest first, such as ``{"step": 30, "MACs": 2e7, "loss": 0.4}``: the cost of the
            network, in the unit of the target, at the beginning and end of each pruning period, and the numbers given
            to :meth:`record`. Reports plot it; state dicts contain it.

    Raises:
        OptionError: An option is missing, or unknown to the wrapped optimizer.
        UnknownParameterError: A parameter has no name, or a prunable node group names one that is not in ``params``.
        NonFiniteParameterError: A parameter of a prunable node group holds NaN or infinity.
    """

    _planned: tuple[Tensor, list[int], Plan] | None = None
    _loud = False
    _followed: Followed | None = None

    def __init__(self, params: Params, choice: Choice, schedule: Schedule, **options: Unpack[BaseOptions]) -> None:
        super().__init__(params, choice, schedule, options)
        require_parameters(self.node_groups, self.parameters())
        self._plan()

    @final
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step: :meth:`sparse_step`, with the checks and bookkeeping that all sparse optimizers share.

        Args:
            closure: Evaluates the model again and returns the loss; run once, with gradients enabled.

        Returns:
            The loss, if there is a closure.

        Raises:
            NonFiniteParameterError: A period begins, and a parameter or gradient holds NaN or infinity.
            NoGradientError: A period begins, its criterion needs gradients, and there are none.
            ModelChangedError: A parameter of the model was replaced since the optimizer was made.
            OptionError: The optimizer is a copy of one that compensates, see :meth:`Compensating.fold`.
            OTOError: A parameter of a node group has a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.is_probe():
            self.descend()
            return loss
        t = self.clock
        if t == 0 and self.choice.target.wants_less:
            self.refuse_sparse_gradients()  # report this at once, not only when the first period begins
        self.look_at_model(t)
        self.go_on_folding()
        self.sparse_step(t)
        self.clock = t + 1
        return loss

    def sparse_step(self, t: int) -> None:
        """Step ``t`` of the paper's algorithm: update the parameters from the current gradients. Autograd is off."""
        raise NotImplementedError

    # A smaller model -------------------------------------------------------------------------------------------------

    def left_like(self, state_dict: Mapping[str, Any] | None) -> dict[str, NDArray[np.bool_]]:
        """For each node group, which atoms of the model remain after shrinking: those that are not pruned.

        Args:
            state_dict: State dict of an optimizer whose model was shrunk: keep the same atoms as that model.

        Raises:
            ShrinkError: The state dict belongs to another model, or to one with atoms that this model no longer has.
        """
        if state_dict is None:
            return {g.name: (own != PRUNED).numpy() for g, own in zip(self.node_groups, self._codes(), strict=True)}
        return left_like(state_dict, self.kept)

    @torch.no_grad()
    def zero_(self, left: Mapping[str, NDArray[np.bool_]]) -> None:
        """Set all atoms that are not in ``left`` to zero, whatever their state."""
        gone = [torch.from_numpy(np.flatnonzero(~left[group.name])) for group in self.node_groups]
        Rows.of(self.node_groups, gone, self.parameters()).zero_()

    def shrink_(
        self,
        moved: Sequence[Moved],
        groups: Sequence[NodeGroup],
        left: Mapping[str, NDArray[np.bool_]],
        gone: Collection[Tensor] = (),
    ) -> None:
        """Continue with a model that has fewer atoms; see :mod:`oto.optim.shrink`.

        Args:
            moved: Every parameter of the smaller model.
            groups: The node groups of the smaller model, in the order of ``node_groups``.
            left: For each node group, which atoms of the model remain.
            gone: Parameters of the model that were removed with a segment.

        Raises:
            ShrinkError: State of the wrapped optimizer cannot be sliced; nothing is changed.
        """
        self.require_shrinkable()
        states = sliced_state(moved, self.base)
        follow(self.base, moved, states, gone)
        if self._followed is not None:
            self._followed = self._followed.renamed(renamed_in(moved))
        mask = torch.from_numpy(np.concatenate([left[group.name] for group in self.node_groups]))
        self._keep_atoms(mask.to(self.atoms.device))
        self.node_groups = tuple(groups)
        self.choice = replace(self.choice, groups=self.node_groups)
        self._renew()
        self._unseen = True  # self._followed knows the old parameters

    def require_shrinkable(self) -> None:
        """Check that the optimizer can continue with a smaller model.

        Raises:
            ShrinkError: The wrapped optimizer holds parameters or state outside of ``param_groups`` and ``state``, or
                atoms are compensated.
        """
        self._share_base()
        self.refuse_shrinking()
        if keeps_own_state(self.base) or inside(self.base):
            raise ShrinkError(
                f"{type(self.base).__name__} keeps parameters and state of its own, beside param_groups and state\n"
                "  effect  it would go on with those of the full model, so nothing was changed\n"
                "  to fix  shrink by construct_subnet at the end; or wrap a plain optimizer (SGD, AdamW...)"
            )

    def _keep_atoms(self, left: Tensor) -> None:
        """Discard the state of all other atoms."""
        first = self.param_groups[0]
        kept = first.get("oto_kept", torch.ones_like(left))
        first["oto_kept"] = kept.masked_scatter(kept.to(left.device), left)
        first["oto_sums"] = first["oto_sums"][:, left]
        self.atoms = self.atoms[left]

    # A model that is replaced ----------------------------------------------------------------------------------------

    def follow(self, model: nn.Module) -> None:
        """From now on, compare the parameters of a model with the trained ones. The model is referenced weakly."""
        self._followed = Followed.of(model, self.parameters())

    def look_at_model(self, n: int) -> None:
        """Compare the model's parameters with the trained ones before step ``n``, if a check is due.

        It is due at the first step, at the first and last step of a period, and once in ``CHECK_STEPS`` steps.

        Raises:
            ModelChangedError: A parameter of the model was replaced, or the optimizer has state of other tensors.
        """
        if not (self._unseen or self.schedule.starts_period(n) or self.schedule.ends_period(n) or n % CHECK_STEPS == 0):
            return
        if type(self.base).__module__.startswith("torch.optim"):  # other optimizers may use other keys in their state
            require_own_state(self.state, self.parameters(), type(self.base).__name__)
        if self._followed is None:
            self._unseen = False
        else:
            needed = {piece.parameter for group in self.node_groups for piece in group.zeros}
            pruning = self.choice.target.wants_less and n < self.schedule.end
            self._followed, self._unseen = self._followed.look(self.parameters(), needed, pruning), False

    # Writing ---------------------------------------------------------------------------------------------------------

    def scale_redundant_(self, factor: float) -> None:
        """Multiply the entries of redundant atoms by ``factor``."""
        self._plan().scale_redundant_(factor)

    def zero_pruned_(self) -> None:
        """Set the entries of pruned atoms to zero.

        A pruned atom of a *quiet* group is zero in all its slices, those that write it and those that read it, and the
        analysis proved that its gradients are then exactly zero. SGD, Adam and AdamW do not move such entries. So on
        the CPU, only the one-dimensional slices of quiet groups (biases, norms) are written at every step; the others
        are rewritten in turn, once in ``HEAL_STEPS`` steps. If a watched entry is not zero, something moves it that the
        proof does not cover, such as noise added to gradients. From this step on, no group is treated as quiet.
        """
        plan = self._plan()
        if plan.moved():
            self._loud, self._planned = True, None
            plan = self._plan()
        plan.zero_pruned_(self.clock)

    def zero_moments_(self) -> None:
        """Clear the state with which the wrapped optimizer would still move pruned entries: momentum, first moments."""
        parameters, pruned = self.parameters(), [rows_of(own, PRUNED) for own in self._codes()]
        for group, rows in zip(self.node_groups, pruned, strict=True):
            for piece in (group.slices if self._is_quiet(group) else group.zeros) if len(rows) else ():
                p = parameters.get(piece.parameter)
                for moment in () if p is None else moments_of(p, self.state.get(p) or {}):
                    place = place_of(piece, moment, rows, group.size, 0)
                    zero_([] if place is None else [place])

    @torch.no_grad()
    def zero_pruned_in(self, model: Any) -> None:
        """Set the entries of pruned atoms to zero in a copy of the model, such as a moving average of its weights.

        An average only approaches zero, so its slim model would be as large as the full one. One call after the last
        period is enough, before the average is evaluated or made slim; during training, call it after each update.

        Args:
            model: A module with the parameter names of the model; a wrapper such as
                ``torch.optim.swa_utils.AveragedModel``, ``timm.utils.ModelEmaV3`` or any object that holds the module
                as ``.module`` or ``.ema``; or a mapping from names to tensors, such as a ``state_dict()``.

        Raises:
            UnknownParameterError: The copy lacks a parameter that may be zeroed, or has it in a different shape.
        """
        names = {piece.parameter for group in self.node_groups for piece in group.zeros}
        shapes = {name: p.shape for name, p in self.parameters().items() if name in names}
        tensors = tensors_like(model, shapes, self.num_removed > 0)
        Rows.of(self.node_groups, [rows_of(own, PRUNED) for own in self._codes()], tensors).zero_()

    def commit(self) -> None:
        """Mark redundant atoms as pruned, and clear the wrapped optimizer's momentum of them."""
        codes = [own.masked_fill(own == REDUNDANT, PRUNED) for own in self._codes()]
        self.atoms = self.atoms.masked_fill(self.atoms == REDUNDANT, PRUNED)
        self._split = ((self.atoms, codes),)  # known without a copy from the device
        self.zero_moments_()
        self._record_cost()

    def _renew(self) -> None:
        self._planned = None

    def _is_quiet(self, group: NodeGroup) -> bool:
        # the analysis may set the attribute; a group without it is written at every step, which is always right
        return not self._loud and group.quiet and type(self.base) in ELEMENTWISE

    def _plan(self) -> Plan:
        """The plan of a step's writes, rebuilt when the state of atoms changes or a parameter was moved in memory."""
        atoms, pointers = self.settled, [address(p) for group in self.param_groups for p in group["params"]]
        if self._planned is None or self._planned[0] is not atoms or self._planned[1] != pointers:
            quiet = [self._is_quiet(group) for group in self.node_groups]
            plan = Plan.of(self.node_groups, self._codes(atoms), self.parameters(), quiet)
            self._planned = (atoms, pointers, plan)
        return self._planned[2]


def tensors_like(model: Any, shapes: Mapping[str, torch.Size], shrunk: bool) -> dict[str, Tensor]:
    """The tensors of a copy of a model, by the names of its parameters.

    Args:
        model: A module, a wrapper of one, or a mapping from names to tensors.
        shapes: The shapes of the required tensors, by name.
        shrunk: Whether the model was shrunk, so that the message mentions older copies.

    Raises:
        UnknownParameterError: The copy lacks a tensor, or has it in a different shape.
    """
    if isinstance(model, Mapping):
        tensors = {name.removeprefix("module."): tensor for name, tensor in model.items()} | dict(model)
    else:
        module = holder(model, shapes)
        tensors = {} if module is None else dict(module.named_parameters(remove_duplicate=False))
    bad = sorted(name for name, shape in shapes.items() if name not in tensors or tensors[name].shape != shape)
    if bad:
        raise UnknownParameterError(
            f"{type(model).__name__} has no {some(bad)} of the shape in the model\n"
            "  effect  nothing was zeroed in it\n"
            "  to fix  pass a copy of the model that is trained, what wraps the copy, or its state_dict()"
            + (": of the model as it was shrunk, not before" if shrunk else "")
        )
    return tensors


def moments_of(p: Tensor, state: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of ``state`` whose entries move the entries of ``p``.

    Quantized tensors (8-bit optimizers) are left out: they are not floating point, and code 0 does not mean zero.
    """
    held = [value for key, value in state.items() if isinstance(value, Tensor) and key not in DIVISORS]
    return [moment for moment in held if moment.is_floating_point() and moment.shape == p.shape]
