"""Accuracy at equal MACs and equal budget: ours, torch-pruning, random choice, and dense networks of the same MACs.

    python benchmarks/rivals.py --tasks resnet20                # every method, target and seed of one task
    python benchmarks/rivals.py --tasks resnet20 --methods oto tp-taylor-global-portions --targets .4 --seeds 0
    python benchmarks/rivals.py --methods oto --options 'oto:{"start_pruning_step": 0.1}'
    python benchmarks/rivals.py --tasks resnet20 --targets .6 --seeds 0 --methods hspg --options 'hspg:{"lmbda": 1.0}'
    python benchmarks/rivals.py --latency                       # of the slim networks, on a machine that is idle
    python benchmarks/rivals.py --search --targets .6 --seeds 0 # which λ and ε; writes rivals_search.jsonl
    python benchmarks/rivals.py --table                         # docs/benchmarks/rivals.md from what is there
    python benchmarks/rivals.py --erase --tasks resnet56        # at equal milliseconds, see rivals_erase.py

Every cell (task, method, target, seed) is a line of `docs/benchmarks/rivals.jsonl`, written when it is done. A cell
that is there, or that another process has in hand, is not run; so a run that was cut off resumes, and two processes
share the work. All methods of a seed see the same initial weights, batches and learning rates. `rivals_tasks.py` says
what is trained and how, `rivals_methods.py` how it gets smaller. `hspg` and `dhspg` are run by name only, with a λ that
suits the number of steps: the table says which share of the groups that went left by half-space; where that is small,
it is the choice that was measured. `lhspg` (for `minilm`) trains adapters on a frozen model, at `rate` times the
task's learning rates; by name only, too.

Choices (a default, an option) are made on `accuracy_holdout`: images that no training here sees. `accuracy` is that on
the test set, and nothing is chosen by it. `--search` never looks at the test set. It runs the options that
`rivals_methods.GRIDS` has for a method, resumes like the cells, and names, among those whose hold-out accuracy is
within half a point of the best, the one with most groups gone by half-space.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from rivals_methods import GRIDS, METHODS, accuracy, macs, params, rebuilt
from rivals_tasks import TASKS, Task, channels_last
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "benchmarks" / "rivals.jsonl"
SEARCHED = RESULTS.with_name("rivals_search.jsonl")
OURS = ("oto", "oto-cric", "oto-published", "random")
SERIES = ("hspg", "dhspg", "dhspg-published", "lhspg")  # the other papers; see the docstring
# What carries all methods; the others the two best rivals and the dense one.
ALL = ["dense", "dense-small", *OURS] + [
    f"tp-{criterion}-{scope}-{when}"
    for criterion in ("l1", "l2", "taylor")
    for scope in ("global", "local")
    for when in ("oneshot", "portions")
]
BEST = ["dense", "dense-small", *OURS, "tp-l1-global-portions", "tp-l2-global-portions", "tp-taylor-global-portions"]
# Of the papers: a GPU's work, and the papers' own figures stand beside them.
RECIPES = ("resnet18", "resnet50", "vgg16_bn", "resnet56_scratch")
REPEATS = 40
SLACK = 0.5  # points of hold-out accuracy that a larger share by half-space is worth; two seeds differ by .2 to .4
TRIED = Path(__file__).with_name("rivals_tried.md")

Line = dict[str, Any]

# ------------------------------------------------------------------------------------------------ cells and lines


def identity(cell: Line) -> tuple[Any, ...]:
    """What makes two lines the same measurement."""
    return tuple(cell[k] for k in ("kind", "task", "method", "target", "seed", "images", "epochs"))


def read(path: Path) -> list[Line]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # the end of a run that was cut off
            print(f"skipped a broken line of {path}", file=sys.stderr)
    return lines


def append(path: Path, line: Line) -> None:
    """One write at the end of the file: other processes may write to it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        broken = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        os.write(file, (("\n" if broken else "") + json.dumps(line) + "\n").encode())
    finally:
        os.close(file)


