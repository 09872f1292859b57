"""Operators that divide by a count, with the full count as an argument.

A removed entry was zero: it added nothing to the sum, but was counted. These functions take the thinner tensors and
divide by ``full``, the number of entries in the full model. Example: the mean of 3 kept entries of 4 is their sum / 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oto.nn.calls import is_tracing


def mean(
    x: Tensor,
    dim: Sequence[int],
    keepdim: bool = False,
    *,
    full: Sequence[int],
    sizes: Sequence[int],
    dtype: torch.dtype | None = None,
    rest: Tensor | None = None,
    along: int = 0,
    left: int = 1,
    of: int = 1,
) -> Tensor:
    """``x.mean(dim)`` of a tensor that had ``full`` entries along ``dim`` and has ``sizes``.

    Args:
        rest: The value of each removed entry, zero by default; ``left`` of ``of`` entries are kept along ``along``.
    """
    y: Tensor = x.mean(list(dim), keepdim=keepdim, dtype=dtype) * (prod(sizes) / prod(full))
    if rest is None:
        return y
    return y + _one(rest, x, along).mean(list(dim), keepdim=keepdim, dtype=dtype) * ((of - left) / of)


def total(
    x: Tensor,
    dim: Sequence[int],
    keepdim: bool = False,
    *,
    rest: Tensor,
    along: int,
    left: int,
    of: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``x.sum(dim)`` of a tensor that has ``left`` of ``of`` entries along ``along``; the others held ``rest``."""
    y: Tensor = x.sum(list(dim), keepdim=keepdim, dtype=dtype)
    return y + _one(rest, x, along).sum(list(dim), keepdim=keepdim, dtype=dtype) * (of - left)


def _one(rest: Tensor, x: Tensor, along: int) -> Tensor:
    """``rest`` with the shape of one entry of ``x`` along a dimension."""
    return rest.broadcast_to([1 if d == along else n for d, n in enumerate(x.shape)])


def _whole(x: Tensor, dim: Sequence[int], full: Sequence[int], sizes: Sequence[int]) -> tuple[int, int]:
    """The kept and the full number of entries along ``dim``."""
    k = prod(x.shape[d] for d in dim)
    return k, k * prod(full) // prod(sizes)


def var_mean(
    x: Tensor,
    dim: Sequence[int],
    correction: float = 1,
    keepdim: bool = False,
    *,
    full: Sequence[int],
    sizes: Sequence[int],
    **held: Any,
) -> tuple[Tensor, Tensor]:
    """``torch.var_mean`` of a tensor that had ``full`` entries along ``dim`` and has ``sizes``, the others zero.

    With k of D entries present, mean = Σx / D and Σ(x − mean)² also runs over D − k zeros. If the other entries are not
    zero, ``held`` gives their values, as for :func:`mean`.
    """
    dim = list(dim) or list(range(x.ndim))
    k, d = _whole(x, dim, full, sizes)
    if held:
        mean = total(x, dim, True, **held) / d
        squares = total((x - mean).square(), dim, True, **held | {"rest": (held["rest"] - mean).square()})
    else:
        mean = x.sum(dim, keepdim=True) / d
        squares = (x - mean).square().sum(dim, keepdim=True) + (d - k) * mean.square()
    var = squares / max(d - correction, 0)
    return (var, mean) if keepdim else (var.squeeze(dim), mean.squeeze(dim))


def var(
    x: Tensor,
    dim: Sequence[int],
    correction: float = 1,
    keepdim: bool = False,
    *,
    full: Sequence[int],
    sizes: Sequence[int],
    **held: Any,
) -> Tensor:
    """``torch.var`` of a tensor that had ``full`` entries along ``dim`` and has ``sizes``, as :func:`var_mean`."""
    return var_mean(x, dim, correction, keepdim, full=full, sizes=sizes, **held)[0]


def std(
    x: Tensor,
    dim: Sequence[int],
    correction: float = 1,
    keepdim: bool = False,
    *,
    full: Sequence[int],
    sizes: Sequence[int],
    **held: Any,
) -> Tensor:
    """``torch.std`` of a tensor that had ``full`` entries along ``dim`` and has ``sizes``, as :func:`var_mean`."""
    return var_mean(x, dim, correction, keepdim, full=full, sizes=sizes, **held)[0].sqrt()


