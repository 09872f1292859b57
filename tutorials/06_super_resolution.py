"""Lesson 6: a network that makes images larger. CARN-M from its pretrained weights, PSNR on Set5 and Set14.

    python tutorials/06_super_resolution.py                   # patches of Set14, about three minutes
    python tutorials/06_super_resolution.py --train-folder DIV2K_train_HR --patch 64 --batch-size 64 --steps 600000 \
        --lr 1e-4 --target-macs 0.4 --device cuda

What is hard here for other tools: convolutions in groups, one block that is run three times with the same weights,
concatenations of all that was computed so far, and a shuffle of channels into pixels.
The pretrained weights saw DIV2K, which is not at hand, so the default goes on with the few images of Set14 and is
tested on Set5. Set14 is therefore no test set here.
"""

from __future__ import annotations

import io
import math
import tarfile
from pathlib import Path

import numpy as np
import torch
from common import compare, parser, start
from data import need, weights
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from oto import OTO, load_subnet

# ---------------------------------------------------------------------------------------------- 1. the network
# CARN-M of Ahn et al. (arXiv 1803.08664); names as in nmhkahn/CARN-pytorch (MIT), whose weights these are.


class Shift(nn.Module):
    """Add or subtract the mean color."""

    def __init__(self, sign: int) -> None:
        super().__init__()
        self.shifter = nn.Conv2d(3, 3, 1)
        self.shifter.weight.data = torch.eye(3).view(3, 3, 1, 1)
        self.shifter.bias.data = sign * torch.tensor([0.4488, 0.4371, 0.4040])
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shifter(x)


