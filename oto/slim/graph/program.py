"""Export the slim model as a ``torch.export`` program: a file that needs no class to load."""

from __future__ import annotations

import functools
import inspect
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from oto._torch import example_size, tree_unflatten
from oto.errors import ArtifactError
from oto.slim.graph.layers import follow_device, name_leaves
from oto.slim.graph.module import SlimGraph
from oto.slim.proof.inputs import random_like
from oto.trace import export as trace_export
from oto.trace.inputs import arguments
from oto.trace.outputs import named_leaves
from oto.trace.takes import parameters_of

MOST_ENTRIES = 2**30  # limit on an input that is drawn at random


class _Inside(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

        @functools.wraps(model.forward)  # the program takes its argument names
        def forward(*args: Any, **kwargs: Any) -> Any:
            return model(*args, **kwargs)

        forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]  # without self
        vars(self)["forward"] = forward


def export_program(slim: nn.Module, dummy_input: Any) -> torch.export.ExportedProgram:
    """Export a slim model; input dimensions that the model leaves free are dynamic.

    Raises:
        EmitterError: ``torch.export`` cannot trace the model.
    """
    # a graph module states its own output types; wrapped in another module it returns plain ones
    name = type(slim).__name__
    return trace_export.export_program(_Inside(slim), dummy_input, portable=True, name=name).program


def output_names(program: torch.export.ExportedProgram) -> list[str]:
    """The names of a program's outputs: keys and fields joined by dots, or ``output_0`` if there is only an index."""
    result = tree_unflatten(list(program.graph_signature.user_outputs), program.call_spec.out_spec)
    names = [name or "output" for name, leaf in named_leaves(result) if isinstance(leaf, str)]
    return [f"output_{name}" if name.isdigit() else name for name in names]


def other_examples(slim: nn.Module, program: torch.export.ExportedProgram, dummy_input: Any) -> list[Any]:
    """Random inputs of other sizes, smaller and larger, that a program exported from ``slim`` accepts."""
    takes = trace_export.takes_of(program, trace_export.module_of(program), parameters_of(slim.forward))
    return [
        random_like(dummy_input, seed, shapes=shapes)
        for seed, shapes in enumerate(takes.other_sizes(*arguments(dummy_input)))
    ]


def example_of(program: torch.export.ExportedProgram) -> Any:
    """An input for a program: random numbers for floating-point dtypes, zeros for all others.

    Returns:
        A tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Raises:
        ArtifactError: An input would take gigabytes of memory.
    """
    made = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
    generator = torch.Generator().manual_seed(0)

    def draw(name: str) -> Any:
        fake = made[name]
        if not isinstance(fake, Tensor):
            return fake
        shape = [example_size(n) for n in fake.shape]
        if prod(shape) > MOST_ENTRIES:
            raise ArtifactError(
                f"the program was made on an input of {' x '.join(map(str, shape))}, too large to be drawn\n"
                "  to fix  pass an input: --input, --input-fn"
            )
        if fake.is_floating_point() or fake.is_complex():
            return torch.randn(shape, generator=generator).to(fake.dtype)
        return torch.zeros(shape, dtype=fake.dtype)

    drawn = [draw(name) if isinstance(name, str) else name for name in program.graph_signature.user_inputs]
    args, kwargs = tree_unflatten(drawn, program.call_spec.in_spec)
    if kwargs and not args:
        return kwargs
    return args[0] if len(args) == 1 and isinstance(args[0], Tensor) else args


def runnable(program: torch.export.ExportedProgram) -> SlimGraph:
    """An exported program as a module that refuses inputs for which it was not exported."""
    module = trace_export.module_of(program)
    slim = SlimGraph(module, module.graph, trace_export.takes_of(program, module))
    follow_device(slim.graph)
    ranks = {node: val.ndim for node in slim.graph.nodes if isinstance(val := node.meta.get("val"), torch.Tensor)}
    name_leaves(slim, module, ranks)
    for node in slim.graph.nodes:
        node.meta = {}
    slim.recompile()
    return slim
