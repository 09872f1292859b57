"""The model's own class, thinner: what it states is found, told, scaled, tied, or stays whole."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oto import OTO, load_subnet
from oto.errors import NotItsClassWarning
from oto.nn import OverriddenForward
from oto.slim.own_class import search, traced, workbench
from oto.slim.own_class.adaptation import Adaptation
from oto.slim.own_class.attributes import AttributePlace
from oto.slim.proof.compare import relative_error
from oto.slim.proof.run import run

EXACT = 1e-12  # float64, sums of at most a few hundred terms


def slimmed(model, x, share=0.5, seed=0, **options):
    """The zeroed model, its slim form of its own class, and the OTO."""
    model = model.double().eval()
    x = x.double() if x.is_floating_point() else x
    oto = OTO(model, x, **options)
    oto.random_set_zero_groups(share, seed)
    subnet = oto.construct_subnet(emitter="module")
    assert type(subnet.model) is type(model)
    assert subnet.cost_after.params < subnet.cost_before.params
    assert relative_error(run(model, x), run(subnet.model, x)) <= EXACT
    return model, subnet, oto


def sizes(oto):
    return {g.name: g.size for g in oto.node_groups if g.prunable}


class Attention(nn.Module):
    """Heads as attributes, a fused projection cut by them."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5)
        return self.out(y.transpose(1, 2).reshape(b, t, self.heads * self.head_dim))


class Blocks(nn.Module):
    def __init__(self, *blocks, width=16):
        super().__init__()
        self.into, self.blocks, self.last = nn.Linear(5, width), nn.ModuleList(blocks), nn.Linear(width, 3)

    def forward(self, x):
        x = self.into(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def test_attributes_that_state_sizes_are_found_in_every_block():
    model, subnet, _ = slimmed(Blocks(Attention(), Attention()), torch.randn(2, 7, 5))
    heads = [block.heads for block in subnet.model.blocks]
    assert all(0 < n <= 4 for n in heads) and sum(heads) < 8  # each block its own
    assert [block.qkv.in_features for block in subnet.model.blocks] == [subnet.model.into.out_features] * 2
    x = torch.randn(3, 2, 5, dtype=torch.float64)  # another batch, another length
    assert relative_error(run(model, x), run(subnet.model, x)) <= EXACT
    assert not any(isinstance(vars(m).get("forward"), OverriddenForward) for m in subnet.model.modules())


class Wider(nn.Module):
    """A projection where the width changes, which two attributes say (Hiera's first layer of a stage)."""

    def __init__(self, width=8, wider=16):
        super().__init__()
        self.width, self.wider = width, wider
        self.norm, self.f, self.project = nn.LayerNorm(width), nn.Linear(width, wider), nn.Linear(width, wider)

    def forward(self, x):
        h = self.norm(x)
        if self.width != self.wider:
            x = self.project(h)
        return x.view(len(x), -1, 2, self.wider).amax(2) + self.f(h).view(len(x), -1, 2, self.wider).amax(2)


@pytest.mark.parametrize("verify", [True, False])
def test_a_class_that_takes_another_way_where_widths_are_equal_keeps_a_zero_atom_more(verify):
    model = nn.Sequential(nn.Linear(5, 8), Wider(), nn.Linear(16, 3)).double().eval()
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    oto = OTO(model, x)
    wide = next(g for g in oto.node_groups if g.size == 16)
    with torch.no_grad():
        for piece in wide.zeros:
            piece.of(model.get_parameter(piece.parameter))[8:] = 0
    subnet = oto.construct_subnet(emitter="module", verify=verify)
    assert len(subnet.kept[wide.name]) == 9  # of eight that are left the class would make no projection
    assert any(wide.name in note and "zero atom" in note for note in subnet.notes)
    assert subnet.cost_after.params == sum(p.numel() for p in subnet.model.parameters())
    assert relative_error(run(model, x), run(subnet.model, x)) <= EXACT


def test_an_attribute_in_a_configuration_that_all_share_becomes_each_blocks_own():
    class Config:
        def __init__(self):
            self.heads, self.names = 4, {"width": 16}

    class Configured(Attention):
        def __init__(self, config):
            super().__init__()
            del self.heads
            self.config = config

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = self.qkv(x).view(b, t, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
            return self.out(F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2))

    config = Config()
    _, subnet, _ = slimmed(Blocks(Configured(config), Configured(config)), torch.randn(2, 7, 5), share=0.4)
    assert config.heads == 4 and {block.config.heads for block in subnet.model.blocks} != {4}


def test_a_number_in_the_code_is_told(tmp_path):
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)).view(-1, 12))

    model, subnet, oto = slimmed(Sized(), torch.randn(2, 5))
    assert (
        isinstance(subnet.model.forward, OverriddenForward)
        and subnet.model.state_dict().keys() == model.state_dict().keys()
    )
    x = torch.randn(7, 5, dtype=torch.float64)
    again = [
        copy.deepcopy(subnet.model),
        torch.compile(subnet.model, backend="eager", fullgraph=True),
        torch.export.export(subnet.model, (x,)).module(),
    ]
    for form in again:
        assert relative_error(run(model, x), [form(x).detach()]) <= EXACT
    saved = oto.construct_subnet(tmp_path / "out")
    assert relative_error(run(model, x), run(load_subnet(saved.path, lambda: Sized().double()), x)) <= EXACT


