"""How much may still be removed before the target is met, for algorithms that remove groups at any step.

A choice (:mod:`oto.optim.select`) counts on the CPU what remains, and respects a target in any unit, multiples, ties
and floors. An algorithm that removes a group when it leaves its half-space must know at every step whether one more may
be removed, without reading back from the device which ones were. So the counts are read at the beginning of each
period, and turned into a :class:`Budget` of prices that never underestimate the savings: costs are sums of products of
counts, so several groups together save at most the sum of what each would save alone. The prices are added up until the
counts are read again. What remains of the budget is spent in the next period.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from oto.optim.choice import Choice, places
from oto.optim.entries import sent
from oto.optim.target import Counts

WHOLE = 1 << 40
"""The cost of the full network in the unit of prices, which are integers so that sums are equal on every device."""


@dataclass(frozen=True, eq=False)
class Budget:
    """How much may still be removed, starting from known counts.

    The shapes below use G node groups, T ties (an untied group has its own), and N atoms.

    Atoms are removed in *units* of as many as the count of their group must be a multiple of. The first removed atom of
    a unit pays for the whole unit. In a tie, only the first group to begin a unit pays; the others must follow.

    Attributes:
        group: The node group of each atom, int64, shape ``(N,)``.
        tie: The tie of each node group, int64, shape ``(G,)``.
        counts: The remaining atoms of each node group, shape ``(G,)``.
        whole: The counts as the target measures them, equal within a tie and rounded to multiples, shape ``(G,)``.
        unit: Number of atoms in a unit, shape ``(G,)``.
        most: How many atoms each node group may lose, shape ``(G,)``.
        price: The savings of a unit, where ``WHOLE`` is the full cost, int64, shape ``(T,)``.
        left: The cost minus the goal, in the unit of ``price``, int64, shape ``()``.
        lost: How many atoms each node group has lost since, because the model was shrunk, shape ``(G,)``.
    """

    group: Tensor
    tie: Tensor
    counts: Tensor
    whole: Tensor
    unit: Tensor
    most: Tensor
    price: Tensor
    left: Tensor
    lost: Tensor

    @classmethod
    def of(cls, choice: Choice, counts: Counts, lost: Counts) -> Budget:
        """The budget of a choice, on the CPU.

        Args:
            counts: The remaining atoms of each node group when they were last read.
            lost: How many of those have been removed from the model since, because it was shrunk.
        """
        ties, per = choice.tied
        whole = whole_counts(choice, counts)
        one = np.unique(ties, return_index=True)[1]
        tied = (whole // per)[one]
        saved = choice.tied_measure.marginal(tied, np.minimum((choice.multiples // per)[one], tied))
        floor = choice.lowest(counts)
        most = np.where(saved[ties] > 0, np.maximum(counts - floor, 0), 0)
        full, goal, now = choice.target.full, choice.target.goal, choice.target.measure(whole)
        group = np.repeat(np.arange(len(choice.sizes)), choice.sizes)
        # rounding must not prevent the removal of the last group: each price is off by at most a half
        left = round((now - goal) / full * WHOLE) + len(group)
        numbers = (group, ties, counts, whole, choice.multiples, most, np.rint(saved / full * WHOLE), left, lost)
        return cls(*(torch.from_numpy(np.asarray(n, dtype=np.int64)) for n in numbers))

    def to(self, device: torch.device) -> Budget:
        own = {field.name: sent(getattr(self, field.name), device) for field in fields(self)}
        return replace(self, **own)

    def open(self, gone: Tensor) -> Tensor:
        """Whether one more atom of the node group of each atom may be removed, bool, shape ``(N,)``.

        Args:
            gone: Which atoms were removed since the counts were read, bool, shape ``(N,)``.
        """
        away = self._away(gone)
        closed = self._closed_ties(self._closed(away))
        pays = self._closed(away + 1) > closed[self.tie]
        spent = (self.price * closed).sum()
        fits = (away < self.most) & (spent + self.price[self.tie] * pays <= self.left)
        return fits[self.group]

    def allowed(self, candidates: Tensor, order: Tensor, gone: Tensor) -> Tensor:
        """The candidates that may be removed, bool, shape ``(N,)``.

        Args:
            candidates: The atoms to remove if possible, bool, shape ``(N,)``.
            order: Candidates with the lowest values are removed first, shape ``(N,)``.
            gone: Which atoms were removed since the counts were read, bool, shape ``(N,)``.
        """
        queue = torch.where(candidates, order, torch.inf).argsort(stable=True)
        own = self.group[queue]
        place = torch.arange(len(queue), device=queue.device)
        by_group = own.argsort(stable=True)  # node group after node group, so the first of each has a known position
        first = torch.searchsorted(self.group, torch.arange(len(self.counts), device=queue.device))
        rank = torch.empty_like(place).scatter_(0, by_group, place - first[own[by_group]])
        away = self._away(gone)
        closes = self._closed((away[own] + rank + 1), own)
        closed = self._closed_ties(self._closed(away))
        fits = candidates[queue] & (away[own] + rank < self.most[own])
        new = fits & (closes > closed[self.tie[own]])
        key = self.tie[own] * (len(queue) + 2) + closes
        pays = new & _first_of(torch.where(new, key, -1))
        spent = (self.price * closed).sum() + (self.price[self.tie[own]] * pays).cumsum(0)
        return torch.zeros_like(candidates).scatter_(0, queue, fits & (spent <= self.left))

    def _away(self, gone: Tensor) -> Tensor:
        """How many atoms each node group has lost since the counts were read, shape ``(G,)``."""
        return self.lost.clone().index_add_(0, self.group, gone.to(torch.int64))

    def _closed(self, away: Tensor, of: Tensor | None = None) -> Tensor:
        """The number of units that have begun once ``away`` atoms of the node groups ``of`` (or of all) are removed."""
        counts, whole, unit = (x if of is None else x[of] for x in (self.counts, self.whole, self.unit))
        kept = (counts - away).clamp_min(0)
        closed = torch.div(whole + unit - 1, unit, rounding_mode="floor") - torch.div(kept, unit, rounding_mode="floor")
        return torch.where(kept >= whole, 0, closed)

    def _closed_ties(self, closed: Tensor) -> Tensor:
        """The greatest number of begun units in each tie, shape ``(T,)``."""
        return torch.zeros_like(self.price).scatter_reduce_(0, self.tie, closed, "amax")


def whole_counts(choice: Choice, counts: Counts) -> Counts:
    """The counts as a target measures them: the lowest of each tie, rounded down to multiples unless full."""
    ties, _ = choice.tied
    units = counts // choice.multiples
    fewest = np.full(ties.max(initial=-1) + 1, np.iinfo(np.int64).max)
    np.minimum.at(fewest, ties, units)
    touched = np.zeros(len(fewest), dtype=bool)
    np.logical_or.at(touched, ties, counts < choice.full)
    whole: Counts = np.where(touched[ties], fewest[ties] * choice.multiples, counts)
    return whole


def rest(choice: Choice, scores: Tensor, alive: Tensor) -> Tensor:
    """The atoms that must still be removed to meet the target, bool, shape ``(N,)``, on the CPU.

    These are the atoms with the lowest scores in node groups whose count is not that of their tie, or not a multiple,
    and the atoms that the choice adds.

    Args:
        scores: Importance of every atom, shape ``(N,)``; higher is kept.
        alive: Which atoms remain, bool, shape ``(N,)``.
    """
    values, left = scores.double().cpu().numpy(), alive.cpu().numpy()
    sizes = np.array(choice.sizes, dtype=np.int64)
    group = np.repeat(np.arange(len(sizes)), sizes)
    counts = np.bincount(group[left], minlength=len(sizes)).astype(np.int64)
    surplus = counts - whole_counts(choice, counts)
    uneven = torch.from_numpy(left & (places(np.where(left, values, np.inf), sizes) < surplus[group]))
    return uneven | choice.select(scores, alive.cpu() & ~uneven)


def _first_of(keys: Tensor) -> Tensor:
    """Whether each key is the first one with its value, bool."""
    by_key = keys.argsort(stable=True)
    ordered = keys[by_key]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(first).scatter_(0, by_key, first)
