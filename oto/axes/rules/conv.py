"""Convolutions and transposed convolutions.

Example: a convolution of 64 channels contracts its input with the second dimension of its weight; its output channels
are the first dimension of the weight, and its bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from oto.axes.call import Call, Operand, Size, zero
from oto.axes.registry import rule

aten = torch.ops.aten
SPACE, KERNEL, OUT = "uvw", "xyz", "pqr"


@rule(aten.conv1d, aten.conv2d, aten.conv3d)
def conv(
    call: Call,
    x: Operand,
    weight: Operand,
    bias: Operand | None = None,
    stride: object = 1,
    padding: object = 0,
    dilation: object = 1,
    groups: int = 1,
) -> Operand:
    """x (N, G·I, *size), weight (G·O, I, *kernel), bias (G·O,) -> (N, G·O, *size').

    Whole groups may be removed, and the same entry of every group, so that groups stay equally wide. Along a dimension
    with kernel size 1, stride 1 and no padding, the kernel does not slide: each position of the output is computed from
    the same position of the input, so positions may be removed.
    """
    n = weight.ndim - 2
    still = [
        k == 1 and by == 1 and (pad == 0 or isinstance(pad, str))  # with these, "same" and "valid" do not pad
        for k, by, pad in zip(weight.shape[2:], _each(stride, n), _each(padding, n), strict=True)
    ]
    # the kernel is applied once for every position of the output
    met = "".join(letter for letter, stays in zip(SPACE, still, strict=False) if not stays)
    return convolve(call, x, weight, bias, groups, "oi", uncounted=met, still=still)


def _each(given: Any, n: int) -> list[Any]:
    """An argument for each of ``n`` dimensions; a single one applies to all."""
    each = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    return each * n if len(each) == 1 else each


@rule(aten.conv_transpose1d, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def conv_transpose(
    call: Call,
    x: Operand,
    weight: Operand,
    bias: Operand | None = None,
    stride: object = 1,
    padding: object = 0,
    output_padding: object = 0,
    groups: int = 1,
    dilation: object = 1,
) -> Operand:
    """x (N, G·I, *size), weight (G·I, O, *kernel), bias (G·O,) -> (N, G·O, *size')."""
    # the kernel is applied once for every position of the input
    return convolve(call, x, weight, bias, groups, "io", uncounted=OUT)


@rule(aten.convolution)
def convolution(
    call: Call,
    x: Operand,
    weight: Operand,
    bias: Operand | None,
    stride: object,
    padding: object,
    dilation: object,
    transposed: bool,
    output_padding: object,
    groups: int,
) -> Operand:
    """The operator into which all convolutions are decomposed below autograd."""
    if transposed:
        return conv_transpose(call, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(call, x, weight, bias, stride, padding, dilation, groups)


@rule(aten.mkldnn_convolution)
def mkldnn_convolution(
    call: Call,
    x: Operand,
    weight: Operand,
    bias: Operand | None,
    padding: object,
    stride: object,
    dilation: object,
    groups: int,
) -> Operand:
    """The operator of ``convolution`` on a CPU."""
    return conv(call, x, weight, bias, stride, padding, dilation, groups)


@rule(aten.cudnn_convolution)
def cudnn_convolution(
    call: Call,
    x: Operand,
    weight: Operand,
    padding: object,
    stride: object,
    dilation: object,
    groups: int,
    *flags: object,
) -> Operand:
    """The operator of ``convolution`` on a GPU; the bias is added afterwards."""
    return conv(call, x, weight, None, stride, padding, dilation, groups)


def convolve(
    call: Call,
    x: Operand,
    weight: Operand,
    bias: Operand | None,
    groups: int,
    channels: str,
    uncounted: str,
    still: Sequence[bool] = (),
) -> Operand:
    """Every kind of convolution, with arguments in a common order.

    Args:
        channels: The letters of the first two dimensions of the weight.
        uncounted: The letters of dimensions that do not multiply the cost.
        still: For each dimension of the kernel, whether the kernel does not slide along it.
    """
    batched = x.ndim == weight.ndim
    x = x if batched else call.view(x, (1, *x.shape))
    n = x.ndim - 2
    size = call.shape[-n:]
    slides = [not (still and still[i]) for i in range(n)]
    space, kernel = SPACE[:n], KERNEL[:n]
    out = "".join(OUT[i] if slides[i] else SPACE[i] for i in range(n))
    sliding = "a convolution slides along it"
    call.fix(x, [2 + i for i in range(n) if slides[i]], sliding)
    call.fix(weight, range(2, weight.ndim), "it is the kernel of a convolution")
    new = {OUT[i]: call.fixed(size[i], sliding) for i in range(n) if slides[i]}
    if groups == 1:
        y = call.contract(f"ni{space},{channels}{kernel}->no{out}", x, weight, new=new, uncounted=uncounted)
    else:
        x = call.view(x, (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]))
        weight = call.view(weight, (groups, weight.shape[0] // groups, *weight.shape[1:]))
        y = call.contract(f"ngi{space},g{channels}{kernel}->ngo{out}", x, weight, new=new, uncounted=uncounted)
        call.resize(groups=Size(y.terms[1]))
        y = call.view(y, (y.shape[0], y.shape[1] * y.shape[2], *size))
    if bias is not None:
        y = call.map(zero, y, call.view(bias, (bias.shape[0], *[1] * n)))
    return y if batched else call.view(y, y.shape[1:])