def std_mean(
    x: Tensor,
    dim: Sequence[int],
    correction: float = 1,
    keepdim: bool = False,
    *,
    full: Sequence[int],
    sizes: Sequence[int],
    **held: Any,
) -> tuple[Tensor, Tensor]:
    """``torch.std_mean`` of a tensor that had ``full`` entries along ``dim`` and has ``sizes``, as :func:`var_mean`."""
    var, mean = var_mean(x, dim, correction, keepdim, full=full, sizes=sizes, **held)
    return var.sqrt(), mean


def vector_norm(
    x: Tensor, ord: float, dim: Sequence[int], keepdim: bool = False, *, dtype: torch.dtype | None = None, **held: Any
) -> Tensor:
    """``torch.linalg.vector_norm`` of a tensor whose removed entries held the values given by ``held``."""
    powers = x.to(dtype or x.dtype).abs().pow(ord)
    return total(powers, dim, keepdim, **held | {"rest": held["rest"].to(powers.dtype).abs().pow(ord)}).pow(1 / ord)


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    full: Sequence[int],
    sizes: Sequence[int],
) -> Tensor:
    """Batch norm by the statistics of ``x`` (N, C, *), which had ``full`` entries in all dimensions but C."""
    over = [0, *range(2, x.ndim)]
    work = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    var, mean = var_mean(work, over, 0, True, full=full, sizes=sizes)
    y = ((work - mean) * torch.rsqrt(var + eps)).to(x.dtype)
    column = (-1, *[1] * (x.ndim - 2))
    if weight is not None:
        y = y * weight.reshape(column)
    return y if bias is None else y + bias.reshape(column)


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    full: Sequence[int],
) -> Tensor:
    """Layer norm over a last dimension that had ``full`` entries; the removed ones were zero.

    With k of D entries present, mean = Σx / D and var = (Σ(x − mean)² + (D − k)·mean²) / D.
    """
    (k,), (d,) = normalized_shape, full
    y = _normalized(x, (-1,), k, d, eps)
    if weight is not None:
        y = _times(y, weight)
    return y if bias is None else _plus(y, bias)


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    full: Sequence[int],
) -> Tensor:
    """RMS norm over dimensions that had ``full`` entries; the removed ones were zero.

    Σx²/D = (k/D)·Σx²/k, so x / √(Σx²/D + eps) = √(D/k) · x / √(Σx²/k + eps·D/k).
    """
    ratio = prod(full) / prod(normalized_shape)
    if is_tracing():  # the older ONNX exporter has no aten::rms_norm
        y = plain_rms(x, list(range(-len(normalized_shape), 0)), ratio, eps)
        return y if weight is None else y * weight
    eps = eps_of(x) if eps is None else eps
    if weight is not None:  # scaling the weight is much cheaper than scaling all entries
        weight = weight * sqrt(ratio)
    y = F.rms_norm(x, list(normalized_shape), weight, eps * ratio)
    return y if weight is not None else y * sqrt(ratio)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    full: int,
    width: int,
) -> Tensor:
    """Group norm with ``width`` of the ``full`` channels of each group kept."""
    if width == full:
        y: Tensor = F.group_norm(x, num_groups, weight, bias, eps)
        return y
    grouped = x.reshape(x.shape[0], num_groups, width, -1)
    positions = grouped.shape[-1]
    y = _normalized(grouped, (2, 3), width * positions, full * positions, eps).reshape(x.shape)
    column = (-1, *[1] * (x.ndim - 2))
    if weight is not None:
        y = _times(y, weight.reshape(column))
    return y if bias is None else _plus(y, bias.reshape(column))


def _normalized(x: Tensor, dims: tuple[int, ...], k: int, d: int, eps: float) -> Tensor:
    """``x`` minus the mean over ``d`` entries, of which ``k`` are present, divided by the root of their variance."""
    if torch.compiler.is_dynamo_compiling() or is_tracing():
        # In eager mode, var_mean is many times slower on a CPU than all of the code below. OpenVINO 2026.4 fuses the
        # code below into a kernel that is wrong in all but the first rows.
        return plain_normalized(x, list(dims), k / d, eps)
    work = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    center = work.sum(dims, keepdim=True) / d
    centered = work - center
    norm = torch.linalg.vector_norm(centered, dim=dims, keepdim=True)
    var = (norm.square() + (d - k) * center.square()) / d
    return _times(centered, torch.rsqrt(var + eps)).to(x.dtype)