class Body(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Residual(Body):
    """Two convolutions in four groups each, and one of 1×1 that mixes them."""

    def __init__(self) -> None:
        grouped = [nn.Conv2d(64, 64, 3, padding=1, groups=4) for _ in range(2)]
        super().__init__(grouped[0], nn.ReLU(), grouped[1], nn.ReLU(), nn.Conv2d(64, 64, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + x)


class Cascade(nn.Module):
    """The same block three times; after each, a 1×1 convolution over everything so far."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.shared = shared
        if shared:
            self.b1 = Residual()
        else:
            self.b1, self.b2, self.b3 = (Cascade(shared=True) for _ in range(3))
        self.c1, self.c2, self.c3 = (Body(nn.Conv2d(64 * n, 64, 1), nn.ReLU()) for n in (2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        blocks = [self.b1] * 3 if self.shared else [self.b1, self.b2, self.b3]
        for block, mix in zip(blocks, [self.c1, self.c2, self.c3], strict=True):
            seen = torch.cat([seen, block(x)], 1)
            x = mix(seen)
        return x


class CARN(Cascade):
    """Twice as large in each direction."""

    def __init__(self) -> None:
        super().__init__(shared=False)
        self.sub_mean, self.add_mean = Shift(-1), Shift(1)
        self.entry = nn.Conv2d(3, 64, 3, padding=1)
        up = Body(nn.Conv2d(64, 256, 3, padding=1, groups=4), nn.ReLU(), nn.PixelShuffle(2))
        self.upsample = nn.ModuleDict({"up2": up})
        self.exit = nn.Conv2d(64, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(self.entry(self.sub_mean(x)))
        return self.add_mean(self.exit(self.upsample["up2"](x)))


def pretrained() -> CARN:
    model = CARN()
    held = weights("weights.tar", "carn_m.pth")
    model.load_state_dict({k: v for k, v in held.items() if "up3" not in k and "up4" not in k})  # the ×3 and ×4 heads
    model.sub_mean.requires_grad_(False)
    return model


# ---------------------------------------------------------------------------------------------- 2. images


def tensor(image: Image.Image) -> Tensor:
    """As bytes, or the 800 images of DIV2K would not fit into memory."""
    return torch.from_numpy(np.array(image.convert("RGB")).transpose(2, 0, 1))


def pairs(name: str, count: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """The images of ``Set5`` or ``Set14``, small and large, as bytes."""
    with tarfile.open(need("sr_set5_set14.tar")) as archive:

        def read(member: str) -> Tensor:
            file = archive.extractfile(member)
            assert file is not None
            return tensor(Image.open(io.BytesIO(file.read())))

        large = sorted(n for n in archive.getnames() if n.startswith(f"{name}/image_SRF_2/") and n.endswith("HR.png"))
        return [(read(n.replace("HR.png", "LR.png")), read(n)) for n in large[:count]]


def folder(path: str) -> list[tuple[Tensor, Tensor]]:
    """Large images of a folder, and what bicubic makes of them."""
    found = []
    for file in sorted(Path(path).glob("*.png")):
        image = Image.open(file).convert("RGB")
        image = image.crop((0, 0, image.width // 2 * 2, image.height // 2 * 2))
        small = image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)
        found.append((tensor(small), tensor(image)))
    return found


def patches(images: list[tuple[Tensor, Tensor]], size: int, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random patches, mirrored and turned at random, with values in [0, 1]."""
    small, large = [], []
    for i in torch.randint(len(images), (count,), generator=draw).tolist():
        a, b = images[i]
        y, x = (int(torch.randint(n - size + 1, (1,), generator=draw)) for n in a.shape[1:])
        turn, mirror = torch.randint(4, (2,), generator=draw).tolist()
        pair = [a[:, y : y + size, x : x + size], b[:, 2 * y : 2 * (y + size), 2 * x : 2 * (x + size)]]
        pair = [p.rot90(turn, (1, 2)).flip(2) if mirror % 2 else p.rot90(turn, (1, 2)) for p in pair]
        small.append(pair[0])
        large.append(pair[1])
    return torch.stack(small) / 255, torch.stack(large) / 255


def luminance(x: Tensor) -> Tensor:
    """Y of YCbCr, from 16 to 235, as the field measures it."""
    r, g, b = x.clamp(0, 1)
    return 16 + 65.481 * r + 128.553 * g + 24.966 * b


@torch.no_grad()
def psnr(model: nn.Module, images: list[tuple[Tensor, Tensor]], device: str) -> str:
    """Mean over images of the PSNR of Y in decibels, without a border of two pixels."""
    model.to(device).eval()
    found = []
    for small, large in images:
        said = model(small[None].to(device) / 255)[0].cpu().mul(255).round().div(255)
        off = (luminance(said) - luminance(large / 255))[2:-2, 2:-2]
        found.append(20 * math.log10(255) - 10 * math.log10(float(off.square().mean())))
    return f"{sum(found) / len(found):.3f} dB"


# ---------------------------------------------------------------------------------------------- 3. the lesson


def main() -> None:
    flags = parser(__doc__, "06_super_resolution")
    flags.add_argument("--train-folder", help="of large PNG images, such as DIV2K_train_HR; default: Set14")
    flags.add_argument("--steps", type=int, default=400)
    flags.add_argument("--patch", type=int, default=32, help="pixels of a small patch")
    flags.add_argument("--batch-size", type=int, default=8)
    flags.add_argument("--lr", type=float, default=2e-4)
    flags.add_argument("--target-macs", type=float, default=0.6)
    flags.add_argument("--test-images", type=int, default=5, help="of Set5")
    args = start(flags, {"steps": 16, "patch": 16, "batch_size": 4, "test_images": 1})
    train = folder(args.train_folder) if args.train_folder else pairs("Set14")
    test = pairs("Set5", args.test_images)

    model = pretrained().to(args.device)
    before = psnr(model, test, args.device)

    # The first and last convolution see colors, which are an input and an output, so these dimensions stay whole.
    oto = OTO(model, torch.rand(1, 3, args.patch, args.patch, device=args.device))
    print(oto.explain(), "\n")
    # Convolutions in groups are slow at odd widths: at multiples of eight, fewer operations are less time too.
    optimizer = oto.hesso(
        variant="adam", lr=args.lr, target_macs=args.target_macs, group_divisible=8, total_steps=args.steps
    )
    print(optimizer.plan(), "\n")
    schedule = CosineAnnealingLR(optimizer, args.steps)

    draw = torch.Generator().manual_seed(args.seed)
    model.train()
    with tqdm(total=args.steps, unit="step", disable=None) as bar:
        for step in range(args.steps):
            small, large = patches(train, args.patch, args.batch_size, draw)
            loss = F.l1_loss(model(small.to(args.device)), large.to(args.device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 10.0)
            optimizer.step()
            schedule.step()
            bar.update()
            if (step + 1) % max(args.steps // 4, 1) == 0:
                tqdm.write(f"loss {loss.item():.4f}; {optimizer.progress}")

    subnet = oto.construct_subnet(out_dir=args.out)
    slim = load_subnet(args.out, CARN)
    rows = {
        "before": (pretrained(), subnet.cost_before, [before]),
        "zeroed": (model, subnet.cost_before, [psnr(model, test, args.device)]),
        "slim": (slim, subnet.cost_after, [psnr(slim, test, args.device)]),
    }
    image = torch.rand(1, 3, 2 * args.patch, 2 * args.patch)
    size = "×".join(map(str, image.shape[2:]))
    compare(rows, ["PSNR on Set5"], lambda m: m(image), f"an image of {size}", args.passes)
    print(subnet)


if __name__ == "__main__":
    main()
