"""Turn a recorded run into a module that can be run again, for models that ``torch.export`` cannot trace.

The module repeats the calls of one run on the example. Sizes, numbers that left torch (``.item()``) and branches are
those of the example; inputs with other shapes are refused.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from oto._torch import tree_leaves, tree_map_only
from oto.errors import EmitterError
from oto.trace.export import Exported, builtin
from oto.trace.graph import Graph, Mode, Node, Value, write_through
from oto.trace.inputs import arguments
from oto.trace.record import record_data
from oto.trace.run import Recording

BUILT_IN = "the model makes the same calls there, with other numbers or sizes than those that were built in"


def replayed(model: nn.Module, dummy_input: Any, known: Callable[[Any], bool], mode: Mode) -> Exported:
    """Record ``model`` on the data of the example, and make a module from the calls.

    Args:
        known: As for ``record``.
        mode: The mode in which the analyzed graph was recorded; what it knew without data holds here too.

    Raises:
        TraceError: ``forward`` fails on the example.
        EmitterError: A call or an input cannot be put into a graph.
    """
    recording = record_data(model, dummy_input, known)
    leaves, held = _tensors(model, recording)
    graph = fx.Graph()
    made = dict(zip(recording.graph.inputs, _inputs(graph, model, dummy_input), strict=True))
    made.update((leaf.value, graph.get_attr(name)) for name, leaf in leaves.items())
    nodes = tuple(_put(graph, node, made) for node in recording.graph.nodes)
    results = iter([made[value] for value in recording.graph.outputs])
    graph.output(tree_map_only(Tensor, lambda _: next(results), builtin(recording.result)))
    named = tuple(replace(leaf, names=(name, *leaf.names[1:])) for name, leaf in leaves.items())
    module = fx.GraphModule(held, graph).eval()
    return Exported(module, replace(recording.graph, nodes=nodes, leaves=named, mode=mode), dynamic=False)


def difference(one: Recording, other: Recording) -> str | None:
    """How two recordings differ; ``None`` if one graph is valid for both."""

    def calls(graph: Graph) -> list[list[Any]]:
        plain = [
            tree_map_only(Value, lambda value: ("value", value.index), (n.args, dict(n.kwargs))) for n in graph.nodes
        ]
        return [[(type(leaf), leaf) for leaf in tree_leaves(arguments)] for arguments in plain]

    if [node.op for node in one.graph.nodes] != [node.op for node in other.graph.nodes]:
        return "the model makes other calls there"
    constants = [list(recording.constants.values()) for recording in (one, other)]
    same = len(constants[0]) == len(constants[1]) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*constants, strict=True)
    )
    if not same or calls(one.graph) != calls(other.graph):
        return BUILT_IN
    return None


def _tensors(model: nn.Module, recording: Recording) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The leaves under the names by which they are read, and their tensors."""
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    read = {value for node in recording.graph.nodes for value in node.inputs()} | set(recording.graph.outputs)
    leaves: dict[str, Any] = {}
    held: dict[str, Tensor] = {}
    for leaf in recording.graph.leaves:
        if leaf.value in read:
            name = leaf.names[0] if leaf.names else f"_constant_{leaf.value.index}"
            leaves[name] = leaf
            held[name] = recording.constants[leaf.value] if leaf.kind == "constant" else own[name]
    return leaves, held


def _inputs(graph: fx.Graph, model: nn.Module, dummy_input: Any) -> list[fx.Node]:
    """Add placeholders named like ``forward``'s parameters; returns the nodes of their tensors in recorded order."""
    args, kwargs = arguments(dummy_input)
    signature = inspect.signature(model.forward)
    bound = signature.bind(*args, **kwargs).arguments
    places: dict[int, fx.Node] = {}
    optional = False

    def visit(node: fx.Node, given: Any) -> None:
        if isinstance(given, Tensor):
            places[id(given)] = node
        elif isinstance(given, list | tuple | Mapping):
            parts = given.items() if isinstance(given, Mapping) else enumerate(given)
            for key, part in parts:
                if any(isinstance(leaf, Tensor) for leaf in tree_leaves(part)):
                    visit(graph.call_function(operator.getitem, (node, key)), part)
        elif any(isinstance(leaf, Tensor) for leaf in tree_leaves(given)):
            raise EmitterError(
                f"a recording takes tensors in lists, tuples and dicts, not in a {type(given).__name__}\n"
                "  effect  no graph can be emitted"
            )

    placeholders = []
    for name, parameter in signature.parameters.items():
        stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
        optional = optional or parameter.default is not parameter.empty
        default = {} if stars or not optional else {"default_value": None}
        placeholders.append((name, graph.placeholder(f"{stars}{name}", **default)))
    for name, node in placeholders:
        if name in bound:
            visit(node, bound[name])
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    found = [places[id(tensor)] for tensor in tensors]
    for node, tensor in zip(found, tensors, strict=True):
        graph.call_function(torch.ops.aten._assert_tensor_metadata.default, (node, list(tensor.shape)))
    return found


def _put(graph: fx.Graph, node: Node, made: dict[Value, fx.Node]) -> Node:
    """Add a call to the graph; returns the node with the fx node as its origin."""
    if node.op is write_through:  # the alias shares memory with the tensor that was written to
        (alias, _), (after,) = node.args, node.outputs
        assert after is not None
        made[after] = made[alias]
        return node
    returns = [str(value.type) for value in node.op._schema.returns] if hasattr(node.op, "_schema") else ["no tensor"]
    if any(kind != "Tensor" for kind in returns) and returns != ["List[Tensor]"]:
        raise EmitterError(
            f"a recording cannot hold {node}: its arguments or results are not only tensors and numbers\n"
            "  effect  no graph can be emitted"
        )
    args, kwargs = tree_map_only(Value, made.__getitem__, (node.args, dict(node.kwargs)))
    call = graph.call_function(node.op, args, kwargs)
    for i, value in enumerate(node.outputs):
        if value is not None:
            made[value] = call if returns == ["Tensor"] else graph.call_function(operator.getitem, (call, i))
    for before, after in node.written:
        made[after] = made[before]
    return replace(node, origin=call)
