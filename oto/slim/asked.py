"""Which segments a class can leave out, asked before anything is trained: what it cannot leave out stays whole.

The model is run once without data, and every module that lies in a segment says what it takes and gives. Whether each
segment can be left out follows from that, for one segment after the other, without a further run. Only where a module
gives something that does not follow from shapes, the segment is left out of a copy with data, as
:mod:`oto.slim.erased` will do it: there a module around it may do what it cannot.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from oto.axes.registry import known
from oto.errors import EmitterError, first_line, reraise_out_of_memory
from oto.groups import Partition
from oto.groups.partition import Segment
from oto.groups.segments import Modules
from oto.slim.edits import Edits, tensors_of
from oto.slim.erased import Learned, plan, renumbered
from oto.trace.inputs import Example
from oto.trace.record import follow
from oto.trace.stand_ins import on_meta

log = logging.getLogger(__name__)

NEEDED = "its class cannot leave it out"


def needed(model: nn.Module, partition: Partition, segments: list[Segment], dummy_input: Example) -> dict[str, str]:
    """The segments that a class cannot do without, each alone, and why; none where it cannot be asked."""
    graph = partition.found.graph
    modules = Modules(node for node in graph.calls if node.index not in graph.dead)
    bodies = frozenset(index for segment in segments for index in segment.body)
    learned = Learned({}, modules, bodies, {})
    handles = learned.watch(model)
    try:
        _, failure = follow(model, dummy_input, known, graph.mode)
    finally:
        for handle in handles:
            handle.remove()
    if failure is not None:
        log.info("the class was not asked what it can leave out: %s", first_line(failure))
        return {}
    found: dict[str, str] = {}
    for segment in segments:
        replaced = [one for path in modules.within(segment.body) for one in learned.outermost(model, path)]
        stuck = next((path for path, how in replaced if how is None), None)
        if stuck is not None and not _is_left_out(model, partition, segment, dummy_input):
            found[segment.name] = f"{NEEDED}: what {stuck} gives does not follow from the shape of what it is given"
        elif why := _why_not_renumbered(model, [path for path, _ in replaced]):
            found[segment.name] = f"{NEEDED}: {why}"
    return found


def _is_left_out(model: nn.Module, partition: Partition, segment: Segment, dummy_input: Example) -> bool:
    """Whether a copy with data can do without a segment; it is believed of one that has no data."""
    if on_meta(model):
        return True
    zero = {name for leaf in segment.writers for name in leaf.names}
    tensors = tensors_of(model, partition)
    tensors |= {name: torch.zeros_like(tensors[name]) for name in zero}
    try:
        return not plan(model, partition, [segment], tensors, Edits(), dummy_input).needed
    except Exception as failure:  # anything that the user's own forward may raise
        reraise_out_of_memory(failure)
        log.info("%s was not left out of a copy: %s", segment.name, first_line(failure))
        return False


def _why_not_renumbered(model: nn.Module, paths: list[str]) -> str | None:
    try:
        list(renumbered(model, paths))
    except EmitterError as failure:
        return str(failure).splitlines()[0]
    return None
