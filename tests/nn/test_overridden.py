"""Calls that a module is told sizes for are known by the lines that make them, and any other one is refused."""

from __future__ import annotations

import copy
import inspect
import linecache
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from oto import OTO, load_subnet
from oto.errors import ClassChangedError, UnseenPathError
from oto.nn import OverriddenForward, overridden
from oto.slim.proof.compare import relative_error
from oto.slim.proof.run import run

EXACT = 1e-12  # float64, sums of a few dozen terms


def slimmed(model, x, share=0.5):
    model = model.double().eval()
    oto = OTO(model, x)
    oto.random_set_zero_groups(share)
    subnet = oto.construct_subnet(emitter="module")
    assert any(isinstance(vars(m).get("forward"), OverriddenForward) for m in subnet.model.modules())
    return model, subnet.model


def agree(full, slim, *given, **named):
    with torch.no_grad():
        return relative_error([full(*given, **named)], [slim(*given, **named)]) <= EXACT


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class TwoPaths(nn.Module):
    """How many views come before the one whose size is stated depends on the path."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x, labels=None):
        if self.training:
            x = x.view(-1, 5)
            x = x.view(1, -1, 5)
        if labels is not None:
            labels = labels.view(-1, 1)
        y = self.b(torch.relu(self.a(x)).view(-1, 12))
        return y if labels is None else y - labels.view(-1, 1)


def test_calls_that_come_before_on_another_path_do_not_matter():
    full, slim = slimmed(TwoPaths(), data(2, 5))
    for train in (False, True):
        full.train(train), slim.train(train)
        assert agree(full, slim, data(4, 5)) and agree(full, slim, data(4, 5), labels=data(4))
        compiled = torch.compile(slim, backend="eager", fullgraph=True)
        assert agree(full, compiled, data(4, 5), labels=data(4))
    assert agree(full.eval(), copy.deepcopy(slim).eval(), data(3, 5), labels=data(3))


def test_the_proof_covers_train_mode_where_something_is_told():
    oto = OTO(TwoPaths(), torch.randn(2, 5))
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet()
    assert any(c.what == "slim in train mode" for c in subnet.checks) and not any("train" in n for n in subnet.notes)


class Helped(nn.Module):
    """A function states the size, and more lines than one call it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 12), nn.Linear(12, 3), nn.Linear(5, 12)

    def rows(self, x, n=12):
        return x.view(-1, n)

    def forward(self, x, whole=False, twice=False, n=12):
        h = self.a(x)
        if twice:
            return self.b(self.rows(h)) + self.b(self.rows(h))
        return self.b(self.rows(x.sum(-1, keepdim=True).expand(-1, 12).contiguous() if whole else h, n))


def test_another_way_to_the_same_line_is_refused():
    full, slim = slimmed(Helped(), data(2, 5))
    x = data(6, 5)
    assert agree(full, slim, x)
    with pytest.raises(
        UnseenPathError, match=r"view is called on a path that was not seen:\n.*rows\(h\)(.*\n)+.*to fix"
    ):
        slim(x, twice=True)
    with pytest.raises(UnseenPathError, match=r"view is given a tensor of shape \(6, 12\), and not one with {-1: 6}"):
        slim(x, whole=True)
    with pytest.raises(UnseenPathError, match=r"view states \[4\] in the places \[1\], and not \[12\]"):
        slim(x, n=4)
    with pytest.raises(Exception, match=r"called on a path that was not seen"):
        torch.compile(slim, backend="eager", fullgraph=True)(x, twice=True)


class Looped(nn.Module):
    """One line, which states another size each time."""

    def __init__(self):
        super().__init__()
        self.into = nn.ModuleList([nn.Linear(5, 12), nn.Linear(5, 16)])
        self.out = nn.ModuleList([nn.Linear(12, 3), nn.Linear(16, 3)])

    def forward(self, x, times=2):
        y = 0.0
        for i in range(times):
            y = y + self.out[i % 2](self.into[i % 2](x).view(-1, (12, 16)[i % 2]))
        return y


def test_a_line_that_is_told_something_else_each_time_runs_as_often_as_it_did():
    full, slim = slimmed(Looped(), data(2, 5))
    assert agree(full, slim, data(6, 5))
    for times in (1, 3, 4):
        with pytest.raises(UnseenPathError, match=r"view is called .*times"):
            slim(data(6, 5), times)


