"""Reshapes, permutations, concatenations and splits: entries change positions, and none are mixed.

Example: ``x.view(b, t, 12, 64)`` splits an axis of 768 into 12 heads × 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from oto.axes import terms as T
from oto.axes.call import Call, Operand, Size
from oto.axes.registry import fixed, rule
from oto.axes.terms import Term

aten = torch.ops.aten


def sizes_of(terms: Sequence[Term], given: Sequence[Any]) -> list[Any]:
    """The size arguments of a call, with a :class:`Size` in place of each number except -1."""
    return [n if isinstance(n, int) and n == -1 else Size(t) for n, t in zip(given, terms, strict=True)]


@rule(aten.view.default, aten.reshape, aten._unsafe_view, aten._reshape_alias)
def view(call: Call, x: Operand, shape: Sequence[int], *rest: Any) -> Operand:
    """The same entries in row-major order."""
    y = call.view(x, call.shape)
    call.rewrite(aten.reshape.default, call.node.args[0], sizes_of(y.terms, shape))
    return y


@rule(aten.view_as, aten.reshape_as)
def view_as(call: Call, x: Operand, other: Operand) -> Operand:
    """The shape is that of another tensor, so both have the same terms."""
    y = call.view(x, call.shape)
    for a, b in zip(y.terms, other.terms, strict=True):
        call.unify(a, b)
    return y


@rule(aten.flatten, aten.ravel)
def flatten(call: Call, x: Operand, *rest: Any) -> Operand:
    """Several dimensions become their product."""
    return call.view(x, call.shape)


@rule(aten.unflatten)
def unflatten(call: Call, x: Operand, dim: int, sizes: Sequence[int]) -> Operand:
    """One dimension becomes several."""
    y = call.view(x, call.shape)
    dim %= x.ndim
    call.resize(sizes=sizes_of(y.terms[dim : dim + len(sizes)], sizes))
    return y


@rule(aten.squeeze, aten.unsqueeze, aten.squeeze_copy, aten.unsqueeze_copy)
def squeeze(call: Call, x: Operand, dim: Any = None) -> Operand:
    """Dimensions of size 1 are added or removed; one that is pruned to size 1 must not be removed."""
    if "unsqueeze" not in str(call.node.op):
        asked = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
        ones = [d for d in asked if x.ndim and x.shape[d] == 1]
        call.rewrite(aten.squeeze.dims, call.node.args[0], ones)
        call.watch(*(x.terms[d] for d in asked if x.ndim))
    return call.view(x, call.shape)


@rule(aten.permute)
def permute(call: Call, x: Operand, dims: Sequence[int]) -> Operand:
    """Dimensions in another order."""
    return call.permute(x, dims)


@rule(aten.transpose, aten.swapaxes, aten.swapdims, aten.adjoint, aten.mT, aten.mH)
def transpose(call: Call, x: Operand, a: int = -2, b: int = -1) -> Operand:
    """Two dimensions are swapped."""
    order = list(range(x.ndim))
    if order:
        order[a], order[b] = order[b], order[a]
    return call.permute(x, order)


@rule(aten.t, aten.numpy_T)
def t(call: Call, x: Operand) -> Operand:
    """All dimensions in reverse order."""
    return call.permute(x, list(range(x.ndim))[::-1])


@rule(aten.movedim, aten.moveaxis)
def movedim(call: Call, x: Operand, source: Any, destination: Any) -> Operand:
    """Some dimensions get new positions, the others keep their order."""
    sources = [d % x.ndim for d in ([source] if isinstance(source, int) else source)]
    targets = [d % x.ndim for d in ([destination] if isinstance(destination, int) else destination)]
    rest = iter(d for d in range(x.ndim) if d not in sources)
    return call.permute(x, [sources[targets.index(d)] if d in targets else next(rest) for d in range(x.ndim)])


@rule(aten.expand, aten.broadcast_to)
def expand(call: Call, x: Operand, shape: Sequence[int], **named: Any) -> Operand:
    """Copies along dimensions of size 1 and along new ones; a copy may be removed like any other entry."""
    y = _expand(call, x, call.shape)
    call.resize(size=sizes_of(y.terms, shape))
    return y


def _expand(call: Call, x: Operand, shape: Sequence[int]) -> Operand:
    new = len(shape) - x.ndim
    terms, sources = [], []
    for d, n in enumerate(shape):
        old = d - new
        kept = old >= 0 and x.shape[old] == n
        terms.append(x.terms[old] if kept else T.axis(n))
        sources.append((old,) if kept else ())
    return call.move(x, terms, sources)


@rule(aten.expand_as)
def expand_as(call: Call, x: Operand, other: Operand) -> Operand:
    """The shape is that of another tensor."""
    y = _expand(call, x, call.shape)
    for a, b in zip(y.terms, other.terms, strict=True):
        call.unify(a, b)
    return y


@rule(aten.broadcast_tensors)
def broadcast_tensors(call: Call, xs: list[Operand]) -> list[Operand]:
    """All tensors are expanded to their common shape."""
    ys = [_expand(call, x, shape) for x, shape in zip(xs, call.shapes, strict=True) if shape is not None]
    for y in ys[1:]:
        for a, b in zip(ys[0].terms, y.terms, strict=True):
            call.unify(a, b)
    return ys


@rule(aten.repeat, aten.tile)
def repeat(call: Call, x: Operand, repeats: Sequence[int]) -> Operand:
    """Whole copies one after the other: repeat × entry."""
    new = len(call.shape) - x.ndim
    counts = [T.axis(n) for n in (*[1] * (len(call.shape) - len(repeats)), *repeats)]
    terms = [c + (x.terms[d - new] if d >= new else ()) for d, c in enumerate(counts)]
    sources = [(d - new,) if d >= new else () for d in range(len(terms))]
    argument = "repeats" if "repeat" in str(call.node.op) else "dims"
    call.resize(**{argument: [Size(c) for c in counts[len(counts) - len(repeats) :]]})
    return call.move(x, terms, sources)


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(
    call: Call, x: Operand, repeats: int, dim: int | None = None, *, output_size: int | None = None
) -> Operand:
    """Copies of each entry next to it: entry × repeat."""
    if dim is None:
        x, dim = call.view(x, (-1,) if 0 in x.shape else (call.shape[0] // repeats,)), 0
    terms = list(x.terms)
    copies = T.axis(repeats)
    terms[dim] = terms[dim] + copies
    call.resize(repeats=Size(copies), **({} if output_size is None else {"output_size": Size(terms[dim])}))
    return call.move(x, terms, [(d,) for d in range(x.ndim)])


@rule(aten.cat, aten.concat, aten.concatenate)
def cat(call: Call, xs: list[Operand], dim: int = 0) -> Operand:
    """Concatenation; empty vectors are ignored."""
    return call.cat([x for x in xs if x.shape != (0,)] or xs[:1], dim)


@rule(aten.stack)
def stack(call: Call, xs: list[Operand], dim: int = 0) -> Operand:
    """Concatenation along a new dimension."""
    dim %= xs[0].ndim + 1
    return call.cat([call.view(x, (*x.shape[:dim], 1, *x.shape[dim:])) for x in xs], dim)


def _pieces(call: Call, x: Operand, dim: int, sizes: Sequence[int]) -> list[Operand]:
    dim %= x.ndim
    pieces = []
    terms = call.cut(x.terms[dim], sizes)
    for term in terms:
        own = list(x.terms)
        own[dim] = term
        pieces.append(call.move(x, own, [(d,) for d in range(x.ndim)]))
    return pieces


@rule(
    aten.split,
    aten.split_with_sizes,
    aten.chunk,
    aten.tensor_split,
    aten.unsafe_chunk,
    aten.unsafe_split,
    aten.unsafe_split_with_sizes,
)
def pieces(call: Call, x: Operand, how: Any, dim: int = 0) -> list[Operand]:
    """Consecutive pieces. Thinner pieces may differ in size, so the thinner call takes the size of each."""
    if isinstance(how, Operand):
        call.fix(how, None, "it names the borders of pieces")
    parts = _pieces(call, x, dim, [shape[dim] for shape in call.shapes if shape is not None])
    sizes = [Size(piece.terms[dim]) for piece in parts]
    call.rewrite(aten.split_with_sizes.default, call.node.args[0], sizes, dim)
    return parts


@rule(aten.unbind)
def unbind(call: Call, x: Operand, dim: int = 0) -> list[Operand]:
    """Each entry becomes a tensor."""
    call.fix(x, [dim], "its entries are used one by one")
    return [_drop(call, x, dim) for _ in call.shapes]


def _drop(call: Call, x: Operand, dim: int) -> Operand:
    places = [d for d in range(x.ndim) if d != dim % x.ndim]
    return call.move(x, [x.terms[d] for d in places], [(d,) for d in places])


@rule(aten.select)
def select(call: Call, x: Operand, dim: int, index: int) -> Operand:
    """One entry of ``dim``; the others may be removed."""
    n = x.shape[dim]
    index %= n
    before, _, _ = call.cut(x.terms[dim], [index, 1, n - index - 1])
    call.resize(index=Size(before) if index else 0)
    call.watch(x.terms[dim])  # since the index may be counted from the end
    return _drop(call, x, dim)


@rule(aten.slice, aten.narrow)
def slice_(call: Call, x: Operand, dim: int = 0, start: Any = None, end: int | None = None, step: int = 1) -> Operand:
    """Consecutive entries; with a step, the dimension stays whole."""
    dim %= x.ndim
    n = x.shape[dim]
    if isinstance(start, Operand):
        call.fix(x, [dim], "its piece begins where a tensor says")
        terms = list(x.terms)
        terms[dim] = call.fixed(call.shape[dim], "its piece begins where a tensor says")
        return call.move(x, terms, [(d,) for d in range(x.ndim)])
    first = min(max((start or 0) + (n if (start or 0) < 0 else 0), 0), n)
    length = call.shape[dim]
    terms = list(x.terms)
    if step != 1:
        call.fix(x, [dim], "a slice takes every other entry")
        terms[dim] = call.fixed(length, "a slice takes every other entry")
    elif length != n:
        before, terms[dim], _ = call.cut(x.terms[dim], [first, length, n - first - length])
        begin = Size(before) if first else 0
        if "narrow" in str(call.node.op):
            call.resize(start=begin, length=Size(terms[dim]))
        else:
            call.rewrite(aten.narrow.default, call.node.args[0], dim, begin, Size(terms[dim]))
        call.watch(x.terms[dim])  # since a position may be counted from the end
    return call.move(x, terms, [(d,) for d in range(x.ndim)])


@rule(aten.roll)
def roll(call: Call, x: Operand, shifts: Any, dims: Any = ()) -> Operand:
    """Entries are shifted along ``dims``."""
    dims = [dims] if isinstance(dims, int) else list(dims)
    call.fix(x, dims or None, "roll changes the places of its entries")
    return call.identity(x)


@rule(aten.diagonal, aten.diag, aten.diag_embed, aten.tril, aten.triu, aten.rot90, aten.trace)
def square(call: Call, x: Operand, *rest: Any, **named: Any) -> Any:
    """Operators that relate positions in one dimension to positions in another."""
    return call.opaque("it is read along a diagonal")


@rule(aten.meshgrid)
def meshgrid(call: Call, xs: list[Operand], *, indexing: str = "ij") -> list[Operand]:
    """Each vector varies along its own dimension, and is repeated along the others."""
    order = list(range(len(xs)))
    if indexing == "xy" and len(xs) > 1:
        order[0], order[1] = 1, 0
    ys = []
    vectors = [x if x.ndim else call.view(x, (1,)) for x in xs]
    for i, x in enumerate(vectors):
        terms = [vectors[j].terms[0] for j in order]
        ys.append(call.move(x, terms, [(0,) if j == i else () for j in order]))
    return ys


fixed(aten.as_strided, why="its entries are read by address, several times over")
fixed(aten.set_.source_Tensor, why="it takes the memory of another tensor")
