"""What reads an axis with a weight, and could therefore take over what its removed atoms carried.

A *reader* is a weight that some calls contract with computed tensors: ``y = W x``. Where entries of ``x`` go, the
others can be made to stand for them, ``x_gone ≈ B x_kept + c``, and ``W`` takes that over (``optim/compensate.py``).
Found from the graph alone: every step of the tape that sums over letters which one computed tensor and one tensor of
parameters share is such a product, be it a linear layer, a convolution of any kind or an einsum. No weight is looked
at.

What cannot be taken over is told, each with its reason:

* A norm or a mean over the axis: without the atom it gives other numbers for all that stay.
* A weight that is computed (a low-rank product, a dequantized or normalized one), or read in another role too, as a
  table of embeddings that is tied to the output layer: to change it would change something else.
* A weight that is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oto._torch import tree_leaves, tree_map_only
from oto.axes.call import Step
from oto.axes.terms import Axis, Term, axes_of, resolve, size_of, survivors
from oto.groups.node_group import NodeGroup
from oto.groups.partition import Partition
from oto.trace.graph import Leaf, Node, Value

PART = 2**23
"""Entries of an unrolled convolution's input that are held at one time, where one image has no more."""


@dataclass(frozen=True)
class Layout:
    """How a tensor is seen as ``(*batch, *rest, *kernel, *contracted)``.

    Dimensions are counted from the end, so that a tensor with more or fewer leading ones is seen alike.

    Attributes:
        splits: Dimensions that are products, outermost first, with the sizes of their factors.
        batch: Dimensions that both factors and the result have, after the splits: groups of a convolution, experts.
        kernel: Dimensions of a weight that are summed over, but not with the tensor: the kernel of a convolution.
        contracted: Dimensions that are summed over together.
    """

    splits: tuple[tuple[int, tuple[int, ...]], ...]
    batch: tuple[int, ...]
    kernel: tuple[int, ...]
    contracted: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """The view."""
        for dim, sizes in self.splits:
            tensor = tensor.unflatten(dim, sizes)
        named = {*self.batch, *self.kernel, *self.contracted}
        rest = [d for d in range(-tensor.ndim, 0) if d not in named]
        return tensor.permute(*self.batch, *rest, *self.kernel, *self.contracted)

    def rows(self, tensor: Tensor) -> Tensor:
        """``(batch, rows, contracted)``, with dimensions of several in one; a copy where it has to be."""
        view = self.of(tensor)
        batch, last = len(self.batch), view.ndim - len(self.contracted)
        return view.reshape(prod(view.shape[:batch]), prod(view.shape[batch:last]), prod(view.shape[last:]))


