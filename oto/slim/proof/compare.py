"""How far apart the outputs of two models are, and what counts as equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oto.errors import VerificationError

# Relative to the largest entry of the full model's output. float64 allows only for sums in a different order; the other
# tolerances are what one rounding per sum grows to in a deep network.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


def tolerance(dtype: torch.dtype) -> float:
    """The largest relative difference at which two models in a dtype count as equal; see :data:`TOLERANCE`."""
    return TOLERANCE.get(dtype, 1e-3)


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        what: Which model, on which input.
        dtype: The dtype of the comparison.
        error: Largest difference, relative to the largest entry of the full model's output.
        finite: How many entries of the outputs are finite; only these can show a difference.
        entries: How many entries the outputs have. Entries that are not finite have to be NaN, or the same infinity,
            in both models; otherwise the error is infinite. ``None`` in artifacts of earlier versions.
    """

    what: str
    dtype: str
    error: float
    tolerance: float
    finite: int | None = None
    entries: int | None = None

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


_PIECE, _LARGE_PIECE = 1 << 17, 1 << 24
"""Entries of an output that are compared at a time: on the CPU a megabyte of float64, which stays in the cache; on
other devices, where each call has a cost of its own, 128 MB."""


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x.reshape(-1), _PIECE if x.device.type == "cpu" else _LARGE_PIECE)


def _apart(x: Tensor, y: Tensor) -> Tensor:
    """The largest difference and the largest entry of ``x``; shape ``(2,)``. If both are finite, so are all entries."""
    return torch.stack([(x - y).abs().amax(), x.abs().amax()])


def _apart_where_finite(x: Tensor, y: Tensor) -> Tensor:
    """The largest difference, the largest finite entry of ``x``, and how many are finite; shape ``(3,)``."""
    finite = torch.isfinite(x) & torch.isfinite(y)
    alike = (x == y) | (torch.isnan(x) & torch.isnan(y))  # equal infinities too, as in masked scores
    difference = (x - y).abs().masked_fill(alike, 0).nan_to_num(nan=float("inf"), posinf=float("inf"))
    size = x.abs().masked_fill(~torch.isfinite(x), 0)
    return torch.stack([difference.max(), size.max(), finite.sum().to(size.dtype)])


def _measured(a: Tensor, b: Tensor) -> tuple[float, float, int]:
    """The largest difference, the largest entry of ``a``, and how many entries are finite."""
    wide = torch.complex128 if a.is_complex() else torch.float64

    def of(measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        pairs = zip(_pieces(a), _pieces(b), strict=True)
        return torch.stack([measure(x.to(wide), y.to(wide)) for x, y in pairs])

    error, scale = of(_apart).amax(0).tolist()
    if math.isfinite(error) and math.isfinite(scale):
        return error, scale, a.numel()
    found = of(_apart_where_finite)
    error, scale = found[:, :2].amax(0).tolist()
    return error, scale, int(found[:, 2].sum())


@dataclass(frozen=True)
class Difference:
    """How two runs differ; the fields are those of :class:`Check`."""

    error: float
    finite: int
    entries: int


def compared(full: Sequence[Tensor], slim: Sequence[Tensor]) -> Difference:
    """Compare the outputs of two models; the error is inf if they differ in kind.

    NaN equals NaN and an infinity equals itself, but such entries do not count as finite.
    """
    entries = sum(x.numel() for x in full)
    different = Difference(float("inf"), 0, entries)
    if len(full) != len(slim):
        return different
    worst, count = 0.0, 0
    for a, b in zip(full, slim, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return different
        if not a.numel():
            continue
        if not (a.is_floating_point() or a.is_complex()):
            worst, count = max(worst, 0.0 if torch.equal(a, b) else float("inf")), count + a.numel()
            continue
        error, scale, finite = _measured(a, b)
        worst, count = max(worst, error / scale if scale > 0 else error), count + finite
    return Difference(worst, count, entries)


def relative_error(full: Sequence[Tensor], slim: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest entry of each full output; inf if the outputs differ in kind."""
    return compared(full, slim).error


def checked(
    what: str, dtype: torch.dtype, full: Sequence[Tensor], slim: Sequence[Tensor], allowed: float | None = None
) -> Check:
    """Compare the outputs of two models, with the tolerance of the dtype by default."""
    found = compared(full, slim)
    allowed = tolerance(dtype) if allowed is None else allowed
    return Check(what, str(dtype).removeprefix("torch."), found.error, allowed, found.finite, found.entries)


def require(checks: Sequence[Check]) -> float:
    """The largest float64 error (or the largest of all, without float64); NaN if nothing was compared.

    Raises:
        VerificationError: A comparison failed.
    """
    failed = [c for c in checks if not c.passed]
    if failed:
        lines = [f"  {c.what}, {c.dtype}: relative error {c.error:.2e}, tolerance {c.tolerance:.0e}" for c in failed]
        raise VerificationError(
            "\n".join(
                [
                    "the slim model does not compute what the zeroed model computes",
                    *lines,
                    "  effect  nothing was written",
                    "  to fix  report the model; until then mark the groups concerned unprunable",
                ]
            )
        )
    exact = [c.error for c in checks if c.dtype == "float64"]
    return max(exact or [c.error for c in checks], default=float("nan"))
