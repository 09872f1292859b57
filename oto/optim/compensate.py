"""Closed-form compensation: change the weights that read an axis to make up for the entries removed from it.

A reader computes ``y = W x + b``. If the entries P of ``x`` are removed and S stay, the removed entries are
approximated by least squares, ``x_P ≈ B x_S + c``, which is folded into the reader: ``W_S += W_P B`` and
``b += W_P c``. With the second moments of the input ``M = E[x xᵀ]``, its mean ``μ`` and its covariance
``C = M - μ μᵀ``, the kinds are

========  ===========================  =============  ==========================================================
kind      B                            c              as in
========  ===========================  =============  ==========================================================
affine    ``C_PS (C_SS + λI)⁻¹``       ``μ_P - Bμ_S``  the affine fit, whose constant is not penalized
ridge     ``M_PS (M_SS + λI)⁻¹``       0              OBS (arXiv 2302.04089, 2403.12983, 2412.18110), which writes
                                                      the same minimizer ``M_SS⁻¹ (M Wᵀ)_S``
bias      0                            ``μ_P``        FLAP (arXiv 2312.11983, equation 6)
========  ===========================  =============  ==========================================================

where λ is ``ridge`` times the mean of the diagonal that it is added to. If a reader has no bias, and is not followed by
a batch norm whose running mean could absorb the constant, there is no ``c``: then an affine fit is a ridge fit, and
``bias`` has no effect.

The fit minimizes ``E||x_P - B x_S - c||²``, and thereby ``E||y - y'||²`` of every linear reader, so readers of the
same tensor share it. A convolution of n channels with a small kernel is unrolled: the fit covers all entries under the
kernel at a position, so it is the least-squares fit of the convolution's output. If that would take too much memory,
O(n² k⁴), the fit is per pixel, with the same ``B`` for every entry of the kernel. The constant is then exact except at
the border, where part of the kernel covers padding.

Removed entries are zero or multiplied by zeros, so they no longer contribute. The slim model is proved equal to the
zeroed and folded model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oto._torch import TorchDispatchMode, tree_leaves
from oto.groups.node_group import NodeGroup
from oto.groups.readers import Reader, Readers, Use

KINDS = ("affine", "ridge", "bias")

RIDGE = 0.01
"""Damping, as a share of the mean of the diagonal."""

WIDE = 4096
"""Moments of rows with more entries than this are in float32, others in float64."""

UNROLLED = 1024
"""A convolution is unrolled if its rows have at most this many entries: channels times kernel size."""

ROOM = 2**30
"""Maximum bytes of second moments in memory at a time, unless a single group needs more."""

Key = tuple[Any, ...]


@dataclass(eq=False)
class Moments:
    """Sums over all input rows of a reader.

    Attributes:
        count: Number of rows.
        first: The sum of the rows, shape ``(batch, n)``.
        second: The sum of their outer products, shape ``(batch, n, n)``.
    """

    count: int
    first: Tensor
    second: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        """The sums over rows of shape ``(batch, rows, n)``."""
        dtype = torch.float32 if rows.shape[-1] > WIDE or rows.device.type == "mps" else torch.float64
        rows = rows.to(dtype)
        return cls(rows.shape[1], rows.sum(1), rows.mT @ rows)

    def add(self, other: Moments) -> None:
        self.count += other.count
        self.first += other.first
        self.second += other.second

    @property
    def mean(self) -> Tensor:
        return self.first / self.count

    @property
    def raw(self) -> Tensor:
        """``E[x xᵀ]``, shape ``(batch, n, n)``; not cached, since it is as large as ``second``."""
        return self.second / self.count

    @property
    def variance(self) -> Tensor:
        """The diagonal of the covariance, shape ``(batch, n)``."""
        return self.second.diagonal(dim1=-2, dim2=-1) / self.count - self.mean.square()

    def fit(self, stay: Tensor, go: Tensor, kind: str, ridge: float) -> tuple[Tensor, Tensor]:
        """Fit the entries ``go`` by the entries ``stay``.

        Args:
            stay, go: Indices of entries, int64.
            kind: One of :data:`KINDS`.
            ridge: Damping, as a share of the mean of the diagonal.

        Returns:
            ``B``, shape ``(batch, go, stay)``, and ``c``, shape ``(batch, go)``.
        """
        mean = self.mean
        if kind == "bias":
            return mean.new_zeros(len(mean), len(go), len(stay)), mean[:, go]
        rows = self.second[:, stay].div_(self.count)
        if kind == "affine":
            rows.baddbmm_(mean[:, stay, None], mean[:, None], alpha=-1)  # now rows of the covariance
        among, across = rows[:, :, stay], rows[:, :, go]
        del rows  # at most three matrices of n² numbers exist: the sums, the matrix to factor, and its factor
        B = _solved(among, across, ridge).mT
        if kind == "ridge":
            return B, mean.new_zeros(len(B), len(go))
        return B, mean[:, go] - (B @ mean[:, stay].unsqueeze(-1)).squeeze(-1)


def _factor(matrix: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of a matrix with damping; overwrites the diagonal of the matrix.

    The damping is ``ridge`` times the mean of the diagonal, or 1 if the diagonal is zero. It is increased if rounding
    makes the matrix indefinite.
    """
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    plain, mean = diagonal.clone(), diagonal.mean(-1, keepdim=True)
    least = 10 * torch.finfo(matrix.dtype).eps
    for by in (ridge, *(max(ridge, least) * 10.0**power for power in range(1, 16))):
        factor: Tensor
        diagonal.copy_(plain + torch.where(mean > 0, by * mean, 1.0))
        factor, wrong = torch.linalg.cholesky_ex(matrix)
        if not bool(wrong.any()):
            break
    return factor


