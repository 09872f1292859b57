"""Measure the latency of the full model and of slim ones in milliseconds, and confirm latency targets."""

from __future__ import annotations

import logging
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist

from oto import clock
from oto._torch import tree_leaves
from oto.axes.registry import known
from oto.errors import NotPrunedWarning, TargetError, first_line, reraise_out_of_memory, users_level
from oto.groups import Costs, Partition
from oto.groups.cost import Polynomial
from oto.groups.latency import latency_table
from oto.slim.edits import Edits, pruned_tensors, slim_copy
from oto.slim.erased import leaving_out, plan
from oto.slim.graph.emit import emit_graph
from oto.slim.own_class import plan_edits
from oto.slim.proof.run import run
from oto.slim.pruned_shapes import pruned_shapes
from oto.slim.removed import within
from oto.slim.widths import Widths
from oto.trace.export import export
from oto.trace.inputs import arguments
from oto.trace.snapshot import preserved
from oto.trace.stand_ins import on_meta

log = logging.getLogger(__name__)

Counts = NDArray[np.int64]

ROUNDS = 5
"""The limit on slim models that are built and measured, besides the thinnest."""

NEAR = 0.92
"""A slim model that takes at least this share of the target is close enough."""

MARGIN = 1.03
"""Measured times are multiplied by this factor, because the next measurement may be slower."""

SLOPE = 1e-3
"""At least this share of the latency falls with the table's prediction, even if noise hides any decrease."""


@dataclass(frozen=True, eq=False)
class Latency:
    """Milliseconds as a function of counts: a table's prediction, corrected by measurements.

    Between two measured points it rises as a power of the prediction.

    Attributes:
        table: Milliseconds of the operators, see :mod:`oto.groups.latency`.
        said: The table's predictions for the measured models, ascending.
        measured: Their measured times, ascending. The last is the full model's.
    """

    table: Polynomial
    said: tuple[float, ...]
    measured: tuple[float, ...]

    @classmethod
    def through(cls, table: Polynomial, points: dict[float, float]) -> Latency:
        """The latency that passes through measured points, made monotonic where noise breaks their order."""
        said = np.array(sorted(points))
        full = points[said[-1]]
        measured = np.minimum(np.maximum.accumulate([points[s] for s in said]), full)
        measured = (1 - SLOPE) * measured + SLOPE * full * said / said[-1]  # so that every atom saves something
        return cls(table, tuple(said.tolist()), tuple(measured.tolist()))

    def _milliseconds(self, said: Any) -> Any:
        tiny = np.finfo(float).tiny  # avoids a warning for the logarithm of zero
        return np.exp(np.interp(np.log(np.maximum(said, tiny)), np.log(self.said), np.log(self.measured)))

    def tied(self, ties: Counts, per: Counts | None = None) -> Latency:
        """The latency as a function of the count of each tie; see :meth:`oto.groups.cost.Polynomial.tied`."""
        return replace(self, table=self.table.tied(ties, per))

    def __call__(self, counts: Counts) -> float:
        """Milliseconds at the given counts, which have shape ``(groups,)``."""
        return float(self._milliseconds(self.table(counts)))

    def marginal(self, counts: Counts, fewer: Counts) -> NDArray[np.float64]:
        """Milliseconds that each group saves when it alone loses ``fewer`` atoms; shapes ``(groups,)``."""
        said = self.table(counts)
        saved: NDArray[np.float64] = self._milliseconds(said) - self._milliseconds(
            said - self.table.marginal(counts, fewer)
        )
        return saved


