"""A smaller model without training: choose, let what stays take over, estimate batch norms anew, zero.

1. **Choose** all that goes, on the full model: by gradients, by the loss of the least-squares fit (``"obs"``), by how
   much the inputs of the readers vary (``"fluctuation"``), or by weights. Segments and atoms share one budget. Where a
   criterion looks at readers, of which a segment has none, a segment goes by how much the loss rises without it.
2. Zero the **segments** that go. Nothing takes over what they add, so they are first: all fits are then to what the
   network without them computes, also those of weights that read a tensor before a segment and another after it. What
   lies in them needs no fit.
3. Go through the node groups that lose atoms, portion by portion along the depth of the network. Each portion sees
   what the pruned and folded layers before it give: without that, errors pile up. With ``"obs"`` the atoms of a portion
   are chosen here, one after the other; how many each group loses is settled before.
4. In each portion: collect the second moments of what its readers read, **fold** (:mod:`oto.optim.compensate`), zero,
   and estimate batch norms anew. Whether that helped is measured on batches that were used for nothing else; a fold
   that did not, and norms that did not, are undone. A fit that nobody checks may destroy a model: what a token carries
   on average is not what the one that is read carries.

Nothing is a matter of a gradient step, so the result is the same for the same batches.
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
    """What the readers' outputs lose when an atom goes and the others take over; measured on batches."""
    raise AssertionError("it is measured")


def fluctuating(entries: Weights) -> Tensor:
    """How much of the readers' outputs an atom moves; measured on batches."""
    raise AssertionError("it is measured")


def sensitivity(entries: Weights) -> Tensor:
    """How much the loss rises with each atom that its group alone loses; measured on batches."""
    raise AssertionError("it is measured")


MEASURED = {"obs": obs, "fluctuation": fluctuating, "sensitivity": sensitivity}
"""Ways to choose that look at what readers read."""

Score = Callable[[Reader, Moments, Tensor, Tensor, float], Tensor]
"""What each atom is worth to one reader, float64, shape ``(atoms,)``: of the reader, the moments of what it reads, its
parameter, the entries of each atom, and the damping."""

SCORES: dict[Callable[[Weights], Tensor], Score] = {
    obs: lambda reader, moments, p, blocks, ridge: Surgeon.of(reader, moments, p, blocks, ridge).scores(),
    fluctuating: lambda reader, moments, p, blocks, _: fluctuation(reader, moments, p, blocks),
}
"""How the atoms of a group are scored; ``"sensitivity"`` goes by the loss instead."""

COMPARABLE: dict[str, Any] = {"normalize": "none", "by_cost": 1.0}
"""How a choice goes by ``"sensitivity"``, which is in the unit of the loss."""

LEVELS = (0.25, 0.5, 0.75)
"""Shares of its atoms that each group loses alone, to see what the loss makes of it."""

NO_FOLD = "what a segment adds is taken over by nothing"

TINY = 1e-9
"""The least that an atom costs; a fit may even help."""


