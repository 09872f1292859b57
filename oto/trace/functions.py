"""Record the torch functions that Python code calls, one level above the ATen operators that these consist of."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Container
from types import BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from oto.nn.calls import first_tensor, name_of, numbers_of, running
from oto.trace.graph import GraphBuilder
from oto.trace.recorder import Recorder

LITERALS = ("tensor", "as_tensor", "scalar_tensor")
"""Functions that make a tensor from numbers, which are no calls of operators."""


@dataclasses.dataclass(frozen=True)
class FunctionCall:
    """A call of a torch function, as Python code makes it.

    Attributes:
        name: The name of the function.
        numbers: The numbers among its arguments, in order.
        within: The modules that were running, from the outside inwards: the path of each, and the ordinal of its run.
        nodes: The calls of operators that it consists of.
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
        """Its site in the forward of a module in ``within``."""
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


class SizeReads(TorchFunctionMode):
    """Notes whether Python code may see a size of a tensor: then it may do something else when tensors are thinner.

    It sees none if each function that it calls returns a tensor, and is written in C++ or known not to look at sizes.

    Attributes:
        last: The last function that may show a size; ``None`` if none was called.
    """

    def __init__(self, builder: GraphBuilder) -> None:
        super().__init__()
        self.builder, self._made = builder, 0
        self.last: str | None = None

    @property
    def none(self) -> bool:
        """Whether no size was seen; calls that no torch function makes are those of TorchScript, which may see any."""
        return self.last is None and self._made == len(self.builder.nodes)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begin = len(self.builder.nodes)
        result = func(*args, **(kwargs or {}))
        self._made += len(self.builder.nodes) - begin
        if not _shows_no_size(func, result):
            self.last = name_of(func)
        return result


def _shows_no_size(func: Callable[..., Any], result: Any) -> bool:
    if not isinstance(func, _COMPILED) and func not in _SIZELESS:
        return False
    if isinstance(result, Tensor):
        return func.__name__ not in LITERALS  # numbers that may come from anywhere
    return getattr(getattr(func, "__self__", func), "__name__", "") in _KINDS


_COMPILED = (BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType)
_KINDS = ("ndim", "dim", "dtype", "device", "layout", "requires_grad", "is_cuda", "is_meta", "is_floating_point")
"""Attributes and methods of a tensor that do not depend on how wide it is."""
_SIZELESS = {
    *(F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.sigmoid, F.tanh),
    *(F.dropout, F.softmax, F.batch_norm, F.layer_norm, F.embedding),
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
}
"""Functions of torch written in Python that look at no width: a norm in train mode and a pool look at batch and length."""
