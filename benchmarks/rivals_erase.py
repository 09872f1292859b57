"""Accuracy against measured milliseconds at batch 1, at half of a network's time: width, depth, both, and others.

    python benchmarks/rivals.py --erase --tasks resnet56               # every method and seed of one task; resumes
    python benchmarks/rivals.py --erase --tasks resnet56 --methods both width --seeds 0
    python benchmarks/rivals.py --erase --tasks resnet56 --latency     # all networks of a seed, in turns in one process
    python benchmarks/rivals.py --erase --table                        # docs/benchmarks/erase.md from what is there

All train as in `rivals.py`: the same initial weights, batches, steps and learning rates for all methods of a seed. The
budget is a share of the dense network's time (`--times .5`): milliseconds that one thread computes for one example.
Ours are asked for milliseconds (`target_latency_ms`). For the others the share of the MACs, the scale or the depth that
meets it is found by bisection, before a method is run for the first time: a network of that size is made and takes
turns with the dense one. It is a line of the file (`"kind": "size"`), and is used for all seeds. What cannot be met is
run at the smallest size that was tried, and the table says so; ours then with the share of the MACs that comes nearest.
What the network that was trained then takes is measured by `--latency`, which times all networks of a task and seed
in turns in one process, and that is what the table compares; it says where two do not take the same time within `SAME`.

| method | |
|---|---|
| `dense` | not pruned, trained on |
| `width`, `depth`, `both` | `oto.hesso`, `compress_mode="prune"`, `"erase"`, `"both"`, with `target_latency_ms` |
| `width-macs`, `depth-macs`, `both-macs` | the same with the `target_macs` that takes as long; by name only |
| `width-half-macs` | `width` at half of the MACs, whatever time that takes: the bar for ResNet-56 |
| `tp` | torch-pruning, Taylor, global, in portions, as in `rivals.py` |
| `shortgpt` | ShortGPT (arXiv 2403.03853): whole blocks go by influence, 1 - cos of what goes in and what comes out |
| `blockpruner` | BlockPruner (arXiv 2406.10594): one branch after another, that without which the loss is lowest |
| `narrow`, `shallow` | dense networks of fewer channels, or of fewer blocks, from scratch |

`shortgpt` and `blockpruner` remove before training where weights are pretrained, else after 40 % of the steps. They are
ours to make: 128 training images or sentences to measure with, and one segment of each run of blocks stays, as for us.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rivals_methods as methods
import torch
from rivals import deviation, mean, spread
from rivals_tasks import TASKS, Data, ResNet, Task, ViT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from oto import OTO
from oto.errors import OTOError, TargetError

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "erase.jsonl"
ERASED = ("resnet56", "mobilenet", "vit", "minilm")
MODES: dict[str, Any] = {"width": "prune", "depth": "erase", "both": "both"}
LEAST = 0.03  # the smallest share of the MACs, and the smallest scale, that is tried
HALVINGS, ROUNDS = 7, 31
UNTIL = 0.4  # of the steps: where what learns from scratch is known well enough to be cut
EXAMPLES = 128  # to measure blocks with
SAME = 0.05  # as a share of the dense network's time

Line = dict[str, Any]


# ------------------------------------------------------------------------------------------------ time


@torch.inference_mode()
def in_turns(models: Sequence[nn.Module], example: tuple[Tensor, ...], rounds: int = ROUNDS) -> list[list[float]]:
    """Milliseconds of this thread: for each model, one number a round, after two rounds to warm up."""
    taken: list[list[float]] = [[] for _ in models]
    for _ in range(rounds + 2):
        for model, own in zip(models, taken, strict=True):
            begin = time.thread_time()
            model(*example)
            own.append(1e3 * (time.thread_time() - begin))
    return [own[2:] for own in taken]


def share_of(task: Task, model: nn.Module) -> float:
    """The share of the dense network's time that a network takes."""
    dense, own = in_turns([task.network().eval(), model.eval()], task.example())
    return statistics.median(own) / statistics.median(dense)


@dataclass(frozen=True)
class Size:
    """A size that meets a budget, or the smallest that was tried: a share of the MACs, a scale, a number of blocks."""

    size: float
    share: float  # of the time
    met: bool


