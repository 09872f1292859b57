"""A run on shapes only computes the shapes of torch, and refuses what torch refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from oto.trace.light import failure_on_meta


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), norm, nn.Linear(8, 4)
        self.ran = 0

    def forward(self, x):
        self.ran += 1
        x = self.norm(self.conv(x)).relu_()
        x = torch.cat([x, torch.zeros(len(x), 8, *x.shape[2:])], 1)[:, :8]
        assert x.is_meta
        return self.head(x.mean((2, 3)))


NORMS = {"batch": nn.BatchNorm2d(8), "group": nn.GroupNorm(2, 8), "layer": nn.LayerNorm(6), "instance": nn.Identity()}
X = torch.randn(2, 3, 6, 6)


@pytest.mark.parametrize("norm", NORMS)
def test_what_runs_is_left_as_it_was(norm):
    net = Net(NORMS[norm]).to("meta").train()
    assert failure_on_meta(net, X) is None
    assert net.ran == 0 and net.training


def shorter(layer, names=("weight", "bias", "running_mean", "running_var")):
    for name in names:
        old = getattr(layer, name)
        new = torch.zeros(len(old) - 1)
        setattr(layer, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
    return layer


class Turned(nn.Module):
    """Views what is not contiguous, as torch refuses."""

    def forward(self, x):
        return torch.relu(x.transpose(2, 3)).view(-1)


WRONG = {
    "a view of what is not contiguous": Turned,
    "a batch norm of fewer channels": lambda: Net(shorter(nn.BatchNorm2d(8))),
    "its mean alone": lambda: Net(shorter(nn.BatchNorm2d(8), ["running_mean"])),
    "a layer norm of another width": lambda: Net(nn.LayerNorm(5)),
    "of another weight": lambda: Net(shorter(nn.LayerNorm(6), ["weight"])),
    "a group norm of fewer channels": lambda: Net(shorter(nn.GroupNorm(2, 8), ["weight", "bias"])),
    "a convolution of no channel": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(9)),
    "a linear layer of another width": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(3, 4)),
}


@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG)
def test_what_torch_refuses_fails(make):
    model = make()
    with pytest.raises(Exception):  # noqa: B017  whatever torch says
        model.eval()(X)
    assert failure_on_meta(model.to("meta"), X) is not None
