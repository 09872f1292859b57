"""A slim model in the middle of training: of the model's own class, and the same in train mode too."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oto._torch import TorchDispatchMode, holder, tree_leaves, tree_map_only
from oto.errors import EmitterError, ShrinkError, VerificationError, first_line, out_of_memory, some
from oto.groups import Kept, NodeGroup, Partition, Slice
from oto.slim.module import attribute, plan_edits, thin_copy, thin_tensors
from oto.slim.origin import descend, origin_of
from oto.slim.plan import thinning
from oto.slim.verify import TOLERANCE, Check, check, random_like, relative_error, require
from oto.trace.found import as_found
from oto.trace.record import arguments, tensors_in

log = logging.getLogger(__name__)

Entries = Sequence[NDArray[np.int64] | None]
"""For each dimension of a tensor the entries that are left; ``None`` where all are."""


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A slim model to go on training with.

    Attributes:
        model: Of the original class, in the mode that the full one is in.
        parameters: For each parameter of the full model, what is left of it.
        averages: Averages of the full model's weights, and their slim forms.
    """

    model: nn.Module
    parameters: Mapping[str, Entries]
    averages: Sequence[tuple[nn.Module, nn.Module]]


def become(model: nn.Module, slim: nn.Module) -> None:
    """Make ``model`` the slim one, in the same object, so that whatever holds it goes on."""
    model.__class__ = type(slim)
    model.__dict__ = slim.__dict__  # shared, as parts of it may refer back to the slim one


def shrunk(
    model: nn.Module,
    partition: Partition,
    kept: Kept,
    dummy_input: Any,
    left: Any = None,
    averages: Iterable[Any] = (),
) -> Shrunk:
    """Make the slim model of ``model``, in which all atoms but those in ``kept`` are zero, and prove it in both modes.

    Args:
        left: As for :func:`oto.slim.verify.check`.
        averages: Averages of the weights, or what holds them; their atoms need not be zero.

    Raises:
        ShrinkError: The class cannot express it, or not with the parameters that the optimizer knows; or an average is
            none of this model.
        VerificationError: It computes something else.
    """
    thin = thinning(partition, kept)
    try:
        edits = plan_edits(model, partition, thin)
        slim = thin_copy(model, thin_tensors(model, thin), edits)
        require(check(model, slim, dummy_input, batch=True, left=left))
    except VerificationError:
        raise
    except Exception as failure:  # anything that the user's own forward may raise at other sizes
        if out_of_memory(failure):
            raise
        said = str(failure) if isinstance(failure, EmitterError) else first_line(failure)
        raise ShrinkError(
            f"{type(model).__name__} cannot be thinned as its own class: {said.splitlines()[0]}\n"
            "  effect  training cannot go on with a slim model of this class; nothing was changed\n"
            "  to fix  prune what the class can do without: OTO(..., keep_class=True)"
        ) from failure
    leaves = {name: leaf for leaf in partition.found.graph.leaves for name in leaf.names}
    parameters: dict[str, Entries] = {}
    for name, old in model.named_parameters():
        masks = thin.entries(leaves[name])
        parameters[name] = [None if mask.all() else np.flatnonzero(mask) for mask in masks]
        if not torch.equal(attribute(slim, name).detach(), thin.thin(leaves[name], old)):
            raise ShrinkError(
                f"the slim {type(model).__name__} holds {name} in another form, scaled for a norm over fewer entries\n"
                "  effect  the optimizer's state would not fit it; nothing was changed\n"
                "  to fix  keep it whole: OTO(..., skip_patterns=[...])"
            )
    training = check_training(model, slim, dummy_input, partition, kept)
    require([] if training is None else [training])
    descend(slim, model, edits, {name: atoms.tolist() for name, atoms in kept.items()})
    made: list[tuple[nn.Module, nn.Module]] = []
    for wrapper in averages:
        inner = _average_in(wrapper, model)
        average = thin_copy(inner, thin_tensors(inner, thin), edits)
        vars(average)["_oto_origin"] = origin_of(slim)
        made.append((inner, average))
    return Shrunk(slim, parameters, made)


