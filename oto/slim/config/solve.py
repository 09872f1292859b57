"""Find the config that makes a class with given sizes. The fields to edit are found by trial, not from a list.

A field may state a size that changed if its value is that size, or the ratio of two sizes, or if it is unset and the
class reads it. Trials decide which fields do: the class is built from the edited config on ``meta``, and every shape is
compared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from math import log2
from typing import Any

import torch
from torch import Tensor, nn

from oto.axes.terms import Sum, Term, count, resolve, size_of
from oto.errors import EmitterError, reraise_out_of_memory, some
from oto.slim.config.recipe import MADE_WITH, Fields, Recipe, Shapes, Unfilled
from oto.slim.edits import Edits, named_tensors, owner_of, renumbered, slim_copy
from oto.slim.pruned_shapes import PrunedShapes, parameter_like

MISFIT = float("inf")


def _parts(term: Term) -> Iterator[Term]:
    """Every run of adjacent factors of a resolved term, and of the terms in its sums."""
    for i in range(len(term)):
        for j in range(i + 1, len(term) + 1):
            yield term[i:j]
        factor = term[i]
        if isinstance(factor, Sum):
            for segment in factor.segments:
                yield from _parts(resolve(segment))


def solve(recipe: Recipe, pruned: PrunedShapes) -> dict[str, Any]:
    """The config edits that give every parameter and buffer its thinner shape.

    Raises:
        EmitterError: There are none; the message names the tensors that would differ.
    """
    base = recipe.shapes({}) or {}
    leaves = [leaf for leaf in pruned.found.graph.leaves if leaf.names]
    wanted = dict(base) | {name: pruned.shape(leaf) for leaf in leaves for name in leaf.names if name in base}
    became = _became(pruned)
    implied = recipe.implied(became)
    numbers = recipe.fields() | implied

    def off(edits: Fields) -> float:
        found = recipe.shapes({**implied, **edits})
        return MISFIT if found is None else _distance(found, wanted)

    tries = [(path, n) for path, value in numbers.items() for n in candidates(value, became) if n != value]

    def nearest(tries: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        edits: dict[str, Any] = {}
        for some_of in ([(path, n) for path, n in tries if path in recipe.stating], tries):
            while (left := off(edits)) > 0:  # the largest improvement first, then any that still improves
                rated = sorted((off(edits | {path: n}), i) for i, (path, n) in enumerate(some_of))
                for better, i in rated:
                    path, n = some_of[i]
                    if better < left and off(edits | {path: n}) < off(edits):
                        edits[path] = n
                if off(edits) == left:
                    break
        return edits

    edits = nearest(tries)
    for wrong in edits.items() if off(edits) > 0 else ():  # two fields with one value: the other may be the right one
        if off(other := nearest([one for one in tries if one != wrong])) < off(edits):
            edits = other
        if off(edits) == 0:
            break
    if off(edits) > 0:
        found = recipe.shapes({**implied, **edits}) or {}
        differ = [
            f"{name} is to be {list(shape)}, the class makes it {list(found.get(name, ()))}"
            for name, shape in wanted.items()
            if found.get(name) != shape
        ]
        raise EmitterError(f"no fields of the config give the class its sizes: {some(differ, 3)}")
    recipe.stating.update(edits)
    for path, value in implied.items():  # state these only where necessary
        if path not in edits:
            edits[path] = value
    for path in implied:
        without = {name: value for name, value in edits.items() if name != path}
        if recipe.shapes(without) == wanted:
            edits = without
    return edits


def candidates(value: int | float, became: Mapping[int, set[int]]) -> list[int | float]:
    """The values that a number may have after pruning, if it is a size or the ratio of two sizes."""
    if isinstance(value, int):
        return sorted(became.get(value, ()))
    found: dict[float, None] = {}
    for base in became:
        for new in sorted(became.get(round(value * base), ())) if value > 0 and (value * base).is_integer() else ():
            found[new / base if int(new / base * base) == new else (new + 0.25) / base] = None
    return list(found)


def _became(pruned: PrunedShapes) -> dict[int, set[int]]:
    """For every size in the network, the pruned sizes of the terms of that size, including unchanged ones."""
    terms = [term for leaf in pruned.found.graph.leaves for term in pruned.found.terms(leaf.value)]
    for rewrite in pruned.found.tape.rewrites.values():
        terms += rewrite.terms
    became: dict[int, set[int]] = {}
    for term in dict.fromkeys(resolve(term) for term in terms):
        for part in _parts(term):
            became.setdefault(size_of(part), set()).add(count(part, pruned.counts))
    became.pop(0, None)  # empty terms
    return became


def _distance(found: Shapes, wanted: Shapes) -> float:
    """How far shapes are off: the sum of ``|log2(found / wanted)|`` over dimensions; inf if names or ranks differ."""
    if found.keys() != wanted.keys():
        return MISFIT
    total = 0.0
    for name, shape in wanted.items():
        other = found[name]
        if other != shape:
            if len(other) != len(shape) or 0 in shape or 0 in other:
                return MISFIT
            total += sum(abs(log2(a / b)) for a, b in zip(other, shape, strict=True))
    return total


def stock(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    edits: Fields,
    recipe: Recipe | None = None,
    layers: Mapping[str, Sequence[int]] | None = None,
) -> nn.Module:
    """Build the class of ``model``, which may be on ``meta``, from its edited config and fill in tensors.

    Args:
        tensors: The tensors, by their names in ``model``.
        layers: If the config states fewer layers, the remaining layers of each list, by its path.

    Raises:
        EmitterError: The class cannot be made, or has other tensors.
    """
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    recipe = recipe or Recipe.of(model)
    if recipe is None:
        raise EmitterError(f"{type(model).__name__} has no config that its class can be made from")
    tensors, like = (_renamed(held, layers or {}) for held in (tensors, named_tensors(model)))
    made = {name: shape for name, shape in (recipe.shapes(edits) or {}).items() if name in tensors}
    wrong = [name for name, shape in made.items() if tuple(tensors[name].shape) != shape]
    if wrong or not made:  # checked before that much memory is allocated
        raise EmitterError(f"{type(model).__name__} made from {dict(edits)} does not hold what is there: {some(wrong)}")
    try:
        with nullcontext() if recipe.device == "cpu" else Unfilled():  # some constructors compute with their weights
            slim = recipe.make(edits, device)
    except Exception as failure:
        reraise_out_of_memory(failure)
        raise EmitterError(f"{type(model).__name__} cannot be made from {dict(edits)}: {failure}") from failure
    fill(slim, like, tensors)
    for name in ("generation_config", "pretrained_cfg", "default_cfg"):  # how the model is used; set from outside
        if hasattr(model, name):
            setattr(slim, name, copy.deepcopy(getattr(model, name)))
    if hasattr(model, MADE_WITH):
        setattr(slim, MADE_WITH, {**getattr(model, MADE_WITH), **recipe.as_given(edits)})
    return slim.eval()


def apply(model: nn.Module, tensors: Mapping[str, Tensor], edits: Edits) -> nn.Module:
    """Make the slim model from ``model`` by edits: its class, rebuilt from a config, or a copy.

    Raises:
        EmitterError: The class cannot be made, or the model cannot be copied.
    """
    if edits.config:
        return stock(model, tensors, edits.config, layers=edits.layers)
    return slim_copy(model, tensors, edits)


def _renamed(tensors: Mapping[str, Tensor], layers: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The tensors under the names that they have once lists of layers are shorter."""
    return {new: tensor for name, tensor in tensors.items() if (new := renumbered(name, layers)) is not None}


