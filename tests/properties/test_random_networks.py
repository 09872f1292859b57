"""Random networks: whatever is put together, the slim model is exact or the axis stays whole; never wrong, no crash."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from oto import OTO
from oto.errors import NothingPrunableError
from oto.slim.proof.compare import relative_error
from oto.slim.proof.run import run

STEPS = [
    "conv",
    "conv",
    "grouped",
    "depthwise",
    "transposed",
    "batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "rms_norm",
    "activation",
    "activation_",
    "add",
    "add",
    "add_",
    "mul",
    "cat",
    "cat",
    "split",
    "slice",
    "gate",
    "shared",
    "tied",
    "shuffle",
    "pixel_shuffle",
    "mlp",
    "attention",
    "pool",
    "upsample",
    "pad",
    "pad_channels",
    "mean_channels",
    "max_channels",
    "softmax",
    "roll",
    "flip",
    "stack_mean",
    "where",
    "write",
    "linear_attention",
    "prelu",
    "einsum",
    "scale",
    "glu",
    "index",
    "expand",
    "heads",
    "heads",
    "channel_attention",
    "window",
    "recurrent",
    "normalize",
    "cumsum",
    "weight_norm",
    "unfold",
    "standardized",
    "experts",
    "topk",
    "chosen_rows",
    "centers",
    "dead",
    "square_weight_norm",
]
ACTIVATIONS = [F.relu, F.gelu, torch.sigmoid, torch.tanh, F.silu, F.softplus, F.hardswish, torch.abs, torch.exp, F.elu]


class Network(nn.Module):
    """A pool of feature maps (N, C, H, W); each step takes some and adds one. All that is left is read at the end."""

    def __init__(self, steps: list[tuple[str, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleDict()
        self.building = True
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        with torch.no_grad():
            self(torch.randn(2, 3, 6, 6))
        self.building = False
        with torch.no_grad():
            for p in self.parameters():
                p.add_(torch.randn_like(p), alpha=0.2)

    def layer(self, key, make):
        if key not in self.layers:
            assert self.building
            self.layers[key] = make()
        return self.layers[key]

    def forward(self, x):
        pool = [self.first(x)]
        for i, (kind, salt) in enumerate(self.steps):
            pool.append(self.step(f"{i}_{kind}", kind, random.Random(salt), pool))
        pooled = [F.adaptive_avg_pool2d(t, 1).flatten(1) for t in pool[-3:]]
        return sum(self.layer(f"head{i}", lambda t=t: nn.Linear(t.shape[1], 4))(t) for i, t in enumerate(pooled))

    def like(self, key, x, other):
        """Bring ``other`` to the shape of ``x``."""
        other = F.interpolate(other, size=x.shape[2:]) if other.shape[2:] != x.shape[2:] else other
        if other.shape[1] != x.shape[1]:
            other = self.layer(f"{key}_fit", lambda: nn.Conv2d(other.shape[1], x.shape[1], 1))(other)
        return other

    def step(self, key, kind, rng, pool):
        x, y = rng.choice(pool[-3:]), rng.choice(pool)
        n, c, h, w = x.shape
        width = rng.choice([4, 6, 8, 12])
        if kind == "conv":
            k = rng.choice([1, 3])
            return self.layer(key, lambda: nn.Conv2d(c, width, k, padding=k // 2, bias=rng.random() < 0.5))(x)
        if kind == "grouped":
            groups = next(g for g in (4, 3, 2, 1) if c % g == 0)
            return self.layer(key, lambda: nn.Conv2d(c, groups * rng.choice([1, 2, 3]), 1, groups=groups))(x)
        if kind == "depthwise":
            return self.layer(key, lambda: nn.Conv2d(c, c * rng.choice([1, 2]), 3, padding=1, groups=c))(x)
        if kind == "transposed":
            return self.layer(key, lambda: nn.ConvTranspose2d(c, width, 3, padding=1))(x)
        if kind == "batch_norm":
            return self.layer(key, lambda: nn.BatchNorm2d(c))(x)
        if kind == "group_norm":
            groups = next(g for g in (4, 3, 2, 1) if c % g == 0)
            return self.layer(key, lambda: nn.GroupNorm(groups, c))(x)
        if kind == "instance_norm":
            return self.layer(key, lambda: nn.InstanceNorm2d(c, affine=rng.random() < 0.5))(x)
        if kind in ("layer_norm", "rms_norm"):
            norm = nn.LayerNorm if kind == "layer_norm" else nn.RMSNorm
            return self.layer(key, lambda: norm(c))(x.movedim(1, -1)).movedim(-1, 1)
        if kind == "activation":
            return rng.choice(ACTIVATIONS)(x)
        if kind == "activation_":
            return F.relu_(x.clone()) if rng.random() < 0.5 else torch.sigmoid_(x * 1.0)
        if kind == "add":
            return x + self.like(key, x, y)
        if kind == "add_":
            z = x.clone()
            z += self.like(key, x, y)
            return z
        if kind == "mul":
            return x * self.like(key, x, y)
        if kind == "cat":
            y = F.interpolate(y, size=(h, w)) if y.shape[2:] != x.shape[2:] else y
            return torch.cat([x, y, x] if rng.random() < 0.3 else [x, y], 1)
        if kind == "split":
            parts = x.chunk(2, 1) if rng.random() < 0.5 else x.split([c // 2, c - c // 2], 1)
            return parts[rng.randrange(len(parts))]
        if kind == "slice":
            start = rng.randrange(c - 1) if c > 1 else 0
            return x[:, start : start + max(1, c // 2)]
        if kind == "gate":
            squeezed = x.mean((2, 3), keepdim=True)
            inner = self.layer(key, lambda: nn.Sequential(nn.Conv2d(c, 4, 1), nn.ReLU(), nn.Conv2d(4, c, 1)))
            return x * torch.sigmoid(inner(squeezed))
        if kind == "shared":
            same = self.layer(key, lambda: nn.Conv2d(c, c, 1))
            return same(F.relu(same(x)))
        if kind == "tied":
            a = self.layer(key, lambda: nn.Conv2d(c, c, 1))
            return F.relu(F.linear(a(x).movedim(1, -1), a.weight.flatten(1))).movedim(-1, 1)
        if kind == "shuffle":
            g = 2 if c % 2 == 0 else 1
            return x.reshape(n, g, -1, h, w).transpose(1, 2).reshape(n, -1, h, w)
        if kind == "pixel_shuffle":
            return F.interpolate(F.pixel_shuffle(self.layer(key, lambda: nn.Conv2d(c, 4 * 3, 1))(x), 2), size=(h, w))
        if kind == "mlp":
            mlp = self.layer(key, lambda: nn.Sequential(nn.Linear(c, width), nn.GELU(), nn.Linear(width, c)))
            return x + mlp(x.movedim(1, -1)).movedim(-1, 1)
        if kind == "attention":
            heads = 2 if c % 2 == 0 else 1
            attention = self.layer(key, lambda: nn.MultiheadAttention(c, heads, batch_first=True))
            t = x.flatten(2).transpose(1, 2)
            return attention(t, t, t, need_weights=rng.random() < 0.5)[0].transpose(1, 2).unflatten(2, (h, w))
        if kind == "linear_attention":
            q, k, v = self.layer(key, lambda: nn.Conv2d(c, 3 * width, 1))(x).flatten(2).chunk(3, 1)
            return torch.einsum("ndt,nde->net", F.elu(q) + 1, torch.einsum("ndt,net->nde", F.relu(k), v)).unflatten(
                2, (h, w)
            )
        if kind == "pool":
            return rng.choice([F.max_pool2d, F.avg_pool2d])(x, 3, 1, 1)
        if kind == "upsample":
            return F.interpolate(x, size=(h, w), mode=rng.choice(["nearest", "bilinear"]))
        if kind == "pad":
            return F.pad(x, (1, 0, 0, 1), value=rng.choice([0.0, 1.0]))[:, :, :h, :w]
        if kind == "pad_channels":
            return F.pad(x, (0, 0, 0, 0, 1, 2))
        if kind == "mean_channels":
            return x * x.mean(1, keepdim=True)
        if kind == "max_channels":
            return x * torch.sigmoid(x.amax(1, keepdim=True))
        if kind == "softmax":
            return x.softmax(rng.choice([1, 2]))
        if kind == "roll":
            return x.roll(1, rng.choice([1, 2, 3]))
        if kind == "flip":
            return x.flip(rng.choice([1, 2]))
        if kind == "stack_mean":
            return torch.stack([x, self.like(key, x, y)]).mean(0)
        if kind == "where":
            return torch.where(x > 0, x, self.like(key, x, y))
        if kind == "write":
            z = x.clone()
            z[:, : max(1, c // 2)] = self.like(key, x, y)[:, : max(1, c // 2)]
            return z
        if kind == "prelu":
            return self.layer(key, lambda: nn.PReLU(c))(x)
        if kind == "einsum":
            weight = self.layer(key, lambda: nn.Linear(c, width, bias=False)).weight
            return torch.einsum("oc,nchw->nohw", weight, x)
        if kind == "scale":
            return x * self.layer(key, lambda: nn.PReLU(c)).weight.view(-1, 1, 1) + 0.5 * (rng.random() < 0.5)
        if kind == "glu":
            return F.glu(self.layer(key, lambda: nn.Conv2d(c, 2 * width, 1))(x), 1)
        if kind == "index":
            return x[:, torch.arange(c).flip(0)] if rng.random() < 0.5 else x.index_select(2, torch.arange(h))
        if kind == "heads":
            return self.heads(key, rng, x)
        if kind == "channel_attention":
            heads = 2 if c % 2 == 0 else 1
            q, k, v = self.layer(key, lambda: nn.Conv2d(c, 3 * c, 1))(x).reshape(n, 3, heads, -1, h * w).unbind(1)
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
            return (scores.softmax(-1) @ v).reshape(n, c, h, w)
        if kind == "window":
            s = 2 if h % 2 == w % 2 == 0 else 1
            cells = x.reshape(n, c, h // s, s, w // s, s).permute(0, 2, 4, 3, 5, 1).reshape(-1, s * s, c)
            cells = cells + self.layer(key, lambda: nn.Linear(s * s, s * s))(cells.transpose(1, 2)).transpose(1, 2)
            return cells.reshape(n, h // s, w // s, s, s, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)
        if kind == "recurrent":
            make = rng.choice([nn.LSTM, nn.GRU, nn.RNN])
            net = self.layer(
                key, lambda: make(c, width, rng.choice([1, 2]), batch_first=True, bidirectional=rng.random() < 0.5)
            )
            return net(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).unflatten(2, (h, w))
        if kind == "normalize":
            return F.normalize(x, dim=rng.choice([1, 3]), eps=1e-6)
        if kind == "cumsum":
            return x.cumsum(rng.choice([1, 2]))
        if kind == "weight_norm":
            return self.layer(key, lambda: weight_norm(nn.Conv2d(c, width, 1), dim=rng.choice([0, 1])))(x)
        if kind == "square_weight_norm":
            return x + self.layer(key, lambda: weight_norm(nn.Conv2d(c, c, 1), dim=rng.choice([0, 1])))(x)
        if kind == "unfold":
            patches = F.unfold(x, 3, padding=1).reshape(n, c, 9, h, w)
            return (patches * self.layer(key, lambda: nn.Linear(9, 1)).weight.view(9, 1, 1)).sum(2)
        if kind == "standardized":
            weight = self.layer(key, lambda: nn.Conv2d(c, width, 1)).weight
            variance, mean = torch.var_mean(weight, (1, 2, 3), keepdim=True)
            return F.conv2d(x, (weight - mean) * torch.rsqrt(variance + 1e-5))
        if kind == "experts":
            weights = self.layer(f"{key}_route", lambda: nn.Linear(c, 2))(x.mean((2, 3))).softmax(-1)
            experts = [
                self.layer(
                    f"{key}_{e}", lambda: nn.Sequential(nn.Conv2d(c, width, 1), nn.ReLU(), nn.Conv2d(width, c, 1))
                )
                for e in range(2)
            ]
            return sum(weights[:, e, None, None, None] * expert(x) for e, expert in enumerate(experts))
        if kind == "topk":
            values, _ = x.flatten(2).topk(4, dim=-1)
            return x + values.mean(-1)[..., None, None]
        if kind == "chosen_rows":
            rows = x.mean((1, 3)).argsort(dim=-1)[:, None, :, None].expand(-1, c, -1, w)
            return x.gather(2, rows)
        if kind == "centers":
            centers = self.layer(key, lambda: nn.Linear(c, 5)).weight
            nearness = torch.softmax(-torch.cdist(x.flatten(2).transpose(1, 2), centers), -1)
            return (nearness @ centers).transpose(1, 2).unflatten(2, (h, w))
        if kind == "dead":  # computed, and read by nobody
            self.step(f"{key}_dead", rng.choice([step for step in STEPS if step != "dead"]), rng, pool)
            return x + 1
        assert kind == "expand"
        one = self.layer(key, lambda: nn.Conv2d(c, 1, 1))(x)
        return one.expand(-1, width, -1, -1) * rng.choice([1.0, 2.0])

    def heads(self, key, rng, x):
        """Attention by hand: queries share keys and values, positions may turn them, the width is the user's."""
        _, c, h, w = x.shape
        shared, d = rng.choice([1, 2]), rng.choice([2, 4])
        repeat = rng.choice([1, 2])
        q = self.layer(f"{key}_q", lambda: nn.Linear(c, shared * repeat * d))
        k, v = (self.layer(f"{key}_{p}", lambda: nn.Linear(c, shared * d)) for p in "kv")
        out = self.layer(f"{key}_out", lambda: nn.Linear(shared * repeat * d, c))
        t = x.flatten(2).transpose(1, 2)
        qs, ks, vs = (f(t).unflatten(-1, (-1, d)).transpose(1, 2) for f in (q, k, v))
        if rng.random() < 0.5:  # RoPE
            angle = torch.arange(h * w, dtype=x.dtype)[:, None] * torch.ones(d // 2, dtype=x.dtype).cumsum(0)
            cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
            qs, ks = (z * cos + torch.cat([-z[..., d // 2 :], z[..., : d // 2]], -1) * sin for z in (qs, ks))
        if repeat > 1:
            ks, vs = (z.repeat_interleave(repeat, 1) for z in (ks, vs))
        if rng.random() < 0.5:
            y = F.scaled_dot_product_attention(qs, ks, vs, is_causal=rng.random() < 0.5)
        else:
            y = (qs @ ks.transpose(-2, -1) / d**0.5).softmax(-1) @ vs
        return out(y.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, (h, w))


def check(steps: list[tuple[str, int]], salt: int) -> None:
    torch.manual_seed(salt)
    model = Network(steps).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    try:
        oto = OTO(model, x, allow_graph=salt % 4 > 0)  # asking the class takes longest
    except NothingPrunableError:
        return
    oto.random_set_zero_groups(0.5, salt)
    zeroed = run(model, x)
    if not all(torch.isfinite(t).all() for t in zeroed) or max(float(t.abs().max()) for t in zeroed) > 1e12:
        return  # a tower of exponentials
    subnet = oto.construct_subnet()
    assert relative_error(zeroed, run(subnet.model, x)) <= 1e-10
    assert subnet.emitter == "module" or subnet.why_graph


STORIES = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 2**16)), min_size=1, max_size=8)
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=120, deadline=None, suppress_health_check=QUIET)
@given(STORIES, st.integers(0, 2**16))
def test_random_networks(steps, salt):
    check(steps, salt)


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore::oto.errors.NotItsClassWarning")  # that is told; here all that counts is exactness
@pytest.mark.parametrize("part", range(8))
def test_thousands_of_random_networks(part):
    @seed(part)  # parts run side by side, each with examples of its own
    @settings(max_examples=250, deadline=None, derandomize=False, database=None, suppress_health_check=QUIET)
    @given(STORIES, st.integers(0, 2**16))
    def networks(steps, salt):
        check(steps, salt)

    networks()


@pytest.mark.parametrize("kind", sorted(set(STEPS)))
def test_each_step_by_itself_leaves_something_prunable(kind):
    """A step between two convolutions: where it keeps everything whole, that is on purpose."""
    model = Network([("conv", 1), (kind, 5), ("conv", 2)]).eval()
    assert any(g.prunable for g in OTO(model, torch.randn(2, 3, 6, 6)).node_groups)
