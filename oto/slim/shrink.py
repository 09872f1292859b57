"""Make the model slim during training: in its own class, and proved equal in eval and train mode."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oto._torch import holder
from oto.axes.registry import known
from oto.errors import EmitterError, ShrinkError, VerificationError, first_line, reraise_out_of_memory, some
from oto.groups import NodeGroup, Partition, Slice, pruned_groups, trainable
from oto.groups.segments import Branches, idle, segment_groups, with_segments
from oto.slim.config.recipe import Recipe, configs, fields
from oto.slim.config.solve import apply, solve
from oto.slim.config.unstated import Unstated
from oto.slim.edits import Edits, attribute, pruned_tensors
from oto.slim.emitters import class_edits, without_needed, without_segments
from oto.slim.own_class import OwnClass, limited, own_class
from oto.slim.proof.compare import require
from oto.slim.proof.reference import CheckOptions, check
from oto.slim.proof.run import learn
from oto.slim.proof.train_mode import check_training
from oto.slim.provenance import REMEMBERED, Round, descend, origin_of
from oto.slim.pruned_shapes import PrunedShapes
from oto.slim.source import Source
from oto.trace.record import record

log = logging.getLogger(__name__)

Entries = Sequence[NDArray[np.int64] | None]
"""For each dimension of a tensor, the kept entries; ``None`` if all are kept."""


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A slim model to continue training with.

    Attributes:
        model: The slim model, of the original class and in the same mode as the full one.
        parameters: The kept entries of each remaining parameter, by its first remaining name. A tied parameter is
            removed only if all modules that hold it are removed with segments.
        averages: Pairs of an average of the full model's weights, and its slim form.
        needed: Names of segments that the class cannot leave out; it computes them, though they are zero.
    """

    model: nn.Module
    parameters: Mapping[str, Entries]
    averages: Sequence[tuple[nn.Module, nn.Module]]
    needed: Sequence[str] = ()


def become(model: nn.Module, slim: nn.Module) -> None:
    """Turn ``model`` into the slim one in place, so that existing references to it stay valid."""
    model.__class__ = type(slim)
    model.__dict__ = slim.__dict__  # shared, as parts of it may refer back to the slim model
    if "save_pretrained" in vars(model):
        vars(model)["save_pretrained"] = Unstated(model)


def shrunk(source: Source, averages: Iterable[Any] = ()) -> Shrunk:
    """Make the slim model in the model's own class from the full one's parameters, and prove it in both modes.

    Args:
        source: The full model, in which all atoms except those in ``kept`` are zero. With a recipe, the sizes are
            written to the model's config, from which the slim class can be made.
        averages: Averages of the weights, or their wrappers; their removed atoms need not be zero.

    Raises:
        ShrinkError: The class cannot express the slim model, or only with rescaled parameters; its config cannot state
            the sizes; or an average does not belong to this model.
        VerificationError: The slim model computes something else than the full one.
    """
    model, partition = source.model, source.partition
    try:
        source, needed = without_needed(source)
        kept, pruned = source.kept, source.pruned
        edits = class_edits(source, source.own.unfolded if source.own is not None else None)
        edits, gone = without_segments(source, edits)
        if source.recipe is not None:
            _state_in_config(edits, model, source.recipe, pruned)
        tensors = {name: tensor for name, tensor in pruned_tensors(model, pruned).items() if name not in gone}
        slim = apply(model, tensors, edits)
        learn(slim, edits, source.dummy_input)
        require(check(model, slim, source.dummy_input, CheckOptions(batch=True), left=source.left))
        if source.recipe is not None and Recipe.of(slim) is None:
            raise EmitterError("what its config makes is not of these sizes")
    except (VerificationError, ShrinkError):
        raise
    except Exception as failure:  # anything that the user's own forward may raise at other sizes
        reraise_out_of_memory(failure)
        said = str(failure) if isinstance(failure, EmitterError) else first_line(failure)
        raise ShrinkError(
            f"{type(model).__name__} cannot be thinned as its own class: {said.splitlines()[0]}\n"
            "  effect  training cannot go on with a slim model of this class; nothing was changed\n"
            f"  to fix  {source.remedy}"
        ) from failure
    parameters = _parameters(model, slim, pruned, gone)
    training = check_training(model, slim, source.dummy_input, partition, kept)
    require([] if training is None else [training])
    descend(slim, model, Round.of(edits, tensors, kept))
    made: list[tuple[nn.Module, nn.Module]] = []
    for wrapper in averages:
        inner = average_in(wrapper, model)
        held = {name: tensor for name, tensor in pruned_tensors(inner, pruned).items() if name not in gone}
        average = apply(inner, held, edits)
        vars(average)[REMEMBERED] = origin_of(slim)
        made.append((inner, average))
    return Shrunk(slim, parameters, made, needed)


