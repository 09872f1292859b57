"""Fields of a config are found by value, and settled by building the class."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from oto import OTO
from oto.errors import EmitterError
from oto.slim.config.recipe import Recipe
from oto.slim.config.solve import candidates, solve, stock
from oto.slim.pruned_shapes import pruned_shapes

from .toy import FFN, Config, Net, config

IDS = torch.tensor([[0, 1, 2]])


def asked(model: nn.Module, keep: int, given: Any = IDS) -> dict[str, Any]:
    """The fields that state ``keep`` atoms of every prunable group."""
    partition = OTO(model, given).partition
    kept = {g.name: np.arange(keep) for g in partition.groups if g.prunable}
    return solve(Recipe.of(model), pruned_shapes(partition, kept))


def test_a_field_is_found_by_value_and_settled_by_trial():
    assert asked(Net(config()), 5) == {"inner": 5}  # and not words, which has the same value


@pytest.mark.parametrize("value", [{"inner": None}, {}])
def test_a_field_that_is_unset_or_missing(value):
    made = config()
    del made.inner
    vars(made).update(value)
    assert asked(Net(made), 5) == {"inner": 5}
    assert vars(made).get("inner") is None  # the user's config is as it was


def test_a_field_of_a_config_inside():
    class Outer(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config, self.net = config, Net(config.text)

        def forward(self, ids):
            return self.net(ids)

    assert asked(Outer(Config(inner=16, text=config())), 5) == {"text.inner": 5}


def test_a_field_of_a_list():
    class Pyramid(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            widths = [3, *config.widths, 2]
            self.layers = nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(widths)])

        def forward(self, x):
            return self.layers(x)

    model = Pyramid(Config(widths=[8, 6]))
    partition = OTO(model, torch.randn(1, 3)).partition
    kept = {"layers.0.weight": np.arange(5), "layers.1.weight": np.arange(2)}
    edits = solve(Recipe.of(model), pruned_shapes(partition, kept))
    assert edits == {"widths.0": 5, "widths.1": 2}
    assert [
        m.out_features
        for m in stock(
            model,
            {
                n: torch.zeros(s)
                for n, s in {
                    "layers.0.weight": (5, 3),
                    "layers.0.bias": (5,),
                    "layers.1.weight": (2, 5),
                    "layers.1.bias": (2,),
                    "layers.2.weight": (2, 2),
                    "layers.2.bias": (2,),
                }.items()
            },
            edits,
        ).layers
    ] == [5, 2, 2]
    assert model.config.widths == [8, 6]


def test_of_two_fields_of_one_value_the_other_may_be_meant():
    class Heads(nn.Module):
        """8 heads and 4 keys of 8. A smaller width of all would do for both, but for the scale that is as wide."""

        def __init__(self, config):
            super().__init__()
            self.config = config
            self.ups = nn.ModuleList([nn.Linear(3, n * config.each) for n in (config.heads, config.keys)])
            self.downs = nn.ModuleList([nn.Linear(n * config.each, 2) for n in (config.heads, config.keys)])
            self.scale = nn.Parameter(torch.rand(config.each))

        def forward(self, x):
            each = zip(self.ups, self.downs, (self.config.heads, self.config.keys), strict=True)
            return sum(down((up(x).unflatten(-1, (n, -1)) * self.scale).flatten(-2)) for up, down, n in each)

    model = Heads(Config(each=8, heads=8, keys=4))
    partition = OTO(model, torch.randn(1, 3)).partition
    free = [g for g in partition.groups if g.prunable and all(p.parameter != "scale" for p in g.slices)]
    pruned = pruned_shapes(partition, {g.name: np.arange(g.size // 2) for g in free})
    assert solve(Recipe.of(model), pruned) == {"heads": 4, "keys": 2}


def test_nothing_of_another_size_is_made():
    model, tensors = Net(config()), {name: t.detach() for name, t in Net(config()).named_parameters()}
    for edits in ({"inner": 10**13}, {"width": 10**9}):  # as a manifest may claim
        with pytest.raises(EmitterError, match="does not hold what is there"):
            stock(model, tensors, edits)


def test_what_no_field_states_is_named():
    class Fixed(Net):
        def __init__(self, config):
            super().__init__(config)
            self.blocks[1] = FFN(config.width, 16)

    with pytest.raises(EmitterError, match=r"blocks\.1\.up\.weight is to be \[5, 4\], the class makes it \[16, 4\]"):
        asked(Fixed(config()), 5)


def test_a_value_that_does_not_survive_being_written():
    class Stubborn(Config):
        @classmethod
        def from_dict(cls, values):
            return cls(**values | {"inner": 16})

    with pytest.raises(EmitterError):
        asked(Net(Stubborn(**vars(config()))), 5)


@pytest.mark.parametrize("width, inner", [(7, 14), (3, 29), (192, 100), (49, 27)])
def test_how_many_times_another_size_survives_being_cut(width, inner):
    found = candidates(2.0, {width: {width}, 2 * width: {inner}})
    assert inner in {int(width * ratio) for ratio in found}
