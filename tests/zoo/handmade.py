"""Networks written by hand, for shapes of networks that no library's zoo holds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import image, tokens

Factory = Callable[[], tuple[nn.Module, Any]]


class LanguageModel(nn.Module):
    """Embedding, a recurrent network, a readout; the embedding may be tied to the readout."""

    def __init__(self, kind: str = "LSTM", width: int = 24, tied: bool = False, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, width)
        self.rnn = getattr(nn, kind)(width, 32, batch_first=True, **options)
        out = options.get("proj_size") or 32
        self.middle = nn.Linear(out * (2 if options.get("bidirectional") else 1), width)
        self.head = nn.Linear(width, 100, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        y, _ = self.rnn(self.embed(ids))
        return self.head(torch.tanh(self.middle(y)))


class ByCell(nn.Module):
    """A recurrent cell called step by step, from a state of zeros."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell = getattr(nn, kind)(12, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], self.cell.hidden_size)
        state = (h, torch.zeros_like(h)) if isinstance(self.cell, nn.LSTMCell) else h
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            h = state[0] if isinstance(state, tuple) else state
        return self.head(h)


class Generator(nn.Module):
    """A GAN's generator: transposed convolutions up from a vector."""

    def __init__(self) -> None:
        super().__init__()
        widths = [24, 16, 8]
        layers: list[nn.Module] = [nn.ConvTranspose2d(12, widths[0], 4, 1, 0, bias=False)]
        for a, b in itertools.pairwise(widths):
            layers += [nn.BatchNorm2d(a), nn.ReLU(True), nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False)]
        self.main = nn.Sequential(
            *layers, nn.BatchNorm2d(widths[-1]), nn.ReLU(True), nn.ConvTranspose2d(8, 3, 3, 1, 1), nn.Tanh()
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z[:, :, None, None])


