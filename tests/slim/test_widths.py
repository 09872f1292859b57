"""The zeros of what computes nothing tie no widths that were not tied before, and follow their own as these shrink."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from oto import OTO, load_subnet
from oto.nn import ErasedForward
from oto.slim.proof.compare import relative_error
from oto.slim.widths import Widths


class Op(nn.Module):
    def __init__(self, width, kernel):
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return self.norm(self.conv(x.relu()))


class Mixed(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ops = nn.ModuleList(Op(width, kernel) for kernel in (1, 3, 5))
        self.alphas = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return sum(alpha * op(x) for alpha, op in zip(self.alphas.softmax(0), self.ops, strict=True))


class Darts(nn.Module):
    """Each cell gives a sum of what operations make of what it is given, and nothing else."""

    def __init__(self):
        super().__init__()
        self.stem, self.cells = nn.Conv2d(3, 8, 3), nn.Sequential(Mixed(8), Mixed(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.cells(self.stem(x)).mean((2, 3)))


class Square(nn.Module):
    """What is added is made of something else of the same width, which is read elsewhere, too."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.out, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.also = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        mixed = self.mix(x).relu()
        return self.head(x + self.out(mixed)) + self.also(mixed)


class Laid(nn.Module):
    """What is added to a concatenation is as wide as both of its branches."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(8, 2)
        self.a, self.b, self.op = (nn.Linear(6, n, bias=False) for n in (5, 3, 8))

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(torch.cat([self.a(x).tanh(), self.b(x).relu()], 1) + 0.5 * self.op(x))


class Mixer(nn.Module):
    """Tokens are mixed, too: what is added has the channels of what it is made of, and tokens of its own."""

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.out = nn.Linear(3, 8), nn.Conv1d(6, 6, 1), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.out(self.up(x).relu()))


class Shared(nn.Module):
    """What computes nothing is added in two places, to widths that nothing else ties."""

    def __init__(self):
        super().__init__()
        self.stem, self.op, self.head = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 2)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)
        self.then = nn.Linear(8, 2)
        ErasedForward(nn.Linear, ["input"], {"zeros": "input", "last": 8}).install(self.op)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((self.a(x) + self.op(x)).relu()) + self.then((self.b(x) + self.op(x)).relu())


IMAGES, ROWS = (2, 3, 8, 8), (3, 4)


def randomized(model):
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.uniform_(p, 0.1, 1) if p.ndim < 2 else nn.init.normal_(p)
    return model.double().eval()


def without(model, shape, *names, out_dir=None):
    """The slim model without segments, and its example."""
    x = torch.randn(shape, dtype=torch.float64)
    oto, parameters = OTO(model, x, compress_mode="both"), dict(model.named_parameters())
    found = {group.name: group for group in oto.node_groups if group.segment and group.prunable}
    for name in names:
        found[name].zero_(parameters, torch.tensor([0]))
    subnet = oto.construct_subnet(out_dir)
    assert subnet.emitter == "module" and subnet.max_error <= 1e-12
    assert all(isinstance(subnet.model.get_submodule(name).forward, ErasedForward) for name in names)
    return subnet, x


def prunable(oto):
    return {group.name: group.size for group in oto.node_groups if group.prunable and not group.segment}


@pytest.mark.parametrize(
    ("make", "shape", "names", "groups"),
    [
        (Darts, IMAGES, ("cells.0.ops.1", "cells.1.ops.2"), 3),
        (Square, ROWS, ("out",), 2),
        (Laid, ROWS, ("op",), 3),
    ],
)
def test_widths_are_as_free_as_before(make, shape, names, groups, tmp_path):
    subnet, x = without(randomized(make()), shape, *names)
    oto = OTO(subnet.model, x)
    assert len(prunable(oto)) == groups
    for seed in range(3):
        oto.random_set_zero_groups(0.5, seed=seed)
        for emitter in ("module", "graph"):
            again = oto.construct_subnet(tmp_path / f"{seed}{emitter}", emitter=emitter)
            assert again.max_error <= 1e-12 and again.cost_after.params < 0.7 * again.cost_before.params
            loaded = load_subnet(tmp_path / f"{seed}{emitter}", make().double() if emitter == "module" else None)
            assert torch.equal(loaded(x), again.model(x))
            more = torch.randn(5, *shape[1:], dtype=torch.float64)
            assert relative_error([loaded(more)], [subnet.model(more)]) <= 1e-12


def test_what_is_gone_follows_each_width_alone():
    for wide, narrow in itertools.permutations(("stem.weight", "cells.0.ops.0.conv.weight")):
        subnet, x = without(randomized(Darts()), IMAGES, "cells.0.ops.1")
        oto, parameters = OTO(subnet.model, x), dict(subnet.model.named_parameters())
        group = next(group for group in oto.node_groups if group.name == narrow)
        group.zero_(parameters, torch.arange(5))
        slim = oto.construct_subnet().model
        read = {"stem.weight": slim.stem, "cells.0.ops.0.conv.weight": slim.cells[0].ops[0].conv}
        assert (read[wide].out_channels, read[narrow].out_channels) == (8, 3)
        gives = slim.cells[0].ops[1].forward.gives
        assert gives["channels"] == slim.cells[0].ops[0].conv.out_channels


def test_what_is_added_to_what_it_is_given_gives_zeros_of_its_shape():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.op, self.head = nn.Conv2d(3, 8, 3), Op(8, 3), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.op(x))

    subnet, _ = without(randomized(Residual()), IMAGES, "op")
    assert subnet.model.op.forward.gives == {"zeros": "x"}


def test_zeros_are_as_wide_as_a_concatenation_that_gets_shorter():
    subnet, _ = without(randomized(Laid()), ROWS, "b", "op")
    assert subnet.model.head.in_features == 5
    assert subnet.model.op.forward.gives == {"zeros": "input", "last": 5}


def test_other_widths_that_it_hands_on_stay_those_of_what_it_is_given():
    model = randomized(Mixer())
    subnet, x = without(model, (2, 6, 3), "out")
    assert subnet.model.out.forward.gives in ({"zeros": "input"}, {"zeros": "input", "last": 8})
    oto = OTO(subnet.model, x)
    oto.random_set_zero_groups(0.5)
    assert oto.construct_subnet(emitter="module").max_error <= 1e-12


def test_what_is_called_in_two_places_gives_the_same_size_in_both():
    oto = OTO(randomized(Shared()), torch.randn(ROWS, dtype=torch.float64))
    for seed in range(4):
        oto.random_set_zero_groups(0.5, seed=seed)
        subnet = oto.construct_subnet(emitter="module")
        assert subnet.max_error <= 1e-12


def test_artifacts_of_earlier_releases_are_read_and_made_slim_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Widths, "apart", lambda *_: None)  # they gave zeros of the shape of what came in
        subnet, x = without(randomized(Square()), ROWS, "out", out_dir=tmp_path / "old")
        assert subnet.model.out.forward.gives == {"zeros": "input"}
    model = load_subnet(tmp_path / "old", Square().double())
    assert torch.equal(model(x), subnet.model(x))
    oto = OTO(model, x)
    assert len(prunable(oto)) == 1
    oto.random_set_zero_groups(0.5)
    assert oto.construct_subnet(tmp_path / "new", emitter="module").max_error <= 1e-12