def smallest(task: Task, make: Callable[[float], nn.Module | None], times: float) -> Size:
    """The largest size in (LEAST, 1) whose time is at most that share; ``make`` gives nothing where one cannot be."""
    low, high, found = LEAST, 1.0, None
    least: Size | None = None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        model = make(middle)
        share = None if model is None else share_of(task, model)
        if share is None:
            low = middle
        elif share <= times:
            low, found = middle, Size(middle, share, True)
        else:
            high, least = middle, Size(middle, share, False)
    best = found or least
    if best is None:
        raise OTOError(f"{task.name}: no size could be made")
    return best


def fewest(task: Task, make: Callable[[int], nn.Module], most: int, times: float) -> Size:
    """The smallest number in 0..most without which the time is at most that share; all of them if there is none."""
    low, high = 0, most
    share = share_of(task, make(most)) if most else 1.0
    if share > times:
        return Size(most, share, False)
    while low < high:
        middle = (low + high) // 2
        now = share_of(task, make(middle))
        low, high, share = (low, middle, now) if now <= times else (middle + 1, high, share)
    return Size(high, share, True)


# ------------------------------------------------------------------------------------------------ ours


def analyzed(task: Task, seed: int, mode: str) -> OTO:
    torch.manual_seed(seed)
    return OTO(task.network(1.0, task.pretrained), task.example(), compress_mode=mode)


