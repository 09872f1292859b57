"""Keep a copy of some rows, to compare their values before and after a step.

    copied = Copied(rows)
    sq = copied.remember_()                            # copies x; ||x_g||² of every atom
    ...                                                # a step, from x to x̂
    inner = copied.subtract_dot_(factors, rates)       # x̂_g -= rate · factor_g · x_g, then <x̂_g, x_g>

A model has hundreds of slices. Most are short (biases, norms), and a torch call on a short slice costs as much as
reading a hundred kilobytes. So everything that stays the same is prepared once: rows as matrices, memory for products
and for sums; and all slices with one entry per atom are handled as one vector. A step reads and writes each entry only
as often as its formula requires, block by block, so that the data of a block stays in the cache between calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from oto.optim.entries import Place, Rate, Rows, Total, dot, is_here, sent, sq_norm

NOTHING = torch.empty(0)


class Copied:
    """The entries of some atoms, and a copy of their earlier values.

    Args:
        rows: The entries; on a CPU preferably in blocks.
        former: A copy whose memory is reused; it must not be used any more.

    Attributes:
        rows: The entries.
    """

    def __init__(self, rows: Rows, former: Copied | None = None) -> None:
        self.rows = rows
        self._counts = [len(place.view if place.rows is None else place.rows) for place in rows.places]
        self._dtype = torch.float32
        for place in rows.places:
            self._dtype = torch.promote_types(self._dtype, place.view.real.dtype)
        sums = torch.empty(2, sum(self._counts), dtype=self._dtype, device=rows.device)
        self._sums = sums.unbind()
        self._index = self._atoms()
        self._room: Tensor = NOTHING if former is None else former._room
        self._used = 0
        self._parts = self._parted()

    def _atoms(self) -> Tensor:
        """The atom of each row, int64."""
        own = [torch.empty(0, dtype=torch.int64, device=self.rows.device)]
        for place in self.rows.places:
            atoms = torch.arange(place.view.shape[0]) + place.first if place.atoms is None else place.atoms
            atoms = sent(atoms, self.rows.device)
            own.append(atoms if place.rows is None else atoms[sent(place.rows, self.rows.device)])
        return torch.cat(own)

    def _parted(self) -> list[_Part]:
        places, device = self.rows.places, self.rows.device
        slots = list(zip(*(own.split(self._counts) for own in self._sums), strict=True)) if places else []
        flat = [is_here(p.view) and p.view.dtype == self._dtype and _is_matrix(p.view) for p in places]
        self._take([p for p, is_flat in zip(places, flat, strict=True) if is_flat])
        most = max((p.view[:n].numel() for p, n, own in zip(places, self._counts, flat, strict=True) if own), default=0)
        scratch = torch.empty(2, most, dtype=self._dtype)
        thin: dict[tuple[int, torch.dtype], list[int]] = {}
        parts, turns = list[_Part](), _turns(self.rows.names, [place.view for place in places])
        ends = [0, *torch.tensor(self._counts).cumsum(0).tolist()]
        for i, place in enumerate(places):
            span = (ends[i], ends[i + 1])
            if place.view.dim() == 1 and place.view.device == device and not place.view.is_complex():
                thin.setdefault((turns[i], place.view.dtype), []).append(i)
            elif flat[i]:
                parts.append(_Matrix(place, span, slots[i], scratch, self._room_for(place, self._counts[i])))
            else:
                parts.append(_Part(place, span, slots[i]))
        for key in sorted(thin, key=lambda key: key[0]):
            parts.append(_Thin([(places[i], ends[i], ends[i + 1]) for i in thin[key]], self._sums))
        return parts

    def _take(self, places: Sequence[Place]) -> None:
        """Allocate memory for copies of all these places, unless that of the former copy is large enough."""
        size = sum(p.view.shape[1] * len(p.view if p.rows is None else p.rows) for p in places)
        if self._room.dtype != self._dtype or len(self._room) < size or not size:
            self._room = torch.empty(size, dtype=self._dtype)

    def _room_for(self, place: Place, count: int) -> Tensor:
        start, width = self._used, place.view.shape[1]
        self._used += count * width
        return self._room[start : self._used].view(count, width)

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return sum(part.copy.nbytes for part in self._parts)

    def remember_(self) -> Tensor:
        """Copy the entries, and return ``||x_g||^2`` of every atom, shape ``(N,)``."""
        for part in self._parts:
            part.remember()
        return self._total(0)

    def subtract_(self, factors: Tensor, rates: Sequence[Rate]) -> None:
        """``x̂_g -= rate * factor_g * x_g``, with a factor per atom, shape ``(N,)``, and a rate per place."""
        factors = self._of_rows(factors, rates)
        for part in self._parts:
            part.subtract(factors)

    def subtract_dot_(self, factors: Tensor, rates: Sequence[Rate]) -> Tensor:
        """:meth:`subtract_`, then return ``<x̂_g, x_g>``, shape ``(N,)``; both in one pass over the entries."""
        factors = self._of_rows(factors, rates)
        for part in self._parts:
            part.dot(part.subtract_read(factors), 0)
        return self._total(0)

    def moved(self) -> tuple[Tensor, Tensor]:
        """``<x̂_g - x_g, x_g>`` and ``||x̂_g - x_g||^2``, shape ``(N,)``; exact even where x̂_g is close to x_g."""
        for part in self._parts:
            part.moved()
        return self._total(0), self._total(1)

    def _of_rows(self, factors: Tensor, rates: Sequence[Rate]) -> Tensor:
        """The factor of each row: that of its atom times the rate of its place."""
        own = factors.index_select(0, self._index)
        first = rates[0] if rates else 0.0
        if are_alike(rates):
            return own * sent(first, own.device) if isinstance(first, Tensor) else own * first
        parts = zip(own.split(self._counts), rates, strict=True)
        return torch.cat([part * (sent(r, part.device) if isinstance(r, Tensor) else r) for part, r in parts])

    def _total(self, which: int) -> Tensor:
        """The sums over the rows of each atom, in the order of the places, shape ``(N,)``."""
        if is_here(self._index) and not self.rows.shardings:
            total = torch.zeros(self.rows.atoms, dtype=self._dtype, device=self.rows.device)
            return total.index_add_(0, self._index, self._sums[which]) if self._parts else total
        summed = Total(self.rows.atoms, self.rows.device, self.rows.shardings)
        parts = self._sums[which].split(self._counts) if self._parts else ()
        for place, part in zip(self.rows.places, parts, strict=True):  # a single call would not add in a fixed order
            summed.add_(place, part)
        return summed.over_processes()


class _Part:
    """The rows of one place, with any memory layout."""

    copy: Tensor = NOTHING

    def __init__(self, place: Place, span: tuple[int, int], slots: tuple[Tensor, Tensor]) -> None:
        self.place, self.span, self.slots = place, span, slots

    def remember(self) -> None:
        self.copy = self.place.copy(None if self.copy is NOTHING else self.copy)
        self.slots[0].copy_(sq_norm(self.copy))

    def subtract(self, factors: Tensor) -> None:
        self.subtract_read(factors)

    def subtract_read(self, factors: Tensor) -> Tensor:
        """:meth:`subtract`, then return the rows."""
        start, end = self.span
        own = self.place.read()
        by = sent(factors[start:end], own.device).to(own.dtype).reshape(-1, *[1] * (own.dim() - 1))
        own.addcmul_(self.copy, by, value=-1)
        if self.place.rows is not None:
            self.place.write_(own)
        return own

    def dot(self, own: Tensor, which: int) -> None:
        self.slots[which].copy_(dot(own, self.copy))

    def moved(self) -> None:
        change = self.place.view - self.copy if self.place.rows is None else self.place.read().sub_(self.copy)
        self.dot(change, 0)
        self.slots[1].copy_(sq_norm(change))


class _Matrix(_Part):
    """Contiguous rows on a CPU, in the dtype of the sums."""

    def __init__(
        self, place: Place, span: tuple[int, int], slots: tuple[Tensor, Tensor], scratch: Tensor, copy: Tensor
    ) -> None:
        super().__init__(place, span, slots)
        self.view, self.rows, self.copy, self.own = place.view, place.rows, copy, place.view
        held, self.product = (room[: copy.numel()].view(copy.shape) for room in scratch)
        if self.rows is not None:
            self.own = held

    def read(self) -> Tensor:
        """The rows; if some rows of the view are left out, a copy in memory that other parts share."""
        return self.view if self.rows is None else torch.index_select(self.view, 0, self.rows, out=self.own)

    def remember(self) -> None:
        if self.rows is None:
            self.copy.copy_(self.view)
        else:
            torch.index_select(self.view, 0, self.rows, out=self.copy)
        torch.linalg.vector_norm(self.copy, dim=1, out=self.slots[0]).square_()

    def subtract(self, factors: Tensor) -> None:
        if self.rows is None:
            self.subtract_read(factors)
        else:  # two calls instead of three, since the rows are not returned
            start, end = self.span
            shares = torch.mul(self.copy, factors[start:end, None], out=self.product)
            self.view.index_add_(0, self.rows, shares, alpha=-1)

    def subtract_read(self, factors: Tensor) -> Tensor:
        start, end = self.span
        own = self.read()
        own.addcmul_(self.copy, factors[start:end, None], value=-1)
        if self.rows is not None:
            self.view.index_copy_(0, self.rows, own)
        return own

    def dot(self, own: Tensor, which: int) -> None:
        torch.sum(torch.mul(own, self.copy, out=self.product), 1, out=self.slots[which])

    def moved(self) -> None:
        change = torch.sub(self.read(), self.copy, out=self.product)
        torch.linalg.vector_norm(change, dim=1, out=self.slots[1]).square_()
        torch.sum(change.mul_(self.copy), 1, out=self.slots[0])


class _Thin(_Part):
    """Places with one entry per row, of one dtype and device, as one vector. No entry is in two of the places."""

    def __init__(self, members: Sequence[tuple[Place, int, int]], sums: tuple[Tensor, ...]) -> None:
        self.places, self.sums = [place for place, *_ in members], sums
        self.slots_of = torch.cat([torch.arange(start, end, device=sums[0].device) for _, start, end in members])
        self.counts = [end - start for _, start, end in members]
        starts = [0, *torch.tensor([len(place.view) for place in self.places]).cumsum(0).tolist()]
        self.rows = None
        if any(place.rows is not None for place in self.places):
            device = sums[0].device
            own = [
                torch.arange(a, b, device=device) if place.rows is None else place.rows + a
                for place, (a, b) in zip(self.places, pairwise(starts), strict=True)
            ]
            self.rows = torch.cat(own)

    def read(self) -> Tensor:
        whole = torch.cat([place.view for place in self.places])
        return whole if self.rows is None else whole.index_select(0, self.rows)

    def store(self, which: int, numbers: Tensor) -> None:
        self.sums[which].index_copy_(0, self.slots_of, numbers)

    def wide(self, numbers: Tensor) -> Tensor:
        return numbers.to(self.sums[0].dtype)

    def remember(self) -> None:
        self.copy = self.read()
        self.store(0, self.wide(self.copy).square())

    def subtract_read(self, factors: Tensor) -> Tensor:
        own = self.read().addcmul_(self.copy, factors[self.slots_of].to(self.copy.dtype), value=-1)
        for place, numbers in zip(self.places, own.split(self.counts), strict=True):
            place.write_(numbers)
        return own

    def dot(self, own: Tensor, which: int) -> None:
        self.store(which, self.wide(own) * self.wide(self.copy))

    def moved(self) -> None:
        change = self.read().sub_(self.copy)
        self.dot(change, 0)
        self.store(1, self.wide(change).square())


def are_alike(rates: Sequence[Rate]) -> bool:
    """Whether all rates are the same number, or the same tensor object; does not synchronize with a device."""
    first, *others = rates or [0.0]
    numbers = not any(isinstance(rate, Tensor) for rate in rates)
    return all(rate is first or (numbers and rate == first) for rate in others)


def _turns(names: Sequence[str], views: Sequence[Tensor]) -> list[int]:
    """For each view, the turn in which it is written, such that no two views of one turn share an entry.

    If a dimension is a product of two axes, an entry belongs to two atoms and is written twice, one view after the
    other. Views whose spans of memory overlap are assumed to share an entry.

    >>> bias = torch.ones(6)
    >>> _turns(["b", "b", "b", "c"], [bias[:3], bias[3:], bias, torch.ones(6)])
    [0, 0, 1, 0]
    """
    held: dict[str, list[tuple[int, int, int]]] = {}
    turns = list[int]()
    for name, view in zip(names, views, strict=True):
        first = int(view.storage_offset())
        last = first + sum((size - 1) * int(stride) for size, stride in zip(view.shape, view.stride(), strict=True))
        others = held.setdefault(name, [])
        turns.append(max((turn + 1 for a, b, turn in others if a <= last and first <= b), default=0))
        others.append((first, last, turns[-1]))
    return turns


def _is_matrix(view: Tensor) -> bool:
    """Whether a view is a contiguous matrix of real numbers."""
    return view.dim() == 2 and view.is_contiguous() and not view.is_complex()
