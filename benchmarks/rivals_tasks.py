"""What is pruned in `rivals.py`: networks, data and recipes. Nothing here knows a pruning method.

Every network takes a `scale`, so that the dense network of the same MACs is the same architecture, narrower. Every
layer is one of `torch.nn`, and the heads of attention are a dimension of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from data import augment, cifar10_arrays, from_tar, load_images, weights
from data import minilm as encoder_folder

# ------------------------------------------------------------------------------------------------ networks


class ZeroPad(nn.Module):
    """Shortcut "A" of He et al. (arXiv 1512.03385): every second pixel, and zeros for the channels that are missing."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
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


class ResNet(nn.Module):
    """CIFAR ResNet of ``depth`` = 6n + 2; names and arithmetic are those of akamaster/pytorch_resnet_cifar10."""

    def __init__(self, depth: int, scale: float = 1) -> None:
        super().__init__()
        widths = [max(1, round(width * scale)) for width in (16, 32, 64)]
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs = widths[0]
        for stage, outputs in enumerate(widths, 1):
            blocks = []
            for block in range((depth - 2) // 6):
                blocks.append(BasicBlock(inputs, outputs, stride=2 if stage > 1 and block == 0 else 1))
                inputs = outputs
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(inputs, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def resnet(depth: int, file: str) -> Callable[[float, bool], nn.Module]:
    def build(scale: float, pretrained: bool) -> nn.Module:
        model = ResNet(depth, scale)
        if pretrained:
            state = weights("weights.tar", file)["state_dict"]
            model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
        return model

    return build


def for_small_images(name: str) -> Callable[[float, bool], nn.Module]:
    """A network of torchvision as papers have it for 32×32 images: the first layers keep the size."""

    def build(scale: float, pretrained: bool) -> nn.Module:
        from torchvision import models

        assert scale == 1, f"{name} has one width"
        model = models.get_model(name, num_classes=10)
        if name.startswith("resnet"):
            model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        else:
            model.avgpool = nn.AdaptiveAvgPool2d(1)
            hidden = [layer for _ in range(2) for layer in (nn.Linear(512, 512), nn.ReLU(), nn.Dropout())]
            model.classifier = nn.Sequential(*hidden, nn.Linear(512, 10))
        return model

    return build


class InvertedResidual(nn.Module):
    """Of MobileNetV2 (arXiv 1801.04381, figure 4d)."""

    def __init__(self, inputs: int, outputs: int, stride: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden),
            nn.ReLU6(),
        )  # fmt: skip
        self.project = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """MobileNetV2 for 28×28 images: nine inverted residuals of expansion 4."""

    STAGES = ((16, 1, 1), (24, 2, 2), (40, 3, 2), (64, 3, 1))  # channels, blocks, stride

    def __init__(self, scale: float = 1) -> None:
        super().__init__()

        def width(n: float) -> int:
            return max(1, round(n * scale))

        inputs = width(16)
        layers: list[nn.Module] = [nn.Conv2d(1, inputs, 3, padding=1, bias=False), nn.BatchNorm2d(inputs), nn.ReLU6()]
        for channels, blocks, stride in self.STAGES:
            for block in range(blocks):
                layers.append(InvertedResidual(inputs, width(channels), 1 if block else stride, 4 * inputs))
                inputs = width(channels)
        layers += [nn.Conv2d(inputs, width(192), 1, bias=False), nn.BatchNorm2d(width(192)), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width(192), 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean(dim=(2, 3)))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        query, key, value = (
            layer(x).view(batch, tokens, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(query, key, value)
        return self.out(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Pre-norm vision transformer (arXiv 2010.11929) on 7×7 patches of 4×4 pixels, with the mean over the tokens."""

    HEADS = 4

    def __init__(self, scale: float = 1, dim: int = 96, depth: int = 4) -> None:
        super().__init__()
        dim, hidden = self.HEADS * max(1, round(dim / self.HEADS * scale)), max(1, round(4 * dim * scale))
        self.patch = nn.Conv2d(1, dim, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 49, dim) * 0.02)
        self.layers = nn.Sequential(*(Layer(dim, self.HEADS, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.layers(x)).mean(1))


class Sentence(nn.Module):
    """A BERT-type encoder, the mean over the tokens as its authors take it, and a classifier."""

    def __init__(self, encoder: nn.Module, classes: int = 2) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(2).to(x.dtype)
        return self.classifier((x * weight).sum(1) / weight.sum(1))


def minilm(scale: float, pretrained: bool) -> nn.Module:
    from transformers import AutoModel, BertConfig, BertModel

    folder = encoder_folder()
    if pretrained:
        encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    else:
        config = BertConfig.from_pretrained(folder)
        config.hidden_size = config.num_attention_heads * max(1, round(config.hidden_size / 12 * scale))
        config.intermediate_size = max(1, round(config.intermediate_size * scale))
        encoder = BertModel(config, add_pooling_layer=False)
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # one epoch; and every method sees the same function
    return Sentence(encoder)


# ------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True)
class Split:
    """Arguments of ``forward`` with one example per row, and the labels."""

    x: tuple[Tensor, ...]
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def first(self, n: int) -> Split:
        return Split(tuple(x[:n] for x in self.x), self.y[:n])

    def to(self, device: str) -> Split:
        return Split(tuple(x.to(device) for x in self.x), self.y.to(device))

    def batch(self, index: Tensor, whole: bool = True) -> tuple[tuple[Tensor, ...], Tensor]:
        """Rows ``index``; sentences, unless ``whole``, cut to the longest of them, which changes nothing but time."""
        index = index.to(self.y.device)
        x = tuple(x[index] for x in self.x)
        if len(x) == 2 and not whole:  # ids and mask
            length = int(x[1].sum(1).max())
            x = tuple(part[:, :length] for part in x)
        return channels_last(x), self.y[index]


@dataclass(frozen=True)
class Data:
    """``holdout`` is never trained on and is what choices are made with; ``test`` is only reported."""

    train: Split
    holdout: Split
    test: Split
    shift: int = 0
    flip: bool = False

    def to(self, device: str) -> Data:
        return Data(*(split.to(device) for split in (self.train, self.holdout, self.test)), self.shift, self.flip)

    def epoch(self, size: int, generator: torch.Generator) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """Shuffled batches, augmented; a last batch that is not full is left out."""
        order = torch.randperm(len(self.train), generator=generator)
        for index in order.split(size):
            if len(index) == size:
                x, y = self.train.batch(index, whole=False)
                if self.shift:
                    x = channels_last((augment(x[0], self.shift, self.flip, generator),))
                yield x, y


def channels_last(x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Images as the CPU's convolutions like them: a step takes 0.6 to 0.75 of the time. Every method gets them so."""
    return tuple(part.contiguous(memory_format=torch.channels_last) if part.dim() == 4 else part for part in x)


@cache
def cifar10(train: int = 20_000, holdout: int = 15_000) -> Data:
    """As the pretrained weights want it: the first training images to train on, the last are held out."""
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    train_x, train_y, test_x, test_y = cifar10_arrays()

    def split(x: np.ndarray, y: np.ndarray) -> Split:
        scaled = (x / np.float32(255) - mean) / std
        return Split((torch.from_numpy(np.ascontiguousarray(np.moveaxis(scaled, 3, 1))),), _labels(y))

    return Data(
        split(train_x[:train], train_y[:train]), split(train_x[-holdout:], train_y[-holdout:]),
        split(test_x, test_y), shift=4, flip=True,
    )  # fmt: skip


def full_cifar10() -> Data:
    return cifar10(45_000, 5_000)


@cache
def fashion_mnist(holdout: int = 5000) -> Data:
    """The last 5,000 training images are held out."""
    images = load_images("fashion_mnist")
    return Data(
        Split((images.train_x[:-holdout],), images.train_y[:-holdout]),
        Split((images.train_x[-holdout:],), images.train_y[-holdout:]),
        Split((images.test_x,), images.test_y), shift=2, flip=True,
    )  # fmt: skip


TOKENS = 64  # of a sentence; the longest few are cut


@cache
def sst2() -> Data:
    """A fixed shuffle of the training phrases, the 872 sentences of `dev` held out, and the 1,821 of `test`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())

    def split(name: str, n: int | None = None) -> Split:
        text = from_tar("text.tar.xz", f"text/sst2_{name}.tsv").decode()
        lines = [line.split("\t", 1) for line in text.splitlines()[1:] if line]
        order = np.random.default_rng(0).permutation(len(lines))[:n] if n else range(len(lines))
        texts, y = [lines[i][1] for i in order], np.array([int(lines[i][0]) for i in order])
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        return Split((tokens["input_ids"], tokens["attention_mask"]), _labels(y))

    return Data(split("train", 20_000), split("dev"), split("test"))


def _labels(y: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(y).astype(np.int64))


# ------------------------------------------------------------------------------------------------ recipes


@dataclass(frozen=True)
class Task:
    """A network, its data and how it is trained; all but the method of pruning.

    Attributes:
        build: ``(scale, pretrained)`` to a network, by torch's global generator.
        example: One input of the size at which MACs count.
        variant, lr, weight_decay, warmup: ``"sgd"`` (momentum .9) or ``"adamw"``; the rate rises over the ``warmup``
            share of the steps and falls to zero as a cosine.
        images: Training examples used, the first so many.
        device: Where it is trained; initial weights are drawn on the CPU in any case.
        half: Whether to train under bfloat16 autocast.
    """

    name: str
    title: str
    build: Callable[[float, bool], nn.Module]
    data: Callable[[], Data]
    example: Callable[[], tuple[Tensor, ...]]
    classifier: str
    targets: tuple[float, ...]
    seeds: tuple[int, ...]
    images: int
    epochs: int
    batch: int
    variant: str = "sgd"
    lr: float = 0.05
    weight_decay: float = 5e-4
    warmup: float = 0.0
    pretrained: bool = False
    device: str = "cpu"
    half: bool = False

    @property
    def steps(self) -> int:
        return self.epochs * (self.images // self.batch)

    def network(self, scale: float = 1.0, pretrained: bool = False) -> nn.Module:
        """Weights of convolutions lie as the CPU likes them, see :func:`channels_last`."""
        return self.build(scale, pretrained).to(self.device, memory_format=torch.channels_last)

    def with_budget(self, images: int | None, epochs: int | None) -> Task:
        return replace(self, images=images or self.images, epochs=epochs or self.epochs)

    def on(self, device: str) -> Task:
        """The same on another device, networks, examples and data."""
        return replace(
            self,
            device=device,
            example=lambda: tuple(x.to(device) for x in self.example()),
            data=lambda: self.data().to(device),
        )

    def rate(self, step: int) -> float:
        rise = min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))
        return self.lr * rise * 0.5 * (1 + float(np.cos(np.pi * step / self.steps)))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.variant == "sgd":
            return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)
        return torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=self.weight_decay)

    def optimizer_options(self) -> dict[str, Any]:
        """The same for `oto.hesso`."""
        momentum = {"first_momentum": 0.9} if self.variant == "sgd" else {}
        return {"variant": self.variant, "lr": self.lr, "weight_decay": self.weight_decay, **momentum}


def _image(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)),)


def _sentence(length: int) -> tuple[Tensor, ...]:
    ids = torch.randint(1000, 20_000, (1, length), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids)


TASKS = {
    task.name: task
    for task in (
        Task(
            "resnet20", "ResNet-20 on CIFAR-10, pretrained (91.73 %)", resnet(20, "resnet20-12fca82f.th"), cifar10,
            _image(3, 32, 32), "linear", (0.6, 0.4, 0.25), (0, 1, 2), images=10_000, epochs=3, batch=128,
            pretrained=True,
        ),
        Task(
            "resnet56", "ResNet-56 on CIFAR-10, pretrained (93.39 %)", resnet(56, "resnet56-4bfd9763.th"), cifar10,
            _image(3, 32, 32), "linear", (0.5,), (0, 1), images=10_000, epochs=3, batch=128, pretrained=True,
        ),
        Task(
            "mobilenet", "MobileNetV2-like on Fashion-MNIST, from scratch", lambda scale, _: MobileNet(scale),
            fashion_mnist, _image(1, 28, 28), "classifier", (0.5, 0.3), (0, 1, 2), images=15_000, epochs=4, batch=128,
            lr=0.1,
        ),
        Task(
            "vit", "ViT (patch 4, 4 layers, 96 wide, 4 heads) on Fashion-MNIST, from scratch",
            lambda scale, _: ViT(scale), fashion_mnist, _image(1, 28, 28), "head", (0.5,), (0, 1, 2), images=20_000,
            epochs=4, batch=128, variant="adamw", lr=2e-3, weight_decay=0.05, warmup=0.1,
        ),
        Task(
            "minilm", "MiniLM-L6 on SST-2, pretrained", minilm, sst2, lambda: _sentence(TOKENS), "classifier", (0.5,),
            (0, 1, 2), images=10_000, epochs=1, batch=32, variant="adamw", lr=2e-4, weight_decay=0.01, warmup=0.1,
            pretrained=True,
        ),
        Task(
            "resnet18", "ResNet-18 on CIFAR-10, from scratch", for_small_images("resnet18"), full_cifar10,
            _image(3, 32, 32), "fc", (0.2,), (0,), images=45_000, epochs=30, batch=512, lr=0.4, warmup=0.15, half=True,
        ),
        Task(
            "resnet50", "ResNet-50 on CIFAR-10, from scratch", for_small_images("resnet50"), full_cifar10,
            _image(3, 32, 32), "fc", (0.1,), (0,), images=45_000, epochs=30, batch=512, lr=0.4, warmup=0.15, half=True,
        ),
        Task(
            "vgg16_bn", "VGG16-BN on CIFAR-10, from scratch", for_small_images("vgg16_bn"), full_cifar10,
            _image(3, 32, 32), "classifier.6", (0.26,), (0,), images=45_000, epochs=30, batch=512, lr=0.2, warmup=0.15,
            half=True,
        ),
        Task(
            "resnet56_scratch", "ResNet-56 on CIFAR-10, from scratch", resnet(56, ""), full_cifar10,
            _image(3, 32, 32), "linear", (0.5,), (0,), images=45_000, epochs=60, batch=256, lr=0.2, warmup=0.1,
        ),
    )
}  # fmt: skip
