"""What a step of HESSO costs beside a step of the optimizer that it wraps.

    python benchmarks/step.py --threads 1
    python benchmarks/step.py --device cuda

Both optimizers run in one process on two copies of the same parameters, step by step in turns; the table shows medians
in milliseconds and their ratio. Gradients are made once; for pruned entries they are what back-propagation gives there
(zero where the node group is quiet). The phases are: before pruning; the first step of a period, which scores every
group; the other steps of a period, which shrink redundant groups and keep pruned ones at zero; and after pruning.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from oto.groups.node_group import NodeGroup
from oto.optim import HESSO

PHASES = ("before", "period start", "during", "after")
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-5, "weight_decay": 1e-2}),
}
MODES = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def resnet50() -> tuple[nn.Module, Tensor]:
    from torchvision.models import resnet50

    return resnet50(), torch.randn(1, 3, 64, 64)


def bert_base() -> tuple[nn.Module, Tensor]:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig()), torch.randint(1000, (1, 16))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"resnet50": resnet50, "bert_base": bert_base}


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def gradients(model: nn.Module) -> None:
    source = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.grad = (torch.randn(p.shape, generator=source) * 1e-3).to(p.device)


def silence(model: nn.Module, optimizer: HESSO) -> None:
    """Give pruned entries of quiet groups the gradient that they have: none."""
    parameters = dict(model.named_parameters())
    for group in optimizer.node_groups:
        rows = optimizer.pruned_groups.get(group.name)
        if rows is not None and getattr(group, "quiet", False):
            for piece in group.slices:
                gradient = parameters[piece.parameter].grad if piece.parameter in parameters else None
                if gradient is not None:
                    piece.of(gradient).index_fill_(0, rows.to(gradient.device), 0)


def measure(
    build: Callable[[], tuple[nn.Module, Tensor]],
    analyse: Callable[[nn.Module, Tensor], Sequence[NodeGroup]],
    optimizer: str,
    mode: str,
    device: torch.device,
    rounds: int,
) -> dict[str, tuple[float, float]]:
    """Median seconds of a step in every phase: of the wrapped optimizer, and of HESSO."""
    ours, x = build()
    theirs, _ = build()
    node_groups = analyse(ours, x)
    for model in (ours, theirs):
        model.to(device)
        gradients(model)
    cls, options = OPTIMIZERS[optimizer]
    wrapped = cls(theirs.parameters(), **options, **MODES[mode])
    hesso = HESSO(
        ours.named_parameters(), node_groups, base=cls, start_pruning_step=rounds + 2, pruning_steps=5 * (rounds // 2),
        pruning_periods=5, target_group_sparsity=0.5, **options, **MODES[mode],
    )  # fmt: skip
    times: dict[str, list[tuple[float, float]]] = {phase: [] for phase in PHASES}
    for n in range(hesso.schedule.end + rounds + 2):
        if n < 2 or n == hesso.schedule.end or n == hesso.schedule.end + 1:
            phase = None  # the first steps make the state
        elif n < hesso.schedule.start:
            phase = "before"
        elif n >= hesso.schedule.end:
            phase = "after"
        else:
            phase = "period start" if hesso.schedule.starts_period(n) else "during"
        pair = timed(wrapped.step, device), timed(hesso.step, device)
        if hesso.schedule.ends_period(n):
            silence(ours, hesso)
        if phase is not None:
            times[phase].append(pair)
    return {phase: tuple(map(statistics.median, zip(*pairs, strict=True))) for phase, pairs in times.items()}  # type: ignore[misc]


def analysis(model: nn.Module, x: Tensor) -> Sequence[NodeGroup]:
    from oto import OTO

    return OTO(model, x).node_groups  # type: ignore[no-any-return]


def main(analyse: Callable[[nn.Module, Tensor], Sequence[NodeGroup]] = analysis) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", default=1, type=int)
    parser.add_argument("--rounds", default=20, type=int, help="steps measured before and after pruning")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else f"{args.threads} CPU thread(s)"
    print(
        f"torch {torch.__version__}, {device}, float32, sparsity 0.5, {args.rounds} rounds, ms: wrapped → HESSO (ratio)"
    )
    print("| model | optimizer | " + " | ".join(PHASES) + " |\n|---|---|" + "---|" * len(PHASES))
    for name in args.models:
        for optimizer in args.optimizers:
            for mode in args.modes:
                torch.manual_seed(0)
                found = measure(MODELS[name], analyse, optimizer, mode, args.device, args.rounds)
                cells = [f"{1e3 * a:.2f} → {1e3 * b:.2f} ({b / a:.2f}×)" for a, b in found.values()]
                print(f"| {name} | {optimizer} {mode} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
