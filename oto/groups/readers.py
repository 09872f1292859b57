"""Find the weights that read an axis, which can be changed to compensate for removed atoms.

A *reader* is a weight that some calls contract with computed tensors: ``y = W x``. If entries of ``x`` are removed, the
others can approximate them, ``x_removed ≈ B x_kept + c``, and this can be folded into ``W`` (``optim/compensate.py``).
For example, ``fc2.weight`` reads the result of ``fc1``. Readers are found from the graph alone: every step of the tape
that sums over dimensions shared by one computed tensor and one parameter is such a product, whether it is a linear
layer, a convolution of any kind or an einsum. The values of weights do not matter.

There are reasons why removed atoms cannot be folded:

* A norm or a mean over the axis changes all entries that stay.
* A weight that is computed (a low-rank product, a dequantized or normalized weight), or that has another use (an
  embedding table tied to the output layer), cannot be changed without changing something else.
* The weight is frozen.
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
"""Maximum number of entries of a convolution's unrolled input in memory at a time, unless a single image has more."""


@dataclass(frozen=True)
class Layout:
    """A view of a tensor as ``(*batch, *rest, *kernel, *contracted)``.

    Dimensions are counted from the end, so that the layout applies to any number of leading dimensions.

    Attributes:
        splits: Dimensions that are products, outermost first, with the sizes of their factors.
        batch: Dimensions (after the splits) of both operands and the result: groups of a convolution, experts.
        kernel: Dimensions of the weight alone that are summed over: the kernel of a convolution.
        contracted: Dimensions of both operands that are summed over.
    """

    splits: tuple[tuple[int, tuple[int, ...]], ...]
    batch: tuple[int, ...]
    kernel: tuple[int, ...]
    contracted: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """The view of a tensor."""
        for dim, sizes in self.splits:
            tensor = tensor.unflatten(dim, sizes)
        named = {*self.batch, *self.kernel, *self.contracted}
        rest = [d for d in range(-tensor.ndim, 0) if d not in named]
        return tensor.permute(*self.batch, *rest, *self.kernel, *self.contracted)

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensor as ``(batch, rows, contracted)``, each flattened; a copy if its strides do not permit a view."""
        view = self.of(tensor)
        batch, last = len(self.batch), view.ndim - len(self.contracted)
        return view.reshape(prod(view.shape[:batch]), prod(view.shape[batch:last]), prod(view.shape[last:]))


@dataclass(frozen=True)
class Window:
    """The arguments of a convolution: a number for each dimension of its kernel, and the number of groups."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def size(self) -> int:
        """Number of entries of the kernel."""
        return prod(self.kernel)

    def rows(self, x: Tensor) -> Tensor:
        """The entries of ``x`` under the kernel at each position.

        Args:
            x: Shape ``(N, C, *size)``.

        Returns:
            Shape ``(groups, N · positions, C / groups · kernel)``.
        """
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
        source: The computed tensor.
        place: Its index, and the weight's, among the tensors in the call's arguments.
        layout: The layout of the computed tensor.
        window: The arguments of the convolution, if the call is one.
        unrolled: Whether a row holds all entries under the kernel at one position, instead of the channels of one
            pixel.
    """

    node: Node
    source: Value
    place: tuple[int, int]
    layout: Layout
    window: Window | None = None
    unrolled: bool = False

    def rows(self, tensor: Tensor) -> Iterator[Tensor]:
        """The rows of the computed tensor, ``(batch, rows, n)``; unrolled ones in parts of at most ``PART`` entries."""
        if not self.unrolled or self.window is None:
            yield self.layout.rows(tensor)
        else:
            images = tensor if tensor.ndim == len(self.window.kernel) + 2 else tensor.unsqueeze(0)
            for part in images.split(max(1, PART // max(1, images[:1].numel() * self.window.size))):
                yield self.window.rows(part)


@dataclass(frozen=True, eq=False)
class Reader:
    """A weight that reads entries of one or more axes.

    Attributes:
        parameter: Name of the parameter that the weight is a view of.
        path: The view calls that lead from the parameter to the weight, each with the index of its result.
        layout: The layout of the weight; its contracted entries are those of ``term``.
        term: The term of the entries that it reads.
        groups: The prunable node groups in the term.
        uses: The calls that use it; statistics are taken over the inputs of all of them.
        shift: Where a constant can be added to the result: the name of a bias and 1, or the name of the running mean of
            the batch norm after it and -1; ``None`` if nowhere.
        each: Number of entries of a row for each entry of the term: the size of an unrolled kernel, or 1.
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
        """The tensors that it is contracted with; readers with the same sources share their statistics."""
        return tuple((use.source, use.layout, use.window if use.unrolled else None) for use in self.uses)

    @property
    def width(self) -> int:
        """Number of entries of each row."""
        return size_of(self.term) * self.each

    @property
    def unrolled(self) -> Reader:
        """The reader with the kernel of a convolution unrolled into its rows, so that the result is linear in a row,
        also at borders.

        The reader itself if it has no kernel, is unrolled already, or its uses have kernels of different sizes.
        """
        kernels = {use.window.size if use.window is not None else 1 for use in self.uses}
        if kernels == {1} or len(kernels) > 1 or self.each > 1:
            return self
        layout = replace(self.layout, kernel=(), contracted=(*self.layout.contracted, *self.layout.kernel))
        uses = tuple(replace(use, unrolled=True) for use in self.uses)
        return replace(self, layout=layout, uses=uses, each=kernels.pop())

    def survivors(self, kept: Mapping[Axis, NDArray[np.bool_]]) -> NDArray[np.bool_]:
        """Which entries of a row are kept, shape ``(width,)``; see :func:`oto.axes.terms.survivors`."""
        return np.repeat(survivors(self.term, kept), self.each)

    def entries(self, axis: Axis) -> NDArray[np.int64]:
        """The indices of each atom's entries in a row, shape ``(atoms, entries per atom)``."""
        atoms = _atoms(self.term, axis)
        order = np.argsort(atoms, kind="stable")
        entries = order[np.count_nonzero(atoms < 0) :].reshape(axis.size, -1, 1)
        unrolled: NDArray[np.int64] = entries * self.each + np.arange(self.each)
        return unrolled.reshape(axis.size, -1)

    def weight(self, parameter: Tensor) -> Tensor:
        """The weight that the calls take, a view of the parameter."""
        view = parameter.detach()
        for node, place in self.path:
            view = _called(node, view, place)
        return view


