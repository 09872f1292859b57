"""Which parts of a network can be removed as a whole, what that saves, and why other branches stay."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from oto.groups import NodeGroup, Partition
from oto.groups.cost import Cost, cost
from oto.groups.partition import Segment
from oto.groups.segments import Modules, Staying
from oto.report.table import columns, html


@dataclass(frozen=True)
class Part:
    """A segment.

    Attributes:
        segment: Its name: the module that ends it.
        modules: The outermost modules that no longer run without it.
        writers: The parameters that are zero when it is removed.
        params, macs, bytes: What its removal saves.
        joint: What becomes of the addition or the concatenations that it ends in.
        reason: Why it stays nevertheless; ``None`` if it can be removed.
    """

    segment: str
    modules: tuple[str, ...]
    writers: tuple[str, ...]
    params: int
    macs: int
    bytes: int
    joint: str
    reason: str | None = None


@dataclass(frozen=True)
class Branch:
    """A residual or parallel branch that cannot be removed.

    Attributes:
        branch: The module that ends it.
        reason: Why it cannot be removed.
        operator, module, source: The call that is the reason, its module and the line of the user's code; ``None`` if
            the reason is not a call.
    """

    branch: str
    reason: str
    operator: str | None = None
    module: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Erasable:
    """What can be removed as a whole; to be printed.

    Attributes:
        full: The costs of the full network.
        parts: The segments, in the order of the network.
        staying: Branches that cannot be removed.
    """

    full: Cost
    parts: tuple[Part, ...]
    staying: tuple[Branch, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        free = sum(part.reason is None for part in self.parts)
        heading = f"{free} segment{'s' * (free != 1)} may go as a whole"
        lines = [heading, *([columns(self._rows(), left=(0, 1, 4))] if self.parts else [])]
        return "\n".join([*lines, *lines_of(self.staying)])

    def _repr_html_(self) -> str:
        return html(self._rows(), left=(0, 1, 4), below="\n".join(lines_of(self.staying)))

    def _rows(self) -> list[list[str]]:
        rows = [["segment", "modules", "params", "MACs", "what becomes of the joint"]]
        for part in self.parts:
            more = f" and {len(part.modules) - 2} more" if len(part.modules) > 2 else ""
            joint = part.joint if part.reason is None else f"stays: {part.reason}"
            macs = f"{part.macs:,} ({part.macs / max(self.full.macs, 1):.1%})"
            rows.append([part.segment, ", ".join(part.modules[:2]) + more, f"{part.params:,}", macs, joint])
        return rows


def lines_of(staying: Sequence[Branch]) -> list[str]:
    """Why branches cannot be removed: one line for all that differ only in the numbers of repeated blocks."""
    alike: dict[str, list[Branch]] = {}
    for branch in staying:
        alike.setdefault(re.sub(r"\d+", "*", f"{branch.branch} {branch.reason} {branch.module}"), []).append(branch)
    more = [f" (and {len(own) - 1} like it)" if len(own) > 1 else "" for own in alike.values()]
    return [f"stays: {_described(own[0])}{rest}" for own, rest in zip(alike.values(), more, strict=True)]


def _described(branch: Branch) -> str:
    """Why a branch cannot be removed, in one line."""
    place = "" if branch.operator is None else f" ({branch.operator} in {branch.module or 'the model'}"
    place += f", {branch.source})" if place and branch.source else ")" if place else ""
    return f"{branch.branch or 'the model'}: {branch.reason}{place}"


def erasable(partition: Partition, groups: Sequence[NodeGroup], staying: Sequence[Staying]) -> Erasable:
    """Summarize the segments of a partition.

    Args:
        groups: The node groups, after all policies.
        staying: Branches that cannot be removed.
    """
    graph, full = partition.found.graph, cost(partition)
    modules, reasons = Modules(graph.nodes), {group.name: group.reason for group in groups}
    parts = []
    for segment in partition.segments:
        without = cost(partition, {segment.name: 0})
        joint = graph.calls[segment.joint]
        parts.append(
            Part(
                segment.name,
                tuple(modules.within(segment.body)),
                tuple(leaf.name for leaf in segment.writers),
                full.params - without.params,
                full.macs - without.macs,
                full.bytes - without.bytes,
                _after(joint.module or "the model", segment),
                reasons.get(segment.name),
            )
        )
    return Erasable(full, tuple(parts), tuple(branch_of(s, partition) for s in staying))


def _after(where: str, segment: Segment) -> str:
    """What becomes of the joint of a segment."""
    if not segment.into:
        return f"the addition in {where} gives its other argument"
    if not segment.axes:
        return f"the stack in {where} takes zeros in its place"
    more = f" and {len(segment.into) - 1} more" if len(segment.into) > 1 else ""
    return f"the concatenation in {where}{more} gets shorter, and what reads it narrower"


def branch_of(staying: Staying, partition: Partition) -> Branch:
    """A branch that cannot be removed, with the call that is the reason."""
    if staying.cause is None:
        return Branch(staying.path, staying.reason)
    node = partition.found.graph.calls[staying.cause]
    return Branch(staying.path, staying.reason, node.name, node.module, node.source or None)
