"""Build the slim model from zeros: try the emitters in order and return the first model that is proved equal.

1. ``"config"``: the model's own class, rebuilt from a config that states the sizes (:mod:`oto.slim.config.emit`); only
   if repeated blocks have equal sizes.
2. ``"module"``: a copy in the model's own class, with thinner tensors, size attributes and call overrides
   (:mod:`oto.slim.edits`).
3. ``"graph"``: the graph that ``torch.export`` traces (:mod:`oto.slim.graph.emit`).
4. ``"recording"``: the calls made on the example, valid for its shapes and values (:mod:`oto.slim.graph.replay`).
"""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from oto.axes.registry import known
from oto.errors import (
    EmitterError,
    NotItsClassWarning,
    NotPrunedWarning,
    VerificationError,
    first_line,
    out_of_memory,
    some,
    users_level,
)
from oto.groups import Kept
from oto.progress import stage
from oto.slim.config.readers import needed, said
from oto.slim.edits import Edits, refuse_training
from oto.slim.emitters import emit_class, emit_config, emit_exported, emit_recorded, without_needed
from oto.slim.graph.replay import RECORDED
from oto.slim.own_class import at_counts
from oto.slim.proof.compare import Check, require
from oto.slim.proof.limits import require_numbers
from oto.slim.proof.reference import CheckOptions, check
from oto.slim.proof.train_mode import differs_in_training, heads_in_training
from oto.slim.prove import prove
from oto.slim.provenance import Round, descend
from oto.slim.source import Emitted, Source
from oto.trace.export import LEVELS, export
from oto.trace.replay import BUILT_IN
from oto.trace.stand_ins import on_meta

log = logging.getLogger(__name__)

EMITTERS = ("auto", "config", "module", "graph", "recording")

Refused = Mapping[str, Exception]
"""For each emitter that was tried, why it failed."""


@dataclass(frozen=True, eq=False)
class Made:
    """A slim model and its proof.

    Attributes:
        emitter: The emitter that made it.
        edits: The edits that made it, if it is of the original class.
        tensors: Its tensors; for the original class, by their names in the full model.
        why: Why it is not of the original class, and the limits of a recording.
        notes: Limits of the slim model or its proof, for the user.
        kept: For each prunable group, the atoms that it holds: all nonzero atoms, plus zero ones if the class needs
            more.
    """

    emitter: str
    model: nn.Module
    edits: Edits | None
    tensors: Mapping[str, Tensor]
    checks: list[Check]
    why: str | None = None
    notes: list[str] = field(default_factory=list)
    kept: Kept = field(default_factory=dict)


def require_values(model: nn.Module) -> None:
    """Check that the model's parameters have values.

    Raises:
        EmitterError: The parameters are on the meta device.
    """
    if on_meta(model):
        raise EmitterError(
            f"parameters of {type(model).__name__} are on the meta device, so there are no zeros to read\n"
            "  effect  groups and costs are known, a slim model cannot be made\n"
            "  to fix  give the model values (model.to_empty(device=...), load_state_dict) and a new OTO"
        )


def construct(source: Source, emitter: str = "auto") -> Made:
    """Build the slim model with the first emitter that can express it, and prove it equal.

    Args:
        emitter: ``"auto"``, or a single emitter.

    Raises:
        EmitterError: The requested emitter cannot express the slim model, or none can.
        VerificationError: The graph computes something else, or float64 was requested and the model does not run in it.
    """
    if emitter not in EMITTERS:
        raise EmitterError(f"emitter={emitter!r} is unknown\n  to fix  use one of {', '.join(EMITTERS)}")
    if source.verify:
        source.reference.full.insist()
        require_numbers(source.reference.full)
    ways = [emitter] if emitter != "auto" else [w for w in WAYS if w != "config" or source.recipe is not None]
    refused: dict[str, Exception] = {}
    for way in ways:
        try:
            made = WAYS[way](source, refused)
        except Exception as failure:  # anything that the user's own forward may raise at other sizes
            if out_of_memory(failure) or _is_final(failure, way, emitter):
                raise
            refused[way] = failure
            log.info("the emitter %s fails: %s", way, _first_lines(failure))
        else:
            if "config" in refused:
                made.notes.append(_unstated(source, refused["config"]))
            if emitter == "auto" and made.emitter not in ("config", "module") and source.promises_its_class:
                _warn_of_a_graph(source, refused)
            return made
    raise _refusal(source, ways, refused) from refused["graph" if emitter == "auto" else emitter]


def _is_final(failure: Exception, way: str, emitter: str) -> bool:
    """Whether no further emitter is tried: the graph computes something else, or only this emitter was requested."""
    return way in ("graph", "recording") and (way == emitter or isinstance(failure, VerificationError))


