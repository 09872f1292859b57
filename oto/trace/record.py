"""Run a model once and record every ATen call.

The run is under ``torch.inference_mode``, in which composite operators (``linear``, ``scaled_dot_product_attention``,
``einsum`` …) are not decomposed, as in ``torch.export``. Three modes are tried in turn: tensors on ``meta``, which have
only shapes; fake tensors, which also have a device; and, for a model that needs data (``.item()``, a branch on a
value), a real run on the example. A model that computes gradients in its forward is run again with autograd, which
decomposes composite operators.

The model is not changed: parameters and buffers are replaced for the run by ``torch.func.functional_call``, and
``snapshot.py`` undoes all other effects of ``forward``.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from oto._torch import (
    tree_map_only,
)
from oto.errors import TraceError, first_line, reraise_out_of_memory, some
from oto.trace.decisions import Script
from oto.trace.functions import FunctionCall
from oto.trace.graph import Graph, GraphBuilder, Mode, Node
from oto.trace.inputs import arguments
from oto.trace.run import Recording, in_analyzed_form, run
from oto.trace.snapshot import (
    Snapshot,
    preserved,
)
from oto.trace.stand_ins import on_meta
from oto.trace.train_mode import with_training
from oto.user_code import line_of

log = logging.getLogger(__name__)


def record(
    model: nn.Module,
    dummy_input: Any,
    known: Callable[[Any], bool] = lambda op: True,
    dead: bool = False,
    training: bool = False,
    watching: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext,
) -> Graph:
    """Trace ``model`` on one example input.

    Args:
        model: Any module, on any device, ``meta`` included. Its mode, gradients, buffers and the random state are
            restored; the run is in eval mode.
        dummy_input: A tensor, a tuple of positional arguments or a dict of keyword arguments.
        known: Returns whether an operator is recorded as it is. A composite operator that is not known is decomposed.
        dead: Keep calls whose results reach no output; the model's class makes them anyway.
        training: If some parameters are not reached in eval mode, record train mode as well.
        watching: Returns a context manager for each run in eval mode; the last run is the recorded one.

    Raises:
        DummyInputError: ``dummy_input`` is of the wrong type.
        TraceError: ``forward`` fails on the example, or the model is TorchScript or has uninitialized parameters.
    """
    args, kwargs = arguments(dummy_input)
    scripted = [(n, type(m).__name__) for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        where, kind = scripted[0]
        raise TraceError(
            f"{where or 'the model'} is TorchScript ({kind}), whose parameters cannot be identified while it runs\n"
            "  effect   there is nothing to analyze; the model is as it was\n"
            "  to fix   pass the Python module that it was made from"
        )
    lazy = [name for name, p in model.named_parameters() if isinstance(p, nn.UninitializedParameter)]
    if lazy:
        raise TraceError(
            f"parameters of {type(model).__name__} have no shape yet: {some(lazy)}\n"
            "  effect   there is nothing to analyze; the model is as it was\n"
            "  to fix   call model(dummy_input) once, so that its lazy modules learn their sizes"
        )
    ways: list[Mode] = ["meta", "fake"] if on_meta(model) else ["meta", "fake", "real", "autograd"]
    failures: dict[str, Exception] = {}
    for way in ways:
        try:
            with preserved(model, dummy_input) as found:
                in_analyzed_form(model)
                script = Script() if way in ("real", "autograd") else None
                with watching(model):
                    graph = run(model, args, kwargs, known, way, found, script=script).recording(dead).graph
        except Exception as failure:
            reraise_out_of_memory(failure)
            traceback.clear_frames(failure.__traceback__)  # they hold tensors
            failures[way] = failure
            log.info("%s tensors are not enough for this model: %s", way, failure)
        else:
            found.warn_of_what_is_left()
            return with_training(graph, model, dummy_input, known, ways[ways.index(way) :]) if training else graph
    plainest = failures.get("real") or failures["fake"]
    if isinstance(plainest, TraceError):
        raise plainest
    raise TraceError(_message(model, args, kwargs, plainest)) from plainest


def record_data(model: nn.Module, dummy_input: Any, known: Callable[[Any], bool] = lambda op: True) -> Recording:
    """Record ``model`` on the data of one example, with which branches on values are decided.

    Raises:
        DummyInputError: ``dummy_input`` is of the wrong type.
        TraceError: ``forward`` fails on the example.
    """
    args, kwargs = arguments(dummy_input)
    failures: list[Exception] = []
    for way in ("real", "autograd"):
        try:
            with preserved(model, dummy_input) as found:
                return run(model, args, kwargs, known, way, found).recording(False)
        except Exception as failure:
            reraise_out_of_memory(failure)
            failures.append(failure)
    raise TraceError(_message(model, args, kwargs, failures[0])) from failures[0]


def follow(
    model: nn.Module,
    dummy_input: Any,
    known: Callable[[Any], bool],
    way: Mode,
    functions: list[FunctionCall] | None = None,
    script: Script | None = None,
    limit: int | None = None,
    literals: list[FunctionCall] | None = None,
    found: Snapshot | None = None,
    bare: bool = False,
) -> tuple[tuple[Node, ...], Exception | None]:
    """Record every call that ``model`` makes on the example, including dead ones, until it fails.

    Args:
        way: The mode, see :data:`oto.trace.graph.Mode`.
        functions: A list to which the called torch functions are added.
        script: Records the decisions that depend on data, or repeats recorded ones.
        limit: Maximum number of calls to record; by default all.
        literals: A list to which functions are added that make a tensor from numbers, which are not operator calls.
        found: The snapshot to restore afterwards, if there is one; for a copy that is discarded, that of the model.
        bare: Whether ``model`` is a copy that is restored by ``found`` and holds its tensors only in its modules and in
            their lists and dicts, so that they may be replaced there.

    Returns:
        The calls, and the exception that was raised, if any.
    """
    args, kwargs = arguments(dummy_input)
    builder = GraphBuilder(way, limit=limit)
    try:
        with preserved(model, dummy_input, found) as found:
            in_analyzed_form(model)
            run(model, args, kwargs, known, way, found, builder, functions, script, literals, bare)
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
