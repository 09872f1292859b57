"""Pointwise operators.

The value of a removed entry is found by running the operator on it: relu(0) = 0, sigmoid(0) = 1/2. A product is zero if
one factor is.
"""

from __future__ import annotations

from typing import Any

import torch

from oto._torch import tree_leaves
from oto.axes.call import NOT_FINITE, Call, Fact, Operand, evaluated, product, same, zero
from oto.axes.registry import fixed, rule
from oto.nn import functional as full_count

aten = torch.ops.aten


@rule(
    aten.abs, aten.absolute, aten.neg, aten.negative, aten.exp, aten.exp2, aten.expm1, aten.log, aten.log2, aten.log10,
    aten.log1p, aten.sqrt, aten.rsqrt, aten.square, aten.sin, aten.cos, aten.tan, aten.asin, aten.acos, aten.atan,
    aten.sinh, aten.cosh, aten.tanh, aten.asinh, aten.acosh, aten.atanh, aten.sigmoid, aten.relu, aten.relu6,
    aten.hardtanh, aten.hardsigmoid, aten.hardswish, aten.silu, aten.mish, aten.gelu, aten.elu, aten.selu, aten.celu,
    aten.leaky_relu, aten.softplus, aten.log_sigmoid, aten.threshold, aten.hardshrink, aten.softshrink,
    aten.erf, aten.erfc, aten.erfinv, aten.ceil, aten.floor, aten.round, aten.trunc, aten.fix, aten.frac, aten.sign,
    aten.sgn, aten.signbit, aten.reciprocal, aten.clamp, aten.clip, aten.clamp_min, aten.clamp_max, aten.nan_to_num,
    aten.logical_not, aten.bitwise_not, aten.isnan, aten.isinf, aten.isfinite, aten.isneginf, aten.isposinf, aten.logit,
    aten.sinc, aten.special_expit, aten.deg2rad, aten.rad2deg, aten.lgamma, aten.digamma, aten.i0,
    aten.add, aten.sub, aten.subtract, aten.rsub, aten.pow, aten.float_power, aten.remainder, aten.fmod,
    aten.floor_divide, aten.atan2, aten.arctan2, aten.maximum, aten.minimum, aten.fmax, aten.fmin, aten.hypot,
    aten.copysign, aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge,
    aten.greater, aten.greater_equal, aten.less, aten.less_equal, aten.not_equal,
    aten.logical_and, aten.logical_or, aten.logical_xor, aten.bitwise_and, aten.bitwise_or, aten.bitwise_xor,
    aten.__and__, aten.__or__, aten.__xor__, aten.lerp, aten.logaddexp, aten.heaviside,
    aten.max.other, aten.min.other, aten.xlogy, aten.ldexp, aten.logaddexp2, aten.nextafter, aten.angle, aten.polar,
    aten.complex, aten.bitwise_left_shift, aten.bitwise_right_shift,
)  # fmt: skip
def pointwise(call: Call, *args: Any, **kwargs: Any) -> Operand:
    """Any number of tensors and numbers, with broadcasting."""
    xs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Operand)]
    return call.map(evaluated(call.node.op, args, kwargs, call.dtypes), *xs, itself=True)


def _operands(*xs: Any) -> list[Operand]:
    return [x for x in xs if isinstance(x, Operand)]


@rule(aten.mul, aten.multiply)
def mul(call: Call, a: Operand, b: Any) -> Operand:
    """0·x = 0."""
    value = evaluated(call.node.op, (a, b), {}, call.dtypes)

    def fact(*facts: Fact) -> Fact:
        return 0.0 if product(*facts) == 0 else value(*facts)

    return call.map(fact, *_operands(a, b), itself=True)


@rule(aten.div, aten.divide, aten.true_divide)
def div(call: Call, a: Operand, b: Any, *, rounding_mode: str | None = None) -> Operand:
    """0/x = 0, unless x is known to be zero."""
    value = evaluated(call.node.op, (a, b), {"rounding_mode": rounding_mode} if rounding_mode else {}, call.dtypes)

    def fact(*facts: Fact) -> Fact:
        if len(facts) == 2 and facts[1] is not None and facts[1] == 0:
            return NOT_FINITE
        return 0.0 if facts[0] is not None and facts[0] == 0 else value(*facts)

    return call.map(fact, *_operands(a, b), itself=True)


@rule(aten.addcmul, aten.addcdiv)
def addcmul(call: Call, x: Operand, a: Operand, b: Operand, *, value: float = 1) -> Operand:
    """x + value·a·b, or x + value·a/b."""
    divides = "div" in str(call.node.op)

    def fact(*facts: Fact) -> Fact:
        x, a, b = facts
        if divides and b is not None and b == 0:
            return NOT_FINITE
        return zero(x, product(a, None if divides else b))

    return call.map(fact, x, a, b)


