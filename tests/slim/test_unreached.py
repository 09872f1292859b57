"""Heads that only training uses: they train on with the slim model, or are left out of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from oto import OTO, load_subnet
from oto.errors import TrainModeError
from oto.slim.proof.compare import relative_error
from oto.slim.proof.run import run
from oto.slim.proof.train_mode import check_training
from oto.slim.removed import unreached

EXACT = 1e-12  # float64, sums of at most a few hundred terms


class Heads(nn.Module):
    """A trunk with a head that only training uses, behind a guard or not, and a layer that nothing uses."""

    def __init__(self, guarded=True, targets=False):
        super().__init__()
        self.guarded, self.targets = guarded, targets
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.trunk = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.aux = nn.Sequential(
            nn.Dropout(0.3),
            nn.Conv2d(16, 16, 3, groups=16),
            nn.BatchNorm2d(16),
            nn.Conv2d(16, 6, 1),
            nn.Flatten(),
            nn.LazyLinear(5),
        )
        self.spare = nn.Linear(4, 4)
        self.out = nn.Linear(24, 5)

    def forward(self, x, targets=None):
        h = self.stem(x)
        aux = None
        if self.training and (not self.guarded or self.aux is not None):
            aux = self.aux(h)
        y = self.out(self.trunk(h).mean((2, 3)))
        if self.training and self.targets:
            return nn.functional.cross_entropy(y, targets)
        return (y, aux) if self.training else y


def heads(**options):
    model = Heads(**options)
    model.train()(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))  # the lazy layer learns its size
    return model.double()


X = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_a_head_of_training_gets_thinner_with_the_trunk_and_trains():
    model = heads()
    found = OTO(model, X)
    whole = {g.name: g.reason for g in found.node_groups if not g.prunable}
    assert whole["aux.3.weight"] == whole["spare.weight"] == "the traced forward never uses it"
    found.random_set_zero_groups(0.5)
    subnet = found.construct_subnet()
    slim = subnet.model
    assert slim.aux[1].in_channels == slim.stem[0].out_channels < 16 and slim.aux[3].out_channels == 6
    assert not subnet.notes and "slim in train mode" in [c.what for c in subnet.checks]
    assert subnet.cost_after.params == sum(p.numel() for p in slim.parameters())
    y, aux = slim.train()(torch.randn(4, 3, 8, 8, dtype=torch.float64))
    (y.square().mean() + aux.square().mean()).backward()
    assert slim.aux[1].weight.grad.abs().sum() > 0


def test_what_the_head_costs_does_not_count():
    model, bare = heads(), heads()
    bare.aux = None
    macs = [OTO(m, X).compute_macs() for m in (model, bare)]
    assert macs[0] == macs[1]


def test_macs_saved_by_a_choice_are_those_of_eval_mode():
    found = OTO(heads(), X)
    costs = found.costs
    assert costs.macs(costs.sizes) == found.compute_macs()


@pytest.mark.parametrize(("guarded", "instead"), [(True, type(None)), (False, nn.Identity)])
def test_heads_are_left_out_on_request(guarded, instead, tmp_path):
    model = heads(guarded=guarded)
    found = OTO(model, X, drop_unreached=True)
    assert unreached(model, found.partition) == ["aux", "spare"]
    found.random_set_zero_groups(0.5)
    subnet = found.construct_subnet(tmp_path)
    assert subnet.emitter == "module" and type(subnet.model.aux) is instead
    assert relative_error(run(model, X), run(subnet.model, X)) <= EXACT
    assert subnet.cost_after.params == sum(p.numel() for p in subnet.model.parameters())
    again = load_subnet(tmp_path, model)
    assert type(again.aux) is instead and relative_error(run(model, X), run(again, X)) <= EXACT
    subnet.model.train()(torch.randn(4, 3, 8, 8, dtype=torch.float64))
    second = OTO(subnet.model, X)
    second.random_set_zero_groups(0.3)
    twice = second.construct_subnet(tmp_path)
    assert type(load_subnet(tmp_path, model).aux) is instead and twice.cost_after.params < subnet.cost_after.params


def test_training_that_cannot_be_followed_is_refused(tmp_path):
    found = OTO(heads(targets=True), X)  # cross entropy of nothing
    found.random_set_zero_groups(0.5)
    subnet = found.construct_subnet(tmp_path)
    (note,) = subnet.notes
    assert note.startswith("train mode is refused: parts that only training may use could not be followed")
    for slim in (subnet.model, copy.deepcopy(subnet.model), load_subnet(tmp_path, lambda: heads(targets=True))):
        for holder in (slim, nn.Sequential(slim)):
            with pytest.raises(TrainModeError, match="could not be followed") as raised:
                holder.train()
            assert "drop_unreached=True" in str(raised.value) and "del model.train" in str(raised.value)
        assert not slim.eval().training
        assert relative_error(run(found.model, X), run(slim, X)) <= EXACT
    second = OTO(subnet.model, X)  # refused again
    second.random_set_zero_groups(0.3)
    again = second.construct_subnet().model
    with pytest.raises(TrainModeError):
        again.train()
    del again.train
    assert again.train().training


def test_a_head_that_would_cost_atoms_does_not():
    class Costly(Heads):
        def forward(self, x):
            h = self.stem(x)
            if self.training:
                return self.aux(h.sort(1).values)  # every channel has its place
            return self.out(self.trunk(h).mean((2, 3)))

    model = Costly().double()
    model.train()(X.repeat(2, 1, 1, 1))
    found = OTO(model, X)
    assert any(g.prunable and g.size == 16 for g in found.node_groups)
    assert "would have to stay" in found.partition.found.graph.untrained


def test_the_proof_in_train_mode_notices_a_head_that_reads_something_else():
    model = heads()
    found = OTO(model, X)
    found.random_set_zero_groups(0.5)
    subnet = found.construct_subnet()
    kept = subnet.kept
    assert check_training(model, subnet.model, X, found.partition, kept).error <= EXACT
    with torch.no_grad():
        subnet.model.aux[1].weight.add_(0.1)
    assert not check_training(model, subnet.model, X, found.partition, kept).passed
    with torch.no_grad():
        subnet.model.aux[1].weight.sub_(0.1)
        subnet.model.stem[1].momentum = 0.3
    assert not check_training(model, subnet.model, X, found.partition, kept).passed


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_torchvision(name):
    models = pytest.importorskip("torchvision").models
    model = getattr(models, name)(weights=None, init_weights=False)
    x = torch.randn(1, 3, *((299, 299) if name == "inception_v3" else (96, 96)))
    found = OTO(model, x)
    found.random_set_zero_groups(0.5)
    subnet = found.construct_subnet()
    assert "slim in train mode" in [c.what for c in subnet.checks] and not subnet.notes
    bare = OTO(model, x, drop_unreached=True).construct_subnet().model
    assert not any(name.lower().startswith("aux") for name, _ in bare.named_parameters())
