"""Calls in the user's own code that have to be made otherwise, as :class:`oto.nn.Told` takes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from oto._torch import tree_map_only
from oto.axes.call import Rewrite, Size, Uniform
from oto.axes.registry import known
from oto.axes.terms import Axis, axes_of, resolve
from oto.errors import EmitterError
from oto.groups import Partition
from oto.nn import functional as counted
from oto.nn.calls import numbers_of
from oto.nn.told import COUNTED, UNIFORM
from oto.slim.plan import Thinning
from oto.trace.graph import Node, Value
from oto.trace.record import FunctionCall, follow

aten = torch.ops.aten
Calls = dict[str, dict[str, list[dict[str, Any]]]]

_RESHAPES = ("view", "reshape", "unflatten")
_PIECES = ("chunk", "split", "split_with_sizes", "tensor_split")


@dataclass(eq=False)
class Telling:
    """The torch functions that a model calls, beside the operators that were recorded.

    Attributes:
        model: The full model.
        way: How its run stands for tensors, see :func:`oto.trace.record.follow`.
    """

    model: nn.Module
    partition: Partition
    dummy_input: Any
    way: str

    @cached_property
    def calls(self) -> list[FunctionCall]:
        calls: list[FunctionCall] = []
        graph = self.partition.found.graph
        nodes, failure = follow(self.model, self.dummy_input, known, self.way, calls)
        if failure is not None or len(nodes) != len(graph.nodes):
            return []  # another run makes other calls: none can be told
        return calls

    @cached_property
    def by_node(self) -> dict[int, int]:
        """For each call of an operator, the place of the torch function that makes it, if that makes no other."""
        return {call.nodes[0]: place for place, call in enumerate(self.calls) if len(call.nodes) == 1}

    def can(self, node: Node, rewrite: Rewrite | None) -> bool:
        """Whether a call could be told."""
        return self.change(node, rewrite, None, ()) is not None

    def change(
        self, node: Node, rewrite: Rewrite | None, thin: Thinning | None, places: Sequence[int], plain: bool = False
    ) -> dict[str, Any] | None:
        """How a call is to be made; ``None`` if that cannot be said.

        Args:
            thin: What is left; without it, only whether it can be said counts.
            places: Numbers to state even if they stay what they were in the full model.
            plain: Leave counts out: the sizes alone, by which calls can be compared.
        """
        at = self.by_node.get(node.index)
        if at is None:
            return None
        call = self.calls[at]
        how: dict[str, Any]
        own = numbers_of(tree_map_only(Value, lambda _: None, (node.args, dict(node.kwargs))))
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
        if rewrite.op is getattr(counted, name, None) and name in COUNTED:
            if call.name.lstrip("_") != name or ("rest" in kwargs and not self.refers(kwargs["rest"])):
                return None
            if plain:
                sizes = _listed(args[1]) if name in ("layer_norm", "rms_norm", "group_norm") else []
                return {"numbers": [[place, size] for place, size in enumerate(sizes)]}
            how = {"counted": name}
            named = ("full", "sizes", "width", "rest", "along", "left", "of")
            how |= {key: kwargs[key] for key in named if key in kwargs}
            return how | ({"groups": args[1]} if name == "group_norm" else {})
        if rewrite.op is not node.op and not (rewrite.op is aten.reshape.default and call.name in _RESHAPES):
            return None
        asked = own if thin is None else numbers_of(tree_map_only(Value, lambda _: None, (args, kwargs)))
        if len(asked) != len(own) or list(call.numbers) != own:
            return None
        differ = [i for i, (old, new) in enumerate(zip(own, asked, strict=True)) if old != new or i in places]
        how = {"numbers": [[i, asked[i]] for i in differ], "of": len(own)}
        free = numbers_of(
            tree_map_only(
                Size,
                lambda size: float(not self.widths.issuperset(axes_of(resolve(size.term)))),
                tree_map_only(Value, lambda _: None, (rewrite.args, dict(rewrite.kwargs))),
            )
        )
        grows = [i for i in differ if free[i] == 1.0 and isinstance(free[i], float)]
        return how | ({"grows": grows} if grows else {})

    @cached_property
    def widths(self) -> set[Axis]:
        return set(self.partition.axes.values())

    def takes(self, node: Node, thin: Thinning, ranked: bool) -> dict[str, Any]:
        """What the first tensor of a call is known by: its dimensions that parameters have."""
        first, call = next(node.inputs(), None), self.calls[self.by_node[node.index]]
        if first is None or first.shape != call.takes:
            return {}
        terms = [resolve(term) for term in self.partition.found.operands[first].terms]
        wide = [dim for dim, term in enumerate(terms) if term and self.widths.issuperset(axes_of(term))]
        sizes = [[dim - len(terms), thin.count(terms[dim])] for dim in wide]
        return {"takes": [len(terms) if ranked else None, sizes]}

    @cached_property
    def makers(self) -> dict[Value, int]:
        nodes = self.partition.found.graph.nodes
        return {value: node.index for node in nodes for value in node.outputs if value is not None}

    def refers(self, rest: Any) -> bool:
        """Whether what is gone follows from results of calls that can be kept."""
        if isinstance(rest, Uniform):
            op = getattr(rest.op, "overloadpacket", None)
            return op is not None and op.__name__ in UNIFORM and not rest.kwargs and all(map(self.refers, rest.args))
        return self.makers.get(rest) in self.by_node if isinstance(rest, Value) else isinstance(rest, int | float)

    def needed(self, rest: Any) -> Iterator[int]:
        """The places of the calls from whose results follows what is gone."""
        if isinstance(rest, Uniform):
            for x in rest.args:
                yield from self.needed(x)
        elif isinstance(rest, Value):
            yield self.by_node[self.makers[rest]]

    def spelled(self, rest: Any, kept: Mapping[int, tuple[str, str, int]]) -> Any:
        """What is gone, as :class:`oto.nn.Told` reads it.

        Args:
            kept: For the place of each call that it follows from, its site, its name and its time.
        """
        if isinstance(rest, Uniform):
            op: Any = rest.op
            args = [self.spelled(x, kept) for x in rest.args]
            return {"op": [op.overloadpacket.__name__, op._overloadname], "args": args}
        return {"kept": list(kept[self.by_node[self.makers[rest]]])} if isinstance(rest, Value) else rest

    def told(self, nodes: Mapping[int, Sequence[int]], thin: Thinning, plain: bool = False) -> dict[str, Calls]:
        """What each module has to be told, by its path.

        Args:
            nodes: The calls, and for each the numbers to state even if they stay what they were.
            plain: As for :meth:`change`.

        Raises:
            EmitterError: A module that runs several times would have to be told another thing each time.
        """
        graph, rewrites = self.partition.found.graph, self.partition.found.tape.rewrites
        hows: dict[int, dict[str, Any]] = {}
        for index, places in nodes.items():
            node, rewrite = graph.nodes[index], rewrites.get(index)
            if not places and (rewrite is None or not thin.changes(rewrite)):
                continue
            how = self.change(node, rewrite, thin, places, plain)
            assert how is not None
            hows[self.by_node[index]] = how if plain else how | self.takes(node, thin, "numbers" not in how)
        needs = {at: set(self.needed(how["rest"])) for at, how in hows.items() if "rest" in how}
        for at in set().union(*needs.values()):
            hows.setdefault(at, {})["keep"] = True
        homes = self.homes(hows, needs)
        while True:
            made, clashing = self.tables(hows, homes)
            if not clashing:
                return made
            for at, path in homes.items():  # the module around it may tell its runs apart
                if path in clashing:
                    around = [p for p, _ in self.calls[at].within]
                    if around.index(path) == 0:
                        raise EmitterError(f"{path or 'the model'} states other sizes each time that it runs")
                    homes[at] = around[around.index(path) - 1]
            homes = self.homes(hows, needs, homes)

    def homes(
        self, hows: Mapping[int, Any], needs: Mapping[int, set[int]], least: Mapping[int, str] | None = None
    ) -> dict[int, str]:
        """For each call that is told, the module that is: its own, or the next around all that it has to know."""
        made = dict(least) if least is not None else {at: self.calls[at].within[-1][0] for at in hows}
        moved = True
        while moved:
            moved = False
            for at, others in needs.items():
                together = [at, *others]
                runs = [[run for run in self.calls[i].within if not _inside(run[0], made[i])] for i in together]
                shared = [run for run in runs[0] if all(run in other for other in runs[1:])]
                for i in together:
                    moved |= made[i] != shared[-1][0]
                    made[i] = shared[-1][0]
        return made

    @cached_property
    def alike(self) -> dict[tuple[str, str], list[int]]:
        """The places of calls of one function in one line of code."""
        found: dict[tuple[str, str], list[int]] = {}
        for at, call in enumerate(self.calls):
            found.setdefault((call.lines[-1] if call.lines else "", call.name), []).append(at)
        return found

    def tables(
        self, hows: Mapping[int, Mapping[str, Any]], homes: Mapping[int, str]
    ) -> tuple[dict[str, Calls], set[str]]:
        """What each module is told in its runs; and those of which that cannot be said, as the runs differ.

        Calls in the same lines that are left as they are belong to it: what is none of these is another path.
        """
        ends = {(self.calls[at].lines[-1], self.calls[at].name) for at in hows}
        runs: dict[tuple[str, int], dict[tuple[str, str], list[int]]] = {}
        told = set(homes.values())
        for at in sorted(itertools.chain.from_iterable(self.alike[end] for end in ends)):
            call, done = self.calls[at], set[str]()
            for level, run in enumerate(call.within):
                if run[0] in told and run[0] not in done:
                    done.add(run[0])
                    runs.setdefault(run, {}).setdefault((call.site(level), call.name), []).append(at)
        made: dict[str, Calls] = {}
        clashing: set[str] = set()
        for (path, _), sites in runs.items():
            mine = {at for at, home in homes.items() if home == path}
            lines = {(self.calls[at].lines[-1], self.calls[at].name) for at in mine}
            kept = {at: (*key, time) for key, places in sites.items() for time, at in enumerate(places)}
            for (site, name), places in sites.items():
                if (site.rpartition("\n")[2], name) not in lines:
                    continue
                each = [dict(hows[at]) if at in mine else {} for at in places]
                for how in each:
                    if "rest" in how:
                        how["rest"] = self.spelled(how["rest"], kept)
                if all(how == each[0] and "keep" not in how for how in each):
                    each = each[:1]
                if made.setdefault(path, {}).setdefault(site, {}).setdefault(name, each) != each:
                    clashing.add(path)
        return made, clashing


def _listed(x: Any) -> list[Any]:
    return list(x) if isinstance(x, list | tuple) else [x]


def _inside(path: str, other: str) -> bool:
    """Whether a module is in another one."""
    return path != other and f"{path}.".startswith(f"{other}." if other else "")
