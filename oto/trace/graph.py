"""The traced model: one flat list of ATen calls.

Both tracers (``record`` and ``export``) make a :class:`Graph` with a :class:`GraphBuilder`, which represents in-place
operators as functional ones: a write gives its target a new value, and gives every other tensor that shares the memory
a new value through a :func:`write_through` node. Example: ``x.add_(1)`` becomes ``%5 = add_(%4, 1)``, and later calls
read ``%5``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from inspect import isfunction
from typing import Any, Literal, TypeAlias

import torch

from oto._torch import tree_leaves, tree_map_only
from oto.trace.decisions import Script

Mode: TypeAlias = Literal["meta", "fake", "real", "autograd", "export"]
"""How a model is traced: with shapes only; with shapes and devices; on data; on data with autograd; by
``torch.export``."""


@dataclass(frozen=True, eq=False, slots=True)
class Value:
    """One tensor of the graph, which is written once."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __repr__(self) -> str:
        return f"%{self.index}{list(self.shape)}"


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """One ATen call.

    Attributes:
        index: Its position in :attr:`Graph.calls`.
        op: The operator.
        args, kwargs: The arguments of the call, with a :class:`Value` in place of each tensor.
        outputs: The tensors that it returns, flattened; ``None`` for results that are not tensors.
        written: Pairs of old and new values of arguments that it wrote to and did not return.
        module: Path of the innermost module, ``""`` for the model itself.
        source: ``file:line`` of the innermost frame outside torch.
        origin: The node of the exported program that it represents.
    """

    index: int
    op: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Value | None, ...]
    written: tuple[tuple[Value, Value], ...]
    module: str
    source: str
    origin: Any = None

    def inputs(self) -> Iterator[Value]:
        found: list[Value] = []
        _gather(self.args, found)
        _gather(self.kwargs, found)
        return iter(found)

    @property
    def name(self) -> str:
        """The operator's name in torch."""
        return self.op.__name__ if isfunction(self.op) else str(self.op)

    def __str__(self) -> str:
        name = getattr(self.op, "name", None)
        return f"{name().replace('::', '.') if callable(name) else self.op.__name__} at {self.module or 'the model'}"


@dataclass(frozen=True, eq=False, slots=True)
class Leaf:
    """A tensor that belongs to the model: a parameter, a buffer or a constant.

    Attributes:
        value: Its value before the first call.
        names: Every path under which the model holds it; several if it is tied.
        kind: ``"parameter"``, ``"buffer"`` or ``"constant"``.
        trainable: Whether it is a parameter with ``requires_grad``.
    """

    value: Value
    names: tuple[str, ...]
    kind: str
    trainable: bool = False

    @property
    def name(self) -> str:
        return self.names[0] if self.names else f"constant %{self.value.index}"

    @property
    def may_be_zeroed(self) -> bool:
        """Whether it is a parameter of real or complex numbers; frozen integers may be quantized weights."""
        dtype = self.value.dtype
        return self.kind == "parameter" and (self.trainable or dtype.is_floating_point or dtype.is_complex)

    @property
    def frozen(self) -> bool:
        """Whether it is a parameter that is not trained."""
        return self.kind == "parameter" and not self.trainable


