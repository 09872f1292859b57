"""Which entries a step has to write: views into parameters, and the rows of redundant and pruned atoms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from oto.groups.node_group import NodeGroup, Slice

FREE, REDUNDANT, PRUNED = 0, 1, 2
"""What became of an atom: not chosen; chosen, on its way to zero; at zero for good."""

HEAL_STEPS = 64
"""Resting entries are written again every so many steps, a few tensors at a time."""


class Target(NamedTuple):
    """Rows of a view into a parameter; one row per atom."""

    view: Tensor
    rows: Tensor


@dataclass
class Plan:
    """What a step has to write.

    Attributes:
        redundant: Entries to scale.
        pruned: Entries to zero at every step.
        resting: Entries of quiet node groups, which stay at zero by themselves.
        watched: A few entries of each quiet node group, such as a bias. If the wrapped optimizer moves one of them, the
            groups are not quiet.
        fresh: Nothing was written yet.
    """

    redundant: list[Target] = field(default_factory=list)
    pruned: list[Target] = field(default_factory=list)
    resting: list[Target] = field(default_factory=list)
    watched: list[Target] = field(default_factory=list)
    fresh: bool = True

    @classmethod
    def of(
        cls,
        groups: Sequence[NodeGroup],
        codes: Sequence[Tensor],
        parameters: Mapping[str, Tensor],
        quiet: Sequence[bool],
    ) -> Plan:
        """Look up the views and rows.

        Args:
            groups: Node groups.
            codes: What became of the atoms of each, uint8, shape ``(size,)``, on the CPU.
            parameters: Parameters by name. Constants that a group names are not among them, and never written.
            quiet: For each group, whether its pruned entries stay at zero by themselves.
        """
        plan = cls()
        for group, own, rests in zip(groups, codes, quiet, strict=True):
            redundant, pruned = rows_of(own, REDUNDANT), rows_of(own, PRUNED)
            if len(redundant):
                plan.redundant += _targets(group.zeros, redundant, parameters)
            if not len(pruned):
                continue
            targets = _targets(group.slices if rests else group.zeros, pruned, parameters)
            if rests and all(target.view.device.type == "cpu" for target in targets):
                flat = [target for target in targets if target.view.dim() == 1]
                plan.resting += [target for target in targets if target.view.dim() > 1]
                plan.watched += flat[:1] or [Target(_first(view), rows) for view, rows in targets]
                targets = flat
            plan.pruned += targets
        return plan

    def moved(self) -> bool:
        """Whether an entry that should rest has moved, as far as the watched ones tell. CPU only."""
        if self.fresh or not self.watched:
            return False
        return bool(torch.cat([view.index_select(0, rows) for view, rows in self.watched]).any())

    def scale_redundant_(self, factor: float) -> None:
        for view, rows in self.redundant:
            view.index_copy_(0, rows, view.index_select(0, rows).mul_(factor))

    def zero_pruned_(self, step: int) -> None:
        zero_(self.pruned)
        zero_(self.resting if self.fresh else self.resting[step % HEAL_STEPS :: HEAL_STEPS])
        self.fresh = False


def _targets(pieces: Iterable[Slice], rows: Tensor, parameters: Mapping[str, Tensor]) -> list[Target]:
    found = [(piece, parameters[piece.parameter]) for piece in pieces if piece.parameter in parameters]
    return [Target(piece.of(p.data), rows.to(p.device, non_blocking=True)) for piece, p in found]


def _first(view: Tensor) -> Tensor:
    """One entry of each atom, as a view."""
    while view.dim() > 1:
        view = view.select(1, 0)
    return view


def rows_of(codes: Tensor, code: int) -> Tensor:
    """Atoms with this code, sorted int64 indices."""
    return (codes == code).nonzero()[:, 0]


def zero_(targets: Iterable[Target]) -> None:
    """Write zeros; unlike multiplying by 0, this also clears NaN and infinity."""
    for view, rows in targets:
        view.index_fill_(0, rows, 0)
