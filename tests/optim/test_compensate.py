"""Closed-form compensation against brute force, for every kind of reader."""

from __future__ import annotations

import copy
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from oto import OTO
from oto._torch import TorchDispatchMode, tree_leaves
from oto.groups.readers import readers
from oto.optim.compensate import Moments, SplitEntries, Surgeon, fold_, greedy, key_of, listening


class Net(nn.Module):
    """Two layers around something; the second reads what the first gives."""

    def __init__(self, first, between, second, after=None):
        super().__init__()
        self.first, self.between, self.second, self.after = first, between, second, after or nn.Identity()

    def forward(self, x):
        return self.after(self.second(self.between(self.first(x))))


class Attention(nn.Module):
    """Grouped queries: each key head serves two query heads."""

    def __init__(self, dim=12, heads=4, kv=2, width=3):
        super().__init__()
        self.shape = heads, kv, width
        self.q, self.k, self.v = (nn.Linear(dim, n * width) for n in (heads, kv, kv))
        self.o = nn.Linear(heads * width, dim)

    def forward(self, x):
        (h, kv, w), (b, s, _) = self.shape, x.shape
        q, k, v = (f(x).view(b, s, -1, w).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (t[:, :, None].expand(b, kv, h // kv, s, w).reshape(b, h, s, w) for t in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, h * w))


class Experts(nn.Module):
    """All experts on all tokens, each with weights of its own in one parameter."""

    def __init__(self, dim=5, hidden=8, experts=3):
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, dim, hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, dim))

    def forward(self, x):
        return torch.bmm(torch.relu(torch.bmm(x.expand(3, -1, -1), self.up)), self.down).sum(0)


class Several(nn.Module):
    """One tensor, read by three weights, one of them an einsum over heads and width."""

    def __init__(self):
        super().__init__()
        self.embed, self.a = nn.Embedding(30, 12), nn.Linear(12, 4)
        self.b = nn.Parameter(torch.randn(3, 4, 7))
        self.c = nn.Parameter(torch.randn(12, 5))

    def forward(self, ids):
        x = torch.tanh(self.embed(ids))
        heads = torch.einsum("bshd,hde->bse", x.unflatten(-1, (3, 4)), self.b)
        return torch.cat([self.a(x), heads, x @ self.c], -1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.lstm = nn.Linear(4, 8), nn.LSTM(8, 3, batch_first=True)

    def forward(self, x):
        return self.lstm(torch.relu(self.first(x)))[0]


def images(n=8):
    return torch.randn(n, 3, 6, 6)


def channels(x, groups=1):
    """Pixels as rows: (groups, pixels, channels of a group)."""
    return x.movedim(1, -1).reshape(-1, groups, x.shape[1] // groups).transpose(0, 1)


def second(model, x):
    return model.between(model.first(x))


def convolved(w, groups=1):
    """(groups, out, kernel, in) of the weight of a convolution."""
    return w.reshape(groups, w.shape[0] // groups, w.shape[1], -1).transpose(2, 3)


def back(w, groups=1):
    """The same of a transposed one, whose inputs come first."""
    return w.reshape(groups, w.shape[0] // groups, w.shape[1], -1).permute(0, 2, 3, 1)


def plain(w):
    return w[None, :, None]


def heads_of(model, x):
    """What the output projection of :class:`Attention` reads."""
    seen = []
    with_hook = model.o.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    with_hook.remove()
    return seen[0].reshape(1, -1, model.o.in_features)


def embedded(model, ids):
    return torch.tanh(model.embed(ids)).reshape(1, -1, 12)


def case(model, x, **reads):
    return model, x, reads


def conv(model, x, groups=1, flat=convolved):
    return case(model, x, **{"second.weight": (lambda m, x: channels(second(m, x), groups), lambda w: flat(w, groups))})


def dense(model, x, name="second.weight"):
    return case(model, x, **{name: (lambda m, x: second(m, x)[None], plain)})


# a network, what to calibrate with, and by hand what each weight reads, (batch, rows, n), and how it reads that,
# (batch, out, kernel, n)
NETS = {
    "linear": lambda: dense(Net(nn.Linear(3, 9), nn.GELU(), nn.Linear(9, 4)), torch.randn(40, 3)),
    "no bias": lambda: dense(Net(nn.Linear(3, 9), nn.GELU(), nn.Linear(9, 4, bias=False)), torch.randn(40, 3)),
    "conv1d": lambda: conv(Net(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3, stride=2)), torch.randn(6, 3, 12)),
    "conv2d": lambda: conv(Net(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)), images()),
    "conv3d": lambda: conv(Net(nn.Conv3d(2, 8, 1), nn.ReLU(), nn.Conv3d(8, 4, 2)), torch.randn(2, 2, 4, 4, 4)),
    "grouped": lambda: conv(Net(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 6, 3, groups=3)), images(), 3),
    "depthwise": lambda: conv(
        Net(nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)), nn.Conv2d(8, 4, 1)), images()
    ),
    "transposed": lambda: conv(
        Net(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3, stride=2)), images(), flat=back
    ),
    "transposed, grouped": lambda: conv(
        Net(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, groups=2)), images(), 2, back
    ),
    "before a norm": lambda: conv(
        Net(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)), images()
    ),
    "flattened": lambda: dense(
        Net(nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()), nn.Linear(32, 5)), images(60)
    ),
    "attention": lambda: case(Attention(), torch.randn(9, 7, 12), **{"o.weight": (heads_of, plain)}),
    "experts": lambda: case(
        Experts(),
        torch.randn(1, 60, 5),
        down=(lambda m, x: torch.relu(x.expand(3, -1, -1) @ m.up), lambda w: w.mT[:, :, None]),
    ),
    "several": lambda: case(
        Several(),
        torch.randint(30, (9, 7)),
        **{
            "a.weight": (embedded, plain),
            "b": (embedded, lambda w: plain(w.reshape(12, 7).T)),
            "c": (embedded, lambda w: plain(w.T)),
        },
    ),
    "recurrent": lambda: case(
        Recurrent(),
        torch.randn(9, 5, 4),
        **{"lstm.weight_ih_l0": (lambda m, x: torch.relu(m.first(x)).reshape(1, -1, 8), plain)},
    ),
}


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class Folded:
    """A network, folded after every second atom of all that is read was to go, and the same before."""

    def __init__(self, net, kind, ridge):
        self.model, self.x, self.reads = NETS[net]()
        for module in self.model.eval().modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 2)
        oto = OTO(self.model, self.x[:2] if len(self.x) > 1 else self.x)
        found = readers(oto.partition, oto.node_groups)
        self.readers = {reader.parameter: reader for reader in found.found}
        read = {name for reader in found.found for name in reader.groups}
        self.kept = {g.name: np.arange(0, g.size, 2) for g in oto.node_groups if g.name in read}
        masks = oto.partition.masks(self.kept)
        self.entries = {
            name: SplitEntries.of(reader.survivors({}), reader.survivors(masks))
            for name, reader in self.readers.items()
        }
        self.before = copy.deepcopy(self.model)
        self.tensors = self.named(self.model)
        with listening(found.found, self.tensors) as moments:
            for part in self.x.split(5) if len(self.x) > 1 else [self.x]:
                self.model(part)
        own = {id(reader): self.entries[name] for name, reader in self.readers.items()}
        assert fold_(found.found, moments, lambda reader: own[id(reader)], self.tensors, kind, ridge) == []

    @staticmethod
    def named(model):
        return dict(model.named_parameters()) | dict(model.named_buffers())

    @torch.no_grad()
    def read(self, name):
        """Rows, the weight before and after, and the constant that was added: all laid out by hand."""
        rows, flat = self.reads[name]
        old = self.named(self.before)
        shift = self.readers[name].shift
        moved = None if shift is None else shift[1] * (self.tensors[shift[0]] - old[shift[0]])
        return rows(self.before, self.x), flat(old[name]), flat(self.tensors[name]), moved