def _solved(among: Tensor, across: Tensor, ridge: float) -> Tensor:
    """``(among + λI)⁻¹ across``; overwrites the diagonal of ``among``."""
    solved: Tensor = torch.cholesky_solve(across, _factor(among, ridge))
    return solved


def fitted(reader: Reader) -> Reader:
    """The form in which a reader is fitted: unrolled if that gives rows of at most ``UNROLLED`` entries."""
    unrolled = reader.unrolled
    return unrolled if unrolled.width <= UNROLLED else reader


def fitted_readers(found: Readers) -> Readers:
    """All readers, in the form in which they are fitted."""
    return replace(found, found=tuple(map(fitted, found.found)))


def key_of(reader: Reader) -> Key:
    """A key that is equal for readers of the same tensors, which share their moments."""
    return tuple((value.index, *how) for value, *how in reader.sources)


def packed(groups: Sequence[NodeGroup], readers: Readers) -> list[list[NodeGroup]]:
    """Divide the groups into packs such that the moments of a pack's readers fit in ``ROOM`` bytes."""
    packs: list[list[NodeGroup]] = []
    needed: dict[Key, int] = {}
    for group in groups:
        own = {key_of(r): r.width**2 * (4 if r.width > WIDE else 8) for r in readers.of([group.name])}
        if packs and sum((needed | own).values()) <= ROOM:
            packs[-1].append(group)
            needed |= own
        else:
            packs.append([group])
            needed = own
    return packs


@contextmanager
def listening(readers: Iterable[Reader], parameters: Mapping[str, Tensor]) -> Iterator[dict[Key, Moments]]:
    """Context manager that adds up the moments of the readers' inputs while the model runs, without gradients.

    Yields:
        The moments by :func:`key_of`; readers that were not called yet have none.
    """
    found: dict[Key, Moments] = {}
    listener = _Listener(found)
    for key, reader in {key_of(reader): reader for reader in readers}.items():
        listener.hear(key, reader, reader.weight(parameters[reader.parameter]))
    with torch.inference_mode(), listener:  # operators are not decomposed, as in the trace
        yield found


