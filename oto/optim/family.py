"""The optimizer of a family: ordinary steps, and one step at which the ranking of all atoms is frozen.

No entries are set to zero. Until ``freeze_step``, only the full network is trained. Scores are averaged over the last
steps before, as in every sparse optimizer; at that step, one ranking determines what all members keep
(:mod:`oto.optim.nested`). The method follows DεpS (Annavajjala et al., ECCV 2024), which ranks by the L1 norms of the
consuming weights, and whose members are prefixes. Here the ranking is HESSO's choice, which takes costs into account,
and members are sets.

As in every sparse optimizer, checkpointed state is in the first parameter group: the frozen levels and scores, and the
buffers (batch-norm statistics) of every member.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from oto.optim.base import SparseOptimizer
from oto.optim.nested import Nested
from oto.optim.options import BaseOptions
from oto.optim.schedule import Schedule
from oto.optim.wrapped import Params

Buffers = Mapping[str, Tensor]
"""The persistent buffers of a member, by name."""


class FamilyOptimizer(SparseOptimizer):
    """A torch optimizer that freezes the ranking of a family's members at one of its steps.

    Args:
        params: As in :class:`SparseOptimizer`.
        nested: How the members are chosen.
        schedule: A schedule whose start is the step at which the ranking is frozen.
        setup: Further plain values that must agree with those of a checkpoint.

    Raises:
        OptionError, UnknownParameterError, NonFiniteParameterError: As in :class:`SparseOptimizer`.
    """

    def __init__(
        self,
        params: Params,
        nested: Nested,
        schedule: Schedule,
        setup: Mapping[str, Any],
        **options: Unpack[BaseOptions],
    ) -> None:
        self.nested, self.setup = nested, dict(setup)
        super().__init__(params, nested.smallest, schedule, **options)

    def sparse_step(self, t: int) -> None:
        """Descend; at one step, first rank the atoms by the current gradients and parameters."""
        self.observe(self.schedule.until_choice(t))
        if self.schedule.starts_period(t):
            scores = self.scores()
            first = self.param_groups[0]
            first["oto_levels"] = self.nested.levels(scores)
            first["oto_scores"] = scores.double().cpu()
            self._forget_averages()
        self.descend()

    @property
    def levels(self) -> Tensor | None:
        """The number of members besides the full network that keep each atom, uint8, shape ``(N,)``; ``None`` before
        the ranking is frozen."""
        levels: Tensor | None = self.param_groups[0].get("oto_levels")
        return levels

    @property
    def ranking(self) -> Tensor:
        """The scores by which the members were chosen, float64, shape ``(N,)``."""
        scores: Tensor = self.param_groups[0]["oto_scores"]
        return scores

    @property
    def buffers(self) -> Sequence[Buffers]:
        """The persistent buffers of every member, the largest first, as checkpoints hold them."""
        held: Sequence[Buffers] = self.param_groups[0].get("oto_buffers", ())
        return held

    @buffers.setter
    def buffers(self, held: Sequence[Buffers]) -> None:
        self.param_groups[0]["oto_buffers"] = [dict(one) for one in held]

    def by_group(self, kept: Tensor) -> dict[str, NDArray[np.int64]]:
        """For each node group, the kept atoms: sorted int64 indices.

        Args:
            kept: Which atoms are kept, bool, shape ``(N,)``.
        """
        sizes = [group.size for group in self.node_groups]
        own = zip(self.node_groups, kept.cpu().split_with_sizes(sizes), strict=True)
        return {group.name: np.flatnonzero(mask.numpy()) for group, mask in own}

    def describe_setup(self) -> dict[str, Any]:
        """As in :class:`SparseOptimizer`, with all targets and ``setup``."""
        described = super().describe_setup()
        described.pop(self.choice.target.name)
        asked = [[choice.target.name, choice.target.asked] for choice in self.nested.choices]
        return described | {"targets": asked} | self.setup

    def plan(self) -> str:
        """A printable text: the targets, and what happens at which step."""
        freeze, total = self.schedule.start, self.schedule.total_steps
        lines = [str(choice.target) for choice in self.nested.choices]
        lines.append(f"steps 0–{freeze}  the full network trains alone")
        lines.append(f"step {freeze}  the ranking is frozen: {len(lines) - 1} members, each in the one before it")
        until = "" if total is None else f"–{total}"
        lines.append(f"steps {freeze + 1}{until}  the full network and members train together")
        return "\n".join(lines)


def levels_kept(levels: Tensor, member: int) -> Tensor:
    """Which atoms a member keeps, bool, shape ``(N,)``; member 0 is the full network, which keeps all."""
    kept: Tensor = levels >= member
    return kept
