"""The result of compression without training (``oto.one_shot``): what was removed, and the held-out loss."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from oto.groups import Cost
from oto.report.table import columns, cost_rows, html


@dataclass(frozen=True)
class Portion:
    """Node groups that lost their atoms together.

    Attributes:
        groups: The names of the groups.
        atoms, size: How many atoms were removed, and how many there were.
        readers: How many weights the atoms could be folded into.
        before: The loss on the held-out batches before the removal.
        zeroed, folded: The loss with the atoms at zero, and with them folded into readers; ``None`` if not measured.
        kept: Which of the two was kept: ``"folded"`` or ``"zeroed"``.
        norms: Whether batch norms were estimated again.
        unreached: Weights that no batch reached, so that nothing was folded into them.
        segments: Whether the groups are segments, which have one atom each and are removed before everything else.
    """

    groups: tuple[str, ...]
    atoms: int
    size: int
    readers: int
    before: float | None
    zeroed: float | None
    folded: float | None
    kept: str
    norms: bool
    unreached: tuple[str, ...] = ()
    segments: bool = False

    @property
    def after(self) -> float | None:
        """The loss of what was kept."""
        return self.folded if self.kept == "folded" else self.zeroed


@dataclass(frozen=True)
class OneShot:
    """A model that was compressed without training: print it, or take ``to_dict()``.

    Attributes:
        target: The target.
        how: How atoms were chosen, and how they were folded.
        portions: The portions, from input to output.
        loss: The loss on the held-out batches before and after; ``None`` if no batches were held out.
        before, after: Costs of the full and of the slim network.
        kept: How many atoms each node group keeps.
        not_folded: For groups that lost atoms, why some or all of them could not be folded.
    """

    target: str
    how: str
    portions: tuple[Portion, ...]
    loss: tuple[float, float] | None
    before: Cost
    after: Cost
    kept: dict[str, int]
    not_folded: dict[str, tuple[str, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"{self.target}\n{self.how}", columns(self._cells()), "\n".join(self._said()), columns(self._costs())]
        return "\n\n".join(part for part in parts if part)

    def _repr_html_(self) -> str:
        above, below = f"{self.target}\n{self.how}", "\n".join(self._said())
        return html(self._cells(), above=above, below=below) + html(self._costs())

    def _cells(self) -> list[list[str]]:
        cells = [["portion", "atoms gone", "readers", "held-out loss", "zeroed", "folded", "stays"]]
        for portion in self.portions:
            more = f" and {len(portion.groups) - 1} more" if len(portion.groups) > 1 else ""
            losses = ("–" if x is None else f"{x:.4g}" for x in (portion.before, portion.zeroed, portion.folded))
            cells.append(
                [
                    f"{portion.groups[0]}{more}",
                    f"{portion.atoms:,} of {portion.size:,}" + " segments" * portion.segments,
                    str(portion.readers),
                    *losses,
                    portion.kept + (", norms anew" if portion.norms else ""),
                ]
            )
        return cells

    def _said(self) -> list[str]:
        lines = [] if self.loss is None else [f"held-out loss: {self.loss[0]:.4g} before, {self.loss[1]:.4g} after"]
        why: dict[tuple[str, ...], list[str]] = {}
        for name, reasons in self.not_folded.items():
            why.setdefault(reasons, []).append(name)
        lines += [
            f"not taken over: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}, {reasons[0]}"
            + (f" (and {len(reasons) - 1} more reasons)" if len(reasons) > 1 else "")
            for reasons, names in why.items()
        ]
        lines += [f"no batch reached {name}" for portion in self.portions for name in portion.unreached]
        return lines

    def _costs(self) -> list[list[str]]:
        return cost_rows(self.before, self.after)
