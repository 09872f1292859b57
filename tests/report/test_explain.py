"""The explanation names what stays whole, where and why."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

from oto import OTO
from oto.errors import TargetError


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
    (softmax,) = [w for w in found.whole if w.group == "gate.weight"]
    assert softmax.parameters == (("gate.weight", 0), ("gate.bias", 0)) and softmax.size == 8
    assert softmax.operator == "aten.softmax.int" and softmax.module == "" and softmax.source.startswith(__file__)
    printed = str(found)
    assert "2 prunable node groups" in printed and "softmax normalizes over it" in printed and softmax.source in printed
    assert json.loads(json.dumps(found.to_dict()))["prunable"] == 2


def test_every_group_is_prunable_or_explained():
    oto = OTO(Net(), torch.randn(2, 8))
    found = oto.explain()
    assert {w.group for w in found.whole} == {g.name for g in oto.node_groups if not g.prunable}
    idle = [w for w in found.whole if w.reason == "the traced forward never uses it"]
    assert all(w.operator and w.source for w in found.whole if w not in idle) and len(idle) == 3


def test_what_was_marked_says_so():
    oto = OTO(Net(), torch.randn(2, 8))
    oto.mark_unprunable_by_param_names(["blocks.0.weight"])
    assert "it was marked unprunable" in {w.reason for w in oto.explain().whole}


def test_repeated_blocks_are_one_row():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            for block in self.blocks:
                x = x * block(x).softmax(-1)
            return self.down(torch.relu(self.up(x)))

    rows = str(OTO(Deep(), torch.randn(2, 8)).explain()).splitlines()
    assert sum("softmax" in row for row in rows) == 1 and any("blocks.*.weight" in row for row in rows)


def test_coverage_counts_calls():
    coverage = OTO(Net(), torch.randn(2, 8)).coverage()
    assert coverage["rule"]["aten.linear.default"] == 5 and coverage["unknown"] == {}


def test_an_example_that_had_to_be_run_is_said():
    class Branch(Net):
        def forward(self, x):
            return super().forward(x if x.sum().item() > 0 else -x)

    assert "path that this example took" in str(OTO(Branch(), torch.ones(2, 8)).explain())


class Adapted(nn.Module):
    """A frozen layer with an adapter beside it."""

    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(8, 32), nn.Linear(8, 4, bias=False), nn.Linear(4, 32, bias=False)
        self.base.requires_grad_(False)
        self.out = nn.Linear(32, 2)

    def forward(self, x):
        return self.out(torch.relu(self.base(x) + self.up(self.down(x))))


@pytest.mark.filterwarnings("ignore:HESSO chooses by gradients")
def test_what_is_frozen_is_told_with_a_way_out_here_and_by_targets():
    oto = OTO(Adapted(), torch.randn(2, 8))
    remedy = r"frozen[^$]*to fix  set requires_grad_\(True\)[^$]*prune_frozen=True\)\.lhspg[^$]*docs/adapters\.md"
    assert re.search(remedy, str(oto.explain()))
    held = r"frozen  32 atoms of 1 node groups stay whole[^$]*base\.weight, base\.bias[^$]*"
    with pytest.raises(TargetError, match=held + remedy[6:]):
        oto.hesso(lr=0.1, total_steps=20, target_params=0.3)
    assert oto.hesso(lr=0.1, total_steps=20, target_params=0.9).num_atoms == 4
    free = OTO(Adapted(), torch.randn(2, 8), prune_frozen=True)
    assert free.hesso(lr=0.1, total_steps=20, target_params=0.3).num_atoms == 36
    assert "to fix  outputs keep" in str(free.explain())
