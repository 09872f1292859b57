"""The torch functions that a class calls, and which of them are to be called with other arguments than it states.

Each is known by the lines of code that run when it is called; :class:`oto.nn.Told` is what overrides them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from oto._torch import tree_map_only
from oto.axes.call import Rewrite, Size, Uniform
from oto.axes.terms import Axis, axes_of, resolve
from oto.errors import EmitterError
from oto.groups import Partition
from oto.nn import functional as full_count
from oto.nn.calls import numbers_of
from oto.nn.told import COUNTED, UNIFORM
from oto.slim.attributes import Place, SizeAttribute
from oto.slim.own_class.adaptation import Adaptation
from oto.slim.own_class.blocks import ancestors
from oto.slim.own_class.traced import TracedInt, places_of
from oto.slim.plan import Thinning
from oto.trace.graph import Node, Value
from oto.trace.record import FunctionCall

aten = torch.ops.aten
Calls = dict[str, dict[str, list[dict[str, Any]]]]
"""For each site and name of a function, how it is to be called, as :class:`oto.nn.Told` takes it."""

_RESHAPES = ("view", "reshape", "unflatten")
_PIECES = ("chunk", "split", "split_with_sizes", "tensor_split")
_COUNTS = ("full", "sizes", "width", "rest", "along", "left", "of")
"""Keywords of our functions that divide by the full count, which an override has to name."""


@dataclass(eq=False)
class FunctionCalls:
    """The torch functions that a model calls, beside the operators that were recorded.

    Attributes:
        recorded: In their order; none if another run of the model makes other calls, and then none can be overridden.
    """

    partition: Partition
    recorded: Sequence[FunctionCall]

    @cached_property
    def by_node(self) -> dict[int, int]:
        """For each call of an operator, the place of the torch function that makes it, if that makes no other."""
        return {call.nodes[0]: place for place, call in enumerate(self.recorded) if len(call.nodes) == 1}

    def stating(self, index: int) -> dict[int, frozenset[Place]]:
        """For each number among the arguments of a call that is known to come from attributes, where they are."""
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
        thin: Thinning | None,
        places: Sequence[int],
        sizes_only: bool = False,
    ) -> dict[str, Any] | None:
        """How a call is to be made; ``None`` if that cannot be said.

        Args:
            thin: What is left; without it, only whether it can be said counts.
            places: Numbers to state even if they stay what they were in the full model.
            sizes_only: Leave counts out: the sizes alone, by which calls can be compared.
        """
        at = self.by_node.get(node.index)
        if at is None:
            return None
        call = self.recorded[at]
        own = _numbers(node.args, node.kwargs)
        if rewrite is None:
            if list(call.numbers) != own or not places:
                return None
            return {"numbers": [[place, own[place]] for place in places], "of": len(own)}
        args, kwargs = rewrite.args, dict(rewrite.kwargs)
        if thin is not None:
            args, kwargs = thin.filled((args, kwargs))
        if rewrite.op is aten.split_with_sizes.default and call.name in _PIECES:
            return {"pieces": [args[1], args[2]]}
        name = getattr(rewrite.op, "__name__", "")
        if rewrite.op is getattr(full_count, name, None) and name in COUNTED:
            return self._counting(name, call, args, kwargs, sizes_only)
        if rewrite.op is not node.op and not (rewrite.op is aten.reshape.default and call.name in _RESHAPES):
            return None
        asked = own if thin is None else _numbers(args, kwargs)
        if len(asked) != len(own) or list(call.numbers) != own:
            return None
        differ = [i for i, (old, new) in enumerate(zip(own, asked, strict=True)) if old != new or i in places]
        free = self._free(rewrite)
        grows = [i for i in differ if free[i]]
        how: dict[str, Any] = {"numbers": [[i, asked[i]] for i in differ], "of": len(own)}
        return how | ({"grows": grows} if grows else {})

    def _counting(
        self, name: str, call: FunctionCall, args: Any, kwargs: Mapping[str, Any], sizes_only: bool
    ) -> dict[str, Any] | None:
        """How a function that divides by a count is to be called."""
        if call.name.lstrip("_") != name or ("rest" in kwargs and not self._refers(kwargs["rest"])):
            return None
        if sizes_only:
            sizes = _listed(args[1]) if name in ("layer_norm", "rms_norm", "group_norm") else []
            return {"numbers": [[place, size] for place, size in enumerate(sizes)]}
        how = {"counted": name} | {key: kwargs[key] for key in _COUNTS if key in kwargs}
        return how | ({"groups": args[1]} if name == "group_norm" else {})

    def _free(self, rewrite: Rewrite) -> list[bool]:
        """For each number among the arguments, whether it is a size that holds a batch or another length, too."""
        return [size is not None and not self._is_width(size) for size in sizes_at(rewrite)]

    def widths(self, rewrite: Rewrite) -> list[int]:
        """The places of the numbers that are sizes which parameters have."""
        sizes = enumerate(sizes_at(rewrite))
        return [
            i for i, size in sizes if size is not None and any(axes_of(resolve(size.term))) and self._is_width(size)
        ]

    def attributes_of(self, node: Node, rewrite: Rewrite | None) -> dict[Place, SizeAttribute]:
        """The attributes that reach a call as they are, and the sizes that they state there."""
        at = self.by_node.get(node.index)
        if at is None or rewrite is None or not (rewrite.op is node.op or rewrite.op is aten.reshape.default):
            return {}
        sizes, stated = sizes_at(rewrite), self.recorded[at].numbers
        if len(sizes) != len(stated) or list(stated) != _numbers(node.args, node.kwargs):
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

    def _takes(self, node: Node, thin: Thinning, ranked: bool) -> dict[str, Any]:
        """What the first tensor of a call is known by: its dimensions that parameters have."""
        first, call = next(node.inputs(), None), self.recorded[self.by_node[node.index]]
        if first is None or first.shape != call.takes:
            return {}
        terms = [resolve(term) for term in self.partition.found.operands[first].terms]
        wide = [dim for dim, term in enumerate(terms) if term and self._widths.issuperset(axes_of(term))]
        sizes = [[dim - len(terms), thin.count(terms[dim])] for dim in wide]
        return {"takes": [len(terms) if ranked else None, sizes]}

    @cached_property
    def _makers(self) -> dict[Value, int]:
        nodes = self.partition.found.graph.nodes
        return {value: node.index for node in nodes for value in node.outputs if value is not None}

    def _refers(self, rest: Any) -> bool:
        """Whether what is gone follows from results of calls that can be kept."""
        if isinstance(rest, Uniform):
            op = getattr(rest.op, "overloadpacket", None)
            return op is not None and op.__name__ in UNIFORM and not rest.kwargs and all(map(self._refers, rest.args))
        return self._makers.get(rest) in self.by_node if isinstance(rest, Value) else isinstance(rest, int | float)

    def _needed(self, rest: Any) -> Iterator[int]:
        """The places of the calls from whose results follows what is gone."""
        if isinstance(rest, Uniform):
            for x in rest.args:
                yield from self._needed(x)
        elif isinstance(rest, Value):
            yield self.by_node[self._makers[rest]]

    def _spelled(self, rest: Any, kept: Mapping[int, tuple[str, str, int]]) -> Any:
        """What is gone, as :class:`oto.nn.Told` reads it.

        Args:
            kept: For the place of each call that it follows from, its site, its name and its time.
        """
        if isinstance(rest, Uniform):
            op: Any = rest.op
            args = [self._spelled(x, kept) for x in rest.args]
            return {"op": [op.overloadpacket.__name__, op._overloadname], "args": args}
        return {"kept": list(kept[self.by_node[self._makers[rest]]])} if isinstance(rest, Value) else rest

    def overrides(self, adaptation: Adaptation, thin: Thinning, sizes_only: bool = False) -> dict[str, Calls]:
        """What each module is to call otherwise, by its path.

        A call that states sizes is overridden whether they change or not: the code may state another number, by an
        attribute or a tensor that does change. Numbers that it gets right are left to it once it is run.

        Args:
            sizes_only: As for :meth:`override`.

        Raises:
            EmitterError: A module that runs several times would have to make another call each time.
        """
        graph, rewrites = self.partition.found.graph, self.partition.found.tape.rewrites
        changed = {place.module for place, size in adaptation.sizes.items() if size.now(thin) != size.value}
        hows: dict[int, dict[str, Any]] = {}
        for index, places in adaptation.overrides.items():
            node, rewrite = graph.nodes[index], rewrites.get(index)
            if rewrite is not None and (rewrite.op is node.op or rewrite.op is aten.reshape.default):
                places = tuple(sorted({*places, *self.widths(rewrite)}))
            if not places and not self._recounts(node, rewrite, thin, changed):
                continue
            how = self.override(node, rewrite, thin, places, sizes_only)
            assert how is not None
            hows[self.by_node[index]] = how if sizes_only else how | self._takes(node, thin, "numbers" not in how)
        needs = {at: set(self._needed(how["rest"])) for at, how in hows.items() if "rest" in how}
        for at in set().union(*needs.values()):
            hows.setdefault(at, {})["keep"] = True
        return self._by_module(hows, needs)

    @staticmethod
    def _recounts(node: Node, rewrite: Rewrite | None, thin: Thinning, changed: Set[str]) -> bool:
        """Whether a call has to name a count or pieces; these too where an attribute around it changes."""
        if rewrite is None or thin.changes(rewrite):
            return rewrite is not None
        return rewrite.op is aten.split_with_sizes.default and not changed.isdisjoint(ancestors(node.module))

    def _by_module(self, hows: Mapping[int, Mapping[str, Any]], needs: Mapping[int, set[int]]) -> dict[str, Calls]:
        """What each module is told: the one whose code calls, or one around it that tells its runs apart."""
        homes = self._homes(hows, needs)
        while True:
            made, clashing = self._tables(hows, homes)
            if not clashing:
                return made
            for at, path in homes.items():  # the module around it may tell its runs apart
                if path in clashing:
                    around = [p for p, _ in self.recorded[at].within]
                    if around.index(path) == 0:
                        raise EmitterError(f"{path or 'the model'} states other sizes each time that it runs")
                    homes[at] = around[around.index(path) - 1]
            homes = self._homes(hows, needs, homes)

    def _homes(
        self, hows: Mapping[int, Any], needs: Mapping[int, set[int]], least: Mapping[int, str] | None = None
    ) -> dict[int, str]:
        """For each call that is told, the module that is: its own, or the next around all that it has to know."""
        made = dict(least) if least is not None else {at: self.recorded[at].within[-1][0] for at in hows}
        moved = True
        while moved:
            moved = False
            for at, others in needs.items():
                together = [at, *others]
                runs = [[run for run in self.recorded[i].within if not _inside(run[0], made[i])] for i in together]
                shared = [run for run in runs[0] if all(run in other for other in runs[1:])]
                for i in together:
                    moved |= made[i] != shared[-1][0]
                    made[i] = shared[-1][0]
        return made

    @cached_property
    def _alike(self) -> dict[tuple[str, str], list[int]]:
        """The places of calls of one function in one line of code."""
        found: dict[tuple[str, str], list[int]] = {}
        for at, call in enumerate(self.recorded):
            found.setdefault((call.lines[-1] if call.lines else "", call.name), []).append(at)
        return found

    def _tables(
        self, hows: Mapping[int, Mapping[str, Any]], homes: Mapping[int, str]
    ) -> tuple[dict[str, Calls], set[str]]:
        """What each module is told in its runs; and those of which that cannot be said, as the runs differ."""
        made: dict[str, Calls] = {}
        clashing: set[str] = set()
        for path, sites in self._runs(hows, homes):
            mine = {at for at, home in homes.items() if home == path}
            lines = {(self.recorded[at].lines[-1], self.recorded[at].name) for at in mine}
            kept = {at: (*key, time) for key, places in sites.items() for time, at in enumerate(places)}
            for (site, name), places in sites.items():
                if (site.rpartition("\n")[2], name) not in lines:
                    continue
                each = [dict(hows[at]) if at in mine else {} for at in places]
                for how in each:
                    if "rest" in how:
                        how["rest"] = self._spelled(how["rest"], kept)
                if all(how == each[0] and "keep" not in how for how in each):
                    each = each[:1]
                if made.setdefault(path, {}).setdefault(site, {}).setdefault(name, each) != each:
                    clashing.add(path)
        return made, clashing

    def _runs(
        self, hows: Mapping[int, Any], homes: Mapping[int, str]
    ) -> Iterator[tuple[str, dict[tuple[str, str], list[int]]]]:
        """Each run of a module that is told something, and for each of its sites the places of the calls there.

        Calls in the same lines that are left as they are belong to it: what is none of these is another path.
        """
        ends = {(self.recorded[at].lines[-1], self.recorded[at].name) for at in hows}
        runs: dict[tuple[str, int], dict[tuple[str, str], list[int]]] = {}
        told = set(homes.values())
        for at in sorted(itertools.chain.from_iterable(self._alike[end] for end in ends)):
            call, done = self.recorded[at], set[str]()
            for level, run in enumerate(call.within):
                if run[0] in told and run[0] not in done:
                    done.add(run[0])
                    runs.setdefault(run, {}).setdefault((call.site(level), call.name), []).append(at)
        return ((path, sites) for (path, _), sites in runs.items())


class _Mark(float):
    """Stands for a size among numbers."""

    size: Size


def sizes_at(rewrite: Rewrite) -> list[Size | None]:
    """For each number among the arguments of a rewrite, the size that it is; ``None`` for plain numbers."""

    def mark(size: Size) -> _Mark:
        made = _Mark(0.5)
        made.size = size
        return made

    plain = tree_map_only(Value, lambda _: None, (rewrite.args, dict(rewrite.kwargs)))
    return [x.size if isinstance(x, _Mark) else None for x in numbers_of(tree_map_only(Size, mark, plain))]


def _numbers(args: Any, kwargs: Mapping[str, Any]) -> list[int | float]:
    return numbers_of(tree_map_only(Value, lambda _: None, (args, dict(kwargs))))


def _listed(x: Any) -> list[Any]:
    return list(x) if isinstance(x, list | tuple) else [x]


def _inside(path: str, other: str) -> bool:
    """Whether a module is in another one."""
    return path != other and f"{path}.".startswith(f"{other}." if other else "")
