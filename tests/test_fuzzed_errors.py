"""Whatever a model's code raises, and wherever, ``oto`` tells it as one of its errors; the model is as it was."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oto import OTO
from oto.errors import OTOError, TraceError

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
WHERE = ["call", "double", "batch", "values", "meta", "thin", "train", "deepcopy", "state_dict", "buffers", "grad mode"]


class Own(Exception):
    """An exception that cannot be made from a message alone."""

    def __init__(self, a, b):
        super().__init__(a, b)


RAISES = {
    "ValueError": lambda: ValueError("no\nlines"),
    "empty": lambda: RuntimeError(),
    "own": lambda: Own(1, 2),
    "assertion": lambda: AssertionError("x"),
    "stop": lambda: StopIteration(),
    "key": lambda: KeyError("k"),
    "recursion": lambda: RecursionError("deep"),
}


class Moody(nn.Module):
    def __init__(self, where, nth, raises, graph=True):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("scale", torch.ones(8))
        self.where, self.left, self.raises, self.graph = where, [nth], raises, graph

    def now(self, where):
        if where != self.where:
            return
        self.left[0] -= 1
        if self.left[0] < 0:
            raise self.raises()

    def forward(self, x):
        self.now("call")
        if x.dtype == torch.float64:
            self.now("double")
        if len(x) != 2:
            self.now("batch")
        if self.where == "values" and x.sum().item() != X.sum().item():
            self.now("values")
        if x.is_meta:
            self.now("meta")
        if self.up.weight.shape[0] != 8:
            self.now("thin")
        if self.training:
            self.now("train")
        if not torch.is_inference_mode_enabled():
            self.now("grad mode")
        h = torch.relu(self.up(x)) * self.scale
        return self.down(h if self.graph else h.view(-1, 8))

    def __deepcopy__(self, memo):
        self.now("deepcopy")
        made = Moody(self.where, self.left[0], self.raises, self.graph)
        memo[id(self)] = made
        made.left = self.left  # one count for all copies
        made.up, made.down = copy.deepcopy(self.up, memo), copy.deepcopy(self.down, memo)
        made.scale = copy.deepcopy(self.scale, memo)
        return made

    def state_dict(self, *args, **kwargs):
        self.now("state_dict")
        return super().state_dict(*args, **kwargs)

    def named_buffers(self, *args, **kwargs):
        self.now("buffers")
        return super().named_buffers(*args, **kwargs)


def use(model, folder, emitter="auto", allow_graph=False):
    oto = OTO(model, X, allow_graph=allow_graph)
    oto.random_set_zero_groups(0.5)
    return oto.construct_subnet(folder, emitter=emitter)


@settings(max_examples=20)
@given(
    where=st.sampled_from(WHERE),
    nth=st.integers(0, 12),
    raises=st.sampled_from(sorted(RAISES)),
    emitter=st.sampled_from(["auto", "module", "graph"]),
    allow_graph=st.booleans(),
    graph=st.booleans(),
)
def test_only_errors_of_ours_come_out(tmp_path_factory, where, nth, raises, emitter, allow_graph, graph):
    model = Moody(where, nth, RAISES[raises], graph)
    model.train()
    folder = tmp_path_factory.mktemp("fuzz") / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            subnet = use(model, folder, emitter, allow_graph)
        except OTOError as told:
            text = str(told)
            assert "\n  to fix" in text and "\n  effect" in text, text
            assert not (folder / "oto.json").exists(), "what failed was written"
            assert all(len(line) < 500 for line in text.splitlines()), "a dump of torch's is no message"
        else:
            assert subnet.cost_after.params < subnet.cost_before.params
    assert model.training and model.up.training


@pytest.mark.parametrize("memory", [MemoryError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("nth", [0, 3, 8])
@pytest.mark.parametrize("where", ["call", "deepcopy"])
def test_no_memory_and_no_patience_pass_through(memory, nth, where, tmp_path):
    class Out(memory):
        pass

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if nth == 0:
            with pytest.raises(Out):
                use(Moody(where, nth, lambda: Out("gone")), tmp_path / "out")
        else:
            try:
                use(Moody(where, nth, lambda: Out("gone")), tmp_path / "out")
            except BaseException as told:
                assert type(told) is Out


def test_a_failure_says_where_and_what_was_proved():
    model = Moody("never", 0, RAISES["ValueError"])
    oto = OTO(model, X, allow_graph=True)
    oto.random_set_zero_groups(0.5)
    model.where = "call"
    with pytest.raises(OTOError) as caught:
        oto.construct_subnet(emitter="graph")
    assert "\n  proved  the analysis is done" in str(caught.value)
    assert f"\n  at      {__file__}:" in str(caught.value) and "ValueError: no" in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("output", ["text", None, object(), [], {"a": [1, "b"]}])
def test_a_forward_that_gives_no_tensor(output):
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(50))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return output

    with pytest.raises(TraceError, match=r"Silent\.forward gives no tensor") as caught:
        OTO(Silent(), X)
    assert "to fix" in str(caught.value) and "layers" not in str(caught.value)
