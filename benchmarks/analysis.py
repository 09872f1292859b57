"""What it costs to find the groups of a model, beside torch-pruning's DependencyGraph on the same model and input.

    python benchmarks/analysis.py                       # the models of the zoo at their usual input sizes
    python benchmarks/analysis.py resnet50 swin_t --repeats 9
    python benchmarks/analysis.py resnet50 --before ../before   # another checkout of oto in the same run, too
    python benchmarks/analysis.py --large               # 8, 47 and 70 thousand million parameters, on the meta device
    python benchmarks/analysis.py --depth               # Llama with 2 to 200 layers; --plot FILE draws the curve

Each tool runs in a fresh process on one thread, in turns, on the same random weights. Times are medians of CPU seconds
over `--repeats` runs after one that is not counted; memory is the growth of the peak resident size in MiB, from before
the tool is imported to after its first run. For oto the trace (recording) and the analysis (everything after it: terms,
proofs, node groups, costs) are shown apart, and `total` is `OTO(model, x)`. Models on meta have the sizes of the
published ones and no data; building them is not counted. torch-pruning needs the data, so it has no part in these.
"""

from __future__ import annotations

import argparse
import json
import os
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
    "resnet18",
    "resnet50",
    "vgg16_bn",
    "densenet121",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "regnet_y_400mf",
    "resnext50_32x4d",
    "shufflenet_v2_x1_0",
    "googlenet",
    "inception_v3",
    "convnext_tiny",
    "vit_b_16",
    "vit_b_32",
    "swin_t",
    "maxvit_t",
]
TEXT = ["bert", "gpt2", "llama", "t5", "vit"]
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LARGE: dict[str, tuple[str, dict[str, int]]] = {
    "llama-3-8b": ("Llama", LLAMA_8B),
    "mixtral-8x7b": ("Mixtral", LLAMA_8B | {"vocab_size": 32000, "num_local_experts": 8}),
    "llama-3-70b": (
        "Llama",
        LLAMA_8B
        | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    ),
}
DEPTHS = [2, 5, 10, 20, 50, 100, 200]
LARGE |= {f"llama-{n}-layers": ("Llama", LLAMA_8B | {"num_hidden_layers": n}) for n in DEPTHS}


def make(name: str) -> tuple[nn.Module, Any]:
    """A model at full size (vision) or with the tiny configuration of the zoo (transformers)."""
    if name in TEXT:
        sys.path.append(str(ROOT))  # behind the checkout that is measured
        from tests.zoo.models import TRANSFORMERS

        return TRANSFORMERS[name]()
    if name in LARGE:
        import transformers

        family, config = LARGE[name]
        with torch.device("meta"):
            made = getattr(transformers, f"{family}Config")(**config)
            return getattr(transformers, f"{family}ForCausalLM")(made), {"input_ids": torch.zeros(1, 32).long()}
    import torchvision

    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    size = 299 if name == "inception_v3" else 224
    return torchvision.models.get_model(name, weights=None, **options), torch.randn(1, 3, size, size)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def median(run: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
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

    def analyze() -> None:
        cost(partition(graph))

    prunable = [group for group in found.node_groups if group.prunable]
    return {
        "trace": median(lambda: record(model, x, known), repeats),
        "analysis": median(analyze, repeats),
        "total": median(lambda: OTO(model, x), repeats),
        "memory": memory,
        "params": found.compute_num_params(),
        "nodes": len(graph.nodes),
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


def spawn(tool: str, name: str, repeats: int, checkout: Path = ROOT) -> dict[str, Any]:
    command = [sys.executable, __file__, name, "--child", tool, "--repeats", str(repeats)]
    where = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=where)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[*VISION, *TEXT])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--before", type=Path, help="another checkout, whose OTO(model, x) is shown as well")
    parser.add_argument("--child", choices=["oto", "torch-pruning"], help=argparse.SUPPRESS)
    parser.add_argument("--large", action="store_true", help="the largest models, on meta")
    parser.add_argument("--depth", action="store_true", help="one model at several depths, on meta")
    parser.add_argument("--plot", type=Path, help="with --depth: where to draw cost against depth (needs matplotlib)")
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.models[0], args.repeats)
    if args.large or args.depth:
        return on_meta(args)
    print(f"{platform.machine()}, torch {torch.__version__}, one thread, float32, batch 1 (text: 2×8 tokens)")
    row("", "axes", "atoms", "trace", "analysis", "OTO(m, x)", "MiB", "torch-pruning", "MiB", "ratio", "before")
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
        if args.before:
            before = spawn("oto", name, args.repeats, args.before)
            cells += [""] * (9 - len(cells)) + [before["failed"] if "failed" in before else f"{before['total']:.3f}"]
        row(name, *cells)


def on_meta(args: argparse.Namespace) -> None:
    print(f"{platform.machine()}, torch {torch.__version__}, one thread, meta device, 1×32 tokens")
    names = [f"llama-{n}-layers" for n in DEPTHS] if args.depth else [n for n in LARGE if "layers" not in n]
    row("", "axes", "calls", "trace", "analysis", "OTO(m, x)", "MiB", "parameters", "ms/layer")
    found = {}
    for name in names:
        found[name] = ours = spawn("oto", name, args.repeats)
        layers = LARGE[name][1]["num_hidden_layers"]
        row(
            name,
            ours["axes"],
            ours["nodes"],
            *(f"{ours[k]:.3f}" for k in TIMES),
            f"{ours['memory']:.0f}",
            f"{ours['params'] / 1e9:.1f}e9",
            f"{1000 * ours['total'] / layers:.1f}",
        )
    if args.plot:
        plot([found[name] for name in names], args.plot)


def plot(found: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for key, label in zip(TIMES, ("trace", "analysis", "OTO(model, x)"), strict=True):
        left.plot(DEPTHS, [ours[key] for ours in found], marker="o", label=label)
    left.set(xlabel="layers", ylabel="seconds, one thread", ylim=(0, None))
    left.legend(frameon=False)
    right.plot(DEPTHS, [ours["memory"] for ours in found], marker="o", color="0.3")
    right.set(xlabel="layers", ylabel="growth of peak memory, MiB", ylim=(0, None))
    figure.suptitle("Cost of the analysis against depth: Llama of 8B width, on meta")
    figure.tight_layout()
    figure.savefig(path)
    print(f"drawn: {path}")


TIMES = ("trace", "analysis", "total")


def row(name: str, *cells: object) -> None:
    widths = (6, 8, 8, 10, 11, 7, 15, 9, 8, 9)
    print(
        f"{name:20}" + "".join(str(cell).rjust(width) for cell, width in zip(cells, widths, strict=False)), flush=True
    )


if __name__ == "__main__":
    main()
