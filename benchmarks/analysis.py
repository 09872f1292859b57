"""What it costs to find the groups of a model, beside torch-pruning's DependencyGraph on the same model and input.

    python benchmarks/analysis.py                       # the models of the zoo at their usual input sizes
    python benchmarks/analysis.py resnet50 swin_t --repeats 9

Each tool runs in a fresh process on one thread, in turns, on the same random weights. Times are medians in seconds over
`--repeats` runs after one that is not counted; memory is the growth of the peak resident size in MiB, from before the
tool is imported to after its first run. For oto the trace (recording) and the analysis (everything after it: terms,
proofs, node groups, costs) are shown apart, and `total` is `OTO(model, x)`.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
VISION = [
    "resnet18", "resnet50", "vgg16_bn", "densenet121", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf",
    "resnext50_32x4d", "shufflenet_v2_x1_0", "googlenet", "inception_v3", "convnext_tiny", "vit_b_16", "vit_b_32",
    "swin_t", "maxvit_t",
]  # fmt: skip
TEXT = ["bert", "gpt2", "llama", "t5", "vit"]


def make(name: str) -> tuple[nn.Module, Any]:
    """A model at full size (vision) or with the tiny configuration of the zoo (transformers)."""
    if name in TEXT:
        sys.path.insert(0, str(ROOT))
        from tests.zoo.models import TRANSFORMERS

        return TRANSFORMERS[name]()
    import torchvision

    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    size = 299 if name == "inception_v3" else 224
    return torchvision.models.get_model(name, weights=None, **options), torch.randn(1, 3, size, size)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def median(run: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure_oto(model: nn.Module, x: Any, repeats: int) -> dict[str, Any]:
    before = peak()
    from oto import OTO
    from oto.axes.registry import known
    from oto.groups import cost, partition
    from oto.trace.record import record

    found = OTO(model, x)
    memory = peak() - before
    graph = record(model, x, known)

    def analyse() -> None:
        cost(partition(graph))

    prunable = [group for group in found.node_groups if group.prunable]
    return {
        "trace": median(lambda: record(model, x, known), repeats),
        "analysis": median(analyse, repeats),
        "total": median(lambda: OTO(model, x), repeats),
        "memory": memory,
        "axes": len(prunable),
        "atoms": sum(group.size for group in prunable),
    }


def measure_torch_pruning(model: nn.Module, x: Any, repeats: int) -> dict[str, Any]:
    before = peak()
    import torch_pruning

    def build() -> Any:
        return torch_pruning.DependencyGraph().build_dependency(model, example_inputs=x)

    build()
    return {"total": median(build, repeats), "memory": peak() - before}


def child(tool: str, name: str, repeats: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, x = make(name)
    model.eval()
    try:
        result = (measure_oto if tool == "oto" else measure_torch_pruning)(model, x, repeats)
    except Exception as failure:
        result = {"failed": type(failure).__name__}
    print(json.dumps(result))


def spawn(tool: str, name: str, repeats: int) -> dict[str, Any]:
    command = [sys.executable, __file__, name, "--child", tool, "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[*VISION, *TEXT])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", choices=["oto", "torch-pruning"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.models[0], args.repeats)
    print(f"{platform.machine()}, torch {torch.__version__}, one thread, float32, batch 1 (text: 2×8 tokens)")
    row("", "axes", "atoms", "trace", "analysis", "OTO(m, x)", "MiB", "torch-pruning", "MiB", "ratio")
    for name in args.models:
        ours, theirs = spawn("oto", name, args.repeats), spawn("torch-pruning", name, args.repeats)
        if "failed" in ours:
            row(name, ours["failed"])
            continue
        cells = [ours["axes"], ours["atoms"], *(f"{ours[key]:.3f}" for key in ("trace", "analysis", "total"))]
        cells.append(f"{ours['memory']:.0f}")
        if "failed" in theirs:
            cells.append(theirs["failed"])
        else:
            cells += [f"{theirs['total']:.3f}", f"{theirs['memory']:.0f}", f"{ours['total'] / theirs['total']:.2f}"]
        row(name, *cells)


def row(name: str, *cells: object) -> None:
    widths = (6, 8, 8, 10, 11, 7, 15, 7, 8)
    print(
        f"{name:20}" + "".join(str(cell).rjust(width) for cell, width in zip(cells, widths, strict=False)), flush=True
    )


if __name__ == "__main__":
    main()
