"""Choose the atoms that each member of a family keeps, from one ranking, such that the sets are nested.

The same scores are used for all targets. The largest member is chosen from all atoms, and each further one from the
atoms of the member before it, so ``K_1 ⊇ K_2 ⊇ ...`` holds by construction. A member between two others can still be
made later: it keeps all of the next smaller member, and the best of the rest.

Example: of eight atoms, a member of size 6 keeps the six best by score and cost, and one of size 4 keeps four of these
six.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from oto.errors import NotPrunedWarning, TargetError, users_level
from oto.optim.choice import Choice
from oto.optim.target import Counts


@dataclass(frozen=True, eq=False)
class Nested:
    """The choices of all members of a family.

    Attributes:
        choices: One for each target, the largest first; they differ only in their targets.
    """

    choices: tuple[Choice, ...]

    @classmethod
    def of(cls, choices: Sequence[Choice]) -> Nested:
        """Make the choices of a family, and check that the targets are given from the largest to the smallest.

        Raises:
            TargetError: There is no target, one of them removes nothing, or those of one unit do not decrease.
        """
        if not choices:
            raise TargetError("a family has no targets\n  to fix  such as targets=[0.75, 0.5, 0.25]")
        for choice in choices:
            if not choice.target.wants_less:
                raise TargetError(
                    f"{choice.target}: the full network is a member of every family\n"
                    "  to fix  leave this target out; it is member 0"
                )
        goals: dict[str, list[float]] = {}
        for choice in choices:
            goals.setdefault(choice.target.unit, []).append(choice.target.goal)
        for unit, asked in goals.items():
            if any(after >= before for before, after in pairwise(asked)):
                raise TargetError(
                    f"the targets in {unit} do not fall: {', '.join(f'{goal:,.6g}' for goal in asked)}\n"
                    "  effect  members are nested, each in the one before it\n"
                    "  to fix  give them from the largest to the smallest, each once"
                )
        return cls(tuple(choices))

    @property
    def smallest(self) -> Choice:
        """The choice of the smallest member, whose criteria apply to all members."""
        return self.choices[-1]

    def levels(self, scores: Tensor) -> Tensor:
        """The number of members besides the full network that keep each atom, uint8, shape ``(N,)``, on the CPU.

        If a target is already met by the member before it, both members keep the same atoms. This gives a
        :class:`NotPrunedWarning` and not an error, so that the training up to that step is not lost.

        Args:
            scores: Importance of every atom, shape ``(N,)``.
        """
        alive = torch.ones(len(scores), dtype=torch.bool)
        levels = torch.zeros(len(scores), dtype=torch.uint8)
        for choice in self.choices:
            going = choice.select(scores, alive)
            if not bool((going & alive).any()):
                warnings.warn(
                    f"{choice.target} is met already by the member before it\n"
                    "  effect  two members of the family are one, which is trained twice as often\n"
                    "  to fix  leave one of both targets out, or ask for targets that lie further apart",
                    NotPrunedWarning,
                    stacklevel=users_level(),
                )
            alive = alive & ~going
            levels += alive.to(torch.uint8)
            choice.warn_of_collapse(alive)
        return levels


def between(choice: Choice, scores: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """The atoms that a new member between two others keeps, bool, shape ``(N,)``, on the CPU.

    Args:
        choice: The choice with the target of the new member.
        scores: Importance of every atom, by which the members were ranked, shape ``(N,)``.
        outer: The atoms of the next larger member, bool, shape ``(N,)``; the new one keeps a subset of these.
        inner: The atoms of the next smaller member, all of which the new one keeps; all ``False`` if there is none.

    Raises:
        TargetError: The target does not lie between the two, or there is no other width between them.
    """
    sizes = choice.sizes
    floor: Counts = _counts(inner, sizes)
    if inner.any():
        choice = replace(choice, least=floor, floor=floor)
    kept_least, goal = choice.target.measure(choice.least), choice.target.goal
    if not kept_least <= goal < choice.target.measure(_counts(outer, sizes)):
        raise TargetError(
            f"{choice.target}: not between {choice.target.measure(_counts(outer, sizes)):,.6g} and {kept_least:,.6g}\n"
            "  effect  no member was cut\n  to fix  ask for a target that no member of the family has yet"
        )
    kept: Tensor = outer & ~choice.select(scores, outer)  # the smaller member has the best atoms of each group
    assert bool((kept >= inner).all()), "members are nested"
    if torch.equal(kept, inner):
        raise TargetError(
            f"{choice.target}: no width between the next smaller member and the target\n"
            "  effect  no member was cut\n  to fix  take the next smaller member, or ask for more"
        )
    return kept


def _counts(kept: Tensor, sizes: list[int]) -> Counts:
    counts: Counts = torch.stack([own.sum() for own in kept.cpu().split_with_sizes(sizes)]).numpy()
    return counts
