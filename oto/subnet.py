"""The result: a slim model, and how it is built, proved and saved."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from oto._torch import holder
from oto.analysis import Analysis
from oto.errors import (
    ArtifactError,
    EmitterError,
    NotPrunedWarning,
    OptionError,
    VerificationError,
    first_line,
    place_of,
    require_flags,
    rewording,
    some,
    users_level,
)
from oto.groups import Cost, Kept, cost
from oto.groups.align import Align, multiples
from oto.groups.layout import equalize_ties
from oto.groups.segments import idle, legal
from oto.io.artifact import adding, check_out_dir
from oto.io.export import export_model
from oto.io.pretrained import save_pretrained
from oto.io.subnet import files, save
from oto.optim import SparseOptimizer
from oto.progress import stage, stages
from oto.report.card import card
from oto.report.html import Background, report
from oto.report.table import cost_rows, html, subnet_lines, subnet_table
from oto.shards import from_first, made_by_first, require_sendable, sharded_names, whole
from oto.slim.config.recipe import Recipe
from oto.slim.construct import Made, construct, require_values
from oto.slim.edits import named_tensors
from oto.slim.latency import as_promised, rounds
from oto.slim.proof.compare import Check, require
from oto.slim.proof.reference import FLOAT64
from oto.slim.pruned_shapes import masks, read_zeros
from oto.slim.removed import unreached, within
from oto.slim.source import Source
from oto.slim.state import left_since
from oto.trace.snapshot import preserved
from oto.trace.state import undone

REPORT = "report.html"

Emitter: TypeAlias = Literal["auto", "config", "module", "graph", "recording"]
"""The name of an emitter, see :meth:`oto.OTO.construct_subnet`."""


@dataclass(frozen=True, eq=False)
class Subnet:
    """A verified slim model.

    Attributes:
        model: The slim module, in eval mode; it owns its memory. A model of the original class can be trained like the
            full one (``docs/after_pruning.md``), and made slim again; its artifact still loads from the first class.
        path: The folder of the artifact, ``None`` if it was not saved.
        emitter: ``"config"`` (the original class, made from an edited config), ``"module"`` (the original class with
            other tensors and attributes), ``"graph"`` (a ``torch.fx.GraphModule`` of the graph from ``torch.export``)
            or ``"recording"`` (a graph module of the calls made on the example, valid for its shapes and values).
        why_graph: Why the original class could not be used, if it could not; and the limits of a recording.
        max_error: Largest relative error against the zeroed full model, in float64 if that was compared; NaN if nothing
            was compared.
        checks: Every comparison that showed something; those of empty outputs, or of NaN with NaN, are in the notes.
        cost_before, cost_after: Parameters and MACs on the example input. If ``oto.shrink`` made the model smaller
            during training, ``cost_before`` is the cost of the first model.
        kept: For each prunable group, the kept atoms.
        notes: Limits of the result: pruning that has not finished, inputs that were not compared, entries of the
            outputs that are not finite, parts that no input of the proof reaches, files that were not written.
        origin: What it was made from, for :meth:`report`.
        example: The example input.
        config: With the emitter ``"config"``, the changes in the model's config, by dotted path; or in the keywords of
            the function that made it, so that ``function(**subnet.config)`` makes a module with the slim sizes. Empty
            if nothing states them; with ``layout="uniform"`` there is a warning then.
    """

    model: nn.Module
    path: Path | None
    emitter: str
    why_graph: str | None
    max_error: float
    checks: tuple[Check, ...]
    cost_before: Cost
    cost_after: Cost
    kept: Kept
    notes: tuple[str, ...] = ()
    origin: Background | None = field(default=None, repr=False)
    example: Any = field(default=None, repr=False)
    config: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return subnet_table(self)

    def __repr__(self) -> str:
        before, after = self.cost_before, self.cost_after
        macs = f"{after.macs / before.macs:.1%} of the MACs, " if before.macs else ""
        notes = f", {len(self.notes)} note{'s' * (len(self.notes) > 1)}" if self.notes else ""
        saved = "" if self.path is None else f", saved in {self.path}"
        return (
            f"Subnet({type(self.model).__name__}, {self.emitter}: {macs}{after.params:,} of {before.params:,}"
            f" parameters, largest error {self.max_error:.1e}{notes}{saved})"
        )

    def _repr_html_(self) -> str:
        return html(cost_rows(self.cost_before, self.cost_after), below="\n".join(subnet_lines(self)))

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        full: nn.Module | None = None,
        dummy_input: Any = None,
        history: Sequence[Any] | None = None,
        title: str | None = None,
    ) -> Path:
        """Write a report: one HTML file that needs no network.

        Args:
            path: The file.
            full: The full model. If given, its forward passes and those of the slim model are timed in turns.
            dummy_input: The input on which they are timed.
            history: Records of training, oldest first: mappings or objects with a ``step`` and numbers, such as
                ``{"step": 10, "loss": 0.7}``. By default ``optimizer.history``.
            title: A title in place of the name of the model's class.

        Returns:
            ``path``.

        Raises:
            MissingExtraError: jinja2 or matplotlib is not installed (``pip install 'oto[report]'``).
            ArtifactError: The file cannot be written; an existing file is unchanged.
        """
        assert self.origin is not None
        times = None
        if full is not None:
            models = {"full": full, "slim": self.model}
            times = dict(zip(models, rounds(list(models.values()), dummy_input, least=20, seconds=3.0), strict=True))
            times = {name: [1e3 * s for s in own] for name, own in times.items()}
        return report(
            place_of("path", path, "nothing was written"),
            self,
            self.origin,
            title=title,
            history=history,
            milliseconds=times,
            example=dummy_input,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: everything except the model; of kept atoms only their number."""
        return {
            "path": None if self.path is None else str(self.path),
            "emitter": self.emitter,
            "why_graph": self.why_graph,
            "max_error": self.max_error,
            "before": vars(self.cost_before),
            "after": vars(self.cost_after),
            "kept": {name: len(atoms) for name, atoms in self.kept.items()},
            "checks": [vars(check) for check in self.checks],
            "notes": list(self.notes),
        }

    def save_pretrained(self, out_dir: str | os.PathLike[str], tokenizer: Any = None) -> list[Path]:
        """Write a folder that ``from_pretrained`` of the model's own library loads, without ``oto``.

        The config of the slim model has to state its sizes: ``OTO(..., layout="uniform")`` or ``"stock"``. The model
        card in the folder, ``README.md``, says what became smaller, how it was proved, and what is needed to load it.

        Args:
            out_dir: A folder that is empty or does not exist yet.
            tokenizer: A tokenizer, a processor, or a list of them, to save beside the model. By default their files are
                copied from the folder that the model was loaded from.

        Returns:
            The files that were written.

        Raises:
            EmitterError: The config cannot state the sizes of the slim model; the message names them.
            ArtifactError: The folder cannot be written or holds files, or what was written reads back differently.
        """
        return save_pretrained(self.model, place_of("out_dir", out_dir, "nothing was written"), tokenizer, card(self))

    def export(self, how: str, path: str | os.PathLike[str]) -> list[Check]:
        """Write the slim model for another runtime and prove the file; sizes that the model leaves free are dynamic.

        Args:
            how: ``"onnx"``, ``"pt2"`` (``torch.export.save``) or ``"aoti"`` (compiled ahead of time, ends in .pt2).
            path: A file that does not exist yet.

        Returns:
            The comparisons of the other runtime's outputs, on the example and on two other sizes if it accepts them.

        Raises:
            EmitterError: The runtime cannot express the model, or there is no compiler.
            VerificationError: The file, read back, computes something else. Nothing was written.
            ArtifactError: The file exists already, or cannot be written.
            MissingExtraError: ONNX is requested but not installed (``pip install 'oto[onnx]'``).
        """
        return export_model(self.model, self.example, how, place_of("path", path, "nothing was exported"))