def plain_normalized(x: Tensor, dims: list[int], share: float, eps: float) -> Tensor:
    """``x`` normalized in one pass, like the compiled stock norm; works in torch.jit.script.

    With m the mean of the k entries present and ``share`` = k/D, the mean over all D entries is k/D · m, and their
    variance Σ(x − m)² / D + k(D − k)/D² · m².
    """
    work = x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x
    var, mean = torch.var_mean(work, dims, correction=0, keepdim=True)
    scale = torch.rsqrt(share * var + share * (1 - share) * mean.square() + eps)
    return ((work - share * mean) * scale).to(x.dtype)


def plain_rms(x: Tensor, dims: list[int], ratio: float, eps: float | None) -> Tensor:
    """``x`` over the root of its mean square over ``ratio`` times as many entries; works in torch.jit.script."""
    eps = eps_of(x) if eps is None else eps
    work = x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x
    return (work * torch.rsqrt(work.square().mean(dims, keepdim=True) / ratio + eps)).to(x.dtype)


def eps_of(x: Tensor) -> float:
    """``torch.finfo(x.dtype).eps``, which torch.jit.script does not support."""
    if x.dtype == torch.float64:
        return 2.0**-52
    if x.dtype == torch.float16:
        return 2.0**-10
    return 2.0**-7 if x.dtype == torch.bfloat16 else 2.0**-23


def _in_place(y: Tensor, other: Tensor) -> bool:
    """Whether an operator on both tensors may write its result into ``y``, to which nothing else refers.

    Without further memory, a chain of operators is as fast as the stock kernel. False if autograd needs ``y``, and
    while tracing for another runtime, where the graph must not contain writes, with or without gradients.
    """
    if torch.is_grad_enabled() or is_tracing():
        return False
    return torch.promote_types(y.dtype, other.dtype) == y.dtype


def _times(y: Tensor, factor: Tensor) -> Tensor:
    return y.mul_(factor) if _in_place(y, factor) else y * factor


def _plus(y: Tensor, term: Tensor) -> Tensor:
    return y.add_(term) if _in_place(y, term) else y + term


def grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """``F.grouped_mm`` for any width: its kernels need rows of a multiple of 16 bytes, so zeros are appended."""
    step = max(16 // a.element_size(), 1)
    k, n = -a.shape[-1] % step, -b.shape[-1] % step
    y: Tensor = F.grouped_mm(
        F.pad(a, (0, k)).contiguous(),
        F.pad(b, (0, n, 0, k)).contiguous(),
        offs=offs,
        bias=None if bias is None else F.pad(bias, (0, n)),
        out_dtype=out_dtype,
    )
    return y[..., : b.shape[-1]]


def view_as_complex(x: Tensor) -> Tensor:
    """``torch.view_as_complex`` of a tensor with any strides."""
    return torch.view_as_complex(x.contiguous())


def mse_loss(x: Tensor, target: Tensor, *args: Any, full: Sequence[int], sizes: Sequence[int], **named: Any) -> Tensor:
    """The mean ``F.mse_loss`` of tensors that had ``full`` entries and have ``sizes``; the rest was equal in both."""
    return F.mse_loss(x, target, *args, **named) * (prod(sizes) / prod(full))


def smooth_l1_loss(
    x: Tensor, target: Tensor, *args: Any, full: Sequence[int], sizes: Sequence[int], **named: Any
) -> Tensor:
    """``F.smooth_l1_loss``, like :func:`mse_loss`."""
    return F.smooth_l1_loss(x, target, *args, **named) * (prod(sizes) / prod(full))


def huber_loss(
    x: Tensor, target: Tensor, *args: Any, full: Sequence[int], sizes: Sequence[int], **named: Any
) -> Tensor:
    """``F.huber_loss``, like :func:`mse_loss`."""
    return F.huber_loss(x, target, *args, **named) * (prod(sizes) / prod(full))
