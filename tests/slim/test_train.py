"""The slim model in train mode is the zeroed full model in train mode: outputs, gradients, batch statistics, dropout.

Dropout draws one number for each entry. Where the tensor that it drops from kept its shape, one seed drops the same
entries in both models; where it got thinner the numbers are others, and only the distribution is the same.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import oto.nn
from oto import OTO
from oto.slim.proof.compare import relative_error
from oto.slim.pruned_shapes import pruned_shapes
from tests.slim.test_construct import Residual

EXACT = 1e-12  # float64, sums of at most a few thousand terms


class Block(nn.Module):
    def __init__(self, into, out, stride=1):
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.two, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out, momentum=0.3)
        self.short = nn.Conv2d(into, out, 1, stride) if into != out else nn.Identity()

    def forward(self, x):
        y = torch.relu(self.norm1(self.one(x)))
        return torch.relu(self.norm2(self.two(y)) + self.short(x))


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, 1, 1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        Block(12, 12),
        Block(12, 20, 2),
        Block(20, 20),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(20, 5),
    )


def mobilenet():
    def separable(into, out):
        return (
            nn.Conv2d(into, into, 3, 1, 1, groups=into, bias=False),
            nn.BatchNorm2d(into),
            nn.ReLU6(),
            nn.Conv2d(into, out, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU6(),
        )

    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.GroupNorm(4, 8),
        nn.SiLU(),
        *separable(8, 16),
        *separable(16, 24),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


class Transformer(nn.Module):
    """Patches, a class token, two blocks of torch's own encoder layer."""

    def __init__(self, dropout=0.0, norm_first=True):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 4, 24, 0.0, "gelu", batch_first=True, norm_first=norm_first)
            for _ in range(2)
        )
        self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        h = self.patches(self.drop(x)).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.places
        for block in self.blocks:
            h = block(h)
        return self.out(self.norm(h)[:, 0])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mid = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.lstm = nn.LSTM(8, 12, num_layers=2, batch_first=True)
        self.norm, self.out = nn.RMSNorm(12), nn.Linear(12, 5)

    def forward(self, ids):
        h, _ = self.lstm(torch.tanh(self.mid(self.embed(ids))))
        return self.out(self.norm(h).mean(1))


IMAGES, SEQUENCES = (4, 3, 8, 8), (4, 7, 5)
MODELS = {
    "resnet": (resnet, IMAGES),
    "mobilenet": (mobilenet, IMAGES),
    "transformer": (Transformer, IMAGES),
    "transformer, norm last": (lambda: Transformer(norm_first=False), IMAGES),
    "lstm": (Recurrent, (4, 9)),
    "residual, rms norm": (lambda: Residual(norm=nn.RMSNorm), SEQUENCES),
}


