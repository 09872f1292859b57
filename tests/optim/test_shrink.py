"""Training goes on with a slim model: the same optimizer, the same trajectory, fewer entries."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from oto import OTO, load_subnet
from oto.errors import NotPrunedWarning, OTOError, ShrinkError, UnknownParameterError
from oto.groups import pruned_groups
from oto.optim import Choice
from oto.slim.proof.compare import relative_error
from oto.slim.proof.run import run
from oto.slim.pruned_shapes import read_zeros
from oto.slim.shrink import parts
from tests.slim.test_construct import EXACT, Residual
from tests.slim.test_train import IMAGES, MODELS, Transformer, data, resnet

SAME = 1e-9  # float64, fifty steps, sums in another order
START, STEPS, PERIODS = 4, 12, 3  # periods end after steps 7, 11 and 15
SGD = {"variant": "sgd", "lr": 0.05, "first_momentum": 0.9, "weight_decay": 1e-3}
ADAMW = {"variant": "adamw", "lr": 3e-3, "weight_decay": 0.05}
LAST = START + STEPS + 50


class Run:
    """A training run that can be shrunk, saved and resumed."""

    def __init__(self, make, shape, options, kind="hesso", target=0.6):
        torch.manual_seed(0)
        self.shape, self.model = shape, make().double().train()
        self.oto = OTO(self.model, data(shape))
        when = {"start_pruning_step": START, "pruning_steps": STEPS}
        when |= {"pruning_periods": PERIODS} if kind == "hesso" else {"sampling_steps": 3, "max_cycles": 2}
        self.optimizer = getattr(self.oto, kind)(target_macs=target, **when, **options)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, LAST)
        self.losses = []

    def backward(self):
        x = data(self.shape, 100 + len(self.losses))
        y = self.model(x)
        loss = y.square().mean() + (y.sin() * torch.arange(y.shape[-1])).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.losses.append(loss.item())

    def until(self, steps):
        while len(self.losses) < steps:
            self.backward()
            self.optimizer.step()
            self.scheduler.step()
        return self

    def shrink(self, **options):
        new = options or self.optimizer.num_pruned > self.optimizer.num_removed
        before = sum(p.numel() for p in self.model.parameters())
        assert self.oto.shrink(self.optimizer, **options) is self.model
        assert (sum(p.numel() for p in self.model.parameters()) < before) == bool(new)
        assert self.optimizer.num_pruned == self.optimizer.num_removed > 0 or options
        return self


def relative(a, b):
    return float((np.abs(np.subtract(a, b)) / np.abs(a)).max())


class OwnNorm(nn.Module):
    """An RMS norm of the user's own, and a view that states its sizes."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class OwnCode(nn.Module):
    def __init__(self, width=16, heads=4):
        super().__init__()
        self.heads, self.width = heads, width // heads
        self.into, self.out = nn.Linear(5, width), nn.Linear(width, 3)
        self.norms = nn.ModuleList(OwnNorm(width) for _ in range(3))
        self.qkv, self.back = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x):
        h = self.into(x)
        qkv = self.qkv(self.norms[0](h)).view(*x.shape[:2], 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*qkv, scale=0.5)
        h = h + self.back(y.transpose(1, 2).flatten(2))
        h = h + self.down(nn.functional.gelu(self.up(self.norms[1](h))))
        return self.out(self.norms[2](h))


CASES = MODELS | {"own code": (OwnCode, (4, 7, 5))}
ALL = (START + 4, START + 9, START + STEPS + 3)


