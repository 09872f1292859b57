"""Read the options of a sparse optimizer: the choice, the schedule, and the options of the wrapped optimizer.

choice, schedule, wrapped = read({"lr": 0.1, "target_macs": 0.5, "total_steps": 100}, groups, costs, None)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from oto.errors import OptionError, some
from oto.groups.cost import Costs
from oto.groups.node_group import NodeGroup
from oto.optim.choice import Choice
from oto.optim.options import (
    ChoiceOptions,
    FoldOptions,
    ScheduleOptions,
    SparseOptions,
    TargetOptions,
    besides,
    picked,
)
from oto.optim.schedule import EXPONENT, LENGTH, START, Schedule
from oto.optim.target import Measure


def read(
    options: SparseOptions, node_groups: Iterable[NodeGroup], costs: Costs | None, latency: Measure | None
) -> tuple[Choice, Schedule, dict[str, Any]]:
    """Read the options that every sparse optimizer takes.

    Args:
        options: The options, without those that a subclass adds.
        node_groups, costs, latency: As in :meth:`Choice.of`.

    Returns:
        The choice, the schedule, and all other options, which are those of the wrapped optimizer.

    Raises:
        OptionError: An option of compensation is given; or as in :meth:`Choice.of`.
        TargetError: The schedule is invalid; or as in :meth:`Choice.of`.
        NothingPrunableError, UnknownParameterError: As in :meth:`Choice.of`.
    """
    if alone := picked(options, FoldOptions):
        raise OptionError(
            f"{some(alone)}: the optimizer alone does not know what reads its groups\n"
            "  effect  nothing was made\n"
            "  to fix  let an OTO make it: oto.hesso(compensate=..., batches=...)"
        )
    schedule = schedule_of(options)
    asked, how = picked(options, TargetOptions), picked(options, ChoiceOptions)
    choice = Choice.of(node_groups, asked, costs=costs, latency=latency, **how)
    return choice, schedule, besides(options, TargetOptions, ChoiceOptions, ScheduleOptions)


def schedule_of(options: SparseOptions) -> Schedule:
    """The schedule; its default exponent is 1 with ``saliency="hesso"``, as published."""
    exponent = options.get("pruning_exponent")
    if exponent is None:
        exponent = 1.0 if options.get("saliency") == "hesso" else EXPONENT
    return Schedule.of(
        options.get("start_pruning_step", START),
        options.get("pruning_steps", LENGTH),
        options.get("pruning_periods"),
        options.get("total_steps"),
        exponent,
    )
