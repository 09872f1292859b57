"""Record the decisions of a run that depend on data, so that another run can repeat them.

Example: which boxes a detector keeps; a slim model that differs by rounding might keep another one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from oto._torch import (
    tree_leaves,
)


@dataclasses.dataclass
class Script:
    """The decisions of a run on data: integers, booleans and numbers that leave torch, in order.

    A run that follows a script repeats them, so it takes the same path whatever its own tensors hold.
    """

    written: list[tuple[Any, list[Any]]] = dataclasses.field(default_factory=list)
    read: int | None = None

    def begin(self) -> None:
        """Repeat the decisions from the first one on."""
        self.read = 0

    def take(self, op: Any, result: Any) -> Any:
        """Record a result, or replace it by that of the script."""
        leaves = [result] if isinstance(result, Tensor) else tree_leaves(result)
        decides = [not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()) for x in leaves]
        if not any(decides):
            return result
        if self.read is None:
            self.written.append((op, [x.clone() if isinstance(x, Tensor) else x for x in leaves]))
            return result
        if self.read < len(self.written) and self.written[self.read][0] is op:
            before = self.written[self.read][1]
            self.read += 1
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
