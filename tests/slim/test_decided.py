"""A class whose path is decided by data: asked again at other counts, it decides as it did when it was analyzed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oto import OTO
from oto.slim.own_class import at_counts


class Spoken(nn.Module):
    """How long its output is follows from values."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(4, 8), nn.Linear(8, 2)
        nn.init.ones_(self.into.weight), nn.init.zeros_(self.into.bias)

    def forward(self, x):
        hidden = F.relu(self.into(x))
        steps = torch.arange(int(hidden.sum()) % 5 + 3, dtype=x.dtype)
        return self.out(hidden)[:, :, None] * steps


class Routed(nn.Module):
    """Each expert runs if a token chooses it."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(3))

    def forward(self, x):
        chosen = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().flatten()
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]))
        return out


def zeroed(model, oto):
    """What the class needs once the first three atoms of each group are zero, and the atoms that it keeps."""
    analysis = oto._analysis
    groups = [group for group in analysis.groups if group.prunable]
    kept = {group.name: torch.arange(3, group.size).numpy() for group in groups}
    found = at_counts(model, analysis.partition, analysis.groups, analysis.example, analysis.form.own, kept)
    return kept, *found


def test_a_length_that_the_weights_decide():
    model, x = Spoken(), torch.ones(1, 4)
    assert model(x).shape == (1, 2, 5)  # 8 units of 4
    oto = OTO(model, x)
    with torch.no_grad():
        model.into.weight[:3] = 0
    assert model(x).shape == (1, 2, 3)  # 5 units
    kept, own, found = zeroed(model, oto)
    assert not own.whole and {name: list(atoms) for name, atoms in found.items()} == {
        name: list(atoms) for name, atoms in kept.items()
    }


@pytest.mark.parametrize("then", [0, 1])
def test_an_expert_that_no_token_chooses_once_the_router_has_learned(then):
    torch.manual_seed(0)
    model, x = Routed(), torch.randn(16, 4)
    assert len(model.router(x).argmax(-1).unique()) > 1
    oto = OTO(model, x)
    with torch.no_grad():  # as if it had learned to send all tokens to one
        model.router.bias[then] = 100.0
        for expert in model.experts:
            expert[0].weight[:3] = expert[0].bias[:3] = 0
    subnet = oto.construct_subnet()
    assert subnet.emitter == "module"
    assert all(expert[0].out_features == 5 for i, expert in enumerate(subnet.model.experts) if i == then)
    kept, own, found = zeroed(model, oto)
    assert not own.whole and all(list(found[name]) == list(atoms) for name, atoms in kept.items())
