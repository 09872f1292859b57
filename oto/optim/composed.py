"""Handle a weight and its adapters as one operator, ``W + γ B A``: score its entries, and merge it into the weight."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar, overload

from torch import Tensor

from oto.groups.adapters import Adapter
from oto.groups.node_group import NodeGroup, Slice
from oto.optim.entries import place_of, zero_
from oto.optim.saliency import Entries
from oto.optim.sums import Sums, gradients_of
from oto.shards import Sharding, gathered_tensor

T = TypeVar("T")


class OnDemand(Sequence[T]):
    """A sequence whose items are computed on each access and not cached, since each is as large as a weight."""

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
        """Each zeroed slice of a weight with an adapter, the adapter, and the slice of its factor with the same
        atoms."""
        for piece in group.zeros:
            for adapter in self._by_weight.get(piece.parameter, ()):
                name, dim = adapter.factor(piece.dim)
                for other in group.slices:
                    if (other.parameter, other.dim, other.cuts) == (name, dim, piece.cuts):
                        yield piece, adapter, other
                        break

    def operators(self, group: NodeGroup) -> NodeGroup:
        """The group without slices of adapter factors, which are handled together with their weights."""
        parts = [factor for _, _, factor in self.pairs(group)]
        slices, zeros = (tuple(p for p in own if p not in parts) for own in (group.slices, group.zeros))
        return replace(group, slices=slices, zeros=zeros)

    def entries_of(self, group: NodeGroup, parameters: Mapping[str, Tensor], maximized: Container[str]) -> Entries:
        """The entries that criteria read: those of ``W + γ B A``, with the gradient ``∂B A + B ∂A``.

        This is the direction in which a descent step in the factors moves their product (LoRAPrune, arXiv 2305.18403,
        equation 9, without the second-order term).
        """
        alone = self.operators(group)
        plain = Entries.of(alone, parameters, maximized)
        if not group.size:  # it was removed with a segment
            return plain
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
        """Merge the adapters' part of some atoms into the weights, and zero it in a factor; the operators do not
        change.

        Args:
            groups: Node groups.
            rows: For each group, the atoms, sorted int64 indices.
        """
        for group, atoms in zip(groups, rows, strict=True):
            for piece, adapter, factor in self.pairs(group) if len(atoms) else ():
                weight = parameters[adapter.weight].detach()
                added = spread_product(adapter, parameters)
                there, beside = (place_of(piece, tensor, atoms, group.size, 0) for tensor in (weight, added))
                if there is not None and beside is not None:
                    there.write_(there.read() + beside.read().to(weight.dtype))
                cleared = place_of(factor, parameters[factor.parameter].detach(), atoms, group.size, 0)
                zero_([] if cleared is None else [cleared])

    # Parameters that are sharded over processes ------------------------------------------------------------------

    def sums(
        self, groups: Sequence[NodeGroup], parameters: Mapping[str, Tensor], maximized: Container[str], device: Any
    ) -> Sums:
        """The sums that criteria read if parameters are sharded over processes; see :meth:`entries_of`."""
        paired = {piece.parameter for group in groups for piece, _, _ in self.pairs(group)}
        own = [self.operators(group) for group in groups]
        gradients: dict[str, Callable[[], Tensor]] = {
            name: partial(_same, gradient) for name, gradient in gradients_of(parameters).items() if name not in paired
        }
        signs = {name for name in parameters if name in maximized and name not in paired}
        for name in paired:
            signs |= {name} if self._by_weight[name][0].up in maximized else set()
            trained = [a for a in self._by_weight[name] if _has_gradient(a, parameters)]
            if trained:
                gradients[name] = partial(_spread_gradient, trained, parameters)
        weights = {
            name: partial(_spread_operator, self._by_weight[name], parameters) if name in paired else partial(_same, p)
            for name, p in parameters.items()
        }
        seen = Looked(weights), Looked(gradients)
        return Sums.of(own, parameters, weights=seen[0], gradients=seen[1], maximized=signs, device=device)


class Looked(Mapping[str, Tensor]):
    """A mapping whose tensors are computed on each access and not cached, since each is as large as a weight."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self.makers = makers

    def __len__(self) -> int:
        return len(self.makers)

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __contains__(self, name: object) -> bool:
        return name in self.makers

    def __getitem__(self, name: str) -> Tensor:
        return self.makers[name]()


def spread_product(adapter: Adapter, parameters: Mapping[str, Tensor]) -> Tensor:
    """``γ B A``, sharded like ``W``: the small factors are gathered, and each process computes its part."""
    up, down, weight = (parameters[name].detach() for name in (adapter.up, adapter.down, adapter.weight))
    return _spread(adapter, up, down, weight) * adapter.scale


def _spread(adapter: Adapter, up: Tensor, down: Tensor, weight: Tensor) -> Tensor:
    """``B A``, sharded like ``W``."""
    sharding = Sharding.of(weight)
    factors = {adapter.up: gathered_tensor(up), adapter.down: gathered_tensor(down)}
    for dim in range(weight.dim()) if sharding is not None else ():
        name, own = adapter.factor(dim) if dim < 2 else (adapter.down, dim)
        if sharding is not None and sharding.parts(dim):
            index = sharding.index(dim, weight.dim(), weight.shape[dim]).to(factors[name].device)
            factors[name] = factors[name].index_select(own, index)
    made = adapter.combined(factors[adapter.up], factors[adapter.down])
    return made if sharding is None else sharding.spread(made, weight)


def _spread_operator(adapters: Sequence[Adapter], parameters: Mapping[str, Tensor]) -> Tensor:
    own = parameters[adapters[0].weight].detach()
    total = own
    for adapter in adapters:
        total = total + spread_product(adapter, parameters).to(own.dtype)
    return total


def _spread_gradient(adapters: Sequence[Adapter], parameters: Mapping[str, Tensor]) -> Tensor:
    total: Tensor | None = None
    for adapter in adapters:
        up, down, weight = (parameters[name] for name in (adapter.up, adapter.down, adapter.weight))
        assert up.grad is not None and down.grad is not None
        pairs = (up.grad.detach(), down.detach()), (up.detach(), down.grad.detach())
        first, second = (_spread(adapter, *pair, weight.detach()) for pair in pairs)
        total = first + second if total is None else total + first + second
    assert total is not None
    return total


def _has_gradient(adapter: Adapter, parameters: Mapping[str, Tensor]) -> bool:
    return parameters[adapter.up].grad is not None and parameters[adapter.down].grad is not None


def _same(given: T) -> T:
    return given


def _gradient(adapter: Adapter, parameters: Mapping[str, Tensor]) -> Tensor | None:
    up, down = parameters[adapter.up], parameters[adapter.down]
    if up.grad is None or down.grad is None:
        return None
    return adapter.combined(up.grad, down.detach()) + adapter.combined(up.detach(), down.grad)
