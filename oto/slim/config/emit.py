"""Build the slim model from its own class and an edited config (:mod:`oto.slim.config.solve`).

Example: ``LlamaConfig(intermediate_size=11008)`` becomes ``LlamaConfig(intermediate_size=6880)``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oto.errors import EmitterError
from oto.groups import Kept, Partition
from oto.slim.config.depth import fewer, layers_left
from oto.slim.config.norms import Norm, eps_fields, fold, norms_that_count
from oto.slim.config.recipe import Recipe
from oto.slim.config.solve import solve, stock
from oto.slim.edits import Edits, attribute, named_tensors, pruned_tensors, renumbered
from oto.slim.proof.reference import Exact
from oto.slim.pruned_shapes import PrunedShapes, pruned_shapes


def solved(
    model: nn.Module, partition: Partition, pruned: PrunedShapes, recipe: Recipe
) -> tuple[dict[str, Any], list[Norm]]:
    """The fields that state the pruned shapes, and the norms that would divide by a smaller count.

    Raises:
        EmitterError: No fields state them.
    """
    norms = norms_that_count(model, partition, pruned)
    edits = solve(recipe, pruned)
    return edits | eps_fields(recipe, edits, norms), norms


def build_from_config(
    model: nn.Module, partition: Partition, kept: Kept, recipe: Recipe | None, held: Mapping[str, Tensor] | None = None
) -> tuple[nn.Module, Edits, set[str]]:
    """Build the model's class from an edited config and fill in the pruned tensors.

    Args:
        held: Pruned tensors that exist already, by the names of the model.

    Returns:
        The model, the edits, and the names (in that model) of the tensors that a factor was folded into.

    Raises:
        EmitterError: No config states the pruned shapes or the removed segments.
    """
    if recipe is None:
        raise EmitterError(f"{type(model).__name__} has no config that its class can be made from")
    layers = layers_left(recipe, partition, kept)
    pruned = pruned_shapes(partition, kept)
    edits, norms = solved(model, partition, pruned, recipe)
    slim = stock(model, pruned_tensors(model, pruned, held=held), edits, recipe)
    with torch.no_grad():
        changed = fold(model, slim, partition, pruned, norms)
    return _shallower(model, slim, Edits(config=edits), changed, recipe, layers)


def _shallower(
    model: nn.Module, slim: nn.Module, edits: Edits, changed: set[str], recipe: Recipe, layers: Mapping[str, list[int]]
) -> tuple[nn.Module, Edits, set[str]]:
    """The same model with fewer layers, if some are gone; factors are folded before, while all layers are there."""
    if not layers:
        return slim, edits, changed
    config = {**edits.config, **fewer(recipe, layers)}
    made = stock(model, named_tensors(slim), config, recipe, layers)
    names = {new for name in changed if (new := renumbered(name, layers)) is not None}
    return made, Edits(config=config, layers={path: list(left) for path, left in layers.items()}), names


@dataclass(frozen=True, eq=False)
class Restated:
    """The slim model as the stock class.

    Attributes:
        edits: The edits that make it.
        tensors: The tensors that are saved in a file, by their names in the full model.
        changed: Names, in the slim model, of the tensors that a factor was folded into.
        rounded: Computes these, and buffers that are not saved, for the proof in float64; ``None`` if there are none.
    """

    model: nn.Module
    edits: Edits
    tensors: dict[str, Tensor]
    changed: Collection[str]
    rounded: Exact | None


def emit_stock(
    model: nn.Module, partition: Partition, kept: Kept, recipe: Recipe | None, held: Mapping[str, Tensor] | None = None
) -> Restated:
    """The slim model as the stock class, made from a config that states its sizes.

    Args:
        held: Pruned tensors that exist already, by the names of the model. They are not written to.

    Raises:
        EmitterError: No config states the pruned shapes.
    """
    slim, edits, changed = build_from_config(model, partition, kept, recipe, held)
    held = named_tensors(slim)

    saved = slim.state_dict().keys() if edits.config else held.keys()  # the constructor makes what is not saved
    made = {name for name, t in held.items() if name not in saved and t.is_floating_point()}

    def rounded(full: nn.Module) -> Mapping[str, Tensor]:  # weights with factors, and what a constructor computes
        same = {name: t for name, t in held.items() if name not in changed}
        narrow = {_full_name(name, edits.layers): t for name, t in same.items()} if full is model else None
        exact = build_from_config(full, partition, kept, recipe, narrow)[0]
        return {name: attribute(exact, name) for name in changed | made}

    tensors = {_full_name(name, edits.layers): t for name, t in held.items() if name in saved}
    return Restated(slim, edits, tensors, changed, rounded if changed | made else None)


def _full_name(name: str, layers: Mapping[str, Sequence[int]]) -> str:
    """The name of a tensor in the full model: the inverse of :func:`oto.slim.edits.renumbered`."""
    for path, left in layers.items():
        number, dot, rest = name.removeprefix(f"{path}.").partition(".")
        if name.startswith(f"{path}.") and number.isdecimal():
            return f"{path}.{left[int(number)]}{dot}{rest}"
    return name
