"""Compensation during training: after each choice, the remaining atoms gradually compensate for the chosen ones.

A choice marks atoms that reach zero at the last of the ``T`` steps of its period. Over the given batches, a fold fits
their activations by those that stay, ``x_P ≈ B x_S + c`` (:mod:`oto.optim.compensate`). The weights that read them are
changed in equal parts, just as the atoms shrink in equal parts::

    ΔW_S = W_P B,  Δb = W_P c               once, when the choice is made, before its step
    W_S += ΔW_S / T,  b += Δb / T           at the beginning of each step of the period

So after t steps, the shrinking atoms contribute (T - t) / T of their former part, and the others the remaining t / T.
With one step per period, the whole change is applied at once. If the activations of a group are proportional to its
entries (a linear layer or convolution, ReLU, a batch norm in training), the sum is constant throughout; otherwise it is
correct at both ends. Meanwhile, all parameters are trained as usual.

The fit uses the activations at the time of the choice, in eval mode. It does not change the model, its batch norms or
the random numbers of the training. Parts that are not applied yet are in checkpoints (``oto_fold``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oto.errors import OptionError, some
from oto.groups.node_group import NodeGroup
from oto.groups.partition import Partition
from oto.groups.readers import Reader, Readers
from oto.optim.compensate import RIDGE, Key, Moments, SplitEntries, fold_, packed, touched

log = logging.getLogger(__name__)

Left = Mapping[str, NDArray[np.bool_]]
"""For each node group, which of its atoms remain."""


@dataclass(frozen=True, eq=False)
class Fold:
    """How the remaining atoms compensate.

    Attributes:
        kind: One of :data:`oto.optim.compensate.KINDS`.
        partition: The partition of the model.
        readers: The readers of all prunable node groups, in the form in which they are fitted.
        moments: Returns the moments of some readers' inputs over the batches.
        tensors: Returns the current parameters and buffers of the model, by name.
    """

    kind: str
    partition: Partition
    readers: Readers
    moments: Callable[[Sequence[Reader]], Mapping[Key, Moments]]
    tensors: Callable[[], Mapping[str, Tensor]]

    def begin(self, first: dict[str, Any], groups: Sequence[NodeGroup], before: Left, after: Left, steps: int) -> None:
        """Fit, apply the first part of the change, and store the others in a parameter group.

        Args:
            first: The parameter group.
            groups: The node groups.
            before, after: Which atoms remain before and after the choice.
            steps: ``T``, the number of parts.

        Raises:
            OptionError: No batch reached a weight that reads the removed atoms.
        """
        changes = self.changes(groups, before, after)
        first["oto_fold"] = {"parts": {name: change / steps for name, change in changes.items()}, "left": steps}
        self.go_on(first)

    @torch.no_grad()
    def go_on(self, first: dict[str, Any]) -> None:
        """Apply the next part of the change, if there is one."""
        coming = first.get("oto_fold")
        if coming is None:
            return
        tensors, left = self.tensors(), coming["left"] - 1
        for name, part in coming["parts"].items():
            tensors[name].data.add_(part.to(tensors[name]))
        first.pop("oto_fold")
        if left:
            first["oto_fold"] = coming | {"left": left}

    @torch.no_grad()
    def changes(self, groups: Sequence[NodeGroup], before: Left, after: Left) -> dict[str, Tensor]:
        """The changes of tensors, by name, that compensate for the atoms in ``before`` but not in ``after``.

        Raises:
            OptionError: No batch reached a weight that reads the removed atoms.
        """
        losing = [group for group in groups if (before[group.name] & ~after[group.name]).any()]
        tensors, copies, left = self.tensors(), dict[str, Tensor](), dict(before)
        unreached, reached = list[str](), 0
        for pack in packed(losing, self.readers):  # a reader of groups in several packs is changed for each of them
            names = [group.name for group in pack]
            readers = self.readers.of(names)
            copies |= {name: tensors[name].detach().clone() for name in touched(readers) - copies.keys()}
            old = self.partition.masks(_indices(left))
            left |= {name: after[name] for name in names}
            new = self.partition.masks(_indices(left))

            def entries(reader: Reader, old: Any = old, new: Any = new) -> SplitEntries:
                return SplitEntries.of(reader.survivors(old), reader.survivors(new))

            missed = fold_(readers, self.moments(readers), entries, copies, self.kind, RIDGE)
            unreached, reached = [*unreached, *missed], reached + len(readers) - len(missed)
        if unreached and not reached:
            raise OptionError(
                f"no batch reached {some(unreached)}, which read what goes\n"
                "  effect  nothing would be taken over\n"
                "  to fix  batches that the model is called with, without autocast, which multiplies copies of weights"
            )
        if unreached:
            log.warning("compensate: no batch reached %s, so it takes nothing over", some(unreached))
        return {name: copy - tensors[name].detach() for name, copy in copies.items()}

    def __str__(self) -> str:
        many = len({reader.parameter for reader in self.readers.found})
        lines = [f"compensate={self.kind!r}: {many} weights take over what they read of what goes"]
        why: dict[tuple[str, ...], list[str]] = {}
        for name, reasons in self.readers.reasons.items():
            why.setdefault(reasons, []).append(name)
        return "\n".join([*lines, *(f"not taken over: {some(names)}, {said[0]}" for said, names in why.items())])


def _indices(left: Left) -> dict[str, NDArray[np.int64]]:
    return {name: np.flatnonzero(own) for name, own in left.items()}
