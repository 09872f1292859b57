"""Branches into a concatenation: what may go is proved, what stays has a reason, what is saved is counted exactly."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oto import OTO
from oto.groups.cost import cost
from oto.groups.segments import legal


def way(into, out, *more):
    return nn.Sequential(nn.Linear(into, 6), nn.ReLU(), nn.Linear(6, out), *more)


class Beside(nn.Module):
    """Three branches beside each other, with what is done to the second, and behind them."""

    def __init__(self, within=lambda v, m: v, behind=lambda v, m: v):
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.ways = nn.ModuleList(way(8, n) for n in (2, 3, 5))
        self.norm, self.over, self.head = nn.BatchNorm1d(10), nn.LayerNorm(10), nn.Linear(10, 3)
        self.register_buffer("constant", torch.ones(3))
        self.bias = nn.Parameter(torch.ones(3))
        self.within, self.behind = within, behind

    def forward(self, x):
        x = self.stem(x).relu()
        made = [own(x) for own in self.ways]
        made[1] = self.within(made[1], self)
        return self.head(self.behind(torch.cat(made, -1), self))


def found(model, **options):
    return OTO(model.eval(), torch.randn(3, 4), compress_mode="both", **options)


def names(oto):
    return [segment.name for segment in oto.partition.segments]


def segment(oto, name):
    return next(group for group in oto.node_groups if group.name == name and group.segment)


def test_branches_beside_each_other_are_segments():
    oto = found(Beside())
    assert names(oto) == ["ways.0", "ways.1", "ways.2"]
    group = segment(oto, "ways.1")
    assert [piece.parameter for piece in group.zeros] == ["ways.1.2.weight", "ways.1.2.bias"]
    assert {piece.parameter for piece in group.slices} == {
        f"ways.1.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")
    }
    assert {name for name, _ in group.among} and len({s.among for s in oto.node_groups if s.segment}) == 1
    assert "the concatenation in the model gets shorter, and what reads it narrower" in str(oto.erasable())


LOUD = {
    "a buffer is added": lambda v, m: v + m.constant,
    "a sigmoid": lambda v, m: v.sigmoid(),
    "an exponential": lambda v, m: v.exp(),
    "a cosine": lambda v, m: v.cos(),
    "a softmax": lambda v, m: v.softmax(-1),
    "a number": lambda v, m: v + 0.5,
}


@pytest.mark.parametrize("within", LOUD)
def test_what_is_not_zero_with_its_writers_stays(within):
    oto = found(Beside(LOUD[within]))
    assert names(oto) == ["ways.0", "ways.2"]
    (branch,) = oto.explain().staying
    assert branch.branch == "ways.1" and "need not be zero" in branch.reason and branch.operator


def test_a_bias_that_is_a_parameter_is_zero_too():
    oto = found(Beside(lambda v, m: v + m.bias))
    groups = [group for group in oto.node_groups if group.segment]
    assert len(groups) == 3 and [["bias" in [piece.parameter for piece in g.zeros] for g in groups].count(True)] == [1]


BEHIND = {
    "a relu": (lambda v, m: v.relu(), None),
    "a norm": (lambda v, m: m.norm(v), None),
    "a norm over it": (lambda v, m: m.over(v), None),
    "a norm over it without parameters": (lambda v, m: nn.functional.layer_norm(v, (10,)), "zeros need not be zero"),
    "a sum with what is as wide": (lambda v, m: v + v.flip(-1), "its channels stay whole"),
    "a sigmoid": (lambda v, m: v.sigmoid(), "zeros need not be zero any more"),
    "a number": (lambda v, m: v + 0.5, "zeros need not be zero any more"),
    "a softmax": (lambda v, m: v.softmax(-1), "its channels stay whole"),
    "a part of it alone": (lambda v, m: torch.cat([v, v[..., 2:5]], -1)[..., :10], "channels are those of the model"),
}


@pytest.mark.parametrize("behind", BEHIND)
def test_what_is_behind_the_concatenation_decides(behind):
    how, why = BEHIND[behind]
    oto = found(Beside(behind=how))
    assert ("ways.1" in names(oto)) == (why is None)
    if why:
        reasons = {branch.branch: branch.reason for branch in oto.explain().staying}
        assert "it is laid beside others (cat)" in reasons["ways.1"] and why in reasons["ways.1"]
        assert "stays: " in str(oto.erasable())


def test_entries_of_a_norm_behind_it_are_zero_too():
    oto = found(Beside(behind=BEHIND["a norm"][0]))
    tensors = {name: torch.ones_like(p) for name, p in oto.model.named_parameters()}
    segment(oto, "ways.1").zero_(tensors, torch.tensor([0]))
    whole = [name for name, t in tensors.items() if not t.any()]
    assert whole == ["ways.1.2.weight", "ways.1.2.bias"]
    for name in ("norm.weight", "norm.bias"):
        assert tensors[name].tolist() == [1, 1, 0, 0, 0, 1, 1, 1, 1, 1]


class Odd(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))
        self.how = how

    def forward(self, x):
        return self.how(self, x)


STAYS = {
    "it is added to the other": (
        lambda m, x: m.head(torch.cat([a := m.a(x), m.b(x) + a], -1)),
        None,
    ),
    "as wide as the other has to be": (
        lambda m, x: m.head(torch.cat([m.a(x), m.b(x)], -1).unflatten(-1, (2, 4)).transpose(1, 2).flatten(1)),
        "what it is laid beside (cat) has the same channels",
    ),
    "taken apart again": (
        lambda m, x: m.head((y := torch.cat([m.a(x), m.b(x)], -1)) + torch.cat([y[:, :4].relu(), y[:, 4:]], -1)),
        "its channels are those of the model, too",
    ),
    "along tokens": (
        lambda m, x: m.head(torch.cat([m.a(x)[:, None], m.b(x)[:, None]], 1).flatten(1)),
        "what it is laid beside (cat) is one entry wide",
    ),
    "it is returned": (
        lambda m, x: (m.head(y := torch.cat([m.a(x), m.b(x)], -1)), y),
        "its channels stay whole: it is a dimension of an output",
    ),
}


@pytest.mark.parametrize("how", STAYS)
def test_what_is_no_segment_and_why(how):
    forward, why = STAYS[how]
    oto = found(Odd(forward))
    assert not any(s.axes for s in oto.partition.segments)
    if why:
        assert why in {branch.branch: branch.reason for branch in oto.explain().staying}["a"]
        assert "stays: " in str(oto.erasable())


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = way(4, 4), way(3, 5), nn.Linear(9, 2)

    def forward(self, x, y):
        return self.head(torch.cat([self.a(x), self.b(y)], -1))


def test_what_alone_reads_an_input_stays():
    oto = OTO(TwoInputs().eval(), (torch.randn(2, 4), torch.randn(2, 3)), compress_mode="both")
    assert not names(oto)
    assert {branch.reason for branch in oto.explain().staying} == {"what it is laid beside depends on other inputs"}


# --- random networks --------------------------------------------------------------------------------------------------


AFTER = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "half": lambda v: v * 0.5,
    "sigmoid": torch.sigmoid,
    "number": lambda v: v + 0.5,
    "none": lambda v: v,
}


class Part(nn.Module):
    """A branch; or some parts of one input beside each other, or beside it; or a branch added to its input."""

    def __init__(self, rng, width, depth):
        super().__init__()
        self.kind = rng.choice(["cat", "cat", "dense", "sum", "way"] if depth else ["way"])
        self.after = rng.choice(["none", "none", "relu", "tanh", "half", "sigmoid", "number"])
        many = rng.randint(2, 3) if self.kind == "cat" else 1
        self.twice = self.kind == "cat" and rng.random() < 0.2
        if self.kind == "sum":
            self.parts, self.width = nn.ModuleList([way(width, width)]), width
        elif self.kind == "way":
            self.width = rng.randint(2, 5)
            norm = [nn.BatchNorm1d(self.width)] if rng.random() < 0.3 else []
            self.parts = nn.ModuleList([way(width, self.width, *norm)])
        else:
            self.parts = nn.ModuleList(Part(rng, width, depth - 1) for _ in range(many))
            widths = [part.width for part in self.parts]
            self.width = sum(widths) + (width if self.kind == "dense" else 0) + (widths[0] if self.twice else 0)
        self.norm = nn.BatchNorm1d(self.width) if rng.random() < 0.3 and self.kind in ("cat", "dense") else None

    def forward(self, x):
        made = [part(x) for part in self.parts]
        if self.kind in ("cat", "dense"):
            made += [x] if self.kind == "dense" else made[:1] if self.twice else []
            value = torch.cat(made, -1)
            value = value if self.norm is None else self.norm(value)
        else:
            value = made[0] + x if self.kind == "sum" else made[0]
        return AFTER[self.after](value)


class Net(nn.Module):
    """Parts one after the other."""

    def __init__(self, seed):
        super().__init__()
        rng = random.Random(seed)
        self.stem, self.parts, width = nn.Linear(4, 5), nn.ModuleList(), 5
        for _ in range(rng.randint(1, 3)):
            self.parts.append(Part(rng, width, 2))
            width = self.parts[-1].width
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x)
        for part in self.parts:
            x = part(x)
        return self.head(x)


def randomized(seed):
    torch.manual_seed(seed)
    model = Net(seed).double().eval()
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.is_floating_point():
            nn.init.uniform_(t, 0.3, 1) if t.ndim < 2 or "running" in name else nn.init.normal_(t)
    return model, torch.randn(6, 4, dtype=torch.float64)


def test_random_networks_have_what_is_to_be_tried():
    found = [OTO(*randomized(seed), compress_mode="both", allow_graph=True) for seed in range(30)]
    beside = [s for oto in found for s in oto.partition.segments if s.axes]
    staying = [branch.reason for oto in found for branch in oto.explain().staying]
    assert len(beside) > 40 and any(s.behind for s in beside) and any(a.body < b.body for a in beside for b in beside)
    assert sum("need not be zero" in reason for reason in staying) > 10


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_nothing_of_a_segment_matters_once_its_zeros_are(seed):
    """Brute force: all else that computes it, and the columns that read it, may hold anything."""
    model, x = randomized(seed)
    oto = OTO(model, x, compress_mode="both", allow_graph=True)
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    for group in (g for g in oto.node_groups if g.segment):
        parameters = dict(model.named_parameters())
        group.zero_(parameters, torch.tensor([0]))
        before = model(x)
        kept = {group.name: np.arange(0)}
        with torch.no_grad():
            for leaf in (leaf for leaf in oto.partition.found.graph.leaves if leaf.kind == "parameter"):
                gone = torch.ones(leaf.value.shape, dtype=torch.bool)
                for dim, mask in enumerate(oto.partition.entries(leaf.value, kept)):
                    gone &= torch.from_numpy(mask).view(-1, *[1] * (gone.ndim - dim - 1))
                segment = next(s for s in oto.partition.segments if s.name == group.name)
                gone = torch.ones_like(gone) if leaf in segment.leaves else ~gone
                zeros = torch.zeros_like(gone)
                for piece in group.zeros:
                    if piece.parameter in leaf.names:
                        piece.of(zeros).fill_(True)
                own = parameters[leaf.name]
                own[gone & ~zeros] = torch.randn_like(own)[gone & ~zeros]
        assert (model(x) - before).abs().max() <= 1e-9 * before.abs().max()
        model.load_state_dict(whole, strict=False)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.3, 0.6, 1.0]))
def test_a_network_without_segments_and_channels_is_the_zeroed_one(seed, share):
    model, x = randomized(seed)
    oto = OTO(model, x, compress_mode="both")
    found = [group for group in oto.node_groups if group.segment and group.prunable]
    if not found:
        return
    oto.random_set_zero_groups(0.3, seed=seed)
    parameters = dict(model.named_parameters())
    for group in random.Random(seed).sample(found, max(1, int(len(found) * share))):
        group.zero_(parameters, torch.tensor([0]))
    subnet = oto.construct_subnet()
    assert subnet.max_error <= 1e-9 and type(subnet.model) is Net
    assert sum(p.numel() for p in subnet.model.parameters()) == subnet.cost_after.params
    counts = [len(subnet.kept[name]) for name in oto.costs.names]
    assert oto.costs.at(np.array(counts)) == subnet.cost_after, "what a choice counts is what the slim model costs"


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_what_is_legal_keeps_something_in_every_joint(seed):
    model, x = randomized(seed)
    partition = OTO(model, x, compress_mode="both", allow_graph=True).partition
    rng = random.Random(seed)
    kept = {s.name: np.arange(0) for s in partition.segments if rng.random() < 0.8}
    kept, _ = legal(partition, kept)
    gone = partition.erased(kept)
    away = frozenset().union(*(s.body for s in gone))
    for node in partition.found.graph.nodes:
        if node.index not in away and node.op is torch.ops.aten.cat.default:
            sizes = [partition.entries(value, kept)[-1].sum() for value in node.inputs()]
            assert sum(sizes) == partition.entries(node.outputs[0], kept)[-1].sum() > 0
    alive = set(partition.found.graph.inputs)
    for node in (node for node in partition.found.graph.nodes if node.index not in away):
        if any(value in alive and all(m.any() for m in partition.entries(value, kept)) for value in node.inputs()):
            alive.update(node.outputs)
    assert alive.issuperset(partition.found.graph.outputs), "the outputs still depend on the input"
    left = cost(partition, {name: len(own) for name, own in kept.items()})
    assert 0 < left.params <= cost(partition).params
