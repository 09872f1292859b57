"""What a target means before training: what would be kept, its latency, and the multiples that suit a device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from oto.analysis import Analysis
from oto.errors import NothingPrunableError, TargetError, first_line, items_of
from oto.groups.align import ON_CUDA, Align
from oto.optim import Choice
from oto.optim.criteria import FROM_MAGNITUDE
from oto.optim.limits import least_staying
from oto.optim.options import ChoiceOptions, PreviewOptions, TargetOptions, names_of, picked, refuse_unknown
from oto.optim.preview import kept_now
from oto.optim.target import Target
from oto.report.preview import Preview
from oto.report.preview import preview as table_of
from oto.shards import from_first, in_the_first, refuse_sharded
from oto.slim.latency import Latency, Timer, measured_latency
from oto.trace.snapshot import preserved

log = logging.getLogger(__name__)

LIMITS = ("scope", "min_kept", "group_divisible")
"""Options that limit what may be removed, independent of the saliency."""


def preview(
    analysis: Analysis,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor] | None,
    options: Mapping[str, Any],
) -> Preview:
    """What each layer would keep for a target; see :meth:`oto.OTO.preview`."""
    batches = items_of("batches", batches)
    if batches:
        refuse_sharded(analysis.model, "a preview by gradients of batches")
    choice = choice_for(analysis, {**({} if batches else FROM_MAGNITUDE), **options}, "preview")
    kept = _kept(analysis.model, choice, batches, loss)
    chosen = f"gradients of {len(batches)} batches" if batches else "the weights alone"
    if choice.align != 1:
        chosen += f"; sizes of dimensions in multiples (align={choice.align!r})"
    times = None
    if choice.target.name == "target_latency_ms":
        times = _times(analysis, np.array(list(kept.values()), dtype=np.int64))
    said, costs = (str(choice.target), f"chosen by {chosen}"), (analysis.cost(), analysis.cost(kept))
    return table_of(*said, analysis.groups, analysis.costs, kept, *costs, times)


def choice_for(analysis: Analysis, options: Mapping[str, Any], taker: str) -> Choice:
    """The choice that these options define for ``taker``, which trains nothing.

    Raises:
        OptionError, TargetError: An option has no meaning here, or the target cannot be reached.
    """
    refuse_unknown(options, names_of(PreviewOptions), taker)
    options = by_first_names(analysis, options)
    target, how = picked(options, TargetOptions), picked(options, ChoiceOptions)
    how |= {"align": align_for(analysis, options)}
    latency = latency_for(analysis, {**target, **how})
    return Choice.of(analysis.groups, target, costs=analysis.costs, latency=latency, **how)


def _kept(
    model: nn.Module, choice: Choice, batches: list[Any], loss: Callable[[nn.Module, Any], Tensor] | None
) -> dict[str, int]:
    """The number of atoms that a choice would keep; the model runs in its current modes and is restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    with preserved(model) if batches else nullcontext():  # the weights alone are only read
        for module, training in modes:
            module.training = training
        return kept_now(choice, model, batches, loss)


def timer_of(analysis: Analysis) -> Timer:
    """A timer of the model and of slim models with the same groups."""
    return Timer(analysis.model, analysis.partition, analysis.costs, analysis.example)


def _times(analysis: Analysis, counts: NDArray[np.int64]) -> tuple[float, float]:
    """Milliseconds of the full model and of one with these counts; a sharded model is timed in the first process."""
    found: tuple[float, float] | None = None
    with in_the_first(analysis.model) as here:
        if here:
            timer = timer_of(analysis.of(analysis.model))
            found = timer(analysis.costs.sizes), timer(counts)
    times: tuple[float, float] = from_first(analysis.model, found)
    return times


def latency_for(analysis: Analysis, options: Mapping[str, Any]) -> Latency | None:
    """Milliseconds as a function of what the prunable groups keep, if the target is a latency.

    It is corrected by measurements near the model that a choice by weights alone would give. A sharded model is
    gathered in the first process, which measures for all.

    Raises:
        TargetError: Latency cannot be measured, or not even the thinnest model is fast enough.
    """
    goal, costs = options.get("target_latency_ms"), analysis.costs
    if goal is None:
        return None
    # refuse invalid targets before anything is timed
    Target.of(picked(options, TargetOptions), costs.sizes, costs, costs.macs)
    limits = FROM_MAGNITUDE | {name: options[name] for name in (*LIMITS, "align") if name in options}
    limited = Choice.of(analysis.groups, {"target_group_sparsity": 0.0}, **limits)
    least = least_staying(limited.groups, limited.least, costs.macs)

    def choose(latency: Latency) -> NDArray[np.int64]:
        choice = Choice.of(analysis.groups, {"target_latency_ms": goal}, latency=latency, **limits)
        return np.array(list(kept_now(choice, analysis.model, (), None).values()), dtype=np.int64)

    with in_the_first(analysis.model):
        timer = timer_of(analysis.of(analysis.model))
        return measured_latency(timer, float(goal), least, choose, options.get("group_divisible", 1))


def align_for(analysis: Analysis, options: Mapping[str, Any]) -> Align:
    """The multiples for sizes: as requested, otherwise what suits the parameters' device and can meet the target."""
    asked: Align | None = options.get("align")
    if asked is not None or not any(p.is_cuda for p in analysis.model.parameters()):
        return 1 if asked is None else asked
    target = {name: options.get(name) for name in names_of(TargetOptions) if name != "target_latency_ms"}
    limits = {name: options[name] for name in LIMITS if name in options}
    try:
        if any(value is not None for value in target.values()):
            Choice.of(analysis.groups, target, costs=analysis.costs, align=ON_CUDA, **limits)
    except (TargetError, NothingPrunableError) as refused:
        log.warning("align=%d, the default on CUDA, is left out: %s", ON_CUDA, first_line(refused))
        return 1
    return ON_CUDA


def by_first_names(analysis: Analysis, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with mappings from parameter names converted to the names that groups use."""
    first = analysis.first_name
    return {
        key: {first.get(name, name): number for name, number in value.items()}
        if key in ("align", "min_kept", "target_kept") and isinstance(value, Mapping)
        else value
        for key, value in options.items()
    }
