"""The result of ``oto.preview``: how many atoms of each layer a target would keep."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from oto.groups import Cost, Costs, NodeGroup
from oto.report.table import columns, cost_rows, html


@dataclass(frozen=True)
class Width:
    """A node group in a preview.

    Attributes:
        group: Its name.
        before, after: The number of atoms in the full network, and of those that would be kept.
        macs_before, macs_after: MACs of all products that have the group as a factor. A product has several factors, so
            the sum over groups is more than the MACs of the network.
        factor: Which factor of a dimension it is, as in :attr:`oto.groups.NodeGroup.factor`.
    """

    group: str
    before: int
    after: int
    macs_before: int
    macs_after: int
    factor: str | None = None


@dataclass(frozen=True)
class Preview:
    """What a target would keep: print it, or take ``to_dict()``.

    Attributes:
        target: The target.
        how: How atoms were chosen.
        widths: Every prunable node group.
        before, after: Costs of the full network, and of the slim one.
        milliseconds: The measured time of a forward pass before and after, if the target is in milliseconds.
    """

    target: str
    how: str
    widths: tuple[Width, ...]
    before: Cost
    after: Cost
    milliseconds: tuple[float, float] | None = None

    @property
    def kept(self) -> dict[str, int]:
        """How many atoms each node group would keep."""
        return {width.group: width.after for width in self.widths}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join([self.target, self.how, "", columns(self._cells()), *self._said(), "", columns(self._costs())])

    def _repr_html_(self) -> str:
        above = f"{self.target}\n{self.how}"
        return html(self._cells(), above=above, below="\n".join(self._said())) + html(self._costs())

    def _said(self) -> list[str]:
        """Notes on columns that need one."""
        factors = [width.factor for width in self.widths if width.factor]
        lines = [
            "MACs with it: a product counts for each group that it runs through, so rows do not add up to the total"
        ]
        if factors:
            lines.append(
                f"{factors[0]}: the group in brackets is a factor of a dimension, as heads and their width are"
            )
        return lines

    def _cells(self) -> list[list[str]]:
        """One row for each width; widths of repeated blocks share a row."""
        rows: dict[tuple[str, str, int], list[Width]] = {}
        for width in self.widths:
            place = re.sub(r"(?<![/\d])\d+", "*", width.group), width.factor or "", width.before
            rows.setdefault(place, []).append(width)
        cells = [["node group", "groups", "before", "after", "kept", "MACs with it", "after"]]
        for (name, factor, before), some in rows.items():
            after = [width.after for width in some]
            macs = [sum(w.macs_before for w in some), sum(w.macs_after for w in some)]
            cells.append(
                [
                    f"{name if len(some) > 1 else some[0].group} {factor}".rstrip(),
                    str(len(some)),
                    f"{before:,}",
                    f"{after[0]:,}" if min(after) == max(after) else f"{min(after):,}–{max(after):,}",
                    f"{sum(after) / (before * len(some)):.0%}",
                    *(f"{n:,}" for n in macs),
                ]
            )
        return cells

    def _costs(self) -> list[list[str]]:
        rows_of_costs = cost_rows(self.before, self.after)
        if self.milliseconds is not None:
            before_ms, after_ms = self.milliseconds
            rows_of_costs.append(["ms, measured", f"{before_ms:.3g}", f"{after_ms:.3g}", f"{after_ms / before_ms:.1%}"])
        return rows_of_costs


def preview(
    target: str,
    how: str,
    groups: Iterable[NodeGroup],
    costs: Costs,
    kept: Mapping[str, int],
    full: Cost,
    remaining: Cost,
    milliseconds: tuple[float, float] | None = None,
) -> Preview:
    """Collect the widths of all prunable groups.

    Args:
        kept: How many atoms each group would keep; missing groups stay whole.
        full, remaining: The costs of the full and of the slim network.
        milliseconds: The times of both, if measured.
    """
    counts = np.array([kept.get(name, size) for name, size in zip(costs.names, costs.sizes, strict=True)], np.int64)
    factors = {group.name: group.factor for group in groups}
    through = [costs.macs.marginal(n, n) for n in (costs.sizes, counts)]  # what would be saved if no atom were left
    widths = tuple(
        Width(name, int(size), int(count), int(a), int(b), factors[name])
        for name, size, count, a, b in zip(costs.names, costs.sizes, counts, *through, strict=True)
    )
    return Preview(target, how, widths, full, remaining, milliseconds)
