"""From zeros to a slim module: both emitters, on networks small enough to check by hand."""

from __future__ import annotations

import copy
import types
import warnings

import pytest
import torch
from torch import nn

import oto.nn
from oto import OTO, load_subnet
from oto.errors import ArtifactError, EmitterError, NonFiniteParameterError
from oto.io import subnet as saving
from oto.slim.copying import copied
from oto.slim.proof.compare import relative_error
from oto.slim.proof.run import run

EXACT = 1e-12  # float64, sums of at most a few hundred terms


class Residual(nn.Module):
    """A residual stream through layer norm, attention and an MLP."""

    def __init__(self, width=16, heads=4, norm=nn.LayerNorm, **attention):
        super().__init__()
        self.into = nn.Linear(5, width)
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True, **attention)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)
        self.out = nn.Linear(width, 3)

    def forward(self, x):
        x = self.into(x)
        h = self.norm1(x)
        x = x + self.attention(h, h, h)[0]
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return self.out(x)


def thinned(model, x, share=0.5, seed=0, allow_graph=False, **options):
    """The zeroed model's output, the slim model's, and the subnet."""
    model = model.double().eval()
    x = x.double() if x.is_floating_point() else x
    found = OTO(model, x, allow_graph=allow_graph)
    found.random_set_zero_groups(share, seed)
    subnet = found.construct_subnet(**options)
    return run(model, x), run(subnet.model, x), subnet


@pytest.mark.parametrize(
    ("emitter", "norm"),
    [
        ("module", nn.LayerNorm),
        ("graph", nn.LayerNorm),
        ("module", nn.RMSNorm),
        ("graph", nn.RMSNorm),
        ("module", lambda n: nn.LayerNorm(n, elementwise_affine=True, bias=False)),
    ],
)
def test_residual_width_heads_and_hidden_width(emitter, norm):
    full, slim, subnet = thinned(Residual(norm=norm), torch.randn(2, 7, 5), emitter=emitter)
    assert relative_error(full, slim) <= EXACT
    assert subnet.emitter == emitter
    sizes = {name: len(kept) for name, kept in subnet.kept.items()}
    assert sizes["into.weight"] < 16 and sizes["up.weight"] < 24
    assert subnet.model.into.weight.shape == (sizes["into.weight"], 5)


def test_stock_modules_that_cannot_say_it_are_replaced():
    _, _, subnet = thinned(Residual(), torch.randn(2, 7, 5), emitter="module")
    assert type(subnet.model) is Residual
    assert isinstance(subnet.model.norm1, oto.nn.LayerNorm) and subnet.model.norm1.full == (16,)
    assert isinstance(subnet.model.attention, oto.nn.MultiheadAttention)
    assert subnet.model.up.in_features == subnet.model.up.weight.shape[1] < 16


@pytest.mark.parametrize(
    ("options", "need_weights"),
    [({}, True), ({}, False), ({"kdim": 6, "vdim": 7}, False), ({"bias": False}, True)],
)
def test_cross_attention_with_masks(options, need_weights):
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            k, v = options.get("kdim", 16), options.get("vdim", 16)
            self.q, self.k, self.v = nn.Linear(5, 16), nn.Linear(5, k), nn.Linear(5, v)
            self.attention = nn.MultiheadAttention(16, 4, **options)
            self.out = nn.Linear(16, 3)
            self.register_buffer("mask", torch.ones(6, 9, dtype=torch.bool).triu(3))

        def forward(self, x, y):
            h, _ = self.attention(self.q(x), self.k(y), self.v(y), attn_mask=self.mask, need_weights=need_weights)
            return self.out(h)

    model = Cross().double().eval()
    inputs = torch.randn(6, 2, 5, dtype=torch.float64), torch.randn(9, 2, 5, dtype=torch.float64)
    found = OTO(model, inputs)
    found.random_set_zero_groups(0.4, seed=1)
    for emitter in ("module", "graph"):
        subnet = found.construct_subnet(emitter=emitter)
        assert relative_error(run(model, inputs), run(subnet.model, inputs)) <= EXACT


