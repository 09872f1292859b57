"""Shrink a sharded model during training: ``oto.shrink(optimizer, shard=f)``.

1. Parameters are gathered one by one in the first process. It makes and proves the slim model, as in
   :meth:`oto.OTO.construct_subnet`, and makes slim forms of ``averages=`` with parameters on ``meta``.
2. All processes get the slim model and averages with parameters on ``meta``, and shard them by the user's function
   ``f``.
3. Every old parameter, its optimizer state and its averages are gathered, one at a time, and each process keeps its
   part of the remaining entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from oto._torch import same_sharding
from oto.errors import ShrinkError, first_line, some
from oto.optim.entries import taken
from oto.optim.shrink import Moved
from oto.shards import (
    Sharding,
    from_first,
    gathered_tensor,
    is_fully_sharded,
    is_sharded,
    local,
    made_by_first,
    require_sendable,
    reshard,
    whole,
)
from oto.slim.edits import owner_of
from oto.slim.shrink import Entries, Shrunk, average_in, become

Shard = Callable[[nn.Module], Any]
"""A function that shards a model over processes, in place."""


def in_every_process(model: nn.Module, averages: Sequence[nn.Module], make: Callable[[], Shrunk]) -> Shrunk:
    """Make a slim model in the first process, and return it on all of them, with parameters on ``meta``.

    Args:
        averages: Averages of the model's weights, the result of :func:`averages_of`.
        make: Called in the first process, while the model is whole there, and averages have parameters on ``meta``.

    Raises:
        OTOError: The slim model could not be made or sent.
    """

    def emptied() -> Shrunk:
        with ExitStack() as without_entries:
            for average in averages:
                without_entries.enter_context(whole(average))
            made = make()
        slim = [own for _, own in made.averages]
        for own in (made.model, *slim):
            _empty(own)
        return replace(made, averages=[(nn.Module(), own) for own in slim])  # each process uses its own full averages

    def send(made: Shrunk) -> None:
        try:
            require_sendable(made)
        except Exception as refused:  # objects of extensions raise what they like
            raise ShrinkError(
                f"the slim {type(model).__name__} cannot be sent to the other processes: {first_line(refused)}\n"
                "  effect  nothing was changed\n"
                "  to fix  construct_subnet(...) at the end, and shard the slim model"
            ) from refused
        from_first(model, made)

    made = made_by_first(model, emptied, send, ShrinkError)
    return replace(made, averages=[(own, slim) for own, (_, slim) in zip(averages, made.averages, strict=True)])


def _empty(model: nn.Module) -> None:
    """Replace all parameters by parameters on ``meta``; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owner, last = owner_of(model, name)
        empty = torch.empty_like(p, device="meta")
        owner._parameters[last] = made.setdefault(id(p), nn.Parameter(empty, p.requires_grad))


class Spread(Moved):
    """One parameter of a sharded model, before and after the model was made smaller.

    All processes must call the same methods in the same order.
    """

    @property
    def whole(self) -> bool:
        """Whether it keeps all of its entries, on the same processes."""
        return super().whole and Sharding.of(self.old) == Sharding.of(self.new)

    def prune(self, tensor: Tensor) -> Tensor:
        """The remaining entries of a tensor of the old shape, sharded like the new parameter. Communicates."""
        from torch.distributed.tensor import distribute_tensor

        left = taken(gathered_tensor(tensor), self.entries)
        sharding = Sharding.of(self.new)
        if sharding is None:
            return left.to(self.new.device, copy=True)
        spread = distribute_tensor(left, sharding.mesh, sharding.placements, src_data_rank=None)
        return sharding.spread(spread.to_local().to(local(self.new).device, copy=True), self.new)


def spread_anew(model: nn.Module, slim: nn.Module, parameters: Mapping[str, Entries], shard: Shard) -> list[Moved]:
    """Shard a slim model whose parameters are on ``meta``, and give each process its part of their entries.

    Communicates.

    Args:
        model: The model or average from which it was made; it is not changed.
        slim: The slim model.
        parameters: The kept entries of each parameter, as in :class:`oto.slim.shrink.Shrunk`.
        shard: Shards the slim model in place.

    Raises:
        ShrinkError: ``shard`` does not shard a parameter that was sharded before.
    """
    reshard(model)
    old = dict(model.named_parameters(remove_duplicate=False))
    former = {p: name for name, p in model.named_parameters()}
    device = next(local(p).device for p in old.values() if is_sharded(p))
    devices = {name: held.device for name, held in model.named_buffers(remove_duplicate=False)}
    buffers = list(slim.named_buffers(remove_duplicate=False))
    aliases: dict[int, list[str]] = {}
    for name, p in slim.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(p), []).append(name)
    shard(slim)
    left = [name for name, p in slim.named_parameters() if is_sharded(old[name]) and not is_sharded(p)]
    if left:
        raise ShrinkError(
            f"shard= has not spread {some(left)} of the slim {type(model).__name__} over processes\n"
            "  effect  each process would hold all of it; nothing was changed\n"
            "  to fix  pass the function that shards the model: fully_shard for every block, then for the model itself"
        )
    slim.to_empty(device=device)
    for first, *others in aliases.values():  # to_empty unties tied parameters
        for name in others:
            owner, last = owner_of(slim, name)
            owner._parameters[last] = slim.get_parameter(first)
    for name, held in buffers:
        owner, last = owner_of(slim, name)
        owner._buffers[last] = held.to(devices.get(name, device))
    moved: list[Moved] = [
        Spread(n, old[n], slim.get_parameter(n), own, former[old[n]]) for n, own in parameters.items()
    ]
    with torch.no_grad():
        for m in moved:
            local(m.new).copy_(local(m.prune(m.old)))
    return moved


def become_spread(model: nn.Module, slim: nn.Module) -> None:
    """Turn ``model`` into the slim one in place, with its sharding."""
    become(model, slim)
    same_sharding(model, slim)


def averages_of(model: nn.Module, averages: Iterable[Any]) -> list[nn.Module]:
    """The averages of a model's weights, which must be sharded like the model.

    Args:
        averages: Averages, or their wrappers.

    Raises:
        ShrinkError: An average belongs to another model, or is not sharded like this one.
    """
    found = []
    for wrapper in averages:
        inner = average_in(wrapper, model)
        reshard(inner)
        theirs = dict(inner.named_parameters())
        other = [n for n, p in model.named_parameters() if Sharding.of(p) != Sharding.of(theirs[n])]
        if other or (wrapper is not inner and is_fully_sharded(wrapper)):
            what = f"has {some(other)} spread in another way" if other else "was given to fully_shard itself"
            raise ShrinkError(
                f"the {type(wrapper).__name__} {what} than the {type(model).__name__}\n"
                "  effect  it cannot follow what each process keeps; nothing was changed\n"
                "  to fix  make the average before the model is sharded, and shard the module that it holds in the same"
                " way: average = AveragedModel(model), f(average.module), f(model)"
            )
        found.append(inner)
    return found
