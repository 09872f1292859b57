"""A copy of a module computes with its own layers, whatever functions, hooks and containers lead to them."""

from __future__ import annotations

import copy
import functools
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oto import OTO, load_subnet
from oto.slim.copying import copied
from oto.slim.proof.compare import relative_error
from oto.slim.proof.run import run

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.m, self.b = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)


class Acts(Base):
    """``act`` is a function that runs ``m``."""

    def forward(self, x):
        return self.b(self.act(self.a(x).relu()))


class Lambda(Acts):
    def __init__(self):
        super().__init__()
        self.act = lambda t: self.m(t).relu()


class Default(Acts):
    def __init__(self):
        super().__init__()
        self.act = lambda t, m=self.m: m(t).relu()


class Keyword(Acts):
    def __init__(self):
        super().__init__()

        def act(t, *, weight=self.m.weight):
            return F.linear(t, weight, self.m.bias).relu()

        self.act = act


class Nested(Acts):
    """A decorator around a function that calls itself, in a list in a dict."""

    def __init__(self):
        super().__init__()

        def deeper(t, times=1):
            return deeper(t, times - 1) if times else self.m(t).relu()

        @functools.wraps(deeper)
        def around(t):
            return deeper(t)

        self.acts = {"all": [around]}

    def act(self, t):
        return self.acts["all"][0](t)


class Partial(Acts):
    def __init__(self):
        super().__init__()
        self.act = functools.partial(lambda m, t: m(t).relu(), self.m)


class Closed(Acts):
    """Over a partial of a method, in a tuple."""

    def __init__(self):
        super().__init__()
        inner = (functools.partial(self.both, F.relu),)
        self.act = lambda t: inner[0](t)

    def both(self, f, t):
        return f(self.m(t))


class Weak(Acts):
    def __init__(self):
        super().__init__()
        me = weakref.ref(self)
        self.act = lambda t: me().m(t).relu()


class Patched(Base):
    """A forward that somebody put into it."""

    def __init__(self):
        super().__init__()
        first = self.forward
        self.forward = lambda x: first(x) * 2

    def forward(self, x):
        return self.b(self.m(self.a(x).relu()).relu())


class Hooked(Base):
    """A hook that closes over a dict of the module's, which the forward reads."""

    def __init__(self):
        super().__init__()
        self.store = store = {}
        self.m.register_forward_hook(lambda module, args, out: store.__setitem__("m", out))

    def forward(self, x):
        self.m(self.a(x).relu())
        return self.b(self.store.pop("m").relu())


class Bound(Base):
    def __init__(self):
        super().__init__()
        self.m.forward = types.MethodType(lambda own, t: F.linear(t, own.weight, own.bias).relu(), self.m)

    def forward(self, x):
        return self.b(self.m(self.a(x).relu()))


KINDS = [Lambda, Default, Keyword, Nested, Partial, Closed, Weak, Patched, Hooked, Bound]


def runs(model, x):
    """The modules that run, and what comes out."""
    met = []
    hook = nn.modules.module.register_module_forward_pre_hook(lambda module, _: met.append(module))
    try:
        return met, model(x)
    finally:
        hook.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_runs_its_own_layers(kind):
    model = kind().double()
    other = copied(model, {})
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
        met, y = runs(other, X)
        mine, theirs = set(model.modules()), set(other.modules())
        assert set(met) <= theirs and not set(met) & mine
        assert not torch.equal(y, model(X))
        for p in other.parameters():
            p.div_(2)
        assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_can_do_with_less(kind, tmp_path):
    model = kind().double().eval()
    oto = OTO(model, X)
    assert {g.name: g.size for g in oto.node_groups if g.prunable} == {"a.weight": 16, "m.weight": 16}
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet(out_dir=tmp_path / "slim")
    assert subnet.emitter == "module" and subnet.cost_after.params < 0.5 * subnet.cost_before.params
    loaded = load_subnet(tmp_path / "slim", lambda: kind().double())
    assert relative_error(run(model, X), run(loaded, X)) < 1e-12


def test_what_belongs_to_somebody_else_is_shared():
    seen = {}
    model = nn.Sequential(nn.Linear(8, 4))
    model[0].register_forward_hook(lambda module, args, out: seen.__setitem__("out", out))
    other = copied(model, {})
    other(X.float())
    assert list(seen) == ["out"]


def test_a_function_that_leads_nowhere_is_not_made_anew():
    model = nn.Sequential(nn.Linear(8, 4))
    model.scale, model.table = (lambda t: t * 2), {"f": copy.copy}
    other = copied(model, {})
    assert other.scale is model.scale and other.table["f"] is copy.copy


def test_tensors_with_a_history_are_taken_along():
    model = Base()
    model.last, model.all = model.a(X.float()), {"m": [model.m.weight * 2]}
    other = copied(model, {})
    assert torch.equal(other.last, model.last) and other.last.grad_fn is None
    assert torch.equal(other.all["m"][0], model.all["m"][0]) and other.all["m"][0] is not model.all["m"][0]


class Bus:
    """What the user shares between models: no copy of a model has one of its own."""

    def __init__(self):
        self.listeners = []

    def __deepcopy__(self, memo):
        return self


def test_what_a_copy_shares_with_the_model_is_not_written_to():
    bus = Bus()

    class Announced(Base):
        def __init__(self):
            super().__init__()
            self.bus, self.seen = bus, []
            bus.listeners.append(lambda x: self.seen.append(x))

        def forward(self, x):
            return self.b(self.m(self.a(x).relu()).relu())

    model = Announced()
    (before,) = bus.listeners
    oto = OTO(model, torch.randn(2, 8))
    oto.random_set_zero_groups(0.5)
    oto.construct_subnet()
    assert bus.listeners == [before]
    before(1)
    assert model.seen == [1]