def data(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if len(shape) == 2:
        return torch.randint(0, 11, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def made_slim(model, x, share=0.4):
    """The zeroed full model and the slim one, both in train mode, and how tensors of the one become the other's."""
    model = model.double()
    found = OTO(model, x)
    found.random_set_zero_groups(share)
    subnet = found.construct_subnet(emitter="module")
    pruned = pruned_shapes(found.partition, subnet.kept)
    leaves = {name: leaf for leaf in found.partition.found.graph.leaves for name in leaf.names}
    assert sum(p.numel() for p in subnet.model.parameters()) < sum(p.numel() for p in model.parameters())
    return model.train(), subnet.model.train(), lambda name, tensor: pruned.prune(leaves[name], tensor)


def step(model, x, seed=0):
    torch.manual_seed(seed)
    y = model(x)
    (y.square().mean() + y.sin().sum()).backward()
    return y


@pytest.mark.parametrize("name", MODELS)
def test_forward_backward_and_statistics(name):
    make, shape = MODELS[name]
    full, slim, pruned = made_slim(make(), data(shape))
    for seed in (1, 2):  # running statistics move twice
        full.zero_grad(), slim.zero_grad()
        y, z = (step(model, data(shape, seed)) for model in (full, slim))
        assert relative_error([y.detach()], [z.detach()]) <= EXACT
    own = dict(slim.named_parameters())
    for name, p in full.named_parameters():
        if p.grad is None:
            assert own[name].grad is None
            continue
        scale = p.grad.abs().max().clamp_min(1e-3)  # a bias before a norm has a gradient of rounding only
        assert (pruned(name, p.grad) - own[name].grad).abs().max() <= EXACT * max(scale, 1.0), name
    buffers = dict(slim.named_buffers())
    for name, b in full.named_buffers():
        assert relative_error([pruned(name, b)], [buffers[name]]) <= EXACT, name


def test_a_step_of_batch_norm_moves_the_slim_statistics():
    _, slim, _ = made_slim(resnet(), data(IMAGES))
    before = slim[1].running_mean.clone()
    step(slim, data(IMAGES, 1))
    assert not torch.equal(before, slim[1].running_mean) and slim[1].num_batches_tracked == 1
    slim.eval()(data(IMAGES, 2))
    assert slim[1].num_batches_tracked == 1


@pytest.mark.parametrize("seed", range(3))
def test_dropout_on_what_kept_its_shape_is_the_same_under_one_seed(seed):
    full, slim, _ = made_slim(Transformer(dropout=0.4), data(IMAGES))
    y, z = (step(model, data(IMAGES), seed).detach() for model in (full, slim))
    assert relative_error([y], [z]) <= EXACT
    other = step(full, data(IMAGES), seed + 10).detach()
    assert relative_error([y], [other]) > 1e-3  # something was dropped


def test_dropout_on_a_thinner_tensor_is_the_same_in_distribution():
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 4))
    x = data((1, 1, 6))[0]
    full, slim, _ = made_slim(model, x)
    many = x.expand(40_000, -1)
    torch.manual_seed(0)
    y = full(many)
    torch.manual_seed(0)
    z = slim(many)
    assert relative_error([y.detach()], [z.detach()]) > 1e-3  # one seed, and yet other numbers
    for moment in (lambda t: t.mean(0), lambda t: t.var(0), lambda t: (t - t.mean(0)).pow(3).mean(0)):
        a, b = moment(y), moment(z)
        noise = (y - y.mean(0)).abs().pow(3).mean(0).clamp_min(1) * 6 / 40_000**0.5  # six standard errors
        assert ((a - b).abs() <= noise).all()
    wrong = copy.deepcopy(slim)
    wrong[2].p = 0.6
    assert ((y.var(0) - wrong(many).var(0)).abs() > noise).any()


def test_mode_of_each_module_is_kept():
    model = resnet().double().train()
    model[3].norm1.eval()  # frozen statistics
    found = OTO(model, data(IMAGES))
    found.random_set_zero_groups(0.4)
    slim = found.construct_subnet(emitter="module").model
    assert not slim.training and model.training and not model[3].norm1.training


NORMS = {
    "layer": (lambda: oto.nn.LayerNorm((5,), (8,)), (3, 4, 5)),
    "layer, no bias": (lambda: oto.nn.LayerNorm((5,), (8,), bias=False), (3, 4, 5)),
    "layer, plain": (lambda: oto.nn.LayerNorm((5,), (8,), weight=False, bias=False), (3, 4, 5)),
    "rms": (lambda: oto.nn.RMSNorm((5,), (8,)), (3, 4, 5)),
    "rms, plain": (lambda: oto.nn.RMSNorm((5,), (8,), eps=1e-3, weight=False), (3, 4, 5)),
    "group": (lambda: oto.nn.GroupNorm(2, 3, 4), (2, 6, 3, 2)),
    "group, plain": (lambda: oto.nn.GroupNorm(2, 3, 4, affine=False), (2, 6, 5)),
}


@pytest.mark.parametrize("name", NORMS)
def test_gradients_of_norms(name):
    make, shape = NORMS[name]
    norm = make().double()
    for p in norm.parameters():
        nn.init.normal_(p)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    held = tuple(norm.parameters())

    def of(x, *values):
        named = dict(zip(dict(norm.named_parameters()), values, strict=True))
        return torch.func.functional_call(norm, named, (x,))

    assert torch.autograd.gradcheck(of, (x, *held))
    assert torch.autograd.gradgradcheck(of, (x, *held))


@pytest.mark.parametrize("need_weights", [True, False])
def test_gradients_of_attention(need_weights):
    attention = oto.nn.MultiheadAttention(5, 5, 5, 5, 2, 3, 2, 0.5, (0, 2), 4, batch_first=True).double()
    for p in attention.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attention(x, x, x, need_weights=need_weights)[0], (x,))
