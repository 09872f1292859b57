"""How much faster slim models are: full against slim at 75, 50 and 25 % of the MACs, and slim norms against stock ones.

    OMP_NUM_THREADS=1 python benchmarks/latency.py                          # every model on one core of the CPU
    python benchmarks/latency.py --models bert_base --targets .5 --modes eager compiled
    for i in 1 2 3 4 5 6 7; do python benchmarks/latency.py --device cuda --dtype bfloat16 & done; wait
    python benchmarks/latency.py --table                                    # docs/benchmarks/latency.md alone

A cell (model, target, mode) is a line of `docs/benchmarks/latency.jsonl`, written when it is done; one that is there is
not measured again, and what failed only with `--again`. Processes share the work model by model: what another one has
in hand is left to it. They build and compile side by side, and one times while the others wait.

The weights are random, so they say nothing of which layer matters. A slim model is what `oto.hesso(target_macs=...)`
arrives at in one step without gradients: it goes by the magnitude of the weights, and every layer gives up the same
share of its atoms (`--scope local`; `global` ranks all atoms of the network together), down to multiples of
`--divisible`. It is of the model's own class. One that computes something else is refused (compared in float32, before
it is cast); only on a CPU the large ones are not compared, for that takes longer than the timing.

Full and slim take turns, so that they see the same machine, in `torch.inference_mode()`. Convolutional networks are
`channels_last`. On a GPU every forward pass is waited for. `compiled` is `torch.compile(dynamic=False)`, `onnxruntime`
what `subnet.export("onnx")` writes, on the CPU.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import hashlib
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from rivals import append, machine, read
from torch import Tensor, nn

from oto import OTO
from oto import nn as slim_nn
from oto.io.export import export_model

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "benchmarks" / "latency.jsonl"
MODES = ("eager", "compiled", "onnxruntime")
TARGETS = (0.75, 0.5, 0.25)
ROUNDS = 7
"""Rounds of timing at least, whatever time they take."""
CALLS = 20
"""A norm is called so often in a row for one figure."""

Line = dict[str, Any]
Call = Callable[[], Any]

# ------------------------------------------------------------------------------------------------ models


@dataclass(frozen=True)
class Subject:
    """A model with random weights, and inputs for it; both are made on torch's default device."""

    title: str
    build: Callable[[], nn.Module]
    example: Callable[[int], Tensor]
    convolutional: bool = False
    large: bool = False
    """On a CPU, a slim one is not compared, and only two models are there at a time."""


def image(batch: int) -> Tensor:
    return torch.randn(batch, 3, 224, 224)


def tokens(batch: int) -> Tensor:
    return torch.randint(1000, (batch, 128))


def from_torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        model = torchvision.models.get_model(name, weights=None)
        if name.startswith("vit"):
            nn.init.normal_(model.heads[0].weight, std=0.02)  # it starts at zero, and would hide whatever is before it
        return model

    return build


def bert_base() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig())


