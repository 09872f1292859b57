"""A class whose code sees no size is run once; whatever may show one, it is asked as any other."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from oto import OTO
from oto.axes.registry import known
from oto.slim.own_class import workbench
from oto.trace.record import record


class Net(nn.Module):
    """Two convolutions, and something between them."""

    def __init__(self, between=lambda x: x):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 6, 3), nn.Linear(6, 2)
        self.between = between

    def forward(self, x):
        x = self.between(F.relu(self.norm(self.first(x))))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(self.second(x), 1), 1))


X = torch.randn(2, 3, 8, 8)


def wider(x):
    return x * 2 if x.shape[1] > 4 else x


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated, and still used
    scripted = torch.jit.script(wider)


READS = {
    "shape": lambda x: x * x.shape[2],
    "size": lambda x: x if x.size(1) else x + 1,
    "len": lambda x: x * len(x),
    "numel": lambda x: x * x.numel(),
    "iteration": lambda x: torch.stack([*x]),
    "code of torch": lambda x: F.interpolate(x, scale_factor=2),
    "TorchScript": scripted,
    "a literal": lambda x: x * torch.tensor(2.0),
    "a parameter": lambda x: x * nn.Parameter(torch.ones(3)).numel(),
}
NOT = {
    "arithmetic": lambda x: (x + 1).neg() * 2 - x.mean((2, 3), keepdim=True),
    "rank": lambda x: x * x.ndim + x.dim(),
    "kind": lambda x: x.to(torch.float32) if x.dtype is torch.float64 or x.requires_grad else x,
    "layers": lambda x: F.max_pool2d(F.hardswish(F.dropout(x, 0.1, False)), 2),
    "a constant slice": lambda x: x[:, :, 1:],
}


@pytest.mark.parametrize("how", READS)
def test_what_may_show_a_size(how):
    assert record(Net(READS[how]), X, known).reads_sizes


@pytest.mark.parametrize("how", NOT)
def test_what_shows_none(how):
    assert not record(Net(NOT[how]), X, known).reads_sizes


@pytest.fixture
def followed(monkeypatch):
    """How often the class is run."""
    runs = []
    follow = workbench.follow
    monkeypatch.setattr(workbench, "follow", lambda *args, **kwargs: runs.append(1) or follow(*args, **kwargs))
    return runs


def test_a_class_that_sees_no_size_is_run_once(followed):
    oto = OTO(Net(), X)
    assert len(followed) == 1
    oto.random_set_zero_groups(0.5, seed=0)
    subnet = oto.construct_subnet()
    assert type(subnet.model) is Net and len(followed) == 1


def test_a_class_that_sees_one_is_run_whole_and_in_several_tries(followed):
    OTO(Net(READS["shape"]), X)
    assert len(followed) >= 4


class Squeezed(Net):
    """It reads no size, and yet the call does something else once one channel is left."""

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(self.second(F.relu(self.first(x))), 1).squeeze())


class Stating(Net):
    """It states a size itself, by an attribute."""

    def __init__(self):
        super().__init__()
        self.width = 6

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(self.second(F.relu(self.first(x))), 1).view(-1, self.width))


class Swapped(Net):
    """The thinner form of its norm is another layer."""

    def __init__(self):
        super().__init__()
        self.last = nn.LayerNorm(6)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.second(F.relu(self.first(x))), 1)
        return self.head(self.last(torch.flatten(x, 1)))


@pytest.mark.parametrize("kind", [Squeezed, Stating, Swapped])
def test_one_try_is_not_enough_if_a_call_depends_on_the_count(kind, followed):
    model = kind()
    assert not record(model, X, known).reads_sizes
    OTO(model, X)
    assert len(followed) >= 4
