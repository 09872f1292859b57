"""Decide which module overrides which calls; each call is identified by the lines of code that lead to it.

The table of a module also lists calls from the same lines that stay unchanged: :class:`oto.nn.OverriddenForward`
rejects a call that is not in the table, because the code then takes a different path.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch

from oto.axes.call import Rewrite
from oto.errors import EmitterError
from oto.nn.overrides import FullCount, Override, Overrides, Passed, Sizes
from oto.slim.own_class.adaptation import Adaptation
from oto.slim.own_class.blocks import ancestors
from oto.slim.own_class.overrides import FunctionCalls
from oto.slim.pruned_shapes import PrunedShapes
from oto.trace.functions import FunctionCall
from oto.trace.graph import Node

aten = torch.ops.aten

Table = dict[str, dict[str, list[Override]]]
"""For each site and function name, the overrides of the calls there, in order."""


def overrides_of(
    calls: FunctionCalls,
    adaptation: Adaptation,
    pruned: PrunedShapes,
    sizes_only: bool = False,
    passed: Collection[int] = (),
) -> dict[str, Overrides]:
    """The call overrides of each module, by path.

    A call that states sizes is overridden whether or not they change: the code may take the number from an attribute
    or a tensor that does change. After a run, overrides of numbers that the code gets right are removed.

    Args:
        sizes_only: Leave full counts out, so that modules make the same calls as before.
        passed: Indices of calls that are given no channels, and not made.

    Raises:
        EmitterError: A module that runs several times would need different overrides each time.
    """
    graph, rewrites = calls.partition.found.graph, calls.partition.found.tape.rewrites
    changed = {place.module for place, size in adaptation.sizes.items() if size.now(pruned) != size.value}
    hows: dict[int, Override] = {}
    for index, places in adaptation.overrides.items():
        node, rewrite = graph.nodes[index], rewrites.get(index)
        if rewrite is not None and (rewrite.op is node.op or rewrite.op is aten.reshape.default):
            places = tuple(sorted({*places, *calls.widths(rewrite)}))
        if not places and not _recounts(node, rewrite, pruned, changed):
            continue
        how = calls.override(node, rewrite, pruned, places, sizes_only)
        assert how is not None
        takes = None if sizes_only else calls.takes(node, pruned, not isinstance(how, Sizes))
        hows[calls.by_node[index]] = replace(how, takes=takes)
    hows |= {calls.by_node[index]: Passed() for index in passed if index in calls.by_node}
    needs = {at: set(calls.needed(how.keywords["rest"])) for at, how in hows.items() if _has_rest(how)}
    for at in set().union(*needs.values()):
        hows[at] = replace(hows.get(at, Override()), keep=True)
    return _Placement(calls, hows, needs).by_module()


def _has_rest(how: Override) -> TypeGuard[FullCount]:
    """Whether the value of removed entries is computed from other results."""
    return isinstance(how, FullCount) and "rest" in how.keywords


def _recounts(node: Node, rewrite: Rewrite | None, pruned: PrunedShapes, changed: Set[str]) -> bool:
    """Whether a call must state a count or split sizes; the latter also if an attribute of its modules changes."""
    if rewrite is None or pruned.changes(rewrite):
        return rewrite is not None
    return rewrite.op is aten.split_with_sizes.default and not changed.isdisjoint(ancestors(node.module))


@dataclass(frozen=True, eq=False)
class _Placement:
    """Calls to override, and the modules that override them.

    Attributes:
        hows: The overrides, by the position of the function call.
        needs: For a call that computes the value of removed entries, the positions of the calls it is computed from.
    """

    calls: FunctionCalls
    hows: Mapping[int, Override]
    needs: Mapping[int, set[int]]

    @property
    def recorded(self) -> Sequence[FunctionCall]:
        return self.calls.recorded

    def by_module(self) -> dict[str, Overrides]:
        """The overrides of each module: the calling one, or an enclosing one that can tell its runs apart."""
        homes = self._homes()
        while True:
            made, clashing = self._tables(homes)
            if not clashing:
                return dict(made)
            for at, path in homes.items():  # the enclosing module may be able to tell the runs apart
                if path in clashing:
                    around = [p for p, _ in self.recorded[at].within]
                    if around.index(path) == 0:
                        raise EmitterError(f"{path or 'the model'} states different sizes each time that it runs")
                    homes[at] = around[around.index(path) - 1]
            homes = self._homes(homes)

    def _homes(self, least: Mapping[int, str] | None = None) -> dict[int, str]:
        """For each overridden call, the module that overrides it: its own, or the innermost around all it needs."""
        made = dict(least) if least is not None else {at: self.recorded[at].within[-1][0] for at in self.hows}
        moved = True
        while moved:
            moved = False
            for at, others in self.needs.items():
                together = [at, *others]
                runs = [[run for run in self.recorded[i].within if not _inside(run[0], made[i])] for i in together]
                shared = [run for run in runs[0] if all(run in other for other in runs[1:])]
                for i in together:
                    moved |= made[i] != shared[-1][0]
                    made[i] = shared[-1][0]
        return made

    def _tables(self, homes: Mapping[int, str]) -> tuple[dict[str, Table], set[str]]:
        """The overrides of each module, and the modules whose runs would need different overrides."""
        made: dict[str, Table] = {}
        clashing: set[str] = set()
        for path, sites in self._runs(homes):
            mine = {at for at, home in homes.items() if home == path}
            lines = {(self.recorded[at].lines[-1], self.recorded[at].name) for at in mine}
            kept = {at: (*key, time) for key, places in sites.items() for time, at in enumerate(places)}
            for (site, name), places in sites.items():
                if (site.rpartition("\n")[2], name) not in lines:
                    continue
                each = [self._spelled(self.hows[at], kept) if at in mine else Override() for at in places]
                if all(how == each[0] and not how.keep for how in each):
                    each = each[:1]
                if made.setdefault(path, {}).setdefault(site, {}).setdefault(name, each) != each:
                    clashing.add(path)
        return made, clashing

    def _spelled(self, how: Override, kept: Mapping[int, tuple[str, str, int]]) -> Override:
        """An override in which results of other calls are named by their sites, as a module identifies them."""
        if not _has_rest(how):
            return how
        return replace(how, keywords={**how.keywords, "rest": self.calls.spelled(how.keywords["rest"], kept)})

    def _runs(self, homes: Mapping[int, str]) -> Iterator[tuple[str, dict[tuple[str, str], list[int]]]]:
        """Each run of a module with overrides: its path, and for each site the positions of the calls there."""
        ends = {(self.recorded[at].lines[-1], self.recorded[at].name) for at in self.hows}
        runs: dict[tuple[str, int], dict[tuple[str, str], list[int]]] = {}
        overriding = set(homes.values())
        for at in sorted(itertools.chain.from_iterable(self.calls.alike[end] for end in ends)):
            call, done = self.recorded[at], set[str]()
            for level, run in enumerate(call.within):
                if run[0] in overriding and run[0] not in done:
                    done.add(run[0])
                    runs.setdefault(run, {}).setdefault((call.site(level), call.name), []).append(at)
        return ((path, sites) for (path, _), sites in runs.items())


def _inside(path: str, other: str) -> bool:
    """Whether a module is inside another."""
    return path != other and f"{path}.".startswith(f"{other}." if other else "")
