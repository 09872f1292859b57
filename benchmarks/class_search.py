"""What it costs to ask a class what it can do without: runs of a thinner copy, and CPU seconds of ``OTO(model, x)``.

    python benchmarks/class_search.py                                   # fourteen models of all kinds
    python benchmarks/class_search.py timm/mixnet_s full/resnet50       # some
    python benchmarks/class_search.py --zoo --part 0/8                  # an eighth of the zoo, class side only
    python benchmarks/class_search.py --before ../before                # another checkout beside this one, in turns
    python benchmarks/class_search.py --json after.json --beside before.json

A model is ``kind/name``: one of the zoo (``tests/zoo``, small inputs), or ``full/name``: torchvision at its usual size,
YOLO of ultralytics. Each runs in a fresh process on one thread, with random weights. Another checkout is compared in
the same run with ``--before``, or with figures that ``--json`` wrote and ``--beside`` reads.

runs
    how often a model, full or thinner, was followed after it had been recorded;
calls
    how many calls of operators these runs made, all together;
class
    share of the parameters in groups that the class can do without, and in brackets: that may go at all;
atoms
    the same of atoms.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = [
    "full/resnet50",
    "full/convnext_tiny",
    "full/mobilenet_v3_large",
    "full/vit_b_32",
    "full/swin_t",
    "full/yolov8n",
    "timm/mixnet_s",
    "timm/xcit_nano_12_p8_224",
    "timm/maxvit_rmlp_pico_rw_256",
    "transformers/rt_detr",
    "models/bert",
    "models/llama",
    "models/gpt2",
    "models/t5",
]


def make(name: str) -> tuple[nn.Module, Any]:
    """A model and an input for it, with random weights."""
    sys.path.append(str(ROOT))  # behind the checkout that is measured
    kind, _, which = name.partition("/")
    torch.manual_seed(0)
    if kind == "full" and which.startswith("yolo"):
        from ultralytics import YOLO

        model, x = YOLO(f"{which}.yaml").model.eval(), torch.randn(1, 3, 640, 640)
        model(x)  # it caches anchors for the last size of an image
        return model, x
    if kind == "full":
        import torchvision

        return torchvision.models.get_model(which, weights=None).eval(), torch.randn(1, 3, 224, 224)
    from tests.zoo.matrix import zoo

    model, x = zoo(kind)[which]()
    return model.eval(), x


def measure(name: str) -> dict[str, Any]:
    """Figures of one model, in this process."""
    from oto import OTO
    from oto.groups import cost
    from oto.trace import record
    from oto.trace.graph import GraphBuilder

    runs = calls = 0
    name_of_run = "run" if hasattr(record, "run") else "_run"  # of checkouts before the tracer had a file for runs
    run, add = getattr(record, name_of_run), GraphBuilder._add

    def counted_run(*args: Any, **kwargs: Any) -> Any:
        nonlocal runs
        runs += 1
        return run(*args, **kwargs)

    def counted_add(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        add(*args, **kwargs)

    model, x = make(name)
    setattr(record, name_of_run, counted_run)
    GraphBuilder._add = counted_add  # type: ignore[method-assign]
    begin = time.process_time()
    everything = OTO(model, x, allow_graph=True)
    alone, runs, calls = time.process_time() - begin, 0, 0
    begin = time.process_time()
    oto = OTO(model, x)
    seconds = time.process_time() - begin

    def share(of: Any) -> tuple[float, float]:
        free = {g.name: 0 for g in of.node_groups if g.prunable}
        params = 1 - cost(of.partition, free).params / of.compute_num_params()
        return params, sum(g.size for g in of.node_groups if g.prunable)

    (params, atoms), (most, all_atoms) = share(oto), share(everything)
    whole = [g.name for g in oto.node_groups if not g.prunable and "its class" in (g.reason or "")]
    return {
        "seconds": seconds,
        "analysis": alone,
        "runs": runs,
        "calls": calls,
        "class": params,
        "share": most,
        "atoms": atoms,
        "all_atoms": all_atoms,
        "whole": whole,
        "nodes": len(oto.partition.found.graph.nodes),
        "ties": len({g.tie for g in oto.node_groups if g.prunable} - {None}),
    }


def child(name: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        found = measure(name)
    except Exception as failure:
        found = {"failed": f"{type(failure).__name__}: {str(failure).splitlines()[0]}"}
    print(json.dumps(found))


def spawn(name: str, limit: float, checkout: Path = ROOT) -> dict[str, Any]:
    command = [sys.executable, __file__, name, "--child"]
    where = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False, env=where)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit:.0f} s"}
    if done.returncode:
        return {"failed": done.stderr.splitlines()[-1] if done.stderr else f"exit status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def shown(name: str, now: dict[str, Any], before: dict[str, Any] | None) -> str:
    if "failed" in now:
        return f"{name:34} {now['failed']}"
    old = before if before is not None and "failed" not in before else {}

    failed = f"\n    before: {before['failed']}" if before is not None and "failed" in before else ""

    def pair(key: str, form: str, width: int) -> str:
        was = f"{format(old[key], form)} > " if key in old else ""
        return f"{was}{format(now[key], form)}".rjust(width if not old else 2 * width)

    lost = sorted(set(now["whole"]) - set(old["whole"])) if old else []
    return (
        f"{name:34} {now['nodes']:6} nodes {pair('seconds', '.2f', 8)} s {pair('runs', '', 6)} runs"
        f" {pair('calls', '', 9)} calls  class {pair('class', '.4f', 7)} ({now['share']:.4f})"
        f" atoms {pair('atoms', '', 7)} ({now['all_atoms']}) ties {pair('ties', '', 3)}"
        + failed
        + (f"\n    whole now: {', '.join(lost)}" if lost else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--zoo", action="store_true", help="all models of the zoo")
    parser.add_argument("--part", default="0/1", help="every n-th model from the i-th on, as i/n")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--beside", type=Path, help="figures of another checkout, to show before these")
    parser.add_argument("--before", type=Path, help="another checkout, to run before this one, model by model")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one model")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child(given.models[0])
    names = given.models or DEFAULT
    if given.zoo:
        sys.path.insert(0, str(ROOT))
        from tests.zoo.matrix import ZOOS, zoo

        names = [f"{kind}/{name}" for kind in ZOOS for name in zoo(kind)]
    first, step = map(int, given.part.split("/"))
    before = json.loads(given.beside.read_text()) if given.beside else {}
    found: dict[str, Any] = {}
    for name in names[first::step]:
        if given.before:
            before[name] = spawn(name, given.limit, given.before)
        found[name] = spawn(name, given.limit)
        print(shown(name, found[name], before.get(name)), flush=True)
        if given.json:
            given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