@dataclass(frozen=True, eq=False)
class Graph:
    """A model as a flat list of ATen calls in the order they ran.

    Attributes:
        mode: ``"meta"`` or ``"fake"`` (no data was computed), ``"real"`` (the example was run) or ``"export"``.
        trained: The graph of train mode, if it reaches parameters that eval mode does not. Its leaves are those of this
            graph and its own constants; the numbers of its values and nodes continue those of this graph.
        untrained: Why the graph of train mode is not known, though it may reach more parameters.
        dead: Indices of calls whose results are never read: no output depends on them, and nothing that the model keeps
            or branches on. They only have to run without error.
        replaced: Names of tensors that the forward replaces by other tensors: state of any shape.
        output_names: The position of each output in the result of ``forward``: ``"logits"``, ``"hidden.0"``;
            ``"output"`` if it is the whole result.
        overwritten: The final value of each tensor of the model that was written to, by its first value.
        enclosed: Values in objects that the forward returns, such as a distribution. They are outputs as well, but are
            not compared. (A cache, which the forward also takes as an argument, is state.)
        ends: Values that are read other than by a call: by code that branches on them, or by the model, as the final
            value of one of its tensors.
        script: The decisions that depended on data, if the model was run on data, so that another run can repeat them.
    """

    nodes: tuple[Node, ...]
    leaves: tuple[Leaf, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    mode: Mode
    trained: Graph | None = None
    untrained: str | None = None
    dead: frozenset[int] = frozenset()
    replaced: frozenset[str] = frozenset()
    overwritten: Mapping[Value, Value] = field(default_factory=dict)
    output_names: tuple[str, ...] = ()
    enclosed: tuple[Value, ...] = ()
    ends: frozenset[Value] = frozenset()
    script: Script | None = None

    @property
    def calls(self) -> tuple[Node, ...]:
        """All nodes by index; those of train mode follow the others."""
        return self.nodes if self.trained is None else self.nodes + self.trained.nodes

    @property
    def read(self) -> set[Value]:
        """The values that calls read, or that the model returns, in eval mode."""
        return {value for node in self.nodes for value in node.inputs()}.union(self.outputs)

    @property
    def idle(self) -> set[str]:
        """Names of tensors of the model on which no output depends in eval mode."""
        live = {value for node in self.nodes if node.index not in self.dead for value in node.inputs()}
        live.update(self.outputs)
        return {name for leaf in self.leaves if leaf.value not in live for name in leaf.names}

    @property
    def unread(self) -> set[str]:
        """Names of tensors of the model that no call reads, not even in train mode."""
        read = self.read if self.trained is None else self.read | self.trained.read
        return {name for leaf in self.leaves if leaf.value not in read for name in leaf.names}

    def beside(self, other: Graph) -> Graph:
        """This graph with ``trained`` set to that of the same model in train mode, which then reads the same leaves."""
        mine = {name: leaf.value for leaf in self.leaves for name in leaf.names}
        made: dict[Value, Value] = {}
        first = 1 + max((value.index for value in self._values()), default=-1)
        more: list[Leaf] = []
        for leaf in other.leaves:
            shared = next((mine[name] for name in leaf.names if name in mine), None)
            if shared is not None and shared.shape == leaf.value.shape:
                made[leaf.value] = shared
            else:
                more.append(leaf)

        def here(value: Value) -> Value:
            if value not in made:
                made[value] = Value(first + value.index, value.shape, value.dtype)
            return made[value]

        def both(node: Node) -> Node:
            args, kwargs = tree_map_only(Value, here, (node.args, dict(node.kwargs)))
            outputs = tuple(None if value is None else here(value) for value in node.outputs)
            written = tuple((here(before), here(after)) for before, after in node.written)
            return replace(
                node, index=len(self.nodes) + node.index, args=args, kwargs=kwargs, outputs=outputs, written=written
            )

        inputs, outputs = tuple(map(here, other.inputs)), tuple(map(here, other.outputs))
        leaves = self.leaves + tuple(replace(leaf, value=here(leaf.value)) for leaf in more)
        nodes, ends = tuple(map(both, other.nodes)), frozenset(map(here, other.ends))
        overwritten = {here(before): here(after) for before, after in other.overwritten.items()}
        trained = Graph(
            nodes,
            leaves,
            inputs,
            outputs,
            other.mode,
            overwritten=overwritten,
            output_names=other.output_names,
            enclosed=tuple(map(here, other.enclosed)),
            ends=ends,
        )
        return replace(self, leaves=leaves, trained=trained)

    def _values(self) -> Iterator[Value]:
        yield from (leaf.value for leaf in self.leaves)
        yield from self.inputs
        for node in self.nodes:
            yield from (value for value in node.outputs if value is not None)
            yield from (after for _, after in node.written)

    def __str__(self) -> str:
        lines = [f"graph ({self.mode}): {len(self.nodes)} nodes, {len(self.leaves)} leaves"]
        lines += [f"{leaf.value} = {leaf.kind} {leaf.name}" for leaf in self.leaves]
        lines += [f"{list(node.outputs)} = {node.op}{node.args}  # {node.module}" for node in self.nodes]
        return "\n".join([*lines, f"return {list(self.outputs)}"])


def write_through(alias: Value, written: Value) -> Value:
    """Marks that ``alias`` has a new value, as a tensor that shares its memory was written to; never called."""
    raise AssertionError("a marker in the graph, never run")


@cache
def effects(op: Callable[..., Any]) -> tuple[tuple[tuple[int, str], ...], tuple[tuple[int, str], ...]]:
    """The arguments that ``op`` writes to, and those that its results may share memory with, as (position, name)."""
    schema = getattr(op, "_schema", None)
    if schema is None:
        return (), ()
    writes: list[tuple[int, str]] = []
    shares: list[tuple[int, str]] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None:
            (writes if argument.alias_info.is_write else shares).append((position, argument.name))
    return tuple(writes), tuple(shares)


class EnoughError(Exception):
    """The requested number of calls has been recorded. Internal to this package: callers catch it."""


@dataclass
class GraphBuilder:
    """Collects calls into a graph. The caller identifies tensors by any hashable key.

    Attributes:
        mode: See :attr:`Graph.mode`.
        nodes, leaves, inputs: Those of the graph so far.
        current: The current value of each key.
        families: For each key, the keys of all tensors that may share its memory.
        held: The key of each leaf.
        ends: See :attr:`Graph.ends`.
        kept: Values that the model keeps, or returns in an object.
        count: Number of values so far.
        limit: Maximum number of calls to collect; ``None`` for all.
    """

    mode: Mode
    nodes: list[Node] = field(default_factory=list)
    leaves: list[Leaf] = field(default_factory=list)
    current: dict[Hashable, Value] = field(default_factory=dict)
    families: dict[Hashable, dict[Hashable, None]] = field(default_factory=dict)
    inputs: list[Value] = field(default_factory=list)
    held: list[Hashable] = field(default_factory=list)
    ends: set[Value] = field(default_factory=set)
    kept: set[Value] = field(default_factory=set)
    count: int = 0
    limit: int | None = None

    @property
    def full(self) -> bool:
        """Whether the requested number of calls has been collected."""
        return self.limit is not None and len(self.nodes) >= self.limit

    def value(self, key: Hashable, shape: Sequence[int], dtype: torch.dtype) -> Value:
        """Make a new value, the current one of ``key`` from now on."""
        made = Value(self.count, tuple(shape), dtype)
        self.count += 1
        self.current[key] = made
        return made

    def input(self, key: Hashable, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.inputs.append(self.value(key, shape, dtype))

    def leaf(
        self,
        key: Hashable,
        shape: Sequence[int],
        dtype: torch.dtype,
        names: Sequence[str],
        kind: str,
        trainable: bool = False,
    ) -> None:
        self.leaves.append(Leaf(self.value(key, shape, dtype), tuple(names), kind, trainable))
        self.held.append(key)

    def call(
        self,
        op: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        results: Sequence[tuple[Hashable, Sequence[int], torch.dtype] | None],
        module: str,
        source: str,
        origin: Any = None,
    ) -> None:
        """Add a call.

        Args:
            args, kwargs: The arguments, with a :class:`Key` in place of each tensor.
            results: Key, shape and dtype of each result; ``None`` for results that are not tensors.
            module, source, origin: See :class:`Node`.
        """
        writes, shares = effects(op)

        def keys_at(places: tuple[tuple[int, str], ...]) -> list[Hashable]:
            found = [args[position] if position < len(args) else kwargs.get(name) for position, name in places]
            return [leaf.key for leaf in tree_leaves(found) if isinstance(leaf, Key)]

        new_args, new_kwargs = _valued(args, self.current), _valued(dict(kwargs), self.current)
        self.add(op, new_args, new_kwargs, results, module, source, keys_at(writes), keys_at(shares), origin)

    def add(
        self,
        op: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        results: Sequence[tuple[Hashable, Sequence[int], torch.dtype] | None],
        module: str,
        source: str,
        written_keys: Sequence[Hashable] = (),
        shared_keys: Sequence[Hashable] = (),
        origin: Any = None,
    ) -> None:
        """Add a call whose arguments hold a :class:`Value` in place of each tensor.

        Args:
            written_keys: Keys of the tensors that the call writes to.
            shared_keys: Keys of the tensors that its results may share memory with.

        Raises:
            EnoughError: The builder has collected ``limit`` calls.
        """
        before = {key: self.current[key] for key in written_keys}
        returned = {result[0] for result in results if result is not None}
        outputs = tuple(None if result is None else self.value(*result) for result in results)
        written = tuple(
            (before[key], self.value(key, before[key].shape, before[key].dtype))
            for key in dict.fromkeys(written_keys)
            if key not in returned
        )
        self._add(op, args, kwargs, outputs, written, module, source, origin)
        if shared_keys:
            self._join([*shared_keys, *returned])
        for key in dict.fromkeys(written_keys):
            for other in self.families.get(key, ()):
                if other != key:
                    old, new = self.current[other], self.current[key]
                    made = self.value(other, old.shape, old.dtype)
                    self._add(write_through, (old, new), {}, (made,), (), module, source)

    def _add(
        self, op: Any, args: Any, kwargs: Any, outputs: Any, written: Any, module: str, source: str, origin: Any = None
    ) -> None:
        if self.full:
            raise EnoughError
        self.nodes.append(Node(len(self.nodes), op, args, kwargs, outputs, written, module, source, origin))

    def end(self, key: Hashable) -> None:
        """Mark the current value of a tensor as kept by the model, or as part of an object that it returns."""
        self.ends.add(self.current[key])
        self.kept.add(self.current[key])

    def _join(self, keys: list[Hashable]) -> None:
        family: dict[Hashable, None] = {}
        for key in keys:
            family.update(self.families.get(key) or {key: None})
        for key in family:
            self.families[key] = family

    def writes(self, kind: str) -> bool:
        """Whether a leaf of this kind was written to."""
        held = zip(self.held, self.leaves, strict=True)
        return any(leaf.kind == kind and self.current[key] is not leaf.value for key, leaf in held)

    def build(self, outputs: Sequence[Hashable], dead: bool = False) -> Graph:
        """Make the graph.

        Args:
            outputs: Keys of the outputs.
            dead: Keep calls whose results reach neither an output nor a value that is kept (:meth:`end`). If no data
                was computed, only code that read a number from them can depend on them.
        """
        ends = tuple(self.current[key] for key in outputs)
        # a tensor of the model that was written to counts as an output
        written = {
            leaf.value: self.current[key]
            for key, leaf in zip(self.held, self.leaves, strict=True)
            if self.current[key] is not leaf.value
        }
        idle = self._idle({*ends, *written.values(), *(self.ends if dead else self.kept)})
        unread: frozenset[int] = frozenset()
        if dead:
            nodes, unread = tuple(self.nodes), frozenset() if self.mode == "real" else frozenset(idle)
        else:
            nodes = tuple(node for node in self.nodes if node.index not in idle)
            nodes = tuple(replace(node, index=i) for i, node in enumerate(nodes))
        leaves, inputs, read = tuple(self.leaves), tuple(self.inputs), frozenset(self.ends.union(written.values()))
        return Graph(nodes, leaves, inputs, ends, self.mode, dead=unread, overwritten=written, ends=read)

    def _idle(self, used: set[Value]) -> set[int]:
        """Indices of the calls that no used value depends on; ``used`` is extended in place."""
        idle: set[int] = set()
        for node in reversed(self.nodes):
            if used.isdisjoint(node.outputs) and not any(after in used for _, after in node.written):
                idle.add(node.index)
            else:
                used.update(node.inputs())
        return idle


_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})


def _gather(x: Any, found: list[Value]) -> None:
    """Collect the values in arguments; ``torch.utils._pytree`` takes ten times as long."""
    kind = type(x)
    if kind is Value:
        found.append(x)
    elif kind in _PLAIN:  # the most frequent case; the check for a mapping is slow
        return
    elif isinstance(x, (tuple, list)):
        for item in x:
            _gather(item, found)
    elif isinstance(x, Mapping):
        for item in x.values():
            _gather(item, found)


def _valued(x: Any, current: Mapping[Hashable, Value]) -> Any:
    """Arguments with the current value of each key; ``torch.utils._pytree`` takes five times as long."""
    if isinstance(x, Key):
        return current[x.key]
    if isinstance(x, (tuple, list)):
        items = [_valued(item, current) for item in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    return {name: _valued(item, current) for name, item in x.items()} if isinstance(x, dict) else x


@dataclass(frozen=True, slots=True)
class Key:
    """Represents a tensor in the arguments of :meth:`GraphBuilder.call`."""

    key: Hashable
