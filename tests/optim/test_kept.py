"""`target_kept`: what each group keeps, said by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from oto import OTO
from oto.errors import SetupError, TargetError, UnknownParameterError
from oto.groups.node_group import NodeGroup, Slice
from oto.optim import Choice

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 40, 3),
        nn.BatchNorm2d(40),
        nn.ReLU(),
        nn.Conv2d(40, 80, 3),
        nn.BatchNorm2d(80),
        nn.ReLU(),
        nn.Conv2d(80, 60, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(60, 5),
    )


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()


def kept(found):
    return [found[f"{layer}.weight"] for layer in (0, 3, 6)]


@pytest.mark.parametrize("options", [{}, {"scope": "local"}, {"saliency": "magnitude"}, {"saliency": "hesso"}], ids=str)
def test_each_layer_is_as_wide_as_was_said_and_what_is_not_named_is_whole(options):
    model = net()
    oto = OTO(model, X)
    optimizer = oto.hesso(lr=1e-3, total_steps=30, target_kept={"0.weight": 0.8, "3.*": 0.4}, **options)
    train(model, optimizer, 30)
    assert [oto.construct_subnet().model[i].out_channels for i in (0, 3, 6)] == [32, 32, 60]
    assert optimizer.progress.cost == optimizer.progress.goal == 32 + 32 + 60


def test_a_walk_of_cric_ends_there_too():
    model = net()
    oto = OTO(model, X)
    optimizer = oto.hesso_cric(lr=1e-3, total_steps=60, sampling_steps=2, max_cycles=2, target_kept={"3.weight": 20})
    train(model, optimizer, 60)
    assert [oto.construct_subnet().model[i].out_channels for i in (0, 3, 6)] == [40, 20, 60]


@pytest.mark.parametrize(
    "asked, options, left",
    [
        ({"3.weight": 0.4, "6.weight": 7}, {}, [40, 32, 7]),
        ({"*": 0.25}, {}, [10, 20, 15]),
        ({"0.*": 0.3, "3.*": 0.3}, {"group_divisible": 8}, [16, 24, 60]),  # rounded up
        ({"3.*": 0.5, "3.weight": 0.6}, {}, None),
        ({"10.weight": 1.0, "0.weight": 0.5}, {}, [20, 80, 60]),  # an output is whole anyway
    ],
)
def test_shares_and_numbers(asked, options, left):
    oto = OTO(net(), X)
    if left is None:
        with pytest.raises(TargetError, match=r"'3\.\*' decides nothing"):
            oto.preview(target_kept=asked, **options)
    else:
        assert kept(oto.preview(target_kept=asked, **options).kept) == left


def test_the_name_of_a_group_means_that_group_alone():
    """Heads and their width lie in the same parameter; the names in `preview` tell them apart."""

    def groups():
        heads = (Slice("q.weight", 0, ()),)
        return [NodeGroup("q.weight", 8, heads, heads), NodeGroup("q.weight/1", 16, heads, heads)]

    def left(asked):
        return Choice.of(groups(), {"target_kept": asked}).least.tolist()

    assert left({"q.weight": 0.5}) == [4, 16]
    assert left({"q.weight/1": 0.5}) == [8, 8]
    assert left({"q.*": 0.5}) == [4, 8]


@pytest.mark.filterwarnings("ignore:layout=")  # that no config states it
def test_groups_of_a_tie_are_named_together():
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 4)) for _ in range(3)))
    oto = OTO(blocks, torch.randn(2, 4), layout="uniform")
    with pytest.raises(TargetError, match=r"'0\.0\.weight' decides nothing"):
        oto.preview(target_kept={"0.0.weight": 0.5})
    assert {oto.preview(target_kept={"?.0.weight": 0.5}).kept[f"{i}.0.weight"] for i in range(3)} == {6}


@pytest.mark.parametrize(
    "asked, kind, says",
    [
        ({"0.wieght": 0.5}, UnknownParameterError, "matches, '0.wieght'"),
        ({"10.weight": 0.5}, TargetError, "stays whole: 10.weight, because it is a dimension of an output"),
        ({"0.weight": 0}, TargetError, "something of every group is kept"),
        ({"0.weight": 1.5}, TargetError, "target_kept is 1.5"),
        ({"0.weight": True}, TargetError, "target_kept is True"),
        ({}, TargetError, r"such as target_kept=\{'layer3"),
        (0.5, TargetError, r"such as target_kept=\{'layer3"),
    ],
)
def test_what_means_nothing_is_refused(asked, kind, says):
    with pytest.raises(kind, match=says):
        OTO(net(), X).hesso(lr=0.1, total_steps=30, target_kept=asked)


def test_two_targets_and_a_floor_above_it_are_refused():
    oto = OTO(net(), X)
    with pytest.raises(TargetError, match="target_macs and target_kept are given"):
        oto.preview(target_kept={"*": 0.5}, target_macs=0.5)
    with pytest.raises(TargetError, match=r"leaves 4 of the 40 atoms of 0\.weight, min_kept 8\n.*ask for 0\.2 or more"):
        oto.preview(target_kept={"0.weight": 0.1}, min_kept=8)


def test_the_first_periods_bring_most_of_it_and_a_shrunk_model_goes_on():
    model = net()
    oto = OTO(model, X)
    options = {"lr": 1e-3, "start_pruning_step": 0, "pruning_steps": 10, "target_kept": {"0.*": 0.5, "3.*": 0.5}}
    optimizer = oto.hesso(**options)
    train(model, optimizer, 4)
    half_way = optimizer.num_pruned
    assert 30 < half_way < 60
    oto.shrink(optimizer)
    train(model, optimizer, 6)
    assert [oto.construct_subnet().model[i].out_channels for i in (0, 3, 6)] == [20, 40, 60]


def test_a_checkpoint_of_other_shares_is_told():
    model = net()
    oto = OTO(model, X)
    first = oto.hesso(lr=1e-3, start_pruning_step=0, pruning_steps=10, target_kept={"0.*": 0.5})
    train(model, first, 3)
    other = oto.hesso(lr=1e-3, start_pruning_step=0, pruning_steps=10, target_kept={"0.*": 0.6})
    with pytest.raises(SetupError, match=r"target_kept: \{'0\.\*': 0\.5\} in the checkpoint"):
        other.load_state_dict(first.state_dict())
    same = oto.hesso(lr=1e-3, start_pruning_step=0, pruning_steps=10, target_kept={"0.*": 0.5})
    same.load_state_dict(first.state_dict())
    assert np.isclose(same.progress.cost, first.progress.cost)
