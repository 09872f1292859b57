"""Which optimizer is wrapped, and how its parameters get their names."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

from oto import OTO
from oto.errors import OptionError, OTOError, ShrinkError, UntrainedWarning
from oto.optim.wrapped import REFUSED, VARIANTS
from tests.optim.toy import END, START, assert_same, backward, count_zeros, hesso, net, train

X = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - REFUSED.keys() - {"muon"}))
def test_any_optimizer_of_torch_by_name_in_any_case(name):
    for spelling in (name, name.upper(), VARIANTS[name].__name__):
        ours, theirs = net(), net()
        optimizer = hesso(ours, variant=spelling, lr=0.01)
        assert type(optimizer.base) is VARIANTS[name]
        train(ours, optimizer, range(START))
        train(theirs, VARIANTS[name](theirs.parameters(), lr=0.01), range(START))
        assert_same(ours, theirs)
    train(ours, optimizer, range(START, END + 2))
    assert count_zeros(ours) == 7


@pytest.mark.skipif("muon" not in VARIANTS, reason="torch has it since 2.9")
def test_muon_takes_matrices_alone():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8, bias=False), torch.nn.ReLU(), torch.nn.Linear(8, 4, bias=False))
    optimizer = OTO(model, torch.randn(2, 3)).hesso(
        variant="Muon", target_group_sparsity=0.5, start_pruning_step=1, pruning_steps=2, pruning_periods=1
    )
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    assert int((model[0].weight == 0).all(1).sum()) == 4


@pytest.mark.parametrize("how", ["an optimizer", "a class", "a class of one's own"])
def test_what_cannot_prune_is_refused_as_base_too(how):
    class Own(torch.optim.LBFGS):
        pass

    model = net()
    base = {"an optimizer": torch.optim.LBFGS(model.parameters()), "a class": torch.optim.LBFGS}.get(how, Own)
    with pytest.raises(OptionError, match=r"base is a (LBFGS|Own): it evaluates the loss several times in a step"):
        OTO(model, X).hesso(base=base, target_group_sparsity=0.5, total_steps=9)


@pytest.mark.parametrize("name, reason", [("LBFGS", "several times in a step"), ("SparseAdam", "sparse gradients")])
def test_optimizers_that_cannot_prune_are_refused(name, reason):
    with pytest.raises(OptionError, match=rf"variant is '{name}': [^$]*{reason}[^$]*to fix  use one of [^$]*AdamW"):
        hesso(net(), variant=name)


def test_a_name_that_torch_does_not_have_is_refused():
    with pytest.raises(OptionError, match=r"variant is 'lion': torch\.optim has none of that name[^$]*base="):
        hesso(net(), variant="lion")


def test_moments_go_by_the_signature():
    def groups_of(**options):
        return hesso(net(), **options).param_groups[0]

    assert groups_of(variant="NAdam", first_momentum=0.8)["betas"] == (0.8, 0.999)
    assert groups_of(variant="adam", second_momentum=0.99)["betas"] == (0.9, 0.99)
    assert groups_of(variant="RMSprop", first_momentum=0.5)["momentum"] == 0.5
    assert groups_of(variant="adam")["betas"] == inspect.signature(torch.optim.Adam).parameters["betas"].default
    with pytest.raises(OptionError, match=r"variant 'rmsprop' has no second_momentum[^$]*RMSprop takes lr, alpha"):
        hesso(net(), variant="rmsprop", second_momentum=0.9)
    with pytest.raises(OptionError, match="variant 'adam' has no nesterov, dampening"):
        hesso(net(), variant="adam", nesterov=True, dampening=0.1)


def test_sgd_needs_a_learning_rate():
    with pytest.raises(OptionError, match=r"lr is missing: SGD[^$]*to fix  give lr=") as caught:
        hesso(net(), lr=None)
    assert isinstance(caught.value, TypeError)
    model = net()
    named = list(model.named_parameters())
    with pytest.raises(OptionError, match="lr is missing"):
        hesso(model, lr=None, params=[{"params": named[:2], "lr": 0.1}, {"params": named[2:]}])
    rates = [{"params": named[:2], "lr": 0.1}, {"params": named[2:], "lr": 0.2}]
    assert [group["lr"] for group in hesso(model, lr=None, params=rates).param_groups] == [0.1, 0.2]
    assert hesso(net(), lr=None, variant="adamw").param_groups[0]["lr"] == 1e-3  # torch's own


# Parameter groups as libraries build them: tensors without names -----------------------------------------------------

SCHEDULE = {"target_group_sparsity": 0.5, "start_pruning_step": 2, "pruning_steps": 6, "pruning_periods": 3}


def no_decay(model):
    """As timm and the Trainer of Hugging Face do."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def layer_wise(model):
    return ({"params": [p], "lr": 0.1 * 0.8**i, "lr_scale": 0.8**i} for i, p in enumerate(model.parameters()))


@pytest.mark.parametrize("split", [no_decay, layer_wise, lambda model: model.parameters()])
def test_parameter_groups_need_no_names(split):
    ours, theirs = net(), net()
    optimizer = OTO(ours, X).hesso(params=split(ours), variant="adamw", lr=0.01, **SCHEDULE)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in ours.named_parameters())
    reference = torch.optim.AdamW(split(theirs), lr=0.01)
    train(ours, optimizer, range(2))
    train(theirs, reference, range(2))
    assert_same(ours, theirs)
    train(ours, optimizer, range(2, 8))
    assert count_zeros(ours) == 7


