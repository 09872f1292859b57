"""Write ``docs/support_matrix.md`` from the results of the zoo tests: ``make test zoo support-matrix``."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .matrix import ZOOS, Result, zoo

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "support_matrix.md"
RECORD = DOCUMENT.with_suffix(".jsonl")
TITLES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "transformers": "transformers",
    "diffusers": "diffusers",
    "papers": "Networks as people write them after a paper",
    "packages": "Other packages of the Python index",
    "models": "torchvision and transformers, other sizes",
    "handmade": "Written for the tests",
}

COUNTS = {"choices", "in_class", "lost", "choice_error", "states", "class_commit"}
"""What is known of other counts, which are not left in every run."""

MACHINE = re.compile(r"[^\s\"]*/site-packages/")
"""Where packages lie on the machine of a run, which says nothing to others."""

SEGMENTS = {"segments", "erased", "segments_class", "segments_error", "segments_reason", "segments_commit"}
"""What is known of segments, which are erased in runs of their own."""

HEAD = """\
# Which models were tried, and what came of them

Written by `make support-matrix` from the results of `make test zoo` (`support_matrix.jsonl` keeps the last of each
model); not edited by hand. {versions}.

Every model is made with its own code, random weights and, where it is large, a small configuration. It is analyzed,
half of all zero-invariant groups (ZIGs) are set to zero at random, the slim model is built in both ways, and what it
computes in float64 is compared with the zeroed full model: on the example, on random inputs and on another batch size.

* **prunable**: share of all parameters that lie in node groups that may lose entries.
* **groups, ZIGs**: prunable node groups, and the zero-invariant groups in them.
* **traced**: on tensors that know their *shapes* (`meta`, then fake tensors), or on the *data* of the example, because
  the model looks at values. Then the graph follows the path of the example.
* **prunable** is with `allow_graph=True`; **class** is what the model's own class can do without, by default, and the
  slim model is of that class. **graph**: with `allow_graph=True`, a `torch.fx.GraphModule`. Where neither takes all
  that is prunable, the recorded calls were replayed on thinner tensors to prove the analysis on the example.
* **own class**: of so many models, whose class was asked since it is the default, so many have a slim model of it.
* **other counts**: of so many choices (one group alone thinner, all but one, what an optimizer leaves at 70 % of the
  MACs) so many slim models are of the own class; each was compared on the example. What the class can do without was
  asked of the model as its library makes it, and once more after a forward, in train mode: {states}.
* **segments**: with `compress_mode="both"`, a third of all segments (residual branches and the like) is erased at
  random besides half of all ZIGs: how many went of how many; with a ✓ the slim model is of the own class, else a graph.