def _refusal(source: Source, ways: Sequence[str], refused: Mapping[str, Exception]) -> EmitterError:
    """The error that no requested emitter can express the slim model."""
    name, why = type(source.model).__name__, {way: _first_lines(failure) for way, failure in refused.items()}
    nothing = "  effect  no slim model was made, and nothing was written\n"
    if ways == ["config"]:
        unstated = _unstated(source, refused["config"])
        return EmitterError(f'{unstated}\n{nothing}  to fix  prune what a config can state: OTO(..., layout="uniform")')
    if ways == ["module"]:
        return EmitterError(
            f"{name} cannot be thinned as its own class: {why['module']}\n{nothing}"
            f"  to fix  use emitter='graph', or {source.remedy}"
        )
    exported, first = refused["graph"], f"the exported graph of {name} fails: {why['graph']}"
    first = str(exported).splitlines()[0] if isinstance(exported, EmitterError) else first
    return EmitterError(
        f"{first}\n"
        f"  class   the original class fails too: {why['module']}\n"
        f"  replay  so does a recording of the example: {why['recording']}\n"
        f"{nothing}  to fix  {source.remedy}"
    )


def _unstated(source: Source, failure: Exception) -> str:
    """The reason why the model's class was not rebuilt from a config."""
    reason = f"{type(source.model).__name__} cannot be made from another config: {_first_lines(failure)}"
    differs = isinstance(failure, VerificationError)
    return f"{reason}: {str(failure).splitlines()[1].strip()}" if differs else reason


def _warn_of_a_graph(source: Source, refused: Mapping[str, Exception]) -> None:
    """Warn that the slim model is not of the promised class, with the remedy."""
    why = _unstated(source, refused["config"]) if "config" in refused else _first_lines(refused["module"])
    warnings.warn(
        f"the slim model is a graph, and no {type(source.model).__name__}: {why}\n"
        "  effect  it computes the same, and has neither the methods nor the attributes of the class\n"
        f"  to fix  {source.remedy}; the zeros of the model may stay, so no training is lost",
        NotItsClassWarning,
        stacklevel=users_level(),
    )


def _of_its_config(source: Source) -> Made:
    emitted = emit_config(source)
    checks = prove(source, emitted)
    assert source.recipe is not None and emitted.edits is not None
    if fields := needed(source.recipe, emitted.edits.config, source.partition):
        emitted.notes.append(said(fields))
    return _made_of_class(source, emitted, checks)


def _of_its_class_at_any_rate(source: Source) -> Made:
    """The slim model of its class; if the adaptation for arbitrary counts fails, search the class at these counts.

    The model is compared on the example even if no proof was requested: a class may take a different path at some
    counts, and nothing else would show it.
    """
    if source.own is not None and not source.verify:
        try:
            return _at_these_counts(source)
        except EmitterError as refused:  # the calls differ, so the results have to be compared
            log.info("compared on the example: %s", _first_lines(refused))
            return _of_its_class(source, compared=True)
    try:
        return _of_its_class(source)
    except Exception as failure:  # anything that the user's own forward may raise at other sizes
        if out_of_memory(failure) or source.own is None:
            raise
        log.info("the class is asked again at the counts that are left: %s", _first_lines(failure))
        try:
            return _at_these_counts(source)
        except EmitterError as refused:
            raise refused from failure


def _at_these_counts(source: Source) -> Made:
    """The slim model of its class, adapted to exactly these counts.

    Raises:
        EmitterError: No adaptation makes the class run with these counts.
    """
    assert source.own is not None
    stage("asking the class again, at these counts")
    groups = source.groups or source.partition.groups
    own, kept = at_counts(source.model, source.partition, groups, source.dummy_input, source.own, source.kept)
    made = _of_its_class(source.keeping(kept, own))
    more = {name: len(atoms) - len(source.kept[name]) for name, atoms in kept.items()}
    made.notes.extend(
        f"{count} zero atom{'s' * (count > 1)} of {name} {'were' if count > 1 else 'was'} kept, because the class takes"
        f" a different path at the size without {'them' if count > 1 else 'it'}"
        for name, count in more.items()
        if count
    )
    return made


