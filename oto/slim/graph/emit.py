"""The graph emitter: rewrite the exported graph with thinner tensors and matching sizes."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from oto._torch import is_free, tree_leaves, tree_map_only
from oto.axes.call import Size, Uniform
from oto.axes.propagate import Propagation, propagate
from oto.axes.terms import Axis, size_of, survivors
from oto.errors import EmitterError
from oto.groups import Kept, Partition, Slice
from oto.groups.beside import CAT
from oto.groups.partition import Segment, occurrences
from oto.groups.segments import branches, not_computed, overwritten
from oto.slim.edits import owner_of
from oto.slim.graph.layers import follow_device, name_leaves
from oto.slim.graph.module import SlimGraph
from oto.slim.pruned_shapes import PrunedShapes, parameter_like
from oto.trace.export import Exported
from oto.trace.graph import Leaf, Node, Value

aten = torch.ops.aten

_BY_COUNT = {aten.chunk.default, aten.unsafe_chunk.default, aten.tensor_split.sections}


def emit_graph(exported: Exported, partition: Partition, kept: Kept) -> SlimGraph:
    """Build the slim model as a ``torch.fx.GraphModule`` with the argument names of ``forward``.

    The entries to keep were chosen on the recorded graph. They are known for each parameter, so they carry over.

    Raises:
        EmitterError: The exported graph couples parameter dimensions differently from the recorded one.
    """
    graph = replace(exported.graph, output_names=partition.found.graph.output_names)
    pruned = PrunedShapes(propagate(graph, partition.found.strict_out_nodes), {})
    entries = entries_of(partition, kept)
    carry_over(
        pruned, {leaf.value: (leaf.name, entries[leaf.name]) for leaf in exported.graph.leaves if leaf.name in entries}
    )
    ranks = ranks_of(exported)
    gone = partition.erased(kept)
    module = pruned_module(exported, pruned, erased_in(pruned.found, gone) if gone else ())
    slim = SlimGraph(module, exported.module.graph, exported.takes)
    name_leaves(slim, exported.module, ranks)
    slim.graph.lint()
    slim.recompile()
    return slim


def entries_of(partition: Partition, kept: Kept) -> dict[str, list[NDArray[np.bool_]]]:
    """For each parameter name and each dimension of the parameter, which entries survive."""
    return {
        name: partition.entries(leaf.value, kept)
        for leaf in partition.found.graph.leaves
        if leaf.kind == "parameter"
        for name in leaf.names
    }


def ranks_of(exported: Exported) -> dict[fx.Node, int]:
    """The number of dimensions of each node's tensor."""
    return {n: val.ndim for n in exported.module.graph.nodes if isinstance(val := n.meta.get("val"), Tensor)}


def erased_in(found: Propagation, gone: Sequence[Segment]) -> list[Segment]:
    """The segments of an exported graph that have the same writers as the given segments of the recorded graph.

    Raises:
        EmitterError: The exported graph has no such segment.
    """
    there: dict[frozenset[str], list[Segment]] = {}
    for segment in branches(found).segments:
        there.setdefault(_writers(segment), []).append(segment)
    found_in: list[Segment] = []
    for segment in gone:
        if not (same := there.get(_writers(segment))):
            raise EmitterError(
                f"the exported graph has no segment that ends at {segment.name}\n"
                "  effect  no graph can be emitted without it\n"
                "  to fix  keep it: skip_patterns=[...], and report the model"
            )
        found_in += same
    return sorted(found_in, key=lambda segment: segment.joint)


def _writers(segment: Segment) -> frozenset[str]:
    return frozenset(name for leaf in segment.writers for name in leaf.names)


