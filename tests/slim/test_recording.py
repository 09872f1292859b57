"""The last resort: what neither the class nor torch.export can express, as the calls that were made on the example."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from oto import OTO, load_subnet
from oto.errors import EmitterError, VerificationError
from oto.slim.proof.compare import relative_error
from oto.slim.proof.run import run

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
EXACT = 1e-12  # float64, sums of at most 16 terms


class Net(nn.Module):
    """The class states a size in every forward below, so it cannot be thinned itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 3)
        self.shift = torch.linspace(0, 1, 16)


class Branches(Net):
    def forward(self, x):
        h = self.a(x).view(-1, 16)
        return self.b(torch.relu(h) if h.mean().item() < 1e9 else -h)


class Scales(Net):
    """A number leaves torch and comes back."""

    def forward(self, x):
        h = self.a(x).view(-1, 16)
        return self.b(torch.tanh(h * (2.0 if bool(x.sum() < 1e9) else 1.0) / float(h.abs().max().item())))


class Writes(Net):
    """Rows chosen by value are written to, in place and through a view; and ``.data`` is set."""

    def forward(self, x):
        h = self.a(x).view(-1, 16).clone()
        rows = h[:, 0] > 0
        h[rows] = torch.relu(h[rows])
        h[:2].mul_(2)
        self.b.bias.data = self.b.bias.data * 1
        return self.b(h if rows.sum().item() <= len(x) else -h)


class Experts(Net):
    """Each row goes to the expert that it chooses."""

    def __init__(self):
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x):
        h = torch.relu(self.a(x)).view(-1, 16)
        out = torch.zeros_like(h)
        chosen = x[:, 0] > 0
        for i, gate in enumerate(self.gates):
            rows = (chosen == bool(i)).nonzero().squeeze(1)
            if len(rows):
                out[rows] = gate(h[rows])
        return {"y": self.b(out), "rows": [rows]}


class Samples(Net):
    """Tokens are drawn until a value says stop."""

    def forward(self, x):
        taken = []
        for row in torch.relu(self.a(x).view(-1, 16) + self.shift.to(x)):
            taken.append(self.b(row))
            if taken[-1].argmax().item() == 7:
                break
        return torch.stack(taken)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.float32) for kind in (Branches, Scales, Writes, Experts, Samples)] + [(Writes, torch.float64)],
)
def test_verified_saved_and_loaded(kind, dtype, tmp_path):
    model, x = kind().to(dtype), X.to(dtype)
    oto = OTO(model, x, allow_graph=True)
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet(tmp_path / "out", emitter="recording" if kind is Scales else "auto")
    assert subnet.emitter == "recording" and subnet.max_error < EXACT
    assert subnet.cost_after.params < subnet.cost_before.params
    assert sum(p.numel() for p in subnet.model.parameters()) == subnet.cost_after.params
    label = "recorded at the example's shapes and values"
    manifest = json.loads((tmp_path / "out" / "oto.json").read_text())
    assert label in subnet.why_graph and label in str(subnet) and label in manifest["why_graph"]
    assert manifest["emitter"] == "recording"
    # the last bit of a table may differ in float64, whose narrow parts the check makes wide
    assert relative_error(run(model, x), run(subnet.model, x)) < (EXACT if dtype == torch.float64 else 1e-5)
    assert relative_error(run(subnet.model, x), run(load_subnet(tmp_path / "out"), x)) < 1e-6


def test_it_trains():
    oto = OTO(Branches().double(), X, allow_graph=True)
    oto.random_set_zero_groups(0.5)
    slim = oto.construct_subnet().model.train_as_eval()
    slim(X).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in slim.parameters())


def test_other_shapes_are_refused():
    oto = OTO(Branches().double(), X, allow_graph=True)
    oto.random_set_zero_groups(0.5)
    slim = oto.construct_subnet().model
    with pytest.raises(RuntimeError, match="Tensor sizes mismatch"):
        slim(X[:3])


def test_inputs_that_take_another_path_are_not_compared_and_it_says_so():
    class Sign(Net):
        def forward(self, x):
            h = self.a(x).view(-1, 16)
            return self.b(torch.relu(h) if x[0, 0].item() == X[0, 0] else torch.tanh(h))

    oto = OTO(Sign().double(), X, allow_graph=True)
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet()
    assert [c.what for c in subnet.checks][:2] == ["slim on the example", "slim on the example, as users run it"]
    assert len(subnet.notes) == 2 and all("makes other calls there" in note for note in subnet.notes)
    assert all(f"note: {note}" in str(subnet) for note in subnet.notes)


