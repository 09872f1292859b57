"""Fold the count that a norm or a mean divides by into the weights and small constants that follow."""

from __future__ import annotations

from collections.abc import Iterator

from oto.slim.own_class.adaptation import Folded
from oto.slim.own_class.attributes import AttributePlace, SizeAttribute
from oto.slim.own_class.blocks import ancestors
from oto.slim.own_class.rescale import folded
from oto.slim.own_class.situation import Proposal, Situation


def proposals(at: Situation) -> Iterator[Proposal]:
    """Fold the count into the weights that follow."""
    for siblings in at.spreads:
        found: dict[int, Folded] = {}
        for index in siblings:
            if at.changes(index) and index in at.bench.partition.found.tape.counted:
                fold = folded(at.bench.partition, index, at.bench.uses) if index not in at.adaptation.folded else None
                if fold is not None:
                    found[index] = fold
        sizes = _constants(at, found)
        if at.index in found and sizes is not None:
            names = sorted(scale.name for fold in found.values() for scale in fold.scales)
            more = f" and {len(names) - 1} others" if len(names) > 1 else ""
            reason = f"the count of removed entries is folded into {names[0]}{more}"
            yield Proposal(at.adaptation.with_folded(found, sizes), reason, must_pass=True)


def _constants(at: Situation, found: dict[int, Folded]) -> dict[AttributePlace, SizeAttribute] | None:
    """The attributes that hold small constants which change with the count; ``None`` if the code states one itself."""
    made: dict[AttributePlace, SizeAttribute] = {}
    for fold in found.values():
        for index, wanted in fold.scalars.items():
            places = [
                AttributePlace(path, key)
                for path in ancestors(at.bench.graph.nodes[index].module)
                for key, value in at.held(path).items()
                if isinstance(value, float) and value == wanted.value
            ]
            if not places:
                return None
            made[places[0]] = wanted
    return made
