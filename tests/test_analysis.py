"""What is known of a model is a value; what the slim model may be is settled in one order; an example is made once."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import UserDict

import pytest
import torch
from torch import nn

from oto import OTO
from oto.analysis import Options, analyze
from oto.errors import DummyInputError, OptionError
from oto.trace.inputs import Example, arguments
from tests.slim.toy import Net, config

X = torch.randn(2, 6)


IDS = torch.tensor([[1, 5, 3], [2, 0, 4]])


def of_config() -> nn.Module:
    return Net(config())


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("model", "options", "kind"),
    [
        (mlp, {}, "class"),
        (mlp, {"allow_graph": True}, "graph"),
        (mlp, {"layout": "free"}, "class"),
        (mlp, {"layout": "uniform"}, "class"),  # it has no config, and there is a warning
        (mlp, {"layout": "uniform", "allow_graph": True}, "graph"),
        (of_config, {}, "class"),
        (of_config, {"layout": "uniform"}, "config"),
        (of_config, {"layout": "stock", "allow_graph": True}, "config"),
    ],
)
def test_a_config_comes_first_then_anything_if_asked_for_then_the_class(model, options, kind):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        form = analyze(model(), IDS if model is of_config else X, Options(**options)).form
    assert form.kind == kind
    assert (form.recipe is not None, form.own is not None) == (kind == "config", kind == "class")
    assert bool(caught) == (options.get("layout") == "uniform" and kind != "config")


def test_marking_makes_another_analysis():
    first = analyze(mlp(), X, Options())
    second = first.without_parameters("0.weight")
    assert {g.name: g.prunable for g in first.groups}["0.weight"]
    assert {g.name: g.reason for g in second.groups}["0.weight"] == "it was marked unprunable"
    assert second.model is first.model and second.partition is first.partition
    with pytest.raises(AttributeError):
        first.groups = ()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda oto: pickle.loads(pickle.dumps(oto))])
@pytest.mark.parametrize("options", [{}, {"allow_graph": True}, {"skip_patterns": ["2"]}])
def test_a_copy_says_the_same_and_knows_no_optimizer(copied, options):
    oto = OTO(mlp(), X, **options)
    optimizer = oto.hesso(lr=0.1, target_macs=0.5, start_pruning_step=1, pruning_steps=3)
    other = copied(oto)
    told = [[(w.group, w.reason) for w in one.explain(search=True).whole] for one in (oto, other)]
    assert told[0] == told[1] and other.explain(search=True).search == oto.explain(search=True).search
    assert repr(other) == repr(oto)
    other.mark_unprunable_by_param_names("0.weight")  # refused where an optimizer was made
    assert [g.prunable for g in other.node_groups] != [g.prunable for g in oto.node_groups]
    assert optimizer.node_groups[0].prunable


@pytest.mark.parametrize("given", [X, (X,), {"input": X}, [X]])
def test_an_example_is_made_once(given):
    example = Example.of(given)
    assert Example.of(example) is example and example.given is (X if given is X else example.given)
    assert type(example.given) is (tuple if isinstance(given, list) else type(given))
    args, kwargs = arguments(example)
    assert [t.data_ptr() for t in (*args, *kwargs.values())] == [X.data_ptr()]
    assert OTO(mlp(), given).compute_macs() == OTO(mlp(), X).compute_macs()


def test_what_is_no_example_is_refused():
    assert Example.of(UserDict(input=X)).given == {"input": X}
    for given in (3, {"input": 3}, {1: X}):
        with pytest.raises(DummyInputError, match="to fix"):
            Example.of(given)


def test_an_option_that_means_nothing_is_refused_before_the_model_is_looked_at():
    with pytest.raises(OptionError, match="layout is 'uniformly'; it is one of"):
        OTO(3, X, layout="uniformly")
