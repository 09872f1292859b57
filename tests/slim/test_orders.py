"""Products whose order is chosen by sizes are one call, in whatever order a thinner model multiplies."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oto import OTO
from oto.slim.proof.compare import relative_error
from oto.slim.proof.run import run

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Chain(nn.Module):
    """x (b, i) · u (i, r) · v (r, o), whichever product is cheaper first."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.a, self.b = how, nn.Linear(8, 24), nn.Linear(20, 3)
        self.u, self.v = nn.Parameter(torch.randn(24, 22) / 5), nn.Parameter(torch.randn(22, 20) / 5)

    def forward(self, x):
        h = F.relu(self.a(x))
        if self.how == "multi_dot":
            h = torch.linalg.multi_dot([h, self.u, self.v])
        elif self.how == "chain_matmul":
            h = torch.chain_matmul(h, self.u, self.v)
        else:
            h = torch.einsum("bi,ir,ro->bo", h, self.u, self.v)
        return self.b(h)


@pytest.fixture
def opt_einsum(monkeypatch):
    """The package that torch asks for the order, which need not be installed: whatever comes first is the smallest."""

    def contract_path(equation, *operands, optimize=None):
        left = list(operands)
        path = []
        while len(left) > 1:
            pair = sorted(sorted(range(len(left)), key=lambda i: left[i].numel())[:2])
            path.append(tuple(pair))
            b, a = left.pop(pair[1]), left.pop(pair[0])
            left.append(a if a.numel() > b.numel() else b)
        return path, None

    module = types.SimpleNamespace(contract_path=contract_path)
    monkeypatch.setitem(sys.modules, "opt_einsum", module)
    backend = sys.modules["torch.backends.opt_einsum"]
    monkeypatch.setattr(backend, "_opt_einsum", module)
    monkeypatch.setattr(backend, "enabled", True)
    monkeypatch.setattr(backend, "strategy", "auto")


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
@pytest.mark.parametrize("how", ["einsum", "multi_dot", "chain_matmul"])
def test_the_class_multiplies_in_its_own_order(how, opt_einsum):
    model = Chain(how).double()
    oto = OTO(model, X)
    assert {g.name: g.size for g in oto.node_groups if g.prunable} == {"a.weight": 24, "u": 22, "v": 20}
    for seed in range(3):
        other = Chain(how).double()
        oto = OTO(other, X)
        oto.random_set_zero_groups(0.7, seed)
        slim = oto.construct_subnet(emitter="module").model
        assert relative_error(run(other, X), run(slim, X)) < 1e-12


class Contracted(Chain):
    """As ``opt_einsum.contract`` has it: matrices are laid out and multiplied two at a time, the smallest first."""

    def __init__(self):
        super().__init__("contract")
        self.w = nn.Parameter(torch.randn(20, 20) / 5)

    def forward(self, x):
        left = [F.relu(self.a(x)), self.u, self.v, self.w]
        while len(left) > 1:
            i = min(range(len(left) - 1), key=lambda i: left[i].shape[0] * left[i + 1].shape[1])
            inner = left[i].shape[1]
            a, b = left[i].reshape(-1, inner), left[i + 1].reshape(inner, -1)
            left[i : i + 2] = [torch.mm(a, b).reshape(len(a), b.shape[1])]
        return self.b(left[0])


def test_a_class_may_choose_the_order_of_many_calls():
    model = Contracted().double()
    oto = OTO(model, X)
    widths = {g.name: g.size for g in oto.node_groups if g.prunable}
    assert {"a.weight": 24, "u": 22, "v": 20}.items() <= widths.items()
    orders = set()
    for seed in range(3):
        other = Contracted().double()
        oto = OTO(other, X)
        oto.random_set_zero_groups(0.6, seed)
        slim = oto.construct_subnet(emitter="module").model
        orders.add(tuple(slim.u.shape))
        assert relative_error(run(other, X), run(slim, X)) < 1e-12
    assert len(orders) > 1
