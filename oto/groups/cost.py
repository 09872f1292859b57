"""What a network costs, and what any choice of removals leaves, without building anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from oto.axes.terms import Axis, count, resolve
from oto.groups.partition import Partition


@dataclass(frozen=True)
class Cost:
    """Plain integers. One MAC is two FLOPs.

    Attributes:
        params: Entries of all parameters; a tied one counts once.
        macs: Multiply–adds of every product (linear, convolution, matmul, attention) on the example input.
    """

    params: int
    macs: int

    @property
    def flops(self) -> int:
        return 2 * self.macs


def cost(partition: Partition, kept: Mapping[str, int] | None = None) -> Cost:
    """The exact cost when each group named in ``kept`` has that many atoms left; others are whole."""
    counts: dict[Axis, int] = {partition.axes[name]: n for name, n in (kept or {}).items()}
    found = partition.found
    params = sum(
        prod(count(term, counts) for term in found.terms(leaf.value))
        for leaf in found.graph.leaves
        if leaf.kind == "parameter"
    )
    macs = sum(
        prod(count(resolve(term), counts) for term in step.volume)
        for step in found.tape.steps
        if step.volume is not None
    )
    return Cost(params, macs)


def macs_by_node(partition: Partition) -> dict[int, int]:
    """Multiply–adds of each call of the full model that has any, by the index of its node."""
    found: dict[int, int] = {}
    for step in partition.found.tape.steps:
        if step.volume is not None:
            found[step.node] = found.get(step.node, 0) + prod(count(resolve(term), {}) for term in step.volume)
    return found
