"""The explanation names what stays whole, where and why."""

from __future__ import annotations

import json

import torch
from torch import nn

from oto import OTO


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.gate = nn.Linear(8, 8)
        self.out = nn.Linear(8, 2)
        self.spare = nn.Linear(4, 4)

    def forward(self, x):
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.out(x * self.gate(x).softmax(-1))


def test_reasons_places_and_lines():
    found = OTO(Net(), torch.randn(2, 8)).explain()
    assert found.prunable == 2 and found.atoms == 16
    assert set(found.unreached) == {"spare.weight", "spare.bias"}
    (softmax,) = [w for w in found.whole if "softmax" in w.reason]
    assert __file__ in softmax.reason and "gate.weight" in softmax.groups
    printed = str(found)
    assert "2 prunable node groups" in printed and "softmax normalizes over it" in printed
    assert json.loads(json.dumps(found.to_dict()))["prunable"] == 2


def test_coverage_counts_calls():
    coverage = OTO(Net(), torch.randn(2, 8)).coverage()
    assert coverage["rule"]["aten.linear.default"] == 5 and coverage["unknown"] == {}


def test_an_example_that_had_to_be_run_is_said():
    class Branch(Net):
        def forward(self, x):
            return super().forward(x if x.sum().item() > 0 else -x)

    assert "path that this example took" in str(OTO(Branch(), torch.ones(2, 8)).explain())
