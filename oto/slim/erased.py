"""Leave erased segments out of a copy of the user's module, by replacing the forwards of modules in them.

A replaced module keeps its signature, and returns zeros or one of its arguments.

A module is replaced if all of its calls are in erased segments or are joints of these; or if only a few functions of an
argument are left of it, such as the ReLU after the joint of a ResNet's block. Its arguments and results are observed by
running the thin copy once. If the result cannot be derived from the arguments for every size, the module's children
are replaced instead.

A module of a concatenated segment returns a tensor without entries along the concatenated dimension; or an empty
vector, which ``torch.cat`` ignores, if its other sizes cannot be derived from an argument. Such a segment is still
present in the thin copy that is observed, since a layer cannot have zero channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from oto.errors import EmitterError, reraise_out_of_memory
from oto.groups import Partition
from oto.groups.beside import dim_of
from oto.groups.partition import Segment
from oto.groups.segments import Modules, not_computed, overwritten
from oto.nn.erased import THEN, is_erased
from oto.slim.called import PLAIN, Shape, Taken
from oto.slim.edits import Edits, slim_copy
from oto.slim.proof.run import run
from oto.slim.widths import Widths
from oto.trace.graph import Graph, Node, Value

aten = torch.ops.aten

_FUNCTIONS: Mapping[object, str] = {
    aten.relu.default: "relu",
    aten.relu_.default: "relu",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",
}
"""Functions that may be left of a block, with their names in :data:`oto.nn.erased.THEN`."""

_POOLS: Collection[object] = {aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool2d_with_indices.default}
_OF_CHANNELS: Collection[object] = {
    op
    for packet in (
        *("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices"),
        *("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
        *("reflection_pad1d", "reflection_pad2d", "reflection_pad3d"),
        *("replication_pad1d", "replication_pad2d", "replication_pad3d"),
        *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d"),
        *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
        *("upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"),
        *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
    )
    for op in (getattr(getattr(aten, packet), name) for name in getattr(aten, packet).overloads())
}
"""Operators that refuse a tensor without channels."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MOST_WINDOWS = 3  # the maximum number of dimensions after the channels in a recipe

Given: TypeAlias = Tensor | Shape


@dataclass(frozen=True, eq=False)
class Erasures:
    """How segments are left out of a class.

    Attributes:
        erased: By the path of each replaced module, the arguments of :class:`oto.nn.ErasedForward`.
        needed: Segments that the class cannot leave out.
    """

    erased: Mapping[str, dict[str, Any]]
    needed: tuple[Segment, ...]


def plan(
    model: nn.Module,
    widths: Widths,
    gone: Sequence[Segment],
    tensors: Mapping[str, Tensor],
    edits: Edits,
    dummy_input: Any,
) -> Erasures:
    """Determine which modules are replaced, and how.

    Args:
        model: The full model.
        widths: The sizes in the slim model, and in the thin copy that is observed.
        gone: The segments to leave out.
        tensors, edits: The tensors and edits of the thin copy.
        dummy_input: The example input.
    """
    learned = _learned(widths, Modules.of(widths.partition.found.graph), gone)
    thin = slim_copy(model, tensors, edits).eval()
    learned.watch(thin)
    run(thin, dummy_input)
    return _decided(learned, thin, gone)


def plan_each(
    model: nn.Module, partition: Partition, segments: Sequence[Segment], tensors: Mapping[str, Tensor], dummy_input: Any
) -> list[Erasures]:
    """:func:`plan` for every segment on its own, from a single run.

    Args:
        tensors: The model's tensors, in which the writers of all segments are zero.
    """
    graph, widths = partition.found.graph, Widths.whole(partition)
    modules = Modules.of(graph)
    each = [_learned(widths, modules, [segment]) for segment in segments]
    ends: dict[str, dict[str, bool]] = {}
    functions: dict[str, Sequence[str]] = {}
    for one in each:
        ends |= {path: {"copy": how["copy"] or (path in ends and ends[path]["copy"])} for path, how in one.ends.items()}
        functions |= one.functions
    every = Learned(ends, modules, not_computed(segments), functions, widths, beside(graph, segments))
    thin = slim_copy(model, tensors, Edits()).eval()
    every.watch(thin)
    run(thin, dummy_input)
    return [
        _decided(replace(one, found=every.found), thin, [segment]) for one, segment in zip(each, segments, strict=True)
    ]


