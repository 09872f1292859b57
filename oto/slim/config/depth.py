"""Find the config fields that state numbers of layers, by trial: with one less, the class lacks the last layer.

A whole layer is gone if all of its parameters lie in removed segments (:mod:`oto.groups.segments`). With fewer layers
in the config, the class renumbers the remaining ones, and config lists with one entry per layer (``layer_types``) get
shorter too. Whether the class computes the same without some layers is tried as for a width
(:mod:`oto.slim.config.trial`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from oto.errors import EmitterError
from oto.groups import Kept, NodeGroup, Partition
from oto.groups.partition import Segment
from oto.slim.config.recipe import Depth, Recipe, configs

UNSTATED = "layout: no field of the config states that it is left out"


def depths(recipe: Recipe, model: nn.Module) -> list[Depth]:
    """The fields that state how many layers a list of modules has, each with the config lists that get shorter too."""
    base = recipe.shapes({}) or {}
    sizes: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and path:
            sizes.setdefault(len(module), []).append(path)
    found: list[Depth] = []
    for field, number in recipe.fields().items():
        if type(number) is not int or number < 2 or number not in sizes:
            continue
        lists = tuple(_lists(recipe, field, number))
        for own in dict.fromkeys((lists, ())):
            depth = Depth(field, "", number, own)
            shapes = recipe.shapes(_without(recipe, depth, range(number - 1)))
            if shapes is not None and (path := _shorter(base, shapes, sizes[number], number)) is not None:
                found.append(replace(depth, layers=path))
                break
    return found


def _shorter(base: Mapping[str, Any], shapes: Mapping[str, Any], paths: Sequence[str], number: int) -> str | None:
    """The list that lost its last layer, if all else is as before; otherwise ``None``."""
    gone = base.keys() - shapes.keys()
    if not gone or shapes.keys() - base.keys() or any(base[name] != shapes[name] for name in shapes):
        return None
    return next((path for path in paths if gone == set(_below(base, path, number - 1))), None)


def _below(names: Mapping[str, Any] | Sequence[str], path: str, layer: int) -> Iterator[str]:
    return (name for name in names if name.startswith(f"{path}.{layer}."))


def _lists(recipe: Recipe, field: str, number: int) -> Iterator[str]:
    """The lists with ``number`` entries in the config that holds a field."""
    for within, config in configs(recipe.config):
        inside = field.removeprefix(f"{within}." if within else "")
        if field.startswith(f"{within}." if within else "") and inside in vars(config):
            for name, value in vars(config).items():
                if isinstance(value, list) and len(value) == number and not name.startswith("_"):
                    yield f"{within}.{name}" if within else name


def _without(recipe: Recipe, depth: Depth, left: Sequence[int]) -> dict[str, Any]:
    """The config edits that state which layers are left."""
    edits: dict[str, Any] = {depth.field: len(left)}
    for path in depth.lists:
        *within, name = path.split(".")
        held: Any = recipe.config
        for part in within:
            held = vars(held)[part]
        edits[path] = [vars(held)[name][i] for i in left]
    return edits


def fewer(recipe: Recipe, layers: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The config edits that state which layers are left, for several lists."""
    edits: dict[str, Any] = {}
    for depth in recipe.depths:
        if depth.layers in layers:
            edits |= _without(recipe, depth, layers[depth.layers])
    return edits


def whole_layers(partition: Partition, depth: Depth, segments: Sequence[Segment]) -> dict[int, list[Segment]]:
    """The layers whose parameters all lie in the given segments, each with the outermost of these segments."""
    leaves = partition.found.graph.leaves
    names = [name for leaf in leaves if leaf.kind == "parameter" for name in leaf.names]
    found: dict[int, list[Segment]] = {}
    for layer in range(depth.number):
        inside = [s for s in segments if all(set(_below(leaf.names, depth.layers, layer)) for leaf in s.writers)]
        outer = [s for s in inside if not any(s.body < other.body for other in inside)]
        held = {name for segment in outer for leaf in segment.leaves for name in leaf.names}
        own = set(_below(names, depth.layers, layer))
        if (
            own
            and own <= held
            and held <= {name for leaf in leaves for name in _below(leaf.names, depth.layers, layer)}
        ):
            found[layer] = outer
    return found


def layers_left(recipe: Recipe, partition: Partition, kept: Kept) -> dict[str, list[int]]:
    """For each list of layers that gets shorter, the layers that are left.

    Raises:
        EmitterError: A removed segment is not part of a removed layer, or no field states that the layer is removed.
    """
    gone = partition.erased(kept)
    stated: set[str] = set()
    layers: dict[str, list[int]] = {}
    for depth in recipe.depths if gone else ():
        whole = whole_layers(partition, depth, gone)
        if len(whole) == depth.number:
            raise EmitterError(f"no config states that none of {depth.layers} is left")
        if whole:
            layers[depth.layers] = [i for i in range(depth.number) if i not in whole]
            stated |= {s.name for s in gone if any(s.body <= own.body for outer in whole.values() for own in outer)}
    if unstated := [segment.name for segment in gone if segment.name not in stated]:
        raise EmitterError(f"no config states that {unstated[0]} is left out")
    return layers


def in_layers(
    groups: Sequence[NodeGroup], partition: Partition, found: Sequence[Depth]
) -> tuple[tuple[NodeGroup, ...], tuple[Depth, ...]]:
    """Tie the segments of each layer, so that it is removed as a whole; all other groups stay whole.

    Args:
        groups: The node groups of segments.

    Returns:
        The groups, and the depths with the layers that may be removed.
    """
    by_name = {group.name: group for group in groups}
    made: dict[str, NodeGroup] = {}
    free: list[Depth] = []
    for depth in found:
        whole = whole_layers(partition, depth, partition.segments)
        free.append(replace(depth, free=tuple(whole)))
        for layer, segments in whole.items():
            for i, segment in enumerate(segments):
                group = by_name[segment.name]
                least = [number for name, number in group.among if "*" in name]
                among = tuple((name, number) for name, number in group.among if "*" not in name)
                if i == 0:  # the first group stands for the layer
                    among = (*among, (f"{depth.layers}.*", max([1, *least])))
                made[group.name] = replace(group, tie=f"{depth.layers}.{layer}", among=among)
    return tuple(made.get(g.name, replace(g, reason=g.reason or UNSTATED)) for g in groups), tuple(free)
