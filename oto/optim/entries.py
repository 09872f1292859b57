"""Read and write the entries of tensors by node group; the rest of ``optim`` accesses parameters through this module.

Optimizers and the choice work with vectors of one number per atom::

    rows = Rows.of(groups, [None] * len(groups), parameters)      # all atoms of all groups
    rows.sq_norm()                                                # ||x_g||², shape (N,)
    rows.zero_(pruned)                                            # bool, shape (N,)

Each operation takes a few calls per slice, not one per atom. Nothing is read back from a device unless the docstring
says "Synchronizes". Sums are accumulated at least in float32. (:mod:`oto.optim.saliency` also reads slices, together
with their gradients.)

If a tensor is sharded over processes (``DTensor``), each process reads and writes its own rows
(:func:`oto.optim.sharded.parts`), and a sum over the entries of an atom ends with an all-reduce of ``N`` numbers. So
all processes take part in the same sums in the same order, whether they have entries of a slice or not.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oto.groups.node_group import NodeGroup, Slice, clear_
from oto.optim.sharded import parts
from oto.shards import Sharding, local

BLOCK = 1 << 17
"""Number of entries that are multiplied at a time on a CPU. A product of half a megabyte stays in the cache, and has
memory reserved for it. Otherwise the allocator may request the memory of each product from the system and return it (it
does so until a program has freed larger blocks), and the page faults cost three times as much as the product itself."""

Rate = float | Tensor
"""The factor for the entries of one parameter: a number, or a tensor with a single element."""


class Place(NamedTuple):
    """Rows of a view into a tensor; one row per atom.

    Attributes:
        view: Shape ``(size, *rest)``; row ``a`` is atom ``a`` of the node group.
        rows: The rows of the view, sorted int64 indices; ``None`` for all.
        first: Total number of atoms in the node groups before this one.
        atoms: The atom that each row of the view is a part of, counted over all node groups, int64; ``None`` if row
            ``a`` is all of atom ``first + a``.
        sharding: How the tensor is sharded, if other processes have entries of these atoms; ``None`` if not.
    """

    view: Tensor
    rows: Tensor | None
    first: int = 0
    atoms: Tensor | None = None
    sharding: Sharding | None = None

    def read(self) -> Tensor:
        """The rows: a view if all rows of the view are meant, else a copy."""
        return self.view if self.rows is None else self.view.index_select(0, self.rows)

    def write_(self, rows: Tensor) -> None:
        """Overwrite the rows."""
        if self.rows is None:
            self.view.copy_(rows)
        else:
            self.view.index_copy_(0, self.rows, rows.to(self.view.dtype))

    def copy(self, into: Tensor | None = None) -> Tensor:
        """A copy of the rows, in the memory of an earlier copy if one is given."""
        if into is None:
            return self.view.clone() if self.rows is None else self.read()
        if self.rows is None:
            return into.copy_(self.view)
        return torch.index_select(self.view, 0, self.rows, out=into)

    def of(self, vector: Tensor) -> Tensor:
        """The numbers of these rows, from a vector of one number per atom.

        They are on the view's device, in a shape that broadcasts over its rows.
        """
        own = self.beside(vector)
        own = own if self.rows is None else own.index_select(0, self.rows)
        return own.reshape(-1, *[1] * (self.view.dim() - 1))

    def beside(self, vector: Tensor) -> Tensor:
        """The number of every row of the view, from a vector of one number per atom, on the view's device."""
        if self.atoms is not None:
            return sent(vector, self.view.device).index_select(0, self.atoms)
        return sent(vector.narrow(0, self.first, self.view.shape[0]), self.view.device)

    def add_(self, total: Tensor, part: Tensor) -> None:
        """Add ``part``, one number per row, to ``total``, one number per atom."""
        if self.atoms is not None:
            own = self.atoms if self.rows is None else self.atoms.index_select(0, self.rows)
            total.index_add_(0, sent(own, total.device), part.to(total.dtype))
        elif self.rows is None:
            total.narrow(0, self.first, self.view.shape[0]).add_(part)
        else:
            own = total.narrow(0, self.first, self.view.shape[0])
            own.index_add_(0, sent(self.rows, total.device), part.to(total.dtype))

    def blocks(self) -> Iterator[Place]:
        """The same rows in blocks that fit into a CPU's cache; in one block on other devices."""
        view = _flat(self.view)
        view = self.view if view is None or self.view.is_complex() else view
        count = len(view if self.rows is None else self.rows)
        size = max(BLOCK * len(view) // max(view.numel(), 1), 1) if is_here(view) else count
        for at in range(0, count, max(size, 1)):
            if self.rows is not None:
                yield self._replace(view=view, rows=self.rows[at : at + size])
            elif self.atoms is not None:
                yield self._replace(view=view[at : at + size], atoms=self.atoms[at : at + size])
            else:
                yield self._replace(view=view[at : at + size], first=self.first + at)

    def first_entries(self) -> Place:
        """The place that holds only the first entry of each row."""
        view = self.view
        while view.dim() > 1:
            view = view.select(1, 0)
        return self._replace(view=view)


@dataclass(frozen=True, eq=False)
class Rows:
    """The entries of some atoms of every node group, in some tensors.

    Attributes:
        places: Their places, slice after slice.
        names: The name of each place's tensor.
        atoms: Total number of atoms of all node groups, N.
        device: The device of vectors of one number per atom.
        shardings: How the tensors are sharded, with the dtype of sums over them; equal on every process and in the same
            order, even if a process has no entries.
        tensors: The names of all tensors that have entries of the atoms; equal on every process.
    """

    places: Sequence[Place]
    names: Sequence[str]
    atoms: int
    device: torch.device
    shardings: Mapping[Sharding, torch.dtype] = field(default_factory=dict)
    tensors: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        groups: Sequence[NodeGroup],
        chosen: Sequence[Tensor | None],
        tensors: Mapping[str, Tensor],
        *,
        slices: Sequence[Slice] | None = None,
        in_blocks: bool = False,
        device: torch.device | str = "cpu",
    ) -> Rows:
        """The entries of some atoms in some tensors.

        Args:
            groups: Node groups.
            chosen: The atoms of each node group, sorted int64 indices on any device; ``None`` for all.
            tensors: The tensors by the names of parameters; slices of other parameters are left out.
            slices: The slices to use; by default the ``zeros`` of each node group.
            in_blocks: Split places so that each fits into the cache and stays there between calls.
            device: The device of vectors of one number per atom.
        """
        places, names, first = list[Place](), list[str](), 0
        known: dict[str, None] = {}
        shardings: dict[Sharding, torch.dtype] = {}
        for group, rows in zip(groups, chosen, strict=True):
            for piece in (group.zeros if slices is None else slices) if rows is None or len(rows) else ():
                if piece.parameter in tensors:
                    tensor, known[piece.parameter] = tensors[piece.parameter].detach(), None
                    if (sharding := Sharding.of(tensor)) is not None:
                        shardings[sharding] = torch.promote_types(
                            shardings.get(sharding, torch.float32), summed_in(tensor)
                        )
                    here = place_of(piece, tensor, rows, group.size, first)
                    found = [] if here is None else list(here.blocks()) if in_blocks else [here]
                    places += found
                    names += [piece.parameter] * len(found)
            first += group.size
        return cls(places, names, first, torch.device(device), shardings, tuple(known))

    def __bool__(self) -> bool:
        return bool(self.places) or bool(self.shardings)

    def sq_norm(self, rates: Sequence[Rate] | None = None) -> Tensor:
        """``||x_g||^2`` of every atom, shape ``(N,)``.

        Args:
            rates: A factor for the part of each place.
        """
        return self._summed((sq_norm(place.read()) for place in self.places), rates)

    def scale_(self, factor: float) -> None:
        """Multiply the entries by a number."""
        scale_(self.places, factor)

    def zero_(self, which: Tensor | None = None) -> None:
        """Set the entries to zero, NaN and infinity included.

        Args:
            which: The atoms to zero, bool, shape ``(N,)``; by default all.
        """
        if which is None or is_here(which):
            zero_(self.places if which is None else self.among(which))
        else:
            self.mask_(which)

    def among(self, which: Tensor) -> list[Place]:
        """The places of some atoms, without places that have none of them. Synchronizes.

        Args:
            which: The atoms, bool, shape ``(N,)``.
        """
        found = list[Place]()
        mask, any_of = which.cpu(), dict[tuple[int, int], bool]()
        for place in self.places:
            own, some = mask, True
            if place.atoms is not None:
                own = mask.index_select(0, place.atoms.cpu())
            else:
                span = place.first, place.first + place.view.shape[0]
                own = mask[slice(*span)]
                if span not in any_of:
                    any_of[span] = bool(own.any())
                some = any_of[span]
            if some:
                kept = None if place.rows is None else place.rows[sent(own, place.rows.device)[place.rows]]
                rows = own.nonzero()[:, 0] if kept is None else kept
                found += [place._replace(rows=rows)] if len(rows) else []
        return found

    def mask_(self, which: Tensor) -> None:
        """:meth:`zero_` for some atoms, without reading back which ones."""
        for place in self.places:
            own = place.read().masked_fill_(place.of(which), 0)
            if place.rows is not None:
                place.write_(own)

    def copies(self, into: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Copies of the rows of each place, in the memory of earlier copies if these are given."""
        return [place.copy(None if into is None else into[i]) for i, place in enumerate(self.places)]

    def copy_(self, others: Iterable[Tensor]) -> None:
        """Overwrite the rows with the result of :meth:`copies`."""
        for place, other in zip(self.places, others, strict=True):
            place.write_(other)

    def _summed(self, parts: Iterable[Tensor], rates: Sequence[Rate] | None = None) -> Tensor:
        """The sum over the places of each atom, shape ``(N,)``."""
        total = Total(self.atoms, self.device, self.shardings)
        for i, (place, part) in enumerate(zip(self.places, parts, strict=True)):
            total.add_(place, part if rates is None else part * rates[i])
        return total.over_processes()


class Total:
    """One number per atom, summed place after place, then over the processes that have entries of the same atoms.

    Args:
        atoms, device, shardings: As in :class:`Rows`.
    """

    def __init__(self, atoms: int, device: torch.device, shardings: Mapping[Sharding, torch.dtype]) -> None:
        self.atoms, self.device = atoms, device
        self.here: Tensor | None = None
        self.there = {
            sharding: torch.zeros(atoms, dtype=dtype, device=device) for sharding, dtype in shardings.items()
        }  # these dtypes depend on the tensors alone, so that processes without entries use the same

    def add_(self, place: Place, part: Tensor) -> None:
        """Add one number for each row of a place."""
        part = sent(part, self.device)
        if place.sharding is not None:
            place.add_(self.there[place.sharding], part.to(self.there[place.sharding].dtype))
            return
        here = torch.zeros(self.atoms, dtype=part.dtype, device=self.device) if self.here is None else self.here
        self.here = here.to(torch.promote_types(here.dtype, part.dtype))
        place.add_(self.here, part)

    def over_processes(self) -> Tensor:
        """The sums, shape ``(N,)``. Communicates if a tensor is sharded over processes."""
        parts = [] if self.here is None else [self.here]
        parts += [sharding.summed(own) for sharding, own in self.there.items()]
        if not parts:
            return torch.zeros(self.atoms, device=self.device)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


def place_of(piece: Slice, tensor: Tensor, rows: Tensor | None, size: int, first: int) -> Place | None:
    """The place of some atoms of a node group in a tensor; ``None`` if this process has no entry of them.

    Args:
        rows: The atoms, sorted int64 indices on any device; ``None`` for all.
        size: Number of atoms of the node group.
        first: Total number of atoms in the node groups before it.
    """
    sharding = Sharding.of(tensor)
    tensor = local(tensor)
    if sharding is None or not sharding.parts(piece.dim):
        view = piece.of(tensor)
        place = Place(view, None if rows is None else sent(rows, tensor.device), first, None, sharding)
    else:
        view, chosen, begin, atoms = parts(piece, tensor, sharding, rows, size)
        atoms = None if atoms is None else atoms + first
        place = Place(view, chosen, first + begin, atoms, sharding)
    many = len(place.view if place.rows is None else place.rows)
    return place if many and place.view.numel() else None


def summed_in(tensor: Tensor) -> torch.dtype:
    """The dtype in which a tensor's entries are summed."""
    dtype = tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype
    return torch.promote_types(dtype, torch.float32)


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on another device. The copy is asynchronous, except to the CPU, where it may be read at once."""
    return tensor.to(device, non_blocking=torch.device(device).type != "cpu")


def is_here(tensor: Tensor) -> bool:
    """Whether the tensor is on the CPU, so that reading it does not synchronize."""
    return tensor.device.type == "cpu"


def scale_(places: Iterable[Place], factor: float) -> None:
    """Multiply the rows of some places by a number."""
    for place in places:
        if place.rows is None:
            place.view.mul_(factor)
        else:
            place.write_(place.read().mul_(factor))


def zero_(places: Iterable[Place]) -> None:
    """Set the rows of some places to zero; unlike multiplying by 0, this also clears NaN and infinity."""
    for place in places:
        if place.rows is None:
            place.view.zero_()
        else:
            clear_(place.view, place.rows)


def any_entry(places: Iterable[Place]) -> bool:
    """Whether any of the rows has an entry that is not zero. Synchronizes."""
    read = [place.read() for place in places]
    return bool(torch.cat(read).any()) if read else False


def taken(tensor: Tensor, entries: Sequence[NDArray[np.int64] | None]) -> Tensor:
    """The tensor with only some entries of each dimension; a copy unless all are kept.

    Args:
        entries: For each dimension, sorted int64 indices; ``None`` for all entries.
    """
    for dim, own in enumerate(entries):
        if own is not None:
            tensor = tensor.index_select(dim, torch.from_numpy(own).to(tensor.device))
    return tensor


def sq_norm(rows: Tensor) -> Tensor:
    """Squared L2 norm of every row, shape ``(size,)``."""
    flat = _flat(_real(rows))
    if flat is None or not flat.is_contiguous():  # torch's norm is several times slower on strided rows
        return dot(rows, rows)
    dtype = torch.promote_types(rows.real.dtype if rows.is_complex() else rows.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(flat.reshape(flat.shape[0], -1), dim=1, dtype=dtype)
    return norms.square()


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner product of every row with the same row of the other, shape ``(size,)``."""
    left, right = _real(left), _real(right)
    dtype = torch.promote_types(left.dtype, torch.float32)
    if left.dim() == 1:
        return left.to(dtype) * right.to(dtype)
    both = _flat(left), _flat(right, left)
    if both[0] is None or both[1] is None:
        return _strided_dot(left, right)
    sums = [_product(x, y, dtype).sum(1) for x, y in zip(_blocks(both[0]), _blocks(both[1]), strict=True)]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


class _Room(threading.local):
    """Memory for one product at a time, one for each thread."""

    def __init__(self) -> None:
        self.held: dict[torch.dtype, Tensor] = {}

    def of(self, dtype: torch.dtype, size: int) -> Tensor:
        if dtype not in self.held:
            self.held[dtype] = torch.empty(BLOCK, dtype=dtype)
        return self.held[dtype][:size]


_ROOM = _Room()


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """``x * y``; valid until the next call, which may use the same memory."""
    if not is_here(x) or x.numel() > BLOCK:
        return x.to(dtype) * y.to(dtype)
    return torch.mul(x.to(dtype), y.to(dtype), out=_ROOM.of(dtype, x.numel()).view(x.shape))


def _strided_dot(left: Tensor, right: Tensor) -> Tensor:
    """:func:`dot` for rows that are not contiguous: entries are read in the order of memory, across rows."""
    dtype = torch.promote_types(left.dtype, torch.float32)
    order = sorted(range(left.dim()), key=left.stride().__getitem__, reverse=True)
    left, right, own = left.permute(order), right.permute(order), order.index(0)
    products = (_product(x, y, dtype) for x, y in zip(_blocks(left), _blocks(right), strict=True))
    if own == 0:
        return torch.cat([product.flatten(1).sum(1) for product in products])
    total = next(products).sum(0)
    for product in products:
        total += product.sum(0)
    return total.movedim(own - 1, 0).reshape(left.shape[own], -1).sum(1)


def _blocks(rows: Tensor) -> Iterator[Tensor]:
    """The rows in blocks that fit into a CPU's cache; in one block on other devices."""
    entries = rows.numel()
    if not is_here(rows) or entries <= BLOCK:
        yield rows
        return
    yield from rows.split(max(BLOCK * rows.shape[0] // entries, 1))


def _flat(rows: Tensor, like: Tensor | None = None) -> Tensor | None:
    """The rows as a matrix, with entries in the order of memory; ``None`` if the strides do not allow it.

    Args:
        like: A tensor whose order of entries is used instead.
    """
    if rows.dim() <= 2:
        own = rows if like is None else like
        return None if own.dim() == 2 and own.stride(0) < own.stride(1) else rows
    strides = (rows if like is None else like).stride()
    order = sorted(range(1, rows.dim()), key=lambda dim: -strides[dim])
    rows = rows.permute(0, *order)
    stride = 1 if rows.numel() == 0 else rows.stride(-1)
    for dim in range(rows.dim() - 1, 1, -1):
        if rows.shape[dim] != 1 and rows.stride(dim) != stride:
            return None
        stride *= rows.shape[dim]
    if rows.shape[1] != 1 and rows.stride(1) != stride:
        return None
    return rows.flatten(1)


def _real(rows: Tensor) -> Tensor:
    """Complex entries as pairs of real ones, which are trained and become zero together; others unchanged."""
    return torch.view_as_real(rows) if rows.is_complex() else rows
