"""Reads by index: the indexed dimension stays whole, all others may get thinner.

Example: of an embedding table (V, D), the V rows stay, and any of the D columns may be removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from oto.axes.call import Call, Fact, Operand, anything, product, same
from oto.axes.registry import fixed, rule
from oto.trace.graph import write_through

aten = torch.ops.aten
PICKED = "its entries are picked by an index"


def looked_up(index: Fact, x: Fact) -> Fact:
    """The fact of the table, regardless of the index."""
    return x


@rule(aten.embedding)
def embedding(call: Call, weight: Operand, indices: Operand, *rest: Any, **named: Any) -> Operand:
    """weight (V, D), indices (*) -> (*, D)."""
    call.fix(weight, [0], PICKED)
    n = indices.ndim
    routes = (tuple((d,) for d in range(n)), ((), (n,)))
    return call.step([indices, weight], [*indices.terms, weight.terms[1]], routes, looked_up)


@rule(aten.embedding_bag, aten._embedding_bag, aten._embedding_bag_forward_only)
def embedding_bag(
    call: Call,
    weight: Operand,
    indices: Operand,
    offsets: Operand,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Operand | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> list[Operand]:
    """weight (V, D) -> (B, D): the sum, mean or maximum of each bag, and outputs for the backward pass."""
    call.fix(weight, [0], PICKED)
    for x in (indices, offsets, per_sample_weights):
        if x is not None:
            call.fix(x, None, PICKED)

    def bags(fact: Any) -> Operand:
        assert call.shape is not None
        return call.step([weight], [call.fixed(call.shape[0], PICKED), weight.terms[1]], (((), (1,)),), fact)

    shapes = [shape or () for shape in call.shapes[1:]]
    largest = [bags(anything)] if mode == 2 else [call.fresh(shapes[2], PICKED)]  # where each maximum was found
    return [bags(product), *(call.fresh(shape, PICKED) for shape in shapes[:2]), *largest]


@rule(aten.index_select)
def index_select(call: Call, x: Operand, dim: int, index: Operand) -> Operand:
    """Entries of ``dim`` in the order of an index vector."""
    if not x.ndim:
        return call.view(x, call.shape)
    return _index(call, x, [None] * (dim % x.ndim) + [index])


@rule(aten.index, aten._unsafe_index)
def index(call: Call, x: Operand, indices: Sequence[Operand | None]) -> Operand:
    """Advanced indexing: ``x[:, i, j]``. Index tensors are broadcast together."""
    return _index(call, x, list(indices))


def _index(call: Call, x: Operand, indices: list[Operand | None]) -> Operand:
    dtypes = iter(call.dtypes[1:])
    masks = [i is not None and next(dtypes) in (torch.bool, torch.uint8) for i in indices]
    whole: list[Operand | None] = []  # one per dimension of x; a mask indexes as many dimensions as it has
    picked: list[int] = []
    for i, mask in zip(indices, masks, strict=True):
        width = i.ndim if mask and i is not None else 1
        picked += range(len(whole), len(whole) + width) if i is not None else ()
        whole += [i] * width
    call.fix(x, picked, PICKED)
    # entries of the indices must keep their positions
    given = [i for i in indices if i is not None]
    for i in given:
        call.fix(i, None, "it is an index")
    if not picked or any(mask and i is not None and not i.ndim for i, mask in zip(indices, masks, strict=True)):
        (y,) = call.opaque("it is picked by a mask")
        assert y is not None
        return y
    start = picked[0] if picked == list(range(picked[0], picked[-1] + 1)) else 0
    kept = [d for d in range(x.ndim) if d not in picked]
    lead = [d for d in kept if d < start]
    shape = call.shape[len(lead) : len(call.shape) - len(kept) + len(lead)]
    order: list[int | None] = [*lead, *[None] * len(shape), *(d for d in kept if d not in lead)]
    why = "it was picked by an index"
    sizes = iter(shape)
    terms = [call.fixed(next(sizes), why) if d is None else x.terms[d] for d in order]
    passed = tuple((order.index(d),) if d in kept else () for d in range(x.ndim))
    routes = (*(tuple(() for _ in i.shape) for i in given), passed)
    return call.step([*given, x], terms, routes, lambda *facts: facts[-1])


@rule(aten.one_hot)
def one_hot(call: Call, x: Operand, classes: int = -1) -> Operand:
    """A new dimension, indexed by value."""
    terms = [*x.terms, call.fixed(call.shape[-1], "it is indexed by value")]
    return call.move(x, terms, [*((d,) for d in range(x.ndim)), ()], lambda fact: None)


@rule(write_through)
def written(call: Call, alias: Operand, source: Operand) -> Operand:
    """A tensor after a tensor that shares its memory was written to: known if both facts are equal."""
    routes = tuple((d,) for d in range(alias.ndim))
    everywhere = tuple(range(alias.ndim))
    return call.step([alias, source], alias.terms, (routes, tuple(everywhere for _ in source.shape)), same)


fixed(
    aten.nonzero,
    aten.masked_select,
    aten.unique_consecutive,
    aten._unique2,
    aten.bincount,
    aten.searchsorted,
    aten.bucketize,
    why="its size or its entries depend on values",
)
fixed(
    aten.index_fill.int_Tensor,
    aten.index_fill_.int_Tensor,
    aten.scatter.value_reduce,
    aten.scatter_.value_reduce,
    aten.masked_scatter,
    aten.select_scatter,
    aten.slice_scatter,
    aten.diagonal_scatter,
    aten.take,
    aten.take_along_dim,
    why="entries are written or read by index",
)
