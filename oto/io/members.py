"""The members of a family in one artifact, and how a member's tensors are selected from the full ones.

``model.safetensors`` holds the full weights, once. ``members.safetensors`` holds two things: for every dimension that
gets thinner, how many members besides the full network keep each entry (one number suffices because members are
nested); and for each member its own tensors, which are batch-norm statistics and weights with a count folded into them.

Example: levels ``[2, 0, 1]`` for the rows of a weight mean that the full network has all three rows, member 1 has rows
0 and 2, and member 2 has row 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from oto.errors import ArtifactError, some

MEMBERS = "members.safetensors"

Places = Mapping[str, Sequence[int | None]]
"""For each tensor that gets thinner and each dimension, the index of its level vector; ``None`` if it stays whole."""


def index_of(manifest: Mapping[str, Any], asked: Any, folder: object) -> int:
    """The index of a member in an artifact; 0 is the largest, and the only index in an artifact without a family.

    Args:
        asked: The member's index, an int, or its target as it was given.

    Raises:
        ArtifactError: There is no such member.
    """
    targets = [member["target"] for member in manifest.get("members", ())]
    if type(asked) is int and 0 <= asked < max(len(targets), 1):
        return asked
    for index, target in enumerate(targets):  # a target in MACs may be an int, too
        if target == asked and isinstance(target, int) == isinstance(asked, int):
            return index
    has = f"it has {some([repr(target) for target in targets])}" if targets else "it is of one slim model, of no family"
    raise ArtifactError(
        f"{folder} has no member {asked!r}: {has}\n"
        "  effect  nothing is loaded\n"
        "  to fix  "
        + (
            f"one of these targets, or an index from 0, the largest, to {len(targets) - 1}"
            if targets
            else "load it without member="
        )
    )


def tensors_of_member(
    full: Mapping[str, Tensor], held: Mapping[str, Tensor], places: Places, index: int
) -> dict[str, Tensor]:
    """The tensors of a member, by name, in memory of their own.

    Args:
        full: The tensors of the full network.
        held: The tensors in ``members.safetensors``.
        places: For each tensor and dimension, the index of its level vector; ``None`` if all entries are kept.

    Raises:
        IndexError, KeyError: The arguments do not belong together.
    """
    own = {name.removeprefix(f"{index}/"): tensor for name, tensor in held.items() if name.startswith(f"{index}/")}
    found: dict[str, Tensor] = {}
    made: dict[tuple[int, tuple[int | None, ...]], Tensor] = {}  # tied names share a tensor
    for name, tensor in full.items():
        dims = tuple(places.get(name, ()))
        if name not in own and (id(tensor), dims) not in made:
            levels = [None if i is None else held[f"entries/{i}"] for i in dims]
            made[id(tensor), dims] = _selected(tensor, levels, index)
        found[name] = own[name] if name in own else made[id(tensor), dims]
    return found | {name: tensor for name, tensor in own.items() if name not in found}


def _selected(tensor: Tensor, levels: Sequence[Tensor | None], index: int) -> Tensor:
    if len(levels) > tensor.ndim:
        raise IndexError(f"levels of {len(levels)} dimensions for a tensor of {tensor.ndim}")
    whole = True
    for dim, level in enumerate(levels):
        if level is not None:
            if level.shape != (tensor.shape[dim],):
                raise IndexError(f"{list(level.shape)} levels for {tensor.shape[dim]} entries")
            tensor, whole = tensor.index_select(dim, (level >= index).nonzero()[:, 0].to(tensor.device)), False
    return tensor.clone() if whole else tensor


OWN = ("edits", "notes", "emitter", "checks", "cost")
"""The manifest entries that each member has for itself; all others apply to the family."""


def kept_of_member(manifest: Mapping[str, Any], index: int) -> dict[str, list[int]]:
    """For each prunable group, the atoms that a member keeps."""
    return {
        name: torch.tensor(levels).ge(index).nonzero()[:, 0].tolist() for name, levels in manifest["levels"].items()
    }


def manifest_of_member(manifest: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The manifest as if only this member had been saved."""
    if index == 0:
        return dict(manifest)
    own = {name: manifest["members"][index][name] for name in OWN if name in manifest["members"][index]}
    return {**manifest, **own, "kept": kept_of_member(manifest, index)}
