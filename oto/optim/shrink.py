"""Continue with the same optimizer when the model is made smaller during training.

The optimizer object stays, with its parameter groups, their order and their options, so objects that refer to it keep
working: learning-rate schedulers, ``GradScaler``, wrappers. Each parameter is replaced, and its state is sliced like
the parameter; one that was removed with a segment is removed from its parameter group::

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
    """One parameter, before and after the model was made smaller.

    Attributes:
        name: Its name in the smaller model.
        old, new: The tensors.
        entries: For each dimension, the entries that remain, sorted int64 indices; ``None`` if all do.
        former: Its name in the former model. A tied parameter has another name if the module of its first name was
            removed with a segment.
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
    """The state of every old parameter, sliced for the new one. The optimizer is not changed.

    Raises:
        ShrinkError: A tensor of the state has neither the shape of its parameter nor a single entry, or the state holds
            a non-empty collection.
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
            made[key] = value  # for example a number of steps
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
    """The new names of parameters whose name has changed, by their former names."""
    return {m.former: m.name for m in moved if m.former not in ("", m.name)}


def follow(
    optimizer: Optimizer,
    moved: Sequence[Moved],
    states: Mapping[Tensor, dict[str, Any]],
    gone: Collection[Tensor] = (),
) -> None:
    """Replace old parameters by new ones, with the state that was sliced for them.

    Args:
        states: The result of :func:`sliced_state`.
        gone: Old parameters that were removed with a segment; they are removed from their parameter groups, with their
            state.
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
