"""What a class is told by numbers: a model that was made with others is loaded with a warning."""

import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from oto import OTO, load_subnet
from oto.errors import DamagedArtifactError, OtherNumbersWarning
from tests.io.forging import sealed


class Scaled(nn.Module):
    def __init__(self, scale=1.0, eps=1e-5, kind="relu", taps=(1, 1)):
        super().__init__()
        self.kind, self.taps, self.drop = kind, taps, nn.Dropout(0.1)
        self.into, self.norm, self.out = nn.Linear(4, 16), nn.LayerNorm(4, eps=eps), nn.Linear(16, 2)
        self.scale, self.gradient_checkpointing, self.calls = scale, False, None

    def forward(self, x):
        return self.out(torch.relu(self.into(self.norm(x)))) * self.scale


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(5, 4)
    oto = OTO(model, x)
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet(tmp_path / "out")
    return tmp_path / "out", subnet.model, x


def test_the_same_arguments_say_nothing(saved):
    path, slim, x = saved
    given = Scaled()
    given.gradient_checkpointing, given.noticed, given.drop.p = True, 3, 0.0  # a trainer's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(load_subnet(path, Scaled)(x), slim(x))
        assert torch.equal(load_subnet(path, given)(x), slim(x))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda: Scaled(2.0), "scale was 1.0, is 2.0"),
        (lambda: Scaled(eps=1e-3), "norm.eps was 1e-05, is 0.001"),
        (lambda: Scaled(kind="tanh"), "kind was relu, is tanh"),
        (lambda: Scaled(taps=(1, 2)), r"taps was \[1, 1\], is \[1, 2\]"),
    ],
)
def test_other_arguments_are_told(saved, given, said):
    with pytest.warns(OtherNumbersWarning, match=said):
        load_subnet(saved[0], given)


class Once(nn.Module):
    """Its first forward learns its width."""

    def __init__(self):
        super().__init__()
        self.into, self.out, self.width = nn.Linear(4, 16), nn.Linear(1, 2), None

    def forward(self, x):
        hidden = torch.relu(self.into(x))
        if self.width is None:
            self.width = hidden.shape[-1]
        return self.out(hidden.sum(-1, keepdim=True) / self.width)


def test_what_a_first_forward_leaves_is_told(tmp_path):
    torch.manual_seed(0)
    model, x = Once(), torch.randn(5, 4)
    model(x)
    oto = OTO(model, x)
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet(tmp_path / "out")
    torch.testing.assert_close(subnet.model(x), model(x))
    with pytest.warns(OtherNumbersWarning, match="width was 16, is None"):
        load_subnet(tmp_path / "out", Once)


class Fourier(nn.Module):
    """Random constants in a list, a private factor, a table of numbers, and a tensor that the first forward keeps."""

    def __init__(self, seed=0, factor=0.5, power=2.0, gain=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.bands = [torch.randn(4, 8, generator=generator) for _ in range(2)]
        self._factor, self.powers, self.last = np.float32(factor), {"first": power}, None
        self.gain, self.table = torch.tensor(gain), np.arange(16, dtype=np.float32)[::-1]
        self.into, self.out = nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x):
        self.last = torch.cat([torch.sin(x @ band) ** self.powers["first"] for band in self.bands], 1)
        return self.out(torch.relu(self.into(self.last))) * float(self._factor) * self.gain


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seed": 1}, r"bands was \['tensor of float32 \[4, 8\], \w+', .* is \['tensor of"),
        ({"gain": 2.0}, r"gain was tensor of float32 \[\], \w+, is tensor of"),
        ({"factor": 0.25}, "_factor was 0.5, is 0.25"),
        ({"power": 3.0}, "powers was {'first': 2.0}, is {'first': 3.0}"),
        ({}, None),
    ],
)
def test_constant_tensors_and_numbers_in_containers_are_compared(tmp_path, given, said):
    torch.manual_seed(0)
    model, x = Fourier(), torch.randn(5, 4)
    model(x)  # its .last is no argument, and nothing is said of it
    oto = OTO(model, x)
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet(tmp_path / "out")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", OtherNumbersWarning)
        loaded = load_subnet(tmp_path / "out", Fourier(**given))
    assert len(told) == (said is not None)
    if said is None:
        assert torch.equal(loaded(x), subnet.model(x))
    else:
        assert re.search(said, str(told[0].message))


def test_artifacts_without_them_are_read_and_others_are_refused(saved, tmp_path):
    path, slim, x = saved
    old = sealed(path, tmp_path / "old", lambda _, manifest: manifest["model"].pop("numbers"))
    assert torch.equal(load_subnet(old, Scaled)(x), slim(x))
    wrong = sealed(
        path,
        tmp_path / "wrong",
        lambda _, manifest: manifest["model"].update(numbers={"norm": {"eps": {"a": {"b": {"c": {}}}}}}),
    )
    with pytest.raises(DamagedArtifactError, match="numbers"):
        load_subnet(wrong, Scaled)
