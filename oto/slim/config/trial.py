"""Find what the fields of a config can state, by trial: half of a tie is removed and the class is rebuilt."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oto.errors import EmitterError, VerificationError, reraise_out_of_memory
from oto.groups import Kept, NodeGroup, Partition, Slice
from oto.groups.align import KERNEL_ROW, multiples
from oto.groups.cost import weights
from oto.groups.layout import as_wide_as_heads, atoms_per_step, settled
from oto.groups.policy import keep_whole
from oto.progress import stage
from oto.slim.config.depth import UNSTATED as NO_LAYER
from oto.slim.config.depth import depths, in_layers, layers_left
from oto.slim.config.emit import Restated, emit_stock, solved
from oto.slim.config.recipe import Depth, Keywords, Recipe
from oto.slim.edits import attribute
from oto.slim.proof.compare import require
from oto.slim.proof.reference import CheckOptions, check
from oto.slim.proof.zeroed import Zeroed
from oto.slim.pruned_shapes import pruned_shapes
from oto.trace.stand_ins import on_meta

log = logging.getLogger(__name__)

SMALL = 2**28
"""When ties are tried, a model of up to this many parameters is also compared in float64; above a sixteenth of that,
only if its own dtype, which takes a third of the time, does not already show it equal."""

COARSER = 6
"""The limit on step sizes that are tried for a tie."""

MANY = 16
"""With at least this many steps, a trial keeps between an eighth and a quarter of them, otherwise any number."""

UNSTATED = "layout: no field of the config states its size"


def stated(
    model: nn.Module,
    partition: Partition,
    groups: Sequence[NodeGroup],
    dummy_input: Any,
    recipe: Recipe | None,
    stock: bool = False,
) -> tuple[NodeGroup, ...] | None:
    """Keep groups whole whose size no config field can state, and tie groups whose sizes are stated by one field.

    For each tie, half of it is removed and the class is built from edited configs on ``meta``. At the end atoms of all
    ties are removed at once, and the class is compared with the zeroed model.

    Args:
        stock: Whether a stream that is as wide as its heads together has to stay so.

    Returns:
        ``None`` if the model has no config, or was made by a function whose keywords state no size.
    """
    if recipe is None:
        return None
    groups = _in_whole_rows(partition, groups)
    if stock:
        groups = as_wide_as_heads(groups, weights(partition))
    trial = _Trial(model, partition, recipe, dummy_input, groups)
    steps = {key: step for key in trial.members() if (step := trial.step(key)) is not None}
    for path, value in recipe.fields().items():
        stage(f"layout: what {path} states")
        open_ = [key for key, same in trial.members().items() if key not in steps and same[0].size == value]
        touched = [key for key in open_ if any(trial.touches(path, group) for group in trial.members()[key])]
        if len(touched) > 1:
            alone = trial.groups
            trial.tie(touched, path)
            if (step := trial.step(path)) is None:
                trial.groups = alone
            else:
                steps[path] = step
    stage("layout: the class of fewer")
    steps = trial.fitting(steps)
    if not steps and isinstance(recipe.config, Keywords):
        return None
    whole = [g.name for key, same in trial.members().items() if key not in steps for g in same]
    found = keep_whole(trial.groups, whole, UNSTATED)
    per = atoms_per_step(found).tolist()
    return settled(replace(g, divisor=steps[_key(g)] * n) if g.prunable else g for g, n in zip(found, per, strict=True))


def stated_layers(
    model: nn.Module, partition: Partition, groups: Sequence[NodeGroup], dummy_input: Any, recipe: Recipe
) -> tuple[NodeGroup, ...]:
    """Tie the segments of each layer if a config field states the number of layers; keep all other segments whole.

    For each field, about half of its layers are left out, and the class with fewer layers is compared with the model in
    which these are zero. The fields that pass are recorded in ``recipe.depths``.

    Args:
        groups: The node groups of segments.
    """
    groups, found = in_layers(groups, partition, depths(recipe, model))
    works: list[Depth] = []
    for depth in found if any(group.prunable for group in groups) else ():
        stage(f"layout: the class of fewer {depth.layers}")
        for own in dict.fromkeys((depth, replace(depth, lists=()))):
            recipe.depths = (own,)
            if own.free and _Trial(model, partition, recipe, dummy_input, groups).lacks_layers(own):
                works.append(own)
                break
    recipe.depths = tuple(works)
    stay = [d for d in found if d.layers not in {own.layers for own in works}]
    whole = [g.name for g in groups for d in stay if (g.tie or "").startswith(f"{d.layers}.")]
    return keep_whole(groups, whole, NO_LAYER)


def _in_whole_rows(partition: Partition, groups: Sequence[NodeGroup]) -> tuple[NodeGroup, ...]:
    """Restrict experts to sizes that ``torch._grouped_mm`` accepts in any dtype that the class may be loaded in."""
    experts = dict.fromkeys(weights(partition, "grouped_mm"), KERNEL_ROW)

    def whole(group: NodeGroup, by: int) -> NodeGroup:
        if not group.prunable or group.size % by == 0:
            return replace(group, divisor=by)
        return replace(group, reason=f"layout: its kernel reads rows of {by} entries, which do not divide {group.size}")

    own = multiples(groups, experts)
    return settled(whole(g, by) if by > g.divisor else g for g, by in zip(groups, own, strict=True))


def _key(group: NodeGroup) -> str:
    return group.tie or group.name


@dataclass(eq=False)
class _Trial:
    """Builds the class with fewer atoms and reports what goes wrong."""

    model: nn.Module
    partition: Partition
    recipe: Recipe
    dummy_input: Any
    groups: tuple[NodeGroup, ...]

    def members(self) -> dict[str, list[NodeGroup]]:
        """The prunable groups of each tie; an untied group is a tie of its own."""
        found: dict[str, list[NodeGroup]] = {}
        for group in self.groups:
            if group.prunable and group.size:
                found.setdefault(_key(group), []).append(group)
        return found

    def size(self, key: str) -> int:
        """The number of steps in a tie; if all groups have the same size, a step is one atom."""
        return math.gcd(*(group.size for group in self.members()[key]))

    def tie(self, keys: Sequence[str], name: str) -> None:
        self.groups = settled(replace(g, tie=name) if g.prunable and _key(g) in keys else g for g in self.groups)

    def touches(self, path: str, group: NodeGroup) -> bool:
        """Whether a field changes a dimension that holds atoms of a group."""
        full, half = self.recipe.shapes({}) or {}, self.recipe.shapes({path: max(group.size // 2, 1)}) or {}
        return any(
            half[piece.parameter][piece.dim] != full[piece.parameter][piece.dim]
            for piece in group.slices
            if len(half.get(piece.parameter, ())) == len(full.get(piece.parameter, ()))
        )

    def step(self, key: str) -> int | None:
        """The step that divides every kept count of a tie; ``None`` if only the full count can be stated."""
        same, size = self.members()[key], self.size(key)
        by = math.lcm(*(-(-group.divisor * size // group.size) for group in same))
        steps = [n for n in range(by, size // 2 + 1, by) if size % n == 0]
        halves = dict.fromkeys([size // 2 // by * by, *steps[-1:]])
        if not any(n and self.solves({key: n}) for n in halves):
            return None
        return next((n for n in steps if self.solves({key: size - n})), None)

    def solves(self, counts: Mapping[str, int]) -> bool:
        try:
            solved(self.model, self.partition, pruned_shapes(self.partition, self._first(counts)), self.recipe)
        except EmitterError as failure:
            log.debug("%s: %s", dict(counts), failure)
            return False
        return True

    def _first(self, counts: Mapping[str, int]) -> dict[str, NDArray[np.int64]]:
        return {
            g.name: np.arange(counts[key] * g.size // self.size(key))
            for key, same in self.members().items()
            if key in counts
            for g in same
        }

    def fitting(self, steps: Mapping[str, int]) -> dict[str, int]:
        """The ties that can shrink together while the class still computes the same, with the steps of their counts.

        If a kernel accepts only some sizes, steps get larger.
        """
        if not steps or self._failure(steps) is None:
            return dict(steps)
        good: dict[str, int] = {}
        for key, step in steps.items():
            size = self.size(key)
            for n in [n for n in range(step, size, step) if size % n == 0][:COARSER]:
                failure = self._failure(good | {key: n})
                if failure is None:
                    good[key] = n
                if failure is None or isinstance(failure, EmitterError | VerificationError):
                    break
        return good

    def _failure(self, steps: Mapping[str, int]) -> Exception | None:
        """The exception raised if ties keep some multiple of their steps; ``None`` if the class works."""
        return self._failure_with(self._drawn(steps), dict(steps))

    def _failure_with(self, kept: Kept, what: object) -> Exception | None:
        try:
            if on_meta(self.model):  # the model cannot be run
                layers_left(self.recipe, self.partition, kept)
                solved(self.model, self.partition, pruned_shapes(self.partition, kept), self.recipe)
            else:
                self._compare(kept)
        except Exception as failure:  # anything that the user's own forward may raise at other sizes
            reraise_out_of_memory(failure)
            log.info("the class cannot lose %s: %s", what, failure)
            return failure
        return None

    def lacks_layers(self, depth: Depth) -> bool:
        """Whether the class with fewer layers computes the same. About half of the removable layers are left out,
        including the first one, so that all others are renumbered."""
        others = np.random.default_rng(0).permutation(depth.free[1:])[: max(len(depth.free) // 2, 1) - 1].tolist()
        gone = {f"{depth.layers}.{layer}" for layer in (depth.free[0], *others)}
        none = np.zeros(0, dtype=np.int64)
        kept = {group.name: none for group in self.groups if group.tie in gone}
        return self._failure_with(kept, sorted(gone)) is None

    def _drawn(self, steps: Mapping[str, int]) -> dict[str, NDArray[np.int64]]:
        """Random atoms to keep, a multiple of the step for each tie; few if there are many, to keep the class small."""
        draw = np.random.default_rng(0)
        kept: dict[str, NDArray[np.int64]] = {}
        for key, step in steps.items():
            same, size = self.members()[key], self.size(key)
            n = size // step
            least, most = (n // 16, n // 8) if n >= MANY else (0, n // 2)
            count = step * (1 + 2 * int(draw.integers(least, most)))  # odd, so not a multiple of twice the step
            kept |= {g.name: np.sort(draw.permutation(g.size)[: count * g.size // size]) for g in same}
        return kept

    def _compare(self, kept: Kept) -> None:
        """Compare the class with the model in which everything that is not kept is zero.

        Raises:
            EmitterError: No config states the pruned shapes.
            VerificationError: The two differ.
        """
        gone: dict[str, list[tuple[Slice, NDArray[np.int64]]]] = {}
        for group in self.groups:
            for piece in group.zeros if group.name in kept else ():
                entries = np.setdiff1d(np.arange(group.size), kept[group.name])
                gone.setdefault(piece.parameter, []).append((piece, entries))
        full = Zeroed(self.model, gone, self._uneven)
        with full.reading():
            made = emit_stock(self.model, self.partition, kept, self.recipe, self._whole(full, kept))
        full.read.clear()  # only what the model itself reads counts
        try:
            self._check(full, made)
        except VerificationError:
            if not full.missed():
                raise
            self._check(full.written(), made)

    def _check(self, full: Zeroed, made: Restated) -> None:
        def rounded(other: nn.Module) -> Mapping[str, Tensor]:
            assert isinstance(other, Zeroed) and made.rounded is not None
            with other.reading():
                return made.rounded(other.model)

        entries = sum(p.numel() for p in self.model.parameters())
        how = None if made.rounded is None else rounded
        for exact in [True] if entries <= SMALL // 16 else [False, True] if entries <= SMALL else [False]:
            checks = check(full, made.model, self.dummy_input, CheckOptions(random=False, exact=exact, rounded=how))
            if all(one.passed for one in checks):
                return
        require(checks)

    def _whole(self, full: Zeroed, kept: Kept) -> dict[str, Tensor]:
        """Parameters that lose nothing; for the comparison, the class shares them with the model."""
        pruned, names = pruned_shapes(self.partition, kept), {*full.gone, *full.instead}
        leaves = [leaf for leaf in self.partition.found.graph.leaves if leaf.kind == "parameter"]
        same = [leaf for leaf in leaves if not names & set(leaf.names) and all(m.all() for m in pruned.entries(leaf))]
        return {name: attribute(self.model, leaf.name).detach() for leaf in same for name in leaf.names}

    @cached_property
    def _uneven(self) -> dict[str, Tensor]:
        """Random replacements for parameters whose entries are all equal, such as biases before training: these would
        hide a mistake."""
        generator, found = torch.Generator().manual_seed(0), {}
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if p.is_floating_point() and p.numel() and p.min() == p.max():
                    found[name] = p.detach().add(torch.rand(p.shape, generator=generator).to(p), alpha=0.1)
        return found
