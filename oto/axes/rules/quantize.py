"""Fake quantization of each entry: x -> (clamp(round(x / scale + zero point)) - zero point) · scale.

Zero stays zero if the zero point is an integer within the range. A scale of zero gives values that are not finite.
"""

from __future__ import annotations

from typing import Any

import torch

from oto.axes.call import NOT_FINITE, Call, Fact, Operand, anything
from oto.axes.registry import rule

aten = torch.ops.aten


def _quantized(exact: bool) -> Any:
    """The fact of the result, as a function of those of the tensor, the scale and the zero point.

    Args:
        exact: Whether the zero point is known to be an integer within the range.
    """

    def fact(x: Fact, scale: Fact = None, point: Fact = None) -> Fact:
        if scale is not None and scale == 0:
            return NOT_FINITE
        return 0.0 if exact and x is not None and x == 0 else None

    return fact


def _results(call: Call, fact: Any, *xs: Operand) -> Any:
    """The result, and the mask of the entries that were not clamped if the operator returns one."""
    outputs = [call.map(anything if i else fact, *xs) for i, _ in enumerate(call.shapes)]
    return outputs[0] if len(outputs) == 1 else outputs


@rule(aten.fake_quantize_per_tensor_affine.default, aten.fake_quantize_per_tensor_affine_cachemask)
def per_tensor(call: Call, x: Operand, scale: float, zero_point: int, low: int, high: int) -> Any:
    """One scale and one zero point, both numbers."""
    return _results(call, _quantized(low <= zero_point <= high), x)


@rule(
    aten.fake_quantize_per_tensor_affine.tensor_qparams,
    aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams,
)
def per_tensor_of_tensors(call: Call, x: Operand, scale: Operand, zero_point: Operand, *rest: Any) -> Any:
    """One scale and one zero point, both tensors; the zero point may lie outside of the range."""
    return _results(call, _quantized(False), x)


@rule(aten._fake_quantize_learnable_per_tensor_affine)
def learnable_per_tensor(call: Call, x: Operand, scale: Operand, zero_point: Operand, *rest: Any) -> Any:
    """One scale and one zero point, both tensors; the zero point is rounded and clamped to the range."""
    return _results(call, _quantized(True), x)


@rule(
    aten.fake_quantize_per_channel_affine,
    aten.fake_quantize_per_channel_affine_cachemask,
    aten._fake_quantize_learnable_per_channel_affine,
)
def per_channel(call: Call, x: Operand, scale: Operand, zero_point: Operand, axis: int, *rest: Any) -> Any:
    """A scale and a zero point for every entry along ``axis``. Torch rejects integer zero points outside of the range,
    and rounds and clamps learned ones; those of floating-point dtypes may be fractions."""
    column = (x.shape[axis], *[1] * (x.ndim - axis % x.ndim - 1))
    scales, points = (call.view(t, column) for t in (scale, zero_point))
    whole = not call.dtypes[2].is_floating_point or "learnable" in str(call.node.op)
    return _results(call, _quantized(whole), x, scales, points)
