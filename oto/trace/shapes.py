"""Compute the result shapes of common operators directly when tensors have no data.

Many of torch's kernels for tensors without data are written in Python and take longer than recording the call: 0.2 ms
for a linear layer, 1 ms for attention. This file handles the simple cases with one real dtype; everything else,
including invalid arguments, is left to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from oto._torch import DisableTorchFunction, FakeTensor, FakeTensorMode, OpOverload, fake_empty

aten = torch.ops.aten

Shape = Sequence[int]


def result_of(
    op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], fake: FakeTensorMode | None = None
) -> Tensor | None:
    """An empty tensor of the right shape and dtype; contiguous, so that any view of it works.

    ``None`` if the call is not one of the simple cases.

    Args:
        fake: The fake tensor mode of the result, if any.
    """
    of = _SHAPES.get(op)
    if of is None or not args:
        return None
    first = args[0][0] if isinstance(args[0], (list, tuple)) and args[0] else args[0]
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return None
    shape = of(*args, **kwargs)
    if shape is None:
        return None
    if fake is not None:
        return fake_empty(fake, shape, None, first.dtype, first.device)
    return torch.empty(shape, dtype=first.dtype, device=first.device)


class Remembered:
    """A cache of results of calls without data; it pays off because blocks and runs repeat.

    It covers only torch's own operators that write to nothing and return new tensors, whose shapes follow from the
    arguments. Views of fake tensors are cached too, with memory of their own: torch takes half a millisecond for such a
    view, and no call can tell the difference.
    """

    def __init__(self) -> None:
        self._given: dict[Hashable, Any] = {}

    def call(
        self, op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], fake: FakeTensorMode | None = None
    ) -> Any:
        """The result of the call, computed or from the cache.

        Args:
            fake: The active mode if the arguments are fake tensors; ``None`` on ``meta``.
        """
        if not _is_pure(op, fake is not None):
            return op(*args, **kwargs)
        key: Hashable = None
        made = None
        with DisableTorchFunction():
            try:
                of = fake is not None
                key = op, of, torch.get_default_dtype(), _signature(args, fake), _signature(kwargs, fake)
                made = self._given.get(key)
            except TypeError:  # an argument that cannot be a key
                pass
            if made is not None:
                kind, of_each = made
                given = [_empty(fake, *one) for one in of_each]
                return given[0] if kind is None else kind(given)
        result = op(*args, **kwargs)
        if key is not None:
            with DisableTorchFunction():
                self._remember(key, result, [*_tensors_in(args), *_tensors_in(kwargs)], fake)
        return result

    def _remember(self, key: Hashable, result: Any, given: list[Tensor], fake: FakeTensorMode | None) -> None:
        tensors = list(result) if isinstance(result, (list, tuple)) else [result]
        plain = all(isinstance(t, Tensor) and _is_plain(t, fake) and type(t) is not nn.Parameter for t in tensors)
        if plain and (_are_views(tensors, given) if fake is not None else _are_apart([*tensors, *given], len(tensors))):
            if len(self._given) >= _MANY:
                self._given.clear()
            kind = None if isinstance(result, Tensor) else type(result)
            self._given[key] = kind, [(t.shape, t.stride(), t.dtype, t.device) for t in tensors]


REMEMBERED = Remembered()
"""The cache of all recordings and runs on shapes."""


def _empty(
    fake: FakeTensorMode | None, shape: Shape, stride: Shape, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if fake is not None:
        return fake_empty(fake, shape, stride, dtype, device)
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _is_plain(t: Tensor, fake: FakeTensorMode | None) -> bool:
    """Whether a tensor has a real dtype and no data, not even a constant known to the mode."""
    if t.is_complex():
        return False
    if fake is None:
        return type(t) in (Tensor, nn.Parameter) and t.is_meta
    return isinstance(t, FakeTensor) and t.fake_mode is fake and t.constant is None


_MANY = 10_000
"""The limit on cached calls: several times the distinct calls of the largest models."""


@cache
def _is_pure(op: Any, views: bool) -> bool:
    """Whether an operator only returns new tensors, by its schema; schemas of composite operators may be wrong.

    Args:
        views: Also allow views of its arguments.
    """
    if not isinstance(op, OpOverload) or op.namespace != "aten":
        return False
    schema = op._schema
    shared = [x.alias_info for x in (*schema.arguments, *schema.returns) if x.alias_info is not None]
    if not schema.arguments or (shared and not views) or any(info.is_write for info in shared):
        return False
    return torch.Tag.dynamic_output_shape not in op.tags


def _tensors_in(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    items = x.values() if isinstance(x, dict) else x if isinstance(x, (tuple, list)) else ()
    return [t for item in items for t in _tensors_in(item)]


def _are_apart(tensors: list[Tensor], first: int) -> bool:
    """Whether the first ``first`` tensors share no memory with any other."""
    storages = [t.untyped_storage() for t in tensors]  # keep them alive, so that ids are unique
    places = [*map(id, storages)]
    return len({*places[:first]}) == first and not {*places[:first]} & {*places[first:]}


def _are_views(tensors: list[Tensor], given: list[Tensor]) -> bool:
    """Whether tensors start at the beginning of their storage, and none of them is an argument itself.

    A view of a normal tensor is not an inference tensor, which torch checks.
    """
    known = set(map(id, given))
    return all(t.is_inference() for t in given) and all(
        t.is_inference() and not t.storage_offset() and id(t) not in known for t in tensors
    )


def _signature(x: Any, fake: FakeTensorMode | None) -> Hashable:
    """The cache key of arguments: everything that the shapes of results depend on.

    Raises:
        TypeError: An argument is of an unknown type, or a tensor that has data or is not plain.
    """
    if isinstance(x, Tensor):
        if not _is_plain(x, fake):
            raise TypeError(x)
        place = None if fake is None else (x.device, x.storage_offset(), x.is_inference())
        return x.shape, x.stride(), x.dtype, place
    if isinstance(x, (tuple, list)):
        return tuple([_signature(item, fake) for item in x])
    if isinstance(x, dict):
        return tuple([(name, _signature(value, fake)) for name, value in x.items()])
    if type(x) in _PLAIN:
        return type(x), x
    if isinstance(x, int):
        return int, int(x)
    raise TypeError(x)


def _first(x: Tensor, *args: Any, **kwargs: Any) -> Shape | None:
    return x.shape


def _unary(x: Tensor, *args: Any, **kwargs: Any) -> Shape | None:
    plain = (bool, int, float, str, type(None))
    return x.shape if all(isinstance(a, plain) for a in (*args, *kwargs.values())) else None


def _binary(x: Tensor, y: Any, **kwargs: Any) -> Shape | None:
    if isinstance(y, (int, float)):
        return x.shape if x.ndim else None
    if not isinstance(y, Tensor) or y.dtype != x.dtype or not x.ndim or not y.ndim or kwargs:
        return None
    if x.shape == y.shape:
        return x.shape
    a, b = (1,) * (y.ndim - x.ndim) + tuple(x.shape), (1,) * (x.ndim - y.ndim) + tuple(y.shape)
    if any(m != n and m != 1 and n != 1 for m, n in zip(a, b, strict=True)):
        return None
    return [n if m == 1 else m for m, n in zip(a, b, strict=True)]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Shape | None:
    fits = weight.ndim == 2 and x.ndim and x.shape[-1] == weight.shape[1] and x.dtype == weight.dtype
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    return (*x.shape[:-1], weight.shape[0])


def _convolution(
    rank: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = (1,),
    padding: Any = (0,),
    dilation: Any = (1,),
    groups: int = 1,
) -> Shape | None:
    alike = (
        x.ndim == weight.ndim == rank + 2 and x.dtype == weight.dtype and x.is_contiguous() and weight.is_contiguous()
    )
    if not alike or groups < 1 or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    size, kernel = x.shape[2:], weight.shape[2:]
    steps, pads, gaps = (tuple(a) * (len(size) if len(a) == 1 else 1) for a in (stride, padding, dilation))
    if not len(steps) == len(pads) == len(gaps) == len(size) or min(*steps, *gaps) < 1 or min(pads) < 0:
        return None
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, kernel, steps, pads, gaps, strict=True)
    ]
    return (x.shape[0], weight.shape[0], *out) if min(x.shape) > 0 and min(out) > 0 else None


def _pooled(x: Tensor, size: Any) -> Shape | None:
    plain = x.ndim == 4 and x.is_contiguous() and len(size) == 2 and min(size) > 0 and min(x.shape) > 0
    return (*x.shape[:2], *size) if plain else None


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Shape | None:
    first = tensors[0]
    rest, own = [t.shape for t in tensors], list(first.shape)
    if not all(t.is_contiguous() and t.dtype is first.dtype for t in tensors) or not -len(own) <= dim < len(own):
        return None
    dim %= len(own)
    if any(len(shape) != len(own) for shape in rest):
        return None
    whole = sum(shape[dim] for shape in rest)
    if any([*shape[:dim], *shape[dim + 1 :]] != [*own[:dim], *own[dim + 1 :]] for shape in rest):
        return None
    return [*own[:dim], whole, *own[dim + 1 :]]


def _matmul(x: Tensor, y: Tensor) -> Shape | None:
    if x.ndim < 2 or x.ndim != y.ndim or x.dtype != y.dtype or x.shape[-1] != y.shape[-2]:
        return None
    return (*x.shape[:-1], y.shape[-1]) if x.shape[:-2] == y.shape[:-2] else None


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Shape | None:
    alike = q.ndim == k.ndim == v.ndim == 4 and q.dtype == k.dtype == v.dtype and attn_mask is None
    if not alike or kwargs.get("enable_gqa") or q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3]:
        return None
    return (*q.shape[:-1], v.shape[-1]) if q.shape[-1] == k.shape[-1] else None


def _reduced(x: Tensor, dim: Any, keepdim: bool = False, **kwargs: Any) -> Shape | None:
    if not isinstance(dim, (list, tuple)) or not dim or kwargs or any(not -x.ndim <= d < x.ndim for d in dim):
        return None
    gone = {d % x.ndim for d in dim}
    return [1 if d in gone else n for d, n in enumerate(x.shape) if keepdim or d not in gone]


def _norm(x: Tensor, order: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Shape | None:
    return _reduced(x, dim, keepdim, **kwargs) if order == 2 else None


_PLAIN = {bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}

_KEEP = (
    aten.batch_norm.default,
    aten.layer_norm.default,
    aten.group_norm.default,
    aten.dropout.default,
    aten.relu.default,
    aten.gelu.default,
    aten.silu.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.hardtanh.default,
    aten.leaky_relu.default,
    aten.contiguous.default,
)
"""Operators whose result has the shape of the first argument, whatever the others are."""

_SHAPES: dict[Any, Callable[..., Shape | None]] = {
    **dict.fromkeys(_KEEP, _first),
    **dict.fromkeys(
        (
            aten.sigmoid.default,
            aten.tanh.default,
            aten.exp.default,
            aten.sqrt.default,
            aten.rsqrt.default,
            aten.neg.default,
            aten.abs.default,
            aten.clamp_min.default,
            aten.pow.Tensor_Scalar,
            aten.square.default,
            aten.softmax.int,
            aten.mish.default,
            aten.elu.default,
        ),
        _unary,
    ),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor), _binary),
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.conv1d.default: partial(_convolution, 1),
    aten.conv2d.default: partial(_convolution, 2),
    aten.conv3d.default: partial(_convolution, 3),
    aten.adaptive_avg_pool2d.default: _pooled,
    aten.cat.default: _cat,
    aten.concat.default: _cat,
    aten.scaled_dot_product_attention.default: _attention,
    aten.mean.dim: _reduced,
    aten.sum.dim_IntList: _reduced,
    aten.linalg_vector_norm.default: _norm,
}
