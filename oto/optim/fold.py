"""Compensation while training: after each choice, the atoms that stay gradually take over what the others carried.

A choice marks atoms that reach zero at the last of the ``T`` steps of its period. From the batches it was given, a fold
fits what they carry by what stays, ``x_P ≈ B x_S + c`` (:mod:`oto.optim.compensate`). The weights that read them are
changed in equal parts, just as the atoms shrink in equal parts::

    ΔW_S = W_P B,  Δb = W_P c               once, when the choice is made, before its step
    W_S += ΔW_S / T,  b += Δb / T           at the beginning of each step of the period

So after t steps the shrinking atoms carry (T - t) / T of what they did, and the others the remaining t / T. With one
step a period everything is taken over at once. If what a group computes is proportional to its entries (a linear layer
or convolution, ReLU, a batch norm in training), the sum is constant throughout; otherwise it is right at both ends.
Meanwhile all parameters learn as usual.

The fit uses the activations of that moment, in eval mode. It changes nothing of the model, its batch norms or the
random numbers of the training. Parts that are still to come survive a checkpoint (``oto_fold``).
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
    """How remaining atoms take over.

    Attributes:
        kind: One of :data:`oto.optim.compensate.KINDS`.
        readers: The readers of all prunable node groups, in the form in which they are fitted.
        moments: Gives the moments of what some readers read, over the batches.
        tensors: Gives the present parameters and buffers of the model, by name.
    """

    kind: str
    partition: Partition
    readers: Readers
    moments: Callable[[Sequence[Reader]], Mapping[Key, Moments]]
    tensors: Callable[[], Mapping[str, Tensor]]

    def begin(self, first: dict[str, Any], groups: Sequence[NodeGroup], before: Left, after: Left, steps: int) -> None:
        """Fit, take over the first part, and store the others in a parameter group.

        Args:
            first: The parameter group.
            before, after: Which atoms remain before and after the choice.
            steps: ``T``, the number of parts.

        Raises:
            OptionError: No batch reached a weight that reads what goes.
        """
        changes = self.changes(groups, before, after)
        first["oto_fold"] = {"parts": {name: change / steps for name, change in changes.items()}, "left": steps}
        self.go_on(first)

    @torch.no_grad()
    def go_on(self, first: dict[str, Any]) -> None:
        """Take over the next part, if there is one."""
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
        """What must be added to tensors, by name, once the atoms are gone."""
        losing = [group for group in groups if (before[group.name] & ~after[group.name]).any()]
        tensors, copies, left = self.tensors(), dict[str, Tensor](), dict(before)
        unreached, reached = list[str](), 0
        for pack in packed(losing, self.readers):  # a reader of several packs is changed by each
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
