"""Slices of tensors that are spread over processes: which of the rows that are here belong to which atom.

A view cannot cross the border of a shard, so along the dimension that is cut an index says for every row the atom that
it is a part of. That is enough for any slice: heads times width, branches side by side, shards of unequal size or none.
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
    """What this process has of some atoms of a slice, whose dimension is cut.

    Args:
        here: The entries of this process.
        sharding: How the tensor is spread.
        rows: The atoms, sorted int64 indices; ``None``: all.
        size: How many atoms the slice has.

    Returns:
        A view with the cut dimension first; which of its rows, ``None`` if all; the atom of the first row, and the atom
        of every row, ``None`` if one row after another is one atom after another.
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
    """The atom of every entry along the slice's dimension that is here, -1 for none, int64, on the CPU; and how that is
    said: by the first one, where they follow each other, or by all of them, on the device."""
    length = piece.cuts[0].before * piece.cuts[0].middle * piece.cuts[0].after if piece.cuts else size
    atom = torch.full((length,), -1)
    entries = Slice("", 0, piece.cuts).of(torch.arange(length)).reshape(size, -1)
    atom[entries] = torch.arange(size)[:, None].expand_as(entries)
    owner = atom[sharding.index(piece.dim, dims, length)]
    begin = int(owner[0]) if len(owner) else 0
    if begin >= 0 and torch.equal(owner, torch.arange(begin, begin + len(owner))):
        return owner, begin, None
    return owner, 0, owner.clamp_min(0).to(device)
