"""What a user keeps whole: by name, by class, by node, by operator; and outputs on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from oto import OTO
from oto.errors import NothingPrunableError, OptionError, UnknownNodeError, UnknownParameterError

X = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 12, 3), nn.ReLU())
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def prunable(oto):
    return {g.name for g in oto.node_groups if g.prunable}


def test_nothing_is_skipped_by_default():
    assert prunable(OTO(Net(), X)) == {"stem.0.weight", "body.0.weight"}


@pytest.mark.parametrize("pattern", ["stem", "stem.0", "stem.0.weight", "stem.*", "*.1.bias", "st*", nn.BatchNorm2d])
def test_skip_patterns_are_names_globs_and_classes(pattern):
    assert prunable(OTO(Net(), X, skip_patterns=[pattern])) == {"body.0.weight"}
    assert prunable(OTO(Net(), X, skip_patterns=pattern)) == {"body.0.weight"}  # one alone will do


def test_a_module_itself_names_what_is_in_it():
    model = Net()
    assert prunable(OTO(model, X, skip_patterns=[model.stem])) == {"body.0.weight"}
    assert prunable(OTO(model, X, skip_patterns=model.stem[1])) == {"body.0.weight"}
    with pytest.raises(UnknownParameterError, match="this Sequential is no module"):
        OTO(model, X, skip_patterns=[Net().stem])
    with pytest.raises(OptionError, match="names nothing of the model"):
        OTO(model, X, skip_patterns=[model.stem[0].weight])


@pytest.mark.parametrize("pattern", ["stem", "stem.0", "stem.0.weight", "stem.*"])
def test_only_is_the_reverse_and_norms_come_along(pattern):
    oto = OTO(Net(), X, only=[pattern])
    assert prunable(oto) == {"stem.0.weight"} == prunable(OTO(Net(), X, only=pattern))
    assert {g.reason for g in oto.node_groups if g.name == "body.0.weight"} == {"only does not name body.*.weight"}


def test_only_by_class_or_module_and_with_skip_patterns():
    model = Net()
    assert prunable(OTO(model, X, only=[nn.Conv2d])) == {"stem.0.weight", "body.0.weight"}
    assert prunable(OTO(model, X, only=model.body)) == {"body.0.weight"}
    assert prunable(OTO(model, X, only=[nn.Conv2d], skip_patterns=["stem"])) == {"body.0.weight"}
    with pytest.raises(UnknownParameterError, match="'steam'"):
        OTO(model, X, only=["steam"])
    with pytest.raises(NothingPrunableError, match="only does not name"):
        OTO(model, X, only=["head"])


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.mlp(x))


def test_a_width_that_others_share_is_not_meant_by_only():
    assert prunable(OTO(Residual(), torch.randn(2, 4))) == {"embed.weight", "mlp.0.weight"}
    assert prunable(OTO(Residual(), torch.randn(2, 4), only=["mlp.*"])) == {"mlp.0.weight"}


def test_a_layer_that_only_reads_is_no_obstacle():
    assert prunable(OTO(Net(), X, skip_patterns=["head"])) == {"stem.0.weight", "body.0.weight"}


def test_a_pattern_that_matches_nothing():
    with pytest.raises(UnknownParameterError, match="'steam'") as caught:
        OTO(Net(), X, skip_patterns=["steam"])
    assert "nearest" in str(caught.value)
    with pytest.raises(UnknownParameterError, match="no module of the model is a LSTM") as caught:
        OTO(Net(), X, skip_patterns=[nn.LSTM])
    assert "BatchNorm2d" in str(caught.value)


def test_nodes_by_id():
    oto = OTO(Net(), X)
    (relu,) = [n for n, data in oto.partition.graph.nodes(data=True) if data.get("module") == "stem.2"]
    oto.mark_unprunable_by_node_ids([relu])
    assert prunable(oto) == {"body.0.weight"}
    other = OTO(Net(), X)
    other.mark_unprunable_by_node_ids([int(relu.removeprefix("node-")), "parameter body.0.bias"])
    assert prunable(other) == set()


def test_a_node_that_does_not_exist_marks_nothing():
    oto = OTO(Net(), X)
    with pytest.raises(UnknownNodeError, match="no node 'node-99'") as caught:
        oto.mark_unprunable_by_node_ids(["node-0", "node-99"])
    assert "visualize" in str(caught.value) and len(prunable(oto)) == 2


@pytest.mark.parametrize("name", ["batch_norm", "aten.batch_norm", "aten.batch_norm.default", "batch*"])
def test_operators_by_any_spelling(name):
    oto = OTO(Net(), X)
    oto.skip_operators([name])
    assert prunable(oto) == {"body.0.weight"}
    assert "skip_operators" in str(oto.explain())


def test_an_operator_that_the_model_does_not_call():
    oto = OTO(Net(), X)
    with pytest.raises(UnknownNodeError, match="no operator 'conv3d'") as caught:
        oto.skip_operators(["conv3d"])
    assert "aten.conv2d" in str(caught.value)


class Pyramid(nn.Module):
    """Returns what it computes on the way, as a backbone does."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 3), nn.Conv2d(10, 4, 3)

    def forward(self, x):
        a = self.a(x).relu()
        b = self.b(a).relu()
        return {"a": a, "b": b, "c": self.c(b)}


