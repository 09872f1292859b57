"""Handle sharded tensors, of which each process holds a part (``DTensor``), and models with such parameters.

A *sharding* describes which entries of a tensor each process has. The rest of the library works on these entries as on
any other tensor, and uses this module for sums over processes::

    sharding = Sharding.of(p)            # None if every process has all of p
    own = local(p)                       # the entries of this process
    total = sharding.summed(own.sum())   # the sum over all processes

Functions marked "Communicates" must be called by every process of the mesh, in the same order.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from oto._torch import undistributed
from oto.errors import OptionError, OTOError, some

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

T = TypeVar("T")


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``; does not import that class, which would take a second."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """The entries on this process, in the tensor's own memory; a plain tensor itself."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor.detach()
    part: Tensor = sharded.to_local()
    return part


def address(tensor: Tensor) -> int:
    """The memory address of the entries on this process."""
    return local(tensor).data_ptr()


def gathered_tensor(tensor: Tensor) -> Tensor:
    """All entries, on every process. Communicates; for small tensors."""
    sharded: Any = tensor.detach()
    if not is_sharded(tensor):
        return tensor.detach()
    if local(tensor).device.type != (kind := sharded.device_mesh.device_type):  # CPUOffloadPolicy
        sharded = sharded.to(kind)
    entries: Tensor = sharded.full_tensor()
    return entries


@dataclass(frozen=True)
class Sharding:
    """Which entries of a tensor each process of a mesh has.

    Attributes:
        mesh: The mesh of processes.
        placements: For each dimension of the mesh, how the tensor is distributed along it.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Sharding | None:
        """The sharding of a tensor; ``None`` if every process has all of it."""
        if not is_sharded(tensor):
            return None
        sharded: DTensor = tensor  # type: ignore[assignment]
        sharding = cls(sharded.device_mesh, tuple(sharded.placements))
        return sharding if any(sharding.parted) else None

    @property
    def parted(self) -> tuple[bool, ...]:
        """For each dimension of the mesh, whether its processes have different entries."""
        return tuple(not placement.is_replicate() for placement in self.placements)

    def parts(self, dim: int) -> bool:
        """Whether processes have different entries along a dimension of the tensor."""
        return any(getattr(placement, "dim", None) == dim for placement in self.placements)

    def index(self, dim: int, dims: int, length: int) -> Tensor:
        """Which entries along a dimension this process has, int64, on the CPU; does not communicate.

        Args:
            dims: Number of dimensions of the tensor.
            length: Number of entries along ``dim``, over all processes.
        """
        return _index(self, dim, dims, length)

    def spread(self, own: Tensor, like: Tensor) -> Tensor:
        """A ``DTensor`` with this sharding, from the entries on this process.

        Args:
            own: The entries on this process.
            like: A tensor with the same shape and strides.
        """
        from torch.distributed.tensor import DTensor

        made: Tensor = DTensor.from_local(
            own, self.mesh, self.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        return made

    def summed(self, own: Tensor) -> Tensor:
        """The sum of ``own`` over the processes, bitwise equal on all of them. Communicates."""
        total = own.to(self.mesh.device_type, copy=True)
        for dim, parted in enumerate(self.parted):
            if parted:
                dist.all_reduce(total, group=self.mesh.get_group(dim))
        for dim in range(self.mesh.ndim) if self.mesh.ndim > 1 else ():  # process groups may add in different orders
            dist.broadcast(total, group=self.mesh.get_group(dim), group_src=0)
        return total.to(own.device)


@lru_cache(maxsize=256)
def _index(sharding: Sharding, dim: int, dims: int, length: int) -> Tensor:
    from torch.distributed.tensor import Replicate, distribute_tensor

    numbers = torch.arange(length, device=sharding.mesh.device_type)
    shape = [length if d == dim else 1 for d in range(dims)]
    alike = [own if getattr(own, "dim", None) == dim else Replicate() for own in sharding.placements]
    spread = distribute_tensor(numbers.reshape(shape), sharding.mesh, alike, src_data_rank=None)
    return spread.to_local().flatten().cpu()


def added_up(tensors: Sequence[Tensor], own: Sequence[Tensor]) -> Tensor:
    """For each tensor, the sum of a number over the processes that have parts of it: int64, shape ``(len(tensors),)``.

    Communicates.

    Args:
        own: For each tensor, the number for the part on this process, a tensor of shape ``()``.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.int64)
    numbers = torch.stack([number.to("cpu", torch.int64) for number in own])
    shardings = [Sharding.of(tensor) for tensor in tensors]
    total = torch.zeros_like(numbers)
    for sharding in dict.fromkeys(shardings):
        mine = numbers * torch.tensor([other == sharding for other in shardings])
        total += mine if sharding is None else sharding.summed(mine)
    return total