class Normed(nn.LayerNorm):
    """As many have it: a layer norm over channels that lie second."""

    def forward(self, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Grouped(nn.GroupNorm):
    def forward(self, x):
        return F.silu(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps))


class ByHand(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, x):
        var, mean = torch.var_mean(x, dim=1, keepdim=True, unbiased=False)
        return (x - mean) * torch.rsqrt(var + 1e-6) * self.weight[:, None, None]


class InParts(nn.Module):
    """The variance is a mean of what no longer is zero where entries are gone."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        return self.weight[:, None, None] * ((x - mean) / torch.sqrt(var + 1e-6)) + self.bias[:, None, None]


@pytest.mark.parametrize("norm", [Normed, lambda n: Grouped(2, n), ByHand, InParts])
def test_norms_of_the_users_own_still_divide_by_the_full_count(norm):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), norm(16), nn.ReLU(), nn.Conv2d(16, 24, 3), norm(24), nn.Conv2d(24, 2, 1)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.rand(p.shape), alpha=0.1)
    model, subnet, oto = slimmed(model, torch.randn(2, 3, 9, 9))
    assert {"0.weight", "3.weight"} <= {name.partition("/")[0] for name in sizes(oto)}
    x = torch.randn(1, 3, 12, 7, dtype=torch.float64)
    assert relative_error(run(model, x), run(subnet.model, x)) <= EXACT


class RMS(nn.Module):
    """As large language models have it; ``plus`` one, or not."""

    def __init__(self, width, plus=0.0):
        super().__init__()
        self.weight, self.small, self.plus = nn.Parameter(torch.rand(width)), 1e-3, plus

    def forward(self, x):
        y = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + self.small)
        return (self.plus + self.weight) * y.type_as(x) if self.plus else self.weight * y.to(x.dtype)


@pytest.mark.parametrize("plus", [0.0, 1.0])
def test_an_rms_norm_takes_its_count_into_its_weight(tmp_path, plus):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.norm, self.out = nn.Linear(5, 16), RMS(16, plus), nn.Linear(16, 3)

        def forward(self, x):
            return self.out(self.norm(self.into(x)))

    model, subnet, oto = slimmed(Model(), torch.randn(4, 5))
    k = subnet.model.into.out_features
    assert (
        k < 16
        and type(subnet.model.norm) is RMS
        and not isinstance(vars(subnet.model.norm).get("forward"), OverriddenForward)
    )
    # weight · √(D / k) and epsilon · D / k
    (name,) = (g.name for g in oto.node_groups if g.prunable)
    kept = torch.from_numpy(subnet.kept[name])
    weight = (model.norm.weight[kept] + plus) * (16 / k) ** 0.5 - plus
    assert torch.allclose(subnet.model.norm.weight, weight) and subnet.model.norm.small == pytest.approx(1e-3 * 16 / k)
    # in float32 too, where the product rounds: the proof in float64 is of the algebra, not of the rounding
    saved = OTO(model.float(), torch.randn(4, 5)).construct_subnet(tmp_path / "out")
    assert saved.max_error < EXACT and saved.emitter == "module"
    x = torch.randn(4, 5)
    assert relative_error(run(model, x), run(load_subnet(tmp_path / "out", Model), x)) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_a_depthwise_convolution_may_be_left_with_one_channel(bias):
    """Its ``groups`` are one then, as by default, and the call is recorded without it."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 3, groups=2, bias=bias), nn.Conv2d(2, 4, 1))
    model, subnet, oto = slimmed(model, torch.randn(1, 3, 6, 6), share=0.5)
    assert sizes(oto) == {"0.weight": 2} and subnet.model[1].groups == subnet.model[0].out_channels == 1


