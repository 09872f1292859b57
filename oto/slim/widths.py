"""Which size the zeros of a module that computes nothing have to state.

Zeros of the shape of what a module is given make the next analysis believe that both have the same entries. That is
true of the branch of a residual block, whose result is added to what it was given. Of one that is added to something
else it is not: two widths of which each could be pruned alone would have to go on with equally many entries. So these
zeros state the size of their own entries (:mod:`oto.nn.erased`), and it gets smaller with these
(:mod:`oto.slim.own_class`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from torch import Tensor

from oto.axes.terms import Axis, Term, axes_of, free
from oto.groups import Partition
from oto.slim.called import Shape
from oto.slim.pruned_shapes import PrunedShapes, pruned_shapes
from oto.trace.graph import Node, Value

Seen: TypeAlias = Tensor | Shape


@dataclass(eq=False)
class Widths:
    """What the dimensions of what modules take and give are made of.

    Attributes:
        left: The pruned shapes of the slim model.
        shown: Those of the model that is run to see what its modules take and give.
    """

    partition: Partition
    left: PrunedShapes
    shown: PrunedShapes

    @classmethod
    def whole(cls, partition: Partition) -> Widths:
        """Those of the full model."""
        pruned = pruned_shapes(partition, {})
        return cls(partition, pruned, pruned)

    def apart(self, calls: Collection[int], given: Seen, made: Seen) -> tuple[int, int] | None:
        """The dimension (counted from -1) of which a module gives other entries than it is given, and its slim size.

        ``None`` if there is none, or not just one, or it is not known what the module gives.

        Args:
            calls: Those of the module.
            given, made: What it is given and gives, where it was watched.
        """
        mine = self._made_by(calls)
        read = dict.fromkeys(x for index in calls for x in self._calls[index].inputs())
        ins = [x for x in read if x in self._flowing and x not in mine and self._is(x, given)]
        outs = self._given_by(calls, made)
        if not ins or not outs or not (given.shape == made.shape or {x.shape for x in ins} == {outs[0].shape}):
            return None
        terms = self._terms(outs[0])
        mixed = [dim for dim, term in enumerate(terms) if self._is_own(term, dim, ins)]
        rest = (term for dim, term in enumerate(terms) if dim not in mixed)
        if len(mixed) != 1 or any(free(term) and self._is_width(term) for term in rest):
            return None
        return mixed[0] - len(terms), self.left.sizes(outs[0])[mixed[0]]

    def size(self, calls: Collection[int], made: Seen, dim: int) -> int:
        """The slim size of a dimension of what a module gives."""
        outs = self._given_by(calls, made)
        return self.left.sizes(outs[0])[dim] if outs else made.shape[dim]

    def _made_by(self, calls: Collection[int]) -> set[Value]:
        return {value for index in calls for value in _made(self._calls[index])}

    def _given_by(self, calls: Collection[int], made: Seen) -> list[Value]:
        """What a module may have given; nothing if these are made of different entries."""
        outside = (x for x in self._made_by(calls) if x in self._ends or self._readers.get(x, set()) - set(calls))
        outs = [x for x in outside if self._is(x, made)]
        return outs if len({tuple(map(_key, self._terms(x))) for x in outs}) == 1 else []

    def _is(self, x: Value, seen: Seen) -> bool:
        return x.dtype == seen.dtype and self.shown.sizes(x) == tuple(seen.shape)

    def _is_own(self, term: Term, dim: int, ins: Iterable[Value]) -> bool:
        """Whether a width is not that of what the module may be given, and one of the two may get thinner."""
        others = [self._terms(x)[dim] for x in ins]
        apart = any(_key(other) != _key(term) and (free(other) or free(term)) for other in others)
        return apart and self._is_width(term)

    def _is_width(self, term: Term) -> bool:
        """Whether a size is made of those of parameters only, so that it is the same for every input."""
        axes = set(axes_of(term))
        return bool(axes) and axes <= self._axes

    def _terms(self, x: Value) -> tuple[Term, ...]:
        return self.partition.found.terms(x)

    @cached_property
    def _axes(self) -> set[Axis]:
        return set(self.partition.axes.values())

    @cached_property
    def _calls(self) -> dict[int, Node]:
        return {node.index: node for node in self.partition.found.graph.calls}

    @cached_property
    def _readers(self) -> dict[Value, set[int]]:
        found: dict[Value, set[int]] = {}
        for index, node in self._calls.items():
            for value in node.inputs():
                found.setdefault(value, set()).add(index)
        return found

    @cached_property
    def _flowing(self) -> set[Value]:
        """Inputs, and what calls make."""
        graph = self.partition.found.graph
        runs = (graph,) if graph.trained is None else (graph, graph.trained)
        return {x for run in runs for x in run.inputs}.union(*(_made(node) for node in self._calls.values()))

    @cached_property
    def _ends(self) -> set[Value]:
        """What the model returns or keeps."""
        graph = self.partition.found.graph
        runs = (graph,) if graph.trained is None else (graph, graph.trained)
        return {x for run in runs for x in (*run.outputs, *run.ends, *run.enclosed)}


def _made(node: Node) -> Iterator[Value]:
    yield from (value for value in (*node.outputs, *(after for _, after in node.written)) if value is not None)


def _key(term: Term) -> tuple[Any, ...]:
    """What two terms of the same entries have in common."""
    return tuple(x if isinstance(x, Axis) else tuple(map(_key, x.segments)) for x in term)
