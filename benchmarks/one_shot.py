"""Smaller without training: what is left of a network, by ways to choose and to compensate.

    python benchmarks/one_shot.py                       # what is missing in docs/benchmarks/one_shot.jsonl
    python benchmarks/one_shot.py --tasks llama minilm --targets .8
    python benchmarks/one_shot.py --table               # docs/benchmarks/one_shot.md anew
    python benchmarks/one_shot.py --memory 1024 2816 24 # the peak of a Llama: width, inner width, layers

Every method gets the same calibration data, none takes a training step, and batch norms are estimated anew for all.
Ours hold a quarter of the data out; the others use all. The data are of the training set; ``holdout`` is what no method
has seen, by which settings were chosen, and ``test`` is only reported. The data sets are found through ``OTO_DATA``, as
for `rivals.py`. The rivals and their formulas are in `one_shot_methods.py`, the networks in `one_shot_tasks.py`.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import one_shot_methods
import torch
from one_shot_methods import AT_ONCE, METHODS
from one_shot_tasks import PROBLEMS, Problem

from oto import OTO

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "benchmarks" / "one_shot.jsonl"
Line = dict[str, Any]


def run(cell: Line, samples: int, batch: int, most: int) -> Line:
    problem, method = PROBLEMS[cell["task"]](), METHODS[cell["method"]]
    model = problem.dense()
    one_shot_methods.join()
    batches = problem.calibration(samples, samples if cell["method"] in AT_ONCE else batch, cell["seed"])
    torch.manual_seed(cell["seed"])
    start = time.process_time()
    done = OTO(model, problem.example(), skip_patterns=problem.skip).one_shot(
        target_macs=problem.share(cell["target"]), batches=batches, loss=problem.loss, **method
    )
    seconds = round(time.process_time() - start)
    return cell | {
        "images": samples,
        "batch": batch,
        "macs_kept": done.after.macs / done.before.macs,
        "holdout": problem.measure(model, "holdout", most),
        "test": problem.measure(model, "test", None),
        "cpu_seconds": seconds,
        "torch": torch.__version__,
    }


def dense(cell: Line, samples: int, batch: int, most: int) -> Line:
    """The network as it was, in the same form."""
    problem = PROBLEMS[cell["task"]]()
    model = problem.dense()
    found = {split: problem.measure(model, split, n) for split, n in (("holdout", most), ("test", None))}
    rest = {"macs_kept": 1.0, "cpu_seconds": 0, "torch": torch.__version__}
    return cell | {"images": samples, "batch": batch} | found | rest


def read() -> list[Line]:
    return [json.loads(text) for text in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table(lines: list[Line]) -> str:
    """A section for each task; a row a method, the mean and the least and greatest over seeds for each target."""
    text = [
        "# Smaller without training",
        "",
        "On the test set, the mean over calibration seeds (least–greatest where there are several), by the MACs that"
        " are left. Written by `benchmarks/one_shot.py`; `one_shot_methods.py` says what the methods are.",
        "",
    ]
    for name in dict.fromkeys(line["task"] for line in lines):
        own, problem = [line for line in lines if line["task"] == name], PROBLEMS[name]()
        targets = sorted({line["target"] for line in own} - {1.0}, reverse=True)
        samples = ", ".join(str(n) for n in sorted({line["images"] for line in own}))
        dense = dict.fromkeys(f" Dense: {line['test']:.4g}." for line in own if line["method"] == "dense")
        before = "".join(dense)
        text += [f"## {problem.title}", "", f"{problem.score}; {samples} samples to calibrate with.{before}", ""]
        text += ["| method | " + " | ".join(f"{t:.0%}" for t in targets) + " |", "|---|" + "---|" * len(targets)]
        for method in (m for m in METHODS if any(line["method"] == m for line in own)):
            cells = []
            for target in targets:
                found = [x["test"] for x in own if (x["method"], x["target"]) == (method, target)]
                spread = f" ({shown(min(found))}–{shown(max(found))})" if len(found) > 1 else ""
                cells.append(f"{shown(sum(found) / len(found))}{spread}" if found else "–")
            text.append(f"| {method} | " + " | ".join(cells) + " |")
        text += ["", *verdict(problem, own, targets)]
    return "\n".join(text)


def shown(number: float) -> str:
    return f"{number:.1f}" if number >= 20 else f"{number:.3g}"


def verdict(problem: Problem, lines: list[Line], targets: list[float]) -> list[str]:
    """Ours, by the setting with the best hold-out at each target, against the best rival there."""
    text = []
    for target in targets:
        here = [x for x in lines if x["target"] == target and x["seed"] in (0, 1, 2)]
        means = {}
        for method in {x["method"] for x in here}:
            rows = [x for x in here if x["method"] == method]
            if len(rows) == 3:  # a spread wants three seeds
                scores = [x["test"] if problem.higher else -x["test"] for x in rows]
                held = sum(x["holdout"] for x in rows) * (1 if problem.higher else -1)
                means[method] = (held, sum(scores) / 3, max(scores) - min(scores))
        ours, others = ({m: v for m, v in means.items() if m.startswith("oto") is mine} for mine in (True, False))
        if not ours or not others:
            continue
        best, rival = max(ours, key=lambda m: ours[m][0]), max(others, key=lambda m: others[m][1])
        ahead, spread = ours[best][1] - others[rival][1], max(ours[best][2], others[rival][2])
        said = "ahead" if ahead > spread else "behind" if ahead < -spread else "within the spread"
        text.append(f"* {target:.0%}: {best} against {rival}: {ahead:+.3g}, spread {spread:.3g}: {said}.")
    return [*text, ""] if text else []


def memory(width: int, inner: int, layers: int) -> None:
    """The greatest resident memory that ``one_shot`` needs beyond that of the analyzed model; Linux."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=max(width // 256, 1), vocab_size=32_000, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    batches = list(torch.randint(32_000, (2, 1, 16), generator=torch.Generator().manual_seed(0)))
    oto = OTO(model, {"input_ids": batches[0]}, skip_patterns=["model.embed_tokens.*"])
    for options in ({}, {"saliency": "magnitude"}):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        oto.one_shot(
            target_macs=0.9, batches=batches, portions=layers, **options,
            loss=lambda m, ids: m(input_ids=ids, labels=ids, use_cache=False).loss,
        )  # fmt: skip
        peak = resident("VmHWM")
        said = f"{size / 1e9:.2f} GB of parameters; {(peak - before) / 1e9:.2f} GB more at the peak"
        print(f"{said} ({(peak - before) / size:.2f} of the model), {options or 'by gradients'}", flush=True)


def resident(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["resnet20"], choices=PROBLEMS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--targets", nargs="+", type=float, default=[0.9, 0.8, 0.7, 0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=512, help="samples to calibrate with: images, sentences, pieces")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--most", type=int, default=4000, help="of the held-out samples that are looked at")
    parser.add_argument("--memory", nargs=3, type=int, metavar=("WIDTH", "INNER", "LAYERS"), help="measure that alone")
    parser.add_argument("--table", action="store_true", help="write the table and stop")
    args = parser.parse_args(argv)
    if args.memory:
        memory(*args.memory)
        return
    cells = [
        {"task": task, "target": target, "method": method, "seed": seed}
        for task in args.tasks
        for seed in args.seeds
        for target, methods in ((1.0, ["dense"]), *((t, args.methods) for t in args.targets))
        for method in methods
        if seed == args.seeds[0] or method != "dense"
    ]
    for cell in [] if args.table else cells:
        same = [x for x in read() if x["images"] == args.images and all(x[key] == cell[key] for key in cell)]
        if not same:
            line = (dense if cell["method"] == "dense" else run)(cell, args.images, args.batch, args.most)
            with RESULTS.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
    RESULTS.with_suffix(".md").write_text(table(read()))


if __name__ == "__main__":
    main()
