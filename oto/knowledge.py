"""Where a model's knowledge lies (LoRAShear, arXiv 2310.18356, section 3.2): what the loss makes of each group alone.

Each group is thinned alone, by a few shares of its atoms, those with the least norm first (of a weight with its
adapter); the loss on held-out batches is measured, and the entries are put back. The groups whose loss rises most stay
whole. Where blocks have to keep equally many atoms, those of all of them are one. The paper takes perplexity for the
loss; what rises most is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oto.analysis import Analysis
from oto.errors import OptionError, some
from oto.groups.adapters import adapters, ranks_in
from oto.groups.node_group import NodeGroup
from oto.optim.composed import Composed
from oto.optim.entries import Rows
from oto.optim.saliency import magnitude
from oto.progress import stage, stages
from oto.report.table import columns
from oto.shards import refuse_sharded
from oto.trace.snapshot import preserved

LEVELS = (0.25, 0.5)
"""Shares of its atoms that a group loses."""


@dataclass(frozen=True)
class Measured:
    """Groups that were thinned together: one, or all of a tie.

    Attributes:
        groups: Their names.
        atoms: How many they have together.
        rise: By how much the loss rose, the mean over the shares.
        whole: Whether they stay whole for it.
    """

    groups: tuple[str, ...]
    atoms: int
    rise: float
    whole: bool


@dataclass(frozen=True)
class Knowledge:
    """What was found; print it.

    Attributes:
        loss: That of the model as it is.
        found: What was thinned, the most sensitive first.
    """

    loss: float
    found: tuple[Measured, ...]

    def __str__(self) -> str:
        rows = [["loss rises by", "atoms", "", "groups"]]
        rows += [[f"{m.rise:+.4g}", f"{m.atoms:,}", "whole" * m.whole, some(m.groups, 2)] for m in self.found]
        return f"loss of the full model: {self.loss:.4g}\n{columns(rows, left=(2, 3))}"


def mark_by_knowledge(
    analysis: Analysis,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    share: float,
    levels: Sequence[float],
) -> tuple[Analysis, Knowledge]:
    """Measure, and keep the most sensitive whole; see :meth:`oto.OTO.mark_unprunable_by_knowledge`."""
    refuse_sharded(analysis.model, "a measurement of what groups cost")
    held = list(batches)
    if not held or not callable(loss) or not 0 <= share < 1 or not levels or not all(0 < own < 1 for own in levels):
        raise OptionError(
            f"{len(held)} batches, share={share!r}, levels={levels!r}: there is at least one batch, a loss of the model"
            " and a batch, a share of the groups in [0, 1), and shares of atoms in (0, 1)\n"
            "  effect  nothing was measured or marked\n  to fix  such as share=0.1, levels=(0.25, 0.5)"
        )
    with stages("knowledge"), preserved(analysis.model), torch.no_grad():
        job = _Measurement(analysis, held, loss)
        full = job.loss()
        if not math.isfinite(full):
            raise OptionError(
                "the loss on these batches is no finite number\n  effect  nothing was measured or marked\n"
                "  to fix  batches, and a loss, that the model as it is gives numbers on"
            )
        risen = [(unit, sum(job.without(unit, level) - full for level in levels) / len(levels)) for unit in job.units]
    risen.sort(key=lambda both: -both[1])
    many = round(share * len(risen))
    found = [
        Measured(tuple(g.name for g in unit), sum(g.size for g in unit), rise, i < many)
        for i, (unit, rise) in enumerate(risen)
    ]
    kept = {name for measured in found if measured.whole for name in measured.groups}
    return analysis.without_groups(kept, "it was marked unprunable: the loss rises most without"), Knowledge(
        full, tuple(found)
    )


class _Measurement:
    """A model of which one group after another gets thinner, and is put back."""

    def __init__(self, analysis: Analysis, batches: list[Any], loss: Callable[[nn.Module, Any], Tensor]) -> None:
        self.model, self.batches, self.of = analysis.model, batches, loss
        self.parameters: dict[str, Tensor] = dict(analysis.model.named_parameters(remove_duplicate=False))
        found = adapters(analysis.graph)
        self.composed, ranks = Composed(found), ranks_in(analysis.groups, found)
        units: dict[str, list[NodeGroup]] = {}
        for group in analysis.groups:
            if group.prunable and group.name not in ranks:
                units.setdefault(group.tie or f"{group.name} alone", []).append(group)
        self.units = list(units.values())

    def loss(self) -> float:
        """The mean over the batches."""
        mean = sum(float(self.of(self.model, batch)) for batch in self.batches) / len(self.batches)
        return mean if math.isfinite(mean) else math.inf  # thinner, it may overflow

    def without(self, unit: Sequence[NodeGroup], level: float) -> float:
        """The loss, if each of some groups loses a share of its atoms."""
        stage(f"what it costs to thin {unit[0].name}")
        least = [self._least(group, level) for group in unit]
        rows = Rows.of(unit, least, self.parameters)
        before = rows.copies()
        try:
            rows.zero_()
            return self.loss()
        finally:
            rows.copy_(before)

    def _least(self, group: NodeGroup, level: float) -> Tensor:
        """The atoms with the least norm, as far as it may lose them; a segment goes as a whole or not at all."""
        if group.segment:
            return torch.zeros(1, dtype=torch.int64)
        norms = magnitude(self.composed.entries_of(group, self.parameters, ()))
        many = min(round(level * group.size), group.size - group.min_kept)
        return norms.argsort(stable=True)[:many].sort().values
