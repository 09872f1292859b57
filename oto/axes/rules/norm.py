"""Normalizations.

Batch and instance norm treat each channel separately. Layer, RMS and group norm divide by a count of entries: removing
a zero entry is exact if the divisor stays the full count, so the thinner call is a function of ``oto.nn.functional``.
For example, the layer norm of 768 entries of which 700 are kept still divides by 768.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from oto.axes.call import Call, Fact, Operand, Size, anything, product, zero
from oto.axes.registry import rule
from oto.nn import functional as full_count

aten = torch.ops.aten
SAVED = "it is kept for the backward pass"


def _scaled(*facts: Fact) -> Fact:
    """norm(x)·weight + bias is the bias if either factor is zero."""
    x, weight, bias = facts
    return bias if product(x, weight) == 0 else None


def _scaled_plain(*facts: Fact) -> Fact:
    return product(*facts)


def _affine(call: Call, x: Operand, weight: Operand | None, bias: Operand | None, dim: int | None) -> Operand:
    """norm(x)·weight + bias, along ``dim``, or along the last dimensions if it is ``None``."""
    if weight is None:
        return x if bias is None else call.map(anything, x, bias)
    if dim is not None:
        column = (-1, *[1] * (x.ndim - dim - 1))
        weight = call.view(weight, (weight.shape[0], *column[1:]))
        bias = None if bias is None else call.view(bias, (bias.shape[0], *column[1:]))
    return call.map(_scaled_plain, x, weight) if bias is None else call.map(_scaled, x, weight, bias)


def _by_channel(
    call: Call,
    x: Operand,
    weight: Operand | None,
    bias: Operand | None,
    mean: Operand | None,
    var: Operand | None,
    over: Sequence[int],
) -> Operand:
    """A norm of each channel, with statistics over the dimensions ``over``, or running statistics if it is empty."""
    call.fix(x, over, "a norm takes statistics along it")
    for statistic in (mean, var):
        if statistic is not None:
            call.unify(x.terms[1], statistic.terms[0])
    # with batch statistics a channel of zeros stays zero; running statistics may shift it
    y = call.map(zero if over else anything, x)
    return _affine(call, y, weight, bias, 1)


@rule(aten.batch_norm)
def batch_norm(
    call: Call,
    x: Operand,
    weight: Operand | None,
    bias: Operand | None,
    running_mean: Operand | None,
    running_var: Operand | None,
    training: bool,
    *rest: object,
) -> Operand:
    """x (N, C, *), the other tensors (C,). In training, statistics are those of the batch."""
    over = [0, *range(2, x.ndim)] if training or running_mean is None else []
    if running_mean is not None or running_var is not None or not over:
        return _by_channel(call, x, weight, bias, running_mean, running_var, over)
    # used to standardize filters: an entry may be removed if it is zero and the divisor stays the full count
    call.reduce(x, over)
    call.counted("a norm divides by the number of entries")
    given = {a.name: v for a, v in zip(call.node.op._schema.arguments, call.node.args, strict=False)}  # type: ignore[attr-defined]
    given |= call.node.kwargs
    call.rewrite(
        full_count.batch_norm,
        given["input"],
        given.get("weight"),
        given.get("bias"),
        given["eps"],
        full=[x.shape[d] for d in over],
        sizes=[Size(x.terms[d]) for d in over],
    )
    own = tuple(() if d in over else (d,) for d in range(x.ndim))
    return _affine(call, call.step([x], x.terms, (own,), zero), weight, bias, 1)


@rule(
    aten.native_batch_norm,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_no_training,
    aten.cudnn_batch_norm,
)
def native_batch_norm(
    call: Call,
    x: Operand,
    weight: Operand | None,
    bias: Operand | None,
    mean: Operand | None = None,
    var: Operand | None = None,
    *rest: object,
) -> list[Operand]:
    """As batch_norm, with batch statistics (C,) or empty tensors as further outputs."""
    mean, var = (t if isinstance(t, Operand) else None for t in (mean, var))
    training = mean is None or rest[0] is True
    y = _by_channel(call, x, weight, bias, mean, var, [0, *range(2, x.ndim)] if training else [])
    saved = [
        call.move(x, [x.terms[1]], [(1,)], anything) if shape == (x.shape[1],) else call.fresh(shape or (), SAVED)
        for shape in call.shapes[1:]
    ]
    return [y, *saved]


@rule(aten.instance_norm)
def instance_norm(
    call: Call,
    x: Operand,
    weight: Operand | None,
    bias: Operand | None,
    running_mean: Operand | None,
    running_var: Operand | None,
    use_input_stats: bool,
    *rest: object,
) -> Operand:
    """x (N, C, *), the other tensors (C,); statistics over *."""
    own = use_input_stats or running_mean is None
    return _by_channel(call, x, weight, bias, running_mean, running_var, range(2, x.ndim) if own else [])


def _layer(
    call: Call,
    x: Operand,
    shape: Sequence[int],
    weight: Operand | None,
    bias: Operand | None,
    eps: object,
    centered: bool,
) -> Operand:
    n = len(shape)
    dims = range(x.ndim - n, x.ndim)
    if n > 1 and centered:
        call.fix(x, dims, "a norm over several dimensions takes statistics along it")
    call.reduce(x, dims)
    if centered:
        y = _affine(call, call.map(anything, x), weight, bias, None)
    else:  # x / rms(x) · weight is zero if either factor is
        y = call.map(product, x) if weight is None else call.map(product, x, weight)
    sizes = [Size(x.terms[d]) for d in dims]
    v = call.node.args
    call.counted("a norm divides by the number of entries")
    kwargs = dict(zip(("weight", "bias", "eps") if centered else ("weight", "eps"), v[2:], strict=False))
    kwargs |= {k: a for k, a in call.node.kwargs.items() if k in ("weight", "bias", "eps")}
    function = full_count.layer_norm if centered else full_count.rms_norm
    call.rewrite(function, v[0], sizes, full=list(shape), **kwargs)
    return y


@rule(aten.layer_norm)
def layer_norm(
    call: Call,
    x: Operand,
    normalized_shape: Sequence[int],
    weight: Operand | None = None,
    bias: Operand | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Operand:
    """x (*, D), weight and bias (D,); statistics over D, divided by the full D."""
    return _layer(call, x, normalized_shape, weight, bias, eps, True)


@rule(aten.native_layer_norm)
def native_layer_norm(
    call: Call, x: Operand, normalized_shape: Sequence[int], weight: Operand | None, bias: Operand | None, eps: float
) -> list[Operand]:
    """As layer_norm, with mean and rstd as further outputs; this operator cannot divide by the full count."""
    call.fix(x, range(x.ndim - len(normalized_shape), x.ndim), "native_layer_norm divides by the number of entries")
    y = _affine(call, call.map(anything, x), weight, bias, None)
    stats = call.reduce(x, range(x.ndim - len(normalized_shape), x.ndim), keepdim=True, fact=anything)
    return [y, stats, call.identity(stats)]


@rule(aten.rms_norm)
def rms_norm(
    call: Call, x: Operand, normalized_shape: Sequence[int], weight: Operand | None = None, eps: float | None = None
) -> Operand:
    """x (*, D), weight (D,); mean square over D, divided by the full D."""
    return _layer(call, x, normalized_shape, weight, None, eps, False)


@rule(aten.group_norm)
def group_norm(
    call: Call,
    x: Operand,
    num_groups: int,
    weight: Operand | None = None,
    bias: Operand | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Operand:
    """x (N, G·I, *), weight and bias (G·I,); statistics over I and *, divided by the full I.

    Whole groups may be removed, and the same entry of every group.
    """
    call.fix(x, range(2, x.ndim), "a norm takes statistics along it")
    grouped = call.view(x, (x.shape[0], num_groups, x.shape[1] // num_groups, *x.shape[2:]))
    call.reduce(grouped, range(2, grouped.ndim))
    y = _affine(call, call.map(anything, x), weight, bias, 1)
    call.counted("a norm divides by the number of entries")
    names = ("weight", "bias", "eps")
    kwargs = dict(zip(names, call.node.args[2:], strict=False))
    kwargs |= {k: a for k, a in call.node.kwargs.items() if k in names}
    call.rewrite(
        full_count.group_norm,
        call.node.args[0],
        Size(grouped.terms[1]),
        full=grouped.shape[2],
        **kwargs,
        width=Size(grouped.terms[2]),
    )
    return y


@rule(aten.native_group_norm)
def native_group_norm(
    call: Call,
    x: Operand,
    weight: Operand | None,
    bias: Operand | None,
    n: int,
    c: int,
    size: int,
    groups: int,
    eps: float,
) -> list[Operand]:
    """As group_norm, with mean and rstd (N, G) as further outputs."""
    grouped = call.view(x, (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]))
    call.fix(grouped, range(2, grouped.ndim), "native_group_norm divides by the number of entries")
    y = _affine(call, call.map(anything, x), weight, bias, 1)
    stats = call.reduce(grouped, range(2, grouped.ndim), fact=anything)
    call.resize(N=Size(x.terms[0]), C=Size(x.terms[1]), group=Size(grouped.terms[1]))
    return [y, stats, call.identity(stats)]
