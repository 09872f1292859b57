"""The axis algebra against brute force: every relation ever stated holds for every choice of surviving atoms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oto.axes.terms import (
    Axis,
    Indivisible,
    Reason,
    Sum,
    _unify_factors,
    axes_of,
    axis,
    concat,
    count,
    cut,
    fix,
    free,
    resolve,
    size_of,
    split,
    survivors,
    unify,
)

WHY = Reason("test")


def choose(terms, seed):
    """A random choice of surviving atoms for every axis that is not fixed."""
    rng = np.random.default_rng(seed)
    return {a: rng.random(a.size) < 0.6 for t in terms for a in axes_of(resolve(t)) if a.fixed is None}


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def stories(draw):
    """Random terms, then random operations on them in random order; returns terms and the relations stated."""
    n = draw(st.sampled_from([4, 6, 8, 12, 24]))
    terms, relations = [], []
    for _ in range(draw(st.integers(2, 5))):
        kind = draw(st.sampled_from(["axis", "product", "sum", "fixed"]))
        if kind == "axis":
            terms.append(axis(n))
        elif kind == "fixed":
            terms.append(axis(n, WHY))
        elif kind == "product":
            d = draw(st.sampled_from(divisors(n)))
            terms.append(axis(d) + axis(n // d))
        else:
            d = draw(st.integers(1, n - 1))
            terms.append(concat([axis(d), axis(n - d)]))
    for _ in range(draw(st.integers(1, 8))):
        a, b = draw(st.sampled_from(terms)), draw(st.sampled_from(terms))
        what = draw(st.sampled_from(["unify", "split", "cut", "roll", "swap", "fix-part"]))
        if what == "unify":
            relations.append(lambda k, a=a, b=b: np.array_equal(survivors(a, k), survivors(b, k)))
            unify(a, b, WHY)
        elif what == "split":
            d = draw(st.sampled_from(divisors(n)))
            x, y = split(a, [d, n // d], WHY)
            relations.append(
                lambda k, a=a, x=x, y=y: np.array_equal(
                    survivors(a, k), np.logical_and.outer(survivors(x, k), survivors(y, k)).ravel()
                )
            )
        elif what == "cut":
            d = draw(st.integers(0, n))
            x, y = cut(a, [d, n - d], WHY)
            relations.append(
                lambda k, a=a, x=x, y=y: np.array_equal(
                    survivors(a, k), np.concatenate([survivors(x, k), survivors(y, k)])
                )
            )
        elif what == "roll":  # entry i of one is entry i + d of the other
            d = draw(st.integers(1, n - 1))
            x, y = cut(a, [d, n - d], WHY)
            rolled = concat([y, x])
            relations.append(
                lambda k, a=a, r=rolled, d=d: np.array_equal(np.roll(survivors(a, k), -d), survivors(r, k))
            )
            terms.append(rolled)
        elif what == "swap":
            d = draw(st.sampled_from(divisors(n)))
            x, y = split(a, [d, n // d], WHY)
            terms.append(resolve(y + x))
            relations.append(
                lambda k, a=a, t=terms[-1], d=d: np.array_equal(
                    survivors(a, k).reshape(d, -1).T.ravel(), survivors(t, k)
                )
            )
        else:
            d = draw(st.integers(1, n - 1))
            x, _ = cut(b, [d, n - d], WHY)
            fix(x, WHY)
            relations.append(lambda k, x=x: survivors(x, k).all())
    return terms, relations


@settings(max_examples=600, deadline=None)
@given(stories(), st.integers(0, 2**16))
def test_every_relation_holds_for_every_choice(story, seed):
    terms, relations = story
    kept = choose(terms, seed)
    for term in terms:
        alive = survivors(term, kept)
        assert len(alive) == size_of(term)
        assert count(resolve(term), {a: int(v.sum()) for a, v in kept.items()}) == alive.sum()
    for relation in relations:
        assert relation(kept)


def test_axis_meets_product():
    heads, width = axis(4), axis(8)
    rows = axis(32)
    unify(rows, heads + width, WHY)
    assert resolve(rows) == heads + width


def test_view_refines_an_axis_into_heads():
    rows = axis(24)
    heads, width = split(rows, [4, 6], WHY)
    assert resolve(rows) == heads + width and free(heads) and free(width)


def test_fused_qkv_ties_the_three_parts():
    q, k, v = axis(8), axis(8), axis(8)
    three, inner = split(concat([q, k, v]), [3, 8], WHY)
    assert resolve(q) == resolve(k) == resolve(v) == resolve(inner)
    assert size_of(three) == 3 and not free(resolve(three))


def test_split_cannot_cross_a_segment():
    t = concat([axis(5), axis(7)])
    split(t, [3, 4], WHY)
    assert not free(resolve(t))
    assert {a.fixed for a in axes_of(resolve(t))} == {WHY}


def test_sizes_that_do_not_divide_are_fixed_with_the_reason():
    a, b = axis(6) + axis(4), axis(4) + axis(6)
    unify(a, b, WHY)
    assert all(x.fixed is WHY for t in (a, b) for x in axes_of(resolve(t)))


def test_only_the_part_that_does_not_divide_is_fixed():
    head = axis(5)
    a, b = head + axis(6) + axis(4), axis(5) + axis(4) + axis(6)
    unify(a, b, WHY)
    assert free(resolve(head))


def test_sum_inside_a_product():
    a, b, k = axis(2), axis(4), axis(3)
    whole = axis(18)
    unify(whole, concat([a, b]) + k, WHY)
    first, second = cut(whole, [6, 12], WHY)
    assert first == resolve(a + k) and second == resolve(b + k)


def test_cutting_a_product_between_its_rows():
    a, k = axis(4), axis(3)
    x, y = cut(a + k, [3, 9], WHY)
    assert size_of(x) == 3 and x == resolve(k)  # the first row of k, entry 0 of a
    assert size_of(y) == 9


def test_an_axis_is_never_a_part_of_itself():
    a = Axis(6)
    with pytest.raises(Indivisible):
        _unify_factors(a, Sum([(a,), axis(2)]), WHY)


def test_the_first_reason_stays():
    a = axis(4)
    fix(a, WHY)
    fix(a, Reason("later"))
    assert a[0].fixed is WHY


def test_rolling_by_one_fixes_everything_without_hanging():
    a = axis(300)
    x, y = cut(a, [1, 299], WHY)
    unify(a, concat([y, x]), WHY)
    assert not free(resolve(a))
