"""Compress a model without training: choose atoms and segments, compensate for them, and set them to zero.

1. **Choose** everything to remove, on the full model: by gradients, by the error of the least-squares fit (``"obs"``),
   by the variance of the readers' inputs (``"fluctuation"``), by the loss (``"sensitivity"``), or by weights. Segments
   and atoms share one budget. If the criterion is measured at readers, which segments do not have, segments are scored
   by how much the loss rises without them.
2. Set the chosen **segments** to zero. They are not compensated, so they come first: all later fits are then made for
   the network without them, also those of weights that read one tensor before a segment and another after it. Node
   groups inside them need no fit.
3. Process the node groups that lose atoms in portions, in the order of depth. The inputs of each portion come from the
   pruned and folded layers before it; otherwise errors would accumulate. With ``"obs"`` and ``"sensitivity"``, the
   atoms of a portion are chosen here, one after the other; only their number is fixed before.
4. For each portion: collect the second moments of its readers' inputs, **fold** (:mod:`oto.optim.compensate`), set the
   atoms to zero, and estimate batch norms again. The effect is measured on held-out batches, which are used for nothing
   else; a fold, or batch-norm statistics, that do not lower the loss are undone. An unchecked fit can destroy a model:
   it minimizes the average error over all tokens, but the output may depend on a single one.

There are no gradient steps, so the result is the same for the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oto.analysis import Analysis
from oto.calibration import Calibrated, Data, LossOf, Undo, require_one_process, undone, worse
from oto.errors import NonFiniteParameterError, OptionError
from oto.groups import NodeGroup, Partition, cost
from oto.groups.readers import Reader, Readers, readers
from oto.groups.segments import idle, not_computed
from oto.optim import Choice
from oto.optim.compensate import (
    KINDS,
    Key,
    Moments,
    SplitEntries,
    Surgeon,
    fitted_readers,
    fluctuation,
    fold_,
    greedy,
    key_of,
    packed,
)
from oto.optim.entries import Rows
from oto.optim.preview import left_by, left_now
from oto.optim.saliency import AS_PUBLISHED, CRITERIA, magnitude
from oto.optim.saliency import Entries as Weights
from oto.previewing import choice_for
from oto.progress import stage, stages
from oto.report.one_shot import OneShot, Portion
from oto.trace.snapshot import preserved


def obs(entries: Weights) -> Tensor:
    """The error of the readers' outputs after an atom is removed and the others compensate; measured on batches."""
    raise AssertionError("it is measured")


def fluctuating(entries: Weights) -> Tensor:
    """How much an atom contributes to the variance of the readers' outputs; measured on batches."""
    raise AssertionError("it is measured")


def sensitivity(entries: Weights) -> Tensor:
    """How much the loss rises per atom if its group alone loses atoms; measured on batches."""
    raise AssertionError("it is measured")


MEASURED = {"obs": obs, "fluctuation": fluctuating, "sensitivity": sensitivity}
"""Criteria that are measured with the inputs of readers."""

Score = Callable[[Reader, Moments, Tensor, Tensor, float], Tensor]
"""Computes the score of each atom for one reader, float64, shape ``(atoms,)``, from the reader, the moments of its
input, its parameter, the entries of each atom, and the damping."""

SCORES: dict[Callable[[Weights], Tensor], Score] = {
    obs: lambda reader, moments, p, blocks, ridge: Surgeon.of(reader, moments, p, blocks, ridge).scores(),
    fluctuating: lambda reader, moments, p, blocks, _: fluctuation(reader, moments, p, blocks),
}
"""The scores of a group's atoms, summed over its readers; ``"sensitivity"`` uses the loss instead."""

COMPARABLE: dict[str, Any] = {"normalize": "none", "by_cost": 1.0}
"""Default options of a choice by ``"sensitivity"``, which is in the unit of the loss."""

LEVELS = (0.25, 0.5, 0.75)
"""The shares of its atoms that each group alone loses when ``"sensitivity"`` is measured."""

NO_FOLD = "what a segment adds is taken over by nothing"

TINY = 1e-9
"""The minimum score of an atom; the loss may even fall, since a fit can improve the model."""


