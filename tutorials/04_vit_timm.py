"""Lesson 4: a vision transformer of timm, with timm's own recipe: parameter groups, moving average, cosine schedule.

    python tutorials/04_vit_timm.py                           # a small ViT on Fashion-MNIST, about three minutes
    python tutorials/04_vit_timm.py --model vit_small_patch16_224 --image-folder imagenet --epochs 300 \
        --batch-size 512 --ema 0.9998 --device cuda

The moving average of the weights is what timm evaluates and ships. An average only comes near zero where the weights
are at zero, so its slim form would be as large as the full one: `optimizer.zero_pruned_in(ema)` puts that right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from common import compare, parser, start
from data import Images, load_images
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from oto import OTO


def make(args: Any) -> nn.Module:
    torch.manual_seed(args.seed)
    if args.image_folder:
        classes = sum(path.is_dir() for path in (Path(args.image_folder) / "train").iterdir())
        return timm.create_model(args.model, pretrained=args.pretrained, num_classes=classes)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=28,
        patch_size=4,
        in_chans=1,
        embed_dim=64,
        depth=4,
        num_heads=4,
        num_classes=10,
    )


class Folder:
    """Images in a folder for each class, with timm's transforms: batches for training, and for testing."""

    def __init__(self, args: Any) -> None:
        self.data = {
            part: timm.data.create_dataset("", root=Path(args.image_folder) / part) for part in ("train", "val")
        }
        load = partial(
            timm.data.create_loader, input_size=(3, 224, 224), use_prefetcher=False, num_workers=args.workers
        )
        self.train = load(self.data["train"], batch_size=args.batch_size, is_training=True)
        self.test = load(self.data["val"], batch_size=min(256, args.batch_size))


def batches(images: Images | Folder, args: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches of one epoch."""
    if isinstance(images, Folder):
        return iter(images.train)
    return images.epoch(args.batch_size, torch.Generator().manual_seed(torch.initial_seed()))


@torch.no_grad()
def accuracy(model: nn.Module, test: Iterable[tuple[Tensor, Tensor]], device: str) -> str:
    model.to(device).eval()
    right = count = 0
    for x, y in test:
        right += int((model(x.to(device)).argmax(1).cpu() == y).sum())
        count += len(y)
    return f"{100 * right / count:.2f} %"


def main() -> None:
    flags = parser(__doc__, "04_vit_timm")
    flags.add_argument("--model", default="vit_small_patch16_224", help="of timm; with --image-folder")
    flags.add_argument("--image-folder", help="with train/ and val/, a folder for each class; default: Fashion-MNIST")
    flags.add_argument("--pretrained", action="store_true", help="start from timm's weights")
    flags.add_argument("--workers", type=int, default=4, help="processes that read the image folder")
    flags.add_argument("--images", type=int, default=20_000, help="of Fashion-MNIST's 60,000")
    flags.add_argument("--test-images", type=int, default=4_000)
    flags.add_argument("--epochs", type=int, default=4)
    flags.add_argument("--batch-size", type=int, default=64)
    flags.add_argument("--lr", type=float, default=2e-3)
    flags.add_argument("--ema", type=float, default=0.98, help="decay of the moving average")
    flags.add_argument("--target-macs", type=float, default=0.6)
    args = start(flags, {"images": 448, "test_images": 250, "batch_size": 16, "epochs": 2})

    if args.image_folder:
        images: Images | Folder = Folder(args)
        test, count = images.test, len(images.data["train"])
    else:
        images = load_images("fashion_mnist").subset(args.images)
        x, y = images.test_x[: args.test_images], images.test_y[: args.test_images]
        test, count = list(zip(x.split(250), y.split(250), strict=True)), len(images.train_y)
    some = next(iter(test))[0]
    model = make(args).to(args.device)
    before = accuracy(model, test, args.device)

    oto = OTO(model, some[:1].to(args.device))
    steps = args.epochs * (count // args.batch_size)
    optimizer = oto.hesso(
        params=param_groups_weight_decay(model, 0.05),  # timm's: no decay of biases and norms
        variant="adamw",
        lr=args.lr,
        target_macs=args.target_macs,
        total_steps=steps,
    )
    print(optimizer.plan(), "\n")
    schedule = CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=steps // 20, warmup_lr_init=1e-5, t_in_epochs=False
    )
    ema = ModelEmaV3(model, decay=args.ema)

    step = 0
    with tqdm(total=steps, unit="step", disable=None) as bar:
        for epoch in range(args.epochs):
            torch.manual_seed(args.seed + epoch)
            model.train()
            for x, y in batches(images, args):
                x, y = x.to(args.device), y.to(args.device)
                loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                step += 1
                schedule.step_update(step)
                ema.update(model, step=step)
                bar.update()
            tqdm.write(f"loss {loss.item():.3f}; {optimizer.progress}")

    # The average is what is shipped, so the average is made slim.
    optimizer.zero_pruned_in(ema)
    subnet = oto.construct_subnet(out_dir=args.out, model=ema)
    rows = {
        "before": (make(args), subnet.cost_before, [before]),
        "weights": (model, subnet.cost_before, [accuracy(model, test, args.device)]),
        "zeroed": (ema.module, subnet.cost_before, [accuracy(ema.module, test, args.device)]),
        "slim": (subnet.model, subnet.cost_after, [accuracy(subnet.model, test, args.device)]),
    }
    batch = some[:32]
    compare(rows, ["accuracy"], lambda m: m(batch), f"{len(batch)} images", args.passes)
    print("before: untrained; weights: as trained; zeroed: their moving average; slim: made of that\n")
    print(subnet)


if __name__ == "__main__":
    main()
