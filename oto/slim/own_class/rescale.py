"""Fold the count that a norm or a mean divides by into the weights that follow, so that the class need not change.

With k of D entries kept and the others zero, a class that divides by k computes a mean that is D/k times too large.
The factor is followed through the graph: sums and casts keep it, roots and powers raise it to a power, a small
constant that is added has to grow with it, and a product with a parameter can undo it. So an RMS norm over k entries,
with weight ``w·√(D/k)`` and epsilon ``ε·D/k``, equals the one over D:

    x / √(Σx²/k + ε·D/k) · w·√(D/k)  =  x / √(Σx²/D + ε) · w

This holds for any implementation, whether it multiplies by ``w`` or by ``1 + w``. A factor that no parameter can undo
is not folded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any

import torch

from oto._torch import tree_leaves
from oto.axes.call import Size
from oto.axes.terms import Term, resolve
from oto.groups import Partition
from oto.nn import functional as full_count
from oto.slim.own_class.adaptation import Folded, Rescale
from oto.slim.own_class.attributes import SizeAttribute
from oto.trace.graph import Graph, Leaf, Node, Value

aten = torch.ops.aten


@dataclass(frozen=True)
class Uses:
    """Which call makes each tensor, and which calls read it."""

    maker: Mapping[Value, Node]
    readers: Mapping[Value, list[Node]]

    @classmethod
    def of(cls, graph: Graph) -> Uses:
        readers: dict[Value, list[Node]] = {}
        for node in graph.nodes:
            for value in dict.fromkeys(node.inputs()):
                readers.setdefault(value, []).append(node)
        return cls({value: node for node in graph.nodes for value in node.outputs if value is not None}, readers)


def folded(partition: Partition, index: int, uses: Uses) -> Folded | None:
    """How to fold the count of a call into parameters; ``None`` if that is impossible."""
    return _Following(partition, index, uses).result()


# How the result of an operator scales when its first argument does: by the same factor, by the same factor if the
# constant is scaled too, or by a power of the factor.
_KEEPS = {
    aten._to_copy,
    aten.to,
    aten.view,
    aten.reshape,
    aten.unsqueeze,
    aten.squeeze,
    aten.expand,
    aten.expand_as,
    aten.clone,
    aten.contiguous,
    aten.alias,
    aten.neg,
    aten.permute,
    aten.transpose,
    aten.slice,
    aten.select,
    aten.sum,
    aten.abs,
    aten.relu,
    aten.flatten,
    aten.lift_fresh,
    aten.dropout,
    aten.detach,
    aten.adaptive_avg_pool2d,
    aten.avg_pool2d,
    aten.max_pool2d,
}
_GROWS = {aten.add, aten.sub, aten.clamp_min, aten.clamp}
_POWERS = {aten.rsqrt: -0.5, aten.sqrt: 0.5, aten.reciprocal: -1.0, aten.square: 2.0}


class _Following:
    """Follows the factor through the graph.

    Attributes:
        power: For each tensor, the power of D/k by which the thinner class's value exceeds the full model's.
    """

    def __init__(self, partition: Partition, index: int, uses: Uses) -> None:
        self.partition, self.index, self.uses = partition, index, uses
        self.graph = partition.found.graph
        self.power: dict[Value, float] = {}
        self.scales: list[Rescale] = []
        self.scalars: dict[int, SizeAttribute] = {}
        self.leaves = {leaf.value: leaf for leaf in self.graph.leaves}
        self.term: Term = ()

    def result(self) -> Folded | None:
        if not self.begin():
            return None
        ahead = [reader.index for value in self.power for reader in self.uses.readers.get(value, ())]
        done: set[int] = set()
        heapify(ahead)
        while ahead:  # in the order of the calls
            after = self.graph.nodes[heappop(ahead)]
            if after.index in done:
                continue
            done.add(after.index)
            if not self.through(after):
                return None
            for value in after.outputs:
                if value is not None and self.power[value]:
                    for reader in self.uses.readers.get(value, ()):
                        heappush(ahead, reader.index)
        if any(self.power.get(value) for value in self.graph.outputs):
            return None
        return Folded(tuple(self.scales), self.scalars) if self.scales else None

    def begin(self) -> bool:
        """Set the factor of the call's own result; ``False`` if the factor cannot be followed."""
        node = self.graph.nodes[self.index]
        rewrite = self.partition.found.tape.rewrites[self.index]
        if rewrite.op is full_count.mean and "rest" not in rewrite.kwargs:
            self.term = tuple(f for size in rewrite.kwargs["sizes"] for f in resolve(size.term))
            self.power[_output(node)] = 1.0
            return True
        eps = rewrite.kwargs.get("eps")
        if rewrite.op is not full_count.rms_norm or eps is None:  # torch then uses the eps of the dtype
            return False
        self.term = tuple(f for size in rewrite.args[1] for f in resolve(size.term))
        self.scalars[self.index] = SizeAttribute(self.term, eps, 1.0)
        weight = rewrite.kwargs.get("weight")
        if weight is None:
            self.power[_output(node)] = -0.5
        return weight is None or self.undo(weight, -0.5)

    def through(self, node: Node) -> bool:
        """Follow the factor through a call; ``False`` if that is impossible."""
        made = self.made(node, list(node.inputs()), list(node.args))
        if made is None or node.written:
            return False
        self.power.update((value, made) for value in node.outputs if value is not None)
        return True

    def made(self, node: Node, tensors: list[Value], args: list[Any]) -> float | None:
        """The power of D/k by which a call's result is scaled; ``None`` if it is not simply scaled."""
        op = getattr(node.op, "overloadpacket", None)
        powers = [self.power.get(value, 0.0) for value in tensors]
        number = args[1] if len(tensors) == 1 and len(args) == 2 and isinstance(args[1], int | float) else None
        if op is aten.type_as and not any(powers[1:]):
            return powers[0]
        if len(tensors) == 1:
            if op in _KEEPS or (op in (aten.mul, aten.div) and isinstance(args[0], Value)):
                return powers[0]
            if op in _POWERS:
                return powers[0] * _POWERS[op]
            if op is aten.pow and number is not None:
                return powers[0] * number
            if op in _GROWS and isinstance(number, float) and not node.kwargs:
                self.scalars[node.index] = SizeAttribute(self.term, number, powers[0])
                return powers[0]
        elif op in (aten.add, aten.sub) and powers[0] == powers[1] and not node.kwargs:
            return powers[0]
        elif op is aten.div:
            return powers[0] - powers[1]
        elif op is aten.mul:
            plain = [value for value, power in zip(tensors, powers, strict=True) if not power]
            return 0.0 if any(self.undo(value, sum(powers)) for value in plain) else sum(powers)
        elif op is aten.linear and not any(powers[1:]) and self.undo(tensors[1], powers[0]):
            return 0.0
        return None

    def undo(self, value: Value, power: float) -> bool:
        """Fold the inverse of a factor into a parameter ``w``, if the tensor is ``w``, a cast of it, or ``1 + w``."""
        offset = 0.0
        seen = value
        while seen not in self.leaves:
            maker = self.uses.maker.get(seen)
            op = getattr(maker.op, "overloadpacket", None) if maker is not None else None
            cast = maker is not None and op is aten.type_as
            if maker is None or len(self.readers(seen)) != 1 or not (cast or len(list(maker.inputs())) == 1):
                return False
            if op is aten.add and isinstance(maker.args[1], int | float) and not offset and not maker.kwargs:
                offset = float(maker.args[1])
            elif op not in _KEEPS and not cast:
                return False
            seen = next(maker.inputs())
        leaf: Leaf = self.leaves[seen]
        if leaf.kind != "parameter" or len(self.readers(seen)) != 1:
            return False
        self.scales.append(Rescale(leaf.name, self.term, -power, offset))
        return True

    def readers(self, value: Value) -> list[Node]:
        return self.uses.readers.get(value, [])


def _output(node: Node) -> Value:
    (value,) = (v for v in node.outputs if v is not None)
    return value


def sizes_in(template: Any) -> list[Size]:
    """The sizes among the arguments of a rewrite."""
    return [x for x in tree_leaves(template) if isinstance(x, Size)]
