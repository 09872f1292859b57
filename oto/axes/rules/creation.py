"""Tensors that are created from sizes alone. Those filled with a single number may get thinner; others stay whole."""

from __future__ import annotations

from typing import Any

import torch

from oto.axes.call import Call, Operand, Size
from oto.axes.registry import rule

aten = torch.ops.aten


def _filled(call: Call, argument: str, fact: Any) -> Operand:
    y = call.fresh(call.shape, None, fact)
    call.resize(**{argument: [Size(term) for term in y.terms]})
    return y


@rule(aten.zeros, aten.new_zeros)
def zeros(call: Call, *args: Any, **named: Any) -> Operand:
    """Zero everywhere."""
    return _filled(call, "size", 0.0)


@rule(aten.ones, aten.new_ones)
def ones(call: Call, *args: Any, **named: Any) -> Operand:
    """One everywhere."""
    return _filled(call, "size", 1.0)


@rule(aten.full)
def full(call: Call, size: Any, value: Any, **named: Any) -> Operand:
    """One number everywhere."""
    return _filled(call, "size", call.constant(value))


@rule(aten.new_full)
def new_full(call: Call, x: Operand, size: Any, value: Any, **named: Any) -> Operand:
    """One number everywhere."""
    return _filled(call, "size", call.constant(value))


@rule(aten.empty, aten.new_empty)
def empty(call: Call, *args: Any, **named: Any) -> Operand:
    """Unknown everywhere until it is written to."""
    return _filled(call, "size", None)


@rule(aten.zeros_like)
def zeros_like(call: Call, x: Operand, **named: Any) -> Operand:
    """Zero everywhere, in the shape of x."""
    return call.map(lambda f: 0.0, x)


@rule(aten.ones_like)
def ones_like(call: Call, x: Operand, **named: Any) -> Operand:
    """One everywhere, in the shape of x."""
    return call.map(lambda f: 1.0, x)


@rule(aten.full_like)
def full_like(call: Call, x: Operand, value: Any, **named: Any) -> Operand:
    """One number everywhere, in the shape of x."""
    return call.map(lambda f: call.constant(value), x)


@rule(aten.empty_like)
def empty_like(call: Call, x: Operand, **named: Any) -> Operand:
    """Unknown everywhere, in the shape of x."""
    return call.map(lambda f: None, x)


@rule(
    aten.arange,
    aten.linspace,
    aten.logspace,
    aten.eye,
    aten.tril_indices,
    aten.triu_indices,
    aten.scalar_tensor,
    aten.rand,
    aten.randn,
    aten.randint,
    aten.randperm,
    aten.range,
    aten.bartlett_window,
    aten.hann_window,
    aten.hamming_window,
    aten.blackman_window,
)
def counting(call: Call, *args: Any, **named: Any) -> Operand:
    """Each entry depends on its position, or is random."""
    return call.fresh(call.shape, "its entries depend on their places")
