"""Lesson 1: a ResNet on CIFAR-10, from its pretrained weights to half of its multiply-adds.

    python tutorials/01_resnet_cifar10.py                     # ResNet-20, 20,000 images twice, about two minutes
    python tutorials/01_resnet_cifar10.py --model resnet18 --images 50000 --epochs 100 --lr 0.1 --device cuda

You will see the whole of the method: analyze the network, train it with a sparse optimizer, take the slim network out.
There is no list of layers and no second training.
"""

from __future__ import annotations

import torch
from common import compare, parser, start
from data import augment, cifar10_arrays, find, weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from oto import OTO, load_subnet

# ---------------------------------------------------------------------------------------------- 1. a network
# Nothing in these classes knows that they are going to be pruned. The first is the CIFAR ResNet of He et al.
# (arXiv 1512.03385, section 4.2) with the names of akamaster/pytorch_resnet_cifar10, whose weights we load.


class ZeroPad(nn.Module):
    """A shortcut without weights: every second pixel, and zeros for the channels that are missing."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = ZeroPad(inputs, outputs) if stride != 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inputs = 16
        for stage, outputs in enumerate((16, 32, 64), 1):
            blocks = []
            for block in range((depth - 2) // 6):
                blocks.append(Block(inputs, outputs, stride=2 if stage > 1 and block == 0 else 1))
                inputs = outputs
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3)))


def network(name: str) -> nn.Module:
    """``resnet20`` … ``resnet56`` for CIFAR; or torchvision's ``resnet18``, with a stem for small images."""
    if name == "resnet18":
        from torchvision.models import resnet18

        model = resnet18(num_classes=10)
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        return model
    return CifarResNet(int(name.removeprefix("resnet")))


FILES = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}


def pretrained(name: str) -> nn.Module:
    """With the weights of the data folder, if it has them; else training starts from scratch."""
    model = network(name)
    if name in FILES and find("weights.tar") is not None:
        held = weights("weights.tar", FILES[name])["state_dict"]
        model.load_state_dict({key.removeprefix("module."): value for key, value in held.items()})
    else:
        print("no pretrained weights: training from scratch")
    return model


# ---------------------------------------------------------------------------------------------- 2. data


def load(images: int, test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalized as the weights want it."""
    train_x, train_y, test_x, test_y = cifar10_arrays()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

    def normal(x: Tensor) -> Tensor:
        return (x.permute(0, 3, 1, 2) / 255 - mean) / std

    train_x, train_y, test_x, test_y = (torch.as_tensor(a) for a in (train_x, train_y, test_x, test_y))
    return normal(train_x[:images]), train_y[:images].long(), normal(test_x[:test]), test_y[:test].long()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, device: str) -> str:
    model.to(device).eval()
    right = sum(
        int((model(a.to(device)).argmax(1).cpu() == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True)
    )
    return f"{100 * right / len(y):.2f} %"


# ---------------------------------------------------------------------------------------------- 3. the lesson


def main() -> None:
    flags = parser(__doc__, "01_resnet_cifar10")
    flags.add_argument("--model", default="resnet20", choices=["resnet20", "resnet56", "resnet18"])
    flags.add_argument("--images", type=int, default=20_000, help="training images; CIFAR-10 has 50,000")
    flags.add_argument("--test-images", type=int, default=10_000)
    flags.add_argument("--epochs", type=int, default=2)
    flags.add_argument("--batch-size", type=int, default=128)
    flags.add_argument("--lr", type=float, default=0.02)
    flags.add_argument("--weight-decay", type=float, default=5e-4)
    flags.add_argument("--target-macs", type=float, default=0.5, help="share of the multiply-adds that is left")
    args = start(flags, {"images": 768, "test_images": 500, "epochs": 2, "batch_size": 64, "lr": 0.01})
    train_x, train_y, test_x, test_y = load(args.images, args.test_images)

    model = pretrained(args.model).to(args.device)
    before = accuracy(model, test_x, test_y, args.device)

    # The model and one example input: this is all that the analysis needs.
    oto = OTO(model, test_x[:1].to(args.device))
    print(oto.preview(target_macs=args.target_macs), "\n")

    # The optimizer wraps torch's SGD. Before, between and after the pruning periods it is SGD.
    steps = args.epochs * (len(train_y) // args.batch_size)
    optimizer = oto.hesso(
        target_macs=args.target_macs,
        total_steps=steps,
        variant="sgd",
        lr=args.lr,
        first_momentum=0.9,
        weight_decay=args.weight_decay,
    )
    print(optimizer.plan(), "\n")
    schedule = CosineAnnealingLR(optimizer, steps)

    # An ordinary training loop; no line of it is about pruning.
    generator = torch.Generator().manual_seed(args.seed)
    with tqdm(total=steps, unit="step", disable=None) as bar:
        for _ in range(args.epochs):
            model.train()
            for index in torch.randperm(len(train_y), generator=generator).split(args.batch_size):
                if len(index) < args.batch_size:
                    continue
                x, y = augment(train_x[index], 4, True, generator).to(args.device), train_y[index].to(args.device)
                loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            tqdm.write(f"loss {loss.item():.3f}; {optimizer.progress}")

    # What was chosen is exactly zero by now. Leaving it out changes nothing, and that is checked.
    subnet = oto.construct_subnet(out_dir=args.out)
    slim = load_subnet(args.out, lambda: network(args.model))

    dense = pretrained(args.model)
    rows = {
        "before": (dense, subnet.cost_before, [before]),
        "zeroed": (model, subnet.cost_before, [accuracy(model, test_x, test_y, args.device)]),
        "slim": (slim, subnet.cost_after, [accuracy(slim, test_x, test_y, args.device)]),
    }
    batch = test_x[:64]
    compare(rows, ["accuracy"], lambda m: m(batch), "64 images", args.passes)
    print(subnet)


if __name__ == "__main__":
    main()
