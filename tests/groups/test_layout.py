"""Ties between repeated blocks, what they hold to, and divisors for several devices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from oto import OTO
from oto.errors import TargetError
from oto.groups.layout import (
    apply_tensor_parallel,
    as_wide_as_heads,
    atoms_per_step,
    drawn,
    equalize_ties,
    settled,
    ties_of,
)
from oto.groups.node_group import Cut, NodeGroup, Slice


class Block(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Tower(nn.Module):
    """Three blocks alike, one of another size, and a stem that looks like them but stands alone."""

    def __init__(self):
        super().__init__()
        self.stem = Block(8, 12)
        self.blocks = nn.ModuleList([Block(8, 12), Block(8, 12), Block(8, 12), Block(8, 20)])
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


X = torch.randn(2, 8)
pytestmark = pytest.mark.filterwarnings("ignore::oto.errors.UnstatedWarning")  # a tower has no config


def ties(oto):
    found = {}
    for group in oto.node_groups:
        found.setdefault(group.tie, []).append(group.name)
    return found


def test_what_lies_at_one_place_of_repeated_blocks_is_tied():
    found = ties(OTO(Tower(), X, layout="uniform"))
    assert found.pop("blocks.*.up.weight") == [f"blocks.{i}.up.weight" for i in range(3)]
    assert found.keys() == {None}


@pytest.mark.parametrize("layout", [None, "free"])
def test_nothing_is_tied_by_default(layout):
    assert ties(OTO(Tower(), X, layout=layout)).keys() == {None}


def test_names_with_numbers_are_no_repetition():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block1, self.block2 = Block(8, 12), Block(8, 12)

        def forward(self, x):
            return self.block2(self.block1(x)).sum(-1)

    assert ties(OTO(Net(), X, layout="uniform")).keys() == {None}


def test_children_of_several_classes_are_no_repetition():
    class Other(Block):
        pass

    net = nn.Sequential(nn.Linear(8, 8), Block(8, 12), Other(8, 12), nn.Flatten())
    assert ties(OTO(net, X, layout="uniform")).keys() == {None}


def test_where_one_stays_whole_all_do():
    oto = OTO(Tower(), X, layout="uniform", skip_patterns=["blocks.1"])
    whole = {g.name: g.reason for g in oto.node_groups if not g.prunable and g.name.startswith("blocks.")}
    assert whole.keys() >= {"blocks.0.up.weight", "blocks.1.up.weight", "blocks.2.up.weight"}
    assert "blocks.1.up.weight" in whole["blocks.0.up.weight"] and "stays whole" in whole["blocks.0.up.weight"]
    assert "blocks.3.up.weight" not in whole
    later = OTO(Tower(), X, layout="uniform")
    later.mark_unprunable_by_param_names(["blocks.2.up.weight"])
    assert not any(g.prunable for g in later.node_groups if g.tie)


def test_all_keep_what_one_has_to_keep():
    oto = OTO(Tower(), X, layout="uniform", min_kept={"blocks.1.up.weight": 7})
    assert {g.min_kept for g in oto.node_groups if g.tie} == {7}


def test_a_tie_that_cannot_be_met_is_told():
    a, b = (NodeGroup(name, 4, (), tie="t") for name in "ab")
    held = settled([a, NodeGroup("b", 4, (), reason="marked", tie="t")])
    assert held[0].reason == "layout: b, which is to have equally many, stays whole"
    assert settled([a, b]) == (a, b)


def test_ties_are_numbered():
    groups = [NodeGroup(n, 2, (), tie=t) for n, t in [("a", "x"), ("b", None), ("c", "x"), ("d", None), ("e", "y")]]
    assert ties_of(groups).tolist() == [0, 1, 0, 2, 3]


# Several devices -----------------------------------------------------------------------------------------------------


def heads(outer, inner):
    """Rows that are ``outer`` times ``inner``: the group of the one and the group of the other."""
    first = NodeGroup("outer", outer, (Slice("w", 0, (Cut(1, outer, inner, 0, outer),)),))
    return first, NodeGroup("inner", inner, (Slice("w", 0, (Cut(outer, inner, 1, 0, inner),)),))


def test_the_outermost_factor_stays_divisible():
    first, second = apply_tensor_parallel(heads(4, 6), 2)
    assert (first.divisor, second.divisor) == (2, 1)


def test_what_does_not_divide_stays_whole_and_the_rest_falls_to_what_is_inside():
    first, second = apply_tensor_parallel(heads(2, 6), 4)  # as two key heads on four devices, with six queries each
    assert first.reason == "layout: tensor_parallel=4 does not divide its 2 atoms" and second.divisor == 2


def test_the_number_of_devices():
    with pytest.raises(TargetError, match="tensor_parallel is 0"):
        OTO(Tower(), X, tensor_parallel=0)
    assert {g.divisor for g in OTO(Tower(), X).node_groups} == {1}


# Random choices ------------------------------------------------------------------------------------------------------


def chosen_counts(groups, share, seed=0):
    return {name: len(atoms) for name, atoms in drawn(groups, share, seed).items()}


@pytest.mark.parametrize("seed", range(5))
def test_a_random_choice_holds_to_ties_and_divisors(seed):
    tied = [NodeGroup(name, 12, (), tie="t", divisor=3) for name in "abc"]
    free = NodeGroup("d", 20, (), min_kept=4)
    chosen = drawn([*tied, free], 0.5, seed)
    counts = {len(chosen[name]) for name in "abc"}
    assert len(counts) == 1 and counts.pop() % 3 == 0
    total = sum(map(len, chosen.values()))
    assert 28 - 9 < total <= 28  # within one step of the tie, which is nine atoms
    assert all(len(set(atoms)) == len(atoms) for atoms in chosen.values())
    assert sorted(chosen["a"]) != sorted(chosen["b"])  # each its own


def test_a_random_choice_keeps_the_least():
    groups = [
        NodeGroup("a", 8, (), min_kept=3, tie="t", divisor=2),
        NodeGroup("b", 8, (), min_kept=5, tie="t", divisor=2),
    ]
    assert chosen_counts(groups, 2 / 16) == {}  # less than one step
    assert chosen_counts(groups, 4 / 16) == {"a": 2, "b": 2}
    with pytest.raises(TargetError, match=r"\[0, 0\.2500\]"):
        drawn(groups, 0.5, 0)


def test_a_random_choice_of_a_model_is_even():
    model = Tower()
    oto = OTO(model, X, layout="uniform", tensor_parallel=2)
    oto.random_set_zero_groups(0.5)
    zero = [int((block.up.weight == 0).all(1).sum()) for block in model.blocks]
    assert zero[0] == zero[1] == zero[2] > 0 and not any(n % 2 for n in zero)


# Shares ---------------------------------------------------------------------------------------------------------------


def sizes(*numbers, **options):
    return [NodeGroup(f"g{n}", n, (), tie="t", **options) for n in numbers]


def test_groups_of_other_sizes_keep_the_same_share():
    assert atoms_per_step([*sizes(128, 8, 64), NodeGroup("alone", 7, ())]).tolist() == [16, 1, 8, 1]
    assert atoms_per_step(sizes(6, 6)).tolist() == [1, 1] and atoms_per_step(sizes(12, 8)).tolist() == [3, 2]
    held = settled([replace(group, min_kept=n) for group, n in zip(sizes(128, 8), (20, 1), strict=True)])
    assert [group.min_kept for group in held] == [32, 2]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.75])
def test_a_random_choice_keeps_shares(share):
    groups = [*sizes(32, 8, divisor=1), NodeGroup("alone", 20, ())]
    chosen = drawn(groups, share, seed=1)
    assert len(chosen.get("g32", ())) == 4 * len(chosen.get("g8", ()))
    assert all(len(set(own)) == len(own) for own in chosen.values())
    assert int(60 * share) - 5 < sum(map(len, chosen.values())) <= int(60 * share)


def test_uneven_shares_are_brought_to_the_largest():
    kept = {"g32": np.arange(9), "g8": np.array([1, 2])}
    result, told = equalize_ties(sizes(32, 8), kept)
    assert [len(result[name]) for name in ("g32", "g8")] == [12, 3]
    assert told == ["4 zero atoms of t were kept, because its groups are to keep the same share by the layout"]


class Heads(nn.Module):
    """A stream of 24, 6 heads of 4 for 2 keys each; and one that is no stream of theirs."""

    def __init__(self, fused=False, keys=3):
        super().__init__()
        self.keys, self.words = keys, nn.Linear(5, 24)
        self.q, self.k, self.v = nn.Linear(24, 24), nn.Linear(24, 4 * keys), nn.Linear(24, 4 * keys)
        self.o, self.up, self.down, self.head = (
            nn.Linear(24, 24),
            nn.Linear(24, 24),
            nn.Linear(24, 24),
            nn.Linear(24, 2),
        )

    def forward(self, x):
        x = self.words(x)
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(6 // self.keys, 1) for t in (k, v))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2))
        return self.head(x + self.down(self.up(x).relu()))


@pytest.mark.parametrize("keys, per", [(6, 4), (3, 8)])
def test_a_stream_is_tied_to_its_heads_and_their_width_stays(keys, per):
    oto = OTO(Heads(keys=keys), torch.randn(2, 3, 5))
    found = {g.name: g for g in as_wide_as_heads(oto.node_groups, oto.costs.weights) if g.prunable}
    (tie,) = {g.tie for g in found.values()} - {None}
    assert {name: g.size for name, g in found.items() if g.tie == tie} == {"words.weight": 24, "q.weight": keys}
    assert [name for name, g in found.items() if g.tie is None] == ["up.weight"]  # as wide, and of no heads
    assert atoms_per_step([found["words.weight"], found["q.weight"]]).tolist() == [per, 1]


def test_where_the_stream_is_whole_so_are_the_heads():
    oto = OTO(Heads(), torch.randn(2, 3, 5), skip_patterns=["o"])
    found = [g.name for g in as_wide_as_heads(oto.node_groups, oto.costs.weights) if g.prunable]
    assert found == ["up.weight"]
    reasons = {g.reason for g in as_wide_as_heads(oto.node_groups, oto.costs.weights) if g.name == "q.weight"}
    assert reasons == {"layout: readers of a config divide its width by its heads"}


@pytest.mark.parametrize("target", [{"target_params": 0.5}, {"target_macs": 0.6}, {"target_group_sparsity": 0.4}])
@pytest.mark.parametrize("options", [{}, {"saliency": "magnitude"}, {"align": 8}])
def test_a_choice_keeps_shares(target, options):
    torch.manual_seed(0)
    model = Heads(keys=6)
    oto = OTO(model, torch.randn(2, 3, 5), layout="stock")
    wide = as_wide_as_heads(oto.node_groups, oto.costs.weights)  # nothing states its widths
    oto._analysis = replace(oto._analysis, groups=wide)
    try:
        optimizer = oto.hesso(lr=0.01, start_pruning_step=1, pruning_steps=4, pruning_periods=2, **target, **options)
    except TargetError as coarse:
        assert "steps are coarse" in str(coarse) and options.get("align") == 8
        return
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 5)).square().sum().backward()
        optimizer.step()
    left = {g.name: g.size - len(optimizer.pruned_groups.get(g.name, ())) for g in optimizer.node_groups}
    assert left["words.weight"] == 4 * left["q.weight"] <= 24
    assert optimizer.progress.over and optimizer.progress.cost <= optimizer.choice.target.goal
    assert oto.construct_subnet().model.o.weight.shape == (left["words.weight"],) * 2


# Uneven zeros --------------------------------------------------------------------------------------------------------


def test_uneven_zeros_keep_the_most_and_say_so():
    groups = [NodeGroup(name, 6, (), tie="t", divisor=2) for name in "ab"]
    kept = {"a": np.array([1, 4, 5]), "b": np.array([0])}
    result, told = equalize_ties(groups, kept)
    assert {name: atoms.tolist() for name, atoms in result.items()} == {"a": [0, 1, 4, 5], "b": [0, 1, 2, 3]}
    assert told == ["4 zero atoms of t were kept, because its groups are to have 4 each by the layout"]
    assert equalize_ties(groups, result) == (result, [])


def test_a_subnet_of_uneven_zeros():
    model = Tower()
    oto = OTO(model, X, layout="uniform")
    with torch.no_grad():
        for block, n in zip(model.blocks, (3, 5, 0, 6), strict=True):
            for tensor in (block.up.weight, block.up.bias):
                tensor[:n] = 0
    model.blocks[2].up.weight.data[:2], model.blocks[2].up.bias.data[:2] = 0, 0
    subnet = oto.construct_subnet()
    assert [block.up.out_features for block in subnet.model.blocks] == [10, 10, 10, 14]
    assert "blocks.*.up.weight were kept" in str(subnet) and any("10 each" in note for note in subnet.notes)
