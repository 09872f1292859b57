"""Record the decisions of a run that depend on data, so that another run can repeat them.

Example: which boxes a detector keeps; a slim model that differs by rounding might keep another one.

A decision is a call that turns floating-point data into something else: a comparison, an index, a number that leaves
torch. Each run computes for itself what follows from the result. It also computes numbers that code derives from sizes,
such as ``torch.tensor(x.shape[1]).item()``; otherwise a slim model would get the full model's number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from oto._torch import (
    memory_of,
    tree_leaves,
)

aten = torch.ops.aten

_READ_SHAPES = {
    *(aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like),
    *(aten.new_empty, aten.new_empty_strided, aten.new_zeros, aten.new_ones, aten.new_full),
    aten._shape_as_tensor,
}
"""Operators that read the shape of their first argument, not its entries."""


@dataclasses.dataclass
class Script:
    """The decisions of a run on data: integers, booleans and numbers that leave torch, in order.

    A run that follows a script repeats them, so it takes the same path whatever its own tensors hold.

    Attributes:
        written: The calls, their results, and their floating-point arguments, if there is a measure.
        read: How many decisions were repeated; ``None`` while they are recorded.
        measure: Returns how far apart two lists of tensors are.
        apart: The largest distance between the numbers from which the two runs decided, where they have the same shape;
            infinite if integers that they were converted to differ by more than rounding explains.
    """

    written: list[tuple[Any, list[Any], list[Tensor]]] = dataclasses.field(default_factory=list)
    read: int | None = None
    measure: Callable[[Sequence[Tensor], Sequence[Tensor]], float] | None = None
    apart: float = 0.0
    _data: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)

    def repeat(self) -> None:
        """From now on repeat the decisions, starting with the first."""
        self.read = 0

    @contextmanager
    def running(self, held: Iterable[Tensor]) -> Iterator[None]:
        """Context manager for one run.

        Args:
            held: The tensors that the run computes with: inputs, parameters, buffers and other state. Integers among
                them are the same in every run.
        """
        self._data = dict(memory_of(t) for t in held if _rounds(t))
        try:
            yield
        finally:
            self._data = {}

    def take(self, op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Any:
        """Record a result, or replace it by the recorded one."""
        leaves = [result] if isinstance(result, Tensor) else tree_leaves(result)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and _rounds(x)]
        if not self._by_data(op, args, kwargs, given, leaves):
            return result
        decides = [not isinstance(x, Tensor) or not _rounds(x) for x in leaves]
        if not any(decides):
            return result
        numbers = given if self.measure is not None else []
        if self.read is None:
            made = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
            self.written.append((op, made, [x.clone() for x in numbers]))
            return result
        if self.read < len(self.written) and self.written[self.read][0] is op:
            _, before, then = self.written[self.read]
            self.read += 1
            self._weigh(op, (then, numbers), (before, leaves))
            return self._repeated(op, result, leaves, decides, before)
        return result

    def _by_data(
        self,
        op: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        given: Sequence[Tensor],
        leaves: Sequence[Any],
    ) -> bool:
        """Whether the results of a call depend on data. If so, the memory of its floating-point results, and of the
        tensors that it writes to, counts as data from then on."""
        if getattr(op, "overloadpacket", None) in _READ_SHAPES:
            return False
        drawn = torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())
        if not drawn and not any(memory_of(x)[0] in self._data for x in given):
            return False
        schema = getattr(op, "_schema", None)
        written = _written(schema, args, kwargs) if schema is not None and schema.is_mutable else []
        self._data.update(memory_of(x) for x in (*leaves, *written) if isinstance(x, Tensor) and _rounds(x))
        return True

    def _weigh(
        self, op: Any, numbers: tuple[Sequence[Tensor], Sequence[Tensor]], made: tuple[Sequence[Any], Sequence[Any]]
    ) -> None:
        """Record how far apart the numbers are from which two runs decide, and the integers they are converted to."""
        if self.measure is None:
            return
        alike = [(a, b) for a, b in zip(*numbers, strict=False) if a.shape == b.shape and a.numel()]
        if alike:
            self.apart = max(self.apart, *(self.measure([a], [b]) for a, b in alike))
        if getattr(op, "overloadpacket", None) in (aten._to_copy, aten.to):  # others hide small scales
            for a, b in zip(*made, strict=False):
                if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and _further(a, b):
                    self.apart = float("inf")

    @staticmethod
    def _repeated(op: Any, result: Any, leaves: list[Any], decides: Sequence[bool], before: Sequence[Any]) -> Any:
        """A result in which the decisions are those of an earlier call."""
        for place, (new, old, own) in enumerate(zip(leaves, before, decides, strict=False)):
            if not (own and isinstance(new, Tensor) and isinstance(old, Tensor)):
                continue
            if new.shape != old.shape:  # the number of entries may be a decision too
                if op.namespace != "aten" or torch.Tag.dynamic_output_shape in op.tags:
                    leaves[place] = old.clone()
            elif 0 not in new.stride():  # an expanded tensor repeats entries that were replaced already
                new.copy_(old)
        if isinstance(result, Tensor):
            return leaves[0]
        if isinstance(result, tuple | list) and all(x is None or isinstance(x, Tensor) for x in result):
            return type(result)(leaves)
        if len(leaves) == len(before) == 1 and not isinstance(result, Tensor | tuple | list):
            return before[0]
        return result


def _rounds(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _further(a: Tensor, b: Tensor) -> bool:
    """Whether entries of two integer tensors differ by more than converting slightly different floats can explain."""
    wide = [x.to(torch.float64) for x in (a, b)]
    return bool(((wide[0] - wide[1]).abs() > 1 + 1e-3 * wide[0].abs()).any())


def _written(schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a call writes to."""
    written = [
        args[place] if place < len(args) else kwargs.get(argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [x for x in tree_leaves(written) if isinstance(x, Tensor)]