def _average_in(wrapper: Any, model: nn.Module) -> nn.Module:
    """The average of a model's weights that a wrapper holds, or that it is."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    inner = holder(wrapper, shapes)
    if inner is None or {n: p.shape for n, p in inner.named_parameters()} != shapes:
        raise ShrinkError(
            f"{type(wrapper).__name__} holds no average of this {type(model).__name__}\n"
            "  effect  nothing was changed\n"
            "  to fix  pass a copy of the model, or what holds one as .module or .ema"
        )
    return inner


def check_training(
    full: nn.Module, slim: nn.Module, dummy_input: Any, partition: Partition, kept: Kept
) -> Check | None:
    """Compare the two in train mode, randomness held still: tensors that are given, and buffers after the step.

    Both are left as they were. ``None`` if the full model does not train on such an input, as one that takes targets.

    Raises:
        ShrinkError: The slim model fails where the full one runs.
    """
    first = next(t for t in tree_leaves(dummy_input) if isinstance(t, Tensor))
    tries = [dummy_input]
    if first.ndim:  # batch norm wants more than one value per channel
        tries.append(random_like(dummy_input, 0, max(2, first.shape[0])))
    for given in tries:
        try:
            expected, moved = trained(full, given)
        except Exception as failure:  # whatever a forward may want for training
            if out_of_memory(failure):
                raise
            log.info("%s does not run in train mode on the example: %s", type(full).__name__, first_line(failure))
            continue
        try:
            found, slim_moved = trained(slim, given)
        except Exception as failure:
            if out_of_memory(failure):
                raise
            raise ShrinkError(
                f"the slim {type(full).__name__} fails in train mode, where the full one runs: {first_line(failure)}\n"
                "  effect  nothing was changed\n"
                "  to fix  if that is in a part that only training uses, keep what it reads: skip_patterns=[...]"
            ) from failure
        entries = {name: leaf for leaf in partition.found.graph.leaves for name in leaf.names}
        thin = thinning(partition, kept)
        pairs = [(thin.thin(entries[name], old), slim_moved[name]) for name, old in moved.items() if name in slim_moved]
        both = list(zip(*pairs, strict=True)) or [(), ()]
        error = max(relative_error(expected, found), relative_error(both[0], both[1]))
        dtype = next((p.dtype for p in full.parameters() if p.is_floating_point()), torch.float32)
        name = str(dtype).removeprefix("torch.")
        return Check("slim in train mode", name, error, TOLERANCE.get(dtype, 1e-3))
    return None


def heads_in_training(
    full: nn.Module, slim: nn.Module, dummy_input: Any, partition: Partition, kept: Kept
) -> tuple[list[Check], list[str]]:
    """Where parts of a model are used in training only: the proof that the slim one trains, or what falls short."""
    graph = partition.found.graph
    if graph.untrained is not None:
        text = "parts that only training may use could not be followed, so the slim model may fail in train mode"
        return [], [f"{text} ({graph.untrained}); drop_unreached=True leaves them out"]
    if graph.trained is None:
        return [], []
    try:
        made = check_training(full, slim, dummy_input, partition, kept)
    except ShrinkError as failure:
        return [], [str(failure).splitlines()[0]]
    if made is not None and not made.passed:
        return [], [f"in train mode the slim model differs from the full one by {made.error:.1e}"]
    return [] if made is None else [made], []


def trained(module: nn.Module, given: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What a module gives in train mode, and its buffers after that."""
    args, kwargs = tree_map_only(Tensor, lambda t: t.detach().clone(), arguments(given))
    modes = [(m, m.training) for m in module.modules()]
    all_eval = not any(training for _, training in modes)
    with as_found(module, given), torch.inference_mode(), _Still():  # type: ignore[no-untyped-call]
        torch.manual_seed(0)
        for m, training in modes:
            m.training = training or all_eval
        outputs = [t.clone() for t in tensors_in(module(*args, **kwargs))]
        buffers = {name: t.detach().clone() for name, t in module.named_buffers()}
    return outputs, buffers


class _Still(TorchDispatchMode):
    """Nothing is dropped and every number that is drawn is one, as tensors of another size draw other numbers."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        schema = getattr(op, "_schema", None)
        if schema is None or torch.Tag.nondeterministic_seeded not in getattr(op, "tags", ()):
            return op(*args, **kwargs)
        names = [argument.name for argument in schema.arguments]
        if "train" in names and names[1:2] == ["p"]:  # dropout, also of features and for self-normalising networks
            return args[0] if schema.is_mutable else args[0].clone()
        for name in ("dropout_p", "dropout"):  # in attention and in recurrent layers
            if name in names:
                place = names.index(name)
                if place < len(args):
                    args = (*args[:place], 0.0, *args[place + 1 :])
                return op(*args, **kwargs | ({name: 0.0} if name in kwargs else {}))
        result = op(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                leaf.fill_(1)
        return result


Labels = dict[tuple[str, int], NDArray[np.int64]]


def labels_of(group: NodeGroup) -> Labels:
    """For each dimension of each parameter, the atom that each of its entries belongs to; -1 for none."""
    labels: Labels = {}
    for piece in group.slices:
        first = piece.cuts[0]
        length = first.before * first.middle * first.after
        own = labels.setdefault((piece.parameter, piece.dim), np.full(length, -1))
        entries = Slice("", 0, piece.cuts).of(torch.arange(length)).reshape(group.size, -1).numpy()
        own[entries] = np.arange(group.size)[:, None]
    return labels


def parts(whole: Sequence[NodeGroup], fine: Sequence[NodeGroup]) -> dict[str, list[NodeGroup]]:
    """For each node group of one analysis, those of another analysis of the same model that it is made of.

    A slim model may be analysed more finely, as the widths of query and value are one where a single weight holds both
    in equal parts, and two where they are stated apart. A group that is not made of others is left out.
    """
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
    }


def same_groups(before: Sequence[NodeGroup], after: Sequence[NodeGroup], going_on: bool) -> tuple[NodeGroup, ...]:
    """The node groups of a slim model, of which only those may lose atoms that could before.

    Args:
        before: Those of the full model, as they lie in the slim one.
        after: Those that its own analysis found.
        going_on: Whether more is to be pruned, so that each has to be there.

    Raises:
        ShrinkError: One is not there.
    """
    made = parts(before, after)
    was = {part.name: group for group in before for part in made.get(group.name, ())}
    lost = [
        group.name
        for group in before
        if group.prunable
        and group.size > group.min_kept
        and not (group.name in made and all(part.prunable for part in made[group.name]))
    ]
    if lost and going_on:
        raise ShrinkError(
            f"the slim model is analysed in another way than the full one: {some(lost)}\n"
            "  effect  pruning could not go on with these, so nothing was changed\n"
            "  to fix  shrink once pruning is over, and report the model"
        )
    nothing = "it could not be pruned before the model was shrunk"

    def restricted(group: NodeGroup) -> NodeGroup:
        old = was.get(group.name)
        if old is None:
            return replace(group, reason=group.reason or nothing)
        return replace(group, reason=group.reason or old.reason, min_kept=old.min_kept, quiet=group.quiet and old.quiet)

    return tuple(map(restricted, after))
