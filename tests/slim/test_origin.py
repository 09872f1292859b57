"""A model that is made slim again and again loads from the class that it was in the beginning."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import oto.nn
from oto import OTO, load_subnet
from oto.slim.proof.compare import relative_error
from oto.slim.proof.run import run
from oto.slim.provenance import origin_of
from tests.optim.test_shrink import OwnCode
from tests.slim.test_construct import EXACT, Residual


class Convolutions(nn.Module):
    """Batch norm, group norm, a depthwise convolution, an LSTM behind it."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.GroupNorm(4, 16),
            nn.SiLU(),
            nn.Conv2d(16, 12, 1),
            nn.BatchNorm2d(12),
            nn.ReLU6(),
        )
        self.sequence, self.out = nn.LSTM(12, 10, batch_first=True), nn.Linear(10, 4)

    def forward(self, x):
        y, _ = self.sequence(self.features(x).mean(3).transpose(1, 2))
        return self.out(y.mean(1))


CASES = {
    "residual, layer norm": (Residual, (2, 7, 5)),
    "residual, rms norm": (lambda: Residual(norm=nn.RMSNorm), (2, 7, 5)),
    "a norm and views of the user's own": (OwnCode, (2, 7, 5)),
    "convolutions, lstm": (Convolutions, (2, 3, 8, 8)),
}


@pytest.mark.parametrize("case", CASES)
def test_three_rounds_load_from_the_first_class(case, tmp_path):
    make, shape = CASES[case]
    x = torch.randn(shape, dtype=torch.float64)
    model = make().double()
    sizes = [sum(p.numel() for p in model.parameters())]
    for seed in range(3):
        found = OTO(model, x)
        found.random_set_zero_groups(0.25, seed)
        subnet = found.construct_subnet(tmp_path)
        assert relative_error(run(model, x), run(subnet.model, x)) <= EXACT
        model = load_subnet(tmp_path, make)
        assert relative_error(run(subnet.model, x), run(model, x)) <= EXACT
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert sizes == sorted(sizes, reverse=True) and sizes[3] < 0.75 * sizes[1]
    assert len(origin_of(model).rounds) == 3
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(__file__).resolve().parents[2] / "docs" / "oto.schema.json").read_text())
    manifest = json.loads((tmp_path / "oto.json").read_text())
    jsonschema.validate(manifest, schema)
    assert len(manifest["earlier"]) == 2


def test_the_residual_width_goes_on_being_prunable():
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    first = OTO(Residual().double(), x)
    first.random_set_zero_groups(0.3)
    subnet = first.construct_subnet()
    assert isinstance(subnet.model.norm1, oto.nn.LayerNorm)
    second = OTO(subnet.model, x)
    names = {g.name for g in first.node_groups if g.prunable}
    assert {g.name for g in second.node_groups if g.prunable} >= names  # and the width of query and key, scaled apart
    second.random_set_zero_groups(0.3)
    again = second.construct_subnet(emitter="module").model
    assert again.norm1.full == (16,) and again.norm1.normalized_shape < subnet.model.norm1.normalized_shape
    assert again.attention.full_heads == 4 and set(again.attention.heads) <= set(subnet.model.attention.heads)


def test_copies_and_pickles_remember_where_they_come_from(tmp_path):
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    first = OTO(Residual().double(), x)
    first.random_set_zero_groups(0.3)
    slim = first.construct_subnet().model
    held = io.BytesIO()
    torch.save(slim, held)
    for other in (copy.deepcopy(slim), torch.load(io.BytesIO(held.getvalue()), weights_only=False)):
        second = OTO(other, x)
        second.random_set_zero_groups(0.3)
        again = second.construct_subnet(tmp_path)
        assert relative_error(run(again.model, x), run(load_subnet(tmp_path, Residual), x)) <= EXACT
    assert all(p.is_meta for p in origin_of(slim).first.parameters())
    assert sum(1 for _ in slim.modules()) == sum(1 for _ in Residual().modules())  # it is no part of the model


class Norm(nn.Module):
    """A norm of the user's own, called as a function or written by hand."""

    def __init__(self, how, width=12):
        super().__init__()
        self.how, self.eps = how, 1e-6
        self.weight, self.bias = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.randn(width))

    def forward(self, x):
        match self.how:
            case "layer_norm":
                return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
            case "layer_norm by name":
                return F.layer_norm(input=x, normalized_shape=[12], weight=self.weight, bias=self.bias)
            case "channels first":
                y = F.layer_norm(x.permute(0, 2, 1).permute(0, 2, 1), (len(self.weight),), None, None, self.eps)
                return y * self.weight + self.bias
            case "rms_norm":
                return F.rms_norm(x, self.weight.shape, self.weight, 0.3) + self.bias
            case "group_norm":
                y = F.group_norm(x.transpose(1, 2), 4, self.weight, self.bias, self.eps)
                return y.transpose(1, 2)
            case "mean square":
                return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.3) * self.weight + self.bias
            case "centered":
                y = x - x.mean(-1, keepdim=True)
                return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 0.3) * self.weight + self.bias
            case "std":
                return x / (x.std(-1, keepdim=True) + 0.3) * self.weight + self.bias
            case "var_mean":
                var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
                return (x - mean) * torch.rsqrt(var + 0.3) * self.weight + self.bias


class Normed(nn.Module):
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.n, self.b, self.m = nn.Linear(5, 12), Norm(how), nn.Linear(12, 12), Norm(how)
        self.c = nn.Linear(12, 3)

    def forward(self, x):
        x = self.a(x)
        x = x + self.b(self.n(x).relu())
        return self.c(self.m(x))


HOWS = (
    "layer_norm",
    "layer_norm by name",
    "channels first",
    "rms_norm",
    "group_norm",
    "mean square",
    "centered",
    "std",
    "var_mean",
)


@pytest.mark.parametrize("how", HOWS)
def test_a_second_round_finds_what_the_first_one_did(how, tmp_path):
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    model = Normed(how).double()
    sizes = None
    for seed in range(2):
        found = OTO(model, x)
        free = {g.name: g.size for g in found.node_groups if g.prunable}
        assert sizes is None or free == {name: size for name, size in sizes.items() if size > 1}
        found.random_set_zero_groups(0.25, seed)
        subnet = found.construct_subnet(tmp_path / how)
        assert subnet.emitter == "module"
        assert relative_error(run(model, x), run(subnet.model, x)) <= EXACT
        sizes = {name: len(atoms) for name, atoms in subnet.kept.items()}
        model = load_subnet(tmp_path / how, lambda: Normed(how).double())
        assert relative_error(run(subnet.model, x), run(model, x)) <= EXACT
    assert model.c.in_features < 12
