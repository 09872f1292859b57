"""Segments: what is found is proved, what stays has a reason, and what is saved is what a network without it costs."""

from __future__ import annotations

import copy
import pickle
import random

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oto import OTO
from oto._torch import tree_map_only
from oto.axes.invariance import Everywhere
from oto.errors import OptionError, TargetError, UnknownParameterError
from oto.groups.cost import cost
from oto.groups.segments import branches, legal, segment_groups, with_segments
from tests.properties.commute import calls, trace
from tests.properties.samples import Sample, samples


class Residual(nn.Module):
    """``x + f(x)``, with what is done to ``f(x)`` on the way."""

    def __init__(self, after=lambda v, m: v, ways=1):
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.ways = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)) for _ in range(ways))
        self.head = nn.Linear(8, 3)
        self.register_buffer("constant", torch.ones(8))
        self.gate = nn.Parameter(torch.ones(()))
        self.after = after

    def forward(self, x):
        x = self.stem(x)
        for way in self.ways:
            x = x + self.after(way(x), self)
        return self.head(x)


def found(model, *x, **options):
    return OTO(model.eval(), x, compress_mode="both", **options)


def names(oto):
    return [segment.name for segment in oto.partition.segments]


def test_a_residual_branch_is_a_segment():
    oto = found(Residual(ways=2), torch.randn(2, 4))
    assert names(oto) == ["ways.0", "ways.1"]
    group = next(g for g in oto.node_groups if g.name == "ways.0")
    assert [piece.parameter for piece in group.zeros] == ["ways.0.2.weight", "ways.0.2.bias"]
    assert {piece.parameter for piece in group.slices} == {
        f"ways.0.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")
    }
    assert group.prunable and group.size == 1 and group.min_kept == 0


def test_a_segment_is_named_by_what_is_zeroed():
    class Weighed(Residual):
        def forward(self, x):
            x = self.stem(x)
            gates = self.gate.expand(len(self.ways)).softmax(0)  # never zero, and the last parameter of every way
            return self.head(x + sum(gate * way(x) for gate, way in zip(gates, self.ways, strict=True)))

    assert {"ways.0", "ways.1", "ways.2"} <= set(names(found(Weighed(ways=3), torch.randn(2, 4))))


LOUD = {
    "a buffer is added": lambda v, m: v + m.constant,
    "a sigmoid": lambda v, m: v.sigmoid(),
    "a cosine": lambda v, m: v.cos(),
    "a softmax": lambda v, m: v.softmax(-1),
    "a norm without parameters": lambda v, m: nn.functional.layer_norm(v + m.constant, (8,)),
    "a number": lambda v, m: v + 0.5,
    "one over it": lambda v, m: m.constant / v,
}


@pytest.mark.parametrize("after", LOUD)
def test_a_branch_with_something_behind_it_is_none(after):
    oto = found(Residual(LOUD[after]), torch.randn(2, 4))
    assert not names(oto)
    (branch,) = oto.explain().staying
    assert "need not be zero" in branch.reason and branch.operator
    assert "stays: ways" in str(oto.erasable()) and "stays: ways" in str(oto.explain())


QUIET = {
    "a tanh": lambda v, m: v.tanh(),
    "times a buffer": lambda v, m: v * m.constant,
    "times a number without dimensions": lambda v, m: v * m.gate,
    "there and back": lambda v, m: v.unflatten(-1, (2, 4)).transpose(-1, -2).transpose(-1, -2).flatten(-2),
    "dropout": lambda v, m: nn.functional.dropout(v, 0.5, m.training),
}


@pytest.mark.parametrize("after", QUIET)
def test_a_branch_that_zero_goes_through_is_one(after):
    assert len(names(found(Residual(QUIET[after]), torch.randn(2, 4)))) == 1


def test_what_scales_a_branch_is_all_that_must_be_zero():
    oto = found(Residual(QUIET["times a number without dimensions"]), torch.randn(2, 4))
    group = next(g for g in oto.node_groups if g.segment)
    assert [piece.parameter for piece in group.zeros] == ["gate"]
    group.zero_(dict(oto.model.named_parameters()), torch.tensor([0]))
    assert not oto.model.gate


