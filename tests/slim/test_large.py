"""Large weights in the proof: what reaches them is found without a gradient of their size, their bits in blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from oto import OTO, load_subnet
from oto.errors import ArtifactError, EmitterError
from oto.io import artifact
from oto.slim import prove
from oto.slim.proof import large, reach


class Words(nn.Module):
    """A table, a product with it, and one with another weight."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 8, padding_idx=padding)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        h = h + self.down(torch.relu(self.up(h)))
        return nn.functional.linear(h, self.table.weight)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda model: None,
        lambda model: model.down.weight.data.zero_(),  # nothing arrives at ``up``
        lambda model: model.up.bias.data.fill_(-1e3),  # nor at either of them
        lambda model: model.table.weight.data.fill_(float("nan")),
    ],
)
def test_the_same_weights_are_reached(monkeypatch: pytest.MonkeyPatch, break_it: Callable[[Words], None]) -> None:
    torch.manual_seed(0)
    model = Words()
    break_it(model)
    wanted, ids = dict(model.named_parameters()), torch.randint(40, (2, 5))
    expected = reach._with_gradient(model, wanted, ids, None)
    monkeypatch.setattr(large, "LARGE", 32)
    assert reach._with_gradient(model, wanted, ids, None) == expected
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("padding, ids", [(None, [[3, 3]]), (3, [[3, 3]]), (-37, [[3, 3]]), (3, [[3, 4]])])
def test_a_row_for_padding_has_no_gradient(
    monkeypatch: pytest.MonkeyPatch, padding: int | None, ids: list[list[int]]
) -> None:
    model = nn.Embedding(40, 8, padding_idx=padding)
    with torch.no_grad():
        model.weight.normal_()
    wanted, given = dict(model.named_parameters()), torch.tensor(ids)
    expected = reach._with_gradient(model, wanted, given, None)
    monkeypatch.setattr(large, "LARGE", 32)
    assert reach._with_gradient(model, wanted, given, None) == expected


def test_no_gradient_of_its_size_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "LARGE", 32)
    model = Words()
    seen: list[str] = []
    for name, p in model.named_parameters():
        p.register_hook(lambda grad, name=name: None if grad is None else seen.append(name))
    assert "table.weight" in reach._with_gradient(model, dict(model.named_parameters()), torch.ones(1, 3).long(), None)
    assert sorted(seen) == ["down.bias", "up.bias"]


def test_entries_and_bits_are_compared_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong row of the last block is found, in memory and in the file."""
    for module, name in ((prove, "_BLOCK"), (artifact, "_BLOCK")):
        monkeypatch.setattr(module, name, 64)
    model = Words()
    oto = OTO(model, torch.randint(40, (2, 5)))
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet(tmp_path / "out")
    again = load_subnet(tmp_path / "out", Words())
    assert all(torch.equal(p, subnet.model.get_parameter(name)) for name, p in again.named_parameters())
    real = artifact.safetensors.torch.save_file

    def wrong(tensors: dict[str, Tensor], path: Path) -> None:
        bad = tensors["table.weight"].clone()
        bad[-1, -1] += 1
        real(tensors | {"table.weight": bad}, path)

    monkeypatch.setattr(artifact.safetensors.torch, "save_file", wrong)
    with pytest.raises(ArtifactError, match=r"reads back differently than it was written \(table.weight\)"):
        oto.construct_subnet(tmp_path / "other")


def test_a_wrong_entry_of_a_large_tensor_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "_BLOCK", 16)
    real = prove._same
    oto = OTO(Words(), torch.randint(40, (2, 5)))
    oto.random_set_zero_groups(0.5)
    calls: list[Tensor] = []

    def last_differs(a: Tensor, b: Tensor) -> bool | None:
        calls.append(a)
        return real(a, b) and len(calls) < 3

    monkeypatch.setattr(prove, "_same", last_differs)
    with pytest.raises(EmitterError, match="does not hold the kept entries"):
        oto.construct_subnet(emitter="module")
