"""Segments: parts of a network that need not be computed at all if their result is zero (OTOv3, design §10).

If one argument of an addition is zero for every input, its result is the other argument. So a *segment* is an edge into
an addition, its *joint*, with

* its *writers*: the last parameters on every path into the edge. If these are zero, the facts of
  :mod:`oto.axes.invariance` prove that the argument is zero everywhere;
* its *body*: every call that reaches the outputs only through the edge. These are the calls that the edge dominates in
  the reversed data flow graph.

If the joint is a concatenation, its result has fewer entries without the segment: no atom is left of the segment's
*axes*, those of its own entries, and every parameter that reads them shrinks as with fewer channels. This is exact if
no result after the concatenation depends on whether these zeros exist. It is possible if the axes belong to the segment
alone and the concatenation has another argument (:mod:`oto.groups.beside`). A stack gets zeros in the segment's place,
in the shape of its other arguments.

All edges of a network are analyzed together: dominators are computed once, and each zero is propagated only as far as
it reaches. Segments may be nested and share writers: if the outer one is zero, so are the writers inside that they
share.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray

from oto.axes.invariance import Everywhere, is_zero
from oto.axes.propagate import Propagation
from oto.axes.terms import Axis
from oto.groups.beside import CAT, Beside, CannotGo
from oto.groups.node_group import NodeGroup, Slice
from oto.groups.partition import Kept, Partition, Segment
from oto.groups.policy import atoms_of, matching
from oto.trace.graph import Graph, Leaf, Node, Value, effects, write_through

aten = torch.ops.aten

ADDITIONS: Mapping[object, tuple[int, ...]] = {
    aten.add.Tensor: (0, 1),
    aten.add_.Tensor: (0, 1),
    aten.sub.Tensor: (1,),
    aten.sub_.Tensor: (1,),
}
"""Operators that return their other argument if one is zero, with the positions that may be zero."""

TOGETHER = (CAT, aten.stack.default)
"""Operators that concatenate or stack branches."""

ELSEWHERE = "its result is read elsewhere, too"
UNTRAINED = "nothing in it is trained, so nothing of it can become zero"
UNLIKE = "what it is added to depends on other inputs, and may go, too"
UNLIKE_BESIDE = "what it is laid beside depends on other inputs"
_END = "end"


@dataclass(frozen=True)
class Staying:
    """A branch that cannot be removed.

    Attributes:
        node: Index of the joint that it ends at.
        path: Path of the module that computes its result.
        reason: Why it stays.
        cause: Index of the call that is the reason, if one is.
    """

    node: int
    path: str
    reason: str
    cause: int | None = None


@dataclass(frozen=True)
class Edge:
    """An argument of an addition, concatenation or stack.

    Attributes:
        joint: The addition, or the first concatenation or stack that takes the argument.
        value: The argument.
        left: The other argument of an addition; one of the others for a concatenation or stack.
        made: The result of the joint.
        why: Why the joint cannot be computed without the argument; ``None`` if it can.
        into: The indices of all concatenations or stacks that take the argument; empty for an addition.
    """

    joint: Node
    value: Value
    left: Value
    made: Value
    why: str | None = None
    into: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Branches:
    """The branches of a network: the segments, and the branches that stay, each with the reason."""

    segments: tuple[Segment, ...]
    staying: tuple[Staying, ...]


def branches(found: Propagation) -> Branches:
    """Find the segments of a network, in the order of their joints."""
    graph = found.graph
    own, staying = _Run(found, graph).branches()
    if graph.trained is not None:  # a segment must also be one in train mode
        train = {_key(segment): segment for segment in _Run(found, graph.trained).branches()[0]}
        kept = [segment for segment in own if _key(segment) in train]
        lost = [segment for segment in own if _key(segment) not in train]
        staying += [Staying(s.joint, s.name, "in train mode its result is read in another way, too") for s in lost]
        own = [_in_both(segment, train[_key(segment)]) for segment in kept]
    readers = _readers(graph.calls)
    reads: dict[int, list[int]] = {}  # for each call, the indices of the leaves that it reads
    for place, leaf in enumerate(graph.leaves):
        for index in readers.get(leaf.value, ()):
            reads.setdefault(index, []).append(place)
    beside = Beside(found)
    named: list[Segment] = []
    taken: dict[str, int] = {}
    for segment in own:
        read = sorted({place for index in segment.body for place in reads.get(index, ())})
        inside = [leaf for leaf in map(graph.leaves.__getitem__, read) if readers[leaf.value] <= segment.body]
        if outside := [leaf for leaf in segment.writers if leaf not in inside]:
            staying.append(Staying(segment.joint, segment.name, f"{outside[0].name} is read elsewhere, too"))
            continue
        segment = replace(segment, leaves=tuple(inside))
        if graph.calls[segment.joint].op is CAT:
            try:
                segment = beside.proved(segment)
            except CannotGo as why:
                staying.append(Staying(segment.joint, segment.name, why.reason, why.cause))
                continue
        taken[segment.name] = number = taken.get(segment.name, -1) + 1
        named.append(replace(segment, name=f"{segment.name}+{number}" if number else segment.name))
    return Branches(tuple(named), tuple(staying))


def _key(segment: Segment) -> tuple[bool, frozenset[Leaf]]:
    return bool(segment.into), frozenset(segment.writers)


def _in_both(segment: Segment, train: Segment) -> Segment:
    """A segment of eval mode, extended by the calls of the same segment in train mode."""
    joint = frozenset[int]() if train.into else {train.joint}
    return replace(segment, body=segment.body | train.body | joint, into=segment.into | train.into)


def feeds_of(run: Graph) -> dict[Value, int]:
    """For each value of a run, a bit mask of the inputs that it depends on."""
    feeds = {value: 1 << i for i, value in enumerate(run.inputs)}
    for node in run.nodes:
        own = 0
        for value in node.inputs():
            own |= feeds.get(value, 0)
        for made in (*node.outputs, *(after for _, after in node.written)):
            if made is not None:
                feeds[made] = own
    return feeds


def _readers(calls: Iterable[Node]) -> dict[Value, set[int]]:
    found: dict[Value, set[int]] = {}
    for node in calls:
        for value in node.inputs():
            found.setdefault(value, set()).add(node.index)
    return found


class _Run:
    """Finds the branches of one run: the forward pass in eval mode, or that in train mode."""

    def __init__(self, found: Propagation, run: Graph) -> None:
        self.found, self.run = found, run
        self.dead = found.graph.dead | _unread_aliases(run)
        self.nodes = [node for node in run.nodes if node.index not in self.dead]
        self.calls = {node.index: node for node in self.nodes}
        self.maker = {v: n for n in run.nodes for v in (*n.outputs, *(new for _, new in n.written)) if v is not None}
        self.leaves = {leaf.value: leaf for leaf in found.graph.leaves}
        self.readers = _readers(self.nodes)
        self.everywhere = Everywhere(found)
        self.feeds = feeds_of(run)

    @cached_property
    def edges(self) -> list[Edge]:
        """The arguments of additions, concatenations and stacks."""
        found = self._beside_others()
        for node in self.nodes:
            made = node.outputs[0] if node.outputs else None
            for place in (0, 1) if node.op in ADDITIONS else ():
                if len(node.args) < 2 or not all(isinstance(x, Value) for x in node.args[:2]):
                    continue
                value, left = node.args[place], node.args[1 - place]
                if made is not None and value is not left:
                    found.append(Edge(node, value, left, made, _why_not(node, place, value, left, made)))
        return sorted(found, key=lambda edge: edge.joint.index)

    def _beside_others(self) -> list[Edge]:
        """The arguments of concatenations and stacks with several arguments; one edge if several take the same."""
        where: dict[tuple[object, Value], list[tuple[Node, Value]]] = {}
        for node in (node for node in self.nodes if node.op in TOGETHER):
            values = list(dict.fromkeys(x for x in node.inputs() if self.feeds.get(x) and 0 not in x.shape))
            for i, value in enumerate(values if len(values) > 1 else ()):
                where.setdefault((node.op, value), []).append((node, values[i - 1]))
        found: list[Edge] = []
        for (op, value), nodes in where.items():
            (first, left), made = nodes[0], nodes[0][0].outputs[0]
            inputs = [x for node, _ in nodes for x in node.inputs() if self.feeds.get(x)]
            why = UNLIKE_BESIDE if len({self.feeds[x] for x in inputs}) > 1 else None
            if op is not CAT and {(x.shape, x.dtype) for x in inputs} != {(value.shape, value.dtype)}:
                why = "what it is stacked with has another dtype"
            if made is not None:
                found.append(Edge(first, value, left, made, why, tuple(node.index for node, _ in nodes)))
        return found

    def branches(self) -> tuple[list[Segment], list[Staying]]:
        """The segments, named by the module that ends them, and the branches that stay; ``leaves`` are not set yet."""
        segments, staying = list[Segment](), list[Staying]()
        bodies = self._bodies()
        modules = Modules(self.nodes)
        for edge, body in zip(self.edges, bodies, strict=True):
            maker = self.maker.get(edge.value)
            if maker is None or not self.feeds.get(edge.left):
                continue  # the trunk, with a constant added to it
            if edge.why is not None and not self.feeds.get(edge.value):
                continue  # a constant added to the trunk
            if maker.index not in body:  # the trunk, or a branch
                staying += self._read_elsewhere(edge, maker)
                continue
            writers = self._last_parameters(edge.value)
            if not any(self.readers[leaf.value] <= body for leaf in writers):
                staying += self._untrained(edge, body, writers, modules)
                continue
            path = modules.ending(writers[0].name.rpartition(".")[0], body)
            if edge.why is not None:
                staying.append(Staying(edge.joint.index, path, edge.why, edge.joint.index))
            elif needed := self._needed(edge.value, writers):
                path = modules.ending(needed[0].name.rpartition(".")[0], body)
                values, into = (edge.value, edge.left, edge.made), frozenset(edge.into)
                segments.append(Segment(path, Axis(1), edge.joint.index, *values, tuple(needed), body, into=into))
            else:
                staying.append(self._loud(edge, path, writers))
        at = {(segment.joint, segment.edge): segment for segment in segments}
        for segment in segments:  # if two segments are added, either may be removed, so both need the same inputs
            other = None if segment.into else at.get((segment.joint, segment.left))
            if other is not None and self.feeds.get(segment.edge) != self.feeds.get(other.edge):
                staying.append(Staying(segment.joint, segment.name, UNLIKE, segment.joint))
                del at[segment.joint, segment.edge], at[other.joint, other.edge]
        return list(at.values()), staying

    def _read_elsewhere(self, edge: Edge, maker: Node) -> list[Staying]:
        """Why a branch stays whose result has other readers than the addition; empty for the trunk."""
        if edge.into or edge.value in self._before(edge.left, edge.value):
            return []  # the other argument is computed from it
        before = self._before(edge.left)
        own = [
            leaf for leaf in self._last_parameters(edge.value) if self.readers[leaf.value].isdisjoint(before.values())
        ]
        others = self.readers[edge.value] - {edge.joint.index}
        return [Staying(edge.joint.index, maker.module, ELSEWHERE, min(others, default=None))] if own else []

    def _before(self, value: Value, until: Value | None = None) -> dict[Value, int]:
        """The values that a value is computed from, each with the index of its call, -1 if it has none.

        Args:
            until: Stop the search at this value.
        """
        found, todo = dict[Value, int](), [value]
        while todo:
            value = todo.pop()
            if value in found or (until is not None and until in found):
                continue
            node = self.maker.get(value)
            found[value] = -1 if node is None else node.index
            todo += [] if node is None or value is until else node.inputs()
        return found

    def _untrained(self, edge: Edge, body: frozenset[int], writers: Sequence[Leaf], modules: Modules) -> list[Staying]:
        """Why a branch stays in which no parameter can be zeroed; empty for code that no module contains."""
        shared = next((leaf for leaf in writers if not self.readers[leaf.value].isdisjoint(body)), None)
        inside = modules.within(body)
        if shared is not None:
            path = modules.ending(shared.name.rpartition(".")[0], body)
            return [Staying(edge.joint.index, path, f"{shared.name} is read elsewhere, too")]
        if not inside or not writers:
            return []
        return [Staying(edge.joint.index, inside[-1], UNTRAINED)]

    def _bodies(self) -> list[frozenset[int]]:
        """For each edge, the calls that reach an output only through it."""
        flow = nx.DiGraph()  # edges point from a call to the calls that its arguments come from
        each = ((edge.into or (edge.joint.index,), edge.value) for edge in self.edges)
        at = {(index, value): i for i, (joints, value) in enumerate(each) for index in joints}
        for node in self.nodes:
            for value in node.inputs():
                maker = self.maker.get(value)
                if maker is None or maker.index in self.dead:
                    continue
                number = at.get((node.index, value))
                if number is None:
                    flow.add_edge(node.index, maker.index)
                else:
                    flow.add_edge(node.index, ("edge", number))
                    flow.add_edge(("edge", number), maker.index)
        ends = {self.maker[v].index for v in (*self.run.outputs, *self.run.ends) if v in self.maker}
        ends.update(node.index for node in self.nodes if node.written and self.readers.keys().isdisjoint(_made(node)))
        flow.add_edges_from((_END, index) for index in sorted(ends))
        below: dict[object, list[object]] = {}
        for node, above in nx.immediate_dominators(flow, _END).items() if flow else ():
            if node != above:
                below.setdefault(above, []).append(node)
        bodies = [frozenset(_inside(below, ("edge", i))) for i in range(len(self.edges))]
        unread = self._unread(nx.descendants(flow, _END) if _END in flow else set())
        return [body | {index for index, made_of in unread.items() if not body.isdisjoint(made_of)} for body in bodies]

    def _unread(self, reaching: Collection[object]) -> dict[int, set[int]]:
        """The calls from which no output is reached, such as writes to a cache, each with the calls it depends on."""
        unread: dict[int, set[int]] = {}
        for node in self.nodes:
            if node.index not in reaching:
                makers = {self.maker[value].index for value in node.inputs() if value in self.maker}
                unread[node.index] = makers.union(*(unread.get(index, ()) for index in makers))
        return unread

    def _last_parameters(self, value: Value) -> list[Leaf]:
        """The last parameters on every path to a value, except on paths through values that are always zero."""
        found: dict[Leaf, None] = {}
        seen: set[Value] = set()
        todo = [value]
        while todo:
            value = todo.pop()
            node = self.maker.get(value)
            if node is None or value in seen or self._is_silenced(value, ()):
                continue
            seen.add(value)
            inputs = list(dict.fromkeys(node.inputs()))
            own = [leaf for x in inputs if not self.feeds.get(x) for leaf in self._parameters(x)]
            found.update(dict.fromkeys(own))
            if not own or not self._is_silenced(value, own):
                todo += [x for x in reversed(inputs) if self.feeds.get(x)]
        return list(found)

    def _parameters(self, value: Value) -> Iterator[Leaf]:
        """The parameters that may be zeroed among those that a value is computed from, which depends on no input."""
        todo, seen = [value], set[Value]()
        while todo:
            value = todo.pop()
            if value in seen:
                continue
            seen.add(value)
            if value in self.leaves and self.leaves[value].may_be_zeroed and value not in self.run.overwritten:
                yield self.leaves[value]
            elif value in self.maker:
                todo += self.maker[value].inputs()

    def _is_silenced(self, value: Value, zeros: Iterable[Leaf]) -> bool:
        """Whether a value is zero for every input if some parameters are zero."""
        facts = self.everywhere.with_zeros(self.found.operands[leaf.value].index for leaf in zeros)
        index = self.found.operands[value].index
        return is_zero(facts.get(index, self.everywhere.always.get(index)))

    def _loud(self, edge: Edge, path: str, writers: Sequence[Leaf]) -> Staying:
        """Why an edge whose result cannot be proved to be zero is not a segment."""
        names = ", ".join(leaf.name for leaf in writers[:2]) + (", ..." if len(writers) > 2 else "")
        cause = self._first_loud(edge.value, writers)
        reason = f"with {names} at zero it need not be zero"
        return Staying(edge.joint.index, path, reason, None if cause is None else cause.index)

    def _first_loud(self, value: Value, writers: Iterable[Leaf]) -> Node | None:
        """The call nearest to the writers whose result is not known to be zero."""
        facts = self.everywhere.with_zeros(self.found.operands[leaf.value].index for leaf in writers)
        loud: Node | None = None
        node = self.maker.get(value)
        while node is not None:
            loud = node
            inputs = [x for x in node.inputs() if self.feeds.get(x)]
            own = [x for x in inputs if not is_zero(facts.get(self.found.operands[x].index))]
            node = self.maker.get(own[0]) if own and own[0] in self.maker and not _reads(node, writers) else None
        return loud

    def _needed(self, value: Value, writers: Sequence[Leaf]) -> list[Leaf]:
        """The writers that must be zero for the value to be zero; empty if that cannot be proved."""
        tries = [list(writers), *([w for w in writers if w is not one] for one in writers if len(writers) > 1)]
        needed = next((own for own in tries if self._is_silenced(value, own)), [])
        for one in list(needed):
            fewer = [leaf for leaf in needed if leaf is not one]
            if fewer and self._is_silenced(value, fewer):
                needed = fewer
        return needed


def _why_not(node: Node, place: int, value: Value, left: Value, made: Value) -> str | None:
    """Why an addition does not return its other argument if this one is zero; ``None`` if it does."""
    if place not in ADDITIONS[node.op]:
        return "what is taken off it would be left with another sign"
    if place == 0 and node.kwargs.get("alpha", 1) != 1:
        return f"what it is added to is taken {node.kwargs['alpha']} times"
    if not made.shape == left.shape == value.shape:
        return "it is broadcast, or what it is added to is"
    return None if made.dtype == left.dtype else "what it is added to has another dtype than their sum"


def _made(node: Node) -> Iterator[Value]:
    """The results of a call, and the new values of the tensors that it writes to."""
    yield from (value for value in (*node.outputs, *(after for _, after in node.written)) if value is not None)


def _reads(node: Node, leaves: Iterable[Leaf]) -> bool:
    return not {leaf.value for leaf in leaves}.isdisjoint(node.inputs())


def _unread_aliases(run: Graph) -> set[int]:
    """Indices of the calls that mark a write to a tensor that is not read afterwards."""
    used = {*run.outputs, *run.ends}
    unread: set[int] = set()
    for node in reversed(run.nodes):
        if node.op is write_through and used.isdisjoint(node.outputs):
            unread.add(node.index)
        else:
            used.update(node.inputs())
    return unread


def _inside(below: Mapping[object, Iterable[object]], top: object) -> Iterator[int]:
    """All calls below a node of the dominator tree, including it."""
    todo = [top]
    while todo:
        node = todo.pop()
        if isinstance(node, int):
            yield node
        todo += below.get(node, ())


_SAME = {aten.to.dtype, aten.to.dtype_layout, aten.contiguous.default, aten.alias.default, aten.detach.default}


class Modules:
    """The calls of a run by the modules that make them, without calls that return their argument unchanged."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.calls: dict[str, set[int]] = {}
        for node in nodes:
            if node.op in _SAME and {(x.shape, x.dtype) for x in node.inputs()} == {
                (x.shape, x.dtype) for x in node.outputs if x is not None
            }:
                continue
            for path in _ancestors(node.module):
                self.calls.setdefault(path, set()).add(node.index)

    @classmethod
    def of(cls, graph: Graph) -> Modules:
        """All calls of a graph that are not dead, except those that only count calls."""
        counting = _counting(graph)
        return cls(node for node in graph.calls if node.index not in graph.dead and node.index not in counting)

    def ending(self, path: str, body: frozenset[int]) -> str:
        """The outermost module around ``path`` whose calls all lie in a body; ``path`` itself if there is none."""
        around = [outer for outer in _ancestors(path) if outer in self.calls and self.calls[outer] <= body]
        return min(around, key=len, default=path)

    def within(self, calls: Iterable[int]) -> list[str]:
        """The outermost modules whose calls are all among the given ones."""
        some = frozenset(calls)
        inside = [path for path, own in self.calls.items() if path and own <= some]
        return sorted(path for path in inside if not any(path.startswith(f"{outer}.") for outer in inside))


