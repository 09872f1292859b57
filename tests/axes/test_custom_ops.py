"""Operators that users register themselves: whole until a rule says more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import oto
from oto import OTO
from oto.axes.registry import RULES
from oto.errors import UnknownOpWarning
from oto.slim.verify import relative_error, run


@torch.library.custom_op("oto_tests::soft_clip", mutates_args=())
def soft_clip(x: Tensor, limit: float) -> Tensor:
    return limit * torch.tanh(x / limit)


@soft_clip.register_fake
def _(x, limit):
    return torch.empty_like(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.c(torch.relu(self.b(soft_clip(self.a(x), 2.0))))


@pytest.fixture
def with_rule():
    op = torch.ops.oto_tests.soft_clip

    @oto.register_rule(op)
    def rule(call, x, limit):
        return call.map(lambda fact: fact, x)  # tanh(0) = 0

    yield
    for key in [key for key in RULES if "soft_clip" in str(key)]:
        del RULES[key]


def prunable(found):
    return {g.name for g in found.node_groups if g.prunable}


def test_without_a_rule_it_keeps_what_it_touches():
    with pytest.warns(UnknownOpWarning, match=r"no rule for oto_tests\.soft_clip"):
        found = OTO(Net(), torch.randn(2, 4))
    assert prunable(found) == {"b.weight"} and found.coverage()["unknown"] == {"oto_tests.soft_clip.default": 1}
    (whole,) = [w for w in found.explain().whole if w.group == "a.weight"]
    assert whole.operator == "oto_tests.soft_clip.default" and whole.source.startswith(__file__)


def test_with_a_rule_it_does_not(with_rule):
    model, x = Net().double(), torch.randn(2, 4, dtype=torch.float64)
    found = OTO(model, x)
    assert prunable(found) == {"a.weight", "b.weight"} and not found.coverage()["unknown"]
    found.random_set_zero_groups(0.5)
    for emitter in ("module", "graph"):
        slim = found.construct_subnet(emitter=emitter).model
        assert relative_error(run(model, x), run(slim, x)) < 1e-12
