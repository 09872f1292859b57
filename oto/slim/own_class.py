"""What a slim model of the model's own class cannot do without."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from oto.axes.terms import axes_of, resolve
from oto.errors import out_of_memory
from oto.groups import NodeGroup, Partition
from oto.slim.module import plan_edits, stock, thin_copy, thin_tensors
from oto.slim.plan import thinning
from oto.slim.verify import run
from oto.trace.record import on_meta

log = logging.getLogger(__name__)


def class_bound(
    model: nn.Module, partition: Partition, groups: Sequence[NodeGroup], dummy_input: Any
) -> dict[str, int]:
    """Node groups that have to stay whole for the class to run, each with the index of a call that is the reason.

    First those whose size a call in the model's own code states. Code may also read a size off one tensor and use it
    for another, so the class is then run with half of all others taken away; where a module fails, what enters it stays
    whole, and it is tried again. A model that runs may still compute something else: that is for the verification.
    """
    keep = _stated(model, partition)
    while not on_meta(model):  # there is nothing to run on meta
        kept = {g.name: np.arange(max(g.min_kept, g.size // 2)) for g in groups if g.prunable and g.name not in keep}
        failing = _failing_class(model, partition, kept, dummy_input)
        paths = [path for path, module in model.named_modules() if type(module) is failing]
        new = {name: cause for name, cause in _read_by(partition, paths).items() if name in kept}
        if not new:
            break
        keep |= new
    return keep


def _stated(model: nn.Module, partition: Partition) -> dict[str, int]:
    """Groups whose size the arguments of a call state, by a number or by a size that was read off a tensor.

    Modules of ``torch.nn`` do not count, because they are adapted.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {axis: name for name, axis in partition.axes.items()}
    found: dict[str, int] = {}
    for index, rewrite in partition.found.tape.rewrites.items():
        if stock(modules.get(partition.found.graph.nodes[index].module)) is None:
            axes = (axis for term in rewrite.terms for axis in axes_of(resolve(term)))
            found.update((names[axis], index) for axis in axes if axis in names)
    return found


def _failing_class(model: nn.Module, partition: Partition, kept: Any, dummy_input: Any) -> type[nn.Module] | None:
    """The class of the innermost module of the user's own in which a slim model fails; ``None`` if it does not."""
    thin = thinning(partition, kept)
    inner: type[nn.Module] | None = None
    try:
        slim = thin_copy(model, thin_tensors(model, thin), plan_edits(model, partition, thin))
        run(slim, dummy_input)
    except Exception as failure:
        if out_of_memory(failure):
            raise
        for frame, _ in traceback.walk_tb(failure.__traceback__):
            running = frame.f_locals.get("self")
            if isinstance(running, nn.Module) and stock(running) is None:
                inner = type(running)
        log.info("with half of what is left, %s fails: %s", inner, failure)
    return inner


def _read_by(partition: Partition, paths: Sequence[str]) -> dict[str, int]:
    """Groups of what enters some modules from outside, with the index of the call inside that reads it."""
    flow = partition.graph
    calls = [node for node, kind in flow.nodes(data="kind") if kind == "operator"]
    found: dict[str, int] = {}
    for path in paths:
        inside = {n for n in calls if f"{flow.nodes[n]['module']}.".startswith(f"{path}." if path else "")}
        for node in inside:
            for before in set(flow.predecessors(node)) - inside:
                if flow.nodes[before]["kind"] in ("operator", "input"):
                    index = int(node.removeprefix("node-"))
                    found.update(dict.fromkeys(flow.nodes[before]["groups"], index))
    return found
