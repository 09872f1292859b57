"""State that a forward leaves: caches and collected activations neither block nor change the class, cold or warm."""

from __future__ import annotations

import copy
import functools
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oto import OTO, load_subnet
from oto.errors import NotItsClassWarning
from oto.slim.proof.compare import relative_error
from oto.slim.proof.run import run
from oto.trace.state import ModelState, undone

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LONGER = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Base(nn.Module):
    """Two hidden layers; ``keep`` does something with what is between, and gives what is added to it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x):
        h = self.b(self.a(x).relu()).relu()
        return self.c(h) + self.keep(h)


class Grid(Base):
    """A table for the last size, of elements of a tensor, as detectors have their anchors."""

    shape = None

    def __init__(self):
        super().__init__()
        self.grid, self.stride = torch.empty(0), torch.tensor([8.0])

    def keep(self, h):
        if self.shape != h.shape[:2]:
            self.grid = torch.stack([h.new_full((h.shape[1],), s) for s in self.stride], 1)
            self.shape = h.shape[:2]
        return self.grid


class LateBuffer(Base):
    """A buffer that the first forward registers."""

    def keep(self, h):
        n = h.shape[1]
        if not hasattr(self, "table") or len(self.table) < n:
            self.register_buffer("table", torch.arange(n, dtype=h.dtype)[:, None], persistent=False)
        return self.table[:n]


class EmptyBuffer(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", None, persistent=False)

    def keep(self, h):
        n = h.shape[1]
        if self.table is None or len(self.table) < n:
            self.register_buffer("table", torch.arange(n, dtype=h.dtype)[:, None], persistent=False)
        return self.table[:n]


class WidthOfTheModel(Base):
    """A mask that is as wide as the layer, and the size that it is for."""

    def __init__(self):
        super().__init__()
        self.size, self.mask = None, None

    def keep(self, h):
        if self.size != h.shape[1:]:
            self.size, self.mask = h.shape[1:], torch.ones(h.shape[1:], dtype=h.dtype, device=h.device)
        return F.linear(h * self.mask, self.c.weight)


class Collected(Base):
    """Activations with their history, in a dict and in a list that is never emptied."""

    def __init__(self):
        super().__init__()
        self.seen, self.all, self.last, self.recent = {}, [], None, deque(maxlen=2)

    def keep(self, h):
        self.seen["h"], self.last = h, (h, h.mean())
        self.all.append(h)
        self.recent.append(h)
        return h.new_zeros(())


class Holder:
    def __init__(self):
        self.table, self.times = None, 0


class AnObject(Base):
    """A cache in an object of the user's, which counts how often it was asked."""

    def __init__(self):
        super().__init__()
        self.cache = Holder()

    def keep(self, h):
        if self.cache.table is None or self.cache.table.shape != h.shape[1:]:
            self.cache.table = torch.ones(h.shape[1:], dtype=h.dtype, device=h.device)
        self.cache.times += 1
        return F.linear(h * self.cache.table, self.c.weight)


class BySize(Base):
    """A table of its own for every size; tuples hold them."""

    def __init__(self):
        super().__init__()
        self.tables = {}

    def keep(self, h):
        n = h.shape[1]
        if n not in self.tables:
            self.tables[n] = (torch.ones(h.shape[1:], dtype=h.dtype, device=h.device), n)
        return F.linear(h * self.tables[n][0], self.c.weight)


class InATuple(Base):
    """A pair of tables in an attribute, as of cosines and sines."""

    pair = None

    def keep(self, h):
        if self.pair is None or self.pair[0].shape != h.shape[1:]:
            self.pair = tuple(h.new_full(h.shape[1:], x) for x in (1.0, 2.0))
        return F.linear(h * self.pair[0] * self.pair[1], self.c.weight)


class OfAMethod(Base):
    """``functools.lru_cache`` around a method."""

    @functools.lru_cache  # noqa: B019
    def table(self, n, dtype):
        return torch.arange(n, dtype=dtype)[:, None]

    def keep(self, h):
        return self.table(h.shape[1], h.dtype)


class Hooks(Base):
    """A hook whose closure is all that knows where the activations go."""

    def __init__(self):
        super().__init__()
        seen = []
        self.a.register_forward_hook(lambda module, args, out: seen.append(out))

    def keep(self, h):
        return h.new_zeros(())


KINDS = [
    Grid,
    LateBuffer,
    EmptyBuffer,
    WidthOfTheModel,
    Collected,
    AnObject,
    BySize,
    InATuple,
    OfAMethod,
    Hooks,
]


def copied(value):
    return copy.copy(value) if isinstance(value, dict | list | deque) else value


def used(model):
    """Forwards as in training, and on another length."""
    for x in (LONGER, X):
        model(x).sum().backward()
    model.zero_grad()


@pytest.mark.parametrize(("when", "training"), [("never", False), ("between", True), ("both", False)])
@pytest.mark.parametrize("kind", KINDS)
def test_whenever_it_was_used_the_class_is_the_same(kind, when, training):
    model = kind().double().train(training)
    if when in ("before", "both"):
        used(model)
    oto = OTO(model, X)
    assert {g.name: g.size for g in oto.node_groups if g.prunable} == {"a.weight": 16, "b.weight": 12}
    oto.random_set_zero_groups(0.5)
    if when in ("between", "both"):
        used(model)
    subnet = oto.construct_subnet()
    assert subnet.emitter == "module" and subnet.cost_after.params < 0.6 * subnet.cost_before.params
    assert relative_error(run(model, X), run(subnet.model, X)) < 1e-12
    if when not in ("before", "both") or kind not in (LateBuffer, EmptyBuffer):
        assert relative_error(run(model, LONGER), run(subnet.model, LONGER)) < 1e-12


