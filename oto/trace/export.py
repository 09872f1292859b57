"""Trace a model with ``torch.export`` to a graph that can be run again. No other file calls it."""

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

from oto._torch import (
    OpOverload,
    count_conditions,
    example_size,
    expression,
    guards_of,
    is_free,
    python_code,
    quiet,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
)
from oto.errors import EmitterError, first_line, reraise_out_of_memory
from oto.trace.graph import Graph, GraphBuilder, Key
from oto.trace.inputs import arguments
from oto.trace.recorder import around_modules
from oto.trace.snapshot import preserved
from oto.trace.takes import Parameter, Takes, parameters_of, traced
from oto.user_code import is_foreign, line_of

log = logging.getLogger(__name__)

LEVELS = ("all", "batch", "none")  # which dimensions of the inputs are free
# torch.export checks every condition on sizes against all others. Networks with more than a few dozen conditions fix
# their sizes anyway (windows, padding), and exporting them would take minutes.
_MOST_CONDITIONS = 64


@dataclass(frozen=True, eq=False)
class Exported:
    """A program that can be run, rewritten and saved, with what ``oto`` needs to know about it.

    Attributes:
        module: A plain ``torch.fx.GraphModule`` with the arguments and results of the model.
        graph: The same calls as a :class:`Graph`; ``origin`` of each node is its ``fx.Node``.
        dynamic: Whether the batch dimension is free.
        level: Which input dimensions were exported as free, one of ``LEVELS``.
        takes: The arguments and sizes that it accepts.
        why: Why no more dimensions are free, if a freer export failed.
    """

    module: fx.GraphModule
    graph: Graph
    dynamic: bool
    level: str = "none"
    takes: Takes | None = None
    why: str | None = None

    def other_sizes(self, dummy_input: Any) -> list[list[tuple[int, ...]]]:
        """:meth:`Takes.other_sizes` for the example; shapes are in the order of its tensors."""
        return [] if self.takes is None else self.takes.other_sizes(*arguments(dummy_input))


@dataclass(frozen=True, eq=False)
class Program:
    """The result of ``torch.export``; ``level`` and ``dynamic`` as in :class:`Exported`."""

    program: torch.export.ExportedProgram
    dynamic: bool
    level: str
    why: str | None