@dataclass(frozen=True)
class Settings:
    """How to compress.

    Attributes:
        compensate: A kind of :mod:`oto.optim.compensate`, or ``None``.
        ridge: Damping of the fit, as a share of the mean of the diagonal.
        portions: In how many portions the network is gone through, at most.
        norms: Whether batch norms are estimated anew.
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
    """A model on the way.

    Attributes:
        calibrated: The model itself, and its batches.
        choice: What goes, and by what it is chosen.
        readers: Of all prunable groups.
        left: Which atoms of each axis are left, by the name of the group.
    """

    calibrated: Calibrated
    partition: Partition
    choice: Choice
    readers: Readers
    settings: Settings
    left: dict[str, NDArray[np.bool_]] = field(default_factory=dict)

    # --- steps --------------------------------------------------------------------------------------------------------

    def run(self) -> list[Portion]:
        """Choose, fold, zero; all is as it was if anything is raised.

        Nothing is copied before the choice, which has gradients, and thereafter only what is written to, as it is: of
        what loses atoms, these. So at no time is there more than one tensor beside each parameter, but for those that
        a portion folds.
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
        """What is told of the choice and the fit."""
        many = len(self.calibrated.data.calibration)
        fit = f"{self.settings.compensate} fit, ridge={self.settings.ridge:g}" if self.settings.compensate else "no fit"
        return (
            f"chosen by {self._by}, {fit}; {many} batches to calibrate with, {len(self.calibrated.data.held)} held out"
        )

    @property
    def _by(self) -> str:
        """What the choice goes by, in a word."""
        if self._measured is not None:
            return _name_of(self._measured)
        return "gradients" if self.choice.averaged else "weights"

    def _erase(
        self, segments: Sequence[NodeGroup], going: Mapping[str, NDArray[np.int64]], before: float | None, undo: Undo
    ) -> Portion:
        """Zero the segments that go, and forget the readers in them, whose results nobody sees."""
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
        """Fold and zero, or zero alone if that leaves a lower loss: what a :class:`Portion` says of it."""
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

    # --- what goes ----------------------------------------------------------------------------------------------------

    @property
    def _measured(self) -> Any:
        """The criterion that is measured at readers, if the choice goes by one."""
        return _measured_by(self.choice)

    def _choose(self) -> dict[str, NDArray[np.int64]]:
        """The atoms of each group that go; with ``"obs"`` their number counts."""
        if self._measured is None:
            wanted = {id(self.calibrated.tensors[piece.parameter]) for g in self.choice.groups for piece in g.zeros}
            with preserved(self.calibrated.model):  # which puts back what wants a gradient
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
        """The measured criterion of every atom; where no reader tells, the magnitude."""
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
        """What the loss rises by with each atom, when this group alone gives them up in their order and is folded.

        It is measured at a few levels. Between them it is interpolated, and it never rises more slowly later on.
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
            return torch.full((group.size,), 1.0)  # it can spare none
        middles, slopes = [0.0, *middles, float(group.size)], [0.5 * slopes[0], *slopes, 2 * slopes[-1]]
        scores = np.empty(group.size)
        scores[order] = np.interp(np.arange(group.size) + 0.5, middles, slopes)
        return torch.from_numpy(scores).float()

    def _loss_of_segment(self, segment: NodeGroup) -> float:
        """What the loss rises by without a segment alone."""
        return self._loss_without(segment, np.arange(1), [], {}) - self.calibrated.calibration_loss

    def _order(self, group: NodeGroup, measured: Mapping[Key, Moments]) -> NDArray[np.int64]:
        """All atoms of a group, the first to go first: the surgeon's order, else by magnitude."""
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
        """Which atoms of a group go, one after the other."""
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
        """Portions along the depth, each of about as many groups, whose moments fit in memory."""
        ordered = sorted(groups, key=self._depth)
        parts = np.array_split(np.arange(len(ordered)), min(self.settings.portions, max(len(ordered), 1)))
        return [pack for part in parts for pack in packed([ordered[i] for i in part], self.readers)]

    def _depth(self, group: NodeGroup) -> int:
        """The first call that reads it; else the first that uses what writes it."""
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
    """Compress a model in place; it is as it was if anything is raised.

    Raises:
        OptionError: Parameters are sharded, or there are several processes; or atoms and segments would be compared by
            different things.
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
    """The criterion that is measured at readers, if a choice goes by one."""
    return next((c for c, _ in choice.criteria if c in MEASURED.values()), None)


def _name_of(measured: Any) -> str:
    return next(name for name, criterion in MEASURED.items() if criterion is measured)


def _require_readers(found: Readers, atoms: Sequence[NodeGroup], saliency: str) -> None:
    """Refuse groups of which none is read by a weight that could take over."""
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
    """Refuse to compare atoms by what readers' outputs lose with segments by what the loss rises by."""
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
    """Refuse to judge by a loss that is NaN or infinite before anything goes; ``None`` if nothing is held out."""
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
    """Positive scores in the order of what the loss rises by; without some it falls, and these come first.

    >>> low, lower, high = in_order({"a": -1.0, "b": -2.0, "c": 0.5}).values()
    >>> 0 < lower < low < high
    True
    """
    falling = sorted((name for name, rise in rises.items() if rise <= TINY), key=lambda name: rises[name])
    return dict(rises) | {name: TINY * (i + 1) / len(falling) for i, name in enumerate(falling)}
