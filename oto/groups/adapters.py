"""Find adapters: low-rank products that are added to a product with a frozen weight, ``W x + γ B (A x)``.

A weight and its adapter are one operator with the matrix ``W + γ B A``. Row ``g`` of this matrix is zero if row ``g``
of ``W`` and row ``g`` of ``B`` are zero; column ``g`` is zero if column ``g`` of ``W`` and of ``A`` are. Adapters are
found from the recorded calls, so they may come from any library. A weight may have several adapters. Adapters that
compute something else are not found, for example DoRA, which rescales the whole sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from oto._torch import OpOverload
from oto.groups.node_group import NodeGroup
from oto.trace.graph import Graph, Leaf, Node, Value

PASSING = {"to", "_to_copy", "dropout", "contiguous", "clone", "view", "reshape", "detach", "alias"}
"""Operators between a product and its operand that are skipped in the search, as none of them mixes channels."""

TURNED = {"t", "numpy_T", "transpose", "permute", "mT"}

CONVS = {"conv1d", "conv2d", "conv3d"}


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter of a frozen weight.

    Attributes:
        weight, down, up: Names of the parameters ``W``, ``A`` and ``B``; ``A`` is ``(r, in, *kernel)``, ``B`` is
            ``(out, r, ...)`` with a kernel of size 1.
        scale: ``γ``.
        turned: Whether ``W`` is ``(in, out)``, as in an embedding, and not ``(out, in, *kernel)``.
    """

    weight: str
    down: str
    up: str
    scale: float
    turned: bool

    def combined(self, up: Tensor, down: Tensor) -> Tensor:
        """``B A`` in the shape of ``W``, from tensors of the shapes of ``B`` and ``A``."""
        product = (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
        return product.t() if self.turned else product

    def product(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """``γ B A`` in the shape of ``W``."""
        return self.combined(tensors[self.up].detach(), tensors[self.down].detach()) * self.scale

    def factor(self, dim: int) -> tuple[str, int]:
        """The name of the factor that shares dimension ``dim`` of ``W``, and the index of this dimension in it."""
        return (self.up, 0) if dim == (1 if self.turned else 0) else (self.down, 1)


def adapters(graph: Graph) -> tuple[Adapter, ...]:
    """The adapters of a model, in the order of its calls.

    An adapter is left out if it belongs to a grouped convolution, if its weight is trainable, if one of its factors is
    frozen, or if its weight or a factor is tied or has another reader. Its parameters are then treated like those of
    any other layer.
    """
    return tuple(_Finder(graph).found())


def ranks_in(groups: Sequence[NodeGroup], adapters: Sequence[Adapter]) -> dict[str, None]:
    """Names of the prunable groups whose atoms are ranks of adapters."""
    ranks = {(a.down, 0) for a in adapters} | {(a.up, 1) for a in adapters}
    atoms = [g for g in groups if g.prunable and not g.segment]
    own = [g for g in atoms if any((p.parameter, p.dim) in ranks for p in g.slices)]
    return dict.fromkeys(group.name for group in own)


def halves_in(groups: Sequence[NodeGroup], adapters: Sequence[Adapter]) -> dict[str, None]:
    """Names of the segments that contain only one side of an adapter's addition: the frozen weight or the adapter."""
    found: dict[str, None] = {}
    for group in groups:
        zeros = {piece.parameter for piece in group.zeros}
        if group.segment and any((a.weight in zeros) != (a.up in zeros) for a in adapters):
            found[group.name] = None
    return found


@dataclass(frozen=True)
class _Product:
    """The product of ``weight`` and ``x``."""

    x: Value
    weight: Leaf
    turned: bool
    bias: bool


class _Finder:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.maker = {value: node for node in graph.nodes for value in node.outputs if value is not None}
        self.leaves = {leaf.value: leaf for leaf in graph.leaves if leaf.kind == "parameter"}
        self.reads: dict[Value, int] = {}
        for nodes in (graph.nodes, () if graph.trained is None else graph.trained.nodes):
            own: dict[Value, int] = {}
            for value in (value for node in nodes for value in node.inputs()):
                own[value] = own.get(value, 0) + 1
            self.reads |= {value: max(count, self.reads.get(value, 0)) for value, count in own.items()}

    def found(self) -> Iterator[Adapter]:
        for node in self.graph.nodes:
            if _called(node) == "add" and len(node.args) == 2 and all(isinstance(v, Value) for v in node.args):
                for base, added in (node.args, node.args[::-1]):
                    if (adapter := self._adapter(base, added)) is not None:
                        yield adapter
                        break

    def _adapter(self, base: Value, added: Value) -> Adapter | None:
        added, scale = self._scaled(added)
        up = self._product(added)
        down = None if up is None else self._product(self._through(up.x))
        if up is None or down is None or up.bias or down.bias or up.turned or down.turned:
            return None
        own = self._base(base, self._through(down.x))
        if own is None or own.weight.trainable or not (up.weight.trainable and down.weight.trainable):
            return None
        if not all(self._alone(product.weight) for product in (own, up, down)):
            return None
        return (
            Adapter(own.weight.name, down.weight.name, up.weight.name, scale, own.turned)
            if _fit(own, up, down)
            else None
        )

    def _base(self, value: Value, x: Value) -> _Product | None:
        """The product with ``x`` among the summands of ``value``; ``None`` if there is none."""
        value = self._through(value)
        node = self.maker.get(value)
        if node is not None and _called(node) == "add":
            terms = [term for term in node.args if isinstance(term, Value)]
            return next((product for term in terms if (product := self._base(term, x)) is not None), None)
        product = self._product(value)
        return product if product is not None and self._through(product.x) is x else None

    def _alone(self, leaf: Leaf) -> bool:
        return len(leaf.names) == 1 and self.reads.get(leaf.value, 0) == 1

    def _through(self, value: Value) -> Value:
        while (node := self.maker.get(value)) is not None and _called(node) in PASSING:
            value = next(node.inputs())
        return value

    def _scaled(self, value: Value) -> tuple[Value, float]:
        """The value before its multiplications with and divisions by numbers, and the resulting factor."""
        scale, value = 1.0, self._through(value)
        while (node := self.maker.get(value)) is not None and _called(node) in ("mul", "div"):
            first, second = node.args[:2]
            if not isinstance(first, Value) or not isinstance(second, int | float):
                break
            scale, value = scale * second if _called(node) == "mul" else scale / second, self._through(first)
        return value, scale

    def _product(self, value: Value) -> _Product | None:
        node = self.maker.get(value)
        if node is None or (operands := _operands(node)) is None:
            return None
        x, weight, turned, bias = operands
        turner = self.maker.get(weight)
        if turned and turner is not None and _called(turner) in TURNED:
            weight, turned = next(turner.inputs()), False
        leaf = self.leaves.get(weight)
        return None if leaf is None else _Product(x, leaf, turned, bias)


def _operands(node: Node) -> tuple[Value, Value, bool, bool] | None:
    """Input and weight of a product, whether the weight is ``(in, out)``, and whether it has a bias; ``None`` for other
    calls."""
    name, args = _called(node), node.args
    if name == "linear" or (name in CONVS and _whole(node)):
        return args[0], args[1], False, len(args) > 2 and args[2] is not None
    if name in ("matmul", "mm"):
        return args[0], args[1], True, False
    if name == "addmm":
        return args[1], args[2], True, True
    return (args[1], args[0], True, False) if name == "embedding" else None


def _whole(conv: Node) -> bool:
    """Whether a convolution has a single group."""
    groups = conv.args[6] if len(conv.args) > 6 else conv.kwargs.get("groups", 1)
    return bool(groups == 1)


def _fit(base: _Product, up: _Product, down: _Product) -> bool:
    """Whether ``B A`` has the shape of ``W``."""
    shape = (up.weight.value.shape[0], *down.weight.value.shape[1:])
    fitting = up.weight.value.shape[1] == down.weight.value.shape[0] and set(up.weight.value.shape[2:]) <= {1}
    return fitting and base.weight.value.shape == (shape[::-1] if base.turned else shape)


def _called(node: Node) -> str:
    """The operator's name without its overload; empty for other functions."""
    op: Callable[..., Any] = node.op
    return op.overloadpacket.__name__ if isinstance(op, OpOverload) else ""
