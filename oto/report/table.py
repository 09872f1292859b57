"""Tables of costs and results, for a terminal and for notebooks."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from oto.errors import some
from oto.groups import Cost
from oto.slim.pickled import needs_oto
from oto.slim.proof.compare import Check

OF_THE_CLASS = ("module", "config")
"""The emitters whose slim model is of the original class."""


class Described(Protocol):
    """The part of a slim model that a table needs."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def path(self) -> Path | None: ...
    @property
    def emitter(self) -> str: ...
    @property
    def why_graph(self) -> str | None: ...
    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def checks(self) -> Sequence[Check]: ...
    @property
    def cost_before(self) -> Cost: ...
    @property
    def cost_after(self) -> Cost: ...
    @property
    def kept(self) -> Mapping[str, Any]: ...


def columns(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> str:
    """Format rows of text; the columns in ``left`` are aligned to the left, the others to the right.

    >>> print(columns([["", "before"], ["MACs", "12"]]))
          before
    MACs      12
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def html(rows: Sequence[Sequence[str]], left: Container[int] = (0,), above: str = "", below: str = "") -> str:
    """Rows of text as an HTML table for a notebook; the first row is the heading; texts may be put above and below.

    >>> html([["", "before"], ["MACs", "12"]])
    '<table><thead><tr><th></th><th>before</th></tr></thead><tbody><tr><td>MACs</td><td>12</td></tr></tbody></table>'
    """

    def line(cells: Sequence[str], tag: str) -> str:
        style = ' style="text-align: left"'
        tagged = (
            f"<{tag}{style if i in left and i else ''}>{escape(cell)}</{tag}>".replace("\n", "<br>")
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(tagged)}</tr>"

    head, *body = rows
    table = f"<thead>{line(head, 'th')}</thead><tbody>{''.join(line(cells, 'td') for cells in body)}</tbody>"
    texts = [f"<p>{escape(text)}</p>".replace("\n", "<br>") if text else "" for text in (above, below)]
    return f"{texts[0]}<table>{table}</table>{texts[1]}"


def cost_rows(before: Cost, after: Cost) -> list[list[str]]:
    """Costs of the full and of the slim network, with a heading."""

    def row(name: str, a: int, b: int) -> list[str]:
        return [name, f"{a:,}", f"{b:,}", f"{100 * b / a:.1f} %" if a else "–"]

    return [
        ["", "before", "after", "kept"],
        row("parameters", before.params, after.params),
        row("MACs", before.macs, after.macs),
        row("bytes", before.bytes, after.bytes),
    ]


def subnet_table(subnet: Described) -> str:
    """The costs of a slim model, how it was proved, and where it is saved."""
    return "\n".join([columns(cost_rows(subnet.cost_before, subnet.cost_after)), *subnet_lines(subnet)])


def _times(comparisons: int) -> str:
    return f"{comparisons} comparison{'' if comparisons == 1 else 's'}"


def subnet_lines(subnet: Described) -> list[str]:
    """How a slim model was proved, its notes, and where it is saved."""
    worst: dict[str, Check] = {}
    for check in subnet.checks:
        if check.dtype not in worst or check.error > worst[check.dtype].error:
            worst[check.dtype] = check
    lines = [
        *(
            f"verified: {_times(len([c for c in subnet.checks if c.dtype == dtype]))} in {dtype}, largest relative"
            f" error {c.error:.1e} (tolerance {c.tolerance:.0e})"
            for dtype, c in worst.items()
        ),
        *([] if worst else ["not verified"]),
        "emitted as the original class" if subnet.emitter in OF_THE_CLASS else "emitted as a torch.fx.GraphModule",
    ]
    if subnet.why_graph:
        lines.append(f"  because {subnet.why_graph}")
    lines += [f"note: {note}" for note in subnet.notes]
    if ours := needs_oto(subnet.model):
        lines.append(f"torch.save(model) is read only where oto is installed: {some(ours, 3)}")
    if subnet.path is not None:
        lines.append(f"saved in {subnet.path}")
    return lines
