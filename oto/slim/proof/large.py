"""Find out whether large weights receive a nonzero gradient, without materializing that gradient.

The gradient of an embedding table takes as much memory as the table, but a few rows show whether any entry is nonzero.
For a product ``y = x Wᵀ`` the gradient is ``gᵀ x``; it is computed in blocks of rows until one has a nonzero entry. For
a lookup the gradient is the sum of ``g`` for each row that was looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

LARGE = 1 << 22
"""A weight with more entries counts as large; also the number of entries of a block."""

_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    F.embedding: ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
}
Notify = Callable[[], None]


def has_number(grad: Tensor) -> bool:
    """Whether any entry is finite and nonzero."""
    return any(bool((torch.isfinite(part) & (part != 0)).any()) for part in grad.reshape(-1).split(LARGE))


class WithoutLarge(TorchFunctionMode):
    """Mode in which products and lookups give large weights no gradient, but report whether it would be nonzero.

    Other uses of these weights are unaffected.

    Args:
        weights: The parameters, by name.
        reached: Receives the names of weights with a nonzero gradient while the backward pass runs.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], reached: set[str]) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in weights.items() if p.numel() > LARGE}
        self.reached = reached

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ARGUMENTS:
            given = dict(zip(_ARGUMENTS[func], args, strict=False)) | kwargs
            name = self.names.get(id(given.get("weight")))
            if name is not None and not given.get("sparse") and given.get("max_norm") is None:
                made = _product if func is F.linear else _lookup
                return made(given, lambda: self.reached.add(name))
        return func(*args, **kwargs)


def _product(given: Mapping[str, Any], found: Notify) -> Tensor:
    y: Tensor = _Product.apply(given["input"], given["weight"], found)
    return y if given.get("bias") is None else y + given["bias"]


def _lookup(given: Mapping[str, Any], found: Notify) -> Tensor:
    y: Tensor = _Lookup.apply(given["input"], given["weight"], given.get("padding_idx"), found)
    return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, found: Notify) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.found = found
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows, inputs = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        if any(has_number(part.t() @ inputs) for part in rows.split(max(1, LARGE // inputs.shape[-1]), 1)):
            ctx.found()
        return g @ weight if ctx.needs_input_grad[0] else None, None, None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None, found: Notify) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding = None if padding is None else padding % len(weight)
        ctx.found = found
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        rows, where = ids.reshape(-1).unique(return_inverse=True)
        total = g.new_zeros(len(rows), g.shape[-1]).index_add_(0, where, g.reshape(-1, g.shape[-1]))
        if has_number(total if ctx.padding is None else total[rows != ctx.padding]):
            ctx.found()
        return None, None, None, None
