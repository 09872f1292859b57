"""When a sparse optimizer prunes: plain integers, no tensors.

Steps are calls of ``optimizer.step()``, counted from 0. With gradient accumulation that is one step per update, not
per micro-batch, and a call that a ``GradScaler`` skips does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

from oto.errors import TargetError


@dataclass(frozen=True)
class Schedule:
    """Steps ``start`` to ``start + steps - 1`` prune, in ``periods`` periods of (nearly) equal length.

    Attributes:
        start: Number of ordinary steps before the first period.
        steps: Number of steps over which pruning is spread, at least ``periods``.
        periods: Number of times that redundant groups are chosen.

    Raises:
        TargetError: A period would have no step.

    Example:
        >>> schedule = Schedule(start=2, steps=5, periods=2)  # two periods: steps 2, 3 and steps 4, 5, 6
        >>> [schedule.period(step) for step in range(8)]
        [None, None, 0, 0, 1, 1, 1, None]
        >>> [schedule.quota(period, 5) for period in range(2)]
        [2, 5]
    """

    start: int
    steps: int
    periods: int

    def __post_init__(self) -> None:
        if self.start < 0:
            raise TargetError(f"start_pruning_step is {self.start}; it counts ordinary steps, so it is at least 0")
        if self.periods < 1:
            raise TargetError(f"pruning_periods is {self.periods}; at least 1 is needed")
        if self.steps < self.periods:
            raise TargetError(
                f"pruning_steps={self.steps} cannot be cut into pruning_periods={self.periods} periods of at least one "
                f"step; ask for pruning_steps >= {self.periods} or pruning_periods <= {max(self.steps, 1)}"
            )

    @property
    def end(self) -> int:
        """The first step after pruning."""
        return self.start + self.steps

    def bounds(self, period: int) -> tuple[int, int]:
        """First step of ``period`` and first step after it."""
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
        """Factor applied to redundant groups at ``step``; 1 outside of pruning.

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

    def quota(self, period: int, total: int) -> int:
        """How many of ``total`` groups are at zero when ``period`` is over."""
        return total * (period + 1) // self.periods
