"""Segments and atoms in one budget: the target is met, some of every run stay, and every optimizer erases."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from oto import OTO
from oto.errors import TargetError
from oto.optim.choice import Choice
from oto.optim.limits import staying_of
from oto.optim.saliency import Entries, compared


class Net(nn.Module):
    def __init__(self, blocks=4):
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(blocks))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def analyzed(mode="both", **options):
    torch.manual_seed(0)
    return OTO(Net(), torch.randn(2, 4), compress_mode=mode, **options)


def train(oto, optimizer, steps):
    x, y = torch.randn(64, 4), torch.randint(0, 3, (64,))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(oto.model(x), y).backward()
        optimizer.step()
    return oto.construct_subnet()


OPTIMIZERS = {
    "hesso": {},
    "hesso_cric": {"sampling_steps": 1, "max_cycles": 2},
    "hspg": {},
    "dhspg": {},
    "h2spg": {},
}


@pytest.mark.parametrize("mode", ["erase", "both"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_meets_a_target_with_segments(name, mode):
    oto = analyzed(mode)
    how = {"target_macs": 0.55, "lr": 0.05, "start_pruning_step": 2, "pruning_steps": 8}
    optimizer = getattr(oto, name)(**how, **OPTIMIZERS[name])
    subnet = train(oto, optimizer, 40)
    assert subnet.cost_after.macs <= 0.55 * subnet.cost_before.macs
    assert subnet.max_error <= 1e-10
    gone = oto.partition.erased(subnet.kept)
    assert len(gone) < 4, "one of the run stays"
    if mode == "erase":
        assert len(gone) == 3 or subnet.cost_after.macs >= 0.3 * subnet.cost_before.macs
        assert all(
            len(kept) == g.size
            for g in oto.node_groups
            if g.prunable and not g.segment
            for kept in [subnet.kept[g.name]]
        )


def test_a_segment_counts_as_one_group():
    oto = analyzed("erase")
    subnet = train(oto, oto.hesso(target_group_sparsity=0.5, lr=0.05, start_pruning_step=2, pruning_steps=8), 12)
    assert len(oto.partition.erased(subnet.kept)) == 2


@pytest.mark.parametrize(("min_depth", "stay"), [(1, 1), (3, 3), (0.5, 2), ({"blocks.*": 2}, 2)])
def test_some_of_a_run_stay_whatever_the_scores(min_depth, stay):
    oto = analyzed("erase", min_depth=min_depth)
    choice = Choice.of(oto.node_groups, {"target_group_sparsity": 1 - stay / 4}, costs=oto.costs, by_cost=0.0)
    for seed in range(10):
        scores = torch.rand(4, generator=torch.Generator().manual_seed(seed))
        gone = choice.select(scores, torch.ones(4, dtype=torch.bool))
        assert (~gone).sum() == stay and set(scores.argsort()[: 4 - stay].tolist()) == set(
            gone.nonzero()[:, 0].tolist()
        )


def test_the_best_of_a_set_stay():
    groups = [g for g in analyzed("erase", min_depth=2).node_groups if g.segment]
    scores, left = np.array([3.0, 1.0, 2.0, 5.0]), np.array([True, True, True, False])
    assert staying_of(groups, scores, left).tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("asked", [{"target_macs": 0.1}, {"target_group_sparsity": 0.75}, {"target_params": 0.2}])
def test_a_target_that_segments_that_stay_do_not_allow_is_refused(asked):
    with pytest.raises(TargetError, match=r"are left|may go"):
        analyzed("erase", min_depth=3).hesso(lr=0.1, start_pruning_step=1, pruning_steps=5, **asked)
    assert analyzed("erase", min_depth=3).hesso(
        lr=0.1, start_pruning_step=1, pruning_steps=5, target_group_sparsity=0.25
    )


def test_channels_and_segments_share_a_budget():
    """Where a whole branch matters little it goes; where only a few of its channels do, these stay."""
    oto = analyzed()
    choice = Choice.of(oto.node_groups, {"target_macs": 0.6}, costs=oto.costs)
    names = [g.name for g in choice.groups]
    scores = torch.cat([torch.full((g.size,), 10.0 if g.segment else 0.2) for g in choice.groups])
    scores[sum(choice.sizes[: names.index("blocks.1")])] = 1e-3
    kept = choice.counts(~choice.select(scores, torch.ones(len(scores), dtype=torch.bool)))
    assert not kept["blocks.1"] and kept["blocks.0"] and kept["blocks.2"]
    assert kept["blocks.1.0.weight"] == 12, "what costs nothing any more is left alone"
    assert any(kept[group.name] < group.size for group in choice.groups if not group.segment)


def test_segments_are_compared_with_each_other():
    weight = [torch.ones(1, 2)]
    entries = [Entries([torch.ones(3, 2)], []), *(Entries(weight, [], segment=True) for _ in range(2))]
    assert compared(entries) == [3, 2]


def test_what_lies_in_a_segment_that_has_gone_costs_nothing_and_needs_no_gradient():
    choice = analyzed().hesso(lr=0.05, target_macs=0.4, total_steps=10).choice
    left = torch.ones(sum(choice.sizes), dtype=torch.bool)
    assert choice.costing(left).all()
    of = dict(zip((group.name for group in choice.groups), left.split(list(choice.sizes)), strict=True))
    gone = next(group.name for group in choice.groups if group.segment and "blocks.1" in group.name)
    of[gone].fill_(False)
    costing = choice.costing(left).split(list(choice.sizes))
    assert {name for name, own in zip(of, costing, strict=True) if not own.all()} == {gone, "blocks.1.0.weight"}


def test_what_knowledge_says_of_a_segment_is_the_loss_without_it():
    oto = analyzed("erase")
    x = torch.randn(8, 4)

    def loss(model, batch):
        return model(batch).square().mean()

    full = float(loss(oto.model, x).detach())
    rise = {m.groups[0]: m.rise for m in oto.mark_unprunable_by_knowledge(batches=[x], loss=loss).found}
    for group in (g for g in oto.node_groups if g.segment):
        without = copy.deepcopy(oto.model)
        group.zero_(dict(without.named_parameters()), torch.tensor([0]))
        assert rise[group.name] == pytest.approx(float(loss(without, x).detach()) - full, rel=1e-4) != 0
