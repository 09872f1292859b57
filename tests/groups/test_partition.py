"""Node groups of networks small enough to write down."""

from __future__ import annotations

import networkx as nx
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from oto.axes.registry import known
from oto.groups import cost, partition
from oto.groups.policy import keep_at_least, keep_whole, zeroing
from oto.trace.record import record


def analyze(model, x):
    return partition(record(model, x, known))


def prunable(found):
    return {g.name: g for g in found.groups if g.prunable}


class Attention(nn.Module):
    """Four query heads on two key-value heads, six wide."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x):
        n, t, _ = x.shape
        q = self.q(x).view(n, t, 4, 6).transpose(1, 2)
        k, v = (y.view(n, t, 2, 6).transpose(1, 2).repeat_interleave(2, 1) for y in self.kv(x).chunk(2, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(n, t, 24))


def test_halving_the_hidden_layer():
    # dense 3*8 + 8 + 8*2 + 2 = 50 parameters and 3*8 + 8*2 = 40 MACs a row;
    # four hidden units: 3*4 + 4 + 4*2 + 2 = 26 and 3*4 + 4*2 = 20
    found = analyze(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 3))
    assert cost(found).params == 50 and cost(found).macs == 5 * 40 and cost(found).flops == 2 * 5 * 40
    half = cost(found, {"0.weight": 4})
    assert half.params == 26 and half.macs == 5 * 20


def test_a_hidden_layer_is_one_group():
    found = analyze(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 3))
    (group,) = prunable(found).values()
    assert (group.name, group.size) == ("0.weight", 8)
    assert {(s.parameter, s.dim) for s in group.zeros} == {("0.weight", 0), ("0.bias", 0)}
    assert {(s.parameter, s.dim) for s in group.slices} == {("0.weight", 0), ("0.bias", 0), ("2.weight", 1)}
    reasons = {g.name: g.reason for g in found.groups if not g.prunable}
    assert any("input" in r for r in reasons.values()) and any("output" in r for r in reasons.values())


def test_grouped_query_attention_is_found_from_its_shapes():
    found = prunable(analyze(Attention(), torch.randn(2, 5, 8)))
    by_size = {(g.size, *sorted({s.parameter for s in g.zeros})) for g in found.values()}
    # two key-value heads with all that they serve; the two queries of each head, silenced where they are read, because
    # a zero query still attends; the value width. The key width is fixed by the scale.
    assert by_size == {
        (2, "kv.bias", "kv.weight", "q.bias", "q.weight"),
        (2, "out.weight"),
        (6, "kv.bias", "kv.weight"),
    }
    heads = next(g for g in found.values() if g.size == 2 and "kv.weight" in {s.parameter for s in g.zeros})
    (rows,) = (s for s in heads.slices if s.parameter == "q.weight")
    assert rows.of(torch.zeros(24, 8)).flatten(1).shape == (2, 2 * 6 * 8)


def test_a_slice_is_a_view_of_the_parameter():
    found = prunable(analyze(Attention(), torch.randn(2, 5, 8)))
    value_width = next(g for g in found.values() if g.size == 6)
    weight = torch.zeros(24, 8)
    for piece in value_width.zeros:
        if piece.parameter == "kv.weight":
            piece.of(weight)[1] = 1.0
    # rows 12 to 23 are the values of two heads of six; entry 1 of each
    assert weight.any(1).nonzero().ravel().tolist() == [13, 19]


def test_costs_agree_with_torch_on_a_network_with_every_kind_of_product():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.ConvTranspose2d(8, 4, 3, stride=2),
        nn.Flatten(2),
        nn.Linear(81, 16),
        nn.TransformerEncoderLayer(16, 2, 24, batch_first=True),
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    found = analyze(model, x)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # not every release counts the fused kernels of the CPU
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert cost(found).flops == counter.get_total_flops()
    assert cost(found).params == sum(p.numel() for p in model.parameters())


def test_the_flow_is_a_networkx_graph():
    found = analyze(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 3))
    assert nx.is_directed_acyclic_graph(found.graph)
    assert nx.has_path(found.graph, "input 0", "output 0")
    assert found.graph.nodes["parameter 0.weight"]["groups"][0] == "0.weight"
    carriers = [n for n, groups in found.graph.nodes(data="groups") if "0.weight" in groups]
    assert {"parameter 0.weight", "parameter 0.bias", "parameter 2.weight", "node-0", "node-1"} == set(carriers)


def test_policy():
    groups = analyze(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 3)).groups
    assert not any(g.prunable for g in keep_whole(groups, zeroing(groups, ["0.weight"]), "kept"))
    assert any(g.prunable for g in keep_whole(groups, zeroing(groups, ["2.weight"]), "kept"))  # it only reads
    assert {g.min_kept for g in keep_at_least(groups, 3) if g.prunable} == {3}
    assert not any(g.prunable for g in keep_at_least(groups, 8))
