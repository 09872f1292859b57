"""Read ``target_kept``: how many atoms each node group keeps, given by names of parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real

import numpy as np

from oto.errors import TargetError, some
from oto.groups.node_group import NodeGroup
from oto.groups.policy import atoms_of, called
from oto.optim.select import least_kept
from oto.optim.target import Counts


def as_named(
    kept: Mapping[str, float], groups: Sequence[NodeGroup], divisors: Sequence[int], whole: Sequence[NodeGroup] = ()
) -> Counts:
    """The number of atoms that each node group keeps, given by names of parameters, shape ``(groups,)``.

    Args:
        kept: Names or globs of parameters or groups, each with a number of atoms or a share of them. Shares are rounded
            up, to whole atoms and to the divisor. If several match a group, the largest number counts. Groups that none
            matches stay whole.
        groups, divisors: The prunable node groups, and the numbers that their kept counts must be multiples of.
        whole: All other node groups.

    Raises:
        TargetError: A number is invalid, is less than the group keeps anyway, or has no effect.
        UnknownParameterError: A name or glob matches nothing.
    """
    by = {group.name: divisor for group, divisor in zip(groups, divisors, strict=True)}
    asked: dict[str, dict[str, int]] = {}  # by pattern, what each of its groups would keep
    for pattern, number in kept.items():
        if isinstance(number, Real) and not number > 0:
            raise TargetError(f"target_kept is {number!r} for {pattern!r}; something of every group is kept")
        atoms = {g: atoms_of(number, g.size, "target_kept") for g in called(pattern, [*groups, *whole])}
        _require_so_many(pattern, number, atoms)
        asked[pattern] = {g.name: least_kept(g.size, n, by[g.name]) for g, n in atoms.items() if g.name in by}
        _require_free(pattern, [g for g, n in atoms.items() if g.name not in by and n < g.size], asked[pattern])
    own = {
        g.name: max((wanted[g.name] for wanted in asked.values() if g.name in wanted), default=g.size) for g in groups
    }
    shares: dict[str | None, float] = {}  # by tie
    for group in groups:
        shares[group.tie] = max(shares.get(group.tie, 0), own[group.name] / group.size)
    counts = {g.name: own[g.name] if g.tie is None else round(shares[g.tie] * g.size) for g in groups}
    _require_followed(asked, counts, groups)
    return np.array(list(counts.values()), dtype=np.int64)


def _require_so_many(pattern: str, number: float, named: Collection[NodeGroup]) -> None:
    """Raise an error if a number exceeds the atoms of all named groups, such as channels for a group of heads."""
    if isinstance(number, Integral) and all(group.size < number for group in named):
        group = max(named, key=lambda group: group.size)
        raise TargetError(
            f"target_kept asks {pattern!r} to keep {number}, but {group.name} has {group.size} atoms"
            + (f" ({group.factor})" if group.factor else "")
            + "\n  effect  nothing of it would go\n"
            f"  to fix  ask for a share, such as 0.5, or a number below {group.size}"
        )


def _require_free(pattern: str, held: Sequence[NodeGroup], free: Mapping[str, int]) -> None:
    if held and not free:
        raise TargetError(
            f"target_kept names {pattern!r}, and what it matches stays whole:"
            f" {held[0].name}, because {held[0].reason}\n"
            "  effect  nothing of it could go\n"
            "  to fix  leave it out; oto.explain() says what may be done about what stays whole"
        )


def _require_followed(
    asked: Mapping[str, Mapping[str, int]], counts: Mapping[str, int], groups: Sequence[NodeGroup]
) -> None:
    """Raise an error for requests that would have no effect, or that contradict ``min_kept``."""
    for pattern, wanted in asked.items():
        if wanted and all(counts[name] > n for name, n in wanted.items()):
            name, n = next(iter(wanted.items()))
            tie = next(group.tie for group in groups if group.name == name)
            others = [
                g.name for g in groups if tie is not None and g.tie == tie and counts[g.name] > n and g.name != name
            ]
            raise TargetError(
                f"target_kept asks {name} to keep {n} by {pattern!r}, but it would keep {counts[name]}: by another name"
                " or glob, or since it is to have as many as groups that keep more (layout)\n"
                f"  effect  {pattern!r} decides nothing\n"
                "  to fix  name what keeps less apart from what keeps more"
                + (f"; and alike all that is tied to it: {some(others)}" if others else "")
            )
    for group in groups:
        if counts[group.name] < group.min_kept:
            raise TargetError(
                f"target_kept leaves {counts[group.name]} of the {group.size} atoms of {group.name}, min_kept"
                f" {group.min_kept}\n  to fix  lower min_kept, or ask for {group.min_kept / group.size:.2g} or more"
            )
