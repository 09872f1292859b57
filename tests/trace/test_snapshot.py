"""A model, and what its code keeps elsewhere, are as they were: the next training step does not notice the analysis."""

from __future__ import annotations

import functools
import random
import warnings
from collections import Counter
from contextlib import nullcontext
from functools import lru_cache
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oto import OTO
from oto.errors import EmitterError, LeftBehindWarning, NotPrunedWarning, OTOError, VerificationError
from oto.slim.proof.run import run
from oto.trace.record import record
from oto.trace.snapshot import preserved
from tests.zoo.unchanged import Seen

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def table(n, like=None):
    return torch.linspace(0, 1, n) if like is None else torch.linspace(0, 1, n, device=like.device, dtype=like.dtype)


class Net(nn.Module):
    """Two linear layers; ``scale`` gives a table of eight numbers between them, and keeps it somewhere."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)
        self.more = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.more(self.down(torch.relu(self.up(x)) * self.scale(x)))

    def scale(self, x):
        return 1


# --- in the model ---------------------------------------------------------------------------------------------------


class FilledBuffer(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", None)

    def scale(self, x):
        if self.table is None:
            self.table = table(8, x)
        return self.table


class RegisteredInForward(Net):
    def scale(self, x):
        if not hasattr(self, "table"):
            self.register_buffer("table", table(8, x), persistent=False)
        return self.table


class ParameterInForward(Net):
    def scale(self, x):
        if not hasattr(self, "table"):
            self.table = nn.Parameter(table(8, x))
        return self.table


class ModuleInForward(Net):
    def scale(self, x):
        if not hasattr(self, "inner"):
            self.inner = nn.LayerNorm(8)
        return self.inner(table(8, x))


class Attribute(Net):
    table = None

    def scale(self, x):
        if self.table is None:
            self.table = table(8, x)
        return self.table


class DictInList(Net):
    def __init__(self):
        super().__init__()
        self.tables = [{}]

    def scale(self, x):
        if 8 not in self.tables[0]:
            self.tables[0][8] = table(8, x)
        return self.tables[0][8]


class Helper:
    table = None

    def __call__(self, x):
        if self.table is None:
            self.table = (table(8, x),)
        return self.table[0]


class InAnObject(Net):
    def __init__(self):
        super().__init__()
        self.helper = Helper()

    def scale(self, x):
        return self.helper(x)


class CountsCalls(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def scale(self, x):
        self.calls += 1
        return 1


class StatisticsInEval(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def scale(self, x):
        h = self.up(x)
        return nn.functional.batch_norm(h, self.mean, self.var, training=True)


class Renormalized(Net):
    """``max_norm`` writes to the weight in the forward, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 8, max_norm=0.5)

    def scale(self, x):
        return self.embed(torch.zeros(1, dtype=torch.long, device=x.device) + int(0 * x.sum().item()))


class OtherData(Net):
    def scale(self, x):
        self.up.weight.data = self.up.weight.data * 2
        return 1


class HookInForward(Net):
    def scale(self, x):
        self.up.register_forward_hook(lambda module, args, output: output * 2)
        return 1


class ModeAndGradients(Net):
    def scale(self, x):
        if self.training:
            return 1
        self.train()
        self.up.weight.requires_grad_(False)
        self.down.weight.grad = torch.ones_like(self.down.weight)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        return 1


class Reordered(Net):
    def scale(self, x):
        up = self.up
        del self.up
        self.up = up
        return 1


# --- elsewhere ------------------------------------------------------------------------------------------------------


@lru_cache
def cached_table(n, device):
    return torch.linspace(0, 1, n, device=device)


@functools.cache
def cached_for_any_device(n):
    return {"tables": [(torch.linspace(0, 1, n),)]}


class Cached(Net):
    def scale(self, x):
        return cached_for_any_device(8)["tables"][0][0]


class CachedByDevice(Net):
    def scale(self, x):
        return cached_table(8, x.device)