def llama_1b() -> nn.Module:
    """That of Llama 3.2 1B. Without a cache: a forward pass reads a prompt."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


MODELS = {
    "resnet50": Subject("ResNet-50", from_torchvision("resnet50"), image, convolutional=True),
    "convnext_tiny": Subject("ConvNeXt-T", from_torchvision("convnext_tiny"), image, convolutional=True),
    "vit_b_16": Subject("ViT-B/16", from_torchvision("vit_b_16"), image),
    "swin_t": Subject("Swin-T", from_torchvision("swin_t"), image),
    "bert_base": Subject("BERT-base, 128 tokens", bert_base, tokens),
    "llama_1b": Subject("Llama 1B, 128 tokens", llama_1b, tokens, large=True),
}

NORMS: dict[str, tuple[int, Callable[[int], nn.Module], Callable[[int, int], nn.Module]]] = {
    "LayerNorm": (768, nn.LayerNorm, lambda k, full: slim_nn.LayerNorm((k,), (full,))),
    "RMSNorm": (2048, lambda k: nn.RMSNorm(k, eps=1e-5), lambda k, full: slim_nn.RMSNorm((k,), (full,), eps=1e-5)),
}
"""The full width; a stock norm of a width; ours of that width, for entries of the full one that are gone."""


@dataclass
class Slim:
    model: nn.Module
    notes: Line


def spared(subject: Subject, args: argparse.Namespace) -> bool:
    return subject.large and args.device == "cpu"


def built(subject: Subject, args: argparse.Namespace) -> nn.Module:
    """The full model, the same one each time."""
    torch.manual_seed(0)
    with torch.device(args.device):
        return subject.build().eval()


def made_slim(subject: Subject, target: float, args: argparse.Namespace) -> Slim:
    """A slim model at a target, in float32."""
    model = built(subject, args)
    with torch.device(args.device):
        x = subject.example(1)
    oto = OTO(model, x)
    optimizer = oto.hesso(
        lr=1.0,
        target_macs=target,
        saliency="magnitude",
        scope=args.scope,
        group_divisible=args.divisible,
        start_pruning_step=0,
        pruning_steps=1,
        pruning_periods=1,
    )
    optimizer.step()  # without gradients nothing moves; what was chosen goes to zero
    subnet = oto.construct_subnet(verify=not spared(subject, args), float64=False)
    before, after = subnet.cost_before, subnet.cost_after
    return Slim(
        subnet.model,
        {
            "full_macs": before.macs,
            "macs": after.macs,
            "macs_kept": after.macs / before.macs,
            "full_params": before.params,
            "params": after.params,
            "emitter": subnet.emitter,
            "compared": len(subnet.checks),
            "max_error": subnet.max_error if subnet.checks else None,
        },
    )


def size(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def fitted(model: nn.Module, subject: Subject, args: argparse.Namespace) -> nn.Module:
    """In the type and memory format in which it is timed."""
    model = model.to(args.dtype)
    return model.to(memory_format=torch.channels_last) if subject.convolutional else model  # type: ignore[call-overload]


def given_to(subject: Subject, args: argparse.Namespace) -> Tensor:
    torch.manual_seed(1)
    with torch.device(args.device):
        x = subject.example(args.batch)
    if x.is_floating_point():
        x = x.to(args.dtype)
    return x.contiguous(memory_format=torch.channels_last) if subject.convolutional else x


# ------------------------------------------------------------------------------------------------ modes


def eager(model: nn.Module, x: Tensor, args: argparse.Namespace, folder: Path) -> Call:
    return lambda: model(x)


def compiled(model: nn.Module, x: Tensor, args: argparse.Namespace, folder: Path) -> Call:
    def forward(x: Tensor) -> Any:
        return model(x)

    # code of its own: what is compiled for one code object is looked through at each call, full and slim alike
    own = types.FunctionType(forward.__code__.replace(), globals(), closure=forward.__closure__)
    fast = torch.compile(own, dynamic=False, mode=args.compile_mode)
    return lambda: fast(x)


def onnxruntime(model: nn.Module, x: Tensor, args: argparse.Namespace, folder: Path) -> Call:
    import onnxruntime as ort

    path = Path(tempfile.mkdtemp(dir=folder)) / "model.onnx"
    export_model(model, x, "onnx", path)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = args.threads, 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, given)


PREPARE: dict[str, Callable[[nn.Module, Tensor, argparse.Namespace, Path], Call]] = {
    "eager": eager,
    "compiled": compiled,
    "onnxruntime": onnxruntime,
}


def prepared(mode: str, model: nn.Module, x: Tensor, args: argparse.Namespace, folder: Path) -> Call:
    """Ready to be timed: compiled, and run once."""
    call = PREPARE[mode](model, x, args, folder)
    with torch.inference_mode():
        call()
    return call


@torch.inference_mode()
def in_turns(calls: Sequence[Call], seconds: float, device: str, repeats: int = 1) -> list[list[float]]:
    """Milliseconds of calls that take turns: for each, one number per round, after two rounds to warm up."""
    times: list[list[float]] = [[] for _ in calls]
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    begin = time.perf_counter()
    while len(times[0]) < ROUNDS + 2 or time.perf_counter() - begin < seconds:
        for call, own in zip(calls, times, strict=True):
            wait()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            wait()
            own.append(1e3 * (time.perf_counter() - start) / repeats)
    return [own[2:] for own in times]


def spread(times: Sequence[float], prefix: str = "") -> Line:
    low, middle, high = statistics.quantiles(times, n=4)
    return {f"{prefix}ms": middle, f"{prefix}quartiles_ms": [low, high]}


# ------------------------------------------------------------------------------------------------ cells and lines

SETTINGS = ("hardware", "device", "dtype", "batch", "threads", "compile_mode", "scope", "divisible")


def settings(args: argparse.Namespace) -> Line:
    return {
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else machine(),
        "device": args.device,
        "dtype": str(args.dtype).removeprefix("torch."),
        "batch": args.batch,
        "threads": args.threads,
        "compile_mode": args.compile_mode,
        "scope": args.scope,
        "divisible": args.divisible,
    }


def identity(line: Line) -> tuple[Any, ...]:
    """What makes two lines the same measurement."""
    return tuple(line[k] for k in ("model", "target", "mode", *SETTINGS))


def last(lines: Sequence[Line]) -> dict[tuple[Any, ...], Line]:
    """Of the lines of one cell the last: it was measured again."""
    return {identity(line): line for line in lines}


@contextmanager
def claimed(args: argparse.Namespace, model: str) -> Iterator[bool]:
    """Whether this process may measure a model: the lock goes with the process that holds it, however it ends."""
    name = hashlib.sha256(repr((str(args.results.resolve()), model, settings(args))).encode()).hexdigest()[:24]
    with open(Path(tempfile.gettempdir()) / f"oto-latency-{name}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def locked(args: argparse.Namespace, how: int) -> Iterator[None]:
    """Many may prepare at once (``LOCK_SH``); one alone times (``LOCK_EX``), and nobody prepares meanwhile."""
    with open(args.lock, "a") as file:
        fcntl.flock(file, how)
        yield


def left(args: argparse.Namespace, model: str) -> list[tuple[float, str]]:
    """Targets and modes of a model that are to be measured."""
    lines = last(read(args.results))
    cells = [(target, mode) for target in args.targets for mode in args.modes]
    if model == "norms":
        cells = [(target, mode) for target, mode in cells if mode != "onnxruntime"]
    found = {}
    for target, mode in cells:
        names = list(NORMS) if model == "norms" else [model]
        own = [lines.get(identity({"model": n, "target": target, "mode": mode} | settings(args))) for n in names]
        found[target, mode] = all(line is not None and not (args.again and "error" in line) for line in own)
    return [cell for cell, done in found.items() if not done]


def where(args: argparse.Namespace) -> Line:
    try:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        commit = None
    return {
        **settings(args),
        "machine": machine(),
        "torch": torch.__version__,
        "command": f"python benchmarks/latency.py {args.command}".strip(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def failed(failure: BaseException) -> str:
    print("".join(traceback.format_exception(failure)[-8:]), file=sys.stderr)
    first = next((line for line in str(failure).splitlines() if line.strip()), "")
    return f"{type(failure).__name__}: {first[:160]}".replace("|", "/")


def rounds_of(model: str, cells: Sequence[tuple[float, str]], args: argparse.Namespace) -> list[list[Any]]:
    """Cells to be timed together: all of a model; of a large one on a CPU each by itself, for the memory."""
    if model in MODELS and spared(MODELS[model], args):
        return [[cell] for cell in cells]
    return [list(cells)] if cells else []


def measure(name: str, cells: Sequence[tuple[float, str]], args: argparse.Namespace) -> Iterator[Line]:
    """The lines of cells whose models are timed in turns."""
    subject, x = MODELS[name], given_to(MODELS[name], args)
    targets = sorted({target for target, _ in cells}, reverse=True)
    errors: dict[Any, str] = {}
    notes: dict[Any, Line] = {target: {} for target in targets}
    calls: dict[tuple[Any, str], Call] = {}
    with tempfile.TemporaryDirectory() as folder:
        with locked(args, fcntl.LOCK_SH):
            models: dict[Any, nn.Module] = {}
            begin = time.perf_counter()
            for target in targets:
                try:
                    slim = made_slim(subject, target, args)
                    models[target] = fitted(slim.model, subject, args)
                    notes[target] = slim.notes | {"bytes": size(models[target])}
                except Exception as failure:
                    errors[target] = failed(failure)
                gc.collect()  # an analysis holds the full model, in circles
            models["full"] = fitted(built(subject, args), subject, args)
            full_bytes = size(models["full"])
            made = time.perf_counter() - begin
            print(f"{name}: slim models made in {made:.0f} s", file=sys.stderr, flush=True)
            for mode in dict.fromkeys(mode for _, mode in cells):
                wanted = [target for target in targets if (target, mode) in cells and target in models]
                for which in ["full", *wanted]:
                    begin = time.perf_counter()
                    try:
                        calls[which, mode] = prepared(mode, models[which], x, args, Path(folder))
                    except Exception as failure:
                        errors[which, mode] = ("full model: " if which == "full" else "") + failed(failure)
                    took = time.perf_counter() - begin
                    print(f"{name}: {which} {mode} ready in {took:.0f} s", file=sys.stderr, flush=True)
            del models
        with locked(args, fcntl.LOCK_EX):
            for mode in dict.fromkeys(mode for _, mode in cells):
                own = [t for t in ["full", *targets] if (t, mode) in calls]
                times = {}
                if "full" in own and len(own) > 1:
                    taken = in_turns([calls[t, mode] for t in own], args.seconds, args.device)
                    times = dict(zip(own, taken, strict=True))
                for target in (t for t in targets if (t, mode) in cells):
                    line: Line = {"model": name, "target": target, "mode": mode, **where(args), **notes[target]}
                    line |= {"full_bytes": full_bytes, "seconds_to_make": round(made, 1)}
                    error = errors.get(target) or errors.get(("full", mode)) or errors.get((target, mode))
                    if error:
                        yield line | {"error": error}
                        continue
                    line |= spread(times["full"], "full_") | spread(times[target])
                    yield line | {"speed_up": line["full_ms"] / line["ms"], "rounds": len(times[target])}


def measure_norms(cells: Sequence[tuple[float, str]], args: argparse.Namespace) -> Iterator[Line]:
    """Ours against the stock norm of the same width, on as many rows as a model may have."""
    rows = 2**17 if args.device == "cuda" else 2**10
    for target, mode in cells:
        for name, (full, stock, ours) in NORMS.items():
            width = round(target * full)
            line: Line = {"model": name, "target": target, "mode": mode, **where(args)}
            line |= {"width": width, "full_width": full, "rows": rows}
            torch.manual_seed(0)
            x = torch.randn(rows, width, device=args.device, dtype=args.dtype)
            try:
                with locked(args, fcntl.LOCK_SH):
                    models = [m.to(args.device, args.dtype).eval() for m in (stock(width), ours(width, full))]
                    calls = [prepared(mode, model, x, args, Path()) for model in models]
                with locked(args, fcntl.LOCK_EX):
                    theirs, own = in_turns(calls, args.seconds / 4, args.device, CALLS)
                line |= spread(theirs, "stock_") | spread(own) | {"rounds": len(own)}
                yield line | {"of_stock": line["ms"] / line["stock_ms"]}
            except Exception as failure:
                yield line | {"error": failed(failure)}


# ------------------------------------------------------------------------------------------------ the page


def page(lines: Sequence[Line]) -> str:
    """Markdown: for every machine and setting a table of models and one of norms."""
    out = [
        "# Latency: full against slim",
        "",
        "Generated by `python benchmarks/latency.py --table` from `latency.jsonl`; its docstring says how slim models",
        "are made and timed. Weights are random. A cell is the median (quartiles) of the milliseconds of a forward",
        "pass, how many times faster that is than the full model, which took turns with it, and in brackets how much",
        "of the promise of its MACs that is: [1.00] says that time fell as MACs did. MB are those of parameters and",
        "buffers.",
        "",
    ]
    places: dict[tuple[Any, ...], list[Line]] = {}
    for line in last(lines).values():
        places.setdefault(tuple(line[k] for k in SETTINGS), []).append(line)
    for place in sorted(places, key=str):
        out += section(places[place])
    return "\n".join(out) + "\n"


def section(here: list[Line]) -> list[str]:
    first = here[0]
    how = f"{first['dtype']}, batch {first['batch']}"
    how += f", {first['threads']} thread{'s' * (first['threads'] > 1)}" if first["device"] == "cpu" else ""
    versions = sorted({f"torch {line['torch']}" for line in here})
    compiling = "" if first["compile_mode"] is None else f" `torch.compile(mode={first['compile_mode']!r})`."
    out = [
        f"## {first['hardware']}: {how}",
        "",
        f"{', '.join(versions)}; {first['scope']} choice, widths in steps of {first['divisible']}.{compiling} "
        "`python benchmarks/latency.py`, cell by cell: each line of `latency.jsonl` says its own command.",
        "",
    ]
    modes = [mode for mode in MODES if any(line["mode"] == mode for line in here)]
    models = [name for name in MODELS if any(line["model"] == name for line in here)]
    if models:
        out += [
            f"| model | MACs | MACs kept | params, M | MB | {' | '.join(modes)} |",
            f"|---|--:|--:|--:|--:|{'--:|' * len(modes)}",
        ]
        for name in models:
            out += rows([line for line in here if line["model"] == name], MODELS[name].title, modes)
        out.append("")
    norms = [line for line in here if line["model"] in NORMS]
    out += norm_table(norms) if norms else []
    made = [line for line in here if line["model"] in models and "emitter" in line]
    if odd := sorted(
        {f"{line['model']} at {line['target']:g} ({line['emitter']})" for line in made}
        - {f"{line['model']} at {line['target']:g} (module)" for line in made}
    ):
        out += [f"Not of the own class: {', '.join(odd)}.", ""]
    if unproved := sorted({MODELS[line["model"]].title for line in made if not line["compared"]}):
        out += [f"Slim models that were not compared with the full one: {', '.join(unproved)}.", ""]
    return out


def rows(own: list[Line], title: str, modes: Sequence[str]) -> list[str]:
    """One row for the full model, and one for each target."""
    good = [line for line in own if "error" not in line]
    said = next((line for line in own if "macs" in line), None)
    cells = []
    for mode in modes:
        timed = next((line for line in good if line["mode"] == mode), None)
        cells.append("" if timed is None else milliseconds(timed, "full_"))
    numbers = ("", "")
    if said is not None:
        numbers = (f"{said['full_macs'] / 1e9:.2f} G", f"{said['full_params'] / 1e6:.1f}")
    out = [f"| {title} | {numbers[0]} | 1 | {numbers[1]} | {own[0]['full_bytes'] / 1e6:.0f} | {' | '.join(cells)} |"]
    for target in sorted({line["target"] for line in own}, reverse=True):
        at = {line["mode"]: line for line in own if line["target"] == target}
        one = next(iter(at.values()))
        numbers4 = ("", f"{target:g} asked", "", "")
        if "macs" in one:
            numbers4 = (
                f"{one['macs'] / 1e9:.2f} G",
                f"{one['macs_kept']:.3f}",
                f"{one['params'] / 1e6:.1f}",
                f"{one['bytes'] / 1e6:.0f}",
            )
        cells = [faster(at[mode]) if mode in at else "" for mode in modes]
        out.append(f"| | {' | '.join(numbers4)} | {' | '.join(cells)} |")
    return out


def milliseconds(line: Line, prefix: str = "") -> str:
    low, high = line[f"{prefix}quartiles_ms"]
    digits = 3 if line[f"{prefix}ms"] < 1 else 2 if line[f"{prefix}ms"] < 100 else 0
    return f"{line[f'{prefix}ms']:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def faster(line: Line) -> str:
    if "error" in line:
        return line["error"]
    return f"{milliseconds(line)}, {line['speed_up']:.2f}× [{line['speed_up'] * line['macs_kept']:.2f}]"


def norm_table(norms: Sequence[Line]) -> list[str]:
    modes = [mode for mode in MODES if any(line["mode"] == mode for line in norms)]
    titles = [f"{mode}: {which}" for mode in modes for which in ("stock, ms", "ours, ms", "ours / stock")]
    out = [
        f"Norms of `oto.nn` against stock ones of the same width, on {norms[0]['rows']:,} rows:",
        "",
        f"| norm | width | {' | '.join(titles)} |",
        f"|---|---|{'--:|' * len(titles)}",
    ]
    for name in NORMS:
        for target in sorted({line["target"] for line in norms if line["model"] == name}, reverse=True):
            at = {line["mode"]: line for line in norms if line["model"] == name and line["target"] == target}
            one, cells = next(iter(at.values())), []
            for mode in modes:
                line = at.get(mode)
                if line is None or "error" in line:
                    cells += [line["error"] if line else "", "", ""]
                else:
                    cells += [milliseconds(line, "stock_"), milliseconds(line), f"{line['of_stock']:.2f}"]
            out.append(f"| {name} | {one['width']} of {one['full_width']} | {' | '.join(cells)} |")
    return [*out, ""]


# ------------------------------------------------------------------------------------------------ command


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*MODELS, "norms"]
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="MODEL", help=", ".join(names))
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS, help="shares of the MACs to keep")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="onnxruntime only on the CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, help="default: 1 on a CPU, 64 on a GPU")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--seconds", type=float, help="of timing for a model and mode; default: 20 on a CPU, else 3")
    parser.add_argument("--divisible", type=int, default=8, help="widths are multiples of it")
    parser.add_argument("--scope", choices=["local", "global"], default="local")
    parser.add_argument("--compile-mode", choices=["reduce-overhead", "max-autotune"], help="of torch.compile")
    parser.add_argument("--again", action="store_true", help="try again what failed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--lock", type=Path, default=Path(tempfile.gettempdir()) / f"oto-latency-{os.getuid()}.lock")
    parser.add_argument("--table", action="store_true", help="only write the page")
    args = parser.parse_args(argv)
    gpu = args.device == "cuda"
    args.command = " ".join(sys.argv[1:] if argv is None else argv)
    args.batch = args.batch or (64 if gpu else 1)
    args.seconds = (3.0 if gpu else 20.0) if args.seconds is None else args.seconds
    args.dtype = getattr(torch, args.dtype)
    if gpu:  # there is only a CPU provider
        args.modes = [mode for mode in args.modes if mode != "onnxruntime"]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    if not args.table:
        torch.set_num_threads(args.threads)
        logging.getLogger("torch").setLevel(logging.ERROR)
        for model in args.models:
            with claimed(args, model) as mine:
                if not mine:
                    print(f"{model}: another process has it in hand", file=sys.stderr)
                for cells in rounds_of(model, left(args, model), args) if mine else []:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # those of torch's compilers and exporters
                        for line in measure_norms(cells, args) if model == "norms" else measure(model, cells, args):
                            append(args.results, line)
                            print(said(line), flush=True)
                    torch.compiler.reset()  # of models that are gone
                    gc.collect()
    target = args.results.with_suffix(".md")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(read(args.results)))
    print(f"wrote {target}")


def said(line: Mapping[str, Any]) -> str:
    name = f"{line['model']} target {line['target']:g} {line['mode']}:"
    if "error" in line:
        return f"{name} {line['error']}"
    if "of_stock" in line:
        return f"{name} {line['ms']:.3f} ms, stock {line['stock_ms']:.3f} ms, {line['of_stock']:.2f}"
    faster = f"{line['full_ms']:.2f} -> {line['ms']:.2f} ms, {line['speed_up']:.2f} times faster"
    return f"{name} {faster} at {line['macs_kept']:.3f} of the MACs, {line['rounds']} rounds"


if __name__ == "__main__":
    main()
