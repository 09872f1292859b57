"""Make the model smaller while it trains: take pruned atoms out of it and of its optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oto._torch import data_parallel_around
from oto.analysis import Analysis, Form, ask_the_class
from oto.errors import NotPrunedWarning, ShrinkError, StaleWrapperError, rewording, some, users_level
from oto.groups import Kept, NodeGroup, Partition, pruned_groups
from oto.groups.cost import Extent
from oto.groups.layout import equalize_ties
from oto.groups.segments import idle
from oto.optim import SparseOptimizer
from oto.optim.shrink import Moved
from oto.resharding import Shard, averages_of, become_spread, in_every_process, spread_anew
from oto.shards import sharded_names, spread, whole
from oto.slim.config.recipe import Recipe
from oto.slim.shrink import Shrunk, analyzed_again, become, names_of, parts, require_there, shrunk
from oto.slim.source import Source
from oto.slim.state import left_since
from oto.trace.state import ModelState, undone
from oto.training import Training

Left = Mapping[str, NDArray[np.bool_]]
"""For each node group, which atoms of the model remain."""


def shrink(
    analysis: Analysis,
    training: Training,
    wrapper: Any,
    like: Mapping[str, Any] | None,
    averages: Iterable[Any],
    shard: Shard | None = None,
) -> tuple[Analysis, Training]:
    """Take pruned atoms out of a model, in place; see :meth:`oto.OTO.shrink`.

    Args:
        analysis: The analysis of the present model.
        training: The optimizer that was made last, and the analysis that it was made for.
        wrapper: The optimizer, or what wraps it; ``None`` is the one that was made last.
        like: The state dict of the optimizer of another run, whose sizes to take.
        shard: What spreads the smaller model over processes, if the model is.

    Returns:
        The analysis of the smaller model, and its training; unchanged if there is nothing to remove.
    """
    optimizer = training.inside(wrapper)
    if sharded := bool(sharded_names(analysis.model)):
        _require_function(analysis.model, shard)
        averages = averages_of(analysis.model, averages)
    full = analysis.partition if training.partition is None else training.partition
    there = {name: np.flatnonzero(mask) for name, mask in optimizer.kept.items()}
    _require_of(analysis, optimizer, full, there)
    left = _left(analysis, optimizer, full, like)
    if all(own.all() for own in left.values()):
        if like is None and not optimizer.num_removed:
            warnings.warn(
                f"{optimizer.progress}\n  effect  nothing was removed\n"
                "  to fix  shrink after a period of pruning has ended",
                NotPrunedWarning,
                stacklevel=users_level(),
            )
        return analysis, training
    if like is not None:
        optimizer.zero_(left)
    slim, after = (_slim_of_all if sharded else _slim)(analysis, _kept(analysis, optimizer, left), averages)
    left = _with_needed(analysis, optimizer, left, slim.needed)
    if all(own.all() for own in left.values()):
        return analysis, training
    left = _without_idle(full, optimizer, there, left)
    rest = {name: atoms[left[name]] for name, atoms in there.items()}
    pruned = pruned_groups(full, optimizer.node_groups, rest, names_of(slim.model))
    if not _is_over(optimizer, like):
        require_there(pruned, after.groups)
    _go_on(optimizer, analysis.model, slim, pruned, left, shard if sharded else None)
    model = analysis.model
    recipe = Recipe.of(model) if after.form.kind == "config" else None
    if recipe is not None and after.form.recipe is not None:
        recipe.depths = after.form.recipe.depths
    first = analysis.first or Extent.of(analysis.partition, analysis.groups)
    form = replace(after.form, recipe=recipe)
    with whole(model) if sharded else nullcontext():
        state = ModelState(model)
    after = replace(after, model=model, form=form, state=state, first=first)
    return after, replace(training, partition=full)


def _is_over(optimizer: SparseOptimizer, like: Mapping[str, Any] | None) -> bool:
    """Whether no group will lose atoms any more: here, or in the run that a state dict is of."""
    if like is None:
        return optimizer.progress.over
    first = like["param_groups"][0]
    return bool(first["oto_step"] >= optimizer.schedule_in(first).end)


def _go_on(
    optimizer: SparseOptimizer,
    model: nn.Module,
    slim: Shrunk,
    pruned: Sequence[NodeGroup],
    left: Left,
    shard: Shard | None,
) -> None:
    """Let the optimizer, and the model itself, go on with the slim model's parameters."""
    old = dict(model.named_parameters(remove_duplicate=False))
    there = {old[name] for name in slim.parameters}
    gone = [p for p in model.parameters() if p not in there]
    if shard is not None:
        optimizer.require_shrinkable()  # before anything is spread
        moved = spread_anew(model, slim.model, slim.parameters, shard)
        for before, now in slim.averages:
            spread_anew(before, now, slim.parameters, shard)
        optimizer.shrink_(moved, pruned, left, gone)
        for before, now in [(model, slim.model), *slim.averages]:
            become_spread(before, now)
        return
    former = {p: name for name, p in model.named_parameters()}
    moved = [Moved(n, old[n], slim.model.get_parameter(n), own, former[old[n]]) for n, own in slim.parameters.items()]
    wrappers = data_parallel_around(model)
    optimizer.shrink_(moved, pruned, left, gone)
    for wrapper in wrappers:
        wrapper.register_forward_pre_hook(_refuse_stale)
    for before, now in [(model, slim.model), *slim.averages]:
        become(before, now)