* **error**: the largest difference of any comparison, relative to the largest entry of the output.
"""


def results() -> Iterator[tuple[str, str, Result]]:
    """Each model of each zoo with the last that was found of it; new findings are written down.

    Raises:
        SystemExit: Some were never tried.
    """
    from .test_exact import RESULTS

    record = {(line["kind"], line["name"]): line for line in map(json.loads, RECORD.read_text().splitlines())}
    for kind in TITLES:
        for name in zoo(kind):
            path = RESULTS / f"{kind}-{name}.json"
            if path.exists():
                new = json.loads(MACHINE.sub("", path.read_text()))
                new = {k: v for k, v in new.items() if v not in (None, "", [], ())}
                new = new if "segments_commit" in new else {k: v for k, v in new.items() if k not in SEGMENTS}
                tried = {k for e in ("module", "graph") if e in new or f"{e}_reason" in new for k in (e, f"{e}_reason")}
                tried |= {"changed", "failure"} if "trace" in new or "failure" in new else set()
                tried |= (COUNTS if "choices" in new else set()) | (SEGMENTS if "segments_commit" in new else set())
                old = {k: v for k, v in record.get((kind, name), {}).items() if k not in tried}
                record[kind, name] = old | new | {"kind": kind, "name": name}
    there = [(kind, name) for kind in TITLES for name in zoo(kind)]
    missing = [f"{kind}-{name}" for kind, name in there if (kind, name) not in record]
    if missing:
        raise SystemExit(
            f"{len(missing)} models were never tried ({', '.join(missing[:5])} …): run `make test zoo` first"
        )
    RECORD.write_text("".join(json.dumps(record[key], sort_keys=True) + "\n" for key in there))
    fields = {field.name for field in dataclasses.fields(Result)}
    for kind, name in there:
        yield kind, name, Result(**{k: v for k, v in record[kind, name].items() if k in fields})


def document() -> str:
    assert set(TITLES) == set(ZOOS)
    found: dict[str, list[Result]] = {}
    for kind, _, result in results():
        found.setdefault(kind, []).append(result)
    libraries = ("torch", "torchvision", "timm", "transformers", "diffusers")
    states, sources = both(found)
    head = HEAD.format(versions=", ".join(f"{name} {version(name)}" for name in libraries), states=states)
    sections = [line for kind in TITLES for line in section(kind, found[kind])]
    return "\n".join([head, *summary(found), "", *sources, *sections]) + "\n"


def both(found: dict[str, list[Result]]) -> tuple[str, list[str]]:
    """How often the state of a model made a difference; and which results are of which commit."""
    everything = [result for those in found.values() for result in those]
    asked = [r for r in everything if r.choices]
    other = sorted(r.name for r in asked if r.states)
    counted = {
        "The class, other counts, and states of the model": Counter(r.class_commit for r in everything),
        "Graphs": Counter(r.graph_commit for r in everything),
        "Segments": Counter(r.segments_commit for r in everything),
    }
    sources = [
        f"* {title}: "
        + ", ".join(f"{n} at `{commit}`" if commit else f"{n} before that" for commit, n in sorted(count.items())[::-1])
        for title, count in counted.items()
    ]
    said = f"of {len(asked)} models {len(other)} differ" + (f" ({', '.join(other)})" if other else "")
    return said, ["Results are kept from run to run, each with the commit that it is of:", "", *sources]


def summary(found: dict[str, list[Result]]) -> Iterator[str]:
    columns = ("models", "exact", "own class", "other counts", "segments erased", "of these in the own class", "graph")
    columns += ("neither: replayed", "nothing prunable")
    yield f"| zoo | {' | '.join(columns)} | mean prunable | of it by the own class | worst error |"
    yield f"|---|{'--:|' * (len(columns) + 3)}"
    everything = [result for those in found.values() for result in those]
    for title, those in [*((TITLES[kind], those) for kind, those in found.items()), ("**all**", everything)]:
        count = Counter[str]()
        for r in those:
            count["exact"] += r.exact
            count["class"] += r.module is not None
            count["asked"] += bool(r.asked)
            count["graph"] += r.graph is not None
            count["replay"] += r.module is None and r.graph is None and r.replay is not None
            count["none"] += not r.axes
            count["choices"] += r.choices
            count["in class"] += r.in_class
            count["segmented"] += bool(r.segments_commit and r.segments)
            count["erased"] += bool(r.segments_commit and r.segments) and r.erases
            count["erased in class"] += r.segments_class
        asked = f"{count['class']} of {count['asked']}"
        segmented = [f"{count['erased']} of {count['segmented']}", count["erased in class"]]
        others = f"{count['in class']} of {count['choices']}"
        last = (count[key] for key in ("graph", "replay", "none"))
        cells = [len(those), count["exact"], asked, others, *segmented, *last]
        share = sum(r.share for r in those) / len(those)
        own = [min(r.class_share / r.share, 1) for r in those if r.share and r.asked]
        part = f"{sum(own) / len(own):.0%}" if own else ""
        yield f"| {title} | {' | '.join(map(str, cells))} | {share:.0%} | {part} | {max(r.error for r in those):.0e} |"


def section(kind: str, some: list[Result]) -> Iterator[str]:
    yield f"\n## {TITLES[kind]}\n"
    yield "| model | parameters | prunable | class | groups | ZIGs | traced | segments | graph | error |"
    yield "|---|--:|--:|--:|--:|--:|---|--:|:-:|--:|"
    for r in some:
        traced = "data" if r.trace == "real" else "shapes"
        own = "" if r.module is None else f"{r.class_share:.0%}"
        cells: list[Any] = [r.name, f"{r.parameters:,}", f"{r.share:.0%}", own, r.axes, r.atoms, traced]
        cells += [_segments(r), "✓" if r.graph is not None else ""]
        yield f"| {' | '.join(map(str, cells))} | {f'{r.error:.0e}' if r.axes else ''} |"
    notes = [f"* {r.name}: {r.graph_reason}" for r in some if r.graph is None and r.graph_reason and r.axes]
    notes += [f"* {r.name}, segments: {r.segments_reason}" for r in some if r.segments and not r.segments_class]
    notes += [f"* {r.name}, class: {r.module_reason}" for r in some if r.module is None and r.module_reason]
    if notes:
        yield from ["", "Where a way does not do:", "", *notes]


def _segments(r: Result) -> str:
    """How many segments went of how many, if that was tried."""
    if not r.segments_commit or not r.segments:
        return "none" if r.segments_commit else ""
    return f"{r.erased} of {r.segments}{' ✓' if r.segments_class else ''}"


if __name__ == "__main__":
    DOCUMENT.write_text(document())
    print(f"written: {DOCUMENT}")
