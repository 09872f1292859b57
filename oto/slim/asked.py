"""Determine before training which segments a class can leave out; the others stay whole.

The arguments and results of every module in a segment are known from the analyzed run. The segments whose results can
be replaced are left out of a copy of the model, which is run without data, since code around a segment may read its
weight or a side effect of its forward. Only if this fails, half of the segments are left out, and so on. Segments that
cannot be left out in this way are left out of a copy with data, as in :mod:`oto.slim.erased`: there, a module around
such a segment may be replaced instead.

For concatenated segments, the copy also lacks the columns that read them. As many as possible are left out at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from oto.axes.registry import known
from oto.errors import EmitterError, first_line, reraise_out_of_memory
from oto.groups import Partition
from oto.groups.partition import Segment
from oto.groups.segments import Modules, legal, not_all
from oto.slim.called import Taken
from oto.slim.edits import Edits, pruned_tensors, slim_copy, tensors_of
from oto.slim.erased import (
    Learned,
    beside,
    failure_without,
    has_fast_path,
    leaving_out,
    outermost,
    plan_each,
    refusing,
    renumbered,
)
from oto.slim.own_class import OwnClass, plan_edits
from oto.slim.pruned_shapes import pruned_shapes
from oto.slim.widths import Widths
from oto.trace.graph import Leaf
from oto.trace.inputs import Example
from oto.trace.light import failure_on_meta
from oto.trace.record import follow
from oto.trace.snapshot import Snapshot
from oto.trace.stand_ins import on_meta

log = logging.getLogger(__name__)

_Erased: TypeAlias = Mapping[str, dict[str, dict[str, Any]]]

NEEDED = "its class cannot leave it out"


def needed(
    model: nn.Module,
    partition: Partition,
    segments: list[Segment],
    dummy_input: Example,
    calls: Mapping[str, Sequence[Taken]],
    own: OwnClass | None = None,
) -> dict[str, str]:
    """The segments that a class cannot leave out, each on its own, with the reason.

    Args:
        calls: The calls of each module in the analyzed run.
        own: What the class needs, if this was searched for.
    """
    graph = partition.found.graph
    modules, widths = Modules.of(graph), Widths.whole(partition)
    added, laid = (
        Learned({}, modules, frozenset(i for segment in some for i in segment.body), {}, widths, beside(graph, some))
        for some in ([s for s in segments if not s.axes], [s for s in segments if s.axes])
    )
    for learned in (added, laid):
        learned.read(model, calls)
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
    asking = _Asking(model, partition, dummy_input, own)
    doubts |= asking.failing({name: how for name, how in erased.items() if name not in apart})
    rest = [segment for segment in segments if segment.name in doubts and segment.name not in apart]
    cannot = _stuck(model, partition, rest, dummy_input) | (apart & doubts.keys())
    failing = asking.failing_beside({name: how for name, how in erased.items() if name in apart})
    doubts, cannot = doubts | failing, cannot | failing.keys()
    found: dict[str, str] = {}
    numbered = any("layer_idx" in vars(module) for module in model.modules())
    for segment in segments:
        if segment.name in cannot:
            found[segment.name] = f"{NEEDED}: {doubts[segment.name]}"
        elif numbered and (why := _why_not_renumbered(model, modules.within(segment.body))):
            found[segment.name] = f"{NEEDED}: {why}"
    return found


@dataclass(eq=False)
class _Asking:
    """Tests a class by running copies that are discarded."""

    model: nn.Module
    partition: Partition
    dummy_input: Example
    own: OwnClass | None

    @cached_property
    def held(self) -> Snapshot:
        """Snapshot of the model's state, some of which its copies share."""
        return Snapshot(self.model, self.dummy_input)

    def failing(self, erased: _Erased) -> dict[str, str]:
        """The segments without which a copy fails when it is run without data, with the reason."""
        model, mode = self.model, self.partition.found.graph.mode
        tensors = tensors_of(model, self.partition)
        fast = has_fast_path(model) and not on_meta(model)

        def without(names: Sequence[str]) -> Exception | None:
            modules = outermost(erased[name] for name in names)
            try:
                edits = leaving_out(Edits(), modules, model)
                if mode == "meta" and not fast and self._runs_on_meta({}, edits):
                    return None
                copy = slim_copy(model, tensors, edits)
            except EmitterError as refused:
                return refused
            failed = follow(copy, self.dummy_input, known, mode)[1]
            if failed is None and fast:  # fast paths are not taken without data
                failed = failure_without(model, modules, tensors, Edits(), self.dummy_input)
            return failed

        calls = self.partition.found.graph.calls
        joints = {segment.name: calls[segment.joint].module for segment in self.partition.segments}
        rounds: list[dict[str, str]] = []
        for name in erased:
            # a removed segment may keep a layer from its fast path, which reads the weights of another segment
            free = next((own for own in rounds if not fast or joints[name] not in own.values()), None)
            if free is None:
                rounds.append(free := {})
            free[name] = joints[name]
        return self._why(failures for names in rounds for failures in _alone(list(names), without).items())

    def failing_beside(self, erased: _Erased) -> dict[str, str]:
        """The concatenated segments without which a thin copy fails when it is run, with the reason."""
        model, partition = self.model, self.partition

        def without(names: Sequence[str]) -> Exception | None:
            pruned = pruned_shapes(partition, {name: np.arange(0) for name in names})
            modules = outermost(erased[name] for name in names)
            shapes = {leaf: pruned.shape(leaf) for leaf in partition.found.graph.leaves}
            thin = {leaf: shape for leaf, shape in shapes.items() if tuple(shape) != leaf.value.shape}
            passed = refusing(partition.found.graph, [s for s in partition.segments if s.name in names])
            made = [i for i in passed if self.own is None or i not in self.own.calls.by_node]
            try:
                edits = leaving_out(plan_edits(model, pruned, self.own, passed), modules, model)
                # without data, torch accepts some calls that it refuses with data
                if (not made and self._runs_on_meta(thin, edits)) or on_meta(model):
                    return None
            except EmitterError as refused:
                return refused
            return failure_without(model, modules, pruned_tensors(model, pruned), edits, self.dummy_input)

        rounds = _rounds(partition, list(erased))
        return self._why(failures for names in rounds for failures in _alone(names, without).items())

    def _runs_on_meta(self, shapes: Mapping[Leaf, Sequence[int]], edits: Edits) -> bool:
        """Whether a copy runs with shapes only, which is faster than recording it.

        Args:
            shapes: The shapes of the tensors that are thinner than in the model.
            edits: The edits of the copy.
        """
        copy = None if self.own is None else self.own.copy
        light = {
            name: torch.empty(shapes.get(leaf, leaf.value.shape), dtype=leaf.value.dtype, device="meta")
            for leaf in self.partition.found.graph.leaves
            if copy is None or leaf in shapes or leaf.kind == "constant"  # such a copy holds data for constants
            for name in leaf.names[: None if copy is None else 1]
        }
        if copy is None:
            return failure_on_meta(slim_copy(self.model, light, edits), self.dummy_input, self.held) is None
        return failure_on_meta(copy.edited(edits, light), self.dummy_input, copy.found) is None

    def _why(self, failures: Iterable[tuple[str, Exception]]) -> dict[str, str]:
        return {
            name: f"without it a {type(self.model).__name__} fails: {first_line(failure)}"
            for name, failure in failures
            if not isinstance(failure, EmitterError)  # copying failed, or numbering a cache, checked elsewhere
        }


def _alone(names: Sequence[str], without: Callable[[Sequence[str]], Exception | None]) -> dict[str, Exception]:
    """The segments without which a copy fails when each alone is left out, found by bisection.

    Args:
        names: The candidates.
        without: Returns the failure of a copy without some segments, or ``None``.
    """
    failure = without(names)
    if failure is None or len(names) == 1:
        return {} if failure is None else {names[0]: failure}
    half = len(names) // 2
    return _alone(names[:half], without) | _alone(names[half:], without)


def _rounds(partition: Partition, names: list[str]) -> Iterator[list[str]]:
    """Divide segments into sets that can be left out together."""
    sets = not_all(partition) if names else []
    while names:
        _, back = legal(partition, {name: np.arange(0) for name in names}, sets)
        together = [name for name in names if name not in back]
        yield together
        names = [name for name in names if name in back]


def _stuck(model: nn.Module, partition: Partition, segments: Sequence[Segment], dummy_input: Example) -> set[str]:
    """The segments that a copy with data cannot leave out; empty for models without data."""
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
