"""HESSO-CRIC: what a walk to zero shows, that it ends, and that nothing is lost on the way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from oto import OTO
from oto.errors import NoGradientError, SetupError, TargetError
from oto.optim import HESSOCRIC

from .toy import assert_same, backward, count_zeros, groups, net, train

OPTIONS = {
    "start_pruning_step": 2,
    "pruning_steps": 4,
    "sampling_steps": 3,
    "target_group_sparsity": 0.5,
    "lr": 0.1,
}


def cric(model, **options):
    return HESSOCRIC(model.named_parameters(), groups(), **(OPTIONS | options))


def last_step(optimizer):
    """The number of steps after which everything is at zero, at the latest."""
    return optimizer.schedule.end


# What it is for ------------------------------------------------------------------------------------------------------


def deceptive():
    """One hidden unit does all the work; it is small, and at its optimum it has no gradient. Seven idle ones are large.

    The idle units are a little off theirs, so every local score takes them for more important.
    """
    model = nn.Sequential(nn.Linear(2, 8, bias=False), nn.ReLU(), nn.Linear(8, 1)).double()
    generator = torch.Generator().manual_seed(0)
    x, y = batch()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(8, 2, generator=generator, dtype=torch.float64))
        model[2].weight.copy_(1e-3 * torch.randn(1, 8, generator=generator, dtype=torch.float64))
        model[2].bias.zero_()
        model[0].weight[3] = torch.tensor([0.1, 0.0])
        model[2].weight[0, 3] = 0.0
        works = (x @ model[0].weight[3:4].T).relu()
        model[2].weight[0, 3] = ((y - model(x)) * works).sum() / works.square().sum()  # least squares
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 2, generator=generator, dtype=torch.float64)
    return x, x[:, :1].relu()


def r_squared(model):
    x, y = batch()
    with torch.no_grad():
        return float(1 - (model(x) - y).square().sum() / (y - y.mean()).square().sum())


def trained(make):
    model = deceptive()
    optimizer = make(OTO(model, torch.zeros(1, 2, dtype=torch.float64)))
    for _ in range(60):
        x, y = batch()
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    assert int((model[0].weight == 0).all(1).sum()) == 4
    return model


@pytest.mark.parametrize("saliency", ["taylor_second_order", "taylor_first_order", "magnitude"])
def test_an_indispensable_group_that_looks_redundant_is_kept(saliency):
    # a learning rate at which nothing that is lost can be learnt again
    common = {"lr": 1e-6, "target_group_sparsity": 0.5, "total_steps": 60}
    assert r_squared(deceptive()) > 0.999
    plain = trained(lambda oto: oto.hesso(**common, saliency=saliency))
    assert (plain[0].weight[3] == 0).all()  # what the score says
    assert r_squared(plain) < 0
    corrected = trained(lambda oto: oto.hesso_cric(**common, sampling_steps=5, max_cycles=4, sensitivity=0.0))
    assert (corrected[0].weight[3] != 0).any()
    assert r_squared(corrected) > 0.999


# The walk ------------------------------------------------------------------------------------------------------------


def test_the_violating_set_walks_to_zero_and_comes_back():
    model = net().double()
    optimizer = cric(model, lr=0.0, sensitivity=0.0, max_cycles=2)
    before = copy.deepcopy(model.state_dict())
    walked, at_rest = [], 0
    for n in range(last_step(optimizer)):
        backward(model, n)
        optimizer.step()
        rows = optimizer.redundant_groups.get("0.weight")
        left = (
            None if rows is None or not len(rows) else model[0].weight.detach()[rows[0]] / before["0.weight"][rows[0]]
        )
        walked.append(None if left is None else round(float(left.mean()), 9))
        if optimizer.cycle and not optimizer.redundant_groups and not optimizer.walk["over"]:
            at_rest += 1
            for name, p in model.named_parameters():  # with a rate of 0 everything is as it was
                assert torch.equal(p, before[name]), name
        if optimizer.walk["over"]:
            break
    first = next(i for i, left in enumerate(walked) if left is not None)
    assert walked[first : first + 3] == [round(2 / 3, 9), round(1 / 3, 9), None]
    assert optimizer.walk["saved"] == [] and at_rest


@pytest.mark.parametrize("sensitivity", [0.0, 1.0])
def test_probes_and_walks_leave_the_weights_as_they_were(sensitivity):
    model = net()
    optimizer = cric(model, sensitivity=sensitivity, max_cycles=2)
    kept = []
    for n in range(last_step(optimizer)):
        backward(model, n)
        optimizer.step()
        if n + 1 >= optimizer.first_step and not optimizer.redundant_groups and not optimizer.progress.over:
            kept.append([p.detach().clone() for p in model.parameters()])
        if optimizer.walk["over"]:
            break
    assert len(kept) >= 3
    assert all(torch.equal(p, first) for weights in kept for p, first in zip(weights, kept[0], strict=True))


def test_every_cycle_walks_groups_that_were_never_walked_and_the_cycles_end():
    model = net()
    optimizer = cric(model, max_cycles=50, sampling_steps=2)
    seen, sets = set(), []
    for n in range(last_step(optimizer)):
        backward(model, n)
        cycle = optimizer.cycle
        optimizer.step()
        if optimizer.cycle > cycle:
            new = {(name, int(atom)) for name, atoms in optimizer.redundant_groups.items() for atom in atoms}
            assert new and not new & seen
            seen |= new
            sets.append(new)
    assert optimizer.walk["over"] and 1 <= len(sets) <= 14
    assert len(sets[0]) == 7  # as many as are to go
    assert count_zeros(model) == 7
    assert optimizer.progress.over


def test_it_ends_at_the_latest_after_the_greatest_number_of_cycles():
    model = net()
    optimizer = cric(model, max_cycles=1)
    probes = 1 + 3
    assert last_step(optimizer) == 2 + probes + 3 + 4
    train(model, optimizer, range(last_step(optimizer)))
    assert optimizer.cycle == 1 and count_zeros(model) == 7


def test_only_the_entries_of_the_walk_are_kept_aside():
    model = net()
    optimizer = cric(model, sensitivity=0.0)
    total = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("8."))
    largest = 0
    for n in range(last_step(optimizer)):
        backward(model, n)
        optimizer.step()
        largest = max(largest, sum(saved.numel() for saved in optimizer.walk["saved"]))
    assert 0 < largest < 0.75 * total  # 7 of 14 groups; those of the second convolution are larger


def test_probes_find_the_layer_that_the_loss_hangs_on():
    model = deceptive()
    wide = nn.Sequential(model[0], model[1], nn.Linear(8, 8).double(), nn.ReLU(), nn.Linear(8, 1).double())
    with torch.no_grad():
        wide[2].weight.mul_(1e-4)
        wide[2].bias.fill_(1.0)  # what comes out of the first layer hardly matters
    oto = OTO(wide, torch.zeros(1, 2, dtype=torch.float64))
    optimizer = oto.hesso_cric(
        lr=0.0, target_group_sparsity=0.5, start_pruning_step=1, pruning_steps=2, sampling_steps=2, max_cycles=1
    )
    before = copy.deepcopy(wide.state_dict())
    for _ in range(1 + 1 + 3):
        x, y = batch()
        optimizer.zero_grad()
        nn.functional.mse_loss(wide(x), y).backward()
        optimizer.step()
    first, second = optimizer.walk["sensitivity"].tolist()
    assert second > 100 * first
    assert all(torch.equal(p, before[name]) for name, p in wide.named_parameters())


# What every optimizer promises ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", range(0, 16, 2))
def test_resuming_in_the_middle_of_a_cycle_gives_the_same_trajectory(tmp_path, stop):
    through, model = net(), net()
    options = {"variant": "adamw", "lr": 0.01, "max_cycles": 2}
    whole, part = cric(through, **options), cric(model, **options)
    end = last_step(whole) + 2
    train(through, whole, range(end))
    train(model, part, range(stop))
    torch.save({"model": model.state_dict(), "optimizer": part.state_dict()}, tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    fresh = net()
    fresh.load_state_dict(saved["model"])
    resumed = cric(fresh, **options)
    resumed.load_state_dict(saved["optimizer"])
    train(fresh, resumed, range(stop, end))
    assert_same(fresh, through)
    assert count_zeros(fresh) == 7


def test_a_saved_state_does_not_change_as_the_walk_goes_on():
    model = net()
    optimizer = cric(model)
    train(model, optimizer, range(10))
    walk = optimizer.state_dict()["param_groups"][0]["oto_walk"]
    before = copy.deepcopy(walk)
    train(model, optimizer, range(10, 14))
    for name, value in before.items():
        found = walk[name]
        assert (
            torch.equal(found, value)
            if isinstance(value, torch.Tensor)
            else len(found) == len(value)
            if isinstance(value, list)
            else found == value
        ), name


def test_a_target_in_macs_is_met():
    model = net()
    oto = OTO(model, torch.randn(1, 3, 8, 8))
    optimizer = oto.hesso_cric(
        target_macs=0.4, lr=0.1, start_pruning_step=2, pruning_steps=4, sampling_steps=2, max_cycles=3
    )
    train(model, optimizer, range(last_step(optimizer)))
    subnet = oto.construct_subnet()
    assert subnet.cost_after.macs <= 0.4 * subnet.cost_before.macs


def test_without_a_target_every_step_is_the_wrapped_one():
    ours, theirs = net(), net()
    train(ours, cric(ours, target_group_sparsity=0.0, sampling_steps=1, max_cycles=1), range(12))
    train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), range(12))
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"saliency": "magnitude"}, "no criterion of saliency looks at gradients"),
        ({"pruning_periods": 5}, "cannot be cut into pruning_periods=5"),
        ({"max_cycles": 0}, "at least one cycle"),
        ({"total_steps": 20}, "training ends after total_steps=20"),
        ({"sampling_steps": 0}, "sampling_steps is 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(TargetError, match=message):
        cric(net(), **options)


def test_a_share_of_a_few_steps_is_a_walk_of_one_step():
    short = {"total_steps": 24, "start_pruning_step": 1, "max_cycles": 4}
    model = net()
    options = {key: value for key, value in (OPTIONS | short).items() if key != "sampling_steps"}
    assert HESSOCRIC(model.named_parameters(), groups(), **options).sampling_steps == 1
    assert cric(net(), **short, sampling_steps=0.02).schedule.end == 1 + 4 + 4 + 4


def test_what_does_not_fit_says_what_would():
    with pytest.raises(TargetError, match=r"from step 18 to step 21.*4 walks of 3 steps[^$]*max_cycles=2 or fewer$"):
        cric(net(), total_steps=17, max_cycles=4)
    assert cric(net(), total_steps=17, max_cycles=2).schedule.end <= 17
    with pytest.raises(TargetError, match=r"start_pruning_step=1 or less$"):
        cric(net(), total_steps=12, max_cycles=1)
    assert cric(net(), total_steps=12, max_cycles=1, start_pruning_step=1).schedule.end == 12


def test_a_checkpoint_of_hesso_is_refused():
    from .toy import hesso

    other = hesso(net())
    train(net(), other, range(1))
    model = net()
    part = hesso(model)
    train(model, part, range(4))
    with pytest.raises(SetupError, match="optimizer: HESSO in the checkpoint, HESSOCRIC here"):
        cric(net()).load_state_dict(part.state_dict())


def test_no_walk_begins_without_gradients():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = OTO(model, torch.randn(2, 3)).hesso_cric(
        lr=0.1, target_macs=0.5, start_pruning_step=2, pruning_steps=4, sampling_steps=2
    )
    model(torch.randn(4, 3)).sum().backward()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    optimizer.step()
    with pytest.raises(NoGradientError, match="nothing was chosen"):
        for _ in range(3):
            optimizer.step()
    assert not optimizer.walk["cycle"]
