"""Four sizes from one run against four runs: accuracy and cost of a family.

    python benchmarks/family.py --tasks resnet20                      # one family, and what it is compared with
    python benchmarks/family.py --tasks resnet20 --methods family --options 'family:{"freeze_step": 0.3}'
    python benchmarks/family.py --tasks resnet20 --ablations          # freeze, networks a step, distillation, ranking
    python benchmarks/family.py --table                               # docs/benchmarks/family.md from what is there

Tasks, data, recipes and the form of the results are those of `rivals.py`: every cell (task, method, target, seed) is a
line of `docs/benchmarks/family.jsonl`, written when it is done, and a cell that is there is not run again. A family is
one cell, with the accuracy of each of its members.

* `dense`: the full network, trained on alone for as many steps.
* `single`: one run of HESSO for each target, each as long as the family's run.
* `family`: one run of `oto.family`, with its defaults or with the options that are named.
* `prefix`: static prefixes, as in Once-for-all (arXiv 1908.09791): from the first step on every group keeps the same
  share of its channels, those of the largest norm.
* `deps`: DεpS (ECCV 2024): the full network alone for 55 % of the steps, then prefixes of every group, ranked by the L1
  norm of the weights that read a channel.

Choices (a default, an option) are made on `accuracy_holdout`; `accuracy` is that on the test set. `cpu_minutes` counts
training and construction, not evaluation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from rivals import append, claimed, read, shown, where
from rivals_methods import accuracy, macs, params, train
from rivals_tasks import TASKS, Data, Task
from torch.nn import functional as F

from oto import OTO

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "benchmarks" / "family.jsonl"
TARGETS = (0.75, 0.5, 0.25)
ABLATIONS: list[dict[str, Any]] = [
    *({"freeze_step": share} for share in (0.2, 0.3, 0.6)),
    *({"networks_per_step": count} for count in (2, 3)),
    {"distillation": False},
    {"scope": "local"},
]

Line = dict[str, Any]


def reader_norm(entries: Any) -> torch.Tensor:
    """L1 norm of the weights that read each atom, by which DεpS ranks."""
    norms = [reader.abs().flatten(1).sum(1) for reader in entries.readers]
    return torch.stack(norms).sum(0) if norms else torch.ones(entries.size)


FAMILIES: dict[str, Line] = {
    "family": {},
    "prefix": {"scope": "local", "saliency": "magnitude", "freeze_step": 0},
    "deps": {"scope": "local", "saliency": reader_norm, "freeze_step": 0.55, "ramp_steps": 0.02},
}


METHODS = ("dense", "single", *FAMILIES)


def trained_family(task: Task, data: Data, seed: int, options: Line) -> tuple[list[Any], float]:
    """The slim members of one run, the largest first, and the minutes of a core that it took."""
    torch.manual_seed(seed)
    model = task.network(1.0, task.pretrained)
    used = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        family = OTO(model, task.example()).family(
            targets=list(TARGETS), total_steps=task.steps, **task.optimizer_options(), **options
        )
    generator = torch.Generator().manual_seed(seed)
    data = Data(data.train.first(task.images), data.holdout, data.test, data.shift, data.flip)
    model.train()
    step = 0
    for _ in range(task.epochs):
        for x, y in data.epoch(task.batch, generator):
            for group in family.optimizer.param_groups:
                group["lr"] = task.rate(step)
            family.step(lambda net, x=x: net(*x), lambda output, y=y: F.cross_entropy(output, y))
            step += 1
    subnets = family.construct()
    return [subnet.model for subnet in subnets], (time.process_time() - used) / 60


def trained_single(task: Task, data: Data, target: float, seed: int, options: Line) -> tuple[Any, float]:
    """The slim model of a run of HESSO; the full network, trained on, for a target of 1."""
    torch.manual_seed(seed)
    model = task.network(1.0, task.pretrained)
    used = time.process_time()
    if target == 1:
        train(task, model, data, task.optimizer(model), seed)
        return model, (time.process_time() - used) / 60
    oto = OTO(model, task.example())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = oto.hesso(target_macs=target, total_steps=task.steps, **task.optimizer_options(), **options)
    train(task, model, data, optimizer, seed)
    return oto.construct_subnet().model, (time.process_time() - used) / 60


def measured(task: Task, model: Any, data: Data) -> Line:
    example, whole = task.example(), task.network()
    model.eval()
    return {
        "macs_kept": macs(model, example) / macs(whole, example),
        "params_kept": params(model) / params(whole),
        "accuracy": accuracy(model, data.test),
        "accuracy_holdout": accuracy(model, data.holdout),
    }


def run(cell: Line, options: Line) -> Line:
    task, method = TASKS[cell["task"]].with_budget(cell["images"], cell["epochs"]), cell["method"].partition("[")[0]
    data = task.data()
    line = cell | {"options": options}
    if method in FAMILIES:
        models, minutes = trained_family(task, data, cell["seed"], FAMILIES[method] | options)
        found = [{"target": t, **measured(task, m, data)} for t, m in zip((1.0, *TARGETS), models, strict=True)]
        line["members"] = found
    else:
        model, minutes = trained_single(task, data, cell["target"], cell["seed"], options)
        line |= measured(task, model, data)
    recipe = {k: getattr(task, k) for k in ("batch", "steps", "variant", "lr", "weight_decay", "warmup", "pretrained")}
    return {**line, "cpu_minutes": round(minutes, 3), "recipe": recipe, **where()}


def cells(args: argparse.Namespace) -> Iterator[tuple[Line, Line]]:
    """Cells with their options, in an order in which every seed is complete before the next begins."""
    for task in (TASKS[name].with_budget(args.images, args.epochs) for name in args.tasks):
        for seed in args.seeds if args.seeds is not None else task.seeds:
            base = {"kind": "family", "task": task.name, "seed": seed, "images": task.images, "epochs": task.epochs}
            for method in args.methods:
                for options in ABLATIONS if args.ablations else [args.options.get(method, {})]:
                    for target in TARGETS if method == "single" else (1.0,):
                        yield {**base, "method": shown(method, options), "target": target}, options


# ------------------------------------------------------------------------------------------------ the page


def page(lines: list[Line]) -> str:
    """Markdown: for each task a table of methods by members, and what it says about the bar."""
    out = [
        "# Four sizes from one run",
        "",
        "Generated by `python benchmarks/family.py --table` from `family.jsonl`; the script's docstring says what the",
        "methods are. Accuracy in percent on the test set, mean ± standard deviation over seeds; in brackets that on",
        "held-out images, by which choices are made. *Cost* is the core minutes of training and construction in",
        "multiples of the full network's alone; of `single`, of all runs together.",
        "",
    ]
    keys = sorted({(line["task"], line["images"], line["epochs"]) for line in lines}, key=str)
    for name, images, epochs in keys:
        here = [one for one in lines if (one["task"], one["images"], one["epochs"]) == (name, images, epochs)]
        first = here[0]
        out += [
            f"## {TASKS[name].title}",
            "",
            f"{images:,} training examples × {epochs}, batch {first['recipe']['batch']} ({first['recipe']['steps']}"
            f" steps), {first['recipe']['variant']}, lr {first['recipe']['lr']}. {first['machine']},"
            f" {first['threads']} thread, torch {first['torch']}.",
            "",
            *table(here),
            "",
            *[f"- {said}" for said in verdicts(here)],
            "",
        ]
    return "\n".join(out)


def by_size(here: list[Line], method: str) -> dict[float, dict[int, Line]]:
    """For each size, by seed, what a method measured."""
    found: dict[float, dict[int, Line]] = {}
    for line in here:
        if line["method"] == method:
            for one in line.get("members", [line]):
                found.setdefault(one["target"], {})[line["seed"]] = one
    return found


def table(here: list[Line]) -> list[str]:
    dense = {line["seed"]: line["cpu_minutes"] for line in here if line["method"] == "dense"}
    rows = ["| method | seeds | full | .75 | .5 | .25 | cost |", "|---|--:|--:|--:|--:|--:|--:|"]
    for method in dict.fromkeys(line["method"] for line in here):
        sizes = by_size(here, method)
        own = [line for line in here if line["method"] == method]
        seeds = {line["seed"] for line in own}
        costs = [
            sum(line["cpu_minutes"] for line in own if line["seed"] == seed) / dense[seed]
            for seed in seeds
            if seed in dense
        ]
        shown_sizes = [spread(list(sizes[size].values())) if size in sizes else "" for size in (1.0, *TARGETS)]
        cost = f"{statistics.mean(costs):.2f}" if costs else ""
        rows.append(f"| {method} | {len(seeds)} | {' | '.join(shown_sizes)} | {cost} |")
    return rows


def spread(own: list[Line]) -> str:
    test, held = ([line[key] for line in own] for key in ("accuracy", "accuracy_holdout"))
    more = f" ± {statistics.stdev(test):.2f}" if len(test) > 1 else ""
    return f"{statistics.mean(test):.2f}{more} ({statistics.mean(held):.2f})"


def verdicts(here: list[Line]) -> Iterator[str]:
    """Each member of the family against its single run: within the bar, or the spread of the difference, or behind."""
    family, alone = by_size(here, "family"), by_size(here, "single") | by_size(here, "dense")
    for size in (1.0, *TARGETS):
        seeds = sorted(family.get(size, {}).keys() & alone.get(size, {}).keys())
        if not seeds:
            continue
        gaps = [family[size][seed]["accuracy"] - alone[size][seed]["accuracy"] for seed in seeds]
        bar = 0.2 if size == 1 else 0.5
        allowed = max(bar, statistics.stdev(gaps) if len(gaps) > 1 else 0.0)
        gap = statistics.mean(gaps)
        said = "within the bar" if gap >= -allowed else "**behind**"
        yield f"{size:g} of the MACs: {gap:+.2f} points against its single run, {len(seeds)} seeds: {said}."


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["resnet20"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, help="default: the task's")
    parser.add_argument("--images", type=int, help="training examples; default: the task's")
    parser.add_argument("--epochs", type=int, help="default: the task's")
    parser.add_argument("--options", nargs="+", default=[], metavar="METHOD:JSON", help="keywords of a method")
    parser.add_argument("--ablations", action="store_true", help="the family with one option changed at a time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only write the page")
    args = parser.parse_args(argv)
    split = [text.partition(":") for text in args.options]
    args.options = {method: json.loads(options) for method, _, options in split}
    args.methods = ["family"] if args.ablations else args.methods
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    torch.set_num_threads(args.threads)
    for cell, options in () if args.table else cells(args):
        with claimed(args.results, cell) as mine:
            if mine:
                line = run(cell, options)
                append(args.results, line)
                sizes = [f"{one['target']:g}: {one['accuracy']:.2f}" for one in line.get("members", [line])]
                print(f"{line['task']} {line['method']} seed {line['seed']}: {', '.join(sizes)};", end=" ")
                print(f"{line['cpu_minutes']:.2f} core minutes", flush=True)
    target = args.results.with_suffix(".md")
    target.write_text(page(read(args.results)))
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
