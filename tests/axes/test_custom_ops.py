"""Operators that users register themselves: followed where they are Python, else whole until a rule says more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import oto
from oto import OTO
from oto.axes.registry import RULES
from oto.errors import UnknownOpWarning
from oto.slim.proof.compare import relative_error
from oto.slim.proof.run import run


@torch.library.custom_op("oto_tests::soft_clip", mutates_args=())
def soft_clip(x: Tensor, limit: float) -> Tensor:
    return limit * torch.tanh(x / limit)


@soft_clip.register_fake
def _(x, limit):
    return torch.empty_like(x)


@torch.library.custom_op("oto_tests::outside", mutates_args=())
def outside(x: Tensor, limit: float) -> Tensor:
    """As ``soft_clip``, in numpy."""
    return torch.from_numpy(limit * np.tanh(x.numpy(force=True) / limit))


@outside.register_fake
def _(x, limit):
    return torch.empty_like(x)


@torch.library.custom_op("oto_tests::two_halves", mutates_args=())
def two_halves(x: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    first, second = x.chunk(2, -1)
    return [first.sigmoid() * second, torch.tanh(second if bias is None else second + bias)]


@two_halves.register_fake
def _(x, bias=None):
    return [x.new_empty(*x.shape[:-1], x.shape[-1] // 2) for _ in range(2)]


@torch.library.custom_op("oto_tests::shift_", mutates_args={"x"})
def shift_(x: Tensor, by: Tensor) -> None:
    x.add_(by)


class Net(nn.Module):
    def __init__(self, op="soft_clip"):
        super().__init__()
        torch.manual_seed(0)
        self.op = op
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.c(torch.relu(self.b(getattr(torch.ops.oto_tests, self.op)(self.a(x), 2.0))))


class Halves(nn.Module):
    """Several results, an argument that is a parameter, and one that is written to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(8, 8), nn.Linear(8, 3)
        self.bias, self.by = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        first, second = torch.ops.oto_tests.two_halves(self.a(x), self.bias)
        h = self.b(first + second)
        shift_(h, self.by)
        return self.c(torch.relu(h))


@pytest.fixture
def with_rule():
    op = torch.ops.oto_tests.outside

    @oto.register_rule(op)
    def rule(call, x, limit):
        return call.map(lambda fact: fact, x)  # tanh(0) = 0

    yield
    for key in [key for key in RULES if "outside" in str(key)]:
        del RULES[key]


def prunable(found):
    return {g.name for g in found.node_groups if g.prunable}


def test_without_a_rule_it_keeps_what_it_touches():
    with pytest.warns(UnknownOpWarning, match=r"no rule for oto_tests\.outside"):
        found = OTO(Net("outside"), torch.randn(2, 4))
    assert prunable(found) == {"b.weight"} and found.coverage()["unknown"] == {"oto_tests.outside.default": 1}
    (whole,) = [w for w in found.explain().whole if w.group == "a.weight"]
    assert whole.operator == "oto_tests.outside.default" and whole.source.startswith(__file__)


def test_with_a_rule_it_does_not(with_rule):
    model, x = Net("outside").double(), torch.randn(2, 4, dtype=torch.float64)
    found = OTO(model, x)
    assert prunable(found) == {"a.weight", "b.weight"} and not found.coverage()["unknown"]
    found.random_set_zero_groups(0.5)
    for emitter in ("module", "graph"):
        slim = found.construct_subnet(emitter=emitter).model
        assert relative_error(run(model, x), run(slim, x)) < 1e-12


@pytest.mark.parametrize(
    ("kind", "emitter"), [(Net, "module"), (Net, "graph"), (Halves, "module"), (Halves, "recording")]
)
def test_code_in_python_is_followed(kind, emitter):
    model, x = kind().double(), torch.randn(2, 4, dtype=torch.float64)
    found = OTO(model, x, allow_graph=emitter != "module")
    assert [g.size for g in found.node_groups if g.prunable] == [8, 8] and not found.coverage()["unknown"]
    assert not any("oto_tests" in node.name for node in found.partition.found.graph.nodes)
    found.random_set_zero_groups(0.5)
    slim = found.construct_subnet(emitter=emitter).model
    assert relative_error(run(model, x), run(slim, x)) < 1e-12
