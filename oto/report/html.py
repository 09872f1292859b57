"""The report on a slim model: one HTML file that needs no network (``subnet.report("report.html")``)."""

from __future__ import annotations

import platform
import re
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from oto.atomic import whole_file
from oto.errors import MissingExtraError
from oto.groups import NodeGroup, Partition
from oto.groups.cost import Extent, macs_by_module
from oto.report import charts
from oto.report.draw import metric, to_dot
from oto.report.table import OF_THE_CLASS, Described, cost_rows
from oto.trace.outputs import tensors_in

TEMPLATE = "report.html.j2"
MOST = 12
"""The limit on rows of a chart of MACs; all further modules share one more row."""


@dataclass(frozen=True, eq=False)
class Background:
    """What a slim model was made from, for the report.

    Attributes:
        name: The class of the full model.
        target: The target, if an optimizer was made.
        partition, groups: The analysis of the model that was made slim.
        history: The optimizer's records of training: mappings with a ``step``, oldest first.
        periods: The first step of each pruning period, and the first step after it.
        first: The size before ``oto.shrink`` made it smaller during training; ``None`` if that was not called.
    """

    name: str
    partition: Partition
    groups: Sequence[NodeGroup]
    target: str | None = None
    history: Sequence[Any] = ()
    periods: Sequence[tuple[int, int]] = ()
    first: Extent | None = None

    @property
    def full(self) -> Extent:
        """The size of the full model."""
        return Extent.of(self.partition, self.groups) if self.first is None else self.first


def report(
    path: Path,
    subnet: Described,
    origin: Background,
    *,
    title: str | None = None,
    history: Sequence[Any] | None = None,
    milliseconds: Mapping[str, Sequence[float]] | None = None,
    example: Any = None,
) -> Path:
    """Write the report.

    Args:
        history: Records to show instead of the optimizer's.
        milliseconds: The times of several forward passes on ``example``, for the full and the slim model.

    Returns:
        ``path``.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed (``pip install 'oto[report]'``).
        ArtifactError: The file cannot be written; an existing file is unchanged.
    """
    environment = _environment()  # raises before anything is drawn
    drawing, no_drawing = _drawing(origin)
    full = origin.full
    sizes = {group.name: group.size for group in origin.groups} | dict(full.sizes)
    widths = [(g.name, sizes[g.name], len(subnet.kept[g.name])) for g in origin.groups if g.name in subnet.kept]
    name = title or origin.name
    facts: dict[str, Any] = {
        "title": name,
        "verdict": _verdict(subnet, milliseconds),
        "notes": subnet.notes,
        "asked": f"asked for: {origin.target}" if origin.target else "without a target",
        "costs": cost_rows(subnet.cost_before, subnet.cost_after),
        "panels": _panels(widths),
        "widths": widths,
        "macs": _macs(origin, subnet),
        "latency": _latency(milliseconds, example),
        "training": _training(_records(origin.history if history is None else history), origin.periods),
        "drawing": drawing,
        "no_drawing": no_drawing,
        "proof": _proof(subnet),
        "checks": subnet.checks,
        "form": _form(subnet),
        "load": _load(subnet),
        "versions": _versions(),
    }
    path = Path(path)
    page = _page(environment, facts)
    with whole_file(path) as draft:
        draft.write_text(page, encoding="utf-8")
    return path


