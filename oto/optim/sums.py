"""Compute the inputs of saliency criteria if parameters are sharded over processes: sums over the entries of atoms.

A criterion computes a score from the norms of an atom, of its gradient and of the weights that read it, and from the
dot product of atom and gradient. No single process can compute these. So each quantity is summed over the processes
when it is first needed, for all node groups at once: one all-reduce of ``N`` numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NoReturn

import torch
from torch import Tensor

from oto.errors import OptionError
from oto.groups.node_group import NodeGroup, Slice
from oto.optim.entries import Place, Total, dot, place_of, sq_norm, summed_in
from oto.optim.refusals import any_entry_of
from oto.optim.saliency import Entries
from oto.shards import Sharding, is_sharded


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over the entries of every atom of all node groups, each computed when it is first needed.

    Attributes:
        groups: The node groups.
        weights: Parameters by name, or tensors in place of them; accessed one at a time.
        gradients: Their gradients by name, for those that have one, sharded alike.
        shardings: How the parameters are sharded, as in :class:`oto.optim.entries.Rows`.
        shapes: The shapes of the parameters over all processes.
        maximized: Names of parameters with ``maximize=True``.
        device: The device of vectors of one number per atom.
        aside: Entries to use instead of the current ones, with their places; by index of the node group and slice.
    """

    groups: Sequence[NodeGroup]
    weights: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    shardings: Mapping[Sharding, torch.dtype]
    shapes: Mapping[str, torch.Size]
    maximized: Container[str]
    device: torch.device
    aside: Mapping[tuple[int, Slice], tuple[Place, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        groups: Sequence[NodeGroup],
        parameters: Mapping[str, Tensor],
        *,
        weights: Mapping[str, Tensor] | None = None,
        gradients: Mapping[str, Tensor] | None = None,
        maximized: Container[str] = (),
        device: torch.device | str = "cpu",
    ) -> Sums:
        """The sums for some node groups.

        Args:
            parameters: Parameters by name.
            weights, gradients: Tensors in place of the parameters and their gradients, sharded in the same way.
            maximized, device: See the attributes.
        """
        named = {p.parameter: None for group in groups for p in group.slices if p.parameter in parameters}
        shardings: dict[Sharding, torch.dtype] = {}
        for name in named:
            if (sharding := Sharding.of(parameters[name])) is not None:
                dtype = summed_in(parameters[name])
                shardings[sharding] = torch.promote_types(shardings.get(sharding, dtype), dtype)
        if gradients is None:
            gradients = gradients_of({name: parameters[name] for name in named})
        shapes = {name: parameters[name].shape for name in named}
        weights = parameters if weights is None else weights
        return cls(groups, weights, gradients, shardings, shapes, maximized, torch.device(device))

    def entries(self) -> list[Entries]:
        """The entries of every node group, which only provide sums."""
        firsts = [0]
        for group in self.groups:
            firsts.append(firsts[-1] + group.size)
        return [SpreadEntries(self, group, first) for group, first in zip(self.groups, firsts, strict=False)]

    @cached_property
    def weight_sq(self) -> Tensor:
        """``||x_g||^2`` of every atom, shape ``(N,)``."""
        return self._summed(self._zeros, self.weights, lambda x, _: sq_norm(x))

    @cached_property
    def reader_sq(self) -> Tensor:
        """Squared norm of the weights that read each atom, shape ``(N,)``; 1 if there are none."""
        total = self._summed(self._readers, self.weights, lambda x, _: sq_norm(x))
        read = [torch.full((g.size,), bool(self.readers(g)), device=self.device) for g in self.groups]
        return torch.where(torch.cat(read), total, 1) if read else total

    @cached_property
    def gradient_sq(self) -> Tensor:
        """``||g_g||^2`` of every atom, shape ``(N,)``."""
        return self._summed(self._zeros, self.gradients, lambda x, _: sq_norm(x))

    @cached_property
    def dot(self) -> Tensor:
        """``<x_g, g_g>`` of every atom, shape ``(N,)``."""
        return self._summed(self._zeros, self.weights, dot, self.gradients)

    @cached_property
    def has_gradient(self) -> bool:
        """Whether a gradient of any atom has a nonzero entry."""
        return any_entry_of(self.gradients[p.parameter] for g in self.groups for p in self._zeros(g, self.gradients))

    def readers(self, group: NodeGroup) -> list[Slice]:
        """The weight slices that read the atoms of a node group."""
        reading = [p for p in group.slices if p not in group.zeros and p.parameter in self.shapes]
        return [piece for piece in reading if len(self.shapes[piece.parameter]) > 1]

    def _zeros(self, group: NodeGroup, tensors: Container[str]) -> Iterable[Slice]:
        return (piece for piece in group.zeros if piece.parameter in tensors)

    def _readers(self, group: NodeGroup, tensors: Container[str]) -> Iterable[Slice]:
        return self.readers(group)

    def _summed(
        self,
        slices: Callable[[NodeGroup, Container[str]], Iterable[Slice]],
        tensors: Mapping[str, Tensor],
        measure: Callable[[Tensor, Tensor], Tensor],
        others: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The sum of a measure over the rows of each atom, shape ``(N,)``, computed one tensor at a time."""
        found: dict[str, list[tuple[int, Slice, int]]] = {}
        first = 0
        for number, group in enumerate(self.groups):
            for piece in slices(group, tensors if others is None else others):
                found.setdefault(piece.parameter, []).append((number, piece, first))
            first += group.size
        total = Total(first, self.device, self.shardings)
        for name, own in found.items():
            tensor = tensors[name].detach()
            other = tensor if others is None else others[name]
            for number, piece, start in own:
                place, beside = (place_of(piece, t, None, self.groups[number].size, start) for t in (tensor, other))
                if place is not None and beside is not None:
                    rows = place.read()
                    if tensors is self.weights and (aside := self.aside.get((number, piece))) is not None:
                        rows = place._replace(view=_with(place.view, *aside)).read()
                    part = measure(rows, beside.read())
                    total.add_(place, -part if others is not None and name in self.maximized else part)
        return total.over_processes()


class SpreadEntries(Entries):
    """The :class:`Entries` of a node group with sharded parameters: sums are available, the entries are not."""

    def __init__(self, sums: Sums, group: NodeGroup, first: int) -> None:
        vars(self).update(sums=sums, group=group, own=slice(first, first + group.size))

    sums: Sums
    group: NodeGroup
    own: slice

    @property
    def weights(self) -> NoReturn:
        """Not available, as no process has all entries.

        Raises:
            OptionError: Always.
        """
        raise OptionError(
            f"parameters of {self.group.name} are spread over processes, so no process has the entries of an atom\n"
            "  effect  a saliency that reads them cannot be computed, and nothing was chosen\n"
            "  to fix  let it be made of weight_sq, gradient_sq, dot, reader_sq and count, which are summed over all"
            " processes"
        )

    gradients = readers = weights

    @property
    def size(self) -> int:
        """Number of atoms of the node group."""
        return self.group.size

    @property
    def count(self) -> int:
        """Number of entries of one atom, over all processes."""
        wholes = [(piece, torch.empty(self.sums.shapes[piece.parameter], device="meta")) for piece in self.group.zeros]
        return sum(piece.of(whole)[0].numel() for piece, whole in wholes)

    @property
    def convolved(self) -> bool:
        """Whether a convolution over two or more dimensions reads the atoms."""
        return any(len(self.sums.shapes[piece.parameter]) > 3 for piece in self._reading)

    @property
    def _reading(self) -> list[Slice]:
        return [p for p in self.group.slices if p not in self.group.zeros and p.parameter in self.sums.shapes]

    @property
    def has_gradient(self) -> bool:
        """Whether a gradient of any node group has a nonzero entry."""
        return self.sums.has_gradient

    @property
    def weight_sq(self) -> Tensor:
        """``||x_g||^2`` of every atom, shape ``(size,)``."""
        return self.sums.weight_sq[self.own]

    @property
    def reader_sq(self) -> Tensor:
        """Squared norm of the weights that read each atom, shape ``(size,)``; 1 if there are none."""
        return self.sums.reader_sq[self.own]

    @property
    def gradient_sq(self) -> Tensor:
        """``||g_g||^2`` of every atom, shape ``(size,)``."""
        return self.sums.gradient_sq[self.own]

    @property
    def dot(self) -> Tensor:
        """``<x_g, g_g>`` of every atom, shape ``(size,)``."""
        return self.sums.dot[self.own]


def put_aside(
    groups: Sequence[NodeGroup], chosen: Sequence[Tensor], tensors: Mapping[str, Tensor], saved: Sequence[Tensor]
) -> dict[tuple[int, Slice], tuple[Place, Tensor]]:
    """The copied entries with their places, for :attr:`Sums.aside`.

    Args:
        groups, chosen, tensors: The arguments of :meth:`oto.optim.entries.Rows.of` with which the copies were made.
        saved: The result of :meth:`oto.optim.entries.Rows.copies`.
    """
    rest, first = iter(saved), 0
    found: dict[tuple[int, Slice], tuple[Place, Tensor]] = {}
    for number, (group, rows) in enumerate(zip(groups, chosen, strict=True)):
        for piece in group.zeros if len(rows) else ():
            place = place_of(piece, tensors[piece.parameter].detach(), rows, group.size, first)
            if place is not None:
                found[number, piece] = place, next(rest)
        first += group.size
    return found


def _with(view: Tensor, there: Place, entries: Tensor) -> Tensor:
    """A copy of a view with other entries at one place."""
    made = view.clone()
    there._replace(view=made).write_(entries)
    return made


def gradients_of(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients by name, sharded like the parameters."""
    found: dict[str, Tensor] = {}
    for name, p in parameters.items():
        if (gradient := p.grad) is not None:
            if is_sharded(p) and gradient.placements != p.placements:  # type: ignore[attr-defined]
                gradient = gradient.redistribute(placements=p.placements)  # type: ignore[attr-defined]
            found[name] = gradient
    return found
