"""A slim model of plain classes is pickled as the full one is: what reads it need not have `oto`."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from oto import OTO
from oto.nn import LayerNorm
from oto.slim.pickled import needs_oto
from oto.slim.provenance import REMEMBERED, origin_of
from tests.slim.test_construct import Residual

READER = """
import sys
import torch

sys.modules["oto"] = None  # `import oto` fails from now on
model = torch.load(sys.argv[1], weights_only=False)
torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
"""


def slimmed(model: nn.Module, x: torch.Tensor, rounds: int = 1) -> nn.Module:
    for seed in range(rounds):
        oto = OTO(model, x)
        oto.random_set_zero_groups(0.3, seed)
        model = oto.construct_subnet(emitter="module").model
    return model


def read_elsewhere(model: nn.Module, x: torch.Tensor, folder: Path) -> subprocess.CompletedProcess[str]:
    torch.save(model, folder / "model.pt")
    torch.save(x, folder / "x.pt")
    command = [sys.executable, "-c", READER, *(str(folder / name) for name in ("model.pt", "x.pt", "y.pt"))]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_slim_resnet_is_read_without_oto(rounds: int, tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    slim = slimmed(models.resnet18(num_classes=5).double().eval(), x, rounds)
    assert not needs_oto(slim)
    done = read_elsewhere(slim, x, tmp_path)
    assert not done.returncode, done.stderr
    assert torch.equal(torch.load(tmp_path / "y.pt"), slim(x))

    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(vars(again)[REMEMBERED]) is dict and len(origin_of(again).rounds) == rounds
    slimmed(again, x)  # a further round goes on from there


def test_what_needs_oto_says_so(tmp_path: Path) -> None:
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    oto = OTO(Residual().double(), x)
    oto.random_set_zero_groups(0.3)
    subnet = oto.construct_subnet()
    assert "norm1 (LayerNorm)" in needs_oto(subnet.model) and isinstance(subnet.model.norm1, LayerNorm)
    assert "torch.save(model) is read only where oto is installed: " in str(subnet)
    done = read_elsewhere(subnet.model, x, tmp_path)
    assert "import of oto halted" in done.stderr or "No module named 'oto" in done.stderr

    graph = oto.construct_subnet(emitter="graph")
    assert needs_oto(graph.model)[0].startswith("the model (SlimGraph")


def test_a_class_that_is_told_sizes_needs_oto() -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 12), nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)).view(-1, 12))

    assert needs_oto(slimmed(Viewed().double(), torch.randn(2, 5).double())) == [
        "the model (forward: OverriddenForward)"
    ]


def test_an_origin_is_pickled_without_weights() -> None:
    x = torch.randn(2, 8)
    slim = slimmed(nn.Sequential(nn.Linear(8, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 2)), x)
    with_origin, without = io.BytesIO(), io.BytesIO()
    torch.save(slim, with_origin)
    del vars(slim)[REMEMBERED]
    torch.save(slim, without)
    assert len(with_origin.getvalue()) < len(without.getvalue()) + 50_000