def export_program(
    model: nn.Module, dummy_input: Any, portable: bool = False, level: str = "all", name: str | None = None
) -> Program:
    """Export ``model`` in eval mode; every input dimension is free that the model leaves free.

    If that fails, or needs too many conditions on sizes, only the batch is free; if that fails too, nothing is.

    Args:
        portable: Return outputs as dicts, lists and tuples, so that the program loads where the model's own output
            types were never imported.
        level: The first of ``LEVELS`` to try.
        name: How messages call the model; by default by its class.

    Raises:
        EmitterError: ``torch.export`` cannot trace the model.
    """
    as_given = arguments(dummy_input)
    two = _two(as_given)
    failures: list[Exception] = []
    ways = [(way, two) for way in LEVELS[LEVELS.index(level) : -1]] + [("none", as_given)]
    with (
        preserved(model, dummy_input),
        _plain_outputs(model, builtin if portable else plain),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        while ways:
            way, given = ways.pop(0)
            try:
                shapes = None if way == "none" else _free(model, given, way == "all")
                with redirect_stderr(io.StringIO()), quiet(), _few_conditions():  # torch prints the whole graph
                    program = torch.export.export(model, given[0], given[1], dynamic_shapes=shapes, strict=False)
                if way == "all":
                    _conditions(program)
                free = way != "none" and _is_free(program, _batch(*given))
                if free or given is as_given:
                    return Program(program, free, way, str(failures[0]) if failures else None)
                log.info("torch.export settled on a batch of two, which is not the example's: exported again")
                ways = [(way if way == "all" else "none", as_given), ("none", as_given)]
            except Exception as problem:
                reraise_out_of_memory(problem)
                failures.append(problem)
                log.info("torch.export with free dimensions %r failed: %s", way, problem)
    failure = failures[-1] if isinstance(failures[0], _TooManyConditions) else failures[0]
    raise EmitterError(
        f"torch.export cannot follow {name or type(model).__name__}: {_cause(failure)}\n"
        "  effect  no graph can be emitted, and no model.pt2 written\n"
        "  to fix  look for branches on values and custom objects, the usual causes; torch.export's message is above"
    ) from failure


class _TooManyConditions(Exception):
    """The model's code compares its sizes too often to leave them all free."""


@contextmanager
def _few_conditions() -> Iterator[None]:
    """Context manager in which modules that run on free sizes raise once too many conditions have been collected."""

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        for tensor in args:
            for size in tensor.shape if isinstance(tensor, Tensor) else ():
                if is_free(size):
                    if count_conditions(size) > _MOST_CONDITIONS:
                        raise _TooManyConditions("the model's code compares its sizes too often to leave all free")
                    return

    with around_modules(look):
        yield


# patterns in messages of torch.export, and their likely causes
_CAUSES = {
    r"data-dependent|GuardOnDataDependent|Could not (guard|extract)|unbacked": "a branch or a size depends on values",
    r"Dim\.|dynamic dim|[Cc]onstraints violated|specializ": "the code states the size of the batch",
    r"pytree|[Uu]nsupported (input|output) type|custom object": "an object of the model's own goes in or out",
    r"\.data|set_|mutat": "the code writes to a tensor of the model",
}


def _cause(failure: BaseException | None) -> str:
    """The first line of torch.export's message, with the user's line of code and the likely cause."""
    assert failure is not None
    likely = next((means for says, means in _CAUSES.items() if re.search(says, f"{type(failure)} {failure}")), None)
    line = line_of(failure) or next(iter(re.findall(r'File "([^"]+)", line (\d+)', str(failure))), "")
    line = line if isinstance(line, str) else ":".join(line)
    said = re.sub(r"\b[us]\d+\b", "a size", first_line(failure, 160))
    return said + (f"\n  at      {line}" if line else "") + (f"\n  cause   {likely}, it seems" if likely else "")


@contextmanager
def _plain_outputs(model: nn.Module, plainly: Callable[[Any], Any]) -> Iterator[None]:
    """Context manager in which ``forward`` returns plain data: torch.export rejects custom objects such as caches."""
    forward = model.forward
    own = vars(model).get("forward")

    @functools.wraps(forward)
    def plain_forward(*args: Any, **kwargs: Any) -> Any:
        return plainly(forward(*args, **kwargs))

    plain_forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]  # of a bound method, without self
    vars(model)["forward"] = plain_forward
    try:
        yield
    finally:
        del vars(model)["forward"]
        if own is not None:
            vars(model)["forward"] = own


def plain(output: Any) -> Any:
    """An output as plain data: dataclasses become dicts, other objects ``None``."""

    def leaf(x: Any) -> Any:
        if x is None or isinstance(x, Tensor | int | float | bool | str):
            return x
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return {f.name: plain(getattr(x, f.name)) for f in dataclasses.fields(x)}
        return None

    return tree_map(leaf, output)


def builtin(output: Any) -> Any:
    """An output converted to built-in dicts, lists and tuples; other objects become ``None``."""
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


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _batch(args: Any, kwargs: Any) -> int | None:
    return next((t.shape[0] for t in _tensors((args, kwargs)) if t.ndim), None)


def _two(given: Any) -> Any:
    """The arguments with a batch of two in place of one, which torch.export would treat as a constant."""
    if _batch(*given) != 1:
        return given
    return tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.ndim and t.shape[0] == 1 else t, given)