class _Listener(TorchDispatchMode):
    """Intercepts every call, and handles those that multiply with the weights of readers."""

    def __init__(self, found: dict[Key, Moments]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found
        self.ops: dict[Any, set[int]] = {}
        self.weights: dict[object, tuple[Key, Use]] = {}

    def hear(self, key: Key, reader: Reader, weight: Tensor) -> None:
        for use in reader.uses:
            _, w = use.place
            self.ops.setdefault(use.node.op, set()).add(w)
            self.weights[use.node.op, w, _lies(weight)] = key, use

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.ops:
            tensors = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
            for w in self.ops[func]:
                heard = self.weights.get((func, w, _lies(tensors[w]))) if w < len(tensors) else None
                if heard is not None:
                    key, use = heard
                    for rows in use.rows(tensors[use.place[0]]):
                        self._add(key, rows)
        return func(*args, **(kwargs or {}))

    def _add(self, key: Key, rows: Tensor) -> None:
        if rows.shape[1]:
            own = Moments.of(rows)
            self.found[key].add(own) if key in self.found else self.found.__setitem__(key, own)


def _lies(tensor: Tensor) -> object:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


@dataclass(frozen=True, eq=False)
class SplitEntries:
    """The entries of a reader's input that stay, and those that are removed now, as int64 indices.

    Entries that were removed before are in neither.
    """

    stay: Tensor
    go: Tensor

    @classmethod
    def of(cls, before: NDArray[np.bool_], after: NDArray[np.bool_]) -> SplitEntries:
        return cls(torch.from_numpy(np.flatnonzero(after)), torch.from_numpy(np.flatnonzero(before & ~after)))


def fold_(
    readers: Sequence[Reader],
    moments: Mapping[Key, Moments],
    entries: Callable[[Reader], SplitEntries],
    tensors: Mapping[str, Tensor],
    kind: str = "affine",
    ridge: float = RIDGE,
) -> list[str]:
    """Fold the approximation of the removed entries into their readers, in place.

    Args:
        moments: The result of :func:`listening`.
        entries: Returns which entries of a reader's input stay and which are removed.
        tensors: Parameters and buffers, by name.
        kind: One of :data:`KINDS`.
        ridge: Damping, as a share of the mean of the diagonal.

    Returns:
        The parameter names of readers that no batch reached; these are unchanged.
    """
    unreached, fits = [], dict[Any, tuple[Tensor, Tensor]]()
    for reader in readers:
        own, key = entries(reader), key_of(reader)
        if not len(own.go) or not len(own.stay):
            continue
        if key not in moments:
            unreached.append(reader.parameter)
            continue
        how = "ridge" if kind == "affine" and reader.shift is None else kind
        stay, go = (index.to(moments[key].second.device) for index in (own.stay, own.go))
        fit = fits.get((key, how))
        if fit is None:
            fit = fits[key, how] = moments[key].fit(stay, go, how, ridge)
        _fold_one(reader, tensors, stay, go, *fit)
    return unreached


@torch.no_grad()
def _fold_one(reader: Reader, tensors: Mapping[str, Tensor], stay: Tensor, go: Tensor, B: Tensor, c: Tensor) -> None:
    view = reader.layout.of(reader.weight(tensors[reader.parameter]))
    rows = reader.layout.rows(reader.weight(tensors[reader.parameter])).to(B, copy=True)
    gone = rows[:, :, go]
    if B.any():
        rows[:, :, stay] += gone @ B
        view.copy_(rows.reshape(view.shape))
    if reader.shift is not None and c.any():
        name, sign = reader.shift
        kernel = len(reader.layout.kernel) + len(reader.layout.contracted)
        by_row = (gone @ c.unsqueeze(-1)).reshape(view.shape[: view.ndim - len(reader.layout.contracted)])
        added = by_row.reshape(*by_row.shape[: view.ndim - kernel], -1).sum(-1)
        target = tensors[name].detach()
        target += sign * added.reshape(target.shape).to(target)


def touched(readers: Iterable[Reader]) -> set[str]:
    """The names of all tensors that :func:`fold_` may write to."""
    return {name for r in readers for name in (r.parameter, *([r.shift[0]] if r.shift else []))}


# --- the error of removing an atom ------------------------------------------------------------------------------------


@dataclass(eq=False)
class Surgeon:
    """The optimal brain surgeon of one reader, for atoms of several entries (ZipLM, arXiv 2302.04089, equation 2).

    With ``H = M + λI``, removing an atom costs ``tr(W_a [H⁻¹]_aa⁻¹ W_aᵀ)``: the error of the reader's output after the
    other atoms have compensated for it. The removal updates ``W -= W_a [H⁻¹]_aa⁻¹ [H⁻¹]_a`` and
    ``H⁻¹ -= [H⁻¹]ᵀ_a [H⁻¹]_aa⁻¹ [H⁻¹]_a``.

    Attributes:
        rows: The weight, shape ``(batch, rows, n)``.
        inverse: ``H⁻¹``, shape ``(batch, n, n)``; identity at the entries of removed atoms.
        blocks: The indices of each atom's entries, shape ``(atoms, entries)``.
    """

    rows: Tensor
    inverse: Tensor
    blocks: Tensor

    @classmethod
    def of(cls, reader: Reader, moments: Moments, parameter: Tensor, blocks: Tensor, ridge: float = RIDGE) -> Surgeon:
        rows = reader.layout.rows(reader.weight(parameter)).to(moments.second, copy=True)
        return cls(rows, torch.cholesky_inverse(_factor(moments.raw, ridge)), blocks.to(rows.device))

    def scores(self) -> Tensor:
        """The cost of removing each atom, float64, shape ``(atoms,)``, on the CPU."""
        at = self.blocks
        own = self.inverse[:, at[:, :, None], at[:, None, :]]  # (batch, atoms, entries, entries)
        w = self.rows[:, :, at].permute(0, 2, 3, 1)  # (batch, atoms, entries, rows)
        scores: Tensor = (torch.linalg.solve(own, w) * w).sum((0, 2, 3)).double()
        return scores.cpu()

    def remove(self, atoms: Tensor) -> None:
        """Remove some atoms; the others compensate for them."""
        at = self.blocks[atoms.to(self.blocks.device)].reshape(-1)
        own = torch.linalg.solve(self.inverse[:, at][:, :, at], self.inverse[:, at])
        self.rows -= self.rows[:, :, at] @ own
        self.inverse -= self.inverse[:, :, at] @ own
        self.rows[:, :, at] = 0
        self.inverse[:, at] = self.inverse[:, :, at] = 0
        self.inverse[:, at, at] = 1


def greedy(surgeons: Sequence[Surgeon], alive: NDArray[np.bool_], go: int, steps: int = 64) -> NDArray[np.int64]:
    """The atoms to remove, in order: each is the one with the lowest cost after the removal of those before it.

    Args:
        surgeons: One for each reader of the atoms; they are modified.
        alive: Which atoms are left, shape ``(atoms,)``.
        go: Number of atoms to remove.
        steps: Maximum number of rounds; if ``go`` is larger, several atoms are removed in each.
    """
    gone: list[int] = []
    left = torch.from_numpy(alive.copy())
    while len(gone) < go:
        total = torch.stack([surgeon.scores() for surgeon in surgeons]).sum(0)
        many = min(-(-go // steps), go - len(gone))
        lowest = torch.argsort(torch.where(left, total, torch.inf), stable=True)[:many]
        for surgeon in surgeons:
            surgeon.remove(lowest)
        left[lowest] = False
        gone += lowest.tolist()
    return np.array(gone, dtype=np.int64)


def fluctuation(reader: Reader, moments: Moments, parameter: Tensor, blocks: Tensor) -> Tensor:
    """``Σ Var(x_e) ||W_e||²`` over the entries of each atom (FLAP, arXiv 2312.11983), float64, shape ``(atoms,)``."""
    rows = reader.layout.rows(reader.weight(parameter)).to(moments.second)
    of_entry = (moments.variance * rows.square().sum(1)).sum(0)
    return of_entry[blocks.to(of_entry.device)].sum(-1).double().cpu()
