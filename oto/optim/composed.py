"""A weight and its adapters as one operator, ``W + γ B A``: its entries by group, and moving them into the weight."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar, overload

from torch import Tensor

from oto.groups.adapters import Adapter
from oto.groups.node_group import NodeGroup, Slice, clear_
from oto.optim.entries import sent
from oto.optim.saliency import Entries

T = TypeVar("T")


class OnDemand(Sequence[T]):
    """Items that are made as they are asked for, and not kept: each is as large as a weight."""

    def __init__(self, makers: Sequence[Callable[[], T]]) -> None:
        self.makers = makers

    def __len__(self) -> int:
        return len(self.makers)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        return self.makers[index]() if isinstance(index, int) else OnDemand(self.makers[index])


@dataclass(frozen=True)
class Composed:
    """The operators of a model that have adapters.

    Attributes:
        adapters: All adapters of the model.
    """

    adapters: tuple[Adapter, ...]

    @cached_property
    def _by_weight(self) -> dict[str, list[Adapter]]:
        found: dict[str, list[Adapter]] = {}
        for adapter in self.adapters:
            found.setdefault(adapter.weight, []).append(adapter)
        return found

    def pairs(self, group: NodeGroup) -> Iterator[tuple[Slice, Adapter, Slice]]:
        """Slices of weights that are zeroed, each with an adapter, and the slice of its factor for the same atoms."""
        for piece in group.zeros:
            for adapter in self._by_weight.get(piece.parameter, ()):
                name, dim = adapter.factor(piece.dim)
                for other in group.slices:
                    if (other.parameter, other.dim, other.cuts) == (name, dim, piece.cuts):
                        yield piece, adapter, other
                        break

    def operators(self, group: NodeGroup) -> NodeGroup:
        """The group without slices of factors: they are a part of the weights that they are added to."""
        parts = [factor for _, _, factor in self.pairs(group)]
        slices, zeros = (tuple(p for p in own if p not in parts) for own in (group.slices, group.zeros))
        return replace(group, slices=slices, zeros=zeros)

    def entries_of(self, group: NodeGroup, parameters: Mapping[str, Tensor], maximized: Container[str]) -> Entries:
        """What criteria see: ``W + γ B A``, and for its gradient ``∂B A + B ∂A``, along which a step of descent in the
        factors moves their product (LoRAPrune, arXiv 2305.18403, equation 9, without the term of second order)."""
        alone = self.operators(group)
        plain = Entries.of(alone, parameters, maximized)
        paired = {piece for piece, _, _ in self.pairs(group)}

        def operator(piece: Slice) -> Tensor:
            own = parameters[piece.parameter].detach()
            return piece.of(sum((a.product(parameters).to(own.dtype) for a in self._by_weight[piece.parameter]), own))

        def gradient(piece: Slice) -> Tensor | None:
            found = [own for a in self._by_weight[piece.parameter] if (own := _gradient(a, parameters)) is not None]
            sign = -1 if self._by_weight[piece.parameter][0].up in maximized else 1
            return piece.of(sum(found[1:], found[0]) * sign) if found else None

        def of(make: Callable[[Slice], Any], given: Sequence[Any]) -> OnDemand[Any]:
            pairs = zip(alone.zeros, given, strict=True)
            return OnDemand([partial(make, piece) if piece in paired else partial(_same, own) for piece, own in pairs])

        return replace(plain, weights=of(operator, plain.weights), gradients=of(gradient, plain.gradients))

    def absorb_(self, groups: Sequence[NodeGroup], rows: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Move what the adapters add for some atoms into the weights; the operators stay what they are.

        Args:
            groups: Node groups.
            rows: For each, the atoms, sorted int64 indices.
        """
        for group, atoms in zip(groups, rows, strict=True):
            for piece, adapter, factor in self.pairs(group) if len(atoms) else ():
                weight = piece.of(parameters[adapter.weight].detach())
                added = piece.of(adapter.product(parameters))
                own = sent(atoms, weight.device)
                weight.index_add_(0, own, added.index_select(0, own).to(weight.dtype))
                clear_(factor.of(parameters[factor.parameter].detach()), own)


def _same(given: T) -> T:
    return given


def _gradient(adapter: Adapter, parameters: Mapping[str, Tensor]) -> Tensor | None:
    up, down = parameters[adapter.up], parameters[adapter.down]
    if up.grad is None or down.grad is None:
        return None
    return adapter.combined(up.grad, down.detach()) + adapter.combined(up.detach(), down.grad)
