"""A part of a model as its own traced graph, thinner, where its class cannot be told its sizes. Both modes are kept."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from oto._torch import tree_leaves
from oto.axes.propagate import propagate
from oto.axes.registry import known
from oto.axes.terms import survivors
from oto.errors import EmitterError
from oto.groups import Kept, Partition
from oto.slim.graph import carry_over, entries_of, ranks_of, thinned
from oto.slim.graph_module import SlimGraph
from oto.slim.leaves import name_leaves
from oto.slim.plan import Thinning
from oto.trace.export import Exported, export
from oto.trace.takes import Takes

Masks: TypeAlias = Sequence[NDArray[np.bool_]]


@dataclass(frozen=True, eq=False)
class Part:
    """A submodule that was made slim by itself.

    Attributes:
        model: What takes its place: its parameters and buffers have the names that they had, and it has both modes.
        outputs: For each tensor that it gives and each dimension, which entries are left.
    """

    model: SlimGraph
    outputs: list[list[NDArray[np.bool_]]]


def entries_below(path: str, partition: Partition, kept: Kept) -> dict[str, list[NDArray[np.bool_]]]:
    """For each parameter of the submodule at ``path``, by its name there, which entries survive."""
    return {
        name.removeprefix(f"{path}."): masks
        for name, masks in entries_of(partition, kept).items()
        if name.startswith(f"{path}.")
    }


def emit_part(
    part: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    entries: Mapping[str, Masks],
    inputs: Sequence[Masks | None] = (),
    train: bool = True,
) -> Part:
    """Build the slim form of a submodule as a graph, with every size of its inputs free that does not get thinner.

    It is not verified: compare the model that it stands in. Entries that are gone from an input are taken to be zero.

    Args:
        part: The full submodule, of which everything that goes is zero. It is left as it was.
        args, kwargs: What it is called with in the full model.
        entries: For each parameter, by its name in ``part``, and each dimension, which entries survive.
        inputs: For each tensor among ``args`` and ``kwargs``, in the order of ``tree_leaves``, and each dimension,
            which entries survive; ``None`` for one that is as it was.
        train: Keep the forward of train mode too, with its dropout and the statistics that it moves.

    Raises:
        EmitterError: ``torch.export`` cannot follow it, or its graph ties what survives to what does not.
    """
    example = _by_name(part, args, kwargs)
    tensors = [leaf for leaf in tree_leaves((tuple(args), dict(kwargs))) if isinstance(leaf, Tensor)]
    by_tensor = {id(t): masks for t, masks in zip(tensors, inputs, strict=False) if masks is not None}
    given = [by_tensor.get(id(leaf)) for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    still = [() if masks is None else [d for d, mask in enumerate(masks) if not mask.all()] for masks in given]
    exported = export(part, example, known, still=still)
    thin = _thin(exported, entries, given)
    ranks = ranks_of(exported)
    slim = SlimGraph(thinned(exported, thin), exported.module.graph, _thinner(exported.takes, given))
    made = name_leaves(slim, exported.module, ranks)
    slim.recompile()
    if train:
        other = export(part, example, known, level=exported.level, train=True, still=still)
        thin_other = _thin(other, entries, given)
        ranks = ranks_of(other)
        module = thinned(other, thin_other)
        _share(slim, module, part)
        name_leaves(slim, other.module, ranks, module.graph, made)
        slim.keep_train(module.graph, _thinner(other.takes, given))
    slim.graph.lint()
    outputs = [[survivors(term, thin.masks) for term in thin.found.terms(value)] for value in exported.graph.outputs]
    return Part(slim, outputs)


def _by_name(part: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A call as an example input."""
    if not kwargs:
        return tuple(args)
    bound = inspect.signature(part.forward).bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL):
            raise EmitterError(
                f"{type(part).__name__} is called by position and by name at once, which no example input can say\n"
                "  effect  no graph can be emitted for it alone"
            )
        named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return named


def _thin(exported: Exported, entries: Mapping[str, Masks], given: Sequence[Masks | None]) -> Thinning:
    thin = Thinning(propagate(exported.graph, part=True), {})
    wanted = {leaf.value: (leaf.name, entries[leaf.name]) for leaf in exported.graph.leaves if leaf.name in entries}
    for i, (value, masks) in enumerate(zip(exported.graph.inputs, given, strict=True)):
        wanted[value] = f"input {i}", [np.ones(n, dtype=bool) for n in value.shape] if masks is None else masks
    carry_over(thin, wanted)
    return thin


def _thinner(takes: Takes | None, given: Sequence[Masks | None]) -> Takes | None:
    """What is taken once the inputs are thinner."""
    if takes is None or len(takes.sizes) != len(given):
        return None
    changed = {
        f"{place}.size()[{dim}]": int(mask.sum())
        for place, masks in zip(takes.sizes, given, strict=True)
        for dim, mask in enumerate(masks or ())
        if not mask.all()
    }
    kept = [text for text in takes.conditions if not any(place in text for place in changed)]
    return replace(
        takes, conditions=(*(f"{place} == {n}" for place, n in changed.items()), *kept), sizes={}, symbols={}
    )


def _share(slim: SlimGraph, other: fx.GraphModule, part: nn.Module) -> None:
    """Let what the graph of train mode reads be what the other one reads, or be added to it."""
    first: dict[int, str] = {}
    own: dict[str, str] = {}
    for name, tensor in _held(part):
        own[name] = first.setdefault(id(tensor), name)
    here = {own.get(name, name): tensor for name, tensor in _held(slim)}
    there = dict(_held(slim))
    for name, tensor in _held(other):
        if name in there:
            continue
        tensor = here.setdefault(own.get(name, name), tensor)
        parent, _, last = name.rpartition(".")
        holder: nn.Module = slim
        for step in parent.split(".") if parent else ():
            if not isinstance(getattr(holder, step, None), nn.Module):
                holder.add_module(step, nn.Module())
            holder = holder.get_submodule(step)
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(last, tensor)
        else:
            holder.register_buffer(last, tensor)


def _held(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
