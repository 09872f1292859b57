"""Lesson 15: a ResNet gets smaller without training, and what a short recovery adds.

    python tutorials/15_one_shot.py                           # ResNet-20, 256 images to calibrate with, some minutes
    python tutorials/15_one_shot.py --model resnet56 --images 1024 --target-macs 0.5 --recover 20000 --device cuda

You will see what zeroing alone costs, what is left once the weights that read a layer take over what its removed
channels carried, which way to choose suits this network, and how far a few seconds of training bring it back. The
test images are looked at once, at the end: all that is compared on the way is compared on images held out for it.
"""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import torch
from common import compare, parser, start
from torch import Tensor, nn
from torch.nn import functional as F

from oto import OTO, load_subnet
from oto.distill import Distillation
from oto.recovery import rewarmed

lesson_1 = import_module("01_resnet_cifar10")  # its network, its weights and its data


# ---------------------------------------------------------------------------------------------- 1. the loss
# All that compression wants to know of a task: the loss of a model and a batch. A batch may be anything.


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def compressed(model: nn.Module, batches: list[Any], args: Any, **how: Any) -> tuple[float, OTO]:
    """What is lost on the held-out batches by one way to compress a copy of a model."""
    oto = OTO(copy.deepcopy(model), batches[0][0][:1])
    done = oto.one_shot(target_macs=args.target_macs, batches=batches, loss=loss, portions=args.portions, **how)
    said = ", ".join(f"{name}={value!r}" for name, value in how.items()) or "as it comes"
    assert done.loss is not None  # a quarter of the batches is held out
    print(f"{said}: held-out loss {done.loss[0]:.3f} before, {done.loss[1]:.3f} after")
    return done.loss[1], oto


# ---------------------------------------------------------------------------------------------- 2. a recovery


def recover(slim: nn.Module, full: nn.Module, x: Tensor, y: Tensor, args: Any) -> None:
    """One pass over some images: a learning rate that rises and falls, and the full model as a teacher."""
    optimizer = torch.optim.SGD(slim.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    order = torch.randperm(len(y)).split(args.batch_size)
    schedule = rewarmed(optimizer, steps=len(order))
    distill = Distillation(full)
    slim.train()
    for index in order:
        a, b = x[index].to(args.device), y[index].to(args.device)
        optimizer.zero_grad()
        distill(slim, a, lambda output, b=b: F.cross_entropy(output, b)).backward()
        optimizer.step()
        schedule.step()


# ---------------------------------------------------------------------------------------------- 3. the lesson


def main() -> None:
    flags = parser(__doc__, "15_one_shot")
    flags.add_argument("--model", default="resnet20", choices=["resnet20", "resnet56"])
    flags.add_argument("--images", type=int, default=256, help="to calibrate with, a quarter of them to check")
    flags.add_argument("--recover", type=int, default=2048, help="images to train on afterwards, once")
    flags.add_argument("--test-images", type=int, default=1000)
    flags.add_argument("--batch-size", type=int, default=32)
    flags.add_argument("--lr", type=float, default=0.01)
    flags.add_argument("--target-macs", type=float, default=0.7, help="share of the multiply-adds that is left")
    flags.add_argument("--portions", type=int, default=6, help="in how many it goes, each chosen anew")
    args = start(flags, {"images": 128, "recover": 128, "test_images": 200, "batch_size": 32, "portions": 2})
    x, y, test_x, test_y = lesson_1.load(args.images + args.recover, args.test_images)
    here = [t[: args.images].to(args.device) for t in (x, y)]
    batches = list(zip(*(t.split(args.batch_size) for t in here), strict=True))
    full = lesson_1.pretrained(args.model).to(args.device).eval()

    # Zeroing alone; then with the fold; then ways to choose. None takes a step of training.
    compressed(full, batches, args, saliency="magnitude", compensate=None, norms=False)
    compressed(full, batches, args, saliency="magnitude")
    ways = [compressed(full, batches, args, **how) for how in ({}, {"saliency": "sensitivity"})]
    _, oto = min(ways, key=lambda way: way[0])  # by the held-out batches, not by the test images

    # From here on it is as after any training: zeros are taken out, and what is left is proved equal.
    subnet = oto.construct_subnet(out_dir=args.out)
    slim = load_subnet(args.out, lambda: lesson_1.network(args.model)).to(args.device)
    recovered = copy.deepcopy(slim)
    recover(recovered, full, x[args.images :], y[args.images :], args)

    def scored(model: nn.Module) -> list[str]:
        return [lesson_1.accuracy(model, test_x, test_y, args.device)]

    rows = {
        "before": (full, subnet.cost_before, scored(full)),
        "zeroed": (oto.model, subnet.cost_before, scored(oto.model)),
        "slim": (slim, subnet.cost_after, scored(slim)),
        "recovered": (recovered, subnet.cost_after, scored(recovered)),
    }
    compare(rows, ["accuracy"], lambda m: m(test_x[:64]), "64 images", args.passes)
    print("zeroed: zeroed and folded, the full network still; slim: the same without the zeros\n")
    print(subnet)


if __name__ == "__main__":
    main()
