"""Compute the cost of a network, before and after any removal, without building a model.

Every size in the network is a sum of products of counts (:mod:`oto.axes.terms`), so every cost is a polynomial in the
numbers of atoms that the node groups keep. For example, two linear layers 8 → h → 3 have ``8h + h + 3h + 3``
parameters. :func:`cost` evaluates it in plain integers. :class:`Costs` expands it once, so that total and marginal
costs of a choice among many thousands of atoms are computed without walking the graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain, combinations
from math import prod

import numpy as np
from numpy.typing import NDArray

from oto.axes.terms import Axis, Term, count, resolve
from oto.groups.node_group import NodeGroup
from oto.groups.partition import Partition
from oto.trace.graph import Leaf, Value


@dataclass(frozen=True)
class Cost:
    """The cost of a network, in plain integers. One MAC is two FLOPs.

    Attributes:
        params: Entries of all parameters; a tied one counts once.
        macs: Multiply–adds of every product (linear, convolution, matmul, attention) on the example input.
        bytes: Memory of all parameters and buffers, each in its own dtype.
    """

    params: int
    macs: int
    bytes: int

    @property
    def flops(self) -> int:
        return 2 * self.macs


def cost(partition: Partition, kept: Mapping[str, int] | None = None, without: Collection[str] = ()) -> Cost:
    """The exact cost of a network of which some atoms are kept.

    Args:
        kept: Number of atoms that each named group keeps; other groups are whole.
        without: Names of parameters and buffers that do not count.
    """
    counts = partition.counts(kept or {})

    def total(products: Products) -> int:
        return sum(int(weight) * prod(count(resolve(term), counts) for term in terms) for weight, terms in products)

    gone = {axis for axis, n in counts.items() if not n}
    away = [leaf for leaf, sets in partition.shared.items() if not any(gone.isdisjoint(own) for own in sets)]
    without = {*without, *(leaf.name for leaf in away)}
    return Cost(total(_params(partition, without)), total(_macs(partition)), total(_bytes(partition, without)))


Products = Iterable[tuple[float, Sequence[Term]]]
HELD = ("parameter", "buffer")
"""The kinds of tensors whose bytes count."""

MOST_SHARED = 6
"""If more sets of segments read a tensor, polynomials count it as always present: its terms double with each set."""

_NOTHING: Mapping[Axis, tuple[Axis, ...]] = {}


def _params(partition: Partition, without: Collection[str] = ()) -> Products:
    leaves = _left(partition, without)
    return ((1, _gated(partition, leaf)) for leaf in leaves if leaf.kind == "parameter")


def _unshared(partition: Partition) -> Iterator[tuple[Leaf, int, Sequence[Term]]]:
    """Correction terms for the model's tensors that only segments read, and that are gone if all of these are.

    If a, b, c are 1 for segments that are present and 0 for others, such a tensor counts 1 - (1 - a) (1 - b) (1 - c)
    times instead of once. Yields the tensor, the sign of a term of this expansion, and the term's factors.
    """
    for leaf, sets in partition.shared.items():
        terms = partition.found.terms(leaf.value)
        if len(sets) <= MOST_SHARED:
            yield leaf, -1, terms
            for many in range(1, len(sets) + 1):
                for some in combinations(sets, many):
                    yield leaf, 1 if many % 2 else -1, (*terms, tuple(frozenset().union(*some)))


def _gated(partition: Partition, leaf: Leaf) -> Sequence[Term]:
    """The terms of a parameter, buffer or constant, times the axes of the segments that it lies in."""
    terms, gate = partition.found.terms(leaf.value), partition.gates.get(leaf)
    return terms if gate is None else (*terms, gate)


def _left(partition: Partition, without: Collection[str]) -> list[Leaf]:
    return [leaf for leaf in partition.found.graph.leaves if not leaf.names or leaf.names[0] not in without]


def _bytes(partition: Partition, without: Collection[str] = ()) -> Products:
    leaves = _left(partition, without)
    held = (leaf for leaf in leaves if leaf.kind in HELD)
    return ((leaf.value.dtype.itemsize, _gated(partition, leaf)) for leaf in held)


def _macs(partition: Partition) -> Products:
    return ((1, volume) for _, volume in _products(partition))


def _products(partition: Partition) -> Iterator[tuple[int, Sequence[Term]]]:
    """Every product of the forward pass in eval mode: the index of its node, and the terms of its volume."""
    nodes, gates = len(partition.found.graph.nodes), partition.gates
    for step in partition.found.tape.steps:
        if step.volume is not None and step.node < nodes:
            gate = gates.get(step.node)
            yield step.node, step.volume if gate is None else (*step.volume, gate)


def macs_by_node(partition: Partition, kept: Mapping[str, int] | None = None) -> dict[int, int]:
    """Multiply–adds of each call that has any, by the index of its node.

    Args:
        kept: Number of atoms that each named group keeps; other groups are whole.
    """
    counts = partition.counts(kept or {})
    macs: dict[int, int] = {}
    for node, volume in _products(partition):
        macs[node] = macs.get(node, 0) + prod(count(resolve(term), counts) for term in volume)
    return macs


def macs_by_module(partition: Partition, kept: Mapping[str, int] | None = None) -> dict[str, int]:
    """Multiply–adds by the name of the module that makes the calls; ``""`` is the model itself."""
    nodes = partition.found.graph.nodes
    macs: dict[str, int] = {}
    for index, own in macs_by_node(partition, kept).items():
        macs[nodes[index].module] = macs.get(nodes[index].module, 0) + own
    return macs


@dataclass(frozen=True)
class Extent:
    """The size of a network, in plain numbers that hold no reference to it.

    Attributes:
        cost: Total cost.
        macs: Multiply–adds by module.
        sizes: Atoms of each node group, by its name.
    """

    cost: Cost
    macs: Mapping[str, int]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, partition: Partition, groups: Iterable[NodeGroup]) -> Extent:
        """The extent of an analyzed network."""
        return cls(cost(partition), macs_by_module(partition), {group.name: group.size for group in groups})


def weights(partition: Partition, of: str = "") -> frozenset[str]:
    """Names of the parameters with at least two dimensions that are a factor of a product (linear, conv, matmul).

    Tables that are indexed first, such as embeddings, are not included.

    Args:
        of: Consider only products whose operator has this in its name.
    """
    tape, graph = partition.found.tape, partition.found.graph
    calls = {node.index: node for node in graph.calls}
    products = {step.node for step in tape.steps if step.volume is not None and of in calls[step.node].name}
    maker = {value: node for node in graph.calls for value in node.outputs if value is not None}
    leaves = {leaf.value: leaf.name for leaf in graph.leaves if leaf.kind == "parameter"}
    names: set[str] = set()
    seen: set[Value] = set()
    todo = [value for index in products for value in calls[index].inputs()]
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in leaves and len(value.shape) > 1:
            names.add(leaves[value])
        node = maker.get(value)
        if node is not None and node.index not in products:  # a view, a cast, a norm of the weight
            todo += [before for before in node.inputs() if prod(before.shape) == prod(value.shape)]
    return frozenset(names)


class Polynomial:
    """A cost as a function of counts: a sum of coefficients times products of counts.

    Exact as long as coefficients are integers and the total is below 2^53 (9e15).

    Args:
        monomials: The coefficient of each product of counts; the key holds the sorted indices of these counts.
        size: Number of counts.

    Example:
        >>> area = Polynomial({(0, 1): 2, (1,): 3}, 2)  # 2ab + 3b
        >>> area(np.array([4, 5])), area.marginal(np.array([4, 5]), np.array([1, 2]))
        (55.0, array([10., 22.]))
    """

    def __init__(self, monomials: Mapping[tuple[int, ...], float], size: int) -> None:
        self.size, self._monomials = size, monomials
        degree = max(map(len, monomials), default=0)
        self.coefficients = np.array(list(monomials.values()), dtype=np.float64)
        padded = [(*indices, *[size] * (degree - len(indices))) for indices in monomials]  # counts[size] is 1
        self.factors = np.array(padded, dtype=np.int64).reshape(len(padded), degree)
        powers: dict[tuple[int, int], int] = {}
        for m, indices in enumerate(monomials):
            for index in indices:
                powers[m, index] = powers.get((m, index), 0) + 1
        pairs = np.array(list(powers), dtype=np.int64).reshape(-1, 2)
        self._monomial, self._index = pairs[:, 0], pairs[:, 1]
        self._power = np.array(list(powers.values()), dtype=np.float64)

    def _products(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        padded = np.append(counts, 1).astype(np.float64)
        products: NDArray[np.float64] = self.coefficients * padded[self.factors].prod(axis=1)
        return products

    def tied(self, ties: NDArray[np.int64], per: NDArray[np.int64] | None = None) -> Polynomial:
        """The same cost as a function of one count per tie.

        Args:
            ties: Index of each count's tie, shape ``(size,)``.
            per: Each count divided by the count of its tie, shape ``(size,)``; 1 by default.
        """
        total: _Sparse = {}
        for indices, coefficient in self._monomials.items():
            times = 1 if per is None else prod(int(per[i]) for i in indices)
            _add(total, {tuple(sorted(int(ties[i]) for i in indices)): coefficient}, times)
        return Polynomial(total, int(ties.max(initial=-1)) + 1)

    def __call__(self, counts: NDArray[np.int64]) -> float:
        """The cost at some counts, shape ``(size,)``."""
        return float(self._products(counts).sum())

    def marginal(self, counts: NDArray[np.int64], fewer: NDArray[np.int64]) -> NDArray[np.float64]:
        """For each count, how much is saved if this count alone decreases by ``fewer``; shapes ``(size,)``."""
        if not counts.all():
            return self._marginal_at_zeros(counts.astype(np.float64), fewer)
        now = np.maximum(counts, 1).astype(np.float64)
        before, after = (n[self._index] ** self._power for n in (now, now - fewer))
        saved = self._products(counts)[self._monomial] / before * (before - after)  # divides evenly
        total: NDArray[np.float64] = np.bincount(self._index, saved, minlength=self.size).astype(np.float64)
        return total

    def _marginal_at_zeros(self, now: NDArray[np.float64], fewer: NDArray[np.int64]) -> NDArray[np.float64]:
        """:meth:`marginal` if some counts are zero, such as those of removed segments, without dividing by them."""
        filled = np.where(now == 0, 1.0, now)
        products = self.coefficients * np.append(filled, 1.0)[self.factors].prod(axis=1)
        is_zero = now[self._index] == 0
        zeros = np.bincount(self._monomial, is_zero, minlength=len(products))
        alone = zeros[self._monomial] == is_zero  # no other factor is zero
        before, after = (n[self._index] ** self._power for n in (now, now - fewer))
        saved = products[self._monomial] / filled[self._index] ** self._power * alone * (before - after)
        total: NDArray[np.float64] = np.bincount(self._index, saved, minlength=self.size).astype(np.float64)
        return total


@dataclass(frozen=True, eq=False)
class Costs:
    """The costs of a network as polynomials in the atoms that its prunable node groups keep.

    Attributes:
        names: The prunable groups, in the order of the counts.
        sizes: Their numbers of atoms in the full network, shape ``(groups,)``.
        params, macs, bytes: The costs; see :class:`Cost`.
        weights: See :func:`weights`.
    """

    names: tuple[str, ...]
    sizes: NDArray[np.int64]
    params: Polynomial
    macs: Polynomial
    bytes: Polynomial
    weights: frozenset[str] = frozenset()

    @classmethod
    def of(cls, partition: Partition, groups: Iterable[NodeGroup]) -> Costs:
        """Expand the costs into polynomials; groups that are not prunable count as whole."""
        prunable = [group for group in groups if group.prunable and group.size]
        index = {partition.axes[group.name]: i for i, group in enumerate(prunable)}
        shared = list(_unshared(partition))
        some = [(sign, terms) for leaf, sign, terms in shared if leaf.kind == "parameter"]
        wide = [(sign * leaf.value.dtype.itemsize, terms) for leaf, sign, terms in shared if leaf.kind in HELD]
        params, macs, in_bytes = (
            polynomial(chain(products(partition), more), index, partition.going)
            for products, more in ((_params, some), (_macs, ()), (_bytes, wide))
        )
        sizes = np.array([g.size for g in prunable], dtype=np.int64)
        return cls(tuple(g.name for g in prunable), sizes, params, macs, in_bytes, weights(partition))

    def at(self, counts: NDArray[np.int64]) -> Cost:
        """All costs at some counts, shape ``(groups,)``."""
        return Cost(int(self.params(counts)), int(self.macs(counts)), int(self.bytes(counts)))


_Sparse = dict[tuple[int, ...], float]


def polynomial(
    products: Products, index: Mapping[Axis, int], going: Mapping[Axis, tuple[Axis, ...]] = _NOTHING
) -> Polynomial:
    """Expand a sum of coefficients times products of sizes into a polynomial in counts.

    Args:
        products: The coefficients, each with the terms of its sizes.
        index: The axes that have a count, with its index; other axes are whole.
        going: For each axis that has no atom left without some segments, the axes of these segments.
    """
    total: _Sparse = {}
    known: dict[Term, _Sparse] = {}

    def spelled(term: Term) -> _Sparse:
        if term not in known:
            known[term] = reduce(_times, map(factor, term), {(): 1})
        return known[term]

    def factor(part: object) -> _Sparse:
        if isinstance(part, Axis):
            indices = tuple(sorted(index[axis] for axis in (part, *going.get(part, ())) if axis in index))
            return {indices: 1 if part in index else part.size}
        added: _Sparse = {}
        for segment in part.segments:  # type: ignore[attr-defined]
            _add(added, spelled(segment), 1)
        return added

    for weight, terms in products:
        _add(total, reduce(_times, (spelled(resolve(term)) for term in terms), {(): 1}), weight)
    return Polynomial(total, len(index))


def _times(a: _Sparse, b: _Sparse) -> _Sparse:
    product: _Sparse = {}
    for left, m in a.items():
        for right, n in b.items():
            both = tuple(sorted(left + right))
            product[both] = product.get(both, 0) + m * n
    return product


def _add(total: _Sparse, more: _Sparse, weight: float) -> None:
    for indices, coefficient in more.items():
        total[indices] = total.get(indices, 0) + weight * coefficient
