"""Convolutions and their transposes."""

from __future__ import annotations

import torch

from oto.axes.call import Call, Operand, Size, zero
from oto.axes.registry import rule

aten = torch.ops.aten
SPACE, KERNEL, OUT = "uvw", "xyz", "pqr"


@rule(aten.conv1d, aten.conv2d, aten.conv3d)
def conv(call: Call, x: Operand, weight: Operand, bias: Operand | None = None, stride: object = 1, padding: object = 0,
         dilation: object = 1, groups: int = 1) -> Operand:  # fmt: skip
    """x (N, G·I, *size), weight (G·O, I, *kernel), bias (G·O,) -> (N, G·O, *size').

    Whole groups may go, and the same entry of every group: the groups stay equally wide.
    """
    # the kernel is met once for every position of the output
    return convolve(call, x, weight, bias, groups, "oi", uncounted=SPACE)


@rule(aten.conv_transpose1d, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def conv_transpose(call: Call, x: Operand, weight: Operand, bias: Operand | None = None, stride: object = 1,
                   padding: object = 0, output_padding: object = 0, groups: int = 1,
                   dilation: object = 1) -> Operand:  # fmt: skip
    """x (N, G·I, *size), weight (G·I, O, *kernel), bias (G·O,) -> (N, G·O, *size')."""
    # the kernel is met once for every position of the input
    return convolve(call, x, weight, bias, groups, "io", uncounted=OUT)


@rule(aten.convolution)
def convolution(call: Call, x: Operand, weight: Operand, bias: Operand | None, stride: object, padding: object,
                dilation: object, transposed: bool, output_padding: object, groups: int) -> Operand:  # fmt: skip
    """The operator that all convolutions become below autograd."""
    if transposed:
        return conv_transpose(call, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(call, x, weight, bias, stride, padding, dilation, groups)


@rule(aten.mkldnn_convolution)
def mkldnn_convolution(call: Call, x: Operand, weight: Operand, bias: Operand | None, padding: object, stride: object,
                       dilation: object, groups: int) -> Operand:  # fmt: skip
    """What ``convolution`` becomes on a CPU."""
    return conv(call, x, weight, bias, stride, padding, dilation, groups)


@rule(aten.cudnn_convolution)
def cudnn_convolution(call: Call, x: Operand, weight: Operand, padding: object, stride: object, dilation: object,
                      groups: int, *flags: object) -> Operand:  # fmt: skip
    """What ``convolution`` becomes on a GPU; the bias is added afterwards."""
    return conv(call, x, weight, None, stride, padding, dilation, groups)


def convolve(call: Call, x: Operand, weight: Operand, bias: Operand | None, groups: int, channels: str,
             uncounted: str) -> Operand:  # fmt: skip
    """All convolutions, once their arguments are sorted; ``channels`` spells the first two dimensions of the weight."""
    batched = x.ndim == weight.ndim
    x = x if batched else call.view(x, (1, *x.shape))
    n = x.ndim - 2
    size = call.shape[-n:]
    space, kernel, out = SPACE[:n], KERNEL[:n], OUT[:n]
    sliding = "a convolution slides along it"
    call.fix(x, range(2, x.ndim), sliding)
    call.fix(weight, range(2, weight.ndim), "it is the kernel of a convolution")
    new = {letter: call.fixed(k, sliding) for letter, k in zip(out, size, strict=True)}
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
