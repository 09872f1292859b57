"""Decide whether a concatenation can be computed without one of its arguments that is zero for every input.

The concatenated dimension is a sum of terms (:mod:`oto.axes.terms`), one for each argument. If no atom is left of the
axes in an argument's term, the sum is shorter, and so is every parameter that reads it. A branch can be removed like
this if

* these axes belong to it alone: outside the calls that compute it, they occur only in sums that also contain all other
  arguments of the concatenation;
* after the concatenation, no step's other results depend on whether these zero entries exist. This is the proof of
  :mod:`oto.axes.invariance`, started at the argument instead of at the parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from oto.axes.call import Fact
from oto.axes.invariance import PRODUCES, Place, Visit, dynamic_tensors, follow, roles_of, visits_of
from oto.axes.propagate import Propagation
from oto.axes.terms import Axis, Sum, Term, axes_of, resolve
from oto.groups.node_group import Cut, Slice
from oto.groups.partition import Segment, occurrences
from oto.trace.graph import Leaf, Node, Value

CAT = torch.ops.aten.cat.default
"""The concatenation operator."""


class CannotGo(Exception):
    """An argument of a concatenation cannot be removed. Internal to this package: callers catch it.

    Attributes:
        reason: Why not.
        cause: Index of the call that is the reason, if one is.
    """

    def __init__(self, reason: str, cause: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.cause = reason, cause


@dataclass(eq=False)
class Beside:
    """A network with concatenated branches, with results of the analysis that its branches share."""

    found: Propagation
    _terms: dict[Place, Term] = field(default_factory=dict, init=False)
    _sums: dict[Sum, frozenset[Axis]] = field(default_factory=dict, init=False)
    _arguments: dict[int, tuple[dict[Value, frozenset[Axis]], Counter[Axis]]] = field(default_factory=dict, init=False)
    _cuts: dict[Place, dict[Axis, list[tuple[Cut, ...]]]] = field(default_factory=dict, init=False)

    def proved(self, segment: Segment) -> Segment:
        """The segment with ``axes`` and ``behind`` set.

        Raises:
            CannotGo: It cannot be proved that its concatenations can be computed without it.
        """
        branch = _Branch(self, segment)
        axes = branch.axes()
        behind = tuple(piece for axis in axes for piece in branch.behind(axis))
        return replace(segment, axes=axes, behind=behind)

    @cached_property
    def visits(self) -> Mapping[Axis, list[Visit]]:
        """For each axis that may be removed, the steps that touch it."""
        return self._followed[0]

    @cached_property
    def places(self) -> Mapping[Axis, list[Place]]:
        """For each axis that may be removed, the tensor dimensions that carry it."""
        found: dict[Axis, list[Place]] = {}
        for tensor, dims in enumerate(self._followed[1]):
            for dim, axes in enumerate(dims):
                for axis in axes:
                    found.setdefault(axis, []).append((tensor, dim))
        return found

    @cached_property
    def makers(self) -> Mapping[int, int]:
        """For each computed tensor, the index of the call that computes it."""
        return {step.output: step.node for step in self.found.tape.steps}

    @cached_property
    def dynamic(self) -> list[bool]:
        """Which tensors depend on the inputs."""
        return dynamic_tensors(self.found)

    @cached_property
    def leaves(self) -> Mapping[int, Leaf]:
        """The model's parameters, buffers and constants by the index of their tensor."""
        return {self.found.operands[leaf.value].index: leaf for leaf in self.found.graph.leaves}

    def term(self, tensor: int, dim: int) -> Term:
        """The resolved term of a dimension of a tensor; cached, since many branches share it."""
        if (tensor, dim) not in self._terms:
            self._terms[tensor, dim] = resolve(self.found.tape.tensors[tensor][dim])
        return self._terms[tensor, dim]

    def axes_in(self, term: Term) -> frozenset[Axis]:
        """All axes of a resolved term."""
        if len(term) != 1 or isinstance(term[0], Axis):
            return frozenset(axes_of(term))
        if term[0] not in self._sums:
            self._sums[term[0]] = frozenset(axes_of(term))
        return self._sums[term[0]]

    def arguments(self, node: Node, dim: int) -> tuple[Mapping[Value, frozenset[Axis]], Mapping[Axis, int]]:
        """The axes of each argument of a concatenation, and the number of arguments that each axis occurs in."""
        if node.index not in self._arguments:
            given = {value: self.axes_in(self.along(value, dim)) for value in node.inputs() if 0 not in value.shape}
            self._arguments[node.index] = given, Counter(axis for axes in given.values() for axis in axes)
        return self._arguments[node.index]

    def along(self, value: Value, dim: int) -> Term:
        """The resolved term of a value's dimension."""
        return self.term(self.found.operands[value].index, dim)

    def cuts(self, tensor: int, dim: int) -> Mapping[Axis, list[tuple[Cut, ...]]]:
        """For each axis in a dimension of a tensor, the strided views of its atoms."""
        if (tensor, dim) not in self._cuts:
            made: dict[Axis, list[tuple[Cut, ...]]] = {}
            self._cuts[tensor, dim] = made
            for axis, cuts in occurrences(self.term(tensor, dim)):
                made.setdefault(axis, []).append(cuts)
        return self._cuts[tensor, dim]

    @cached_property
    def _followed(self) -> tuple[dict[Axis, list[Visit]], list[list[tuple[Axis, ...]]]]:
        return visits_of(self.found)