def slim_of(oto: OTO, kept: dict[str, int]) -> nn.Module:
    """A network of a shape, without a proof: its time alone counts."""
    parameters = dict(oto.model.named_parameters(remove_duplicate=False))
    for group in oto.node_groups:
        if group.name in kept:
            group.zero_(parameters, torch.arange(kept[group.name], group.size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return oto.construct_subnet(verify=False).model


def oto_size(task: Task, data: Data, how: str, times: float) -> Size:
    """The share of the MACs at which a choice by gradients, without training, takes that share of the time."""
    batches = [data.train.batch(index) for index in torch.arange(min(EXAMPLES, len(data.train))).split(32)]

    def make(share: float) -> nn.Module | None:
        oto = analyzed(task, 0, MODES[how])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = oto.preview(batches=batches, loss=loss_of, target_macs=share)
        except TargetError:
            return None
        return slim_of(oto, found.kept)

    return smallest(task, make, times)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(*batch[0]), batch[1])


def ours(how: str, by_time: bool = False) -> Callable[..., methods.Slim]:
    def run(task: Task, data: Data, size: Size, seed: int, times: float) -> methods.Slim:
        oto = analyzed(task, seed, MODES[how])
        target: Line = {"target_macs": size.size}
        if by_time:  # by the library's clock, which counts what else the machine does, for the dense network, too
            found = oto.preview(target_latency_ms=1e9).milliseconds
            assert found is not None
            target = {"target_latency_ms": times * found[0]}
        optimizer = oto.hesso(**task.optimizer_options(), **target, total_steps=task.steps)
        methods.train(task, oto.model, data, optimizer, seed)
        return finished(oto, MODES[how])

    return run


def finished(oto: OTO, mode: str) -> methods.Slim:
    subnet = oto.construct_subnet()
    sizes = {group.name: group.size for group in oto.node_groups}
    kept = {name: methods._packed(atoms, sizes[name]) for name, atoms in subnet.kept.items()}
    gone = [segment.name for segment in oto.partition.erased(subnet.kept)]
    notes = {"emitter": subnet.emitter, "gone": gone}
    return methods.Slim(subnet.model, {"kept": kept, "mode": mode}, notes)


# ------------------------------------------------------------------------------------------------ by blocks alone


Order = Callable[[Task, OTO, Data], list[str]]


def valid(groups: Sequence[Any], gone: Collection[str]) -> bool:
    """Whether as many of every set of segments stay as have to."""
    left = Counter[tuple[str, int]]()
    for group in groups:
        left.update(dict.fromkeys(group.among, int(group.name not in gone)))
    return all(number >= least for (_, least), number in left.items())


def free(oto: OTO) -> list[Any]:
    return [group for group in oto.node_groups if group.segment and group.prunable]


class Additions(TorchFunctionMode):
    """What goes into additions besides the results of some modules, and what comes out, as cosines of both."""

    def __init__(self, names: Sequence[str], model: nn.Module) -> None:
        super().__init__()
        self.found: dict[str, tuple[Tensor, Tensor]] = {}
        self.made: dict[int, tuple[str, Tensor]] = {}
        self.handles = [
            model.get_submodule(name).register_forward_hook(lambda m, x, y, name=name: self.see(name, y))
            for name in names
        ]

    def see(self, name: str, y: Any) -> None:
        made = y[0] if isinstance(y, tuple) else y
        self.made[made.data_ptr()] = name, made  # kept alive, or another tensor may get its memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        adding = getattr(func, "__name__", "") in ("add", "__add__", "__radd__", "add_", "__iadd__")
        given = [x for x in args[:2] if isinstance(x, Tensor)] if adding else []
        hits = [self.made[x.data_ptr()][0] if x.data_ptr() in self.made else None for x in given]
        before = [x.clone() for x in given] if any(hits) else []
        result = func(*args, **(kwargs or {}))
        if len(before) == 2:
            place = 0 if hits[0] else 1
            self.found[str(hits[place])] = before[1 - place].flatten(1), result.flatten(1)
        return result


@torch.no_grad()
def by_influence(task: Task, oto: OTO, data: Data) -> list[str]:
    """Segments of the blocks with the least influence first; those of a block, such as of a layer, go together."""
    groups, graph = free(oto), oto.partition.found.graph
    joints = {s.name: graph.calls[s.joint].module for s in oto.partition.segments}
    blocks: dict[str, list[str]] = {}
    for group in groups:  # the joints of a BERT lie in modules of their own, two in a layer
        blocks.setdefault(".".join(joints[group.name].split(".")[:4]) or group.name, []).append(group.name)
    scores: dict[str, list[float]] = {block: [] for block in blocks}
    seen = Additions([group.name for group in groups], oto.model)
    try:
        for index in torch.arange(min(EXAMPLES, len(data.train))).split(32):
            with seen:
                oto.model(*data.train.batch(index)[0])
            for block, own in blocks.items():
                there = [name for name in own if name in seen.found]
                if there:
                    first, last = seen.found[there[0]][0], seen.found[there[-1]][1]
                    scores[block].append(1 - float(F.cosine_similarity(first, last).mean()))
            seen.found.clear()
            seen.made.clear()
    finally:
        for handle in seen.handles:
            handle.remove()
    known = sorted((block for block, own in scores.items() if own), key=lambda block: statistics.mean(scores[block]))
    order: list[str] = []
    for block in known:
        if valid(groups, [*order, *blocks[block]]):
            order += blocks[block]
    return order


@torch.no_grad()
def by_loss(task: Task, oto: OTO, data: Data) -> list[str]:
    """One segment after the other, each time the one without which the loss is lowest."""
    groups, parameters = free(oto), dict(oto.model.named_parameters(remove_duplicate=False))
    batches = [data.train.batch(index) for index in torch.arange(min(EXAMPLES, len(data.train))).split(64)]

    def loss_without(group: Any) -> float:
        saved = {piece.parameter: parameters[piece.parameter].clone() for piece in group.zeros}
        group.zero_(parameters, torch.tensor([0]))
        found = sum(float(loss_of(oto.model, batch)) for batch in batches)
        for name, before in saved.items():
            parameters[name].copy_(before)
        return found

    order: list[str] = []
    state = {name: p.clone() for name, p in parameters.items()}
    while may := [g for g in groups if g.name not in order and valid(groups, [*order, g.name])]:
        best = min(may, key=loss_without)
        best.zero_(parameters, torch.tensor([0]))
        order.append(best.name)
    for name, before in state.items():
        parameters[name].copy_(before)
    return order


def removing(order_of: Order) -> Callable[..., methods.Slim]:
    def run(task: Task, data: Data, size: Size, seed: int, times: float) -> methods.Slim:
        oto = analyzed(task, seed, "erase")
        due, met = 0 if task.pretrained else round(UNTIL * task.steps), Size(0, 1.0, False)

        def without(names: Collection[str]) -> nn.Module:
            return slim_of(analyzed(task, 0, "erase"), dict.fromkeys(names, 0))

        def before(step: int, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
            nonlocal met
            if step == due:
                oto.model.eval()
                order = order_of(task, oto, data)
                met = fewest(task, lambda n: without(order[:n]), len(order), times)
                freeze(oto, order[: int(met.size)])
                oto.model.train()
            return optimizer

        methods.train(task, oto.model, data, task.optimizer(oto.model), seed, before)
        slim = finished(oto, "erase")
        slim.notes["size"] = vars(met)
        return slim

    return run


def freeze(oto: OTO, names: Collection[str]) -> None:
    """Bring segments to zero, where they stay: nothing in them is trained any more."""
    parameters = dict(oto.model.named_parameters(remove_duplicate=False))
    for group in free(oto):
        if group.name in names:
            group.zero_(parameters, torch.tensor([0]))
            for piece in group.slices:
                parameters[piece.parameter].requires_grad_(False)


# ------------------------------------------------------------------------------------------------ others


def torch_pruned(task: Task, data: Data, size: Size, seed: int, times: float) -> methods.Slim:
    return methods.METHODS["tp-taylor-global-portions"](task, data, size.size, seed, {})


def tp_size(task: Task, data: Data, times: float) -> Size:
    """The share of the MACs at which what it leaves before training takes that share of the time."""

    def make(share: float) -> nn.Module | None:
        torch.manual_seed(0)
        model = task.network(1.0, task.pretrained)
        settings = {"inner": False, "batches": 2}
        rival = methods.Rival(task, model, data, "taylor", "global", settings, 0)
        optimizer = task.optimizer(model)
        try:
            rival.prune(share, optimizer)
        except (AssertionError, RuntimeError):
            return None
        return model

    return smallest(task, make, times)


def narrow(task: Task, data: Data, size: Size, seed: int, times: float) -> methods.Slim:
    torch.manual_seed(seed)
    model = task.network(size.size, False)
    methods.train(task, model, data, task.optimizer(model), seed)
    return methods.Slim(model, {"scale": size.size})


def shallow_network(task: Task, depth: int) -> nn.Module:
    """A network of so many blocks: of each stage of a ResNet, or layers."""
    if task.name == "resnet56":
        model: nn.Module = ResNet(6 * depth + 2)
    elif task.name == "vit":
        model = ViT(depth=depth)
    else:
        model = task.network(1.0, False)
        layers = model.get_submodule("encoder.encoder")
        layers.layer = layers.layer[:depth]
    return model.to(task.device, memory_format=torch.channels_last)


DEPTHS = {"resnet56": 9, "vit": 4, "minilm": 6}
"""The blocks of networks that can be made of fewer."""


def shallow(task: Task, data: Data, size: Size, seed: int, times: float) -> methods.Slim:
    torch.manual_seed(seed)
    model = shallow_network(task, int(size.size))
    methods.train(task, model, data, task.optimizer(model), seed)
    return methods.Slim(model, {"depth": int(size.size)})


def shallow_size(task: Task, times: float) -> Size:
    tried = [(depth, share_of(task, shallow_network(task, depth))) for depth in range(DEPTHS[task.name] - 1, 0, -1)]
    return next((Size(d, share, True) for d, share in tried if share <= times), Size(*tried[-1], False))


def dense(task: Task, data: Data, size: Size, seed: int, times: float) -> methods.Slim:
    return methods.dense(task, data, 1.0, seed, {})


Method = Callable[[Task, Data, Size, int, float], methods.Slim]
METHODS: dict[str, Method] = {
    "dense": dense,
    **{how: ours(how, by_time=True) for how in MODES},
    **{f"{how}-macs": ours(how) for how in MODES},
    "width-half-macs": ours("width"),
    "tp": torch_pruned,
    "shortgpt": removing(by_influence),
    "blockpruner": removing(by_loss),
    "narrow": narrow,
    "shallow": shallow,
}
USUAL = [name for name in METHODS if name.removesuffix("-macs") not in MODES or name in MODES]


def size_of(task: Task, data: Data, method: str, times: float) -> Size:
    """The size that a method is run at; of those that find it themselves, nothing."""
    if (how := method.removesuffix("-macs")) != method and how in MODES:
        return oto_size(task, data, how, times)
    if method == "tp":
        return tp_size(task, data, times)
    if method == "narrow":
        return smallest(task, lambda scale: task.network(scale, False), times)
    if method == "shallow":
        return shallow_size(task, times)
    return Size(0.5, 1.0, True) if method == "width-half-macs" else Size(1.0, 1.0, True)


def again(task: Task, how: Line) -> nn.Module:
    """A network of the shape of one that was trained."""
    return shallow_network(task, how["depth"]).eval() if "depth" in how else methods.rebuilt(task, how)


# ------------------------------------------------------------------------------------------------ cells


def cells(args: argparse.Namespace) -> Iterator[Line]:
    for name in args.tasks:
        task = TASKS[name].with_budget(args.images, args.epochs)
        for seed in args.seeds if args.seeds is not None else (0, 1):
            for times in args.times:
                for method in args.methods or USUAL:
                    if method != "shallow" or name in DEPTHS:
                        yield {
                            "kind": "accuracy", "task": name, "method": method, "target": times, "seed": seed,
                            "images": task.images, "epochs": task.epochs,
                        }  # fmt: skip


def sized(cell: Line, task: Task, data: Data, path: Path) -> Size:
    """The size of a cell, which all seeds share; found and written down if it is not known."""
    from rivals import append, read, where

    key = {**cell, "kind": "size", "seed": -1, "images": 0, "epochs": 0}
    for line in read(path):
        if all(line.get(name) == value for name, value in key.items()):
            return Size(line["size"], line["share"], line["met"])
    found = size_of(task, data, cell["method"], cell["target"])
    append(path, key | vars(found) | where())
    return found


def trained(cell: Line, args: argparse.Namespace) -> Line | None:
    from rivals import claimed, where

    with claimed(args.results, cell) as mine:
        if not mine:
            return None
        task = TASKS[cell["task"]].with_budget(cell["images"], cell["epochs"])
        data, example = task.data(), task.example()
        size = sized(cell, task, data, args.results)
        used, how = time.process_time(), cell["method"]
        try:
            slim = METHODS[how](task, data, size, cell["seed"], cell["target"])
        except TargetError:  # so many milliseconds cannot be met
            size = sized(cell | {"method": f"{how}-macs"}, task, data, args.results)
            slim = METHODS[f"{how}-macs"](task, data, size, cell["seed"], cell["target"])
        slim.model.eval()
        left = methods.macs(slim.model, example)
        return {
            **cell,
            "size": vars(size),
            "macs": left,
            "macs_kept": left / methods.macs(task.network(), example),
            "params": methods.params(slim.model),
            "accuracy": methods.accuracy(slim.model, data.test),
            "accuracy_holdout": methods.accuracy(slim.model, data.holdout),
            "cpu_minutes": round((time.process_time() - used) / 60, 2),
            **slim.notes,
            "rebuild": slim.rebuild,
            **where(),
        }


def timed(args: argparse.Namespace) -> Iterator[Line]:
    """All networks of a task, a budget and a seed that are there, in turns in this process, with the dense one."""
    from rivals import identity, read, where

    lines = {identity(line): line for line in read(args.results)}
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for cell in cells(args):
        if identity(cell) in lines:
            key = tuple(cell[name] for name in ("task", "target", "seed", "images", "epochs"))
            groups.setdefault(key, []).append(cell)
    for own in groups.values():
        if all(identity(cell | {"kind": "time"}) in lines for cell in own):
            continue
        task = TASKS[own[0]["task"]]
        models = [task.network().eval(), *(again(task, lines[identity(cell)]["rebuild"]).eval() for cell in own)]
        dense_ms, *others = in_turns(models, task.example(), args.rounds)
        full = statistics.median(dense_ms)
        for cell, times in zip(own, others, strict=True):
            low, middle, high = statistics.quantiles(times, n=4)
            found = {"ms": middle, "quartiles_ms": [low, high], "dense_ms": full, "time_kept": middle / full}
            yield {**cell, "kind": "time", **found, **where()}


# ------------------------------------------------------------------------------------------------ the page


def page(lines: list[Line]) -> str:
    """Markdown: a table per task and budget, and what it says about the bar."""
    from rivals import identity

    out = [
        "# Accuracy at equal time",
        "",
        "Generated by `python benchmarks/rivals.py --erase --table` from `erase.jsonl`; the docstring of",
        "`benchmarks/rivals_erase.py` says what each method does. Milliseconds are those that one thread computes for",
        "one example, the median (quartiles) of the networks of one seed that took turns in one process; *of dense* is",
        "the share of the dense network's time, the mean over seeds. `±` is the standard deviation over seeds. A size",
        "that misses the budget is marked: nothing smaller was tried.",
        "",
    ]
    times = {identity(line | {"kind": "accuracy"}): line for line in lines if line["kind"] == "time"}
    runs = [line | {"time": times.get(identity(line))} for line in lines if line["kind"] == "accuracy"]
    keys = dict.fromkeys((r["task"], r["images"], r["epochs"], r["target"]) for r in runs)
    said = []
    for task, images, epochs, target in sorted(keys, key=lambda key: (list(TASKS).index(key[0]), key[1:])):
        here = [r for r in runs if (r["task"], r["images"], r["epochs"], r["target"]) == (task, images, epochs, target)]
        first = here[0]
        out += [
            f"## {TASKS[task].title}, {target:g} of its time",
            "",
            f"{images:,} training examples × {epochs}. {first['machine']}, {first['threads']} thread, torch"
            f" {first['torch']}; {sum(r['cpu_minutes'] for r in here):.0f} minutes of a core for {len(here)} runs.",
            "",
            *table(here),
            "",
        ]
        said += [f"- {TASKS[task].title}: {text}" for text in verdicts(task, here)]
    return "\n".join([*out, "## Against the bar", "", *said]) + "\n"


def table(here: list[Line]) -> list[str]:
    rows = [
        "| method | seeds | ms | of dense | MACs kept | segments gone | accuracy | hold-out |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    own: dict[str, list[Line]] = {}
    for r in here:
        own.setdefault(r["method"], []).append(r)
    for method in sorted(own, key=lambda m: (m != "dense", -mean(own[m], "accuracy"))):
        some = own[method]
        clock = next((r["time"] for r in some if r["time"]), None)
        ms = "–" if clock is None else "{:.2f} ({:.2f}–{:.2f})".format(clock["ms"], *clock["quartiles_ms"])
        kept = "–" if (share := time_kept(some)) is None else f"{share:.2f}"
        missed = "" if all(r["size"]["met"] for r in some) else ", misses the budget"
        gone = [len(r["gone"]) for r in some if "gone" in r]
        bold = "**" if method == "both" else ""
        rows.append(
            f"| {bold}{method}{bold}{missed} | {len(some)} | {ms} | {kept} | {mean(some, 'macs_kept'):.3f} |"
            f" {'–' if not gone else f'{statistics.mean(gone):.1f}'} | {bold}{spread(some, 'accuracy')}{bold} |"
            f" {spread(some, 'accuracy_holdout')} |"
        )
    return rows


def verdicts(task: str, here: list[Line]) -> Iterator[str]:
    """Both against each method that is no slower, by more than the larger deviation or not; and ResNet-56's bar."""
    own: dict[str, list[Line]] = {}
    for r in here:
        own.setdefault(r["method"], []).append(r)
    both = own.get("both", [])
    mine = time_kept(both)
    if mine is None:
        yield "not measured yet"
        return
    for method, theirs in own.items():
        share = time_kept(theirs)
        if method in ("dense", "both", "both-macs", "width-half-macs") or share is None:
            continue
        gap = mean(both, "accuracy") - mean(theirs, "accuracy")
        noise = max(deviation(both), deviation(theirs))
        word = "ahead" if gap > noise else "within the spread" if gap > -noise else "**behind**"
        clock = "at equal time" if abs(share - mine) <= SAME else f"at {share:.2f} against {mine:.2f} of the time"
        yield f"both {gap:+.2f} points over `{method}` {clock}, spread {noise:.2f}: {word}"
    if task == "resnet56" and (bar := own.get("width-half-macs")):
        gap = mean(both, "accuracy") - mean(bar, "accuracy")
        yield f"at {mine:.2f} of its time {gap:+.2f} points of width alone at half of the MACs (bar: -1)"


def time_kept(own: Sequence[Line]) -> float | None:
    found = [r["time"]["time_kept"] for r in own if r["time"]]
    return statistics.mean(found) if found else None


# ------------------------------------------------------------------------------------------------ command


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=ERASED, default=list(ERASED))
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--times", nargs="+", type=float, default=[0.5], help="shares of the dense network's time")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 and 1")
    parser.add_argument("--images", type=int, help="training examples; default: the task's")
    parser.add_argument("--epochs", type=int, help="default: the task's")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=101, help="of --latency")
    parser.add_argument("--latency", action="store_true", help="only time the networks that are there")
    parser.add_argument("--table", action="store_true", help="only write the page")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    from rivals import append

    args = parsed(argv)
    torch.set_num_threads(1)
    if args.latency:
        for line in timed(args):
            append(args.results, line)
            print("{task} {method} seed {seed}: {ms:.2f} ms, {time_kept:.2f} of dense".format(**line), flush=True)
    elif not args.table:
        for cell in cells(args):
            if (line := trained(cell, args)) is not None:
                append(args.results, line)
                said = "{task} {method} seed {seed}: {accuracy:.2f} % (hold-out {accuracy_holdout:.2f} %), "
                print((said + "{macs_kept:.3f} of the MACs, {cpu_minutes:.1f} minutes of a core").format(**line))
    from rivals import read

    target = args.results.with_suffix(".md")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(read(args.results)))
    print(f"wrote {target}")
