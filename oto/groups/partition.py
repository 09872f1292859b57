"""Find the node groups of a network: one for each axis that a parameter carries.

Example: the hidden axis of ``fc2(relu(fc1(x)))`` is carried by the rows of ``fc1.weight``, by ``fc1.bias`` and by the
columns of ``fc2.weight``. It is a node group of three slices, of which the first two must be zero.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from oto.axes.invariance import Exact, prove
from oto.axes.propagate import Propagation, propagate
from oto.axes.terms import Axis, Reason, Sum, Term, axes_of, count, resolve, survivors
from oto.groups.node_group import Cut, NodeGroup, Slice
from oto.trace.graph import Graph, Leaf, Value

Kept = Mapping[str, NDArray[np.int64]]
_WHOLE: Mapping[Axis, int] = {}


@dataclass(frozen=True, eq=False)
class Segment:
    """A part of a network that need not be computed if its result is zero; see :mod:`oto.groups.segments`.

    Attributes:
        name: Path of the module that computes its result; unique, and different from all node group names.
        axis: Its axis of size 1: an additional factor of every size within the segment.
        joint: Index of the addition that takes its result, or of the first concatenation or stack that does.
        edge: The result of the segment, an argument of the joint.
        left: The other argument of an addition, which is its result without the segment. For other joints, one of the
            other arguments.
        made: The result of the joint.
        writers: The parameters that must be zero.
        body: Indices of the calls whose results only reach the outputs through the joint.
        leaves: The model's parameters, buffers and constants that only these calls read.
        into: If the result is concatenated or stacked, the indices of all calls that do so, which are still computed
            without the segment; empty for an addition.
        axes: For a concatenation, the axes that have no atom left without the segment; empty for other joints.
        behind: Slices that must be zero as well, for example where a norm after a concatenation maps zeros to nonzeros.
    """

    name: str
    axis: Axis
    joint: int
    edge: Value
    left: Value
    made: Value
    writers: tuple[Leaf, ...]
    body: frozenset[int]
    leaves: tuple[Leaf, ...] = ()
    into: frozenset[int] = frozenset()
    axes: tuple[Axis, ...] = ()
    behind: tuple[Slice, ...] = ()


@dataclass(eq=False)
class Partition:
    """The node groups of a network.

    Attributes:
        found: The terms of every dimension.
        groups: Every axis that a parameter carries, prunable or not, in the order of the parameters.
        axes: The axis of each group, and of each segment, by name.
        segments: The segments, which can be removed as a whole; empty if they were not searched for.
    """

    found: Propagation
    groups: tuple[NodeGroup, ...]
    axes: Mapping[str, Axis]
    segments: tuple[Segment, ...] = ()

    @cached_property
    def gates(self) -> Mapping[int | Leaf, Term]:
        """For each call (by its index) and each tensor of the model in segments, the axes of these segments."""
        found: dict[int | Leaf, Term] = {}
        for segment in self.segments:
            inside: list[int | Leaf] = [*segment.body, *segment.leaves]
            for one in inside:
                found[one] = (*found.get(one, ()), segment.axis)
        return found

    @cached_property
    def shared(self) -> Mapping[Leaf, tuple[frozenset[Axis], ...]]:
        """For each tensor of the model that only segments read, but more than one: for each reader, the axes of the
        segments around it. The tensor is gone if at least one axis of every set is."""
        around: dict[int, set[Axis]] = {}
        for segment in self.segments:
            for index in segment.body:
                around.setdefault(index, set()).add(segment.axis)
        single = {leaf for segment in self.segments for leaf in segment.leaves}
        readers: dict[Value, list[frozenset[Axis]]] = {}
        for node in self.found.graph.calls if around else ():
            for value in node.inputs():
                readers.setdefault(value, []).append(frozenset(around.get(node.index, ())))
        found: dict[Leaf, tuple[frozenset[Axis], ...]] = {}
        for leaf in self.found.graph.leaves:
            sets = dict.fromkeys(readers.get(leaf.value, ()))
            if sets and all(sets) and leaf not in single:
                found[leaf] = tuple(own for own in sets if not any(other < own for other in sets))
        return found

    @cached_property
    def going(self) -> Mapping[Axis, tuple[Axis, ...]]:
        """For each axis that has no atom left without some segments, the axes of these segments."""
        found: dict[Axis, tuple[Axis, ...]] = {}
        for segment in self.segments:
            for axis in segment.axes:
                found[axis] = (*found.get(axis, ()), segment.axis)
        return found

    def erased(self, kept: Kept) -> list[Segment]:
        """The segments that are not kept."""
        return [segment for segment in self.segments if segment.name in kept and not len(kept[segment.name])]

    def counts(self, kept: Mapping[str, int]) -> dict[Axis, int]:
        """For each group in ``kept``, the number of kept atoms of its axis; 0 if it is removed with a segment."""
        counts = {self.axes[name]: n for name, n in kept.items()}
        gone = {segment.axis for segment in self.segments if kept.get(segment.name) == 0}
        return counts | {axis: 0 for axis, own in self.going.items() if not gone.isdisjoint(own)}

    @cached_property
    def graph(self) -> nx.DiGraph:
        """The data flow graph, with calls, leaves, inputs and outputs as nodes.

        Nodes are called ``"node-12"`` (a call), ``"parameter fc.weight"``, ``"input 0"``, ``"output 0"``. The attribute
        ``groups`` of a node holds the names of the node groups that it carries.
        """
        return _flow(self.found, {self.axes[group.name]: group.name for group in self.groups})

    def masks(self, kept: Kept) -> dict[Axis, NDArray[np.bool_]]:
        """For each group in ``kept``, which atoms of its axis are kept; none if it is removed with a segment."""
        masks = {}
        for name, indices in kept.items():
            axis = self.axes[name]
            masks[axis] = np.zeros(axis.size, dtype=bool)
            masks[axis][indices] = True
        for axis in (axis for segment in self.erased(kept) for axis in segment.axes):
            masks[axis] = np.zeros(axis.size, dtype=bool)
        return masks

    def entries(self, value: Value, kept: Kept) -> list[NDArray[np.bool_]]:
        """For each dimension of a tensor, which entries are kept."""
        masks = self.masks(kept)
        return [survivors(term, masks) for term in self.found.terms(value)]


def partition(graph: Graph, strict_out_nodes: bool | frozenset[str] = False) -> Partition:
    """Find the node groups of a traced model and how each can be removed exactly.

    Args:
        strict_out_nodes: As for :func:`oto.axes.propagate.propagate`.
    """
    propagation = propagate(graph, strict_out_nodes)
    proofs = prove(propagation)
    where: dict[Axis, list[Slice]] = {}
    reached, used = graph.read, set[Axis]()
    idle = Reason("the traced forward never uses it")
    first: dict[Axis, str] = {}
    for leaf in graph.leaves:
        if leaf.kind != "parameter":
            continue
        for dim, term in enumerate(propagation.terms(leaf.value)):
            for axis, cuts in occurrences(term):
                where.setdefault(axis, []).append(Slice(leaf.name, dim, cuts))
                if leaf.value in reached:
                    used.add(axis)
    for axis in where.keys() - used:  # heads that only training uses can lose inputs, but no axes of their own
        axis.fixed = idle
    for axis, proof in proofs.items():
        if proof.zeros:
            leaf, _ = proof.zeros[0]
            first[axis] = leaf.name
    names: dict[Axis, str] = {}
    taken: dict[str, int] = {}
    for axis in sorted(where, key=lambda axis: axis.fixed is not None):  # prunable groups have the plain names
        base = first.get(axis, where[axis][0].parameter)
        taken[base] = taken.get(base, -1) + 1
        names[axis] = f"{base}/{taken[base]}" if taken[base] else base
    groups = []
    for axis, slices in where.items():
        own = proofs[axis] if axis.fixed is None else None
        zeros = () if own is None else _zeros(own, slices)
        quiet = own is not None and own.quiet
        reason, cause = (None, None) if axis.fixed is None else (axis.fixed.text, axis.fixed.node)
        groups.append(NodeGroup(names[axis], axis.size, tuple(slices), zeros, reason, cause, quiet=quiet))
    axes = {name: axis for axis, name in names.items()}
    return Partition(propagation, tuple(groups), axes)


def _zeros(proof: Exact, slices: list[Slice]) -> tuple[Slice, ...]:
    places = {(leaf.name, dim) for leaf, dim in proof.zeros}
    return tuple(s for s in slices if (s.parameter, s.dim) in places)


def trainable(graph: Graph, strict_out_nodes: bool | frozenset[str] = False) -> Partition:
    """The node groups of a traced model, which are valid in train mode as well if that costs no prunable atoms.

    If it would, only the forward pass in eval mode is considered, and ``untrained`` of the graph says so.
    """
    with_training = partition(graph, strict_out_nodes)
    if graph.trained is None:
        return with_training
    alone = partition(replace(graph, trained=None), strict_out_nodes)
    both, one = (sum(g.size for g in own.groups if g.prunable) for own in (with_training, alone))
    if both >= one:
        return with_training
    text = f"{one - both:,} of {one:,} zero-invariant groups would have to stay for what train mode does besides"
    return partition(replace(graph, trained=None, untrained=text), strict_out_nodes)


def pruned_groups(
    partition: Partition, groups: Sequence[NodeGroup], kept: Kept, present: Collection[str] | None = None
) -> tuple[NodeGroup, ...]:
    """The groups of a pruned model: their slices in parameters that hold only the kept atoms.

    Slices in parameters that were removed with a segment are left out.

    Args:
        present: The names of all remaining parameters; a tied parameter may have lost the first of its names. By
            default all names remain.
    """
    counts = partition.counts({name: len(atoms) for name, atoms in kept.items()})
    gone = {leaf for segment in partition.erased(kept) for leaf in segment.leaves}
    now: dict[str, str] = {}
    whole: dict[str, Slice] = {}
    where: dict[Axis, list[Slice]] = {}
    for leaf in partition.found.graph.leaves:
        name = next((own for own in leaf.names if present is None or own in present), None)
        if leaf.kind == "parameter" and leaf not in gone and name is not None:
            terms = partition.found.terms(leaf.value)
            now |= dict.fromkeys(leaf.names, name)
            whole[name] = Slice.whole(name, [count(resolve(term), counts) for term in terms])
            for dim, term in enumerate(terms):
                for axis, cuts in occurrences(term, counts):
                    where.setdefault(axis, []).append(Slice(name, dim, cuts))

    segments = {segment.axis: segment for segment in partition.segments}

    def pruned(group: NodeGroup) -> NodeGroup:
        axis = partition.axes[group.name]
        if group.segment:
            behind = {(now.get(piece.parameter), piece.dim) for piece in segments[axis].behind}
            names = [now[piece.parameter] for piece in group.slices if piece.parameter in now]
            there = [whole[name] for name in names if name not in {own for own, _ in behind}]
            beside = [piece for own in segments[axis].axes for piece in where.get(own, ())]
            there += [piece.as_one() for piece in beside if (piece.parameter, piece.dim) in behind]
            slices = tuple(there) if counts.get(axis, 1) else ()
        else:
            slices = tuple(where.get(axis, ()))
        places = {(now.get(piece.parameter), piece.dim) for piece in group.zeros}
        zeros = tuple(piece for piece in slices if (piece.parameter, piece.dim) in places)
        return replace(group, size=counts.get(axis, group.size), slices=slices, zeros=zeros)

    return tuple(map(pruned, groups))


def occurrences(term: Term, counts: Mapping[Axis, int] = _WHOLE) -> Iterator[tuple[Axis, tuple[Cut, ...]]]:
    """Every axis of a resolved term with the strided view of its atoms, if ``counts`` atoms of each axis are kept."""
    before, total = 1, count(term, counts)
    if not total:  # a parameter may be empty
        return
    for factor in term:
        own = count((factor,), counts)
        after = total // (before * own)
        if isinstance(factor, Sum):
            offset = 0
            for segment in factor.segments:
                n = count(segment, counts)
                for axis, cuts in occurrences(segment, counts):
                    yield axis, (Cut(before, own, after, offset, n), *cuts)
                offset += n
        else:
            yield factor, (Cut(before, own, after, 0, own),)
        before *= own


def _flow(propagation: Propagation, names: Mapping[Axis, str]) -> nx.DiGraph:
    flow = nx.DiGraph()
    made_by: dict[int, str] = {}

    def carried(index: int) -> tuple[str, ...]:
        terms = propagation.tape.tensors[index]
        return tuple(dict.fromkeys(names[a] for t in terms for a in axes_of(resolve(t)) if a in names))

    for leaf in propagation.graph.leaves:
        made_by[leaf.value.index] = f"{leaf.kind} {leaf.name}"
        flow.add_node(
            made_by[leaf.value.index],
            kind=leaf.kind,
            shape=leaf.value.shape,
            module=leaf.name.rpartition(".")[0],
            groups=carried(propagation.operands[leaf.value].index),
        )
    for i, value in enumerate(propagation.graph.inputs):
        made_by[value.index] = f"input {i}"
        flow.add_node(f"input {i}", kind="input", shape=value.shape, module="", groups=())
    for node in propagation.graph.nodes:
        me = f"node-{node.index}"
        outputs = [value for value in node.outputs if value is not None]
        flow.add_node(
            me,
            kind="operator",
            op=node.name,
            module=node.module,
            source=node.source,
            shape=outputs[0].shape if outputs else (),
            groups=tuple(dict.fromkeys(g for v in outputs for g in carried(propagation.operands[v].index))),
        )
        for value in node.inputs():
            flow.add_edge(made_by[value.index], me)
        for value in (*outputs, *(after for _, after in node.written)):
            made_by[value.index] = me
    for i, value in enumerate(propagation.graph.outputs):
        flow.add_node(f"output {i}", kind="output", shape=value.shape, module="", groups=())
        flow.add_edge(made_by[value.index], f"output {i}")
    return flow
