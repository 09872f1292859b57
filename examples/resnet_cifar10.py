"""Train a ResNet once with HESSO, and take a smaller network out of it that computes the same function.

    python examples/resnet_cifar10.py                                          # digits, 2 CPU cores, about 3 minutes
    python examples/resnet_cifar10.py --dataset fashion_mnist --epochs 10 --depth 8
    python examples/resnet_cifar10.py --dataset cifar10 --device cuda --depth 56 --epochs 200 --batch-size 64 \
        --target-group-sparsity 0.7

The network is the CIFAR ResNet of He et al. (arXiv 1512.03385, section 4.2) with 1×1 projections where the shape
changes: depth 6n + 2, three stages of n blocks, `width`, 2·`width` and 4·`width` channels.

The schedule is that of HESSO (arXiv 2409.09085): train as usual, from `--start-epoch` on shrink the least salient
groups to exactly zero over `--pruning-epochs` in `--periods` portions, then train what is left. The dense network that
the table compares with has the same initial weights, batches, optimizer settings and number of steps.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch
from data import LOADERS, Images, load_images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from oto import OTO, load_subnet

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
    steps = args.epochs * (len(images.train_y) // args.batch_size)
    scheduler = CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(args.seed)
    model.train()
    with tqdm(total=steps, desc=title, unit="step", mininterval=0.5, dynamic_ncols=True) as bar:
        for _ in range(args.epochs):
            for x, y in images.epoch(args.batch_size, generator):
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                lr = scheduler.get_last_lr()[0]
                optimizer.step()
                scheduler.step()
                if bar.n % 10 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}", lr=f"{lr:.4f}", group_sparsity="?")
                bar.update()


@torch.no_grad()
def correct(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 500) -> int:
    """How many of the images are put in the right class."""
    model.eval()
    batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
    return sum(int((model(a).argmax(1) == b).sum()) for a, b in batches)


@torch.no_grad()
def latency(model: nn.Module, x: Tensor, repeats: int = 31) -> float:
    """Median seconds of one forward pass on the device of ``x``."""
    model = copy.deepcopy(model).to(x.device).eval()
    seconds = []
    for _ in range(repeats + 3):  # three to warm up
        start = time.perf_counter()
        model(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:])


# ------------------------------------------------------------------------------------------------ the job


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
    steps_per_epoch = len(images.train_y) // args.batch_size
    optimizer = oto.hesso(
        variant="sgd",
        lr=args.lr,
        first_momentum=0.9,
        weight_decay=args.weight_decay,
        target_group_sparsity=args.target_group_sparsity,
        start_pruning_step=round(args.start_epoch * steps_per_epoch),
        pruning_steps=round(args.pruning_epochs * steps_per_epoch),
        pruning_periods=args.periods,
    )
    train(model, optimizer, images, args, "hesso")
    return oto


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    images = load_images(args.dataset).subset(args.train_images).to(args.device)
    n = len(images.test_y)
    print(
        f"{args.dataset}: {len(images.train_y)} training and {n} test images, {'×'.join(map(str, images.shape))}; "
        f"ResNet-{args.depth}, width {args.width}; {args.epochs} epochs, batch {args.batch_size}, seed {args.seed}, "
        f"{args.device}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )

    dense = None if args.no_dense else train_dense(images, args)
    oto = train_sparse(images, args)
    subnet = oto.construct_subnet(out_dir=args.out)
    full, slim = oto.model, subnet.model

    rows = [("zeroed full", full), ("slim", slim)]
