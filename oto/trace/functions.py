"""Record the torch functions that Python code calls, one level above the ATen operators that they run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Container
from typing import Any

from torch.overrides import TorchFunctionMode

from oto.nn.calls import first_tensor, name_of, numbers_of, running
from oto.trace.recorder import Recorder

LITERALS = ("tensor", "as_tensor", "scalar_tensor")
"""Functions that make a tensor from numbers; they call no operator."""


@dataclasses.dataclass(frozen=True)
class FunctionCall:
    """A call of a torch function from Python code.

    Attributes:
        name: The name of the function.
        numbers: The numbers among its arguments, in order.
        within: The modules that were running, outermost first: the path of each, and the ordinal of its run.
        nodes: The operator calls that it made.
        lines: The lines of code that were running, in the form of :mod:`oto.nn.calls`.
        begins: For each module in ``within``, how many of ``lines`` were running when it was called.
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
        """The site of the call in the forward of a module in ``within``."""
        return "\n".join(self.lines[self.begins[level] :])


class Functions(TorchFunctionMode):
    """Records the torch functions that are called."""

    def __init__(self, recorder: Recorder, calls: list[FunctionCall], named: Container[str] | None = None) -> None:
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