@contextmanager
def claimed(path: Path, cell: Line) -> Iterator[bool]:
    """Whether this process may run the cell: the lock goes with the process that holds it, however it ends."""
    name = hashlib.sha256(repr((str(path.resolve()), identity(cell))).encode()).hexdigest()[:24]
    with open(Path(tempfile.gettempdir()) / f"oto-rivals-{name}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield identity(cell) not in set(map(identity, read(path)))


def cells(args: argparse.Namespace) -> Iterator[Line]:
    """In an order in which every seed is complete before the next begins."""
    for task in (TASKS[name].with_budget(args.images, args.epochs) for name in args.tasks):
        usual = ALL if task.name == "resnet20" else ["dense", "oto"] if task.name in RECIPES else BEST
        methods = args.methods or usual
        seeds = args.seeds if args.seeds is not None else task.seeds
        for seed in seeds:
            for method in methods:
                targets = (1.0,) if method == "dense" else tuple(args.targets or task.targets)
                for target in targets:
                    yield {
                        "kind": "accuracy",
                        "task": task.name,
                        "method": shown(method, args.options.get(method, {})),
                        "target": target,
                        "seed": seed,
                        "images": task.images,
                        "epochs": task.epochs,
                    }


def shown(method: str, options: Line) -> str:
    """The name of a method with the options that are not its defaults."""
    return method + (f"[{','.join(f'{k}={v}' for k, v in sorted(options.items()))}]" if options else "")


def of(cell: Line, device: str = "cpu") -> Task:
    return TASKS[cell["task"]].with_budget(cell["images"], cell["epochs"]).on(device)


# ------------------------------------------------------------------------------------------------ accuracy


def run(cell: Line, options: Line, device: str) -> Line:
    task, method = of(cell, device), cell["method"].partition("[")[0]
    data, example = task.data(), task.example()
    whole = task.network()
    start, used = time.perf_counter(), time.process_time()
    slim = METHODS[method](task, data, cell["target"], cell["seed"], options)
    minutes, cpu_minutes = (time.perf_counter() - start) / 60, (time.process_time() - used) / 60
    left = macs(slim.model, example)
    return cell | {
        "options": options,
        "macs": left,
        "macs_kept": left / macs(whole, example),
        "params": params(slim.model),
        "params_kept": params(slim.model) / params(whole),
        "accuracy": accuracy(slim.model, data.test),
        "accuracy_holdout": accuracy(slim.model, data.holdout),
        "minutes": round(minutes, 2),
        "cpu_minutes": round(cpu_minutes, 2),
        "recipe": {
            k: getattr(task, k) for k in ("batch", "steps", "variant", "lr", "weight_decay", "warmup", "pretrained")
        },
        **slim.notes,
        "rebuild": slim.rebuild,
        **where(device),
    }


def where(device: str = "cpu") -> Line:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(git, capture_output=True, text=True)
    return {
        "machine": machine() if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": found.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def machine() -> str:
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return f"{names[0].partition(': ')[2]}, {len(names)} cores"
    except (OSError, IndexError):
        return f"{platform.machine()}, {os.cpu_count()} cores"


# ------------------------------------------------------------------------------------------------ search


def tried(args: argparse.Namespace) -> Iterator[tuple[Line, Line]]:
    """Cells and options of a search, those of all methods in turn."""
    for method in args.methods or list(GRIDS):
        for options in GRIDS[method]:
            for cell in cells(argparse.Namespace(**vars(args) | {"methods": [method], "options": {method: options}})):
                yield cell | {"kind": "search"}, options


def search_of(cell: Line, options: Line, args: argparse.Namespace) -> Line | None:
    """Accuracy on what is held out, and how many groups went which way; the test set is not looked at."""
    with claimed(args.results, cell) as mine:
        if not mine:
            return None
        task, method = of(cell, args.device), cell["method"].partition("[")[0]
        data, used = task.data(), time.process_time()
        slim = METHODS[method](task, data, cell["target"], cell["seed"], options)
        return cell | {
            "options": options,
            "accuracy_holdout": accuracy(slim.model, data.holdout),
            **slim.notes,
            "cpu_minutes": round((time.process_time() - used) / 60, 2),
            **where(args.device),
        }


def by_half_space(line: Line) -> float:
    """Share of the groups at zero that left their half-spaces."""
    return line["ways"]["by half-space"] / max(sum(line["ways"].values()), 1)


def searched(lines: list[Line]) -> list[str]:
    """A row for every options that were tried, and the one that is taken, in bold: by the rule of the docstring."""
    rows = ["| task | target | options | seeds | hold-out | by half-space |", "|---|--:|---|--:|--:|--:|"]
    found: dict[tuple[str, float, str], dict[str, list[Line]]] = {}
    for line in lines:
        key = line["task"], line["target"], line["method"].partition("[")[0]
        found.setdefault(key, {}).setdefault(line["method"], []).append(line)
    for (task, target, _), own in sorted(found.items(), reverse=True):
        scores = {m: mean(rs, "accuracy_holdout") for m, rs in own.items()}
        shares = {m: statistics.mean(map(by_half_space, rs)) for m, rs in own.items()}
        best = max(scores.values())
        taken = max((m for m in own if scores[m] >= best - SLACK), key=lambda m: shares[m])
        for method in sorted(own, key=lambda m: -scores[m]):
            bold = "**" if method == taken else ""
            cells = f"{len(own[method])} | {scores[method]:.2f} | {shares[method]:.0%}"
            rows.append(f"| {task} | {target:g} | {bold}{method}{bold} | {cells} |")
    return rows


# ------------------------------------------------------------------------------------------------ latency


def latency(cell: Line, how: Line, batch: int) -> Line:
    """Milliseconds of a forward pass, eager and compiled; dense and slim take turns, so both see the same machine."""
    task = of(cell)
    example = channels_last(tuple(x.repeat(batch, *(1,) * (x.dim() - 1)) for x in task.example()))
    found: Line = {}
    for mode in ("eager", "compiled"):
        models = [task.network().eval(), rebuilt(task, how)]
        if mode == "compiled":
            torch.compiler.reset()
            models = [torch.compile(model) for model in models]
        for name, times in zip(("dense_", ""), alternating(models, example), strict=True):
            low, middle, high = statistics.quantiles(times, n=4)
            found[f"{name}{mode}_ms"] = middle
            found[f"{name}{mode}_quartiles_ms"] = [low, high]
    return {**cell, "kind": "latency", "batch": batch, **found, **where()}


@torch.inference_mode()
def alternating(models: Sequence[nn.Module], example: tuple[torch.Tensor, ...]) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in models]
    for repeat in range(REPEATS + 5):  # five to warm up
        for model, own in zip(models, times, strict=True):
            start = time.perf_counter()
            model(*example)
            if repeat >= 5:
                own.append(1e3 * (time.perf_counter() - start))
    return times


# ------------------------------------------------------------------------------------------------ the page


def page(lines: list[Line]) -> str:
    """Markdown: a table per task and target, and what it says about the bar."""
    out = [
        "# Accuracy at equal MACs and equal budget",
        "",
        "Generated by `python benchmarks/rivals.py --table` from `rivals.jsonl`; its docstrings say what each method",
        "does. All methods of a seed have the same initial weights, batches, steps and learning rates. `±` is the",
        "standard deviation over seeds. *Hold-out* is accuracy on training data that is not trained on here, by which",
        "choices are made; the weights of the pretrained ResNets come from all 50,000 training images, so theirs is",
        "too high for every method alike. Nothing was chosen by the test set. MACs are those that",
        "`torch.utils.flop_counter` counts in the slim network. Latency is the median (quartiles) of a forward pass of",
        "the slim network of one seed on the CPU, and how many times faster that is than the dense one beside it.",
        "",
    ]
    runs = [line for line in lines if line["kind"] == "accuracy"]
    times = {identity(line | {"kind": "accuracy"}): line for line in lines if line["kind"] == "latency"}
    recipes = sorted({(r["task"], r["images"], r["epochs"]) for r in runs}, key=lambda r: (list(TASKS).index(r[0]), r))
    verdicts = []
    for name, images, epochs in recipes:
        here = [r for r in runs if (r["task"], r["images"], r["epochs"]) == (name, images, epochs)]
        first = here[0]["recipe"]
        places = sorted({f"{r['machine']}, {r['threads']} thread, torch {r['torch']}" for r in here})
        task = TASKS[name]
        flags = f"--tasks {name}" + ("" if images == task.images else f" --images {images}")
        flags += "" if epochs == task.epochs else f" --epochs {epochs}"
        out += [
            f"## {task.title}",
            "",
            f"`python benchmarks/rivals.py {flags}`: {images:,} training examples × {epochs}, batch "
            f"{first['batch']} ({first['steps']} steps), {first['variant']}, lr {first['lr']} to 0 as a cosine, weight "
            f"decay {first['weight_decay']}. {'; '.join(places)}; "
            f"{sum(r['cpu_minutes'] for r in here):.0f} minutes of a core for {len(here)} runs.",
            "",
        ]
        dense = [r for r in here if r["method"] == "dense"]
        for target in sorted({r["target"] for r in here if r["method"] != "dense"}, reverse=True):
            out += [f"### {target:g} of the MACs", "", *table(here, dense, target, times), ""]
            verdicts.append((TASKS[name].title, target, verdict([r for r in here if r["target"] == target])))
    out += ["## Ours against the best rival", ""]
    out += [f"- {title}, {target:g} of the MACs: {said}" for title, target, said in verdicts]
    if any(name == "resnet20" for name, *_ in recipes):
        out += ["", "## What was tried for the default choice", "", TRIED.read_text().strip()]
    return "\n".join(out) + "\n"


def table(here: list[Line], dense: list[Line], target: float, times: dict[Any, Line]) -> list[str]:
    rows = [
        "| method | seeds | MACs kept | params kept | accuracy | hold-out | eager, ms | compiled, ms | core minutes |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    methods = {r["method"]: [] for r in dense} | {r["method"]: [] for r in here if r["target"] == target}
    for r in [*dense, *(r for r in here if r["target"] == target and r["method"] != "dense")]:
        methods[r["method"]].append(r)

    def order(method: str) -> tuple[Any, ...]:
        return method != "dense", -mean(methods[method], "accuracy")

    for method in sorted(methods, key=order):
        own = methods[method]
        timed = next((times[identity(r)] for r in own if identity(r) in times), None)
        cells = [speed(timed, mode) if timed else "" for mode in ("eager", "compiled")]
        bold = "**" if method == "oto" else ""
        ways = [by_half_space(r) for r in own if "ways" in r]
        left = f", {statistics.mean(ways):.0%} by half-space" if ways else ""
        rows.append(
            f"| {bold}{method}{bold}{left} | {len(own)} | "
            f"{mean(own, 'macs_kept'):.3f} | {mean(own, 'params_kept'):.3f} | "
            f"{bold}{spread(own, 'accuracy')}{bold} | {spread(own, 'accuracy_holdout')} | {' | '.join(cells)} | "
            f"{mean(own, 'cpu_minutes'):.1f} |"
        )
    return rows


def speed(line: Line, mode: str) -> str:
    low, high = line[f"{mode}_quartiles_ms"]
    middle = line[f"{mode}_ms"]
    return f"{middle:.2f} ({low:.2f}–{high:.2f}), {line[f'dense_{mode}_ms'] / middle:.2f}×"


def mean(own: list[Line], key: str) -> float:
    return statistics.mean(r[key] for r in own)


def deviation(own: list[Line]) -> float:
    return statistics.stdev(r["accuracy"] for r in own) if len(own) > 1 else 0.0


def spread(own: list[Line], key: str) -> str:
    values = [r[key] for r in own]
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def verdict(here: list[Line]) -> str:
    """Ours with its defaults against the best of the others; by more than the larger of both deviations, or not."""
    methods: dict[str, list[Line]] = {}
    for r in here:
        methods.setdefault(r["method"], []).append(r)
    own = methods.get("oto")
    rivals = {m: rs for m, rs in methods.items() if m.partition("[")[0] not in (*OURS, *SERIES)}
    if not own or not rivals:
        return "not measured yet"
    best = max(rivals, key=lambda m: mean(rivals[m], "accuracy"))
    gap = mean(own, "accuracy") - mean(rivals[best], "accuracy")
    noise = max(deviation(own), deviation(rivals[best]))
    seeds = min(len(own), len(rivals[best]))
    said = "ahead by more than the spread" if gap > noise else "within the spread" if gap > -noise else "**behind**"
    if seeds < 2:
        said = "one seed, so no spread; " + ("ahead" if gap > 0 else "**behind**")
    return f"{gap:+.2f} points over `{best}`, spread {noise:.2f}, {seeds} seeds: {said}."


# ------------------------------------------------------------------------------------------------ command


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[name for name in TASKS if name not in RECIPES])
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--targets", nargs="+", type=float, help="shares of the MACs to keep; default: the task's")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: the task's")
    parser.add_argument("--images", type=int, help="training examples; default: the task's")
    parser.add_argument("--epochs", type=int, help="default: the task's")
    parser.add_argument("--options", nargs="+", default=[], metavar="METHOD:JSON", help="keywords of a method")
    parser.add_argument("--search", action="store_true", help="try the options of GRIDS instead, on what is held out")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="where to train; latency is always that on the CPU")
    parser.add_argument("--batch", type=int, default=4, help="of --latency")
    parser.add_argument("--latency", action="store_true", help="only time the slim networks of the chosen cells")
    parser.add_argument("--table", action="store_true", help="only write the page")
    args = parser.parse_args(argv)
    args.results = args.results or (SEARCHED if args.search else RESULTS)
    split = [text.partition(":") for text in args.options]
    args.options = {method: json.loads(options) for method, _, options in split}
    unknown = args.options.keys() - METHODS.keys()
    if unknown:
        parser.error(f"--options names {', '.join(sorted(unknown))}, which is no method")
    if args.search and (missing := set(args.methods or ()) - GRIDS.keys()):
        parser.error(f"--search has no options to try for {', '.join(sorted(missing))}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--erase" in argv:
        import rivals_erase

        argv.remove("--erase")
        return rivals_erase.main(argv)
    args = parsed(argv)
    torch.set_num_threads(args.threads)
    if args.search:
        for cell, options in tried(args):
            line = None if args.table else search_of(cell, options, args)
            if line is not None:
                append(args.results, line)
                said = "{method}: hold-out {accuracy_holdout:.2f} %, {ways}, {cpu_minutes} minutes of a core"
                print(said.format(**line), flush=True)
        print(*searched(read(args.results)), sep="\n")
        return
    if not args.table:
        for cell in cells(args):
            line = latency_of(cell, args) if args.latency else accuracy_of(cell, args)
            if line is not None:
                append(args.results, line)
    target = args.results.with_suffix(".md")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(read(args.results)))
    print(f"wrote {target}")


