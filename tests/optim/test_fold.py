"""What stays takes over while training."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

import oto.optim.fold
from oto import HESSO, OTO
from oto.errors import DummyInputError, OptionError, SetupError, ShrinkError

WHEN = {"start_pruning_step": 1, "pruning_steps": 8, "pruning_periods": 2, "lr": 0.05}
OTHERS = {
    "hesso": {},
    "hesso_cric": {"sampling_steps": 2, "max_cycles": 2},
    "hspg": {"lmbda": 0.01, "half_space_step": 2},
    "dhspg": {"half_space_step": 4, "lmbda": 1e-6, "lmbda_amplify": 1.0, "epsilon": 0.0},
}


class Net(nn.Module):
    """A convolution with a norm, and a layer with a bias."""

    def __init__(self, norm=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(12) if norm else nn.Identity()
        self.next = nn.Conv2d(12, 8, 3, bias=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.next(torch.relu(self.norm(self.conv(x)))))
        return self.head(x.mean((2, 3)))


def made(norm=True, dtype=torch.float32):
    torch.manual_seed(0)
    model = Net(norm).to(dtype)
    x, y = torch.randn(48, 3, 6, 6, dtype=dtype), torch.randint(5, (48,))
    with torch.no_grad():
        model(x)  # norms that count
    return model, x, y


def train(model, optimizer, x, y, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


@pytest.mark.parametrize("steps", [1, 4])
def test_the_network_stays_what_it_is_all_along(monkeypatch, steps):
    """Half of the channels are copies of the others, so what goes is fitted exactly, at each step of the way."""
    monkeypatch.setattr(oto.optim.fold, "RIDGE", 0.0)
    model, x, _ = made(dtype=torch.float64)
    model.norm.eps = 1e-12  # in training it undoes what scales the convolution
    with torch.no_grad():
        for tensor in (model.conv.weight, model.norm.weight, model.norm.bias, model.norm.running_mean):
            tensor[6:] = tensor[:6]
        model.norm.running_var[6:] = model.norm.running_var[:6]
        model.norm.weight[6:] *= 0.5
        model.norm.bias[6:] *= 0.5
    before = model(x)
    optimizer = OTO(model, x[:1]).hesso(
        target_kept={"conv.weight": 6},
        compensate="affine",
        batches=[x],
        saliency="magnitude",
        **WHEN | {"start_pruning_step": 0, "pruning_steps": steps, "pruning_periods": 1, "lr": 0.0},
    )
    for _ in range(steps):
        model(x).sum().backward()
        optimizer.step()
        torch.testing.assert_close(model(x), before, rtol=1e-7, atol=1e-7)
    assert int((model.conv.weight == 0).flatten(1).all(1).sum()) == 6
    assert "oto_fold" not in optimizer.param_groups[0]


def test_it_is_the_least_squares_fit(monkeypatch):
    """Against brute force, in float64: of a linear reader with a bias."""
    monkeypatch.setattr(oto.optim.fold, "RIDGE", 0.0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(64, 4, dtype=torch.float64)
    hidden = torch.tanh(model[0](x)).detach().numpy()
    weight, bias = (p.detach().numpy().copy() for p in model[2].parameters())
    optimizer = OTO(model, x[:1]).hesso(
        target_kept={"0.weight": 4},
        compensate="affine",
        batches=[x[:40], x[40:]],
        saliency="magnitude",
        **WHEN | {"start_pruning_step": 0, "pruning_steps": 3, "pruning_periods": 1, "lr": 0.0},
    )
    for _ in range(3):
        model(x).sum().backward()
        optimizer.step()
    (gone,) = (atoms.numpy() for atoms in optimizer.pruned_groups.values())
    stay = np.setdiff1d(np.arange(6), gone)
    fit, *_ = np.linalg.lstsq(np.c_[hidden[:, stay], np.ones(64)], hidden[:, gone], rcond=None)
    np.testing.assert_allclose(
        model[2].weight.detach().numpy()[:, stay], weight[:, stay] + weight[:, gone] @ fit[:-1].T
    )
    np.testing.assert_allclose(model[2].bias.detach().numpy(), bias + weight[:, gone] @ fit[-1])


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", ["affine", "ridge", "bias"])
def test_every_optimizer_takes_it(name, kind):
    model, x, y = made()
    oto = OTO(model, x[:1])
    optimizer = getattr(oto, name)(target_macs=0.5, compensate=kind, batches=[x[:16], x[16:32]], **WHEN | OTHERS[name])
    folded = []
    real = type(optimizer._fold).changes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(optimizer._fold), "changes", lambda *args: folded.append(real(*args)) or folded[-1])
        train(model, optimizer, x, y, 24)
    assert optimizer.progress.over and optimizer.progress.cost <= optimizer.progress.goal
    moved = [sum(float(t.abs().sum()) for t in change.values()) for change in folded]
    assert moved and all(np.isfinite(moved)) and max(moved) > 0
    assert f"compensate='{kind}'" in optimizer.plan()
    subnet = oto.construct_subnet()
    assert subnet.cost_after.macs <= 0.5 * subnet.cost_before.macs


def test_nothing_else_of_a_training_is_changed():
    """A fold that has nothing to say leaves every number as it was: norms, random numbers, modes."""
    runs = []
    for options in ({}, {"compensate": "bias", "batches": [torch.randn(8, 3, 6, 6)]}):
        model, x, y = made(norm=False)
        model.head.bias.requires_grad_(requires_grad=True)
        model.next.bias = None  # nothing that a constant could go into
        oto = OTO(model, x[:1], only=["conv.*"])
        optimizer = oto.hesso(target_macs=0.8, **WHEN, **options)
        torch.manual_seed(1)
        train(model, optimizer, x, y, 10)
        runs.append((state(model), torch.get_rng_state(), model.training))
    assert same(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1]) and runs[1][2]


def test_with_nothing_to_remove_every_step_is_that_of_the_wrapped_optimizer():
    model, x, y = made()
    plain = copy.deepcopy(model)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.05), x, y, 10)
    optimizer = OTO(model, x[:1]).hesso(target_macs=1.0, compensate="affine", batches=[x], **WHEN)
    train(model, optimizer, x, y, 10)
    assert same(state(model), state(plain))


@pytest.mark.parametrize("stopped", [3, 5, 6])
def test_a_run_that_is_resumed_within_a_period_is_the_run_that_was_not_interrupted(stopped):
    runs = []
    for stop in (None, stopped):
        model, x, y = made()
        options = {"target_macs": 0.5, "compensate": "affine", "batches": [x], "first_momentum": 0.9} | WHEN
        optimizer = OTO(model, x[:1]).hesso(**options)
        if stop is not None:
            train(model, optimizer, x, y, stop)
            file = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            file.seek(0)
            held = torch.load(file, weights_only=True)
            model, *_ = made()
            model.load_state_dict(held["model"])
            optimizer = OTO(model, x[:1]).hesso(**options)
            optimizer.load_state_dict(held["optimizer"])
        train(model, optimizer, x, y, 12 - (stop or 0))
        runs.append(state(model))
    assert same(*runs)


def test_refusals():
    model, x, y = made()
    oto, before = OTO(model, x[:1]), state(model)
    good = {"target_macs": 0.5, "compensate": "affine", "batches": [x]} | WHEN
    for wrong, match in [
        ({"batches": None}, "no batches to fit by"),
        ({"batches": []}, "no batches to fit by"),
        ({"compensate": "mean"}, "compensate is 'mean'"),
        ({"compensate": None}, "compensate= is not given"),
    ]:
        with pytest.raises(OptionError, match=match):
            oto.hesso(**good | wrong)
    with pytest.raises(DummyInputError):
        oto.hesso(**good | {"batches": [(1, 2)]})
    with pytest.raises(OptionError, match="the optimizer alone does not know"):
        HESSO(model.named_parameters(), oto.node_groups, **good)
    optimizer = oto.hesso(**good)
    train(model, copied := copy.deepcopy(optimizer), x, y, 0)
    with pytest.raises(OptionError, match="a copy of an optimizer does not know"):
        copied.step()
    assert same(state(model), before)
    train(model, optimizer, x, y, 6)  # in the middle of the second period
    with pytest.raises(ShrinkError, match="compensate='affine' knows what reads"):
        oto.shrink()
    with pytest.raises(SetupError, match="compensate"):
        OTO(model, x[:1]).hesso(target_macs=0.5, **WHEN).load_state_dict(optimizer.state_dict())


def test_a_loss_says_how_the_model_is_called_and_what_no_batch_reaches_is_told():
    model, x, y = made()
    options = {"target_macs": 0.5, "compensate": "ridge", "batches": [{"x": x}]} | WHEN
    with pytest.raises(OptionError, match="no batch reached"):
        train(model, OTO(model, x[:1]).hesso(loss=lambda m, batch: batch["x"].sum(), **options), x, y, 3)
    train(model, OTO(model, x[:1]).hesso(loss=lambda m, batch: m(batch["x"]), **options), x, y, 3)
