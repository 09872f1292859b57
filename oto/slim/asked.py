"""Which segments a class can leave out, asked before anything is trained: what it cannot leave out stays whole.

The model is run once without data, and every module that lies in a segment says what it takes and gives. Then a copy of
it is run without data and without all segments that this leaves, since code around one may read its weight, or what its
forward leaves behind; only if that fails, they are left out one by one. What could not be left out so is left out of a
copy with data, as :mod:`oto.slim.erased` will do it: there a module around it may do what it cannot.

Of segments that are concatenated with others the copy also lacks the columns that read them. As many go at once as may;
only if the copy fails, they are left out one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oto._torch import tree_map_only
from oto.axes.registry import known
from oto.errors import EmitterError, first_line, reraise_out_of_memory
from oto.groups import Partition
from oto.groups.partition import Segment
from oto.groups.segments import Modules, legal
from oto.slim.edits import Edits, pruned_tensors, slim_copy, tensors_of
from oto.slim.erased import (
    Learned,
    beside,
    failure_without,
    has_fast_path,
    leaving_out,
    outermost,
    plan_each,
    renumbered,
)
from oto.slim.own_class import OwnClass, plan_edits
from oto.slim.pruned_shapes import pruned_shapes
from oto.trace.inputs import Example, arguments
from oto.trace.record import follow
from oto.trace.snapshot import preserved
from oto.trace.stand_ins import on_meta

log = logging.getLogger(__name__)

NEEDED = "its class cannot leave it out"


def needed(
    model: nn.Module, partition: Partition, segments: list[Segment], dummy_input: Example, own: OwnClass | None = None
) -> dict[str, str]:
    """The segments that a class cannot do without, each alone, and why; none where it cannot be asked.

    Args:
        own: What the class needs, if it was searched.
    """
    graph = partition.found.graph
    modules = Modules.of(graph)
    bodies = frozenset(index for segment in segments for index in segment.body)
    added, laid = Learned({}, modules, bodies, {}), Learned({}, modules, bodies, {}, beside(graph, segments))
    handles = [*added.watch(model), *laid.watch(model)]
    try:
        _, failure = follow(model, dummy_input, known, graph.mode)
    finally:
        for handle in handles:
            handle.remove()
    if failure is not None:
        log.info("the class was not asked what it can leave out: %s", first_line(failure))
        return {}
    doubts: dict[str, str] = {}
    erased: dict[str, dict[str, dict[str, Any]]] = {}
    for segment in segments:
        learned = laid if segment.axes else added
        replaced = [one for path in modules.within(segment.body) for one in learned.outermost(model, path)]
        stuck = next((path for path, how in replaced if how is None), None)
        if stuck is not None:
            doubts[segment.name] = f"what {stuck} gives does not follow from the shape of what it is given"
        else:
            erased[segment.name] = {path: how for path, how in replaced if how is not None}
    apart = {segment.name for segment in segments if segment.axes}
    doubts |= _failing(model, partition, {name: how for name, how in erased.items() if name not in apart}, dummy_input)
    rest = [segment for segment in segments if segment.name in doubts and segment.name not in apart]
    cannot = _stuck(model, partition, rest, dummy_input) | (apart & doubts.keys())
    failing = _failing_beside(model, partition, {n: erased[n] for n in erased if n in apart}, dummy_input, own)
    doubts, cannot = doubts | failing, cannot | failing.keys()
    found: dict[str, str] = {}
    for segment in segments:
        if segment.name in cannot:
            found[segment.name] = f"{NEEDED}: {doubts[segment.name]}"
        elif why := _why_not_renumbered(model, modules.within(segment.body)):
            found[segment.name] = f"{NEEDED}: {why}"
    return found


def _failing(
    model: nn.Module, partition: Partition, erased: Mapping[str, dict[str, dict[str, Any]]], dummy_input: Example
) -> dict[str, str]:
    """The segments without which a copy fails when it is run without data, and why."""
    tensors, mode = tensors_of(model, partition), partition.found.graph.mode
    fast = has_fast_path(model) and not on_meta(model)

    def without(modules: Mapping[str, dict[str, Any]]) -> Exception | None:
        try:
            edits = leaving_out(Edits(), modules, model)
            if mode == "meta" and not fast and _runs_on_meta(model, tensors, edits, dummy_input):
                return None
            copy = slim_copy(model, tensors, edits)
        except EmitterError as refused:
            return refused
        failed = follow(copy, dummy_input, known, mode)[1]
        if failed is None and fast:  # not taken without data
            failed = failure_without(model, modules, tensors, Edits(), dummy_input)
        return failed

    joints = {segment.name: partition.found.graph.calls[segment.joint].module for segment in partition.segments}
    rounds: list[dict[str, str]] = []
    for name in erased:
        # one that is gone may keep a layer off its fast path, which reads the weights of another
        free = next((own for own in rounds if not fast or joints[name] not in own.values()), None)
        if free is None:
            rounds.append(free := {})
        free[name] = joints[name]
    failures: dict[str, Exception] = {}
    for names in rounds:
        if without(outermost(erased[name] for name in names)) is not None:
            failures |= {name: failure for name in names if (failure := without(erased[name])) is not None}
    return {
        name: f"without it a {type(model).__name__} fails: {first_line(failure)}"
        for name, failure in failures.items()
        if not isinstance(failure, EmitterError)  # of a copy, or of numbers in a cache, which is told apart
    }


def _failing_beside(
    model: nn.Module,
    partition: Partition,
    erased: Mapping[str, dict[str, dict[str, Any]]],
    dummy_input: Example,
    own: OwnClass | None,
) -> dict[str, str]:
    """The segments concatenated with others without which a thin copy fails when it is run, and why."""

    def without(names: Sequence[str]) -> Exception | None:
        pruned = pruned_shapes(partition, {name: np.arange(0) for name in names})
        modules = outermost(erased[name] for name in names)
        try:
            edits = leaving_out(plan_edits(model, pruned, own), modules, model)
        except EmitterError as refused:
            return refused
        light = {
            name: torch.empty(pruned.shape(leaf), dtype=leaf.value.dtype, device="meta")
            for leaf in partition.found.graph.leaves
            for name in leaf.names
        }
        if _runs_on_meta(model, light, edits, dummy_input) or on_meta(model):
            return None
        return failure_without(model, modules, pruned_tensors(model, pruned), edits, dummy_input)

    failures: dict[str, Exception] = {}
    for names in _rounds(partition, list(erased)):
        if without(names) is not None:
            failures |= {name: failure for name in names if (failure := without([name])) is not None}
    return {
        name: f"without it a {type(model).__name__} fails: {first_line(failure)}"
        for name, failure in failures.items()
        if not isinstance(failure, EmitterError)
    }


def _rounds(partition: Partition, names: list[str]) -> Iterator[list[str]]:
    """Segments that may go together, until each was among some."""
    while names:
        _, back = legal(partition, {name: np.arange(0) for name in names})
        together = [name for name in names if name not in back]
        yield together
        names = [name for name in names if name in back]


def _runs_on_meta(model: nn.Module, tensors: Mapping[str, Tensor], edits: Edits, dummy_input: Example) -> bool:
    """Whether a copy runs with shapes only: faster than to record it."""
    light = slim_copy(model, {name: _empty(t) for name, t in tensors.items()}, edits).eval()
    args, kwargs = tree_map_only(Tensor, _empty, arguments(dummy_input))
    try:
        with preserved(light, dummy_input), torch.device("meta"), torch.no_grad():
            light(*args, **kwargs)
    except Exception as failure:  # anything that the user's own forward may raise
        reraise_out_of_memory(failure)
        return False
    return True


def _empty(t: Tensor) -> Tensor:
    return torch.empty_like(t, device="meta")


def _stuck(model: nn.Module, partition: Partition, segments: Sequence[Segment], dummy_input: Example) -> set[str]:
    """The segments that a copy with data cannot do without; it is believed of one that has no data that it can."""
    if on_meta(model) or not segments:
        return set()
    zero = {name for segment in segments for leaf in segment.writers for name in leaf.names}
    tensors = tensors_of(model, partition)
    tensors |= {name: torch.zeros_like(tensors[name]) for name in zero}

    def fails(erased: Mapping[str, dict[str, Any]]) -> bool:
        try:
            failure = failure_without(model, erased, tensors, Edits(), dummy_input)
        except EmitterError:
            return False
        return failure is not None

    try:
        each = plan_each(model, partition, segments, tensors, dummy_input)
    except Exception as failure:  # anything that the user's own forward may raise
        reraise_out_of_memory(failure)
        log.info("%s was not copied without its segments: %s", type(model).__name__, first_line(failure))
        return {segment.name for segment in segments}
    plans = {segment.name: how for segment, how in zip(segments, each, strict=True)}
    found = {name for name, how in plans.items() if how.needed}
    rest = {name: how.erased for name, how in plans.items() if name not in found}
    if rest and fails(outermost(rest.values())):
        found |= {name for name, erased in rest.items() if len(rest) == 1 or fails(erased)}
    return found


def _why_not_renumbered(model: nn.Module, paths: list[str]) -> str | None:
    try:
        list(renumbered(model, paths))
    except EmitterError as failure:
        return str(failure).splitlines()[0]
    return None