def _counting(graph: Graph) -> set[int]:
    """The calls of train mode that only count how often a module has run, such as ``num_batches_tracked``.

    They read and write only tensors of the model that no other call reads. Python code does not read them either, since
    the tensors had no data during the trace. So these calls can be removed with the module.
    """
    train = graph.trained
    if train is None or train.mode not in ("meta", "fake"):
        return set()
    mine, readers = {leaf.value for leaf in graph.leaves}, _readers(graph.calls)
    read = {*readers, *train.outputs, *train.enclosed}
    return {
        node.index
        for node in train.nodes
        if effects(node.op)[0]
        and all(value in mine and readers[value] == {node.index} for value in node.inputs())
        and read.isdisjoint(_made(node))
    }


def _ancestors(path: str) -> Iterator[str]:
    """``a.b`` -> ``""``, ``a``, ``a.b``."""
    yield ""
    parts = path.split(".") if path else []
    yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


# --- which can be removed together ------------------------------------------------------------------------------------


def legal(
    partition: Partition, kept: Kept, sets: Sequence[tuple[str, set[str]]] | None = None
) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    """Keep some segments that are zero, where the network could not be computed without them.

    Afterwards, every input is read, and every joint that is computed has an argument. The segments that are kept again
    are zero, so the network computes the same function.

    Args:
        sets: The result of :func:`not_all`, if it is known.

    Returns:
        The atoms to keep, and the names of the segments that were added.
    """
    result, back = dict(kept), list[str]()
    sets = not_all(partition) if sets is None else sets
    before, gone = -1, partition.erased(result)
    while before < len(back):  # segments inside a removed one only matter once that one is kept again
        before = len(back)
        for _, members in sets:
            own = [segment for segment in gone if segment.name in members]
            if len(own) < len(members):
                continue
            apart = next((s for s in own if not any(_joints(s) <= other.body for other in gone)), None)
            if apart is not None:
                result[apart.name] = np.arange(1)
                back.append(apart.name)
                gone = partition.erased(result)
    return result, back