def _erase(exported: Exported, segments: Sequence[Segment], slim: fx.GraphModule) -> None:
    """Replace the joints of segments by their other argument, and remove calls and tensors that are then unused."""
    gone = not_computed(segments)
    origins = {node.origin for node in exported.graph.nodes if node.index in gone}
    readers: dict[Value, list[Node]] = {}
    for node in exported.graph.nodes:
        for value in node.inputs():
            readers.setdefault(value, []).append(node)
    for segment in segments:
        if segment.into:
            continue
        joint = exported.graph.nodes[segment.joint]
        place = next(i for i, x in enumerate(joint.args[:2]) if x is segment.left)
        left = joint.origin.args[place]
        if overwritten(exported.graph, segment, segments):
            with slim.graph.inserting_after(joint.origin):
                left = slim.graph.call_function(aten.clone.default, (left,))
        joint.origin.replace_all_uses_with(left, delete_user_cb=lambda user, own=left: user is not own)
        for reader in readers.get(segment.made, []):  # a joint that was written to in place may be read by its old name
            for ours, theirs in zip(*_arguments(reader), strict=True):
                if ours is segment.made:
                    reader.origin.replace_input_with(theirs, left)
    _without(exported, segments, gone)
    ends = ("placeholder", "output")
    slim.graph.eliminate_dead_code(lambda node: node.op in ends or (node.is_impure() and node not in origins))
    used = {n.target for n in slim.graph.nodes if n.op in ("get_attr", "call_module")}
    for name, _ in [*slim.named_parameters(remove_duplicate=False), *slim.named_buffers(remove_duplicate=False)]:
        parent, _, last = name.rpartition(".")
        if name not in used and parent not in used:
            delattr(slim.get_submodule(parent), last)


def _without(exported: Exported, segments: Iterable[Segment], gone: frozenset[int]) -> None:
    """Remove segments from concatenations, and replace them by zeros in stacks."""
    away: dict[int, set[Value]] = {}
    for segment in segments:
        for index in segment.into - gone:
            away.setdefault(index, set()).add(segment.edge)
    for joint in (exported.graph.nodes[index] for index in away):
        given = list(zip(joint.args[0], joint.origin.args[0], strict=True))
        left = [own for value, own in given if value not in away[joint.index]]
        if joint.op is not CAT:
            with joint.origin.graph.inserting_before(joint.origin):
                zeros = joint.origin.graph.call_function(aten.zeros_like.default, (left[0],))
            left = [zeros if value in away[joint.index] else own for value, own in given]
        joint.origin.args = (left, *joint.origin.args[1:])


def _arguments(node: Node) -> tuple[list[Any], list[Any]]:
    """The flattened arguments of a call, and those of the fx node that it was read from."""
    ours = tree_leaves((list(node.args), dict(node.kwargs)))
    return ours, tree_leaves((list(node.origin.args), dict(node.origin.kwargs)))


def pruned_module(exported: Exported, pruned: PrunedShapes, erased: Sequence[Segment] = ()) -> fx.GraphModule:
    """Rewrite the exported module with pruned sizes and tensors; its graph is changed in place.

    Args:
        erased: Segments of its graph that are left out.
    """
    source = exported.module
    slim = fx.GraphModule(source, source.graph)
    inputs = _tensors_of(exported)
    for node in exported.graph.nodes:
        rewrite = pruned.found.tape.rewrites.get(node.index)
        if rewrite is not None and pruned.changes(rewrite):
            _apply(node, rewrite.op, rewrite.args, dict(rewrite.kwargs), pruned, inputs)
    if erased:
        _erase(exported, erased, slim)
    follow_device(slim.graph)
    for node in slim.graph.nodes:  # the shapes recorded at export no longer hold
        node.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
        if node.target is torch.ops.aten.view.default:  # thinner tensors may have other strides
            node.target = torch.ops.aten.reshape.default
    leaves, made = _leaves(exported), dict[int, Tensor]()
    # tensors are identified by id, so keep every old one alive until all are replaced
    held = {n.target: getattr(*owner_of(slim, n.target)) for n in slim.graph.nodes if n.op == "get_attr"}
    for target, old in held.items():
        owner, name = owner_of(slim, target)
        if id(old) in leaves and id(old) not in made:
            new = pruned.prune(leaves[id(old)], old)
            made[id(old)] = parameter_like(old, new) if isinstance(old, nn.Parameter) else new
        if id(old) in made:
            setattr(owner, name, made[id(old)])
    return slim


def _leaves(exported: Exported) -> dict[int, Leaf]:
    """The leaf of each tensor of the module, by the tensor's id."""
    return {id(getattr(*owner_of(exported.module, leaf.name))): leaf for leaf in exported.graph.leaves}