class CachedMethod(Net):
    @lru_cache  # noqa: B019 on purpose
    def make(self):
        return torch.linspace(0, 1, 8)

    def scale(self, x):
        return self.make()


def behind_a_function(function):
    """A cache that only the closure of a function holds, as a decorator of transformers keeps it."""
    cached = lru_cache(function)

    @functools.wraps(function)
    def wrapper(*args):
        return cached(*args)

    wrapper.cache = cached  # for the tests
    return wrapper


@behind_a_function
def hidden_table(n):
    return torch.linspace(0, 1, n)


class CachedInAClosure(Net):
    def scale(self, x):
        return hidden_table(8)


class CachedInAStaticMethod(Net):
    @staticmethod
    @behind_a_function
    def make(n):
        return torch.linspace(0, 1, n)

    def scale(self, x):
        return self.make(8)


TABLE = None
TABLES: dict[int, torch.Tensor] = {}


class InAGlobal(Net):
    def scale(self, x):
        global TABLE
        if TABLE is None:
            TABLE = table(8)
        return TABLE


class InAGlobalDict(Net):
    def scale(self, x):
        if 8 not in TABLES:
            TABLES[8] = table(8)
        return TABLES[8]


class OnTheClass(Net):
    shared = None
    by_size: ClassVar = {}

    def scale(self, x):
        if type(self).shared is None:
            type(self).shared = table(8)
            self.by_size[8] = table(8)
        return self.shared + self.by_size[8]


def remembering(function):
    memory = {}

    @functools.wraps(function)
    def inner(n):
        if n not in memory:
            memory[n] = function(n)
        return memory[n]

    return inner


remembered_table = remembering(table)


class InAClosure(Net):
    def scale(self, x):
        return remembered_table(8)


class InADefault(Net):
    def scale(self, x, memory={}):  # noqa: B006 on purpose
        if 8 not in memory:
            memory[8] = table(8)
        return memory[8]


def counter():
    kept = None

    def give():
        nonlocal kept
        if kept is None:
            kept = table(8)
        return kept

    return give


give = counter()


class InACell(Net):
    def scale(self, x):
        return give()


class ByAHook(Net):
    """What a user's hook collects is in a list that only the hook knows."""

    def __init__(self):
        super().__init__()
        collected = []
        self.up.register_forward_hook(lambda module, args, output: collected.append(output))

    def scale(self, x):
        (hook,) = self.up._forward_hooks.values()
        collected = hook.__closure__[0].cell_contents
        return collected[0].mean()


class OnlyReal(Net):
    """Needs data, so it is run really, in inference mode, whose tensors may not take part in training."""

    def scale(self, x):
        assert x.abs().sum().item() > 0
        return cached_for_any_device(8)["tables"][0][0]


MODELS = [kind for kind in list(globals().values()) if isinstance(kind, type) and issubclass(kind, Net)]


def forget():
    """What the tests before this one left."""
    global TABLE
    TABLE = None
    TABLES.clear()
    cached_table.cache_clear()
    cached_for_any_device.cache_clear()
    CachedMethod.make.cache_clear()
    hidden_table.cache.cache_clear()
    CachedInAStaticMethod.make.cache.cache_clear()
    OnTheClass.shared = None
    OnTheClass.by_size.clear()
    remembered_table.__closure__[1].cell_contents.clear()
    give.__closure__[0].cell_contents = None
    InADefault.scale.__defaults__[0].clear()


def trained(model):
    """The gradients of one step and all that it leaves, from a start where nothing is remembered or warm."""
    model.train()
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(X).square().sum().backward()
    optimizer.step()
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def one_step_is_the_same(make, use):
    forget()
    expected = trained(make())
    forget()
    model = make().train()
    model.down.eval()
    before = Seen(model)
    use(model)
    assert not before.difference(model)
    got = trained(model)
    assert got.keys() == expected.keys() and all(torch.equal(t, got[name]) for name, t in expected.items())


