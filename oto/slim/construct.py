"""From zeros to a slim model: the ways in their order, and the proof without which none is handed out.

1. ``"config"``: the model's own class, made anew from a config that states the sizes (:mod:`oto.slim.layout`); only
   where repeated blocks are alike.
2. ``"module"``: the model's own class, with thinner tensors and what the class has to be told (:mod:`oto.slim.module`).
3. ``"graph"``: what ``torch.export`` follows (:mod:`oto.slim.graph`).
4. ``"recording"``: the calls that were made on the example, at its shapes and values (:mod:`oto.slim.recording`).
"""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oto.axes.registry import known
from oto.errors import (
    EmitterError,
    NotItsClassWarning,
    TraceError,
    VerificationError,
    first_line,
    out_of_memory,
    some,
    users_level,
)
from oto.groups import Kept, Partition
from oto.progress import stage
from oto.slim.graph import emit_graph
from oto.slim.layout import emit_stock
from oto.slim.module import Edits, attribute, forget_idle, refuse_training, thin_copy, thin_tensors
from oto.slim.origin import Round, descend
from oto.slim.own_class import OwnClass, at_counts, plan_edits
from oto.slim.plan import thinning
from oto.slim.recipe import Recipe
from oto.slim.recording import RECORDED, check_recording, emit_recording
from oto.slim.reference import Reference, check
from oto.slim.training import heads_in_training
from oto.slim.unreached import left_out, within
from oto.slim.verify import Check, learn, require
from oto.trace.export import LEVELS, export
from oto.trace.record import on_meta

log = logging.getLogger(__name__)

EMITTERS = ("auto", "config", "module", "graph", "recording")


@dataclass(frozen=True, eq=False)
class Zeroed:
    """What a slim model is made of.

    Attributes:
        model: The full model, of which everything that goes is zero.
        dummy_input: The example input.
        own: What was found out about the class of the model; ``None`` if nothing was asked.
        kept: For each prunable group, the atoms that are left.
        recipe: How the class is made from its config, if that is to be tried.
        drop_unreached: Leave out what the forward never uses in eval mode.
        float64: Whether to compare in float64, as :class:`oto.slim.reference.Reference` takes it.
        verify: Whether to compare at all.
    """

    model: nn.Module
    dummy_input: Any
    partition: Partition
    own: OwnClass | None
    kept: Kept
    recipe: Recipe | None = None
    drop_unreached: bool = False
    float64: bool | str = "auto"
    verify: bool = True

    @cached_property
    def reference(self) -> Reference:
        """The full model, with which whatever is made of it is compared."""
        decides = self.partition.found.graph.how == "real"
        return Reference(self.model, self.dummy_input, self.left, self.float64, decides=decides)

    @property
    def left(self) -> list[list[NDArray[np.bool_]]] | None:
        """For each output and each of its dimensions, what the slim model still has; ``None`` if that is all."""
        if not self.partition.found.strict_out_nodes:
            return None
        return [self.partition.entries(value, self.kept) for value in self.partition.found.graph.outputs]

    @property
    def way_out(self) -> str:
        """What to do where the original class cannot express what was removed."""
        if self.own is not None:
            return "keep what that line reads whole: OTO(..., skip_patterns=[...])"
        return "prune only what the class can do without: OTO(...) without everything=True"


@dataclass(frozen=True, eq=False)
class Made:
    """A slim model and its proof.

    Attributes:
        emitter: The way that was taken.
        edits: What made it of the original class, if it is of that.
        tensors: What it holds, by the names of the full model for the original class.
        why: Why it is not of the original class, and what a recording is.
        notes: What falls short of what one might expect.
    """

    emitter: str
    model: nn.Module
    edits: Edits | None
    tensors: Mapping[str, Tensor]
    checks: list[Check]
    why: str | None = None
    notes: list[str] = field(default_factory=list)


def require_values(model: nn.Module) -> None:
    """Refuse a model whose parameters have shapes only.

    Raises:
        EmitterError: They are on the meta device.
    """
    if on_meta(model):
        raise EmitterError(
            f"parameters of {type(model).__name__} are on the meta device, so there are no zeros to read\n"
            "  effect  groups and costs are known, a slim model cannot be made\n"
            "  to fix  give the model values (model.to_empty(device=...), load_state_dict) and a new OTO"
        )