def carry_over(pruned: PrunedShapes, wanted: Mapping[Value, tuple[str, Sequence[NDArray[np.bool_]]]]) -> None:
    """Choose the surviving atoms of this graph from the surviving entries of some tensors, each with its name.

    Raises:
        EmitterError: The graph cannot lose these entries, or would lose others with them.
    """
    masks: dict[Axis, NDArray[np.bool_]] = {}
    for value, (name, entries) in wanted.items():
        for term, mask in zip(pruned.found.terms(value), entries, strict=True):
            for axis, cuts in occurrences(term):
                own = Slice("", 0, cuts).of(torch.from_numpy(mask)).reshape(axis.size, -1).any(1).numpy()
                masks[axis] = masks[axis] & own if axis in masks else own
                if axis.fixed is not None and not own.all():
                    raise EmitterError(
                        f"the exported graph cannot prune {name}: {axis.fixed.text}\n"
                        "  effect  no graph can be emitted for this choice of entries\n"
                        "  to fix  mark the parameter unprunable, and report the model"
                    )
    for value, (name, entries) in wanted.items():
        for dim, (term, mask) in enumerate(zip(pruned.found.terms(value), entries, strict=True)):
            if not np.array_equal(survivors(term, masks), mask):
                raise EmitterError(
                    f"the exported graph couples dimension {dim} of {name} to others, the recorded one does not\n"
                    "  effect  no graph can be emitted for this choice of entries\n"
                    "  to fix  mark the parameter unprunable, and report the model"
                )
    pruned.masks = masks


def _tensors_of(exported: Exported) -> dict[Value, fx.Node]:
    """The fx node of each value, taken from the arguments of a node that reads it."""
    found: dict[Value, fx.Node] = {}
    for node in exported.graph.nodes:
        if node.origin is not None:
            found.update((a, b) for a, b in zip(*_arguments(node), strict=True) if isinstance(a, Value))
    return found


def _apply(node: Node, op: Any, args: Any, kwargs: Any, pruned: PrunedShapes, inputs: dict[Value, fx.Node]) -> None:
    origin: fx.Node = node.origin

    def call(op: Any, args: Any, kwargs: Any) -> fx.Node:
        return origin.graph.call_function(op, *tree_map_only(Value, inputs.__getitem__, (args, kwargs)))

    def build(template: Any, old: Any) -> Any:
        if isinstance(template, Value):
            return inputs[template]
        if isinstance(template, Uniform):
            return template.computed(call, {})
        if isinstance(template, list | tuple):
            olds = old if isinstance(old, list | tuple) and len(old) == len(template) else [None] * len(template)
            return [build(t, o) for t, o in zip(template, olds, strict=True)]
        if not isinstance(template, Size):
            return template
        return _scaled(origin.graph, old, pruned.size(template), size_of(template.term))

    with origin.graph.inserting_before(origin):
        if op is aten.split_with_sizes.default and _cut_by_share(origin, args[2], pruned.filled(args[1])):
            return
        old_args = list(origin.args) + [None] * len(args)
        new_args = tuple(build(t, o) for t, o in zip(args, old_args, strict=False))
        new_kwargs = {name: build(t, origin.kwargs.get(name)) for name, t in kwargs.items()}
    origin.target = op
    origin.args = new_args
    origin.kwargs = new_kwargs


def _scaled(graph: fx.Graph, old: Any, new: int, before: int) -> Any:
    """The argument for a size that shrinks from ``before`` to ``new``; a symbolic one (batch · heads) is scaled."""
    if not isinstance(old, fx.Node):
        return new
    if new == before:
        return old
    return graph.call_function(operator.floordiv, (graph.call_function(operator.mul, (old, new)), before))


def _cut_by_share(origin: fx.Node, dim: int, new: list[int]) -> bool:
    """Split a dimension that includes the batch into thinner pieces of symbolic size; ``False`` if it is not one."""
    pieces: Any = origin.meta.get("val", ())
    free = [is_free(piece.shape[dim]) for piece in pieces]
    if origin.target is aten.split_with_sizes.default or not any(free):  # sizes are arguments, or plain numbers
        return False
    if origin.target in _BY_COUNT and len(set(new)) == 1:
        return True
    graph, x = origin.graph, origin.args[0]
    *others, last = [i for i, symbolic in enumerate(free) if symbolic]
    sizes: list[Any] = list(new)
    rest: Any = graph.call_function(aten.sym_size.int, (x, dim))
    for n, symbolic in zip(new, free, strict=True):
        rest = rest if symbolic else graph.call_function(operator.sub, (rest, n))
    sizes[last] = rest  # the remainder, so that the pieces add up even if the division has a rest
    for i in others:
        sizes[i] = _scaled(graph, rest, new[i], sum(new[k] for k in (*others, last)))
        sizes[last] = graph.call_function(operator.sub, (sizes[last], sizes[i]))
    origin.target, origin.args, origin.kwargs = aten.split_with_sizes.default, (x, sizes, dim), {}
    return True
