"""Node groups: one axis of the network with every parameter slice it names.

An *atom* is one entry of the axis. A *zero-invariant group* (ZIG) is one atom of a prunable node group: zero the
entries of its ``zeros`` slices, and the network computes what it would compute without the atom (OTO v1, section 3;
OTOv2, section 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cut:
    """One step into a dimension: view it as ``(before, middle, after)`` and take ``length`` entries of the middle."""

    before: int
    middle: int
    after: int
    offset: int
    length: int


@dataclass(frozen=True)
class Slice:
    """Where the atoms of a node group lie in one dimension of one parameter.

    The dimension may be a product (heads × width) or a sum (concatenated branches), so the atoms are reached by a few
    strided views and never by a list of indices.
    """

    parameter: str
    dim: int
    cuts: tuple[Cut, ...]

    @classmethod
    def whole(cls, parameter: str, shape: Sequence[int]) -> Slice:
        """All of a parameter as the entries of a single atom."""
        return cls(parameter, 0, (Cut(1, 1, shape[0], 0, 1),) if shape else ())

    def as_one(self) -> Slice:
        """The entries of all atoms as those of a single one."""
        *outer, last = self.cuts
        return replace(self, cuts=(*outer, Cut(1, 1, last.before * last.middle * last.after, 0, 1)))

    def of(self, tensor: Tensor) -> Tensor:
        """The view of ``tensor`` that holds the group's entries, shape ``(size, *rest)``; row ``a`` is atom ``a``."""
        dim = self.dim
        if not tensor.ndim:  # one that is a number has no dimension to cut, and is whole
            return tensor.unsqueeze(0)
        for cut in self.cuts:
            if cut.before != 1 or cut.after != 1:
                tensor = tensor.unflatten(dim, (cut.before, cut.middle, cut.after))
                dim += 1
            if cut.length != cut.middle:
                tensor = tensor.narrow(dim, cut.offset, cut.length)
        return tensor.movedim(dim, 0)


@dataclass(frozen=True)
class NodeGroup:
    """One axis of the network, with every slice of a parameter that it runs through.

    Attributes:
        name: Unique, stable for the same model: the first parameter slice it names.
        size: Number of atoms.
        slices: Every slice that disappears with an atom.
        zeros: The slices that must be zero for the removal to be exact; a subset of ``slices``.
        reason: Why the group stays whole; ``None`` if it is prunable.
        cause: Index of the call that is the reason, if a call is.
        min_kept: Least number of atoms to keep.
        quiet: Whether all gradients of an atom's ``slices`` are exactly zero once these are zero.
        tie: Groups of the same tie keep equally many atoms, each its own; ``None`` if the count is free.
        divisor: The kept count is a multiple of this; it divides ``size``.
        segment: Whether its one atom is a segment (:mod:`oto.groups.segments`), which may go like any other atom, and
            of which every slice is a whole parameter, or of entries behind a concatenation that have to be zero, too.
        among: For a segment, the sets of segments that it is one of, each with the number of those that stay.
    """

    name: str
    size: int
    slices: tuple[Slice, ...]
    zeros: tuple[Slice, ...] = ()
    reason: str | None = None
    cause: int | None = None
    min_kept: int = 1
    quiet: bool = False
    tie: str | None = None
    divisor: int = 1
    segment: bool = False
    among: tuple[tuple[str, int], ...] = ()

    @property
    def prunable(self) -> bool:
        return self.reason is None

    @property
    def factor(self) -> str | None:
        """Which factor of a dimension it is: ``"[12]×64"`` for heads, ``"12×[64]"`` for their width.

        ``None`` if its atoms are the entries of the dimension themselves, or it is a segment.
        """
        if self.segment:
            return None
        cuts = (self.zeros or self.slices)[0].cuts
        if not cuts or cuts[-1].before == cuts[-1].after == 1:
            return None
        before, after = (f"{n}" if n > 1 else "" for n in (cuts[-1].before, cuts[-1].after))
        return "×".join(filter(None, (before, f"[{self.size}]", after)))

    def zero_(self, tensors: Mapping[str, Tensor], atoms: Tensor) -> None:
        """Set the ``zeros`` of some atoms to zero, in place, without autograd.

        Args:
            tensors: By the names of parameters; the model's own, or those of a copy.
            atoms: Indices of atoms, int64, on any device.
        """
        for piece in self.zeros if len(atoms) else ():
            clear_(piece.of(tensors[piece.parameter].detach()), atoms)

    def __str__(self) -> str:
        atoms = "a segment" if self.segment else f"{self.size:,} atom{'s' * (self.size != 1)}"
        if not self.prunable:
            named = ", ".join(f"{piece.parameter}[{piece.dim}]" for piece in self.slices[:5])
            return f"{self.name}: {atoms}, whole because {self.reason}\n  of      {named}{_more(self.slices[5:])}"
        lines = [f"{self.name}: {atoms}, prunable, at least {self.min_kept} kept"]
        others = [piece for piece in self.slices if piece not in self.zeros]
        for word, pieces in (("zeroed", self.zeros), ("leaves", others)):
            if pieces:  # those after `leaves` are removed with an atom, and need not be zero
                named = ", ".join(f"{piece.parameter}[{piece.dim}]" for piece in pieces[:5])
                lines.append(f"  {word}  {named}{_more(pieces[5:])}")
        return "\n".join(lines)


def _more(rest: Sequence[Slice]) -> str:
    return f" and {len(rest)} more" if rest else ""


def computable(tensor: Tensor) -> Tensor:
    """A tensor of 8-bit floats in float32, since torch has few operators for them; any other one as it is."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def clear_(entries: Tensor, rows: Tensor) -> None:
    """Set rows to zero, in place, whatever the dtype."""
    if computable(entries) is not entries:
        entries = entries.view(torch.uint8)  # zero has no bit set
    entries.index_fill_(0, rows.to(entries.device), 0)


def is_finite(tensor: Tensor) -> Tensor:
    """Whether all entries are finite, as a bool tensor of no dimension: nothing is read back from a device."""
    tensor = computable(tensor)
    if type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and tensor.numel():
        return torch.stack(torch.aminmax(tensor.detach())).isfinite().all()  # one pass, 50 times as fast
    return tensor.detach().isfinite().all()
