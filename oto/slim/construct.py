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
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from oto.axes.registry import known
from oto.errors import EmitterError, TraceError, VerificationError, first_line, out_of_memory
from oto.groups import Kept, Partition
from oto.slim.graph import emit_graph
from oto.slim.layout import emit_stock
from oto.slim.module import Edits, OwnClass, plan_edits, thin_copy, thin_tensors
from oto.slim.origin import Round, descend
from oto.slim.plan import thinning
from oto.slim.recipe import Recipe
from oto.slim.recording import RECORDED, check_recording, emit_recording
from oto.slim.training import heads_in_training
from oto.slim.unreached import left_out, within
from oto.slim.verify import Check, check, in_double, require
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
    """

    model: nn.Module
    dummy_input: Any
    partition: Partition
    own: OwnClass | None
    kept: Kept
    recipe: Recipe | None = None
    drop_unreached: bool = False

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
        VerificationError: What the graph computes differs.
    """
    name = type(source.model).__name__
    if emitter not in EMITTERS:
        raise EmitterError(f"emitter={emitter!r} is unknown\n  to fix  use one of {', '.join(EMITTERS)}")
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
    return made


def _in_other_ways(source: Zeroed, emitter: str, name: str, why: list[str]) -> Made:
    if emitter in ("auto", "module"):
        try:
            return _of_its_class(source)
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
    slim, edits, tensors, checks = emit_stock(
        source.model, source.partition, source.kept, source.dummy_input, source.recipe, batch=True, left=source.left
    )  # fmt: skip
    descend(slim, source.model, Round.of(edits, tensors, source.kept))
    return Made("config", slim, edits, tensors, checks)


def _of_its_class(source: Zeroed) -> Made:
    thin = thinning(source.partition, source.kept)
    edits = plan_edits(source.model, source.partition, thin, source.own)
    gone: set[str] = set()
    if source.drop_unreached:
        tensors = thin_tensors(source.model, thin, source.own)
        edits = left_out(source.model, source.partition, tensors, edits, source.dummy_input)
        gone = set(within(tensors, edits.dropped))

    def slim_of(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
        tensors = {n: t for n, t in thin_tensors(model, thin, source.own).items() if n not in gone}
        # a class may drop what it keeps for inference when it is trained
        return thin_copy(model, tensors, edits).train().eval(), tensors

    def wider(full64: nn.Module) -> nn.Module:  # what weights take in is worked out anew: float32 would round it
        return in_double(slim_of(full64)[0])

    slim, tensors = slim_of(source.model)
    rounded = source.own is not None and source.own.absorbed
    checks = check(
        source.model, slim, source.dummy_input, batch=True, left=source.left, wider=wider if rounded else None
    )  # fmt: skip
    require(checks)
    notes: list[str] = []
    if not edits.dropped:
        proofs, notes = heads_in_training(source.model, slim, source.dummy_input, source.partition, source.kept)
        checks = [*checks, *proofs]
    descend(slim, source.model, Round.of(edits, tensors, source.kept))
    return Made("module", slim, edits, tensors, checks, None, notes)


def _exported(source: Zeroed, why: list[str]) -> Made:
    """The slim form of what torch.export follows, with as much free as can be proved."""
    notes: list[str] = []
    level: str | None = LEVELS[0]
    while level is not None:
        exported = export(source.model, source.dummy_input, known, level)
        slim = emit_graph(exported, source.partition, source.kept)
        shapes = exported.other_sizes(source.dummy_input) if exported.level == LEVELS[0] else []
        found: list[str] = []
        checks = check(
            source.model, slim, source.dummy_input, batch=exported.dynamic and not shapes, left=source.left,
            notes=found, shapes=shapes,
        )  # fmt: skip
        wrong = [c for c in checks if not c.passed]
        level = LEVELS[(*LEVELS, LEVELS[-1]).index(exported.level) + 1] if exported.level != LEVELS[-1] else None
        if level is None or not (found or (wrong and all("sizes" in c.what or "batch" in c.what for c in wrong))):
            break
        notes = found or notes  # other sizes than the example's do not do, so fewer are free
    try:
        require(checks)
    except VerificationError as failure:
        _require_faithful_export(source, failure)
        raise
    if exported.level != LEVELS[0] and not any("batch" in note for note in notes):
        why_not = (*notes, exported.why, "what it gives at others is wrong")
        free = "only the batch is" if exported.dynamic else "none is"
        notes = [f"of the sizes of its inputs {free} free: {next(x for x in why_not if x).splitlines()[0]}"]
    return Made("graph", slim, None, _held(slim), checks, "; ".join(why) or None, notes)


def _recorded(source: Zeroed, why: list[str]) -> Made:
    notes: list[str] = []
    slim = emit_recording(source.model, source.dummy_input, source.partition, source.kept)
    checks = check_recording(
        source.model, slim, source.dummy_input, source.partition, source.kept, notes, source.left
    )  # fmt: skip
    require(checks)
    return Made("recording", slim, None, _held(slim), checks, "; ".join(why), notes)


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
