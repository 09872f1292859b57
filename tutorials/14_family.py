"""Lesson 14: a family of four sizes from one training, a small residual network on handwritten digits.

    python tutorials/14_family.py                             # digits, under a minute
    python tutorials/14_family.py --data cifar10 --epochs 30 --device cuda

The full network trains alone until it is settled which channels each member keeps; from then on members of 75, 50 and
25 % of the MACs learn with it, from what it says on the same batch. Every member is proved and saved in one folder that
holds the shared weights once. Then a fifth size is cut out of the finished family, without training.
"""

from __future__ import annotations

import torch
from common import compare, parser, start
from data import Images, augment, cifar10, load_images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from oto import OTO, load_subnet

TARGETS = [0.75, 0.5, 0.25]

# ---------------------------------------------------------------------------------------------- 1. the network


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width)
        self.conv2, self.norm2 = nn.Conv2d(2 * width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self, channels: int = 1, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.blocks = nn.Sequential(Block(width), nn.MaxPool2d(2), Block(width), Block(width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


# ---------------------------------------------------------------------------------------------- 2. the lesson


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Percent of the test images."""
    said = torch.cat([model(x).argmax(1) for x in images.test_x.split(500)])
    return 100 * float((said == images.test_y).float().mean())


def main() -> None:
    flags = parser(__doc__, "14_family")
    flags.add_argument("--data", choices=["digits", "cifar10"], default="digits")
    flags.add_argument("--epochs", type=int, default=10)
    flags.add_argument("--batch-size", type=int, default=64)
    flags.add_argument("--lr", type=float, default=0.1)
    args = start(flags, {"epochs": 4})
    images = (load_images("digits") if args.data == "digits" else cifar10()).to(args.device)
    channels = images.train_x.shape[1]
    model = Net(channels).to(args.device)
    batches = len(images.train_x) // args.batch_size
    steps = args.epochs * batches

    oto = OTO(model, images.test_x[:1])
    family = oto.family(
        targets=TARGETS, variant="sgd", lr=args.lr, first_momentum=0.9, weight_decay=5e-4, total_steps=steps
    )
    print(family.plan(), "\n")
    schedule = OneCycleLR(family.optimizer, args.lr, total_steps=steps)

    draw = torch.Generator().manual_seed(args.seed)
    model.train()
    with tqdm(total=steps, unit="step", disable=None) as bar:
        for _ in range(args.epochs):
            order = torch.randperm(len(images.train_x), generator=draw).to(args.device)
            for index in order.split(args.batch_size)[:batches]:
                x, y = augment(images.train_x[index], 1, False, draw), images.train_y[index]
                # instead of forward, backward and optimizer.step(): `net` is the full network, then each member
                family.step(lambda net, x=x: net(x), lambda output, y=y: F.cross_entropy(output, y))
                schedule.step()
                bar.update()

    scored = family.evaluate(lambda net: accuracy(net, images))
    subnets = family.construct(args.out)  # the largest first; one folder
    names = ["full", *(f"{target:.0%}" for target in TARGETS)]
    rows = {
        name: (load_subnet(args.out, lambda: Net(channels), member=i), subnet.cost_after, [f"{member.score:.2f} %"])
        for i, (name, subnet, member) in enumerate(zip(names, subnets, scored, strict=True))
    }
    x = images.test_x[:1].cpu()
    compare(rows, ["accuracy"], lambda net: net(x), "one image", args.passes)
    held = {file.name: file.stat().st_size for file in sorted(args.out.glob("*.safetensors"))}
    print(f"saved in {args.out}:", ", ".join(f"{name} {size:,} bytes" for name, size in held.items()))
    print(f"verified: largest relative error {max(subnet.max_error for subnet in subnets):.1e}")

    # A size that nobody trained. Its batch norms are estimated on a few training images.
    few = images.train_x[:512].split(128)
    between = family.cut(0.6, evaluate=lambda net: accuracy(net, images), batches=few, forward=lambda net, x: net(x))
    print(f"cut afterwards: {between}")

    # In memory, members are views of one copy of the weights: a server may hold all of them and route by load.
    nets = [family.module(target) for target in (1.0, *TARGETS)]
    memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for net in nets for p in net.parameters()}
    print(f"in memory: {len(nets)} members, {sum(memory.values()):,} bytes of weights")


if __name__ == "__main__":
    main()
