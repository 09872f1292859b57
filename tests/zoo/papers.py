"""Networks as people write them after a paper or a tutorial: small, and with the tricks that each is known for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from .models import image, tokens


class NanoGPT(nn.Module):
    """Queries, keys and values from one layer, its width read off the input; embedding and head are tied."""

    class Block(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.norm2 = nn.LayerNorm(width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            self.heads, self.width = heads, width

        def forward(self, x):
            b, t, c = x.size()
            q, k, v = self.qkv(self.norm1(x)).split(self.width, dim=2)
            q, k, v = (z.view(b, t, self.heads, c // self.heads).transpose(1, 2) for z in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).contiguous().view(b, t, c))
            return x + self.mlp(self.norm2(x))

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(100, 32), nn.Embedding(16, 32)
        self.blocks = nn.ModuleList(self.Block(32, 4) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 100, bias=False)
        self.tokens.weight = self.head.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PointNet(nn.Module):
    """Points are turned by matrices that the network computes of all of them."""

    class Turn(nn.Module):
        def __init__(self, k: int) -> None:
            super().__init__()
            self.k = k
            self.each = nn.Sequential(nn.Conv1d(k, 16, 1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 1))
            self.all = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, k * k))

        def forward(self, x):
            return self.all(self.each(x).max(2)[0]).view(-1, self.k, self.k) + torch.eye(self.k, device=x.device)

    def __init__(self) -> None:
        super().__init__()
        self.turn, self.inner = self.Turn(3), self.Turn(16)
        self.a, self.b, self.head = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 64, 1), nn.Linear(64, 5)

    def forward(self, x):
        x = torch.bmm(x.transpose(2, 1), self.turn(x)).transpose(2, 1)
        x = F.relu(self.a(x))
        x = torch.bmm(x.transpose(2, 1), self.inner(x)).transpose(2, 1)
        return F.log_softmax(self.head(self.b(x).max(2)[0]), 1)


class WaveNet(nn.Module):
    """Gated dilated convolutions, a residual and a skip path."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 16, 1)
        self.gates = nn.ModuleList(weight_norm(nn.Conv1d(16, 32, 2, dilation=2**k)) for k in range(3))
        self.residuals = nn.ModuleList(nn.Conv1d(16, 16, 1) for _ in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(16, 24, 1) for _ in range(3))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(24, 24, 1), nn.ReLU(), nn.Conv1d(24, 8, 1))

    def forward(self, x):
        x, skipped = self.first(x), 0
        for k, (gate, residual, skip) in enumerate(zip(self.gates, self.residuals, self.skips, strict=True)):
            a, b = gate(F.pad(x, (2**k, 0))).chunk(2, 1)
            h = torch.tanh(a) * torch.sigmoid(b)
            x, skipped = x + residual(h), skipped + skip(h)
        return self.head(skipped)


class Fourier(nn.Module):
    """Fourier neural operator: complex weights on the lowest frequencies."""

    class Spectral(nn.Module):
        def __init__(self, width: int, modes: int) -> None:
            super().__init__()
            self.modes = modes
            self.weight = nn.Parameter(torch.randn(width, width, modes, dtype=torch.cfloat) / width)

        def forward(self, x):
            f = torch.fft.rfft(x)
            y = torch.zeros_like(f)
            y[:, :, : self.modes] = torch.einsum("bix,iox->box", f[:, :, : self.modes], self.weight)
            return torch.fft.irfft(y, n=x.shape[-1])

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.up, self.down = nn.Linear(2, 8), nn.Linear(8, 32), nn.Linear(32, 1)
        self.spectral = nn.ModuleList(self.Spectral(8, 4) for _ in range(2))
        self.local = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(2))

    def forward(self, x):
        x = self.lift(x).permute(0, 2, 1)
        for spectral, local in zip(self.spectral, self.local, strict=True):
            x = F.gelu(spectral(x) + local(x))
        return self.down(F.gelu(self.up(x.permute(0, 2, 1))))


class DiagonalStateSpace(nn.Module):
    """S4D: a convolution whose kernel comes from complex poles."""

    def __init__(self, width: int = 8, states: int = 4) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, width), nn.Linear(width, 2)
        self.c = nn.Parameter(torch.randn(width, states, 2))
        self.step, self.skip = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.decay, self.turn = nn.Parameter(torch.randn(width, states)), nn.Parameter(torch.randn(width, states))

    def forward(self, x):
        u = self.enter(x).transpose(1, 2)
        n = u.shape[-1]
        poles = -self.decay.exp() + 1j * self.turn
        scaled = poles * self.step.exp()[:, None]
        c = torch.view_as_complex(self.c) * (scaled.exp() - 1) / poles
        powers = (scaled[..., None] * torch.arange(n, device=x.device)).exp()
        kernel = 2 * torch.einsum("hn,hnl->hl", c, powers).real
        y = torch.fft.irfft(torch.fft.rfft(u, n=2 * n) * torch.fft.rfft(kernel, n=2 * n), n=2 * n)[..., :n]
        return self.leave((y + u * self.skip[:, None]).transpose(1, 2))