def confirmed(
    table: Polynomial,
    sizes: Counts,
    least: Counts,
    goal: float,
    choose: Callable[[Latency], Counts],
    measure: Callable[[Counts], float],
) -> Latency:
    """Correct a table by measurements until the counts chosen by it meet the requested time.

    Args:
        table: Milliseconds as a function of counts, before any model was measured.
        sizes: Atoms of each node group in the full network.
        least: Atoms that each group keeps at least.
        goal: Requested milliseconds.
        choose: Chooses the counts for a goal by a given latency.
        measure: Measures the milliseconds of the model with given counts.

    Raises:
        TargetError: Not even the thinnest model is fast enough.

    Warns:
        NotPrunedWarning: Measurements were too noisy to find a model of about the requested time.
    """
    full = measure(sizes)
    points = {share * table(sizes): share * full for share in (1e-6, 1.0)}
    if goal >= full:
        log.info("the full model takes %.3g ms of the %.3g ms that it may: nothing has to go", full, goal)
        return Latency.through(table, points)
    bottom = measure(least)
    if bottom > goal:
        raise TargetError(
            f"target_latency_ms={goal:g} cannot be reached: measured on this machine, the full model takes {full:.3g} "
            f"ms, and {bottom:.3g} ms when every node group is at its least\n"
            f"  to fix  ask for {1.05 * bottom:.3g} or more, lower min_kept or group_divisible, or see oto.explain() "
            "for what stays whole"
        )
    points = {table(least): bottom, table(sizes): full}
    taken: dict[float, float] = {}  # predicted time -> measured time, in the order of measurement
    for _ in range(ROUNDS):
        latency = Latency.through(table, points)
        counts = choose(latency)
        said = table(counts)
        if said in points:  # widths come in steps; there are no counts in between
            break
        taken[said] = measure(counts)
        points[said] = MARGIN * taken[said]
        log.info("%.3g ms asked for; chosen for %.3g, measured %.3g ms", goal, latency(counts), taken[said])
        if NEAR * goal <= taken[said] <= goal:
            break
    if taken.get(said, bottom) > goal:
        warnings.warn(
            f"target_latency_ms={goal:g}: none of the slim models that were built and measured takes about that; they "
            f"take {', '.join(f'{ms:.3g}' for ms in (*taken.values(), bottom))} ms\n"
            "  effect  the chosen model may be slower than requested\n"
            "  to fix  measure on an idle machine and with a larger batch, or ask for target_macs=",
            NotPrunedWarning,
            stacklevel=users_level(),
        )
    return Latency.through(table, points)


def measured_latency(
    timer: Timer, goal: float, least: Counts, choose: Callable[[Latency], Counts], divisible: int = 1
) -> Latency:
    """Milliseconds of a model as a function of counts, confirmed near the goal; see :func:`confirmed`.

    In a distributed run the first process measures for all of them, because all have to make the same choice.

    Raises:
        TargetError: The model is on ``meta``, or not even the thinnest model is fast enough.
    """
    if on_meta(timer.model):
        raise TargetError(
            f"target_latency_ms={goal:g}: parameters of {type(timer.model).__name__} are on the meta device, where "
            "nothing takes any time\n"
            "  to fix  give the model values on the device that it is to be fast on, or ask for target_macs="
        )
    found: list[Latency | TargetError | None] = [None]
    shared = dist.is_available() and dist.is_initialized()
    failure: Exception | None = None
    if not shared or dist.get_rank() == 0:
        try:
            table = latency_table(timer.partition, timer.costs, timer.device, divisible)
            found[0] = confirmed(table, timer.costs.sizes, least, goal, choose, timer)
        except TargetError as refused:
            found[0] = refused
        except Exception as raised:  # the other processes are waiting for a message
            failure = raised
            found[0] = TargetError(
                f"target_latency_ms={goal:g}: the first process could not measure: {first_line(raised)}\n"
                "  effect  nothing was made\n  to fix  see the error there; or ask for target_macs="
            )
    if shared:
        dist.broadcast_object_list(found)
    if failure is not None:
        raise failure
    (result,) = found
    if isinstance(result, TargetError):
        raise result
    assert result is not None
    return result


class Timer:
    """Times a model and slim models with the same groups in alternation, so that all see the same noise.

    The slim models are neither verified nor returned to the user.
    """

    def __init__(self, model: nn.Module, partition: Partition, costs: Costs, dummy_input: Any) -> None:
        self.model, self.partition, self.costs, self.dummy_input = model, partition, costs, dummy_input
        self.full: float | None = None

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def __call__(self, counts: Counts) -> float:
        """Milliseconds of a forward pass with the given number of atoms in each node group; any atoms will do."""
        if self.full is None:
            self.full = 1e3 * statistics.median(rounds([self.model], self.dummy_input)[0])
        if (counts == self.costs.sizes).all():
            return self.full
        kept = {name: np.arange(n) for name, n in zip(self.costs.names, counts.tolist(), strict=True)}
        slim = built(self.model, self.partition, kept, self.dummy_input)
        pairs = zip(*rounds([self.model, slim], self.dummy_input), strict=True)
        ratio: float = statistics.median(slim_time / full_time for full_time, slim_time in pairs)
        return self.full * ratio


