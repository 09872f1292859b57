"""Plan the writes of a step: views into parameters, and the rows of redundant and pruned atoms.

plan = Plan.of(groups, codes, parameters, quiet)
plan.scale_redundant_(0.5)
plan.zero_pruned_(step)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from oto.groups.node_group import NodeGroup
from oto.optim.entries import Place, Rows, any_entry, scale_, zero_

FREE, REDUNDANT, PRUNED = 0, 1, 2
"""The state of an atom: not chosen; chosen and being driven to zero; at zero permanently."""

HEAL_STEPS = 64
"""Resting entries are rewritten once in this many steps, some of the tensors at each step."""


@dataclass
class Plan:
    """The entries that a step writes.

    Attributes:
        redundant: Entries to scale.
        pruned: Entries to zero at every step.
        resting: Entries of quiet node groups, which stay at zero without being written at each step.
        watched: A few entries of each quiet node group, such as a bias. If one of them moves, no group counts as quiet.
        fresh: Whether nothing has been written yet.
    """

    redundant: list[Place] = field(default_factory=list)
    pruned: list[Place] = field(default_factory=list)
    resting: list[Place] = field(default_factory=list)
    watched: list[Place] = field(default_factory=list)
    fresh: bool = True

    @classmethod
    def of(
        cls,
        groups: Sequence[NodeGroup],
        codes: Sequence[Tensor],
        parameters: Mapping[str, Tensor],
        quiet: Sequence[bool],
    ) -> Plan:
        """Make the plan for the current states of atoms.

        Args:
            groups: Node groups.
            codes: For each group, the state of its atoms, uint8, shape ``(size,)``, on the CPU.
            parameters: Parameters by name. Constants that a group names are not among them, and are never written.
            quiet: For each group, whether its pruned entries stay at zero without being written.
        """
        plan = cls()
        redundant = [rows_of(own, REDUNDANT) for own in codes]
        plan.redundant += Rows.of(groups, redundant, parameters, in_blocks=True).places
        for group, own, rests in zip(groups, codes, quiet, strict=True):
            pieces = group.slices if rests else group.zeros
            places = list(Rows.of([group], [rows_of(own, PRUNED)], parameters, slices=pieces).places)
            if rests and all(place.view.device.type == "cpu" for place in places):
                flat = [place for place in places if place.view.dim() == 1]
                plan.resting += [place for place in places if place.view.dim() > 1]
                plan.watched += flat[:1] or [place.first_entries() for place in places]
                places = flat
            plan.pruned += places
        return plan

    def moved(self) -> bool:
        """Whether a watched entry is no longer zero. All watched entries are on the CPU."""
        if self.fresh or not self.watched:
            return False
        return any_entry(self.watched)

    def scale_redundant_(self, factor: float) -> None:
        scale_(self.redundant, factor)

    def zero_pruned_(self, step: int) -> None:
        zero_(self.pruned)
        zero_(self.resting if self.fresh else self.resting[step % HEAL_STEPS :: HEAL_STEPS])
        self.fresh = False


def rows_of(codes: Tensor, code: int) -> Tensor:
    """The atoms in state ``code``, sorted int64 indices."""
    return (codes == code).nonzero()[:, 0]
