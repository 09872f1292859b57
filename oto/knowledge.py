"""Measure where a model's knowledge lies (LoRAShear, arXiv 2310.18356, section 3.2): the loss without each group.

Each group is thinned alone, by a few shares of its atoms, those with the least norm first (of the weight together with
its adapter); the loss on held-out batches is measured, and the entries are restored. The groups for which the loss
rises most stay whole. If blocks have to keep equally many atoms, their groups are thinned as one. The paper uses
perplexity; the ranking is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oto.analysis import Analysis
from oto.errors import OptionError, items_of, some
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
"""The shares of its atoms that a group loses."""


@dataclass(frozen=True)
class Measured:
    """Groups that were thinned together: a single one, or all groups of a tie.

    Attributes:
        groups: The names of the groups.
        atoms: Total number of their atoms.
        rise: The rise of the loss, averaged over the shares.
        whole: Whether they stay whole as a result.
    """

    groups: tuple[str, ...]
    atoms: int
    rise: float
    whole: bool


@dataclass(frozen=True)
class Knowledge:
    """The result of the measurement; can be printed.

    Attributes:
        loss: The loss of the unchanged model.
        found: The groups that were thinned, most sensitive first.
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
    """Measure the groups and keep the most sensitive ones whole; see :meth:`oto.OTO.mark_unprunable_by_knowledge`."""
    refuse_sharded(analysis.model, "a measurement of what groups cost")
    held = items_of("batches", batches)
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
    """A model in which one group after another is thinned and restored."""

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
        """The mean loss over the batches."""
        mean = sum(float(self.of(self.model, batch)) for batch in self.batches) / len(self.batches)
        return mean if math.isfinite(mean) else math.inf  # a thinner model may overflow

    def without(self, unit: Sequence[NodeGroup], level: float) -> float:
        """The loss if each group of a unit loses a share of its atoms."""
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
        """A share of the atoms, those with the least norm, within the group's minimum; the whole of a segment."""
        if group.segment:
            return torch.zeros(1, dtype=torch.int64)
        norms = magnitude(self.composed.entries_of(group, self.parameters, ()))
        many = min(round(level * group.size), group.size - group.min_kept)
        return norms.argsort(stable=True)[:many].sort().values