@dataclass(frozen=True)
class Build:
    """The options for a slim model, as in :meth:`oto.OTO.construct_subnet`."""

    out_dir: Path | None = None
    emitter: Emitter = "auto"
    program: bool | None = None
    save_full: bool = False
    float64: bool | Literal["auto"] = "auto"
    verify: bool = True
    report: bool = False
    align: Align = 1

    @classmethod
    def of(cls, out_dir: str | os.PathLike[str] | None, *options: Any) -> Build:
        """Make the options, with the folder as users pass it.

        Raises:
            OptionError: An option is invalid.
            ArtifactError: The folder has no name.
        """
        if out_dir == "":
            check_out_dir(out_dir)
        folder = None if out_dir is None else place_of("out_dir", out_dir, "nothing was computed or saved")
        build = cls(folder, *options)
        if build.float64 not in FLOAT64:
            raise OptionError(f"float64 is {build.float64!r}; it is one of {', '.join(map(repr, FLOAT64))}")
        require_flags(save_full=build.save_full, verify=build.verify, report=build.report)
        if build.program is not None:
            require_flags(program=build.program)
        return build


def build_subnet(
    analysis: Analysis, model: Any, build: Build, optimizer: SparseOptimizer | None, kept: Kept | None = None
) -> Subnet:
    """Make the slim model, prove it, and save it; see :meth:`oto.OTO.construct_subnet`.

    Args:
        analysis: The analysis of the model that the optimizer, if there is one, trained.
        model: That model or a copy of it.
        kept: The atoms to keep of every prunable group, if known; all others are zero in the model. By default those
            that are not zero.
    """
    inner = holder(model, [name for name, _ in analysis.model.named_parameters()])
    if inner is None or not sharded_names(inner):
        return _build(analysis, model, build, optimizer, kept)

    def make() -> Subnet:
        return _build(analysis, inner, build, optimizer, kept)

    made = made_by_first(inner, make, lambda made: _send(inner, made), EmitterError)
    return made if made.origin is not None else replace(made, origin=_origin(analysis, optimizer))