def construct(source: Zeroed, emitter: str = "auto") -> Made:
    """Build the slim model in the first way that can express it, and prove it equal.

    Args:
        emitter: ``"auto"``, or one way alone.

    Raises:
        EmitterError: The asked way cannot express the slim model, or none can.
        VerificationError: What the graph computes differs; or the model does not run in float64, which was asked for.
    """
    name = type(source.model).__name__
    if emitter not in EMITTERS:
        raise EmitterError(f"emitter={emitter!r} is unknown\n  to fix  use one of {', '.join(EMITTERS)}")
    if source.verify:
        source.reference.insist()
    why: list[str] = []
    notes: list[str] = []
    if emitter == "config" or (emitter == "auto" and source.recipe is not None):
        try:
            return _of_its_config(source)
        except Exception as failure:  # anything that the user's own forward may raise at other sizes
            if out_of_memory(failure):
                raise
            said = f"{name} cannot be made from another config: {_first_lines(failure)}"
            if emitter == "config":
                raise EmitterError(
                    f"{said}\n  effect  no slim model was made, and nothing was written\n"
                    '  to fix  prune what a config can state: OTO(..., layout="uniform")'
                ) from failure
            notes.append(said)
    made = _in_other_ways(source, emitter, name, why)
    made.notes.extend(notes)
    if emitter == "auto" and made.emitter != "module" and source.own is not None:
        _warn_of_a_graph(source, name, why[0])
    return made


def _warn_of_a_graph(source: Zeroed, name: str, why: str) -> None:
    """Say that the promised class was not had, and the way out."""
    warnings.warn(
        f"the slim model is a graph, and no {name}: {why}\n"
        "  effect  it computes the same, and has neither the methods nor the attributes of the class\n"
        f"  to fix  {source.way_out}; the zeros of the model may stay, so no training is lost",
        NotItsClassWarning,
        stacklevel=users_level(),
    )


def _proved(source: Zeroed, prove: Callable[[Zeroed], list[Check]], notes: list[str]) -> list[Check]:
    """The comparisons of a slim model with the full one, if they are wanted.

    Args:
        prove: Makes the slim model of a full one, and compares them.

    Raises:
        VerificationError: The slim model computes something else.
    """
    if not source.verify:
        return []
    checks = prove(source)
    require(checks)
    notes.extend(source.reference.notes)
    idle = source.reference.idle()
    if idle:
        checks = checks + _lively(source, prove, idle, notes)
    return checks


def _lively(source: Zeroed, prove: Callable[[Zeroed], list[Check]], idle: list[int], notes: list[str]) -> list[Check]:
    """Where outputs are the same for every input, compare once more with random numbers in constant parameters."""
    stage("an output is constant: comparing with random numbers in constant parameters")
    said = f"of the full model, {_outputs(idle)} {'are' if len(idle) > 1 else 'is'} the same for every input"
    lively = enlivened(source.model, source.partition, source.kept)
    other = replace(source, model=lively)
    other.reference.brief = True
    try:
        checks = prove(other)
        require(checks)
    except VerificationError:
        raise
    except Exception as failure:  # code that minds other numbers
        if out_of_memory(failure):
            raise
        notes.append(f"{said}, so comparing them shows nothing ({_first_lines(failure)} with other numbers)")
        return []
    by_design = other.reference.idle()
    moved = [i for i in idle if i not in by_design]
    if moved:
        notes.append(
            f"{said}: a layer before starts at zero, it seems, so comparing shows nothing of what is before it."
            " Compared once more, with random numbers in constant parameters; load trained weights to compare these"
        )
        return [replace(c, what=f"{c.what}, with other numbers in constant parameters") for c in checks]
    if len(idle) == len(source.reference.floating):
        notes.append(f"{said}, whatever the parameters are: comparing it shows nothing")
    return []


def _outputs(indices: list[int]) -> str:
    return f"output{'s' * (len(indices) > 1)} {some(map(str, indices))}"


def enlivened(model: nn.Module, partition: Partition, kept: Kept) -> nn.Module:
    """A copy that shares the parameters of a model; those that are all one number hold random ones where they stay."""
    thin = thinning(partition, kept)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for leaf in partition.found.graph.leaves:
        if not leaf.names:
            continue
        tensor = attribute(model, leaf.names[0]).detach()
        if leaf.kind == "parameter" and tensor.is_floating_point() and tensor.numel() and tensor.min() == tensor.max():
            stays = torch.ones(tensor.shape, dtype=torch.bool)
            for dim, mask in enumerate(thin.entries(leaf)):
                stays &= torch.from_numpy(mask).view(-1, *[1] * (tensor.ndim - dim - 1))
            drawn = torch.rand(tensor.shape, generator=generator) * 0.1 * stays
            tensor = tensor + drawn.to(tensor)
        tensors.update(dict.fromkeys(leaf.names, tensor))
    return thin_copy(model, tensors, Edits())


