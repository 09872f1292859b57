"""Where a slim model comes from, so that one that was made slim again still loads from the first class.

It is kept in the slim module itself, as the plain attribute ``_oto_origin``: copies and pickles of the module have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from oto.slim.module import Edits, thin_copy


@dataclass(frozen=True, eq=False)
class Origin:
    """What a slim model was made of, and how.

    Attributes:
        first: The model as it was before it was ever made slim, on ``meta``.
        edits: All that changed since, besides the tensors.
        rounds: What each round left, the first one first: for each group that could be pruned, its atoms, counted among
            those that the round before had left.
    """

    first: nn.Module
    edits: Edits
    rounds: tuple[Mapping[str, list[int]], ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self  # never written to


def origin_of(model: nn.Module) -> Origin | None:
    """Where a model comes from; ``None`` if it was not made slim."""
    found: Origin | None = vars(model).get("_oto_origin")
    return found


def descend(slim: nn.Module, model: nn.Module, edits: Edits, *rounds: Mapping[str, list[int]]) -> Origin:
    """Remember in ``slim`` that it was made of ``model``, which may have been made slim itself."""
    before = origin_of(model)
    if before is None:
        origin = Origin(skeleton(model), edits, rounds)
    else:
        origin = Origin(before.first, composed(before.edits, edits), (*before.rounds, *rounds))
    vars(slim)["_oto_origin"] = origin
    return origin


def skeleton(model: nn.Module) -> nn.Module:
    """A copy without values: parameters and buffers are on ``meta``, unless they have no plain form there.

    Raises:
        EmitterError: The model cannot be copied.
    """
    made: dict[int, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if id(tensor) not in made:
            plain = tensor.layout is torch.strided and not tensor.is_quantized
            made[id(tensor)] = torch.empty_like(tensor.detach(), device="meta") if plain else tensor.detach()
        tensors[name] = made[id(tensor)]
    return thin_copy(model, tensors, Edits())


def composed(first: Edits, second: Edits) -> Edits:
    """What two rounds of edits change together."""
    both = {}
    for field in fields(Edits):
        old, new = getattr(first, field.name), getattr(second, field.name)
        both[field.name] = {path: _over(old.get(path), new.get(path)) for path in old | new}
    return Edits(**both)


def _over(old: Any, new: Any) -> Any:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return {**old, **new}
    return old if new is None else new