def _environment() -> Any:
    """The jinja2 environment that renders the template.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as failure:
        raise MissingExtraError(
            f"a report needs {failure.name}, which is not installed\n  to fix  pip install 'oto[report]'"
        ) from failure
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )


def _page(environment: Any, facts: dict[str, Any]) -> str:
    """The page. Charts and drawings are inserted unescaped; all other text is escaped."""
    from markupsafe import Markup, escape

    for panel in facts["panels"]:  # let long names break at their dots
        panel["title"] = Markup(escape(panel["title"]).replace(".", Markup(".<wbr>")))
    for chart in (*facts["panels"], *filter(None, (facts["macs"], facts["latency"], facts["training"]))):
        chart["chart"] = Markup(chart["chart"])
    page: str = environment.get_template(TEMPLATE).render({**facts, "drawing": Markup(facts["drawing"])})
    return page


def _verdict(subnet: Described, milliseconds: Mapping[str, Sequence[float]] | None) -> str:
    before, after = subnet.cost_before, subnet.cost_after
    macs = f"{after.macs / before.macs:.1%} of the MACs and " if before.macs else ""
    exact = [c for c in subnet.checks if c.dtype == "float64"] or list(subnet.checks)
    faster = f", {_speedup(milliseconds):.2f} times as fast" if milliseconds else ""
    error = max((c.error for c in exact), default=0.0)
    equal = f"{f'to {error:.0e}' if error else 'in every bit'} in {exact[0].dtype}" if exact else "without a comparison"
    return (
        f"{macs}{after.params / before.params:.1%} of the parameters are left{faster}; equal to the pruned full model"
        f" {equal}"
    )


def _speedup(milliseconds: Mapping[str, Sequence[float]]) -> float:
    full, slim = milliseconds.values()
    return statistics.median(a / b for a, b in zip(full, slim, strict=True))


def pattern(name: str) -> str:
    """A name with stars for the numbers of repeated blocks.

    >>> pattern("encoder.layer.11.conv1.weight")
    'encoder.layer.*.conv1.weight'
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _panels(widths: Sequence[tuple[str, int, int]]) -> list[dict[str, str]]:
    """One chart for each set of repeated layers, and charts for the layers that are not repeated."""
    families: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for name, before, after in widths:
        families.setdefault((pattern(name), before), []).append((name, after))
    alone = [(some[0][0], before, some[0][1]) for (_, before), some in families.items() if len(some) == 1]
    panels = []
    for i, ((name, before), some) in enumerate(families.items()):
        if len(some) > 1:
            kept = [n for _, n in some]
            bounds = f"{min(kept):,}" if min(kept) == max(kept) else f"{min(kept):,} to {max(kept):,}"
            says = f"{len(some)} layers of {before:,}; {bounds} left, {sum(kept) / before / len(some):.0%} in all"
            chart = charts.bars(f"width{i}", before, kept, f"{name}: {says}. In order: {', '.join(map(str, kept))}")
            panels.append({"title": name, "chart": chart, "says": says})
    for i in range(0, len(alone), MOST):
        some_alone = alone[i : i + MOST]
        rows = [(name, before, after, f"{after:,} of {before:,}") for name, before, after in some_alone]
        says = f"{len(rows)} layer{'s' * (len(rows) > 1)} on {'their' if len(rows) > 1 else 'its'} own"
        spoken = f"{says}: " + "; ".join(f"{name} {text}" for name, _, _, text in rows)
        title = "Not repeated"
        panels.append({"title": title, "chart": charts.shares(f"alone{i}", rows, spoken, own_scale=True), "says": says})
    return panels


def _macs(origin: Background, subnet: Described) -> dict[str, str]:
    """MACs by module, with repeated blocks in one row, the largest first."""
    kept = {name: len(atoms) for name, atoms in subnet.kept.items()}
    full, slim = origin.full.macs, macs_by_module(origin.partition, kept)
    places: dict[str, list[int]] = {}
    for name in full:
        entry = places.setdefault(pattern(name) or "the model itself", [0, 0])
        entry[0] += full[name]
        entry[1] += slim.get(name, 0)
    order = sorted(places.items(), key=lambda item: -item[1][0])
    shown = [(name, macs[0], macs[1]) for name, macs in order[:MOST]]
    if rest := order[MOST:]:
        shown.append((f"{len(rest)} others", sum(m[0] for _, m in rest), sum(m[1] for _, m in rest)))
    rows = [(name, a, b, f"{metric(a).strip()} to {metric(b).strip()}") for name, a, b in shown]
    says = f"{metric(sum(full.values())).strip()} MACs before, {metric(sum(slim.values())).strip()} after"
    spoken = f"{says}. " + "; ".join(f"{name} {text}" for name, _, _, text in rows)
    if not rows:
        return {"chart": "", "says": "the model computes no products"}
    return {"chart": charts.shares("macs", rows, spoken), "says": f"{says}; modules of repeated blocks together."}


