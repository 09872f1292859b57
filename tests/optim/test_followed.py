"""The model that an optimizer was made for may change afterwards: it goes on right, or it is told."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from oto import OTO
from oto.errors import ModelChangedError, NoGradientWarning, UntrainedWarning
from oto.optim.followed import CHECK_STEPS

X = torch.randn(16, 6)
END = 12


def made(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    schedule = {"start_pruning_step": 2, "pruning_steps": 8, "pruning_periods": 2}
    oto = OTO(model, X)
    return model, oto, oto.hesso(**{"variant": "adamw", "lr": 0.01, "target_macs": 0.6} | schedule | options)


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def a_new_layer(model):
    model[2] = nn.Linear(16, 16)


def a_new_head(model):
    model[4] = nn.Linear(16, 3)


def a_new_tensor(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def other_tensors(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def tied(model):
    model[2].bias = model[0].bias


@pytest.mark.parametrize("change", [a_new_layer, a_new_head, a_new_tensor, other_tensors, tied])
@pytest.mark.parametrize("at", [0, 3, END])
def test_a_parameter_that_was_replaced_is_told_within_a_few_steps(change, at):
    model, _, optimizer = made()
    train(model, optimizer, at)
    change(model)
    with pytest.raises(
        ModelChangedError, match=r"of the Sequential is another tensor than when the optimizer was made"
    ):
        train(model, optimizer, CHECK_STEPS)


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model[2])


class Adapted(nn.Module):
    """As libraries of adapters wrap a layer."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.down, self.up = base_layer, nn.Linear(16, 2), nn.Linear(2, 16)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def adapters(model):
    model[2] = Adapted(model[2])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (parametrized, "is no parameter any more[^$]*is not trained"),
        (adapters, "has another name than[^$]*by its name"),
    ],
)
def test_a_parameter_that_has_another_name_now_is_told(change, said):
    model, _, optimizer = made()
    train(model, optimizer, 1)
    change(model)
    with pytest.raises(ModelChangedError, match=rf"2\.weight.* {said}"):
        train(model, optimizer, CHECK_STEPS)


def test_tensors_that_are_replaced_while_a_checkpoint_is_loaded_are_told_at_once():
    model, _, optimizer = made()
    train(model, optimizer, 1)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model.load_state_dict(saved[0], assign=True)
    optimizer.load_state_dict(saved[1])
    with pytest.raises(ModelChangedError, match="assign=True"):
        train(model, optimizer, 1)


def test_what_changes_no_tensor_is_as_ever():
    model, oto, optimizer = made()
    train(model, optimizer, 1)
    model.double().float().to(torch.device("cpu"))
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    held = nn.DataParallel(model)
    train(held, optimizer, END)
    assert optimizer.progress.over and not oto.construct_subnet().notes


def test_both_may_be_replaced_alike():
    model, _, optimizer = made()
    other_tensors(model)  # as accelerate does for FSDP2
    optimizer.param_groups[0]["params"][:] = model.parameters()
    train(model, optimizer, END)
    assert optimizer.progress.over


def test_state_of_parameters_that_are_gone_is_refused():
    """As that of an optimizer which fills it when it is made, where accelerate shards afterwards (fsdp_version: 2)."""
    model, _, optimizer = made(variant="adagrad")
    assert optimizer.state
    other_tensors(model)
    optimizer.param_groups[0]["params"][:] = model.parameters()
    with pytest.raises(ModelChangedError, match=r"Adagrad holds state of \d+ tensors[^$]*AdamW"):
        train(model, optimizer, 1)


def test_ties_are_known_by_each_name():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6)), torch.randn(4, 6)
    model[4].weight = nn.Parameter(model[0].weight.detach().T.clone())
    model[2].bias = model[0].bias
    optimizer = OTO(model, x).hesso(lr=0.1, target_macs=0.9, start_pruning_step=2, pruning_steps=2)
    train(model, optimizer, 2)
    model[2].bias = nn.Parameter(model[0].bias.detach().clone())
    with pytest.raises(ModelChangedError, match=r"2\.bias of the Sequential is another tensor"):
        train(model, optimizer, 1)


def test_what_is_added_is_told_unless_the_optimizer_is_given_it():
    model, _, optimizer = made()
    train(model, optimizer, 1)
    model.add_module("5", nn.Linear(3, 3))
    with pytest.warns(UntrainedWarning, match=r"5\.weight, 5\.bias of the Sequential came after") as caught:
        train(model, optimizer, END)
    assert len(caught) == 1
    model, _, optimizer = made()
    train(model, optimizer, 1)
    model.add_module("5", nn.Linear(3, 3))
    optimizer.add_param_group({"params": model[5].parameters()})
    train(model, optimizer, END)


def test_what_the_optimizer_was_not_given_is_none_of_its_business():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    oto = OTO(model, X, skip_patterns=["2.*"])
    mine = [(name, p) for name, p in model.named_parameters() if not name.startswith("2.bias")]
    optimizer = oto.hesso(params=mine, lr=0.1, target_macs=0.6, start_pruning_step=2, pruning_steps=4)
    model[2].bias = nn.Parameter(torch.zeros(3))
    train(model, optimizer, END)


def test_what_is_frozen_later_is_told_and_nothing_after_pruning():
    model, _, optimizer = made()
    train(model, optimizer, 1)
    model[0].weight.requires_grad_(False)
    with pytest.warns(UntrainedWarning, match=r"0\.weight of the Sequential was frozen after") as caught:
        train(model, optimizer, END)
    assert len(caught) == 1
    model[2].requires_grad_(False)
    train(model, optimizer, CHECK_STEPS)


def test_a_copy_that_is_trained_instead_is_told():
    model, _, optimizer = made(start_pruning_step=3 * CHECK_STEPS)
    other = copy.deepcopy(model)
    other(X).square().mean().backward()
    with pytest.warns(
        NoGradientWarning, match="no parameter of the Sequential that the optimizer trains has a gradient"
    ):
        optimizer.step()
    for _ in range(2 * CHECK_STEPS):  # told once
        optimizer.step()


def test_parameters_of_before_shrinking_are_told():
    model, oto, optimizer = made()
    train(model, optimizer, END)
    held = dict(model.named_parameters())
    oto.shrink(optimizer)
    optimizer.zero_grad()
    torch.func.functional_call(model, held, (X,)).square().mean().backward()
    with pytest.warns(NoGradientWarning, match=r"listed before oto\.shrink\(\), are others"):
        optimizer.step()


def test_the_model_is_not_kept_alive():
    model, oto, optimizer = made()
    assert copy.deepcopy(optimizer)._followed is None  # a copy may train another model
    train(model, optimizer, 1)
    parameters, gone = list(model.parameters()), weakref.ref(model)
    del model, oto
    gc.collect()
    assert gone() is None
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