def test_halves_of_a_chunk_are_tied_and_stay_so():
    class Halves(nn.Module):
        """``chunk`` makes pieces of one size; half of everything would not show that they may differ."""

        def __init__(self):
            super().__init__()
            self.into, self.a, self.b = nn.Linear(6, 32), nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x):
            a, b = self.into(x).chunk(2, -1)
            return self.a(a) + self.b(b)

    model, subnet, oto = slimmed(Halves(), torch.randn(2, 6))
    one, two = (g for g in oto.node_groups if g.prunable)
    assert one.tie == two.tie is not None
    assert len(subnet.kept[one.name]) == len(subnet.kept[two.name]) < 16
    oto.hesso(lr=0.1, target_macs=0.4, start_pruning_step=0, pruning_steps=1, pruning_periods=1)
    optimizer = oto.hesso(lr=0.0, target_params=0.4, start_pruning_step=0, pruning_steps=2, pruning_periods=1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 6, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    kept = oto.construct_subnet(emitter="module").kept
    assert len(kept[one.name]) == len(kept[two.name])


def test_sizes_that_are_read_off_another_tensor_are_told():
    class Block(nn.Module):
        """The width of its input decides how it cuts its own queries."""

        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x):
            b, t, c = x.shape
            q, k, v = (z.view(b, t, 4, c // 4).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c)
            return self.out(y)

    model, subnet, oto = slimmed(Blocks(Block(), Block()), torch.randn(2, 5, 5), share=0.4)
    assert "into.weight" in sizes(oto)
    x = torch.randn(3, 9, 5, dtype=torch.float64)
    assert relative_error(run(model, x), run(subnet.model, x)) <= EXACT


def test_calls_of_norms_of_ours_are_not_counted():
    class Block(nn.Module):
        """A view is told another size; the norm before it, thinner now, makes views of its own."""

        def __init__(self):
            super().__init__()
            self.norm, self.up = nn.GroupNorm(2, 16), nn.Conv2d(16, 16, 1)

        def forward(self, x):
            y = self.up(self.norm(x))
            return y.reshape(len(y), 4, 4, -1).tanh().reshape(x.shape)

    model = nn.Sequential(nn.Conv2d(3, 16, 3), Block(), nn.Conv2d(16, 2, 1))
    model, subnet, _ = slimmed(model, torch.randn(2, 3, 6, 6), share=0.4)
    x = torch.randn(3, 3, 8, 5, dtype=torch.float64)
    for form in (subnet.model, torch.compile(subnet.model, backend="eager", fullgraph=True)):
        assert relative_error(run(model, x), [form(x).detach()]) <= EXACT


def test_a_number_that_follows_from_a_width_stays_what_it_was():
    class Scaled(nn.Module):
        """What a thinner tensor is divided by would be another number."""

        def __init__(self):
            super().__init__()
            self.into, self.out = nn.Linear(6, 16), nn.Linear(16, 4)

        def forward(self, x):
            h = self.into(x)
            return self.out(torch.relu(h) / h.size(1))

    model = Scaled().double()
    before = {name: p.clone() for name, p in model.named_parameters()}
    x = torch.randn(2, 6, dtype=torch.float64)
    oto = OTO(model, x)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet(emitter="module")
    assert relative_error(run(model, x), run(subnet.model, x)) <= EXACT and sizes(oto) == {"into.weight": 16}


class Headed(nn.Module):
    """It says how wide its features are, and nothing in the forward asks, unless it ``minds``."""

    def __init__(self, minds=False):
        super().__init__()
        self.features, self.classes, self.minds = 16, 3, minds
        self.body, self.head = (
            nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU()),
            nn.Linear(16, 3),
        )

    def forward(self, x):
        return self.head(self.body(x)) * (self.features if self.minds else 1)

    def reset(self, classes):
        self.classes, self.head = classes, nn.Linear(self.features, classes)


def test_numbers_that_say_how_wide_the_last_layer_is_follow(tmp_path):
    x = torch.randn(2, 6)
    model, subnet, oto = slimmed(Headed(), x, share=0.4)
    loaded = load_subnet(oto.construct_subnet(tmp_path).path, lambda: Headed().double())
    for slim in (subnet.model, loaded):
        assert slim.features == slim.head.in_features < 16 and model.features == 16
        slim.reset(5)
        assert slim.float()(x).shape == (2, 5)
    assert slimmed(Headed(minds=True), x, share=0.4)[1].model.features == 16


class Sorted(nn.Module):
    """A branch on a width, which no attribute and no call states."""

    def __init__(self):
        super().__init__()
        self.into, self.up, self.down, self.out = (
            nn.Linear(6, 16),
            nn.Linear(16, 24),
            nn.Linear(24, 16),
            nn.Linear(16, 4),
        )

    def forward(self, x):
        h = self.into(x)
        h = torch.relu(h) if h.size(1) == 16 else torch.tanh(h)
        return self.out(h + self.down(torch.relu(self.up(h))))


def test_a_width_that_the_class_divides_by_a_larger_number_keeps_so_much():
    class Windowed(nn.Module):
        """The width of a head is computed of that of the stream, as in Swin: with fewer entries than heads it is 0."""

        def __init__(self, width=96, heads=24):
            super().__init__()
            self.heads = heads
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

        def forward(self, x):
            b, t, c = x.shape
            q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
            scores = ((c // self.heads) ** -0.5 * q @ k.transpose(-2, -1)).softmax(-1)
            return self.out((scores @ v).transpose(1, 2).reshape(b, t, c))

    blocks = [Windowed() for _ in range(2)]
    _, subnet, oto = slimmed(Blocks(*blocks, width=96), torch.randn(2, 7, 5), share=0.6)
    (stream,) = (g for g in oto.node_groups if g.size == 96 and g.prunable)
    assert 24 <= stream.min_kept <= 48
    assert subnet.model.into.out_features < 96


@pytest.mark.parametrize("width", [1, 4])
def test_a_group_norm_may_lose_whole_groups(width):
    """Of groups of one channel nothing else can go; the class is told of fewer of them."""

    class Instance(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Conv2d(3, 8 * width, 3), nn.GroupNorm(8, 8 * width)
            self.b = nn.Conv2d(8 * width, 2, 3)

        def forward(self, x):
            return self.b(self.norm(self.a(x)).relu())

    model = Instance()
    nn.init.uniform_(model.norm.weight), nn.init.uniform_(model.norm.bias)
    _, subnet, oto = slimmed(model, torch.randn(2, 3, 8, 8))
    assert {g.size for g in oto.node_groups if g.prunable} == {8, width} - {1}
    assert subnet.model.norm.num_groups < 8 and subnet.emitter == "module"


def test_what_the_class_cannot_be_told_stays_whole_and_says_why():
    x = torch.randn(2, 6, dtype=torch.float64)
    _, _, oto = slimmed(Sorted(), x)
    assert sizes(oto) == {"up.weight": 24}
    (residual,) = [w for w in oto.explain().whole if ("into.weight", 0) in w.parameters]
    assert "its class cannot do without" in residual.reason and residual.source.startswith(__file__)
    everything = OTO(Sorted().double(), x, allow_graph=True)
    everything.random_set_zero_groups(0.5)
    assert everything.construct_subnet().emitter == "graph" and sizes(everything).keys() == {"into.weight", "up.weight"}


def test_calls_whose_results_nobody_reads_are_minded():
    class Pooler(nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 4)
            self.pool = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            h = self.out(x)
            self.pool(h, h, h)
            return self.down(torch.relu(self.up(h)))

    _, subnet, _ = slimmed(Pooler(), torch.randn(2, 5, 16))
    assert subnet.model.pool.in_proj_weight.shape[1] == subnet.model.up.in_features


def test_a_model_that_looks_at_values_is_followed_on_the_path_of_the_full_one():
    class Routed(nn.Module):
        """Each row goes to the expert that the model's own numbers choose."""

        def __init__(self):
            super().__init__()
            self.into, self.route = nn.Linear(6, 16), nn.Linear(16, 2)
            self.experts = nn.ModuleList([nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4)) for _ in "ab"])

        def forward(self, x):
            h = self.into(x)
            choice = self.route(h).argmax(-1)
            y = h.new_zeros(len(x), 4)
            for i, expert in enumerate(self.experts):
                rows = (choice == i).nonzero()[:, 0]
                if rows.numel():
                    y = y.index_add(0, rows, expert(h[rows]))
            return y

    torch.manual_seed(0)
    model, subnet, oto = slimmed(Routed(), torch.randn(8, 6))
    assert oto.partition.found.graph.mode == "real" and "into.weight" in sizes(oto)
    x = torch.randn(20, 6, dtype=torch.float64)
    assert relative_error(run(model, x), run(subnet.model, x)) <= EXACT


def test_on_meta_the_class_is_asked_too():
    oto = OTO(Blocks(Attention()).to("meta"), torch.randn(2, 7, 5))
    assert {"into.weight", "blocks.0.qkv.weight"} <= {name.partition("/")[0] for name in sizes(oto)}


def test_an_oto_can_be_copied_and_pickled():
    model, x = Blocks(Attention()).double(), torch.randn(2, 7, 5, dtype=torch.float64)
    oto = OTO(model, x)
    for other in (copy.deepcopy(oto), pickle.loads(pickle.dumps(oto))):
        other.random_set_zero_groups(0.4)
        assert other.construct_subnet(emitter="module").max_error < EXACT
        assert sizes(other) == sizes(oto)


class Part(nn.Module):
    """Holds the number by which a method cuts that another module's forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.gain = 4, nn.Parameter(torch.rand(4))

    def cut(self, y: Tensor) -> Tensor:
        return y.view(len(y), self.heads, -1) * self.gain[:, None]


class Cutting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.part, self.down = nn.Linear(6, 12), Part(), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.part.cut(self.up(x))).flatten(1))


def test_what_a_block_needs_is_asked_once_for_all_blocks(monkeypatch):
    divergence, asked = workbench.Workbench.divergence, []

    def counted(self, *args):
        asked[-1] += 1
        return divergence(self, *args)

    monkeypatch.setattr(workbench.Workbench, "divergence", counted)
    for depth in (2, 6):
        asked.append(0)
        torch.manual_seed(0)
        oto = OTO(
            nn.Sequential(nn.Linear(5, 6), *(Cutting() for _ in range(depth)), nn.Linear(6, 2)), torch.randn(3, 5)
        )
        oto.random_set_zero_groups(0.4)
        subnet = oto.construct_subnet()
        assert subnet.emitter == "module" and subnet.max_error < 1e-12
        assert all(block.part.heads == len(block.part.gain) for block in subnet.model[1:-1])
        assert any(block.part.heads < 4 for block in subnet.model[1:-1])
    assert asked[0] == asked[1]


# --- the counts that come ---------------------------------------------------------------------------------------------


def zeroed(oto, counts):
    """Of some groups so many atoms are left, of the others all."""
    parameters = dict(oto.model.named_parameters())
    with torch.no_grad():
        for group in oto.node_groups:
            for piece in group.zeros if group.name in counts else ():
                gone = torch.arange(counts[group.name], group.size)
                piece.of(parameters[piece.parameter]).index_fill_(0, gone, 0)


class Attended(nn.Module):
    """As in Llama: one number states how wide queries and keys are, and how wide values are; which may differ."""

    def __init__(self, width=16, heads=4, head_dim=6):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v = (nn.Linear(width, heads * head_dim) for _ in range(3))
        self.o = nn.Linear(heads * head_dim, width)

    def forward(self, x):
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = (z + torch.cat([-z[..., z.shape[-1] // 2 :], z[..., : z.shape[-1] // 2]], -1) for z in (q, k))
        return self.o(((q @ k.transpose(-1, -2) * 0.4).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_any_one_group_alone_and_all_but_one_may_have_been_thinned():
    x = torch.randn(2, 5, 5, dtype=torch.float64)
    names = sizes(OTO(Blocks(Attended(), Attended()).double(), x))
    assert len(names) >= 5
    for alone in (True, False):
        for one in names:
            torch.manual_seed(0)
            model = Blocks(Attended(), Attended()).double().eval()
            oto = OTO(model, x)
            zeroed(oto, {name: n // 2 for name, n in names.items() if (name == one) == alone})
            subnet = oto.construct_subnet(emitter="module")
            assert relative_error(run(model, x), run(subnet.model, x)) <= EXACT
            assert len(subnet.kept[one]) == (names[one] // 2 if alone else names[one])


class Lucky(nn.Module):
    """For one width in a hundred its code goes a way of its own, which states the size by an attribute."""

    def __init__(self, width=100, special=37, ways=1, states=True):
        super().__init__()
        self.widths, self.special, self.states = [6, width, 3], range(special, special + ways), states
        self.up, self.down = nn.Linear(6, width), nn.Linear(width, 3)

    def forward(self, x):
        h = torch.relu(self.up(x))
        if h.shape[-1] in self.special:
            h = h.unflatten(-1, (self.widths[1], 1)).flatten(-2) if self.states else torch.sort(h).values
        return self.down(h)


def test_the_class_is_asked_again_at_the_counts_that_come(caplog):
    x = torch.randn(2, 6, dtype=torch.float64)
    for left in (50, 37):
        model = Lucky().double().eval()
        oto = OTO(model, x)
        assert sizes(oto) == {"up.weight": 100} and not oto._analysis.form.own.adaptation.sizes
        zeroed(oto, {"up.weight": left})
        subnet = oto.construct_subnet()
        assert subnet.emitter == "module" and subnet.model.widths[1] == (37 if left == 37 else 100)
        assert relative_error(run(model, x), run(subnet.model, x)) <= EXACT


def test_a_graph_in_place_of_the_class_warns_with_the_way_out(recwarn):
    x = torch.randn(2, 6, dtype=torch.float64)
    model = Lucky(states=False, ways=2).double().eval()  # so that one more fails too
    oto = OTO(model, x)
    zeroed(oto, {"up.weight": 37})
    with pytest.warns(NotItsClassWarning, match=r"(?s)no Lucky: .*test_own_class.py:\d+.*to fix .*skip_patterns"):
        subnet = oto.construct_subnet()
    assert subnet.emitter == "graph" and relative_error(run(model, x), run(subnet.model, x)) <= EXACT
    everything = OTO(Lucky(states=False, ways=2).double().eval(), x, allow_graph=True)
    zeroed(everything, {"up.weight": 37})
    recwarn.clear()
    everything.construct_subnet()
    assert not [w for w in recwarn if w.category is NotItsClassWarning]  # nothing was promised


# --- classes that branch on sizes -------------------------------------------------------------------------------------


class Grouped4(nn.Module):
    """Keys and values are shared by queries: a kernel repeats them where all are equally wide, else the code does."""

    def __init__(self, width=16, heads=4, shared=2, head_dim=6, wrong=False):
        super().__init__()
        self.heads, self.shared, self.times, self.wrong = heads, shared, heads // shared, wrong
        self.q, self.o = nn.Linear(width, heads * head_dim), nn.Linear(heads * head_dim, width)
        self.k, self.v = (nn.Linear(width, shared * head_dim) for _ in "kv")

    def repeated(self, x):
        b, h, t, d = x.shape
        return x[:, :, None].expand(b, h, self.times, t, d).reshape(b, h * self.times, t, d)

    def forward(self, x):
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.heads, -1).transpose(1, 2)
        k, v = (layer(x).view(b, t, self.shared, -1).transpose(1, 2) for layer in (self.k, self.v))
        if k.shape[-1] == v.shape[-1]:
            y = F.scaled_dot_product_attention(q, k, v, scale=0.4, enable_gqa=True)
        else:
            k, v = self.repeated(k), self.repeated(v) * (2 if self.wrong else 1)
            y = F.scaled_dot_product_attention(q, k, v, scale=0.4)
        return self.o(y.transpose(1, 2).flatten(2))


def test_a_branch_on_sizes_whose_sides_give_the_same_is_no_divergence():
    model, x = Blocks(Grouped4(), Grouped4()).double().eval(), torch.randn(2, 5, 5, dtype=torch.float64)
    oto = OTO(model, x)
    assert not {g.tie for g in oto.node_groups if g.prunable} - {None}
    zeroed(oto, {"blocks.0.q.weight/1": 2, "blocks.0.v.weight": 5, "blocks.1.v.weight": 3})
    subnet = oto.construct_subnet(emitter="module")
    widths = [(block.k.out_features, block.v.out_features) for block in subnet.model.blocks]
    assert widths == [(4, 10), (12, 6)]
    y = torch.randn(3, 4, 5, dtype=torch.float64)
    assert relative_error(run(model, y), run(subnet.model, y)) <= EXACT


def test_a_branch_on_sizes_whose_sides_differ_ties_the_widths():
    x = torch.randn(2, 5, 5)
    _, subnet, oto = slimmed(Blocks(Grouped4(wrong=True), Grouped4(wrong=True)), x, share=0.4)
    tied = [g.name for g in oto.node_groups if g.prunable and g.tie is not None]
    assert {"blocks.0.q.weight/1", "blocks.0.v.weight"} <= set(tied)
    assert all(b.k.out_features == b.v.out_features < 12 for b in subnet.model.blocks)


@pytest.mark.parametrize("how", ["size", "multi_dot", "einsum"])
def test_an_order_of_products_that_is_chosen_by_size_is_no_divergence(how):
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 24), nn.Linear(20, 3)
            self.u, self.v = nn.Parameter(torch.randn(24, 22) / 5), nn.Parameter(torch.randn(22, 20) / 5)

        def forward(self, x):
            h = self.a(x).relu()
            if how == "multi_dot":
                return self.b(torch.linalg.multi_dot([h, self.u, self.v]))
            if how == "einsum":
                return self.b(torch.einsum("bi,ir,ro->bo", h, self.u, self.v))
            left = len(h) * (self.u.numel() + self.v.numel())
            right = self.u.numel() * self.v.shape[1] + h.numel() * self.v.shape[1]
            return self.b((h @ self.u) @ self.v if left < right else h @ (self.u @ self.v))

    _, _, oto = slimmed(Chain(), torch.randn(16, 8), share=0.4)
    assert sizes(oto) == {"a.weight": 24, "u": 22, "v": 20}


# --- what is seen of the search ---------------------------------------------------------------------------------------


def test_the_search_can_be_read():
    oto = OTO(Blocks(Attention(), Attention()), torch.randn(2, 7, 5))
    assert not oto.explain().search
    told = OTO(Sorted(), torch.randn(2, 6)).explain(search=True)
    (text,) = told.search
    assert text in str(told) and f"{__file__}:" in text and "aten.tanh.default" not in text.splitlines()[0]
    assert "saw      it called aten.tanh.default" in text and "settled  stays whole: into.weight" in text
    assert "when     every group is thinner" in text


def test_attributes_that_the_code_names_are_set_without_a_try(monkeypatch):
    seen = []
    repair = search.Search._repair
    monkeypatch.setattr(search.Search, "_repair", lambda self, at: (seen.append(at), repair(self, at)))
    oto = OTO(Blocks(Attention(), Attention()), torch.randn(2, 7, 5))
    assert not seen and {p.key for p in oto._analysis.form.own.adaptation.sizes} == {("heads",), ("head_dim",)}


def test_integers_remember_the_attributes_that_they_were_made_of():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.width, self.heads, self.sizes = 12, 4, [3, 9]

    holder = Holder()
    width, heads, sizes = AttributePlace("", ("width",)), AttributePlace("", ("heads",)), holder.sizes
    with traced.traced(holder, lambda module: False):
        each = holder.width // holder.heads
        assert (each, traced.places_of(each)) == (3, {width, heads}) and holder.width.direct and not each.direct
        assert traced.places_of(24 * holder.heads) == {heads} == traced.places_of(-holder.heads)
        assert traced.places_of(holder.sizes[1] - 1) == {AttributePlace("", ("sizes", 1))}
        assert not traced.places_of(int(holder.width)) and not traced.places_of(holder.width / 2)
        assert type(copy.deepcopy(holder).width) is traced.TracedInt and type(pickle.loads(pickle.dumps(each))) is int
        assert torch.empty(2, 12).view(holder.heads, -1).shape == (4, 6)
    assert type(holder.width) is int and holder.sizes is sizes and list(map(type, sizes)) == [int, int]


def test_a_try_that_showed_a_repair_is_not_made_again(monkeypatch):
    class Literals(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 12), nn.Linear(12, 16), nn.Linear(16, 3)

        def forward(self, x):
            h = self.a(x).view(len(x), 3, 4).transpose(1, 2).reshape(len(x), 12)
            return self.c(self.b(h).view(len(x), 4, 4).transpose(1, 2).reshape(len(x), 16))

    run, ran = workbench.Workbench._run, []

    def kept(self, edits, adaptation, pruned, limit):
        result = run(self, edits, adaptation, pruned, limit)
        ran.append((adaptation, pruned, result.is_cut))
        return result

    monkeypatch.setattr(workbench.Workbench, "_run", kept)
    slimmed(Literals(), torch.randn(2, 5))
    whole = [(id(adaptation), id(pruned)) for adaptation, pruned, is_cut in ran if not is_cut]
    assert len(whole) == len(set(whole)) > 3


def test_an_adaptation_is_a_value():
    one = Adaptation(ties=(("a", "b"),))
    more = one.with_ties([("b", "c")]).with_minimum({"a": 2}).with_whole({"c": 7})
    assert one == Adaptation(ties=(("a", "b"),)) and more.ties == (("a", "b", "c"),)
    assert more.whole == {"a": 7, "b": 7, "c": 7} and more.minimum == {"a": 2}
    assert more.with_whole({"a": 9}).whole["a"] == 7


class ScaledByWidth(nn.Module):
    """A norm of lucidrains' networks: two products on one line, of which one has a number."""

    def __init__(self, width):
        super().__init__()
        self.g = nn.Parameter(torch.rand(1, width, 1) + 0.5)

    def forward(self, x):
        return F.normalize(x, dim=1) * self.g * (x.shape[1] ** 0.5)


def test_two_calls_of_one_line_need_not_have_as_many_numbers():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(3, 16, 1), ScaledByWidth(16), nn.SiLU(), nn.Conv1d(16, 16, 1), ScaledByWidth(16), nn.Conv1d(16, 4, 1)
    )
    _, subnet, oto = slimmed(net, torch.randn(2, 3, 5))
    assert sizes(oto) == {"0.weight": 16, "3.weight": 16} and "0.weight" in subnet.kept
