"""Fold into weights what a stock class of the right sizes computes differently from the zeroed model.

* A norm of the zeroed model divides by the full count, a norm of the stock class by the smaller one. With k of D
  entries kept and the rest zero, the RMS norm equals the stock one with ``weight * sqrt(D / k)`` and ``eps * D / k``.
  A norm that reads the same eps field but is not thinner gets its input scaled by ``sqrt(D / k)``.
* An embedding may be scaled by a function of its width. The factor is folded into the table; if the table is read
  again, its inverse is folded into the norm before that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from oto.axes.call import Size
from oto.errors import EmitterError
from oto.groups import Partition
from oto.nn import functional as full_count
from oto.slim.config.recipe import Recipe
from oto.slim.edits import attribute
from oto.slim.pruned_shapes import PrunedShapes
from oto.trace.graph import Leaf, Node, Value


@dataclass(frozen=True)
class Norm:
    """A norm that has become thinner.

    Attributes:
        path: The path of its module.
        weight: The leaf that it multiplies by.
        ratio: Its full count divided by its kept count.
    """

    path: str
    weight: Leaf
    ratio: float


def norms_that_count(model: nn.Module, partition: Partition, pruned: PrunedShapes) -> list[Norm]:
    graph, found = partition.found.graph, []
    for index, text in partition.found.tape.counted.items():
        rewrite, node = partition.found.tape.rewrites[index], graph.calls[index]
        full, left = _counts(rewrite.op, rewrite.args, rewrite.kwargs, pruned)
        if full == left:
            continue
        refusal = f"{text}, and no field of a config says of how many ({node})"
        if rewrite.op not in (full_count.mean, full_count.rms_norm):
            raise EmitterError(refusal)
        own = {id(p) for p in model.get_submodule(node.module).parameters(recurse=False)}
        weights = [leaf for leaf in graph.leaves if leaf.kind == "parameter" and id(attribute(model, leaf.name)) in own]
        if not node.module or len(weights) != 1 or pruned.shape(weights[0]) != (left,):
            raise EmitterError(refusal)
        found.append(Norm(node.module, weights[0], full / left))
    return found


def _counts(op: Any, args: Any, kwargs: Mapping[str, Any], pruned: PrunedShapes) -> tuple[int, int]:
    """The number of entries that a call averages in the full and in the thinner model; unequal numbers if unknown."""
    if op is full_count.group_norm:
        width = kwargs["width"]
        return kwargs["full"], pruned.size(width) if isinstance(width, Size) else width
    sizes = kwargs.get("sizes") or (args[1] if op in (full_count.layer_norm, full_count.rms_norm) else None)
    if sizes is None or "full" not in kwargs:
        return 0, 1
    return math.prod(kwargs["full"]), math.prod(pruned.filled(list(sizes)))


def eps_fields(recipe: Recipe, edits: Mapping[str, Any], norms: Sequence[Norm]) -> dict[str, float]:
    """The fields that state the eps of norms, with their new values."""
    if not norms:
        return {}
    ratios = {norm.ratio for norm in norms}
    if len(ratios) > 1:
        raise EmitterError("norms of several widths have become thinner, and one field of the config states their eps")
    (ratio,) = ratios
    plain = recipe.make(edits, recipe.device)
    own = {norm.path: _floats(plain.get_submodule(norm.path)) for norm in norms}
    small = {path: v for path, v in recipe.fields().items() if isinstance(v, float) and 0 < v < 0.01}
    found: dict[str, float] = {}
    for path, value in small.items():
        if any(value in held.values() for held in own.values()):
            made = recipe.make({**edits, path: value * ratio}, recipe.device)
            if any(_floats(made.get_submodule(norm.path)) != own[norm.path] for norm in norms):
                found[path] = value * ratio
    made = recipe.make({**edits, **found}, recipe.device)
    for norm in norms:
        now = _floats(made.get_submodule(norm.path))
        if not any(now[name] == value * ratio for name, value in own[norm.path].items()):
            raise EmitterError(f"no field of the config states what {norm.path} adds to the mean")
    return found


def _floats(module: nn.Module) -> dict[str, float]:
    return {name: value for name, value in vars(module).items() if isinstance(value, float)}


def fold(
    model: nn.Module, slim: nn.Module, partition: Partition, pruned: PrunedShapes, norms: Sequence[Norm]
) -> set[str]:
    """Fold into weights what the stock class computes differently from the zeroed model; returns their names."""
    if not norms:
        return set()
    touched = {name for norm in norms for name in norm.weight.names}
    factors = {norm.path: math.sqrt(norm.ratio) for norm in norms}
    forms = {norm.path: _scaled(model, slim, pruned, norm) for norm in norms}
    # norms that share the eps but are not thinner
    changed = {pair for norm in norms for pair in _changed(model, slim, norm.path)}
    for path, _ in slim.named_modules():
        for was, now in _changed(model, slim, path) & changed if path not in factors else ():
            for leaf in _producers(partition, path):
                _times(slim, leaf.names, math.sqrt(now / was))
                touched.update(leaf.names)
    # tables that are scaled by a function of their width
    by_value = {leaf.value: leaf for leaf in partition.found.graph.leaves}
    graph = partition.found.graph
    for node in graph.nodes:
        table = by_value.get(node.args[0]) if node.op is torch.ops.aten.embedding.default else None
        if table is None or not node.module or all(mask.all() for mask in pruned.entries(table)):
            continue
        ids = torch.arange(min(table.value.shape[0], 8), device=attribute(model, table.name).device)
        try:
            full, left = model.get_submodule(node.module)(ids), slim.get_submodule(node.module)(ids)
        except TypeError:  # the module's forward takes more than indices
            continue
        ratio = float(full.norm() / left.norm())
        if abs(ratio - 1) < 1e-6:
            continue
        _times(slim, table.names, ratio)
        touched.update(table.names)
        for reader in graph.nodes:
            if reader is not node and table.value in reader.inputs():
                before = _norm_before(partition, reader, table.value, forms.keys())
                _scale(slim.get_submodule(before), forms[before], 1 / ratio)
    return touched


def _changed(model: nn.Module, slim: nn.Module, path: str) -> set[tuple[float, float]]:
    """Numbers of a module that differ in the stock class, as pairs (full, slim)."""
    was, now = _floats(model.get_submodule(path)), _floats(slim.get_submodule(path))
    return {(was[name], now[name]) for name in was.keys() & now.keys() if was[name] != now[name]}


def _times(model: nn.Module, names: Iterable[str], factor: float) -> None:
    done: set[int] = set()
    for name in names:
        tensor = attribute(model, name)
        if id(tensor) not in done:
            tensor.data = tensor * factor  # in new memory: the old may be shared with the full model
            done.add(id(tensor))


def _scale(module: nn.Module, plus_one: bool, factor: float) -> None:
    (weight,) = module.parameters(recurse=False)
    weight.copy_((1 + weight) * factor - 1 if plus_one else weight * factor)


def _scaled(model: nn.Module, slim: nn.Module, pruned: PrunedShapes, norm: Norm) -> bool:
    """Scale the weight of a norm; returns whether the norm multiplies by ``1 + weight``."""
    full, left = model.get_submodule(norm.path), slim.get_submodule(norm.path)
    (mask,) = pruned.entries(norm.weight)
    like = attribute(model, norm.weight.name)
    keep = torch.from_numpy(np.flatnonzero(mask)).to(like.device)
    x = torch.randn(4, len(mask), generator=torch.Generator().manual_seed(0)).to(like)
    x = torch.zeros_like(x).index_copy_(1, keep, x.index_select(1, keep))
    wanted = full(x).index_select(1, keep)
    (weight,) = left.parameters(recurse=False)
    plain = weight.detach().clone()
    errors = []
    for plus_one in (False, True):
        _scale(left, plus_one, math.sqrt(norm.ratio))
        errors.append(float((left(x.index_select(1, keep)) - wanted).abs().max()))
        weight.copy_(plain)
    plus_one = errors[1] < errors[0]
    _scale(left, plus_one, math.sqrt(norm.ratio))
    return plus_one


def _producers(partition: Partition, path: str) -> list[Leaf]:
    """The parameters of the call that produced the input of a module.

    Raises:
        EmitterError: There is no such call.
    """
    graph = partition.found.graph
    leaves = {leaf.value: leaf for leaf in graph.leaves if leaf.kind == "parameter"}
    inside = [node for node in graph.nodes if node.module == path]
    inner = {value for node in inside for value in node.outputs}
    for value in (value for node in inside for value in node.inputs() if value not in inner and value not in leaves):
        for node in _back(partition, value):
            found = [leaves[v] for v in node.inputs() if v in leaves]
            if found:
                return found
    raise EmitterError(f"{path} shares its eps with thinner norms, and what it is given cannot be scaled")


def _norm_before(partition: Partition, reader: Node, table: Value, norms: Iterable[str]) -> str:
    """The norm whose result a call multiplies with a table.

    Raises:
        EmitterError: There is no such norm.
    """
    paths = set(norms)
    for value in reader.inputs():
        for node in _back(partition, value) if value is not table else ():
            if node.module in paths:
                return node.module
    raise EmitterError(f"{reader} reads a table that is scaled by its width, behind no norm that could make up for it")


def _back(partition: Partition, value: Value) -> Iterator[Node]:
    """The calls that led to a value, from the last back to the first that combines several tensors."""
    made = {v: node for node in partition.found.graph.nodes for v in node.outputs if v is not None}
    while value in made:
        node = made[value]
        yield node
        before = list(node.inputs())
        if len(before) != 1:
            return
        (value,) = before