class Attending(nn.Module):
    """Sequence to sequence: a bidirectional encoder, a cell that attends to it step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = nn.Embedding(100, 16), nn.Embedding(100, 16)
        self.encoder = nn.LSTM(16, 24, batch_first=True, bidirectional=True)
        self.bridge, self.cell = nn.Linear(48, 24), nn.LSTMCell(16 + 48, 24)
        self.query, self.head = nn.Linear(24, 48), nn.Linear(24 + 48, 100)

    def forward(self, source, target):
        memory, _ = self.encoder(self.read(source))
        context = memory.mean(1)
        h = torch.tanh(self.bridge(context))
        c, out = torch.zeros_like(h), []
        for t in range(target.shape[1]):
            h, c = self.cell(torch.cat([self.write(target[:, t]), context], -1), (h, c))
            weights = torch.softmax((memory @ self.query(h)[..., None])[..., 0], -1)
            context = (weights[..., None] * memory).sum(1)
            out.append(self.head(torch.cat([h, context], -1)))
        return torch.stack(out, 1)


class MessagePassing(nn.Module):
    """Messages along edges, summed per node, and a cell that takes them in."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 16), nn.Linear(16, 3)
        self.message = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16))
        self.cell = nn.GRUCell(16, 16)

    def forward(self, x, edges):
        h, (source, target) = F.relu(self.enter(x)), edges
        for _ in range(2):
            messages = self.message(torch.cat([h[source], h[target]], -1))
            h = self.cell(torch.zeros_like(h).index_add(0, target, messages), h)
        degree = torch.zeros_like(x[:, 0]).scatter_add(0, target, torch.ones_like(target, dtype=x.dtype)).clamp(min=1)
        return self.leave(h / degree[:, None])


class GraphAttention(nn.Module):
    """A softmax over the edges of each node, by hand."""

    def __init__(self, heads: int = 4, width: int = 8) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.enter, self.leave = nn.Linear(5, heads * width, bias=False), nn.Linear(heads * width, 3)
        self.left, self.right = nn.Parameter(torch.randn(heads, width)), nn.Parameter(torch.randn(heads, width))

    def forward(self, x, edges):
        h, (source, target) = self.enter(x).view(-1, self.heads, self.width), edges
        scores = F.leaky_relu((h * self.left).sum(-1)[source] + (h * self.right).sum(-1)[target], 0.2)
        scores = (scores - scores.max()).exp()
        total = torch.zeros_like(h[..., 0]).index_add(0, target, scores)
        weights = scores / (total[target] + 1e-9)
        return self.leave(F.elu(torch.zeros_like(h).index_add(0, target, h[source] * weights[..., None]).flatten(1)))


class Quantizer(nn.Module):
    """VQ-VAE: every pixel becomes the nearest entry of a codebook."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 8, 4, 2, 1))
        self.book = nn.Embedding(10, 8)
        self.decoder = nn.Sequential(nn.ConvTranspose2d(8, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1))

    def forward(self, x):
        z = self.encoder(x).permute(0, 2, 3, 1)
        flat = z.reshape(-1, z.shape[-1])
        book = self.book.weight
        distances = (flat**2).sum(1, keepdim=True) + (book**2).sum(1) - 2 * flat @ book.t()
        q = self.book(distances.argmin(1)).view(z.shape)
        return self.decoder((z + (q - z).detach()).permute(0, 3, 1, 2))


class Recommender(nn.Module):
    """DLRM: bags of embeddings, and the products of all pairs of them."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.bags = nn.ModuleList(nn.EmbeddingBag(20, 8, mode=mode) for mode in ("sum", "mean", "sum"))
        self.top = nn.Sequential(nn.Linear(8 + 6, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x, ids):
        dense = self.bottom(x)
        features = torch.stack([dense, *(bag(ids[:, k : k + 2]) for k, bag in enumerate(self.bags))], 1)
        products = torch.bmm(features, features.transpose(1, 2))
        i, j = torch.tril_indices(4, 4, -1)
        return self.top(torch.cat([dense, products[:, i, j]], 1))


class Capsules(nn.Module):
    """Vectors that are squashed to length below one, and routing by agreement."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.primary = nn.Conv2d(3, 16, 5), nn.Conv2d(16, 32, 5, 2)
        self.votes = nn.Parameter(0.1 * torch.randn(1, 4 * 4 * 4, 5, 6, 8))

    def forward(self, x):
        u = self.primary(F.relu(self.first(x))).view(x.shape[0], 4, 8, 4, 4).permute(0, 1, 3, 4, 2)
        u = u.reshape(x.shape[0], -1, 8)
        length = u.norm(dim=-1, keepdim=True)
        u = length**2 / (1 + length**2) * u / (length + 1e-8)
        votes = (self.votes @ u[:, :, None, :, None])[..., 0]
        logits = torch.zeros_like(votes[..., :1])
        for _ in range(2):
            chosen = (logits.softmax(2) * votes).sum(1, keepdim=True)
            logits = logits + (votes * chosen).sum(-1, keepdim=True)
        return chosen[:, 0].norm(dim=-1)


class Styled(nn.Module):
    """StyleGAN 2: weights scaled per image and normalized again, in one convolution with a group for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.mapping, self.style = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2)), nn.Linear(16, 12)
        self.weight = nn.Parameter(torch.randn(10, 12, 3, 3))
        self.enter, self.leave = nn.Conv2d(3, 12, 1), nn.Conv2d(10, 3, 1)

    def forward(self, x, z):
        style, x = self.style(self.mapping(z)), self.enter(x)
        b, c, h, w = x.shape
        weight = self.weight[None] * style[:, None, :, None, None]
        weight = weight * torch.rsqrt(weight.pow(2).sum((2, 3, 4), keepdim=True) + 1e-8)
        y = F.conv2d(x.reshape(1, b * c, h, w), weight.reshape(-1, c, 3, 3), padding=1, groups=b)
        return self.leave(F.leaky_relu(y.reshape(b, -1, h, w), 0.2))


