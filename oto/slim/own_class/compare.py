"""Compare each call of a thinner model of the same class with the call that the analysis expects.

If the slim model makes the same calls on the same tensors as the full one, with the thinner shapes and sizes that the
analysis expects, the class computes what the rewritten graph computes. Values are compared only where the two models
take different paths that meet again: both paths are then run on random numbers (``detours``).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import isclose, prod
from typing import Any

import torch
from torch import Tensor

from oto._torch import tree_map_only
from oto.axes.call import Rewrite
from oto.axes.propagate import Propagation
from oto.nn import functional as full_count
from oto.nn.calls import numbers_of
from oto.slim.edits import Edits
from oto.slim.own_class.adaptation import Adaptation
from oto.slim.own_class.blocks import ancestors
from oto.slim.own_class.detours import Detour
from oto.slim.pruned_shapes import PrunedShapes
from oto.trace.functions import FunctionCall
from oto.trace.graph import Node, Value

aten = torch.ops.aten


@dataclass(frozen=True)
class Divergence:
    """The first call at which a slim model of the class differs from what is expected.

    Attributes:
        index: Index of the call in the full model.
        failure: The exception, if one was raised.
        right: How many of the sizes that the call states are right.
        call: The call that was made instead, if the class got that far.
    """

    index: int
    failure: Exception | None = None
    right: int = 0
    call: Node | None = None

    @property
    def progress(self) -> tuple[int, int]:
        """How far the class got; of two divergences, the greater one is further along."""
        return self.index, self.right

    def __str__(self) -> str:
        if self.failure is not None:
            said = str(self.failure).splitlines() or [""]
            return f"it raised {type(self.failure).__name__}: {said[0]}"
        return f"it called {self.call.name} as it should not" if self.call is not None else "it made no such call"


@dataclass(frozen=True)
class Run:
    """The calls of one run.

    Attributes:
        calls: Calls of operators, in order.
        failure: The exception that ended the run, if one did.
        literals: Calls that make a tensor from numbers (``torch.tensor``); these are not operator calls.
        is_cut: Whether the recording stopped at its limit.
    """

    calls: Sequence[Node]
    failure: Exception | None
    literals: Sequence[FunctionCall]
    is_cut: bool = False


@dataclass(eq=False)
class Full:
    """The full model's side of every comparison.

    Attributes:
        literals: As in :class:`Run`.
    """

    found: Propagation
    literals: Sequence[FunctionCall] = ()

    def __post_init__(self) -> None:
        self.nodes, self.dead = self.found.graph.nodes, self.found.graph.dead
        self.inputs = [values_in(node) for node in self.nodes]
        last = {value: node.index for node in self.nodes for value in self.inputs[node.index]}
        self.last_read: dict[Value, int] = last | dict.fromkeys(self.found.graph.outputs, len(self.nodes))
        self.leaves = {leaf.value for leaf in self.found.graph.leaves}
        self._plain: dict[int, list[Any]] = {}

    def plain(self, index: int) -> list[Any]:
        """The arguments of a call without tensors, devices and layouts."""
        if index not in self._plain:
            self._plain[index] = _plain(self.nodes[index].args, self.nodes[index].kwargs)
        return self._plain[index]


class Comparison:
    """Compares the calls of a slim model of the class with those of the full model.

    Args:
        own: How the class was adapted.
        pruned: The pruned shapes.
        edits: The edits that made the slim model.
    """

    def __init__(self, full: Full, slim: Run, own: Adaptation, pruned: PrunedShapes, edits: Edits) -> None:
        self.full, self.slim, self.own, self.pruned, self.edits = full, slim, own, pruned, edits
        self.nodes, self.calls = full.nodes, slim.calls
        self.rewrites = full.found.tape.rewrites
        self.scalars = own.scalars
        self.stands: dict[Value, Value] = {}
        self.itself: dict[Value, Value] = {}

    def divergence(self) -> Divergence | None:
        """The first call that differs from what the analysis expects; ``None`` if there is none."""
        called, literal = self._called(), self._literal()
        return called if literal is None or (called is not None and called.index <= literal) else Divergence(literal)

    def _literal(self) -> int | None:
        """The call that follows the first tensor made from different numbers; ``None`` if there is none."""
        for full, slim in zip(self.full.literals, self.slim.literals, strict=False):
            if full.numbers != slim.numbers:
                return min(full.nodes.start, len(self.nodes) - 1)
        return None

    def _called(self) -> Divergence | None:
        """The first operator call that differs."""
        i = j = 0
        while i < len(self.nodes):
            after = self._laid_out(i, j)
            if after is None and j >= len(self.calls):
                return Divergence(i, self.slim.failure)
            if after is None and (path := self._swapped(self.nodes[i].module)) is not None:
                after = self._block(i, j, path)
                if after is None:
                    end = _leaving(self.calls, j, path)
                    return Divergence(i, self.slim.failure if end == len(self.calls) else None)
            if after is None:
                right = self._right(i, self.calls[j])
                after = (i + 1, j + 1) if right is None else self._otherwise(i, j)
                if after is None:
                    failure = self.slim.failure if j == len(self.calls) - 1 else None
                    return Divergence(i, failure, right or 0, self.calls[j])
            i, j = after
        if self.slim.failure is not None or j < len(self.calls):
            return Divergence(len(self.nodes) - 1, self.slim.failure)
        return None

    # --- calls that need not be matched -------------------------------------------------------------------------------

    def _laid_out(self, i: int, j: int) -> tuple[int, int] | None:
        """Where both sides continue after a ``contiguous()`` that only one of them calls."""
        laid = self.nodes[i].op is _LAID, j < len(self.calls) and self.calls[j].op is _LAID
        if laid == (False, True):
            self.itself[_output(self.calls[j])] = self._real(values_in(self.calls[j])[0])
            return i, j + 1
        if laid == (True, False) and (known_as := self.stands.get(self.full.inputs[i][0])) is not None:
            self.stands[_output(self.nodes[i])] = known_as
            return i + 1, j
        return None

    def _swapped(self, path: str) -> str | None:
        """The innermost module around a call that was swapped for one of ``oto.nn``; ``None`` if there is none."""
        return next((p for p in ancestors(path) if p in self.edits.swaps), None) if self.edits.swaps else None

    def _block(self, i: int, j: int, path: str) -> tuple[int, int] | None:
        """Where both sides continue after a swapped module, if its results have the expected shapes."""
        after, other = _leaving(self.nodes, i, path), _leaving(self.calls, j, path)
        pairs = self._given(i, after, j, other)
        if pairs is None or not all(self._fits(old, new) for old, new in pairs):
            return None
        return after, other

    def _given(self, i: int, after: int, j: int, other: int) -> list[tuple[Value, Value]] | None:
        """Pairs of results of the two models that later calls read; ``None`` if one has more of them than the other."""
        theirs = _made(self.nodes, i, after, self.full.last_read)
        ours = _made(self.calls, j, other, self.read_last)
        if len(ours) < len(theirs) and j < other:  # an output of the model, or the calls end here
            last = [value for value in self.calls[other - 1].outputs if value is not None]
            ours += [value for value in last if value not in ours][: len(theirs) - len(ours)]
        return list(zip(theirs, ours, strict=True)) if len(theirs) == len(ours) else None

    @cached_property
    def read_last(self) -> dict[Value, int]:
        """For each tensor of the slim model, the last call that reads it."""
        return {value: place for place, node in enumerate(self.calls) for value in values_in(node)}

    def _otherwise(self, i: int, j: int) -> tuple[int, int] | None:
        """Where both sides continue after calls that the slim model may leave out or compute differently."""
        for value in self.nodes[i].outputs:  # results of the call that the slim model did not make
            if value is not None:
                self.stands.pop(value, None)
        if i in self.full.dead:
            return i + 1, j
        return self._idle(i, j) or self._detour(i, j)

    def _detour(self, i: int, j: int) -> tuple[int, int] | None:
        """Where both sides continue after different paths to the same results: a class may branch on sizes."""
        ahead = enumerate(self.nodes[i : i + _DETOUR])
        # nothing is compared with a result that is held
        free = next((n for n, node in ahead if self._is_held(node)), _DETOUR)
        full, slim = self.nodes[i : i + _DETOUR], self.calls[j : j + _DETOUR]
        detour = Detour(full, slim, self.stands, self.itself, self.pruned, self.rewrites)
        for steps in range(1, _DETOUR):
            for back in range(min(steps, free) + 1):
                after, other = i + back, j + steps - back
                if after > len(self.nodes) or other > len(self.calls) or not self._meet(after, other):
                    continue
                pairs = self._given(i, after, j, other)
                if pairs and all(self._fits(old, new, True) for old, new in pairs):
                    self._meet_leaves(full[:back], slim[: steps - back])
                    if detour.agrees(back, steps - back, pairs):
                        for old, new in pairs:
                            self.stands[old] = self._real(new)
                        return after, other
        return None

    def _is_held(self, node: Node) -> bool:
        """Whether the result of a live call is read by no other call: the model keeps it or branches on it."""
        return node.index not in self.full.dead and not any(v in self.full.last_read for v in node.outputs if v)

    def _meet_leaves(self, full: Sequence[Node], slim: Sequence[Node]) -> None:
        """Pair model tensors that are read for the first time; both recordings number these before all others."""
        read = {value.index: value for node in slim for value in values_in(node)}
        for value in {value for node in full for value in values_in(node)} & self.full.leaves:
            if value not in self.stands and value.index in read:
                self._fits(value, read[value.index])

    def _meet(self, i: int, j: int) -> bool:
        """Whether both models call the same operator in the same module next."""
        if i == len(self.nodes) or j == len(self.calls):
            return i == len(self.nodes) and j == len(self.calls) and self.slim.failure is None
        return self.nodes[i].op is self.calls[j].op and self.nodes[i].module == self.calls[j].module

    def _idle(self, start: int, j: int) -> tuple[int, int] | None:
        """Where both sides continue after layout calls that together change nothing; a class may leave these out.

        Example: repeating each head once, which most classes skip with an ``if``.
        """
        given = self.full.inputs[start]
        if len(given) != 1 or given[0] not in self.stands:
            return None
        shape = self.stands[given[0]].shape
        before = torch.arange(prod(shape)).view(shape)
        laid: dict[Value, Tensor] = {given[0]: before}
        for node in self.nodes[start : start + _IDLE]:
            if getattr(node.op, "overloadpacket", None) not in _LAYS or not laid.keys() >= set(values_in(node)):
                return None
            rewrite = self.rewrites.get(node.index)
            op, args, kwargs = self.pruned.call(node, rewrite)
            args, kwargs = tree_map_only(Value, laid.__getitem__, (args, kwargs))
            try:
                after = op(*args, **kwargs)
            except RuntimeError:
                return None
            made = _output(node)
            if torch.equal(after, before) and all(self.full.last_read.get(v, -1) <= node.index for v in [*laid][1:]):
                self.stands[made] = self.stands[given[0]]
                return node.index + 1, j
            laid[made] = after
        return None

    # --- calls that are to be the same --------------------------------------------------------------------------------

    def _real(self, value: Value) -> Value:
        return self.itself.get(value, value)

    def _fits(self, old: Value, new: Value, ask: bool = False) -> bool:
        """Whether a tensor has the thinner shape; from then on it stands for the full one, unless ``ask``."""
        if self.pruned.sizes(old) != new.shape or old.dtype != new.dtype:
            return False
        held = self.stands.get(old) if ask else self.stands.setdefault(old, self._real(new))
        return held is None or held is self._real(new)

    def _right(self, i: int, slim: Node) -> int | None:
        """``None`` if a call is as expected, otherwise how many of its sizes are right."""
        full, rewrite = self.nodes[i], self.rewrites.get(i)
        if i in self.full.dead:  # nothing reads its result, so it only has to run
            return None if full.op is slim.op else 0
        overridden = i in self.own.overrides
        alike = full.module == slim.module and len(full.outputs) == len(slim.outputs)
        if not alike or (full.op is not slim.op and not overridden):
            return 0
        pairs = zip(self.full.inputs[i], values_in(slim), strict=False)
        if not all(self._fits(old, new) for old, new in pairs):
            return 0
        made = [*zip(full.outputs, slim.outputs, strict=True)]
        made += [(a[1], b[1]) for a, b in zip(full.written, slim.written, strict=False)]
        for old, new in made:
            if (old is None) != (new is None):
                return 0
            if old is not None and new is not None and not self._fits(old, new):
                return self._sizes_right(rewrite, full, slim)
        changes = rewrite is not None and self.pruned.changes(rewrite)
        if overridden and rewrite is not None and changes and rewrite.op is not full.op:
            return None  # a call that splits, whose shapes were compared above, or one that divides by a count
        if i in self.scalars:
            wanted = self.scalars[i]
            return None if self._equal(i, slim, wanted.ratio(self.pruned) ** wanted.power) else 0
        if rewrite is None or i in self.own.folded or not changes:
            return None if self._equal(i, slim) else 0
        return self._rewritten(rewrite, full, slim)

    def _rewritten(self, rewrite: Rewrite, full: Node, slim: Node) -> int | None:
        """:meth:`_right` for a call some of whose sizes change."""
        if rewrite.op is full.op:
            asked = self.pruned.filled(rewrite.args), self.pruned.filled(dict(rewrite.kwargs))
            wanted = _plain(_with_defaults(full.op, asked[0]), asked[1])
            given = _plain(_with_defaults(full.op, slim.args), slim.kwargs)
            return None if _agree(wanted, given) else self._sizes_right(rewrite, full, slim)
        if rewrite.op in _BY_SHAPE:
            return None
        if rewrite.op is aten.narrow.default:  # a slice: its length is in the shape, so its start is left
            begin = self.pruned.filled(rewrite.args[2])
            begins = slim.args[2] if len(slim.args) > 2 and slim.args[2] is not None else 0
            length = values_in(slim)[0].shape[rewrite.args[1]]
            return None if min(max(begins + (length if begins < 0 else 0), 0), length) == begin else 0
        if rewrite.op is full_count.group_norm:  # right if there are fewer groups, each as wide as before
            groups, width = self.pruned.filled((rewrite.args[1], rewrite.kwargs["width"]))
            return None if (slim.args[1], width) == (groups, rewrite.kwargs["full"]) else 0
        return 0

    def _sizes_right(self, rewrite: Rewrite | None, full: Node, slim: Node) -> int:
        """How many of the sizes that a call states are right."""
        if rewrite is None or rewrite.op not in (full.op, *_BY_SHAPE):
            return 0
        asked = _plain(self.pruned.filled(rewrite.args), self.pruned.filled(dict(rewrite.kwargs)))
        given = _plain(slim.args, slim.kwargs)
        pairs = zip(filter(_is_int, asked), filter(_is_int, given), strict=False)
        return sum(a == b for a, b in pairs)

    def _equal(self, i: int, slim: Node, factor: float | None = None) -> bool:
        """Whether two calls have the same arguments; with ``factor``, floats may also be larger by that factor."""
        a, b = self.full.plain(i), _plain(slim.args, slim.kwargs)
        if len(a) != len(b):
            return False
        if factor is None:
            return all(type(x) is type(y) and (x == y or x != x) for x, y in zip(a, b, strict=True))
        return all(
            isclose(x * factor, y, rel_tol=1e-6) if isinstance(x, float) and isinstance(y, float) and x != y else x == y
            for x, y in zip(a, b, strict=True)
        )


def values_in(node: Node) -> list[Value]:
    """The tensors among the arguments of a call."""
    found: list[Value] = []
    _gather(node.args, found, True)
    _gather(node.kwargs, found, True)
    return found


def _gather(x: Any, found: list[Any], values: bool) -> None:
    """Collect the leaves of arguments, either tensors or all others; ten times as fast as a pytree."""
    if isinstance(x, Value):
        if values:
            found.append(x)
    elif isinstance(x, (list, tuple)):
        for item in x:
            _gather(item, found, values)
    elif isinstance(x, Mapping):
        for item in x.values():
            _gather(item, found, values)
    elif not values:
        found.append(x)


def _plain(args: Any, kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments except tensors, devices, layouts, and the functions that a branch or a loop runs."""
    found: list[Any] = []
    _gather(args, found, False)
    _gather(kwargs, found, False)
    return [x for x in found if not isinstance(x, _ELSEWHERE) and not callable(x)]


