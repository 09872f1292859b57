"""The slim model as an exported program: a file that needs no class to load."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx, nn

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


def runnable(program: torch.export.ExportedProgram) -> nn.Module:
    """An exported program as a plain module with ``train`` and ``eval``."""
    takes = inspect.signature(program.module).parameters
    module = program.module(check_guards=False) if "check_guards" in takes else program.module()
    assert isinstance(module, fx.GraphModule)
    return fx.GraphModule(module, module.graph).eval()
