"""What a step of HESSO costs beside a step of the optimizer that it wraps.

    python benchmarks/step.py --threads 1
    python benchmarks/step.py --device cuda
    python benchmarks/step.py --threads 1 --training 8

Both optimizers run in one process on two copies of the same parameters, step by step in turns; the table shows medians
in milliseconds and their ratio. Gradients are made once; for pruned entries they are what back-propagation gives there
(zero where the node group is quiet). The phases are: before pruning; the steps before a choice whose gradients are
averaged, with the criterion ``--saliency``; the first step of a period, which scores every group; the other steps of a
period, which shrink redundant groups and keep pruned ones at zero; and after pruning.

With ``--training N`` the table is another one: what observing a step costs beside a whole training step (forward,
backward, SGD) on a batch of N. On one CPU thread seconds are those of the process, so that other programs do not count.
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

PHASES = ("before", "observed", "period start", "during", "after")
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
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


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
    saliency: str | None = None,
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
    window = max(rounds // 2, 2)  # as long as a period, so that only the last one is not observed
    hesso = HESSO(
        ours.named_parameters(), node_groups, base=cls, start_pruning_step=rounds + window + 2,
        pruning_steps=5 * window, pruning_periods=5, target_group_sparsity=0.5, average_steps=window,
        saliency=saliency, **options, **MODES[mode],
    )  # fmt: skip
    times: dict[str, list[tuple[float, float]]] = {phase: [] for phase in PHASES}
    for n in range(hesso.schedule.end + rounds + 2):
        if n < 2 or n == hesso.schedule.end or n == hesso.schedule.end + 1:
            phase = None  # the first steps make the state
        elif hesso.schedule.starts_period(n):
            phase = "period start"
        elif (ahead := hesso.schedule.until_choice(n)) is not None and ahead < window:
            phase = "observed"
        elif n < hesso.schedule.start:
            phase = "before"
        else:
            phase = "after" if n >= hesso.schedule.end else "during"
        pair = timed(wrapped.step, device), timed(hesso.step, device)
        if hesso.schedule.ends_period(n):
            silence(ours, hesso)
        if phase is not None:
            times[phase].append(pair)
    return {phase: tuple(map(statistics.median, zip(*pairs, strict=True))) for phase, pairs in times.items()}  # type: ignore[misc]


def training(
    name: str, analyse: Callable[[nn.Module, Tensor], Sequence[NodeGroup]], device: torch.device, batch: int,
    saliency: str | None, rounds: int = 3,
) -> tuple[float, float]:  # fmt: skip
    """Median seconds of a training step, and of observing one."""
    model, x = MODELS[name]()
    node_groups = analyse(model, x)
    model.to(device)
    x = torch.randn(batch, 3, 224, 224) if name == "resnet50" else torch.randint(1000, (batch, 128))
    x = x.to(device)
    optimizer = HESSO(
        model.named_parameters(), node_groups, lr=1e-4, first_momentum=0.9, target_group_sparsity=0.5,
        start_pruning_step=1000, pruning_steps=10, average_steps=1000, saliency=saliency,
    )  # fmt: skip

    def step() -> None:
        optimizer.zero_grad()
        output = model(x)
        (output if isinstance(output, Tensor) else output.last_hidden_state).square().mean().backward()
        optimizer.descend()

    timed(step, device)
    optimizer.observe(1)
    pairs = [(timed(step, device), timed(lambda: optimizer.observe(1), device)) for _ in range(rounds)]
    whole, observed = map(statistics.median, zip(*pairs, strict=True))
    return whole, observed


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
    parser.add_argument("--saliency", help="the criterion that is averaged; by default that of HESSO")
    parser.add_argument("--training", type=int, metavar="N", help="beside whole training steps on batches of N")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else f"{args.threads} CPU thread(s)"
    print(
        f"torch {torch.__version__}, {device}, float32, sparsity 0.5, {args.rounds} rounds, ms: wrapped → HESSO (ratio)"
    )
    if args.training:
        print("| model | batch | training step | observing | share |\n|---|--:|--:|--:|--:|")
        for name in args.models:
            torch.manual_seed(0)
            whole, seen = training(name, analyse, args.device, args.training, args.saliency)
            print(
                f"| {name} | {args.training} | {1e3 * whole:.1f} | {1e3 * seen:.1f} | {seen / whole:.1%} |", flush=True
            )
        return
    print("| model | optimizer | " + " | ".join(PHASES) + " |\n|---|---|" + "---|" * len(PHASES))
    for name in args.models:
        for optimizer in args.optimizers:
            for mode in args.modes:
                torch.manual_seed(0)
                found = measure(MODELS[name], analyse, optimizer, mode, args.device, args.rounds, args.saliency)
                cells = [f"{1e3 * a:.2f} → {1e3 * b:.2f} ({b / a:.2f}×)" for a, b in found.values()]
                print(f"| {name} | {optimizer} {mode} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