def _made(nodes: Sequence[Node], start: int, end: int, last_read: Mapping[Value, int]) -> list[Value]:
    """The results of a stretch of calls that later calls read."""
    made = [value for node in nodes[start:end] for value in node.outputs if value is not None]
    return [value for value in made if last_read.get(value, -1) >= end]


def _leaving(nodes: Sequence[Node], start: int, path: str) -> int:
    """The first call after those that a module and its submodules make."""
    end = start
    while end < len(nodes) and f"{nodes[end].module}.".startswith(f"{path}." if path else ""):
        end += 1
    return end


def _output(node: Node) -> Value:
    (value,) = (v for v in node.outputs if v is not None)
    return value


def _with_defaults(op: Any, args: Sequence[Any]) -> list[Any]:
    """The arguments of a call, with the defaults of trailing ones that it leaves out."""
    left = _defaults(op)[len(args) :]
    return [*args, *itertools.takewhile(lambda default: default is not _NONE, left)]


_NONE = object()


@cache
def _defaults(op: Any) -> list[Any]:
    """The defaults of an operator's arguments; cached because reading the schema takes longer than comparing a call."""
    schema = getattr(op, "_schema", None)
    named = [] if schema is None else [x for x in schema.arguments if not x.kwarg_only]
    return [x.default_value if x.has_default_value() else _NONE for x in named]


