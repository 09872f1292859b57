"""An offline HTML page about a family: its members, and their scores against their costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oto.atomic import whole_file
from oto.groups import Cost
from oto.report import charts
from oto.report.table import columns, html

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
:root {{ --ink: #1a1a1a; --muted: #767676; --soft: #ececec; --accent: #3566b8; --band: #f4f4f4; --paper: #fff }}
@media (prefers-color-scheme: dark) {{
:root {{ --ink: #eee; --muted: #999; --soft: #333; --accent: #7aa2e8; --band: #222; --paper: #151515 }} }}
body {{ color: var(--ink); background: var(--paper); font: 16px/1.5 sans-serif; max-width: 46rem; margin: 2rem auto;
padding: 0 1rem }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .2rem .8rem .2rem 0; text-align: right }} td:first-child, th:first-child {{ text-align: left }}
svg {{ width: 100%; height: auto }}
</style></head><body><h1>{title}</h1>
{table}
{chart}
</body></html>
"""


@dataclass(frozen=True)
class MemberRow:
    """A member as the page shows it."""

    target: str
    cost: Cost
    score: float | None
    trained: bool


def rows_of(sizes: Sequence[MemberRow]) -> list[list[str]]:
    """The members as rows of text; the first row has the headings."""
    full = sizes[0].cost
    rows = [["member", "MACs", "share", "parameters", "score", ""]]
    for one in sizes:
        share = one.cost.macs / full.macs if full.macs else 1.0
        score = "" if one.score is None else f"{one.score:.5g}"
        how = "" if one.trained else "cut without training"
        rows.append([one.target, f"{one.cost.macs:,}", f"{share:.1%}", f"{one.cost.params:,}", score, how])
    return rows


def table_of(sizes: Sequence[MemberRow]) -> str:
    """The members as a table."""
    return columns(rows_of(sizes))


def report(path: Path, name: str, sizes: Sequence[MemberRow]) -> Path:
    """Write the page; without scores it has no curve.

    Raises:
        MissingExtraError: matplotlib is not installed (``pip install 'oto[report]'``).
        ArtifactError: The file cannot be written; an existing file is unchanged.
    """
    scored = [(one, one.score) for one in sizes if one.score is not None]
    chart = ""
    if scored:
        chart = charts.points(
            "family",
            [one.cost.macs for one, _ in scored],
            [score for _, score in scored],
            [one.target for one, _ in scored],
            ("MACs", "score"),
            "; ".join(f"{one.target}: {one.cost.macs:,} MACs, score {score:.5g}" for one, score in scored),
        )
    title = f"A family of {name}".replace("&", "&amp;").replace("<", "&lt;")
    with whole_file(path) as file:
        file.write_text(PAGE.format(title=title, table=html(rows_of(sizes)), chart=chart), encoding="utf-8")
    return path
