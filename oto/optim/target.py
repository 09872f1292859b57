"""Targets: the maximum cost of the pruned network, in a unit that users know, and the measure of that cost.

    print(Target.of({"target_macs": 0.5}, sizes, costs))   # target_macs=0.5: at most 20,275,520 of 40,551,040 MACs

Shared by all sparse optimizers. A measure computes the cost as a function of the numbers of atoms that node groups
keep, and the savings of each group. :class:`oto.groups.cost.Polynomial` is one.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from oto.errors import TargetError, some
from oto.groups.cost import Costs, Polynomial

Counts = NDArray[np.int64]
"""How many atoms each node group keeps, shape ``(groups,)``."""


class Measure(Protocol):
    """A cost as a function of counts."""

    def __call__(self, counts: Counts) -> float:
        """The cost at some counts."""
        ...

    def marginal(self, counts: Counts, fewer: Counts) -> NDArray[np.float64]:
        """For each group, how much is saved if it alone keeps ``fewer`` fewer atoms; shapes ``(groups,)``."""
        ...

    def tied(self, ties: Counts, per: Counts | None = None) -> Measure:
        """The same cost as a function of one count per tie.

        Args:
            ties: The index of each group's tie, shape ``(groups,)``.
            per: The number of atoms of each group in one step of its tie, shape ``(groups,)``; 1 by default.
        """
        ...


UNITS = {
    "target_macs": "MACs",
    "target_params": "parameters",
    "target_bytes": "bytes",
    "target_latency_ms": "ms",
    "target_group_sparsity": "groups",
    "target_kept": "groups",
}


@dataclass(frozen=True, eq=False)
class Target:
    """The maximum cost of a network.

    Attributes:
        name: The keyword of the target.
        asked: Its value: a number, or one for each name or glob.
        goal: The maximum cost, in the unit of ``measure``.
        full: The cost of the full network.
        measure: The cost as a function of the counts.
    """

    name: str
    asked: float | Mapping[str, float]
    goal: float
    full: float
    measure: Measure

    @classmethod
    def of(
        cls,
        asked: Mapping[str, Any],
        sizes: Counts,
        costs: Costs | None,
        latency: Measure | None = None,
        kept: Counts | None = None,
    ) -> Target:
        """Make a target from the keywords of an optimizer, of which exactly one is not ``None``.

        Args:
            asked: ``target_macs``, ``target_params``, ``target_bytes``: a float in (0, 1] is the share to keep, an
                integer the number itself. ``target_latency_ms``: milliseconds. ``target_group_sparsity``: the share of
                groups to remove, in [0, 1). ``target_kept``: what each node group keeps, by names or globs.
            sizes: Number of atoms of every prunable node group, shape ``(groups,)``.
            costs: Costs of the network; needed for ``target_macs``, ``target_params`` and ``target_bytes``.
            latency: Milliseconds of the network; needed for ``target_latency_ms``.
            kept: The number of atoms that each node group keeps, for ``target_kept``.

        Raises:
            TargetError: No target or several are given, or a value is invalid.
        """
        given = {name: asked[name] for name in (*UNITS, *asked) if asked.get(name) is not None}
        if len(given) != 1:
            raise TargetError(
                f"{' and '.join(given) or 'no target'} {'are' if given else 'is'} given; exactly one is needed\n"
                f"  to fix  ask for one of {', '.join(f'{name}=' for name in UNITS)}, such as target_macs=0.5"
            )
        ((name, value),) = given.items()
        atoms, count = int(sizes.sum()), Polynomial({(i,): 1 for i in range(len(sizes))}, len(sizes))
        if name == "target_kept":
            if not isinstance(value, Mapping) or not value or kept is None:
                raise TargetError(
                    f"{name} is {value!r}; it maps names or globs of parameters to the share of its atoms that each"
                    f" group keeps\n  to fix  such as {name}={{'layer3.*': 0.4}}"
                )
            return cls(name, dict(value), int(kept.sum()), atoms, count)
        number = _number(name, value)
        if name == "target_group_sparsity":
            if not 0 <= number < 1:
                raise TargetError(f"{name} is {value}; it is the share of groups to remove, in [0, 1)")
            pruned = int(atoms * number + 1e-6)  # .29 of 100 is 28.999999999999996
            if number and atoms and not pruned:
                enough = f"ask for {np.ceil(1e4 / atoms) / 1e4:g} or more, or for" if atoms > 1 else "ask for"
                raise TargetError(
                    f"{name}={value} of {atoms} groups is less than one\n"
                    f"  effect  nothing would be removed\n  to fix  {enough} a target in MACs"
                )
            return cls(name, number, atoms - pruned, atoms, count)
        measure = _measure(name, costs, latency)
        full = measure(sizes)
        if isinstance(number, int) or name == "target_latency_ms":
            if number <= 0:
                raise TargetError(f"{name} is {value}; it is a positive number of {UNITS[name]}")
            return cls(name, number, float(number), full, measure)
        if not 0 < number <= 1:
            raise TargetError(
                f"{name} is {value}; a float is the share to keep, in (0, 1], an integer the number of {UNITS[name]}"
            )
        return cls(name, number, full * number, full, measure)

    @property
    def unit(self) -> str:
        """The unit of the cost, such as ``"MACs"``."""
        return UNITS[self.name]

    @property
    def wants_less(self) -> bool:
        """Whether anything has to be removed."""
        return self.asked != 0 if self.name == "target_group_sparsity" else self.goal < self.full

    def after(self, share: float) -> float:
        """The maximum cost after ``share`` of the total reduction from the full network to the goal."""
        return self.goal if share >= 1 else self.full - share * (self.full - self.goal)

    def require_reachable(self, least: Counts, besides: str | None = None) -> None:
        """Check that the target can be met with ``least`` atoms in each group.

        Args:
            least: The minimum number of atoms of each group, shape ``(groups,)``.
            besides: Further lines for the message.

        Raises:
            TargetError: It cannot; the message states the lowest target that can.
        """
        bottom = self.measure(least)
        if bottom <= self.goal:
            return
        unit, more = self.unit, f"\n{besides}" if besides else ""
        if self.name == "target_group_sparsity":
            most = self.full - bottom
            raise TargetError(
                f"{self.name}={self.asked} asks for {self.full - self.goal:,.0f} of {self.full:,.0f} groups, but only "
                f"{most:,.0f} may go: every node group keeps its least number of atoms\n"
                f"  to fix  ask for {np.floor(most / self.full * 1e4) / 1e4:.4f} or less, or lower min_kept,"
                f" group_divisible or align{more}"
            )
        share = bottom / self.full
        hint = f"; {self.asked} is a number of {unit}, {self._share} would be a share" if self._share else ""
        least_asked = (
            f"{1.05 * bottom:.3g}" if self.name == "target_latency_ms" else f"{np.ceil(share * 1e4) / 1e4:.4f}"
        )
        raise TargetError(
            f"{self.name}={self.asked} allows {shown(self.goal)} of {shown(self.full)} {unit}, but {shown(bottom)} "
            f"({share:.1%}) are left when every node group is at its least{hint}\n"
            f"  to fix  ask for {least_asked} or more, lower min_kept, group_divisible or align, or see"
            f" oto.explain() for what stays whole{more}"
        )

    @property
    def _share(self) -> float | None:
        """The share that the user most likely meant with a small integer: 1 is all, 50 is half."""
        if not isinstance(self.asked, int) or self.asked > 100 or self.name == "target_latency_ms":
            return None
        return 1.0 if self.asked == 1 else self.asked / 100

    def asking(self, cost: float) -> str:
        """The keyword and value of a target with this cost, in the form in which the target was given."""
        if self.name == "target_group_sparsity":
            return f"{self.name}={np.floor((self.full - cost) / self.full * 1e4) / 1e4:.4f}"
        if isinstance(self.asked, int):
            return f"{self.name}={int(np.ceil(cost))}"
        return f"{self.name}={np.ceil(cost / self.full * 1e4) / 1e4:.4f}"

    def __str__(self) -> str:
        asked: object = self.asked
        if isinstance(self.asked, Mapping):
            asked = f"{{{some([f'{name!r}: {number}' for name, number in self.asked.items()])}}}"
        return f"{self.name}={asked}: at most {shown(self.goal)} of {shown(self.full)} {self.unit}"


def _measure(name: str, costs: Costs | None, latency: Measure | None) -> Measure:
    """The measure of a keyword.

    Raises:
        TargetError: The costs or latency that it needs are not given.
    """
    of_costs: Measure | None = None if costs is None else getattr(costs, name.removeprefix("target_"), None)
    measure = latency if name == "target_latency_ms" else of_costs
    if measure is None:
        raise TargetError(
            f"{name} needs the costs of the network, which this optimizer was not given\n"
            "  to fix  make it through oto.OTO(model, dummy_input), or ask for target_group_sparsity="
        )
    return measure


def shown(number: float) -> str:
    """A cost as text: integers and large numbers with separators, others with three digits.

    >>> shown(1234567.8), shown(12.3456)
    ('1,234,568', '12.3')
    """
    return f"{number:,.0f}" if number >= 1000 or number == int(number) else f"{number:.3g}"


def _number(name: str, value: Any) -> int | float:
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
        try:
            number = float(value)
        except (TypeError, ValueError):
            pass
        else:
            if np.isfinite(number):
                return number
    raise TargetError(f"{name} is {value!r}; it is a finite number")