class StyleBlock(nn.Module):
    """A convolution whose filters are scaled by a style and brought back to length one, sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv2d(3, 12, 3, padding=1)
        self.style = nn.Linear(8, 12)
        self.weight = nn.Parameter(torch.randn(16, 12, 3, 3) * 0.1)
        self.end = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        x = F.leaky_relu(self.start(x), 0.2)
        n, c, h, w = x.shape
        weight = self.weight[None] * (1 + self.style(z))[:, None, :, None, None]
        weight = weight * torch.rsqrt(weight.square().sum([2, 3, 4], keepdim=True) + 1e-8)
        x = F.conv2d(x.reshape(1, n * c, h, w), weight.flatten(0, 1), padding=1, groups=n)
        return self.end(F.leaky_relu(x.reshape(n, -1, h, w), 0.2))


class Cascade(nn.Module):
    """CARN: residual blocks whose outputs are all concatenated, then pixel shuffle."""

    def __init__(self, width: int = 16, scale: int = 2) -> None:
        super().__init__()
        self.entry = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(True), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(3)
        )
        self.mix = nn.ModuleList(nn.Conv2d(width * (i + 2), width, 1) for i in range(3))
        self.up = nn.Sequential(nn.Conv2d(width, width * scale**2, 3, padding=1), nn.ReLU(True), nn.PixelShuffle(scale))
        self.exit = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        seen = x
        for block, mix in zip(self.blocks, self.mix, strict=True):
            seen = torch.cat([seen, F.relu(block(x) + x)], 1)
            x = F.relu(mix(seen))
        return self.exit(self.up(x))


def _conv(a: int, b: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(a, b, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(b),
        nn.SiLU(inplace=True),
    )


class C2f(nn.Module):
    """YOLO's stage: split in two, a chain on one half, everything concatenated."""

    def __init__(self, a: int, b: int, n: int = 2) -> None:
        super().__init__()
        self.first = _conv(a, b, 1)
        self.chain = nn.ModuleList(nn.Sequential(_conv(b // 2, b // 2), _conv(b // 2, b // 2)) for _ in range(n))
        self.last = _conv(b // 2 * (n + 2), b, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.chain:
            parts.append(parts[-1] + block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Detector(nn.Module):
    """YOLO: a backbone, a neck that goes up and down, heads with a distribution over distances, boxes."""

    def __init__(self, classes: int = 4, bins: int = 4) -> None:
        super().__init__()
        self.classes, self.bins = classes, bins
        self.stem = nn.Sequential(_conv(3, 8, 3, 2), _conv(8, 16, 3, 2), C2f(16, 16))
        self.down3, self.down4 = (
            nn.Sequential(_conv(16, 24, 3, 2), C2f(24, 24)),
            nn.Sequential(_conv(24, 32, 3, 2), C2f(32, 32)),
        )
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.spp = _conv(32 * 4, 32, 1)
        self.up = nn.Upsample(scale_factor=2)
        self.up3, self.back4 = C2f(32 + 24, 24), C2f(24 + 32, 32)
        self.again = _conv(24, 24, 3, 2)
        self.box = nn.ModuleList(nn.Sequential(_conv(c, 16), nn.Conv2d(16, 4 * bins, 1)) for c in (24, 32))
        self.cls = nn.ModuleList(nn.Sequential(_conv(c, 16), nn.Conv2d(16, classes, 1)) for c in (24, 32))
        self.dfl = nn.Conv2d(bins, 1, 1, bias=False)
        self.dfl.weight.data[:] = torch.arange(bins).view(1, bins, 1, 1)
        self.dfl.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        three = self.down3(self.stem(x))
        four = self.down4(three)
        pools = [four]
        for _ in range(3):
            pools.append(self.pool(pools[-1]))
        four = self.spp(torch.cat(pools, 1))
        three = self.up3(torch.cat([self.up(four), three], 1))
        four = self.back4(torch.cat([self.again(three), four], 1))
        boxes, scores = [], []
        for level, box, cls in zip((three, four), self.box, self.cls, strict=True):
            n, _, h, w = level.shape
            boxes.append(box(level).view(n, 4, self.bins, h * w))
            scores.append(cls(level).view(n, self.classes, h * w))
        distance = torch.cat(boxes, 3).transpose(1, 2).softmax(1)
        return self.dfl(distance).squeeze(1), torch.cat(scores, 2).sigmoid()


class Mixer(nn.Module):
    """MLP-mixer: tokens are mixed by a layer over their positions."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.across = nn.ModuleList(nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 16)) for _ in range(2))
        self.within = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width)) for _ in range(2)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for i in range(2):
            x = x + self.across[i](self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + self.within[i](self.norms[2 * i + 1](x))
        return self.head(self.norms[4](x).mean(1))


class LinearAttention(nn.Module):
    """Attention without softmax over the positions: keys and values meet first."""

    def __init__(self, width: int = 32, heads: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.embed = nn.Embedding(100, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 100)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        if self.causal:
            state = torch.einsum("bthd,bthe->bthde", k, v).cumsum(1)
            y = torch.einsum("bthd,bthde->bthe", q, state)
            scale = torch.einsum("bthd,bthd->bth", q, k.cumsum(1))
        else:
            y = torch.einsum("bthd,bhde->bthe", q, torch.einsum("bthd,bthe->bhde", k, v))
            scale = torch.einsum("bthd,bhd->bth", q, k.sum(1))
        return self.head(self.norm(x + self.out((y / scale[..., None]).flatten(2))))


class Experts(nn.Module):
    """A mixture of experts whose tokens are gathered and added back by index."""

    def __init__(self, width: int = 16, inner: int = 24, experts: int = 3, dense: bool = False) -> None:
        super().__init__()
        self.dense = dense
        self.embed = nn.Embedding(100, width)
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)) for _ in range(experts)
        )
        self.head = nn.Linear(width, 100)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        flat = x.flatten(0, 1)
        weights, chosen = self.gate(flat).softmax(-1).topk(2, -1)
        y = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            if self.dense:
                y = y + expert(flat) * (weights * (chosen == i)).sum(-1, keepdim=True)
            else:
                token, slot = torch.where(chosen == i)
                y.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return self.head(x + y.view_as(x))


class Capsules(nn.Module):
    """Per-expert weights looked up by index, and a dispatch by one-hot einsum."""

    def __init__(self, width: int = 16, inner: int = 24, experts: int = 4) -> None:
        super().__init__()
        self.entry = nn.Linear(12, width)
        self.gate = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, inner) * 0.2)
        self.down = nn.Parameter(torch.randn(experts, inner, width) * 0.2)
        self.extra = nn.Parameter(torch.randn(experts, width, width) * 0.2)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        best = self.gate(x).argmax(-1)
        there = F.one_hot(best, self.up.shape[0]).to(x.dtype)
        spread = torch.einsum("bte,btd->bted", there, x)
        y = torch.einsum("bted,edi->btei", spread, self.up).relu()
        y = torch.einsum("btei,eid->btd", y, self.down)
        z = (x.unsqueeze(-2) @ self.extra[best]).squeeze(-2)
        return self.head(x + y + z)


class Scan(nn.Module):
    """A selective state space, as a loop over time with writes into a preallocated output."""

    def __init__(self, width: int = 12, state: int = 4) -> None:
        super().__init__()
        self.entry = nn.Linear(8, 2 * width)
        self.conv = nn.Conv1d(width, width, 3, groups=width, padding=2)
        self.dt, self.b, self.c = nn.Linear(width, width), nn.Linear(width, state), nn.Linear(width, state)
        self.a = nn.Parameter(torch.rand(width, state))
        self.d = nn.Parameter(torch.ones(width))
        self.exit = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.entry(x).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        dt, b, c = F.softplus(self.dt(u)), self.b(u), self.c(u)
        decay = torch.exp(-dt[..., None] * self.a)
        h = u.new_zeros(u.shape[0], *self.a.shape)
        y = torch.zeros_like(u)
        for t in range(x.shape[1]):
            h = decay[:, t] * h + (dt[:, t] * u[:, t])[..., None] * b[:, t, None]
            y[:, t] = (h * c[:, t, None]).sum(-1)
        return x + self.exit((y + u * self.d) * F.silu(gate))


class Quantized(nn.Module):
    """A VQ-VAE: each place takes the nearest entry of a code book."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.ReLU(), nn.Conv2d(16, 8, 1))
        self.codes = nn.Embedding(12, 8)
        self.decode = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x).movedim(1, -1)
        near = torch.cdist(z.flatten(0, 2), self.codes.weight).argmin(-1)
        code = self.codes(near).view_as(z)
        return self.decode((z + (code - z)).movedim(-1, 1))


class Graphs(nn.Module):
    """A graph network: messages along edges, summed at their ends by scatter."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.entry = nn.Linear(6, width)
        self.message = nn.Sequential(nn.Linear(2 * width, 24), nn.ReLU(), nn.Linear(24, width))
        self.update = nn.GRUCell(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = F.relu(self.entry(x))
        for _ in range(2):
            message = self.message(torch.cat([h[edges[0]], h[edges[1]]], -1))
            index = edges[1][:, None].expand_as(message)
            h = self.update(torch.zeros_like(h).scatter_add_(0, index, message), h)
        return self.head(h)


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(6, 12)
        self.meet = nn.Bilinear(10, 12, 14)
        self.head = nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.meet(self.a(x).tanh(), self.b(x).relu())))


class UNet(nn.Module):
    """Down and up with concatenated skips; a bottleneck with squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = _conv(3, 8), _conv(8, 16), _conv(16, 24)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 6, 1), nn.ReLU(), nn.Conv2d(6, 24, 1), nn.Sigmoid()
        )
        self.up2, self.up1 = nn.ConvTranspose2d(24, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.back2, self.back1 = _conv(32, 16), _conv(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(F.max_pool2d(one, 2))
        three = self.three(F.max_pool2d(two, 2))
        three = three * self.squeeze(three)
        x = self.back2(torch.cat([self.up2(three), two], 1))
        return self.head(self.back1(torch.cat([one, self.up1(x)], 1)))


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _edges() -> Tensor:
    return torch.randint(0, 7, (2, 12), generator=torch.Generator().manual_seed(1))


ZOO: dict[str, Factory] = {
    "lstm": lambda: (LanguageModel(), tokens()),
    "lstm_tied": lambda: (LanguageModel(tied=True, num_layers=2), tokens()),
    "lstm_both_ways": lambda: (LanguageModel(num_layers=2, bidirectional=True), tokens()),
    "lstm_projected": lambda: (LanguageModel(proj_size=12), tokens()),
    "gru": lambda: (LanguageModel("GRU", num_layers=2), tokens()),
    "gru_both_ways": lambda: (LanguageModel("GRU", bidirectional=True, bias=False), tokens()),
    "rnn_tanh": lambda: (LanguageModel("RNN"), tokens()),
    "rnn_relu": lambda: (LanguageModel("RNN", nonlinearity="relu", num_layers=2), tokens()),
    "lstm_cell": lambda: (ByCell("LSTMCell"), floats(2, 4, 12)),
    "gru_cell": lambda: (ByCell("GRUCell"), floats(2, 4, 12)),
    "rnn_cell": lambda: (ByCell("RNNCell"), floats(2, 4, 12)),
    "gan_generator": lambda: (Generator(), floats(2, 12)),
    "style_block": lambda: (StyleBlock(), (image(8), floats(2, 8))),
    "carn": lambda: (Cascade(), image(12)),
    "yolo": lambda: (Detector(), image(32)),
    "mixer": lambda: (Mixer(), image(32)),
    "linear_attention": lambda: (LinearAttention(), tokens()),
    "causal_linear_attention": lambda: (LinearAttention(causal=True), tokens()),
    "experts_by_index": lambda: (Experts(), tokens()),
    "experts_by_mask": lambda: (Experts(dense=True), tokens()),
    "experts_by_one_hot": lambda: (Capsules(), floats(2, 5, 12)),
    "selective_scan": lambda: (Scan(), floats(2, 6, 8)),
    "vq_vae": lambda: (Quantized(), image(16)),
    "graph_network": lambda: (Graphs(), (floats(7, 6), _edges())),
    "bilinear": lambda: (Bilinear(), floats(4, 6)),
    "unet": lambda: (UNet(), image(16)),
}