def failure_without(
    model: nn.Module,
    erased: Mapping[str, dict[str, Any]],
    tensors: Mapping[str, Tensor],
    edits: Edits,
    dummy_input: Any,
) -> Exception | None:
    """The exception that a copy raises without some modules, for example since code around one reads its weight.

    ``None`` if the copy runs.

    Args:
        erased: See :class:`Erasures`.
        tensors, edits: The tensors and edits of the thin copy.

    Raises:
        EmitterError: As in :func:`leaving_out`.
    """
    left = leaving_out(edits, erased, model)
    try:
        thin = slim_copy(model, tensors, left).eval()
        run(thin, dummy_input)
        if has_fast_path(thin):
            run(thin, dummy_input, fast=True)
    except Exception as failure:  # anything that the user's own forward may raise
        reraise_out_of_memory(failure)
        return failure
    return None


def has_fast_path(model: nn.Module) -> bool:
    """Whether the model has layers of torch that read their children's weights in eval mode to use a faster kernel."""
    return any(isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder) for module in model.modules())


def outermost(erased: Iterable[Mapping[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The modules that are replaced for any of several segments, without those inside other replaced modules."""
    found: dict[str, dict[str, Any]] = {}
    for path, how in sorted((item for own in erased for item in own.items()), key=lambda item: len(item[0])):
        if not _is_inside(path, found):
            found[path] = how
    return found


def beside(graph: Graph, segments: Iterable[Segment]) -> dict[int, int]:
    """The calls in concatenated segments, each with the concatenated dimension, which is negative."""
    found: dict[int, int] = {}
    for segment in sorted((s for s in segments if s.axes), key=lambda segment: len(segment.body)):
        joint = graph.calls[segment.joint]
        found.update(dict.fromkeys(segment.body, dim_of(joint) - len(segment.made.shape)))
    return found


def refusing(graph: Graph, gone: Iterable[Segment]) -> list[int]:
    """The calls between replaced modules and a concatenation that torch refuses for tensors without channels."""
    laid = [segment for segment in gone if segment.axes]
    if not laid:
        return []
    calls = not_computed(laid)
    inside, found = Modules.of(graph).within(calls), list[int]()
    empty: set[Value] = set()
    for node in (node for node in graph.nodes if node.index in calls):
        within = _is_inside(node.module, inside)
        if within or not empty.isdisjoint(node.inputs()):
            empty.update(value for value in (*node.outputs, *(new for _, new in node.written)) if value is not None)
            found += [node.index] if _refuses_nothing(node) and not within else []
    return found


def _refuses_nothing(node: Node) -> bool:
    """Whether torch refuses a call for tensors without channels."""
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    return node.op in _OF_CHANNELS or (node.op is aten.pad.default and mode != "constant")


def _learned(widths: Widths, modules: Modules, gone: Sequence[Segment]) -> Learned:
    """An observer of modules with which some segments are left out; it has not observed a run yet."""
    graph = widths.partition.found.graph
    calls, added = not_computed(gone), [segment for segment in gone if not segment.into]
    held = [segment for segment in added if overwritten(graph, segment, gone)]
    ends = {
        path: {"copy": any(segment.joint in own for segment in held)}
        for path, own in modules.calls.items()
        if any(segment.joint in own for segment in added)
    }
    return Learned(ends, modules, calls, _left(graph, modules, added, calls), widths, beside(graph, gone))


def _decided(learned: Learned, thin: nn.Module, gone: Sequence[Segment]) -> Erasures:
    """How segments are left out, given the observed run."""
    modules = learned.modules
    erased: dict[str, dict[str, Any]] = {}
    stuck: set[int] = set()
    for path in sorted(learned.functions, key=len):
        if not _is_inside(path, erased) and (what := learned.whole(path)) is not None:
            erased[path] = what
    for path in modules.within(learned.calls):
        for inner, how in learned.outermost(thin, path) if not _is_inside(path, erased) else ():
            if how is None:
                stuck |= modules.calls[inner]
            else:
                erased[inner] = how
    return Erasures(erased, tuple(segment for segment in gone if not stuck.isdisjoint(segment.body)))


def leaving_out(edits: Edits, erased: Mapping[str, dict[str, Any]], model: nn.Module) -> Edits:
    """The edits with replaced modules, and without edits inside of these.

    Args:
        erased: See :class:`Erasures`.

    Raises:
        EmitterError: A layer would get the number of a layer of another kind in a cache.
    """

    def left(table: Mapping[str, Any]) -> dict[str, Any]:
        return {path: value for path, value in table.items() if not _is_inside(path, erased)}

    stated = left(edits.stated)
    for path, number in renumbered(model, erased):
        stated[path] = [*stated.get(path, []), [["layer_idx"], number]]
    return replace(
        edits,
        attributes=left(edits.attributes),
        swaps=left(edits.swaps),
        stated=stated,
        told=left(edits.told),
        erased={**left(edits.erased), **erased},
    )


def _is_inside(path: str, outer: Collection[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[: i + 1]) in outer for i in range(len(parts)))


def renumbered(model: nn.Module, erased: Collection[str]) -> Iterator[tuple[str, int]]:
    """The new numbers of remaining layers in a cache, which are counted from zero without gaps.

    Yields:
        The path of each layer whose number changes, and its new number.

    Raises:
        EmitterError: A layer would get the number of a layer of another kind.
    """
    numbered: dict[type[nn.Module], dict[str, int]] = {}
    for path, module in model.named_modules():
        if type(number := vars(module).get("layer_idx")) is int and not is_erased(module):
            numbered.setdefault(type(module), {})[path] = number
    kinds = getattr(getattr(model, "config", None), "layer_types", None)
    for places in numbered.values():
        there = {path: n for path, n in places.items() if not _is_inside(path, erased)}
        if len(there) == len(places):
            continue
        order = {n: i for i, n in enumerate(sorted(set(there.values())))}
        for path, n in there.items():
            if kinds is not None and n < len(kinds) and kinds[n] != kinds[order[n]]:
                raise EmitterError(
                    f"{path} would take the place of a layer of another kind in a cache (config.layer_types)\n"
                    "  effect  the original class cannot be used without the layers before it"
                )
            if order[n] != n:
                yield path, order[n]


def _left(
    graph: Graph, modules: Modules, gone: Sequence[Segment], calls: Collection[int]
) -> dict[str, tuple[str, ...]]:
    """The modules of which only functions of a joint's result are left, with the names of these in order.

    An in-place ReLU of a ReLU's result changes nothing, and is left out.
    """
    nodes, trained = {node.index: node for node in graph.nodes}, {node.index: node for node in graph.calls}
    at = {segment.joint: segment for segment in gone}
    found: dict[str, tuple[str, ...]] = {}
    for path, own in modules.calls.items():
        every = sorted(own - set(calls))
        rest = [i for i in every if i in nodes]
        if not path or not rest or own.isdisjoint(at) or any(nodes[i].op not in _FUNCTIONS for i in rest):
            continue
        besides = [trained[i].op for i in every if i not in nodes]  # calls of train mode, which may include dropout
        if graph.trained is not None and besides != [nodes[i].op for i in rest]:
            continue
        last = at[max(own & at.keys())]
        values = {last.made, *(new for _, new in nodes[last.joint].written)}
        names: list[str] = []
        for node in (nodes[i] for i in rest):
            if len(node.args) != 1 or node.kwargs or node.args[0] not in values:
                break
            if node.op is not aten.relu_.default or names or not _is_rectified(graph, last.left, at):
                names.append(_FUNCTIONS[node.op])
            values = {v for v in (*node.outputs, *(new for _, new in node.written)) if v is not None}
        else:
            found[path] = tuple(names)
    return found


def _is_rectified(graph: Graph, value: Value, at: Mapping[int, Segment]) -> bool:
    """Whether a value is the result of a ReLU, possibly after max pooling or joints of removed segments."""
    maker = {v: n for n in graph.nodes for v in (*n.outputs, *(new for _, new in n.written)) if v is not None}
    while (node := maker.get(value)) is not None:
        if node.op in (aten.relu.default, aten.relu_.default):
            return True
        if node.index in at:
            value = at[node.index].left
        elif node.op in _POOLS:
            value = node.args[0]
        else:
            return False
    return False


@dataclass(eq=False)
class Learned:
    """The observed arguments and results of modules, and how these can be replaced.

    Attributes:
        ends: Paths of modules that contain a joint which returns its other argument, and whether as a copy.
        modules: The calls of each module.
        calls: The calls that are not made.
        functions: Paths of modules of which some functions are left, with the names of these.
        widths: The terms of the dimensions of their arguments and results.
        beside: The calls in concatenated segments, each with the concatenated dimension.
        found: For each observed call of a module, the arguments of :class:`oto.nn.ErasedForward`, or ``None``.
        takes: The positional parameters of each class's forward.
    """

    ends: Mapping[str, Mapping[str, bool]]
    modules: Modules
    calls: frozenset[int]
    functions: Mapping[str, Sequence[str]]
    widths: Widths
    beside: Mapping[int, int] = field(default_factory=dict)
    found: dict[str, list[dict[str, Any] | None]] = field(default_factory=dict)
    takes: dict[type[nn.Module], list[str]] = field(default_factory=dict, repr=False)

    def watch(self, thin: nn.Module) -> list[RemovableHandle]:
        """Add hooks that observe the modules to replace when the model is run."""
        handles: list[RemovableHandle] = []
        for path, module in thin.named_modules():
            if path and self._is_gone(path):

                def see(module: nn.Module, args: Any, kwargs: Any, result: Any, path: str = path) -> None:
                    self.found.setdefault(path, []).append(self._seen(path, module, args, kwargs, result))

                handles.append(module.register_forward_hook(see, with_kwargs=True))
        return handles

    def read(self, model: nn.Module, calls: Mapping[str, Sequence[Taken]]) -> None:
        """Use the calls of an earlier run. They hold only shapes, so functions that are left cannot be checked."""
        for path, own in calls.items():
            if self._is_gone(path):
                module = model.get_submodule(path)
                self.found[path] = [self._seen(path, module, call.args, call.kwargs, call.result) for call in own]

    def _is_gone(self, path: str) -> bool:
        return path in self.functions or self.modules.calls.get(path, {-1}) <= self.calls

    def outermost(self, thin: nn.Module, path: str) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """The outermost replaceable modules in ``path``, each with its replacement.

        A module that cannot be replaced and has no children is given with ``None``.

        Args:
            thin: Any model whose modules have the same paths.
        """
        if (how := self.whole(path)) is not None:
            yield path, how
            return
        inner = [f"{path}.{name}" for name, _ in thin.get_submodule(path).named_children()]
        inner = [child for child in inner if child in self.modules.calls]
        if not inner:
            yield path, None
        for child in inner:
            yield from self.outermost(thin, child)

    def whole(self, path: str) -> dict[str, Any] | None:
        """The replacement of a module; ``None`` if it is not known, or differs between calls."""
        found = self.found.get(path, [None])
        return found[0] if all(how == found[0] for how in found) else None

    def _seen(self, path: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> dict[str, Any] | None:
        takes = self._takes(type(module))
        named = {**dict(zip(takes, args, strict=False)), **kwargs}
        tensors = {name: x for name, x in named.items() if isinstance(x, Tensor | Shape)}
        gives = self._recipe(path, module, tensors, result) if tensors and len(args) <= len(takes) else None
        return None if gives is None else {"takes": takes, "gives": gives}

    def _takes(self, kind: type[nn.Module]) -> list[str]:
        """The names of the positional parameters of a forward."""
        if kind not in self.takes:
            parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
            self.takes[kind] = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        return self.takes[kind]

    def _recipe(self, path: str, module: nn.Module, given: Mapping[str, Given], x: Any) -> dict[str, Any] | None:
        """The recipe that derives a result from argument tensors; ``None`` if it is not known for every size."""
        if type(x) in (tuple, list):
            items = [self._recipe(path, module, given, item) for item in x]
            return None if None in items else {"items": items, "list": isinstance(x, list)}
        if isinstance(x, PLAIN):
            return None if _is_a_size(x, given) else {"value": x}
        if not isinstance(x, Tensor | Shape):
            return None
        if path in self.ends:
            names = list(self.functions.get(path, ()))
            same = [name for name, own in given.items() if (x is own and not names) or _gives(x, own, names)]
            copied = {"then": names} if names else {"copy": True} if self.ends[path]["copy"] else {}
            return {"given": same[0], **copied} if same else None
        name, first = next(iter(given.items()))
        if x.dtype != first.dtype:
            return None
        if (own := self.modules.calls.get(path, {-1})) <= self.beside.keys():
            return _nothing(module, name, first, x, self.beside[max(own)])
        return self._zeros(own, module, name, first, x)

    def _zeros(
        self, own: Collection[int], module: nn.Module, name: str, given: Given, x: Given
    ) -> dict[str, Any] | None:
        """The recipe for zeros of a result's shape, derived from that of an argument; ``None`` if it cannot be."""
        if (apart := self.widths.apart(own, given, x)) is not None and -apart[0] <= _MOST_WINDOWS + 1:
            dim, size = apart
            if dim == -1:
                return {"zeros": name, "last": size}
            return {"zeros": name, "channels": size, "window": [[1, 1, 0, 1] for _ in range(-dim - 1)]}
        if x.shape == given.shape:
            return {"zeros": name}
        if isinstance(module, nn.Linear) or (x.ndim > 2 and x.shape[:-1] == given.shape[:-1]):  # tokens by features
            return {"zeros": name, "last": self.widths.size(own, x, -1)}
        if not _has_window(module):
            return None
        return _windowed(module, name, self.widths.size(own, x, -len(module.kernel_size) - 1))


def _has_window(module: nn.Module) -> TypeGuard[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """Whether a module is a convolution whose output sizes can be computed from its input's."""
    return isinstance(module, _CONVOLUTIONS) and not isinstance(module.padding, str)


def _windowed(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, name: str, channels: int) -> dict[str, Any]:
    window = zip(module.kernel_size, module.stride, module.padding, module.dilation, strict=True)
    return {"zeros": name, "channels": channels, "window": list(map(list, window))}


def _nothing(module: nn.Module, name: str, given: Given, x: Given, dim: int) -> dict[str, Any]:
    """The recipe for a result without entries along a dimension."""
    if x.ndim == given.ndim >= -dim and all(x.shape[i] == given.shape[i] for i in range(-x.ndim, 0) if i != dim):
        return {"zeros": name, "none": dim}
    if _has_window(module) and dim == -len(module.kernel_size) - 1:
        return _windowed(module, name, 0)
    return {"empty": name}


def _is_a_size(x: Any, given: Mapping[str, Given]) -> bool:
    """Whether a number may be a size of an argument, so that it may differ for another input."""
    return type(x) is int and any(x in own.shape or x == own.numel() for own in given.values())


def _gives(x: Given, own: Given, names: Sequence[str]) -> bool:
    """Whether a tensor equals the result of some functions of another one."""
    if not isinstance(x, Tensor) or not isinstance(own, Tensor):
        return False  # of an earlier run, only shapes are known
    for name in names if own.is_floating_point() else ():
        own = THEN[name](own)
    return x.shape == own.shape and x.dtype == own.dtype and torch.equal(x, own)
