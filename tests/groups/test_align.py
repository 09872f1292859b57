"""Sizes of dimensions in multiples: shared out among factors and segments, whatever is kept of each."""

from __future__ import annotations

from math import lcm

import numpy as np
import pytest
import torch
from torch import nn

from oto import OTO
from oto.errors import NothingPrunableError, OptionError, UnknownParameterError
from oto.groups.align import PRESETS, multiples
from oto.groups.node_group import Cut, NodeGroup, Slice


class Attention(nn.Module):
    """A stream of 48; 6 heads of 8, of 16 for values; a table of places by heads; 40 inside."""

    def __init__(self, fused=False):
        super().__init__()
        self.fused, self.table = fused, nn.Parameter(torch.randn(5, 6))
        self.q, self.k, self.v = nn.Linear(48, 48), nn.Linear(48, 48), nn.Linear(48, 96)
        self.o, self.up, self.down = nn.Linear(96, 48), nn.Linear(48, 40), nn.Linear(40, 48)
        self.words, self.head = nn.Embedding(20, 48), nn.Linear(48, 3)

    def forward(self, ids):
        x = self.words(ids)
        q, k, v = (p(x).unflatten(-1, (6, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        places = (torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])).abs()
        bias = self.table[places].permute(2, 0, 1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.3)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return self.head(x + self.down(self.up(x).relu()))


@pytest.fixture(scope="module")
def oto():
    torch.manual_seed(0)
    return OTO(Attention(), torch.randint(0, 20, (2, 5)))


NAMES = {"hidden": "o.weight", "heads": "table", "width": "q.weight", "values": "v.weight", "inner": "up.weight"}


def by_name(oto, align):
    found = dict(
        zip((g.name for g in oto.node_groups), multiples(oto.node_groups, align, oto.costs.weights), strict=True)
    )
    return {role: found[name] for role, name in NAMES.items()}


def test_the_network_is_what_these_tests_take_it_for(oto):
    assert {g.name: g.size for g in oto.node_groups if g.prunable} == {
        "o.weight": 48,
        "table": 6,
        "q.weight": 8,
        "v.weight": 16,
        "up.weight": 40,
    }
    assert oto.costs.weights == {f"{name}.weight" for name in ("q", "k", "v", "o", "up", "down", "head")}


@pytest.mark.parametrize(
    "align, wanted",
    [
        (1, {"hidden": 1, "heads": 1, "width": 1, "values": 1, "inner": 1}),
        (8, {"hidden": 8, "heads": 1, "width": 8, "values": 8, "inner": 8}),  # heads are free
        (16, {"hidden": 16, "heads": 2, "width": 8, "values": 8, "inner": 16}),  # 2 × 8 in q; so 2 × 8 do for v
        (3, {"hidden": 3, "heads": 3, "width": 1, "values": 1, "inner": 3}),
        ("cuda", {"hidden": 8, "heads": 1, "width": 8, "values": 8, "inner": 8}),
        ("gguf", {"hidden": 32, "heads": 2, "width": 1, "values": 16, "inner": 32}),  # rows are not cut in q
        ("gguf-k", {"hidden": 256, "heads": 16, "width": 1, "values": 16, "inner": 256}),
        ({"up.weight": 10}, {"hidden": 10, "heads": 1, "width": 1, "values": 1, "inner": 10}),
        ({"*": 4, "down.*": 8}, {"hidden": 8, "heads": 1, "width": 4, "values": 4, "inner": 8}),
        ({"table": 2}, {"hidden": 1, "heads": 2, "width": 1, "values": 1, "inner": 1}),  # named, so it counts
    ],
)
def test_what_counts_are_multiples_of(oto, align, wanted):
    assert by_name(oto, align) == wanted


@pytest.mark.parametrize("align", [4, 8, 16, 24, "cuda", "marlin", "gguf", {"*.weight": 12}])
def test_sizes_are_multiples_whatever_is_kept(oto, align):
    by = multiples(oto.node_groups, align, oto.costs.weights)
    draw = np.random.default_rng(0)
    for _ in range(50):
        kept = {}
        for group, n in zip(oto.node_groups, by, strict=True):
            counts = [*range(n, group.size + 1, n)] if group.prunable else []
            kept[group.name] = int(draw.choice(counts)) if counts else group.size
        for name, dims in sizes_of(oto, kept).items():
            rows, others = PRESETS[align] if isinstance(align, str) else (align, align)
            for dim, (size, full, free) in enumerate(dims) if name in oto.costs.weights else ():
                need = 12 if isinstance(align, dict) else rows if dim == len(dims) - 1 else others
                assert size == full or not free or size % need == 0 or full % need, (name, dim, kept)


def sizes_of(oto, kept):
    """For each parameter and dimension its size, what it was, and whether it may change."""
    masks = oto.partition.masks({name: np.arange(n) for name, n in kept.items()})
    free = {oto.partition.axes[g.name] for g in oto.node_groups if g.prunable}
    from oto.axes.terms import axes_of, survivors

    return {
        leaf.name: [
            (int(survivors(term, masks).sum()), size, bool(set(axes_of(term)) & free))
            for term, size in zip(oto.partition.found.terms(leaf.value), leaf.value.shape, strict=True)
        ]
        for leaf in oto.partition.found.graph.leaves
        if leaf.kind == "parameter"
    }


def test_segments_of_a_sum_and_ties():
    def piece(parameter, dim, *cuts):
        return Slice(parameter, dim, tuple(Cut(*cut) for cut in cuts))

    groups = [  # rows are [heads × 4, state, heads]: each segment by itself
        NodeGroup(
            "heads",
            12,
            (piece("w", 0, (1, 66, 1, 0, 48), (1, 12, 4, 0, 12)), piece("w", 0, (1, 66, 1, 54, 12), (1, 12, 1, 0, 12))),
        ),
        NodeGroup("width", 4, (piece("w", 0, (1, 66, 1, 0, 48), (12, 4, 1, 0, 4)),), reason="fixed"),
        NodeGroup("state", 6, (piece("w", 0, (1, 66, 1, 48, 6), (1, 6, 1, 0, 6)), piece("c", 0, (1, 6, 1, 0, 6)))),
        NodeGroup("in", 10, (piece("w", 1, (1, 10, 1, 0, 10)),), tie="t"),
        NodeGroup("tied", 10, (piece("b", 0, (1, 10, 1, 0, 10)),), tie="t"),
    ]
    assert multiples(groups, 8) == [8, 1, 8, 8, 8]
    assert multiples(groups, 2, divisible=3) == [6, 1, 6, 6, 6]  # a bias is no weight, and its group is tied to one
    assert multiples(groups, {"b": 5}) == [1, 1, 1, 5, 5]


def test_layers_that_change_keep_their_multiples_in_training_and_out_of_it(oto):
    seen = oto.preview(target_params=0.6, align=8)
    assert "align=8" in str(seen) and "align" not in str(oto.preview(target_params=0.6))
    kept = {role: seen.kept[name] for role, name in NAMES.items()}
    assert kept["hidden"] % 8 == kept["inner"] % 8 == 0
    model = Attention()
    own = OTO(model, torch.randint(0, 20, (2, 5)))
    own.random_set_zero_groups(0.5, seed=3)
    plain, aligned = own.construct_subnet(), own.construct_subnet(align=8)
    assert plain.kept["up.weight"].size % 8 and aligned.kept["up.weight"].size % 8 == 0
    assert set(plain.kept["up.weight"]) < set(aligned.kept["up.weight"])
    assert any("by align=8" in note for note in aligned.notes)
    assert aligned.model.up.weight.shape[0] % 8 == aligned.model.v.weight.shape[0] % 8 == 0


def test_a_checkpoint_says_how_it_was_aligned(oto):
    setup = [oto.hesso(lr=0.1, total_steps=9, target_params=0.6, align=n).describe_setup() for n in (1, 8)]
    assert "align" not in setup[0] and lcm(*setup[1]["align"]) == 8


@pytest.mark.parametrize("align", [0, -8, 8.0, True, "nf4", {"up.*": 0}])
def test_what_means_nothing_is_refused(oto, align):
    with pytest.raises(OptionError, match="align is"):
        oto.preview(target_params=0.6, align=align)


def test_what_names_nothing_is_refused(oto):
    with pytest.raises(UnknownParameterError, match=r"'uo\.weight'"):
        oto.preview(target_params=0.6, align={"uo.weight": 8})


def test_where_multiples_leave_nothing_to_prune_they_are_named(oto):
    with pytest.raises(NothingPrunableError, match="align='gguf-k'"):
        oto.preview(target_params=0.9, align="gguf-k", min_kept={"q.weight": 1.0})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the default is for these")
def test_on_cuda_sizes_are_multiples_of_eight_by_default():
    oto = OTO(Attention().cuda(), torch.randint(0, 20, (2, 5)).cuda())
    assert "align=8" in str(oto.preview(target_params=0.6))
    assert "align" not in str(oto.preview(target_params=0.6, align=1))
