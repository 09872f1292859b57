"""Train a ResNet once with HESSO, and take a smaller network out of it that computes the same function.

    python examples/resnet_cifar10.py                                       # digits, one CPU core, about two minutes
    python examples/resnet_cifar10.py --dataset fashion_mnist --epochs 10 --width 16 --threads 2
    python examples/resnet_cifar10.py --dataset cifar10 --device cuda --depth 56 --width 16 --epochs 200

The network is the CIFAR ResNet of He et al. (arXiv 1512.03385, section 4.2) with 1×1 projections where the shape
changes: depth 6n + 2, three stages of n blocks, `width`, 2·`width` and 4·`width` channels.

The schedule is that of HESSO (arXiv 2409.09085): train as usual for a while, then shrink the least important groups to
exactly zero in `--periods` portions until the target is met, then train what is left. The dense network that
the table compares with has the same initial weights, batches, optimizer settings and number of steps.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from data import LOADERS, Images, load_images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from oto import HESSO, OTO, load_subnet

REPEATS = 51

# ------------------------------------------------------------------------------------------------ the network


class Block(nn.Module):
    """Two 3×3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR ResNet of ``depth`` = 6n + 2 layers; the first stage has ``width`` channels."""

    def __init__(self, depth: int, width: int, channels: int, classes: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"--depth must be 6n + 2 (8, 14, 20, ..., 56, 110), not {depth}")
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        stages, inputs = [], width
        for stage in range(3):
            outputs = width * 2**stage
            for block in range(blocks):
                stages.append(Block(inputs, outputs, stride=2 if stage > 0 and block == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.fc(x.mean(dim=(2, 3)))


# ------------------------------------------------------------------------------------------------ training


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Images, args: argparse.Namespace, title: str
) -> None:
    """Cosine learning rate, cross-entropy; the bar shows loss, learning rate and the share of groups at zero."""
    steps = total_steps(images, args)
    scheduler = CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(args.seed)
    model.train()
    with tqdm(total=steps, desc=title, unit="step", mininterval=0.5, dynamic_ncols=True, disable=None) as bar:
        for _ in range(args.epochs):
            for x, y in images.epoch(args.batch_size, generator):
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                lr = scheduler.get_last_lr()[0]
                optimizer.step()
                scheduler.step()
                if bar.n % 10 == 0:
                    sparsity = optimizer.sparsity if isinstance(optimizer, HESSO) else 0.0
                    bar.set_postfix(loss=f"{loss.item():.3f}", lr=f"{lr:.4f}", group_sparsity=f"{sparsity:.2f}")
                bar.update()


def total_steps(images: Images, args: argparse.Namespace) -> int:
    steps: int = args.epochs * (len(images.train_y) // args.batch_size)
    return steps


@torch.no_grad()
def correct(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 500) -> int:
    """How many of the images are put in the right class."""
    model.eval()
    batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
    return sum(int((model(a).argmax(1) == b).sum()) for a, b in batches)


@torch.no_grad()
def latency(model: nn.Module, x: Tensor) -> float:
    """Median seconds of one forward pass on the CPU."""
    model = copy.deepcopy(model).cpu().eval()
    seconds = []
    for _ in range(REPEATS + 5):  # five to warm up
        start = time.perf_counter()
        model(x)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[5:])


# ------------------------------------------------------------------------------------------------ the job


def load(args: argparse.Namespace) -> Images:
    """The data set that the flags ask for."""
    images = load_images(args.dataset).subset(args.train_images).to(args.device)
    return replace(images, shift=0, flip=False) if args.no_augment else images


def new_model(images: Images, args: argparse.Namespace) -> ResNet:
    """The same initial weights on every call."""
    torch.manual_seed(args.seed)
    channels = images.shape[0]
    return ResNet(args.depth, args.width, channels, images.classes).to(args.device)


def train_dense(images: Images, args: argparse.Namespace) -> nn.Module:
    """What the network reaches without pruning, on the same budget."""
    model = new_model(images, args)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    train(model, optimizer, images, args, "dense")
    return model


def train_sparse(images: Images, args: argparse.Namespace) -> OTO:
    """Train with HESSO; at the end the chosen groups of ``oto.model`` are exactly zero."""
    model = new_model(images, args)
    oto = OTO(model, images.test_x[:1])
    share = args.target_group_sparsity
    target = {"target_macs": args.target_macs} if share is None else {"target_group_sparsity": share}
    optimizer = oto.hesso(
        **target,
        group_divisible=args.group_divisible,
        total_steps=total_steps(images, args),
        start_pruning_step=args.start,
        pruning_steps=args.length,
        pruning_periods=args.periods,
        variant="sgd",
        lr=args.lr,
        first_momentum=0.9,
        weight_decay=args.weight_decay,
    )
    train(model, optimizer, images, args, "hesso")
    return oto


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    images = load(args)
    size = "×".join(map(str, images.shape))
    print(f"{args.dataset}: {len(images.train_y):,} training and {len(images.test_y):,} test images, {size}")
    print(f"ResNet-{args.depth}, width {args.width}; {args.epochs} epochs, batch {args.batch_size}, seed {args.seed}")
    print(f"torch {torch.__version__}, {args.device}, CPU threads: {torch.get_num_threads()}")

    dense = None if args.no_dense else train_dense(images, args)
    oto = train_sparse(images, args)
    subnet = oto.construct_subnet(out_dir=args.out)

    sample = images.test_x[: args.latency_batch].cpu()
    before, after = subnet.cost_before, subnet.cost_after
    models = [("dense", dense, before), ("zeroed full", oto.model, before), ("slim", subnet.model, after)]
    header = ["", "accuracy", "params", "MACs / image", f"CPU ms / batch of {len(sample)}"]
    rows = [
        [name, percent(model, images), f"{cost.params:,}", f"{cost.macs:,}", f"{1e3 * latency(model, sample):.2f}"]
        for name, model, cost in models
        if model is not None
    ]
    print("\n" + table([header, *rows]))
    print(f"latency: median of {REPEATS} forward passes, float32, CPU threads: {torch.get_num_threads()}\n")
    print(subnet)

    # The artifact needs the class and nothing of this run.
    loaded = load_subnet(args.out, lambda: ResNet(args.depth, args.width, images.shape[0], images.classes))
    slim = copy.deepcopy(subnet.model).cpu()
    with torch.no_grad():
        difference = (loaded(sample) - slim(sample)).abs().max().item()
    print(f"reloaded: largest absolute difference {difference:.1e} on {len(sample)} test images")


def percent(model: nn.Module, images: Images) -> str:
    return f"{100 * correct(model, images.test_x, images.test_y) / len(images.test_y):.2f} %"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Text in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a ResNet with HESSO and take a smaller one out of it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", choices=LOADERS, default="digits", help="digits needs no files")
    add("--train-images", type=int, help="use only the first so many training images (default: all)")
    add("--depth", type=int, default=8, help="6n + 2 layers")
    add("--width", type=int, default=64, help="channels of the first stage")
    add("--epochs", type=int, default=12)
    add("--batch-size", type=int, default=64)
    add("--lr", type=float, default=0.1, help="at the start; follows a cosine to zero")
    add("--weight-decay", type=float, default=5e-4)
    add("--target-macs", type=float, default=0.3, help="share of the multiply-adds to keep, in (0, 1]")
    add("--target-group-sparsity", type=float, help="instead: share of the groups to remove, in [0, 1)")
    add("--group-divisible", type=int, default=8, help="widths are multiples of this, which kernels like")
    add("--start", type=float, default=0.1, help="when pruning starts, as a share of the steps")
    add("--length", type=float, default=0.3, help="how long it takes, likewise")
    add("--periods", type=int, default=5, help="in how many portions the groups go")
    add("--seed", type=int, default=0)
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--no-augment", action="store_true", help="train on the images as they are, neither moved nor mirrored")
    add("--no-dense", action="store_true", help="skip the dense network that is trained for comparison")
    add("--latency-batch", type=int, default=64, help="images per forward pass when latency is measured")
    add("--out", type=Path, default=Path("out/resnet"), help="where the artifact goes")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