def not_all(partition: Partition) -> list[tuple[str, set[str]]]:
    """The sets of segments of which at least one must stay, each with a name."""
    if not partition.segments:
        return []
    beside = list(_beside_each_other(partition))
    return [*beside, *_reading_inputs(partition, {name for _, members in beside for name in members})]


# --- the network without them -----------------------------------------------------------------------------------------


def not_computed(segments: Iterable[Segment]) -> frozenset[int]:
    """The calls that are not made without some segments: their bodies, and the additions that they end at."""
    return frozenset().union(*(s.body if s.into else s.body | {s.joint} for s in segments))


def _joints(segment: Segment) -> frozenset[int]:
    """The indices of the additions, concatenations and stacks that take a segment's result."""
    return segment.into or frozenset({segment.joint})


def idle(partition: Partition, groups: Iterable[NodeGroup], kept: Kept) -> set[str]:
    """The names of the node groups that are gone with removed segments: those inside, and those of their axes."""
    gone = partition.erased(kept)
    inside = {name for segment in gone for leaf in segment.leaves for name in leaf.names}
    axes = {axis for segment in gone for axis in segment.axes}
    return {
        g.name
        for g in groups
        if not g.segment and (partition.axes[g.name] in axes or {piece.parameter for piece in g.slices} <= inside)
    }