def _in_other_ways(source: Zeroed, emitter: str, name: str, why: list[str]) -> Made:
    if emitter in ("auto", "module"):
        try:
            return _of_its_class_at_any_rate(source)
        except Exception as failure:  # anything that the user's own forward may raise at other sizes
            if out_of_memory(failure):
                raise
            why.append(_first_lines(failure))
            if emitter == "module":
                raise EmitterError(
                    f"{name} cannot be thinned as its own class: {why[0]}\n"
                    "  effect  no slim model was made, and nothing was written\n"
                    f"  to fix  use emitter='graph', or {source.way_out}"
                ) from failure
            log.info("the original class does not fit, using the graph: %s", why[0])
    if emitter == "recording":
        return _recorded(source, [f"it was asked for: {RECORDED}"])
    try:
        return _exported(source, why)
    except VerificationError:
        raise
    except Exception as failure:
        if emitter == "graph":
            raise
        refused = failure
        log.info("torch.export does not do, using the recording: %s", _first_lines(failure))
    try:
        return _recorded(source, [*why, _first_lines(refused), RECORDED])
    except (EmitterError, TraceError) as failure:
        said = f"the exported graph of {name} fails: {_first_lines(refused)}"
        raise EmitterError(
            f"{str(refused).splitlines()[0] if isinstance(refused, EmitterError) else said}\n"
            f"  class   the original class does not do either: {why[0]}\n"
            f"  replay  nor does a recording of the example: {str(failure).splitlines()[0]}\n"
            "  effect  no slim model was made, and nothing was written\n"
            f"  to fix  {source.way_out}"
        ) from refused


def _of_its_config(source: Zeroed) -> Made:
    notes: list[str] = []
    slim, edits, tensors, wider = emit_stock(source.model, source.partition, source.kept, source.recipe)

    def prove(full: Zeroed) -> list[Check]:
        own, own_wider = slim, wider
        if full is not source:
            own, _, _, own_wider = emit_stock(full.model, full.partition, full.kept, full.recipe)
        return full.reference.check(own, batch=True, wider=own_wider)

    checks = _proved(source, prove, notes)
    descend(slim, source.model, Round.of(edits, tensors, source.kept))
    return Made("config", slim, edits, tensors, checks, notes=notes)


def _of_its_class_at_any_rate(source: Zeroed) -> Made:
    """The slim model of its class; where that fails with what was found for any counts, the class is asked at these."""
    try:
        return _of_its_class(source)
    except Exception as failure:  # anything that the user's own forward may raise at other sizes
        if out_of_memory(failure) or source.own is None:
            raise
        log.info("the class is asked again at the counts that are left: %s", _first_lines(failure))
        stage("asking the class again, at these counts")
        try:
            own = at_counts(source.model, source.partition, source.dummy_input, source.own, source.kept)
        except EmitterError as refused:
            raise refused from failure
    return _of_its_class(replace(source, own=own))