def test_outputs_on_the_way_keep_their_size_unless_asked(tmp_path):
    torch.manual_seed(0)
    assert prunable(OTO(nn.ModuleDict({"p": Pyramid()})["p"], X, strict_out_nodes=True)) == {"a.weight", "b.weight"}
    with pytest.raises(Exception, match="no node group"):
        OTO(Pyramid(), X)
    model = Pyramid()
    oto = OTO(model, X, strict_out_nodes=True)
    oto.random_set_zero_groups(0.5)
    full = model(X)
    for emitter in ("module", "graph"):
        subnet = oto.construct_subnet(tmp_path / emitter, emitter=emitter)
        slim = subnet.model(X)
        for name in "abc":
            left = full[name][:, subnet.kept[f"{name}.weight"]] if name != "c" else full[name]
            torch.testing.assert_close(slim[name], left)
        assert slim["a"].shape[1] < 8 and slim["c"].shape[1] == 4
        assert any("reloaded" in check.what for check in subnet.checks)


class State(Pyramid):
    """Returns a state that nothing else reads, and a tuple of what was on the way."""

    def __init__(self):
        super().__init__()
        self.state = nn.Linear(10, 20)

    def forward(self, x):
        a = self.a(x).relu()
        b = self.b(a).relu()
        return {"c": self.c(b), "state": self.state(b.mean((2, 3))), "way": (a, b)}


@pytest.mark.parametrize(
    "named, free",
    [
        (["state"], {"state.weight"}),
        ("way.1", {"b.weight"}),
        (["way"], {"a.weight", "b.weight"}),
        (["way.*", "state"], {"a.weight", "b.weight", "state.weight"}),
    ],
)
def test_outputs_that_are_named_may_get_thinner(named, free, tmp_path):
    torch.manual_seed(0)
    model = State()
    oto = OTO(model, X, strict_out_nodes=named)
    assert prunable(oto) == free
    oto.random_set_zero_groups(0.5)
    full = model(X)
    for emitter in ("module", "graph"):
        subnet = oto.construct_subnet(tmp_path / emitter, emitter=emitter)
        slim = subnet.model(X)
        pairs = [("state.weight", full["state"], slim["state"])]
        pairs += [(f"{name}.weight", full["way"][i], slim["way"][i]) for i, name in enumerate("ab")]
        for group, before, after in pairs:
            left = before[:, subnet.kept[group]] if group in subnet.kept else before
            torch.testing.assert_close(after, left)
            assert (group in free) == (after.shape[1] < before.shape[1])
        torch.testing.assert_close(slim["c"], full["c"])


def test_an_output_that_there_is_not():
    with pytest.raises(UnknownNodeError, match="no output of the model is called, or matches, 'sate'") as caught:
        OTO(State(), X, strict_out_nodes=["sate"])
    assert "it has   c, state, way.0, way.1" in str(caught.value)
    with pytest.raises(UnknownNodeError, match="it has   output"):
        OTO(Net(), X, strict_out_nodes=["state"])


# A least width -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "min_kept, least",
    [
        (5, {"stem.0.weight": 5, "body.0.weight": 5}),
        (0.3, {"stem.0.weight": 3, "body.0.weight": 4}),  # rounded up
        (np.int64(5), {"stem.0.weight": 5, "body.0.weight": 5}),
        ({"body.*": 0.5}, {"stem.0.weight": 1, "body.0.weight": 6}),
        ({"*": 2, "stem.1.weight": 7}, {"stem.0.weight": 7, "body.0.weight": 2}),
    ],
)
def test_every_group_keeps_its_least(min_kept, least):
    groups = OTO(Net(), X, min_kept=min_kept).node_groups
    assert {g.name: g.min_kept for g in groups if g.prunable} == least


def test_a_group_of_no_more_than_its_least_stays_whole():
    oto = OTO(Net(), X, min_kept=8)
    assert prunable(oto) == {"body.0.weight"}
    assert "it has no more than 8 atoms to keep" in str(oto.explain())
