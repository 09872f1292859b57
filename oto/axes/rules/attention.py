"""Attention operators, described by the products and the softmax that they consist of."""

from __future__ import annotations

from typing import Any

import torch

from oto.axes.call import Call, Operand, anything
from oto.axes.registry import rule
from oto.axes.rules.linear import letters

aten = torch.ops.aten


@rule(aten.scaled_dot_product_attention)
def attention(
    call: Call,
    query: Operand,
    key: Operand,
    value: Operand,
    attn_mask: Operand | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Operand:
    """query (*, Hq, S, D), key (*, Hkv, T, D), value (*, Hkv, T, V) -> (*, Hq, S, V).

    With ``enable_gqa``, Hq / Hkv query heads share each key-value head. Without a given scale, it is 1/√D: D is fixed.
    """
    if scale is None:
        call.fix(query, [-1], "attention scales by the square root of its size")
        call.fix(key, [-1], "attention scales by the square root of its size")
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        heads = key.shape[-3]
        repeat = query.shape[-3] // heads
        query = call.view(query, (*query.shape[:-3], heads, repeat, *query.shape[-2:]))
        key = call.view(key, (*key.shape[:-3], heads, 1, *key.shape[-2:]))
        value = call.view(value, (*value.shape[:-3], heads, 1, *value.shape[-2:]))
        if attn_mask is not None and attn_mask.ndim > 2:
            n = attn_mask.shape[-3]
            parts = (heads, repeat) if n != 1 else (1, 1)
            attn_mask = call.view(attn_mask, (*attn_mask.shape[:-3], *parts, *attn_mask.shape[-2:]))
    b = letters(max(query.ndim, key.ndim, value.ndim) - 2)
    q, k, v = (b[len(b) - (x.ndim - 2) :] for x in (query, key, value))
    scores = call.contract(f"{q}sd,{k}td->{b}st", query, key)
    if attn_mask is not None:
        scores = call.map(anything, scores, attn_mask)
    call.fix(scores, [-1, -2], "attention normalizes over the positions")
    call.fix(value, [-2], "attention normalizes over the positions")
    if dropout_p > 0:
        call.fix(scores, None, "attention drops weights at random")
    # if all scores are zero, the softmax is uniform, so only a zero in the values gives a zero
    weights = call.map(anything, scores)
    y = call.contract(f"{b}st,{v}tv->{b}sv", weights, value)
    return y if y.shape == call.shape else call.view(y, call.shape)


@rule(
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
)
def fused_attention(call: Call, query: Operand, key: Operand, value: Operand, *rest: Any, **named: Any) -> list[Any]:
    """The kernels that compute attention; all outputs but the first are for the backward pass."""
    arguments = call.node.op._schema.arguments  # type: ignore[attr-defined]
    given = {a.name: x for a, x in zip(arguments[3:], rest, strict=False)} | named
    mask = given.get("attn_mask") or given.get("attn_bias")
    shared = 1 < key.shape[1] < query.shape[1]
    for x in (query, key, value):
        call.fix(x, [-1], "the heads of an attention kernel must be equally wide")
    dropout_p, scale = given.get("dropout_p", 0.0), given.get("scale")
    y = attention(call, query, key, value, mask, dropout_p, scale=scale, enable_gqa=shared)
    rest_of = [call.fixed(n, "bookkeeping of an attention kernel") for n in (call.shapes[1] or ())[2:]]
    sums = call.move(query, [*query.terms[:2], *rest_of], [(0,), (1,)], anything)  # a number for each row of scores
    others = [None if s is None else call.fresh(s, "bookkeeping of an attention kernel") for s in call.shapes[2:]]
    return [y, sums if call.shapes[1] == sums.shape else call.fresh(call.shapes[1] or (), "bookkeeping"), *others]


@rule(aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax, aten._safe_softmax)
def softmax(call: Call, x: Operand, dim: int, *rest: Any, **named: Any) -> Operand:
    """A zero still adds exp(0) to the sum, so no entry along ``dim`` may be removed."""
    if x.ndim:
        call.fix(x, [dim], "softmax normalizes over it")
    return call.map(anything, x)