def by_hand(x, stay, go, kind, ridge):
    """Fit what goes by what stays with ``lstsq``; damping as rows of its own."""
    x_s, x_g = x[:, stay], x[:, go]
    if kind == "bias":
        return torch.zeros(len(go), len(stay)), x_g.mean(0)
    mean_s, mean_g = (x_s.mean(0), x_g.mean(0)) if kind == "affine" else (0, 0)
    a, b = (x_s - mean_s) / len(x) ** 0.5, (x_g - mean_g) / len(x) ** 0.5
    damping = ridge * a.square().sum(0).mean()
    a = torch.cat([a, damping.sqrt() * torch.eye(len(stay))])
    b = torch.cat([b, torch.zeros(len(stay), len(go))])
    fit = torch.linalg.lstsq(a, b).solution.T
    return fit, (mean_g - fit @ mean_s if kind == "affine" else torch.zeros(len(go)))


@pytest.mark.parametrize("kind", ["affine", "ridge", "bias"])
@pytest.mark.parametrize("net", NETS)
def test_a_fold_is_the_damped_least_squares_fit(net, kind):
    folded = Folded(net, kind, ridge=0.01)
    assert folded.readers.keys() == folded.reads.keys(), "another weight reads it"
    for name, own in folded.entries.items():
        rows, old, new, moved = folded.read(name)
        how = "ridge" if kind == "affine" and moved is None else kind
        added = []
        for x, w, w_new in zip(rows, old, new, strict=True):
            fit, constant = by_hand(x, own.stay, own.go, how, 0.01)
            expected = w.clone()
            expected[..., own.stay] += w[..., own.go] @ fit
            torch.testing.assert_close(w_new, expected, rtol=0, atol=1e-10)
            added.append((w[..., own.go] @ constant).sum(1))
        if moved is not None:
            torch.testing.assert_close(moved, torch.cat(added), rtol=0, atol=1e-10)


