"""Node groups: one axis of the network with every parameter slice that carries it.

An *atom* is one entry of the axis. A *zero-invariant group* (ZIG) is one atom of a prunable node group: if the entries
of its ``zeros`` slices are zero, the network computes the same as without the atom (OTO v1, section 3; OTOv2, section
4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cut:
    """One step into a dimension: view it as ``(before, middle, after)``, and take ``length`` entries of the middle one
    from ``offset`` on."""

    before: int
    middle: int
    after: int
    offset: int
    length: int


@dataclass(frozen=True)
class Slice:
    """Where the atoms of a node group lie in one dimension of one parameter.

    The dimension may be a product (heads × width) or a sum (concatenated branches). The atoms are always a few strided
    views of it, so no list of indices is needed.
    """

    parameter: str
    dim: int
    cuts: tuple[Cut, ...]

    @classmethod
    def whole(cls, parameter: str, shape: Sequence[int]) -> Slice:
        """The slice of a whole parameter, as the entries of a single atom."""
        return cls(parameter, 0, (Cut(1, 1, shape[0], 0, 1),) if shape else ())

    def as_one(self) -> Slice:
        """The slice with the entries of all its atoms as those of a single atom."""
        *outer, last = self.cuts
        return replace(self, cuts=(*outer, Cut(1, 1, last.before * last.middle * last.after, 0, 1)))

    def of(self, tensor: Tensor) -> Tensor:
        """The view of ``tensor`` that holds the group's entries, shape ``(size, *rest)``; row ``a`` is atom ``a``."""
        dim = self.dim
        if not tensor.ndim:  # a scalar has no dimension to cut; it is taken whole
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
    """One axis of the network, with every parameter slice that carries it.

    Attributes:
        name: Unique, stable for the same model: a parameter of the group, numbered if several groups share it.
        size: Number of atoms.
        slices: Every slice that is removed with an atom.
        zeros: The slices that must be zero for the removal to be exact; a subset of ``slices``.
        reason: Why the group stays whole; ``None`` if it is prunable.
        cause: Index of the call that is the reason, if one is.
        min_kept: Minimum number of atoms to keep.
        quiet: Whether all gradients of an atom's ``slices`` are exactly zero once these are zero.
        tie: Groups of the same tie keep equally many atoms, not necessarily the same; ``None`` if the count is free.
        divisor: The kept count is a multiple of this; it divides ``size``.
        segment: Whether the only atom is a segment (:mod:`oto.groups.segments`), which can be removed like any atom.
            Each of its slices is a whole parameter, or the entries after a concatenation that must be zero as well.
        among: For a segment, the sets of segments that it belongs to, each with the number of members that must stay.
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
        """The factor of a dimension that the group is: ``"[12]×64"`` for heads, ``"12×[64]"`` for their width.

        ``None`` if the atoms are the entries of the dimension themselves, or if the group is a segment.
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
            tensors: Tensors by the names of parameters; the model's own, or those of a copy.
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
            if pieces:  # the slices listed after `leaves` are removed with an atom, but need not be zero
                named = ", ".join(f"{piece.parameter}[{piece.dim}]" for piece in pieces[:5])
                lines.append(f"  {word}  {named}{_more(pieces[5:])}")
        return "\n".join(lines)


def _more(rest: Sequence[Slice]) -> str:
    return f" and {len(rest)} more" if rest else ""


def computable(tensor: Tensor) -> Tensor:
    """The tensor, converted to float32 if it holds 8-bit floats, for which torch has few operators."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def clear_(entries: Tensor, rows: Tensor) -> None:
    """Set rows to zero, in place, for any dtype."""
    if computable(entries) is not entries:
        entries = entries.view(torch.uint8)  # zero has no bit set
    entries.index_fill_(0, rows.to(entries.device), 0)


def is_finite(tensor: Tensor) -> Tensor:
    """Whether all entries are finite, as a bool tensor of shape ``()``, so that the device is not synchronized."""
    tensor = computable(tensor)
    if type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and tensor.numel():
        return torch.stack(torch.aminmax(tensor.detach())).isfinite().all()  # one pass, 50 times as fast
    return tensor.detach().isfinite().all()