@pytest.mark.parametrize("emitter", ["module", "graph"])
def test_convolutions_with_groups_and_group_norm(emitter):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.GroupNorm(4, 16),
        nn.SiLU(),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.Conv2d(16, 24, 1, groups=4),
        nn.PReLU(24),
        nn.ConvTranspose2d(24, 12, 2, stride=2),
        nn.InstanceNorm2d(12, affine=True),
        nn.Hardswish(),
        nn.Flatten(),
        nn.Linear(12 * 12 * 12, 5),
    )
    full, slim, subnet = thinned(model, torch.randn(2, 3, 10, 10), emitter=emitter)
    assert relative_error(full, slim) <= EXACT
    assert subnet.cost_after.params == sum(p.numel() for p in subnet.model.parameters())


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm2d, lambda n: nn.BatchNorm2d(n, affine=False, track_running_stats=False)]
)
def test_norms_without_tensors_state_the_channels_that_they_get(norm):
    model = nn.Sequential(nn.Conv2d(3, 12, 3), norm(12), nn.Conv2d(12, 3, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where an instance norm states another number
        full, slim, subnet = thinned(model, torch.randn(2, 3, 8, 8), emitter="module")
    assert relative_error(full, slim) <= EXACT and subnet.model[1].num_features == 6


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mid, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            x = self.embed(ids)
            return self.head(x + torch.tanh(self.mid(x)))

    ids = torch.randint(0, 11, (2, 4))
    full, slim, subnet = thinned(Tied(), ids, emitter="module")
    assert relative_error(full, slim) <= EXACT
    assert subnet.model.head.weight is subnet.model.embed.weight and subnet.model.embed.embedding_dim == 4


def test_slim_tensors_own_their_memory_and_train():
    _, _, subnet = thinned(Residual(), torch.randn(2, 7, 5), emitter="module")
    for p in subnet.model.parameters():
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size() and p.is_leaf and p.requires_grad
    optimizer = torch.optim.SGD(subnet.model.parameters(), lr=0.1)
    before = subnet.model.up.weight.detach().clone()
    subnet.model.train()(torch.randn(2, 7, 5, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, subnet.model.up.weight)


def test_a_size_in_the_users_forward_falls_back_to_the_graph_and_says_why():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)).view(-1, 12))

    full, slim, subnet = thinned(Sized(), torch.randn(2, 5), allow_graph=True)
    assert subnet.emitter == "graph" and "RuntimeError" in subnet.why_graph
    assert relative_error(full, slim) <= EXACT
    with pytest.raises(EmitterError, match="Sized cannot be thinned as its own class"):
        thinned(Sized(), torch.randn(2, 5), allow_graph=True, emitter="module")


def test_the_graph_takes_any_batch_size():
    model = Residual().double().eval()
    x = torch.randn(1, 7, 5, dtype=torch.float64)
    found = OTO(model, x)
    found.random_set_zero_groups(0.5)
    slim = found.construct_subnet(emitter="graph").model
    y = torch.randn(5, 7, 5, dtype=torch.float64)
    assert relative_error(run(model, y), run(slim, y)) <= EXACT


def test_nan_in_a_parameter():
    model = Residual()
    found = OTO(model, torch.randn(1, 7, 5))
    model.up.weight.data[3, 2] = float("nan")
    with pytest.raises(NonFiniteParameterError, match=r"up\.weight"):
        found.construct_subnet()


def test_every_group_keeps_an_atom():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    found = OTO(model, torch.randn(1, 3))
    for p in model[0].parameters():
        p.data.zero_()
    subnet = found.construct_subnet()
    assert subnet.model[0].out_features == 1


