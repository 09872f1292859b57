"""Lesson 8: two processes. DistributedDataParallel, and the same groups go in both.

    torchrun --nproc-per-node 2 tutorials/08_ddp.py           # digits, two CPU processes, about one minute
    torchrun --nproc-per-node 8 tutorials/08_ddp.py --device cuda --epochs 30

OTO gets the model inside or outside of the wrapper; the optimizer steps on gradients that are averaged already, so
every process chooses the same groups without a word between them. One process saves.
"""

from __future__ import annotations

import hashlib
import os

import torch
from common import compare, parser, start
from data import load_images
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR

from oto import OTO


def network() -> nn.Module:
    def stage(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        *stage(1, 32), *stage(32, 64), nn.Flatten(), nn.Linear(64 * 4, 64), nn.ReLU(), nn.Linear(64, 10)
    )


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> str:
    return f"{100 * int((model.eval()(x).argmax(1) == y).sum()) / len(y):.2f} %"


def main() -> None:
    flags = parser(__doc__, "08_ddp")
    flags.add_argument("--epochs", type=int, default=20)
    flags.add_argument("--batch-size", type=int, default=32, help="of each process")
    flags.add_argument("--lr", type=float, default=0.1)
    flags.add_argument("--target-macs", type=float, default=0.4)
    if "RANK" not in os.environ:
        raise SystemExit("start it with: torchrun --nproc-per-node 2 tutorials/08_ddp.py")
    args = start(flags, {"epochs": 3})
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" else args.device
    images = load_images("digits").to(device)

    model = network().to(device)
    wrapped = DistributedDataParallel(model)
    oto = OTO(wrapped, images.test_x[:1])  # it looks inside of the wrapper
    steps = args.epochs * (len(images.train_y) // (world * args.batch_size))
    optimizer = oto.hesso(lr=args.lr, first_momentum=0.9, target_macs=args.target_macs, total_steps=steps)
    schedule = CosineAnnealingLR(optimizer, steps)
    if rank == 0:
        print(optimizer.plan(), "\n")

    shuffle = torch.Generator().manual_seed(args.seed)
    for epoch in range(args.epochs):
        wrapped.train()
        order = torch.randperm(len(images.train_y), generator=shuffle)[: steps // args.epochs * world * args.batch_size]
        for index in order.view(-1, world, args.batch_size)[:, rank].to(device):  # every process has its own part
            loss = F.cross_entropy(wrapped(images.train_x[index]), images.train_y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if rank == 0 and (epoch + 1) % max(args.epochs // 4, 1) == 0:
            print(f"loss {loss.item():.3f}; {optimizer.progress}")

    # Which groups are at zero, as one number that can be compared.
    chosen = repr({name: atoms.tolist() for name, atoms in optimizer.pruned_groups.items()})
    digests: list[str | None] = [None] * world
    dist.all_gather_object(digests, hashlib.sha256(chosen.encode()).hexdigest()[:12])
    if rank == 0:
        same = len({*digests}) == 1
        which = "the same groups" if same else "other groups"
        print(f"{world} processes, {which} at zero: {', '.join(map(str, digests))}")
        subnet = oto.construct_subnet(out_dir=args.out)
        x, y = images.test_x, images.test_y
        rows = {
            "zeroed": (model, subnet.cost_before, [accuracy(model, x, y)]),
            "slim": (subnet.model, subnet.cost_after, [accuracy(subnet.model, x, y)]),
        }
        batch = x[:64].cpu()
        compare(rows, ["accuracy"], lambda m: m(batch), "64 images", args.passes)
        print(subnet)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