@pytest.mark.parametrize(
    ("name", "options", "at"),
    [
        ("resnet", SGD, ALL),
        ("resnet", ADAMW, (START + STEPS,)),
        ("transformer", SGD, (START + 5,)),
        ("transformer", ADAMW, ALL),
        ("mobilenet", SGD, (START + STEPS,)),
        ("lstm", ADAMW, (START + 5,)),
        ("residual, rms norm", SGD, ALL),
        ("residual, rms norm", ADAMW, (START + 5,)),
        ("own code", SGD, ALL),
        ("own code", ADAMW, (START + STEPS,)),
    ],
    ids=lambda x: x.get("variant") if isinstance(x, dict) else str(x),
)
def test_the_rest_of_the_run_is_on_the_same_trajectory(name, at, options):
    if name == "own code":
        options = options | {"scope": "local"}  # so that the residual width goes, too
    full, slim = (Run(*CASES[name], options) for _ in range(2))
    full.until(LAST)
    for step in at:
        slim.until(step).shrink()
    slim.until(LAST)
    assert len(slim.losses) - at[-1] >= 47
    if name == "own code":
        assert len(slim.model.norms[0].weight) < 16  # a norm that goes on counting, not one that is scaled
    assert relative(full.losses, slim.losses) <= SAME
    assert [g["lr"] for g in slim.optimizer.param_groups] == [g["lr"] for g in full.optimizer.param_groups]
    assert str(slim.optimizer.progress) == str(full.optimizer.progress)
    a, b = (r.oto.construct_subnet() for r in (full, slim))
    assert a.cost_after == b.cost_after
    theirs = dict(b.model.named_parameters())
    for name, p in a.model.named_parameters():  # at zero for good in the one, gone from the other
        assert p.shape == theirs[name].shape
        assert (p - theirs[name]).abs().max() <= SAME * p.abs().max().clamp_min(1e-3), name


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "sgd", "lr": 0.05, "first_momentum": 0.9, "nesterov": True},
        {"variant": "adamw", "lr": 3e-3, "amsgrad": True},
        {"variant": "rmsprop", "lr": 1e-3, "first_momentum": 0.9, "centered": True},
        {"variant": "nadam", "lr": 3e-3},
    ],
    ids=lambda o: " ".join(map(str, o.values())),
)
def test_other_optimizers(options):
    full, slim = Run(resnet, IMAGES, options).until(40), Run(resnet, IMAGES, options).until(START + STEPS).shrink()
    assert relative(full.losses, slim.until(40).losses) <= SAME
    for p, state in slim.optimizer.state.items():
        assert all(v.shape in (p.shape, ()) for v in state.values() if isinstance(v, torch.Tensor))


def test_hesso_cric():
    full, slim = (Run(resnet, IMAGES, SGD, "hesso_cric").until(120) for _ in range(2))
    assert full.optimizer.progress.over and full.optimizer.num_pruned
    slim.shrink()
    assert relative(full.until(140).losses, slim.until(140).losses) <= SAME
    assert str(slim.optimizer.progress) == str(full.optimizer.progress)


def test_hesso_cric_between_its_periods():
    full, slim = (Run(resnet, IMAGES, SGD, "hesso_cric") for _ in range(2))
    while not slim.optimizer.num_pruned:
        slim.until(len(slim.losses) + 1)
    assert not slim.optimizer.progress.over
    slim.shrink()
    assert relative(full.until(140).losses, slim.until(140).losses) <= SAME
    for name, kept in slim.optimizer.left_like(None).items():
        assert kept.sum() == full.optimizer.left_like(None)[name].sum(), name


@pytest.mark.parametrize(
    "how",
    [
        {"scope": "local", "group_divisible": 2},
        {"normalize": "mean", "saliency": "magnitude"},
        {"normalize": "max", "saliency": "magnitude", "by_cost": 0.5, "min_kept": 0.2},
        {"saliency": "taylor_second_order"},
    ],
    ids=str,
)
def test_a_choice_counts_in_the_full_network(how):
    torch.manual_seed(0)
    found = OTO(resnet(), data(IMAGES).float())
    choice = Choice.of(found.node_groups, {"target_macs": 0.2}, costs=found.costs, **how)
    for seed in range(5):
        draw = torch.Generator().manual_seed(seed)
        scores = torch.rand(sum(choice.sizes), generator=draw)
        # one layer lost half of its atoms, the others none, so that prices of an average atom change their order
        alive = [torch.ones(n, dtype=torch.bool) for n in choice.sizes]
        alive[seed % len(alive)][::2] = False
        left = torch.cat(alive)
        groups = [replace(g, size=int(own.sum())) for g, own in zip(choice.groups, alive, strict=True)]
        pruned = replace(choice, groups=tuple(groups))
        for share in (0.7, 1.0):
            chosen = choice.select(scores, left, share)
            assert torch.equal(
                chosen[left], pruned.select(scores[left], torch.ones(int(left.sum()), dtype=bool), share)
            )
            assert chosen.any() and not chosen[~left].any()


def test_by_magnitude_other_atoms_may_go_but_as_many():
    # what reads a channel that is gone does not count any more
    options = SGD | {"scope": "local", "saliency": "magnitude"}
    full, slim = Run(resnet, IMAGES, options).until(30), Run(resnet, IMAGES, options).until(START + 5).shrink()
    assert slim.until(30).optimizer.num_pruned == full.optimizer.num_pruned