class Odd(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
        self.how = how

    def forward(self, x):
        return self.how(self, x)


STAYS = {
    "it is returned, too": (lambda m, x: (m.head(x + (v := m.a(x))), v), "a: its result is read elsewhere, too"),
    "its weight is read elsewhere": (lambda m, x: m.head(m.a(x + m.a(x))), "a: a.weight is read elsewhere, too"),
    "a product, no sum": (lambda m, x: m.head(x * m.a(x)), None),
    "it is broadcast": (lambda m, x: m.head(x + m.a(x).mean(-1, keepdim=True)), "a: it is broadcast"),
    "another dtype": (lambda m, x: m.head((x.half() + m.a(x)).float()), "a: what it is added to has another dtype"),
    "twice the other": (lambda m, x: m.head(torch.add(m.a(x), x, alpha=2)), "a: what it is added to is taken 2 times"),
    "nothing else is there": (lambda m, x: m.head(m.a(x)), None),
    "a constant is": (lambda m, x: m.head(m.a(x) + m.b.weight[0]), None),
    "taken off it": (lambda m, x: m.head(m.a(x) - x), "a: what is taken off it would be left with another sign"),
    "beside others": (
        lambda m, x: m.head(torch.cat([m.a(x).relu()[:, :2], m.b(x)[:, :2]], 1).cumsum(1)),
        "a: it is laid beside others (cat), and its channels stay whole",
    ),
    "stacked, with a number behind it": (
        lambda m, x: m.head(torch.stack([m.a(x) + 1, m.b(x) + 1]).sum(0)),
        "a: with a.weight, a.bias at zero it need not be zero",
    ),
}


@pytest.mark.parametrize("how", STAYS)
def test_what_is_no_segment_and_why(how):
    forward, why = STAYS[how]
    oto = found(Odd(forward), torch.randn(4, 4))
    assert not names(oto)
    for said in (str(oto.explain()), str(oto.erasable())):
        assert f"stays: {why}" in said if why else "stays: " not in said


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
        self.pools = nn.ModuleList(nn.AvgPool1d(3, 1, 1) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for pool in self.pools:
            x = x + pool(x)
        return self.head(x)


def test_branches_without_parameters_say_so_once():
    oto = found(Pooled(), torch.randn(2, 4))
    assert len(oto.explain().staying) == 3 and not names(oto)
    said = [line for line in str(oto.explain()).splitlines() if line.startswith("stays: ")]
    assert said == ["stays: pools.0: nothing in it is trained, so nothing of it can become zero (and 2 like it)"]


def test_a_frozen_writer_stays_with_the_reason():
    model = Residual(ways=2)
    model.ways[0][2].bias.requires_grad_(False)
    oto = found(model, torch.randn(2, 4))
    group = next(g for g in oto.node_groups if g.name == "ways.0")
    assert not group.prunable and "frozen" in group.reason
    skipped = found(Residual(ways=2), torch.randn(2, 4), skip_patterns=["ways.1"])
    assert [g.name for g in skipped.node_groups if g.segment and g.prunable] == ["ways.0"]


def test_parallel_branches_keep_one_of_them():
    model = Odd(lambda m, x: m.head(m.a(x).relu() + m.b(x)))
    oto = found(model, torch.randn(2, 4))
    assert sorted(names(oto)) == ["a", "b"]
    sets = {g.name: g.among for g in oto.node_groups if g.segment}
    assert sets["a"] == sets["b"] and [n for _, n in sets["a"]] == [1]
    with torch.no_grad():
        for p in (*model.a.parameters(), *model.b.parameters()):
            p.zero_()
    subnet = oto.construct_subnet()
    assert len(oto.partition.erased(subnet.kept)) == 1 and any("come apart" in note for note in subnet.notes)


def test_an_input_goes_on_being_read():
    model = Odd(lambda m, x: m.head(x + m.a(x)))
    model.how = lambda m, x, y: m.head(x + m.a(y) + m.b(x))
    model.forward = lambda x, y: model.how(model, x, y)
    oto = found(model, torch.randn(2, 4), torch.randn(2, 4))
    sets = {g.name: g.among for g in oto.node_groups if g.segment}
    assert sets["a"] == (("of input 1", 1),) and not sets["b"]
    kept, back = legal(oto.partition, {"a": torch.arange(0).numpy(), "b": torch.arange(0).numpy()})
    assert len(kept["a"]) == 1 and not len(kept["b"]) and back == ["a"]


def test_runs_keep_some():
    oto = found(Residual(ways=4), torch.randn(2, 4))
    partition = oto.partition
    assert {g.among for g in segment_groups(partition)} == {(("ways.*", 1),)}
    assert {g.among for g in segment_groups(partition, 0.5)} == {(("ways.*", 2),)}
    assert {g.among for g in segment_groups(partition, 3)} == {(("ways.*", 3),)}
    for asked, least in (({"ways.1": 2}, 2), ({"ways.1": 3, "ways.2": 2}, 3), ({"*": 0}, 0)):  # the largest of several
        assert {g.among for g in segment_groups(partition, asked)} == {(("ways.*", least),) if least else ()}
    with pytest.raises(TargetError, match="min_depth"):
        segment_groups(partition, 1.5)
    with pytest.raises(UnknownParameterError, match="nothing"):
        segment_groups(partition, {"nothing": 1})


@pytest.mark.parametrize("wrong", [-1, 1.5, "2", None, {"ways.*": -1}])
@pytest.mark.parametrize("mode", ["prune", "both"])
def test_a_depth_that_means_nothing_is_refused_whether_or_not_any_may_go(mode, wrong):
    with pytest.raises(TargetError, match=r"min_depth is .*; it is a number of segments"):
        OTO(Residual(ways=2), torch.randn(2, 4), compress_mode=mode, min_depth=wrong)


def test_nothing_changes_for_prune():
    x, model = torch.randn(2, 4), Residual(ways=2)
    oto, both = OTO(model, x), OTO(model, x, compress_mode="both")
    assert not any(g.segment for g in oto.node_groups) and not oto.partition.segments
    assert oto.node_groups == both.node_groups[: len(oto.node_groups)]
    assert not oto.explain().staying and oto.coverage() == both.coverage()
    assert str(oto.erasable()) == str(both.erasable()), "it can be asked for before"
    with pytest.raises(OptionError, match="compress_mode"):
        OTO(model, x, compress_mode="depth")


def test_erase_leaves_channels_alone():
    oto = OTO(Residual(ways=2), torch.randn(2, 4), compress_mode="erase")
    assert [g.name for g in oto.node_groups if g.prunable] == ["ways.0", "ways.1"]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_costs_are_those_of_the_network_without_it(share):
    oto = found(Residual(ways=4), torch.randn(2, 4))
    partition, chosen = oto.partition, random.Random(0).sample(names(oto), int(4 * share))
    kept = dict.fromkeys(chosen, 0)
    own = cost(partition, kept)
    less = sum(p.numel() for n, p in oto.model.named_parameters() if n[:6] in chosen)
    assert cost(partition).params - own.params == less
    assert own.macs == 2 * (4 * 8 + (4 - len(chosen)) * 2 * 8 * 6 + 8 * 3)
    counts = oto.costs.sizes.copy()
    for i, name in enumerate(oto.costs.names):
        counts[i] = kept.get(name, counts[i])
    assert oto.costs.at(counts) == own


def test_the_marginal_cost_of_a_segment_there_and_back():
    costs = found(Residual(ways=2), torch.randn(2, 4)).costs
    for gone in ([], ["ways.0"], ["ways.0", "ways.1"]):
        counts = costs.sizes.copy()
        for name in gone:
            counts[costs.names.index(name)] = 0
        fewer = counts - (1 - counts) * (costs.sizes == 1)  # those that are there go, the others come back
        fewer = (costs.sizes == 1) * (2 * counts - 1)
        found_ = costs.macs.marginal(counts, fewer)
        for i, n in enumerate(fewer):
            after = counts.copy()
            after[i] -= n
            assert found_[i] == costs.macs(counts) - costs.macs(after)


# --- facts of whole tensors -------------------------------------------------------------------------------------------


def by_operator():
    """One call of each operator at once; all others in the long run."""
    seen = set()
    for i, sample in enumerate(samples()):
        yield pytest.param(sample, id=f"{i}-{sample.op}", marks=[pytest.mark.zoo] if sample.op in seen else [])
        seen.add(sample.op)


@pytest.mark.parametrize("sample", list(by_operator()))
def test_what_a_rule_says_of_removed_entries_holds_for_whole_tensors(sample: Sample):
    if not sample.values or sample.device != "cpu":
        pytest.skip("its numbers mean nothing")
    args, kwargs = sample.make()
    traced = trace(sample.op, args, kwargs)
    everywhere = Everywhere(traced.found)
    leaves = [leaf for leaf in traced.graph.leaves if leaf.value.dtype.is_floating_point]
    node = traced.graph.nodes[0]
    for zeros in [*([leaf] for leaf in leaves), leaves]:
        facts = everywhere.with_zeros(traced.found.operands[leaf.value].index for leaf in zeros)
        claims = []
        for made in node.outputs:
            index = None if made is None else traced.found.operands[made].index
            claims.append(None if index is None else facts.get(index, everywhere.always.get(index)))
        if not any(type(claim) in (int, float, bool) and claim == claim for claim in claims):
            continue
        gone = {id(traced.tensors[leaf.value]) for leaf in zeros}

        def put(x, gone=gone):
            return torch.zeros_like(x) if id(x) in gone else x

        results = calls(sample.op, *tree_map_only(torch.Tensor, put, (args, kwargs)))
        for claim, result in zip(claims, results, strict=True):
            if type(claim) in (int, float, bool) and claim == claim and isinstance(result, torch.Tensor):
                assert (result == claim).all(), f"{sample}: said to hold {claim}"


# --- brute force ------------------------------------------------------------------------------------------------------


class Cell(nn.Module):
    """Nodes that sum what comes from some earlier ones, through a layer or as it is."""

    def __init__(self, seed: int):
        super().__init__()
        drawn = random.Random(seed)
        self.edges = []
        self.ops = nn.ModuleDict()
        for node in range(1, drawn.randint(2, 5)):
            for source in sorted(drawn.sample(range(node), drawn.randint(1, min(node, 3)))):
                kind = drawn.choice(["linear", "norm", "skip", "relu", "loud", "nested"])
                self.edges.append((source, node, kind))
                self.ops[f"{source}-{node}"] = {
                    "linear": lambda: nn.Linear(4, 4),
                    "norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU()),
                    "skip": nn.Identity,
                    "relu": nn.ReLU,
                    "loud": lambda: nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()),
                    "nested": lambda: Inner(),
                }[kind]()
        self.head = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))

    def forward(self, x):
        nodes = {0: x}
        for source, node, _ in self.edges:
            made = self.ops[f"{source}-{node}"](nodes[source])
            nodes[node] = nodes[node] + made if node in nodes else made
        return self.head(nodes[max(nodes)])


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.way, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.way(x).relu())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_bodies_are_what_brute_force_finds(seed):
    model, x = Cell(seed).eval(), torch.randn(3, 4)
    oto = OTO(model, x, allow_graph=True)
    partition, found_ = with_segments(oto.partition)
    graph = partition.found.graph
    made = {value: node.index for node in graph.nodes for value in node.outputs}
    flow = nx.DiGraph()
    for node in graph.nodes:
        flow.add_edges_from((made[v], node.index) for v in node.inputs() if v in made)
    flow.add_edges_from((made[v], "out") for v in graph.outputs)
    for segment in partition.segments:
        cut = flow.copy()
        cut.remove_edge(made[segment.edge], segment.joint)
        reaches = nx.ancestors(cut, "out") | {"out"}
        before = nx.ancestors(flow, "out")
        assert segment.body == {n for n in before if n not in reaches}
        with torch.no_grad():  # and it is zero on whatever comes in
            parameters = dict(model.named_parameters())
            before_ = {leaf.name: parameters[leaf.name].clone() for leaf in segment.writers}
            for name in before_:
                parameters[name].zero_()
            seen = {}
            for leaf in segment.leaves:  # nothing that it holds matters any more
                if leaf.name not in before_:
                    seen[leaf.name] = parameters[leaf.name].clone()
            one = model(x)
            for name in seen:
                parameters[name].normal_()
            assert torch.equal(one, model(x))
            for name, value in {**before_, **seen}.items():
                parameters[name].copy_(value)
    assert len(found_.staying) == len({(s.node, s.path) for s in found_.staying})