# Models ---------------------------------------------------------------------------------------------------------------


def sharded_names(model: nn.Module) -> list[str]:
    """The names of the sharded parameters, after a call of :func:`reshard`."""
    reshard(model)
    return [name for name, p in model.named_parameters(remove_duplicate=False) if is_sharded(p)]


def spread(model: nn.Module) -> str:
    """The beginning of a message that names the sharded parameters; empty if there are none.

    Example:
        ``"fc1.weight, fc2.weight of the Net are spread over processes"``
    """
    names = sharded_names(model)
    if not names:
        return ""
    return f"{some(names)} of the {type(model).__name__} {'is' if len(names) == 1 else 'are'} spread over processes"


def refuse_sharded(model: nn.Module, what: str, remedy: str = "do it before the model is sharded") -> None:
    """Check that no parameter is sharded, for operations that need whole weights in one process.

    Args:
        what: The operation, such as "a measurement of what groups cost", for the message.
        remedy: What the user can do, for the message.

    Raises:
        OptionError: Parameters are sharded over processes.
    """
    if where := spread(model):
        raise OptionError(
            f"{where}\n  effect  {what} needs whole weights in one process, and nothing was done\n  to fix  {remedy}"
        )


def reshard(model: nn.Module) -> None:
    """Make modules of ``fully_shard`` hold their shards again.

    After a forward without a backward, the outermost module holds whole parameters. Does not communicate.
    """
    for module in model.modules():
        if is_fully_sharded(module):
            owner: Any = module
            owner.reshard()


def is_fully_sharded(module: Any) -> bool:
    """Whether ``fully_shard`` was called with this module itself."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def refuse_flattened(model: nn.Module) -> None:
    """Check that parameters are not flattened or moved by FSDP1 or DeepSpeed's ZeRO-3, so that they have no rows.

    Raises:
        OptionError: The model is wrapped by one of these.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            raise OptionError(
                f"{type(model).__name__} is wrapped by FullyShardedDataParallel (FSDP1), which lays all parameters end"
                " to end and cuts them anywhere\n"
                "  effect  no process has rows of a weight that could be scored or zeroed; nothing was made\n"
                "  to fix  torch.distributed.fsdp.fully_shard (FSDP2) instead: fully_shard(block) for every block, then"
                " fully_shard(model); with accelerate or the HF Trainer, fsdp_version: 2"
            )
    gone = [name for name, p in model.named_parameters() if hasattr(p, "ds_id") and p.numel() == 0]
    if gone:
        raise OptionError(
            f"{some(gone)} of the {type(model).__name__} {'has' if len(gone) == 1 else 'have'} no entries here:"
            " DeepSpeed (ZeRO-3) holds them elsewhere, cut anywhere\n"
            "  effect  no process has rows of a weight that could be scored or zeroed; nothing was made\n"
            "  to fix  shard by torch.distributed.fsdp.fully_shard (FSDP2), or train with DistributedDataParallel"
        )


