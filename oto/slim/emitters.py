"""The emitters: each builds the slim model in its own form; the proof is separate."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from oto.axes.registry import known
from oto.errors import EmitterError, first_line, some
from oto.slim.config.emit import emit_stock
from oto.slim.edits import Edits, forget_idle, named_tensors, pruned_tensor, pruned_tensors, slim_copy
from oto.slim.erased import Erasures, failure_without, leaving_out, plan, refusing
from oto.slim.graph.emit import emit_graph
from oto.slim.graph.replay import check_recording, emit_recording
from oto.slim.own_class import OwnClass, plan_edits
from oto.slim.proof.compare import Check
from oto.slim.proof.reference import CheckOptions, Reference
from oto.slim.proof.run import learn
from oto.slim.pruned_shapes import PrunedShapes
from oto.slim.removed import left_out, within
from oto.slim.source import Emitted, Source
from oto.slim.widths import Widths
from oto.trace.export import LEVELS, Exported, export

log = logging.getLogger(__name__)


def emit_config(source: Source) -> Emitted:
    """The model's class, made from a config that states the sizes.

    Raises:
        EmitterError: No config states the pruned shapes or the removed segments.
    """
    made = emit_stock(source.model, source.partition, source.kept, source.recipe)

    def compare(reference: Reference) -> list[Check]:
        return reference.check(made.model, CheckOptions(batch=True, rounded=made.rounded))

    return Emitted("config", made.model, made.edits, made.tensors, compare, emit_config, changed=made.changed)


def emit_class(source: Source) -> Emitted:
    """A copy of the model with thinner tensors.

    Raises:
        EmitterError: The class cannot express the pruned shapes.
    """
    pruned = source.pruned
    edits, gone = without_segments(source, class_edits(source, source.own))
    if source.drop_unreached:
        tensors = pruned_tensors(source.model, pruned)
        edits = left_out(source.model, source.partition, tensors, edits, source.dummy_input)
        gone |= set(within(tensors, edits.dropped))
    slim = _emit_class(source, pruned, edits, gone)
    learn(slim.model, edits, source.dummy_input)
    forget_idle(slim.model, edits)
    return slim


def class_edits(source: Source, own: OwnClass | None) -> Edits:
    """The edits of a copy of the model with thinner tensors, before segments are left out of it.

    Args:
        own: What the class needs, if it was searched.
    """
    passed = refusing(source.partition.found.graph, source.partition.erased(source.kept))
    return plan_edits(source.model, source.pruned, own, passed)


def without_segments(source: Source, edits: Edits) -> tuple[Edits, set[str]]:
    """The edits that also leave out segments that are removed whole, and the names of the tensors removed with them.

    Args:
        edits: The edits of the thin copy.
    """
    if not source.partition.erased(source.kept):
        return edits, set()
    edits = leaving_out(edits, erasures(source, edits).erased, source.model)
    names = [name for leaf in source.partition.found.graph.leaves for name in leaf.names]
    return edits, set(within(names, edits.erased))


def without_needed(source: Source) -> tuple[Source, list[str]]:
    """The source with the zero segments kept that the class cannot leave out, and the names of these segments."""
    needed: list[str] = []
    while gone := source.partition.erased(source.kept):
        found = erasures(source)
        more = [segment.name for segment in found.needed]
        if not more and _fails_without(source, found):
            alone = [_keeping(source, [other.name for other in gone if other is not segment]) for segment in gone]
            stuck = [(own, erasures(own)) for own in alone]
            more = [
                segment.name
                for segment, (own, how) in zip(gone, stuck, strict=True)
                if how.needed or _fails_without(own, how)
            ] or [segment.name for segment in gone]
        if not more:
            break
        needed += more
        source = _keeping(source, more)
    return source, needed


def _keeping(source: Source, segments: Collection[str]) -> Source:
    return replace(source, kept={**source.kept, **{name: np.arange(1) for name in segments}})


def _fails_without(source: Source, how: Erasures) -> bool:
    """Whether the class fails on the example without the removed segments."""
    edits = class_edits(source, source.own)
    tensors = pruned_tensors(source.model, source.pruned, source.own.scales if source.own is not None else {})
    try:
        failure = failure_without(source.model, how.erased, tensors, edits, source.dummy_input)
    except EmitterError:  # reported when the class is thinned
        return False
    if failure is not None:
        log.info("%s fails without %s: %s", type(source.model).__name__, some(list(how.erased)), first_line(failure))
    return failure is not None


def erasures(source: Source, edits: Edits | None = None) -> Erasures:
    """How the class leaves out the segments that are removed whole.

    Args:
        edits: The edits of the thin copy.
    """
    gone, left = source.partition.erased(source.kept), source.pruned
    if beside := [segment.name for segment in gone if segment.axes]:  # a layer needs a channel, so keep one here
        source, edits = _keeping(source, beside), None
    edits = plan_edits(source.model, source.pruned, source.own) if edits is None else edits
    tensors = pruned_tensors(source.model, source.pruned, source.own.scales if source.own is not None else {})
    widths = Widths(source.partition, left, source.pruned)
    return plan(source.model, widths, gone, tensors, edits, source.dummy_input)


def _emit_class(source: Source, pruned: PrunedShapes, edits: Edits, gone: Collection[str]) -> Emitted:
    """A copy of the model with thinner tensors and the given edits, without the tensors in ``gone``."""
    scales = source.own.scales if source.own is not None else {}
    tensors = {n: t for n, t in pruned_tensors(source.model, pruned, scales).items() if n not in gone}
    # a class may drop what it cached for inference when it enters train mode
    slim = slim_copy(source.model, tensors, edits).train().eval()

    def rounded(full: nn.Module) -> dict[str, Tensor]:  # weights that counts are folded into
        leaves = [leaf for leaf in pruned.found.graph.leaves if leaf.names and leaf.name in scales]
        made = [(leaf, pruned_tensor(full, pruned, leaf, scales[leaf.name])) for leaf in leaves]
        return {name: tensor for leaf, tensor in made for name in leaf.names if name not in gone}

    def compare(reference: Reference) -> list[Check]:
        return reference.check(slim, CheckOptions(batch=True, rounded=rounded if scales else None))

    def again(full: Source) -> Emitted:
        return _emit_class(full, pruned, edits, gone)

    return Emitted("module", slim, edits, tensors, compare, again, scales)


def emit_exported(source: Source, exported: Exported) -> Emitted:
    """The exported graph with thinner tensors.

    Raises:
        EmitterError: The exported graph couples parameter dimensions differently from the recorded one.
    """
    slim = emit_graph(exported, source.partition, source.kept)
    notes: list[str] = []

    def compare(reference: Reference) -> list[Check]:
        shapes = exported.other_sizes(source.dummy_input) if exported.level == LEVELS[0] else []
        return reference.check(slim, CheckOptions(batch=exported.dynamic and not shapes, shapes=shapes, notes=notes))

    def again(full: Source) -> Emitted:
        return emit_exported(full, export(full.model, full.dummy_input, known, exported.level))

    return Emitted("graph", slim, None, named_tensors(slim), compare, again, notes=notes)


def emit_recorded(source: Source) -> Emitted:
    """The calls made on the example, with thinner tensors.

    Raises:
        EmitterError: One of the calls cannot be put into a graph.
    """
    slim = emit_recording(source.model, source.dummy_input, source.partition, source.kept)
    notes: list[str] = []

    def compare(reference: Reference) -> list[Check]:
        return check_recording(reference, slim, source.partition, source.kept, notes)

    return Emitted("recording", slim, None, named_tensors(slim), compare, emit_recorded, notes=notes)
