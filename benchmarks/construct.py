"""What a slim model costs to make: seconds in forward passes of the full model, memory, and bytes on disk.

    OMP_NUM_THREADS=1 nice python benchmarks/construct.py          # half an hour on one core
    python benchmarks/construct.py --table                         # docs/benchmarks/construct.md from what is there

Every row is measured in a process of its own and added to ``docs/benchmarks/construct.jsonl``; a row that is there is
not measured again. Half of all groups are zero. Seconds are those of the process on one thread, so other programs count
little. Memory is what a row takes beyond what the process held before it (the full model): the peak of its resident
pages. ``torch-pruning`` builds its graph and removes as large a share of the channels; it proves and saves nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "docs/benchmarks/construct.jsonl", ROOT / "docs/benchmarks/construct.md"

Model = tuple[nn.Module, Any]


def resnet50() -> Model:
    import torchvision

    return torchvision.models.resnet50(), torch.randn(1, 3, 224, 224)


def vit_b_32() -> Model:
    import torchvision

    model = torchvision.models.vit_b_32()
    nn.init.normal_(model.heads[0].weight, std=0.02)  # it starts at zero, and would hide whatever is before it
    return model, torch.randn(1, 3, 224, 224)


def bert_base() -> Model:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig()), torch.randint(1000, (1, 128))


def llama_250m() -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
    )
    return LlamaForCausalLM(config), torch.randint(1000, (1, 128))


def llama_8b_bf16() -> Model:
    """The sizes of Llama-3-8B: 16 GB of weights, so it needs a machine of 24."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    return in_bf16(lambda: LlamaForCausalLM(config)), torch.randint(1000, (1, 32))


def llama_1b_bf16() -> Model:
    """The sizes of Llama-3.2-1B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    return in_bf16(lambda: LlamaForCausalLM(config)), torch.randint(1000, (1, 128))


def in_bf16(make: Callable[[], nn.Module]) -> nn.Module:
    """A model that never was in float32: that would not fit."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        return make()
    finally:
        torch.set_default_dtype(torch.float32)


MODELS: dict[str, Callable[[], Model]] = {
    f.__name__: f for f in (resnet50, vit_b_32, bert_base, llama_250m, llama_1b_bf16, llama_8b_bf16)
}
LARGE = ("llama_8b_bf16",)

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "own dtype only": {"float64": False},
    "no proof": {"verify": False},
    "with model.pt2": {"program": True},
    "graph": {"emitter": "graph"},
}
METHODS = (*OPTIONS, "torch-pruning")


