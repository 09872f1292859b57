"""A model that is spread over processes gets smaller while it trains: made slim in one, then spread anew over all.

The first process makes and proves the slim model from parameters that are gathered one by one, as for
:meth:`oto.OTO.construct_subnet`. Then all have it with empty parameters, shard it as the user says, and each takes its
part of what is left of every old parameter, and of its state, which are gathered one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from oto._torch import same_sharding
from oto.errors import OTOError, ShrinkError, some
from oto.optim.entries import taken
from oto.optim.shrink import Moved
from oto.shards import (
    Sharding,
    from_first,
    gathered,
    gathered_tensor,
    is_first,
    is_sharded,
    local,
    reshard,
    whole,
)
from oto.slim.edits import owner_of
from oto.slim.shrink import Shrunk, become

Shard = Callable[[nn.Module], Any]
"""What spreads a model over processes, in place."""


def in_every_process(model: nn.Module, make: Callable[[], Shrunk]) -> Shrunk:
    """What the first process makes of the whole model, on all of them, with parameters on ``meta``.

    Args:
        make: Called in the first process, while the model is whole there.

    Raises:
        OTOError: It could not be made, or not be sent.
    """
    values = gathered(model)
    made: Shrunk | None = None
    failure: Exception | None = None
    if is_first(model):
        try:
            with whole(model, values):
                made = make()
            _empty(made.model)
        except Exception as raised:  # the other processes wait to be told
            failure = raised
    del values
    kind, said = (type(failure), str(failure)) if isinstance(failure, OTOError) else (ShrinkError, repr(failure))
    try:
        sent = from_first(model, (kind, said) if made is None else made)
    except Exception as unsent:  # pickle's, before anything was sent
        failure = ShrinkError(
            f"the slim {type(model).__name__} cannot be sent to the other processes: {unsent}\n"
            "  effect  nothing was changed\n"
            "  to fix  construct_subnet(...) at the end, and shard the slim model"
        )
        sent = from_first(model, (ShrinkError, str(failure)))
    if failure is not None:
        raise failure
    if not isinstance(sent, Shrunk):
        raise sent[0](f"{sent[1]}\n  at      the first process, which makes the slim model for all")
    return sent


def _empty(model: nn.Module) -> None:
    """Take the entries out of all parameters; ties stay."""
    made: dict[int, nn.Parameter] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owner, last = owner_of(model, name)
        empty = torch.empty_like(p, device="meta")
        owner._parameters[last] = made.setdefault(id(p), nn.Parameter(empty, p.requires_grad))


class Spread(Moved):
    """One parameter of a model that is spread over processes, before and after. Every process has to ask."""

    @property
    def whole(self) -> bool:
        """Whether it stays as it was, and where it was."""
        return super().whole and Sharding.of(self.old) == Sharding.of(self.new)

    def prune(self, tensor: Tensor) -> Tensor:
        """The entries that are left of a tensor of the old shape, spread as the new parameter is. Communicates."""
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
        model: The model that it was made from, which stays as it is.

    Raises:
        ShrinkError: ``shard`` leaves a parameter that was spread over processes whole.
    """
    reshard(model)
    old = dict(model.named_parameters())
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
    for first, *others in aliases.values():  # it makes two of what is tied
        for name in others:
            owner, last = owner_of(slim.model, name)
            owner._parameters[last] = slim.model.get_parameter(first)
    for name, held in buffers:
        owner, last = owner_of(slim.model, name)
        owner._buffers[last] = held.to(devices.get(name, device))
    moved: list[Moved] = [Spread(n, old[n], slim.model.get_parameter(n), own) for n, own in slim.parameters.items()]
    with torch.no_grad():
        for m in moved:
            local(m.new).copy_(local(m.prune(m.old)))
    return moved


def become_spread(model: nn.Module, slim: nn.Module) -> None:
    """Turn ``model`` into the slim one in place, with its sharding."""
    become(model, slim)
    same_sharding(model, slim)


def without_averages(averages: Any, model: nn.Module) -> None:
    """Refuse averages of weights beside a model that is spread over processes.

    Raises:
        ShrinkError: There are some.
    """
    if list(averages):
        raise ShrinkError(
            f"averages= of a {type(model).__name__} that is spread over processes are not made slim\n"
            "  effect  nothing was changed\n"
            "  to fix  oto.shrink(optimizer, shard=...) without them, and begin a new average"
        )
