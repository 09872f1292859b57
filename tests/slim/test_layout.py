"""Uniform layouts of classes that are made from a config: what is tied, what stays whole, what norms absorb."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from oto import OTO
from oto._torch import DisableTorchFunction
from oto.errors import EmitterError, NothingPrunableError, OptionError, UnstatedWarning
from oto.slim.config import trial as layout
from oto.slim.config.trial import UNSTATED
from oto.slim.proof.zeroed import Zeroed

from .toy import Config


class RMS(nn.Module):
    def __init__(self, width, eps, plus):
        super().__init__()
        self.weight, self.eps, self.plus = nn.Parameter(torch.rand(width) + 0.5), eps, plus

    def forward(self, x):
        return (self.weight + self.plus) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Block(nn.Module):
    """Heads of ``head_width``, with norms of keys that share the eps of the others where ``config.key_norms``."""

    def __init__(self, config):
        super().__init__()
        width, self.heads, self.each = config.width, config.heads, config.head_width
        self.first, self.second = (config.norm(width, config) for _ in range(2))
        self.q, self.k, self.v = (nn.Linear(width, self.heads * self.each) for _ in range(3))
        self.key_norm = RMS(self.each, config.eps, 0) if config.key_norms else nn.Identity()
        self.o = nn.Linear(self.heads * self.each, width)
        self.up, self.down = nn.Linear(width, config.inner), nn.Linear(config.inner, width)

    def forward(self, x):
        h = self.first(x)
        q, k, v = (p(h).unflatten(-1, (self.heads, self.each)).transpose(1, 2) for p in (self.q, self.k, self.v))
        a = nn.functional.scaled_dot_product_attention(q, self.key_norm(k), v)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        return x + self.down(self.up(self.second(x)).relu())


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * self.embedding_dim**0.5


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.words = (Scaled if config.scaled else nn.Embedding)(50, config.width)
        self.encoder = nn.ModuleList([Block(config) for _ in range(2)])
        self.decoder = nn.ModuleList([Block(config) for _ in range(2)])
        self.last = config.norm(config.width, config)
        self.head = nn.Linear(config.width, 50, bias=False)
        if config.tied:
            self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids)
        for block in [*self.encoder, *self.decoder]:
            x = block(x)
        return self.head(self.last(x))


def rms(width, config):
    return RMS(width, config.eps, config.plus)


def layer_norm(width, config):
    return nn.LayerNorm(width, config.eps)


IDS = torch.arange(12).reshape(2, 6)


def model(**values: Any) -> Model:
    torch.manual_seed(0)
    options = {
        "width": 16,
        "heads": 4,
        "head_width": 6,
        "inner": 24,
        "eps": 1e-3,
        "plus": 0.0,
        "norm": rms,
        "scaled": False,
        "tied": False,
        "key_norms": False,
    } | values
    return Model(Config(**options)).eval()


def stated(oto: OTO) -> dict[str, int]:
    """For each tie that may lose atoms, the number of its groups."""
    found: dict[str, int] = {}
    for group in oto.node_groups:
        if group.prunable:
            found[group.tie or group.name] = found.get(group.tie or group.name, 0) + 1
    return found


def test_one_field_for_several_stacks_ties_them():
    assert stated(OTO(model(), IDS, layout="uniform")) == {"words.weight": 1, "heads": 4, "inner": 4}


def test_what_no_field_states_stays_whole():
    oto = OTO(model(norm=layer_norm), IDS, layout="uniform")
    assert stated(oto) == {"heads": 4, "inner": 4}
    whole = [w for w in oto.explain().whole if w.reason == UNSTATED]
    assert {w.group for w in whole} >= {"words.weight", "encoder.0.v.weight"}  # the stream, and the width of a value


@pytest.mark.parametrize(
    "plus, tied, scaled, key_norms",
    [
        (0, False, False, False),
        (1, False, False, False),
        (0, True, True, False),
        (1, True, False, True),
        (1, True, True, True),
        (0, False, True, True),
    ],
)
def test_norms_absorb_the_count(plus, tied, scaled, key_norms):
    full = model(plus=plus, tied=tied, scaled=scaled, key_norms=key_norms)
    oto = OTO(full, IDS, layout="uniform")
    oto.random_set_zero_groups(0.4)
    subnet = oto.construct_subnet()
    assert subnet.emitter == "config" and subnet.max_error < 1e-12 and not subnet.notes
    slim = subnet.model
    assert (
        type(slim) is Model
        and slim.config.width < 16
        and slim.config.eps == pytest.approx(1e-3 * 16 / slim.config.width)
    )
    assert (slim.head.weight is slim.words.weight) == tied
    torch.testing.assert_close(slim(IDS), full(IDS))


def test_a_large_model_is_compared_in_its_own_dtype(monkeypatch):
    monkeypatch.setattr(layout, "SMALL", 0)
    real = layout.check

    def check(full, slim, example, options):
        assert not options.exact
        return real(full, slim, example, options)

    monkeypatch.setattr(layout, "check", check)
    assert stated(OTO(model(), IDS, layout="uniform")) == {"words.weight": 1, "heads": 4, "inner": 4}
    assert stated(OTO(model(norm=layer_norm), IDS, layout="uniform")) == {"heads": 4, "inner": 4}


def test_no_copy_is_made_to_see_what_a_config_states(monkeypatch):
    full, alive, most, other = model(), weakref.WeakSet(), [], Zeroed.other
    before = copy.deepcopy(full.state_dict())

    def read(self, parameter, names):
        made = other(self, parameter, names)
        if parameter.ndim == 2:
            alive.add(made)
            most.append(len(alive))
        return made

    monkeypatch.setattr(Zeroed, "other", read)
    monkeypatch.setattr(Zeroed, "written", None)
    assert stated(OTO(full, IDS, layout="uniform")) == {"words.weight": 1, "heads": 4, "inner": 4}
    assert max(most) <= 2  # matrices at a time
    assert all(torch.equal(t, before[name]) for name, t in full.state_dict().items())


class Apart(nn.Linear):
    """Computes where no mode is told of it, as scripted functions do."""

    def forward(self, x):
        with DisableTorchFunction():
            return nn.functional.linear(x, self.weight, self.bias)


def test_what_torch_does_not_tell_of_is_compared_with_a_copy():
    full = model()
    full.encoder[0].v.__class__ = Apart
    assert stated(OTO(full, IDS, layout="uniform")) == {"words.weight": 1, "heads": 4, "inner": 4}


def test_an_eps_that_no_field_states_keeps_the_stream_whole():
    def fixed(width, config):
        return RMS(width, 2e-3, 0.0)

    assert stated(OTO(model(norm=fixed), IDS, layout="uniform")) == {"heads": 4, "inner": 4}


def test_every_optimizer_leaves_equal_counts():
    for make, options in (
        ("hesso", {}),
        ("hesso_cric", {"sampling_steps": 2, "max_cycles": 2}),
        ("hspg", {"pruning_steps": 24, "lmbda": 100}),
        ("dhspg", {"pruning_steps": 12, "lmbda": 100}),
    ):
        net = model()
        oto = OTO(net, IDS, layout="uniform", tensor_parallel=2)
        if make == "hesso":
            options = options | {"pruning_periods": 2}
        optimizer = getattr(oto, make)(
            **(
                {"variant": "adamw", "lr": 1e-3, "target_macs": 0.5, "start_pruning_step": 2, "pruning_steps": 4}
                | options
            )
        )
        for _ in range(40):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(IDS).flatten(0, 1), IDS.flatten()).backward()
            optimizer.step()
        assert optimizer.progress.over
        counts: dict[str, set[int]] = {}
        for group in optimizer.node_groups:
            gone = len(optimizer.pruned_groups.get(group.name, ()))
            counts.setdefault(group.tie or group.name, set()).add(group.size - gone)
        assert all(len(each) == 1 for each in counts.values()), counts
        assert all(n % 2 == 0 for each in counts.values() for n in each)
        each = {name: tuple(atoms.tolist()) for name, atoms in optimizer.pruned_groups.items() if ".up" in name}
        assert len(set(each.values())) > 1  # each block its own
        assert getattr(optimizer, "ways", {"by half-space": 1})["by half-space"]
        subnet = oto.construct_subnet()
        assert subnet.emitter == "config" and not subnet.notes
        assert subnet.cost_after.macs <= 0.5 * subnet.cost_before.macs


def test_a_stream_that_is_as_wide_as_its_heads_stays_so():
    net = model(width=24)  # 4 heads of 6
    for name, free in (("uniform", [1, 4, 4]), ("stock", [4, 5])):  # groups of the stream, heads and inner widths
        assert sorted(stated(OTO(net, IDS, layout=name)).values()) == free
    oto = OTO(net, IDS, layout="stock")
    kept = oto.preview(target_params=0.5).kept
    (heads,) = {n for name, n in kept.items() if ".q." in name}
    assert kept["words.weight"] == 6 * heads < 24
    with torch.no_grad():
        for group in oto.node_groups:
            for piece in group.zeros if group.prunable else ():
                piece.of(net.get_parameter(piece.parameter))[kept[group.name] :] = 0
    subnet = oto.construct_subnet()
    slim = subnet.model.config
    assert subnet.emitter == "config" and subnet.max_error < 1e-12 and not subnet.notes
    assert slim.width == 6 * slim.heads < 24 and slim.head_width == 6


def test_a_stream_of_another_width_than_its_heads_is_free():
    assert stated(OTO(model(), IDS, layout="stock")) == stated(OTO(model(), IDS, layout="uniform"))


def test_a_preview_is_even():
    oto = OTO(model(), IDS, layout="uniform")
    kept = oto.preview(target_macs=0.5).kept
    assert len({n for name, n in kept.items() if name.endswith("up.weight")}) == 1


def test_uneven_zeros_are_kept_and_told():
    net = model()
    oto = OTO(net, IDS, layout="uniform")
    with torch.no_grad():
        for block, n in zip([*net.encoder, *net.decoder], (3, 4, 5, 6), strict=True):
            block.up.weight[:n], block.up.bias[:n] = 0, 0
    subnet = oto.construct_subnet()
    assert subnet.model.config.inner == 21
    assert "zero atoms of inner were kept, because its groups are to have 21 each by the layout" in str(subnet)


def test_without_a_config_repeated_blocks_are_tied_all_the_same():
    class Stack(nn.Sequential):
        pass

    torch.manual_seed(0)
    config = model().config
    net = nn.Sequential(nn.Embedding(50, 16), Stack(Block(config), Block(config)), nn.Linear(16, 3))
    with pytest.warns(UnstatedWarning, match=r"no config states the widths of Sequential(.|\n)*leave layout out"):
        oto = OTO(net, IDS, layout="uniform")
    assert {"1.*.q.weight", "1.*.up.weight"} <= stated(oto).keys()
    oto.random_set_zero_groups(0.5)
    kept = {name: len(atoms) for name, atoms in oto.construct_subnet().kept.items()}
    assert kept["1.0.up.weight"] == kept["1.1.up.weight"] < 24


def test_what_was_marked_and_what_is_left():
    with pytest.raises(NothingPrunableError, match="layout") as caught:
        OTO(model(norm=layer_norm), IDS, layout="uniform", skip_patterns=["*.up", "*.q"])
    assert "take back what was asked" in str(caught.value)


def test_a_copy_and_a_pickle_know_the_layout():
    oto = OTO(model(), IDS, layout="uniform")
    for other in (copy.deepcopy(oto), pickle.loads(pickle.dumps(OTO(model(), IDS, layout="uniform")))):
        assert stated(other) == stated(oto)
        other.random_set_zero_groups(0.4)
        assert other.construct_subnet().emitter == "config"


def test_the_way_may_be_asked_for():
    oto = OTO(model(), IDS)
    oto.random_set_zero_groups(0.5)
    with pytest.raises(EmitterError, match=r'(?s)Model cannot be made from another config.*layout="uniform"'):
        oto.construct_subnet(emitter="config")
    with pytest.raises(OptionError, match="layout is 'even'"):
        OTO(model(), IDS, layout="even")


def test_no_weights_are_needed():
    with torch.device("meta"):
        net = model()
    assert stated(OTO(net, IDS.to("meta"), layout="uniform")) == {"words.weight": 1, "heads": 4, "inner": 4}
