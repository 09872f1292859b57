"""The torch functions that a class calls, and the overrides that call them with different arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from oto._torch import tree_map_only
from oto.axes.call import Rewrite, Size, Uniform
from oto.axes.terms import Axis, axes_of, resolve
from oto.groups import Partition
from oto.nn import functional as full_count
from oto.nn.calls import numbers_of
from oto.nn.overridden import COUNTED, UNIFORM
from oto.nn.overrides import FullCount, Given, Override, Pieces, Sizes
from oto.slim.own_class.attributes import AttributePlace, SizeAttribute
from oto.slim.own_class.traced import TracedInt, places_of
from oto.slim.pruned_shapes import PrunedShapes
from oto.trace.functions import FunctionCall
from oto.trace.graph import Node, Value

aten = torch.ops.aten
_RESHAPES = ("view", "reshape", "unflatten")
_PIECES = ("chunk", "split", "split_with_sizes", "tensor_split")
_COUNTS = ("full", "sizes", "width", "rest", "along", "left", "of")
"""Keywords of :mod:`oto.nn.functional` that an override has to pass: full counts, and what removed entries held."""


@dataclass(eq=False)
class FunctionCalls:
    """The torch functions that a model calls, each with the recorded operators that it runs.

    Attributes:
        recorded: The calls in order; empty if a second run of the model makes different ones, so that none can be
            overridden.
    """

    partition: Partition
    recorded: Sequence[FunctionCall]
    _sizes: dict[Rewrite, list[Size | None]] = field(default_factory=dict)
    _stated: dict[int, list[int | float]] = field(default_factory=dict)

    def sizes_at(self, rewrite: Rewrite) -> list[Size | None]:
        """For each number among the arguments of a rewrite, its size; ``None`` for plain numbers."""
        if rewrite not in self._sizes:
            self._sizes[rewrite] = _sizes_at(rewrite)
        return self._sizes[rewrite]

    def _numbers_of(self, node: Node) -> list[int | float]:
        """The numbers among the arguments of a recorded call."""
        if node.index not in self._stated:
            self._stated[node.index] = _numbers(node.args, node.kwargs)
        return self._stated[node.index]

    @cached_property
    def alike(self) -> dict[tuple[str, str], list[int]]:
        """The positions of the calls of each function from each line of code."""
        found: dict[tuple[str, str], list[int]] = {}
        for at, call in enumerate(self.recorded):
            found.setdefault((call.lines[-1] if call.lines else "", call.name), []).append(at)
        return found

    @cached_property
    def by_node(self) -> dict[int, int]:
        """For each operator call, the position of the torch function that makes it, if it makes only this one.

        Losses broadcast their arguments first; such a broadcast is ignored if it does nothing.
        """
        nodes = self.partition.found.graph.nodes
        made = {
            place: [i for i in call.nodes if not _does_nothing(nodes[i])] for place, call in enumerate(self.recorded)
        }
        return {own[0]: place for place, own in made.items() if len(own) == 1}

    @cached_property
    def places(self) -> set[AttributePlace]:
        """All attributes that a number among the arguments of any call is known to come from."""
        return {place for call in self.recorded for number in call.numbers for place in places_of(number)}

    def stating(self, index: int) -> dict[int, frozenset[AttributePlace]]:
        """For each number among the arguments of a call that is known to come from attributes, their places."""
        at = self.by_node.get(index)
        found = enumerate(self.recorded[at].numbers if at is not None else ())
        return {i: places_of(number) for i, number in found if places_of(number)}

    def can(self, node: Node, rewrite: Rewrite | None, places: Sequence[int]) -> bool:
        """Whether a call could be overridden."""
        return self.override(node, rewrite, None, places) is not None

    def override(
        self,
        node: Node,
        rewrite: Rewrite | None,
        pruned: PrunedShapes | None,
        places: Sequence[int],
        sizes_only: bool = False,
    ) -> Override | None:
        """The override of a call; ``None`` if it cannot be overridden.

        Args:
            pruned: The pruned shapes; without them the numbers are those of the full model.
            places: Positions of numbers to state even if they do not change.
            sizes_only: State only sizes, no full counts, so that calls can be compared.
        """
        at = self.by_node.get(node.index)
        if at is None:
            return None
        call, own = self.recorded[at], self._numbers_of(node)
        aligned = list(call.numbers) == own
        if places and max(places) >= len(own):
            return None  # the positions are those of another operator on the same line, with more numbers
        if rewrite is None:
            return Sizes(numbers=tuple((i, own[i]) for i in places), of=len(own)) if aligned and places else None
        args, kwargs = rewrite.args, dict(rewrite.kwargs)
        if pruned is not None:
            args, kwargs = pruned.filled((args, kwargs))
        if rewrite.op is aten.split_with_sizes.default and call.name in _PIECES:
            return Pieces(sizes=tuple(args[1]), dim=args[2])
        name = getattr(rewrite.op, "__name__", "")
        if rewrite.op is getattr(full_count, name, None) and name in COUNTED:
            return self._counting(name, call, args, kwargs, sizes_only)
        reshapes = rewrite.op is aten.reshape.default and call.name in _RESHAPES
        asked = own if pruned is None else _numbers(args, kwargs)
        if not (rewrite.op is node.op or reshapes) or len(asked) != len(own) or not aligned:
            return None
        differ = [i for i, (old, new) in enumerate(zip(own, asked, strict=True)) if old != new or i in places]
        free = self._free(rewrite)
        numbers = tuple((i, asked[i]) for i in differ)
        return Sizes(numbers=numbers, of=len(own), grows=tuple(i for i in differ if free[i]))

    def _counting(
        self, name: str, call: FunctionCall, args: Any, kwargs: Mapping[str, Any], sizes_only: bool
    ) -> Override | None:
        """The override of a function that divides by a count."""
        if call.name.lstrip("_") != name or ("rest" in kwargs and not self._refers(kwargs["rest"])):
            return None
        if sizes_only:
            sizes = _listed(args[1]) if name in ("layer_norm", "rms_norm", "group_norm") else []
            return Sizes(numbers=tuple(enumerate(sizes)))
        keywords = {key: kwargs[key] for key in _COUNTS if key in kwargs}
        return FullCount(name=name, keywords=keywords | ({"groups": args[1]} if name == "group_norm" else {}))

    def _free(self, rewrite: Rewrite) -> list[bool]:
        """For each number among the arguments, whether it is a size with an axis that no parameter has, as a batch."""
        return [size is not None and not self._is_width(size) for size in self.sizes_at(rewrite)]

    def widths(self, rewrite: Rewrite) -> list[int]:
        """The positions of the numbers that are sizes made only of axes of parameters."""
        sizes = enumerate(self.sizes_at(rewrite))
        return [
            i for i, size in sizes if size is not None and any(axes_of(resolve(size.term))) and self._is_width(size)
        ]

    def attributes_of(self, node: Node, rewrite: Rewrite | None) -> dict[AttributePlace, SizeAttribute]:
        """The attributes that reach a call unchanged, and the sizes that they state there."""
        at = self.by_node.get(node.index)
        if at is None or rewrite is None or not (rewrite.op is node.op or rewrite.op is aten.reshape.default):
            return {}
        sizes, stated = self.sizes_at(rewrite), self.recorded[at].numbers
        if len(sizes) != len(stated) or list(stated) != self._numbers_of(node):
            return {}
        return {
            place: SizeAttribute(size.term, int(number))
            for size, number in zip(sizes, stated, strict=True)
            if size is not None and isinstance(number, TracedInt) and number.direct
            for place in number.places
        }

    def _is_width(self, size: Size) -> bool:
        return self._widths.issuperset(axes_of(resolve(size.term)))

    @cached_property
    def _widths(self) -> set[Axis]:
        return set(self.partition.axes.values())

    def takes(self, node: Node, pruned: PrunedShapes, ranked: bool) -> Given | None:
        """What identifies the first tensor of a call: its sizes that are widths of parameters."""
        first, call = next(node.inputs(), None), self.recorded[self.by_node[node.index]]
        if first is None or first.shape != call.takes:
            return None
        terms = [resolve(term) for term in self.partition.found.operands[first].terms]
        wide = [dim for dim, term in enumerate(terms) if term and self._widths.issuperset(axes_of(term))]
        sizes = tuple((dim - len(terms), pruned.count(terms[dim])) for dim in wide)
        return Given(len(terms) if ranked else None, sizes)

    @cached_property
    def _makers(self) -> dict[Value, int]:
        nodes = self.partition.found.graph.nodes
        return {value: node.index for node in nodes for value in node.outputs if value is not None}

    def _refers(self, rest: Any) -> bool:
        """Whether the value of removed entries can be computed from results of calls that can be kept."""
        if isinstance(rest, Uniform):
            op = getattr(rest.op, "overloadpacket", None)
            return op is not None and op.__name__ in UNIFORM and not rest.kwargs and all(map(self._refers, rest.args))
        return self._makers.get(rest) in self.by_node if isinstance(rest, Value) else isinstance(rest, int | float)

    def needed(self, rest: Any) -> Iterator[int]:
        """The positions of the calls whose results determine the value of removed entries."""
        if isinstance(rest, Uniform):
            for x in rest.args:
                yield from self.needed(x)
        elif isinstance(rest, Value):
            yield self.by_node[self._makers[rest]]

    def spelled(self, rest: Any, kept: Mapping[int, tuple[str, str, int]]) -> Any:
        """The value of removed entries, in the form that :class:`oto.nn.OverriddenForward` reads.

        Args:
            kept: For the position of each call that the value depends on, its site, name and turn at that site.
        """
        if isinstance(rest, Uniform):
            op: Any = rest.op
            args = [self.spelled(x, kept) for x in rest.args]
            return {"op": [op.overloadpacket.__name__, op._overloadname], "args": args}
        return {"kept": list(kept[self.by_node[self._makers[rest]]])} if isinstance(rest, Value) else rest


def _does_nothing(node: Node) -> bool:
    """Whether a call broadcasts tensors to the shapes that they already have."""
    if getattr(node.op, "overloadpacket", None) is not aten.broadcast_tensors:
        return False
    return [value.shape for value in node.inputs()] == [None if v is None else v.shape for v in node.outputs]


class _Mark(float):
    """A number that stands for a size among plain numbers."""

    size: Size


def _sizes_at(rewrite: Rewrite) -> list[Size | None]:

    def mark(size: Size) -> _Mark:
        made = _Mark(0.5)
        made.size = size
        return made

    plain = rewrite.args, dict(rewrite.kwargs)
    return [x.size if isinstance(x, _Mark) else None for x in numbers_of(tree_map_only(Size, mark, plain))]


def _numbers(args: Any, kwargs: Mapping[str, Any]) -> list[int | float]:
    return numbers_of((args, dict(kwargs)))


def _listed(x: Any) -> list[Any]:
    return list(x) if isinstance(x, list | tuple) else [x]
