"""A model and its batches, for compression without training: moments of readers' inputs, losses, and undoing changes.

data = Data.of(batches, loss, holdout=0.25)     # the last quarter of the batches is held out
calibrated = Calibrated(model, data, reestimate=True)
calibrated.moments(readers)                     # over the calibration batches
calibrated.held_loss()                          # over those that were held out
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from oto.errors import OptionError, items_of
from oto.groups import NodeGroup
from oto.groups.node_group import computable
from oto.groups.readers import Reader
from oto.optim.compensate import (
    Key,
    Moments,
    listening,
    touched,
)
from oto.optim.entries import Place
from oto.optim.refusals import require_loss
from oto.shards import spread
from oto.slim.edits import named_tensors
from oto.trace.snapshot import preserved

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm

LossOf = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Data:
    """Batches for calibration, held-out batches for checks, and the loss."""

    calibration: Sequence[Any]
    held: Sequence[Any]
    loss: LossOf

    @classmethod
    def of(cls, batches: Iterable[Any], loss: LossOf | None, holdout: float) -> Data:
        """Divide batches, and hold out the last ones.

        Args:
            holdout: Share of the batches to hold out, in [0, 1).

        Raises:
            OptionError: There are too few batches, ``holdout`` is invalid, or there is no loss.
        """
        listed = items_of("batches", batches)
        if not callable(loss):
            raise OptionError(
                "one_shot needs a loss\n  to fix  pass loss=, a function of the model and a batch, such as"
                " lambda model, batch: cross_entropy(model(batch[0]), batch[1])"
            )
        if not (isinstance(holdout, int | float) and 0 <= holdout < 1):
            raise OptionError(f"holdout is {holdout!r}; it is the share of the batches that is held out, in [0, 1)")
        many = math.ceil(len(listed) * holdout)
        if not listed or many == len(listed):
            raise OptionError(
                f"{len(listed)} batches are given, of which {many} would be held out\n"
                "  effect  nothing was changed\n"
                "  to fix  give at least two batches, smaller ones if there is no more data (on the command line,"
                " --batch-size); or holdout=0"
            )
        return cls(listed[: len(listed) - many], listed[len(listed) - many :], loss)


def require_one_process(model: nn.Module, taker: str) -> None:
    """Check that there is a single process with whole parameters.

    Args:
        taker: What requires this, for the message.

    Raises:
        OptionError: Parameters are sharded, or there are several processes.
    """
    where = spread(model)
    if not where and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        where = "there are several processes"
    if where:
        raise OptionError(
            f"{taker} runs in one process, on whole parameters, and {where}\n"
            "  effect  nothing was changed\n"
            "  to fix  compress before the process group is made, or before the model is sharded; then distribute it"
        )


@dataclass(eq=False)
class Undo:
    """Copies of everything that is overwritten: whole tensors, or only the atoms that are zeroed.

    Attributes:
        whole: The tensors that were copied as a whole, by name.
        steps: Each place that is written to, with its former values, in the order of writing.
    """

    whole: dict[str, Tensor] = field(default_factory=dict)
    steps: list[tuple[Place, Tensor]] = field(default_factory=list)

    def remember(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """Copy some tensors before they are written to, and return the copies."""
        copies = {name: tensors[name].detach().clone() for name in names}
        for name, copy in copies.items():
            if name not in self.whole:
                self.whole[name] = copy
                self.steps.append((Place(_bits(tensors[name].detach()), None), _bits(copy)))
        return copies

    def remember_atoms(self, group: NodeGroup, tensors: Mapping[str, Tensor], atoms: Tensor) -> None:
        """Copy atoms of a node group before they are zeroed, unless their tensors were copied as a whole."""
        for piece in group.zeros if len(atoms) else ():
            if piece.parameter not in self.whole:
                view = piece.of(_bits(tensors[piece.parameter].detach()))
                place = Place(view, atoms.to(view.device))
                self.steps.append((place, place.copy()))

    def put_back(self) -> None:
        """Restore all copies, in reverse order."""
        with torch.no_grad():
            for place, before in reversed(self.steps):
                place.write_(before)

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(before.nbytes for _, before in self.steps)


def _bits(tensor: Tensor) -> Tensor:
    """The tensor itself, or a view as bytes of 8-bit floats, for which torch has few operators."""
    return tensor if computable(tensor) is tensor else tensor.view(torch.uint8)


@contextmanager
def undone() -> Iterator[Undo]:
    """Context manager that restores all copies if an exception is raised."""
    undo = Undo()
    try:
        yield undo
    except BaseException:
        undo.put_back()
        raise


@dataclass(eq=False)
class Calibrated:
    """A model that is being compressed, with its batches for calibration and checks.

    Attributes:
        model: The model.
        data: The batches and the loss.
        reestimate: Whether the statistics of batch norms are estimated again.
    """

    model: nn.Module
    data: Data
    reestimate: bool

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers, by all of their names."""
        return named_tensors(self.model)

    def moments(self, readers: Sequence[Reader]) -> dict[Key, Moments]:
        if not readers:
            return {}
        with preserved(self.model), listening(readers, self.tensors) as found:
            for batch in self.data.calibration:
                self.data.loss(self.model, batch)
        return found

    def held_loss(self) -> float | None:
        return self.loss_over(self.data.held) if self.data.held else None

    @cached_property
    def calibration_loss(self) -> float:
        return self.loss_over(self.data.calibration)

    def loss_over(self, batches: Sequence[Any]) -> float:
        with preserved(self.model), torch.no_grad():
            losses = [self.data.loss(self.model, batch) for batch in batches]
            for value in losses:
                if not isinstance(value, int | float):  # no gradient is needed, so a number is accepted
                    require_loss(value)
        return sum(map(float, losses)) / len(losses)

    def zero_(self, pack: Sequence[NodeGroup], going: Mapping[str, NDArray[np.int64]]) -> None:
        for group in pack:
            group.zero_(self.tensors, torch.from_numpy(going[group.name]))

    def writes(self, readers: Iterable[Reader]) -> set[str]:
        """The names of all tensors that a fold may write to, and of the statistics of batch norms."""
        return touched(readers) | {*self._norm_buffers}

    def saved(self, readers: Sequence[Reader]) -> dict[str, Tensor]:
        """Copies of the tensors in :meth:`writes`. (Removed atoms are zeroed with or without a fold.)"""
        return {name: self.tensors[name].detach().clone() for name in self.writes(readers)}

    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, old in tensors.items():
                self.tensors[name].data.copy_(old)

    def settle(self) -> tuple[bool, float | None]:
        """Estimate the statistics of batch norms again, unless that increases the held-out loss.

        Returns:
            Whether the new statistics are used, and the held-out loss.
        """
        loss = self.held_loss()
        if not self.reestimate or not self._norms:
            return False, loss
        old = {name: self.tensors[name].detach().clone() for name in self._norm_buffers}
        self.put_back(self._norms_anew())
        now = self.held_loss()
        if worse(now, loss):
            self.put_back(old)
            return False, loss
        return True, now

    def _norms_anew(self) -> dict[str, Tensor]:
        """The statistics of batch norms, averaged over the calibration batches."""
        with preserved(self.model), torch.no_grad():
            for norm in self._norms.values():
                norm.train()
                norm.momentum = None  # the mean over all batches
                norm.reset_running_stats()
            for batch in self.data.calibration:
                self.data.loss(self.model, batch)
            return {name: self.tensors[name].detach().clone() for name in self._norm_buffers}

    @cached_property
    def _norms(self) -> dict[str, Norm]:
        """The batch norms with running statistics, by path."""
        modules = self.model.named_modules()
        return {name: m for name, m in modules if isinstance(m, Norm) and m.running_mean is not None}

    @property
    def _norm_buffers(self) -> list[str]:
        return [f"{path}.{name}" if path else name for path in self._norms for name in ("running_mean", "running_var")]


def worse(loss: float | None, than: float | None) -> bool:
    """Whether a loss is not lower than another, or is NaN; ``False`` if one of them was not measured."""
    if loss is None or than is None:
        return False
    return not loss < than
