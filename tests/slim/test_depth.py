"""Whole layers go with ``layout="uniform"``, and the depth that the config states is that of the slim model."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import oto as library
from oto import OTO
from oto.groups.layout import equalize_ties
from oto.slim.config.recipe import Recipe
from oto.slim.edits import renumbered

ACTS = {"relu": torch.relu, "tanh": torch.tanh}


class Config:
    """The form of a config of transformers: numbers, and a list with an entry for each layer."""

    def __init__(self, width=8, hidden=12, depth=4, acts=None, sizes=(1, 2, 3, 4)):
        self.width, self.hidden, self.depth, self.sizes = width, hidden, depth, list(sizes)
        self.acts = ["relu", "tanh"] * (depth // 2) if acts is None else list(acts)
        if len(self.acts) != depth:
            raise ValueError("an entry for each layer")

    def to_dict(self):
        return copy.deepcopy(vars(self))

    @classmethod
    def from_dict(cls, plain):
        return cls(**plain)


class Layer(nn.Module):
    def __init__(self, config, act):
        super().__init__()
        self.mix, self.act = nn.Linear(config.width, config.width), act
        self.up, self.down = nn.Linear(config.width, config.hidden), nn.Linear(config.hidden, config.width)

    def forward(self, x):
        x = x + self.mix(x)
        return x + self.down(ACTS[self.act](self.up(x)))


class Net(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.stem, self.head = nn.Linear(4, config.width), nn.Linear(config.width, 3)
        self.layers = nn.ModuleList(Layer(config, config.acts[i]) for i in range(config.depth))

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Numbered(Net):
    """Its layers do not compute what they would in another place."""

    def forward(self, x):
        x = self.stem(x)
        for i, layer in enumerate(self.layers):
            x = layer(x) * (i + 1)
        return self.head(x)


def analyzed(kind=Net, mode="both", **options):
    torch.manual_seed(0)
    return OTO(kind(Config()), torch.randn(2, 4), compress_mode=mode, layout="uniform", **options)


def without(oto, layers):
    parameters = dict(oto.model.named_parameters())
    for group in oto.node_groups:
        if group.tie in {f"layers.{i}" for i in layers}:
            group.zero_(parameters, torch.tensor([0]))
    return oto


def test_the_segments_of_a_layer_go_together_and_no_other_does():
    oto = analyzed()
    ties = {g.name: g.tie for g in oto.node_groups if g.segment}
    assert ties == {f"layers.{i}.{part}": f"layers.{i}" for i in range(4) for part in ("mix", "down")}
    (depth,) = oto._analysis.form.recipe.depths
    assert (depth.field, depth.layers, depth.number, set(depth.lists)) == ("depth", "layers", 4, {"acts", "sizes"})
    again = pickle.loads(pickle.dumps(oto))
    assert again._analysis.form.recipe.depths == (depth,)


@pytest.mark.parametrize("gone", [[0], [1, 2], [3]])
def test_the_config_states_what_is_left(gone, tmp_path):
    oto = without(analyzed(), gone)
    oto.random_set_zero_groups(0.3)
    left = [i for i in range(4) if oto.model.layers[i].mix.weight.any()]
    subnet = oto.construct_subnet(tmp_path / "slim")
    assert subnet.emitter == "config" and subnet.max_error < 1e-12
    acts = [Config().acts[i] for i in left]
    assert (subnet.model.config.depth, subnet.model.config.acts) == (len(left), acts) and len(left) < 4
    plain = Net(subnet.model.config)
    plain.load_state_dict(subnet.model.state_dict())
    x = torch.randn(5, 4)
    torch.testing.assert_close(plain(x), oto.model(x))
    loaded = library.load_subnet(tmp_path / "slim", lambda: Net(Config()))
    assert torch.equal(loaded(x), subnet.model(x)) and loaded.config.depth == len(left)
    again = OTO(subnet.model, x, compress_mode="both", layout="uniform")
    assert len([g for g in again.node_groups if g.segment and g.prunable]) == (2 * len(left) if len(left) > 1 else 0)


def test_a_layer_that_is_gone_does_not_keep_the_others_wide():
    oto = without(analyzed(), [2])
    parameters = dict(oto.model.named_parameters())
    for group in oto.node_groups:
        if group.name.endswith("up.weight") and not group.name.startswith("layers.2"):
            group.zero_(parameters, torch.arange(6))
    subnet = oto.construct_subnet()
    assert subnet.emitter == "config" and subnet.model.config.hidden == 6 and not subnet.notes


def test_idle_groups_keep_what_the_others_do():
    oto = analyzed()
    wide = [g for g in oto.node_groups if g.name.endswith("up.weight")]
    kept = {g.name: np.arange(12 if i == 1 else 5) for i, g in enumerate(wide)}
    even, said = equalize_ties(wide, kept, idle={wide[1].name})
    assert [len(even[g.name]) for g in wide] == [5] * 4 and not said
    assert [len(own) for own in equalize_ties(wide, kept)[0].values()] == [12] * 4


def test_layers_that_depend_on_their_number_stay():
    oto = analyzed(Numbered)
    reasons = {g.reason for g in oto.node_groups if g.segment}
    assert reasons == {"layout: no field of the config states that it is left out"}
    assert not oto._analysis.form.recipe.depths


@pytest.mark.parametrize("name", ["hesso", "hspg", "h2spg"])
def test_layers_and_widths_in_one_budget(name):
    oto = analyzed(min_depth=2)
    optimizer = getattr(oto, name)(target_macs=0.4, lr=0.02, start_pruning_step=2, pruning_steps=8)
    x, y = torch.randn(64, 4), torch.randint(0, 3, (64,))
    for _ in range(14):
        optimizer.zero_grad()
        nn.functional.cross_entropy(oto.model(x), y).backward()
        optimizer.step()
    subnet = oto.construct_subnet()
    assert subnet.emitter == "config" and subnet.cost_after.macs <= 0.4 * subnet.cost_before.macs
    assert subnet.model.config.depth >= 2


def test_so_many_layers_go():
    oto = analyzed(mode="erase")
    optimizer = oto.h2spg(target_segments=2, lr=0.02, start_pruning_step=2, pruning_steps=8)
    for _ in range(14):
        optimizer.zero_grad()
        oto.model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    assert oto.construct_subnet().model.config.depth == 2


def test_a_file_may_not_make_lists_longer_or_other():
    recipe = Recipe(Net, Config())
    assert recipe.edited({"acts": ["tanh", "relu"], "depth": 2}).acts == ["tanh", "relu"]
    for bad in (["relu"] * 5, ["sin"], [1], "relu", [["relu"]]):
        with pytest.raises(library.errors.EmitterError):
            recipe.edited({"acts": bad})


def test_names_where_layers_are_gone():
    assert renumbered("layers.3.up.weight", {"layers": [1, 3]}) == "layers.1.up.weight"
    assert renumbered("layers.2.up.weight", {"layers": [1, 3]}) is None
    assert renumbered("layers2.2.up.weight", {"layers": [1, 3]}) == "layers2.2.up.weight"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sliding", [False, pytest.param(True, marks=pytest.mark.zoo)])
def test_plain_transformers_reads_it_and_generates(sliding, tmp_path):
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2} if sliding else {}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **windows, num_hidden_layers=3, vocab_size=60)).eval()
    ids = torch.randint(0, 60, (2, 7))
    oto = OTO(model, {"input_ids": ids, "use_cache": False}, compress_mode="both", layout="uniform")
    parameters = dict(model.named_parameters())
    for group in oto.node_groups:
        if group.tie == "model.layers.1" or group.name.endswith("gate_proj.weight"):
            group.zero_(parameters, torch.arange(group.size // 2 or 1))
    subnet = oto.construct_subnet()
    files = subnet.save_pretrained(tmp_path / "slim")
    assert subnet.emitter == "config" and files
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    types = model.config.layer_types
    assert (plain.config.num_hidden_layers, plain.config.layer_types) == (2, [types[0], types[2]])
    assert [layer.self_attn.layer_idx for layer in plain.model.layers] == [0, 1]
    for more in ({}, {"cache_implementation": "static"}):
        how = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids), **more}
        assert torch.equal(model.generate(ids, **how), plain.generate(ids, **how))