@dataclass(frozen=True)
class Settings:
    """How to compress.

    Attributes:
        compensate: One of :data:`oto.optim.compensate.KINDS`, or ``None``.
        ridge: Damping of the fit, as a share of the mean of the diagonal.
        portions: Number of portions along the depth; more if the moments of one do not fit in memory.
        norms: Whether the statistics of batch norms are estimated again.

    Raises:
        OptionError: A value is invalid.
    """

    compensate: str | None
    ridge: float
    portions: int
    norms: bool

    def __post_init__(self) -> None:
        if self.compensate not in (None, *KINDS):
            raise OptionError(f"compensate is {self.compensate!r}; it is None or one of {', '.join(map(repr, KINDS))}")
        if not (isinstance(self.ridge, int | float) and 0 <= self.ridge < math.inf):
            raise OptionError(f"ridge is {self.ridge!r}; it is a share of the mean of a diagonal, at least 0")
        if not isinstance(self.portions, int) or self.portions < 1:
            raise OptionError(f"portions is {self.portions!r}; it is a whole number, at least 1")


@dataclass(eq=False)
class Compression:
    """The compression of a model.

    Attributes:
        calibrated: The model and its batches.
        choice: How atoms and segments are chosen.
        readers: The readers of all prunable groups.
        left: Which atoms of each group are left, by name.
    """

    calibrated: Calibrated
    partition: Partition
    choice: Choice
    readers: Readers
    settings: Settings
    left: dict[str, NDArray[np.bool_]] = field(default_factory=dict)

    # --- steps --------------------------------------------------------------------------------------------------------

    def run(self) -> list[Portion]:
        """Choose, fold and set to zero; if an exception is raised, the model is restored.

        Nothing is copied before the choice, which computes gradients. Afterwards only the entries are copied that are
        written to: the removed atoms, and whole tensors that are folded into. So at any time there is at most one
        additional tensor for each parameter, except for those that the current portion folds into.
        """
        stage("choosing")
        going = self._choose()
        self.left = {group.name: np.ones(group.size, dtype=bool) for group in self.choice.groups}
        losing = [group for group in self.choice.groups if len(going[group.name])]
        with undone() as undo:
            before, done = self.calibrated.held_loss(), list[Portion]()
            _require_number(before)
            if erased := [group for group in losing if group.segment]:
                stage("segments")
                done.append(self._erase(erased, going, before, undo))
                before = done[-1].after
            uncomputed = idle(self.partition, losing, _kept(self.left))
            packs = self._packs([g for g in losing if not g.segment and g.name not in uncomputed])
            for i, pack in enumerate(packs):
                stage(f"portion {i + 1} of {len(packs)}")
                done.append(self._portion(pack, going, before, undo))
                before = done[-1].after
        return done

    @property
    def how(self) -> str:
        """A description of the choice and the fit, for the result."""
        many = len(self.calibrated.data.calibration)
        fit = f"{self.settings.compensate} fit, ridge={self.settings.ridge:g}" if self.settings.compensate else "no fit"
        return (
            f"chosen by {self._by}, {fit}; {many} batches to calibrate with, {len(self.calibrated.data.held)} held out"
        )

    @property
    def _by(self) -> str:
        """The name of the criterion, ``"gradients"`` or ``"weights"``."""
        if self._measured is not None:
            return _name_of(self._measured)
        return "gradients" if self.choice.averaged else "weights"

    def _erase(
        self, segments: Sequence[NodeGroup], going: Mapping[str, NDArray[np.int64]], before: float | None, undo: Undo
    ) -> Portion:
        """Set segments to zero, and discard readers inside them, whose results are no longer used."""
        tried = self._fold_and_zero(segments, going, [], {}, _nothing, undo)
        names = tuple(group.name for group in segments)
        self.left |= {name: self._without(name, going[name]) for name in names}
        gone = not_computed(self.partition.erased(_kept(self.left)))
        seen = [r for r in self.readers.found if any(use.node.index not in gone for use in r.uses)]
        self.readers = replace(self.readers, found=tuple(seen))
        many = sum(group.segment for group in self.choice.groups)
        return Portion(names, len(names), many, before=before, segments=True, **tried)

    def _portion(
        self, pack: Sequence[NodeGroup], going: dict[str, NDArray[np.int64]], before: float | None, undo: Undo
    ) -> Portion:
        names = [group.name for group in pack]
        readers = self.readers.of(names) if self.settings.compensate else []
        by_fit = self._measured in (obs, sensitivity)
        measured = self.calibrated.moments(self.readers.of(names) if by_fit else readers)
        if by_fit:
            going |= {group.name: self._surgery(group, measured, len(going[group.name])) for group in pack}
        after = self.left | {name: self._without(name, going[name]) for name in names}
        old, new = self.partition.masks(_kept(self.left)), self.partition.masks(_kept(after))

        def entries(reader: Reader) -> SplitEntries:
            return SplitEntries.of(reader.survivors(old), reader.survivors(new))

        tried = self._fold_and_zero(pack, going, readers, measured, entries, undo)
        self.left = after
        atoms, size = sum(len(going[name]) for name in names), sum(group.size for group in pack)
        return Portion(tuple(names), atoms, size, before=before, **tried)

    def _fold_and_zero(
        self,
        pack: Sequence[NodeGroup],
        going: Mapping[str, NDArray[np.int64]],
        readers: Sequence[Reader],
        measured: Mapping[Key, Moments],
        entries: Callable[[Reader], SplitEntries],
        undo: Undo,
    ) -> dict[str, Any]:
        """Fold and set to zero, or only set to zero if that gives a lower loss; returns fields of a ``Portion``."""
        kind, tensors = str(self.settings.compensate), self.calibrated.tensors
        saved = undo.remember(tensors, sorted(self.calibrated.writes(readers)))
        for group in pack:
            undo.remember_atoms(group, tensors, torch.from_numpy(going[group.name]))
        unreached = fold_(readers, measured, entries, tensors, kind, self.settings.ridge) if readers else []
        many = len(readers) - len(unreached)
        self.calibrated.zero_(pack, going)
        norms, loss = self.calibrated.settle()
        zeroed, folded, kept = (None, loss, "folded") if many else (loss, None, "zeroed")
        if many and self.calibrated.data.held:
            with_fold = {name: tensors[name].detach().clone() for name in saved}
            self.calibrated.put_back(saved)
            self.calibrated.zero_(pack, going)
            norms_of_zeroed, zeroed = self.calibrated.settle()
            if worse(folded, zeroed):
                norms, kept = norms_of_zeroed, "zeroed"
            else:
                self.calibrated.put_back(with_fold)
        return {
            "readers": many,
            "zeroed": zeroed,
            "folded": folded,
            "kept": kept,
            "norms": norms,
            "unreached": tuple(unreached),
        }

    # --- the choice ---------------------------------------------------------------------------------------------------

    @property
    def _measured(self) -> Any:
        """The criterion of :data:`MEASURED` by which is chosen, or ``None``."""
        return _measured_by(self.choice)

    def _choose(self) -> dict[str, NDArray[np.int64]]:
        """The atoms of each group to remove; with ``"obs"`` and ``"sensitivity"``, only their number is used."""
        if self._measured is None:
            wanted = {id(self.calibrated.tensors[piece.parameter]) for g in self.choice.groups for piece in g.zeros}
            with preserved(self.calibrated.model):  # restores requires_grad
                for p in self.calibrated.model.parameters():
                    p.requires_grad_(p.requires_grad and id(p) in wanted)
                batches = self.calibrated.data.calibration if self.choice.averaged else ()
                left = left_now(self.choice, self.calibrated.model, batches, self.calibrated.data.loss)
        else:
            parameters = dict(self.calibrated.model.named_parameters(remove_duplicate=False))
            with torch.no_grad():
                weights = [Weights.of(group, parameters) for group in self.choice.groups]
                left = left_by(self.choice, weights, {self._measured: self._scores(weights)})
        parts = left.cpu().split_with_sizes(self.choice.sizes)
        return {g.name: np.flatnonzero(~own.numpy()) for g, own in zip(self.choice.groups, parts, strict=True)}

    def _scores(self, weights: Sequence[Weights]) -> Tensor:
        """The measured criterion of every atom, shape ``(N,)``; the magnitude for groups without readers."""
        found: dict[str, Tensor] = {}
        atoms = [group for group in self.choice.groups if not group.segment]
        for pack in packed(atoms, self.readers):
            measured = self.calibrated.moments(self.readers.of([group.name for group in pack]))
            for group in pack if self._measured is sensitivity else ():
                stage(f"what it costs to thin {group.name}")
                found[group.name] = self._loss_per_atom(group, measured)
            for group in pack if self._measured is not sensitivity else ():
                own = [self._score(reader, group, measured) for reader in self._reached(group, measured)]
                if own:
                    found[group.name] = torch.stack(own).sum(0).float()
        if atoms and not found:
            _require_readers(self.readers, atoms, self._by)
            raise OptionError(
                f"no batch reached a weight that reads what may go, and saliency={self._by!r} looks at what it reads\n"
                "  effect  nothing was changed\n"
                "  to fix  a loss that calls the model, and no autocast in it, which multiplies copies of the weights:"
                " cast the model instead"
            )
        rises: dict[str, float] = {}
        for group in self.choice.groups:
            if group.segment:
                stage(f"what it costs to leave out {group.name}")
                rises[group.name] = self._loss_of_segment(group)
        found |= {name: torch.tensor([score]) for name, score in in_order(rises).items()}
        return torch.cat(
            [found.get(g.name, magnitude(w).float().cpu()) for g, w in zip(self.choice.groups, weights, strict=True)]
        )

    def _score(self, reader: Reader, group: NodeGroup, measured: Mapping[Key, Moments]) -> Tensor:
        parameter, own = self.calibrated.tensors[reader.parameter], measured[key_of(reader)]
        return SCORES[self._measured](reader, own, parameter, self._blocks(reader, group), self.settings.ridge)

    def _loss_per_atom(self, group: NodeGroup, measured: Mapping[Key, Moments]) -> Tensor:
        """The rise of the loss with each atom, if this group alone loses its atoms in order and is folded.

        It is measured at a few levels, and interpolated such that it never decreases from atom to atom.
        """
        readers = [r for r in self.readers.of([group.name]) if self.settings.compensate]
        order = self._order(group, measured)
        before, done = self.calibrated.calibration_loss, 0
        middles, slopes = list[float](), list[float]()
        for level in LEVELS:
            go = min(int(level * group.size), group.size - group.min_kept)
            if go > done:
                rise = self._loss_without(group, np.sort(order[:go]), readers, measured) - before
                slopes.append(max([*slopes, rise / (go - done), TINY]))
                middles.append((done + go) / 2)
                before, done = before + rise, go
        if not slopes:
            return torch.full((group.size,), 1.0)  # the group cannot lose any atom
        middles, slopes = [0.0, *middles, float(group.size)], [0.5 * slopes[0], *slopes, 2 * slopes[-1]]
        scores = np.empty(group.size)
        scores[order] = np.interp(np.arange(group.size) + 0.5, middles, slopes)
        return torch.from_numpy(scores).float()

    def _loss_of_segment(self, segment: NodeGroup) -> float:
        """The rise of the loss without this segment alone."""
        return self._loss_without(segment, np.arange(1), [], {}) - self.calibrated.calibration_loss

    def _order(self, group: NodeGroup, measured: Mapping[Key, Moments]) -> NDArray[np.int64]:
        """All atoms of a group in the order of removal: by the surgeon, or by magnitude without readers."""
        surgeons = self._surgeons(group, measured)
        if not surgeons:
            return self._by_magnitude(group)
        return greedy(surgeons, np.ones(group.size, dtype=bool), group.size)

    def _loss_without(
        self, group: NodeGroup, atoms: NDArray[np.int64], readers: Sequence[Reader], measured: Mapping[Key, Moments]
    ) -> float:
        saved = self.calibrated.saved(readers)
        rows = Rows.of([group], [torch.from_numpy(atoms)], self.calibrated.tensors)
        before = rows.copies()
        masks = self.partition.masks({group.name: np.setdiff1d(np.arange(group.size), atoms)})
        try:
            kind = str(self.settings.compensate)
            fold_(
                readers,
                measured,
                lambda r: SplitEntries.of(r.survivors({}), r.survivors(masks)),
                self.calibrated.tensors,
                kind,
                self.settings.ridge,
            )
            rows.zero_()
            loss = self.calibrated.loss_over(self.calibrated.data.calibration)
        finally:
            rows.copy_(before)
            self.calibrated.put_back(saved)
        return loss if math.isfinite(loss) else 1e9

    def _surgery(self, group: NodeGroup, measured: Mapping[Key, Moments], go: int) -> NDArray[np.int64]:
        """The sorted indices of ``go`` atoms of a group, chosen one after the other."""
        surgeons = self._surgeons(group, measured)
        if not surgeons:
            return np.sort(self._by_magnitude(group)[:go])
        return np.sort(greedy(surgeons, self.left[group.name], go))

    def _surgeons(self, group: NodeGroup, measured: Mapping[Key, Moments]) -> list[Surgeon]:
        return [
            Surgeon.of(
                reader,
                measured[key_of(reader)],
                self.calibrated.tensors[reader.parameter],
                self._blocks(reader, group),
                self.settings.ridge,
            )
            for reader in self._reached(group, measured)
        ]

    def _by_magnitude(self, group: NodeGroup) -> NDArray[np.int64]:
        with torch.no_grad():
            return torch.argsort(magnitude(Weights.of(group, self.calibrated.tensors)).cpu(), stable=True).numpy()

    def _reached(self, group: NodeGroup, measured: Mapping[Key, Moments]) -> list[Reader]:
        return [reader for reader in self.readers.of([group.name]) if key_of(reader) in measured]

    def _blocks(self, reader: Reader, group: NodeGroup) -> Tensor:
        return torch.from_numpy(reader.entries(self.partition.axes[group.name]))

    def _without(self, name: str, atoms: NDArray[np.int64]) -> NDArray[np.bool_]:
        left = self.left[name].copy()
        left[atoms] = False
        return left

    # --- portions -----------------------------------------------------------------------------------------------------

    def _packs(self, groups: Sequence[NodeGroup]) -> list[list[NodeGroup]]:
        """Portions along the depth with nearly equal numbers of groups, divided further to fit moments in memory."""
        ordered = sorted(groups, key=self._depth)
        parts = np.array_split(np.arange(len(ordered)), min(self.settings.portions, max(len(ordered), 1)))
        return [pack for part in parts for pack in packed([ordered[i] for i in part], self.readers)]

    def _depth(self, group: NodeGroup) -> int:
        """Index of the first call that reads a group; if no weight does, of the first that uses a tensor of it."""
        found = [use.node.index for reader in self.readers.of([group.name]) for use in reader.uses]
        return min(found) if found else self._first_use.get((group.zeros or group.slices)[0].parameter, 0)

    @cached_property
    def _first_use(self) -> dict[str, int]:
        graph = self.partition.found.graph
        names = {leaf.value: leaf.name for leaf in graph.leaves}
        return {names[v]: n.index for n in reversed(graph.calls) for v in n.inputs() if v in names}


