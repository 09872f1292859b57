"""A class whose path is decided by data: asked again at other counts, it decides as it did when it was analyzed."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oto import OTO
from oto.errors import EmitterError
from oto.slim.own_class import at_counts
from oto.slim.proof.run import run
from oto.trace.decisions import Script


class Spoken(nn.Module):
    """How long its output is follows from values."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(4, 8), nn.Linear(8, 2)
        nn.init.ones_(self.into.weight), nn.init.zeros_(self.into.bias)

    def forward(self, x):
        hidden = F.relu(self.into(x))
        steps = torch.arange(int(hidden.sum()) % 5 + 3, dtype=x.dtype)
        return self.out(hidden)[:, :, None] * steps


class Routed(nn.Module):
    """Each expert runs if a token chooses it."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(3))

    def forward(self, x):
        chosen = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().flatten()
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]))
        return out


class Averaged(nn.Module):
    """A mean over a width, taken from a tensor that holds it; whether it doubles is decided by data."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(4, 16), nn.Linear(1, 2)

    def forward(self, x):
        hidden = F.relu(self.into(x))
        if hidden.sum().item() > 1e9:
            hidden = hidden * 2
        return self.out(hidden.sum(-1, keepdim=True) / int(torch.IntTensor([hidden.shape[-1]])[0]))


def test_a_size_that_passes_through_a_tensor_is_not_repeated():
    torch.manual_seed(0)
    model, x = Averaged(), torch.randn(5, 4)
    oto = OTO(model, x)
    assert oto.partition.found.graph.mode == "real"
    with torch.no_grad():
        model.into.weight[:6] = model.into.bias[:6] = 0
    subnet = oto.construct_subnet()
    assert subnet.model.into.out_features == 10
    assert any("looks at values" in note for note in subnet.notes)
    torch.testing.assert_close(subnet.model(x), model(x))


class Makes(nn.Module):
    def __init__(self, made):
        super().__init__()
        self.made = made

    def forward(self, x):
        self.made(x)
        return x


def written(x):
    mask = torch.zeros(4)
    mask[1:3] = x[0, :2]
    return mask.nonzero()


@pytest.mark.parametrize(
    ("made", "decided"),
    [
        (lambda x: (x > 0).sum(), 1),  # a sum of what was decided decides nothing
        (written, 1),
        (lambda x: x.argmax(), 1),
        (lambda x: int(x.sum()), 1),
        (lambda x: torch.rand(3).argmax(), 1),
        (lambda x: torch.ones_like(x).long().sum(), 0),
        (lambda x: int(torch.tensor(x.shape[0])), 0),
        (lambda x: torch.arange(x.shape[0]) > 2, 0),
        (lambda x: x.new_zeros(2).bool(), 0),
        (lambda x: torch._shape_as_tensor(x).prod(), 0),
    ],
)
def test_what_is_a_decision(made, decided):
    script = Script()
    run(Makes(made), torch.randn(4, 3), script=script)
    assert len(script.written) == decided


def mixed(x, width):
    return torch.stack([x.sum(-1).argmax().int(), torch.IntTensor([width])[0]])[1]


def written_beside(x, width):
    sizes = torch.IntTensor([0, width])
    sizes[0] = x.sum(-1).argmax()
    return sizes[1]


def cut_together(x, width):
    return torch.stack([x.abs().sum() * 1e4, torch.IntTensor([width])[0].float()]).long()[1]


def switched(x, width):
    return torch.where(x[0, 0] < 1e9, torch.IntTensor([width])[0], 1)


class Divides(nn.Module):
    """What it gives is divided by a width that met data on its way."""

    def __init__(self, by):
        super().__init__()
        self.into, self.out, self.by = nn.Linear(4, 16), nn.Linear(1, 2), by

    def forward(self, x):
        hidden = F.relu(self.into(x))
        return self.out(hidden.sum(-1, keepdim=True) / int(self.by(x, hidden.shape[-1])))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("by", [mixed, written_beside, cut_together, switched])
def test_a_size_among_decisions_is_not_repeated(by):
    torch.manual_seed(0)
    model, x = Divides(by), torch.randn(5, 4)
    oto = OTO(model, x)
    with torch.no_grad():
        model.into.weight[:6] = model.into.bias[:6] = 0
    try:
        subnet = oto.construct_subnet()
    except EmitterError:
        return
    torch.testing.assert_close(subnet.model(x), model(x))


