"""Where the exported graph needs more than thinner tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oto import OTO
from oto.axes.registry import known
from oto.errors import EmitterError
from oto.trace.export import export


class Recurrent(nn.Module):
    """Composite operators without a rule of their own are taken apart in the exported graph, too."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.cell, self.out = nn.Linear(5, 8), nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(self.into(x))[0])


class Standardized(nn.Conv2d):
    """The filters are standardized by a batch norm that has no running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class ByDeviation(nn.Conv2d):
    """The same, spelled with ``std_mean``."""

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-6), self.bias, self.stride, self.padding)


class Permuted(nn.Module):
    """A layer norm gives contiguous memory, which is then viewed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 8, 1), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return self.out(y.view(x.shape[0], -1, y.shape[-1]).mean(1))


def _stack(conv: type[nn.Conv2d]) -> nn.Module:
    return nn.Sequential(
        conv(3, 8, 3), nn.ReLU(), conv(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )


@pytest.mark.parametrize(
    ("model", "x", "least"),
    [
        (Recurrent(), torch.randn(2, 4, 5), 14),
        (_stack(Standardized), torch.randn(2, 3, 8, 8), 16),
        (_stack(ByDeviation), torch.randn(2, 3, 8, 8), 16),
        (Permuted(), torch.randn(2, 3, 4, 4), 8),
    ],
    ids=["recurrent", "standardized", "by deviation", "permuted"],
)
def test_half_of_all_groups_removed(model: nn.Module, x: Tensor, least: int) -> None:
    oto = OTO(model.double(), x.double())
    assert sum(group.size for group in oto.node_groups if group.prunable) >= least
    oto.random_set_zero_groups(0.5, seed=1)
    assert oto.construct_subnet(emitter="graph").max_error < 1e-10


def test_nothing_is_taken_apart_without_need() -> None:
    ops = {str(node.op) for node in export(_stack(Standardized), torch.randn(2, 3, 8, 8), known).graph.nodes}
    assert "aten.batch_norm.default" in ops


def test_a_model_that_cannot_be_exported_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.score(x)
            good = y[y[:, 0] > 0]
            return self.out(good) if good.numel() else self.out(y)

    with pytest.raises(EmitterError, match=r"torch\.export cannot follow"):
        export(Picks(), torch.randn(4, 4))
    assert "def forward" not in capfd.readouterr().err


class Folded(nn.Module):
    """Heads and batch in one dimension, which is then cut into pieces."""

    def __init__(self, cut: Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cut, self.q, self.out = cut, nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        h = self.q(x).view(b, t, 4, 4).transpose(1, 2).reshape(b * 4, t, 4)
        h = torch.cat([piece.tanh() for piece in self.cut(h)])
        return self.out(h.view(b, 4, t, 4).transpose(1, 2).reshape(b, t, 16))


@pytest.mark.parametrize(
    ("batch", "cut"),
    [
        (1, lambda h: h.chunk(2)),
        (2, lambda h: h.chunk(2)),
        (1, lambda h: h.tensor_split(2)),
        (1, lambda h: h.split(h.shape[0] // 2)),
        (2, lambda h: h.split(h.shape[0] // 2)),
        (2, lambda h: h.split([h.shape[0] // 2, h.shape[0] - h.shape[0] // 2])),
        (4, lambda h: h.tensor_split((h.shape[0] // 4, h.shape[0] // 2))),
        (2, lambda h: h.tensor_split((4,))),
        (3, lambda h: h.tensor_split((4, 4 + (h.shape[0] - 4) // 2))),
    ],
)
def test_pieces_of_a_dimension_that_holds_the_batch(batch: int, cut: Callable[[Tensor], Sequence[Tensor]]) -> None:
    oto = OTO(Folded(cut).double(), torch.randn(batch, 6, 8, dtype=torch.float64))
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet(emitter="graph")
    assert subnet.max_error < 1e-12 and f"slim on batch of {batch + 2}" in {c.what for c in subnet.checks}
    assert subnet.cost_after.params < subnet.cost_before.params


def test_a_batch_that_only_the_extra_check_tries_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oto.slim.graph._cut_by_share", lambda *given: False)  # sizes as the example has them
    oto = OTO(Folded(lambda h: h.chunk(2)).double(), torch.randn(2, 6, 8, dtype=torch.float64))
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet(emitter="graph")
    (note,) = subnet.notes
    assert note.startswith("slim takes the batch size of the example only") and f"note: {note}" in str(subnet)
    assert subnet.max_error < 1e-12 and len(subnet.checks) == 3


class Padded(nn.Module):
    """A block whose shortcut has no channels for half of its outputs: they are padded with zeros."""

    def __init__(self):
        super().__init__()
        self.first, self.wide, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(self.wide(x) + nn.functional.pad(x, (0, 0, 0, 0, 5, 3))).mean((2, 3))


def test_channels_that_a_shortcut_pads_with_zeros_may_go():
    torch.manual_seed(0)
    model = Padded().double()
    oto = OTO(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert sorted(g.size for g in oto.node_groups if g.prunable) == [3, 5, 8]
    with torch.no_grad():
        for p in (model.wide.weight, model.wide.bias):
            p[torch.tensor([0, 2, 14])] = 0  # two of the five in front, one of the three behind
    subnet = oto.construct_subnet()
    assert subnet.emitter == "graph" and subnet.max_error < 1e-12
    assert sorted(len(atoms) for atoms in subnet.kept.values()) == [2, 3, 8]
