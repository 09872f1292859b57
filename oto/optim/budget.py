"""How much may go by itself before the target is met, for papers whose groups leave at any step.

A choice (:mod:`oto.optim.select`) counts what is left on the CPU, with all it has to keep to: a target in any unit,
multiples, ties, and floors. A paper that lets groups go when *they* are ready has to know at every step whether one
more may, and must not read back from a device which ones went. So the counts are read once in a while, as a period
begins, and become a :class:`Budget`: prices that never promise too much. Costs are sums of products of counts, so what
several groups save together is at most what each would save alone, and those prices are added up until the next
reading. What is left of the budget then is spent in the next period.
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
"""The cost of the full network, in the whole numbers that prices are counted in: their sums are the same everywhere."""


@dataclass(frozen=True, eq=False)
class Budget:
    """What may go from some counts on. G node groups, T ties (a group that is not tied is alone in its own), N atoms.

    A group closes *units*, of as many atoms as its count must be a multiple of; the first atom of a unit pays for it,
    and where groups are tied, only in the one that closes it first: the others have to follow.

    Attributes:
        group: The node group of each atom, int64, shape ``(N,)``.
        tie: The tie of each node group, int64, shape ``(G,)``.
        counts: Atoms that it has left, shape ``(G,)``.
        whole: Those of them that a target counts: even within a tie, and multiples.
        unit: Atoms of its units, shape ``(G,)``.
        most: How many atoms it may lose, shape ``(G,)``.
        price: What a unit saves, of ``WHOLE``, int64, shape ``(T,)``.
        left: By how much the cost is above the goal, of ``WHOLE``, an int64 of no dimension.
        lost: How many atoms each lost since, and the model no longer has, shape ``(G,)``.
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
            counts: How many atoms each node group had left when they were read.
            lost: How many of those the model lost since, as it was shrunk.
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
        # rounding may not keep the last group from going: each price is off by half of one at most
        left = round((now - goal) / full * WHOLE) + len(group)
        numbers = (group, ties, counts, whole, choice.multiples, most, np.rint(saved / full * WHOLE), left, lost)
        return cls(*(torch.from_numpy(np.asarray(n, dtype=np.int64)) for n in numbers))

    def to(self, device: torch.device) -> Budget:
        own = {field.name: sent(getattr(self, field.name), device) for field in fields(self)}
        return replace(self, **own)

    def open(self, gone: Tensor) -> Tensor:
        """Whether an atom of this node group may still go, bool, shape ``(N,)``.

        Args:
            gone: Which atoms went since the counts were read, bool, shape ``(N,)``.
        """
        away = self._away(gone)
        closed = self._closed_ties(self._closed(away))
        pays = self._closed(away + 1) > closed[self.tie]
        spent = (self.price * closed).sum()
        fits = (away < self.most) & (spent + self.price[self.tie] * pays <= self.left)
        return fits[self.group]

    def allowed(self, candidates: Tensor, order: Tensor, gone: Tensor) -> Tensor:
        """Those of the candidates that may go, bool, shape ``(N,)``.

        Args:
            candidates: What would go, bool, shape ``(N,)``.
            order: The lowest go first, shape ``(N,)``.
            gone: Which atoms went since the counts were read, bool, shape ``(N,)``.
        """
        queue = torch.where(candidates, order, torch.inf).argsort(stable=True)
        own = self.group[queue]
        place = torch.arange(len(queue), device=queue.device)
        by_group = own.argsort(stable=True)  # node group after node group, so the first of each is where it always is
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
        """How many atoms each node group lost, shape ``(G,)``."""
        return self.lost.clone().index_add_(0, self.group, gone.to(torch.int64))

    def _closed(self, away: Tensor, of: Tensor | None = None) -> Tensor:
        """How many units are closed once so many atoms of these node groups, or of all, are gone."""
        counts, whole, unit = (x if of is None else x[of] for x in (self.counts, self.whole, self.unit))
        kept = (counts - away).clamp_min(0)
        closed = torch.div(whole + unit - 1, unit, rounding_mode="floor") - torch.div(kept, unit, rounding_mode="floor")
        return torch.where(kept >= whole, 0, closed)

    def _closed_ties(self, closed: Tensor) -> Tensor:
        """The greatest number of closed units in each tie, shape ``(T,)``."""
        return torch.zeros_like(self.price).scatter_reduce_(0, self.tie, closed, "amax")


def whole_counts(choice: Choice, counts: Counts) -> Counts:
    """What a target counts of these: in every tie as many as in the emptiest group, in multiples unless it is full."""
    ties, _ = choice.tied
    units = counts // choice.multiples
    fewest = np.full(ties.max(initial=-1) + 1, np.iinfo(np.int64).max)
    np.minimum.at(fewest, ties, units)
    touched = np.zeros(len(fewest), dtype=bool)
    np.logical_or.at(touched, ties, counts < choice.full)
    whole: Counts = np.where(touched[ties], fewest[ties] * choice.multiples, counts)
    return whole


def rest(choice: Choice, scores: Tensor, alive: Tensor) -> Tensor:
    """What must go for the target to be met where some atoms went by themselves, bool, shape ``(N,)``, on the CPU.

    First the lowest scores of node groups whose count is uneven, or no multiple; then what the choice adds to that.

    Args:
        scores: Importance of every atom, shape ``(N,)``; higher is kept.
        alive: Which atoms are left, bool, shape ``(N,)``.
    """
    values, left = scores.double().cpu().numpy(), alive.cpu().numpy()
    sizes = np.array(choice.sizes, dtype=np.int64)
    group = np.repeat(np.arange(len(sizes)), sizes)
    counts = np.bincount(group[left], minlength=len(sizes)).astype(np.int64)
    surplus = counts - whole_counts(choice, counts)
    uneven = torch.from_numpy(left & (places(np.where(left, values, np.inf), sizes) < surplus[group]))
    return uneven | choice.select(scores, alive.cpu() & ~uneven)


def _first_of(keys: Tensor) -> Tensor:
    """Whether each key is the first of its kind."""
    by_key = keys.argsort(stable=True)
    ordered = keys[by_key]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(first).scatter_(0, by_key, first)
