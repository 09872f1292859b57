"""Find the calls at the same place of each repeated block, so that a repair in one block is tried in all of them.

Example: the view in ``layers.0.attn`` and those of ``layers.1.attn``, ``layers.2.attn`` are alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from oto.trace.functions import FunctionCall
from oto.trace.graph import Graph


def ancestors(path: str) -> list[str]:
    """A module and all modules that enclose it, innermost first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]


def moved(holder: str, home: str, other: str) -> str | None:
    """The module at the same place relative to ``other`` as ``holder`` is relative to ``home``.

    >>> [moved(holder, "layers.0.attn", "layers.3.attn") for holder in ("layers.0.attn.bias", "layers.0")]
    ['layers.3.attn.bias', 'layers.3']
    """
    for around, there in zip(ancestors(home), ancestors(other), strict=False):
        if holder == around or not around or holder.startswith(f"{around}."):
            rest = holder[len(around) :].lstrip(".")
            return ".".join(part for part in (there, rest) if part)
    return None


def family(name: str) -> str:
    """A name with block numbers replaced by ``*``; the part of a group's name after the slash is kept.

    >>> family("layers.3.attn.weight/1")
    'layers.*.attn.weight/1'
    """
    path, slash, which = name.partition("/")
    return re.sub(r"\d+", "*", path) + slash + which


@dataclass(frozen=True, eq=False)
class Blocks:
    """The calls of a model, by their place in a block.

    Attributes:
        modules: The modules of the full model, by path.
        functions: The torch functions that the model calls; they record in which run of a module a call is made.
    """

    graph: Graph
    modules: Mapping[str, nn.Module]
    functions: Sequence[FunctionCall]

    def alike(self, index: int) -> list[int]:
        """The calls at the same place of blocks whose paths differ only in numbers, including this one."""
        keys, found = self._by_path
        return found[keys[index]]

    def same_line(self, index: int) -> list[int]:
        """The calls from the same line in every run of every module of the class, including this one.

        If a line calls several times in one run, only the calls at the same turn count.
        """
        keys, found = self._by_line
        return found[keys[index]]

    def every_turn(self, index: int) -> list[int]:
        """:meth:`same_line`, but at any turn, as in a loop."""
        keys, found = self._by_loop
        return found[keys[index]]

    @cached_property
    def _by_path(self) -> tuple[list[Hashable], dict[Hashable, list[int]]]:
        seen: dict[str, int] = {}

        def key(index: int) -> Hashable:
            node = self.graph.nodes[index]
            seen[node.module] = seen.get(node.module, -1) + 1
            return re.sub(r"\d+", "*", node.module), seen[node.module], node.op

        return self._gathered(key)

    @cached_property
    def _by_line(self) -> tuple[list[Hashable], dict[Hashable, list[int]]]:
        runs = {index: call.within[-1] for call in self.functions for index in call.nodes if call.within}
        seen: dict[Hashable, int] = {}

        def key(index: int) -> Hashable:
            node = self.graph.nodes[index]
            line = type(self.modules.get(node.module)), node.source, node.op
            within = (*line, runs.get(index, (node.module, 0)))
            seen[within] = seen.get(within, -1) + 1
            return *line, seen[within]

        return self._gathered(key)

    @cached_property
    def _by_loop(self) -> tuple[list[Hashable], dict[Hashable, list[int]]]:
        nodes = self.graph.nodes
        return self._gathered(lambda i: (type(self.modules.get(nodes[i].module)), nodes[i].source, nodes[i].op))

    def _gathered(self, key: Callable[[int], Hashable]) -> tuple[list[Hashable], dict[Hashable, list[int]]]:
        keys = [key(node.index) for node in self.graph.nodes]
        found: dict[Hashable, list[int]] = {}
        for index, own in enumerate(keys):
            found.setdefault(own, []).append(index)
        return keys, found
