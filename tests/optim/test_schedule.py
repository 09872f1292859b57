"""When pruning happens, in integers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oto.errors import TargetError
from oto.optim import Schedule
from oto.optim.schedule import LENGTH, START

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


@given(schedules)
def test_the_way_to_the_target_is_shared_evenly(schedule):
    shares = [schedule.share(schedule.bounds(period)[0]) for period in range(schedule.periods)]
    assert shares == pytest.approx([(period + 1) / schedule.periods for period in range(schedule.periods)])
    assert shares[-1] == 1


def test_most_of_the_way_may_be_done_early():
    shares = [Schedule(0, 5, 5, exponent=3).share(step) for step in range(5)]
    assert shares == pytest.approx([0.488, 0.784, 0.936, 0.992, 1.0])  # 1 - (1 - k / 5)^3
    assert shares[-1] == 1


@given(schedules)
def test_steps_until_the_next_choice(schedule):
    starts = [step for step in range(schedule.end) if schedule.starts_period(step)]
    for step in range(schedule.end + 2):
        assert schedule.until_choice(step) == next((start - step for start in starts if start >= step), None)


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


# Shares of all steps, and numbers that are none -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked, meant",
    [
        ((0.1, 0.4, 5, 1000), (100, 400, 5)),
        ((0.0, 1.0, 5, 1000), (0, 1000, 5)),  # floats are shares, up to all of it
        ((1, 5, 5, 1000), (1, 5, 5)),  # ints are steps
        ((10, 0.5, 5, 101), (10, 50, 5)),  # 50.5 is rounded to even
        ((10.0, 40.0, 5.0, 1000.0), (10, 40, 5)),
        ((10.0, 40.0, 5.0), (10, 40, 5)),
        ((np.int64(10), torch.tensor(40), np.int32(5)), (10, 40, 5)),
        ((np.float32(0.5), torch.tensor(0.25), 5, torch.tensor(100)), (50, 25, 5)),
        ((0.0, 40, 5), (0, 40, 5)),
    ],
)
def test_steps_are_whole_numbers_or_shares(asked, meant):
    schedule = Schedule.of(*asked)
    assert (schedule.start, schedule.steps, schedule.periods) == meant
    assert all(type(number) is int for number in (schedule.start, schedule.steps, schedule.periods))


@given(st.floats(0, 1), st.integers(20, 3000))
def test_shares_that_make_up_the_whole_end_with_it(share, total):
    before = min(share, 0.9)
    assert Schedule.of(before, 1 - before, 1, total).end == total


@pytest.mark.parametrize("total, start", [(20, 1), (49, 1), (50, 1), (99, 1), (100, 1), (200, 2), (1000, 10)])
def test_a_share_of_few_steps_is_one_at_least(total, start):
    """Or the first groups would be chosen by the gradient of a single batch."""
    schedule = Schedule.of(START, LENGTH, total_steps=total)
    assert schedule.start == start and schedule.end == round(0.41 * total)
    assert Schedule.of(0, LENGTH, total_steps=total).start == Schedule.of(0.0, LENGTH, total_steps=total).start == 0


@pytest.mark.parametrize(
    "asked, message",
    [
        ((9.3, 10, 2), r"start_pruning_step is 9\.3;[^$]*to fix  round it"),
        ((2, 7.5, 2), r"pruning_steps is 7\.5;[^$]*to fix  round it"),
        ((2, 8, 1.5), r"pruning_periods is 1\.5"),
        ((2, 8, 2, 99.5), r"total_steps is 99\.5"),
        ((2, 7.5, 2, 100), r"pruning_steps is 7\.5"),  # not a share either
        ((-0.5, 8, 2, 100), r"start_pruning_step is -0\.5"),
        ((0.1, 8, 2), r"start_pruning_step is 0\.1, a share[^$]*give total_steps= too"),
        ((1, math.nan, 2), "pruning_steps is nan"),
        ((1, math.inf, 2), "pruning_steps is inf"),
        ((0.5, 0.6, 2, 100), r"to step 109, but training ends after[^$]*=40 or less, or pruning_steps=50 or fewer"),
        ((100, 20, 2, 100), r"from step 100 to step 119[^$]*to fix  start_pruning_step=80 or less$"),  # too late
        ((99, 200, 2, 100), r"to fix  train for 299 steps, or prune in fewer periods"),
        ((0.1, 0.4, 2, 0), r"total_steps is 0; it is how often[^$]*epochs \* len\(loader\)"),
        ((90, 20, 2, 100), "from step 90 to step 109"),
        ((0.0, 0.4, 10, 20), "pruning_steps=8 cannot be cut into pruning_periods=10"),
    ],
)
def test_a_number_that_is_no_number_of_steps_is_refused(asked, message):
    with pytest.raises(TargetError, match=message):
        Schedule.of(*asked)


def test_a_fraction_is_refused_by_the_class_too():
    with pytest.raises(TargetError, match=r"start_pruning_step is 9\.3"):
        Schedule(9.3, 10, 2)


def test_a_schedule_says_what_happens_when():
    assert str(Schedule(0, 7, 7)).splitlines() == [
        "steps 0–6  7 periods of 1 step; groups are chosen at steps 0, 1, 2, …, 6",
        "step 6     the last of them reach zero",
        "steps 7–   training goes on with what is left",
    ]
    assert Schedule(2, 5, 2).lines()[:2] == [
        "steps 0–1  ordinary steps",
        "steps 2–6  2 periods of 2 or 3 steps; groups are chosen at steps 2, 4",
    ]
    assert Schedule.of(0.0, 1.0, 1, 4).lines()[-1] == "step 3     the last of them reach zero"  # nothing comes after
