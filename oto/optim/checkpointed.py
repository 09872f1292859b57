"""Keep the state of every atom and the progress of pruning, and save both in checkpoints.

    optimizer.progress          # step 130 of 300, period 1 of 5: 0 of 1,216 groups are zero, 122 on their way; ...
    optimizer.pruned_groups     # {"conv1.weight": tensor([3, 17])}

The contents of a checkpoint are described in :mod:`oto.optim.state`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oto.errors import OptionError, SetupError, first_line, some
from oto.optim.choice import Choice
from oto.optim.plan import PRUNED, REDUNDANT, rows_of
from oto.optim.schedule import Progress, Schedule
from oto.optim.state import ours, require_same_atoms, require_same_setup, with_ours
from oto.optim.wrapped import Params, foreign_options, keeps_own_state
from oto.optim.wrapper import Wrapper

ENTRY_BY_ENTRY = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adadelta,
    torch.optim.AdamW,
)
"""Optimizers that update each entry from its own gradient and state alone, so the state of pruned entries may be
cleared at any time."""


class Checkpointed(Wrapper):
    """A wrapping optimizer that records the state of every atom of its node groups, also in its state dict.

    Args:
        params, choice, schedule: As in :class:`oto.optim.SparseOptimizer`, and so is the attribute ``history``.
        options: The options of the wrapped optimizer, see :class:`oto.optim.options.BaseOptions`.
    """

    _split: tuple[tuple[Tensor, list[Tensor]], ...] = ()
    _unseen = True  # the model may have changed since it was last compared, for example while a checkpoint was loaded

    def __init__(self, params: Params, choice: Choice, schedule: Schedule, options: Mapping[str, Any]) -> None:
        self.choice, self.schedule, self.node_groups = choice, schedule, choice.groups
        self.history: list[dict[str, float]] = []
        super().__init__(params, options)
        self._fill_state()

    # The state of the atoms ------------------------------------------------------------------------------------------

    @property
    def clock(self) -> int:
        """Number of steps taken."""
        step: int = self.param_groups[0]["oto_step"]
        return step

    @clock.setter
    def clock(self, step: int) -> None:
        self.param_groups[0]["oto_step"] = step

    @property
    def atoms(self) -> Tensor:
        """The state of every atom: FREE, REDUNDANT or PRUNED, uint8, shape ``(N,)``. Never modified in place."""
        atoms: Tensor = self.param_groups[0]["oto_atoms"]
        return atoms

    @atoms.setter
    def atoms(self, atoms: Tensor) -> None:
        self.param_groups[0]["oto_atoms"] = atoms

    @property
    def settled(self) -> Tensor:
        """The state of the atoms from which the plan of a step is made.

        An algorithm may prune atoms at any step without reading back from the device which ones; then this is the state
        that was last read back.
        """
        return self.atoms

    @property
    def num_atoms(self) -> int:
        """Number of zero-invariant groups (ZIGs) of the model that may be pruned."""
        return sum(group.size for group in self.node_groups)

    @property
    def num_removed(self) -> int:
        """Number of ZIGs that were removed from the model when it was shrunk."""
        return int(self.choice.full.sum()) - self.num_atoms

    @property
    def num_pruned(self) -> int:
        """Number of ZIGs that are at zero for good, or removed already."""
        return self.num_removed + sum(int((own == PRUNED).sum()) for own in self._codes())

    @property
    def sparsity(self) -> float:
        """Share of the full network's ZIGs that are pruned, in [0, 1]."""
        return self.num_pruned / max(self.num_atoms + self.num_removed, 1)

    @property
    def progress(self) -> Progress:
        """The progress of pruning, to print or to read by field. A wrapper of this optimizer does not have it."""
        redundant, target = sum(int((own == REDUNDANT).sum()) for own in self._codes()), self.choice.target
        counts = np.array([int((own != PRUNED).sum()) for own in self._codes()], dtype=np.int64)
        return Progress(
            self.clock,
            self.schedule,
            self.num_atoms + self.num_removed,
            redundant,
            self.num_pruned,
            target.measure(counts),
            target.goal,
            target.unit,
        )

    def schedule_in(self, first: Mapping[str, Any]) -> Schedule:
        """The schedule of a run.

        Args:
            first: The first parameter group of its state dict.
        """
        return self.schedule

    def record(self, **numbers: float | Tensor) -> None:
        """Add numbers of the coming step (a loss, an accuracy) to :attr:`history`.

        Args:
            **numbers: Numbers by name, or tensors of one element; reading these synchronizes with their device.

        Raises:
            OptionError: A value is neither. Nothing is added.
        """
        made: dict[str, float] = {}
        for name, number in numbers.items():
            try:
                made[name] = float(number.detach() if isinstance(number, Tensor) else number)
            except (TypeError, ValueError, RuntimeError) as failure:
                raise OptionError(
                    f"{name} is no number to record: {first_line(failure)}\n"
                    "  effect  nothing was added to the history\n"
                    "  to fix  numbers, or tensors of one element, such as loss.mean()"
                ) from failure
        if not self.history or self.history[-1]["step"] != self.clock:
            self.history.append({"step": self.clock})
        self.history[-1] |= made

    def _record_cost(self) -> None:
        self.record(**{self.choice.target.unit: self.progress.cost})

    @property
    def redundant_groups(self) -> dict[str, Tensor]:
        """Atoms on their way to zero: node group name to sorted int64 indices, on the CPU."""
        return self._having(REDUNDANT)

    @property
    def pruned_groups(self) -> dict[str, Tensor]:
        """Atoms of the model that are pruned: node group name to sorted int64 indices, on the CPU."""
        return self._having(PRUNED)

    def _having(self, code: int) -> dict[str, Tensor]:
        rows = {g.name: rows_of(own, code) for g, own in zip(self.node_groups, self._codes(), strict=True)}
        return {name: atoms for name, atoms in rows.items() if len(atoms)}

    def _codes(self, atoms: Tensor | None = None) -> list[Tensor]:
        """``atoms`` on the CPU, one tensor per node group. Cached; synchronizes when ``atoms`` is a new tensor."""
        atoms = self.atoms if atoms is None else atoms
        for known, codes in self._split:
            if known is atoms:
                return codes
        codes = list(atoms.cpu().split_with_sizes([group.size for group in self.node_groups]))
        self._split = ((atoms, codes), *self._split[:1])
        return codes

    @property
    def kept(self) -> dict[str, NDArray[np.bool_]]:
        """For each node group, which atoms of the full network the model still has, bool."""
        full = self.choice.full.tolist()
        mask: Tensor | None = self.param_groups[0].get("oto_kept")
        own = torch.ones(sum(full), dtype=torch.bool) if mask is None else mask.cpu()
        return {g.name: m.numpy() for g, m in zip(self.node_groups, own.split_with_sizes(full), strict=True)}

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def describe_setup(self) -> dict[str, Any]:
        """The options that must agree with those of a checkpoint for pruning to continue, as plain values by name."""
        schedule = self.schedule
        return {
            "optimizer": type(self).__name__,
            "start_pruning_step": schedule.start,
            "pruning_steps": schedule.steps,
            "pruning_periods": schedule.periods,
            "pruning_exponent": schedule.exponent,
        } | self.choice.describe()

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} over {type(self.base).__name__}: {self.choice.target}", str(self.progress)]
        for number, group in enumerate(self.param_groups):
            shown = {k: v for k, v in group.items() if k not in ("params", "param_names") and not k.startswith("oto_")}
            options = ", ".join(f"{name}={value}" for name, value in sorted(shown.items()))
            lines.append(f"parameter group {number}: {len(group['params'])} parameters, {options}")
        return "\n".join(lines)

    def plan(self) -> str:
        """A printable text: what happens at which step, and how the learning rate should develop."""
        target, end = self.choice.target, self.schedule.end
        if not target.wants_less:
            return f"{target}\nnothing has to go: every step is one of {type(self.base).__name__}"
        rate = f"learning rate: as without pruning; high up to step {end}, so that what is left can adapt, then falling"
        return "\n".join([str(target), *self.schedule.lines(), rate])

    def state_dict(self) -> dict[str, Any]:
        """The state dict in the form of torch, with the state of pruning in the first parameter group.

        If the wrapped optimizer updates each entry from its own state alone, the momentum and first moments of pruned
        entries are set to zero first.

        If the wrapped optimizer overrides ``state_dict()`` (because it shards its state, or wraps another optimizer),
        its result is used, and the state of pruning is added to the first parameter group.

        Raises:
            OTOError: The wrapped optimizer's own state dict has no parameter groups.
        """
        if isinstance(self.base, ENTRY_BY_ENTRY):  # elsewhere, the state of pruned rows also affects the other rows
            self.zero_moments_()
        self.param_groups[0]["oto_history"] = json.dumps(self.history)
        if not keeps_own_state(self.base):
            return super().state_dict()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        saved = with_ours(self.base.state_dict(), self.param_groups[0], self.base)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            saved = post_hook(self, saved) or saved
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, as in torch.

        A state dict of the wrapped optimizer alone can be loaded too; pruning then starts from the beginning.

        Raises:
            SetupError: The state dict was saved under a different schedule or target, and pruning has begun under one
                of the two. (Before that there is only a ``SetupWarning``, and the setup of this optimizer applies.) Or
                it belongs to another wrapped optimizer with other options, or is not an optimizer's state dict.
            OTOError: It belongs to a different model, or only one of the two models was shrunk.
        """
        state_dict = copy.copy(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        if not isinstance(state_dict, Mapping) or not isinstance(state_dict.get("param_groups"), Sequence):
            found = f"it holds {some(map(str, state_dict))}" if isinstance(state_dict, Mapping) else "it is no mapping"
            raise SetupError(
                f"this is no state dict of an optimizer: {found}\n  effect  nothing was loaded\n"
                "  to fix  pass what optimizer.state_dict() gave; of a checkpoint with several parts, that part"
            )
        saved = state_dict["param_groups"][0] if state_dict["param_groups"] else {}
        kept = self.param_groups[0].get("oto_kept")
        if saved.get("oto_atoms") is not None:
            require_same_atoms(saved, self.param_groups[0], self.num_atoms, self.num_removed)
            require_same_setup(saved, self.param_groups[0])
        if isinstance(state := state_dict.get("state"), Mapping):
            state_dict["state"] = dict(state)  # a sharded optimizer removes the state that it does not own
        if not keeps_own_state(self.base) and (foreign := foreign_options(self.base, saved)):
            raise SetupError(
                f"the state dict is of another optimizer than {type(self.base).__name__}, with {some(foreign)}\n"
                "  effect  no step could be taken with it; nothing was loaded\n"
                "  to fix  wrap the optimizer that it was saved from (variant=, base=)"
            )
        self.base.load_state_dict(state_dict)
        self._share_base()
        if keeps_own_state(self.base):
            self.param_groups[0] |= ours(saved)
        if kept is not None:
            self.param_groups[0].setdefault("oto_kept", kept)
        self._fill_state()
        self.history = json.loads(self.param_groups[0]["oto_history"])
        self._renew()
        self._unseen = True
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # without derived values, hooks, and the `step` that a learning-rate scheduler puts on the instance
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_") and key != "step"}

    def _fill_state(self) -> None:
        first = self.param_groups[0]
        first.setdefault("oto_step", 0)
        first.setdefault("oto_history", "[]")
        if "oto_atoms" not in first:
            device = first["params"][0].device if first["params"] else "cpu"
            first["oto_atoms"] = torch.zeros(self.num_atoms, dtype=torch.uint8, device=device)
        if "oto_sums" not in first:
            self._forget_averages()
        first["oto_setup"] = json.dumps(self.describe_setup(), default=float)

    def _forget_averages(self) -> None:
        shape = len(self.choice.averaged), self.num_atoms
        self.param_groups[0] |= {"oto_sums": torch.zeros(shape, device=self.atoms.device), "oto_seen": 0}

    def zero_moments_(self) -> None:
        """Clear the state with which the wrapped optimizer would still move pruned entries, before it is saved."""
        raise NotImplementedError
