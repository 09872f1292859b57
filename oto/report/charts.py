"""Charts as inline SVG, drawn by matplotlib.

Text stays text, and colors are CSS variables of the page, so a chart follows the page's dark mode and font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from oto.errors import MissingExtraError

# Placeholder colors for matplotlib, which CSS variables replace in the SVG.
INK, MUTED, SOFT, ACCENT, BAND = (f"#0a0b{n:02x}" for n in range(0x10, 0x15))
_VARIABLES = {INK: "--ink", MUTED: "--muted", SOFT: "--soft", ACCENT: "--accent", BAND: "--band"}
WIDTH, NARROW = 3.2, 2.4
"""Width in inches of a chart, and of a chart beside others: small enough for readable text on a page of any width."""


def _figure(height: float, rows: int = 1, width: float = WIDTH) -> tuple[Any, Any]:
    """A figure and its axes, one below the other."""
    try:
        from matplotlib.figure import Figure
    except ImportError as failure:
        raise MissingExtraError(
            "a report needs matplotlib, which is not installed\n  to fix  pip install 'oto[report]'"
        ) from failure
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, sharex=True, squeeze=False)[:, 0]
    for ax in axes:
        ax.patch.set_visible(False)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(MUTED)
        ax.tick_params(colors=MUTED, labelsize=7)
    figure.patch.set_visible(False)
    return figure, axes


def _svg(figure: Any, name: str, says: str) -> str:
    """The figure as an element of a page.

    Args:
        name: A name that is unique on the page; ids inside the figure begin with it.
        says: What the figure shows, for screen readers.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return embedded(buffer.getvalue(), name, says)


def embedded(svg: str, name: str, says: str) -> str:
    """An SVG document as an element of a page: no prologue and no external addresses, but unique ids and a label."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\sid="', f' id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = re.sub(r"font: ([^;\"]*?)'[^;\"]*", r"font: \1sans-serif", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    label = says.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def bars(name: str, before: int, after: Sequence[int], says: str) -> str:
    """One bar for each of several equal layers: how many of its ``before`` atoms it keeps."""
    figure, (ax,) = _figure(0.95, width=NARROW)
    places = range(len(after))
    ax.bar(places, [before] * len(after), 0.8, facecolor=SOFT, edgecolor=MUTED, linewidth=0.6)
    ax.bar(places, after, 0.8, color=ACCENT)
    ax.set_xlim(-0.6, max(len(after), 4) - 0.4)
    ax.set_yticks([0, before])
    step = max(len(after) // 6, 1)
    ax.set_xticks(list(places)[::step])
    ax.tick_params(axis="x", length=0)
    return _svg(figure, name, says)


def shares(name: str, rows: Sequence[tuple[str, float, float, str]], says: str, own_scale: bool = False) -> str:
    """For each row, a bar inside a bar.

    Args:
        rows: For each row its label, the numbers before and after, and a text for the right side.
        own_scale: Whether every row fills the width; otherwise all rows share one scale.
    """
    figure, (ax,) = _figure(0.32 * len(rows) + 0.1, width=NARROW if own_scale else WIDTH)
    room = 38 if own_scale else 54  # characters in a row
    largest = max(before for _, before, _, _ in rows) or 1
    for place, (label, before, after, text) in enumerate(rows):
        scale = (before or 1) if own_scale else largest
        ax.barh(place, before / scale, 0.36, facecolor=SOFT, edgecolor=MUTED, linewidth=0.6)
        ax.barh(place, after / scale, 0.36, color=ACCENT)
        letters = room - len(text)
        short = label if len(label) <= letters else f"…{label[1 - letters :]}"
        ax.text(0, place - 0.27, short, color=INK, fontsize=7.5, va="bottom")
        ax.text(1, place - 0.27, text, color=MUTED, fontsize=7.5, va="bottom", ha="right")
    ax.set_ylim(len(rows) - 0.6, -0.85)
    ax.set_xlim(-0.005, 1.005)
    ax.set_axis_off()
    return _svg(figure, name, says)


def spread(name: str, milliseconds: Mapping[str, Sequence[float]], says: str) -> str:
    """One box for each model: quartiles, with whiskers at the 5th and 95th percentiles."""
    figure, (ax,) = _figure(0.36 * len(milliseconds) + 0.5)
    boxes = ax.boxplot(
        list(milliseconds.values()),
        orientation="horizontal",
        whis=(5, 95),
        showfliers=False,
        patch_artist=True,
        widths=0.5,
    )
    for line in (*boxes["whiskers"], *boxes["caps"], *boxes["medians"]):
        line.set_color(INK)
    for box, color in zip(boxes["boxes"], [SOFT, ACCENT], strict=False):
        box.set(facecolor=color, edgecolor=INK)
    ax.set_yticks(range(1, len(milliseconds) + 1), list(milliseconds))
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.set_xlabel("milliseconds of a forward pass", fontsize=7.5, color=MUTED)
    return _svg(figure, name, says)


def curves(
    name: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    periods: Sequence[tuple[int, int]],
    says: str,
) -> str:
    """Values over steps, one plot below the other, with the pruning periods shaded."""
    figure, axes = _figure(1.05 * len(series) + 0.2, len(series))
    from matplotlib.ticker import EngFormatter

    for ax, (title, (steps, values)) in zip(axes, series.items(), strict=True):
        for first, end in periods:
            ax.axvspan(first, end, color=BAND, linewidth=0)
            ax.axvline(first, color=MUTED, linewidth=0.5, linestyle=(0, (2, 2)))
        ax.plot(steps, values, color=ACCENT, linewidth=1.3)
        ax.set_title(title, fontsize=8, color=INK, loc="left")
        if max(map(abs, values)) >= 1e4:
            ax.yaxis.set_major_formatter(EngFormatter())
    axes[-1].set_xlabel("step", fontsize=7.5, color=MUTED)
    return _svg(figure, name, says)


def points(
    name: str, x: Sequence[float], y: Sequence[float], marks: Sequence[str], labels: tuple[str, str], says: str
) -> str:
    """One value against another, joined by a line in the order of ``x``.

    Args:
        marks: A label beside each point.
        labels: The labels of both axes.
    """
    figure, (ax,) = _figure(2.0)
    from matplotlib.ticker import EngFormatter

    order = sorted(range(len(x)), key=x.__getitem__)
    ax.plot([x[i] for i in order], [y[i] for i in order], color=ACCENT, linewidth=1.3, marker="o", markersize=4)
    for i in order:
        ax.annotate(marks[i], (x[i], y[i]), (3, 4), textcoords="offset points", fontsize=7, color=INK)
    ax.xaxis.set_major_formatter(EngFormatter())
    ax.margins(0.12, 0.15)
    ax.set_xlabel(labels[0], fontsize=7.5, color=MUTED)
    ax.set_ylabel(labels[1], fontsize=7.5, color=MUTED)
    return _svg(figure, name, says)