@rule(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def where(call: Call, condition: Operand, x: Any, y: Any) -> Operand:
    """Known if both sides are equal, or if the condition is known."""
    values = [v for v in (x, y) if isinstance(v, Operand)]

    def fact(*facts: Fact) -> Fact:
        rest = iter(facts[1:])
        a, b = (next(rest) if isinstance(v, Operand) else v for v in (x, y))
        return same(a, b) if facts[0] is None else (a if facts[0] else b)

    return call.map(fact, condition, *values)


@rule(aten.masked_fill)
def masked_fill(call: Call, x: Operand, mask: Operand, value: Any) -> Operand:
    """Known if the fill value is equal to the value before."""
    if isinstance(value, Operand):
        return call.map(lambda f, m, v: same(f, _cast(v)), x, mask, value)
    return call.map(lambda f, m: same(f, call.constant(value)), x, mask)


@rule(aten.prelu, aten._prelu_kernel)
def prelu(call: Call, x: Operand, weight: Operand) -> Operand:
    """x (N, C, *), weight (C,) or (1,): zero stays zero, whatever the slope."""
    if x.ndim == 0:
        weight = call.view(weight, ())
    elif weight.ndim == 1 and x.ndim > 1:
        weight = call.view(weight, (weight.shape[0], *[1] * (x.ndim - 2)))
    return call.map(lambda f, w: 0.0 if f is not None and f == 0 else None, x, weight)


@rule(aten.glu)
def glu(call: Call, x: Operand, dim: int = -1) -> Operand:
    """The first half times the sigmoid of the second half: entry i is removed from both halves."""
    half = x.shape[dim] // 2
    dims = [(d,) for d in range(x.ndim)]

    def part(term: Any) -> Operand:
        terms = list(x.terms)
        terms[dim] = term
        return call.move(x, terms, dims)

    first, second = call.cut(x.terms[dim], [half, half])
    return call.map(lambda a, b: product(a), part(first), part(second))


@rule(
    aten.tanh_backward, aten.sigmoid_backward, aten.silu_backward, aten.gelu_backward, aten.threshold_backward,
    aten.softplus_backward, aten.leaky_relu_backward, aten.hardswish_backward,
)  # fmt: skip
def slope(call: Call, gradient: Operand, x: Operand, *args: Any, **kwargs: Any) -> Operand:
    """The gradient times a derivative, for models that compute gradients in their forward."""
    value = evaluated(call.node.op, (gradient, x, *args), kwargs, call.dtypes)

    def fact(*facts: Fact) -> Fact:
        return 0.0 if facts[0] == 0 else value(*facts)

    return call.map(fact, gradient, x)


DRAWN = "random numbers are drawn entry by entry"


@rule(aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout)
def dropout(call: Call, x: Operand, p: float, train: bool) -> Any:
    """The identity in eval mode. In train mode, removing an entry would shift the random numbers of all others."""
    return call.opaque(DRAWN) if train and p > 0 else call.identity(x)


@rule(aten.rrelu)
def rrelu(call: Call, x: Operand, lower: float = 0.125, upper: float = 1 / 3, training: bool = False,
          *rest: Any) -> Any:  # fmt: skip
    """In eval mode, a leaky relu with the mean slope."""
    if training and lower != upper:
        return call.opaque(DRAWN)
    return call.map(lambda f: 0.0 if f is not None and f == 0 else None, x)


@rule(
    aten.clone, aten.contiguous, aten.detach, aten.alias, aten.lift_fresh, aten.lift_fresh_copy, aten.lift,
    aten.positive, aten.conj, aten.resolve_conj, aten.resolve_neg, aten.real, aten._conj, aten.data,
    aten.pin_memory, aten.conj_physical,
)  # fmt: skip
def identity(call: Call, x: Operand, *rest: Any, **named: Any) -> Operand:
    """The same entries."""
    return call.identity(x)


@rule(aten.view_as_real, aten.view_as_real_copy)
def view_as_real(call: Call, x: Operand) -> Operand:
    """The real and the imaginary part, along a new last dimension."""
    parts = call.fixed(2, "it holds the real and the imaginary part")
    return call.move(x, [*x.terms, parts], [(d,) for d in range(x.ndim)] + [()], lambda f: 0.0 if f == 0 else None)


@rule(aten.view_as_complex, aten.view_as_complex_copy)
def view_as_complex(call: Call, x: Operand) -> Operand:
    """The last dimension holds the real and the imaginary part."""
    call.fix(x, [-1], "it holds the real and the imaginary part")
    # the two parts must be adjacent in memory, at even offsets
    call.relaid(full_count.view_as_complex, call.node.args[0])
    return call.move(x, x.terms[:-1], [(d,) for d in range(x.ndim - 1)], lambda f: 0.0 if f == 0 else None)


def _cast(fact: Fact) -> Fact:
    """The fact after a cast: 0 and 1 are the same in every dtype, other values are unknown."""
    return fact if fact is not None and fact in (0, 1) else None


@rule(aten.to, aten._to_copy, aten.type_as, aten.cpu, aten.cuda, aten._cast_Float, aten.view.dtype)
def cast(call: Call, x: Operand, *rest: Any, **named: Any) -> Operand:
    """The same entries in another dtype or on another device; or the same bits, read as another dtype."""
    if "view" in str(call.node.op):
        if call.shape != x.shape:
            call.fix(x, None, "its bytes are read under another width")
            return call.fresh(call.shape, "bytes read under another width")
        return call.map(lambda f: 0.0 if f is not None and f == 0 else None, x)
    return call.map(_cast, x, itself=isinstance(rest[0] if rest else None, torch.dtype | None))


@rule(aten.copy)
def copy(call: Call, x: Operand, source: Operand, non_blocking: bool = False) -> Operand:
    """Every entry is overwritten, with broadcasting."""
    return call.map(lambda old, new: _cast(new), x, source)


@rule(aten.fill, aten.zero)
def fill(call: Call, x: Operand, value: Any = 0) -> Operand:
    """Every entry is overwritten by one number."""
    if isinstance(value, Operand):
        return call.map(lambda old, new: _cast(new), x, value)
    return call.map(lambda old: call.constant(value), x)


fixed(
    aten.bernoulli, aten.rand_like, aten.randn_like, aten.randint_like, aten.multinomial, aten.normal, aten.uniform,
    aten.exponential, aten.random, aten.native_dropout,
    why=DRAWN,
)  # fmt: skip
