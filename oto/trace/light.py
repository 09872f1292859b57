"""Run a model on shapes only and write nothing down, to see whether it runs: in a fraction of the time of a recording.

Unlike a recording, whose calls are compared with others afterwards, this has to refuse what torch refuses of tensors
without data. So a call is torch's own, unless its result is remembered from an equal call, or its arguments were looked
at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from oto._torch import DisableTorchFunction, HigherOrderOperator, TorchDispatchMode, tree_map_only
from oto.errors import reraise_out_of_memory
from oto.trace.inputs import arguments
from oto.trace.shapes import REMEMBERED, result_of
from oto.trace.snapshot import Snapshot, preserved
from oto.trace.stand_ins import empty

aten = torch.ops.aten


def failure_on_meta(model: nn.Module, dummy_input: Any, found: Snapshot | None = None) -> Exception | None:
    """What a model without data raises on inputs without data, if anything.

    Args:
        found: The snapshot to restore afterwards; for a copy that is thrown away, that of the model.
    """
    args, kwargs = tree_map_only(Tensor, empty, arguments(dummy_input))
    try:
        with preserved(model, dummy_input, found), torch.device("meta"), torch.inference_mode(), _Shapes():  # type: ignore[no-untyped-call]
            model(*args, **kwargs)
    except Exception as failure:  # anything that the user's own forward may raise
        reraise_out_of_memory(failure)
        return failure
    return None


class _Shapes(TorchDispatchMode):
    """Computes the shapes of results."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(op, HigherOrderOperator) or op.namespace != "aten":
            return op(*args, **kwargs)
        fits = _FITS.get(op)
        with DisableTorchFunction():
            light = _is_plain(args) and _is_plain(kwargs.values())
            result = result_of(op, args, kwargs) if light and (fits is None or fits(*args, **kwargs)) else None
        return REMEMBERED.call(op, args, kwargs) if result is None else result


def _is_plain(args: Iterable[Any]) -> bool:
    """Whether the tensors among the arguments, at the first two levels, have no data and are contiguous, as results are
    taken to be."""
    for x in args:
        for t in x if isinstance(x, tuple | list) else (x,):
            if isinstance(t, Tensor) and not (t.is_meta and t.is_contiguous()):
                return False
    return True


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *rest: Any, **named: Any
) -> bool:
    if training or mean is None or var is None or x.ndim < 2 or 0 in x.shape:
        return False
    return all(t.shape == x.shape[1:2] and t.dtype == x.dtype for t in (weight, bias, mean, var) if t is not None)


def _layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, *rest: Any, **named: Any) -> bool:
    inner = tuple(x.shape[x.ndim - len(shape) :])
    if not shape or x.ndim < len(shape) or inner != tuple(shape):
        return False
    return all(tuple(t.shape) == inner and t.dtype == x.dtype for t in (weight, bias) if t is not None)


def _never(*args: Any, **kwargs: Any) -> bool:
    return False


_FITS: Mapping[Any, Callable[..., bool]] = {
    aten.batch_norm.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.group_norm.default: _never,
}
"""Whether the arguments fit together, of operators whose results a recording takes to have the shape of the first."""