def _send(model: nn.Module, made: Subnet) -> None:
    """Send the other processes the slim model with its parameters on ``meta``."""
    light = replace(made, origin=None)
    parameters = made.model.named_parameters(remove_duplicate=False)
    empty = {name: torch.empty_like(p, device="meta") for name, p in parameters}
    try:
        with whole(made.model, named_tensors(made.model) | empty):
            require_sendable(light)
    except Exception as refused:  # extension objects may raise anything; nothing was sent
        note = f"the slim model was not sent to this process, so it is empty here: {first_line(refused)}"
        from_first(model, replace(light, model=nn.Module(), notes=(*made.notes, note), example=None))
    else:
        with whole(made.model, named_tensors(made.model) | empty):
            from_first(model, light)


def _build(
    analysis: Analysis, model: Any, build: Build, optimizer: SparseOptimizer | None, kept: Kept | None
) -> Subnet:
    """:func:`build_subnet` if all parameters are in this process."""
    if build.out_dir is not None:
        names = files(build.emitter, analysis.allow_graph, build.program, build.save_full)
        check_out_dir(build.out_dir, [*names, *([REPORT] if build.report else [])])
    before = _files_in(build.out_dir)
    with stages("construct_subnet"):
        subnet = replace(_built(analysis.of(model), build, optimizer, kept), origin=_origin(analysis, optimizer))
    if build.report and subnet.path is not None:
        with adding(subnet.path, REPORT) as file:
            subnet.report(file)
    if gone := before - _files_in(build.out_dir):
        note = f"{some(sorted(gone))} of the earlier artifact, which was not asked for now, was removed"
        subnet = replace(subnet, notes=(*subnet.notes, note))
    return subnet


