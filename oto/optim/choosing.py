"""Choose atoms during training: score every atom, now or averaged over steps, and mark those to remove.

::

    self.observe(self.schedule.until_choice(t))         # at each step: add its gradients to the averages
    if self.schedule.starts_period(t):
        self.choose_redundant(self.schedule.share(t))   # mark; each paper brings them to zero in its own way

The rule that selects atoms from scores is in :mod:`oto.optim.choice`.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from oto.groups.node_group import NodeGroup, Slice
from oto.optim.compensating import Compensating
from oto.optim.plan import FREE, PRUNED, REDUNDANT
from oto.optim.refusals import (
    any_entry_of,
    refuse_sparse_gradients,
    require_finite,
    require_gradients,
    tell_of_no_gradient,
)
from oto.optim.saliency import Entries, Saliency, any_gradient, raw_scores
from oto.optim.sums import Sums
from oto.shards import any_sharded


class Choosing(Compensating):
    """A wrapping optimizer that chooses which atoms of its node groups to remove."""

    _computed: tuple[Sequence[Tensor], list[NodeGroup]] | None = None

    def observe(self, ahead: int | None) -> None:
        """Add the scores of this step to the averages, if the next choice is at most ``average_steps`` away.

        Args:
            ahead: Number of steps to the next choice; ``None`` if there is none.
        """
        averaged = self.choice.averaged
        if ahead is None or ahead >= self.choice.average_steps or not averaged or not self.choice.target.wants_less:
            return
        first = self.param_groups[0]
        entries = self.entries()
        first["oto_sums"] = first["oto_sums"] + torch.stack(
            [raw_scores(entries, criterion, self.atoms.device) for criterion in averaged]
        )
        first["oto_seen"] += 1

    def scores(self) -> Tensor:
        """The current importance of every atom, shape ``(N,)``.

        Raises:
            NonFiniteParameterError: A parameter or gradient holds NaN or infinity.
            NoGradientError: The criterion needs gradients, and there are none.
        """
        first, averaged, alive = self.param_groups[0], self.choice.averaged, self.atoms != PRUNED
        entries = self.entries()
        if seen := first["oto_seen"]:
            averages = {c: sums / seen for c, sums in zip(averaged, first["oto_sums"], strict=True)}
        else:
            averages = {c: raw_scores(entries, c, alive.device) for c in averaged}
        scores = self.choice.scores(entries, alive, averages)
        self.check_scores(entries, averages, scores)
        return scores

    def choose_redundant(self, share: float) -> None:
        """Mark atoms as redundant such that removing them achieves ``share`` of the total cost reduction."""
        if not self.choice.target.wants_less:
            return
        self._record_cost()
        self.mark_redundant(self.choice.select(self.scores(), self.atoms != PRUNED, share), final=share >= 1)

    def mark_redundant(self, chosen: Tensor, final: bool = True) -> None:
        """Mark atoms as redundant; all others that are not pruned become free.

        Args:
            chosen: The atoms to bring to zero, bool, shape ``(N,)``.
            final: Whether this is the last choice.
        """
        alive = self.atoms != PRUNED
        self.atoms = torch.where(alive, torch.where(chosen.to(alive.device), REDUNDANT, FREE), PRUNED).to(torch.uint8)
        self._forget_averages()
        if self.fold_at_choice:
            self.begin_fold()
        if final:
            self.choice.warn_of_miss(self.atoms == FREE)
            self.choice.warn_of_collapse(self.atoms == FREE)

    # The entries that are scored, and checks -------------------------------------------------------------------------

    def entries(self) -> list[Entries]:
        """The entries of the ``zeros`` slices of every node group, with their gradients.

        With ``maximize`` the sign of a gradient is changed, so that the step always descends along it.
        """
        self.refuse_sparse_gradients()
        parameters, maximized = self.parameters(), self.maximized()
        if any_sharded(parameters.values()):
            return self.sums(parameters, maximized).entries()
        return [self.entries_of(group, parameters, maximized) for group in self.computed_groups()]

    def computed_groups(self) -> list[NodeGroup]:
        """The node groups, without slices of parameters in pruned segments, which have no effect on any output."""
        if not any(group.segment for group in self.node_groups):
            return list(self.node_groups)
        codes = self._codes()
        if self._computed is None or self._computed[0] is not codes:  # codes is a new list after each choice
            self._computed = codes, self._without_gone(codes)
        return list(self._computed[1])

    def _without_gone(self, codes: Sequence[Tensor]) -> list[NodeGroup]:
        parameters, gone = self.parameters(), set[str]()
        for group, atoms in zip(self.node_groups, codes, strict=True):
            if group.segment and group.size and bool((atoms == PRUNED).all()):
                # of a parameter after a concatenation, only some entries belong to the segment
                whole = (
                    own for own in group.slices if own == Slice.whole(own.parameter, parameters[own.parameter].shape)
                )
                gone |= {own.parameter for own in whole}

        def read(group: NodeGroup) -> NodeGroup:
            left = [piece for piece in group.slices if piece.parameter not in gone or piece in group.zeros]
            return group if group.segment else replace(group, slices=tuple(left))

        return list(map(read, self.node_groups)) if gone else list(self.node_groups)

    def maximized(self) -> set[str]:
        """Names of the parameters in parameter groups with ``maximize=True``."""
        return {n for group in self.param_groups if group.get("maximize", False) for n in group["param_names"]}

    def sums(self, parameters: Mapping[str, Tensor], maximized: Container[str]) -> Sums:
        """The sums that criteria read if parameters are sharded over processes."""
        return Sums.of(self.computed_groups(), parameters, maximized=maximized, device=self.atoms.device)

    def entries_of(self, group: NodeGroup, parameters: Mapping[str, Tensor], maximized: Container[str]) -> Entries:
        """The entries of one node group. Subclasses may replace the parameters by other tensors."""
        return Entries.of(group, parameters, maximized)

    def refuse_sparse_gradients(self) -> None:
        """Raise ``OTOError`` if a parameter of a node group has a sparse gradient."""
        refuse_sparse_gradients(self.node_groups, self.parameters())

    def check_scores(self, entries: Sequence[Entries], averages: Mapping[Saliency, Tensor], scores: Tensor) -> None:
        """Check the scores before a choice. Synchronizes.

        Raises:
            NonFiniteParameterError: A score is NaN or infinite.
            NoGradientError: The criteria need gradients, and there are none.
        """
        require_finite(scores, self.node_groups, entries, self.clock)
        remedy = "call loss.backward() before optimizer.step(), of a loss that depends on the model's parameters"
        if any_entry_of(p.grad for p in self.parameters().values()):
            # layers after the groups have gradients, but pass none back to them
            remedy = "a layer after them is still zero, it seems: let pruning begin later (start_pruning_step=)"
        require_gradients(self.node_groups, entries, self.choice.costing(self.atoms != PRUNED), averages, remedy)
        if not averages and not any_gradient(entries):
            tell_of_no_gradient(remedy)