def _of_its_class(source: Zeroed) -> Made:
    notes: list[str] = []
    stage("thinning the class")
    thin = thinning(source.partition, source.kept)
    scales = source.own.scales if source.own is not None else {}
    edits = plan_edits(source.model, thin, source.own)
    gone: set[str] = set()
    if source.drop_unreached:
        tensors = thin_tensors(source.model, thin, scales)
        edits = left_out(source.model, source.partition, tensors, edits, source.dummy_input)
        gone = set(within(tensors, edits.dropped))

    def slim_of(model: nn.Module, held: Mapping[str, Tensor] | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
        tensors = {n: t for n, t in thin_tensors(model, thin, scales, held).items() if n not in gone}
        # a class may drop what it keeps for inference when it is trained
        return thin_copy(model, tensors, edits).train().eval(), tensors

    slim, tensors = slim_of(source.model)
    learn(slim, edits, source.dummy_input)
    forget_idle(slim, edits)

    def prove(full: Zeroed) -> list[Check]:
        own, made = (slim, tensors) if full is source else slim_of(full.model)

        def wider(whole: nn.Module) -> nn.Module:  # what weights take in is worked out anew: float32 would round it
            narrow = {n: t for n, t in made.items() if n not in scales} if whole is full.model else None
            return slim_of(whole, narrow)[0]

        return full.reference.check(own, batch=True, wider=wider if scales else None)

    if not source.verify and source.own is None:  # nothing else tells whether the class can do it
        require(source.reference.check(slim, random=False, exact=False))
    checks = _proved(source, prove, notes)
    if source.verify and not edits.dropped:
        proofs, untrained = heads_in_training(
            source.model, slim, source.dummy_input, source.partition, source.kept, bool(edits.told)
        )  # fmt: skip
        checks = [*checks, *proofs]
        if untrained:
            notes.append(f"train mode is refused: {untrained}")
            edits = replace(edits, untrained=untrained)
            refuse_training(slim, untrained)
    descend(slim, source.model, Round.of(edits, tensors, source.kept))
    return Made("module", slim, edits, tensors, checks, notes=notes)


def _exported(source: Zeroed, why: list[str]) -> Made:
    """The slim form of what torch.export follows, with as much free as can be proved."""
    notes: list[str] = []
    level: str | None = LEVELS[0]
    while level is not None:
        stage("exporting the graph")
        exported = export(source.model, source.dummy_input, known, level)
        slim = emit_graph(exported, source.partition, source.kept)
        shapes = exported.other_sizes(source.dummy_input) if exported.level == LEVELS[0] else []
        how: dict[str, Any] = {"batch": exported.dynamic and not shapes, "shapes": shapes}
        found: list[str] = []
        checks = source.reference.check(slim, notes=found, **how) if source.verify else []
        wrong = [c for c in checks if not c.passed]
        level = LEVELS[(*LEVELS, LEVELS[-1]).index(exported.level) + 1] if exported.level != LEVELS[-1] else None
        if level is None or not (found or (wrong and all("sizes" in c.what or "batch" in c.what for c in wrong))):
            break
        notes = found or notes  # other sizes than the example's do not do, so fewer are free

    if exported.level != LEVELS[0] and not any("batch" in note for note in notes):
        why_not = (*notes, exported.why, "what it gives at others is wrong")
        free = "only the batch is" if exported.dynamic else "none is"
        notes = [f"of the sizes of its inputs {free} free: {next(x for x in why_not if x).splitlines()[0]}"]

    def prove(full: Zeroed) -> list[Check]:
        if full is source:
            return checks
        own = emit_graph(export(full.model, full.dummy_input, known, exported.level), full.partition, full.kept)
        return full.reference.check(own)

    try:
        checks = _proved(source, prove, notes)
    except VerificationError as failure:
        _require_faithful_export(source, failure)
        raise
    return Made("graph", slim, None, _held(slim), checks, "; ".join(why) or None, notes)


def _recorded(source: Zeroed, why: list[str]) -> Made:
    notes: list[str] = []
    stage("recording the example")
    slim = emit_recording(source.model, source.dummy_input, source.partition, source.kept)

    def prove(full: Zeroed) -> list[Check]:
        own = slim
        if full is not source:
            own = emit_recording(full.model, full.dummy_input, full.partition, full.kept)
        return check_recording(full.reference, own, full.partition, full.kept, notes)

    return Made("recording", slim, None, _held(slim), _proved(source, prove, notes), "; ".join(why), notes)


def _held(graph: nn.Module) -> dict[str, Tensor]:
    return dict([*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)])


def _require_faithful_export(source: Zeroed, failure: Exception) -> None:
    """Tell a mistake of ours from one of torch.export, which may follow another path than the model itself."""
    dense = export(source.model, source.dummy_input, known)
    try:
        require(check(source.model, dense.module, source.dummy_input, batch=dense.dynamic, notes=[]))
    except VerificationError as unfaithful:
        raise EmitterError(
            f"torch.export's graph of {type(source.model).__name__} does not compute what the model does\n"
            + "\n".join(str(unfaithful).splitlines()[1:-2])
            + "\n  effect  no graph can be emitted, and nothing was written\n"
            "  to fix  look for code that runs otherwise while exporting (torch.compiler.is_exporting)"
        ) from failure


def _first_lines(failure: Exception) -> str:
    where = traceback.extract_tb(failure.__traceback__)[-1]
    return first_line(failure) if str(failure) else f"{type(failure).__name__}: at {where.filename}:{where.lineno}"