def one_shot(
    analysis: Analysis,
    batches: Iterable[Any],
    loss: LossOf | None,
    holdout: float,
    settings: Settings,
    options: Mapping[str, Any],
) -> OneShot:
    """Compress a model in place; see :meth:`oto.OTO.one_shot`."""
    if isinstance(asked := options.get("saliency"), str):
        if asked not in {*MEASURED, *CRITERIA, *AS_PUBLISHED}:
            names = ", ".join([*MEASURED, *AS_PUBLISHED, *CRITERIA])
            raise OptionError(f"no saliency of one_shot is called {asked!r}\n  to fix  one of {names}, or a function")
        comparable = COMPARABLE if asked == "sensitivity" else {}
        options = {**comparable, **options, "saliency": MEASURED.get(asked, asked)}
    data, choice = Data.of(batches, loss, holdout), choice_for(analysis, options, "one_shot")
    with stages("one_shot"):
        return compress(analysis, choice, data, settings)


def compress(analysis: Analysis, choice: Choice, data: Data, settings: Settings) -> OneShot:
    """Compress a model in place; it is restored if an exception is raised.

    Raises:
        OptionError: Parameters are sharded, or there are several processes; or the scores of atoms and segments would
            not be comparable.
        NonFiniteParameterError: The loss of the held-out batches, or a score, is NaN or infinite.
    """
    model, partition = analysis.model, analysis.partition
    require_one_process(model, "one_shot")
    _require_comparable(choice)
    found = fitted_readers(readers(partition, analysis.groups, analysis.prune_frozen))
    job = Compression(Calibrated(model, data, settings.norms), partition, choice, found, settings)
    portions = job.run()
    losses = [x for portion in portions for x in (portion.before, portion.after)]
    loss = None if not losses or losses[0] is None or losses[-1] is None else (losses[0], losses[-1])
    kept = {name: int(own.sum()) for name, own in job.left.items()}
    lost = {name for portion in portions for name in portion.groups}
    reasons = job.readers.reasons | {segment.name: (NO_FOLD,) for segment in partition.segments}
    not_folded = {name: why for name, why in reasons.items() if name in lost and settings.compensate}
    return OneShot(
        str(choice.target), job.how, tuple(portions), loss, cost(partition), cost(partition, kept), kept, not_folded
    )


