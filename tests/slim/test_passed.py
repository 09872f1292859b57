"""Between a segment and the concatenation that it is left out of there may be calls that take no tensor without
channels: the class does not make them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oto import OTO, load_subnet
from oto.nn import ErasedForward, OverriddenForward
from oto.slim.own_class.overrides import FunctionCalls


class Pyramid(nn.Module):
    """What is coarse is made fine again, and what is fine smoothed, before all is laid side by side."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.up, self.skip, self.pooled = nn.Conv2d(8, 5, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 3, 1)
        self.padded, self.head = nn.Conv2d(6, 3, 3), nn.Conv2d(15, 2, 1)

    def forward(self, x):
        a = self.stem(x).relu()
        b = self.down(a).relu()
        up = F.interpolate(self.up(b), size=a.shape[-2:], mode="bilinear", align_corners=False)
        pooled = F.max_pool2d(F.relu(self.pooled(F.avg_pool2d(a, 3, 1, 1))), 3, 1, 1)
        padded = F.pad(self.padded(a), (1, 1, 1, 1), mode="reflect")
        return self.head(torch.cat([self.skip(a), up, pooled, padded], 1).relu())


class Loop(nn.Module):
    """One line of code for all of them, and one pooling layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 6, 3, padding=1), nn.MaxPool2d(2)
        self.ways = nn.ModuleList(nn.Conv2d(6, 4, k, padding=k // 2) for k in (1, 3, 1, 3))
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        found = []
        for way in self.ways:
            found.append(F.interpolate(self.pool(way(x)), scale_factor=2))
        return self.head(torch.cat(found, 1).relu())


class Taken(Loop):
    """What has no channels would be reshaped before it is laid beside others."""

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(torch.cat([self.pool(way(x)).flatten(2).unflatten(2, (4, 4)) for way in self.ways], 1).relu())


X = (2, 3, 8, 8)


def made(make):
    torch.manual_seed(0)
    return make().double().eval(), torch.randn(X, dtype=torch.float64)


def without(model, x, *names, out_dir=None):
    oto, parameters = OTO(model, x, compress_mode="both"), dict(model.named_parameters())
    found = {group.name: group for group in oto.node_groups if group.segment and group.prunable}
    for name in names:
        found[name].zero_(parameters, torch.tensor([0]))
    return oto.construct_subnet(out_dir, emitter="module")


@pytest.mark.parametrize("names", [("up",), ("pooled",), ("padded",), ("up", "pooled", "padded")])
def test_it_is_left_out_of_its_class(names, tmp_path):
    model, x = made(Pyramid)
    subnet = without(model, x, *names, out_dir=tmp_path / "slim")
    assert subnet.max_error <= 1e-12
    assert all(isinstance(subnet.model.get_submodule(name).forward, ErasedForward) for name in names)
    assert isinstance(subnet.model.forward, OverriddenForward)
    assert subnet.model.head.in_channels == 15 - sum(getattr(model, name).out_channels for name in names)
    loaded = load_subnet(tmp_path / "slim", Pyramid().double())
    for size in (X, (1, 3, 6, 10), (3, 3, 16, 12)):
        given = torch.randn(size, dtype=torch.float64)
        torch.testing.assert_close(loaded(given), model(given), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(copy.deepcopy(loaded)(given), model(given), rtol=1e-12, atol=1e-12)
    loaded.train()(x).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_what_is_done_before_it_is_done_as_ever():
    model, x = made(Pyramid)
    calls = without(model, x, "pooled").model.forward.calls
    assert [name for named in calls.values() for name in named] == ["max_pool2d"]


def test_it_is_exported():
    model, x = made(Pyramid)
    slim = without(model, x, "up", "pooled").model
    torch.testing.assert_close(torch.export.export(slim, (x,)).module()(x), slim(x))


def test_one_line_of_code_for_some_that_are_gone_and_some_that_are_not(tmp_path):
    model, x = made(Loop)
    subnet = without(model, x, "ways.1", "ways.2")
    assert subnet.max_error <= 1e-12 and subnet.model.head.in_channels == 8
    again = without(subnet.model, x, "ways.0", out_dir=tmp_path / "slim")
    assert again.max_error <= 1e-12 and again.model.head.in_channels == 4
    assert not [name for name, _ in again.model.named_parameters() if name.startswith(("ways.0", "ways.1", "ways.2"))]
    loaded = load_subnet(tmp_path / "slim", Loop().double())
    torch.testing.assert_close(loaded(x), subnet.model(x))


def test_widths_go_with_them_and_after_them():
    model, x = made(Loop)
    OTO(model, x).random_set_zero_groups(0.5)
    subnet = without(model, x, "ways.1")
    assert subnet.max_error <= 1e-12 and isinstance(subnet.model.ways[1].forward, ErasedForward)
    again = OTO(subnet.model, x)
    again.random_set_zero_groups(0.3, seed=1)
    assert again.construct_subnet(emitter="module").max_error <= 1e-12


def test_what_cannot_be_passed_over_stays_with_its_reason():
    model, x = made(Taken)
    reasons = [group.reason for group in OTO(model, x, compress_mode="both").node_groups if group.segment]
    assert reasons and all("cannot leave it out" in (reason or "") for reason in reasons)


def test_the_class_is_asked_with_data_where_torch_allows_without_what_it_refuses_with_it(monkeypatch):
    monkeypatch.setattr(FunctionCalls, "by_node", {})  # no call can be overridden
    model, x = made(Pyramid)
    reasons = {group.name: group.reason for group in OTO(model, x, compress_mode="both").node_groups if group.segment}
    assert "Non-empty 4D data tensor expected" in reasons["up"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [Pyramid, Loop])
def test_shrinking_is_the_run_without_it(make):
    losses, sizes = [], []
    for shrinks in (False, True):
        model, x = made(make)
        model.train()
        oto = OTO(model, x, compress_mode="both", min_kept=0.7)  # channels alone would not do
        options = {"start_pruning_step": 2, "pruning_steps": 9, "pruning_periods": 3, "total_steps": 16}
        optimizer = oto.hesso(variant="adam", lr=1e-2, target_macs=0.5, **options)
        own = []
        for step in range(16):
            optimizer.zero_grad()
            loss = (model(x) - 0.1).square().mean()
            loss.backward()
            optimizer.step()
            own.append(loss.item())
            if shrinks and step in (5, 8, 13):
                oto.shrink(optimizer)
        losses.append(own)
        sizes.append(sum(p.numel() for p in model.parameters()))
        assert oto.construct_subnet().emitter == "module"
    assert isinstance(model.forward, OverriddenForward)
    assert sizes[1] < sizes[0] and losses[1] == pytest.approx(losses[0], rel=1e-9)
