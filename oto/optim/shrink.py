"""Continue with the same optimizer when the model gets smaller in the middle of training.

The optimizer object stays, with its parameter groups, their order and their options, so whatever holds it keeps
working: learning-rate schedulers, ``GradScaler``, wrappers. Each parameter is replaced, its state sliced alike; one
that went with a segment leaves its group::

    follow(optimizer, moved, sliced_state(moved, optimizer))
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from oto.errors import ShrinkError
from oto.optim.entries import taken


@dataclass(frozen=True, eq=False)
class Moved:
    """One parameter, before and after.

    Attributes:
        name: As the smaller model has it.
        old, new: The tensors.
        entries: For each dimension the entries that remain, sorted int64 indices; ``None`` if all do.
        former: As the model had it before: another name of a tied one, if what held it by that went with a segment.
    """

    name: str
    old: Tensor
    new: Tensor
    entries: Sequence[NDArray[np.int64] | None]
    former: str = ""

    def prune(self, tensor: Tensor) -> Tensor:
        """The remaining entries of a tensor of the old shape, in new memory."""
        made = taken(tensor.detach(), self.entries)
        return made.clone() if made is tensor or made.data_ptr() == tensor.data_ptr() else made

    @property
    def whole(self) -> bool:
        return all(entries is None for entries in self.entries)


def sliced_state(moved: Sequence[Moved], optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    """The state of every old parameter, sliced for the new one. Nothing is changed.

    Raises:
        ShrinkError: Some state has neither the shape of its parameter nor a single entry.
    """
    return {m.old: _sliced(m, optimizer) for m in moved if m.old in optimizer.state}


def _sliced(moved: Moved, optimizer: Optimizer) -> dict[str, Any]:
    state: dict[str, Any] = optimizer.state[moved.old]
    if moved.whole:
        return state
    made: dict[str, Any] = {}
    for key, value in state.items():
        plain = not isinstance(value, Tensor | Sequence | Mapping) or isinstance(value, str)
        if plain or (isinstance(value, Tensor) and value.numel() == 1 and moved.old.numel() > 1):
            made[key] = value  # a number of steps, for example
        elif isinstance(value, Tensor) and value.shape == moved.old.shape and value.layout is torch.strided:
            made[key] = moved.prune(value)
        elif value is None or (not isinstance(value, Tensor) and not len(value)):
            made[key] = value
        else:
            shape = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise ShrinkError(
                f"{type(optimizer).__name__} keeps {key!r} of {shape} for {moved.name}, which has shape "
                f"{tuple(moved.old.shape)}\n"
                "  effect  it cannot be told what is left of it, so nothing was changed\n"
                "  to fix  use an optimizer whose state has the shape of its parameter (SGD, Adam, AdamW, RMSprop...),"
                " or shrink by construct_subnet and make a new optimizer"
            )
    return made


def renamed_in(moved: Sequence[Moved]) -> dict[str, str]:
    """The new names of parameters that lost their first one."""
    return {m.former: m.name for m in moved if m.former not in ("", m.name)}


def follow(
    optimizer: Optimizer,
    moved: Sequence[Moved],
    states: Mapping[Tensor, dict[str, Any]],
    gone: Collection[Tensor] = (),
) -> None:
    """Replace old parameters by new ones, with the state that was sliced for them.

    Args:
        gone: Old parameters that went with a segment: they leave their parameter groups, with their state.
    """
    new, away, renamed = {m.old: m.new for m in moved}, set(gone), renamed_in(moved)
    for group in optimizer.param_groups:
        left = [i for i, p in enumerate(group["params"]) if p not in away]
        names = group.get("param_names")
        if names is not None:
            names[:] = [renamed.get(names[i], names[i]) for i in left]
        group["params"][:] = [new.get(p, p) for p in (group["params"][i] for i in left)]
    for m in moved:
        m.new.grad = None if m.old.grad is None else m.prune(m.old.grad)
    held = [(new.get(p, p), states.get(p, state)) for p, state in optimizer.state.items() if p not in away]
    optimizer.state.clear()
    optimizer.state.update(held)
