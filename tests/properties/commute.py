"""Removing an entry commutes with an operator: the check that every rule must pass.

An operator is run on its own, on tensors of which every dimension may be thinned. Its rule says which dimensions go
together, what a removed entry holds and how the thinner call is spelled. All three are put to the test on real tensors.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oto._torch import tree_leaves, tree_map_only
from oto.axes.call import Fact, Size, Uniform
from oto.axes.invariance import Place, Visit, follow, visits_of
from oto.axes.propagate import Propagation, propagate
from oto.axes.terms import Axis, count, resolve, size_of, survivors
from oto.trace.graph import Graph, GraphBuilder, Key, Leaf, Value

Masks = Mapping[Axis, np.ndarray]


class Broken(AssertionError):
    """A rule said something that does not hold."""


def calls(op: Callable[..., Any], args: Any, kwargs: Any) -> list[Any]:
    """The leaves of the result on copies of the tensors: nothing is written into the sample itself."""
    return _run(op, *tree_map_only(Tensor, lambda t: t.detach().clone(), (args, dict(kwargs))))


def _run(op: Callable[..., Any], args: Any, kwargs: Any) -> list[Any]:
    torch.manual_seed(0)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some operators are deprecated; models call them all the same
        return list(tree_leaves(op(*args, **kwargs)))


@dataclass(eq=False)
class Traced:
    """One call as a graph of its own, with the tensors it was called on."""

    graph: Graph
    found: Propagation
    tensors: dict[Value, Tensor]
    values: bool = True  # whether the numbers of the result mean anything
    visits: dict[Axis, list[Visit]] = field(init=False)
    carried: list[list[tuple[Axis, ...]]] = field(init=False)

    def __post_init__(self) -> None:
        self.visits, self.carried = visits_of(self.found)

    @property
    def axes(self) -> list[Axis]:
        """All axes that the rule leaves free."""
        return list(dict.fromkeys(a for places in self.carried for axes in places for a in axes))

    def places(self, axis: Axis) -> list[tuple[Leaf, int, Place]]:
        """Where the axis lies in the tensors that the call is given."""
        index = {leaf: self.found.operands[leaf.value].index for leaf in self.graph.leaves}
        return [
            (leaf, dim, (i, dim))
            for leaf, i in index.items()
            for dim, axes in enumerate(self.carried[i])
            if axis in axes
        ]


def trace(op: Callable[..., Any], args: Any, kwargs: Any, values: bool = True) -> Traced:
    """Run an operator and apply its rule; each of its tensors is a parameter, its results are no outputs."""
    builder = GraphBuilder("real")
    tensors: dict[Value, Tensor] = {}

    def see(t: Tensor) -> Key:
        if id(t) not in builder.current:
            builder.leaf(id(t), t.shape, t.dtype, [f"t{len(tensors)}"], "parameter", True)
            tensors[builder.current[id(t)]] = t
        return Key(id(t))

    keyed = tree_map_only(Tensor, see, (args, dict(kwargs)))
    copies = {id(t): t.detach().clone() for t in tree_leaves((args, dict(kwargs))) if isinstance(t, Tensor)}
    originals = {id(copy): key for key, copy in copies.items()}  # an in-place operator returns what it was given
    leaves = _run(op, *tree_map_only(Tensor, lambda t: copies[id(t)], (args, dict(kwargs))))
    results = [(originals.get(id(t), id(t)), t.shape, t.dtype) if isinstance(t, Tensor) else None for t in leaves]
    builder.call(op, keyed[0], keyed[1], results, "", "")
    graph = Graph(tuple(builder.nodes[:1]), tuple(builder.leaves), (), (), "real")
    return Traced(graph, propagate(graph, strict=True), tensors, values)


def _dead(traced: Traced, value: Value, dim: int, axis: Axis, mask: np.ndarray) -> Tensor:
    """Indices along ``dim`` at which some removed atom of ``axis`` lies."""
    alive = survivors(traced.found.operands[value].terms[dim], {axis: mask})
    return torch.from_numpy(np.flatnonzero(~alive)).to(traced.tensors.get(value, torch.empty(0)).device)


def _thin(traced: Traced, value: Value, tensor: Tensor, masks: Masks) -> Tensor:
    for dim, term in enumerate(traced.found.operands[value].terms):
        alive = survivors(term, masks)
        if not alive.all():
            tensor = tensor.index_select(dim, torch.from_numpy(np.flatnonzero(alive)).to(tensor.device))
    return tensor


def slim_call(traced: Traced, tensors: Mapping[Value, Tensor], masks: Masks) -> list[Any]:
    """The call on thinner tensors, spelled as its rule says."""
    node = traced.graph.nodes[0]
    counts = {axis: int(mask.sum()) for axis, mask in masks.items()}
    op, args, kwargs = node.op, node.args, node.kwargs
    rewrite = traced.found.tape.rewrites.get(0)
    if rewrite is not None and any(count(resolve(term), counts) != size_of(term) for term in rewrite.terms):
        op, args, kwargs = rewrite.op, rewrite.args, rewrite.kwargs
    args, kwargs = tree_map_only(Size, lambda x: count(resolve(x.term), counts), (args, dict(kwargs)))
    pruned = {value: _thin(traced, value, tensor, masks) for value, tensor in tensors.items()}
    args, kwargs = tree_map_only(Value, pruned.__getitem__, (args, kwargs))
    return calls(op, args, kwargs)


def _constants(dtype: torch.dtype) -> list[Fact]:
    """Numbers a removed entry may hold; indices may only be zero, which is a place that exists."""
    if dtype == torch.bool:
        return [False, True]
    return [0.0, 1.0, 0.5] if dtype.is_floating_point else [0.0]


def _hypotheses(traced: Traced, axes: list[Axis], rng: random.Random) -> Iterator[dict[tuple[Axis, Place], Fact]]:
    """What removed entries hold in the tensors of the call: nothing known, zero everywhere, and in between."""
    places = [(axis, leaf, place) for axis in axes for leaf, _, place in traced.places(axis)]
    zero = [((axis, place), _constants(leaf.value.dtype)[0]) for axis, leaf, place in places]
    if len(places) <= 3:
        for chosen in itertools.product([False, True], repeat=len(places)):
            yield {key: fact for (key, fact), yes in zip(zero, chosen, strict=True) if yes}
    else:
        yield {}
        yield dict(zero)
        for key, _ in rng.sample(zero, 3):
            yield {k: f for k, f in zero if k == key}
            yield {k: f for k, f in zero if k != key}
    if len(axes) == 1 and places:
        yield {
            (axis, place): fact
            for axis, leaf, place in places
            if (fact := rng.choice([None, *_constants(leaf.value.dtype)])) is not None
        }
        shared = rng.choice([1.0, 0.5])
        yield {(axis, place): shared for axis, leaf, place in places if leaf.value.dtype.is_floating_point}


def _masks(axes: list[Axis], rng: random.Random) -> dict[Axis, np.ndarray]:
    masks = {}
    for axis in axes:
        gone = rng.sample(range(axis.size), rng.randint(1, axis.size - 1))
        masks[axis] = np.isin(np.arange(axis.size), gone, invert=True)
    return masks


def compare(got: Any, want: Any, what: str, values: bool = True) -> None:
    if not isinstance(want, Tensor):
        return
    if got.shape != want.shape:
        raise Broken(f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if got.is_meta or got.numel() == 0 or not values:
        return
    if got.dtype.is_floating_point or got.dtype.is_complex:
        scale = max(1.0, float(want[want.isfinite()].abs().max())) if want.isfinite().any() else 1.0
        # sums of at most some hundred terms, in float64 (a few kernels know float32 only)
        near = 1e-5 if got.dtype == torch.float32 else 1e-12
        if not torch.allclose(got, want, rtol=near, atol=near * scale, equal_nan=True):
            raise Broken(f"{what}: differs by {float((got - want).abs().nan_to_num().max()):.2g}")
    elif not torch.equal(got, want):
        raise Broken(f"{what}: differs")


def check(traced: Traced, seed: int | str = 0) -> int:
    """Put all a rule says about one call to the test; how many removals were compared.

    Raises:
        Broken: Something does not hold.
    """
    rng = random.Random(seed)
    compared = 0
    free = traced.axes
    choices = [[axis] for axis in free]
    if len(free) > 1:
        choices += [rng.sample(free, rng.randint(2, len(free))), free]
    for axes in choices:
        masks = _masks(axes, rng)
        for hypothesis in _hypotheses(traced, axes, rng):
            compared += _check_one(traced, masks, hypothesis)
    return compared


def _claimed(fact: Fact, held: Tensor, tensors: Mapping[Value, Tensor]) -> Tensor:
    """A fact, in the shape of the entries that it is about."""
    if not isinstance(fact, Uniform):
        return torch.full_like(held, fact)  # type: ignore[arg-type]

    def call(op: Any, args: Any, kwargs: Any) -> Tensor:
        args, kwargs = tree_map_only(Value, tensors.__getitem__, (args, kwargs))
        made: Tensor = op(*args, **kwargs)
        return made

    made: Tensor = fact.computed(call, {})
    assert made.dtype == held.dtype, f"{made.dtype} for {held.dtype}"
    return made.expand_as(held)


def _check_one(traced: Traced, masks: Masks, hypothesis: Mapping[tuple[Axis, Place], Fact]) -> int:
    known: dict[Axis, dict[Place, Fact]] = {}
    exact = True
    for axis in masks:
        known[axis] = {place: fact for (a, place), fact in hypothesis.items() if a is axis}
        exact &= follow(traced.visits.get(axis, ()), known[axis]) is None
    tensors = {value: tensor.clone() for value, tensor in traced.tensors.items()}
    for axis, mask in masks.items():
        for leaf, dim, place in traced.places(axis):
            fact = hypothesis.get((axis, place))
            if fact is not None:
                tensors[leaf.value].index_fill_(dim, _dead(traced, leaf.value, dim, axis, mask), fact)
    node = traced.graph.nodes[0]
    args, kwargs = tree_map_only(Value, tensors.__getitem__, (node.args, dict(node.kwargs)))
    try:
        full = calls(node.op, args, kwargs)
    except RuntimeError as error:
        if "ZeroDivisionError" in str(error):  # whole numbers cannot be divided by zero at all
            return 0
        raise
    told = {f"t{i}[{dim}]": f for (_, (i, dim)), f in hypothesis.items()}
    for value, got in zip(node.outputs, full, strict=True):
        if value is None or got.is_meta:
            continue
        index = traced.found.operands[value].index
        finite = all(fact is None or fact == fact for facts in known.values() for fact in facts.values())
        for axis, mask in masks.items():
            for dim, axes in enumerate(traced.carried[index]):
                fact = known[axis].get((index, dim)) if axis in axes else None
                if fact is not None and finite:
                    held = got.index_select(dim, _dead(traced, value, dim, axis, mask))
                    text = f"claimed {fact} at dim {dim} of {value}, given {told}"
                    compare(held, _claimed(fact, held, tensors), text, traced.values)
    if not exact:
        return 0
    slim = slim_call(traced, tensors, masks)
    for value, got, want in zip(node.outputs, slim, full, strict=True):
        if value is not None:
            text = f"removal from {value}, given {told}, kept {[mask.tolist() for mask in masks.values()]}"
            compare(got, _thin(traced, value, want, masks), text, traced.values)
    return 1
