"""Recording: any forward becomes one flat list of calls, and the model is left as it was."""

from __future__ import annotations

import copy
import types
import typing
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from oto import OTO
from oto.axes.registry import known
from oto.errors import DummyInputError, TraceError
from oto.groups import partition
from oto.slim.proof.compare import relative_error
from oto.slim.proof.run import run
from oto.trace.graph import write_through
from oto.trace.record import record


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.down = nn.Linear(8, 3)

    def forward(self, x):
        return self.down(self.drop(torch.relu(self.norm(self.up(x)))))


def prunable(model, x):
    return [(g.name, g.size) for g in partition(record(model, x, known)).groups if g.prunable]


def test_every_call_knows_its_module_and_line():
    graph = record(Net(), torch.randn(2, 4))
    assert [str(n.op) for n in graph.nodes] == [
        "aten.linear.default",
        "aten.batch_norm.default",
        "aten.relu.default",
        "aten.dropout.default",
        "aten.linear.default",
    ]
    assert [n.module for n in graph.nodes] == ["up", "norm", "", "drop", "down"]
    assert all(n.source.split(":")[0] == __file__ for n in graph.nodes)


def test_the_model_is_left_as_it_was():
    model = Net().train()
    model.drop.eval()
    model(torch.randn(5, 4)).sum().backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    pointers = [p.data_ptr() for p in model.parameters()]
    random = torch.get_rng_state()
    record(model, torch.randn(2, 4))
    torch.set_rng_state(random)
    state = torch.get_rng_state()
    x = torch.zeros(2, 4)
    record(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not model.drop.training and model.up.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert not hasattr(model, "_forward_pre_hooks") or not model._forward_pre_hooks


def test_mode_dtype_and_meta_give_the_same_groups():
    x = torch.randn(2, 4)
    expected = prunable(Net().eval(), x)
    assert expected == [("up.weight", 8)]
    assert prunable(Net().train(), x) == expected
    assert prunable(Net().half(), x.half()) == expected
    assert prunable(Net().to("meta"), x) == expected


def test_a_branch_on_data_is_followed_on_the_example():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            hidden = self.a(x) if x.sum().item() > 0 else self.b(x)
            return self.out(torch.relu(hidden))

    graph = record(Branch(), torch.ones(1, 4))
    assert graph.mode == "real"
    assert {n.module for n in graph.nodes} >= {"a", "out"} and not any(n.module == "b" for n in graph.nodes)
    assert prunable(Branch(), torch.ones(1, 4)) == [("a.weight", 6)]


def test_tied_parameters_are_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    graph = record(Tied(), torch.tensor([[1, 2]]))
    (leaf,) = graph.leaves
    assert leaf.names == ("embed.weight", "head.weight")
    assert prunable(Tied(), torch.tensor([[1, 2]])) == [("embed.weight", 6)]


def test_a_write_into_a_view_reaches_the_base():
    class Write(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            h = self.up(x)
            h[:, :3].add_(1.0)  # the first three channels never are zero
            return self.down(h)

    graph = record(Write(), torch.randn(2, 4))
    assert [n.op for n in graph.nodes].count(write_through) == 1
    groups = {g.name: g for g in partition(graph).groups if g.prunable and g.size > 1}
    # the touched three need their readers at zero; the others need nothing of the sort, or are kept as unknown
    for group in groups.values():
        if group.size == 3:
            assert all(s.parameter == "down.weight" for s in group.zeros)


def test_dataclass_dict_and_none_outputs_are_outputs():
    @dataclass
    class Out:
        y: torch.Tensor
        extra: object = None

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x, *, scale=None):
            h = self.a(x)
            return Out(self.b(h), {"hidden": (h, None)})

    graph = record(Model(), {"x": torch.randn(1, 4)})
    assert [v.shape for v in graph.outputs] == [(1, 3), (1, 6)]


def test_checkpointing_custom_functions_and_parametrizations():
    from torch.nn.utils.parametrizations import weight_norm
    from torch.utils.checkpoint import checkpoint

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * 2

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = weight_norm(nn.Linear(4, 6)), nn.Linear(6, 3)

        def forward(self, x):
            h = checkpoint(lambda t: torch.relu(self.a(t)), x, use_reentrant=False)
            return self.b(Double.apply(h))

    assert record(Model(), torch.randn(1, 4)).nodes


@pytest.mark.parametrize("wrong", [3, "x", None, [], {"x": 1}, {1: torch.ones(1)}, object()])
def test_a_dummy_input_of_the_wrong_type(wrong):
    with pytest.raises(DummyInputError, match="dummy_input"):
        record(Net(), wrong)


def test_a_forward_that_fails_says_what_it_was_given():
    with pytest.raises(TraceError) as caught:
        record(Net(), torch.randn(2, 5))
    message = str(caught.value)
    assert "Net.forward failed" in message and "(2, 5)" in message and "to fix" in message


def test_a_module_held_twice_gets_its_own_tensors_back():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    model = Shared()
    before = list(model.parameters())
    graph = record(model, torch.randn(2, 4))
    assert graph.mode == "meta"
    assert all(now is then for now, then in zip(model.parameters(), before, strict=True))


def test_what_forward_keeps_in_attributes_is_taken_back():
    class Tables(nn.Module):
        def __init__(self):
            super().__init__()
            self.by_size, self.grids, self.last = {}, [torch.ones(4)], None

        def forward(self, x):
            if x.shape not in self.by_size:
                self.by_size[x.shape] = torch.arange(4, device=x.device)
            self.grids = [grid.to(x.device) for grid in self.grids]
            self.last = self.seen = x
            return x * self.grids[0] + self.by_size[x.shape]

    model = Tables()
    record(model, torch.randn(2, 4))
    assert model.by_size == {} and model.last is None and not hasattr(model, "seen")
    assert model.grids[0].device.type == "cpu"


def test_a_view_of_what_was_made_contiguous():
    class Shuffle(nn.Module):
        def forward(self, x):
            y = x.view(2, 2, 3, 5).transpose(1, 2).contiguous()
            return torch.relu(y.permute(0, 3, 1, 2)).contiguous().view(2, 30)

    assert record(Shuffle(), torch.randn(2, 6, 5)).mode == "meta"


def test_fake_tensors_carry_a_model_that_asks_for_its_device():
    class Asks(nn.Module):
        def forward(self, x):
            assert x.device.type == "cpu"
            return x + torch.ones(4, device=x.device)

    assert record(Asks(), torch.randn(2, 4)).mode == "fake"


class Merged(nn.Module):
    """Two branches while it trains; evaluated, one layer whose weight is made of theirs and set past autograd."""

    class Layer(nn.Module):
        def __init__(self, into, out):
            super().__init__()
            self.a, self.b, self.one = nn.Linear(into, 12), nn.Linear(12, out), nn.Linear(into, out)
            self.skip = nn.Linear(into, out)

        def forward(self, x):
            if self.training:
                return self.b(self.a(x)) + self.skip(x)
            weight, bias = self.b.weight.data.clone(), self.b.bias.data
            self.one.weight.data = weight @ self.a.weight.data + self.skip.weight.data
            self.one.bias.data = bias + weight @ self.a.bias.detach() + self.skip.bias.data
            return self.one(x)

    def __init__(self):
        super().__init__()
        self.first, self.last = self.Layer(5, 16), self.Layer(16, 3)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


def test_values_that_are_read_and_set_as_data_are_followed():
    torch.manual_seed(0)
    model, x = Merged().double(), torch.randn(2, 5, dtype=torch.float64)
    before = {name: p.clone() for name, p in model.named_parameters()}
    oto = OTO(model, x)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    prunable = {g.name: g for g in oto.node_groups if g.prunable}
    assert sorted(g.size for g in prunable.values()) == [12, 12, 16]
    (between,) = (g for g in prunable.values() if g.size == 16)
    assert {z.parameter for z in between.zeros} == {
        "first.b.weight",
        "first.b.bias",
        "first.skip.weight",
        "first.skip.bias",
    }
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet()
    assert type(subnet.model) is Merged and subnet.max_error < 1e-14
    assert subnet.model.first.b.weight.shape[0] == subnet.model.last.a.weight.shape[1] == len(subnet.kept[between.name])


class HeldElsewhere(nn.Module):
    """A weight that is registered, and read from somewhere else."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.w = nn.Linear(8, 16), nn.Linear(16, 3), nn.Parameter(torch.randn(16, 16) / 4)
        self.register_buffer("scale", torch.rand(16) + 1)
        self.double()
        w, scale = self.w, self.scale
        places = {
            "dict": {"w": (w, scale)},
            "list": [w, scale],
            "tuple": (w, (scale,)),
            "named tuple": Pair(w, scale),
            "object": types.SimpleNamespace(w=w, scale=scale),
            "object of the user's": Holder(w, scale),
            "closure": lambda: (w, scale),
        }
        self.place, self.how = places[how], how

    def forward(self, x):
        at = self.place
        match self.how:
            case "dict":
                w, scale = at["w"]
            case "list" | "named tuple":
                w, scale = at
            case "tuple":
                w, (scale,) = at
            case "closure":
                w, scale = at()
            case _:
                w, scale = at.w, at.scale
        return self.b(torch.relu(torch.nn.functional.linear(torch.relu(self.a(x)), w) * scale))


class Pair(typing.NamedTuple):
    w: torch.Tensor
    scale: torch.Tensor


class Holder:
    def __init__(self, w, scale):
        self.w, self.scale = w, scale


@pytest.mark.parametrize("how", ["dict", "list", "tuple", "named tuple", "object", "object of the user's", "closure"])
def test_a_parameter_may_be_read_from_elsewhere(how):
    model, x = HeldElsewhere(how).eval(), torch.randn(2, 8, dtype=torch.float64)
    before = copy.copy(vars(model))
    oto = OTO(model, x)
    assert {g.name: g.size for g in oto.node_groups if g.prunable} == {"a.weight": 16, "w": 16}
    assert not oto.partition.found.graph.unread
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet(emitter="module")
    assert relative_error(run(model, x), run(subnet.model, x)) < 1e-12
    assert vars(model).keys() == before.keys() and all(vars(model)[k] is v for k, v in before.items())
    with torch.no_grad():
        model(x)  # the weights are where they were


class TiedInAList(nn.Module):
    """The output layer's weight is the embedding's, in a list so that it is registered once."""

    def __init__(self):
        super().__init__()
        self.words, self.inner = nn.Embedding(20, 16), nn.Linear(16, 16)
        self.tied = [self.words.weight]

    def forward(self, ids):
        return torch.nn.functional.linear(torch.relu(self.inner(self.words(ids))), self.tied[0])


def test_a_weight_that_is_tied_through_a_list_stays_tied():
    model, ids = TiedInAList().eval(), torch.randint(0, 20, (2, 5))
    oto = OTO(model, ids)
    oto.random_set_zero_groups(0.5)
    slim = oto.construct_subnet(emitter="module").model
    assert slim.tied[0] is slim.words.weight and slim.words.weight.shape[1] < 16