def accuracy_of(cell: Line, args: argparse.Namespace) -> Line | None:
    """The finished line, or ``None`` if the cell is there, or in the hands of another process."""
    with claimed(args.results, cell) as mine:
        if not mine:
            return None
        line = run(cell, args.options.get(cell["method"].partition("[")[0], {}), args.device)
        said = "{task} {method} target {target:g} seed {seed}: {accuracy:.2f} % (hold-out {accuracy_holdout:.2f} %), "
        said += "{macs_kept:.3f} of the MACs, {params_kept:.3f} of the parameters, "
        said += "{minutes:.1f} minutes ({cpu_minutes:.1f} of a core)"
        print(said.format(**line), flush=True)
        return line


def latency_of(cell: Line, args: argparse.Namespace) -> Line | None:
    lines = {identity(line): line for line in read(args.results)}
    done = lines.get(identity(cell))
    if done is None or identity(cell | {"kind": "latency"}) in lines:
        return None
    line = latency(cell, done["rebuild"], args.batch)
    print(f"{cell['task']} {cell['method']} target {cell['target']:g}:", end=" ")
    print(*(f"{k} {v:.2f}" for k, v in line.items() if k.endswith("_ms") and isinstance(v, float)), flush=True)
    return line


if __name__ == "__main__":
    main()
