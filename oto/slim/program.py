"""The slim model as an exported program: a file that needs no class to load."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn

from oto._torch import example_size, tree_unflatten
from oto.trace import export as trace_export


class _Inside(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def export_program(slim: nn.Module, dummy_input: Any) -> torch.export.ExportedProgram:
    """Export a slim model with a free batch dimension where it allows one.

    Raises:
        EmitterError: ``torch.export`` cannot follow it.
    """
    # a graph module states its output types itself; inside another module it is asked for plain ones
    program, _ = trace_export.export_program(_Inside(slim), dummy_input, portable=True)
    return program


def example_of(program: torch.export.ExportedProgram) -> Any:
    """An input that a program takes: random floats, and zeros of all other kinds.

    Returns:
        A tensor, a tuple of positional arguments, or a dict of keyword arguments.
    """
    made = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
    generator = torch.Generator().manual_seed(0)

    def draw(name: str) -> Any:
        fake = made[name]
        if not isinstance(fake, Tensor):
            return fake
        shape = [example_size(n) for n in fake.shape]
        if fake.is_floating_point() or fake.is_complex():
            return torch.randn(shape, generator=generator).to(fake.dtype)
        return torch.zeros(shape, dtype=fake.dtype)

    drawn = [draw(name) if isinstance(name, str) else name for name in program.graph_signature.user_inputs]
    args, kwargs = tree_unflatten(drawn, program.call_spec.in_spec)
    if kwargs and not args:
        return kwargs
    return args[0] if len(args) == 1 and isinstance(args[0], Tensor) else args


def runnable(program: torch.export.ExportedProgram) -> nn.Module:
    """An exported program as a plain module with ``train`` and ``eval``."""
    takes = inspect.signature(program.module).parameters
    module = program.module(check_guards=False) if "check_guards" in takes else program.module()
    assert isinstance(module, fx.GraphModule)
    return fx.GraphModule(module, module.graph).eval()
