"""Scores and a target -> which atoms are redundant.

Everything is a handful of sorts over all atoms at once, on the device of the scores, without synchronisation. Sorts
are stable and ties fall to the first atom of the first node group, so every rank of a distributed run that has the
same scores chooses the same atoms.

With ``divisible = d > 1`` atoms leave a node group in *units*: the first unit brings the kept count to a multiple of
``d``, every further one holds ``d`` atoms. A unit is as salient as the most salient atom that it holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def least_kept(size: int, min_kept: int, divisible: int) -> int:
    """Least number of atoms that a node group of ``size`` atoms keeps.

    >>> least_kept(10, 3, 1), least_kept(10, 3, 4), least_kept(3, 1, 4)
    (3, 4, 3)
    """
    units = -(-max(min_kept, 1) // divisible)
    return min(units * divisible, size)


def reachable(sizes: Sequence[int], min_kept: Sequence[int], divisible: int = 1) -> int:
    """Greatest number of atoms that may be pruned together."""
    return sum(size - least_kept(size, kept, divisible) for size, kept in zip(sizes, min_kept, strict=True))


def select(scores: Tensor, sizes: Sequence[int], min_kept: Sequence[int], count: int, divisible: int = 1) -> Tensor:
    """Mark the ``count`` least salient atoms, without emptying a node group.

    Args:
        scores: Saliency of every atom, node group after node group, shape ``(N,)``; ``-inf`` for the atoms that are
            pruned already.
        sizes: Atoms of each node group; their sum is N.
        min_kept: Least number of atoms that each node group keeps.
        count: How many atoms to mark, those with ``-inf`` included; at most ``reachable(sizes, min_kept, divisible)``.
        divisible: The kept count of a node group that loses atoms is a multiple of this.

    Returns:
        Boolean tensor, shape ``(N,)``, with ``count`` entries set; up to ``divisible - 1`` fewer where only whole units
        may go.

    Example:
        >>> select(torch.tensor([3.0, 1.0, 2.0, 0.5, 0.1]), [3, 2], [1, 1], 3)
        tensor([False,  True,  True, False,  True])
    """
    device = scores.device
    size = torch.tensor(sizes, device=device)
    least = torch.tensor([least_kept(s, k, divisible) for s, k in zip(sizes, min_kept, strict=True)], device=device)
    group = torch.arange(len(sizes), device=device).repeat_interleave(size, output_size=len(scores))
    first = (size.cumsum(0) - size)[group]
    size, least = size[group], least[group]

    # node group after node group, rising scores inside: `rank` atoms of the same group go before this one
    order = scores.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    rank = torch.arange(len(scores), device=device) - first

    end = size - divisible * ((size - rank - 1) // divisible)  # atoms gone from the group once this one's unit is gone
    allowed = end <= size - least
    score = scores[order][first + end - 1].masked_fill(~allowed, torch.inf)

    turn = score.argsort(stable=True)  # the atoms of a unit have one score and lie side by side, so they stay together
    place = torch.empty_like(turn).scatter_(0, turn, torch.arange(len(scores), device=device))
    chosen = allowed & (place + (end - 1 - rank) < count)
    return torch.zeros_like(chosen).scatter_(0, order, chosen)