def _latency(milliseconds: Mapping[str, Sequence[float]] | None, example: Any) -> dict[str, str] | None:
    if milliseconds is None:
        return None
    said = []
    for name, own in milliseconds.items():
        low, middle, high = statistics.quantiles(own, n=4)
        said.append(f"{name} {middle:.3g} ms ({low:.3g} to {high:.3g})")
    tensors = list(tensors_in(example))
    shapes = ", ".join("×".join(map(str, t.shape)) for t in tensors)
    device = tensors[0].device if tensors else torch.device("cpu")
    where = f"{device}, {torch.get_num_threads()} CPU threads" if device.type == "cpu" else str(device)
    says = f"{'; '.join(said)}; {len(own)} passes each, in turns, on {where}; input {shapes}"
    return {"chart": charts.spread("latency", milliseconds, says), "says": says}


def _records(history: Sequence[Any]) -> list[Mapping[str, Any]]:
    return [record if isinstance(record, Mapping) else vars(record) for record in history]


def _training(history: Sequence[Mapping[str, Any]], periods: Sequence[tuple[int, int]]) -> dict[str, str] | None:
    """A chart of all numbers in the records over the steps; ``None`` if there are none."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for record in history:
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                steps, values = series.setdefault(key, ([], []))
                steps.append(record["step"])
                values.append(value)
    series = {key: (steps, values) for key, (steps, values) in series.items() if len(steps) > 1}
    if not series:
        return None
    ends = "; ".join(f"{key} from {_short(values[0])} to {_short(values[-1])}" for key, (_, values) in series.items())
    shaded = f"; groups go to zero from step {periods[0][0]} to {periods[-1][1] - 1} (shaded)" if periods else ""
    return {"chart": charts.curves("training", series, periods, f"{ends}{shaded}"), "says": f"{ends}{shaded}."}


def _short(x: float) -> str:
    """
    >>> _short(0.12345), _short(4.1e9)
    ('0.1235', '4.10 G')
    """
    return metric(int(x)) if abs(x) >= 1e4 else f"{x:.4g}"


def _drawing(origin: Background) -> tuple[str, str]:
    """The drawing as an element of the page, and an empty reason; or an empty string, and why there is no drawing."""
    if shutil.which("dot") is None:
        return "", "The drawing is left out: graphviz was not installed where this was written."
    try:
        dot = to_dot(origin.partition, origin.groups, origin.name)
    except MissingExtraError:
        return "", "The drawing is left out: pydot was not installed where this was written (pip install 'oto[viz]')."
    svg = dot.create(format="svg").decode("utf-8")
    svg = re.sub(r'<a xlink:title="([^"]*)">', r"<g><title>\1</title>", svg).replace("</a>", "</g>")
    return charts.embedded(svg, "drawing", f"the graph of {origin.name}"), ""


def _proof(subnet: Described) -> list[tuple[str, int, float, float]]:
    dtypes = dict.fromkeys(check.dtype for check in subnet.checks)
    return [
        (dtype, len(own), max(c.error for c in own), own[0].tolerance)
        for dtype in dtypes
        if (own := [c for c in subnet.checks if c.dtype == dtype])
    ]


def _form(subnet: Described) -> str:
    if subnet.emitter in OF_THE_CLASS:
        return "It is a module of the original class."
    return f"It is a torch.fx.GraphModule, because {subnet.why_graph or 'that was asked for'}."


def _load(subnet: Described) -> str:
    if subnet.path is None:
        return '# it was not saved: construct_subnet(out_dir="...") saves it'
    if subnet.emitter in OF_THE_CLASS:
        return (
            "from oto import load_subnet\n\n"
            f'model = load_subnet("{subnet.path}", make_model)  # make_model() gives the full-size model'
        )
    return f'from oto import load_subnet\n\nmodel = load_subnet("{subnet.path}")'


def _versions() -> str:
    from oto import __version__

    return (
        f"Written by oto {__version__} with torch {torch.__version__}, Python {platform.python_version()}, on"
        f" {platform.machine()} {platform.system()}. This file needs no network."
    )