def built(model: nn.Module, partition: Partition, kept: dict[str, NDArray[np.int64]], dummy_input: Any) -> nn.Module:
    """The slim model with the given atoms, whether others are zero or not, as construct would emit it; not verified.

    Raises:
        EmitterError: No emitter can build it.
    """
    pruned = pruned_shapes(partition, kept)
    try:
        tensors, edits = pruned_tensors(model, pruned), plan_edits(model, pruned)
        tensors, edits = _without_segments(model, partition, kept, tensors, edits, dummy_input)
        slim = slim_copy(model, tensors, edits).eval()
        run(slim, dummy_input)
    except Exception as failure:  # anything that the user's own forward may raise at other sizes
        reraise_out_of_memory(failure)
        log.info("the original class does not fit, timing the graph: %s", failure)
        slim = emit_graph(export(model, dummy_input, known), partition, kept)
    return slim


def _without_segments(
    model: nn.Module,
    partition: Partition,
    kept: dict[str, NDArray[np.int64]],
    tensors: dict[str, Tensor],
    edits: Edits,
    dummy_input: Any,
) -> tuple[dict[str, Tensor], Edits]:
    """The tensors and edits of a slim model that does not compute segments that are removed whole.

    These need not be zero in the model, so they are zeroed here to see what is left of each module.
    """
    if not (gone := partition.erased(kept)):
        return tensors, edits
    zero = {name for segment in gone for leaf in segment.writers for name in leaf.names}
    shown, shown_edits = tensors, edits
    left = pruned = pruned_shapes(partition, kept)
    if beside := {segment.name: np.arange(1) for segment in gone if segment.axes}:  # a layer needs a channel
        pruned = pruned_shapes(partition, {**kept, **beside})
        shown, shown_edits = pruned_tensors(model, pruned), plan_edits(model, pruned)
    silent = {name: torch.zeros_like(t) if name in zero else t for name, t in shown.items()}
    widths = Widths(partition, left, pruned)
    edits = leaving_out(edits, plan(model, widths, gone, silent, shown_edits, dummy_input).erased, model)
    away = set(within(tensors, edits.erased))
    rest = {name: tensor for name, tensor in tensors.items() if name not in away}
    return {name: torch.zeros_like(t) if name in zero else t for name, t in rest.items()}, edits


MISSED = 1.1
"""A slim model that takes more than this multiple of the requested time has missed its target, which is reported."""


def as_promised(model: nn.Module, slim: nn.Module, dummy_input: Any, goal: float, full: float) -> str | None:
    """A message if a slim model misses its latency target, otherwise ``None``.

    Both models are timed in turns, so that it does not matter if the machine is slower or faster by now.

    Args:
        goal: Requested milliseconds.
        full: Milliseconds of the full model when the target was set.
    """
    pairs = zip(*rounds([model, slim], dummy_input), strict=True)
    ratio: float = statistics.median(slim_time / full_time for full_time, slim_time in pairs)
    if ratio > 1:
        return (
            f"the slim model is slower than the full one: {ratio:.2f} times its {full:.3g} ms. At this size a call's"
            " overhead, or widths that kernels do not like, outweigh what is computed\n"
            "  to fix  align=8 or 16; fewer calls (compress_mode='both'); or a larger batch, for which it may be faster"
        )
    if ratio * full <= MISSED * goal:
        return None
    return (
        f"target_latency_ms={goal:g} is missed: measured in turns with the full model ({full:.3g} ms), the slim one"
        f" takes {ratio * full:.3g} ms\n"
        f"  to fix  ask for {goal * goal / (ratio * full):.3g}, as much less; measure on an idle machine"
    )


def rounds(models: list[nn.Module], dummy_input: Any, least: int = 5, seconds: float = 1.0) -> list[list[float]]:
    """Seconds of forward passes in eval mode, with the models taking turns: for each model, one number per round.

    Args:
        least: Minimum number of rounds, after one to warm up.
        seconds: Further rounds are made until this much time has passed.
    """
    args, kwargs = arguments(dummy_input)
    device = next((t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), torch.device("cpu"))
    found: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        begin = clock.now()
        while len(found[0]) <= least or clock.now() - begin < seconds:
            for model, own in zip(models, found, strict=True):
                with preserved(model):
                    clock.synchronize(device)
                    start = clock.now()
                    model(*args, **kwargs)
                    clock.synchronize(device)
                    own.append(clock.now() - start)
    return [own[1:] for own in found]
