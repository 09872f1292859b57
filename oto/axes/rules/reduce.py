"""Reductions. Removing zeros does not change a sum, nor a mean that still divides by the full count."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from oto.axes.call import NOT_FINITE, Call, Operand, Size, Uniform, anything, same, zero
from oto.axes.registry import rule
from oto.nn import functional as full_count

aten = torch.ops.aten
NOT_ZERO = "a sum goes over entries that do not become zero"


def _dims(x: Operand, dim: Any) -> list[int]:
    if dim is None or (isinstance(dim, Sequence) and not dim):
        return list(range(x.ndim))
    return [d % x.ndim for d in ([dim] if isinstance(dim, int) else dim)] if x.ndim else []


@rule(aten.sum)
def total(call: Call, x: Operand, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Operand:
    """Zeros add nothing. If all removed entries have another known value, the thinner call adds it for each of them."""
    dims = _dims(x, dim)
    rest = call.rest(x, dims)
    if rest is not None:
        call.counted(NOT_ZERO)
        call.rewrite(full_count.total, call.node.args[0], dims, keepdim, dtype=dtype, **_added(x, *rest))
    return call.reduce(x, dims, keepdim, rest=rest)


def _added(x: Operand, dim: int, held: Uniform) -> dict[str, Any]:
    return {"rest": held, "along": dim, "left": Size(x.terms[dim]), "of": x.shape[dim]}


@rule(aten.mean)
def mean(call: Call, x: Operand, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Operand:
    """As :func:`total`, divided by the full count."""
    dims = _dims(x, dim)
    rest = call.rest(x, dims)
    call.counted("a mean divides by the number of entries")
    call.rewrite(
        full_count.mean,
        call.node.args[0],
        dims,
        keepdim,
        full=[x.shape[d] for d in dims],
        sizes=[Size(x.terms[d]) for d in dims],
        dtype=dtype,
        **({} if rest is None else _added(x, *rest)),
    )
    return call.reduce(x, dims, keepdim, rest=rest)


@rule(aten.linalg_vector_norm)
def vector_norm(
    call: Call, x: Operand, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Operand:
    """A sum of powers, as :func:`total`, if the order is positive and finite."""
    dims = _dims(x, dim)
    if not 0 < ord < float("inf"):
        call.fix(x, dims, "a norm of this order sees every entry")
    rest = call.rest(x, dims)
    if rest is not None:
        call.counted(NOT_ZERO)
        call.rewrite(full_count.vector_norm, call.node.args[0], ord, dims, keepdim, dtype=dtype, **_added(x, *rest))
    return call.reduce(x, dims, keepdim, zero, rest=rest)


@rule(aten.norm)
def norm(call: Call, x: Operand, p: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Operand:
    """The older name of a vector norm."""
    return vector_norm(call, x, 2 if p is None else p, dim, keepdim)


def _over(call: Call, x: Operand, dim: Any, keepdim: bool, text: str, fact: Any) -> list[Operand]:
    dims = _dims(x, dim)
    call.fix(x, dims, text)
    return [call.reduce(x, dims, keepdim, fact if i == 0 else anything) for i, _ in enumerate(call.shapes)]


@rule(
    aten.amax,
    aten.amin,
    aten.max.default,
    aten.min.default,
    aten.max.dim,
    aten.min.dim,
    aten.median,
    aten.nanmedian,
)
def extreme(call: Call, x: Operand, dim: Any = None, keepdim: bool = False, **named: Any) -> Any:
    """A zero may be the extreme entry, so no entry along the reduced dimensions may be removed."""
    return _over(call, x, dim, keepdim, f"{_name(call)} looks at every entry", same)


@rule(aten.mode)
def mode(call: Call, x: Operand, dim: int = -1, keepdim: bool = False) -> Any:
    """The most frequent entry, and its index."""
    return extreme(call, x, dim, keepdim)


@rule(
    aten.argmax,
    aten.argmin,
    aten.prod,
    aten.any,
    aten.all,
    aten._is_all_true,
    aten._is_any_true,
    aten.logsumexp,
    aten.count_nonzero,
    aten.nansum,
    aten.nanmean,
)
def selective(call: Call, x: Operand, dim: Any = None, keepdim: bool = False, **named: Any) -> Any:
    """Reductions whose results also depend on zeros."""
    return _over(call, x, dim, keepdim, f"{_name(call)} looks at every entry", anything)


@rule(aten.std, aten.var, aten.std_mean, aten.var_mean)
def spread(call: Call, x: Operand, *args: Any, **named: Any) -> Any:
    """Removed zeros are taken into account by a mean and divisor with the full count."""
    schema = call.node.op._schema.arguments  # type: ignore[attr-defined]
    given = {a.name: a.default_value for a in schema}
    given |= dict(zip((a.name for a in schema[1:]), args, strict=False)) | named
    dims, keepdim = _dims(x, given.get("dim")), bool(given.get("keepdim"))
    correction = given.get("correction", given.get("unbiased"))
    correction = 1 if correction is None else correction + 0
    count = prod(x.shape[d] for d in dims)
    if call.dtypes[0].is_complex or not count:
        return _over(call, x, dims, keepdim, f"{_name(call)} divides by the number of entries", anything)
    function = {
        "std": full_count.std,
        "var": full_count.var,
        "std_mean": full_count.std_mean,
        "var_mean": full_count.var_mean,
    }
    rest = call.rest(x, dims)
    call.counted("a variance divides by the number of entries")
    call.rewrite(
        function[_name(call)],
        call.node.args[0],
        dims,
        correction,
        keepdim,
        full=[x.shape[d] for d in dims],
        sizes=[Size(x.terms[d]) for d in dims],
        **({} if rest is None else _added(x, *rest)),
    )
    # if there are not more entries than the correction, the divisor is zero
    facts = [zero if count > correction else lambda *_: NOT_FINITE, zero]
    return [call.reduce(x, dims, keepdim, fact, rest) for fact, _ in zip(facts, call.shapes, strict=False)]


@rule(aten.cumsum, aten.cumprod, aten.logcumsumexp, aten.cummax, aten.cummin, aten.flip, aten.sort, aten.argsort)
def along(call: Call, x: Operand, dim: Any = -1, *rest: Any, **named: Any) -> Any:
    """Each entry along ``dim`` depends on its position among the others."""
    if isinstance(dim, bool):  # sort.stable passes flags by name, argsort's older overload by position
        dim = rest[0] if rest else -1
    call.fix(x, _dims(x, dim), f"{_name(call)} depends on the place of every entry")
    return [call.map(anything if i else _order(call), x) for i, _ in enumerate(call.shapes)]


@rule(aten.msort)
def msort(call: Call, x: Operand) -> Any:
    """A sort along the first dimension."""
    return along(call, x, 0)


def _order(call: Call) -> Any:
    return same if _name(call) in ("flip", "sort", "msort") else zero if _name(call) == "cumsum" else anything


@rule(aten.topk, aten.kthvalue)
def topk(call: Call, x: Operand, k: int, dim: int = -1, *rest: Any, **named: Any) -> Any:
    """The k largest entries along ``dim``."""
    call.fix(x, [dim] if x.ndim else [], f"{_name(call)} looks at every entry")
    outs = []
    for i, shape in enumerate(call.shapes):
        assert shape is not None
        kept = len(shape) == x.ndim
        places = [d for d in range(x.ndim) if kept or d != dim % x.ndim]
        terms = [
            call.fixed(shape[j], "it was selected by value") if d == dim % x.ndim else x.terms[d]
            for j, d in enumerate(places)
        ]
        outs.append(call.move(x, terms, [(d,) for d in places], anything if i else same))
    return outs


def _name(call: Call) -> str:
    return str(call.node.op).split(".")[1]
