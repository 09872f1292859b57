"""Former names work, and say so."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

import oto.nn
from oto import OTO, errors
from oto.errors import OptionError
from oto.nn.overridden import OverriddenForward


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))


def test_former_options() -> None:
    with pytest.warns(DeprecationWarning, match=r"everything= is called allow_graph= now"):
        oto = OTO(mlp(), torch.randn(1, 3), everything=True)
    assert oto._analysis.form.kind == "graph"
    with pytest.warns(DeprecationWarning, match=r"normalise= is called normalize= now"):
        optimizer = oto.hesso(lr=0.1, target_macs=0.5, total_steps=40, normalise="max")
    assert optimizer.choice.normalize == "max"
    with pytest.raises(OptionError, match="normalise and normalize are the same"):
        oto.hesso(lr=0.1, target_macs=0.5, total_steps=40, normalise="max", normalize="mean")


@pytest.mark.parametrize("former", errors.FORMER)
def test_former_errors(former: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{former} is called"):
        kind = getattr(errors, former)
    assert kind is getattr(errors, errors.FORMER[former])


def test_former_modules() -> None:
    with pytest.warns(DeprecationWarning, match=r"oto\.nn\.Told is called"):
        assert oto.nn.Told is OverriddenForward
    assert importlib.import_module("oto.nn.told").Told is OverriddenForward  # pickles look there


@pytest.mark.parametrize("module", [errors, oto.nn])
def test_what_never_was(module: object) -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        module.nonsense  # noqa: B018
