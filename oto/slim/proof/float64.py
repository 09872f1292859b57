"""Run a model in float64 throughout, whatever dtypes its code states, or in float32 without TF32."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from oto._torch import TorchDispatchMode, tree_map, tree_map_only
from oto.slim.copying import copied

aten = torch.ops.aten
_GROUPED_MM = getattr(getattr(aten, "_grouped_mm", None), "default", None)  # torch before 2.8 has none


class _Wide(TorchDispatchMode):
    """Runs every computation in float64, even if the model's code states a narrower dtype.

    Casts to a narrower float become casts to float64. Tensors created or promoted without a dtype are float64. Other
    operands, such as parameters or numpy data, are widened as they are read, so a float32 model needs no float64 copy.
    Two models that differ only in where they round, such as a class and its exported graph, then agree up to float64
    rounding. Values are unchanged: a number that float32 cannot hold is rounded where the model rounds it
    (``torch.tensor(0.1)``), and nowhere else.
    """

    supports_higher_order_operators = True

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in _MOVES:  # do not widen a whole table to read a few of its entries
            return widened(op(*args, **(kwargs or {})))
        if op in _PRODUCTS and not kwargs and _is_large(args[_PRODUCTS[op]]):
            return _product(op, args)

        def of(shared: bool, x: Any) -> Any:  # the operator needs this very memory, not a copy
            return tree_map_only(torch.dtype, widened, x) if shared else tree_map(widened, x)

        shares = _shares(op)
        args = tuple(of(shared, x) for shared, x in zip_longest(shares.values(), args, fillvalue=True))[: len(args)]
        kwargs = {name: of(shares.get(name, True), x) for name, x in (kwargs or {}).items()}
        if op is aten._assert_tensor_metadata.default:  # torch.export's check of the dtype that it traced
            args, kwargs = tree_map_only(torch.dtype, lambda _: None, (args, kwargs))
        if op is _GROUPED_MM and args[0].dtype == torch.float64:
            return _grouped_mm(*args, **kwargs)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            result = op(*args, **kwargs)
        finally:
            torch.set_default_dtype(before)
        return widened(result) if op is aten.lift_fresh.default else result  # a literal that later calls may write into


WIDER = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}
_MOVES = {aten.embedding.default, aten.index_select.default, aten.gather.default}


_PRODUCTS = {aten.linear.default: 1, aten.matmul.default: 1, aten.mm.default: 1, aten.addmm.default: 2}
"""The position of the weight among the arguments."""
_BLOCK = 1 << 18
"""How many entries of a weight are widened at a time. They stay in the cache; allocating fresh pages for gigabytes of
float64 would take longer than the products."""


def _is_large(weight: Any) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter)
    return plain and weight.dim() == 2 and weight.dtype in WIDER and weight.numel() > _BLOCK


def _product(op: Any, args: tuple[Any, ...]) -> Tensor:
    """A product with a weight that is widened to float64 one block of output columns at a time."""
    if op is aten.addmm.default:
        bias, x, weight = args
    else:
        x, weight, bias = (*args, None)[:3]
        weight = weight.t() if op is aten.linear.default else weight
    x = widened(x)
    inner, outer = weight.shape
    y: Tensor = x.new_empty(*x.shape[:-1], outer)
    columns = max(1, _BLOCK // inner)
    scratch = x.new_empty(columns, inner)
    for start in range(0, outer, columns):
        part = weight[:, start : start + columns].t()
        y[..., start : start + columns] = x @ scratch[: len(part)].copy_(part).t()
    return y if bias is None else y + widened(bias)


def widened(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.to(WIDER[x.dtype]) if x.dtype in WIDER else x
    return WIDER.get(x, x) if isinstance(x, torch.dtype) else x


@cache
def _shares(op: Any) -> dict[str, bool]:
    """For each argument of an operator, whether the operator writes to its memory or returns a view of it."""
    schema = getattr(op, "_schema", None)  # higher-order operators have none
    return {a.name: a.alias_info is not None for a in schema.arguments} if schema else {}


def _grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """``F.grouped_mm``, for which there is no kernel in float64."""
    if offs is None:
        y = a @ b
        return y if bias is None else y + bias[:, None]
    ends = offs.tolist()
    groups = list(zip([0, *ends], ends, strict=False))
    if a.ndim == b.ndim == 2:
        return torch.stack([a[:, i:j] @ b[i:j] for i, j in groups])
    if b.ndim == 3:
        y = a.new_zeros(a.shape[0], b.shape[-1])
        for e, (i, j) in enumerate(groups):
            y[i:j] = a[i:j] @ b[e] if bias is None else a[i:j] @ b[e] + bias[e]
        return y
    y = b.new_zeros(a.shape[1], b.shape[1])
    for e, (i, j) in enumerate(groups):
        y[:, i:j] = a[e] @ b[:, i:j]
    return y


def throughout(module: nn.Module) -> AbstractContextManager[Any]:
    """Context manager in which a float64 module computes in float64 throughout; other modules compute as usual."""
    wide = dtype_of(module) == torch.float64
    return widening() if wide else nullcontext()


def widening() -> AbstractContextManager[Any]:
    """Context manager in which everything is computed in float64."""
    return _Wide()  # type: ignore[no-untyped-call]


# Two interfaces set whether float32 factors are rounded to TF32 (the default for convolutions on a GPU) or, on some
# CPUs, to bfloat16. The old one sets both, and cannot be read once the user has set the new one.
_TF32 = ("cuda.matmul", "cudnn")
_PRECISION = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")


@contextmanager
def without_tf32() -> Iterator[None]:
    """Context manager in which float32 products use full float32, whatever precision the user allowed for speed."""
    new = hasattr(torch.backends, "fp32_precision")  # since torch 2.9
    places = [(name, "fp32_precision") for name in _PRECISION if new] + [(name, "allow_tf32") for name in _TF32]
    before: list[tuple[Any, str, Any]] = []
    for path, name in places:
        place: Any = operator.attrgetter(path)(torch.backends)
        with suppress(RuntimeError):
            before.append((place, name, getattr(place, name)))
    try:
        for place, name, _ in before:
            setattr(place, name, "ieee" if name == "fp32_precision" else False)
        yield
    finally:
        for place, name, value in reversed(before):  # the new settings last: they are finer-grained
            setattr(place, name, value)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype in which a module computes: that of its first floating-point parameter."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def in_double(module: nn.Module) -> nn.Module:
    """A copy in float64 and complex128."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):  # without a copy in the narrow dtype first
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.dtype in WIDER:
            wider = tensor.detach().to(WIDER[tensor.dtype])
            plain = type(tensor) is Tensor
            memo[id(tensor)] = wider if plain else nn.Parameter(wider, tensor.requires_grad)
    return double_(copied(module, memo))


def double_(module: nn.Module) -> nn.Module:
    """Turn a module into float64 and complex128, in place."""
    module.double()
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_complex():  # ``Module.double`` leaves these as they are
            tensor.data = tensor.data.to(torch.complex128)
    return module


def double_input(dummy_input: Any) -> Any:
    """An example input in float64 and complex128."""

    def widen(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t.to(torch.complex128) if t.is_complex() else t

    return tree_map_only(Tensor, widen, dummy_input)
