"""The axis algebra: what a tensor dimension is made of.

A dimension is a *term*, a product of factors read from the left (most significant) to the right::

    Axis(n)        n entries that can be removed one by one, the atoms
    A × B          index = a * |B| + b        (heads × head_dim, channel × 7 × 7 after a flatten)
    A ⊕ B          concatenation              (torch.cat, a fused qkv)
    ()             a dimension of size 1

An entry of a product survives iff all its factors survive; an entry of a sum follows its own segment. So a choice of
surviving atoms for every axis gives a choice of surviving entries for every term (:func:`survivors`).

Only four things ever happen to terms: :func:`unify`, :func:`split` (a product), :func:`cut` (a sum) and :func:`fix`.
Axes are refined in place, as in union-find, so a term that is held elsewhere stays valid; :func:`resolve` writes it out
in its present axes. What cannot be expressed (sizes that do not divide each other) is fixed, with a reason: then less
can be pruned, but nothing is wrong.

Example: a flatten of 64 channels of 7 × 7 gives the term ``Axis(64) × Axis(7) × Axis(7)``. If channel 3 is removed,
entries 147 to 195 of the flattened dimension go with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Reason:
    """Why an axis stays whole: a sentence, and the graph node that caused it."""

    text: str
    node: int | None = None


class Axis:
    """Entries that can be removed one by one, unless ``fixed`` says why not."""

    __slots__ = ("bound", "fixed", "size")

    def __init__(self, size: int, fixed: Reason | None = None) -> None:
        self.size = size
        self.fixed = fixed
        self.bound: Term | None = None  # the term that the axis was found to consist of

    def __repr__(self) -> str:
        return f"{'F' if self.fixed else 'A'}{self.size}" + (f"={self.bound}" if self.bound is not None else "")


class Sum:
    """Segments one after the other. The segments are refined in place; the entries stay the same."""

    __slots__ = ("segments", "size")

    def __init__(self, segments: Sequence[Term]) -> None:
        self.segments = tuple(segments)
        self.size = sum(size_of(segment) for segment in segments)

    def __repr__(self) -> str:
        return "(" + " + ".join(map(repr, self.segments)) + ")"


Factor: TypeAlias = Axis | Sum
Term: TypeAlias = tuple[Factor, ...]

ONE: Term = ()


class Indivisible(Exception):
    """A boundary falls where a term cannot be split. Never raised outside of this module."""


def axis(n: int, fixed: Reason | None = None) -> Term:
    """A fresh term of ``n`` entries."""
    if n == 0:
        fixed = fixed or Reason("it is empty")
    return () if n == 1 else (Axis(n, fixed),)


def size_of(term: Term) -> int:
    return prod(factor.size for factor in term)


def resolve(term: Term) -> Term:
    """Write a term out in axes that are not bound to other terms."""
    for factor in term:
        if type(factor) is Sum or factor.bound is not None:  # type: ignore[union-attr]
            break
    else:
        return term
    out: list[Factor] = []
    for factor in term:
        if isinstance(factor, Axis):
            if factor.bound is None:
                out.append(factor)
            else:
                factor.bound = resolve(factor.bound)
                out.extend(factor.bound)
        else:
            _refresh(factor)
            if len(factor.segments) == 1:
                out.extend(factor.segments[0])
            else:
                out.append(factor)
    return tuple(out)


def _refresh(total: Sum) -> None:
    segments: list[Term] = []
    for segment in total.segments:
        term = resolve(segment)
        if len(term) == 1 and isinstance(term[0], Sum):
            segments.extend(term[0].segments)
        else:
            segments.append(term)
    total.segments = tuple(segments)


def axes_of(term: Term) -> Iterator[Axis]:
    """Every axis of a resolved term, from left to right; an axis that occurs twice is yielded twice."""
    for factor in term:
        if isinstance(factor, Axis):
            yield factor
        else:
            for segment in factor.segments:
                yield from axes_of(segment)


def free(term: Term) -> bool:
    """Whether some entry of a resolved term may be removed."""
    for factor in term:
        if isinstance(factor, Axis):
            if factor.fixed is None:
                return True
        elif any(free(segment) for segment in factor.segments):
            return True
    return False


def fix(term: Term, reason: Reason) -> None:
    """Keep every entry, and record why. The first reason stays."""
    for part in axes_of(resolve(term)):
        if part.fixed is None:
            part.fixed = reason


def concat(terms: Sequence[Term]) -> Term:
    """The sum of terms."""
    segments = [segment for term in terms if size_of(segment := resolve(term))]
    if len(segments) == 1:
        return segments[0]
    if not any(free(segment) for segment in segments):
        return axis(sum(map(size_of, segments)), _reason(segments))
    total = Sum(segments)
    _refresh(total)
    return (total,)


def _reason(terms: Sequence[Term]) -> Reason:
    return next(
        (a.fixed for term in terms for a in axes_of(term) if a.fixed), Reason("its entries are used one by one")
    )


def unify(left: Term, right: Term, reason: Reason) -> None:
    """Make two terms of equal size the same: entry ``i`` of one survives iff entry ``i`` of the other does.

    If that cannot be expressed, the rest of both is fixed for ``reason``.
    """
    assert size_of(left) == size_of(right), (left, right)
    while True:
        left, right = resolve(left), resolve(right)
        while left and right and left[0] is right[0]:
            left, right = left[1:], right[1:]
        if not left and not right:
            return
        if not free(left):
            return fix(right, _reason([left]))
        if not free(right):
            return fix(left, _reason([right]))
        f, g = left[0], right[0]
        try:
            if f.size == g.size:
                _unify_factors(f, g, reason)
                left, right = left[1:], right[1:]
            elif f.size > g.size:
                _split_factor(f, g.size, reason)
            else:
                _split_factor(g, f.size, reason)
        except Indivisible:
            fix(left, reason)
            fix(right, reason)
            return


def _unify_factors(f: Factor, g: Factor, reason: Reason) -> None:
    if isinstance(f, Sum) and isinstance(g, Axis):
        f, g = g, f
    if isinstance(f, Axis):
        if isinstance(g, Sum) and any(inner is f for inner in axes_of((g,))):
            raise Indivisible  # an axis cannot be part of itself
        _bind(f, (g,))
        return
    assert isinstance(g, Sum)
    a, b = list(f.segments), list(g.segments)
    while a:  # cut each side at the other's boundaries
        _expose(a)
        _expose(b)
        x, y = a.pop(0), b.pop(0)
        if (short := size_of(x)) > size_of(y):
            x, rest = _cut_term(x, size_of(y))
            a.insert(0, rest)
        elif short < size_of(y):
            y, rest = _cut_term(y, short)
            b.insert(0, rest)
        unify(x, y, reason)


def _expose(segments: list[Term]) -> None:
    head = resolve(segments[0])
    segments[:1] = head[0].segments if len(head) == 1 and isinstance(head[0], Sum) else [head]


def _bind(a: Axis, term: Term) -> None:
    a.bound = term
    if a.fixed is not None:
        fix(term, a.fixed)


def _split_factor(factor: Factor, head: int, reason: Reason) -> tuple[Term, Term]:
    """Refine a factor into ``head × (size / head)``."""
    if factor.size % head:
        raise Indivisible
    tail = factor.size // head
    if isinstance(factor, Axis):
        halves = axis(head, factor.fixed), axis(tail, factor.fixed)
        factor.bound = halves[0] + halves[1]
        return halves
    # (T₁ ⊕ T₂) × K = T₁×K ⊕ T₂×K, so every segment must end in the same tail
    heads, tails = [], []
    for segment in factor.segments:
        if size_of(segment) % tail:
            raise Indivisible
        first, last = _split_term(segment, size_of(segment) // tail, reason)
        heads.append(first)
        tails.append(last)
    for other in tails[1:]:
        unify(tails[0], other, reason)
    halves = concat(heads), resolve(tails[0])
    # the sum itself becomes the product, for every term that holds it
    factor.segments = (halves[0] + halves[1],)
    return halves


def _split_term(term: Term, head: int, reason: Reason) -> tuple[Term, Term]:
    term = resolve(term)
    done = 1
    for i, factor in enumerate(term):
        if done == head:
            return term[:i], term[i:]
        if head % (done * factor.size) == 0:
            done *= factor.size
            continue
        if head % done:
            raise Indivisible
        first, last = _split_factor(factor, head // done, reason)
        return resolve(term[:i] + first), resolve(last + term[i + 1 :])
    assert done == head, (term, head)
    return term, ()


def _cut_term(term: Term, head: int) -> tuple[Term, Term]:
    """The first ``head`` entries of a term, and the rest."""
    term = resolve(term)
    if len(term) > 1:  # (A ⊕ B) × K: only between whole K
        tail = size_of(term[1:])
        if head % tail:
            raise Indivisible
        left, right = _cut_term(term[:1], head // tail)
        return left + term[1:], right + term[1:]
    (factor,) = term
    if isinstance(factor, Axis):
        left, right = axis(head, factor.fixed), axis(factor.size - head, factor.fixed)
        factor.bound = (Sum([left, right]),)
        return left, right
    before: list[Term] = []
    rest = list(factor.segments)
    while head >= (n := size_of(rest[0])):
        before.append(rest.pop(0))
        head -= n
        if not head:
            break
    if head:
        left, right = _cut_term(rest[0], head)
        before.append(left)
        rest[0] = right
        _refresh(factor)
    return _sum(before), _sum(rest)


def _sum(segments: list[Term]) -> Term:
    if len(segments) == 1:
        return resolve(segments[0])
    total = Sum(segments)
    _refresh(total)
    return (total,)


def split(term: Term, sizes: Sequence[int], reason: Reason) -> list[Term]:
    """Split a product into consecutive terms of the given sizes (``view``, ``unflatten``).

    If a boundary falls inside a factor that cannot be divided there, the whole term is fixed for ``reason``.
    """
    assert prod(sizes) == size_of(term), (term, sizes)
    term = resolve(term)
    if len(sizes) == 1:
        return [term]
    if free(term):
        parts: list[Term] = []
        rest = term
        try:
            for n in sizes[:-1]:
                part, rest = _split_term(rest, n, reason)
                parts.append(part)
            return [resolve(part) for part in [*parts, rest]]
        except Indivisible:
            fix(term, reason)
    why = _reason([resolve(term)])
    return [axis(n, why) for n in sizes]


def cut(term: Term, sizes: Sequence[int], reason: Reason) -> list[Term]:
    """Cut a sum into consecutive segments of the given sizes (``slice``, ``chunk``, ``split``).

    Segments of size 0 are allowed. If a boundary falls inside a product, the whole term is fixed for ``reason``.
    """
    assert sum(sizes) == size_of(term), (term, sizes)
    term = resolve(term)
    if free(term):
        parts: list[Term] = []
        rest: Term = term
        remaining = size_of(term)
        try:
            for n in sizes:
                if n == 0 or n == remaining:
                    part, rest = (rest, axis(0)) if n else (axis(0), rest)
                else:
                    part, rest = _cut_term(rest, n)
                remaining -= n
                parts.append(part)
            return [resolve(part) for part in parts]
        except Indivisible:
            fix(term, reason)
    why = _reason([resolve(term)])
    return [axis(n, why) for n in sizes]


def survivors(term: Term, kept: Mapping[Axis, NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """Which entries of a term survive, shape ``(size,)``; an axis that is not in ``kept`` survives whole."""
    alive = np.ones(1, dtype=bool)
    for factor in resolve(term):
        if isinstance(factor, Axis):
            own = kept[factor] if factor in kept else np.ones(factor.size, dtype=bool)
        else:
            own = np.concatenate([survivors(segment, kept) for segment in factor.segments])
        alive = np.logical_and.outer(alive, own).reshape(-1)
    return alive


def reordered(term: Term, orders: Mapping[Axis, NDArray[np.int64]]) -> NDArray[np.int64]:
    """The permutation of a term's entries if the atoms of some axes are reordered: int64, shape ``(size,)``.

    Args:
        orders: For each axis, which of its atoms comes first, second, ...; an axis that is missing keeps its order.
    """
    order = np.zeros(1, dtype=np.int64)
    for factor in resolve(term):
        if isinstance(factor, Axis):
            own = orders[factor] if factor in orders else np.arange(factor.size)
        else:
            sizes = np.array([size_of(segment) for segment in factor.segments], dtype=np.int64)
            offsets = np.cumsum(sizes) - sizes
            own = np.concatenate(
                [reordered(segment, orders) + offset for segment, offset in zip(factor.segments, offsets, strict=True)]
            )
        order = np.add.outer(order * len(own), own).reshape(-1)
    return order


def count(term: Term, kept: Mapping[Axis, int]) -> int:
    """How many entries of a resolved term survive, given how many atoms of each axis do."""
    total = 1
    for factor in term:
        if isinstance(factor, Axis):
            total *= kept.get(factor, factor.size)
        else:
            total *= sum(count(segment, kept) for segment in factor.segments)
    return total
