"""Losses inside a forward. Entries that are equal on both sides add nothing to a distance; losses over classes keep all
classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from oto.axes.call import Call, Operand, Size, anything
from oto.axes.registry import fixed, rule
from oto.axes.rules.distance import apart
from oto.nn import functional as full_count

aten = torch.ops.aten
MEAN = 1
"""The number of this reduction in ATen; 0 is none, 2 is the sum."""


def _distance(
    call: Call, x: Operand, target: Operand, reduction: int, loss: Callable[..., Any], **named: Any
) -> Operand:
    """A function of the difference that is zero at zero: per entry, its mean, or its sum."""
    each = call.map(apart, x, target)
    if not reduction:
        return each
    if reduction == MEAN:
        call.counted("a mean divides by the number of entries")
        call.rewrite(loss, *call.node.args[:2], full=list(each.shape), sizes=[Size(t) for t in each.terms], **named)
    return call.reduce(each, range(each.ndim))


@rule(aten.mse_loss)
def mse_loss(call: Call, x: Operand, target: Operand, reduction: int = MEAN) -> Operand:
    """Squared differences."""
    return _distance(call, x, target, reduction, full_count.mse_loss)


@rule(aten.smooth_l1_loss)
def smooth_l1_loss(call: Call, x: Operand, target: Operand, reduction: int = MEAN, beta: float = 1.0) -> Operand:
    """Squares of differences up to ``beta``, absolute values beyond."""
    return _distance(call, x, target, reduction, full_count.smooth_l1_loss, beta=beta)


@rule(aten.huber_loss)
def huber_loss(call: Call, x: Operand, target: Operand, reduction: int = MEAN, delta: float = 1.0) -> Operand:
    """:func:`smooth_l1_loss` times ``delta``."""
    return _distance(call, x, target, reduction, full_count.huber_loss, delta=delta)


def _entries(call: Call, reduction: int, *xs: Operand | None) -> Operand:
    """A loss to which entries contribute even if they are zero on both sides."""
    each = call.map(anything, *(x for x in xs if x is not None))
    if not reduction:
        return each
    call.fix(each, None, "every entry adds to a loss, zeros too")
    return call.reduce(each, range(each.ndim), fact=anything)


@rule(aten.binary_cross_entropy)
def binary_cross_entropy(
    call: Call, x: Operand, target: Operand, weight: Operand | None = None, reduction: int = MEAN
) -> Operand:
    """Cross entropy of probabilities."""
    return _entries(call, reduction, x, target, weight)


@rule(aten.binary_cross_entropy_with_logits)
def binary_cross_entropy_with_logits(
    call: Call,
    x: Operand,
    target: Operand,
    weight: Operand | None = None,
    pos_weight: Operand | None = None,
    reduction: int = MEAN,
) -> Operand:
    """Cross entropy of logits, which is log 2 for zero."""
    return _entries(call, reduction, x, target, weight, pos_weight)


@rule(aten.soft_margin_loss)
def soft_margin_loss(call: Call, x: Operand, target: Operand, reduction: int = MEAN) -> Operand:
    """log(1 + exp(-target · x)), which is log 2 for zero."""
    return _entries(call, reduction, x, target)


fixed(
    aten.nll_loss,
    aten.nll_loss_forward,
    aten.nll_loss2d,
    aten.nll_loss2d_forward,
    aten.nll_loss_nd,
    aten.multi_margin_loss,
    aten.multilabel_margin_loss,
    aten.multilabel_margin_loss_forward,
    why="targets name classes by their places",
)
fixed(aten.ctc_loss, aten._ctc_loss, why="labels name classes by their places, and time runs")
