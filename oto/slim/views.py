"""Members of a family in shared memory: full tensors with kept atoms sorted first, and members as views of them.

If the atoms of every group are sorted by the number of members that keep them, a member keeps the first ones, and its
tensors are ``full[:k]`` along the dimensions that get thinner. Such views need no memory, so a server can hold all
members and route by load. Sorting the atoms of a group only changes the order of sums, which is checked. If a dimension
is a product or a sum of axes (the inner width of heads, a fused projection), the kept entries are not its first ones;
there the member holds a copy.

Example: of atoms ``[a b c d]`` with ``b, d`` in every member and ``a`` in the larger one, the order is ``[b d a c]``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oto.axes.terms import Axis, reordered
from oto.slim.config.solve import apply
from oto.slim.edits import Edits, attribute, slim_copy
from oto.slim.emitters import class_edits, without_segments
from oto.slim.proof.compare import require
from oto.slim.proof.reference import CheckOptions, check
from oto.slim.proof.run import learn
from oto.slim.pruned_shapes import PrunedShapes
from oto.slim.source import Source

Orders = Mapping[str, NDArray[np.int64]]
"""For each prunable group, its atoms in the new order, int64."""


@dataclass(frozen=True, eq=False)
class View:
    """A member whose tensors are views of those of the sorted full model.

    Attributes:
        net: The module, in eval mode.
        copied: The names of parameters that are copies, since they cannot be views.
        copied_bytes: Memory of these copies in bytes.
    """

    net: nn.Module
    copied: Sequence[str]
    copied_bytes: int


def sorted_copy(model: nn.Module, source: Source, orders: Orders) -> nn.Module:
    """A copy of a model with the atoms of its groups in other orders.

    Args:
        source: The analysis of the model.
        orders: See :data:`Orders`.
    """
    axes: dict[Axis, NDArray[np.int64]] = {source.partition.axes[name]: own for name, own in orders.items()}
    tensors: dict[str, Tensor] = {}
    found = source.partition.found
    for leaf in found.graph.leaves:
        if leaf.names:
            made = attribute(model, leaf.names[0]).detach()
            for dim, term in enumerate(found.terms(leaf.value)):
                order = reordered(term, axes)
                if (order != np.arange(len(order))).any():
                    made = made.index_select(dim, torch.from_numpy(order).to(made.device))
            made = made.clone() if made.data_ptr() == attribute(model, leaf.names[0]).data_ptr() else made
            tensors.update(dict.fromkeys(leaf.names, made))
    return slim_copy(model, tensors, Edits())


def view_of(store: nn.Module, masked: nn.Module, plain: Source, orders: Orders) -> View:
    """A member as a view of ``store``, proved to compute what ``masked`` does.

    Args:
        store: The full model, sorted.
        masked: The full model, unsorted, in which all atoms that the member does not keep are zero.
        plain: The source of the member; ``plain.model`` is ``store``, and ``plain.kept`` its atoms, unsorted.
        orders: The orders in which ``store`` is sorted.

    Raises:
        EmitterError: The class cannot express the member.
        VerificationError: The view computes something else than ``masked``.
    """
    front = {name: np.arange(len(atoms)) for name, atoms in plain.kept.items()}
    source = replace(plain, kept=front)
    edits = class_edits(source, source.own.unfolded if source.own is not None else None)
    zeroed = sorted_copy(masked, source, orders)  # with the statistics of the member
    edits, gone = without_segments(replace(source, model=zeroed), edits)
    tensors, copied, size = _tensors(store, zeroed, source.pruned, gone)
    net = apply(store, tensors, edits).eval()
    learn(net, edits, source.dummy_input)
    require(check(masked, net, source.dummy_input, CheckOptions("view"), left=source.left))
    return View(net, copied, size)


def _tensors(
    store: nn.Module, masked: nn.Module, pruned: PrunedShapes, gone: Collection[str]
) -> tuple[dict[str, Tensor], list[str], int]:
    """A member's tensors, without those removed with segments; the names of parameters that are copies; and the bytes
    of these copies."""
    tensors: dict[str, Tensor] = {}
    copied: list[str] = []
    size = 0
    for leaf in pruned.found.graph.leaves:
        names = [name for name in leaf.names if name not in gone]
        if not names:
            continue
        if leaf.kind != "parameter":
            made = pruned.prune(leaf, attribute(masked, leaf.names[0]))
        else:
            full = attribute(store, leaf.names[0]).detach()
            view = _front(full, pruned.entries(leaf))
            made = pruned.prune(leaf, full) if view is None else view
            if view is None:
                copied.append(names[0])
                size += made.nbytes
        tensors.update(dict.fromkeys(names, made))
    return tensors, copied, size


def _front(full: Tensor, entries: Sequence[NDArray[np.bool_]]) -> Tensor | None:
    """The entries as a view if they are the first ones of every dimension, else ``None``."""
    for dim, mask in enumerate(entries):
        k = int(mask.sum())
        if not mask[:k].all():
            return None
        full = full.narrow(dim, 0, k)
    return full
