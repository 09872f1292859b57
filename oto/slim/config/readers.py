"""Find the fields that programs must read from a slim model's config, though they could derive them before.

A config often leaves out what follows from other fields: the head width is the stream width divided by the number of
heads. After pruning that may no longer be true, so the slim config states it. A program that still divides fails or
makes different shapes; if it reshapes by the quotient, it silently computes something else.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from math import prod
from typing import Any

from oto.errors import reraise_out_of_memory
from oto.groups import Partition
from oto.groups.cost import weights
from oto.groups.layout import streams
from oto.slim.config.recipe import Fields, Recipe, Shapes, apart, fields, shapes_of

log = logging.getLogger(__name__)


def needed(recipe: Recipe, edits: Fields, partition: Partition) -> dict[str, Any]:
    """The fields that the full model's config could leave out but the slim model's cannot, with their values.

    These are fields that the full config does not state, and those that hold the width of a head.
    """
    config = recipe.edited(edits)
    read = getattr(type(config), "from_dict", None)
    if read is None:
        return {}
    found = list(streams(partition.groups, weights(partition)))
    wide = {stream.size // prod(group.size for group in heads) for stream, heads, _ in found}
    before = recipe.fields()
    stated = {path: value for path, value in fields(config) if isinstance(value, int)}
    tried = {path: value for path, value in stated.items() if path not in before or value in wide}

    def without(held: Any, path: str) -> Shapes | None:
        plain = _without(held.to_dict(), path)
        try:
            with apart(recipe.device):
                return shapes_of(recipe.kind(read(plain)))
        except Exception as failure:  # anything that a constructor or a validator may raise
            reraise_out_of_memory(failure)
            log.debug("without %s: %s", path, failure)
            return None

    full, slim = recipe.shapes({}), recipe.shapes(edits)
    return {
        path: value
        for path, value in tried.items()
        if without(recipe.config, path) == full and without(config, path) != slim
    }


def _without(plain: Mapping[str, Any], path: str) -> dict[str, Any]:
    name, _, rest = path.partition(".")
    left = {key: value for key, value in plain.items() if key != name or rest}
    if rest and isinstance(left.get(name), Mapping):
        left[name] = _without(left[name], rest)
    return left


def said(found: Mapping[str, Any]) -> str:
    """The note on fields that must be read from the config."""
    named = ", ".join(f"{path} = {value}" for path, value in found.items())
    return (
        f"readers have to take {named} from its config: a program that divides the width by the heads instead takes"
        ' other sizes, or fails; OTO(..., layout="stock") keeps to that division'
    )