def test_segments_of_a_copy_are_found_again():
    plain = OTO(Plain(nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 4), compress_mode="both")
    assert names(copy.deepcopy(plain)) == names(plain)
    assert names(pickle.loads(pickle.dumps(plain))) == names(plain) == ["inner"]


class Plain(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(4, 2)

    def forward(self, x):
        return self.head(x + self.inner(x))


def test_it_is_told_as_a_table():
    oto = found(Residual(ways=2), torch.randn(2, 4))
    table = oto.erasable()
    assert "ways.0" in str(table) and "<table>" in table._repr_html_()
    (first, _) = table.to_dict()["parts"]
    assert first["modules"] == ("ways.0",) and first["params"] == 8 * 6 + 6 + 6 * 8 + 8 and first["macs"] == 2 * 96
    assert not branches(OTO(Residual(), torch.randn(2, 4)).partition.found).staying


class Tied(nn.Module):
    """Branches that share a norm."""

    def __init__(self, ways=3):
        super().__init__()
        self.norm, self.stem = nn.LayerNorm(8), nn.Linear(4, 8)
        self.ways, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(ways)), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for way in self.ways:
            x = x + way(self.norm(x))
        return self.head(x)


@pytest.mark.parametrize("ways", [2, 3, 8])
def test_a_norm_that_segments_share_goes_with_the_last_of_them(ways):
    torch.manual_seed(0)
    model = Tied(ways)
    oto = found(model, torch.randn(2, 4))
    assert len(names(oto)) == ways
    for many in (0, 1, ways - 1, ways):
        kept = dict.fromkeys(names(oto)[:many], 0)
        left = cost(oto.partition, kept)
        assert left.params == 4 * 8 + 8 + 3 * 8 + 3 + (ways - many) * 72 + 16 * (many < ways)
        assert left.bytes == 4 * left.params
        counts = np.array([kept.get(name, size) for name, size in zip(oto.costs.names, oto.costs.sizes, strict=True)])
        assert oto.costs.at(counts) == left or (ways > 6 and many == ways)
    for group in (group for group in oto.node_groups if group.segment):
        group.zero_(dict(model.named_parameters()), torch.tensor([0]))
    subnet = oto.construct_subnet()
    assert sum(p.numel() for p in subnet.model.parameters()) == subnet.cost_after.params == 67