class Parted(nn.Module):
    """Parts of the forward are methods that may be called alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 12), nn.Linear(12, 16), nn.Linear(16, 3)

    def rows(self, x):
        return self.a(x).relu().view(-1, 12)

    def features(self, x):
        return self.b(self.rows(x)).view(-1, 16)

    def head(self, x, pre_logits=False):
        x = x.view(-1, 16)
        return x if pre_logits else self.c(x)

    def forward(self, x):
        return self.head(self.features(x))


def test_methods_that_the_forward_calls_may_be_called_alone():
    full, slim = slimmed(Parted(), data(2, 5), 0.4)
    x = data(6, 5)
    for model in (slim, copy.deepcopy(slim)):
        assert agree(full, model, x)
        h = model.features(x)
        assert h.shape == (6, model.b.out_features) and agree(
            full, lambda x, model=model: model.head(model.features(x)), x
        )
        assert model.head(h, pre_logits=True).shape == h.shape
        assert model.rows(x).shape == (6, model.a.out_features)
        again = torch.compile(model.features, backend="eager", fullgraph=True)
        assert torch.equal(again(x), h)
    assert str(inspect.signature(slim.head)) == "(x, pre_logits=False)"


class Block(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.up, self.down, self.inner = nn.Linear(8, 12), nn.Linear(12, 8), inner

    def forward(self, x):
        h = torch.relu(self.up(x)).view(-1, 12)
        y = x + self.down(h)
        return y if self.inner is None else self.inner(y).view(-1, 8)


class Stack(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.into, self.blocks, self.out = nn.Linear(5, 8), nn.ModuleList(blocks), nn.Linear(8, 3)
        self.again = False

    def forward(self, x):
        x = self.into(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.again else block(x)
            torch._dynamo.graph_break()
        return self.out(x)


def test_each_module_is_told_what_is_its_own():
    full, slim = slimmed(Stack(Block(Block()), Block()), data(2, 5), 0.4)
    told_ = [name for name, m in slim.named_modules() if isinstance(vars(m).get("forward"), OverriddenForward)]
    assert told_ == ["blocks.0", "blocks.0.inner", "blocks.1"]
    assert agree(full, slim, data(6, 5))
    assert agree(full, torch.compile(slim, backend="eager"), data(4, 5))  # in pieces
    full.again = slim.again = True  # forwards run again in the backward
    grads = []
    x = data(4, 5)
    for model in (full, slim):
        given = x.clone().requires_grad_()
        model(given).square().sum().backward()
        grads.append(given.grad)
    assert relative_error(grads[:1], grads[1:]) <= EXACT


def test_a_block_that_is_left_out_does_not_shift_the_others():
    full, slim = slimmed(Stack(Block(), Block()), data(2, 5), 0.4)
    del full.blocks[0], slim.blocks[0]
    assert agree(full, slim, data(6, 5))


class Folded(nn.Module):
    """A number that grows with the batch is stated for the heads that there were."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x):
        b, t = x.shape[0], x.shape[1]
        h = self.into(x).view(b, t, 4, 3).transpose(1, 2).reshape(b * 4, t, 3).relu()
        return self.out(h.view(b, 4, t, 3).transpose(1, 2).reshape(b, t, -1))


def test_a_number_that_holds_a_width_and_the_batch_grows_with_that():
    full, slim = slimmed(Folded(), data(2, 7, 5), 0.4)
    assert slim.into.out_features < 12
    for shape in ((2, 7, 5), (5, 3, 5)):
        assert agree(full, slim, data(*shape))
    free = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(slim, (data(2, 7, 5),), dynamic_shapes=(free,), strict=False).module()
    assert agree(full, program, data(4, 3, 5))


def test_two_rounds(tmp_path):
    full, x = Stack(Block(), Block()).double(), data(2, 5)
    first, given = copy.deepcopy(full), full
    for number in (1, 2):
        oto = OTO(given, x)
        oto.random_set_zero_groups(0.3, seed=number)
        subnet = oto.construct_subnet(tmp_path / str(number), emitter="module")
        wanted, given = run(given, x), subnet.model
    assert subnet.cost_after.params < subnet.cost_before.params < sum(p.numel() for p in first.parameters())
    again = load_subnet(tmp_path / "2", lambda: first)
    for model in (given, again):
        assert relative_error(wanted, run(model, x)) <= EXACT
        with pytest.raises(UnseenPathError, match="view is given a tensor of shape"):
            model.blocks[0].up = nn.Linear(model.into.out_features, 12).double()
            run(model, x)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(-1, keepdim=True)