def _built(analysis: Analysis, build: Build, optimizer: SparseOptimizer | None, known: Kept | None = None) -> Subnet:
    """The slim model of the analyzed model itself, without the background for reports."""
    require_values(analysis.model)
    stage("reading the zeros")
    zeros = read_zeros(analysis.groups, analysis.model)  # refuses parameters that are not finite
    zeros = zeros if known is None else dict(known)
    kept, uneven = _even(analysis, zeros, build.align)
    recipe = _recipe(analysis, build.emitter)
    source = Source(
        analysis.model,
        analysis.example,
        analysis.partition,
        analysis.form.own,
        kept,
        recipe,
        analysis.drop_unreached,
        build.float64,
        build.verify,
        analysis.groups,
    )
    gone = within(analysis.names, unreached(source.model, source.partition)) if analysis.drop_unreached else ()
    before = analysis.cost() if analysis.first is None else analysis.first.cost
    later = left_since(analysis.state, analysis.model, analysis.example, analysis.names)
    built = rewording(analysis.model, EmitterError, "its slim model was built and verified", "the analysis is done")
    altered = analysis.altered
    with _naming(altered), built, undone(later), preserved(analysis.model):
        made = construct(source, build.emitter)
    source = (
        source if made.kept is kept else source.keeping(made.kept, source.own)
    )  # a class may need some atoms that are zero
    after = cost(analysis.partition, {name: len(atoms) for name, atoms in made.kept.items()}, gone)
    checks = made.checks
    if build.out_dir is not None:
        with undone(later):
            checks = checks + _saved(source, made, build, before, after)
    slow = _slow(analysis, made.model, optimizer) if known is None else None
    short = _short_of(analysis, optimizer, zeros) if known is None else None
    if short:  # besides notes on what the layout or align= adds
        warnings.warn(short, NotPrunedWarning, stacklevel=users_level())
    notes = (*(one for one in (short, slow) if one), *_of_altered(altered), *uneven, *made.notes)
    return Subnet(
        made.model,
        build.out_dir,
        made.emitter,
        made.why,
        require(checks),
        tuple(checks),
        before,
        after,
        made.kept,
        notes,
        example=analysis.example.given,
        config={} if recipe is None or made.edits is None else recipe.as_given(made.edits.config),
    )


@contextmanager
def _naming(altered: Sequence[str]) -> Iterator[None]:
    """Context manager in which a failed proof names what was changed since the analysis, a possible cause."""
    try:
        yield
    except VerificationError as failure:
        if not altered:
            raise
        raise VerificationError(
            f"{failure}\n"
            f"  but     the model was changed since OTO(...) was made: {some(altered)}; if that is the cause, change it"
            " back, or change the model first, then OTO(...), and train"
        ) from failure


def _of_altered(altered: Sequence[str]) -> list[str]:
    if not altered:
        return []
    return [f"changed since OTO(...) was made, so costs are those of before, and may be stale: {some(altered)}"]


def _recipe(analysis: Analysis, emitter: str) -> Recipe | None:
    """The recipe that makes the class from its config, if that is to be tried."""
    return Recipe.of(analysis.model) if analysis.form.recipe is None and emitter == "config" else analysis.form.recipe


def _even(analysis: Analysis, zeros: Kept, align: Align) -> tuple[Kept, list[str]]:
    """The kept atoms after equalizing ties and rounding to multiples, with notes on the zero atoms that are kept for
    that, or because the network would come apart without them."""
    groups, asking = analysis.groups, "the layout"
    if align != 1:
        by = multiples(groups, align, analysis.costs.weights)
        groups = tuple(replace(group, divisor=own) for group, own in zip(groups, by, strict=True))
        asking = f"the layout and align={align!r}" if analysis.form.kind == "config" else f"align={align!r}"
    kept, uneven = equalize_ties(groups, zeros, asking)
    kept, back = legal(analysis.partition, kept)
    if not analysis.partition.erased(kept):
        return kept, uneven
    # removed segments are not computed, so their widths impose nothing on others; tied segments stay tied
    segments = {s.name: kept[s.name] for s in analysis.partition.segments if s.name in kept}
    kept, uneven = equalize_ties(groups, {**zeros, **segments}, asking, idle(analysis.partition, groups, kept))
    uneven += [f"{name}, which is zero, was kept: the network would come apart without it" for name in back]
    return kept, uneven