def test_numbers_and_tables_that_come_of_the_data_are_built_in_and_it_says_so():
    class Cumulated(Net):
        def forward(self, x):
            return self.b(self.a(x).view(-1, 16) * torch.from_numpy(np.cumsum(x.numpy(), 1)).sum(1, keepdim=True))

    for kind in (Scales, Cumulated):
        oto = OTO(kind().double(), X, allow_graph=True)
        oto.random_set_zero_groups(0.5)
        subnet = oto.construct_subnet(emitter="recording")
        assert [c.what for c in subnet.checks] == ["slim on the example", "slim on the example, as users run it"]
        assert len(subnet.notes) == 2
        assert all("other numbers or sizes than those that were built in" in note for note in subnet.notes)


def test_what_holds_for_the_example_alone_is_made_by_name_only():
    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(1, 3)

        def forward(self, x):
            return self.b(torch.from_numpy(torch.relu(self.a(x)).detach().numpy().mean(1, keepdims=True)))

    oto = OTO(Averaged().double(), X)
    oto.random_set_zero_groups(0.5)
    with pytest.raises(EmitterError, match="numbers that follow from the values of the example"):
        oto.construct_subnet()
    assert oto.construct_subnet(emitter="recording").emitter == "recording"


def test_a_recording_that_is_wrong_is_not_handed_out(monkeypatch):
    from oto.slim.graph import emit as graph

    apply = graph.carry_over

    def one_more(pruned, wanted):
        apply(pruned, wanted)
        for mask in pruned.masks.values():
            if len(mask) == 16:
                mask[int(mask.argmax())] = False

    oto = OTO(Branches().double(), X, allow_graph=True)
    oto.random_set_zero_groups(0.5)
    monkeypatch.setattr(graph, "carry_over", one_more)
    with pytest.raises(VerificationError):
        oto.construct_subnet()


def test_arguments_of_every_kind():
    class Given(Net):
        def forward(self, x, flag=None, *rest, extra, **more):
            h = self.a(x).view(-1, 16) + more["last"]
            return [self.b(h * (2 if h.mean().item() < 1e9 else 1)) + rest[0] * extra["k"][0], None, h.shape[0]]

    one = torch.ones(1, dtype=torch.float64)
    model = Given().double()
    args = (X, True, one)
    kwargs = {"extra": {"k": (one * 2,), "n": 3}, "last": one * 3}

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, args, kwargs):
            return self.inner(*args, **kwargs)

    given = {"args": args, "kwargs": kwargs}
    oto = OTO(Whole(), given, allow_graph=True)
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet(emitter="recording")
    assert subnet.max_error < EXACT and subnet.model(**given)[1:] == [None, 6]


def test_what_no_graph_can_hold_names_all_three_ways():
    def negative(h):
        return torch.cond(h.sum() > 0, lambda t: t * 2, lambda t: t + 1, (h,))

    class Conditional(Net):
        def forward(self, x):
            h = self.a(x).view(-1, 16)
            return self.b(torch.relu(h)) + negative(x[:, :3] if x.mean().item() < 1e9 else -x)

    oto = OTO(Conditional().double(), X, allow_graph=True)
    oto.random_set_zero_groups(0.5)
    with pytest.raises(EmitterError) as caught:
        oto.construct_subnet()
    message = str(caught.value)
    assert "torch.export cannot follow Conditional" in message and "the original class fails too" in message
    assert "a recording cannot hold cond" in message and "without allow_graph=True" in message
    with pytest.raises(EmitterError, match="a recording cannot hold"):
        oto.construct_subnet(emitter="recording")


def test_it_runs_where_its_inputs_are():
    class Counts(Net):
        def forward(self, x):
            places = torch.arange(len(x), device=x.device)[:, None] + torch.zeros(1, device=x.device)
            return self.b(torch.relu(self.a(x).view(-1, 16)) + places)

    oto = OTO(Counts(), X.float(), allow_graph=True)
    oto.random_set_zero_groups(0.5)
    slim = oto.construct_subnet(emitter="recording").model
    assert not [node for node in slim.graph.nodes if "cpu" in f"{node.args} {node.kwargs}"]
    assert slim.to("meta")(X.float().to("meta")).is_meta
