"""``torch.export``: the graph that can be run again. No other file calls it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import logging
import operator
import re
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from oto._torch import OpOverload, example_size, is_free, quiet, tree_leaves, tree_map, tree_map_only
from oto.errors import EmitterError, first_line, out_of_memory
from oto.trace.found import as_found, is_foreign
from oto.trace.graph import Graph, GraphBuilder, Key
from oto.trace.record import arguments, line_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Exported:
    """A program that can be run, rewritten and saved, and what ``oto`` reads off it.

    Attributes:
        module: A plain ``torch.fx.GraphModule`` that takes and returns what the model does.
        graph: The same calls as a :class:`Graph`; ``origin`` of each node is its ``fx.Node``.
        dynamic: Whether the batch dimension is free.
    """

    module: fx.GraphModule
    graph: Graph
    dynamic: bool


def export_program(
    model: nn.Module, dummy_input: Any, portable: bool = False
) -> tuple[torch.export.ExportedProgram, bool]:
    """Export ``model`` in eval mode, with a free batch dimension where the model allows it.

    Args:
        portable: Give outputs as dicts, lists and tuples, so that the program loads where the model's own output types
            were never imported.

    Raises:
        EmitterError: ``torch.export`` cannot follow the model.
    """
    as_given = arguments(dummy_input)
    failure: Exception | None = None
    with (
        as_found(model, dummy_input),
        _plain_outputs(model, builtin if portable else plain),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for dynamic in (True, False):
            try:
                given = _two(as_given) if dynamic else as_given
                shapes = _free_batch(model, *given) if dynamic else None
                with redirect_stderr(io.StringIO()), quiet():  # where it fails, torch prints the whole graph
                    program = torch.export.export(model, given[0], given[1], dynamic_shapes=shapes, strict=False)
                free = dynamic and _is_free(program, _batch(*given))
                if free or given is as_given:
                    return program, free
                log.info("torch.export settled on a batch of two, which is not the example's: exported again")
            except Exception as problem:
                if out_of_memory(problem):
                    raise
                failure = failure or problem
                log.info("torch.export with a %s batch failed: %s", "free" if dynamic else "fixed", problem)
    raise EmitterError(
        f"torch.export cannot follow {type(model).__name__}: {_cause(failure)}\n"
        "  effect  no graph can be emitted, and no model.pt2 written\n"
        "  to fix  branches on values and custom objects are the usual causes; torch.export's own message is above"
    ) from failure


# what torch.export says, and what it means
_CAUSES = {
    r"data-dependent|GuardOnDataDependent|Could not (guard|extract)|unbacked": "a branch or a size depends on values",
    r"Dim\.|dynamic dim|[Cc]onstraints violated|specializ": "the code states the size of the batch",
    r"pytree|[Uu]nsupported (input|output) type|custom object": "an object of the model's own goes in or out",
    r"\.data|set_|mutat": "the code writes to a tensor of the model",
}


def _cause(failure: BaseException | None) -> str:
    """torch.export's message, cut to the user's line and the likely cause."""
    assert failure is not None
    likely = next((means for says, means in _CAUSES.items() if re.search(says, f"{type(failure)} {failure}")), None)
    line = line_of(failure) or next(iter(re.findall(r'File "([^"]+)", line (\d+)', str(failure))), "")
    line = line if isinstance(line, str) else ":".join(line)
    said = re.sub(r"\b[us]\d+\b", "a size", first_line(failure, 160))
    return said + (f"\n  at      {line}" if line else "") + (f"\n  cause   {likely}, it seems" if likely else "")


@contextmanager
def _plain_outputs(model: nn.Module, plainly: Callable[[Any], Any]) -> Iterator[None]:
    """While inside, ``forward`` gives plain data: torch.export takes no objects with a behaviour, such as caches."""
    forward = model.forward
    own = vars(model).get("forward")

    @functools.wraps(forward)
    def plain_forward(*args: Any, **kwargs: Any) -> Any:
        return plainly(forward(*args, **kwargs))

    vars(model)["forward"] = plain_forward
    try:
        yield
    finally:
        del vars(model)["forward"]
        if own is not None:
            vars(model)["forward"] = own


def plain(output: Any) -> Any:
    """An output as plain data: dataclasses become dicts, objects that hold no plain data become ``None``."""

    def leaf(x: Any) -> Any:
        if x is None or isinstance(x, Tensor | int | float | bool | str):
            return x
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return {f.name: plain(getattr(x, f.name)) for f in dataclasses.fields(x)}
        return None

    return tree_map(leaf, output)


def builtin(output: Any) -> Any:
    """An output made of dicts, lists and tuples only."""
    if output is None or isinstance(output, Tensor | int | float | bool | str):
        return output
    if isinstance(output, Mapping):
        return {key: builtin(value) for key, value in output.items()}
    if isinstance(output, list):
        return [builtin(item) for item in output]
    if isinstance(output, tuple):
        return tuple(builtin(item) for item in output)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {f.name: builtin(getattr(output, f.name)) for f in dataclasses.fields(output)}
    return None


def _batch(args: Any, kwargs: Any) -> int | None:
    return next((t.shape[0] for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim), None)


def _two(given: Any) -> Any:
    """A batch of one is special to torch.export: show it two."""
    if _batch(*given) != 1:
        return given
    return tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.ndim and t.shape[0] == 1 else t, given)


def _free_batch(model: nn.Module, args: Any, kwargs: Any) -> Any:
    batch = _batch(args, kwargs)
    bound = inspect.signature(model.forward).bind(*args, **kwargs)

    def free(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return {0: torch.export.Dim.AUTO} if leaf.ndim and leaf.shape[0] == batch else {}
        return None

    return {name: tree_map(free, value) for name, value in bound.arguments.items()}


def _is_free(program: torch.export.ExportedProgram, batch: int | None) -> bool:
    """Whether every input that has the batch dimension may have another one."""
    given = set(program.graph_signature.user_inputs)
    inputs = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in given]
    first = [x.shape[0] for x in inputs if isinstance(x, Tensor) and x.ndim]
    leading = [n for n in first if is_free(n) or n == batch]
    return bool(leading) and all(map(is_free, leading))


def _taken_apart(program: torch.export.ExportedProgram, known: Callable[[Any], bool]) -> torch.export.ExportedProgram:
    table = torch.export.default_decompositions()
    calls = {
        node.target
        for part in program.graph_module.modules()
        if isinstance(part, fx.GraphModule)
        for node in part.graph.nodes
        if node.op == "call_function" and any(isinstance(leaf, Tensor) for leaf in tree_leaves(node.meta.get("val")))
    }
    unknown = {op: table[op] for op in calls if isinstance(op, OpOverload) and not known(op) and op in table}
    return program.run_decompositions(unknown) if unknown else program


def export(model: nn.Module, dummy_input: Any, known: Callable[[Any], bool] = lambda op: True) -> Exported:
    """Trace ``model`` to a module that can be rewritten.

    Args:
        known: As for ``record``: a composite operator that is not known is taken apart.

    Raises:
        EmitterError: ``torch.export`` cannot follow the model.
    """
    program, dynamic = export_program(model, dummy_input)
    program = _taken_apart(program, known)
    options = inspect.signature(program.module).parameters
    module = program.module(check_guards=False) if "check_guards" in options else program.module()
    assert isinstance(module, fx.GraphModule)
    _inline(module)
    trainable = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    try:
        graph = _read(module, trainable)
    except TypeError as failure:
        raise EmitterError(
            f"a tensor of {type(model).__name__} has a size that depends on values\n"
            "  effect  no graph can be emitted, and no model.pt2 written"
        ) from failure
    live = {node.origin for node in graph.nodes}
    for node in reversed(module.graph.nodes):  # torch keeps whatever may draw a random number
        if node.op == "call_function" and not node.users and node not in live:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return Exported(module, graph, dynamic)


def _inline(module: fx.GraphModule) -> None:
    """Put the bodies of wrappers (``torch.no_grad``, autocast) in their place."""
    wrappers = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
    graph = module.graph
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name not in wrappers:
            continue
        if name == "wrap_with_autocast" and node.args[2]:
            raise EmitterError(
                "forward turns torch.autocast on, which a graph does not keep\n"
                "  effect  no graph can be emitted, and no model.pt2 written\n"
                "  to fix  turn autocast on around the model instead of inside it"
            )
        body_node, *operands = node.args[wrappers[name] :]
        body = getattr(module, body_node.target)
        _inline(body)
        inputs = iter(operands)
        place: dict[fx.Node, fx.Node] = {}
        result: Any = None
        with graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op == "placeholder":
                    place[inner] = next(inputs)
                elif inner.op == "output":
                    result = inner.args[0]
                elif inner.op == "get_attr":
                    setattr(
                        module, f"{body_node.target}_{inner.target}".replace(".", "_"), _attribute(body, inner.target)
                    )
                    place[inner] = graph.get_attr(f"{body_node.target}_{inner.target}".replace(".", "_"))
                    place[inner].meta = inner.meta
                else:
                    place[inner] = graph.node_copy(inner, place.__getitem__)
        for user in list(node.users):
            assert user.target is operator.getitem, user
            user.replace_all_uses_with(place[result[user.args[1]]])
            graph.erase_node(user)
        graph.erase_node(node)
    module.recompile()


def _attribute(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _read(module: fx.GraphModule, trainable: dict[str, bool]) -> Graph:
    builder = GraphBuilder("export")
    keys: dict[fx.Node, Hashable] = {}
    outputs: list[Hashable] = []
    tensors: dict[int, Hashable] = {}

    def put(add: Callable[..., None], key: Hashable, tensor: Tensor, *more: Any) -> None:
        add(key, [example_size(n) for n in tensor.shape], tensor.dtype, *more)

    def seen(x: Any) -> Any:
        """An argument as the builder wants it: tensors by key, symbolic sizes by the example's."""
        if isinstance(x, fx.Node):
            if x in keys:
                return Key(keys[x])
            value = x.meta.get("val")
            return example_size(value) if isinstance(value, torch.SymInt | int) else value
        return x

    for node in module.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            if isinstance(value, Tensor):
                keys[node] = node
                put(builder.input, node, value)
        elif node.op == "get_attr":
            tensor = _attribute(module, node.target)
            if not isinstance(tensor, Tensor):
                continue
            if id(tensor) in tensors:
                keys[node] = tensors[id(tensor)]
                continue
            keys[node] = tensors[id(tensor)] = node
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            put(builder.leaf, node, tensor, [node.target], kind, trainable.get(node.target, False))
        elif node.op == "output":
            outputs = [keys[x] for x in tree_leaves(node.args) if isinstance(x, fx.Node) and x in keys]
        elif node.target is operator.getitem:
            source = node.args[0]
            if isinstance(value, Tensor):
                keys[node] = (source, node.args[1])
        elif any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), seen)
            into = _returns_written(node)
            results: list[Any] = []
            for i, leaf in enumerate(tree_leaves(value)):
                key: Hashable = keys[into] if into is not None else node if leaf is value else (node, i)
                shape = [example_size(n) for n in leaf.shape] if isinstance(leaf, Tensor) else None
                results.append(None if shape is None else (key, shape, leaf.dtype))
            if isinstance(value, Tensor):
                keys[node] = results[0][0]
            builder.call(node.target, args, kwargs, results, *_whence(node), node)
    return builder.build(outputs)


def _returns_written(node: fx.Node) -> fx.Node | None:
    """The argument that an in-place operator writes into and gives back."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or len(schema.returns) != 1 or schema.returns[0].alias_info is None:
        return None
    if not schema.returns[0].alias_info.is_write:
        return None
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found = node.args[i] if i < len(node.args) else node.kwargs[argument.name]
            assert isinstance(found, fx.Node)
            return found
    return None


def _whence(node: fx.Node) -> tuple[str, str]:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [f"{file}:{line}" for file, line in lines if is_foreign(file)]
    return path, own[-1] if own else ""