def _of_its_class(source: Source, compared: bool = False) -> Made:
    """The slim model of its class.

    Args:
        compared: Compare on the example even if no proof was requested.
    """
    stage("thinning the class")
    source, needed = without_needed(source)
    emitted = emit_class(source)
    emitted.notes.extend(f"{name}, which is zero, is computed: its class cannot do without it" for name in needed)
    if needed:
        warnings.warn(
            f"{some(needed)}, which {'is' if len(needed) == 1 else 'are'} zero, cannot be left out of a"
            f" {type(source.model).__name__}\n"
            "  effect  the slim model computes it, and is larger than what the target counted\n"
            "  to fix  emitter='graph'; or skip_patterns=[...], so that something else goes",
            NotPrunedWarning,
            stacklevel=users_level(),
        )
    slim, edits = emitted.model, emitted.edits
    assert edits is not None
    if compared or (not source.verify and source.own is None):  # nothing else shows whether the class works
        require(source.reference.check(slim, CheckOptions(random=False, exact=False)))
    checks = prove(source, emitted)
    if source.verify and not edits.dropped:
        proofs, untrained = heads_in_training(
            source.model, slim, source.dummy_input, source.partition, source.kept, bool(edits.told)
        )
        checks = [*checks, *proofs]
        if not proofs and not untrained:
            told = differs_in_training(source.model, slim, source.dummy_input, source.partition, source.kept)
            emitted.notes.extend([told] if told else [])
        if untrained:
            emitted.notes.append(f"train mode is refused: {untrained}")
            emitted = replace(emitted, edits=replace(edits, untrained=untrained))
            refuse_training(slim, untrained)
    return _made_of_class(source, emitted, checks)


def _made_of_class(source: Source, emitted: Emitted, checks: list[Check]) -> Made:
    edits, tensors = emitted.edits, emitted.tensors
    assert edits is not None
    descend(emitted.model, source.model, Round.of(edits, tensors, source.kept))
    return Made(emitted.emitter, emitted.model, edits, tensors, checks, notes=emitted.notes, kept=source.kept)


def _exported(source: Source, refused: Refused) -> Made:
    """The slim form of the exported graph, with as many free sizes as can be proved."""
    notes: list[str] = []
    level: str | None = LEVELS[0]
    while level is not None:
        stage("exporting the graph")
        exported = export(source.model, source.dummy_input, known, level)
        emitted = emit_exported(source, exported)
        checks = emitted.compare(source.reference) if source.verify else []
        wrong = [c for c in checks if not c.passed]
        level = LEVELS[LEVELS.index(exported.level) + 1] if exported.level != LEVELS[-1] else None
        fewer = emitted.notes or (wrong and all("sizes" in c.what or "batch" in c.what for c in wrong))
        if level is None or not fewer:
            break
        notes = emitted.notes or notes  # the graph is wrong at other sizes than the example's, so free fewer

    if exported.level != LEVELS[0] and not any("batch" in note for note in notes):
        why_not = (*notes, exported.why, "what it gives at others is wrong")
        free = "only the batch is" if exported.dynamic else "none is"
        notes = [f"of the sizes of its inputs {free} free: {next(x for x in why_not if x).splitlines()[0]}"]
    try:
        checks = prove(source, emitted, checks)
    except VerificationError as failure:
        _require_faithful_export(source, failure)
        raise
    why = _first_lines(refused["module"]) if "module" in refused else None
    return Made("graph", emitted.model, None, emitted.tensors, checks, why, [*notes, *emitted.notes], source.kept)


def _recorded(source: Source, refused: Refused) -> Made:
    stage("recording the example")
    why = [_first_lines(refused[way]) for way in ("module", "graph") if way in refused]
    why = [*why, RECORDED] if why else [f"it was asked for: {RECORDED}"]
    emitted = emit_recorded(source)
    checks = prove(source, emitted)
    # a user who requests a recording by name may get one that is valid only for the example
    if refused and any(note.endswith(BUILT_IN) for note in emitted.notes):
        raise EmitterError(
            "it would hold numbers that follow from the values of the example, and give these for any other input"
            " (emitter='recording' makes it)"
        )
    return Made("recording", emitted.model, None, emitted.tensors, checks, "; ".join(why), emitted.notes, source.kept)


WAYS: dict[str, Callable[[Source, Refused], Made]] = {
    "config": lambda source, refused: _of_its_config(source),
    "module": lambda source, refused: _of_its_class_at_any_rate(source),
    "graph": _exported,
    "recording": _recorded,
}
"""The emitters in order; each gets the reasons why those before it failed."""


def _require_faithful_export(source: Source, failure: Exception) -> None:
    """Distinguish our own mistakes from those of torch.export, which may trace another path than the model takes."""
    dense = export(source.model, source.dummy_input, known)
    try:
        require(check(source.model, dense.module, source.dummy_input, CheckOptions(batch=dense.dynamic, notes=[])))
    except VerificationError as unfaithful:
        raise EmitterError(
            f"torch.export's graph of {type(source.model).__name__} does not compute what the model does\n"
            + "\n".join(str(unfaithful).splitlines()[1:-2])
            + "\n  effect  no graph can be emitted, and nothing was written\n"
            "  to fix  look for code that behaves differently while exporting (torch.compiler.is_exporting)"
        ) from failure


def _first_lines(failure: Exception) -> str:
    where = traceback.extract_tb(failure.__traceback__)[-1]
    return first_line(failure) if str(failure) else f"{type(failure).__name__}: at {where.filename}:{where.lineno}"
