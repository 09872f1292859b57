"""The result of ``oto.explain``: what can be removed; and for the rest, reason, operator, module and source line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from math import prod
from typing import Any

from oto.errors import some
from oto.groups import NodeGroup, Partition
from oto.groups.policy import REMEDIES, promise, starred
from oto.groups.segments import Staying
from oto.report.erasable import Branch, branch_of, lines_of
from oto.report.table import columns, html
from oto.trace.graph import Graph

WAYS = {
    "meta": "traced on shapes alone: the graph holds for every input of these shapes",
    "fake": "traced on fake tensors: the graph holds for every input of these shapes",
    "real": "traced by running the example: the graph follows the path that this example took",
}


@dataclass(frozen=True)
class Whole:
    """A node group that stays whole.

    Attributes:
        group: Its name.
        size: Number of entries of the axis.
        parameters: The parameter dimensions that it runs through, such as ``("fc.weight", 0)``.
        entries: Number of entries of these parameters.
        reason: Why it stays whole.
        operator, module, source: The call that is the reason, the path of its module (``""`` is the model itself) and
            the line of the model's code that makes it; ``None`` if the reason is not a call.
    """

    group: str
    size: int
    parameters: tuple[tuple[str, int], ...]
    entries: int
    reason: str
    operator: str | None = None
    module: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Explanation:
    """What can be removed from a model, and why the rest stays whole.

    Attributes:
        trace: How the model was traced, and which inputs the graph holds for.
        prunable, atoms: The number of prunable node groups, and of their zero-invariant groups.
        share: The share of all parameter entries that are in parameters with a prunable dimension.
        whole: All other node groups, each with its reason.
        unreached: Parameters that the traced forward never uses.
        unknown: Operators without a rule.
        search: On request, each decision of the search for what the model's class needs: the line of code, what was
            seen and tried there, and what was chosen.
        staying: If segments may be removed: the residual and parallel branches that cannot be, and why.
    """

    trace: str
    prunable: int
    atoms: int
    share: float
    whole: tuple[Whole, ...]
    unreached: tuple[str, ...]
    unknown: tuple[str, ...]
    search: tuple[str, ...] = ()
    staying: tuple[Branch, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [*self._lines(), *_table(self.whole), *self._remedies(), *lines_of(self.staying), *self.search]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        above = "\n".join(self._lines())
        if not self.whole:
            return f"<p>{escape(above)}</p>"
        heading, *rows = _cells(self.whole)
        joined = [(*cells[:3], f"{cells[3]}\n{source}" if source else cells[3], *cells[4:]) for cells, source in rows]
        return html([heading[0], *joined], left=range(2, 6), above=above)

    def _remedies(self) -> list[str]:
        """What a user can do about the reasons, one line for each."""
        todo = sorted({promise(w.reason) for w in self.whole if promise(w.reason) < len(REMEDIES)})
        return [f"{'to fix' if place == 0 else ''}".ljust(8) + REMEDIES[i][1] for place, i in enumerate(todo)]

    def _lines(self) -> list[str]:
        lines = [
            f"{self.prunable} prunable node groups with {self.atoms:,} zero-invariant groups,"
            f" in parameters that hold {self.share:.1%} of all entries",
            self.trace,
        ]
        if self.unknown:
            lines.append(f"operators without a rule: {', '.join(self.unknown)}")
        if self.unreached:
            lines.append(f"never used by the traced forward: {_patterns(self.unreached)}")
        return lines


def explain(
    groups: Sequence[NodeGroup],
    partition: Partition,
    search: Iterable[object] = (),
    staying: Iterable[Staying] = (),
) -> Explanation:
    """Explain which node groups are prunable, and why the others are not.

    Args:
        search: The decisions of the search of a class, to be printed, too.
        staying: The branches that cannot be removed as a whole, to be printed, too.
    """
    graph = partition.found.graph
    sizes = {leaf.name: prod(leaf.value.shape) for leaf in graph.leaves if leaf.kind == "parameter"}
    used = {value for node in graph.nodes for value in node.inputs()} | set(graph.outputs)
    free = [group for group in groups if group.prunable]
    touched = {piece.parameter for group in free for piece in group.slices}
    return Explanation(
        WAYS.get(graph.mode, graph.mode),
        len(free),
        sum(group.size for group in free),
        sum(sizes[name] for name in touched) / max(sum(sizes.values()), 1),
        tuple(_whole(group, graph, sizes) for group in groups if not group.prunable),
        tuple(leaf.name for leaf in graph.leaves if leaf.kind == "parameter" and leaf.value not in used),
        tuple(sorted({node.name for node in partition.found.unknown})),
        tuple(map(str, search)),
        tuple(branch_of(branch, partition) for branch in staying),
    )


def _whole(group: NodeGroup, graph: Graph, sizes: dict[str, int]) -> Whole:
    named = tuple(dict.fromkeys((piece.parameter, piece.dim) for piece in group.slices))
    entries = sum(sizes[name] for name in dict.fromkeys(name for name, _ in named))
    reason = group.reason or ""
    if group.cause is None:
        return Whole(group.name, group.size, named, entries, reason)
    node = graph.calls[group.cause]
    return Whole(group.name, group.size, named, entries, reason, node.name, node.module, node.source or None)


def _table(whole: Sequence[Whole]) -> list[str]:
    if not whole:
        return []
    cells, sources = zip(*_cells(whole), strict=True)
    lines = columns(cells, left=range(2, 6)).splitlines()
    indent = " " * lines[0].index(cells[0][2])
    return ["", *(f"{line}\n{indent}{source}" if source else line for line, source in zip(lines, sources, strict=True))]


def _cells(whole: Sequence[Whole]) -> list[tuple[tuple[str, ...], str]]:
    """The heading, and one row with a source line for all groups that differ only in the numbers of repeated blocks.

    Reasons that a user can do something about come first, reasons that nobody can change last; among equal ones, those
    with the most entries come first.
    """
    rows: dict[tuple[str, ...], list[Whole]] = {}
    for w in whole:
        place = "" if w.module is None else re.sub(r"\d+", "*", w.module)
        rows.setdefault((w.reason, w.operator or "", place, w.source or ""), []).append(w)
    weight = {key: sum(w.entries for w in alike) for key, alike in rows.items()}
    order = sorted(rows, key=lambda key: (promise(key[0]), -weight[key]))
    heading = ("entries", "groups", "stays whole because", "operator", "in", "parameters")
    cells: list[tuple[tuple[str, ...], str]] = [(heading, "")]
    for key in order:
        reason, operator, _, source = key
        parameters = _patterns([name for w in rows[key] for name, _ in w.parameters])
        modules = _patterns([_module(w.module) for w in rows[key] if w.module is not None])
        cells.append(((f"{weight[key]:,}", str(len(rows[key])), reason, operator, modules, parameters), source))
    return cells


def _module(path: str) -> str:
    return starred(f"{path}.").removesuffix(".") if path else "the model"


def _patterns(names: Iterable[str]) -> str:
    """Names of parameters with stars for the numbers of repeated blocks; at most three."""
    return some(dict.fromkeys(map(starred, names)), 3)
