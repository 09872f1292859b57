"""The schedule of a sparse optimizer, in plain integers without tensors.

Steps are calls of ``optimizer.step()``, counted from 0. With gradient accumulation that is one step per update, not
per micro-batch, and a call that a ``GradScaler`` skips does not count.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat, SupportsIndex

from oto.errors import TargetError
from oto.optim.target import shown

START, LENGTH, PERIODS, EXPONENT = 0.01, 0.4, 5, 3.0
"""Defaults: start and length of pruning as shares of all steps, the number of periods, and the exponent."""

SHARES = ("start_pruning_step", "pruning_steps", "sampling_steps", "half_space_step", "partition_step", "warm_up_steps")
"""Options that are a number of steps, or a share of all steps."""

Steps = SupportsFloat | SupportsIndex
"""A number of steps: an int (of Python, numpy or torch), or a float that is a share."""


@dataclass(frozen=True)
class Schedule:
    """The steps that prune: ``start`` to ``start + steps - 1``, in ``periods`` periods of (nearly) equal length.

    Attributes:
        start: Number of ordinary steps before the first period.
        steps: Number of steps over which pruning is spread, at least ``periods``.
        periods: Number of times that redundant groups are chosen.
        total_steps: Number of steps that training takes, if it is known.
        exponent: After ``k`` periods, ``1 - (1 - k / periods) ^ exponent`` of the total cost reduction is done. 1 is
            even; 3 is the schedule of Zhu and Gupta (arXiv 1710.01878, equation 1).

    Raises:
        TargetError: A number is invalid or not an integer, a period would have no step, or pruning would outlast
            training.

    Example:
        >>> schedule = Schedule(start=2, steps=5, periods=2)  # two periods: steps 2, 3 and steps 4, 5, 6
        >>> [schedule.period(step) for step in range(8)]
        [None, None, 0, 0, 1, 1, 1, None]
        >>> [schedule.until_choice(step) for step in range(6)]
        [2, 1, 0, 1, 0, None]
    """

    start: int
    steps: int
    periods: int
    total_steps: int | None = None
    exponent: float = 1.0

    @classmethod
    def of(
        cls,
        start: Steps,
        steps: Steps,
        periods: Steps | None = None,
        total_steps: Steps | None = None,
        exponent: float = 1.0,
    ) -> Schedule:
        """A schedule whose start and length may be given as shares of all steps.

        Args:
            start: Number of ordinary steps before pruning; a float in [0, 1] is a share of ``total_steps``.
            steps: Number of steps over which pruning is spread; a float in [0, 1] is a share of ``total_steps``.
            periods: Number of times that redundant groups are chosen; by default 5, or the number of steps if fewer.
            total_steps: Number of steps that training takes; only shares need it.
            exponent: As for the class.

        Raises:
            TargetError: As for the class, or a share is given without ``total_steps``.

        Example:
            >>> print(Schedule.of(0.1, 0.4, periods=5, total_steps=1000))
            steps 0–99     ordinary steps
            steps 100–499  5 periods of 80 steps; groups are chosen at steps 100, 180, 260, 340, 420
            step 499       the last of them reach zero
            steps 500–999  training goes on with what is left
        """
        given = {"start_pruning_step": start, "pruning_steps": steps, "pruning_periods": periods}
        _require_numbers({**given, "total_steps": total_steps, "pruning_exponent": exponent})
        total = None if total_steps is None else _whole("total_steps", total_steps)
        first, length = _count("start_pruning_step", start, total), _count("pruning_steps", steps, total)
        begin, end = round(first), round(first + length)  # so that shares of .3 and .7 never exceed all steps
        if float(length).is_integer():  # round() rounds both 13.5 and 14.5 to 14
            end = begin + round(length)
        if 0 < first < 1 < end:  # a share of a few steps is at least one
            begin = 1
        if periods is None:
            periods = max(min(PERIODS, end - begin), 1)
        return cls(begin, end - begin, _whole("pruning_periods", periods), total, exponent)

    def __post_init__(self) -> None:
        names = {"start": "start_pruning_step", "steps": "pruning_steps", "periods": "pruning_periods"}
        for field, name in names.items():
            object.__setattr__(self, field, _whole(name, getattr(self, field)))
        if self.total_steps is not None:
            object.__setattr__(self, "total_steps", _whole("total_steps", self.total_steps))
        if self.total_steps is not None and self.total_steps < 1:
            raise TargetError(
                f"total_steps is {self.total_steps}; it is how often optimizer.step() is called in the whole training\n"
                "  to fix  total_steps=epochs * len(loader), divided by the micro-batches of an update, if there are"
                " several"
            )
        if self.start < 0:
            raise TargetError(f"start_pruning_step is {self.start}; it counts ordinary steps, so it is at least 0")
        if not self.exponent >= 1:
            raise TargetError(f"pruning_exponent is {self.exponent}; it is at least 1, which is evenly")
        if self.periods < 1:
            raise TargetError(f"pruning_periods is {self.periods}; at least 1 is needed")
        if self.steps < self.periods:
            raise TargetError(
                f"pruning_steps={self.steps} cannot be cut into pruning_periods={self.periods} periods of at least one "
                f"step; ask for pruning_steps >= {self.periods}"
                + (f" or pruning_periods <= {self.steps}" if self.steps > 0 else ", or more total_steps")
            )
        if self.total_steps is not None and self.end > self.total_steps:
            raise TargetError(
                f"pruning would last from step {self.start} to step {self.end - 1}, but training ends after "
                f"total_steps={self.total_steps}\n"
                "  effect  groups would be left that never reach zero\n"
                f"  to fix  {self._shorter(self.total_steps)}"
            )

    def _shorter(self, total: int) -> str:
        """Options with which pruning ends before training does, for a message."""
        left = total - self.start
        ways = [f"start_pruning_step={total - self.steps} or less"] if self.steps <= total else []
        ways += [f"pruning_steps={left} or fewer"] if left >= self.periods else []
        return ", or ".join(ways) or f"train for {self.end} steps, or prune in fewer periods (pruning_periods=1)"

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, before: Sequence[tuple[int, int, str]] = ()) -> list[str]:
        """Lines of text about what happens at which step.

        Args:
            before: The parts before the first period, if these are not only ordinary steps: for each part its first
                step, the step after its last one, and a text.
        """
        bounds = [self.bounds(period) for period in range(self.periods)]
        lengths = sorted({end - first for first, end in bounds})
        chosen = [str(first) for first, _ in bounds]
        if len(chosen) > 6:
            chosen = [*chosen[:3], "…", chosen[-1]]
        periods = (
            f"{self.periods} period{'s' * (self.periods > 1)} of {' or '.join(map(str, lengths))}"
            f" step{'s' * (lengths[-1] > 1)}; groups are chosen at step{'s' * (self.periods > 1)} {', '.join(chosen)}"
        )
        rows = [
            (_steps(self.start, self.end), periods),
            (_steps(self.end - 1, self.end), "the last of them reach zero"),
        ]
        parts = before or [(0, self.start, "ordinary steps")]
        rows[:0] = [(_steps(begin, end), what) for begin, end, what in parts if begin < end]
        if self.total_steps is None or self.total_steps > self.end:
            rows.append((_steps(self.end, self.total_steps), "training goes on with what is left"))
        width = max(len(when) for when, _ in rows)
        return [f"{when.ljust(width)}  {what}" for when, what in rows]

    @property
    def end(self) -> int:
        """The first step after pruning."""
        return self.start + self.steps

    def bounds(self, period: int) -> tuple[int, int]:
        """The first step of ``period``, and the first step after it."""
        return (
            self.start + period * self.steps // self.periods,
            self.start + (period + 1) * self.steps // self.periods,
        )

    def period(self, step: int) -> int | None:
        """The period that ``step`` belongs to; ``None`` before and after pruning."""
        if not self.start <= step < self.end:
            return None
        return ((step - self.start + 1) * self.periods - 1) // self.steps

    def starts_period(self, step: int) -> bool:
        """Whether redundant groups are chosen at ``step``."""
        period = self.period(step)
        return period is not None and step == self.bounds(period)[0]

    def ends_period(self, step: int) -> bool:
        """Whether the redundant groups reach zero at ``step``."""
        period = self.period(step)
        return period is not None and step == self.bounds(period)[1] - 1

    def factor(self, step: int) -> float:
        """The factor that is applied to redundant groups at ``step``; 1 outside of pruning.

        At step ``t`` of a period of ``T`` steps it is ``(T - t - 1) / (T - t)``. The product over steps 0 to t is
        ``(T - t - 1) / T``, so a group reaches exactly zero at the last step, whatever its size.

        >>> [round(Schedule(start=0, steps=4, periods=1).factor(t), 3) for t in range(5)]
        [0.75, 0.667, 0.5, 0.0, 1.0]
        """
        period = self.period(step)
        if period is None:
            return 1.0
        left = self.bounds(period)[1] - step
        return (left - 1) / left

    def share(self, step: int) -> float:
        """The share of the total cost reduction that is done after the period of ``step``, in (0, 1]."""
        period = self.period(step)
        assert period is not None
        return float(1 - (1 - (period + 1) / self.periods) ** self.exponent)

    def until_choice(self, step: int) -> int | None:
        """Number of steps from ``step`` to the next one that chooses; ``None`` after the last."""
        if step <= self.start:
            return self.start - step
        following = ((step - self.start) * self.periods - 1) // self.steps + 1  # the first period that starts later
        return self.bounds(following)[0] - step if following < self.periods else None


@dataclass(frozen=True)
class Progress:
    """The progress of pruning.

    Attributes:
        step: Number of steps taken.
        schedule: When pruning happens.
        groups: Number of ZIGs that may be pruned.
        redundant: Number of ZIGs that are being driven to zero.
        pruned: Number of ZIGs that are pruned.
        cost: The cost of the network without pruned ZIGs, in ``unit``.
        goal: The maximum cost in the end.
        unit: The unit of the cost, such as ``"MACs"``.
        ways: If there are several ways to zero, the number of pruned ZIGs by way.

    Example:
        >>> print(Progress(130, Schedule(100, 200, 5), 1216, redundant=122, pruned=0, cost=8e6, goal=4e6, unit="MACs"))
        step 130 of 300, period 1 of 5: 0 of 1,216 groups are zero, 122 on their way; 8,000,000 MACs, goal 4,000,000
    """

    step: int
    schedule: Schedule
    groups: int
    redundant: int
    pruned: int
    cost: float
    goal: float
    unit: str
    ways: Mapping[str, int] | None = None

    @property
    def period(self) -> int | None:
        """The period of the next step, counted from 0; ``None`` before and after pruning."""
        return self.schedule.period(self.step)

    @property
    def over(self) -> bool:
        """Whether the last period has ended."""
        return self.step >= self.schedule.end

    @property
    def done(self) -> float:
        """Share of the pruning steps that are done, in [0, 1]."""
        return min(max(self.step - self.schedule.start, 0) / self.schedule.steps, 1.0)

    @property
    def sparsity(self) -> float:
        """Share of ZIGs that are pruned, in [0, 1]."""
        return self.pruned / max(self.groups, 1)

    def __str__(self) -> str:
        zero = f"{self.pruned:,} of {self.groups:,} groups are zero"
        if self.ways and self.pruned:
            zero += f" ({', '.join(f'{number:,} {way}' for way, number in self.ways.items())})"
        cost = f"; {shown(self.cost)} {self.unit}, goal {shown(self.goal)}"
        if self.over:
            return f"step {self.step}, pruning ended after {self.schedule.end} steps: {zero}{cost}"
        period = "" if self.period is None else f", period {self.period + 1} of {self.schedule.periods}"
        way = f", {self.redundant:,} on their way" if self.redundant else ""
        return f"step {self.step} of {self.schedule.end}{period}: {zero}{way}{cost}"


def count_steps(name: str, number: Steps, total_steps: Steps | None) -> int:
    """A number of steps, or a share of ``total_steps``, as an int.

    Raises:
        TargetError: The number is not an integer, or a share is given without ``total_steps``.
    """
    return round(_count(name, number, None if total_steps is None else _whole("total_steps", total_steps)))


def _count(name: str, number: Steps, total: int | None) -> float:
    share = _share(number)
    return _whole(name, number) if total is None or share is None else share * total


def _share(number: Steps) -> float | None:
    """A float in [0, 1] is a share of all steps; the int 1 is one step."""
    share: Any = number
    return float(share) if _index(number) is None and 0 <= float(share) <= 1 else None


def _index(number: Steps) -> int | None:
    """The number as an int if it is of an integer type, else ``None``."""
    integer: Any = number
    try:
        return operator.index(integer)
    except TypeError:  # a float tensor has the method, and raises this too
        return None


def _require_numbers(given: Mapping[str, Any]) -> None:
    """Refuse what is no number, such as a text.

    Raises:
        TargetError: The first of them, by its name.
    """
    for name, number in given.items():
        if number is not None and not hasattr(number, "__float__"):
            raise TargetError(
                f"{name} is {number!r}, which is no number\n  effect  nothing was made\n  to fix  give a number"
            )


def _whole(name: str, number: Steps) -> int:
    """The number as an int.

    Raises:
        TargetError: The number is not an integer.
    """
    whole, value = _index(number), float(number)
    if whole is not None:
        return whole
    if value.is_integer():
        return int(value)
    if 0 < value < 1 and name in SHARES:
        raise TargetError(
            f"{name} is {value:g}, a share of all steps (as it is by default), and their number is not known\n"
            "  effect  no step would be the one at which pruning begins or ends\n"
            f"  to fix  give total_steps= too, or {name}= as a whole number of steps"
        )
    raise TargetError(
        f"{name} is {value:g}; steps and periods are counted in whole numbers\n"
        "  effect  no step would be the one at which pruning begins or ends\n"
        "  to fix  round it"
    )


def _steps(first: int, end: int | None) -> str:
    if end is None:
        return f"steps {first}–"
    return f"step {first}" if end - first == 1 else f"steps {first}–{end - 1}"