def _measured_by(choice: Choice) -> Any:
    """The criterion of :data:`MEASURED` among those of a choice, or ``None``."""
    return next((c for c, _ in choice.criteria if c in MEASURED.values()), None)


def _name_of(measured: Any) -> str:
    return next(name for name, criterion in MEASURED.items() if criterion is measured)


def _require_readers(found: Readers, atoms: Sequence[NodeGroup], saliency: str) -> None:
    """Raise ``OptionError`` if no group is read by a weight that could compensate."""
    if not found.of([group.name for group in atoms]):
        reasons = ((g.name, own[0]) for g in atoms if (own := found.reasons.get(g.name)))
        name, why = next(reasons, (atoms[0].name, "what reads it is no weight"))
        raise OptionError(
            f"saliency={saliency!r} looks at what the weights that read a group make of it, and no group has such"
            f" weights: {name}, {why}\n"
            "  effect  nothing was changed\n"
            "  to fix  leave saliency out, which goes by gradients, or choose by 'sensitivity' or 'magnitude'"
        )


def _require_comparable(choice: Choice) -> None:
    """Raise ``OptionError`` if atoms would be scored by readers' outputs, and segments by the loss."""
    measured = _measured_by(choice)
    if measured in SCORES and len({group.segment for group in choice.groups}) > 1:
        raise OptionError(
            f"saliency={_name_of(measured)!r} scores atoms by the outputs of what reads them, and no segment has a"
            " share in these: the two cannot be compared\n"
            "  effect  nothing was changed\n"
            "  to fix  saliency='sensitivity', or none: both are in the unit of the loss; or OTO(...,"
            " compress_mode='prune'), or 'erase'"
        )