def test_the_optimizer_stays_the_same_object_with_its_options():
    model = resnet().double()
    norms = [(n, p) for n, p in model.named_parameters() if p.ndim == 1]
    rest = [(n, p) for n, p in model.named_parameters() if p.ndim > 1]
    found = OTO(model, data(IMAGES))
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))  # of a loss, not of the model
    groups = [{"params": norms, "weight_decay": 0.0}, {"params": rest, "lr": 0.01}, {"params": [("extra", extra)]}]
    base = torch.optim.AdamW(
        [{**g, "params": [p for _, p in g["params"]], "param_names": [n for n, _ in g["params"]]} for g in groups]
    )
    optimizer = found.hesso(base=base, target_macs=0.6, start_pruning_step=1, pruning_steps=3, pruning_periods=1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    held = [group["params"] for group in optimizer.param_groups]
    for _ in range(5):
        optimizer.zero_grad()
        (model(data(IMAGES)).square().mean() + extra.square().sum()).backward()
        optimizer.step()
        scheduler.step()
    names = [group["param_names"] for group in optimizer.param_groups]
    options = [{k: v for k, v in g.items() if k != "params" and "oto" not in k} for g in optimizer.param_groups]
    moment = optimizer.state[extra]["exp_avg"]
    old, kind = list(model.parameters()), type(model)
    slim = found.shrink()
    assert slim is model and type(slim) is kind and not set(map(id, old)) & set(map(id, slim.parameters()))
    assert optimizer.base is base and base.param_groups is optimizer.param_groups and base.state is optimizer.state
    assert all(group["params"] is own for group, own in zip(optimizer.param_groups, held, strict=True))
    own = dict(slim.named_parameters())
    for group, asked in zip(optimizer.param_groups, names, strict=True):
        assert group["param_names"] == asked
        assert all(p is own.get(n, extra) for n, p in zip(asked, group["params"], strict=True))
    assert options == [{k: v for k, v in g.items() if k != "params" and "oto" not in k} for g in optimizer.param_groups]
    assert optimizer.state[extra]["exp_avg"] is moment and len(optimizer.state) == len(own) + 1
    assert slim[0].weight.grad.shape == slim[0].weight.shape  # of the last step, sliced
    assert scheduler.optimizer is optimizer and slim.training and all(p.requires_grad for p in slim.parameters())


def test_a_wrapper_of_the_optimizer_goes_on():
    accelerate = pytest.importorskip("accelerate")
    one = Run(resnet, IMAGES, SGD)
    wrapped = accelerate.Accelerator(cpu=True).prepare(one.optimizer)
    one.until(START + STEPS)
    one.oto.shrink(wrapped)
    assert wrapped.optimizer is one.optimizer
    one.backward()
    before = one.model[0].weight.detach().clone()
    wrapped.step()
    assert not torch.equal(before, one.model[0].weight)


@pytest.mark.parametrize(("at", "options"), [(START + 5, ADAMW), (START + STEPS + 2, SGD)], ids=["adamw", "sgd"])
def test_a_checkpoint_from_after_shrinking_resumes_bit_for_bit(at, options):
    one = Run(resnet, IMAGES, options).until(at).shrink().until(at + 2)
    states = {"model": one.model, "optimizer": one.optimizer, "scheduler": one.scheduler}
    held = io.BytesIO()
    torch.save({name: x.state_dict() for name, x in states.items()}, held)
    held.seek(0)
    saved = torch.load(held, weights_only=True)

    two = Run(resnet, IMAGES, options).shrink(like=saved["optimizer"])  # as in the beginning, other weights
    two.losses = list(one.losses)
    for name, x in {"model": two.model, "optimizer": two.optimizer, "scheduler": two.scheduler}.items():
        x.load_state_dict(saved[name])
    assert two.until(at + 25).losses == one.until(at + 25).losses
    assert str(two.optimizer.progress) == str(one.optimizer.progress)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_checkpoints_of_other_models_are_refused():
    one, two = Run(resnet, IMAGES, SGD).until(START + STEPS), Run(resnet, IMAGES, SGD)
    before = one.optimizer.state_dict()
    after = one.shrink().optimizer.state_dict()
    with pytest.raises(OTOError, match=r"saved after the model was shrunk.*\n.*\n.*like=state_dict"):
        two.optimizer.load_state_dict(after)
    with pytest.raises(OTOError, match="saved before the model was shrunk"):
        one.optimizer.load_state_dict(before)
    whole = two.oto.model
    assert two.oto.shrink(two.optimizer, like=before) is whole and not two.optimizer.num_removed  # all is left there
    with pytest.raises(ShrinkError, match="more left than this one"):
        one.oto.shrink(one.optimizer, like=before)
    with pytest.raises(ShrinkError, match="no optimizer of this OTO"):
        two.oto.shrink(two.optimizer, like=torch.optim.SGD(two.model.parameters(), lr=0.1).state_dict())
    three = Run(resnet, IMAGES, SGD).until(START + 5).shrink()
    with pytest.raises(OTOError, match="and not the same"):
        one.optimizer.load_state_dict(three.optimizer.state_dict())
    with pytest.raises(ShrinkError, match="more left than this one"):
        one.oto.shrink(one.optimizer, like=three.optimizer.state_dict())
    three.shrink(like=after)  # of less, which it can become
    three.optimizer.load_state_dict(after)
    two.optimizer.load_state_dict(before)
    one.optimizer.load_state_dict(one.optimizer.base.state_dict())
    assert one.optimizer.num_removed  # also a state without names of groups leaves that as it is


def test_state_that_cannot_be_sliced_is_refused_before_anything_is_changed():
    one = Run(resnet, IMAGES, {"base": torch.optim.Adafactor, "lr": 1e-3}).until(START + STEPS)
    model, parameters = one.model, [p for g in one.optimizer.param_groups for p in g["params"]]
    with pytest.raises(ShrinkError, match=r"Adafactor keeps 'row_var' of shape \(.*for .*weight, which has shape"):
        one.oto.shrink(one.optimizer)
    assert one.oto.model is model and not one.optimizer.num_removed
    assert all(a is b for a, b in zip(parameters, one.optimizer.param_groups[0]["params"], strict=True))
    one.until(START + STEPS + 2)


def test_nothing_at_zero_is_a_warning():
    one = Run(resnet, IMAGES, SGD).until(START)
    with pytest.warns(NotPrunedWarning, match="nothing was removed"):
        assert one.oto.shrink() is one.model
    one.until(START + STEPS).shrink()
    assert one.oto.shrink() is one.model  # there is nothing left to remove


def test_optimizers_of_something_else_are_refused():
    one, two = Run(resnet, IMAGES, SGD).until(START + STEPS), Run(resnet, IMAGES, SGD).until(START + STEPS)
    with pytest.raises(ShrinkError, match="not over the parameters of this Sequential"):
        one.oto.shrink(two.optimizer)
    with pytest.raises(ShrinkError, match="SGD is not one, and wraps none"):
        one.oto.shrink(torch.optim.SGD(one.model.parameters(), 0.1))
    with pytest.raises(ShrinkError, match="there is no optimizer"):
        OTO(resnet().double(), data(IMAGES)).shrink()


def test_afterwards_everything_is_about_the_slim_model(tmp_path):
    one = Run(Residual, (4, 7, 5), ADAMW).until(START + 5)
    full = one.oto.compute_num_params()
    old = copy.deepcopy(one.model)
    one.shrink()
    assert one.oto.model is one.model and one.oto.compute_num_params() < full
    assert one.oto.compute_num_params() == sum(p.numel() for p in one.model.parameters())
    assert one.optimizer.progress.pruned == one.optimizer.num_removed > 0
    assert sum(map(len, one.optimizer.pruned_groups.values())) == 0
    with pytest.raises(UnknownParameterError, match="as it was shrunk, not before"):
        one.optimizer.zero_pruned_in(old)
    average = copy.deepcopy(one.model)
    with torch.no_grad():
        for p in average.parameters():
            p.add_(1e-3)
    one.until(START + STEPS + 1)
    one.optimizer.zero_pruned_in(average)
    kept = read_zeros(one.oto.node_groups, average)
    assert sum(map(len, kept.values())) < sum(g.size for g in one.oto.node_groups if g.prunable)
    x = data((4, 7, 5))
    subnet = one.oto.construct_subnet(tmp_path)
    assert subnet.emitter == "module" and not subnet.notes
    again = load_subnet(tmp_path, Residual)
    assert relative_error(run(one.model, x), run(again, x)) <= EXACT
    assert sum(p.numel() for p in again.parameters()) < one.oto.compute_num_params()
    copied = copy.deepcopy(one.oto)
    assert relative_error(run(one.model, x), run(copied.construct_subnet().model, x)) <= EXACT


def test_moving_averages_go_on_with_the_slim_model():
    full, slim = Run(resnet, IMAGES, SGD), Run(resnet, IMAGES, SGD)
    found = []
    for one in (full, slim):
        average = torch.optim.swa_utils.AveragedModel(
            one.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        for step in range(1, 40):
            one.until(step)
            average.update_parameters(one.model)
            if one is slim and step == START + STEPS:
                with pytest.raises(ShrinkError, match="holds no average of this Sequential"):
                    one.oto.shrink(averages=[Run(Transformer, IMAGES, SGD).model])
                one.shrink(averages=[average])
        one.optimizer.zero_pruned_in(average)
        subnet = one.oto.construct_subnet(model=average)
        found.append([p.detach() for p in subnet.model.parameters()])
    assert relative_error(*found) <= SAME


def test_what_was_kept_whole_stays_whole():
    torch.manual_seed(0)
    model = Residual().double()
    found = OTO(model, data((4, 7, 5)), skip_patterns=["up"], min_kept={"into.weight": 9})
    optimizer = found.hesso(
        **SGD, target_group_sparsity=0.3, start_pruning_step=0, pruning_steps=4, pruning_periods=2, scope="local"
    )
    for step in range(4):
        optimizer.zero_grad()
        model(data((4, 7, 5), step)).square().mean().backward()
        optimizer.step()
    found.shrink()
    groups = {g.name: g for g in found.node_groups}
    assert groups["up.weight"].size == 24 and "skip_patterns" in groups["up.weight"].reason
    assert groups["into.weight"].min_kept == 9 and groups["into.weight"].size < 16


@pytest.mark.parametrize("name", MODELS)
def test_groups_lie_where_the_analysis_of_the_slim_model_finds_them(name):
    make, shape = MODELS[name]
    found = OTO(make().double(), data(shape))
    found.random_set_zero_groups(0.4)
    subnet = found.construct_subnet(emitter="module")
    groups = [g for g in pruned_groups(found.partition, found.node_groups, subnet.kept) if g.prunable and g.size > 1]
    made = parts(groups, OTO(subnet.model, data(shape)).node_groups)
    assert made.keys() == {g.name for g in groups}
    parameters = dict(subnet.model.named_parameters())
    for group in groups:  # no row of it is zero in the slim model, as none that was kept is
        alive = sum(p.of(parameters[p.parameter]).reshape(group.size, -1).abs().sum(1) for p in group.zeros)
        assert group.size == len(subnet.kept[group.name]) and (alive > 0).all()


def test_a_model_whose_class_cannot_do_it_is_refused():
    class Stated(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.out(torch.relu(self.into(x)).view(len(x), 8))

    torch.manual_seed(0)
    model, x = Stated().double(), data((1, 4, 6))[0]
    found = OTO(model, x, allow_graph=True)
    optimizer = found.hesso(**SGD, target_macs=0.5, start_pruning_step=0, pruning_steps=2, pruning_periods=1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    with pytest.raises(ShrinkError, match="cannot be thinned as its own class"):
        found.shrink()
    assert found.model is model and not optimizer.num_removed


def test_dropout_on_what_kept_its_shape_stays_on_the_trajectory():
    def make():
        return Transformer(dropout=0.3)

    full, slim = Run(make, IMAGES, SGD), Run(make, IMAGES, SGD)
    for one in (full, slim):
        torch.manual_seed(1)
        one.until(START + STEPS)
        if one is slim:
            one.shrink()
        torch.manual_seed(2)
        one.until(START + STEPS + 20)
    assert relative(full.losses, slim.losses) <= SAME


def test_the_page_about_it_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).resolve().parents[2] / "docs" / "after_pruning.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    held = {"nn": nn, "torch": torch, "OTO": OTO}
    exec(code, held)
    assert "pruning ended after 35 steps" in capsys.readouterr().out
    assert held["subnet"].cost_after.macs <= 0.4 * (20 * 64 + 64 * 64 + 64 * 5) * 8
    assert (tmp_path / "out" / "oto.json").exists()
