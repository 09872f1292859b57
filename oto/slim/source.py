"""What a slim model is made of, and what an emitter gives: a slim model that nobody has proved yet."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from oto.groups import Kept, NodeGroup, Partition
from oto.slim.config.recipe import Recipe
from oto.slim.edits import Edits, Scale
from oto.slim.own_class import OwnClass
from oto.slim.proof.compare import Check
from oto.slim.proof.reference import Reference


@dataclass(frozen=True, eq=False)
class Source:
    """What a slim model is made of.

    Attributes:
        model: The full model, of which everything that goes is zero.
        dummy_input: The example input.
        own: What was found out about the class of the model; ``None`` if nothing was asked.
        kept: For each prunable group, the atoms that are left.
        recipe: How the class is made from its config, if that is to be tried.
        drop_unreached: Leave out what the forward never uses in eval mode.
        float64: Whether to compare in float64, as :class:`oto.slim.proof.reference.Reference` takes it.
        verify: Whether to compare at all.
        groups: The node groups that ``kept`` is of, with what they are tied to and divided by; those of the partition
            by default.
    """

    model: nn.Module
    dummy_input: Any
    partition: Partition
    own: OwnClass | None
    kept: Kept
    recipe: Recipe | None = None
    drop_unreached: bool = False
    float64: bool | str = "auto"
    verify: bool = True
    groups: Sequence[NodeGroup] = ()

    @cached_property
    def reference(self) -> Reference:
        """The full model, with which whatever is made of it is compared."""
        decides = self.partition.found.graph.mode == "real"
        return Reference(self.model, self.dummy_input, self.left, self.float64, decides=decides)

    @property
    def left(self) -> list[list[NDArray[np.bool_]]] | None:
        """For each output and each of its dimensions, what the slim model still has; ``None`` if that is all."""
        if not self.partition.found.strict_out_nodes:
            return None
        return [self.partition.entries(value, self.kept) for value in self.partition.found.graph.outputs]

    @property
    def promises_its_class(self) -> bool:
        """Whether nothing was made prunable that the class, or its config, cannot do without."""
        return self.own is not None or self.recipe is not None

    @property
    def remedy(self) -> str:
        """What to do where the original class cannot express what was removed."""
        if self.own is not None:
            return "keep what that line reads whole: OTO(..., skip_patterns=[...])"
        if self.recipe is not None:
            return (
                "where a narrow dtype alone differs, rounding decides what is routed or compared: model.float(), then"
                " construct_subnet(), then cast the slim model; emitter='config' raises instead"
            )
        return "prune only what the class can do without: OTO(...) without allow_graph=True"


@dataclass(frozen=True, eq=False)
class Emitted:
    """A slim model that nobody has proved yet.

    Attributes:
        emitter: The way that was taken.
        model: The slim model.
        edits: What made it of the original class, if it is of that.
        tensors: What it holds, by the names of the full model for the original class.
        compare: Compares the slim model with the full one.
        again: Makes another slim model in the same way, of a full one with other numbers.
        scales: By what tensors are multiplied that take a count in, by name.
        changed: Names of tensors that are more than what is left of those of the full model.
        notes: What falls short of what one might expect.
    """

    emitter: str
    model: nn.Module
    edits: Edits | None
    tensors: Mapping[str, Tensor]
    compare: Callable[[Reference], list[Check]]
    again: Callable[[Source], Emitted]
    scales: Mapping[str, Sequence[Scale]] = field(default_factory=dict)
    changed: Collection[str] = ()
    notes: list[str] = field(default_factory=list)
