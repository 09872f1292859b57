"""Two runs side by side: the calls of a thinner model of the same class, and what each of them should be.

If every call of the slim model is the same call of the same tensors as in the full one, with the thinner shapes and
sizes that the analysis says, the class computes what the rewritten graph computes. No number is looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isclose, prod
from typing import Any

import torch
from torch import Tensor

from oto._torch import tree_leaves, tree_map_only
from oto.groups import Partition
from oto.nn import functional as thinner
from oto.nn.calls import numbers_of
from oto.slim.module import Edits, OwnClass
from oto.slim.plan import Thinning
from oto.trace.graph import Node, Value
from oto.trace.record import FunctionCall

aten = torch.ops.aten


@dataclass(frozen=True)
class Departure:
    """The first call in which a slim model of the class does something else than it should.

    Attributes:
        index: Of the call in the full model.
        failure: What it raised.
        right: How many of the sizes that the call states are right.
        call: What was called instead, if the class got that far.
    """

    index: int
    failure: Exception | None = None
    right: int = 0
    call: Node | None = None

    @property
    def far(self) -> tuple[int, int]:
        return self.index, self.right


@dataclass(eq=False)
class Alignment:
    """The calls of a slim model of the class beside those of the full model.

    Attributes:
        own: What the class was told.
        last_read: For each tensor of the full model, the last call that reads it.
        edits: What made the slim model.
        calls, failure: What it called, and what it raised.
        literals: The tensors that the full and the slim model made of numbers.
    """

    partition: Partition
    own: OwnClass
    last_read: Mapping[Value, int]
    thin: Thinning
    edits: Edits
    calls: Sequence[Node]
    failure: Exception | None
    literals: tuple[Sequence[FunctionCall], Sequence[FunctionCall]] = ((), ())

    def departure(self) -> Departure | None:
        """The first call that is another one than the analysis says; ``None`` if there is none."""
        called, said = self.called(), self.said()
        return called if said is None or (called is not None and called.index <= said) else Departure(said)

    def said(self) -> int | None:
        """The first call after a tensor was made of other numbers; ``None`` if none was."""
        last = len(self.partition.found.graph.nodes) - 1
        for full, slim in zip(*self.literals, strict=False):
            if full.numbers != slim.numbers:
                return min(full.nodes.start, last)
        return None

    def called(self) -> Departure | None:
        """The first call that is another one."""
        nodes = self.partition.found.graph.nodes
        self.stands: dict[Value, Value] = {}
        self.itself: dict[Value, Value] = {}
        i = j = 0
        while i < len(nodes):
            # what lies in memory as it should already is not made so again
            laid = nodes[i].op is _LAID, j < len(self.calls) and self.calls[j].op is _LAID
            if laid == (False, True):
                self.itself[_given(self.calls[j])] = self.real(next(self.calls[j].inputs()))
                j += 1
                continue
            if laid == (True, False) and (known_as := self.stands.get(next(nodes[i].inputs()))) is not None:
                self.stands[_given(nodes[i])] = known_as
                i += 1
                continue
            swapped = self.swapped(nodes[i].module)
            if j >= len(self.calls):
                return Departure(i, self.failure)
            if swapped is not None:
                after, other = self.leaving(nodes, i, swapped), self.leaving(self.calls, j, swapped)
                if not self.block(i, after, j, other):
                    return Departure(i, self.failure if other == len(self.calls) else None)
                i, j = after, other
                continue
            right = self.same(nodes[i], self.calls[j])
            if right is not None and i in self.partition.found.graph.dead:  # what nobody reads may be left out
                i += 1
                continue
            if right is not None and (after_all := self.idle(i)) is not None:
                i = after_all
                continue
            if right is not None:
                return Departure(i, self.failure if j == len(self.calls) - 1 else None, right, self.calls[j])
            i, j = i + 1, j + 1
        if self.failure is not None or j < len(self.calls):
            return Departure(len(nodes) - 1, self.failure)
        return None

    def swapped(self, path: str) -> str | None:
        """The module around a call that a module of ours has taken the place of."""
        return next((p for p in ancestors(path) if p in self.edits.swaps), None)

    @staticmethod
    def leaving(nodes: Sequence[Node], start: int, path: str) -> int:
        end = start
        while end < len(nodes) and f"{nodes[end].module}.".startswith(f"{path}."):
            end += 1
        return end

    def block(self, i: int, after: int, j: int, other: int) -> bool:
        """Whether a module of ours gives what the one in whose place it is gave."""
        nodes, calls = self.partition.found.graph.nodes, self.calls
        theirs = self.given(nodes, i, after, self.last_read)
        ours = self.given(calls, j, other, self.read_last)
        if len(ours) < len(theirs) and j < other:  # an output of the model, or the calls end here
            last = [value for value in calls[other - 1].outputs if value is not None]
            ours += [value for value in last if value not in ours][: len(theirs) - len(ours)]
        if len(theirs) != len(ours):
            return False
        return all(self.fits(old, new) for old, new in zip(theirs, ours, strict=True))

    @cached_property
    def read_last(self) -> dict[Value, int]:
        """For each tensor of the slim model, the last call that reads it."""
        return {value: place for place, node in enumerate(self.calls) for value in node.inputs()}

    @staticmethod
    def given(nodes: Sequence[Node], start: int, end: int, last_read: Mapping[Value, int]) -> list[Value]:
        """What some calls make that later ones read."""
        made = [value for node in nodes[start:end] for value in node.outputs if value is not None]
        return [value for value in made if last_read.get(value, -1) >= end]

    def idle(self, start: int) -> int | None:
        """The call after some that only lay a tensor out, and in the end as it was; a class may leave them out.

        So repeating each head once, which most say with an ``if``.
        """
        nodes = self.partition.found.graph.nodes
        given = list(nodes[start].inputs())
        if len(given) != 1 or given[0] not in self.stands:
            return None
        shape = self.stands[given[0]].shape
        before = torch.arange(prod(shape)).view(shape)
        laid: dict[Value, Tensor] = {given[0]: before}
        for node in nodes[start : start + _IDLE]:
            if getattr(node.op, "overloadpacket", None) not in _LAYS or not laid.keys() >= set(node.inputs()):
                return None
            rewrite = self.partition.found.tape.rewrites.get(node.index)
            op, args, kwargs = node.op, node.args, dict(node.kwargs)
            if rewrite is not None:
                op = rewrite.op
                args, kwargs = self.thin.filled((rewrite.args, dict(rewrite.kwargs)))
            args, kwargs = tree_map_only(Value, laid.__getitem__, (args, kwargs))
            try:
                after = op(*args, **kwargs)
            except RuntimeError:
                return None
            made = _given(node)
            if torch.equal(after, before) and all(self.last_read.get(v, -1) <= node.index for v in [*laid][1:]):
                self.stands[made] = self.stands[given[0]]
                return node.index + 1
            laid[made] = after
        return None

    def fits(self, old: Value, new: Value) -> bool:
        """Whether a tensor has the thinner shape; from then on it stands for the full one."""
        terms = self.partition.found.operands[old].terms
        if tuple(map(self.thin.count, terms)) != new.shape or old.dtype != new.dtype:
            return False
        return self.stands.setdefault(old, self.real(new)) is self.real(new)

    def real(self, value: Value) -> Value:
        return self.itself.get(value, value)

    def same(self, full: Node, slim: Node) -> int | None:
        """``None`` if a call is what it should be; else how many of its sizes are."""
        tape, own = self.partition.found.tape, self.own
        told = full.index in own.told
        if full.index in self.partition.found.graph.dead:  # it has to run, and no more
            return None if full.op is slim.op else 0
        alike = full.module == slim.module and len(full.outputs) == len(slim.outputs)
        if not alike or (full.op is not slim.op and not told):
            return 0
        pairs = list(zip(full.inputs(), slim.inputs(), strict=False))
        if not all(self.fits(old, new) for old, new in pairs):
            return 0
        made = [*zip(full.outputs, slim.outputs, strict=True)]
        made += [(a[1], b[1]) for a, b in zip(full.written, slim.written, strict=False)]
        for old, new in made:
            if (old is None) != (new is None):
                return 0
            if old is not None and new is not None and not self.fits(old, new):
                return self.right(full, slim)
        rewrite = tape.rewrites.get(full.index)
        if told and rewrite is not None and self.thin.changes(rewrite) and rewrite.op is not full.op:
            return None  # a piece, whose size is in its shape, or a count
        if full.index in own.scalars:
            wanted = own.scalars[full.index]
            ratio = wanted.ratio(self.thin) ** wanted.power
            return None if _equal(full, slim, ratio) else 0
        if rewrite is None or full.index in own.absorbed or not self.thin.changes(rewrite):
            return None if _equal(full, slim) else 0
        if rewrite.op is full.op:
            asked, given = (
                _plain((_with_defaults(full.op, args), dict(kwargs)))
                for args, kwargs in (
                    (self.thin.filled(rewrite.args), self.thin.filled(dict(rewrite.kwargs))),
                    (slim.args, slim.kwargs),
                )
            )
            return None if _agree(asked, given) else self.right(full, slim)
        if rewrite.op in _BY_SHAPE:
            return None
        if rewrite.op is aten.narrow.default:  # of a slice, whose length is in the shape
            begin = self.thin.filled(rewrite.args[2])
            begins = slim.args[2] if len(slim.args) > 2 and slim.args[2] is not None else 0
            length = next(slim.inputs()).shape[rewrite.args[1]]
            return None if min(max(begins + (length if begins < 0 else 0), 0), length) == begin else 0
        if rewrite.op is thinner.group_norm:  # of fewer groups, each as wide as before
            groups, width = self.thin.filled((rewrite.args[1], rewrite.kwargs["width"]))
            return None if (slim.args[1], width) == (groups, rewrite.kwargs["full"]) else 0
        return 0

    def right(self, full: Node, slim: Node) -> int:
        """How many of the sizes that a call states are right."""
        rewrite = self.partition.found.tape.rewrites.get(full.index)
        if rewrite is None or rewrite.op not in (full.op, *_BY_SHAPE):
            return 0
        asked = [x for x in tree_leaves((self.thin.filled(rewrite.args), self.thin.filled(dict(rewrite.kwargs))))
                 if _is_int(x)]  # fmt: skip
        given = [x for x in tree_leaves((slim.args, dict(slim.kwargs))) if _is_int(x)]
        return sum(a == b for a, b in zip(asked, given, strict=False))


_LAID = aten.contiguous.default


def _given(node: Node) -> Value:
    (value,) = (v for v in node.outputs if v is not None)
    return value


_IDLE = 6
"""How many calls in a row are looked at for coming to nothing."""

# calls that give the entries that they are given, in other shapes or more than once
_LAYS = {
    aten.alias, aten.clone, aten.expand, aten.permute, aten.repeat, aten.reshape, aten.select, aten.slice, aten.squeeze,
    aten.transpose, aten.unsqueeze, aten.view,
}  # fmt: skip

# calls whose meaning is in the shapes of what they give
_BY_SHAPE = {aten.reshape.default, aten.squeeze.dims, aten.split_with_sizes.default, thinner.view_as_complex}


def _plain(arguments: Any) -> list[Any]:
    named = tree_map_only(Value, lambda _: "a tensor", arguments)
    elsewhere = (torch.device, torch.layout, torch.Generator)
    # what a branch or a loop runs is a function, and keeps its sizes
    return [x for x in tree_leaves(named) if not isinstance(x, elsewhere) and not callable(x)]


def _with_defaults(op: Any, args: Sequence[Any]) -> list[Any]:
    """The arguments of a call, and the defaults of those that it leaves out at the end; it may, by what they are."""
    schema = getattr(op, "_schema", None)
    left = [] if schema is None else [x for x in schema.arguments[len(args) :] if not x.kwarg_only]
    return [*args, *(x.default_value for x in itertools.takewhile(lambda x: x.has_default_value(), left))]


def _agree(asked: Sequence[Any], given: Sequence[Any]) -> bool:
    """Whether arguments are those that were asked for; -1 is what a shape leaves open."""
    return len(asked) == len(given) and all(
        (type(b) is type(a) and (a == b or a != a)) or (_is_int(b) and b == -1)
        for a, b in zip(asked, given, strict=True)
    )


def _equal(full: Node, slim: Node, factor: float | None = None) -> bool:
    """Whether two calls have the same arguments; of one, a number may have grown by a factor."""
    a, b = _plain((full.args, dict(full.kwargs))), _plain((slim.args, dict(slim.kwargs)))
    if factor is None:
        return len(a) == len(b) and all(type(x) is type(y) and (x == y or x != x) for x, y in zip(a, b, strict=True))
    return len(a) == len(b) and all(
        isclose(x * factor, y, rel_tol=1e-6) if isinstance(x, float) and isinstance(y, float) and x != y else x == y
        for x, y in zip(a, b, strict=True)
    )


def differing(full: Node, slim: Node) -> tuple[int, ...]:
    """The places of numbers that two calls of one operator do not share."""
    a, b = (
        numbers_of(tree_map_only(Value, lambda _: None, (node.args, dict(node.kwargs)))) for node in (full, slim)
    )  # fmt: skip
    return tuple(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y) if len(a) == len(b) else ()


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def ancestors(path: str) -> list[str]:
    """A module and all around it, from the inside outwards."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]
