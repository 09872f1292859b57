"""A class whose path is decided by data: its decisions are those of the analysis, and nothing else is computed."""

import torch
import torch.nn.functional as F
from torch import nn

from oto import OTO
from oto.slim.own_class import at_counts
from oto.trace import recorder

aten = torch.ops.aten


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


def test_at_other_counts_it_decides_as_when_it_was_analyzed():
    model, x = Spoken(), torch.ones(1, 4)
    assert model(x).shape == (1, 2, 5)  # 8 units of 4
    analysis = OTO(model, x)._analysis
    with torch.no_grad():
        model.into.weight[:3] = 0
    assert model(x).shape == (1, 2, 3)  # 5 units
    (name,) = [group.name for group in analysis.groups if group.prunable]
    kept = {name: torch.arange(3, 8).numpy()}
    own, found = at_counts(model, analysis.partition, analysis.groups, x, analysis.form.own, kept)
    assert not own.whole and list(found[name]) == [3, 4, 5, 6, 7]


def test_tries_compute_no_products(monkeypatch):
    made = []
    shape = recorder.result_of

    def result_of(op, *args, **kwargs):
        result = shape(op, *args, **kwargs)
        if op is aten.linear.default and kwargs.get("zero"):
            made.append(result is not None)
        return result

    monkeypatch.setattr(recorder, "result_of", result_of)
    oto = OTO(Spoken(), torch.ones(1, 4))
    assert oto.partition.found.graph.mode == "real"
    assert len(made) >= 2 * 4 and all(made)  # two products in the run of the full model and in each of three tries


def test_a_class_that_needs_the_numbers_has_them_computed(monkeypatch):
    def result_of(op, *args, zero=False, **kwargs):
        if zero:
            raise RuntimeError("an operator that refuses zeros")
        return shape(op, *args, **kwargs)

    shape = recorder.result_of
    monkeypatch.setattr(recorder, "result_of", result_of)
    oto = OTO(Spoken(), torch.ones(1, 4))
    assert any(group.prunable for group in oto.node_groups)