def overwritten(graph: Graph, segment: Segment, erased: Sequence[Segment]) -> bool:
    """Whether removing a segment would let an in-place write corrupt a tensor that is read later.

    Without the segment, the result of its joint and the joint's other argument are the same tensor. This checks whether
    a call writes to one of them while the other is read later.

    Args:
        erased: All removed segments.
    """
    gone = not_computed(erased)
    nodes = [node for node in graph.nodes if node.index > segment.joint and node.index not in gone]
    joints = [(s.left, s.made) for s in erased if s is not segment and not s.into]
    one, other = _aliases(graph, segment.left, joints), _aliases(graph, segment.made, joints)
    last = {value: node.index for node in nodes for value in node.inputs()}
    last.update((value, len(graph.calls)) for value in (*graph.outputs, *graph.ends))
    for node in nodes:
        for place, name in effects(node.op)[0]:
            written = node.args[place] if place < len(node.args) else node.kwargs.get(name)
            for own, beside in ((one, other), (other, one)):
                if written in own and any(last.get(value, -1) > node.index for value in beside):
                    return True
    return False


def _aliases(graph: Graph, value: Value, joints: Iterable[tuple[Value, Value]]) -> set[Value]:
    """The values that may share memory with ``value``.

    Args:
        joints: Pairs of values that are the same tensor.
    """
    sharing = nx.Graph(joints)
    sharing.add_node(value)
    for node in graph.nodes:
        for place, name in (places for kind in effects(node.op) for places in kind):
            given = node.args[place] if place < len(node.args) else node.kwargs.get(name)
            for x in given if isinstance(given, list | tuple) else [given]:
                if isinstance(x, Value):
                    sharing.add_edges_from((x, made) for made in node.outputs if made is not None)
        sharing.add_edges_from(node.written)
        if node.op is write_through:
            sharing.add_edge(node.args[0], node.outputs[0])
    return set(nx.node_connected_component(sharing, value))


