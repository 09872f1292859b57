"""What segments cost to find, and what depth is worth beside width in milliseconds, without any training.

    OMP_NUM_THREADS=1 python benchmarks/erase.py analysis                    # the models of the zoo
    OMP_NUM_THREADS=1 python benchmarks/erase.py analysis resnet50 llama --repeats 25
    OMP_NUM_THREADS=1 python benchmarks/erase.py times                       # resnet56 and vit, half of the MACs
    OMP_NUM_THREADS=1 python benchmarks/erase.py times resnet56 --targets .75 .5 .25 --batch 64

``analysis``: `OTO(model, x, compress_mode="both")` beside `"prune"`, on one thread, in turns in one process. Seconds
are medians of CPU time over `--repeats` turns after one that is not counted, each after a garbage collection, and the
ratio is that of the medians. The bar is 1.3.

``times``: a network at a share of its MACs by width only (`"prune"`), by depth only (`"erase"`), and by both in one
budget. What goes has the least magnitude; nothing is trained, so nothing is said of accuracy. Weights are random.
All slim models and the full one take turns on one thread; a row is the median, its quartiles, and the share of the full
model's time. Milliseconds are those that the thread computes for: what else the machine does is not in them. `calls` is
what a forward pass calls of torch. A row is of the model's own class; with `--graph` there is another, of the graph,
which makes no call that came to nothing. A slim model that is slower than the full one is said to be.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from analysis import make
from rivals import machine
from rivals_tasks import ViT, resnet
from torch import nn

from oto import OTO
from oto.axes.registry import known
from oto.errors import OTOError
from oto.trace.record import record

ANALYZED = (
    "resnet18", "resnet50", "densenet121", "mobilenet_v3_small", "googlenet", "convnext_tiny", "vit_b_16", "swin_t",
    "bert", "gpt2", "llama", "t5",
)  # fmt: skip
"""Of `benchmarks/analysis.py`, which says what they are."""

BAR = 1.3
MODES: dict[str, Any] = {"width": "prune", "depth": "erase", "both": "both"}


def resnet56() -> tuple[nn.Module, torch.Tensor]:
    return resnet(56, "")(1.0, False), torch.randn(1, 3, 32, 32)


def vit() -> tuple[nn.Module, torch.Tensor]:
    return ViT(), torch.randn(1, 1, 28, 28)


TIMED: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {"resnet56": resnet56, "vit": vit}


# ------------------------------------------------------------------------------------------------ analysis


def seconds(run: Callable[[], Any]) -> float:
    gc.collect()  # else a turn may pay for what the one before it left, a fifth of a second in all that torch holds
    begin = time.process_time()
    run()
    return time.process_time() - begin


def analyzed(name: str, repeats: int) -> dict[str, float]:
    """Medians of CPU seconds with and without segments, and how many there are."""
    model, x = make(name)
    model.eval()
    taken: dict[str, list[float]] = {"prune": [], "both": []}
    for _ in range(repeats + 1):
        for mode, own in taken.items():
            own.append(seconds(lambda mode=mode: OTO(model, x, compress_mode=mode)))
    found = OTO(model, x, compress_mode="both")
    own = {mode: statistics.median(times[1:]) for mode, times in taken.items()}
    return own | {"segments": sum(group.segment for group in found.node_groups)}


def analysis(args: argparse.Namespace) -> None:
    row("", "segments", "prune, s", "both, s", "ratio")
    over = []
    for name in args.models or ANALYZED:
        try:
            found = analyzed(name, args.repeats)
        except OTOError as failure:
            row(name, type(failure).__name__)
            continue
        ratio = found["both"] / found["prune"]
        over += [name] * (ratio > BAR)
        row(name, f"{found['segments']:.0f}", f"{found['prune']:.3f}", f"{found['both']:.3f}", f"{ratio:.2f}")
    print(f"above {BAR}: {', '.join(over) or 'none'}")


# ------------------------------------------------------------------------------------------------ times


Row = tuple[nn.Module, float, int]
"""A model, the share of the MACs that it has, and how many segments went."""


def slim(model: nn.Module, x: torch.Tensor, how: str, target: float, graph: bool) -> dict[str, Row]:
    """A slim model in its own class, and on demand as a graph."""
    oto = OTO(copy.deepcopy(model), x, compress_mode=MODES[how])
    optimizer = oto.hesso(
        lr=1.0, target_macs=target, saliency="magnitude", start_pruning_step=0, pruning_steps=1, pruning_periods=1
    )
    optimizer.step()  # without gradients nothing moves; what was chosen goes to zero
    left = optimizer.left_like(None)
    gone = sum(group.segment and not left[group.name].any() for group in optimizer.node_groups)
    rows: dict[str, Row] = {}
    for emitter in ("module", "graph") if graph else ("module",):
        subnet = oto.construct_subnet(emitter=emitter)
        name = f"{how}, {target:.0%}" + ", graph" * (emitter == "graph")
        rows[name] = subnet.model, subnet.cost_after.macs / subnet.cost_before.macs, gone
    return rows


def time_one(name: str, targets: Sequence[float], args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model, x = TIMED[name]()
    model.eval()
    with torch.no_grad():  # a network as it is after some training, not one whose norms are all alike
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                module.weight.uniform_(0.2, 1.8)
                module.bias.normal_(0, 0.2)
    rows: dict[str, Row] = {"full": (model, 1.0, 0)}
    for target in targets:
        for how in MODES:
            try:
                rows |= slim(model, x, how, target, args.graph)
            except OTOError as failure:
                print(f"{name}, {how} to {target:.0%}: {type(failure).__name__}: {str(failure).splitlines()[0]}")
    printed(name, rows, x.repeat(args.batch, *[1] * (x.ndim - 1)), args.rounds)


def printed(name: str, rows: Mapping[str, Row], x: torch.Tensor, rounds: int) -> None:
    calls = [lambda model=model: model(x) for model, _, _ in rows.values()]
    times = in_turns(calls, rounds)
    row(f"{name}, batch {len(x)}", "MACs", "segments gone", "calls", "ms", "quartiles", "of full")
    full = statistics.median(times[0])
    slower = []
    for (how, (model, macs, gone)), own in zip(rows.items(), times, strict=True):
        low, middle, high = statistics.quantiles(own, n=4)
        slower += [how] * (middle > full)
        cells = (
            f"{macs:.1%}",
            gone,
            operators(model, x),
            f"{middle:.2f}",
            f"{low:.2f}–{high:.2f}",
            f"{middle / full:.2f}",
        )
        row(how, *cells)
    print(f"slower than the full model: {', '.join(slower) or 'none'}\n")


def operators(model: nn.Module, x: torch.Tensor) -> int:
    """Calls that a forward pass makes: what a small network pays for besides its arithmetic."""
    return len(record(model, x, known).calls)


@torch.inference_mode()
def in_turns(calls: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Milliseconds of this thread: for each call, one number per round, after two rounds to warm up."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 2):
        for call, own in zip(calls, taken, strict=True):
            begin = time.thread_time()
            call()
            own.append(1e3 * (time.thread_time() - begin))
    return [own[2:] for own in taken]


def row(name: str, *cells: object) -> None:
    print(f"{name:22}" + "".join(str(cell).rjust(15) for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["analysis", "times"])
    parser.add_argument("models", nargs="*", help=f"analysis: {', '.join(ANALYZED)}; times: {', '.join(TIMED)}")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--targets", type=float, nargs="*", default=[0.5], help="shares of the MACs that are left")
    parser.add_argument("--graph", action="store_true", help="time what the graph emitter makes, too")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=101, help="of timing, for each network")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{machine()}, torch {torch.__version__}, one thread, float32")
    if args.what == "analysis":
        return analysis(args)
    for name in args.models or TIMED:
        time_one(name, args.targets, args)


if __name__ == "__main__":
    main()
