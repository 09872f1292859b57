"""When pruning happens, in integers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oto.errors import TargetError
from oto.optim import Schedule

schedules = st.builds(
    lambda start, periods, extra: Schedule(start, periods + extra, periods),
    st.integers(0, 20),
    st.integers(1, 12),
    st.integers(0, 40),
)


@given(schedules)
def test_periods_cover_the_pruning_steps_once(schedule):
    covered = [step for period in range(schedule.periods) for step in range(*schedule.bounds(period))]
    assert covered == list(range(schedule.start, schedule.end))
    assert all(step in range(*schedule.bounds(schedule.period(step))) for step in covered)
    assert schedule.period(schedule.start - 1) is None
    assert schedule.period(schedule.end) is None


@given(schedules)
def test_every_period_starts_and_ends_once_and_lengths_differ_by_one_at_most(schedule):
    steps = range(schedule.end + 5)
    assert sum(map(schedule.starts_period, steps)) == schedule.periods
    assert sum(map(schedule.ends_period, steps)) == schedule.periods
    lengths = [end - first for first, end in map(schedule.bounds, range(schedule.periods))]
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1


@given(schedules, st.integers(0, 19))
def test_a_period_runs_linearly_to_exactly_zero(schedule, pick):
    first, end = schedule.bounds(pick % schedule.periods)
    factors = [schedule.factor(step) for step in range(first, end)]
    assert factors[-1] == 0.0
    for t in range(end - first):
        assert math.isclose(math.prod(factors[: t + 1]), (end - first - t - 1) / (end - first), abs_tol=1e-12)


@given(schedules, st.integers(0, 1000))
def test_quotas_rise_evenly_to_the_total(schedule, total):
    quotas = [schedule.quota(period, total) for period in range(schedule.periods)]
    assert quotas[-1] == total
    shares = [after - before for before, after in zip([0, *quotas], quotas, strict=False)]
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize(
    "numbers, message",
    [
        ((0, 3, 4), "pruning_steps=3 cannot be cut into pruning_periods=4"),
        ((0, 0, 1), "pruning_steps >= 1"),
        ((0, 4, 0), "at least 1"),
        ((-1, 4, 1), "start_pruning_step is -1"),
    ],
)
def test_an_impossible_schedule_is_refused(numbers, message):
    with pytest.raises(TargetError, match=message):
        Schedule(*numbers)
