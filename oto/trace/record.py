"""Run a model once and write down every ATen call.

The run happens under ``torch.inference_mode``: composite operators (``linear``, ``scaled_dot_product_attention``,
``einsum`` …) then arrive whole, the level at which ``torch.export`` works too. Three ways are tried in turn: tensors on
``meta``, which know their shapes only; fake tensors, which know their device too; and, for a model that needs data
(``.item()``, a branch on a value), the real run on the example. A model that takes gradients in its forward is run once
more with autograd, which takes composite operators apart.

The model is left as it was: parameters and buffers are swapped for the run by ``torch.func.functional_call``, and
``found.py`` takes back what ``forward`` does besides.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from os import sep
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from oto._torch import (
    DisableTorchFunction,
    FakeTensorMode,
    HigherOrderOperator,
    TorchDispatchMode,
    fake_empty,
    python_code,
    quiet,
    tree_leaves,
    tree_map_only,
)
from oto.errors import OTOError, TraceError, first_line, out_of_memory, reraise_out_of_memory, some
from oto.nn.calls import first_tensor, name_of, numbers_of, running
from oto.nn.overridden import OverriddenForward
from oto.trace.graph import Graph, GraphBuilder, Node, Value, effects
from oto.trace.inputs import Arguments, arguments
from oto.trace.shapes import Remembered, result_of
from oto.trace.snapshot import (
    Snapshot,
    is_foreign,
    modules_by_path,
    modules_of,
    preserved,
    standing_in,
    state_of,
    tensors_by_path,
)

log = logging.getLogger(__name__)


@contextmanager
def around_modules(
    enter: Callable[[nn.Module, Any], None], leave: Callable[[nn.Module, Any, Any], None] | None = None
) -> Iterator[None]:
    """While inside, every module that runs is shown before, with its arguments, and after, whatever it raises."""
    hooks = [nn.modules.module.register_module_forward_pre_hook(enter)]
    if leave is not None:
        hooks.append(nn.modules.module.register_module_forward_hook(leave, always_call=True))
    try:
        with warnings.catch_warnings():  # compiled submodules mind the hooks
            warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global hooks")
            yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """A graph, and what its run met besides: enough to run it again.

    Attributes:
        constants: What the constants among the leaves held, if the run was made on data.
        result: What ``forward`` returned.
    """

    graph: Graph
    constants: Mapping[Value, Tensor]
    result: Any


def record(
    model: nn.Module,
    dummy_input: Any,
    known: Callable[[Any], bool] = lambda op: True,
    dead: bool = False,
    training: bool = False,
) -> Graph:
    """Trace ``model`` on one example input.

    Args:
        model: Any module, on any device, ``meta`` included. Its mode, gradients, buffers and the random state are left
            as they were; the run is made in eval mode.
        dummy_input: A tensor, a tuple of positional arguments or a dict of keyword arguments.
        known: Whether an operator is to be written down as it is. A composite operator that is not known is taken
            apart into those that it is made of.
        dead: Keep calls whose results reach no output; the model's class makes them all the same.
        training: Where parameters are not reached in eval mode, look at what train mode does, too.

    Raises:
        DummyInputError: ``dummy_input`` is of the wrong type.
        TraceError: ``forward`` fails on the example.
    """
    args, kwargs = arguments(dummy_input)
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            f"the model is TorchScript ({type(model).__name__}), whose parameters cannot be told apart while it runs\n"
            "  effect   there is nothing to analyze; the model is as it was\n"
            "  to fix   give the Python module that it was made of"
        )
    lazy = [name for name, p in model.named_parameters() if isinstance(p, nn.UninitializedParameter)]
    if lazy:
        raise TraceError(
            f"parameters of {type(model).__name__} have no shape yet: {some(lazy)}\n"
            "  effect   there is nothing to analyze; the model is as it was\n"
            "  to fix   call model(dummy_input) once, so that its lazy modules learn their sizes"
        )
    ways = ["meta", "fake"] if on_meta(model) else ["meta", "fake", "real", "grad"]
    failures: dict[str, Exception] = {}
    for way in ways:
        try:
            with preserved(model, dummy_input) as found:
                _in_analyzed_form(model)
                graph = _run(model, args, kwargs, known, way, found).recording(dead).graph
        except Exception as failure:
            reraise_out_of_memory(failure)
            traceback.clear_frames(failure.__traceback__)  # they hold tensors
            failures[way] = failure
            log.info("%s tensors do not carry this model: %s", way, failure)
        else:
            found.warn_of_what_is_left()
            return _with_training(graph, model, dummy_input, known, ways[ways.index(way) :]) if training else graph
    plainest = failures.get("real") or failures["fake"]
    if isinstance(plainest, TraceError):
        raise plainest
    raise TraceError(_message(model, args, kwargs, plainest)) from plainest


def record_data(model: nn.Module, dummy_input: Any, known: Callable[[Any], bool] = lambda op: True) -> Recording:
    """The run of ``model`` on the data of one example, in which branches go as its values say.

    Raises:
        DummyInputError: ``dummy_input`` is of the wrong type.
        TraceError: ``forward`` fails on the example.
    """
    args, kwargs = arguments(dummy_input)
    failures: list[Exception] = []
    for way in ("real", "grad"):
        try:
            with preserved(model, dummy_input) as found:
                return _run(model, args, kwargs, known, way, found).recording(False)
        except Exception as failure:
            reraise_out_of_memory(failure)
            failures.append(failure)
    raise TraceError(_message(model, args, kwargs, failures[0])) from failures[0]


@dataclasses.dataclass(frozen=True)
class FunctionCall:
    """A call of a torch function, as Python code makes it.

    Attributes:
        name: What the function is called.
        numbers: The numbers among its arguments, in their order.
        within: The modules that were running, from the outside inwards: the path of each, and its how manieth run.
        nodes: The calls of operators that it consists of.
        lines: The lines of code that were running, as :mod:`oto.nn.calls` has them.
        begins: For each module in ``within``, how many of these were running when it was called.
        takes: The shape of its first tensor.
    """

    name: str
    numbers: tuple[int | float, ...]
    within: tuple[tuple[str, int], ...]
    nodes: range
    lines: tuple[str, ...]
    begins: tuple[int, ...]
    takes: tuple[int, ...] | None

    def site(self, level: int) -> str:
        """Where it is made in the forward of a module in ``within``."""
        return "\n".join(self.lines[self.begins[level] :])


@dataclasses.dataclass
class Script:
    """The decisions of a run on data: whole numbers, truth values and what leaves torch, in their order.

    A run that follows a script takes them from there, so that it takes the same path, whatever its own tensors hold.
    """

    written: list[tuple[Any, list[Any]]] = dataclasses.field(default_factory=list)
    read: int | None = None

    def take(self, op: Any, result: Any) -> Any:
        """Write a result down, or put what stands in the script in its place."""
        leaves = [result] if isinstance(result, Tensor) else tree_leaves(result)
        decides = [not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()) for x in leaves]
        if not any(decides):
            return result
        if self.read is None:
            self.written.append((op, [x.clone() if isinstance(x, Tensor) else x for x in leaves]))
            return result
        if self.read < len(self.written) and self.written[self.read][0] is op:
            before = self.written[self.read][1]
            self.read += 1
            for place, (new, old, own) in enumerate(zip(leaves, before, decides, strict=False)):
                if not (own and isinstance(new, Tensor) and isinstance(old, Tensor)):
                    continue
                if new.shape != old.shape:  # how many there are may be a decision, too
                    if op.namespace != "aten" or torch.Tag.dynamic_output_shape in op.tags:
                        leaves[place] = old.clone()
                elif 0 not in new.stride():  # an expanded one repeats what was put in its place before
                    new.copy_(old)
            if isinstance(result, Tensor):
                return leaves[0]
            if isinstance(result, tuple | list) and all(x is None or isinstance(x, Tensor) for x in result):
                return type(result)(leaves)
            if len(leaves) == len(before) == 1 and not isinstance(result, Tensor | tuple | list):
                return before[0]
        return result


def follow(
    model: nn.Module,
    dummy_input: Any,
    known: Callable[[Any], bool],
    way: str,
    functions: list[FunctionCall] | None = None,
    script: Script | None = None,
    limit: int | None = None,
    literals: list[FunctionCall] | None = None,
    found: Snapshot | None = None,
    bare: bool = False,
) -> tuple[tuple[Node, ...], Exception | None]:
    """Every call that ``model`` makes on the example, dead ones too, until it fails; and how it fails, if it does.

    Args:
        way: How tensors are stood for, as in :attr:`Graph.how`: ``"meta"``, ``"fake"`` or ``"real"``.
        functions: Where to write down the torch functions that are called.
        script: Where to write down what the run decides by its data, or whence to take it.
        limit: How many calls to follow, if not all.
        literals: Where to write down the functions that make a tensor of numbers, which are no calls of operators.
        found: What is put back afterwards, where that is known: for a copy that is thrown away, what the model holds.
        bare: Whether ``model`` is a copy that is put back by ``found`` and holds its tensors nowhere but in its modules
            and in lists and dicts of these, so that they may be swapped there.
    """
    args, kwargs = arguments(dummy_input)
    builder = GraphBuilder(way, limit=limit)
    try:
        with preserved(model, dummy_input, found) as found:
            _in_analyzed_form(model)
            _run(model, args, kwargs, known, way, found, builder, functions, script, literals, bare)
    except Exception as failure:  # anything that the user's own forward may raise
        reraise_out_of_memory(failure)
        return tuple(builder.nodes[:limit]), None if builder.full else failure
    return tuple(builder.nodes), None


def _message(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], failure: Exception) -> str:
    shown = tree_map_only(Tensor, lambda t: f"{t.dtype} {tuple(t.shape)} on {t.device}", (args, kwargs))
    positional = [f"  input    {i}: {value}" for i, value in enumerate(shown[0])]
    named = [f"  input    {name}={value}" for name, value in shown[1].items()]
    return "\n".join(
        [
            f"{type(model).__name__}.forward failed on the dummy input: {first_line(failure)}",
            *([f"  at       {line}"] if (line := line_of(failure)) else []),
            *positional,
            *named,
            "  effect   there is no graph to analyze; the model is as it was",
            "  to fix   check that model(dummy_input) (model(*tuple), model(**dict)) runs by itself in eval mode",
        ]
    )


def _with_training(graph: Graph, model: nn.Module, dummy_input: Any, known: Any, ways: Sequence[str]) -> Graph:
    """The graph, with that of train mode where it reaches more parameters, such as those of heads for training only."""
    idle = graph.idle & {name for name, _ in model.named_parameters()}
    if not idle:
        return graph
    args, kwargs = _doubled(arguments(dummy_input))
    failure: Exception | None = None
    for way in ways:
        try:
            with preserved(model, dummy_input) as found:
                _in_analyzed_form(model)
                for module in model.modules():
                    module.training = True
                trained = _run(model, args, kwargs, known, way, found).recording(False).graph
        except Exception as problem:  # it may want targets, or a batch of another kind
            reraise_out_of_memory(problem)
            traceback.clear_frames(problem.__traceback__)
            failure = failure or problem
            log.info("%s tensors do not carry this model in train mode: %s", way, problem)
        else:
            quiet_nodes = tuple(map(_without_dropout, trained.nodes))
            return graph.beside(dataclasses.replace(trained, nodes=quiet_nodes)) if idle - trained.unread else graph
    assert failure is not None
    return dataclasses.replace(graph, untrained=first_line(failure, 120))


def _without_dropout(node: Node) -> Node:
    """The call as it is when nothing is dropped: what is dropped is no part of the structure."""
    schema = getattr(node.op, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else []
    calm = {"dropout": 0.0, "dropout_p": 0.0} | ({"train": False} if names[1:3] == ["p", "train"] else {})
    args = tuple(calm.get(name, value) for name, value in zip(names, node.args, strict=False)) if names else node.args
    kwargs = {name: calm.get(name, value) for name, value in node.kwargs.items()}
    return dataclasses.replace(node, args=args, kwargs=kwargs)


def _doubled(given: Arguments) -> Arguments:
    """A batch of one twice: batch norm trains on more than one value."""
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and leaf.ndim]
    if not tensors or tensors[0].shape[0] != 1:
        return given
    twice: Arguments = tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.ndim and t.shape[0] == 1 else t, given)
    return twice


def _in_analyzed_form(model: nn.Module) -> None:
    """Let modules that have another form for the analysis (those of ``oto.nn``, and those of the user's own that are
    told sizes) run in it, until all is put back."""
    for module in modules_of(model):
        forward = vars(module).get("forward")
        if hasattr(type(module), "_oto_analyzed"):
            vars(module)["forward"] = module._oto_analyzed
        elif isinstance(forward, OverriddenForward):
            forward.as_analyzed().install()


def on_meta(model: nn.Module) -> bool:
    """Whether parameters have shapes and no values."""
    return any(p.is_meta for p in model.parameters())


def _empty(t: Tensor) -> Tensor:
    with DisableTorchFunction():
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _stand_ins(way: str, inputs: Any, stack: ExitStack) -> tuple[Callable[[Tensor], Tensor], FakeTensorMode | None]:
    """Set the way up; what stands for a real tensor in it, and the mode of those that are fake."""
    if way == "meta":
        stack.enter_context(torch.device("meta"))
        return _empty, None
    if way == "grad":
        return lambda t: t.detach().clone().requires_grad_(t.requires_grad), None
    if way == "real":
        return lambda t: t.detach() if isinstance(t, nn.Parameter) else t.detach().clone(), None
    stack.enter_context(quiet())
    mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
    device = next((t.device for t in tree_leaves(inputs) if isinstance(t, Tensor) and not t.is_meta), None)

    def fake(t: Tensor) -> Tensor:
        if t.is_meta and device is not None:  # parameters on meta meet real inputs: let both be on one device
            return fake_empty(mode, t.shape, t.stride(), t.dtype, device)
        return mode.from_tensor(t)

    return fake, mode


class _Held:
    """The parameters and buffers of a model, and what stands for each of them in a run.

    Attributes:
        named: The tensors by every name that they have.
        names: The names of each, by its id.
        made: What stands for each, by its id.
    """

    def __init__(self, modules: Mapping[str, nn.Module], bare: bool) -> None:
        self.modules, self.bare = modules, bare
        self.named = tensors_by_path(modules)
        self.names: dict[int, list[str]] = {}
        for name, tensor in self.named.items():
            self.names.setdefault(id(tensor), []).append(name)
        self.made: dict[int, Tensor] = {}

    def make(self, stand_in: Callable[[Tensor], Tensor]) -> None:
        with DisableTorchFunction():
            self.made = {key: stand_in(self.named[own[0]]) for key, own in self.names.items()}

    def write_down(self, recorder: _Recorder, inputs: Any) -> None:
        """Let the tensors and the inputs be known."""
        builder = recorder.builder
        for key, tensor in self.made.items():
            first = self.named[self.names[key][0]]
            parameter = isinstance(first, nn.Parameter)
            recorder.hold(tensor)
            builder.leaf(
                id(tensor),
                tensor.shape,
                tensor.dtype,
                self.names[key],
                "parameter" if parameter else "buffer",
                parameter and first.requires_grad,
            )
        for leaf in tree_leaves(inputs):
            if isinstance(leaf, Tensor):
                recorder.hold(leaf)
                builder.input(id(leaf), leaf.shape, leaf.dtype)

    def call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
        """The result of a model that holds what stands for its tensors; and what its forward puts in their place."""
        # a module that the model holds twice is swapped once, or its own tensors would not come back
        places: dict[tuple[int, str], str] = {}
        for name in self.named:
            path, _, last = name.rpartition(".")
            places.setdefault((id(self.modules[path]), last), name)
        swapped = {name: self.made[id(self.named[name])] for name in places.values()}
        if self.bare:
            for module in self.modules.values():
                tables: tuple[dict[str, Any], ...] = module._parameters, module._buffers
                for table in tables:
                    table.update({key: self.made[id(t)] for key, t in table.items() if id(t) in self.made})
            result = model(*args, **kwargs)
            now = tensors_by_path(self.modules)
            after = {name: now[name] for name in swapped if name in now}
        else:
            after = swapped
            result = torch.func.functional_call(model, swapped, args, kwargs, tie_weights=False)
        return result, {name: t for name, t in after.items() if t is not self.made[id(self.named[name])]}


@dataclasses.dataclass(frozen=True)
class _Ran:
    """What a run came to.

    Attributes:
        result: What ``forward`` returned.
        outputs: The tensors in it, by where they are.
        replaced: Names of tensors of the model in whose place the forward put others.
    """

    recorder: _Recorder
    result: Any
    outputs: Sequence[tuple[str, Tensor]]
    replaced: frozenset[str]

    def recording(self, dead: bool) -> Recording:
        builder = self.recorder.builder
        graph = builder.build([id(tensor) for _, tensor in self.outputs], dead)
        names = tuple(name or "output" for name, _ in self.outputs)
        graph = dataclasses.replace(graph, replaced=self.replaced, output_names=names)
        return Recording(graph, self.recorder.constants, self.result)


def _run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: Any,
    way: str,
    found: Snapshot,
    builder: GraphBuilder | None = None,
    functions: list[FunctionCall] | None = None,
    script: Script | None = None,
    literals: list[FunctionCall] | None = None,
    bare: bool = False,
) -> _Ran:
    modules = modules_by_path(model)
    held = _Held(modules, bare)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad() if way == "grad" else torch.inference_mode())
        stand_in, fake = _stand_ins(way, (args, kwargs), stack)
        stack.enter_context(found.making_anew())
        builder = GraphBuilder("real" if way == "grad" else way) if builder is None else builder
        recorder = _Recorder(builder, known, modules, found)
        recorder.script, recorder.fake = script, fake
        held.make(stand_in)
        run_args, run_kwargs = tree_map_only(Tensor, stand_in, (args, kwargs))
        with DisableTorchFunction():
            held.write_down(recorder, (run_args, run_kwargs))
        stack.enter_context(standing_in(model, held.made, deep=not bare))
        stack.enter_context(recorder.following(modules, sys._getframe()))
        stack.enter_context(recorder)
        if functions is not None:
            stack.enter_context(_Functions(recorder, functions))
        if literals is not None:
            stack.enter_context(_Functions(recorder, literals, LITERALS))
        result, replaced = held.call(model, run_args, run_kwargs)
        outputs = list(named_tensors_in(result))
        if not outputs:
            raise TraceError(_gives_no_tensor(model, result))
        kept = [t for t in state_of(model, result, run_args, run_kwargs) if id(t) in builder.current]
        kept += replaced.values()
    for tensor in (*(tensor for _, tensor in outputs), *kept):
        recorder.see(tensor)
    for tensor in kept:
        builder.end(id(tensor))
    if builder.writes("parameter"):
        found.writes_parameters()
    return _Ran(recorder, result, outputs, frozenset(replaced))


def _gives_no_tensor(model: nn.Module, result: Any) -> str:
    kinds = some(dict.fromkeys(type(leaf).__name__ for leaf in tree_leaves(result)) or [type(result).__name__])
    return (
        f"{type(model).__name__}.forward gives no tensor: what it returned is made of {kinds}\n"
        "  effect   nothing leads from the inputs to an output, so there is nothing to analyze\n"
        f"{_whole_inside(model)}"
        "  to fix   return tensors, alone or in tuples, lists, dicts or dataclasses; wrap a model that returns"
        " objects of its own in a module that takes the tensors out"
    )


def _whole_inside(model: nn.Module) -> str:
    """What to do where a module is a wrapper around another that has all of its parameters."""
    count = len(list(model.parameters()))
    held = [
        name
        for name, child in model.named_children()
        if count and len(list(child.parameters())) == count and type(child).forward is not nn.Module.forward
    ]
    return f"  to fix   OTO(model.{held[0]}, ...): that module has all the parameters; or\n" if held else ""


def tensors_in(result: Any) -> Iterator[Tensor]:
    """The tensors of an output: of tuples, lists, mappings and dataclasses, however nested.

    Objects with a behavior of their own, such as key-value caches, are state that the model hands to itself; they are
    not looked into.
    """
    return (tensor for _, tensor in named_tensors_in(result))


def named_tensors_in(result: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The same with where they are: the keys, fields and places on the way, with dots between them."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(result, Tensor):
        yield name, result
    elif isinstance(result, Mapping):
        items = result.items()
    elif isinstance(result, list | tuple):
        items = zip(getattr(result, "_fields", range(len(result))), result, strict=True)
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        items = ((field.name, getattr(result, field.name)) for field in dataclasses.fields(result))
    for key, item in items:
        yield from named_tensors_in(item, f"{name}.{key}" if name else str(key))


_Place: TypeAlias = tuple[Any, ...]


def _place(tensor: Tensor) -> _Place | None:
    """Where the entries of a tensor lie; ``None`` if it has no memory of the plain kind."""
    try:
        return tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    except (NotImplementedError, RuntimeError):
        return None


class _Recorder(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(
        self, builder: GraphBuilder, known: Callable[[Any], bool], modules: Mapping[str, nn.Module], found: Snapshot
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.builder = builder
        self.found = found
        self.known = known
        self.shapes_only = builder.how in ("meta", "fake")
        self.constants: dict[Value, Tensor] = {}
        self.script: Script | None = None
        self.fake: FakeTensorMode | None = None
        self.alive: list[Tensor] = []  # tensors are known by id, so none may be freed while we look
        self.places: dict[int, _Place] = {}
        self.latest: dict[_Place, int] = {}
        self.path: list[str] = [""]
        self.running: list[tuple[str, int]] = []
        self.begins: list[int] | None = None
        self.runs = 0
        self.outside: FrameType | None = None
        self.attributes = {
            id(value): f"{name}.{attribute}" if name else attribute
            for name, module in _once(modules)
            for attribute, value in vars(module).items()
            if isinstance(value, Tensor)
        }

    def hold(self, tensor: Tensor) -> None:
        self.alive.append(tensor)
        place = _place(tensor)
        if place is not None:
            self.places[id(tensor)] = place
            self.latest[place] = id(tensor)

    def see(self, tensor: Tensor) -> Value:
        """What stands for a tensor; one that was never seen is a constant of the model.

        Reading and setting ``.data`` are no calls: a tensor that is new, or lies elsewhere than before, is the one that
        was seen in the same place.
        """
        place = _place(tensor)
        if id(tensor) not in self.builder.current or place != self.places.get(id(tensor)):
            name = self.attributes.get(id(tensor))
            source = None if name or place is None else self.latest.get(place)
            self.hold(tensor)
            if source is None:
                self.builder.leaf(id(tensor), tensor.shape, tensor.dtype, [name] if name else [], "constant")
                if self.builder.how == "real":
                    self.constants[self.builder.current[id(tensor)]] = tensor.clone()  # before anything writes to it
            else:
                args, result = (self.builder.current[source],), (id(tensor), tensor.shape, tensor.dtype)
                self.builder.add(
                    aten.alias.default, args, {}, [result], self.path[-1], _user_line(), shared_keys=[source]
                )
        return self.builder.current[id(tensor)]

    def valued(self, x: Any) -> Any:
        """Arguments with a value in place of each tensor."""
        if isinstance(x, Tensor):
            return self.see(x)
        if isinstance(x, (tuple, list)):
            items = [self.valued(item) for item in x]
            return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
        return {name: self.valued(value) for name, value in x.items()} if isinstance(x, dict) else x

    @contextmanager
    def following(self, modules: Mapping[str, nn.Module], outside: FrameType) -> Iterator[None]:
        """Keep ``self.path`` at the module that is running.

        Args:
            outside: What runs the model.
        """
        self.outside = outside
        paths = {id(module): name for name, module in _once(modules)}

        def enter(module: nn.Module, _args: Any) -> None:
            self.path.append(paths.get(id(module), self.path[-1]))
            self.runs += 1
            self.running.append((self.path[-1], self.runs))
            if self.begins is not None:
                self.begins.append(len(running(sys._getframe(1), self.outside)))

        def leave(module: nn.Module, _args: Any, _output: Any) -> None:
            self.path.pop()
            self.running.pop()
            if self.begins is not None:
                self.begins.pop()

        try:
            with around_modules(enter, leave):
                yield
        finally:
            self.outside = None  # it holds tensors

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op.namespace == "prim":  # a fake tensor is asked for its device
            return op(*args, **kwargs)
        whole = isinstance(op, HigherOrderOperator)  # torch.cond and the like: functions among the arguments
        if not whole and not self.known(op):
            with self:
                parts = op.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
            code = python_code(op)
            if code is not None and _runs_without_data(code, args, kwargs):
                with self:
                    return code(*args, **kwargs)
        named = kwargs
        if op is aten.einsum.default:  # in which order it multiplies is chosen by sizes, and no part of what it gives
            named = {name: value for name, value in kwargs.items() if name != "path"}
        writes = not whole and op._schema.is_mutable
        with DisableTorchFunction():  # that we look at a tensor is no call of the model's, which costs as much as one
            values = self.valued(args), self.valued(named)
            self.found.look(sys._getframe(1))
            result = args[0] if self.shapes_only and op in _WRITES_FIRST else None
            if result is None and self.shapes_only:
                result = result_of(op, args, kwargs, self.fake)
        if self.builder.how == "real" and (whole or writes):
            self.found.spare((args, kwargs))
        if result is None and self.shapes_only and not whole:
            result = _REMEMBERED.call(op, args, kwargs, self.fake)
        elif result is None:
            result = op(*args, **kwargs)
        if self.script is not None:
            result = self.script.take(op, result)
        with DisableTorchFunction():
            self._write_down(op, values, (args, named), result, writes)
        return result

    def _write_down(self, op: Any, values: tuple[Any, Any], given: tuple[Any, Any], result: Any, writes: bool) -> None:
        """Add a call, or a number that leaves torch, on which code may branch."""
        results: list[Any] = []
        for leaf in [result] if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                if id(leaf) not in self.builder.current:
                    self.found.made.append(weakref.ref(leaf))
                self.hold(leaf)
                results.append((id(leaf), leaf.shape, leaf.dtype))
            else:
                results.append(None)
        if any(results) or writes:
            written, shared = (_keys_at(places, *given) if places else [] for places in effects(op))
            self.builder.add(op, *values, results, self.path[-1], _user_line(), written, shared)
        else:
            self.builder.ends.update(x for x in tree_leaves(values) if isinstance(x, Value))


def _keys_at(places: Sequence[tuple[int, str]], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[int]:
    """The keys of the tensors among some arguments, by position and name."""
    found = [args[position] if position < len(args) else kwargs.get(name) for position, name in places]
    return [id(leaf) for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def _once(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Each module by the first of its paths."""
    seen: set[int] = set()
    for path, module in modules.items():
        if id(module) not in seen:
            seen.add(id(module))
            yield path, module