class Memory(Base):
    """A buffer of a checkpoint that grows with every forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("memory", torch.zeros(0, 12))

    def keep(self, h):
        self.memory = torch.cat([self.memory[-20:], h.detach().flatten(0, 1)])
        return F.linear(self.memory[-h.shape[1] :], self.c.weight)


@pytest.mark.parametrize(
    ("kind", "warm"),
    [*((kind, False) for kind in KINDS), *((kind, True) for kind in (Grid, LateBuffer, Memory, BySize))],
)
def test_a_slim_model_is_saved_and_loaded_whatever_was_left(kind, warm, tmp_path):
    model = kind().double()
    if warm:
        model(X)
    oto = OTO(model, X)
    oto.random_set_zero_groups(0.5)
    used(model)
    slim = oto.construct_subnet(out_dir=tmp_path / "slim").model
    loaded = load_subnet(tmp_path / "slim", lambda: kind().double())
    for x in (X,) if warm else (X, LONGER):
        assert relative_error(run(slim, x), run(loaded, x)) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_the_model_is_left_to_it(kind):
    model = kind().double()
    oto = OTO(model, X)
    oto.random_set_zero_groups(0.5)
    used(model)
    before = {name: copied(value) for name, value in (vars(model) | model._buffers).items()}
    oto.construct_subnet()
    after = vars(model) | model._buffers
    assert after.keys() == before.keys()
    for name, value in before.items():
        now = after[name]
        assert type(now) is type(value)
        if type(value) in (list, deque, tuple):
            assert all(x is y for x, y in zip(now, value, strict=True)), name
        elif type(value) is dict:
            assert now.keys() == value.keys() and all(now[key] is x for key, x in value.items()), name
        elif isinstance(value, torch.Tensor):
            assert now is value, name


def test_a_model_goes_on_after_shrinking_whatever_was_left():
    model = WidthOfTheModel()
    oto = OTO(model, X.float())
    optimizer = oto.hesso(lr=0.01, target_group_sparsity=0.5, total_steps=8, pruning_steps=4)
    for _ in range(8):
        model(X.float()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    full = run(model, X.float())
    oto.shrink(optimizer)
    assert model.b.out_features < 12
    assert relative_error(full, run(model, X.float())) < 1e-5


def test_state_that_the_outputs_depend_on_is_no_cache():
    """What training has measured, and nothing was there when the model was analyzed."""

    class Measured(Base):
        mean = None

        def keep(self, h):
            if self.training:
                self.mean = h.detach().mean((0, 1))
            return 0 if self.mean is None else F.linear(h - self.mean, self.c.weight)

    model = Measured().double().eval()
    oto = OTO(model, X)
    oto.random_set_zero_groups(0.5)
    model.train()(X)
    with pytest.warns(NotItsClassWarning, match="makes other calls than those that were recorded"):
        slim = oto.construct_subnet().model
    assert relative_error(run(model, X), run(slim, X)) < 1e-12


class Constants(Base):
    """Tables in a container that the constructor has put there, beside one that the forward fills."""

    def __init__(self):
        super().__init__()
        self.given, self.made = {"gain": torch.full((), 2.0, dtype=X.dtype)}, {}

    def keep(self, h):
        if "mask" not in self.made:
            self.made["mask"] = torch.ones(h.shape[-1], dtype=h.dtype)
        return F.linear(h * self.made["mask"] * self.given["gain"], self.c.weight)


def test_constants_in_containers_are_no_state():
    model = Constants().double()
    model(X)
    mask = model.made["mask"]
    oto = OTO(model, X)
    assert {g.name: g.size for g in oto.node_groups if g.prunable} == {"a.weight": 16, "b.weight": 12}
    assert model.made["mask"] is mask
    oto.random_set_zero_groups(0.5)
    slim = oto.construct_subnet().model
    assert type(slim) is Constants and slim.given["gain"] == 2 and not slim.made
    assert relative_error(run(model, X), run(slim, X)) < 1e-12


def test_a_copy_of_the_model_may_have_been_used():
    """Such as a moving average, which is evaluated now and then."""
    model = WidthOfTheModel().double()
    oto = OTO(model, X)
    oto.random_set_zero_groups(0.5)
    average = copy.deepcopy(model)
    with torch.no_grad():
        average(X)
    subnet = oto.construct_subnet(model=average)
    assert subnet.emitter == "module"


def test_what_a_user_sets_is_no_state():
    """Numbers and functions that were set since, in modules that no tensor turned up in."""
    model = Base()
    model.keep, model.gain = (lambda h: model.gain), 1.0
    state = ModelState(model)
    model.gain, model.flag, model.keep = 2.0, [1, 2], lambda h: 0.0
    model.a.register_forward_hook(lambda *args: None)
    assert not state.changes(model, ())


def test_changes_are_undone_and_done_again():
    model = Collected()
    state = ModelState(model)
    model.keep(torch.ones(1, 2, 12))
    now = (dict(model.seen), list(model.all), model.last, list(model.recent))
    changes = state.changes(model, ())
    with undone(changes):
        assert (model.seen, model.all, model.last, len(model.recent)) == ({}, [], None, 0)
    assert model.seen["h"] is now[0]["h"] and model.all[0] is now[1][0]
    assert model.last is now[2] and model.recent[0] is now[3][0]