@pytest.mark.parametrize("emitter", ["module", "graph"])
def test_saved_and_loaded(tmp_path, emitter):
    torch.manual_seed(1)
    model, x = Residual().eval(), torch.randn(2, 7, 5)
    found = OTO(model, x)
    found.random_set_zero_groups(0.5)
    subnet = found.construct_subnet(tmp_path / "out", emitter=emitter, program=True, save_full=True)
    assert found.compressed_model_path.exists() and found.full_group_sparse_model_path.exists()
    for given in (None, Residual, model):
        loaded = load_subnet(subnet.path, given)
        # float32, the same operations in the same order but for fused kernels
        assert relative_error(run(subnet.model, x), run(loaded, x)) <= 1e-5
        assert type(loaded).__name__ == ("Residual" if emitter == "module" and given else "SlimGraph")
    assert "parameters" in str(subnet) and str(subnet.path) in str(subnet)


def test_a_saved_program_is_compared_on_another_size(tmp_path, monkeypatch):
    found = OTO(Residual().eval(), torch.randn(2, 7, 5))
    found.random_set_zero_groups(0.5)
    checks = found.construct_subnet(tmp_path / "out", program=True).checks
    assert [c.what for c in checks if "(1, 1, 5)" in c.what or "(1, 3, 5)" in c.what] != []
    read = saving.read_program

    def longer(path):  # right on the example only
        model = read(path)
        right = model.forward
        model.forward = lambda x: right(x) if x.shape[1] == 7 else right(x) + 1
        return model

    monkeypatch.setattr(saving, "read_program", longer)
    with pytest.raises(
        EmitterError, match=r"model\.pt2 was asked for, and cannot be written: .*reloaded program on \("
    ):
        found.construct_subnet(tmp_path / "other", program=True)


