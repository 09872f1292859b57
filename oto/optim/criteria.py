"""Combine saliency criteria into the importance of atoms, and choose default options for each kind of criteria.

read_criteria({"saliency": "magnitude"})   # normalized by group means, costs do not count
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oto.errors import TargetError
from oto.optim.options import ChoiceOptions
from oto.optim.saliency import (
    AS_PUBLISHED,
    CRITERIA,
    FROM_WEIGHTS,
    NORMALIZE,
    OF_THE_LOSS,
    Entries,
    Saliency,
    Weights,
    compared,
    importance,
    name_of,
    raw_scores,
    resolve,
    shared_out,
)

DEFAULT: Weights = {"taylor_second_order": 1.0}
"""Half the mean of ``<x, g>^2`` over many batches: an estimate of how much the loss rises without the group, with the
empirical Fisher matrix in place of the Hessian (as in Optimal Brain Damage). It is in the unit of the loss, so it can
be compared between layers, and divided by a cost."""

WITHIN = "path_norm"
"""The criterion by which the importance of a node group is distributed among its atoms. A dozen batches estimate the
sum over a group well, but not the score of a single atom, for which the weights are a better estimate. This was
measured on convolutional networks; in a sentence encoder the opposite holds (`docs/benchmarks/rivals.md`)."""

FROM_MAGNITUDE: dict[str, Any] = {"saliency": "magnitude"}
"""The options of a choice without gradients."""


class Defaults(NamedTuple):
    """The values of options that are not given."""

    normalize: str
    by_cost: float
    average_steps: int


DEFAULTS = {
    "of the loss": Defaults("none", by_cost=1.0, average_steps=32),
    "of any unit": Defaults("mean", by_cost=0.0, average_steps=32),
    "as published": Defaults("all", by_cost=0.0, average_steps=1),
}
"""Defaults by kind of criteria: all in the unit of the loss; any others, for which costs do not count, since dividing a
magnitude by MACs would empty parallel layers; and ``saliency="hesso"`` or ``"dhspg"``."""


@dataclass(frozen=True, eq=False)
class Criteria:
    """How the importance of atoms is measured, and how much it is weighed against costs.

    Attributes:
        criteria: Saliency criteria, each with its weight.
        normalize: What a criterion is divided by, a key of :data:`oto.optim.saliency.NORMALIZE`.
        within: The criterion of weights by which the importance of a node group is distributed among its atoms;
            ``None`` if each atom keeps its own score.
        everywhere: Whether ``within`` applies to all node groups, or only to those that a convolution over images
            reads.
        by_cost: How much costs count, see :mod:`oto.optim.select`; 0 for not at all.
        average_steps: Number of steps before a choice over which criteria that use gradients are averaged.
    """

    criteria: tuple[tuple[Saliency, float], ...]
    normalize: str
    within: Saliency | None
    everywhere: bool
    by_cost: float
    average_steps: int

    @property
    def averaged(self) -> list[Saliency]:
        """The criteria that use gradients."""
        return [criterion for criterion, _ in self.criteria if criterion not in FROM_WEIGHTS]

    def scores(self, entries: Sequence[Entries], alive: Tensor, averages: Mapping[Saliency, Tensor]) -> Tensor:
        """Importance of every atom, shape ``(N,)``.

        Args:
            entries: The entries of every node group.
            alive: Whether an atom is still unpruned, bool, shape ``(N,)``.
            averages: Criteria that are computed already, shape ``(N,)`` each.
        """
        sizes = [own.size for own in entries]
        raw = [averages[c] if c in averages else raw_scores(entries, c, alive.device) for c, _ in self.criteria]
        scores = importance(raw, [weight for _, weight in self.criteria], alive, compared(entries), self.normalize)
        if self.within is None:
            return scores
        by = raw_scores(entries, self.within, alive.device)
        shares = torch.cat([torch.full((own.size,), self.everywhere or own.convolved) for own in entries])
        return torch.where(shares.to(alive.device), shared_out(scores, by, alive, sizes), scores)


def read_criteria(options: ChoiceOptions) -> dict[str, Any]:
    """The fields of :class:`Criteria`, from the options of an optimizer.

    Raises:
        TargetError: An option is invalid.
    """
    saliency, within, by_cost = options.get("saliency"), options.get("within"), options.get("by_cost")
    criteria, steps = tuple(resolve(DEFAULT if saliency is None else saliency)), options.get("average_steps")
    _check(options)
    if published(options):
        default = DEFAULTS["as published"]
    else:
        default = DEFAULTS["of the loss" if all(c in OF_THE_LOSS for c, _ in criteria) else "of any unit"]
    return {
        "criteria": criteria,
        "normalize": options.get("normalize") or default.normalize,
        "within": _within(within or (WITHIN if saliency is None else "none")),
        "everywhere": within is not None,
        "by_cost": default.by_cost if by_cost is None else by_cost,
        "average_steps": default.average_steps if steps is None else steps,
    }


def published(options: ChoiceOptions) -> bool:
    """Whether ``saliency`` names a paper, so that everything is done as published."""
    saliency = options.get("saliency")
    return isinstance(saliency, str) and saliency in AS_PUBLISHED


def _within(criterion: str | Saliency) -> Saliency | None:
    if isinstance(criterion, str):
        return None if criterion == "none" else CRITERIA[criterion]
    return criterion


def _check(options: ChoiceOptions) -> None:
    scope, divisible, normalize = (
        options.get("scope", "global"),
        options.get("group_divisible", 1),
        options.get("normalize"),
    )
    within, by_cost, average_steps = (options.get("within"), options.get("by_cost"), options.get("average_steps"))
    if scope not in ("global", "local"):
        raise TargetError(f"scope is {scope!r}; it is 'global' or 'local'")
    if divisible < 1:
        raise TargetError(f"group_divisible is {divisible}; it is at least 1")
    if normalize is not None and normalize not in NORMALIZE:
        raise TargetError(f"normalize is {normalize!r}; it is one of {', '.join(NORMALIZE)}")
    shares = ["none", *(name for name in map(name_of, FROM_WEIGHTS) if name in CRITERIA)]
    if isinstance(within, str) and within not in shares:
        raise TargetError(f"within is {within!r}; it is one of {', '.join(shares)}, or a function of weights")
    if by_cost is not None and not by_cost >= 0:
        raise TargetError(f"by_cost is {by_cost}; it is an exponent, at least 0")
    if average_steps is not None and average_steps < 1:
        raise TargetError(f"average_steps is {average_steps}; it is at least 1, the step of the choice")