@dataclass(frozen=True, eq=False)
class Readers:
    """All readers of a network.

    Attributes:
        found: The readers, in the order of the calls.
        reasons: For each group that cannot be folded into readers, or only in part, the reasons.
    """

    found: tuple[Reader, ...]
    reasons: dict[str, tuple[str, ...]]

    def of(self, groups: Collection[str]) -> list[Reader]:
        """The readers of some groups."""
        return [reader for reader in self.found if any(name in groups for name in reader.groups)]


def readers(partition: Partition, groups: Iterable[NodeGroup], frozen: bool = False) -> Readers:
    """Find the readers of all prunable node groups.

    Args:
        groups: Node groups, after all policies were applied.
        frozen: Whether frozen weights may be changed.
    """
    return _Search(partition, [group.name for group in groups if group.prunable], frozen).result()


@dataclass(eq=False)
class _Weight:
    """A weight during the search: its position in the parameter, and the calls found so far that use it."""

    leaf: Leaf
    path: tuple[tuple[Node, int], ...]
    layout: Layout
    term: Term
    shift: tuple[str, int] | None
    uses: list[Use] = field(default_factory=list)


class _Search:
    def __init__(self, partition: Partition, names: Collection[str], frozen: bool) -> None:
        self.partition, self.frozen = partition, frozen
        self.propagation, self.graph = partition.found, partition.found.graph
        self.names: dict[Axis, str] = {partition.axes[name]: name for name in names}
        self.reasons: dict[str, dict[str, None]] = {name: {} for name in names}
        self.summed: set[Axis] = set()
        self.maker = {step.output: step for step in self.propagation.tape.steps}
        self.origin = {v: (node, i) for node in self.graph.calls for i, v in enumerate(node.outputs) if v is not None}
        self.leaves = {leaf.value: leaf for leaf in self.graph.leaves}
        self.users: dict[Value, list[Node]] = {}
        for node in self.graph.nodes:  # calls of train mode alone do not count
            for value in node.inputs():
                self.users.setdefault(value, []).append(node)
        self.dynamic = self._dynamic()
        self.weights: dict[tuple[str, object], _Weight] = {}

    def result(self) -> Readers:
        nodes = len(self.graph.nodes)
        for step in self.propagation.tape.steps:
            read = [self._free(step, group) for group in step.summed]
            if any(read) and step.node < nodes:
                axes = dict.fromkeys(axis for some in read for axis in some)
                why = self._add(step)
                for axis in axes if why else ():
                    self._refuse(axis, f"{self.graph.calls[step.node]}: {why}")
        readers = [reader for weight in self.weights.values() if (reader := self._reader(weight)) is not None]
        for axis, name in self.names.items():
            if axis not in self.summed and not self.reasons[name] and not any(name in r.groups for r in readers):
                self._refuse(axis, "no weight reads it")
        order = sorted(readers, key=lambda reader: reader.uses[0].node.index)
        return Readers(tuple(order), {name: tuple(why) for name, why in self.reasons.items() if why})

    def _refuse(self, axis: Axis, why: str) -> None:
        self.reasons[self.names[axis]].setdefault(why)

    def _dynamic(self) -> list[bool]:
        """Which tensors depend on the model's inputs."""
        dynamic = [False] * len(self.propagation.tape.tensors)
        runs = [self.graph] if self.graph.trained is None else [self.graph, self.graph.trained]
        for value in (value for run in runs for value in run.inputs):
            dynamic[self.propagation.operands[value].index] = True
        for step in self.propagation.tape.steps:
            dynamic[step.output] = any(dynamic[i] for i in step.inputs)
        return dynamic

    def _free(self, step: Step, group: tuple[tuple[int, int], ...]) -> list[Axis]:
        terms = (self.propagation.tape.tensors[step.inputs[i]][dim] for i, dim in group)
        return [axis for term in terms for axis in axes_of(resolve(term)) if axis in self.names]

    # --- products -----------------------------------------------------------------------------------------------------

    def _add(self, step: Step) -> str | None:
        """Add a step as a use of a weight, or return the reason why it is not one."""
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
        node, tape = self.graph.calls[step.node], self.propagation.tape
        values = list(node.inputs())
        places = {self.propagation.operands[value].index: i for i, value in enumerate(values)}
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
        weight = self._weight(values[operands[1]])
        if isinstance(weight, str):
            return weight
        leaf, path = weight
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
        """The index of the argument that an operand is a rearrangement of, and the rearrangements in order."""
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
        before, after = (tuple(map(size_of, self.propagation.tape.tensors[i])) for i in (step.inputs[0], step.output))
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
        """The parameter that an operand is a view of, and the view calls; or the reason why it is not one."""
        path: list[tuple[Node, int]] = []
        while value not in self.leaves:
            node, place = self.origin.get(value, (None, 0))
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
        """:attr:`Reader.shift` of a product; ``None`` unless each result sums over a whole row of the weight."""
        sizes = [size_of(term) for term in self.propagation.tape.tensors[step.inputs[w]]]
        met = prod(n for n, out in zip(sizes, step.routes[w], strict=True) if not out)
        rows, out = prod(sizes) // met, prod(size_of(term) for term in self.propagation.tape.tensors[step.output])
        if prod(map(size_of, step.volume or ())) != out * met or {"alpha", "beta"} & set(node.kwargs):
            return None
        held = [self.leaves[v] for v in node.inputs() if v is not weight and v in self.leaves]
        if held:
            return (held[0].name, 1) if len(held) == 1 and self._may_shift(held[0], rows) else None
        made = node.outputs[0]
        return None if made is None else self._behind(made, rows)

    def _behind(self, result: Value, rows: int) -> tuple[str, int] | None:
        """The bias that the next call adds to the result, or the running mean of the batch norm that it is."""
        users = self.users.get(result, [])
        if len(users) != 1 or result in self.graph.outputs:
            return None
        (node,) = users
        given = _arguments(node)
        if "batch_norm" in node.name and given.get("input") is result:
            leaf = self.leaves.get(given.get("running_mean"))  # type: ignore[arg-type]
            if leaf is not None and leaf.kind == "buffer" and leaf.value.shape == (rows,) and leaf.names:
                return (leaf.name, -1) if self._alone(leaf) else None
        if node.op is torch.ops.aten.add.Tensor and not node.kwargs:
            other = [value for value in node.inputs() if value is not result]
            leaf = self.leaves.get(other[0]) if len(other) == 1 else None
            if leaf is not None and self._may_shift(leaf, rows) and result.shape[-1] == rows:
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
        """The reader of a weight; ``None``, with the reason noted, if it cannot be changed."""
        axes = dict.fromkeys(axis for axis in axes_of(own.term) if axis in self.names)
        why = self._against(own, axes)
        if why is None:
            names = tuple(self.names[axis] for axis in axes)
            return Reader(own.leaf.name, own.path, own.layout, own.term, names, tuple(own.uses), own.shift)
        for axis in axes:
            if axis not in self.summed:  # the reason for those is noted already
                self._refuse(axis, why)
        return None

    def _against(self, own: _Weight, axes: Collection[Axis]) -> str | None:
        if summed := [self.names[axis] for axis in axes if axis in self.summed]:
            return f"{own.leaf.name} reads it in one with {summed[0]}, which is summed over without a weight"
        read = {id(use.node) for weight in self.weights.values() if weight.leaf is own.leaf for use in weight.uses}
        others = [node for node in self._readings(own.leaf.value) if id(node) not in read]
        if others:
            return f"{own.leaf.name}: {others[0]} reads it too, in another way"
        same = [weight for weight in self.weights.values() if weight.leaf is own.leaf]
        if len(same) > 1 and not _apart([weight.path for weight in same], own.leaf):
            return f"{own.leaf.name}: parts of it that overlap are read in several ways"
        return None

    def _readings(self, value: Value) -> Iterator[Node]:
        """All calls that read a tensor or a view of it, except calls that only make views."""
        for node in self.users.get(value, []):
            if _is_view(node) and len(list(node.inputs())) == 1:
                for view in node.outputs:
                    if view is not None:
                        yield from self._readings(view)
            else:
                yield node