# --- as node groups ---------------------------------------------------------------------------------------------------


def with_segments(partition: Partition) -> tuple[Partition, Branches]:
    """The partition with its segments, and all branches with the reasons why others stay."""
    found = branches(partition.found)
    names = {group.name for group in partition.groups}
    clear = tuple(replace(s, name=f"{s.name}+") if s.name in names else s for s in found.segments)
    axes = {**partition.axes, **{segment.name: segment.axis for segment in clear}}
    return Partition(partition.found, partition.groups, axes, clear), replace(found, segments=clear)


MinDepth = int | float | Mapping[str, int | float]
"""Minimum number of members that a run of repeated blocks keeps: an int; a float, as a share; or a mapping from globs
of module paths to either."""


def segment_groups(partition: Partition, min_depth: MinDepth = 1) -> tuple[NodeGroup, ...]:
    """The node group of each segment: one atom; ``zeros`` are the writers, ``slices`` all parameters.

    Columns that read the entries of a concatenated segment are removed with it as well, but are not among its slices,
    since they need not be zero.

    Raises:
        TargetError: ``min_depth`` is neither a number of members nor a share of them.
        UnknownParameterError: A name or glob in ``min_depth`` matches no segment.
    """
    sets = not_all(partition)
    runs = runs_of(partition.segments)
    least = _least(runs, min_depth, [segment.name for segment in partition.segments])
    made = []
    for segment in partition.segments:
        parameters = {leaf.name: leaf for leaf in segment.leaves if leaf.kind == "parameter"}
        writers = {leaf.name for leaf in segment.writers}
        pieces = {name: Slice.whole(name, leaf.value.shape) for name, leaf in parameters.items()}
        among = [(name, 1) for name, members in sets if segment.name in members]
        among += [(run, least[run]) for run, members in runs.items() if segment.name in members and least.get(run)]
        zeros = *(piece for name, piece in pieces.items() if name in writers), *segment.behind
        slices = *pieces.values(), *segment.behind
        made.append(NodeGroup(segment.name, 1, slices, zeros, min_kept=0, segment=True, among=tuple(among)))
    return tuple(made)


