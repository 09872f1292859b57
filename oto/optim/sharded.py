"""Find the rows of a sharded tensor that are on this process, and the atom that each belongs to.

A view cannot contain entries of another process's shard. So along a sharded dimension, an index holds for every row the
atom that it is a part of. This covers any slice: heads times width, concatenated branches, and shards that are of
unequal size or empty.

Example: of 6 rows that are 3 heads times 2, a process that has rows 3 to 5 has one row of head 1 and both of head 2.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from oto.groups.node_group import Slice
from oto.shards import Sharding


def parts(
    piece: Slice, here: Tensor, sharding: Sharding, rows: Tensor | None, size: int
) -> tuple[Tensor, Tensor | None, int, Tensor | None]:
    """This process's part of some atoms of a slice whose dimension is sharded.

    Args:
        piece: The slice.
        here: The tensor's entries on this process.
        sharding: How the tensor is sharded.
        rows: The atoms, sorted int64 indices; ``None`` for all.
        size: Number of atoms of the slice.

    Returns:
        A view with the sharded dimension first; the indices of its rows that belong to these atoms, ``None`` if all do;
        the atom of the first row, 0 if the next item is given; and the atom of every row, ``None`` if each row is one
        atom, in order.
    """
    view = here.movedim(piece.dim, 0)
    owner, begin, atoms = _owners(piece, sharding, size, here.dim(), here.device)
    own = owner >= 0
    if rows is not None:
        wanted = torch.zeros(size, dtype=torch.bool)
        wanted[rows.cpu()] = True
        own &= wanted[owner.clamp_min(0)]
    chosen = None if own.all() else own.nonzero()[:, 0].to(here.device)
    return view, chosen, begin, atoms


@lru_cache(maxsize=1024)
def _owners(
    piece: Slice, sharding: Sharding, size: int, dims: int, device: torch.device
) -> tuple[Tensor, int, Tensor | None]:
    """The atom of every entry along the slice's dimension on this process, int64, on the CPU, -1 for none.

    Also returns the last two items of :func:`parts`; the atom of every row is on ``device``.
    """
    length = piece.cuts[0].before * piece.cuts[0].middle * piece.cuts[0].after if piece.cuts else size
    atom = torch.full((length,), -1)
    entries = Slice("", 0, piece.cuts).of(torch.arange(length)).reshape(size, -1)
    atom[entries] = torch.arange(size)[:, None].expand_as(entries)
    owner = atom[sharding.index(piece.dim, dims, length)]
    begin = int(owner[0]) if len(owner) else 0
    if begin >= 0 and torch.equal(owner, torch.arange(begin, begin + len(owner))):
        return owner, begin, None
    return owner, 0, owner.clamp_min(0).to(device)