def _runs_without_data(code: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether the code of an operator is made of calls alone, and no values leave torch in it."""
    try:
        given = tree_map_only(
            Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), (args, kwargs)
        )
        code(*given[0], **given[1])
    except Exception as failure:  # whatever its author does with data
        reraise_out_of_memory(failure)
        return False
    return True


_REMEMBERED = Remembered()
LITERALS = ("tensor", "as_tensor", "scalar_tensor")


class _Functions(TorchFunctionMode):
    """Writes down the torch functions that are called."""

    def __init__(self, recorder: _Recorder, calls: list[FunctionCall], named: Container[str] | None = None) -> None:
        super().__init__()
        self.recorder, self.calls, self.named = recorder, calls, named
        if named is None:
            recorder.begins = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.named is not None and name_of(func) not in self.named:
            return func(*args, **kwargs)
        nodes = self.recorder.builder.nodes
        begin, within = len(nodes), tuple(self.recorder.running)
        result = func(*args, **kwargs)
        numbers, first = tuple(numbers_of((args, kwargs))), first_tensor((args, kwargs))
        outside = self.recorder.outside
        lines = tuple(running(sys._getframe(1), outside)) if self.recorder.begins is not None else ()
        begins, takes = tuple(self.recorder.begins or ()), None if first is None else tuple(first.shape)
        self.calls.append(FunctionCall(name_of(func), numbers, within, range(begin, len(nodes)), lines, begins, takes))
        return result


aten = torch.ops.aten

# calls that write to their first argument and give it: where shapes are all that is computed, they need not be made
_WRITES_FIRST = {
    aten.relu_.default,
    aten.silu_.default,
    aten.hardswish_.default,
    aten.hardsigmoid_.default,
    aten.hardtanh_.default,
}


@contextmanager
def told(model: nn.Module, error: type[OTOError], stage: str, proved: str = "") -> Iterator[None]:
    """Whatever the model's code raises is told as one of our errors, with the stage."""
    try:
        yield
    except Exception as failure:
        if isinstance(failure, OTOError) or out_of_memory(failure):
            raise
        line = line_of(failure)
        told = [f"{type(model).__name__} failed while {stage}: {first_line(failure)}"]
        told += [f"  at      {line}"] if line else []
        told += [f"  proved  {proved}"] if proved else []
        told += ["  effect  nothing was written; the model is as it was"]
        told += [
            "  to fix  see that line: the model is copied, and run in eval mode several times, on other values, on"
            " another batch size and in float64"
            if line
            else "  to fix  see the traceback above; if it is not about the model, it is a mistake of oto's: report it"
        ]
        raise error("\n".join(told)) from failure


_PYTHON = f"{Path(traceback.__file__).parent}{sep}"


def line_of(failure: BaseException) -> str:
    """``file:line`` of the innermost frame outside torch and this package in which an exception was raised."""
    frames = [f for f in traceback.extract_tb(failure.__traceback__) if is_foreign(f.filename)]
    own = [f for f in frames if "site-packages" in f.filename or not f.filename.startswith(_PYTHON)]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""


def _user_line() -> str:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if is_foreign(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
