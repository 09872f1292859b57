"""Calls whose results nobody reads have to run, and no more: they keep nothing whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oto import OTO
from oto.errors import UnknownOpWarning
from oto.slim.proof.compare import relative_error
from oto.slim.proof.run import run

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@torch.library.custom_op("oto_tests::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.numpy() * 2)


@opaque.register_fake
def _(x):
    return torch.empty_like(x)


class Attention(nn.Module):
    """Its caller throws the averaged map away; ``use`` may not."""

    def __init__(self, use=lambda model, h, a: None, width=16, heads=4):
        super().__init__()
        torch.manual_seed(0)
        self.use, self.heads, self.width = use, heads, width // heads
        self.i, self.q, self.k, self.v, self.o, self.last = (
            nn.Linear(8, width),
            *(nn.Linear(width, width) for _ in range(4)),
            nn.Linear(width, 3),
        )

    def forward(self, x):
        h = self.i(x)
        b, t, _ = h.shape
        q, k, v = (f(h).view(b, t, self.heads, self.width).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = (q @ k.transpose(2, 3) / 3).softmax(-1)
        h = h + self.o((a @ v).transpose(1, 2).reshape(b, t, self.heads * self.width))
        self.use(self, h, a)
        return self.last(h)


def sizes(use):
    model = Attention(use).double().eval()
    oto = OTO(model, X)
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet()
    assert relative_error(run(model, X), run(subnet.model, X)) < 1e-12
    assert subnet.emitter == "module"
    return sorted(g.size for g in oto.node_groups if g.prunable)


FREE = sizes(lambda model, h, a: None)
DEAD = {
    "a mean over the heads": lambda model, h, a: a.mean(1),
    "a mean over the width": lambda model, h, a: h.mean(-1),
    "a softmax over the width": lambda model, h, a: h.softmax(-1),
    "the largest": lambda model, h, a: h.max(-1),
    "a sort": lambda model, h, a: h.sort(-1).values.cumsum(-1),
    "a norm": lambda model, h, a: F.layer_norm(h, h.shape[-1:]),
    "a layer that no output reads": lambda model, h, a: model.last(F.normalize(h, dim=-1)).exp(),
    "heads by an attribute": lambda model, h, a: a.view(h.shape[0], model.heads, 6, 6).mean(1),
    "a chain": lambda model, h, a: (h.transpose(1, 2) @ h).softmax(-1).sum((1, 2)),
    "written in place": lambda model, h, a: torch.zeros_like(a).add_(a).div_(2),
}


@pytest.mark.parametrize("use", DEAD.values(), ids=DEAD.keys())
def test_what_nobody_reads_keeps_nothing_whole(use):
    assert sizes(use) == FREE


def keeps(model, h, a):
    model.map = a.mean(1)


READ = {
    "kept in an attribute": keeps,
    "kept in a buffer": lambda model, h, a: model.register_buffer("map", a.mean(1)),
    "kept in a dict": lambda model, h, a: model.__dict__.setdefault("maps", {}).update(map=a.amax(1)),
    "states the sizes in its code": lambda model, h, a: a.view(2, 4, 36).sum(1),
    "written into what is read": lambda model, h, a: h.mul_(a.mean((1, 2, 3))[:, None, None]),
}


@pytest.mark.parametrize("use", READ.values(), ids=READ.keys())
def test_what_is_kept_or_does_not_run_counts(use):
    assert sizes(use)  # exact all the same
    graph = OTO(Attention(use).double(), X).partition.found.graph
    assert not any("mean" in node.name or "amax" in node.name for i, node in enumerate(graph.nodes) if i in graph.dead)


class Cache:
    """What a forward gives besides its output, for the next one; ``oto`` does not look into it."""

    def __init__(self, mean):
        self.mean = mean


class Cached(Attention):
    def forward(self, x):
        cache = []
        self.use = lambda model, h, a: cache.append(a.mean(1))
        y = super().forward(x)
        del self.use
        return y, Cache(cache.pop())


def test_what_is_handed_on_in_an_object_counts():
    graph = OTO(Cached().double(), X).partition.found.graph
    assert not graph.dead


def test_a_number_that_code_branches_on_is_read():
    def branch(model, h, a):
        return h.mean() > 0 and h.add_(1)

    model = Attention(branch).double().eval()
    found = OTO(model, X)
    assert not found.partition.found.graph.dead  # it was run on data: numpy reads without a call
    found.random_set_zero_groups(0.5)
    subnet = found.construct_subnet()
    assert relative_error(run(model, X), run(subnet.model, X)) < 1e-12


def test_an_operator_without_a_rule_keeps_what_it_touches():
    with pytest.warns(UnknownOpWarning):
        found = OTO(Attention(lambda model, h, a: opaque(h)).double(), X)
    assert sorted(g.size for g in found.node_groups if g.prunable) == [size for size in FREE if size != 16]


class WithHead(nn.Module):
    """A second head that is computed always, and given in training only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 5)

    def forward(self, x):
        h = self.a(x).relu()
        y, other = self.b(h), self.head(h.softmax(-1))
        return (y, other) if self.training else y


def test_a_head_for_training_still_counts():
    found = OTO(WithHead().double(), X)
    graph = found.partition.found.graph
    assert graph.dead and (graph.trained is not None or graph.untrained is not None)
    found.random_set_zero_groups(0.5)
    subnet = found.construct_subnet()
    assert subnet.emitter == "module"
    if not any("train mode is refused" in note for note in subnet.notes):
        subnet.model.train()(X)


def test_dead_calls_still_cost():
    plain, dead = (OTO(Attention(use).double(), X) for use in (lambda *_: None, lambda model, h, a: a @ a))
    assert dead.compute_macs() == plain.compute_macs() + 2 * 4 * 6 * 6 * 6