class Splines(nn.Module):
    """KAN with radial functions: a small function on every edge."""

    class Layer(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.register_buffer("grid", torch.linspace(-1, 1, 5))
            self.weight = nn.Parameter(0.1 * torch.randn(outputs, inputs, 5))
            self.base = nn.Linear(inputs, outputs)

        def forward(self, x):
            bumps = torch.exp(-4 * (x[..., None] - self.grid) ** 2)
            return self.base(F.silu(x)) + torch.einsum("big,oig->bo", bumps, self.weight)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(self.Layer(3, 12), self.Layer(12, 12), self.Layer(12, 2))

    def forward(self, x):
        return self.layers(x)


class HyperNetwork(nn.Module):
    """One network computes the weights of another."""

    def __init__(self) -> None:
        super().__init__()
        self.hyper = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 8 * 4))
        self.enter, self.leave = nn.Linear(5, 4), nn.Linear(8, 2)

    def forward(self, x, z):
        return self.leave(torch.relu(torch.einsum("boi,bi->bo", self.hyper(z).view(-1, 8, 4), self.enter(x))))


class Perceiver(nn.Module):
    """Learned queries attend to an input of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(4, 16))
        self.look = nn.MultiheadAttention(16, 2, kdim=6, vdim=6, batch_first=True)
        self.think = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        z = self.latents.expand(x.shape[0], -1, -1)
        z = z + self.look(z, x, x)[0]
        return self.head((z + self.think(z)).mean(1))


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _edges() -> torch.Tensor:
    return torch.randint(0, 7, (2, 12), generator=torch.Generator().manual_seed(1))


def _transformer() -> nn.Module:
    return nn.Transformer(32, 4, 2, 2, 64, batch_first=True)


ZOO: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "nano_gpt": lambda: (NanoGPT(), tokens()),
    "pointnet": lambda: (PointNet(), _normal(2, 3, 20)),
    "wavenet": lambda: (WaveNet(), _normal(2, 1, 16)),
    "fourier_operator": lambda: (Fourier(), _normal(2, 16, 2)),
    "diagonal_state_space": lambda: (DiagonalStateSpace(), _normal(2, 8, 3)),
    "seq2seq": lambda: (Attending(), (tokens(), tokens(4))),
    "message_passing": lambda: (MessagePassing(), (_normal(7, 5), _edges())),
    "graph_attention": lambda: (GraphAttention(), (_normal(7, 5), _edges())),
    "vq_vae": lambda: (Quantizer(), image(16)),
    "dlrm": lambda: (Recommender(), (_normal(3, 4), tokens(4, 3) % 20)),
    "capsules": lambda: (Capsules(), image(16)),
    "style_gan2": lambda: (Styled(), (image(6), _normal(2, 8))),
    "kan": lambda: (Splines(), _normal(4, 3)),
    "hyper_network": lambda: (HyperNetwork(), (_normal(2, 5), _normal(2, 3))),
    "perceiver": lambda: (Perceiver(), _normal(2, 9, 6)),
    "nn_transformer": lambda: (_transformer(), (_normal(2, 6, 32), _normal(2, 5, 32))),
}
