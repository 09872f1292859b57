"""What the lessons share and none of them is about: flags, clocks and tables. Data comes from `examples/data.py`."""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))  # for the lessons too, which import this first

from resnet_cifar10 import table  # noqa: E402


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """The flags that every lesson has. Each adds its own."""
    found = argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    found.add_argument("--smoke", action="store_true", help="seconds instead of minutes: does it run? Learns nothing")
    found.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    found.add_argument("--threads", type=int, default=2, help="CPU threads")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--passes", type=int, default=31, help="forward passes when latency is measured")
    found.add_argument("--out", type=Path, default=Path("out") / name, help="where the artifact goes")
    return found


def start(found: argparse.ArgumentParser, smoke: Mapping[str, Any], argv: Sequence[str] | None = None) -> Any:
    """Read the flags; ``--smoke`` replaces the defaults by tiny ones. Threads and seed are set."""
    if "--smoke" in (sys.argv[1:] if argv is None else argv):
        found.set_defaults(**{"threads": 1, "passes": 5, **smoke})
    args = found.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if os.environ.get("RANK", "0") == "0":  # of several processes, one prints
        print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} CPU threads, seed {args.seed}")
    return args


@torch.no_grad()
def milliseconds(models: Mapping[str, nn.Module], run: Any, passes: int) -> dict[str, tuple[float, float, float]]:
    """First quartile, median and third quartile of a forward pass, in eval mode and float32 on the CPU.

    The models take turns, so that whatever else the machine does slows all of them down alike.

    Args:
        run: Is called with a model, and runs it.
    """
    ready = {name: copy.deepcopy(model).float().cpu().eval() for name, model in models.items()}
    taken: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(passes + 3):  # three to warm up
        for name, model in ready.items():
            begin = time.perf_counter()
            run(model)
            taken[name].append(1e3 * (time.perf_counter() - begin))
    return {name: tuple(statistics.quantiles(own[3:], n=4)) for name, own in taken.items()}  # type: ignore[misc]


def compare(
    rows: Mapping[str, tuple[nn.Module, Any, Sequence[str]]], scores: Sequence[str], run: Any, on: str, passes: int
) -> None:
    """Print what pruning changed.

    Args:
        rows: For each model its name, itself, its costs, and what it scores.
        scores: What the scores are called.
        run, on: How to run a model to time it, and what on, in words.
    """
    times = milliseconds({name: model for name, (model, _, _) in rows.items()}, run, passes)
    cells = [["", *scores, "params", "MACs", "ms", "quartiles"]]
    for name, (_, cost, scored) in rows.items():
        low, middle, high = times[name]
        cells.append([name, *scored, f"{cost.params:,}", f"{cost.macs:,}", f"{middle:.2f}", f"{low:.2f}–{high:.2f}"])
    print("\n" + table(cells))
    print(f"ms: of {passes} forward passes on {on}, CPU, {torch.get_num_threads()} threads, in turns\n")