class _Branch:
    """One branch and the concatenations that take it."""

    def __init__(self, network: Beside, segment: Segment) -> None:
        self.network, self.found, self.body = network, network.found, segment.body
        self.joints = [self.found.graph.calls[index] for index in sorted(segment.into)]
        made = {value for node in self.found.graph.calls if node.index in self.body for value in node.outputs if value}
        self.inside = {self._index(leaf.value) for leaf in segment.leaves}
        self.inside |= {tensor for tensor, node in network.makers.items() if node in self.body}
        self.edges = list(dict.fromkeys(x for node in self.joints for x in node.inputs() if x in made))
        self.dim = dim_of(self.joints[0])
        self.alone: dict[Sum, bool] = {}

    def _index(self, value: Value) -> int:
        """The index of a value's tensor."""
        return self.found.operands[value].index

    def axes(self) -> tuple[Axis, ...]:
        """The axes that have no atom left without the branch.

        Raises:
            CannotGo: The axes are not the branch's own, or the branch has none.
        """
        if any(dim_of(node) != self.dim for node in self.joints):
            raise CannotGo("it is laid beside others along several dimensions (cat)", self.joints[-1].index)
        own = frozenset().union(*(self.network.axes_in(self.network.along(value, self.dim)) for value in self.edges))
        self.others = [self._others(node, own) for node in self.joints]
        axes = dict.fromkeys(a for value in self.edges for a in self._gone(self.network.along(value, self.dim)))
        return tuple(axes)

    def behind(self, axis: Axis) -> list[Slice]:
        """The slices of later parameters that must be zero so that removing the zero entries of an axis is exact.

        Raises:
            CannotGo: Removal would not be exact whichever parameters are zero.
        """
        steps = self.network.visits.get(axis, [])
        rest = [visit for visit in steps if visit.step.node not in self.body]
        silent: dict[Place, Fact] = {(self._index(value), self.dim): 0.0 for value in self.edges}
        failed = follow(rest, dict(silent))
        if failed is None:
            return []
        roles = roles_of(steps, self.network.dynamic)
        places = [(tensor, dim) for tensor, dim in self.network.places.get(axis, ()) if tensor not in self.inside]
        zeros = [place for place in places if self._may_be_zeroed(place[0]) and roles.get(place, 0) & PRODUCES]
        if not zeros or follow(rest, silent | dict.fromkeys(zeros, 0.0)) is not None:
            raise CannotGo("behind what it is laid beside others (cat) zeros need not be zero any more", failed.node)
        # the entries of all of its atoms, as those of a single atom
        return [
            Slice(self.network.leaves[tensor].name, dim, cuts).as_one()
            for tensor, dim in zeros
            for cuts in self.network.cuts(tensor, dim).get(axis, ())
        ]

    def _may_be_zeroed(self, tensor: int) -> bool:
        return tensor in self.network.leaves and self.network.leaves[tensor].may_be_zeroed

    def _others(self, node: Node, own: Collection[Axis]) -> Set[Axis]:
        """The axes of a concatenation's other arguments.

        Raises:
            CannotGo: One of them shares axes with the branch, or has none.
        """
        given, counts = self.network.arguments(node, self.dim)
        mine = [given[value] for value in self.edges if value in given]
        if all(given.values()) and all(counts[axis] == sum(axis in axes for axes in mine) for axis in own):
            return counts.keys() - own
        for value, axes in given.items():
            if value not in self.edges and (not axes or not axes.isdisjoint(own)):
                what = "has the same channels" if axes else "is one entry wide"
                raise CannotGo(f"what it is laid beside (cat) {what}", node.index)
        return counts.keys() - own

    def _gone(self, term: Term) -> list[Axis]:
        """Axes of the branch such that no entry of the term is left once they have no atoms.

        Raises:
            CannotGo: There are none.
        """
        why = CannotGo("it is one entry wide along what it is laid beside others (cat)", self.joints[0].index)
        for i, factor in enumerate(term):
            try:
                if not isinstance(factor, Axis):
                    return [axis for segment in factor.segments for axis in self._gone(segment)]
                self._require_own(factor)
                return [factor]
            except CannotGo as reason:
                why = why if i else reason
        raise why

    def _require_own(self, axis: Axis) -> None:
        """Raise ``CannotGo`` if an axis is fixed, or occurs outside the branch other than in its concatenations."""
        if axis.fixed is not None:
            reason = f"it is laid beside others (cat), and its channels stay whole: {axis.fixed.text}"
            raise CannotGo(reason, axis.fixed.node)
        for tensor, dim in self.network.places.get(axis, ()):
            if tensor not in self.inside and not self._is_beside(axis, self.network.term(tensor, dim)):
                maker, leaf = self.network.makers.get(tensor), self.network.leaves.get(tensor)
                if maker is None:
                    where = "an input" if leaf is None else leaf.name
                else:
                    where = self.found.graph.calls[maker].module or "the model"
                raise CannotGo(f"it is laid beside others (cat), and its channels are those of {where}, too", maker)

    def _is_beside(self, axis: Axis, term: Term) -> bool:
        """Whether an axis occurs in a term only within sums that contain all other arguments of a concatenation."""
        for factor in term:
            if factor is axis:
                return False
            if isinstance(factor, Sum):
                axes = self.network.axes_in((factor,))
                if factor not in self.alone:
                    self.alone[factor] = not any(others <= axes for others in self.others)
                if axis in axes and self.alone[factor]:
                    return False
        return True


def dim_of(node: Node) -> int:
    """The dimension of a concatenation, counted from 0."""
    dim: int = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    ranks = {len(value.shape) for value in node.inputs() if 0 not in value.shape}
    return dim % max(ranks)
