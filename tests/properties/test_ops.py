"""One property for every operator: removing an entry commutes with it.

Of each call all tensors may be thinned along every dimension that the rule leaves free, several at a time. Whatever is
known of the removed entries, three things must hold: what the rule claims of the result's removed entries is so; and if
no sum over them needs a zero that is not there, the thinner call gives the result without them.
"""

from __future__ import annotations

import inspect
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oto._torch import HigherOrderOperator
from oto.axes.invariance import follow, visits_of
from oto.axes.propagate import propagate
from oto.axes.registry import FIXED, NAMED, RULES, find, is_fixed, known
from oto.axes.terms import axes_of, survivors
from oto.trace.graph import write_through
from oto.trace.record import record
from tests.properties.commute import Broken, check, trace
from tests.properties.samples import Sample, mask, overloads, samples, whole, x

aten = torch.ops.aten


def by_operator() -> list[Any]:
    found: dict[Any, list[Sample]] = {}
    for sample in samples():
        found.setdefault(sample.op, []).append(sample)
    return [pytest.param(group, id=str(op)) for op, group in found.items()]


@pytest.mark.parametrize("group", by_operator())
def test_removing_an_entry_commutes_with_the_op(group: list[Sample]) -> None:
    for sample in group:
        traced = trace(sample.op, *sample.make(), values=sample.values)
        assert not traced.found.unknown
        if is_fixed(sample.op):
            kept = [a for leaf in traced.graph.leaves for term in traced.found.terms(leaf.value) for a in axes_of(term)]
            assert all(axis.fixed and axis.fixed.text for axis in kept), f"{sample} is fixed on purpose"
        try:
            check(traced, repr(sample))  # each with choices of its own, the same ones every time
        except Broken as broken:
            raise AssertionError(f"{sample}: {broken}") from broken


def test_every_rule_has_a_sample() -> None:
    sampled = {sample.op for sample in samples()}
    missing = [op for op in overloads() if op not in sampled]
    assert not missing, f"add a call to tests/properties/samples.py for {', '.join(map(str, missing))}"
    answered = {find(op) for op in sampled} | {RULES[write_through]}  # the marker has a test of its own
    functions = {RULES[op] for op in RULES if isinstance(op, HigherOrderOperator)}  # tests/trace/test_anything.py
    assert set(RULES.values()) <= answered | functions | {RULES[aten.cudnn_convolution], RULES[aten.scalar_tensor]}


def test_every_rule_for_another_library_has_a_sample() -> None:
    pytest.importorskip("torchvision")
    sampled = {sample.op._schema.name for sample in samples()}
    assert {op for op in NAMED if op not in FIXED} <= sampled


def test_what_is_written_elsewhere_has_no_rule() -> None:
    """``out=`` names a tensor of which the rule of the plain operator knows nothing."""
    assert known(aten.add.Tensor) and not known(aten.add.out)
    assert known(aten.cat.default) and not known(aten.cat.out)


# --- random shapes ----------------------------------------------------------------------------------------------------

PROFILE = settings(max_examples=20, deadline=None, derandomize=True, database=None)
shapes = st.lists(st.integers(1, 4), min_size=0, max_size=4).map(tuple)


@st.composite
def broadcast(draw: Any, n: int) -> list[tuple[int, ...]]:
    """Shapes that broadcast together."""
    full = draw(shapes)
    found = []
    for _ in range(n):
        cut = draw(st.integers(0, len(full)))
        found.append(tuple(k if draw(st.booleans()) else 1 for k in full[cut:]))
    return found