@dataclass(frozen=True, eq=False)
class Again:
    """The analysis of a slim model.

    Attributes:
        partition, groups, branches: As in :class:`oto.analysis.Analysis`.
        own: What its class needs, if this was searched for.
    """

    partition: Partition
    groups: tuple[NodeGroup, ...]
    branches: Branches | None
    own: OwnClass | None


def analyzed_again(
    slim: nn.Module, source: Source, groups: Sequence[NodeGroup], allow_graph: bool, asked: bool
) -> Again:
    """Analyze a slim model; only node groups that could lose atoms before are prunable.

    Args:
        slim: The slim model.
        source: The source that it was made from.
        groups: Node groups of the full model.
        allow_graph: Whether groups may be pruned that the class cannot express.
        asked: Whether to search for what the class needs.
    """
    before, given = source.partition, source.dummy_input
    graph = record(slim, given, known, dead=not allow_graph, training=True)
    alone, branches = trainable(graph, before.found.strict_out_nodes), None
    found, made = alone, alone.groups
    if any(group.segment for group in groups):
        found, branches = with_segments(alone)
        made = (*made, *segment_groups(found))
    inside = {**source.kept, **{name: np.arange(0) for name in idle(before, groups, source.kept)}}
    left = same_groups(pruned_groups(before, groups, inside, names_of(slim)), made)
    if not asked:
        return Again(found, left, branches, None)
    atoms, segments = left[: len(alone.groups)], left[len(alone.groups) :]
    own = own_class(slim, alone, atoms, given)
    return Again(found, (*limited(atoms, own), *segments), branches, own)


def _parameters(model: nn.Module, slim: nn.Module, pruned: PrunedShapes, gone: Collection[str]) -> dict[str, Entries]:
    """The kept entries of each remaining parameter, by its first remaining name.

    Raises:
        ShrinkError: A parameter of the slim model holds other values than these entries.
    """
    leaves = {name: leaf for leaf in pruned.found.graph.leaves for name in leaf.names}
    left: dict[int, tuple[str, Tensor]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if name not in gone:
            left.setdefault(id(p), (name, p))
    found: dict[str, Entries] = {}
    for name, old in left.values():
        masks = pruned.entries(leaves[name])
        found[name] = [None if mask.all() else np.flatnonzero(mask) for mask in masks]
        if not torch.equal(attribute(slim, name).detach(), pruned.prune(leaves[name], old)):
            raise ShrinkError(
                f"the slim {type(model).__name__} holds {name} in another form, scaled for a norm over fewer entries\n"
                "  effect  the optimizer's state would not fit it; nothing was changed\n"
                "  to fix  keep it whole: OTO(..., skip_patterns=[...])"
            )
    return found


def names_of(model: nn.Module) -> frozenset[str]:
    """All names of the parameters of a model."""
    return frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))


def _state_in_config(edits: Edits, model: nn.Module, recipe: Recipe, pruned: PrunedShapes) -> None:
    """Add edits that set the sizes of the slim model in the config of every module that holds it.

    Raises:
        EmitterError: No fields of the config state the sizes.
        ShrinkError: The model holds no config; or a norm would still divide by the full count, which configs cannot
            state.
    """
    name = type(model).__name__
    whole = dict(fields(recipe.config))
    holders = [  # after a round, each module has its own config
        (path, within, dict(fields(own)))
        for path, m in model.named_modules()
        for within, config in configs(recipe.config)
        if type(own := vars(m).get("config")) is type(config)
    ]
    counting = [
        text for index, text in pruned.found.tape.counted.items() if pruned.changes(pruned.found.tape.rewrites[index])
    ]
    if not any(path == "" for path, *_ in holders) or counting:
        why = counting[0] if counting else f"{name} was made by a function, whose keywords nothing holds"
        raise ShrinkError(
            f"no config can state a {name} that got smaller in the middle of training: {why}\n"
            "  effect  its class alone could not load what is saved; nothing was changed\n"
            "  to fix  construct_subnet at the end, without shrink; or shrink an OTO(...) without layout='uniform'"
            + ("; or keep that width whole: skip_patterns=[...]" if counting else "")
        )
    for path, value in solve(recipe, pruned).items():
        for module, within, own in holders:
            inside = path.removeprefix(f"{within}." if within else "")
            if f"{path}.".startswith(f"{within}." if within else "") and own.get(inside) == whole.get(path):
                key = ["config", *(int(part) if part.isdecimal() else part for part in inside.split("."))]
                edits.stated.setdefault(module, []).append([key, value])


def average_in(wrapper: Any, model: nn.Module) -> nn.Module:
    """The average of a model's weights: ``wrapper`` itself, or the module that it wraps.

    Raises:
        ShrinkError: There is no module with parameters of the model's names and shapes.
    """
    shapes = {name: p.shape for name, p in model.named_parameters()}
    inner = holder(wrapper, shapes)
    if inner is None or {n: p.shape for n, p in inner.named_parameters()} != shapes:
        raise ShrinkError(
            f"{type(wrapper).__name__} holds no average of this {type(model).__name__}\n"
            "  effect  nothing was changed\n"
            "  to fix  pass a copy of the model, or what holds one as .module or .ema"
        )
    return inner


