"""Calls in the user's own code that have to be made otherwise, as :class:`oto.nn.Told` takes them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from oto._torch import tree_map_only
from oto.axes.call import Rewrite, Uniform
from oto.axes.registry import known
from oto.errors import EmitterError
from oto.groups import Partition
from oto.nn import functional as counted
from oto.nn.told import COUNTED, UNIFORM, numbers_of
from oto.slim.plan import Thinning
from oto.trace.graph import Node, Value
from oto.trace.record import FunctionCall, follow

aten = torch.ops.aten
Calls = dict[str, dict[str, dict[str, Any]]]

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
            how: dict[str, Any] = {"counted": name}
            named = ("full", "sizes", "width", "rest", "along", "left", "of")
            how |= {key: kwargs[key] for key in named if key in kwargs}
            return how | ({"groups": args[1]} if name == "group_norm" else {})
        if rewrite.op is not node.op and not (rewrite.op is aten.reshape.default and call.name in _RESHAPES):
            return None
        asked = own if thin is None else numbers_of(tree_map_only(Value, lambda _: None, (args, kwargs)))
        if len(asked) != len(own) or list(call.numbers) != own:
            return None
        differ = [i for i, (old, new) in enumerate(zip(own, asked, strict=True)) if old != new or i in places]
        return {"numbers": [[i, asked[i]] for i in differ], "of": len(own)}

    def place(self, at: int, run: tuple[str, int], swapped: Container[str]) -> str:
        """How many calls of the same function come before one in a run of a module, but for those of swapped ones."""
        name = self.calls[at].name
        before = (c.within for c in self.calls[:at] if c.name == name and run in c.within)
        return str(sum(not any(path in swapped for path, _ in within) for within in before))

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

    def spelled(self, rest: Any, run: tuple[str, int], calls: Calls, swapped: Container[str]) -> Any:
        """What is gone, as :class:`oto.nn.Told` reads it; the calls that it follows from are marked to be kept."""
        if isinstance(rest, Uniform):
            op: Any = rest.op
            args = [self.spelled(x, run, calls, swapped) for x in rest.args]
            return {"op": [op.overloadpacket.__name__, op._overloadname], "args": args}
        if not isinstance(rest, Value):
            return rest
        at = self.by_node[self.makers[rest]]
        name, place = self.calls[at].name, self.place(at, run, swapped)
        if run not in self.calls[at].within:
            raise EmitterError(f"what {run[0]} would have to know was computed outside of it")
        calls.setdefault(name, {}).setdefault(place, {})["keep"] = True
        return {"kept": [name, place]}

    def told(
        self, nodes: Mapping[int, Sequence[int]], thin: Thinning, plain: bool = False, swapped: Container[str] = ()
    ) -> dict[str, Calls]:
        """What each module has to be told, by its path.

        Args:
            nodes: The calls, and for each the numbers to state even if they stay what they were.
            plain: As for :meth:`change`.
            swapped: Modules in whose place ones of ours are; nobody counts what those call.

        Raises:
            EmitterError: A module that runs several times would have to be told another thing each time.
        """
        graph, rewrites = self.partition.found.graph, self.partition.found.tape.rewrites
        outer = _outermost(graph.nodes[index].module for index in nodes)
        found: dict[tuple[str, int], Calls] = {}
        for index, places in nodes.items():
            node, rewrite = graph.nodes[index], rewrites.get(index)
            if not places and (rewrite is None or not thin.changes(rewrite)):
                continue
            how = self.change(node, rewrite, thin, places, plain)
            assert how is not None
            call = self.calls[self.by_node[index]]
            run = next(run for run in call.within if run[0] in outer)
            calls = found.setdefault(run, {})
            if "rest" in how:
                how["rest"] = self.spelled(how["rest"], run, calls, swapped)
            own = calls.setdefault(call.name, {}).setdefault(self.place(self.by_node[index], run, swapped), {})
            own.update(how)
        made: dict[str, Calls] = {}
        for (path, _), calls in found.items():
            runs = {run for call in self.calls for run in call.within if run[0] == path}
            if made.setdefault(path, calls) != calls or any(found.get(run) != calls for run in runs):
                raise EmitterError(f"{path or 'the model'} runs several times, and states other sizes each time")
        return made


def _listed(x: Any) -> list[Any]:
    return list(x) if isinstance(x, list | tuple) else [x]


def _outermost(paths: Iterable[str]) -> set[str]:
    """Of some modules, those that are in none of the others."""
    given = set(paths)

    def inside(path: str, other: str) -> bool:
        return path != other and f"{path}.".startswith(f"{other}." if other else "")

    return {path for path in given if not any(inside(path, other) for other in given)}