def _saved(source: Source, made: Made, build: Build, before: Cost, after: Cost) -> list[Check]:
    """Save the slim model; returns the comparisons made with what was read back."""
    assert build.out_dir is not None
    proved = f"the slim model was built, and right in {len(made.checks)} comparisons"
    costs = {"before": vars(before), "after": vars(after)}
    with (
        rewording(source.model, ArtifactError, "its slim model was saved and loaded again", proved),
        preserved(source.model),
    ):
        return save(build.out_dir, source, made, costs, build.save_full, build.program)


def _origin(analysis: Analysis, optimizer: SparseOptimizer | None) -> Background:
    """The background that a report needs about a model and its training."""
    name = type(analysis.model).__name__
    if optimizer is None:
        return Background(name, analysis.partition, analysis.groups, first=analysis.first)
    history, schedule = tuple(optimizer.history), optimizer.schedule  # a copy, as training may continue
    periods = [schedule.bounds(period) for period in range(schedule.periods)]
    target = str(optimizer.choice.target)
    return Background(name, analysis.partition, analysis.groups, target, history, periods, analysis.first)


def _files_in(folder: Path | None) -> set[str]:
    return (
        {path.name for path in folder.iterdir() if path.is_file()} if folder is not None and folder.is_dir() else set()
    )


def _slow(analysis: Analysis, slim: nn.Module, optimizer: SparseOptimizer | None) -> str | None:
    """A message if the latency target is missed; ``None`` unless pruning is over and the full model is available."""
    if optimizer is None or optimizer.choice.target.name != "target_latency_ms" or not optimizer.progress.over:
        return None
    target = optimizer.choice.target
    if analysis.first is not None or type(analysis.model) is not type(slim):
        return None
    return as_promised(analysis.model, slim, analysis.example, target.goal, target.full)


def _short_of(analysis: Analysis, optimizer: SparseOptimizer | None, kept: Kept) -> str | None:
    """Why fewer groups are zero than expected, as far as known."""
    total = sum(group.size for group in analysis.groups if group.prunable)
    zero = total - sum(map(len, kept.values()))
    what = f"{zero:,} of {total:,} groups are zero"
    if optimizer is not None and not optimizer.progress.over:
        end = optimizer.schedule.end
        what, remedy = (
            f"step {optimizer.clock:,} of {end:,}: {what} yet",
            (
                f"construct_subnet after {end:,} steps; let early stopping begin there with"
                " oto.integrations.early_stopping(trainer), or prune sooner (pruning_steps=)"
            ),
        )
    elif optimizer is not None and zero < (pruned := optimizer.num_pruned - optimizer.num_removed):
        what += f", the optimizer has pruned {pruned:,}: these are other weights than it trains"
        remedy = (
            "optimizer.zero_pruned_in(model) for a moving average; if a trainer restored an earlier model"
            " (load_best_model_at_end), train with oto.integrations.early_stopping(trainer); otherwise load the"
            " trained weights"
        )
    elif not zero and (optimizer is None or not optimizer.num_removed):
        remedy = "train with oto.hesso(...) to the end of its schedule, or load weights that were trained like that"
        if masked := masks(analysis.model):
            remedy = (
                f"what torch.nn.utils.prune masks counts as zero ({some(masked)}), but no whole group is: mask"
                " whole rows, and each bias with its row"
            )
    else:
        return None
    effect = "only what is zero was removed" if zero else "nothing was removed, slim is as large as full"
    return f"{what}\n  effect  {effect}\n  to fix  {remedy}"