def _least(runs: Mapping[str, Sequence[str]], asked: MinDepth, names: Sequence[str]) -> dict[str, int]:
    """The minimum number of members that each run keeps."""
    least: dict[str, int] = {}
    for pattern, number in asked.items() if isinstance(asked, Mapping) else [("*", asked)] if names else []:
        hits = set(matching([pattern], names))
        for run, members in runs.items():
            if not hits.isdisjoint(members):
                own = min(atoms_of(number, len(members), "min_depth", "segments"), len(members))
                least[run] = max(least.get(run, 0), own)
    return dict.fromkeys(runs, 1) | least


def require_depth(asked: Any) -> None:
    """Refuse a ``min_depth`` that means nothing, whether or not any segment may go.

    Raises:
        TargetError: A number is negative, or a share above 1.
    """
    for number in asked.values() if isinstance(asked, Mapping) else [asked]:
        atoms_of(number, 1, "min_depth", "segments")


def runs_of(segments: Sequence[Segment]) -> dict[str, list[str]]:
    """Segments of repeated blocks, by their path with one number replaced by a star.

    If a path has several numbers, the one is replaced that gives the run with the most members.
    """
    runs: dict[str, list[str]] = {}
    for segment in segments:
        for run in _stars(segment.name):
            runs.setdefault(run, []).append(segment.name)
    best: dict[str, list[str]] = {}
    for segment in segments:
        longest = max(_stars(segment.name), key=lambda run: len(runs[run]), default=None)
        if longest is not None and len(runs[longest]) > 1:
            best.setdefault(longest, []).append(segment.name)
    return best


