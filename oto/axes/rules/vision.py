"""Windows, grids and regions of images: channels may be removed, positions stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from oto.axes.call import Call, Operand, Size, anything, same, zero
from oto.axes.registry import fixed, rule
from oto.axes.rules.conv import SPACE, convolve

aten = torch.ops.aten
WINDOW = "a window slides along it"
SAMPLED = "it is sampled at places that are computed"


@rule(aten.unfold)
def unfold(call: Call, x: Operand, dimension: int, size: int, step: int) -> Operand:
    """Windows along a dimension; a new last dimension holds the entries of each window."""
    if not x.ndim:
        return call.fresh(call.shape, WINDOW)
    dimension %= x.ndim
    call.fix(x, [dimension], WINDOW)
    terms = list(x.terms)
    terms[dimension] = call.fixed(call.shape[dimension], WINDOW)
    sources: list[tuple[int, ...]] = [(d,) if d != dimension else () for d in range(x.ndim)]
    return call.move(x, [*terms, call.fixed(size, WINDOW)], [*sources, ()])


@rule(aten.unfold_backward)
def unfold_backward(call: Call, x: Operand, sizes: Sequence[int], dim: int, size: int, step: int) -> Operand:
    """The gradient of :func:`unfold`: windows are summed where they overlap."""
    if not call.shape:
        return call.fresh(call.shape, WINDOW)
    dim %= len(sizes)
    call.fix(x, [dim, x.ndim - 1], WINDOW)
    terms = list(x.terms[:-1])
    terms[dim] = call.fixed(call.shape[dim], WINDOW)
    call.resize(input_sizes=list(map(Size, terms)))
    return call.move(x, terms, [(d,) if d != dim else () for d in range(len(terms))], zero)


@rule(aten.im2col)
def im2col(call: Call, x: Operand, kernel: Sequence[int], *rest: Any) -> Operand:
    """(*, C, H, W) -> (*, C·kernel, windows); positions outside of the image are zero."""
    n = x.ndim - 3
    call.fix(x, [n + 1, n + 2], WINDOW)
    width = call.shape[n] // x.shape[n]
    terms = [*x.terms[:n], x.terms[n] + call.fixed(width, WINDOW), call.fixed(call.shape[-1], WINDOW)]
    return call.move(x, terms, [*((d,) for d in range(n + 1)), ()], lambda f: same(f, 0.0))


@rule(aten.col2im)
def col2im(call: Call, x: Operand, size: Sequence[int], kernel: Sequence[int], *rest: Any) -> Operand:
    """(*, C·kernel, windows) -> (*, C, H, W): windows are summed where they overlap."""
    n = x.ndim - 2
    channels = call.shape[n]
    x = call.view(x, (*x.shape[:n], channels, x.shape[n] // channels, x.shape[-1]))
    call.fix(x, [n + 1, n + 2], WINDOW)
    terms = [*x.terms[: n + 1], *(call.fixed(k, WINDOW) for k in call.shape[-2:])]
    return call.move(x, terms, [*((d,) for d in range(n + 1)), (), ()], zero)


@rule(aten.grid_sampler, aten.grid_sampler_2d, aten.grid_sampler_3d)
def grid_sampler(call: Call, x: Operand, grid: Operand, *rest: Any) -> Operand:
    """x (N, C, *size), grid (N, *size', dimensions) -> (N, C, *size')."""
    call.fix(x, range(2, x.ndim), SAMPLED)
    call.fix(grid, range(1, grid.ndim), "it names places")
    call.unify(x.terms[0], grid.terms[0])
    terms = [*x.terms[:2], *(call.fixed(k, SAMPLED) for k in call.shape[2:])]
    places: tuple[tuple[int, ...], ...] = ((),) * (x.ndim - 2)
    routes = ((0,), (1,), *places), ((0,), *places, ())
    return call.step([x, grid], terms, routes, lambda f, _: zero(f))


@rule(aten.affine_grid_generator)
def affine_grid(call: Call, theta: Operand, size: Sequence[int], align_corners: bool) -> Operand:
    """theta (N, d, d + 1) -> positions (N, *size, d)."""
    call.fix(theta, [1, 2], "it is a map of places")
    terms = [theta.terms[0], *(call.fixed(k, "they are places") for k in call.shape[1:])]
    call.resize(size=[Size(theta.terms[0]), *size[1:]])
    return call.move(theta, terms, [(0,), *[()] * (len(terms) - 1)], anything)


@rule("torchvision::roi_align", "torchvision::roi_pool")
def roi(call: Call, x: Operand, regions: Operand, *rest: Any) -> list[Operand]:
    """x (N, C, H, W), regions (K, 5) -> (K, C, height, width); ``roi_pool`` also returns the indices of its values."""
    call.fix(x, [0, 2, 3], "regions are cut out of it")
    call.fix(regions, None, "it names regions")
    outs = []
    for i, shape in enumerate(call.shapes):
        assert shape is not None
        terms = [call.fixed(k, "it belongs to a region") for k in shape]
        terms[1] = x.terms[1]
        outs.append(call.move(x, terms, [(), (1,), (), ()], anything if i else zero))
    return outs


@rule("torchvision::deform_conv2d")
def deform_conv(
    call: Call, x: Operand, weight: Operand, offset: Operand, mask: Operand, bias: Operand, *rest: Any
) -> Operand:
    """A convolution that reads at positions shifted by ``offset``, each weighted by ``mask``."""
    groups, shifts = rest[6:8]
    call.unify(x.terms[0], offset.terms[0])
    call.unify(x.terms[0], mask.terms[0])
    if shifts == 1 or mask.shape[1] == 1:
        call.fix(mask, range(1, mask.ndim), "it weighs places")
    if shifts == 1:
        call.fix(offset, range(1, offset.ndim), "it names places")
    else:  # an offset group may be removed with its channels, or the same channel of each, so groups stay equally wide
        parts = call.view(x, (x.shape[0], shifts, x.shape[1] // shifts, *x.shape[2:]))
        for places in (offset, mask) if mask.shape[1] > 1 else (offset,):
            own = call.view(places, (places.shape[0], shifts, places.shape[1] // shifts, *places.shape[2:]))
            call.unify(parts.terms[1], own.terms[1])
            call.fix(own, range(2, own.ndim), "it names places")
        if max(groups, shifts) % min(groups, shifts):
            call.fix(parts, [1, 2], "shifts and groups cut the channels differently")
        call.resize(offset_groups=Size(parts.terms[1]))
    return convolve(call, x, weight, bias, groups, "oi", uncounted=SPACE)


@rule(
    aten._fft_r2c,
    aten._fft_c2r,
    aten._fft_c2c,
    aten.fft_fft,
    aten.fft_ifft,
    aten.fft_rfft,
    aten.fft_irfft,
    aten.fft_fft2,
    aten.fft_ifft2,
    aten.fft_rfft2,
    aten.fft_irfft2,
    aten.fft_fftn,
    aten.fft_ifftn,
    aten.fft_rfftn,
    aten.fft_irfftn,
    aten.fft_fftshift,
    aten.fft_ifftshift,
)
def fourier(call: Call, x: Operand, *args: Any, **named: Any) -> Operand:
    """Every position along the transformed dimensions depends on all others."""
    schema = call.node.op._schema.arguments  # type: ignore[attr-defined]
    given = {a.name: a.default_value for a in schema}
    given |= dict(zip((a.name for a in schema[1:]), args, strict=False)) | named
    dim = range(x.ndim) if given["dim"] is None else given["dim"]
    dims = [d % x.ndim for d in ([dim] if isinstance(dim, int) else dim)]
    call.fix(x, dims, "a Fourier transform mixes its places")
    terms = [
        call.fixed(call.shape[d], "a Fourier transform mixes its places") if d in dims else x.terms[d]
        for d in range(x.ndim)
    ]
    return call.move(x, terms, [() if d in dims else (d,) for d in range(x.ndim)], zero)


fixed(
    "torchvision::nms",
    "torchvision::ps_roi_align",
    "torchvision::ps_roi_pool",
    "torchvision::encode_jpeg",
    "torchvision::decode_jpeg",
    "torchvision::_roi_align_backward",
    why="what it gives depends on values and on the places of all its entries",
)