@pytest.mark.parametrize("net", NETS)
def test_what_is_left_of_the_error_is_orthogonal_to_what_stays(net):
    """The normal equations: no other weights of what stays, and no other constant, come nearer."""
    folded = Folded(net, "affine", ridge=0.0)
    for name, own in folded.entries.items():
        rows, old, new, moved = folded.read(name)
        for x, w, w_new in zip(rows, old, new, strict=True):
            short = torch.einsum("re,oke->rok", x, w)
            short -= torch.einsum("re,oke->rok", x[:, own.stay], w_new[..., own.stay])
            if moved is not None:
                short -= short.mean(0)
            across = torch.einsum("rok,re->oke", short, x[:, own.stay]) / len(x)
            assert across.abs().max() < 1e-10


@pytest.mark.parametrize("geometry", [{"padding": 1}, {"stride": 2, "padding": (2, 0)}, {"dilation": 2}, {"groups": 3}])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_an_unrolled_convolution_gives_the_least_squares_fit_of_its_output(dims, geometry):
    if isinstance(geometry.get("padding"), tuple):
        geometry = geometry | {"padding": (2, 0, 1)[:dims]}
    first, second_ = (
        (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](*c, **k) for c, k in (((2, 6, 1), {}), ((6, 3, 3), geometry))
    )
    model, x = Net(first, nn.ReLU(), second_).eval(), torch.randn(30, 2, *[6] * dims)
    oto = OTO(model, x[:1])
    (reader,) = (r.unrolled for r in readers(oto.partition, oto.node_groups).found)
    kept = {name: np.arange(0, oto.partition.axes[name].size, 2) for name in reader.groups}
    masks = oto.partition.masks(kept)
    tensors, read = dict(model.named_parameters()), second(model, x).detach()
    target, before = model.second(read).detach(), model.second.weight.detach().clone()
    with listening([reader], tensors) as moments:
        model(x)
    own = SplitEntries.of(reader.survivors({}), reader.survivors(masks))
    fold_([reader], moments, lambda _: own, tensors, "affine", ridge=0.0)
    each = 6 // geometry.get("groups", 1)
    gone = [c for c in range(each) if not reader.survivors(masks).reshape(each, -1)[c].all()]
    assert gone and torch.equal(model.second.weight[:, gone], before[:, gone])
    with torch.no_grad():
        model.second.weight[:, gone] = 0
    # the gradient of the error by every weight that stays, and by the bias, is zero: no others come nearer
    (model.second(read) - target).square().mean().backward()
    stays = [c for c in range(each) if c not in gone]
    assert model.second.weight.grad[:, stays].abs().max() < 1e-10 and model.second.bias.grad.abs().max() < 1e-10
    assert (model.second(read) - target).square().mean() > 1e-6


