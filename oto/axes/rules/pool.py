"""Pooling, resampling and padding: channels may be removed, positions stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from oto.axes import terms as T
from oto.axes.call import Call, Operand, Size, same, zero
from oto.axes.registry import rule

aten = torch.ops.aten


def _pool(call: Call, x: Operand, n: int, fact: Any) -> list[Operand]:
    """A window that slides along the last ``n`` dimensions, with one output, or two (values and indices)."""
    lead = x.ndim - n
    text = "it is pooled over"
    call.fix(x, range(lead, x.ndim), text)
    sources: list[tuple[int, ...]] = [(d,) for d in range(lead)] + [()] * n
    outs = []
    for i, shape in enumerate(call.shapes):
        assert shape is not None
        terms = [*x.terms[:lead], *(call.fixed(k, text) for k in shape[lead:])]
        outs.append(call.move(x, terms, sources, fact if i == 0 else lambda *f: None))
    return outs


def _dimensions(call: Call) -> int:
    name = str(call.node.op)
    return next(n for n in (1, 2, 3) if f"{n}d" in name)


@rule(
    aten.max_pool1d,
    aten.max_pool2d,
    aten.max_pool3d,
    aten.max_pool2d_with_indices,
    aten.max_pool3d_with_indices,
    aten.max_pool1d_with_indices,
    aten.adaptive_max_pool1d,
    aten.adaptive_max_pool2d,
    aten.adaptive_max_pool3d,
)
def pool(call: Call, x: Operand, *rest: Any, **named: Any) -> Any:
    """The maximum of a window that holds one number everywhere is that number."""
    return _pool(call, x, _dimensions(call), same)


@rule(aten.fractional_max_pool2d, aten.fractional_max_pool3d)
def fractional_pool(call: Call, x: Operand, kernel: Any, size: Any, samples: Operand) -> list[Operand]:
    """The windows of each channel begin at random positions, given as samples (N, C, 2 or 3)."""
    n = _dimensions(call)
    lead = x.ndim - n
    for a, b in zip(x.terms[:lead], samples.terms[2 - lead : 2], strict=True):
        call.unify(a, b)
    call.fix(samples, [-1], "it is read place by place")
    return _pool(call, x, n, same)


@rule(
    aten.avg_pool1d,
    aten.avg_pool2d,
    aten.avg_pool3d,
    aten.adaptive_avg_pool1d,
    aten.adaptive_avg_pool2d,
    aten.adaptive_avg_pool3d,
    aten._adaptive_avg_pool2d,
    aten._adaptive_avg_pool3d,
)
def avg_pool(call: Call, x: Operand, *rest: Any, **named: Any) -> Any:
    """The mean of a window, which may include zeros of the padding, so only a value of zero stays known."""
    return _pool(call, x, _dimensions(call), zero)


@rule(
    aten.upsample_nearest1d,
    aten.upsample_nearest2d,
    aten.upsample_nearest3d,
    aten._upsample_nearest_exact1d,
    aten._upsample_nearest_exact2d,
    aten._upsample_nearest_exact3d,
    aten.upsample_linear1d,
    aten.upsample_bilinear2d,
    aten.upsample_bicubic2d,
    aten.upsample_trilinear3d,
    aten._upsample_bilinear2d_aa,
    aten._upsample_bicubic2d_aa,
)
def upsample(call: Call, x: Operand, *rest: Any, **named: Any) -> Any:
    """Weighted sums over positions; their sum is 1 only up to rounding, so only a value of zero stays known."""
    return _pool(call, x, x.ndim - 2, zero)


def _padded(call: Call, x: Operand, pad: Sequence[int], fact: Any, value: float | None) -> Operand:
    terms = list(x.terms)
    sizes: list[int | Size] = list(pad)
    for i in range(len(pad) // 2):
        dim = x.ndim - 1 - i
        before, after = pad[2 * i], pad[2 * i + 1]
        term = terms[dim]
        if value is None and (before or after):
            T.fix(term, call.why("padding repeats its entries"))
        n = T.size_of(term)
        if before < 0 or after < 0:
            T.fix(term, call.why("negative padding cuts through it"))
            cuts = [max(-before, 0), n - max(-before, 0) - max(-after, 0), max(-after, 0)]
            term = call.cut(term, cuts)[1]
        # entries padded with a number may be removed, such as channels that a shortcut does not have
        sides = [
            T.axis(k, call.why("it is padding") if value is None else None) if k > 0 else None for k in (before, after)
        ]
        for place, side in enumerate(sides, 2 * i):
            if side is not None and value is not None:
                sizes[place] = Size(side)
        whole = [sides[0], term, sides[1]]
        terms[dim] = T.concat([t for t in whole if t is not None]) if any(s is not None for s in sides) else term
    if value is not None:
        call.resize(pad=sizes)
    routes = (tuple((d,) for d in range(x.ndim)),)
    return call.step([x], terms, routes, fact, skip_absent=value is not None)


@rule(aten.constant_pad_nd)
def constant_pad(call: Call, x: Operand, pad: Sequence[int], value: float = 0) -> Operand:
    """Padding of other dimensions adds ``value`` to a removed slice, whose value is then known only if it is equal."""
    return _padded(call, x, pad, lambda *facts: same(*facts, value), value)


@rule(aten.pad)
def pad(call: Call, x: Operand, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Operand:
    """All modes of ``torch.nn.functional.pad``."""
    if mode == "constant":
        return constant_pad(call, x, pad, value or 0)
    return _padded(call, x, pad, same, None)


@rule(
    aten.reflection_pad1d,
    aten.reflection_pad2d,
    aten.reflection_pad3d,
    aten.replication_pad1d,
    aten.replication_pad2d,
    aten.replication_pad3d,
    aten._pad_circular,
)
def repeat_pad(call: Call, x: Operand, pad: Sequence[int]) -> Operand:
    """Padding that repeats entries of the tensor."""
    return _padded(call, x, pad, same, None)


@rule(aten.pixel_shuffle)
def pixel_shuffle(call: Call, x: Operand, r: int) -> Operand:
    """(*, C·r·r, H, W) -> (*, C, H·r, W·r)."""
    c, h, w = x.shape[-3:]
    lead = x.shape[:-3]
    n = len(lead)
    y = call.view(x, (*lead, c // (r * r), r, r, h, w))
    call.fix(y, [n + 1, n + 2], "pixel_shuffle names its factor")
    y = call.permute(y, [*range(n), n, n + 3, n + 1, n + 4, n + 2])
    return call.view(y, (*lead, c // (r * r), h * r, w * r))


@rule(aten.pixel_unshuffle)
def pixel_unshuffle(call: Call, x: Operand, r: int) -> Operand:
    """(*, C, H·r, W·r) -> (*, C·r·r, H, W)."""
    c, h, w = x.shape[-3:]
    lead = x.shape[:-3]
    n = len(lead)
    y = call.view(x, (*lead, c, h // r, r, w // r, r))
    call.fix(y, range(n + 1, n + 5), "pixel_unshuffle names its factor")
    y = call.permute(y, [*range(n), n, n + 2, n + 4, n + 1, n + 3])
    return call.view(y, (*lead, c * r * r, h // r, w // r))


@rule(aten.channel_shuffle, aten.native_channel_shuffle)
def channel_shuffle(call: Call, x: Operand, groups: int) -> Operand:
    """(N, G·K, *) -> (N, K·G, *); the number of groups is an argument of the call, so groups stay whole."""
    n, c, *rest = x.shape
    y = call.view(x, (n, groups, c // groups, *rest))
    call.fix(y, [1], "channel_shuffle names its number of groups")
    y = call.permute(y, [0, 2, 1, *range(3, y.ndim)])
    return call.view(y, (n, c, *rest))