def _free(model: nn.Module, given: Any, all_of_them: bool) -> Any:
    """The dimensions that may be free, for each tensor; torch.export finds out which of these cannot be."""
    (args, kwargs), batch, auto = given, _batch(*given), torch.export.Dim.AUTO
    bound = inspect.signature(model.forward).bind(*args, **kwargs)

    def free(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        if all_of_them:  # torch treats sizes of zero and one as constants
            return {dim: auto for dim, n in enumerate(leaf.shape) if n > 1}
        return {0: auto} if leaf.ndim and leaf.shape[0] == batch else {}

    return {name: tree_map(free, value) for name, value in bound.arguments.items()}


def _is_free(program: torch.export.ExportedProgram, batch: int | None) -> bool:
    """Whether every input that has the batch dimension may have a different batch size."""
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
    written = {op: code for op in calls if not known(op) and (code := python_code(op)) is not None}
    if written:
        try:
            apart: torch.export.ExportedProgram = program.run_decompositions({**unknown, **written})
            return apart
        except Exception as failure:  # an operator's code may do anything with data
            reraise_out_of_memory(failure)
            log.info("the code of an operator cannot be followed: %s", first_line(failure))
    return program.run_decompositions(unknown) if unknown else program


def export(
    model: nn.Module, dummy_input: Any, known: Callable[[Any], bool] = lambda op: True, level: str = "all"
) -> Exported:
    """Trace ``model`` to a module that can be rewritten.

    Args:
        known: As for ``record``: a composite operator that is not known is decomposed.
        level: As for :func:`export_program`.

    Raises:
        EmitterError: ``torch.export`` cannot trace the model.
    """
    made = export_program(model, dummy_input, level=level)
    program = _taken_apart(made.program, known)
    module = module_of(program)
    takes = takes_of(made.program, module, parameters_of(model.forward))
    args, kwargs = arguments(dummy_input)
    if made.level != "none" and not takes.holds(takes.bind(args, kwargs)):
        # torch.export needs sizes of at least two to find free dimensions; with these the model took another path
        log.info("what is free at level %r does not hold for the example: exported again", made.level)
        return export(model, dummy_input, known, LEVELS[LEVELS.index(made.level) + 1])
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
    for node in reversed(module.graph.nodes):  # torch keeps dead nodes that may draw random numbers
        if node.op == "call_function" and not node.users and node not in live:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return Exported(module, graph, made.dynamic, made.level, takes, made.why)


def module_of(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """An exported program as a module; its inputs are checked by :class:`Takes`."""
    options = inspect.signature(program.module).parameters
    module = program.module(check_guards=False) if "check_guards" in options else program.module()
    assert isinstance(module, fx.GraphModule)
    return module


def _conditions(program: torch.export.ExportedProgram) -> list[str]:
    """The conditions on sizes; conditions on strides and offsets only describe the example's memory layout."""
    guards = guards_of(program)
    if guards is None:
        raise NotImplementedError("this torch does not say under which conditions an exported program holds")
    return [text for text in guards if ".stride()" not in text and ".storage_offset()" not in text]


def takes_of(
    program: torch.export.ExportedProgram, module: fx.GraphModule, parameters: tuple[Parameter, ...] = ()
) -> Takes:
    """The inputs that the module of an exported program accepts.

    Args:
        parameters: The parameters of the model's ``forward``; by default the arguments of the module.
    """
    tensors = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    leaves = [
        argument.value if hasattr(argument := spec.arg, "value") else tensors[argument.name]
        for spec in program.graph_signature.input_specs
        if spec.kind.name == "USER_INPUT"
    ]
    args, kwargs = tree_unflatten(leaves, program.call_spec.in_spec)
    names = list(inspect.signature(module.forward).parameters)
    values = dict(zip(names, args, strict=False)) | kwargs
    conditions, free, sizes, symbols = list[str](), dict[str, tuple[int, ...]](), dict[str, Any](), dict[str, int]()

    def visit(place: str, shown: str, value: Any) -> None:
        if isinstance(value, Tensor):
            sizes[place] = tuple(expression(n) if is_free(n) else int(n) for n in value.shape)
            free[shown] = tuple(dim for dim, n in enumerate(value.shape) if is_free(n))
            for dim, n in enumerate(value.shape):
                if not is_free(n):
                    conditions.append(f"{place}.size()[{dim}] == {int(n)}")
                elif dim:
                    conditions.append(f"{place}.size()[{dim}] >= 2")  # torch.export assumed that no size is one
                if is_free(n) and parameters and expression(n).isidentifier():
                    symbols[expression(n)] = example_size(n)
        elif isinstance(value, Mapping) or type(value) in (list, tuple):
            for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
                visit(f"{place}[{key!r}]", f"{shown}[{key!r}]", part)

    for name in names:
        visit(f"L[{name!r}]", name, values[name])
    conditions += _conditions(program) if guards_of(program) is not None else []
    given = {name: traced(values[name]) for name in names}
    return Takes(parameters, given, tuple(dict.fromkeys(conditions)), free, sizes, symbols)


def _inline(module: fx.GraphModule) -> None:
    """Inline the bodies of wrappers (``torch.no_grad``, autocast)."""
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
        """An argument as the builder expects it: keys for tensors, the example's sizes for symbolic ones."""
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
    """The argument that an in-place operator writes into and returns."""
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