def peak() -> int:
    """Bytes of resident pages, at most, since the last :func:`forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


def forget_peak() -> int:
    """Bytes of resident pages now; the peak starts from there."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def measure(name: str, method: str) -> dict[str, Any]:
    """One row."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model.eval()
    row: dict[str, Any] = {"model": name, "method": method, "full_bytes": sum(p.nbytes for p in model.parameters())}
    times = []
    with torch.no_grad():
        for _ in range(6):
            start = time.process_time()
            model(x)
            times.append(time.process_time() - start)
    row["forward_s"] = sorted(times[1:])[len(times) // 2 - 1]
    if method == "torch-pruning":
        return row | by_torch_pruning(model, x)
    from oto import OTO

    start = time.process_time()
    oto = OTO(model, x)
    row["analysis_s"] = time.process_time() - start
    oto.random_set_zero_groups(0.5)
    with tempfile.TemporaryDirectory() as folder:
        before = forget_peak()
        start = time.process_time()
        subnet = oto.construct_subnet(Path(folder) / "out", **OPTIONS[method])
        row["seconds"] = time.process_time() - start
        row["memory"] = peak() - before
        row["peak"] = peak()  # of the whole process
        assert subnet.path is not None
        row["written"] = sum(path.stat().st_size for path in subnet.path.iterdir())
    row["slim_bytes"] = sum(p.nbytes for p in subnet.model.parameters())
    return row | {"emitter": subnet.emitter, "comparisons": len(subnet.checks), "notes": list(subnet.notes)}


def by_torch_pruning(model: nn.Module, x: Any) -> dict[str, Any]:
    import torch_pruning

    heads = {
        layer: model.config.num_attention_heads
        for path, layer in model.named_modules()
        if path.endswith(("query", "key", "value", "q_proj"))
    }
    outputs = [layer for path, layer in model.named_modules() if path in ("fc", "heads.head", "lm_head")]
    before = forget_peak()
    start = time.process_time()
    try:
        pruner = torch_pruning.pruner.BasePruner(
            model,
            x,
            importance=torch_pruning.importance.GroupMagnitudeImportance(),
            pruning_ratio=0.5,
            ignored_layers=outputs,
            num_heads=heads,
            prune_num_heads=bool(heads),
            head_pruning_ratio=0.5,
        )
        pruner.step()
        seconds, memory = time.process_time() - start, peak() - before
        with torch.no_grad():
            model(x)
    except Exception as failure:
        return {"failure": f"{type(failure).__name__}: {str(failure).splitlines()[0][:100]}"}
    return {"seconds": seconds, "memory": memory, "slim_bytes": sum(p.nbytes for p in model.parameters())}


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The page."""
    mega = 1e6
    lines = [
        "# What a slim model costs to make",
        "",
        "Generated by `python benchmarks/construct.py --table` from `construct.jsonl`; its docstring says how it was",
        "measured. Half of all groups are zero. *Forwards* are seconds in forward passes of the full model on the",
        "example, in its own dtype. *Memory* is the peak beyond the full model, in brackets as a multiple of the slim",
        "one. *Analysis* is `OTO(...)`, in forwards.",
        "",
    ]
    if rows:
        lines += [f"torch {rows[0]['torch']}, {rows[0]['cpu']}, one thread.", ""]
    lines += [
        "| model | full, MB | way | slim, MB | analysis | forwards | seconds | memory, MB | written, MB |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    order = {method: i for i, method in enumerate(METHODS)}
    for row in sorted(rows, key=lambda row: (list(MODELS).index(row["model"]), order[row["method"]])):
        if "failure" in row:
            lines.append(
                f"| {row['model']} | {row['full_bytes'] / mega:.0f} | {row['method']} | {row['failure']} |||||||"
            )
            continue
        forward, slim = row["forward_s"], row["slim_bytes"]
        analysis = f"{row['analysis_s'] / forward:.1f}" if "analysis_s" in row else ""
        written = f"{row['written'] / mega:.0f}" if "written" in row else ""
        lines.append(
            f"| {row['model']} | {row['full_bytes'] / mega:.0f} | {row['method']} | {slim / mega:.0f} | {analysis}"
            f" | {row['seconds'] / forward:.1f} | {row['seconds']:.1f}"
            f" | {row['memory'] / mega:.0f} ({row['memory'] / slim:.1f} ×) | {written} |"
        )
    return "\n".join(lines) + "\n"


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[m for m in MODELS if m not in LARGE], choices=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--table", action="store_true", help="write the page, measure nothing")
    parser.add_argument("--row", nargs=2, metavar=("MODEL", "METHOD"), help="measure one row and print it")
    args = parser.parse_args(argv)
    if args.row:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(*args.row) | {"torch": torch.__version__, "cpu": cpu()}))
        return
    done = {(row["model"], row["method"]) for row in read()}
    for model in args.models if not args.table else ():
        for method in args.methods:
            if (model, method) in done:
                continue
            command = [sys.executable, __file__, "--row", model, method]
            env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
            result = subprocess.run(command, capture_output=True, text=True, env=env)
            if result.returncode:
                print(f"{model}, {method}: {result.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            row = json.loads(result.stdout.splitlines()[-1])
            with RESULTS.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            whole = f"{row['peak'] / row['full_bytes']:.2f} x the full weights" if "peak" in row else ""
            forwards = f"{row.get('seconds', 0) / row['forward_s']:.1f} forwards"
            print(model, method, forwards, whole, row.get("failure", ""))
    PAGE.write_text(table(read()))


if __name__ == "__main__":
    main()
