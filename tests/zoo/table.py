"""Write ``docs/support_matrix.md`` from the results of the zoo tests: ``make test zoo support-matrix``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .matrix import ZOOS, Result, zoo

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "support_matrix.md"
TITLES = {
    "torchvision": "torchvision", "timm": "timm", "transformers": "transformers", "diffusers": "diffusers",
    "papers": "Networks as people write them after a paper", "packages": "Other packages of the Python index",
    "models": "torchvision and transformers, other sizes", "handmade": "Written for the tests",
}  # fmt: skip

HEAD = """\
# Which models were tried, and what came of them

Written by `make support-matrix` from the results of `make test zoo`; not edited by hand. {versions}.

Every model is made with its own code, random weights and, where it is large, a small configuration. It is analysed,
half of all zero-invariant groups (ZIGs) are set to zero at random, the slim model is built in both ways, and what it
computes in float64 is compared with the zeroed full model: on the example, on random inputs and on another batch size.

* **prunable**: share of all parameters that lie in node groups that may lose entries.
* **groups, ZIGs**: prunable node groups, and the zero-invariant groups in them.
* **traced**: on tensors that know their *shapes* (`meta`, then fake tensors), or on the *data* of the example, because
  the model looks at values. Then the graph follows the path of the example.
* **prunable** is with `everything=True`; **class** is what the model's own class can do without, by default, and the slim
  model is of that class. **graph**: with `everything=True`, a `torch.fx.GraphModule`. Where neither takes all that is
  prunable, the recorded calls were replayed on thinner tensors to prove the analysis on the example.
* **error**: the largest difference of any comparison, relative to the largest entry of the output.
"""


def results() -> Iterator[tuple[str, str, Result]]:
    """Each model of each zoo with its last result.

    Raises:
        SystemExit: Some have none.
    """
    from .test_exact import RESULTS

    missing = [
        f"{kind}-{name}" for kind in TITLES for name in zoo(kind) if not (RESULTS / f"{kind}-{name}.json").exists()
    ]
    if missing:
        raise SystemExit(
            f"{len(missing)} models have no result ({', '.join(missing[:5])} …): run `make test zoo` first"
        )
    for kind in TITLES:
        for name in zoo(kind):
            yield kind, name, Result(**json.loads((RESULTS / f"{kind}-{name}.json").read_text()))


def document() -> str:
    assert set(TITLES) == set(ZOOS)
    found: dict[str, list[Result]] = {}
    for kind, _, result in results():
        found.setdefault(kind, []).append(result)
    libraries = ("torch", "torchvision", "timm", "transformers", "diffusers")
    head = HEAD.format(versions=", ".join(f"{name} {version(name)}" for name in libraries))
    return "\n".join([head, *summary(found), *(line for kind in TITLES for line in section(kind, found[kind]))]) + "\n"


def summary(found: dict[str, list[Result]]) -> Iterator[str]:
    columns = ("models", "exact", "class", "class, in part", "graph", "neither: replayed", "nothing prunable")
    yield f"| zoo | {' | '.join(columns)} | mean prunable | worst error |"
    yield f"|---|{'--:|' * (len(columns) + 2)}"
    everything = [result for some in found.values() for result in some]
    for title, some in [*((TITLES[kind], some) for kind, some in found.items()), ("**all**", everything)]:
        count = Counter[str]()
        for r in some:
            count["exact"] += r.exact
            count["class"] += r.module is not None
            count["graph"] += r.graph is not None
            count["replay"] += r.module is None and r.graph is None and r.replay is not None
            count["part"] += r.module is None and bool(r.class_share)
            count["none"] += not r.axes
        cells = [len(some), *(count[key] for key in ("exact", "class", "part", "graph", "replay", "none"))]
        share = sum(r.share for r in some) / len(some)
        yield f"| {title} | {' | '.join(map(str, cells))} | {share:.0%} | {max(r.error for r in some):.0e} |"


def section(kind: str, some: list[Result]) -> Iterator[str]:
    yield f"\n## {TITLES[kind]}\n"
    yield "| model | parameters | prunable | groups | ZIGs | traced | class | graph | error |"
    yield "|---|--:|--:|--:|--:|---|:-:|:-:|--:|"
    for r in some:
        part = "" if r.class_share is None else f"{r.class_share:.0%}"
        ways = ["✓" if r.module is not None else part, "✓" if r.graph is not None else ""]
        traced = "data" if r.trace == "real" else "shapes"
        cells: list[Any] = [r.name, f"{r.parameters:,}", f"{r.share:.0%}", r.axes, r.atoms, traced, *ways]
        yield f"| {' | '.join(map(str, cells))} | {f'{r.error:.0e}' if r.axes else ''} |"
    notes = [f"* {r.name}: {r.graph_reason}" for r in some if r.module is None and r.graph is None and r.axes]
    notes += [f"* {r.name}: {r.module_reason}" for r in some if not r.axes]
    if notes:
        yield from ["", "No graph, and more than the class can do without:", "", *notes]


if __name__ == "__main__":
    DOCUMENT.write_text(document())
    print(f"written: {DOCUMENT}")