def test_what_is_unrolled_in_parts_is_the_same(monkeypatch):
    model, x, _ = NETS["conv2d"]()
    oto = OTO(model.eval(), x[:1])
    (reader,) = (r.unrolled for r in readers(oto.partition, oto.node_groups).found)
    found = []
    for part in (2**23, 3 * 8 * 16 * 9):  # all images; three at a time
        monkeypatch.setattr("oto.groups.readers.PART", part)
        with listening([reader], dict(model.named_parameters())) as moments:
            model(x)
        found.append(moments[key_of(reader)])
        assert len(list(reader.uses[0].rows(torch.zeros(8, 8, 4, 4)))) == (1 if part > 2**20 else 3)
    assert found[0].count == found[1].count == 8 * 16
    torch.testing.assert_close(found[0].second, found[1].second, rtol=1e-12, atol=1e-12)


def test_a_shift_is_where_a_constant_can_go():
    shifts = {net: next(iter(Folded(net, "affine", 0.01).readers.values())).shift for net in NETS}
    assert shifts["linear"] == shifts["conv2d"] == shifts["grouped"] == ("second.bias", 1)
    assert shifts["before a norm"] == ("after.running_mean", -1)  # what is added before it is taken off its mean
    assert shifts["attention"] == ("o.bias", 1)
    # an output of a transposed convolution meets some of the kernel only; and there is no bias without one
    assert shifts["transposed"] is None and shifts["no bias"] is None


class OverriddenForward(nn.Module):
    """Weights that read, and must not be changed."""

    def __init__(self):
        super().__init__()
        self.tied = nn.Embedding(20, 8)
        self.up, self.norm = nn.Linear(8, 12), nn.LayerNorm(12)
        self.down, self.frozen = nn.Linear(12, 8), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.rand(5, 1))
        self.computed = nn.Parameter(torch.randn(5, 8))
        self.frozen.weight.requires_grad_(False)

    def forward(self, ids):
        x = self.tied(ids)
        x = self.down(self.norm(self.up(x)))
        x = torch.relu(self.frozen(x))
        return F.linear(x, self.tied.weight), F.linear(x, self.scale * self.computed)


def test_what_cannot_take_over_is_told_with_its_reason():
    model = OverriddenForward()
    oto = OTO(model, torch.randint(20, (2, 5)), prune_frozen=True)
    found = readers(oto.partition, oto.node_groups)
    why = {name: " ".join(reasons) for name, reasons in found.reasons.items()}
    told = " ".join(why.values())
    assert "it sums over the entries without a weight" in told  # LayerNorm over what `up` gives
    assert "reads it too, in another way" in told  # the table of embeddings
    assert "its weight is computed" in told
    assert "frozen.weight is frozen" in told
    assert not any(r.parameter in ("tied.weight", "computed", "frozen.weight") for r in found.found)
    allowed = readers(oto.partition, oto.node_groups, frozen=True)
    assert "frozen.weight" in {r.parameter for r in allowed.found}