def fill(slim: nn.Module, like: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Replace the tensors of a module, keeping ties; buffers that are not saved stay as the constructor made them.

    Args:
        like: The tensors of the model that it was made from. Both mappings use the names of ``slim``.
    """
    saved = slim.state_dict().keys()
    made: dict[int, nn.Parameter] = {}
    for name, old in list(slim.named_parameters(remove_duplicate=False)):
        if name not in tensors or tensors[name].shape != old.shape:
            raise EmitterError(f"{name} is {list(old.shape)}, and nothing of that shape is there for it")
        if id(old) not in made:
            made[id(old)] = parameter_like(like[name], tensors[name])
        _put(slim, name, made[id(old)])
    for name, buffer in list(slim.named_buffers(remove_duplicate=False)):
        if name in saved and name in tensors:
            _put(slim, name, tensors[name])
        elif name in like:
            _put(slim, name, like[name].detach().clone() if _near(buffer, like[name]) else buffer.to(like[name].dtype))


def _near(made: Tensor, held: Tensor) -> bool:
    """Whether a buffer that a constructor made equals the model's own, up to rounding by casts."""
    if held.is_meta or made.shape != held.shape:
        return False
    wide = torch.complex128 if held.is_complex() else torch.float64
    return torch.allclose(made.to(held.device, wide), held.to(wide), rtol=1e-2, atol=1e-6)


def _put(model: nn.Module, path: str, tensor: Tensor) -> None:
    setattr(*owner_of(model, path), tensor)