def _atoms(term: Term, axis: Axis) -> NDArray[np.int64]:
    """For each entry of a term, the atom of an axis that it belongs to, or -1."""
    atom_of = np.full(1, -1, dtype=np.int64)
    for factor in resolve(term):
        if isinstance(factor, Axis):
            own = np.arange(axis.size) if factor is axis else np.full(factor.size, -1, dtype=np.int64)
        else:
            own = np.concatenate([_atoms(segment, axis) for segment in factor.segments])
        atom_of = np.maximum.outer(atom_of, own).reshape(-1)
    return atom_of


def _is_view(node: Node) -> bool:
    """Whether a call only returns views of one of its arguments."""
    schema = getattr(node.op, "_schema", None)
    shared = [] if schema is None else [a.alias_info for a in schema.arguments if a.alias_info is not None]
    return len(shared) == 1 and not shared[0].is_write


def _called(node: Node, tensor: Tensor, place: int) -> Tensor:
    """Run a call with ``tensor`` in place of its only tensor argument, and return the result with index ``place``."""
    args, kwargs = tree_map_only(Value, lambda _: tensor, (node.args, dict(node.kwargs)))
    result: Tensor = tree_leaves(node.op(*args, **kwargs))[place]
    return result


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
    """The window of a convolution; ``None`` for other calls, transposed convolutions, and padding given as a string."""
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
    """The layout of a tensor, given dimensions of its rearrangement.

    ``None`` if these dimensions are not factors of the tensor's own dimensions, or none of them is contracted.
    """
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
    for home, pieces in by_dim.items():
        pieces.sort(reverse=True)
        if prod(n for _, n, _ in pieces) != whole.shape[home]:
            return None
        if len(pieces) > 1:
            splits[home] = tuple(n for _, n, _ in pieces)
        at.update((which, (home, i)) for i, (_, _, which) in enumerate(pieces))
    factors = {home: len(splits.get(home, (0,))) for home in range(whole.ndim)}
    ends = {home: sum(factors[d] for d in range(home, whole.ndim)) for home in range(whole.ndim)}

    def places(dims: list[int]) -> tuple[int, ...]:
        return tuple(at[d][1] - ends[at[d][0]] for d in dims if d in at)

    parts = tuple((home - whole.ndim, splits[home]) for home in sorted(splits))
    return Layout(parts, places(batch), places(kernel), places(contracted)) if places(contracted) else None
