"""Forwards that leave something behind, and what they do only in train mode: nothing of it may be lost unseen."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from oto import OTO
from oto.errors import EmitterError, NothingPrunableError, VerificationError
from oto.slim.proof.compare import relative_error

EXACT = 1e-12  # float64, sums of at most 16 terms


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.into, self.mid, self.out = nn.Linear(10, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.register_buffer("seen", torch.zeros(()))
        self.kept, self.calls, self.width = None, 0, 16

    def hidden(self, x):
        return torch.relu(self.into(x))


class InBuffer(Net):
    def forward(self, x):
        out = self.out(self.hidden(x)) + self.seen
        self.seen = torch.sigmoid(self.into(x)).mean().detach()
        return out


class InAttribute(Net):
    def forward(self, x):
        out = self.out(self.hidden(x)) + (0 if self.kept is None else self.kept)
        self.kept = self.hidden(x).sum().detach()
        return out


class InNumber(Net):
    def forward(self, x):
        hidden = self.hidden(x)
        out, self.width = self.out(hidden) / self.width, hidden.shape[-1]
        return out


class EverySecond(Net):
    def forward(self, x):
        self.calls += 1
        return self.out(self.hidden(x)) if self.calls % 2 else self.out(torch.sigmoid(self.into(x)))


class Centered(Net):
    """A constraint on a weight, as a forward that writes into it."""

    def forward(self, x):
        with torch.no_grad():
            self.out.weight.sub_(self.out.weight.mean(1, keepdim=True))
        return self.out(torch.relu(self.mid(self.hidden(x))))


class Drifting(Net):
    """What it writes is not zero where zeros were."""

    def forward(self, x):
        out = self.out(torch.relu(self.mid(self.hidden(x))))
        with torch.no_grad():
            self.mid.bias.add_(0.1)
        return out


class Halved(Net):
    """Zeros stay zeros, so nothing is in the way."""

    def forward(self, x):
        with torch.no_grad():
            self.mid.weight.mul_(0.5)
        return self.out(torch.relu(self.mid(self.hidden(x))))


@pytest.mark.parametrize("emitter", ["auto", "graph"])
@pytest.mark.parametrize("allow_graph", [False, True])
@pytest.mark.parametrize("kind", [InBuffer, InAttribute, InNumber, EverySecond, Centered, Drifting, Halved])
@pytest.mark.filterwarnings("ignore")
def test_every_call_is_that_of_the_full_model_or_there_is_no_slim_one(kind, allow_graph, emitter):
    model, x = kind().double(), torch.randn(3, 10, dtype=torch.float64)
    try:
        oto = OTO(model, x, allow_graph=allow_graph)
        oto.random_set_zero_groups(0.5)
        subnet = oto.construct_subnet(emitter=emitter)
    except (EmitterError, NothingPrunableError, VerificationError):
        assert emitter == "graph" or kind not in (Drifting, Halved)
        return
    full, slim = copy.deepcopy(model), copy.deepcopy(subnet.model)
    assert subnet.cost_after.params < subnet.cost_before.params
    with torch.no_grad():
        for seed in range(4):
            given = torch.randn(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            assert relative_error([full(given)], [slim(given)]) < EXACT


def test_what_a_forward_writes_into_a_parameter_has_to_stay_zero():
    ways = [{g.name for g in OTO(kind(), torch.randn(3, 10)).node_groups if g.prunable} for kind in (Drifting, Halved)]
    assert ways == [{"into.weight", "out.weight"}, {"into.weight", "mid.weight"}]  # of out, what reads what drifts
    said = "the forward itself writes into out.weight, where zeros would not stay"
    assert said in str(OTO(Centered(), torch.randn(3, 10)).explain())


class OnlyInTraining(Net):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        hidden = self.hidden(x)
        if self.training and self.what == "width":
            hidden = hidden / hidden.shape[-1]
        if self.training and self.what == "shift":
            hidden = hidden + 0.1
        return self.out(hidden)


@pytest.mark.parametrize("what", ["width", "shift", "nothing"])
def test_what_training_alone_computes_is_compared(what):
    oto = OTO(OnlyInTraining(what), torch.randn(4, 10))
    oto.random_set_zero_groups(0.5)
    told = [note for note in oto.construct_subnet().notes if "in train mode it differs from the full one" in note]
    assert len(told) == (what != "nothing")


class Normed(OnlyInTraining):
    """It does not train on a single sample."""

    def __init__(self, what):
        super().__init__(what)
        self.norm = nn.BatchNorm1d(16)

    def hidden(self, x):
        return self.norm(super().hidden(x))


def test_training_is_compared_where_an_example_is_too_small_for_it():
    oto = OTO(Normed("shift"), torch.randn(1, 10))
    oto.random_set_zero_groups(0.5)
    assert any("in train mode it differs" in note for note in oto.construct_subnet().notes)


class Found:
    def __init__(self, boxes):
        self.boxes = boxes


class Detects(Net):
    """An object of its own among its outputs, or one that it takes in."""

    def __init__(self, give):
        super().__init__()
        self.give = give

    def forward(self, x, state=None):
        hidden = self.hidden(x)
        boxes = self.mid(hidden)
        return {"out": self.out(hidden), **self.give(boxes)}


@pytest.mark.parametrize(
    ("give", "whole"),
    [
        (lambda boxes: {"found": Found(boxes)}, True),
        (lambda boxes: {"found": torch.distributions.Normal(boxes, 1.0, validate_args=False)}, True),
        (lambda boxes: {"state": SimpleNamespace(boxes=boxes)}, False),  # as caches are
    ],
)
def test_objects_that_are_returned_keep_their_entries(give, whole):
    oto = OTO(Detects(give), torch.randn(3, 10))
    prunable = {g.name for g in oto.node_groups if g.prunable}
    assert ("mid.weight" in prunable) is not whole and "into.weight" in prunable
    assert any(at in str(oto.explain()) for at in ("in an object that is returned", "could be zeroed")) is whole
