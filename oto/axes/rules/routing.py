"""Routing of tokens to experts and back: grouped products, and reads and writes by index.

The indexed dimension stays whole, all others may get thinner. For example, ``gather`` along the tokens keeps all
tokens, while channels may be removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from oto.axes import terms as T
from oto.axes.call import NOT_FINITE, Call, Fact, Operand, same, zero
from oto.axes.registry import fixed, rule
from oto.axes.rules.index import PICKED
from oto.axes.rules.linear import letters
from oto.nn import functional as full_count

aten = torch.ops.aten
GROUPED = "it is divided among the groups of a product"


@rule("aten::_grouped_mm")  # by name, since torch before 2.8 does not have it
def grouped_mm(
    call: Call, a: Operand, b: Operand, offs: Operand | None = None, bias: Operand | None = None, out_dtype: Any = None
) -> Operand:
    """Products by group.

    Groups are consecutive rows of ``a`` (S, K), consecutive columns of ``b`` (K, S), parts of the contracted dimension
    of both, or a leading dimension (E, ·, ·).
    """
    if offs is not None:
        call.fix(offs, None, "it names the borders of groups")
    for x, along in ((a, 0), (b, 1)):
        if x.ndim == 2 and a.ndim + b.ndim != 4:
            call.fix(x, [along], GROUPED)
    if a.ndim == 3 and b.ndim == 3:
        y = call.contract("emk,ekn->emn", a, b)
    elif a.ndim == 3:
        call.fix(a, [0], GROUPED)
        y = call.contract("emk,kn->mn", a, b, uncounted="e")
    elif b.ndim == 3:
        call.fix(b, [0], GROUPED)
        y = call.contract("mk,ekn->mn", a, b, uncounted="e")
    else:  # the contracted dimension is divided into groups
        call.fix(a, [1], GROUPED)
        call.fix(b, [0], GROUPED)
        groups = call.fixed(call.shape[0], GROUPED)
        y = call.contract("mk,kn->emn", a, b, new={"e": groups}, uncounted="e")
    if bias is not None:
        if bias.ndim == 2:
            call.fix(bias, [0], GROUPED)
            bias = call.move(bias, bias.terms[1:], [(1,)])
        y = call.map(zero, y, bias)
    # the kernel requires rows whose size is a multiple of 16 bytes, which those of a thinner tensor may not be
    call.rewrite(full_count.grouped_mm, *call.node.args, **call.node.kwargs)
    call.watch(*a.terms, *b.terms)
    return y


@rule("transformers::grouped_mm_fallback")
def grouped_rows(call: Call, a: Operand, b: Operand, offs: Operand) -> Operand:
    """Consecutive groups of the rows (S, K), each with its own matrix of (E, K, N), for any width."""
    call.fix(offs, None, "it names the borders of groups")
    call.fix(a, [0], GROUPED)
    call.fix(b, [0], GROUPED)
    return call.contract("mk,ekn->mn", a, b, uncounted="e")


def _others(call: Call, dim: int, x: Operand, *others: Operand) -> None:
    """Unify all dimensions except ``dim``, in which the operator uses equal positions of all tensors."""
    for d in range(x.ndim):
        if d == dim:
            continue
        for other in others:
            if other.shape[d] == x.shape[d]:
                call.unify(x.terms[d], other.terms[d])
            else:  # only the first entries are read
                call.fix(x, [d], PICKED)
                call.fix(other, [d], PICKED)


def _written(
    call: Call, x: Operand, dim: int, others: Sequence[Operand], values: Sequence[Operand], fact: Any
) -> Operand:
    """``x`` with some entries along ``dim`` replaced or added to; other dimensions match those of ``others``."""
    call.fix(x, [dim], PICKED)
    for other in others:
        call.fix(other, [dim], "it is written by index")
    _others(call, dim, x, *others)
    own = tuple((d,) for d in range(x.ndim))
    through = tuple((d,) if d != dim else () for d in range(x.ndim))
    return call.step([x, *values], x.terms, (own, *(through for _ in values)), fact)


@rule(aten.gather)
def gather(call: Call, x: Operand, dim: int, index: Operand, **named: Any) -> Operand:
    """Each entry of the index is a position in ``dim`` to read; along other dimensions, positions stay the same."""
    if not x.ndim or not index.ndim:
        call.fix(x, None, PICKED)
        call.fix(index, None, "it is an index")
        return call.fresh(call.shape, PICKED)
    dim %= x.ndim
    call.fix(x, [dim], PICKED)
    _others(call, dim, x, index)
    own = tuple((d,) for d in range(x.ndim))
    through = tuple((d,) if d != dim else () for d in range(x.ndim))
    return call.step([x, index], index.terms, (through, own), lambda f, _: f)


@rule(
    aten.scatter.src,
    aten.scatter_.src,
    aten.scatter_add,
    aten.scatter_reduce,
    aten.scatter.reduce,
    aten.scatter_.reduce,
)
def scatter(call: Call, x: Operand, dim: int, index: Operand, source: Operand, *rest: Any, **named: Any) -> Operand:
    """Each entry of ``source`` is written or added to ``x``, at the position in ``dim`` given by the index."""
    if not x.ndim or not index.ndim or not source.ndim:
        (y,) = call.opaque(PICKED)
        assert y is not None
        return y
    plain = "reduce" not in str(call.node.op) and "add" not in str(call.node.op)
    return _written(call, x, dim % x.ndim, [index, source], [source], same if plain else zero)


@rule(aten.scatter.value, aten.scatter_.value)
def scatter_value(call: Call, x: Operand, dim: int, index: Operand, value: Any) -> Operand:
    """One number is written to every position given by the index."""
    if not x.ndim or not index.ndim:
        (y,) = call.opaque(PICKED)
        assert y is not None
        return y
    constant = call.constant(value)
    return _written(call, x, dim % x.ndim, [index], [], lambda f: same(f, constant))


@rule(aten.index_add, aten.index_copy)
def index_add(call: Call, x: Operand, dim: int, index: Operand, source: Operand, *, alpha: float = 1) -> Operand:
    """Slices of ``source`` are added or written to the slices of ``x`` along ``dim`` given by an index vector."""
    call.fix(index, None, "it is an index")
    if not x.ndim or not source.ndim:
        (y,) = call.opaque(PICKED)
        assert y is not None
        return y
    fact = zero if "add" in str(call.node.op) else same
    return _written(call, x, dim % x.ndim, [source], [source], fact)


@rule(aten.index_fill.int_Scalar, aten.index_fill_.int_Scalar)
def index_fill(call: Call, x: Operand, dim: int, index: Operand, value: Any) -> Operand:
    """One number is written to the slices along ``dim`` given by an index vector."""
    call.fix(index, None, "it is an index")
    constant = call.constant(value)
    if not x.ndim:
        return call.map(lambda f: same(f, constant), x)
    return _written(call, x, dim % x.ndim, [], [], lambda f: same(f, constant))


@rule(aten.index_put, aten._index_put_impl)
def index_put(
    call: Call,
    x: Operand,
    indices: Sequence[Operand | None],
    values: Operand,
    accumulate: bool = False,
    unsafe: bool = False,
) -> Operand:
    """``x[i, :, j] = values``: dimensions that are not indexed match those of the values."""
    dtypes = iter(call.dtypes[1:])
    given: list[tuple[Operand, bool] | None] = [
        None if i is None else (i, next(dtypes) in (torch.bool, torch.uint8)) for i in indices
    ]
    picked: list[int] = []
    free_dims: list[int] = []
    count = 0
    for indexer in given:  # a mask indexes as many dimensions as it has
        width = indexer[0].ndim if indexer is not None and indexer[1] else 1
        (free_dims if indexer is None else picked).extend(range(count, count + width))
        count += width
    free_dims += range(count, x.ndim)
    call.fix(x, picked, PICKED)
    for indexer in given:
        if indexer is not None:
            call.fix(indexer[0], None, "it is an index")
    shapes = [(1,) if indexer[1] else indexer[0].shape for indexer in given if indexer is not None]
    n = len(torch.broadcast_shapes(*shapes))
    # in the values, indexed dimensions keep their position if they are adjacent, and otherwise come first
    start = picked[0] if picked == list(range(picked[0], picked[-1] + 1)) else 0
    lead = [d for d in free_dims if d < start]
    order: list[int | None] = [*lead, *[None] * n, *(d for d in free_dims if d not in lead)]
    offset = len(order) - values.ndim
    through: list[tuple[int, ...]] = []
    for d in range(values.ndim):
        place = order[d + offset] if d + offset >= 0 else None
        if place is None:
            call.fix(values, [d], "it is written by index")
            through.append(())
        else:
            if values.shape[d] != 1:
                call.unify(x.terms[place], values.terms[d])
            through.append((place,))
    own = tuple((d,) for d in range(x.ndim))
    return call.step([x, values], x.terms, (own, tuple(through)), zero if accumulate else same)


@rule(aten.bilinear)
def bilinear(call: Call, a: Operand, b: Operand, weight: Operand, bias: Operand | None = None) -> Operand:
    """a (*, I), b (*, J), weight (O, I, J), bias (O,) -> (*, O)."""
    lead = letters(a.ndim - 1)
    y = call.contract(f"{lead}i,{lead}j,oij->{lead}o", a, b, weight)
    return y if bias is None else call.map(zero, y, bias)


@rule(aten.linalg_solve_triangular)
def solve_triangular(
    call: Call, a: Operand, b: Operand, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Operand:
    """a (*, N, N), b (*, N, K) -> (*, N, K), or b (*, K, N) if not ``left``; columns of zeros give zeros."""
    solved = b.ndim - (2 if left else 1)
    call.fix(a, [-1, -2], "a system of equations is solved along it")
    call.fix(b, [solved], "a system of equations is solved along it")
    lead = len(call.shape) - 2
    n, k = b.terms[solved], b.terms[b.ndim - (1 if left else 2)]
    terms: list[T.Term] = []
    for d in range(lead):
        sides = [x.terms[d - lead + x.ndim - 2] for x in (a, b) if d - lead + x.ndim - 2 >= 0]
        sides = [t for t in sides if T.size_of(t) == call.shape[d]]
        for other in sides[1:]:
            call.unify(sides[0], other)
        terms.append(sides[0] if sides else T.ONE)
    terms += [n, k] if left else [k, n]
    own_a = (*((d + lead - a.ndim + 2,) for d in range(a.ndim - 2)), (), ())
    own_b = tuple((d + lead + 2 - b.ndim,) for d in range(b.ndim))
    return call.step([a, b], terms, (own_a, own_b), _solved)


def _solved(system: Fact, given: Fact) -> Fact:
    """A system of zeros has no solution."""
    return NOT_FINITE if system is not None and system == 0 else zero(given)


fixed(aten.histc, aten.repeat_interleave.Tensor, why="it counts values")