def test_a_slim_model_of_decisions_is_copied_and_freed():
    torch.manual_seed(0)
    oto = OTO(Averaged(), torch.randn(5, 4))
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet()
    for _ in range(3):
        copy.deepcopy((subnet, oto.partition))
        gc.collect()
    assert not oto.partition.found.graph.script._data


@pytest.mark.parametrize("wide", [False, True])
def test_what_a_buffer_decides_is_a_decision_in_every_precision(wide):
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("level", torch.tensor(0.5))

        def forward(self, x):
            return x * int(self.level * 10)

    script = Script()
    run(Buffered(), torch.randn(4, 3), wide=wide, script=script)
    assert len(script.written) == 1


class Chosen(nn.Module):
    def forward(self, x):
        rows = x[:, 0].nonzero().flatten()[:3]
        return torch.arange(4)[rows] * 2.0


def test_what_follows_from_a_decision_is_repeated_too():
    script = Script()
    (first,) = run(Chosen(), torch.ones(4, 3), script=script)
    script.repeat()
    (second,) = run(Chosen(), torch.eye(4, 3), script=script)
    assert script.read == len(script.written)
    assert first.tolist() == second.tolist() == [0, 2, 4]


def zeroed(model, oto):
    """What the class needs once the first three atoms of each group are zero, and the atoms that it keeps."""
    analysis = oto._analysis
    groups = [group for group in analysis.groups if group.prunable]
    kept = {group.name: torch.arange(3, group.size).numpy() for group in groups}
    found = at_counts(model, analysis.partition, analysis.groups, analysis.example, analysis.form.own, kept)
    return kept, *found


def test_a_length_that_the_weights_decide():
    model, x = Spoken(), torch.ones(1, 4)
    assert model(x).shape == (1, 2, 5)  # 8 units of 4
    oto = OTO(model, x)
    with torch.no_grad():
        model.into.weight[:3] = 0
    assert model(x).shape == (1, 2, 3)  # 5 units
    kept, own, found = zeroed(model, oto)
    assert not own.whole and {name: list(atoms) for name, atoms in found.items()} == {
        name: list(atoms) for name, atoms in kept.items()
    }


@pytest.mark.parametrize("then", [0, 1])
def test_an_expert_that_no_token_chooses_once_the_router_has_learned(then):
    torch.manual_seed(0)
    model, x = Routed(), torch.randn(16, 4)
    assert len(model.router(x).argmax(-1).unique()) > 1
    oto = OTO(model, x)
    with torch.no_grad():  # as if it had learned to send all tokens to one
        model.router.bias[then] = 100.0
        for expert in model.experts:
            expert[0].weight[:3] = expert[0].bias[:3] = 0
    subnet = oto.construct_subnet()
    assert subnet.emitter == "module"
    assert all(expert[0].out_features == 5 for i, expert in enumerate(subnet.model.experts) if i == then)
    kept, own, found = zeroed(model, oto)
    assert not own.whole and all(list(found[name]) == list(atoms) for name, atoms in kept.items())


class Experts(nn.Module):
    """Rows in the order of their experts, whose products are one call; how many rows each has is decided by data."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(2, *shape) / 4) for shape in ((16, 24), (24, 16)))

    def forward(self, x):
        order = (x.sum(-1) > 0).long().sort()
        ends = torch.bincount(order.values, minlength=2).cumsum(0).int()
        if ends[0].item() < 0:
            x = -x
        hidden = F.relu(F.grouped_mm(x[order.indices], self.up, offs=ends))
        return F.grouped_mm(hidden, self.down, offs=ends)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch before 2.10 has none")
def test_a_kernel_that_refuses_a_width_is_overridden_before_it_meets_it():
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(8, 16)
    oto = OTO(model, x)
    assert oto.partition.found.graph.mode == "real"
    with torch.no_grad():
        model.up[:, :, :3] = 0
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        F.grouped_mm(x, model.up[:, :, 3:].contiguous(), offs=torch.tensor([4, 8], dtype=torch.int32))
    kept, own, found = zeroed(model, oto)
    assert not own.whole and all(list(found[name]) == list(atoms) for name, atoms in kept.items())