def _stars(name: str) -> list[str]:
    """The variants of a path in which one of its numbers is replaced by a star."""
    parts = name.split(".")
    return [".".join([*parts[:i], "*", *parts[i + 1 :]]) for i, part in enumerate(parts) if re.fullmatch(r"\d+", part)]


def _beside_each_other(partition: Partition) -> Iterator[tuple[str, set[str]]]:
    """The sets of segments that are all arguments of one joint, which needs at least one of them."""
    by_joint: dict[int, set[str]] = {}
    for segment in partition.segments:
        for joint in _joints(segment):
            by_joint.setdefault(joint, set()).add(segment.name)
    graph = partition.found.graph
    feeds = feeds_of(graph) if any(segment.into for segment in partition.segments) else {}
    for joint, members in sorted(by_joint.items()):
        if joint >= len(graph.nodes):  # a call of train mode
            continue
        node = graph.nodes[joint]
        if len(members) >= (
            len({x for x in node.inputs() if feeds.get(x) and 0 not in x.shape}) if node.op in TOGETHER else 2
        ):
            yield f"into node-{joint}", members


def _reading_inputs(partition: Partition, beside: set[str]) -> Iterator[tuple[str, set[str]]]:
    """The sets of segments without which an input of the model would no longer reach an output; at least one must stay.

    Args:
        beside: Names of segments to leave out, since they are in a set of one joint already.
    """
    graph = partition.found.graph
    cut = {(joint, s.edge): s for s in partition.segments if s.name not in beside for joint in _joints(s)}
    for i, given in enumerate(graph.inputs):
        whole, without = _reached(graph, given, {}), _reached(graph, given, cut)
        if not whole.isdisjoint(graph.outputs) and without.isdisjoint(graph.outputs):
            index = {node.index for node in graph.nodes if not without.isdisjoint(node.inputs())}
            inside = [s for s in dict.fromkeys(cut.values()) if not index.isdisjoint(s.body)]
            outermost = {s.name for s in inside if not any(s.body < other.body for other in inside)}
            yield f"of input {i}", outermost


def _reached(graph: Graph, value: Value, cut: Mapping[tuple[int, Value], Segment]) -> set[Value]:
    """The values that depend on ``value`` if some edges are cut."""
    reached = {value}
    for node in graph.nodes:
        if any(x in reached and (node.index, x) not in cut for x in node.inputs()):
            reached.update(made for made in (*node.outputs, *(after for _, after in node.written)) if made is not None)
    return reached
