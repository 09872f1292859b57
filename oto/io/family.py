"""Save a family: the shared weights once, and a description of each member. Loading is in :mod:`oto.io.subnet`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oto.errors import EmitterError, VerificationError, some
from oto.io.artifact import Draft, writing
from oto.io.members import MEMBERS, Places, tensors_of_member
from oto.io.subnet import NOT_ASKED, WEIGHTS, describe, plain_edits, rebuild, state_names
from oto.slim.edits import attribute, renumbered, tensors_of
from oto.slim.proof.compare import checked, require
from oto.slim.proof.float64 import dtype_of
from oto.slim.proof.run import run
from oto.slim.provenance import Origin, after_rounds, origin_of
from oto.slim.pruned_shapes import PrunedShapes
from oto.slim.source import Source


@dataclass(frozen=True, eq=False)
class ToSave:
    """A member to be saved.

    Attributes:
        slim: Its slim model, of the model's class.
        said: Its manifest entries: target, emitter, notes, checks, costs, score.
    """

    slim: nn.Module
    pruned: PrunedShapes
    said: Mapping[str, Any]

    @property
    def origin(self) -> Origin:
        """How the slim model was made.

        Raises:
            EmitterError: The member is not of the model's class.
        """
        found = origin_of(self.slim)
        if found is None:
            raise EmitterError(
                "a member is a graph, and not of its model's class\n"
                "  effect  the family cannot be saved in one folder\n"
                "  to fix  construct_subnet for this member alone; or OTO(...) without allow_graph=True"
            )
        return found

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by their names in the full model."""
        last = self.origin.rounds[-1]
        names = {name: renumbered(name, last.edits.layers) for name in last.shapes}
        return {name: attribute(self.slim, own).detach() for name, own in names.items() if own is not None}


def files_of_family() -> list[str]:
    """The files that :func:`save_family` writes."""
    return [WEIGHTS, MEMBERS]


def save_family(
    out_dir: Path, source: Source, members: Sequence[ToSave], levels: Mapping[str, NDArray[np.int64]]
) -> None:
    """Write the artifact of a family; what is read back from it is proved before it is put in place.

    Args:
        source: The full model.
        members: The members, largest first; the first is the full network.
        levels: For each prunable group, how many members besides the full network keep each atom.

    Raises:
        ArtifactError: The artifact cannot be written.
        VerificationError: What was read back differs. Nothing is put in place.
    """
    full = tensors_of(source.model, source.partition)
    places, vectors = _entries(source, members)
    largest = members[0]
    state = state_names(source)
    with writing(out_dir) as draft:
        left_out = draft.tensors(WEIGHTS, full, source.partition.found.graph.unread)
        draft.tensors(MEMBERS, _held(full, places, vectors, members))
        manifest = {
            "model": describe(largest.origin.first, [name for name in full if name not in state]),
            "earlier": [done.plain() for done in largest.origin.rounds[:-1]],
            "edits": plain_edits(largest.origin.rounds[-1].edits),
            "kept": {name: list(range(len(own))) for name, own in levels.items()},
            "no_program": NOT_ASKED,
            "left_out": left_out,
            "why_graph": None,
            **{key: largest.said[key] for key in ("emitter", "notes", "checks", "cost")},
            "members": [{**one.said, "edits": plain_edits(one.origin.rounds[-1].edits)} for one in members],
            "levels": {name: own.tolist() for name, own in levels.items()},
            "entries": {name: dims for name, dims in places.items() if any(i is not None for i in dims)},
        }
        _read_back(draft, source, members, places)
        draft.commit(manifest)


def _entries(source: Source, members: Sequence[ToSave]) -> tuple[dict[str, list[int | None]], list[Tensor]]:
    """For each tensor and dimension, the index of its level vector; and the vectors: how many members keep an entry."""
    places: dict[str, list[int | None]] = {}
    vectors: dict[bytes, int] = {}
    found: list[Tensor] = []
    for leaf in source.partition.found.graph.leaves:
        dims: list[int | None] = []
        masks = [member.pruned.entries(leaf) for member in members[1:]]
        for own in zip(*masks, strict=True):
            level = np.sum(own, axis=0, dtype=np.uint8)
            if (level == len(own)).all():
                dims.append(None)
                continue
            if level.tobytes() not in vectors:
                vectors[level.tobytes()] = len(found)
                found.append(torch.from_numpy(level))
            dims.append(vectors[level.tobytes()])
        places.update(dict.fromkeys(leaf.names, dims))
    return places, found


def _held(
    full: Mapping[str, Tensor], places: Places, vectors: Sequence[Tensor], members: Sequence[ToSave]
) -> dict[str, Tensor]:
    """What is saved besides the full tensors: the level vectors, and the members' own tensors."""
    levels = {f"entries/{i}": vector for i, vector in enumerate(vectors)}
    held = dict(levels)
    for index, member in enumerate(members[1:], 1):
        shared = tensors_of_member(full, levels, places, index)
        for name, tensor in member.tensors.items():
            if name not in shared or not _same(shared[name], tensor):
                held[f"{index}/{name}"] = tensor
    return held


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and every entry; NaN equals NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, 0, 0, equal_nan=True))


def _read_back(draft: Draft, source: Source, members: Sequence[ToSave], places: Places) -> None:
    """Check that every member is read back bit for bit, fits into the class, and computes the same.

    Raises:
        VerificationError: A member differs.
    """
    full, held = draft.load(WEIGHTS), draft.load(MEMBERS)
    device = next(source.model.parameters()).device
    for index, member in enumerate(members):
        read = {n: t.to(device) for n, t in tensors_of_member(full, held, places, index).items()}
        wrong = [name for name, tensor in member.tensors.items() if not _same(read[name], tensor)]
        if wrong:
            raise VerificationError(
                f"member {index} reads back differently than it was built: {some(wrong)}\n"
                "  effect  nothing was written\n  to fix  report the model"
            )
        *earlier, last = member.origin.rounds
        first = after_rounds(member.origin.first, earlier) if earlier else source.model
        loaded = rebuild(first, read, json.loads(json.dumps(plain_edits(last.edits)))).eval()
        outputs = run(member.slim, source.dummy_input), run(loaded, source.dummy_input)
        require([checked(f"member {index}, reloaded", dtype_of(member.slim), *outputs)])
