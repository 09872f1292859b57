"""How a model was made: its class and a config, or a function and its keywords."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from oto import OTO
from oto.errors import UnstatedWarning
from oto.slim.config.recipe import Recipe, fields

from .toy import FFN, Config, Net, config


def test_a_class_that_its_config_does_not_make():
    class Taking(Net):
        def __init__(self, config, more):
            super().__init__(config)

    grown = Net(config())
    grown.words = nn.Embedding(20, 4)
    for model in (Taking(config(), 1), grown, nn.Linear(2, 2)):
        assert Recipe.of(model) is None
    assert Recipe.of(Net(config())) is not None


def test_a_class_is_made_without_touching_the_random_state():
    recipe = Recipe.of(Net(config()))
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    recipe.make({"inner": 5}, "cpu")
    assert torch.rand(1) == wanted


def test_what_a_class_reads_of_its_config_is_watched_and_no_more():
    unset = config()
    del unset.inner
    recipe = Recipe.of(Net(unset))
    assert recipe.implied([4, 8, 16, 32]) == {"inner": 16}
    assert "__getattribute__" not in vars(Config) and not hasattr(unset, "inner")


def test_numbers_of_a_config():
    held = Config(a=1, b=True, c="x", d=0.5, e=None, f=[2, None, {"g": 3}], _h=4, i=Config(j=5))
    assert dict(fields(held)) == {"a": 1, "d": 0.5, "e": None, "f.0": 2, "f.2.g": 3, "i.j": 5}


# Functions and their keywords ----------------------------------------------------------------------------------------


class Mixer(nn.Module):
    def __init__(self, classes, depth, width, ratio=2.0, act=nn.ReLU):
        super().__init__()
        self.stem = nn.Linear(3, width)
        self.blocks = nn.Sequential(*[FFN(width, int(width * ratio)) for _ in range(depth)])
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


def mixer_small(**options: Any) -> nn.Module:
    model = Mixer(**{"classes": 5, "depth": 2, "width": 7} | options)
    model.pretrained_cfg = {"architecture": "mixer_small"}
    return model


@pytest.mark.parametrize("options", [{}, {"classes": 4}, {"width": 6, "ratio": 3.5}])
def test_keywords_of_the_function_that_a_model_says_it_was_made_by(options):
    model, made = mixer_small(**options), Mixer.__init__
    model._model_args = options  # as the library keeps them
    oto = OTO(model, torch.randn(2, 3), layout="uniform", skip_patterns=["stem"])
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet()
    assert subnet.emitter == "config" and subnet.config.keys() == {"ratio"}
    again = (
        mixer_small(**options, **subnet.config) if "ratio" not in options else mixer_small(**options | subnet.config)
    )
    again.load_state_dict(subnet.model.state_dict())
    x = torch.randn(4, 3)
    assert torch.equal(again(x), subnet.model(x))
    assert subnet.model._model_args == options | subnet.config
    assert Mixer.__init__ is made  # it was looked at, and left as it was


class Stages(nn.Module):
    """Inner widths come in a list, as stages of large networks have them."""

    def __init__(self, inner=(8, 12), width=7):
        super().__init__()
        self.stem, self.head = nn.Linear(3, width), nn.Linear(width, 2)
        self.one = nn.Sequential(FFN(width, inner[0]), FFN(width, inner[0]))
        self.two = nn.Sequential(FFN(width, inner[1]), FFN(width, inner[1]))

    def forward(self, x):
        return self.head(self.two(self.one(self.stem(x))))


def stages_small(**options: Any) -> nn.Module:
    model = Stages(**options)
    model.pretrained_cfg, model._model_args = {"architecture": "stages_small"}, options
    return model


def test_keywords_that_are_lists_are_given_whole():
    oto = OTO(stages_small(), torch.randn(2, 3), layout="uniform", skip_patterns=["one", "stem"])
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet()
    assert subnet.emitter == "config" and subnet.config == {"inner": [8, subnet.model.two[0].up.out_features]}
    again = stages_small(**subnet.config)
    again.load_state_dict(subnet.model.state_dict())
    assert again.two[0].up.out_features < 12 and subnet.model._model_args == subnet.config


def test_a_function_that_says_nothing_leaves_ties_alone():
    class Odd(Mixer):
        def __init__(self, **options):
            super().__init__(4, 2, 6, 3.0)

    def odd(**options):
        return Odd(**options)

    globals()["odd"] = odd
    try:
        model = odd()
        model.pretrained_cfg = {"architecture": "odd"}
        with pytest.warns(
            UnstatedWarning, match="no config states the widths of Odd: the numbers that it is made from"
        ):
            oto = OTO(model, torch.randn(2, 3), layout="uniform")
        assert Recipe.of(model) is not None
        assert {g.tie for g in oto.node_groups if g.prunable} == {None, "blocks.*.up.weight"}
        oto.random_set_zero_groups(0.5)
        assert oto.construct_subnet().emitter == "module"
    finally:
        del globals()["odd"]