Labels = dict[tuple[str, int], NDArray[np.int64]]


def labels_of(group: NodeGroup) -> Labels:
    """For each dimension of each parameter, the atom that each entry belongs to; -1 for none."""
    labels: Labels = {}
    for piece in group.slices:
        first = piece.cuts[0]
        length = first.before * first.middle * first.after
        own = labels.setdefault((piece.parameter, piece.dim), np.full(length, -1))
        entries = Slice("", 0, piece.cuts).of(torch.arange(length)).reshape(group.size, -1).numpy()
        own[entries] = np.arange(group.size)[:, None]
    return labels


def parts(whole: Sequence[NodeGroup], fine: Sequence[NodeGroup]) -> dict[str, list[NodeGroup]]:
    """For each node group of one analysis, the groups of a finer analysis of the same model that it consists of.

    The analysis of a slim model may be finer: the widths of query and value are one group if a single weight holds both
    in equal parts, and two if they are stated separately. A group that does not consist of others is left out. A
    segment corresponds to the smallest one with the same writers that has all of its parameters, and possibly others
    that it shared with a removed segment.
    """
    segments = [part for part in fine if part.segment]
    same = {group.name: _same_segment(group, segments) for group in whole if group.segment}
    whole, fine = ([group for group in groups if not group.segment] for groups in (whole, fine))
    labels = {group.name: labels_of(group) for group in whole}
    holders: dict[tuple[str, int], list[NodeGroup]] = {}
    for group in whole:
        for place in labels[group.name]:
            holders.setdefault(place, []).append(group)
    found: dict[str, list[NodeGroup]] = {}
    covered: dict[str, Labels] = {}
    for part in fine:
        own = labels_of(part)
        for group in holders.get(next(iter(own)), []):
            theirs = labels[group.name]
            if group.size == part.size and all(
                place in theirs and ((mask < 0) | (mask == theirs[place])).all() for place, mask in own.items()
            ):
                found.setdefault(group.name, []).append(part)
                there = covered.setdefault(group.name, {place: np.full_like(m, -1) for place, m in theirs.items()})
                for place, mask in own.items():
                    np.maximum(there[place], mask, out=there[place])
                break
    return {
        name: made
        for name, made in found.items()
        if all(np.array_equal(covered[name][place], mask) for place, mask in labels[name].items())
    } | {name: [part] for name, part in same.items() if part is not None}


def _same_segment(group: NodeGroup, segments: Sequence[NodeGroup]) -> NodeGroup | None:
    written, own = ({piece.parameter for piece in pieces} for pieces in (group.zeros, group.slices))
    if not own:  # it was removed
        return None
    like = [(part, {piece.parameter for piece in part.slices}) for part in segments]
    like = [
        (part, theirs)
        for part, theirs in like
        if theirs >= own and {piece.parameter for piece in part.zeros} == written
    ]
    return min(like, key=lambda found: len(found[1]))[0] if like else None


def same_groups(before: Sequence[NodeGroup], after: Sequence[NodeGroup]) -> tuple[NodeGroup, ...]:
    """The node groups of a slim model, with the limits that they had in the full one.

    Groups that could not lose atoms before stay whole.

    Args:
        before: The groups of the full model, with their slices in the slim one.
        after: The groups that the analysis of the slim model found.
    """
    made = parts(before, after)
    was = {part.name: group for group in before for part in made.get(group.name, ())}
    nothing = "it could not be pruned before the model was shrunk"

    def restricted(group: NodeGroup) -> NodeGroup:
        old = was.get(group.name)
        if old is None:
            return replace(group, reason=group.reason or nothing)
        return replace(
            group,
            reason=group.reason or old.reason,
            min_kept=old.min_kept,
            quiet=group.quiet and old.quiet,
            tie=old.tie,
            divisor=old.divisor,
            among=old.among,  # the number of a run's members that stay refers to the full model
        )

    return tuple(map(restricted, after))


def require_there(before: Sequence[NodeGroup], after: Sequence[NodeGroup]) -> None:
    """Check that node groups that could lose more atoms still can in the slim model.

    Segments are not checked if so many of their joint or run are removed that the others must stay.

    Raises:
        ShrinkError: A group no longer can.
    """
    made = parts(before, after)
    members = Counter(name for group in before if group.size for name, _ in group.among)
    lost = [
        group.name
        for group in before
        if group.prunable
        and group.size > group.min_kept
        and not any(members[name] <= number for name, number in group.among)
        and not (group.name in made and all(part.prunable for part in made[group.name]))
    ]
    if lost:
        raise ShrinkError(
            f"some groups could not be pruned further in the slim model: {some(lost)}\n"
            "  effect  pruning could not continue with these, so nothing was changed\n"
            "  to fix  shrink once pruning is over"
        )
