"""The traced graph as a module that accepts keywords, can be copied, pickled and moved, and refuses invalid input."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from oto._torch import HigherOrderOperator, OpOverload, codegen_state, nested_codegen
from oto.errors import GraphModeError, ScriptError
from oto.trace.takes import Takes


class SlimGraph(fx.GraphModule):
    """A ``torch.fx.GraphModule`` of the calls that a model makes in eval mode.

    Arguments can be passed by the names of the model's ``forward``, in any order; arguments that the graph was made
    without only with their default values. Inputs for which the graph is not valid are refused
    (:class:`oto.errors.GraphInputError`).

    Attributes:
        takes: The arguments and sizes that the graph accepts, if known.
    """

    takes: Takes | None
    _checks: tuple[tuple[str, Callable[..., Any]], ...]

    def __init__(self, root: nn.Module | dict[str, Any], graph: fx.Graph, takes: Takes | None = None) -> None:
        vars(self)["takes"] = takes
        vars(self)["_checks"] = () if takes is None else takes.compiled
        vars(self)["_trains_as_eval"] = False
        super().__init__(root, graph, SlimGraph.__name__)
        self.eval()

    def recompile(self) -> Any:
        """Regenerate ``forward`` from the graph."""
        code = super().recompile()
        takes: Takes | None = vars(self)["takes"]
        if takes is not None:
            kind: Any = type(self)  # torch.fx gives each graph module its own class
            kind.forward = _by_name(kind.forward, takes)
        return code

    @property
    def free_dims(self) -> dict[str, tuple[int, ...]]:
        """For each input tensor, the dimensions whose sizes may differ from the example's."""
        return {} if self.takes is None else dict(self.takes.free)

    def train(self, mode: bool = True) -> SlimGraph:
        """Set the mode; train mode is refused unless :meth:`train_as_eval` allowed it.

        Raises:
            GraphModeError: Train mode was requested; the graph holds the calls of eval mode.
        """
        if mode and not self._trains_as_eval:
            raise GraphModeError(
                "this slim model is a graph of the eval forward: it has no dropout, and its batch norms do not move\n"
                "  effect  it stays in eval mode; train mode would change nothing, silently\n"
                "  to fix  model.train_as_eval() to train it anyway, without dropout and with the"
                " statistics of batch norms as they are; or use a slim model of the model's own class"
            )
        super().train(False)
        self.training = mode
        return self

    def train_as_eval(self) -> SlimGraph:
        """Allow ``train()``: gradients flow, dropout stays off and batch norms keep their statistics."""
        self._trains_as_eval = True
        return self.train()

    def __prepare_scriptable__(self) -> SlimGraph:
        """Refuse ``torch.jit.script``, which calls this first."""
        raise ScriptError("a slim model that is a graph: its arguments are checked in Python")

    def __deepcopy__(self, memo: dict[int, Any]) -> SlimGraph:
        state = copy.deepcopy(self._state(), memo)
        made = _rebuilt(state, copy.deepcopy(self.graph), self.takes)
        memo[id(self)] = made
        return made

    def __copy__(self) -> SlimGraph:
        return _rebuilt(self._state(), copy.deepcopy(self.graph), self.takes)

    def __reduce__(self) -> Any:
        return _unpickled, (self._state(), _records(self.graph), codegen_state(self.graph), self.takes)

    def _state(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in _MADE_ANEW}


# attributes that a graph module generates from its graph
_MADE_ANEW = {"_graph", "_code", "_tracer_cls", "_tracer_extras", "_in_spec", "_out_spec", "_checks", "takes", "meta"}


def _by_name(generated: Callable[..., Any], takes: Takes) -> Callable[..., Any]:
    def forward(self: SlimGraph, *args: Any, **kwargs: Any) -> Any:
        named = takes.bind(args, kwargs)
        takes.require(named, self._checks)
        return generated(self, **named)

    own = takes.signature()
    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = own.replace(parameters=[me, *own.parameters.values()])  # type: ignore[attr-defined]
    return forward


def _rebuilt(state: dict[str, Any], graph: fx.Graph, takes: Takes | None) -> SlimGraph:
    root = nn.Module()
    vars(root).update(state)
    made = SlimGraph(root, graph, takes)
    vars(made).update(state)
    return made


class _Ref:
    """Stands for a node among the arguments of another node."""

    def __init__(self, name: str) -> None:
        self.name = name


def _records(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """A graph as plain data, with operators and nodes by their names."""

    def plain(x: Any) -> Any:
        if isinstance(x, fx.Node):
            return _Ref(x.name)
        if isinstance(x, OpOverload | HigherOrderOperator):
            return _target(x)
        if isinstance(x, list | tuple):
            return type(x)(map(plain, x)) if type(x) in (list, tuple) else [plain(y) for y in x]
        if isinstance(x, dict):
            return {key: plain(value) for key, value in x.items()}
        return slice(plain(x.start), plain(x.stop), plain(x.step)) if isinstance(x, slice) else x

    return [
        (node.op, node.name, _target(node.target), plain(node.args), plain(dict(node.kwargs))) for node in graph.nodes
    ]


def _target(target: Any) -> Any:
    if isinstance(target, OpOverload):
        return _Operator("overload", str(target))
    if isinstance(target, HigherOrderOperator):
        return _Operator("higher_order", target.__name__)
    return target


class _Operator:
    """Stands for an operator of torch, by name, because operators cannot be pickled."""

    def __init__(self, kind: str, name: str) -> None:
        self.kind, self.name = kind, name

    def found(self) -> Any:
        found: Any = torch.ops.higher_order if self.kind == "higher_order" else torch.ops
        for part in self.name.split("."):
            found = getattr(found, part)
        return found


def _unpickled(
    state: dict[str, Any], records: list[tuple[Any, ...]], codegen: tuple[Any, ...] | None, takes: Takes | None
) -> SlimGraph:
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def full(x: Any) -> Any:
        if isinstance(x, _Ref):
            return made[x.name]
        if isinstance(x, _Operator):
            return x.found()
        if isinstance(x, list | tuple):
            return type(x)(map(full, x))
        if isinstance(x, dict):
            return {key: full(value) for key, value in x.items()}
        return slice(full(x.start), full(x.stop), full(x.step)) if isinstance(x, slice) else x

    for op, name, target, args, kwargs in records:
        made[name] = graph.create_node(op, full(target), full(args), full(kwargs), name)
    if codegen is not None:
        nested_codegen(graph, codegen)
    return _rebuilt(state, graph, takes)
