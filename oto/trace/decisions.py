"""Record the decisions of a run that depend on data, so that another run can repeat them.

Example: which boxes a detector keeps; a slim model that differs by rounding might keep another one.

What no floating-point data lead to is no decision: a number that code makes of a size, such as
``torch.tensor(x.shape[1]).item()``, is computed by each run for itself, or a slim model would be told the full one's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        written: The calls, their results, and the floating-point numbers that they were given, if there is a measure.
        read: How many decisions were repeated; ``None`` while they are recorded.
        measure: How far apart two lists of tensors are.
        apart: How far apart, at most, the numbers were from which both runs decided, where they have the same shape.
    """

    written: list[tuple[Any, list[Any], list[Tensor]]] = dataclasses.field(default_factory=list)
    read: int | None = None
    measure: Callable[[Sequence[Tensor], Sequence[Tensor]], float] | None = None
    apart: float = 0.0
    _data: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def branches(self) -> bool:
        """Whether code was told numbers that follow from data, and may have branched on them."""
        return any(not isinstance(x, Tensor) for _, made, _ in self.written for x in made)

    def repeat(self) -> None:
        """Repeat the decisions from the first one on."""
        self.read = 0

    def start(self, held: Iterable[Tensor]) -> None:
        """A run begins.

        Args:
            held: What its numbers come from: inputs, parameters, buffers and other state. Whole numbers among them are
                the same in every run.
        """
        self._data = dict(memory_of(t) for t in held if _rounds(t))

    def take(self, op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Any:
        """Record a result, or replace it by that of the script."""
        leaves = [result] if isinstance(result, Tensor) else tree_leaves(result)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not self._by_data(op, args, kwargs, given, leaves):
            return result
        decides = [not isinstance(x, Tensor) or not _rounds(x) for x in leaves]
        if not any(decides):
            return result
        numbers = [x for x in given if _rounds(x)] if self.measure is not None else []
        if self.read is None:
            made = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
            self.written.append((op, made, [x.clone() for x in numbers]))
            return result
        if self.read < len(self.written) and self.written[self.read][0] is op:
            _, before, then = self.written[self.read]
            self.read += 1
            self._weigh(then, numbers)
            repeated = self._repeated(op, result, leaves, decides, before)
            self._data.update(memory_of(x) for x in leaves if isinstance(x, Tensor))  # some are others now
            return repeated
        return result

    def _weigh(self, then: Sequence[Tensor], now: Sequence[Tensor]) -> None:
        """Take note of how far apart the numbers are from which two runs decide."""
        alike = [(a, b) for a, b in zip(then, now, strict=False) if a.shape == b.shape and a.numel()]
        if self.measure is not None and alike:
            self.apart = max(self.apart, *(self.measure([a], [b]) for a, b in alike))

    def _by_data(
        self,
        op: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        given: Sequence[Tensor],
        leaves: Sequence[Any],
    ) -> bool:
        """Whether the results of a call follow from data; if so, what they or the call's arguments hold then does."""
        if getattr(op, "overloadpacket", None) in _READ_SHAPES:
            return False
        drawn = torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())
        if not drawn and not any(memory_of(x)[0] in self._data for x in given):
            return False
        self._data.update(memory_of(x) for x in leaves if isinstance(x, Tensor))
        schema = getattr(op, "_schema", None)
        if schema is not None and schema.is_mutable:
            self._data.update(memory_of(x) for x in _written(schema, args, kwargs))
        return True

    @staticmethod
    def _repeated(op: Any, result: Any, leaves: list[Any], decides: Sequence[bool], before: Sequence[Any]) -> Any:
        """A result with the decisions of a call before."""
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


def _written(schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a call writes to."""
    written = [
        args[place] if place < len(args) else kwargs.get(argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return [x for x in tree_leaves(written) if isinstance(x, Tensor)]
