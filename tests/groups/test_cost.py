"""Costs as polynomials in what is kept: against plain integers, networks that were built, and a profiler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from oto import OTO
from oto.groups.cost import Polynomial, cost


class Dense(nn.Module):
    """Concatenations of concatenations, as in a DenseNet, and a convolution with groups."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.layers = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.norm = nn.BatchNorm2d(20)
        self.grouped = nn.Conv2d(20, 30, 3, groups=5, bias=False)
        self.depthwise = nn.Conv2d(30, 30, 3, groups=30)
        self.head = nn.Linear(30, 5)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x).relu()], 1)
        return self.head(self.depthwise(self.grouped(self.norm(x))).mean((2, 3)))


class Attention(nn.Module):
    """Six query heads share two key and value heads; the embedding is tied to the output."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.q, self.k, self.v = nn.Linear(24, 48, bias=False), nn.Linear(24, 16), nn.Linear(24, 16)
        self.o = nn.Linear(48, 24)
        self.norm = nn.LayerNorm(24)
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, ids):
        x = self.embed(ids)
        b, s, _ = x.shape
        q = self.q(x).view(b, s, 6, 8).transpose(1, 2)
        k, v = (f(x).view(b, s, 2, 8).transpose(1, 2) for f in (self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, s, 48))
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return x @ self.embed.weight.T


class Experts(nn.Module):
    """Every token weighs four experts, whose weights lie in one tensor."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 16)
        self.gate = nn.Linear(16, 4)
        self.up = nn.Parameter(torch.randn(4, 16, 20))
        self.down = nn.Parameter(torch.randn(4, 20, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.inner(x)
        y = torch.einsum("bi,eij->bej", x, self.up).relu()
        y = torch.einsum("bej,ejo->beo", y, self.down)
        return self.head(x + (self.gate(x).softmax(-1).unsqueeze(-1) * y).sum(1))


NETWORKS = {
    "dense": lambda: (Dense(), torch.randn(2, 3, 8, 8)),
    "attention": lambda: (Attention(), torch.randint(50, (2, 7))),
    "experts": lambda: (Experts(), torch.randn(5, 6)),
}


@pytest.fixture(scope="module", params=NETWORKS)
def oto(request):
    torch.manual_seed(0)
    return OTO(*NETWORKS[request.param]())


def random_counts(sizes, times=25):
    rng = np.random.default_rng(0)
    return [rng.integers(1, sizes + 1) for _ in range(times)]


def test_the_polynomials_are_the_costs_in_plain_integers(oto):
    costs = oto.costs
    assert costs.at(costs.sizes) == cost(oto.partition)
    assert len(costs.sizes) >= 2
    for counts in random_counts(costs.sizes):
        exact = cost(oto.partition, dict(zip(costs.names, counts.tolist(), strict=True)))
        assert costs.at(counts) == exact
        assert costs.macs(counts) == exact.macs  # a float, without a fraction


@pytest.mark.parametrize("what", ["params", "macs", "bytes"])
def test_marginal_costs_are_differences(oto, what):
    measure, rng = getattr(oto.costs, what), np.random.default_rng(1)
    for counts in random_counts(oto.costs.sizes, 10):
        fewer = rng.integers(-2, counts)  # negative: what comes back
        marginal = measure.marginal(counts, fewer)
        for g, n in enumerate(fewer):
            after = counts.copy()
            after[g] -= n
            assert marginal[g] == measure(counts) - measure(after)


def test_what_the_polynomials_say_is_what_is_built(oto):
    oto.model.eval()
    oto.random_set_zero_groups(0.4)
    subnet = oto.construct_subnet()
    costs = oto.costs
    kept = np.array(
        [
            len(subnet.kept[name]) if name in subnet.kept else size
            for name, size in zip(costs.names, costs.sizes, strict=True)
        ]
    )
    assert costs.at(kept) == subnet.cost_after
    tensors = list(subnet.model.parameters())
    assert subnet.cost_after.params == sum(p.numel() for p in tensors) < subnet.cost_before.params
    held = [*tensors, *subnet.model.buffers()]
    assert subnet.cost_after.bytes == sum(t.numel() * t.element_size() for t in held)
    with FlopCounterMode(display=False) as counter:
        subnet.model(oto.dummy_input)
    assert subnet.cost_after.flops == counter.get_total_flops()


def test_a_power_of_a_count_falls_as_powers_do():
    square = Polynomial({(0, 0): 3, (0,): 1, (): 7}, 1)  # 3a² + a + 7
    assert square(np.array([4])) == 59
    assert square.marginal(np.array([4]), np.array([2])).tolist() == [3 * (16 - 4) + 2]
    assert square.marginal(np.array([4]), np.array([4])).tolist() == [3 * 16 + 4]


def test_what_cannot_be_pruned_counts_as_whole():
    oto = OTO(Attention(), torch.randint(50, (2, 7)), skip_patterns=["up"])
    costs = oto.costs
    assert "up.weight" not in costs.names
    least = costs.at(np.ones_like(costs.sizes))
    assert least.params > 40  # the bias of `up`, whole, is among them
    assert least == cost(oto.partition, dict.fromkeys(costs.names, 1))
