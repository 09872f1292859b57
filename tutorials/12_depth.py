"""Lesson 12: a ResNet gets shallower, not only narrower, at the same number of multiply-adds.

    python tutorials/12_depth.py                              # ResNet-56, 2,048 images twice, some minutes
    python tutorials/12_depth.py --images 50000 --epochs 60 --lr 0.05 --test-images 10000 --device cuda

You will see which parts of a network can go as a whole, how they are compared with channels in one budget, and what
that is worth in milliseconds: at batch 1 a small network pays for every call, whatever its width. The network is
trained twice in the same way, once with channels only.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from common import compare, parser, start
from data import augment
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from oto import OTO, load_subnet

lesson_1 = import_module("01_resnet_cifar10")  # its network, its weights and its data


# ---------------------------------------------------------------------------------------------- 1. training
# The loop of lesson 1. No line of it is about depth: a branch of a residual block is chosen as a channel is, and goes
# to zero as a channel does. What it saves counts, and what it means to the loss.


def train(oto: OTO, x: Tensor, y: Tensor, args: Any) -> list[str]:
    """Bring the network to the target; the names of the segments that went."""
    steps = args.epochs * (len(y) // args.batch_size)
    optimizer = oto.hesso(
        target_macs=args.target_macs,
        total_steps=steps,
        variant="sgd",
        lr=args.lr,
        first_momentum=0.9,
        weight_decay=5e-4,
    )
    schedule = CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(args.seed)
    with tqdm(total=steps, unit="step", disable=None) as bar:
        for _ in range(args.epochs):
            oto.model.train()
            for index in torch.randperm(len(y), generator=generator).split(args.batch_size):
                if len(index) < args.batch_size:
                    continue
                a, b = augment(x[index], 4, True, generator).to(args.device), y[index].to(args.device)
                loss = F.cross_entropy(oto.model(a), b)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            tqdm.write(f"loss {loss.item():.3f}; {optimizer.progress}")
    left = optimizer.left_like(None)
    return [group.name for group in optimizer.node_groups if group.segment and not left[group.name].any()]


# ---------------------------------------------------------------------------------------------- 2. the lesson


def main() -> None:
    flags = parser(__doc__, "12_depth")
    flags.add_argument("--model", default="resnet56", choices=["resnet20", "resnet56"])
    flags.add_argument("--images", type=int, default=2048, help="training images; CIFAR-10 has 50,000")
    flags.add_argument("--test-images", type=int, default=1000)
    flags.add_argument("--epochs", type=int, default=2)
    flags.add_argument("--batch-size", type=int, default=64)
    flags.add_argument("--lr", type=float, default=0.01)
    flags.add_argument("--target-macs", type=float, default=0.5, help="share of the multiply-adds that is left")
    smoke = {"model": "resnet20", "images": 512, "test_images": 300, "batch_size": 32}
    args = start(flags, smoke)
    x, y, test_x, test_y = lesson_1.load(args.images, args.test_images)

    def scored(model: nn.Module) -> list[str]:
        return [lesson_1.accuracy(model, test_x, test_y, args.device)]

    # Width only: the mode that a user gets who says nothing.
    narrow = OTO(lesson_1.pretrained(args.model).to(args.device), test_x[:1].to(args.device))
    train(narrow, x, y, args)
    width = narrow.construct_subnet()

    # Both: the branches of the residual blocks may go, too. What each would save is known before any training.
    oto = OTO(lesson_1.pretrained(args.model).to(args.device), test_x[:1].to(args.device), compress_mode="both")
    print(oto.erasable(), "\n")
    gone = train(oto, x, y, args)
    print(f"segments that went: {', '.join(gone) or 'none'}\n")

    # A block without its branch is what it was given. The slim model is of the same class, and checked.
    subnet = oto.construct_subnet(out_dir=args.out)
    slim = load_subnet(args.out, lambda: lesson_1.network(args.model)).to(args.device)

    full = lesson_1.pretrained(args.model).to(args.device)
    rows = {
        "before": (full, subnet.cost_before, scored(full)),
        "width only": (width.model, width.cost_after, scored(width.model)),
        "zeroed": (oto.model, subnet.cost_before, scored(oto.model)),
        "slim": (slim, subnet.cost_after, scored(slim)),
    }
    compare(rows, ["accuracy"], lambda m: m(test_x[:1]), "1 image", args.passes)
    print("zeroed: width and depth, the full network still; slim: the same without the zeros\n")
    print(subnet)


if __name__ == "__main__":
    main()