@dataclass(frozen=True)
class Window:
    """How a convolution slides, for each dimension of its kernel, and its groups."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def size(self) -> int:
        """Entries of the kernel."""
        return prod(self.kernel)

    def rows(self, x: Tensor) -> Tensor:
        """What each place of the output meets of ``x (N, C, *size)``: ``(groups, places, C / groups · kernel)``."""
        n = len(self.kernel)
        x = torch.nn.functional.pad(x, [pad for by in reversed(self.padding) for pad in (by, by)])
        for dim, (k, by, apart) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), 2):
            x = x.unfold(dim, (k - 1) * apart + 1, by)[..., ::apart]
        x = x.unflatten(1, (self.groups, x.shape[1] // self.groups))
        x = x.permute(1, 0, *range(3, 3 + n), 2, *range(3 + n, 3 + 2 * n))  # (groups, N, *places, channels, *kernel)
        return x.reshape(self.groups, prod(x.shape[1 : 2 + n]), prod(x.shape[2 + n :]))


@dataclass(frozen=True, eq=False)
class Use:
    """A call that contracts a weight with a computed tensor.

    Attributes:
        node: The call.
        source: The tensor that it reads.
        place: Which of the tensors among its arguments that is, and which is the weight.
        layout: How the tensor is seen.
        window: How the weight slides along it, if it is the kernel of a convolution.
        unrolled: Whether a row is all that the kernel meets at a place, and not a pixel.
    """

    node: Node
    source: Value
    place: tuple[int, int]
    layout: Layout
    window: Window | None = None
    unrolled: bool = False

    def rows(self, tensor: Tensor) -> Iterator[Tensor]:
        """What it reads of its tensor, ``(batch, rows, n)``; unrolled, in parts of a size that memory can bear."""
        if not self.unrolled or self.window is None:
            yield self.layout.rows(tensor)
        else:
            images = tensor if tensor.ndim == len(self.window.kernel) + 2 else tensor.unsqueeze(0)
            for part in images.split(max(1, PART // max(1, images[:1].numel() * self.window.size))):
                yield self.window.rows(part)


@dataclass(frozen=True, eq=False)
class Reader:
    """A weight that reads entries of an axis, or of several.

    Attributes:
        parameter: Its name.
        path: Views that lead from the parameter to the weight, each with the place among the results.
        layout: How the weight is seen; its contracted entries are those of ``term``.
        term: What the entries that it reads are made of.
        groups: The prunable node groups in that.
        uses: The calls that read with it. All that they read counts.
        each: How many entries of each row there are for one of the term: those of an unrolled kernel.
        shift: Where a constant may be added to what it gives: the name of a bias and 1, or of the running mean of the
            norm behind it and -1.
    """

    parameter: str
    path: tuple[tuple[Node, int], ...]
    layout: Layout
    term: Term
    groups: tuple[str, ...]
    uses: tuple[Use, ...]
    shift: tuple[str, int] | None = None
    each: int = 1

    @property
    def sources(self) -> tuple[tuple[Value, Layout, Window | None], ...]:
        """What it reads: readers that read the same share their statistics."""
        return tuple((use.source, use.layout, use.window if use.unrolled else None) for use in self.uses)

    @property
    def width(self) -> int:
        """Entries that each row of it reads."""
        return size_of(self.term) * self.each

    @property
    def unrolled(self) -> Reader:
        """The same, with the kernel of a convolution as entries: what it gives is then linear in a row, border and all.

        It is itself where it slides along nothing.
        """
        kernels = {use.window.size if use.window is not None else 1 for use in self.uses}
        if kernels == {1} or len(kernels) > 1 or self.each > 1:
            return self
        layout = replace(self.layout, kernel=(), contracted=(*self.layout.contracted, *self.layout.kernel))
        uses = tuple(replace(use, unrolled=True) for use in self.uses)
        return replace(self, layout=layout, uses=uses, each=kernels.pop())

    def survivors(self, kept: Mapping[Axis, NDArray[np.bool_]]) -> NDArray[np.bool_]:
        """Which of the entries that it reads survive, as :func:`oto.axes.terms.survivors` has it."""
        return np.repeat(survivors(self.term, kept), self.each)

    def entries(self, axis: Axis) -> NDArray[np.int64]:
        """The entries that each atom of an axis in its term has, shape ``(atoms, entries of each)``."""
        atoms = _atoms(self.term, axis)
        order = np.argsort(atoms, kind="stable")
        entries = order[np.count_nonzero(atoms < 0) :].reshape(axis.size, -1, 1)
        unrolled: NDArray[np.int64] = entries * self.each + np.arange(self.each)
        return unrolled.reshape(axis.size, -1)

    def weight(self, parameter: Tensor) -> Tensor:
        """The weight, as the calls get it; a view of the parameter."""
        view = parameter.detach()
        for node, place in self.path:
            view = _called(node, view, place)
        return view


@dataclass(frozen=True, eq=False)
class Readers:
    """All readers of a network.

    Attributes:
        found: In the order of the calls.
        reasons: For groups of which something cannot be taken over, or nothing, why.
    """

    found: tuple[Reader, ...]
    reasons: dict[str, tuple[str, ...]]

    def of(self, groups: Collection[str]) -> list[Reader]:
        """The readers of some groups."""
        return [reader for reader in self.found if any(name in groups for name in reader.groups)]


def readers(partition: Partition, groups: Iterable[NodeGroup], frozen: bool = False) -> Readers:
    """Find the readers of all prunable node groups.

    Args:
        groups: Node groups, after what users said of them.
        frozen: Whether frozen weights may be changed.
    """
    return _Search(partition, [group.name for group in groups if group.prunable], frozen).result()


@dataclass(eq=False)
class _Weight:
    """A weight in the making: where it lies in its parameter, and the calls that read with it."""

    leaf: Leaf
    path: tuple[tuple[Node, int], ...]
    layout: Layout
    term: Term
    shift: tuple[str, int] | None
    uses: list[Use] = field(default_factory=list)


class _Search:
    def __init__(self, partition: Partition, names: Collection[str], frozen: bool) -> None:
        self.partition, self.frozen = partition, frozen
        self.found, self.graph = partition.found, partition.found.graph
        self.names: dict[Axis, str] = {partition.axes[name]: name for name in names}
        self.reasons: dict[str, dict[str, None]] = {name: {} for name in names}
        self.summed: set[Axis] = set()
        self.maker = {step.output: step for step in self.found.tape.steps}
        self.made = {v: (node, i) for node in self.graph.calls for i, v in enumerate(node.outputs) if v is not None}
        self.leaves = {leaf.value: leaf for leaf in self.graph.leaves}
        self.users: dict[Value, list[Node]] = {}
        for node in self.graph.nodes:  # what only training does besides is no part of what is to stay
            for value in node.inputs():
                self.users.setdefault(value, []).append(node)
        self.dynamic = self._dynamic()
        self.weights: dict[tuple[str, object], _Weight] = {}

    def result(self) -> Readers:
        nodes = len(self.graph.nodes)
        for step in self.found.tape.steps:
            read = [self._free(step, group) for group in step.summed]
            if any(read) and step.node < nodes:
                axes = dict.fromkeys(axis for some in read for axis in some)
                why = self._add(step)
                for axis in axes if why else ():
                    self._refuse(axis, f"{self.graph.calls[step.node]}: {why}")
        made = [reader for found in self.weights.values() if (reader := self._reader(found)) is not None]
        for axis, name in self.names.items():
            if axis not in self.summed and not self.reasons[name] and not any(name in r.groups for r in made):
                self._refuse(axis, "no weight reads it")
        order = sorted(made, key=lambda reader: reader.uses[0].node.index)
        return Readers(tuple(order), {name: tuple(why) for name, why in self.reasons.items() if why})

    def _refuse(self, axis: Axis, why: str) -> None:
        self.reasons[self.names[axis]].setdefault(why)

    def _dynamic(self) -> list[bool]:
        """Which tensors depend on the inputs."""
        dynamic = [False] * len(self.found.tape.tensors)
        runs = [self.graph] if self.graph.trained is None else [self.graph, self.graph.trained]
        for value in (value for run in runs for value in run.inputs):
            dynamic[self.found.operands[value].index] = True
        for step in self.found.tape.steps:
            dynamic[step.output] = any(dynamic[i] for i in step.inputs)
        return dynamic

    def _free(self, step: Step, group: tuple[tuple[int, int], ...]) -> list[Axis]:
        terms = (self.found.tape.tensors[step.inputs[i]][dim] for i, dim in group)
        return [axis for term in terms for axis in axes_of(resolve(term)) if axis in self.names]

    # --- products -----------------------------------------------------------------------------------------------------

    def _add(self, step: Step) -> str | None:
        """Take a step down as the use of a weight; the reason if it is none."""
        data = [i for i, tensor in enumerate(step.inputs) if self.dynamic[tensor]]
        if step.volume is None and len(step.inputs) > 1:
            return "a step of time, of which the next one reads"
        if step.volume is None:
            if data:
                self.summed.update(axis for group in step.summed for axis in self._free(step, group))
                return "it sums over the entries without a weight, so what stays is changed when some go"
            return "weights are computed from weights"
        if len(data) != 1 or len(step.inputs) != 2:
            return "a product of two computed tensors" if data else "weights are computed from weights"
        return self._product(step, data[0], 1 - data[0])

    def _product(self, step: Step, x: int, w: int) -> str | None:
        node, tape = self.graph.calls[step.node], self.found.tape
        values = list(node.inputs())
        places = {self.found.operands[value].index: i for i, value in enumerate(values)}
        both = [dict(group) for group in step.summed if len(group) == 2]
        pairs = [(own[x], own[w]) for own in both]
        target = {out: dim for dim, (out,) in self._passing(step, w)}
        batch = [
            (dim, target[out])
            for dim, (out,) in self._passing(step, x)
            if out in target
            and all(size_of(tape.tensors[step.inputs[i]][d]) > 1 for i, d in ((x, dim), (w, target[out])))
        ]
        alone = [dim for group in step.summed if len(group) == 1 for i, dim in group if i == w]
        wanted: tuple[tuple[int, tuple[list[int], list[int], list[int]]], ...] = (
            (x, ([d for d, _ in batch], [], [d for d, _ in pairs])),
            (w, ([d for _, d in batch], alone, [d for _, d in pairs])),
        )
        layouts, operands = [], []
        for i, dims in wanted:
            walked = self._walk(step.inputs[i], step.node, places)
            layout = None if walked is None else _layout(values[walked[0]].shape, walked[1], *dims)
            if walked is None or layout is None:
                return "it rearranges what it multiplies in a way that cannot be followed"
            layouts.append(layout)
            operands.append(walked[0])
        found = self._weight(values[operands[1]])
        if isinstance(found, str):
            return found
        leaf, path = found
        term = tuple(f for d, _ in pairs for f in resolve(tape.tensors[step.inputs[x]][d]))
        key = leaf.name, _lies(leaf, path)
        use = Use(node, values[operands[0]], (operands[0], operands[1]), layouts[0], _window(node))
        shift = self._shift(step, w, node, values[operands[1]])
        own = self.weights.setdefault(key, _Weight(leaf, path, layouts[1], term, shift))
        if (own.layout, own.term) != (layouts[1], term):
            return f"{leaf.name} is read in two ways"
        own.shift = own.shift if own.shift == shift else None
        own.uses.append(use)
        return None

    def _passing(self, step: Step, i: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        return ((dim, out) for dim, out in enumerate(step.routes[i]) if len(out) == 1)

    def _walk(
        self, index: int, node: int, places: dict[int, int]
    ) -> tuple[int, list[Callable[[Tensor], Tensor]]] | None:
        """Back from a factor to the argument that it is a rearrangement of, and the rearrangements in their order."""
        moves: list[Callable[[Tensor], Tensor]] = []
        while index not in places:
            step = self.maker.get(index)
            if step is None or step.node != node or len(step.inputs) != 1 or step.summed or step.volume is not None:
                return None
            move = self._move(step)
            if move is None:
                return None
            moves.insert(0, move)
            index = step.inputs[0]
        return places[index], moves

    def _move(self, step: Step) -> Callable[[Tensor], Tensor] | None:
        before, after = (tuple(map(size_of, self.found.tape.tensors[i])) for i in (step.inputs[0], step.output))
        if prod(before) != prod(after):
            return None
        (routes,) = step.routes
        going = [out for n, out in zip(before, routes, strict=True) if n > 1]
        if all(out for out in going) and all(a[-1] <= b[0] for a, b in pairwise(going)):
            return lambda t: t.view(after)
        if len(before) == len(after) and all(len(out) == 1 for out in routes):
            order = sorted(range(len(before)), key=lambda dim: routes[dim])
            return lambda t: t.permute(order)
        return None

    # --- weights ------------------------------------------------------------------------------------------------------

    def _weight(self, value: Value) -> tuple[Leaf, tuple[tuple[Node, int], ...]] | str:
        """The parameter that a factor is a view of, and the views; the reason if it is none."""
        path: list[tuple[Node, int]] = []
        while value not in self.leaves:
            node, place = self.made.get(value, (None, 0))
            inputs = [] if node is None else list(node.inputs())
            if node is None or len(inputs) != 1 or not _is_view(node):
                return "its weight is computed, or written to"
            path.insert(0, (node, place))
            value = inputs[0]
        leaf = self.leaves[value]
        if leaf.kind != "parameter" or not leaf.value.dtype.is_floating_point:
            return "its weight is no parameter of real numbers"
        if leaf.frozen and not self.frozen:
            return f"{leaf.name} is frozen"
        return leaf, tuple(path)

    def _shift(self, step: Step, w: int, node: Node, weight: Value) -> tuple[str, int] | None:
        """Where a constant can be added to the result, if every entry of that meets every entry of its row."""
        sizes = [size_of(term) for term in self.found.tape.tensors[step.inputs[w]]]
        met = prod(n for n, out in zip(sizes, step.routes[w], strict=True) if not out)
        rows, out = prod(sizes) // met, prod(size_of(term) for term in self.found.tape.tensors[step.output])
        if prod(map(size_of, step.volume or ())) != out * met or {"alpha", "beta"} & set(node.kwargs):
            return None
        held = [self.leaves[v] for v in node.inputs() if v is not weight and v in self.leaves]
        if held:
            return (held[0].name, 1) if len(held) == 1 and self._may_shift(held[0], rows) else None
        made = node.outputs[0]
        return None if made is None else self._behind(made, rows)

    def _behind(self, made: Value, rows: int) -> tuple[str, int] | None:
        """A bias that is added right behind, or the running mean of a batch norm."""
        users = self.users.get(made, [])
        if len(users) != 1 or made in self.graph.outputs:
            return None
        (node,) = users
        given = _arguments(node)
        if "batch_norm" in node.name and given.get("input") is made:
            leaf = self.leaves.get(given.get("running_mean"))  # type: ignore[arg-type]
            if leaf is not None and leaf.kind == "buffer" and leaf.value.shape == (rows,) and leaf.names:
                return (leaf.name, -1) if self._alone(leaf) else None
        if node.op is torch.ops.aten.add.Tensor and not node.kwargs:
            other = [value for value in node.inputs() if value is not made]
            leaf = self.leaves.get(other[0]) if len(other) == 1 else None
            if leaf is not None and self._may_shift(leaf, rows) and made.shape[-1] == rows:
                return leaf.name, 1
        return None

    def _may_shift(self, leaf: Leaf, rows: int) -> bool:
        return (
            leaf.kind == "parameter"
            and leaf.value.shape == (rows,)
            and self._alone(leaf)
            and (self.frozen or not leaf.frozen)
        )

    def _alone(self, leaf: Leaf) -> bool:
        return len(self.users.get(leaf.value, [])) == 1

    def _reader(self, own: _Weight) -> Reader | None:
        """What was found as a reader, unless something stands against it."""
        axes = dict.fromkeys(axis for axis in axes_of(own.term) if axis in self.names)
        why = self._against(own, axes)
        if why is None:
            names = tuple(self.names[axis] for axis in axes)
            return Reader(own.leaf.name, own.path, own.layout, own.term, names, tuple(own.uses), own.shift)
        for axis in axes if why else ():
            self._refuse(axis, why)
        return None

    def _against(self, own: _Weight, axes: Collection[Axis]) -> str | None:
        if any(axis in self.summed for axis in axes):
            return ""  # that is told already
        read = {id(use.node) for found in self.weights.values() if found.leaf is own.leaf for use in found.uses}
        others = [node for node in self._readings(own.leaf.value) if id(node) not in read]
        if others:
            return f"{own.leaf.name}: {others[0]} reads it too, in another way"
        same = [found for found in self.weights.values() if found.leaf is own.leaf]
        if len(same) > 1 and not _apart([found.path for found in same], own.leaf):
            return f"{own.leaf.name}: parts of it that overlap are read in several ways"
        return None

    def _readings(self, value: Value) -> Iterator[Node]:
        """All calls that do more with a tensor than take a view of it."""
        for node in self.users.get(value, []):
            if _is_view(node) and len(list(node.inputs())) == 1:
                for made in node.outputs:
                    if made is not None:
                        yield from self._readings(made)
            else:
                yield node


def _atoms(term: Term, axis: Axis) -> NDArray[np.int64]:
    """Which atom of an axis each entry of a term belongs to, -1 if to none."""
    found = np.full(1, -1, dtype=np.int64)
    for factor in resolve(term):
        if isinstance(factor, Axis):
            own = np.arange(axis.size) if factor is axis else np.full(factor.size, -1, dtype=np.int64)
        else:
            own = np.concatenate([_atoms(segment, axis) for segment in factor.segments])
        found = np.maximum.outer(found, own).reshape(-1)
    return found


def _is_view(node: Node) -> bool:
    """Whether a call gives views of its argument, and nothing else."""
    schema = getattr(node.op, "_schema", None)
    shared = [] if schema is None else [a.alias_info for a in schema.arguments if a.alias_info is not None]
    return len(shared) == 1 and not shared[0].is_write


def _called(node: Node, tensor: Tensor, place: int) -> Tensor:
    """A call on another tensor in place of its only one; the result of that place."""
    args, kwargs = tree_map_only(Value, lambda _: tensor, (node.args, dict(node.kwargs)))
    found: Tensor = tree_leaves(node.op(*args, **kwargs))[place]
    return found


def _viewed(leaf: Leaf, path: tuple[tuple[Node, int], ...], numbered: bool = False) -> Tensor:
    shape = leaf.value.shape
    view = torch.arange(prod(shape)).view(shape) if numbered else torch.empty(shape, device="meta")
    for node, place in path:
        view = _called(node, view, place)
    return view


def _lies(leaf: Leaf, path: tuple[tuple[Node, int], ...]) -> object:
    view = _viewed(leaf, path)
    return view.storage_offset(), tuple(view.shape), view.stride()


def _apart(paths: list[tuple[tuple[Node, int], ...]], leaf: Leaf) -> bool:
    entries = torch.cat([_viewed(leaf, path, numbered=True).reshape(-1) for path in paths])
    return len(entries.unique()) == len(entries)


def _arguments(node: Node) -> dict[str, Any]:
    schema = getattr(node.op, "_schema", None)
    names = [] if schema is None else [argument.name for argument in schema.arguments]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _window(node: Node) -> Window | None:
    """How a convolution slides; ``None`` where a call is none, or a transposed one, or says its padding in a word."""
    aten, given = torch.ops.aten, _arguments(node)
    if node.op not in (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default):
        return None
    kernel = given["weight"].shape[2:]
    stride, padding, dilation = (
        (tuple(by) * len(kernel))[: len(kernel)] if len(by) == 1 else tuple(by)
        for by in (given.get("stride", [1]), given.get("padding", [0]), given.get("dilation", [1]))
    )
    return Window(kernel, stride, padding, dilation, given.get("groups", 1))


def _layout(
    shape: tuple[int, ...],
    moves: list[Callable[[Tensor], Tensor]],
    batch: list[int],
    kernel: list[int],
    contracted: list[int],
) -> Layout | None:
    """Where dimensions of a rearranged tensor lie in the tensor itself; ``None`` if they do not fill its dimensions."""
    whole = view = torch.empty(shape, device="meta")
    for move in moves:
        view = move(view)
    by_dim: dict[int, list[tuple[int, int, int]]] = {}  # dimension: (stride, size, which)
    for which in range(view.ndim):
        n, stride = view.shape[which], view.stride(which)
        if n > 1:
            home = max(
                (d for d in range(whole.ndim) if whole.shape[d] > 1 and whole.stride(d) <= stride), key=whole.stride
            )
            by_dim.setdefault(home, []).append((stride, n, which))
    at: dict[int, tuple[int, int]] = {}
    splits: dict[int, tuple[int, ...]] = {}
    for home, found in by_dim.items():
        found.sort(reverse=True)
        if prod(n for _, n, _ in found) != whole.shape[home]:
            return None
        if len(found) > 1:
            splits[home] = tuple(n for _, n, _ in found)
        at.update((which, (home, i)) for i, (_, _, which) in enumerate(found))
    factors = {home: len(splits.get(home, (0,))) for home in range(whole.ndim)}
    ends = {home: sum(factors[d] for d in range(home, whole.ndim)) for home in range(whole.ndim)}

    def places(dims: list[int]) -> tuple[int, ...]:
        return tuple(at[d][1] - ends[at[d][0]] for d in dims if d in at)

    parts = tuple((home - whole.ndim, splits[home]) for home in sorted(splits))
    return Layout(parts, places(batch), places(kernel), places(contracted)) if places(contracted) else None
