"""The replay proves the analysis where no slim model can be had, so it must notice when the analysis is wrong."""

from __future__ import annotations

from unittest import mock

import torch
from torch import nn

from oto import OTO
from oto.slim.proof.compare import relative_error
from oto.slim.proof.run import run
from oto.slim.pruned_shapes import read_zeros

from . import replay as module
from .replay import replay


class Loop(nn.Module):
    """As often as a value says; torch.export cannot follow it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.turn, self.down = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = torch.relu(self.up(x))
        for _ in range(1 + int(x.abs().max().item() > 0)):
            h = torch.relu(self.turn(h.view(len(x), 16)))
        return self.down(h)


def half_zeroed():
    model, x = Loop().double(), torch.randn(2, 4, dtype=torch.float64)
    OTO(model, x).random_set_zero_groups(0.5)
    return model, x


def test_thinner_tensors_give_what_the_zeroed_model_gives():
    model, x = half_zeroed()
    assert relative_error(run(model, x), replay(model, x)) < 1e-12


def test_a_removed_entry_that_is_not_zero_is_noticed():
    model, x = half_zeroed()

    def one_less(groups, model):
        return {name: kept[1:] for name, kept in read_zeros(groups, model).items()}

    with mock.patch.object(module, "read_zeros", one_less):
        assert relative_error(run(model, x), replay(model, x)) > 1e-3