@contextmanager
def whole(model: nn.Module, values: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Context manager in which a sharded model is as in a single process: it has its own class, no hooks for
    distribution, and no ``DTensor`` parameters.

    Args:
        values: The tensors that the model then has, by all of their names. By default, sharded tensors are replaced by
            tensors on ``meta``, and all others stay.
    """
    reshard(model)
    made: dict[int, Tensor] = {}

    def instead(name: str, tensor: Tensor) -> Tensor:
        if values is None and not is_sharded(tensor):
            return tensor
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") if values is None else values[name]
            plain = not isinstance(tensor, nn.Parameter)
            made[id(tensor)] = new if plain else nn.Parameter(new, requires_grad=tensor.requires_grad)
        return made[id(tensor)]

    tables = [(path, table) for path, m in model.named_modules() for table in (m._parameters, m._buffers)]
    before = [(table, dict(table)) for _, table in tables]
    with undistributed(model):
        try:
            for path, table in tables:
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = instead(f"{path}.{name}".removeprefix("."), tensor)
            yield
        finally:
            for table, content in before:
                table.update(content)


@torch.no_grad()
def gathered(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of a model as whole tensors, by all of their names.

    In the first process they are on the CPU; in the others the dict is empty. Tensors are gathered one at a time.
    Communicates.
    """
    reshard(model)
    first = is_first(model)
    made: dict[int, Tensor] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for _, tensor in tensors:
        if id(tensor) not in made:
            entries = gathered_tensor(tensor)
            made[id(tensor)] = entries.to("cpu", copy=True) if first else torch.empty(0)
            del entries
    return {name: made[id(tensor)] for name, tensor in tensors} if first else {}


@contextmanager
def in_the_first(model: nn.Module) -> Iterator[bool]:
    """Context manager in which a sharded model is whole in the first process, on the device of its mesh; in other
    processes it is unchanged. Communicates.

    Yields:
        Whether this process has the whole model.
    """
    if not sharded_names(model):
        yield True
        return
    values, mesh = gathered(model), mesh_of(model)
    if mesh is None or not is_first(model):
        yield False
        return
    moved = {id(t): t.to(mesh.device_type) for t in values.values()}
    with whole(model, {name: moved[id(t)] for name, t in values.items()}):
        yield True


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """The mesh of processes over which parameters of a model are sharded; ``None`` if none are.

    Raises:
        OptionError: There are several meshes, and none of them contains the processes of all others.
    """
    meshes: dict[DeviceMesh, None] = {}
    for p in model.parameters():
        if is_sharded(p):
            sharded: DTensor = p  # type: ignore[assignment]
            meshes[sharded.device_mesh] = None
    if not meshes:
        return None
    largest = max(meshes, key=lambda mesh: mesh.size())
    if any(not set(mesh.mesh.flatten().tolist()) <= set(largest.mesh.flatten().tolist()) for mesh in meshes):
        raise OptionError(
            f"parameters of {type(model).__name__} are spread over {len(meshes)} meshes, and none has all processes\n"
            "  effect  no process can gather them all; nothing was made\n"
            "  to fix  a mesh for all parameters (of more dimensions, if need be)"
        )
    return largest


def is_first(model: nn.Module) -> bool:
    """Whether this is the first process of a model's mesh."""
    mesh = mesh_of(model)
    where = None if mesh is None else mesh.get_coordinate()
    return where is None or not any(where)


def from_first(model: nn.Module, thing: Any) -> Any:
    """The object that the first process of a model's mesh passes, on all processes; it is pickled. Communicates."""
    mesh = mesh_of(model)
    if mesh is None:
        return thing
    held = [thing]
    for dim in range(mesh.ndim):  # along the first dimension, then from there along the next one
        dist.broadcast_object_list(held, group=mesh.get_group(dim), group_src=0)
    return held[0]


def require_sendable(thing: Any) -> None:
    """Raise the exception of ``pickle`` for an object that :func:`from_first` could not send, or others not read.

    If a message could not be read, the processes would no longer wait for the same messages.
    """
    held = io.BytesIO()
    pickle.Pickler(held).dump(thing)
    held.seek(0)
    pickle.Unpickler(held).load()


@dataclass(frozen=True)
class _Failure:
    """Sent by the first process instead of a result if making that failed."""

    kind: type[OTOError]
    message: str


def made_by_first(model: nn.Module, make: Callable[[], T], send: Callable[[T], Any], otherwise: type[OTOError]) -> T:
    """Make something from the whole model in the first process, and return it on all of them.

    If that fails, every process raises an error. Communicates.

    Args:
        make: Called in the first process, while the model is whole there.
        send: Called with the result once the model is sharded again; passes what other processes get to
            :func:`from_first`. Objects that cannot be pickled must raise before anything is sent.
        otherwise: The error class of the other processes if the error of the first one is not an ``OTOError``.
    """
    values = gathered(model)
    if is_first(model):
        try:
            with whole(model, values):
                made = make()
            del values
            send(made)
        except Exception as error:  # the other processes wait for what is sent
            kind, message = (type(error), str(error)) if isinstance(error, OTOError) else (otherwise, repr(error))
            from_first(model, _Failure(kind, message))
            raise
        return made
    sent: T | _Failure = from_first(model, None)
    if isinstance(sent, _Failure):
        failure = sent.kind.__new__(sent.kind)  # the constructor may make another message from its argument
        failure.args = (f"{sent.message}\n  at      the first process, which makes the slim model for all",)
        raise failure
    return sent


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any tensor is sharded over processes."""
    return any(map(is_sharded, tensors))