def _require_function(model: nn.Module, shard: Shard | None) -> None:
    """Refuse parameters that are spread over processes where nothing says how to spread what is left of them."""
    if shard is None:
        raise ShrinkError(
            f"{spread(model)}, and torch does not tell how to spread what is left\n"
            "  effect  nothing was changed\n"
            "  to fix  oto.shrink(optimizer, shard=f) on every process, where f(model) shards it as before:"
            " fully_shard for every block, then for the model itself"
        )


def _require_of(analysis: Analysis, optimizer: SparseOptimizer, full: Partition, there: Kept) -> None:
    """Refuse an optimizer over other parameters.

    Args:
        there: For each of its node groups, the atoms of the full network that the model has.
    """
    names: dict[Tensor, str] = {p: name for name, p in analysis.model.named_parameters()}
    known, own = set(names.values()), optimizer.parameters().items()
    foreign = [name for name, p in own if name in known and names.get(p) != name]
    own_names = names_of(analysis.model)
    expected = [group.slices for group in pruned_groups(full, optimizer.node_groups, there, own_names)]
    if foreign or expected != [group.slices for group in optimizer.node_groups]:
        raise ShrinkError(
            f"the {type(optimizer).__name__} is not over the parameters of this {type(analysis.model).__name__}\n"
            "  effect  nothing was changed\n"
            "  to fix  use the optimizer that this OTO made: optimizer = oto.hesso(...)"
        )


def _left(
    analysis: Analysis, optimizer: SparseOptimizer, full: Partition, like: Mapping[str, Any] | None
) -> dict[str, NDArray[np.bool_]]:
    """What remains when all pruned atoms are removed, or those that a state dict does not have."""
    left = optimizer.left_like(like)
    if like is not None:
        return left
    groups = optimizer.node_groups
    if analysis.form.kind == "config":
        layers = [g.name for g in groups if g.segment and not left[g.name].all()]
        left |= {name: np.ones_like(left[name]) for name in layers}
        if layers:
            _tell_of_zeros(analysis, layers, "the config of a model in training cannot state that they are gone")
    # groups of a tie keep the same number of atoms
    kept = {name: np.flatnonzero(own) for name, own in left.items()}
    even, _ = equalize_ties(groups, kept, idle=idle(full, groups, kept))
    return {name: np.isin(np.arange(len(own)), even[name]) for name, own in left.items()}


def _with_needed(
    analysis: Analysis, optimizer: SparseOptimizer, left: Left, needed: Collection[str]
) -> dict[str, NDArray[np.bool_]]:
    """What remains, with the segments that the class cannot leave out; these stay at zero."""
    if not needed:
        return dict(left)
    made = parts(optimizer.node_groups, analysis.groups)
    stays = [name for name, own in made.items() if any(part.name in needed for part in own)]
    _tell_of_zeros(analysis, stays, f"a {type(analysis.model).__name__} cannot do without")
    return {**left, **{name: np.ones_like(left[name]) for name in stays}}


