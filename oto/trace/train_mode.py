"""Record what a model does only in train mode, such as auxiliary heads."""

from __future__ import annotations

import dataclasses
import logging
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from oto._torch import (
    tree_leaves,
    tree_map_only,
)
from oto.errors import first_line, reraise_out_of_memory
from oto.trace.graph import Graph, Mode, Node
from oto.trace.inputs import Arguments, arguments
from oto.trace.run import in_analyzed_form, run
from oto.trace.snapshot import (
    preserved,
)

log = logging.getLogger(__name__)


def with_training(graph: Graph, model: nn.Module, dummy_input: Any, known: Any, ways: Sequence[Mode]) -> Graph:
    """The graph, together with the train-mode graph if that uses more parameters, such as those of auxiliary heads."""
    idle = graph.idle & {name for name, _ in model.named_parameters()}
    if not idle:
        return graph
    args, kwargs = _doubled(arguments(dummy_input))
    failure: Exception | None = None
    for way in ways:
        try:
            with preserved(model, dummy_input) as found:
                in_analyzed_form(model)
                for module in model.modules():
                    module.training = True
                trained = run(model, args, kwargs, known, way, found).recording(False).graph
        except Exception as problem:  # it may need targets, or a different kind of batch
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
    """The call with dropout turned off, which does not affect the structure."""
    schema = getattr(node.op, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else []
    calm = {"dropout": 0.0, "dropout_p": 0.0} | ({"train": False} if names[1:3] == ["p", "train"] else {})
    args = tuple(calm.get(name, value) for name, value in zip(names, node.args, strict=False)) if names else node.args
    kwargs = {name: calm.get(name, value) for name, value in node.kwargs.items()}
    return dataclasses.replace(node, args=args, kwargs=kwargs)


def _doubled(given: Arguments) -> Arguments:
    """The arguments with a batch of one repeated: batch norm needs more than one value in train mode."""
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and leaf.ndim]
    if not tensors or tensors[0].shape[0] != 1:
        return given
    twice: Arguments = tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.ndim and t.shape[0] == 1 else t, given)
    return twice