@st.composite
def regrouped(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes with the same number of entries."""
    primes = draw(st.lists(st.sampled_from([1, 2, 2, 3]), min_size=1, max_size=5))

    def grouped() -> tuple[int, ...]:
        order, out, i = draw(st.permutations(primes)), [], 0
        while i < len(order):
            n = draw(st.integers(1, 3))
            out.append(prod(order[i : i + n]))
            i += n
        return tuple(out)

    return grouped(), grouped()


def holds(op: Any, *args: Any, **kwargs: Any) -> None:
    sample = Sample(op, args, kwargs)
    check(trace(op, *sample.make()), repr(sample))


@PROFILE
@given(broadcast(2), st.sampled_from([aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.maximum.default]))
def test_any_broadcast(pair: list[tuple[int, ...]], op: Any) -> None:
    holds(op, x(*pair[0]), x(*pair[1]))


@PROFILE
@given(broadcast(3))
def test_any_broadcast_of_three(three: list[tuple[int, ...]]) -> None:
    a, b, c = three
    holds(aten.where.self, mask(*a), x(*b), x(*c))
    holds(aten.addcmul.default, x(*a), x(*b), x(*c))


@PROFILE
@given(regrouped())
def test_any_view(pair: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    holds(aten.view.default, x(*pair[0]), list(pair[1]))


@PROFILE
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 1), st.data())
def test_any_cat_and_split(sizes: list[int], dim: int, data: Any) -> None:
    pieces = [x(*((n, 3) if dim == 0 else (3, n))) for n in sizes]
    holds(aten.cat.default, pieces, dim)
    whole_size = sum(sizes)
    whole_shape = (whole_size, 3) if dim == 0 else (3, whole_size)
    holds(aten.split_with_sizes.default, x(*whole_shape), sizes, dim - data.draw(st.sampled_from([0, 2])))
    start, end = data.draw(st.integers(-9, 9)), data.draw(st.integers(-9, 9))
    first, last, _ = slice(start, end).indices(whole_size)
    if last > first:
        holds(aten.slice.Tensor, x(*whole_shape), dim, start, end)


@PROFILE
@given(st.permutations(range(3)), st.integers(1, 4), st.integers(-3, 2))
def test_any_order(order: list[int], n: int, dim: int) -> None:
    data = x(2, n, 3)
    holds(aten.permute.default, data, list(order))
    holds(aten.transpose.int, data, dim, order[0])
    holds(aten.sum.dim_IntList, data, [dim], n % 2 == 0)
    holds(aten.index_select.default, data, dim, whole((2, n, 3)[dim], 3))


@PROFILE
@given(st.sampled_from([1, 2, 3, 4]), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans())
def test_any_convolution(groups: int, inner: int, outer: int, bias: bool, transposed: bool) -> None:
    weight = x(groups * inner, outer, 2, 2) if transposed else x(groups * outer, inner, 2, 2)
    op, tail = (
        (aten.conv_transpose2d.input, ([1, 1], [0, 0], [0, 0], groups))
        if transposed
        else (aten.conv2d.default, ([1, 1], [0, 0], [1, 1], groups))
    )
    holds(op, x(1, groups * inner, 3, 3), weight, x(groups * outer) if bias else None, *tail)


# --- writing through a view -------------------------------------------------------------------------------------------


class Writes(nn.Module):
    def __init__(self, how: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 6).double()), nn.Parameter(torch.randn(6).double())
        self.how = how

    def forward(self, one: torch.Tensor) -> torch.Tensor:
        y = self.a * one
        self.how(y, self.b)
        return y


def _whole(y: torch.Tensor, b: torch.Tensor) -> None:
    y.view(2, 2, 6).add_(b)


def _shifted(y: torch.Tensor, b: torch.Tensor) -> None:
    y.t().add_(1)


def _part(y: torch.Tensor, b: torch.Tensor) -> None:
    y[:, 2:5].mul_(b[2:5])


def _row(y: torch.Tensor, b: torch.Tensor) -> None:
    y[1].copy_(b)


def _column(y: torch.Tensor, b: torch.Tensor) -> None:
    y[:, 3].fill_(1.0)


@pytest.mark.parametrize("how", [_whole, _shifted, _part, _row, _column])
def test_what_is_written_through_a_view_is_seen(how: Any) -> None:
    """What is claimed of a tensor after a write into a view of it holds when the model is run."""
    model, one = Writes(how), torch.ones((), dtype=torch.float64)
    graph = record(model, one, known)
    free = graph.__class__(graph.nodes, graph.leaves, graph.inputs, (), graph.mode)
    found = propagate(free, strict=True)
    assert any(node.op is write_through for node in graph.nodes)
    visits, carried = visits_of(found)
    out = found.operands[graph.outputs[0]]
    claimed = 0
    for leaf_names in (["a"], ["b"], ["a", "b"]):
        leaves = [leaf for leaf in graph.leaves if leaf.name in leaf_names]
        for axis in dict.fromkeys(a for axes in carried for places in axes for a in places):
            zeros = {
                (found.operands[v.value].index, d): 0.0
                for v in leaves
                for d, axes in enumerate(carried[found.operands[v.value].index])
                if axis in axes
            }
            follow(visits.get(axis, ()), zeros)
            gone = {axis: torch.arange(axis.size).numpy() > 0}
            run = Writes(how)
            with torch.no_grad():
                for leaf in leaves:
                    for dim, term in enumerate(found.terms(leaf.value)):
                        if axis in carried[found.operands[leaf.value].index][dim]:
                            dead = torch.from_numpy((~survivors(term, gone)).nonzero()[0])
                            run.get_parameter(leaf.name).index_fill_(dim, dead, 0.0)
                y = run(one)
            for dim in range(2):
                fact = zeros.get((out.index, dim)) if axis in carried[out.index][dim] else None
                if fact is not None:
                    dead = torch.from_numpy((~survivors(out.terms[dim], gone)).nonzero()[0])
                    assert (y.index_select(dim, dead) == fact).all(), (how, leaf_names, axis)
                    claimed += 1
    assert (claimed > 0) == (how not in (_column, _shifted))  # these two leave nothing that is known


# --- what is not finite -----------------------------------------------------------------------------------------------


def test_zero_times_infinity_is_not_zero() -> None:
    """A parameter that is divided by cannot be silenced by zeros behind it."""

    class Divides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.linear = nn.Parameter(torch.rand(5) + 1), nn.Linear(5, 2)

        def forward(self, one: torch.Tensor) -> torch.Tensor:
            return self.linear(one / self.scale)

    found = propagate(record(Divides(), torch.ones(1, 1), known), strict=True)
    visits, carried = visits_of(found)
    index = {leaf.name: found.operands[leaf.value].index for leaf in found.graph.leaves}
    (axis,) = carried[index["scale"]][0]
    assert follow(visits[axis], {(index["linear.weight"], 1): 0.0}) is None
    facts = {(index["linear.weight"], 1): 0.0, (index["scale"], 0): 0.0}
    assert follow(visits[axis], facts) is not None
    assert any(fact is not None and fact != fact for fact in facts.values())


def test_rules_are_named_once() -> None:
    """Rules are told apart by module and name in the tests of this folder."""
    rules = {rule for op, rule in RULES.items() if op not in FIXED}
    assert len({(rule.__module__, rule.__name__) for rule in rules}) == len(rules)
    assert all(inspect.getdoc(rule) for rule in rules)
