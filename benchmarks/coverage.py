"""What oto and torch-pruning do with the same models: pruned at all, runs, exact, seconds, hints needed.

    python benchmarks/coverage.py                        # some models of every zoo of the tests
    python benchmarks/coverage.py timm                   # all models of one zoo
    python benchmarks/coverage.py torchvision/resnet50 transformers/llama

Both get the same model in float64, the same example and the order to remove half of the channels of everything that
they find, at random. A removal is exact if the slim model gives what the full one gives once every removed entry is
zero there; the largest relative difference is shown where it is above 1e-9.

torch-pruning is run twice: as it is, and with the hints that its documentation asks for: `ignored_layers` for layers as
wide as an output, `num_heads` for projections to queries, keys and values, and `output_transform` to the tensors of the
output. oto gets none. Seconds are those of everything up to the slim model; for oto that includes
exporting, where the class cannot be kept, and the verification on four inputs in float64, which torch-pruning does not
do.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import signal
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
sys.path.insert(0, str(ROOT))

SOME = {
    "torchvision": ["resnet50", "vgg16_bn", "densenet121", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf",
                    "resnext50_32x4d", "shufflenet_v2_x1_0", "googlenet", "convnext_tiny", "vit_b_16", "swin_t",
                    "swin_v2_t", "deeplabv3_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn",
                    "ssdlite320_mobilenet_v3_large", "r3d_18", "raft_small"],
    "timm": ["ghostnet_050", "levit_128s", "xcit_nano_12_p8_224", "nf_resnet26", "mobileone_s1", "poolformer_s12"],
    "transformers": ["bloom", "gemma2", "mixtral", "mamba", "deepseek_v3", "albert", "deberta", "whisper", "clip",
                     "segformer", "detr", "gpt_neox"],
    "models": ["bert", "gpt2", "llama", "t5"],
    "diffusers": ["autoencoder_kl", "unet2d", "unet2d_condition", "flux"],
    "handmade": ["lstm", "gru_both_ways", "gan_generator", "carn", "yolo", "experts_by_mask", "selective_scan"],
}  # fmt: skip
LIMIT = 120  # seconds per model and tool
EXACT = 1e-9


def with_oto(model: nn.Module, inputs: Any) -> tuple[nn.Module, nn.Module, float]:
    """The zeroed model, the slim one, and the seconds it took."""
    from oto import OTO

    begin = time.perf_counter()
    oto = OTO(model, inputs)
    oto.random_set_zero_groups(0.5)
    slim = oto.construct_subnet().model
    return model, slim, time.perf_counter() - begin


def with_torch_pruning(model: nn.Module, inputs: Any, hints: bool) -> tuple[nn.Module, nn.Module, float]:
    import torch_pruning

    full = copy.deepcopy(model)
    options = hints_for(model, inputs) if hints else {}
    begin = time.perf_counter()
    pruner = torch_pruning.pruner.BasePruner(
        model, inputs, importance=torch_pruning.importance.RandomImportance(), pruning_ratio=0.5, **options
    )
    ready = time.perf_counter() - begin
    # which entries survive is read off their numbers: every tensor holds its own indices while it is pruned
    held = {name: t for name, t in _tensors(model).items() if t.is_floating_point()}
    values = {name: t.detach().clone() for name, t in held.items()}
    for t in held.values():
        t.data = torch.arange(t.numel(), dtype=torch.float64).reshape(t.shape)
    begin = time.perf_counter()
    pruner.step()
    seconds = ready + time.perf_counter() - begin
    left, whole = _tensors(model), _tensors(full)
    with torch.no_grad():
        for name, value in values.items():
            ids = left[name].detach().round().long()
            alive = torch.zeros(value.numel(), dtype=torch.bool)
            alive[ids.flatten()] = True
            if name in dict(full.named_parameters()):
                whole[name].mul_(alive.reshape(value.shape))
            left[name].data = value.flatten()[ids]
    return full, model, seconds


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def hints_for(model: nn.Module, inputs: Any) -> dict[str, Any]:
    from oto.slim.proof.run import run
    from oto.trace.outputs import tensors_in

    widths = {n for t in run(model, inputs) if t.ndim > 1 for n in (t.shape[1], t.shape[-1])}
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    heads: dict[nn.Module, int] = {}
    for module in model.modules():
        config = getattr(module, "config", None) if "Attention" in type(module).__name__ else None
        names = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
        count = next((n for a in names for it in (module, config) if isinstance(n := getattr(it, a, None), int)), None)
        if count is not None and isinstance(module, nn.MultiheadAttention):
            heads[module] = count
        shared = getattr(config, "num_key_value_heads", None) or count
        for name, child in module.named_children():
            if count is not None and isinstance(child, nn.Linear) and name[0] in "qkv":
                heads[child] = shared if name[0] in "kv" else count
    ignored = [m for m in layers if getattr(m, "out_features", getattr(m, "out_channels", None)) in widths]
    return {"ignored_layers": ignored, "num_heads": heads, "output_transform": lambda output: list(tensors_in(output))}


TOOLS: dict[str, Callable[[nn.Module, Any], tuple[nn.Module, nn.Module, float]]] = {
    "oto": with_oto,
    "torch-pruning": lambda model, inputs: with_torch_pruning(model, inputs, False),
    "torch-pruning + hints": lambda model, inputs: with_torch_pruning(model, inputs, True),
}


def measure(tool: str, name: str) -> dict[str, Any]:
    from oto.slim.proof.compare import relative_error
    from oto.slim.proof.float64 import double_input
    from oto.slim.proof.run import run
    from tests.zoo.matrix import prepared, zoo

    kind, _, which = name.partition("/")
    model, inputs = prepared(zoo(kind)[which])
    model.eval()
    dense = sum(p.numel() for p in model.parameters())
    found: dict[str, Any] = {"left": 1.0, "runs": False, "error": None}
    full, slim, found["seconds"] = TOOLS[tool](model, inputs)
    found["left"] = sum(p.numel() for p in slim.parameters()) / dense
    if next(model.parameters()).dtype != torch.float64:  # it states a dtype in its code; ``run`` widens that
        full, slim, inputs = full.double(), slim.double(), double_input(inputs)
    expected = run(full, inputs)
    try:
        given = run(slim, inputs)
    except Exception as failure:
        return found | {"failed": shown(failure)}
    return found | {"runs": True, "error": relative_error(expected, given)}


def shown(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"


def child(tool: str, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {LIMIT} s")

    signal.signal(signal.SIGALRM, late)
    for name in names:
        signal.alarm(LIMIT)
        try:
            found = measure(tool, name)
        except Exception as failure:
            found = {"failed": shown(failure)}
        signal.alarm(0)
        print(json.dumps({"name": name} | found), flush=True)


def spawn(tool: str, names: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--child", tool, *names]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def cell(found: dict[str, Any]) -> str:
    if "failed" in found and "left" in found:
        return f"{found['left']:4.0%} left, does not run {found['seconds']:6.2f} s"
    if "failed" in found:
        return "fails: " + found["failed"].partition(":")[0]
    if found["left"] >= 1:
        return f"nothing pruned {found['seconds']:6.2f} s"
    exact = "exact" if found["error"] <= EXACT else "output differs" if found["error"] == float("inf") else (
        f"off by {found['error']:.0e}"
    )  # fmt: skip
    return f"{found['left']:4.0%} left, {exact} {found['seconds']:6.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="zoo, or zoo/model")
    parser.add_argument("--child", choices=list(TOOLS), help=argparse.SUPPRESS)
    parser.add_argument("--errors", action="store_true", help="print the message of each failure")
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.models)
    from tests.zoo.matrix import zoo

    names = [n for given in args.models for n in ([given] if "/" in given else [f"{given}/{m}" for m in zoo(given)])]
    names = names or [f"{kind}/{name}" for kind, some in SOME.items() for name in some]
    print(f"{platform.machine()}, torch {torch.__version__}, one thread, float64, half of all channels at random")
    print(f"{'':46}" + "".join(f"{tool:36}" for tool in TOOLS))
    running = {tool: spawn(tool, names) for tool in TOOLS}
    found: dict[str, list[dict[str, Any]]] = {tool: [] for tool in TOOLS}
    for name in names:
        for tool, process in running.items():
            assert process.stdout is not None
            line = process.stdout.readline()
            result = json.loads(line) if line else {"failed": "Crashed"}
            if not line and names.index(name) + 1 < len(names):  # the tool took its process down; go on behind it
                running[tool] = spawn(tool, names[names.index(name) + 1 :])
            found[tool].append(result)
        print(f"{name:46}" + "".join(f"{cell(found[tool][-1]):36}" for tool in TOOLS), flush=True)
        for tool in TOOLS:
            if args.errors and "failed" in found[tool][-1]:
                print(f"    {tool}: {found[tool][-1]['failed']}")
    print(f"\n{len(names)} models" + " " * 20 + "".join(f"{tool:>24}" for tool in TOOLS))
    rows: dict[str, Callable[[dict[str, Any]], bool]] = {
        "pruned at all": lambda r: r.get("left", 1) < 1,
        "and the slim model runs": lambda r: r.get("left", 1) < 1 and r["runs"],
        "and is exact": lambda r: r.get("left", 1) < 1 and r["runs"] and r["error"] <= EXACT,
    }
    for label, holds in rows.items():
        print(f"{label:30}" + "".join(f"{sum(map(holds, found[tool])):24}" for tool in TOOLS))
    both = [i for i in range(len(names)) if all("seconds" in found[tool][i] for tool in TOOLS)]
    seconds = {tool: sum(found[tool][i]["seconds"] for i in both) for tool in TOOLS}
    print(f"{f'seconds, {len(both)} models':30}" + "".join(f"{seconds[tool]:24.1f}" for tool in TOOLS))
    print(f"{'ratio to oto':30}" + "".join(f"{seconds[tool] / seconds['oto']:24.2f}" for tool in TOOLS))


if __name__ == "__main__":
    main()