def test_a_head_for_training_alone_stands_in_nobodys_way():
    class Helped(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.help = nn.Linear(3, 8), nn.Linear(8, 2), nn.Linear(8, 4)

        def forward(self, x):
            x = torch.relu(self.up(x))
            return (self.down(x), self.help(x)) if self.training else self.down(x)

    model, x = Helped().eval(), torch.randn(9, 3)
    oto = OTO(model, x)
    assert oto.partition.found.graph.trained is not None
    found = readers(oto.partition, oto.node_groups)
    assert [r.parameter for r in found.found] == ["down.weight"]


def test_parts_of_a_weight_that_read_different_tensors_are_told_apart():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(3, 6)
            self.both = nn.Parameter(torch.randn(8, 6))

        def forward(self, x):
            first, last = self.both.split([5, 3])
            return F.linear(torch.relu(self.a(x)), first), F.linear(torch.tanh(self.b(x)), last)

    model, x = Fused(), torch.randn(30, 3)
    oto = OTO(model, x[:2])
    found = readers(oto.partition, oto.node_groups)
    assert [len(r.weight(model.both)) for r in found.found] == [5, 3]
    with listening(found.found, dict(model.named_parameters())) as moments:
        model(x)
    for reader, read in zip(found.found, (torch.relu(model.a(x)), torch.tanh(model.b(x))), strict=True):
        torch.testing.assert_close(moments[key_of(reader)].raw[0], read.T @ read / 30)


@pytest.mark.parametrize("kind", ["affine", "ridge"])
def test_a_fit_holds_two_matrices_beside_the_sums(kind):
    """What is factored, before and after; or the rows that stay, and what they have among themselves."""
    moments, stay, go = Moments.of(torch.randn(1, 900, 300)), torch.arange(290), torch.arange(290, 300)
    before, made, most = moments.second.clone(), [], 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            out = func(*args, **(kwargs or {}))
            made.extend(weakref.ref(t) for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            alive = {id(t): t for ref in made if (t := ref()) is not None and t.numel() > 40_000}
            most = max(most, len({t.untyped_storage().data_ptr() for t in alive.values()} - {own}))
            return out

    own = moments.second.untyped_storage().data_ptr()
    with Watch():
        moments.fit(stay, go, kind, 0.01)
    assert most == 2
    assert moments.second.equal(before)


def test_the_surgeon_takes_the_atom_that_costs_least_each_time():
    model, x, _ = NETS["attention"]()
    oto = OTO(model, x[:1])
    (reader,) = readers(oto.partition, oto.node_groups).found
    group = next(g for g in oto.node_groups if g.name in reader.groups and g.size == 3 and "v" in g.name)
    blocks = torch.from_numpy(reader.entries(oto.partition.axes[group.name]))
    with listening([reader], dict(model.named_parameters())) as moments:
        model(x)
    own = moments[key_of(reader)]
    rows, w = heads_of(model, x)[0].detach(), model.o.weight.detach()
    damping = 0.01 * rows.square().sum(0).mean() / len(rows)

    def lost(gone):
        """The damped least-squares error of the output, by all atoms that are gone."""
        go = blocks[gone].reshape(-1)
        stay = torch.tensor([i for i in range(12) if i not in go.tolist()])
        h = rows.T @ rows / len(rows) + damping * torch.eye(12)
        fit = torch.linalg.solve(h[stay][:, stay], h[stay][:, go])
        left = h[go][:, go] - h[go][:, stay] @ fit
        return float((w[:, go] @ left @ w[:, go].T).trace())

    surgeon = Surgeon.of(reader, own, model.o.weight, blocks)
    torch.testing.assert_close(surgeon.scores(), torch.tensor([lost([a]) for a in range(3)]), rtol=1e-9, atol=0)
    first = min(range(3), key=lambda a: lost([a]))
    others = [a for a in range(3) if a != first]
    surgeon.remove(torch.tensor([first]))
    more = torch.tensor([lost([first, a]) - lost([first]) for a in others])
    torch.testing.assert_close(surgeon.scores()[others], more, rtol=1e-8, atol=0)
    gone = greedy([Surgeon.of(reader, own, model.o.weight, blocks)], np.ones(3, dtype=bool), 2)
    then = min(others, key=lambda a: lost([first, a]))
    assert gone.tolist() == [first, then]