def test_a_saved_program_needs_no_output_type_of_the_model(tmp_path):
    """In a fresh process, where the class of the model and of its output were never imported."""
    import subprocess
    import sys

    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_attention_heads=4, intermediate_size=48, num_hidden_layers=1, vocab_size=50
    )
    model, ids = transformers.BertModel(config).eval(), torch.randint(0, 50, (2, 6))
    found = OTO(model, ids)
    found.random_set_zero_groups(0.5)
    found.construct_subnet(tmp_path / "out", program=True)
    torch.save(ids, tmp_path / "ids.pt")
    code = (
        "import sys, torch; from oto import load_subnet; folder = sys.argv[1];"
        "y = load_subnet(folder + '/out')(torch.load(folder + '/ids.pt'));"
        "assert 'transformers' not in sys.modules;"
        "torch.save(y['last_hidden_state'].detach(), folder + '/y.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=1800)
    expected = run(model, ids)[0]
    assert relative_error([expected], [torch.load(tmp_path / "y.pt")]) <= 1e-4


class Stated(nn.Module):
    """A view that states the width of a head, beside a feed-forward part that states nothing."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x):
        q, k, v = self.qkv(x).view(x.shape[0], -1, 3, 4, 4).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], -1, 16)
        return self.down(torch.relu(self.up(self.out(y))))


def test_an_example_of_one_whose_batch_is_baked_in():
    class Baked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x):
            windows = torch.relu(self.b(self.a(x).view(2 * len(x), -1, 16)))
            return self.c(windows.view(int(windows.shape[0] / 2), -1, 16))

    full, slim, subnet = thinned(Baked(), torch.randn(1, 6, 4), allow_graph=True)
    assert subnet.emitter == "graph" and relative_error(full, slim) <= EXACT


def test_a_program_that_is_not_proved_is_left_out_and_the_rest_is_saved(tmp_path, monkeypatch):
    from oto.io import subnet as io

    model, x = Residual().eval(), torch.randn(2, 7, 5)
    oto = OTO(model, x)
    oto.random_set_zero_groups(0.5)

    for broken, why in [(lambda path: nn.Linear(5, 3), "relative error"), (lambda path: nn.Linear(4, 3), "it fails")]:
        monkeypatch.setattr(io, "read_program", broken)
        subnet = oto.construct_subnet(tmp_path / "out", emitter="graph")
        (note,) = subnet.notes
        assert why in note and "nothing in it can be loaded" in note and not (tmp_path / "out/model.pt2").exists()
        assert relative_error(run(model, x), run(subnet.model, x)) <= 1e-5
        with pytest.raises(ArtifactError, match=why):
            load_subnet(tmp_path / "out")


@pytest.mark.parametrize("persistent", [True, False])
def test_what_no_call_reads_does_not_stop_saving(tmp_path, persistent):
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 3)
            self.register_buffer("heads", torch.eye(4, dtype=torch.bool).to_sparse(), persistent=persistent)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    full, slim, subnet = thinned(Sparse(), torch.randn(2, 4), out_dir=tmp_path / "out", program=True)
    assert relative_error(full, slim) <= EXACT
    assert ["torch cannot compare tensors of their layout" in note for note in subnet.notes] == [True]
    x = torch.randn(2, 4, dtype=torch.float64)
    for given in (None, Sparse, Sparse()):
        loaded = load_subnet(subnet.path, given)
        assert relative_error(run(subnet.model, x), run(loaded, x)) <= EXACT
        assert given is None or torch.equal(loaded.heads.to_dense(), torch.eye(4, dtype=torch.bool))
    assert subnet.model.heads.is_sparse


def test_a_grouped_convolution_loses_whole_groups_and_the_same_channel_of_every_group():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, groups=4),
        nn.ReLU(),
        nn.Conv2d(24, 5, 1),
    ).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    oto = OTO(model, x)
    assert sorted(g.size for g in oto.node_groups if g.prunable) == [3, 4, 6]  # width in, groups, width out
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet(emitter="module")
    kept = {g.size: len(subnet.kept[g.name]) for g in oto.node_groups if g.prunable}
    assert subnet.model[3].groups == kept[4] and subnet.model[3].weight.shape[:2] == (kept[4] * kept[6], kept[3])
    assert subnet.model[3].in_channels == kept[4] * kept[3] and subnet.max_error < 1e-12


class Particular(nn.Module):
    """Says itself how it is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.copies = nn.Linear(2, 2), 0

    def __deepcopy__(self, memo: dict[int, object]) -> Particular:
        made = Particular()
        made.inner, made.copies = copy.deepcopy(self.inner, memo), self.copies + 1
        return made


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.attention = nn.LSTM(3, 4), nn.MultiheadAttention(4, 2)
        self.narrow = torch.nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
        self.particular, self.plain = Particular(), nn.Linear(4, 4)
        self.table: dict[str, object] = {}
        self.plain.table, self.plain.sizes = self.table, [4, {"deep": (4,)}]
        self.also, self.plain.around = self.plain, [self]
        self.plain.forward = types.MethodType(lambda module, x: module.weight @ x, self.plain)


def test_a_copy_is_as_python_copies():
    model = Shared()
    wanted, made = copy.deepcopy(model), copied(model, {})
    assert list(wanted.state_dict()) == list(made.state_dict())
    for (path, a), (_, b), (_, own) in zip(
        wanted.named_modules(), made.named_modules(), model.named_modules(), strict=True
    ):
        assert type(a) is type(b) and list(vars(a)) == list(vars(b)) and b is not own, path
        for name, value in vars(a).items():
            assert type(value) is type(vars(b)[name]), (path, name)
            if isinstance(value, dict | list):
                assert len(value) == len(vars(b)[name]) and vars(b)[name] is not vars(own)[name]
    assert all(torch.equal(p, q) and p is not q for p, q in zip(model.parameters(), made.parameters(), strict=True))
    assert made.also is made.plain and made.plain.around == [made] and made.table is made.plain.table
    assert made.plain.forward.__self__ is made.plain and made.particular.copies == 1
    assert made.plain.sizes == [4, {"deep": (4,)}] and made.plain.sizes is not model.plain.sizes
    assert {p.data_ptr() for p in made.lstm._flat_weights} == {p.data_ptr() for p in made.lstm.parameters()}


def test_channels_that_lie_last_in_memory_stay_last_in_the_slim_model_and_in_one_that_is_loaded(tmp_path):
    def made():
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(32, 2))
        return model.to(memory_format=torch.channels_last)

    def last(model):
        return [
            p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
            for p in model.parameters()
            if p.ndim == 4
        ]

    oto = OTO(made(), torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last))
    oto.random_set_zero_groups(0.5)
    assert last(oto.construct_subnet(tmp_path).model) == [True, True]
    assert last(load_subnet(tmp_path, made)) == [True, True]
    assert last(load_subnet(tmp_path, lambda: made().to(memory_format=torch.contiguous_format))) == [False, False]


