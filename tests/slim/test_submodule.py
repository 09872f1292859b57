"""The smallest part that cannot be told its sizes, as a graph of its own with both modes."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oto import OTO
from oto.errors import EmitterError, GraphInputError
from oto.slim.plan import read_zeros
from oto.slim.submodule import Part, emit_part, entries_below

WIDTH = 16
EXACT = 1e-12  # float64, sums of at most 48 terms


class Block(nn.Module):
    """Heads by numbers in the code, dropout in two places, statistics that move, and weights that are read twice."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.dropout, self.p = nn.BatchNorm1d(WIDTH), nn.Dropout(p), p
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        b, t = x.shape[:2]
        q, k, v = self.qkv(x).view(b, t, 3, 4, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=self.p if self.training else 0.0)
        x = x + self.dropout(self.out(y.transpose(1, 2).reshape(b, t, 16)))
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        hidden = self.up(x).relu()
        return x + self.dropout(self.down(hidden)) * scale, hidden if self.training else hidden * 1


class Net(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.block, self.head = nn.Linear(5, WIDTH), Block(p), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.into(x), scale=0.5)[0])


def made(p: float = 0.0, train: bool = True) -> tuple[Block, Part, Any]:
    """The full block, its slim form, and the entries that are left of the width around it."""
    full, part, left = copy.deepcopy(_made(p, train))
    return full, part, left


@functools.cache
def _made(p: float, train: bool) -> tuple[Block, Part, Any]:
    torch.manual_seed(1)
    net = Net(p).double().eval()
    with torch.no_grad():
        net.block.norm.running_mean.normal_()
        net.block.norm.running_var.uniform_(0.5, 2)
    oto = OTO(net, torch.randn(2, 6, 5).double(), everything=True)
    oto.random_set_zero_groups(0.5)
    kept = read_zeros(oto.node_groups, net)
    (around,) = entries_below("into", oto.partition, kept)["weight"][:1]
    assert 0 < around.sum() < WIDTH
    x = torch.randn(2, 6, WIDTH).double()
    whole = np.ones(2, bool), np.ones(6, bool)
    part = emit_part(
        net.block, (x,), {"scale": 0.5}, entries_below("block", oto.partition, kept), [[*whole, around]], train
    )
    return net.block, part, torch.from_numpy(np.flatnonzero(around))


def given(left: Tensor, batch: int = 2, length: int = 6) -> Tensor:
    """What the full block takes: zero where entries are gone."""
    x = torch.zeros(batch, length, WIDTH).double()
    x[..., left] = torch.randn(batch, length, len(left)).double()
    return x


@pytest.mark.parametrize(("batch", "length"), [(2, 6), (1, 9), (5, 3)])
def test_it_computes_what_the_full_one_does_at_any_length(batch: int, length: int) -> None:
    full, part, left = made()
    x = given(left, batch, length)
    y, hidden = full.eval()(x, scale=0.5)
    y_slim, hidden_slim = part.model(x[..., left], scale=0.5)
    assert (y[..., left] - y_slim).abs().max() < EXACT and not y[..., _gone(left)].any()
    inner = torch.from_numpy(np.flatnonzero(part.outputs[1][2]))
    assert len(inner) < 24 and (hidden[..., inner] - hidden_slim).abs().max() < EXACT
    assert sum(p.numel() for p in part.model.parameters()) < sum(p.numel() for p in full.parameters()) / 2


def _gone(left: Tensor) -> Tensor:
    return torch.tensor(sorted(set(range(WIDTH)) - set(left.tolist())))


def test_its_outputs_say_what_is_left_of_them() -> None:
    _, part, left = made()
    (_, _, last), (_, _, hidden) = part.outputs
    assert np.flatnonzero(last).tolist() == left.tolist() and 0 < hidden.sum() < 24
    assert all(mask.all() for masks in part.outputs for mask in masks[:2])


def test_train_mode_moves_statistics_and_gives_the_gradients_of_what_is_left() -> None:
    full, part, left = made()
    slim = part.model.train()
    full.train()
    x = given(left)
    x_slim = x[..., left].clone().requires_grad_()
    x.requires_grad_()
    full(x, scale=0.5)[0].square().sum().backward()
    slim(x_slim, scale=0.5)[0].square().sum().backward()
    assert x.grad is not None and (x.grad[..., left] - x_slim.grad).abs().max() < 1e-9
    assert (full.norm.running_mean[left] - slim.norm.running_mean).abs().max() < EXACT
    assert full.norm.num_batches_tracked == slim.norm.num_batches_tracked == 1
    assert (full.out.bias.grad[left] - slim.out.bias.grad).abs().max() < 1e-9
    before = slim.norm.running_mean.clone()
    slim.eval()(x[..., left].detach(), scale=0.5)
    assert torch.equal(slim.norm.running_mean, before)


def test_dropout_is_drawn_in_train_mode_alone() -> None:
    _, part, left = made(p=0.5)
    slim, x = part.model, given(left)[..., left]
    assert torch.equal(slim(x, scale=0.5)[0], slim(x, scale=0.5)[0])
    slim.train()
    assert not torch.equal(slim(x, scale=0.5)[0], slim(x, scale=0.5)[0])
    ops = {str(n.target): n.args for n in slim._in_train.graph.nodes if "dropout" in str(n.target)}
    assert ops["aten.dropout.default"][1:] == (0.5, True)
    (attention,) = (n for n in slim._in_train.graph.nodes if "attention" in str(n.target))
    assert 0.5 in [*attention.args, *attention.kwargs.values()]


def test_both_modes_share_every_tensor_after_moves_copies_and_pickles() -> None:
    _, part, left = made()
    x = given(left)[..., left]
    for slim in (part.model, copy.deepcopy(part.model), pickle.loads(pickle.dumps(part.model))):
        slim.float().double()
        with torch.no_grad():
            slim.down.weight.mul_(2)
        slim.norm.running_mean = slim.norm.running_mean + 1  # a buffer that is replaced
        y = slim.train()(x, scale=0.5)[0]
        assert slim._in_train.norm is slim.norm and slim.norm.num_batches_tracked == 1
        again = slim.eval()(x, scale=0.5)[0]
        assert not torch.equal(y, again)
        slim.norm.num_batches_tracked.zero_()
    assert {n for n, _ in part.model.named_parameters()} == {n for n, _ in Block(0.0).named_parameters()}
    assert set(part.model.state_dict()) == set(Block(0.0).state_dict())


def test_it_takes_its_place_in_the_model() -> None:
    _, part, left = made()
    outer = nn.ModuleDict({"block": part.model})
    outer.train()
    outer.eval()
    assert isinstance(part.model.qkv, nn.Linear) and part.model.qkv.in_features == len(left)
    with pytest.raises(GraphInputError, match=rf"x\.size\(\)\[2\] == {len(left)}"):
        part.model(given(left), scale=0.5)
    with pytest.raises(GraphInputError, match=r"scale is 1\.0"):
        part.model(given(left)[..., left], scale=1.0)


def test_entries_that_do_not_go_together_are_refused() -> None:
    net = Net().double()
    entries = {name: [np.ones(n, bool) for n in p.shape] for name, p in net.block.named_parameters()}
    entries["up.bias"][0][3] = False  # but not its row
    with pytest.raises(EmitterError, match=r"ties dimension 0 of up\."):
        emit_part(net.block, (torch.randn(2, 6, WIDTH).double(),), {}, entries)


def test_without_train_mode_it_says_so() -> None:
    _, part, _ = made(train=False)
    with pytest.raises(Exception, match="no dropout"):
        part.model.train()