def _agree(asked: Sequence[Any], given: Sequence[Any]) -> bool:
    """Whether arguments are as expected; -1, as in a ``view``, agrees with any size."""
    return len(asked) == len(given) and all(
        (type(b) is type(a) and (a == b or a != a)) or (_is_int(b) and b == -1)
        for a, b in zip(asked, given, strict=True)
    )


def differing(full: Node, slim: Node) -> tuple[int, ...]:
    """The positions of the numbers in which two calls of one operator differ."""
    a, b = (numbers_of((node.args, dict(node.kwargs))) for node in (full, slim))
    return tuple(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y) if len(a) == len(b) else ()


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


_LAID = aten.contiguous.default
_ELSEWHERE = (torch.device, torch.layout, torch.Generator)

_IDLE = 6
"""Longest run of calls that may cancel out: repeating heads takes four."""
_DETOUR = 48
"""The limit on calls of both sides of a branch on sizes together: repeating keys and values takes nine, a product of
four tensors in the cheapest order eighteen on each side."""

# operators that return the entries of their input, in another shape or repeated
_LAYS = {
    aten.alias,
    aten.clone,
    aten.expand,
    aten.permute,
    aten.repeat,
    aten.reshape,
    aten.select,
    aten.slice,
    aten.squeeze,
    aten.transpose,
    aten.unsqueeze,
    aten.view,
}

# operators whose calls are determined by the shapes of their results
_BY_SHAPE = {aten.reshape.default, aten.squeeze.dims, aten.split_with_sizes.default, full_count.view_as_complex}