def _without_idle(
    full: Partition, optimizer: SparseOptimizer, there: Mapping[str, NDArray[np.int64]], left: Left
) -> dict[str, NDArray[np.bool_]]:
    """What remains, without the groups that lie in a segment that is gone."""
    rest = {name: atoms[left[name]] for name, atoms in there.items()}
    inside = idle(full, optimizer.node_groups, rest)
    return {name: own & (name not in inside) for name, own in left.items()}


def _tell_of_zeros(analysis: Analysis, names: Sequence[str], why: str) -> None:
    """Warn of segments that are at zero, and are computed all the same."""
    warnings.warn(
        f"{some(names)} {'is' if len(names) == 1 else 'are'} at zero, and {'stays' if len(names) == 1 else 'stay'} in"
        f" the {type(analysis.model).__name__}: {why}\n"
        "  effect  the model computes it on; it stays at zero, and all else that was to go is gone\n"
        "  to fix  nothing: construct_subnet at the end takes out what can be, with emitter='graph' all of it",
        NotPrunedWarning,
        stacklevel=users_level(),
    )


def _kept(analysis: Analysis, optimizer: SparseOptimizer, left: Left) -> Kept:
    """The same by the groups of the model; a group of the optimizer may consist of several of them."""
    made = parts(optimizer.node_groups, analysis.groups)
    # of what lies in a segment that is gone nothing may be left, and nobody asks
    groups = [group for group in optimizer.node_groups if group.segment or left[group.name].any()]
    losing = [group.name for group in groups if not left[group.name].all()]
    return {part.name: np.flatnonzero(left[name]) for name in losing for part in made[name]}


def _slim(analysis: Analysis, kept: Kept, averages: Iterable[Any]) -> tuple[Shrunk, Analysis]:
    """The slim model, still as a separate module, and its analysis."""
    with _building(analysis):
        source = _source(analysis, kept)
        slim = shrunk(source, averages)
        return slim, _analyzed(analysis, slim, source)


def _slim_of_all(analysis: Analysis, kept: Kept, averages: Iterable[Any]) -> tuple[Shrunk, Analysis]:
    """The same where parameters are spread over processes: those of what is slim are on ``meta`` in all of them."""
    averages = list(averages)

    def make() -> Shrunk:
        here = analysis.of(analysis.model)
        with _building(here):
            return shrunk(_source(here, kept), averages)

    slim = in_every_process(analysis.model, averages, make)
    with whole(analysis.model), _building(analysis):
        return slim, _analyzed(analysis, slim, _source(analysis, kept, ask=False))


@contextmanager
def _building(analysis: Analysis) -> Iterator[None]:
    """While inside, the slim model is built; the model is put back."""
    later = left_since(analysis.state, analysis.model, analysis.example, analysis.names)
    built = rewording(analysis.model, ShrinkError, "its slim form was built and verified", "the analysis is done")
    with built, undone(later):
        yield


def _source(analysis: Analysis, kept: Kept, ask: bool = True) -> Source:
    own = ask_the_class(analysis) if ask and analysis.form.kind == "config" else analysis.form.own
    return Source(analysis.model, analysis.example, analysis.partition, own, kept, analysis.form.recipe)


def _analyzed(analysis: Analysis, slim: Shrunk, source: Source) -> Analysis:
    form, needed = analysis.form, {name: np.arange(1) for name in slim.needed}
    source = replace(source, kept={**source.kept, **needed})
    again = analyzed_again(slim.model, source, analysis.groups, analysis.allow_graph, form.kind == "class")
    return replace(
        analysis,
        partition=again.partition,
        groups=again.groups,
        branches=again.branches,
        form=Form(form.kind, form.recipe, again.own),
    )


def _refuse_stale(wrapper: nn.Module, _: Any) -> None:
    """A hook on a wrapper that holds the parameters from before ``shrink``; evaluation through it still works."""
    if torch.is_grad_enabled():
        raise StaleWrapperError(
            f"this {type(wrapper).__name__} was made before oto.shrink(), and reduces the gradients of parameters that "
            "are gone\n"
            "  effect  every process would train on its own batches alone, and the processes would drift apart\n"
            f"  to fix  wrap the model again after shrink: model = {type(wrapper).__name__}(oto.model, ...)"
        )
