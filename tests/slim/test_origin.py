"""A model that is made slim again and again loads from the class that it was in the beginning."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import oto.nn
from oto import OTO, load_subnet
from oto.slim.origin import origin_of
from oto.slim.verify import relative_error, run
from tests.optim.test_shrink import OwnCode
from tests.slim.test_construct import EXACT, Residual


class Convolutions(nn.Module):
    """Batch norm, group norm, a depthwise convolution, an LSTM behind it."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.GroupNorm(4, 16), nn.SiLU(),
            nn.Conv2d(16, 12, 1), nn.BatchNorm2d(12), nn.ReLU6(),
        )  # fmt: skip
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
