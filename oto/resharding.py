"""Shrink a model that is spread over processes while it trains: ``oto.shrink(optimizer, shard=f)``.

1. Parameters are gathered one by one in the first process, which makes and proves the slim model, as in
   :meth:`oto.OTO.construct_subnet`.
2. All processes get the slim model without entries, and shard it by the user's function ``f``.
3. Every old parameter and its optimizer state are gathered, one at a time, and each process takes its part of what is
   left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from oto._torch import same_sharding
from oto.errors import ShrinkError, some
from oto.optim.entries import taken
from oto.optim.shrink import Moved
from oto.shards import (
    Sharding,
    from_first,
    gathered_tensor,
    is_sharded,
    local,
    made_by_first,
    reshard,
)
from oto.slim.edits import owner_of
from oto.slim.shrink import Shrunk, become

Shard = Callable[[nn.Module], Any]
"""A function that spreads a model over processes, in place."""


def in_every_process(model: nn.Module, make: Callable[[], Shrunk]) -> Shrunk:
    """Make a slim model in the first process, and give it to all of them, with parameters on ``meta``.

    Args:
        make: Called in the first process, while the model is whole there.

    Raises:
        OTOError: The slim model could not be made, or not be sent.
    """

    def emptied() -> Shrunk:
        made = make()
        _empty(made.model)
        return made

    def send(made: Shrunk) -> None:
        try:
            from_first(model, made)
        except Exception as refused:  # pickle's, before anything was sent
            raise ShrinkError(
                f"the slim {type(model).__name__} cannot be sent to the other processes: {refused}\n"
                "  effect  nothing was changed\n"
                "  to fix  construct_subnet(...) at the end, and shard the slim model"
            ) from refused

    return made_by_first(model, emptied, send, ShrinkError)


def _empty(model: nn.Module) -> None:
    """Replace all parameters by ones on ``meta``; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owner, last = owner_of(model, name)
        empty = torch.empty_like(p, device="meta")
        owner._parameters[last] = made.setdefault(id(p), nn.Parameter(empty, p.requires_grad))


class Spread(Moved):
    """One parameter before and after, of a model that is spread over processes.

    Every process has to call the same methods.
    """

    @property
    def whole(self) -> bool:
        """Whether it keeps all of its entries, in the same processes."""
        return super().whole and Sharding.of(self.old) == Sharding.of(self.new)

    def prune(self, tensor: Tensor) -> Tensor:
        """What is left of a tensor of the old shape, spread like the new parameter. Communicates."""
        from torch.distributed.tensor import distribute_tensor

        left = taken(gathered_tensor(tensor), self.entries)
        sharding = Sharding.of(self.new)
        if sharding is None:
            return left.to(self.new.device, copy=True)
        spread = distribute_tensor(left, sharding.mesh, sharding.placements, src_data_rank=None)
        return sharding.spread(spread.to_local().to(local(self.new).device, copy=True), self.new)


def spread_anew(model: nn.Module, slim: Shrunk, shard: Shard) -> list[Moved]:
    """Shard a slim model whose parameters are on ``meta``, and give each process its part of their entries.

    Args:
        model: The model that it was made from; it is not changed.

    Raises:
        ShrinkError: ``shard`` leaves a parameter whole that was spread over processes.
    """
    reshard(model)
    old = dict(model.named_parameters(remove_duplicate=False))
    former = {p: name for name, p in model.named_parameters()}
    device = next(local(p).device for p in old.values() if is_sharded(p))
    devices = {name: held.device for name, held in model.named_buffers(remove_duplicate=False)}
    buffers = list(slim.model.named_buffers(remove_duplicate=False))
    aliases: dict[int, list[str]] = {}
    for name, p in slim.model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(p), []).append(name)
    shard(slim.model)
    left = [name for name, p in slim.model.named_parameters() if is_sharded(old[name]) and not is_sharded(p)]
    if left:
        raise ShrinkError(
            f"shard= has not spread {some(left)} of the slim {type(model).__name__} over processes\n"
            "  effect  each process would hold all of it; nothing was changed\n"
            "  to fix  pass the function that shards the model: fully_shard for every block, then for the model itself"
        )
    slim.model.to_empty(device=device)
    for first, *others in aliases.values():  # to_empty makes two tensors of one that is tied
        for name in others:
            owner, last = owner_of(slim.model, name)
            owner._parameters[last] = slim.model.get_parameter(first)
    for name, held in buffers:
        owner, last = owner_of(slim.model, name)
        owner._buffers[last] = held.to(devices.get(name, device))
    moved: list[Moved] = [
        Spread(n, old[n], slim.model.get_parameter(n), own, former[old[n]]) for n, own in slim.parameters.items()
    ]
    with torch.no_grad():
        for m in moved:
            local(m.new).copy_(local(m.prune(m.old)))
    return moved


def become_spread(model: nn.Module, slim: nn.Module) -> None:
    """Turn ``model`` into the slim one in place, with its sharding."""
    become(model, slim)
    same_sharding(model, slim)


def without_averages(averages: Any, model: nn.Module) -> None:
    """Refuse averages of weights of a model that is spread over processes.

    Raises:
        ShrinkError: There are averages.
    """
    if list(averages):
        raise ShrinkError(
            f"averages= of a {type(model).__name__} that is spread over processes are not made slim\n"
            "  effect  nothing was changed\n"
            "  to fix  oto.shrink(optimizer, shard=...) without them, and begin a new average"
        )
