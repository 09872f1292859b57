"""What a slim model of the model's own class cannot do without."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from oto.axes.terms import axes_of, resolve
from oto.errors import out_of_memory
from oto.groups import Kept, NodeGroup, Partition
from oto.slim.module import Edits, plan_edits, stock, tensors_of, thin_copy, thin_tensors
from oto.slim.plan import thinning
from oto.slim.verify import check, require
from oto.trace.record import on_meta

log = logging.getLogger(__name__)


def class_bound(
    model: nn.Module, partition: Partition, groups: Sequence[NodeGroup], dummy_input: Any
) -> dict[str, int | None]:
    """Node groups that have to stay whole for the class to run, each with the index of a call that is the reason.

    Found by trial: the class is made with every group thinner, and compared with the full model. If that does not do,
    groups stay whole whose size a call in the model's own code states. Code may also read a size off one tensor and use
    it for another: where a module fails, what enters it stays whole, and it is tried again. If it runs and computes
    something else, everything stays whole. In the end groups are freed, family by family, where that does no harm.
    """
    stated = _stated(model, partition)
    keep: dict[str, int | None] = {name: calls[0] for name, calls in stated.items()}
    if on_meta(model):  # there is nothing to run
        return keep
    trial = _Trial(model, partition, groups, dummy_input)
    free = {g.name for g in groups if g.prunable}
    if trial.failure(()) is None:
        return {}
    while (failure := trial.failure(keep)) is not None and free - keep.keys():
        failing = _failing_class(failure)
        paths = [path for path, module in model.named_modules() if type(module) is failing]
        new = {name: cause for name, cause in _read_by(partition, paths).items() if name in free - keep.keys()}
        keep |= new or dict.fromkeys(free - keep.keys())
    families: dict[object, list[str]] = {}
    for name in sorted(free & keep.keys()):
        lines = frozenset(partition.found.graph.calls[index].source for index in stated.get(name, ()))
        families.setdefault(lines or re.sub(r"\d+", "", name), []).append(name)
    for names in families.values():
        if trial.failure(keep.keys() - names) is None:
            for name in names:
                del keep[name]
    return keep


def _stated(model: nn.Module, partition: Partition) -> dict[str, list[int]]:
    """Groups whose size the arguments of calls state, by a number or by a size that was read off a tensor.

    Modules of ``torch.nn`` do not count, because they are adapted.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {axis: name for name, axis in partition.axes.items()}
    found: dict[str, list[int]] = {}
    for index, rewrite in partition.found.tape.rewrites.items():
        if stock(modules.get(partition.found.graph.calls[index].module)) is None:
            axes = {axis: None for term in rewrite.terms for axis in axes_of(resolve(term))}
            for axis in axes.keys() & names.keys():
                found.setdefault(names[axis], []).append(index)
    return found


@dataclass
class _Trial:
    """Slim models of the class, and what is wrong with them."""

    model: nn.Module
    partition: Partition
    groups: Sequence[NodeGroup]
    dummy_input: Any

    def failure(self, whole: Collection[str]) -> Exception | None:
        """What happens to the class when all groups but ``whole`` get thinner, each by another number of atoms."""
        for seed in range(2):  # every group is thinner once, and two may have the same size once
            draw = np.random.default_rng(seed)
            kept = {}
            for g in self.groups:
                if g.prunable and g.name not in whole:
                    least = min(g.min_kept, g.size)
                    atoms = draw.integers(least, g.size if seed else max(least, g.size - 1), endpoint=True)
                    kept[g.name] = np.sort(draw.permutation(g.size)[:atoms])
            try:
                self._compare(kept)
            except Exception as failure:  # anything that the user's own forward may raise at other sizes
                if out_of_memory(failure):
                    raise
                log.info("thinner in all but %d groups, the class fails: %s", len(whole), failure)
                return failure
        return None

    def _compare(self, kept: Kept) -> None:
        held = {name: t.detach().clone() for name, t in tensors_of(self.model, self.partition).items()}
        full = thin_copy(self.model, held, Edits())
        _enliven(full)
        parameters = dict(full.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for group in self.groups:
                gone = np.setdiff1d(np.arange(group.size), kept.get(group.name, np.arange(group.size)))
                for piece in group.zeros if len(gone) else ():
                    entries = piece.of(parameters[piece.parameter])
                    entries.index_fill_(0, torch.from_numpy(gone).to(entries.device), 0)
        thin = thinning(self.partition, kept)
        slim = thin_copy(full, thin_tensors(full, thin), plan_edits(full, self.partition, thin))
        left = None
        if self.partition.found.strict_out_nodes:
            left = [self.partition.entries(value, kept) for value in self.partition.found.graph.outputs]
        require(check(full, slim, self.dummy_input, inputs=0, left=left))


def _enliven(model: nn.Module) -> None:
    """Give parameters without variation some: a layer that starts at zero would hide what it is given."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and p.numel() and p.min() == p.max():
                p.add_(torch.rand(p.shape, generator=generator).to(p), alpha=0.1)


def _failing_class(failure: Exception) -> type[nn.Module] | None:
    """The class of the innermost module of the user's own in which a slim model failed; ``None`` if it ran through."""
    inner: type[nn.Module] | None = None
    for frame, _ in traceback.walk_tb(failure.__traceback__):
        running = frame.f_locals.get("self")
        if isinstance(running, nn.Module) and stock(running) is None:
            inner = type(running)
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