@pytest.mark.parametrize("kind", MODELS)
def test_recording_leaves_everything_as_it_was(kind):
    one_step_is_the_same(kind, lambda model: record(model, X))


@pytest.mark.parametrize("kind", MODELS)
def test_running_leaves_everything_as_it_was(kind):
    def use(model):
        record(model, X)
        run(model, X)

    one_step_is_the_same(kind, use)


# what torch.export makes of them, or does not
REFUSED = {
    Renormalized: VerificationError,
    OtherData: EmitterError,
    OnlyReal: EmitterError,
    HookInForward: EmitterError,  # every call doubles once more
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("emitter", ["module", "graph"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_slim_model_is_made_and_the_full_one_left_as_it_was(kind, emitter, tmp_path):
    def use(model):
        oto = OTO(model, X)
        refused = REFUSED.get(kind) if emitter == "graph" else None
        with nullcontext() if refused is None else pytest.raises(refused):
            oto.construct_subnet(tmp_path / "out", emitter=emitter)

    one_step_is_the_same(kind, use)


CACHES = {
    Cached: cached_for_any_device,
    CachedByDevice: cached_table,
    CachedMethod: CachedMethod.make,
    CachedInAClosure: hidden_table.cache,
    CachedInAStaticMethod: CachedInAStaticMethod.make.cache,
}


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_of_results_that_was_filled_before_is_no_constant(kind):
    forget()
    cold = [node.op for node in record(kind(), X).nodes]
    model = kind()
    model(X)
    assert [node.op for node in record(model, X).nodes] == cold
    model(X)
    kept = CACHES[kind].cache_info().currsize
    with preserved(model, X):
        model(X)
    record(model, X)
    # what it keeps may be drawn, or learnt: no second call would give it
    assert kept and CACHES[kind].cache_info().currsize == kept


@functools.lru_cache
def drawn(width):
    return torch.randn(width)


class Drawing(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(X.shape[-1], 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.up(x).relu()) * drawn(8)


def test_what_a_function_drew_before_is_what_it_keeps():
    model = Drawing()
    model(X)
    kept = drawn(8)
    oto = OTO(model, X)
    oto.random_set_zero_groups()
    before = model(X)
    subnet = oto.construct_subnet()
    assert drawn(8) is kept and torch.equal(model(X), before)
    assert torch.allclose(subnet.model(X), before)


# --- anywhere -------------------------------------------------------------------------------------------------------

PLACES = [
    "attribute",
    "buffer",
    "new buffer",
    "list",
    "dict",
    "object",
    "class",
    "global",
    "global dict",
    "closure",
    "default",
    "function attribute",
    "lru_cache",
    "class list",
    "partial",
]


class Holder:
    pass


class Anywhere(Net):
    """Keeps tables in places that are drawn; those outside the model are made anew with each class."""

    def __init__(self, places, needs_data):
        super().__init__()
        self.places, self.needs_data = places, needs_data
        self.kept_list, self.kept_dict, self.kept_object = [], {}, Holder()
        self.register_buffer("kept_buffer", None)
        self.kept_partial = functools.partial(lambda memory, key: memory, {})

    def scale(self, x):
        if self.needs_data:
            assert x.abs().sum().item() > 0
        return sum(getattr(self, f"in_{place.replace(' ', '_')}")(lambda: table(8, x)) for place in self.places)

    def in_attribute(self, make):
        self.kept = getattr(self, "kept", None)
        if self.kept is None:
            self.kept = make()
        return self.kept

    def in_buffer(self, make):
        if self.kept_buffer is None:
            self.kept_buffer = make()
        return self.kept_buffer

    def in_new_buffer(self, make):
        if not hasattr(self.up, "made"):
            self.up.register_buffer("made", make(), persistent=False)
        return self.up.made

    def in_list(self, make):
        self.kept_list or self.kept_list.append([(make(),)])
        return self.kept_list[0][0][0]

    def in_dict(self, make):
        return self.kept_dict.setdefault("a", {}).setdefault("b", make())

    def in_object(self, make):
        self.kept_object.table = getattr(self.kept_object, "table", None)
        if self.kept_object.table is None:
            self.kept_object.table = make()
        return self.kept_object.table

    def in_class(self, make):
        if not hasattr(type(self), "kept_by_class"):
            type(self).kept_by_class = make()
        return type(self).kept_by_class

    def in_class_list(self, make):
        self.shared_list or self.shared_list.append(make())
        return self.shared_list[0]

    shared_list: ClassVar = []

    def in_global(self, make):
        global TABLE
        TABLE = make() if TABLE is None else TABLE
        return TABLE

    def in_global_dict(self, make):
        return TABLES.setdefault(9, make())

    def in_closure(self, make):
        return remembered_table(8).to(make().device)

    def in_default(self, make, memory={}):  # noqa: B006
        return memory.setdefault(8, make())

    def in_function_attribute(self, make):
        if not hasattr(table, "kept"):
            table.kept = make()
        return table.kept

    def in_lru_cache(self, make):
        return cached_for_any_device(8)["tables"][0][0].to(make().device)

    def in_partial(self, make):
        return self.kept_partial("x").setdefault("x", make())


def forget_anywhere():
    forget()
    Anywhere.shared_list.clear()
    Anywhere.in_default.__defaults__[0].clear()
    for holder, name in ((Anywhere, "kept_by_class"), (table, "kept")):
        if hasattr(holder, name):
            delattr(holder, name)


def test_tables_in_random_places():
    made = Counter()
    some = st.lists(st.sampled_from(PLACES), min_size=1, max_size=4, unique=True)
    emitters = st.sampled_from([None, None, "module", "graph"])

    @settings(max_examples=25)
    @given(places=some, needs_data=st.booleans(), emitter=emitters)
    def tables(places, needs_data, emitter):
        made.update(tables_in(places, needs_data, emitter))

    tables()
    assert made["module"] and made["graph"]


def tables_in(places, needs_data, emitter):
    """Whether a slim model was made, by its emitter; the full one is left as it was."""
    forget_anywhere()
    expected = trained(Anywhere(places, needs_data))
    forget_anywhere()
    model = Anywhere(places, needs_data).train()
    before = Seen(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LeftBehindWarning)
        warnings.simplefilter("ignore", UserWarning) if emitter == "graph" else None
        warnings.simplefilter("ignore", NotPrunedWarning)  # nothing is zero, so that the model trains on as it was
        oto = OTO(model, X)
        made = [emitter] if emitter is not None and was_made(oto, emitter) else []
    assert not before.difference(model)
    got = trained(model)
    assert got.keys() == expected.keys() and all(torch.equal(t, got[name]) for name, t in expected.items())
    return made


def was_made(oto, emitter):
    try:
        oto.construct_subnet(emitter=emitter)
    except OTOError:  # torch.export cannot follow all of these
        return False
    return True


class Sealed:
    """Nothing but itself can look into it."""

    __slots__ = ("table",)


def test_what_cannot_be_taken_back_is_said():
    sealed = Sealed()

    class Hidden(Net):
        def scale(self, x):
            sealed.table = table(8, x)
            return 1

    with pytest.warns(LeftBehindWarning, match=r"keeps tensors outside the model.*Sealed") as caught:
        record(Hidden(), X)
    assert "(8,)" in str(caught[0].message) and "to fix" in str(caught[0].message)


def test_the_example_is_as_it_was_too():
    class Cache:
        def __init__(self):
            self.states = []

    class Caches(Net):
        def forward(self, x, cache):
            cache.states.append(self.up(x))
            x.add_(int(0 * x.sum().item()) + 1)
            return super().forward(x)

    cache, x = Cache(), X.clone()
    model = Caches()
    record(model, (x, cache))
    run(model, (x, cache))
    assert not cache.states and torch.equal(x, X)
