"""Which optimizer is wrapped, and how its parameters get their names."""

from __future__ import annotations

import inspect

import pytest
import torch

from oto import OTO
from oto.errors import OptionError
from oto.optim.wrapped import REFUSED, VARIANTS
from tests.optim.toy import END, START, assert_same, count_zeros, hesso, net, train

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