class Spread(nn.Module):
    """One module, whose runs differ, in one that tells them apart; what is gone is known outside of it."""

    def __init__(self):
        super().__init__()
        self.into, self.out, self.mean = nn.Linear(5, 16), nn.Linear(16, 3), Mean()

    def forward(self, x):
        h = self.into(x)
        mean = self.mean(h)
        return self.out((h - mean) * torch.rsqrt(self.mean((h - mean).pow(2)) + 1e-3))


def test_a_shared_module_whose_runs_differ_is_told_by_the_one_around_it():
    full, slim = slimmed(Spread(), data(4, 5))
    assert slim.into.out_features < 16 and [n for n, m in slim.named_modules() if "forward" in vars(m)] == [""]
    assert agree(full, slim, data(6, 5))
    assert agree(full, torch.compile(slim, backend="eager", fullgraph=True), data(4, 5))


def test_code_that_has_changed_is_refused(tmp_path, monkeypatch):
    model, x = TwoPaths().double(), data(2, 5)
    oto = OTO(model, x)
    oto.random_set_zero_groups(0.5)
    oto.construct_subnet(tmp_path)
    assert relative_error(run(model, x), run(load_subnet(tmp_path, lambda: TwoPaths().double()), x)) <= EXACT
    lines = frozenset(line for line in overridden._source(__name__) if ".view(-1, 12)" not in line)
    monkeypatch.setattr(overridden, "_source", lambda name: lines if name == __name__ else frozenset())
    with pytest.raises(ClassChangedError, match=r"has changed since TwoPaths was made slim") as raised:
        load_subnet(tmp_path, lambda: TwoPaths().double())
    assert "to fix" in str(raised.value)


LIKE_TORCHVISION = """
import torch
from torch import nn


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.out = nn.Linear(8, 24), nn.Linear(24, 2)

    def forward(self, x):
        return self.out(self.cut(self.body(x).relu()))

    def cut(self, h):
        return h.view(h.shape[0], 4, 6).flip(1).view(-1, 24)
"""


def of_a_package_beside_torch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A class whose code lies in a package that is called like torch and something more."""
    file = f"{Path(torch.__file__).parent}like/net.py"
    home = types.ModuleType("torchlike_net")
    home.__file__ = file
    linecache.cache[file] = (len(LIKE_TORCHVISION), None, LIKE_TORCHVISION.splitlines(keepends=True), file)
    exec(compile(LIKE_TORCHVISION, file, "exec"), vars(home))
    monkeypatch.setitem(sys.modules, home.__name__, home)
    return home.Head


def test_code_of_packages_that_are_called_like_torch_is_a_users(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, x = of_a_package_beside_torch(monkeypatch), torch.randn(3, 8)
    torch.manual_seed(0)
    oto = OTO(kind(), x)
    oto.random_set_zero_groups()
    slim = oto.construct_subnet().model
    expected, forward = slim(x), slim.forward
    assert isinstance(forward, OverriddenForward) and slim.body.out_features == 12
    assert all("forward: return self.out(self.cut(" in site for site in forward.calls)
    # as artifacts had them: lines of such packages are left out, and their forwards are one word
    former = {
        "\n".join("forward" for line in site.split("\n") if line.startswith("forward")): named
        for site, named in forward.calls.items()
    }
    assert set(former) == {"forward"}
    forward.remove()
    OverriddenForward(slim, former).install()
    torch.testing.assert_close(slim(x), expected, rtol=0, atol=0)


def test_rounds_that_see_other_calls_than_each_other_are_refused():
    """A call that was passed over in the first round is not seen by the second."""
    first = {"site": {"max_pool2d": [{"passed": True}, {}, {}]}}
    both = overridden.merge_rounds(first, {"site": {"max_pool2d": [{"keep": True}, {}]}})
    assert both["site"]["max_pool2d"] == [{"passed": True}, {"keep": True}, {}]
    both = overridden.merge_rounds(first, {"site": {"max_pool2d": [{}, {"keep": True}, {}]}})  # it saw all of them
    assert both["site"]["max_pool2d"] == [{"passed": True}, {"keep": True}, {}]
    with pytest.raises(RuntimeError, match="max_pool2d has 2 overrides in one round, 4 in another: site"):
        overridden.merge_rounds(first, {"site": {"max_pool2d": [{}, {}, {}, {}]}})
