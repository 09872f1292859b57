"""What the rest of training costs once the model was shrunk, beside going on with the full one.

    python benchmarks/shrink.py
    python benchmarks/shrink.py --models transformer --optimizers adamw --target-macs 0.5 --device cuda

Two runs from one seed are pruned in the same steps; then one is shrunk, and both go on, step by step in turns on the
same batches. The table shows the medians of a whole training step (forward, backward, optimizer, scheduler) in float32
and the share of MACs that is left. The last column is from two more runs in float64: the largest relative difference
between their losses over 50 steps. The transformer has no dropout, which draws other numbers for thinner tensors.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from oto import OTO

PRUNING, AFTER = 12, 50
OPTIMIZERS = {
    "sgd": {"variant": "sgd", "lr": 0.005, "first_momentum": 0.9, "weight_decay": 1e-4},
    "adamw": {"variant": "adamw", "lr": 3e-4, "weight_decay": 0.05},
}


def resnet() -> nn.Module:
    """A ResNet-18 for small images."""
    from torchvision.models import resnet18

    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


class Transformer(nn.Module):
    """Four encoder layers of torch over 8 × 8 patches."""

    def __init__(self, width: int = 192, heads: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.places = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(4)
        )
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            h = block(h)
        y: Tensor = self.out(self.norm(h).mean(1))
        return y


MODELS: dict[str, Callable[[], nn.Module]] = {"resnet18": resnet, "transformer": Transformer}


@dataclass
class Run:
    """A training run on random images, always the same ones."""

    name: str
    optimizer_name: str
    target: float
    dtype: torch.dtype
    device: torch.device
    batch: int
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = MODELS[self.name]().to(self.device, self.dtype).train()
        self.oto = OTO(self.model, torch.randn(2, 3, 32, 32, device=self.device, dtype=self.dtype))
        self.optimizer = self.oto.hesso(
            target_macs=self.target,
            start_pruning_step=1,
            pruning_steps=PRUNING - 2,
            pruning_periods=2,
            **OPTIMIZERS[self.optimizer_name],
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10 * AFTER)

    def step(self) -> None:
        source = torch.Generator().manual_seed(len(self.losses))
        x = torch.randn(self.batch, 3, 32, 32, generator=source).to(self.device, self.dtype)
        y = torch.randint(10, (self.batch,), generator=source).to(self.device)
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.scheduler.step()
        self.losses.append(loss.item())


def pair(*options: object) -> tuple[Run, Run, float]:
    """A run that was pruned, and one that was shrunk after that; the seconds that shrinking took."""
    full, slim = Run(*options), Run(*options)  # type: ignore[arg-type]
    for run in (full, slim):
        for _ in range(PRUNING):
            run.step()
    start = time.perf_counter()
    slim.oto.shrink(slim.optimizer)
    return full, slim, time.perf_counter() - start


def milliseconds(full: Run, slim: Run, rounds: int) -> tuple[float, float]:
    """Medians of a step of each, in turns."""
    times: list[list[float]] = [[], []]
    for _ in range(rounds + 1):
        for run, own in zip((full, slim), times, strict=True):
            start = time.perf_counter()
            run.step()  # reads the loss, so the device is done
            own.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def difference(full: Run, slim: Run) -> float:
    """The largest relative difference between the losses of two runs over so many steps."""
    for run in (full, slim):
        for _ in range(AFTER):
            run.step()
    return max(abs(a - b) / abs(a) for a, b in zip(full.losses, slim.losses, strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", default=1, type=int)
    parser.add_argument("--rounds", default=15, type=int)
    parser.add_argument("--batch", default=16, type=int)
    parser.add_argument("--target-macs", default=0.3, type=float)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else f"{args.threads} CPU thread(s)"
    print(f"torch {torch.__version__}, {where}, batches of {args.batch} images of 32 × 32, {args.rounds} rounds")
    print("| model | optimizer | MACs left | full, ms | slim, ms | ratio | shrinking, s | difference in float64 |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for name in args.models:
        for optimizer in args.optimizers:
            full, slim, seconds = pair(name, optimizer, args.target_macs, torch.float32, args.device, args.batch)
            a, b = milliseconds(full, slim, args.rounds)
            left = slim.oto.compute_macs() / full.oto.compute_macs()
            off = difference(*pair(name, optimizer, args.target_macs, torch.float64, args.device, 8)[:2])
            print(
                f"| {name} | {optimizer} | {left:.2f} | {a:.1f} | {b:.1f} | {b / a:.2f} | {seconds:.1f} | {off:.0e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
