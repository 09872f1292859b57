"""Run a model once in one mode, and build the graph of that run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from oto._torch import (
    DisableTorchFunction,
    tree_leaves,
    tree_map_only,
)
from oto.errors import TraceError, some
from oto.nn.overridden import OverriddenForward
from oto.trace.decisions import Script
from oto.trace.functions import LITERALS, FunctionCall, Functions
from oto.trace.graph import Graph, GraphBuilder, Mode, Value
from oto.trace.outputs import named_leaves, named_tensors_in
from oto.trace.recorder import Recorder
from oto.trace.snapshot import (
    Snapshot,
    modules_by_path,
    modules_of,
    standing_in,
    state_of,
    tensors_reached,
)
from oto.trace.stand_ins import Held, stand_ins


@dataclasses.dataclass(frozen=True, eq=False)
class Recording:
    """A graph with everything else that is needed to run it again.

    Attributes:
        constants: The values of the constants among the leaves, if the run was made on data.
        result: What ``forward`` returned.
    """

    graph: Graph
    constants: Mapping[Value, Tensor]
    result: Any


@dataclasses.dataclass(frozen=True)
class Ran:
    """The result of a run.

    Attributes:
        result: What ``forward`` returned.
        outputs: The tensors in the result, with their paths.
        replaced: Names of tensors of the model that the forward replaced by others.
        enclosed: The tensors in returned objects, except objects that the forward also takes as state.
    """

    recorder: Recorder
    result: Any
    outputs: Sequence[tuple[str, Tensor]]
    replaced: frozenset[str]
    enclosed: Sequence[Tensor]

    def recording(self, dead: bool) -> Recording:
        builder = self.recorder.builder
        graph = builder.build([id(tensor) for _, tensor in self.outputs], dead)
        names = tuple(name or "output" for name, _ in self.outputs)
        graph = dataclasses.replace(
            graph,
            replaced=self.replaced,
            enclosed=tuple(builder.current[id(tensor)] for tensor in self.enclosed),
            output_names=names,
            script=self.recorder.script,
        )
        return Recording(graph, self.recorder.constants, self.result)


def run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: Any,
    way: Mode,
    found: Snapshot,
    builder: GraphBuilder | None = None,
    functions: list[FunctionCall] | None = None,
    script: Script | None = None,
    literals: list[FunctionCall] | None = None,
    bare: bool = False,
) -> Ran:
    modules = modules_by_path(model)
    held = Held(modules, bare)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad() if way == "autograd" else torch.inference_mode())
        stand_in, fake = stand_ins(way, (args, kwargs), stack)
        stack.enter_context(found.making_anew())
        builder = GraphBuilder("real" if way == "autograd" else way) if builder is None else builder
        recorder = Recorder(builder, known, modules, found)
        recorder.script, recorder.fake = script, fake
        held.make(stand_in)
        run_args, run_kwargs = tree_map_only(Tensor, stand_in, (args, kwargs))
        with DisableTorchFunction():
            held.write_down(recorder, (run_args, run_kwargs))
        if script is not None:
            with DisableTorchFunction():
                data = [*held.made.values(), *state_of(model, run_args, run_kwargs)]
            stack.enter_context(script.running(data))
        stack.enter_context(standing_in(model, held.made, deep=not bare))
        stack.enter_context(recorder.following(modules, sys._getframe()))
        stack.enter_context(recorder)
        if functions is not None:
            stack.enter_context(Functions(recorder, functions))
        if literals is not None:
            stack.enter_context(Functions(recorder, literals, LITERALS))
        result, replaced = held.call(model, run_args, run_kwargs)
        outputs = list(named_tensors_in(result))
        if not outputs:
            raise TraceError(_gives_no_tensor(model, result))
        kept = [t for t in state_of(model, result, run_args, run_kwargs) if id(t) in builder.current]
        kept += replaced.values()
        enclosed = [t for t in _enclosed(model, result, (run_args, run_kwargs)) if id(t) in builder.current]
    for tensor in (*(tensor for _, tensor in outputs), *kept):
        recorder.see(tensor)
    for tensor in kept:
        builder.end(id(tensor))
    if builder.writes("parameter"):
        found.writes_parameters()
    return Ran(recorder, result, outputs, frozenset(replaced), enclosed)


def _enclosed(model: nn.Module, result: Any, given: Any) -> list[Tensor]:
    """The tensors in returned objects that are not state: ``forward`` has no argument of that name or type."""
    taken = set(signature(model.forward).parameters)
    kinds = {type(leaf) for _, leaf in named_leaves(given)}
    objects = [
        leaf
        for path, leaf in named_leaves(result)
        if not isinstance(leaf, Tensor) and type(leaf) not in kinds and taken.isdisjoint(path.split("."))
    ]
    return tensors_reached(*objects)


def in_analyzed_form(model: nn.Module) -> None:
    """Switch modules with a separate form for the analysis (modules of ``oto.nn``, overridden forwards) to that form.

    It lasts until the model is restored.
    """
    for module in modules_of(model):
        forward = vars(module).get("forward")
        if hasattr(type(module), "_oto_analyzed"):
            vars(module)["forward"] = module._oto_analyzed
        elif isinstance(forward, OverriddenForward):
            forward.as_analyzed().install()


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
    """The remedy if a module wraps another that has all of its parameters."""
    count = len(list(model.parameters()))
    held = [
        name
        for name, child in model.named_children()
        if count and len(list(child.parameters())) == count and type(child).forward is not nn.Module.forward
    ]
    return f"  to fix   OTO(model.{held[0]}, ...): that module has all the parameters; or\n" if held else ""
