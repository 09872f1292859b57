"""What comes out: a slim model, how it was proved, and what can be written of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from oto.groups import Cost, Kept
from oto.io.export import export_model
from oto.io.pretrained import save_pretrained
from oto.report.card import card
from oto.report.html import Origin, report
from oto.report.table import cost_rows, html, subnet_lines, subnet_table
from oto.slim.latency import rounds
from oto.slim.proof.compare import Check


@dataclass(frozen=True, eq=False)
class Subnet:
    """A verified slim model.

    Attributes:
        model: The slim module, in eval mode; it owns its memory. One of the original class trains on as the full one
            would (``docs/after_pruning.md``), and may be made slim again: what is saved loads from the first class.
        path: The folder of the artefact, ``None`` if it was not saved.
        emitter: ``"config"`` (the original class, made from an edited config), ``"module"`` (the original class with
            other tensors and attributes), ``"graph"`` (a ``torch.fx.GraphModule`` of what ``torch.export``
            followed) or ``"recording"`` (one of the calls that were made on the example, at its shapes and values).
        why_graph: Why the original class could not be used, if it could not; and what a recording is.
        max_error: Largest relative error against the zeroed full model, in float64 where that was compared; NaN if
            nothing was.
        checks: Every comparison that showed something: those of empty outputs, or of NaN with NaN, are among the notes.
        cost_before, cost_after: Parameters and MACs on the example input.
        kept: For each prunable group, the atoms that are left.
        notes: What falls short of what one might expect: pruning that has not finished, inputs that were not compared,
            entries of the outputs that are no numbers, parts that no input of the proof reaches, files that were not
            written.
        origin: What it was made from, for :meth:`report`.
        example: The example input.
        config: With the emitter ``"config"``, what changes in the model's config, by dotted paths; or in the keywords
            of the function that made it, so that ``function(**subnet.config)`` makes a module of the slim sizes. Empty
            where nothing states them; of ``layout="uniform"`` there is a warning then.
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
    origin: Origin | None = field(default=None, repr=False)
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
            full: The full model. Where it is given, forward passes of it and of the slim one are timed in turns.
            dummy_input: What to time them on.
            history: Records of training, oldest first: mappings or objects with a ``step`` and numbers, such as
                ``{"step": 10, "loss": 0.7}``. By default ``optimizer.history``.
            title: Instead of the name of the model's class.

        Returns:
            ``path``.

        Raises:
            MissingExtraError: jinja2 or matplotlib is not installed (``pip install 'oto[report]'``).
            ArtefactError: The file cannot be written; what was there is as it was.
        """
        assert self.origin is not None
        times = None
        if full is not None:
            models = {"full": full, "slim": self.model}
            times = dict(zip(models, rounds(list(models.values()), dummy_input, least=20, seconds=3.0), strict=True))
            times = {name: [1e3 * s for s in own] for name, own in times.items()}
        return report(Path(path).expanduser(), self, self.origin, title=title, history=history, milliseconds=times,
                      example=dummy_input)  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: all but the model; of the kept atoms their numbers."""
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

        It needs a slim model whose config states its sizes: ``OTO(..., layout="uniform")`` or ``"stock"``. The model
        card in it, ``README.md``, says what became smaller, how it was proved, and what a reader needs.

        Args:
            out_dir: A folder that is empty or not there yet.
            tokenizer: A tokenizer, a processor, or a list of such, to be saved beside the model. By default the files
                of the folder that the model was loaded from are copied.

        Returns:
            The files that were written.

        Raises:
            EmitterError: The config cannot state the sizes of the slim model; the message names them.
            ArtefactError: The folder cannot be written or holds files, or what was written reads otherwise.
        """
        return save_pretrained(self.model, Path(out_dir).expanduser(), tokenizer, card(self))

    def export(self, how: str, path: str | os.PathLike[str]) -> list[Check]:
        """Write the slim model as a file of another runtime, with every size free that it leaves free, and prove it.

        Args:
            how: ``"onnx"``, ``"pt2"`` (``torch.export.save``) or ``"aoti"`` (compiled ahead of time, ends in .pt2).
            path: A file that is not there yet.

        Returns:
            The comparisons of what the other runtime gives, on the example and on two other sizes where it takes them.

        Raises:
            EmitterError: The model cannot be expressed in it, or there is no compiler.
            VerificationError: What was read back computes something else. Nothing was written.
            ArtefactError: There is a file already, or it cannot be written.
            MissingExtraError: ONNX is asked for and not installed (``pip install 'oto[onnx]'``).
        """
        return export_model(self.model, self.example, how, Path(path).expanduser())