def test_an_optimizer_over_nameless_groups_can_be_wrapped():
    model = net()
    base = torch.optim.SGD(no_decay(model), lr=0.1)
    train(model, OTO(model, X).hesso(base=base, **SCHEDULE), range(8))
    assert count_zeros(model) == 7


# Optimizers that keep state of their own, and write it into their own state dict --------------------------------------


class Shell(torch.optim.Optimizer):
    """Steps another optimizer and has nothing in ``.state``, as optimizers that shard theirs."""

    def __init__(self, inner):
        self.inner, self.steps = inner, 0
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups = inner.param_groups

    def step(self):
        self.inner.step()
        self.steps += 1


class Saved(Shell):
    """Knows the entries of its own groups only."""

    def state_dict(self):
        return self.inner.state_dict() | {"steps": self.steps}

    def load_state_dict(self, state_dict):
        groups = [{k: v for k, v in g.items() if not k.startswith("oto_")} for g in state_dict["param_groups"]]
        self.inner.load_state_dict({"state": state_dict["state"], "param_groups": groups})
        self.param_groups, self.steps = self.inner.param_groups, state_dict["steps"]


def lookahead(inner):
    return pytest.importorskip("timm.optim.lookahead").Lookahead(inner, k=3)


@pytest.mark.parametrize("shell", [Saved, lookahead])
@pytest.mark.parametrize("stop", [1, START + 3, END + 1])
def test_state_that_is_kept_elsewhere_is_saved_and_resumed(tmp_path, shell, stop):
    def made():
        model = net()
        return model, hesso(model, base=shell(torch.optim.AdamW(model.parameters(), lr=0.01)), lr=None)

    through, optimizer = made()
    train(through, optimizer, range(END + 3))
    model, optimizer = made()
    train(model, optimizer, range(stop))
    optimizer.register_state_dict_post_hook(lambda _, saved: saved | {"seen": True})
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["optimizer"]["seen"] and len(saved["optimizer"]["state"]) == len(list(model.parameters()))
    resumed, again = made()
    resumed.load_state_dict(saved["model"])
    before = copy.deepcopy(saved["optimizer"])
    again.load_state_dict(saved["optimizer"])
    assert saved["optimizer"]["state"].keys() == before["state"].keys()
    assert again.clock == stop and again.history == optimizer.history
    train(resumed, again, range(stop, END + 3))
    assert_same(resumed, through)
    assert count_zeros(resumed) == 7


def test_state_that_no_checkpoint_would_hold_is_told():
    model = net()
    with pytest.warns(UntrainedWarning, match=r"Shell steps another optimizer, its inner, [^$]*starts without it"):
        hesso(model, base=Shell(torch.optim.AdamW(model.parameters())), lr=None)


def test_a_state_dict_without_parameter_groups_is_refused():
    class Exotic(torch.optim.SGD):
        def state_dict(self):
            return {"flat": torch.ones(3)}

    with pytest.raises(OTOError, match=r"state dict of Exotic has no param_groups: flat"):
        hesso(net(), base=Exotic).state_dict()


def test_what_lacks_what_every_optimizer_has_is_refused():
    local = pytest.importorskip("torch.distributed.optim").PostLocalSGDOptimizer
    model = net()
    with pytest.raises(OptionError, match="PostLocalSGDOptimizer, which has no defaults"):
        hesso(model, base=local(torch.optim.SGD(model.parameters(), lr=0.1), None), lr=None)


def test_an_optimizer_inside_of_another_does_not_shrink():
    model = net()
    oto = OTO(model, X)
    optimizer = oto.hesso(base=Saved(torch.optim.AdamW(model.parameters(), lr=0.01)), **SCHEDULE)
    train(model, optimizer, range(8))
    parameters = list(model.parameters())
    with pytest.raises(ShrinkError, match=r"Saved keeps parameters and state of its own[^$]*nothing was changed"):
        oto.shrink(optimizer)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    backward(model, 8)
    optimizer.step()


@pytest.mark.parametrize(
    "options, says",
    [
        ({"target_mac": 0.5}, r"no option target_mac\n[^$]*perhaps target_macs= is meant"),  # nothing else is given
        ({"target_macs": 0.5, "lr": 0.1, "min_keep": 2}, r"no option min_keep\n[^$]*perhaps min_kept="),
        ({"variant": "adam", "nestrov": True}, "HESSO and Adam have no option nestrov"),
        ({"base": torch.optim.RAdam, "weight_decy": 0.1}, r"RAdam have no option weight_decy\n[^$]*weight_decay="),
        ({"xyzzy": 1, "plugh": 2}, r"no option xyzzy, plugh\n[^$]*leave it out"),
    ],
    ids=str,
)
def test_an_option_that_there_is_not_is_named_first(options, says):
    oto = OTO(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 3))
    with pytest.raises(OptionError, match=says):
        oto.hesso(**options)


def test_other_makers_name_it_too():
    oto = OTO(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 3))
    with pytest.raises(OptionError, match=r"preview has no option target_mac\n[^$]*perhaps target_macs="):
        oto.preview(target_mac=0.5)
    with pytest.raises(OptionError, match=r"no option max_cycle\n[^$]*perhaps max_cycles="):
        oto.hesso_cric(max_cycle=3)
    oto.hesso_cric(target_macs=0.5, lr=0.1, total_steps=200, max_cycles=3, nesterov=True, first_momentum=0.9)
    own = oto.hesso(base=lambda groups, **more: torch.optim.SGD(groups, **more), lr=0.1, target_macs=1.0, total_steps=9)
    assert own.num_pruned == 0
