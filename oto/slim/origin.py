"""Where a slim model comes from, so that one that was made slim again still loads from the first class.

It is kept in the slim module itself, as the plain attribute ``_oto_origin``: copies and pickles of the module have it.
What was done in each round is kept as it was done, and done again in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oto.errors import EmitterError
from oto.groups import Kept
from oto.slim.module import Edits, attribute, thin_copy
from oto.slim.unstated import refuse_saving


@dataclass(frozen=True, eq=False)
class Round:
    """How a model was made slim once; plain data, for JSON.

    Attributes:
        edits: What changed besides the tensors.
        shapes: Of every tensor that the slim model was given.
        kept: For each group that could be pruned, its atoms that are left.
    """

    edits: Edits
    shapes: Mapping[str, list[int]]
    kept: Mapping[str, list[int]]

    @classmethod
    def of(cls, edits: Edits, tensors: Mapping[str, Tensor], kept: Kept) -> Round:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        return cls(edits, shapes, {name: atoms.tolist() for name, atoms in kept.items()})

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Round:
        """Of plain data."""
        return cls(Edits(**plain["edits"]), plain["shapes"], plain["kept"])

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return {"edits": asdict(self.edits), "shapes": dict(self.shapes), "kept": dict(self.kept)}


@dataclass(frozen=True, eq=False)
class Origin:
    """What a slim model was made of, and how.

    Attributes:
        first: The model as it was before it was ever made slim, on ``meta``.
        rounds: What was done to it, in order.
    """

    first: nn.Module
    rounds: tuple[Round, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self  # never written to


def origin_of(model: nn.Module) -> Origin | None:
    """Where a model comes from; ``None`` if it was not made slim."""
    found: Origin | None = vars(model).get("_oto_origin")
    return found


def descend(slim: nn.Module, model: nn.Module, *rounds: Round) -> None:
    """Remember in ``slim`` that it was made of ``model``, which may have been made slim itself."""
    before = origin_of(model)
    if before is None:
        vars(slim)["_oto_origin"] = Origin(skeleton(model), rounds)
    else:
        vars(slim)["_oto_origin"] = Origin(before.first, (*before.rounds, *rounds))
    if not rounds[-1].edits.config:
        refuse_saving(slim, model)


def after_rounds(first: nn.Module, rounds: Iterable[Round]) -> nn.Module:
    """A model as some rounds leave it, without values.

    Raises:
        EmitterError: A tensor would grow, or the rounds cannot be done; a file may say so.
    """
    model = first
    for done in rounds:
        tensors: dict[str, Tensor] = {}
        made: dict[tuple[int, Sequence[int]], Tensor] = {}  # ties hold
        for name, shape in done.shapes.items():
            old = attribute(model, name)
            if len(shape) != old.ndim or any(a > b for a, b in zip(shape, old.shape, strict=True)):
                raise EmitterError(f"{name} is {list(old.shape)}, of which {list(shape)} cannot be left")
            key = id(old), tuple(shape)
            if key not in made:
                made[key] = torch.empty(tuple(shape), dtype=old.dtype, device="meta")
            tensors[name] = made[key]
        model = thin_copy(model, tensors, done.edits)
    return model


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
