"""Record how a slim model was made, so that a model made slim several times still loads from the first class.

The record is the attribute ``_oto_origin`` of the slim module itself, which copies and pickles of the module keep; in
pickles it is plain data, which can be read without ``oto``. The edits of each round are kept separately and are
repeated in the same order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from oto.errors import EmitterError
from oto.groups import Kept
from oto.slim.config.solve import apply
from oto.slim.config.unstated import refuse_saving
from oto.slim.edits import Edits, attribute, module_at, named_tensors, slim_copy
from oto.trace.snapshot import state_of

REMEMBERED = "_oto_origin"
"""The attribute of a slim module that holds its origin."""


@dataclass(frozen=True, eq=False)
class Round:
    """One round of making a model slim; plain data, for JSON.

    Attributes:
        edits: The edits of the round, without tensors.
        shapes: The shape of every tensor that the slim model was given.
        kept: For each prunable group, the atoms that are left.
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
        """Read a round from plain data."""
        return cls(Edits(**plain["edits"]), plain["shapes"], plain["kept"])

    def plain(self) -> dict[str, Any]:
        """The round as plain data."""
        return {"edits": self.edits.plain(), "shapes": dict(self.shapes), "kept": dict(self.kept)}


@dataclass(frozen=True, eq=False)
class Origin:
    """What a slim model was made from, and how.

    Attributes:
        first: The model before it was first made slim, on ``meta``.
        rounds: What was done to it, in order.
    """

    first: nn.Module
    rounds: tuple[Round, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self  # immutable

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ([("first", self.first), ("rounds", [done.plain() for done in self.rounds])],)


def origin_of(model: nn.Module) -> Origin | None:
    """The origin of a model; ``None`` if it was not made slim."""
    found = vars(model).get(REMEMBERED)
    if isinstance(found, dict):  # loaded from a pickle
        found = vars(model)[REMEMBERED] = Origin(found["first"], tuple(map(Round.read, found["rounds"])))
    return found


def descend(slim: nn.Module, model: nn.Module, *rounds: Round) -> None:
    """Record in ``slim`` that it was made from ``model``, which may have been slim itself."""
    before = origin_of(model)
    if before is None:
        vars(slim)[REMEMBERED] = Origin(skeleton(model), rounds)
    else:
        vars(slim)[REMEMBERED] = Origin(before.first, (*before.rounds, *rounds))
    if not rounds[-1].edits.config:
        refuse_saving(slim, model)


def after_rounds(first: nn.Module, rounds: Iterable[Round]) -> nn.Module:
    """The model after some rounds, without values.

    Raises:
        EmitterError: A tensor would grow, or a round cannot be repeated; a forged file may ask for that.
    """
    model = first
    for done in rounds:
        tensors: dict[str, Tensor] = {}
        made: dict[tuple[int | str, Sequence[int]], Tensor] = {}  # keeps ties
        for name, shape in done.shapes.items():
            old = held(model, name)
            if old is not None and not is_part(shape, old.shape):
                raise EmitterError(f"{name} is {list(old.shape)}, of which {list(shape)} cannot be left")
            key = name if old is None else id(old), tuple(shape)
            if key not in made:
                dtype = torch.get_default_dtype() if old is None else old.dtype
                made[key] = torch.empty(tuple(shape), dtype=dtype, device="meta")
            tensors[name] = made[key]
        model = copy_with(model, tensors, done.edits)
    return model


def is_part(shape: Sequence[int], full: Sequence[int]) -> bool:
    """Whether a tensor of shape ``shape`` can be a pruned form of one of shape ``full``."""
    return len(shape) == len(full) and all(a <= b for a, b in zip(shape, full, strict=True))


def held(model: nn.Module, name: str) -> Tensor | None:
    """A tensor of a model by its dotted path; ``None`` if it is state that no forward has created yet."""
    try:
        found = attribute(model, name)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None


def lacks_values(model: nn.Module, names: Collection[str]) -> bool:
    """Whether a model on ``meta`` has tensors other than parameters, buffers and those in ``names``.

    These are plain attributes that no forward has read, and tables in containers: only the constructor knows their
    values.
    """
    known = {id(tensor) for tensor in (*model.buffers(), *(held(model, name) for name in names))}
    return any(tensor.is_meta and id(tensor) not in known for tensor in state_of(model))


def copy_with(model: nn.Module, tensors: Mapping[str, Tensor], edits: Edits) -> nn.Module:
    """:func:`oto.slim.config.solve.apply`, which also adds tensors that the model does not hold yet.

    Size attributes of a cache are set only if it exists already.
    """

    def filled(path: str, key: Sequence[Any]) -> bool:
        return getattr(module_at(model, path), str(key[0]), None) is not None

    stated = {path: [one for one in numbers if filled(path, one[0])] for path, numbers in edits.stated.items()}
    edits = replace(edits, stated=stated)
    late = {name: tensor for name, tensor in tensors.items() if held(model, name) is None}
    slim = apply(model, {name: tensor for name, tensor in tensors.items() if name not in late}, edits)
    for name, tensor in late.items():
        holder, _, last = name.rpartition(".")
        module = module_at(slim, holder)
        if last in module._buffers:
            module._buffers[last] = tensor
        elif not hasattr(module, last):
            module.register_buffer(last, tensor, persistent=False)
        elif getattr(module, last) is None:
            setattr(module, last, tensor)
        else:
            raise EmitterError(f"{name} is no tensor of {type(module).__name__}")
    return slim


def skeleton(model: nn.Module) -> nn.Module:
    """A copy without values: parameters and buffers are on ``meta``, unless their type does not support that.

    Raises:
        EmitterError: The model cannot be copied.
    """
    made: dict[int, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in named_tensors(model).items():
        if id(tensor) not in made:
            plain = tensor.layout is torch.strided and not tensor.is_quantized
            made[id(tensor)] = torch.empty_like(tensor.detach(), device="meta") if plain else tensor.detach()
        tensors[name] = made[id(tensor)]
    return slim_copy(model, tensors, Edits())
