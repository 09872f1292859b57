"""The input of an emitter, ``Source``, and its output, ``Emitted``: a slim model that is not yet proved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from oto.slim.pruned_shapes import PrunedShapes, pruned_shapes


@dataclass(frozen=True, eq=False)
class Source:
    """What a slim model is made from.

    Attributes:
        model: The full model, in which everything to be removed is zero.
        dummy_input: The example input.
        own: The result of the search for its class's adaptation; ``None`` if there was no search.
        kept: For each prunable group, the kept atoms.
        recipe: How the class is made from its config, if that is to be tried.
        drop_unreached: Remove modules that the forward never uses in eval mode.
        float64: Whether to compare in float64, as in :class:`oto.slim.proof.reference.Reference`.
        verify: Whether to compare at all.
        groups: The node groups that ``kept`` refers to, with their ties and divisors; those of the partition by
            default.
        brief: Compare only in float64, if that is possible.
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
    brief: bool = False

    @cached_property
    def pruned(self) -> PrunedShapes:
        """The pruned shapes: how many entries every dimension keeps."""
        return pruned_shapes(self.partition, self.kept)

    @cached_property
    def reference(self) -> Reference:
        """The full model, with which every slim model made from it is compared."""
        decides = self.partition.found.graph.mode == "real"
        return Reference(self.model, self.dummy_input, self.left, self.float64, decides=decides, brief=self.brief)

    def keeping(self, kept: Kept, own: OwnClass | None) -> Source:
        """The source with other counts; the full model's outputs are reused if none of their entries was removed."""
        made = replace(self, kept=kept, own=own)
        if "reference" in vars(self) and self.left is None:
            vars(made)["reference"] = self.reference
        return made

    @property
    def left(self) -> list[list[NDArray[np.bool_]]] | None:
        """For each output and each of its dimensions, the entries that the slim model has; ``None`` if all."""
        if not self.partition.found.strict_out_nodes:
            return None
        return [self.partition.entries(value, self.kept) for value in self.partition.found.graph.outputs]

    @property
    def promises_its_class(self) -> bool:
        """Whether all prunable groups can be expressed by the class or its config."""
        return self.own is not None or self.recipe is not None

    @property
    def remedy(self) -> str:
        """What to do if the original class cannot express what was removed."""
        if self.own is not None:
            return "keep what that line reads whole: OTO(..., skip_patterns=[...])"
        if self.recipe is not None:
            return (
                "if only a narrow dtype differs, rounding decides what is routed or compared: model.float(), then"
                " construct_subnet(), then cast the slim model; emitter='config' raises instead"
            )
        return "prune only what the class can do without: OTO(...) without allow_graph=True"


@dataclass(frozen=True, eq=False)
class Emitted:
    """A slim model that is not yet proved.

    Attributes:
        emitter: The emitter that made it.
        model: The slim model.
        edits: The edits that made it, if it is of the original class.
        tensors: Its tensors; for the original class, by their names in the full model.
        compare: Compares the slim model with the full one.
        again: Makes a slim model in the same way from a full model with different numbers.
        scales: For tensors that a count is folded into, how they are rescaled, by name.
        changed: Names of tensors that differ from the kept entries of the full model's.
        notes: Limits of the slim model, for the user.
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
