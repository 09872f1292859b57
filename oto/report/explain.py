"""What can be removed, and why the rest stays whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from oto.groups import NodeGroup, Partition

WAYS = {
    "meta": "traced on shapes alone: the graph holds for every input of these shapes",
    "fake": "traced on fake tensors: the graph holds for every input of these shapes",
    "real": "traced by running the example: the graph follows the path that this example took",
}


@dataclass(frozen=True)
class Whole:
    """Axes that stay whole for the same reason.

    Attributes:
        reason: Why, with the operator, the module and the source line that caused it.
        groups: Names of the node groups.
        entries: Parameter entries along these axes.
    """

    reason: str
    groups: tuple[str, ...]
    entries: int


@dataclass(frozen=True)
class Explanation:
    """What the analysis found.

    Attributes:
        trace: How the model was followed, and what that means.
        prunable: Number of prunable node groups; ``atoms`` counts their ZIGs.
        share: Share of all parameter entries that lie along a prunable axis.
        whole: Reasons for everything else, the weightiest first.
        unreached: Parameters that the traced forward never used.
        unknown: Operators without a rule.
    """

    trace: str
    prunable: int
    atoms: int
    share: float
    whole: tuple[Whole, ...]
    unreached: tuple[str, ...]
    unknown: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.prunable} prunable node groups with {self.atoms:,} zero-invariant groups,"
            f" in parameters that hold {self.share:.1%} of all entries",
            self.trace,
        ]
        if self.unknown:
            lines.append(f"operators without a rule: {', '.join(self.unknown)}")
        if self.unreached:
            lines.append(f"never used by the traced forward: {_patterns(self.unreached)}")
        for whole in self.whole:
            text, _, cause = whole.reason.partition(" (")
            lines += ["", f"{text}: {len(whole.groups)} groups, {whole.entries:,} parameter entries"]
            if cause:
                lines.append(f"  cause  {cause.removesuffix(')')}")
            lines.append(f"  where  {_patterns(whole.groups)}")
        return "\n".join(lines)


def explain(groups: Sequence[NodeGroup], partition: Partition) -> Explanation:
    """Sum up which axes may lose entries, and why the others may not."""
    graph = partition.found.graph
    sizes = {leaf.name: prod(leaf.value.shape) for leaf in graph.leaves if leaf.kind == "parameter"}
    reasons: dict[str, list[NodeGroup]] = {}
    touched: set[str] = set()
    for group in groups:
        if group.reason is None:
            touched.update(piece.parameter for piece in group.slices)
        else:
            reasons.setdefault(_general(group.reason), []).append(group)
    whole = [
        Whole(
            reason, tuple(g.name for g in found), sum(sizes[n] for n in {s.parameter for g in found for s in g.slices})
        )
        for reason, found in reasons.items()
    ]
    used = {value for node in graph.nodes for value in node.inputs()} | set(graph.outputs)
    free = [group for group in groups if group.prunable]
    return Explanation(
        WAYS.get(graph.how, graph.how),
        len(free),
        sum(group.size for group in free),
        sum(sizes[name] for name in touched) / max(sum(sizes.values()), 1),
        tuple(sorted(whole, key=lambda w: -w.entries)),
        tuple(leaf.name for leaf in graph.leaves if leaf.kind == "parameter" and leaf.value not in used),
        tuple(sorted({str(node.op) for node in partition.found.unknown})),
    )


def _general(reason: str) -> str:
    """A reason without the numbers of repeated blocks, so that they fall together."""
    return re.sub(r" at [^,)]+", lambda place: re.sub(r"\d+", "*", place.group()), reason)


def _patterns(names: Sequence[str]) -> str:
    """Names with the numbers of repeated blocks taken out, cut after three."""
    found = list(dict.fromkeys(re.sub(r"\d+", "*", name.split("/")[0]) for name in names))
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