@pytest.mark.parametrize("allow_graph", [False, True])
def test_marks_on_parameters_stay(tmp_path, allow_graph):
    """Code that makes parameter groups for the slim model goes by them."""

    def made():
        model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
        model[0].weight._no_weight_decay, model[0].bias.part = True, "encoder"
        model[0].weight.main_grad = torch.zeros(16, 3)
        return model

    def marks(model):
        return [vars(p) for p in model.parameters()]

    wanted = [{"_no_weight_decay": True}, {"part": "encoder"}, {}, {}]
    model = made()
    oto = OTO(model, torch.randn(2, 3), allow_graph=allow_graph)
    oto.random_set_zero_groups(0.5)
    assert marks(oto.construct_subnet(tmp_path, emitter="graph" if allow_graph else "auto").model) == wanted
    if not allow_graph:
        assert marks(load_subnet(tmp_path, made)) == wanted


class Marked(nn.Parameter):
    """A parameter of a class of its own, whose constructor asks for more than a tensor."""

    def __new__(cls, data, part, requires_grad=True):
        return super().__new__(cls, data, requires_grad)

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), Marked(self.data.clone(), "", self.requires_grad))

    def __reduce_ex__(self, protocol):
        return Marked, (self.data, "", self.requires_grad)


@pytest.mark.parametrize("allow_graph", [False, True])
def test_classes_of_parameters_stay(tmp_path, allow_graph):
    def made():
        model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
        model[0].weight = Marked(model[0].weight.data, "encoder", requires_grad=True)
        return model

    wanted = [Marked, nn.Parameter, nn.Parameter, nn.Parameter]
    oto = OTO(made(), torch.randn(2, 3), allow_graph=allow_graph)
    oto.random_set_zero_groups(0.5)
    slim = oto.construct_subnet(tmp_path, emitter="graph" if allow_graph else "auto").model
    assert [*map(type, slim.parameters())] == wanted and slim.get_parameter("0.weight").shape == (8, 3)
    if not allow_graph:
        assert [*map(type, load_subnet(tmp_path, made).parameters())] == wanted


class Loaded(nn.Parameter):
    """A parameter whose methods need what it holds."""

    @property
    def mT(self):
        return self.loader(self)


def test_parameters_that_hold_more_than_marks_become_plain_ones():
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
    model[0].weight = Loaded(model[0].weight.data)
    model[0].weight.loader = torch.Tensor.t
    oto = OTO(model, torch.randn(2, 3))
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet()
    assert subnet.emitter == "module" and {*map(type, subnet.model.parameters())} == {nn.Parameter}


def test_marks_on_parameters_stay_when_the_model_shrinks_in_training():
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
    model[0].weight._no_weight_decay = True
    oto = OTO(model, torch.randn(2, 3))
    optimizer = oto.hesso(lr=0.1, target_macs=0.5, start_pruning_step=0, pruning_steps=2, pruning_periods=1)
    for _ in range(3):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    oto.shrink(optimizer)
    assert model[0].weight.shape[0] < 16 and vars(model[0].weight) == {"_no_weight_decay": True}
