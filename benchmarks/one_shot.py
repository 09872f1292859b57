"""Smaller without training: what is left of accuracy, by ways to choose and to compensate.

    python benchmarks/one_shot.py                       # what is missing in docs/benchmarks/one_shot.jsonl
    python benchmarks/one_shot.py --table               # docs/benchmarks/one_shot.md anew

Every method gets the same calibration images, none takes a training step, and batch norms are estimated anew for all.
Ours hold a quarter of the images out; the others use all. The images are of the training set; ``holdout`` are training
images that no method has seen, by which settings were chosen, and ``test`` is only reported. The data sets are found
through ``OTO_DATA``, as for `rivals.py`.

Rivals are written with the parts of the library, so that they differ in their formulas alone:

* ``random``, ``magnitude`` (L2, relative to the mean of its layer), ``taylor`` (LLM-Pruner's ``|<x, g>|``, arXiv
  2305.11627, averaged over batches): zeroed, nothing takes over.
* ``flap`` (arXiv 2312.11983): how much what is read varies, and the mean into the bias. Scores are divided by their
  mean over a layer; the paper standardises them.
* ``obs`` (as ZipLM, arXiv 2302.04089, and OSSCAR, 2403.12983): atom after atom by ``tr(W [H⁻¹]⁻¹ Wᵀ)``, ridge fit.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rivals_tasks import TASKS
from torch import Tensor, nn
from torch.nn import functional as F

from oto import OTO

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "benchmarks" / "one_shot.jsonl"
Line = dict[str, Any]


def random(entries: Any) -> Tensor:
    return torch.rand(len(entries.weights[0]))


ALONE = {"compensate": None, "holdout": 0}
METHODS: dict[str, Line] = {
    "random": {"saliency": random} | ALONE,
    "magnitude": {"saliency": "magnitude"} | ALONE,
    "taylor": {"saliency": "taylor_first_order"} | ALONE,
    "flap": {"saliency": "fluctuation", "compensate": "bias", "holdout": 0},
    "obs": {"saliency": "obs", "compensate": "ridge", "holdout": 0},
    "oto, gradients": {},
    "oto, gradients, no fold": {"compensate": None},
    "oto, obs": {"saliency": "obs"},
    "oto, obs, no fold": {"saliency": "obs", "compensate": None},
    "oto, sensitivity": {"saliency": "sensitivity"},
}


def loss(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(*x), y)


@torch.no_grad()
def accuracy(model: nn.Module, split: Any, most: int) -> float:
    rows = torch.arange(min(most, len(split)))
    parts = [split.batch(index) for index in rows.split(500)]
    return 100 * sum(float((model(*x).argmax(1) == y).sum()) for x, y in parts) / len(rows)


def run(cell: Line, images: int, batch: int, most: int) -> Line:
    task = TASKS[cell["task"]]
    data, model = task.data(), task.network(pretrained=True).eval()
    torch.manual_seed(cell["seed"])
    drawn = torch.randperm(len(data.train))[:images].split(batch)
    start = time.process_time()
    done = OTO(model, task.example()).one_shot(
        target_macs=cell["target"],
        batches=[data.train.batch(index) for index in drawn],
        loss=loss,
        **METHODS[cell["method"]],
    )
    return cell | {
        "images": images,
        "batch": batch,
        "macs_kept": done.after.macs / done.before.macs,
        "holdout": accuracy(model, data.holdout, most),
        "test": accuracy(model, data.test, len(data.test)),
        "cpu_seconds": round(time.process_time() - start),
        "torch": torch.__version__,
    }


def read() -> list[Line]:
    return [json.loads(text) for text in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table(lines: list[Line]) -> str:
    """A section for each task; a row a method, the mean and the least and greatest over seeds for each target."""
    text = [
        "# Smaller without training",
        "",
        "Test accuracy in %, the mean over calibration seeds (least–greatest where there are several), by the MACs that"
        " are left. Written by `benchmarks/one_shot.py`, which says what the methods are.",
        "",
    ]
    for name in dict.fromkeys(line["task"] for line in lines):
        own = [line for line in lines if line["task"] == name]
        targets = sorted({line["target"] for line in own}, reverse=True)
        images = ", ".join(str(n) for n in sorted({line["images"] for line in own}))
        text += [f"## {TASKS[name].title}", "", f"{images} images to calibrate with.", ""]
        text += ["| method | " + " | ".join(f"{t:.0%}" for t in targets) + " |", "|---|" + "---|" * len(targets)]
        for method in (m for m in METHODS if any(line["method"] == m for line in own)):
            cells = []
            for target in targets:
                found = [x["test"] for x in own if (x["method"], x["target"]) == (method, target)]
                spread = f" ({min(found):.1f}–{max(found):.1f})" if len(found) > 1 else ""
                cells.append(f"{sum(found) / len(found):.1f}{spread}" if found else "–")
            text.append(f"| {method} | " + " | ".join(cells) + " |")
        text.append("")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["resnet20"], choices=[t for t in TASKS if TASKS[t].pretrained])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--targets", nargs="+", type=float, default=[0.9, 0.8, 0.7, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--most", type=int, default=4000, help="of the held-out images that are looked at")
    parser.add_argument("--table", action="store_true", help="write the table and stop")
    args = parser.parse_args(argv)
    cells = [
        {"task": task, "target": target, "method": method, "seed": seed}
        for task in args.tasks
        for seed in args.seeds
        for target in args.targets
        for method in args.methods
    ]
    for cell in [] if args.table else cells:
        same = [x for x in read() if x["images"] == args.images and all(x[key] == cell[key] for key in cell)]
        if not same:
            line = run(cell, args.images, args.batch, args.most)
            with RESULTS.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
    RESULTS.with_suffix(".md").write_text(table(read()))


if __name__ == "__main__":
    main()
