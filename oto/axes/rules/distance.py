"""Distances and norms: sums over entries. A zero, or an entry that is equal in both operands, adds nothing to them."""

from __future__ import annotations

from typing import Any

import torch

from oto.axes.call import NOT_FINITE, Call, Fact, Operand, anything, product, same
from oto.axes.registry import rule

aten = torch.ops.aten


def apart(*facts: Fact) -> Fact:
    """The difference of two facts: zero where they are equal, otherwise unknown."""
    return 0.0 if same(*facts) is not None else None


@rule(aten.cdist, aten._cdist_forward)
def cdist(call: Call, a: Operand, b: Operand, p: float = 2.0, *rest: Any) -> Operand:
    """(*, P, M), (*, R, M) -> (*, P, R): a norm of differences over M."""
    column = call.view(a, (*a.shape[:-1], 1, a.shape[-1]))
    row = call.view(b, (*b.shape[:-2], 1, *b.shape[-2:]))
    difference = call.map(apart, column, row)
    return call.reduce(difference, [difference.ndim - 1])


def _quotient(*facts: Fact) -> Fact:
    x, length = facts
    if length is not None and length == 0:
        return NOT_FINITE
    return 0.0 if x is not None and x == 0 else None


@rule(aten._weight_norm, aten._weight_norm_interface)
def weight_norm(call: Call, v: Operand, g: Operand, dim: int = 0) -> Any:
    """g · v / |v|, with the norm over all dimensions except ``dim``. If v is zero, this is 0/0, so only g may be
    zeroed."""
    if v.ndim and dim != -1:
        dim %= v.ndim
        length = call.reduce(v, [d for d in range(v.ndim) if d != dim], keepdim=True)
    else:
        length = call.reduce(v, range(v.ndim))
    direction = call.map(_quotient, v, length)
    y = call.map(product, direction, g)
    return y if len(call.shapes) == 1 else [y, call.map(anything, length)]


@rule(aten.isin.Tensor_Tensor)
def isin(call: Call, x: Operand, among: Operand, **named: Any) -> Operand:
    """Whether each entry occurs in another tensor, whose entries all stay."""
    call.fix(among, None, "entries are looked for among its own")
    return call.map(anything, x)