def _require_number(loss: float | None) -> None:
    """Raise ``NonFiniteParameterError`` if the held-out loss is NaN or infinite before anything is removed."""
    if loss is not None and not math.isfinite(loss):
        raise NonFiniteParameterError(
            f"the loss of the held-out batches is {loss}\n"
            "  effect  nobody could tell whether a fit helps; nothing was changed\n"
            "  to fix  look for NaN in the weights, the batches and the loss of each batch; or holdout=0"
        )


def _nothing(reader: Reader) -> SplitEntries:
    raise AssertionError("no weight reads a segment")


def _kept(left: Mapping[str, NDArray[np.bool_]]) -> dict[str, NDArray[np.int64]]:
    return {name: np.flatnonzero(own) for name, own in left.items()}


def in_order(rises: Mapping[str, float]) -> dict[str, float]:
    """Positive scores in the order of the rises of the loss; segments without which the loss falls come first.

    >>> low, lower, high = in_order({"a": -1.0, "b": -2.0, "c": 0.5}).values()
    >>> 0 < lower < low < high
    True
    """
    falling = sorted((name for name, rise in rises.items() if rise <= TINY), key=lambda name: rises[name])
    return dict(rises) | {name: TINY * (i + 1) / len(falling) for i, name in enumerate(falling)}
