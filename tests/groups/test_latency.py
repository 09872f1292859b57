"""What a forward pass takes as a function of widths: the table, with a clock that goes by known prices."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oto import OTO
from oto._torch import tree_leaves
from oto.groups import latency
from oto.groups.latency import latency_table

CPU = torch.device("cpu")


class Mixed(nn.Module):
    """A convolution, tokens, attention, norms, a concatenation, an index and a reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 4, 4)
        self.table = nn.Embedding(10, 24)
        self.norm = nn.LayerNorm(24)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.up, self.down = nn.Linear(24, 40), nn.Linear(80, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        y = self.norm(self.conv(x).flatten(2).transpose(1, 2) + self.table(which)[:, None])
        y = y + self.attention(y, y, y, need_weights=False)[0]
        hidden = self.up(y)
        y = y + self.down(torch.cat([F.gelu(hidden), hidden.relu()], -1))
        return self.head(y.mean(1))


def mixed() -> OTO:
    torch.manual_seed(0)
    return OTO(Mixed(), (torch.randn(2, 3, 16, 16), torch.tensor([1, 7])))


def priced(price):
    """In place of the clock: run the call, and let it take what it costs."""

    def timed(op, args, kwargs, device):
        results = tree_leaves(op(*args, **kwargs))
        return price(op, args, kwargs, results), results

    return timed


def entries(op, args, kwargs, results) -> float:
    tensors = [t for t in (*tree_leaves((args, kwargs)), *results) if isinstance(t, Tensor)]
    return 3.0 + 0.5 * sum(t.numel() for t in tensors)


def some_counts(sizes, seed=0):
    return np.random.default_rng(seed).integers(1, sizes, endpoint=True)


def test_the_table_is_right_at_widths_that_were_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a call takes what its entries cost, the table is exact, whatever each node group keeps."""
    monkeypatch.setattr(latency, "timed", priced(entries))
    oto = mixed()
    table = latency_table(oto.partition, oto.costs, CPU)
    axes = [oto.partition.axes[name] for name in oto.costs.names]
    for seed in range(3):
        counts = some_counts(oto.costs.sizes, seed)
        replay = latency.Replay(oto.partition, dict(zip(axes, counts.tolist(), strict=True)), CPU)
        assert table(counts) == pytest.approx(sum(replay.milliseconds()), rel=0.02)  # norms of other form, once thin


def test_products_take_what_their_multiply_adds_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    def price(op, args, kwargs, results):
        return args[0].numel() * results[0].shape[1] if op is torch.ops.aten.linear.default else 0.0

    monkeypatch.setattr(latency, "timed", priced(price))
    oto = OTO(
        nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 3)), torch.ones(5, 6)
    )
    table = latency_table(oto.partition, oto.costs, CPU)
    for seed in range(3):
        counts = some_counts(oto.costs.sizes, seed)
        assert table(counts) == pytest.approx(oto.costs.macs(counts), rel=1e-6)


def test_every_call_of_a_network_can_be_timed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="oto.groups.latency")
    oto = mixed()
    table = latency_table(oto.partition, oto.costs, CPU)
    assert not [r.message for r in caplog.records if "cannot be timed" in r.message]
    assert table(oto.costs.sizes) > table(np.ones_like(oto.costs.sizes)) > 0
    assert (table.marginal(oto.costs.sizes, np.ones_like(oto.costs.sizes)) > 0).all()  # whatever the clock says


def test_what_cannot_be_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def price(op, args, kwargs, results):
        if op is torch.ops.aten.relu.default:
            raise RuntimeError("no kernel")
        return 1.0

    monkeypatch.setattr(latency, "timed", priced(price))
    oto = mixed()
    table = latency_table(oto.partition, oto.costs, CPU)
    calls = [node.op for node in oto.partition.found.graph.nodes]
    assert table(oto.costs.sizes) == pytest.approx(len(calls) - calls.count(torch.ops.aten.relu.default))


def test_widths_are_measured_as_they_will_be_chosen() -> None:
    assert [latency._width(100, share, 8) for share in (1.0, 0.75, 0.5, 0.125, 0.01)] == [100, 72, 48, 16, 8]
    assert latency._width(3, 0.1, 8) == 3


def test_it_leaves_the_random_state_as_it_was() -> None:
    oto = mixed()
    before = torch.get_rng_state()
    latency_table(oto.partition, oto.costs, CPU)
    assert torch.equal(before, torch.get_rng_state())


def test_a_table_is_no_longer_than_the_network_has_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation costs as much as there are monomials; `benchmarks/choice.py` times a choice of many."""
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setattr(latency.Replay, "milliseconds", lambda self: [1.0] * len(self.propagation.graph.nodes))
    oto = OTO(torchvision.models.resnet50(weights=None), torch.randn(1, 3, 32, 32))
    table = latency_table(oto.partition, oto.costs, CPU)
    assert len(table.coefficients) <= len(oto.partition.found.graph.nodes)
