"""Calls on which every rule is put to the test: at least one for each overload of each operator.

Tensors are written as their shapes and filled from a seed; in-place variants are made from the plain ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

import oto.axes.rules  # noqa: F401  registers the rules
from oto._torch import tree_map_only
from oto.axes.registry import RULES, find
from oto.axes.rules import pointwise as P
from tests.properties.commute import calls

with suppress(ImportError):
    import torchvision  # noqa: F401  registers operators of its own

aten = torch.ops.aten


@dataclass(frozen=True)
class T:
    """A tensor of a sample: random numbers of some kind."""

    shape: tuple[int, ...]
    kind: str = "normal"
    high: int = 0

    def fill(self, generator: torch.Generator, device: str) -> Tensor:
        if self.kind == "int":
            made = torch.randint(self.high, self.shape, generator=generator)
        elif self.kind == "bool":
            made = torch.rand(self.shape, generator=generator) < 0.5
        elif self.kind == "unit":
            made = torch.rand(self.shape, generator=generator, dtype=torch.float64) * 0.9 + 0.05
        else:
            made = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        if self.kind == "int32":
            made = torch.randint(self.high, self.shape, generator=generator, dtype=torch.int32)
        if self.kind in ("complex", "single"):
            made = made.to(torch.complex128 if self.kind == "complex" else torch.float32)
        return made.to(device)

    def __repr__(self) -> str:
        return f"{'' if self.kind == 'normal' else self.kind}{list(self.shape)}"


def x(*shape: int) -> T:
    return T(shape)


def unit(*shape: int) -> T:
    return T(shape, "unit")


def whole(high: int, *shape: int) -> T:
    return T(shape, "int", high)


def mask(*shape: int) -> T:
    return T(shape, "bool")


def imaginary(*shape: int) -> T:
    return T(shape, "complex")


def single(*shape: int) -> T:
    return T(shape, "single")


@dataclass(frozen=True)
class Sample:
    """One call.

    Attributes:
        device: ``"meta"`` for kernels that no CPU has: their relation and shapes are checked, not their numbers.
        values: Whether the numbers of the result mean anything.
        written: By a person; the others are made from schemas.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    values: bool = True
    written: bool = True

    def make(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed)
        return tree_map_only(T, lambda t: t.fill(generator, self.device), (self.args, dict(self.kwargs)))

    def __repr__(self) -> str:
        shown = [*map(repr, self.args), *(f"{k}={v!r}" for k, v in self.kwargs.items())]
        return f"{self.op}({', '.join(shown)})"


CPU_HAS_NONE = "a CUDA kernel: checked on meta tensors for its relation and shapes only"

# Overloads that no sample can call, each with the reason.
UNCALLABLE: dict[Any, str] = {
    aten.cuda.default: "it needs a GPU",
    aten.pin_memory.default: "it needs a GPU",
    aten.cudnn_convolution.default: "a CUDA kernel; its rule is that of aten.convolution",
    aten.cudnn_batch_norm.default: "a CUDA kernel; its rule is that of aten.native_batch_norm",
    aten.mm.dtype: "a CUDA kernel; its rule is that of aten.mm.default",
    aten.bmm.dtype: "a CUDA kernel; its rule is that of aten.bmm.default",
    aten.addmm.dtype: "a CUDA kernel; its rule is that of aten.addmm.default",
    aten.baddbmm.dtype: "a CUDA kernel; its rule is that of aten.baddbmm.default",
    aten.data.default: "only the interpreter of TorchScript calls it",
    aten.sort.Tensor: "only the interpreter of TorchScript calls it",
    aten.copy_.Tensor: "only the interpreter of TorchScript calls it",
    aten.copy_.int: "only the interpreter of TorchScript calls it",
    aten.copy_.float: "only the interpreter of TorchScript calls it",
    aten.scalar_tensor.default: "a tensor without dimensions",
}
# Overloads that only the interpreter of TorchScript calls, or that take shapes that nobody traces.
SCRIPT_ONLY = ("hacked_twin", "prim_", "list_Tensor", "Dict_Tensor", "Tensor_list", "sublist", "quantized", "names")


def overloads() -> Iterator[OpOverload]:
    """Every overload that some rule answers for and that takes or gives a tensor."""
    for key in RULES:
        if isinstance(key, OpOverload):
            yield key
        elif isinstance(key, OpOverloadPacket):
            for name in key.overloads():
                op = getattr(key, name)
                arguments = op._schema.arguments
                tensors = any("Tensor" in str(a.type) for a in [*arguments, *op._schema.returns])
                script = any(text in name for text in SCRIPT_ONLY) or name == "a"
                named = any(a.name == "names" or ("str" in str(a.type) and a.name == "dim") for a in arguments)
                out = any(a.is_out for a in arguments)
                if tensors and not (script or named or out) and op not in UNCALLABLE:
                    yield op


def _quantized() -> Iterator[Sample]:
    """Fake quantization: of a tensor as a whole, and by channel, with zero points in the range and out of it."""
    one = T((1,), "single"), T((1,), "int32", 9)
    for point in (0, 3, 8):
        yield Sample(aten.fake_quantize_per_tensor_affine.default, (single(3, 4), 0.1, point, 0, 8))
        yield Sample(aten.fake_quantize_per_tensor_affine_cachemask.default, (single(3, 4), 0.1, point, 0, 8))
    yield Sample(aten.fake_quantize_per_tensor_affine.tensor_qparams, (single(3, 4), *one, 0, 8))
    on = T((1,), "int32", 9)
    yield Sample(aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default, (single(3, 4), *one, on, 0, 8))
    learned = aten._fake_quantize_learnable_per_tensor_affine.default
    yield Sample(learned, (single(3, 4), single(1), single(1), -8, 7))
    for axis, points in ((0, T((3,), "int32", 9)), (1, T((4,), "int32", 9)), (1, single(4))):
        given = single(3, 4), single(points.shape[0]), points, axis, 0, 8
        yield Sample(aten.fake_quantize_per_channel_affine_cachemask.default, given)
        yield Sample(aten.fake_quantize_per_channel_affine.default, given)
    for axis in (0, 1):
        channels = single((3, 4)[axis])
        yield Sample(
            aten._fake_quantize_learnable_per_channel_affine.default, (single(3, 4), channels, channels, axis, -8, 7)
        )


# --- made from schemas ------------------------------------------------------------------------------------------------

BITS = ("bitwise", "__and__", "__or__", "__xor__")
UNIT = ("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "asin", "acos", "atanh", "erfinv", "logit", "pow",
        "float_power", "lgamma", "digamma", "acosh", "reciprocal")  # fmt: skip
BINARY = [((3, 4), (3, 4)), ((3, 4), (4,)), ((2, 3, 4), (3, 1)), ((3, 1), (1, 4)), ((3,), (2, 3)), ((3, 4), ())]
TERNARY = [((3, 4), (3, 4), (3, 4)), ((2, 3, 4), (3, 1), (4,)), ((3, 1), (4,), (3, 4))]
EXTRA = {
    "decimals": 1,
    "threshold": 0.1,
    "value": 0.3,
    "rounding_mode": "floor",
    "exponent": 2,
    "min": -0.3,
    "max": 0.4,
    "upper": 0.3,
    "lower": 0.1,
}
ENTRY_BY_ENTRY = {P.pointwise, P.mul, P.div, P.addcmul}


def _entry_by_entry(op: OpOverload) -> Iterator[Sample]:
    """Samples of a pointwise operator: every tensor argument that must be given, and the numbers beside them."""
    name = op.overloadpacket.__name__
    kind = "int" if name.startswith(BITS) else "unit" if name.rstrip("_") in UNIT else "normal"
    arguments = op._schema.arguments
    needed = [a for a in arguments if not a.has_default_value() or a.name in ("min", "max") or str(a.type) == "Tensor"]
    n = sum("Tensor" in str(a.type) for a in needed)
    for shapes in {1: [((3, 4),)], 2: BINARY, 3: TERNARY}[n]:
        if name.endswith("_") and not name.endswith("__") and torch.broadcast_shapes(*shapes) != torch.Size(shapes[0]):
            continue
        left = iter(shapes)
        args, kwargs = [], {}
        for a in needed:
            value: Any
            if "Tensor" in str(a.type):
                value = T(next(left), kind, 7 if kind == "int" else 0)
            else:
                value = 2 if kind == "int" else EXTRA.get(a.name, 0.7)
            if a.kwarg_only:
                kwargs[a.name] = value
            else:
                args.append(value)
        yield Sample(op, tuple(args), kwargs, written=False)


# --- written by hand --------------------------------------------------------------------------------------------------


def _written() -> Iterator[Sample]:
    def s(op: Any, *args: Any, **kwargs: Any) -> Sample:
        return Sample(op, args, kwargs)

    # products
    for first in ((5, 3), (2, 5, 3), (3,)):
        yield s(aten.linear.default, x(*first), x(4, 3))
        yield s(aten.linear.default, x(*first), x(4, 3), x(4))
    yield s(aten.mm.default, x(3, 4), x(4, 2))
    yield s(aten.bmm.default, x(2, 3, 4), x(2, 4, 5))
    yield s(aten.mv.default, x(3, 4), x(4))
    yield s(aten.dot.default, x(4), x(4))
    yield s(aten.outer.default, x(3), x(4))
    yield s(aten.ger.default, x(3), x(4))
    for bias in ((3, 5), (5,), (1, 5), (3, 1)):
        for named in ({}, {"beta": 0}, {"beta": 0.5, "alpha": 2}):
            yield s(aten.addmm.default, x(*bias), x(3, 4), x(4, 5), **named)
    yield s(aten.addmv.default, x(3), x(3, 4), x(4), beta=0.5)
    for bias in ((2, 3, 5), (5,), (3, 1)):
        yield s(aten.baddbmm.default, x(*bias), x(2, 3, 4), x(2, 4, 5))
    yield s(aten.baddbmm.default, x(2, 3, 5), x(2, 3, 4), x(2, 4, 5), beta=0)
    for a, b in [
        ((4,), (4,)),
        ((3, 4), (4,)),
        ((4,), (4, 3)),
        ((3, 4), (4, 5)),
        ((2, 3, 4), (4, 5)),
        ((3, 4), (2, 4, 5)),
        ((2, 1, 3, 4), (5, 4, 2)),
        ((2, 3, 4), (4,)),
        ((4,), (2, 4, 3)),
        ((2, 2, 3, 3), (2, 2, 3, 3)),
    ]:
        yield s(aten.matmul.default, x(*a), x(*b))
    for equation, *shapes in [
        ("ij,jk->ik", (2, 3), (3, 4)),
        ("ij,jk", (2, 3), (3, 4)),
        ("bhsd,bhtd->bhst", (2, 2, 3, 4), (2, 2, 5, 4)),
        ("...i,oi->...o", (2, 3, 4), (5, 4)),
        ("...ij,...jk->...ik", (2, 1, 3, 4), (5, 4, 2)),
        ("i,j,k->ijk", (2,), (3,), (4,)),
        ("ij->ji", (3, 4)),
        ("ij->", (3, 4)),
        ("ij->j", (3, 4)),
        ("ii->i", (3, 3)),
        ("ii", (3, 3)),
        ("i...->...", (3, 4, 2)),
        ("bi,oij,bj->bo", (2, 3), (4, 3, 5), (2, 5)),
        ("i j, j -> i", (3, 4), (4,)),
        ("...,...->...", (3, 4), (4,)),
        ("ba", (3, 4)),
        ("aB,Bc->ac", (2, 3), (3, 4)),
        ("abc,cd->abd", (2, 3, 1), (4, 5)),
    ]:
        yield s(aten.einsum.default, equation, [x(*shape) for shape in shapes])
    for chain in (
        [(3, 4), (4, 2), (2, 5)],
        [(2, 6), (6, 2), (2, 3), (3, 4)],
        [(4,), (4, 3), (3, 2)],
        [(2, 4), (4, 3), (3,)],
        [(3,), (3, 2), (2,)],
    ):
        yield s(aten.linalg_multi_dot.default, [x(*shape) for shape in chain])
        if all(len(shape) == 2 for shape in chain):
            yield s(aten.chain_matmul.default, [x(*shape) for shape in chain])

    # attention
    q, k, v = x(2, 4, 3, 2), x(2, 4, 5, 2), x(2, 4, 5, 3)
    for named in (
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": x(3, 5)},
        {"attn_mask": x(4, 3, 5)},
        {"attn_mask": x(2, 1, 3, 5), "scale": 0.5},
        {"attn_mask": x(2, 4, 1, 5)},
        {"dropout_p": 0.5},
    ):
        yield s(aten.scaled_dot_product_attention.default, q, k, v, **named)
    yield s(aten.scaled_dot_product_attention.default, x(3, 2), x(5, 2), x(5, 3))
    yield s(aten.scaled_dot_product_attention.default, x(4, 3, 2), x(2, 4, 5, 2), x(2, 4, 5, 3), scale=1.0)
    for named in (
        {},
        {"attn_mask": x(2, 6, 3, 5)},
        {"attn_mask": x(6, 3, 5), "scale": 0.5},
        {"attn_mask": x(2, 1, 3, 5)},
    ):
        yield s(
            aten.scaled_dot_product_attention.default,
            x(2, 6, 3, 2),
            x(2, 3, 5, 2),
            x(2, 3, 5, 4),
            enable_gqa=True,
            **named,
        )
    yield s(aten._scaled_dot_product_flash_attention_for_cpu.default, x(2, 4, 3, 2), x(2, 4, 5, 2), x(2, 4, 5, 2))
    yield s(aten._scaled_dot_product_flash_attention_for_cpu.default, x(2, 4, 3, 2), x(2, 4, 5, 2), x(2, 4, 5, 2),
            attn_mask=x(2, 4, 3, 5), scale=0.5)  # fmt: skip
    same = (x(2, 4, 3, 8), x(2, 4, 5, 8), x(2, 4, 5, 8))  # CPU_HAS_NONE
    yield Sample(aten._scaled_dot_product_flash_attention.default, same, {}, "meta")
    yield Sample(aten._scaled_dot_product_efficient_attention.default, (*same, None, True), {}, "meta")
    yield Sample(aten._scaled_dot_product_efficient_attention.default, (*same, x(2, 4, 3, 5), False), {}, "meta")
    yield Sample(aten._scaled_dot_product_cudnn_attention.default, (*same, None, True), {}, "meta")
    for op in (aten.softmax.int, aten.log_softmax.int, aten._safe_softmax.default):
        yield s(op, x(2, 3, 4), 1)
        yield s(op, x(2, 3, 4), -1)
    yield s(aten._softmax.default, x(2, 3, 4), -1, False)
    yield s(aten._log_softmax.default, x(2, 3, 4), 0, False)

    # convolutions
    for n, conv, transposed in [(1, aten.conv1d, aten.conv_transpose1d.default),
                                (2, aten.conv2d, aten.conv_transpose2d.input),
                                (3, aten.conv3d, aten.conv_transpose3d.input)]:  # fmt: skip
        size, kernel = (5, 4, 4)[:n], (3, 1, 2)[:n]
        one = [1] * n
        for groups, inner, outer in [(1, 3, 4), (4, 1, 1), (4, 1, 2), (2, 3, 2), (2, 2, 1)]:
            data, bias = x(2, groups * inner, *size), x(groups * outer)
            weight, back = x(groups * outer, inner, *kernel), x(groups * inner, outer, *kernel)
            tail = ([2] * n, one, one, groups)
            yield s(conv.default, data, weight, bias, *tail)
            yield s(conv.default, data, weight, None, *tail)
            yield s(conv.padding, data, weight, bias, one, "same", one, groups)
            yield s(transposed, data, back, bias, [2] * n, one, one, groups, one)
            yield s(aten.convolution.default, data, weight, bias, one, one, one, False, [0] * n, groups)
            yield s(aten.convolution.default, data, back, None, one, one, one, True, [0] * n, groups)
            yield s(conv.default, x(groups * inner, *size), weight, bias, one, one, one, groups)
        yield s(conv.default, x(2, 3, *size), x(4, 3, *kernel))
        for groups in (1, 2):  # nothing slides, or along some dimensions only
            for strides, padding in (([1] * n, [0] * n), ([2, 1, 1][:n], [0] * n), ([1] * n, [0, 1, 0][:n])):
                yield s(conv.default, x(2, 4, *size), x(6, 4 // groups, *one), x(6), strides, padding, one, groups)
        yield s(conv.padding, x(2, 3, *size), x(4, 3, *one), x(4), one, "same", one, 1)
        yield s(conv.default, x(2, 1, *size), x(1, 1, *kernel), x(1))
        yield s(transposed, x(3, *size), x(3, 4, *kernel), x(4))
    one = [1, 1]
    yield s(aten.mkldnn_convolution.default, single(2, 3, 4, 4), single(4, 3, 2, 2), single(4), [0, 0], one, one, 1)
    yield s(aten.mkldnn_convolution.default, single(2, 4, 4, 4), single(4, 1, 2, 2), None, [0, 0], one, one, 4)

    # norms
    for shape in ((4, 3), (4, 3, 5), (2, 3, 2, 2)):
        affine, running = (x(3), x(3)), (x(3), unit(3))
        for weight, bias in (affine, (None, None), (x(3), None)):
            yield s(aten.batch_norm.default, x(*shape), weight, bias, *running, False, 0.1, 1e-5, False)
            yield s(aten.batch_norm.default, x(*shape), weight, bias, *running, True, 0.1, 1e-5, False)
            yield s(aten.batch_norm.default, x(*shape), weight, bias, None, None, True, 0.1, 1e-5, False)
            if len(shape) > 2:
                yield s(aten.instance_norm.default, x(*shape), weight, bias, None, None, True, 0.1, 1e-5, False)
                yield s(aten.instance_norm.default, x(*shape), weight, bias, *running, False, 0.1, 1e-5, False)
        yield s(aten.native_batch_norm.default, x(*shape), *affine, *running, False, 0.1, 1e-5)
        yield s(aten.native_batch_norm.default, x(*shape), *affine, *running, True, 0.1, 1e-5)
        yield s(aten._native_batch_norm_legit.default, x(*shape), *affine, *running, False, 0.1, 1e-5)
        yield s(aten._native_batch_norm_legit.no_stats, x(*shape), *affine, True, 0.1, 1e-5)
        yield s(aten._native_batch_norm_legit_no_training.default, x(*shape), *affine, *running, 0.1, 1e-5)
    for weight, bias in ((x(4), x(4)), (x(4), None), (None, None)):
        yield s(aten.layer_norm.default, x(2, 3, 4), [4], weight, bias)
        yield s(aten.layer_norm.default, x(2, 3, 4), [4], weight, bias, 0.1)
        yield s(aten.native_layer_norm.default, x(2, 3, 4), [4], weight, bias, 1e-5)
        yield s(aten.group_norm.default, x(2, 4, 3), 2, weight, bias)
        yield s(aten.group_norm.default, x(2, 4, 3, 2), 4, weight, bias, 0.1)
        yield s(aten.group_norm.default, x(2, 4), 1, weight, bias)
        yield s(aten.native_group_norm.default, x(2, 4, 3), weight, bias, 2, 4, 3, 2, 1e-5)
    yield s(aten.layer_norm.default, x(2, 3, 4), [3, 4], x(3, 4), x(3, 4))
    yield s(aten.rms_norm.default, x(2, 3, 4), [4], x(4))
    yield s(aten.rms_norm.default, x(2, 3, 4), [4], x(4), 0.1)
    yield s(aten.rms_norm.default, x(2, 3, 4), [4])
    yield s(aten.rms_norm.default, x(2, 3, 4), [3, 4], x(3, 4))

    # look-ups
    yield s(aten.embedding.default, x(5, 3), whole(5, 2, 4))
    yield s(aten.embedding.default, x(5, 3), whole(5, 4), 1)
    for mode in (0, 1, 2):
        bags = (x(5, 3), whole(5, 6), torch.tensor([0, 2, 3]), False, mode, False)
        yield s(aten.embedding_bag.default, *bags)
        yield s(aten.embedding_bag.padding_idx, *bags, None, False, None)
        yield s(aten._embedding_bag.default, *bags)
        yield s(aten._embedding_bag_forward_only.default, *bags)
    yield s(aten.embedding_bag.default, x(5, 3), whole(5, 6), torch.tensor([0, 2, 3]), False, 0, False, x(6))
    for dim in (0, 1, -1):
        yield s(aten.index_select.default, x(3, 4, 5), dim, whole(3, 2))
    yield s(aten.index_select.default, x(), 0, whole(1, 1))
    for op in (aten.index.Tensor, aten._unsafe_index.Tensor):
        yield s(op, x(3, 4, 5), [whole(3, 2)])
        yield s(op, x(3, 4, 5), [None, whole(4, 2, 3)])
        yield s(op, x(3, 4, 5), [whole(3, 2), None, whole(5, 2)])
        yield s(op, x(3, 4, 5), [None, whole(4, 2, 1), whole(5, 3)])
        yield s(op, x(3, 4), [whole(3, 2, 1), whole(4, 1, 2)])
    yield s(aten.index.Tensor, x(3, 4), [mask(3)])
    yield s(aten.index.Tensor, x(3, 4), [mask(3, 4)])
    yield s(aten.gather.default, x(3, 4), 1, whole(4, 3, 2))
    yield s(aten.one_hot.default, whole(4, 2, 3), 5)

    # entry by entry, with a shape or a rule of its own
    for clamp in ("clamp", "clip"):
        yield s(getattr(aten, clamp).default, x(3, 4), 0.2)
        yield s(getattr(aten, clamp).default, x(3, 4), None, 0.2)
        yield s(getattr(aten, clamp).Tensor, x(3, 4), x(4), None)
        yield s(getattr(aten, clamp).Tensor, x(3, 4), None, x(3, 1))
    yield s(aten.add.Tensor, x(3, 4), x(4), alpha=-1)
    yield s(aten.add.Tensor, whole(5, 3, 4), whole(5, 4))
    yield s(aten.bitwise_not.default, mask(3, 4))
    yield s(aten.logical_and.default, mask(3, 4), mask(4))
    yield s(aten.gelu.default, x(3, 4), approximate="tanh")
    yield s(aten.threshold.default, x(3, 4), 0.0, -1.0)
    yield s(aten.vdot.default, x(4), x(4))
    for op in ("linalg_matrix_exp", "linalg_inv_ex", "linalg_qr", "_linalg_svd", "_linalg_eigh", "linalg_eig",
               "_linalg_det", "_linalg_slogdet", "linalg_lu_factor_ex", "linalg_cholesky_ex"):  # fmt: skip
        yield s(getattr(aten, op).default, x(3, 3))
    yield s(aten.linalg_householder_product.default, x(4, 3), x(3))
    yield s(aten._linalg_solve_ex.default, x(3, 3), x(3, 2))
    yield s(aten.linalg_lstsq.default, x(4, 3), x(4, 2))
    yield s(aten.linalg_pinv.atol_rtol_tensor, x(4, 3))
    for op in ("tanh", "sigmoid", "silu", "gelu", "hardswish"):
        yield s(getattr(aten, f"{op}_backward").default, x(3, 4), x(3, 4))
    yield s(aten.threshold_backward.default, x(3, 4), x(3, 4), 0.0)
    yield s(aten.softplus_backward.default, x(3, 4), x(3, 4), 1.0, 20.0)
    yield s(aten.leaky_relu_backward.default, x(3, 4), x(3, 4), 0.1, False)
    for c, a, b in [((3, 4), (3, 4), (3, 4)), ((4,), (3, 1), (3, 4)), ((3, 1), (2, 1, 4), ())]:
        yield s(aten.where.self, mask(*c), x(*a), x(*b))
        yield s(aten.where.ScalarSelf, mask(*c), 0.0, x(*b))
        yield s(aten.where.ScalarOther, mask(*c), x(*a), 0.5)
    yield s(aten.where.Scalar, mask(3, 4), 1.0, 0.0)
    for value in (0.0, -1.0):
        yield s(aten.masked_fill.Scalar, x(3, 4), mask(4), value)
    yield s(aten.masked_fill.Scalar, x(4), mask(3, 4), 0.5)
    yield s(aten.masked_fill.Tensor, x(3, 4), mask(3, 1), x())
    for data, weight in [((2, 3, 4), (3,)), ((2, 3), (1,)), ((3,), (1,)), ((), (1,))]:
        yield s(aten.prelu.default, x(*data), x(*weight))
    yield s(aten._prelu_kernel.default, x(2, 3, 4), x(1, 3, 1))
    for dim in (-1, 0, 1):
        yield s(aten.glu.default, x(4, 6), dim)
    for op in (aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout):
        yield s(op.default, x(3, 4, 2), 0.5, False)
        yield s(op.default, x(3, 4, 2), 0.5, True)
    yield s(aten.rrelu.default, x(3, 4))
    yield s(aten.rrelu.default, x(3, 4), 0.1, 0.4, True)
    for op in (
        aten.clone,
        aten.contiguous,
        aten.detach,
        aten.alias,
        aten.lift_fresh,
        aten.lift_fresh_copy,
        aten.lift,
        aten.positive,
        aten.conj,
        aten.resolve_conj,
        aten.resolve_neg,
        aten.real,
        aten.cpu,
        aten._cast_Float,
        aten.conj_physical,
        aten._to_copy,
    ):
        yield s(op.default, x(3, 4))
    for op in (
        aten.conj,
        aten._conj,
        aten.conj_physical,
        aten.real,
        aten.view_as_real,
        aten.view_as_real_copy,
        aten.angle,
    ):
        yield s(op.default, imaginary(3, 4))
    yield s(aten.view_as_complex.default, x(3, 4, 2))
    yield s(aten.view_as_complex_copy.default, x(3, 4, 2))
    yield s(aten.to.dtype, x(3, 4), torch.float32)
    yield s(aten.to.dtype, x(3, 4), torch.bool)
    yield s(aten.to.device, x(3, 4), torch.device("cpu"), torch.float64)
    yield s(aten.to.dtype_layout, x(3, 4), dtype=torch.int64)
    yield s(aten.to.other, x(3, 4), x(2))
    yield s(aten._to_copy.default, x(3, 4), dtype=torch.int32)
    yield s(aten.type_as.default, x(3, 4), whole(3, 2))
    yield s(aten.view.dtype, x(3, 4), torch.int64)
    yield s(aten.view.dtype, x(3, 4), torch.int32)
    yield s(aten.copy.default, x(3, 4), x(4))
    yield s(aten.copy.default, x(3, 4), whole(3, 3, 1))
    yield s(aten.copy_.default, x(3, 4), x(4))
    yield s(aten.fill.Scalar, x(3, 4), 1 / 3)
    yield s(aten.fill.Scalar, whole(5, 3, 4), 0.5)
    yield s(aten.fill.Tensor, x(3, 4), x())
    yield s(aten.zero.default, x(3, 4))

    # pooling, resampling, padding
    for n in (1, 2, 3):
        size = (5, 4, 6)[:n]
        for lead in ((2, 3), (3,)):
            data = x(*lead, *size)
            pools = ["max_pool{}d", "max_pool{}d_with_indices", "avg_pool{}d"]
            for op in (getattr(aten, p.format(n), None) for p in pools):
                if op is not None:
                    yield s(op.default, data, [2] * n)
                    yield s(op.default, data, [2] * n, [1] * n, [1] * n)
            for p in ("adaptive_avg_pool{}d", "adaptive_max_pool{}d", "_adaptive_avg_pool{}d"):
                if hasattr(aten, p.format(n)):
                    yield s(getattr(aten, p.format(n)).default, data, [2] * n)
            for p in ("reflection_pad{}d", "replication_pad{}d"):
                yield s(getattr(aten, p.format(n)).default, data, [1] * (2 * n))
            if n > 1:
                fractional = getattr(aten, f"fractional_max_pool{n}d").default
                yield s(fractional, data, [2] * n, [2] * n, T((*((1,) if len(lead) == 1 else (2,)), 3, n), "unit"))
        data = x(2, 3, *size)
        for p in ("upsample_nearest{}d", "_upsample_nearest_exact{}d"):
            yield s(getattr(aten, p.format(n)).default, data, [7] * n)
            yield s(getattr(aten, p.format(n)).vec, data, None, [2.0] * n)
        linear = getattr(aten, ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d")[n - 1])
        for align in (False, True):
            yield s(linear.default, data, [7] * n, align)
            yield s(linear.vec, data, None, align, [2.0] * n)
    for op in (aten.upsample_bicubic2d, aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa):
        yield s(op.default, x(2, 3, 4, 5), [6, 3], False)
        yield s(op.vec, x(2, 3, 4, 5), None, False, [2.0, 2.0])
    yield s(aten._pad_circular.default, x(2, 3, 4), [1, 2])
    for pads in ([1, 2], [0, 0, 2, 1], [0, 1, 1, 0, 2, 2], [0, -1], [-1, 2, 1, -1]):
        for value in (0.0, 0.5):
            yield s(aten.constant_pad_nd.default, x(2, 3, 4), pads, value)
            yield s(aten.pad.default, x(2, 3, 4), pads, "constant", value)
    for mode in ("reflect", "replicate", "circular"):
        yield s(aten.pad.default, x(2, 3, 4), [1, 1], mode)
    for lead in ((), (2,), (2, 2)):
        yield s(aten.pixel_shuffle.default, x(*lead, 8, 2, 3), 2)
        yield s(aten.pixel_unshuffle.default, x(*lead, 2, 4, 6), 2)
    for op in (aten.channel_shuffle, aten.native_channel_shuffle):
        yield s(op.default, x(2, 6, 2, 2), 3)

    # windows, grids, regions
    for lead in ((), (2,)):
        for stride in (1, 2):
            tail = ([2, 2], [1, 1], [1, 0], [stride, stride])
            yield s(aten.im2col.default, x(*lead, 3, 4, 5), *tail)
            windows = (4 // stride + 1) * ((5 - 2) // stride + 1)
            yield s(aten.col2im.default, x(*lead, 12, windows), [4, 5], *tail)
    for sizes, dim, size, step in (((3, 6, 4), 1, 3, 2), ((3, 6, 4), -1, 2, 1), ((5,), 0, 2, 3)):
        windows = list(sizes)
        windows[dim] = (sizes[dim] - size) // step + 1
        yield s(aten.unfold_backward.default, x(*windows, size), list(sizes), dim, size, step)
    yield s(aten.set_.source_Tensor, x(3, 4), x(2, 5))
    yield from _quantized()
    yield s(aten.unfold.default, x(3, 6, 4), 1, 3, 2)
    yield s(aten.unfold.default, x(3, 6, 4), -1, 2, 1)
    for mode in (0, 1):
        yield s(aten.grid_sampler.default, x(2, 3, 4, 5), x(2, 3, 2, 2), mode, 0, False)
        yield s(aten.grid_sampler_2d.default, x(2, 3, 4, 5), x(2, 3, 2, 2), mode, 1, True)
        yield s(aten.grid_sampler_3d.default, x(2, 3, 4, 5, 3), x(2, 3, 2, 2, 3), mode, 0, False)
    yield s(aten.affine_grid_generator.default, x(2, 2, 3), [2, 3, 4, 5], False)
    yield s(aten.affine_grid_generator.default, x(2, 3, 4), [2, 3, 4, 5, 2], True)
    if hasattr(torch.ops.torchvision, "deform_conv2d"):
        regions = torch.tensor([[0, 0.5, 0.5, 3.5, 3.0], [1, 1.0, 0.0, 2.0, 3.0]], dtype=torch.float64)
        vision = torch.ops.torchvision
        yield s(vision.roi_align.default, x(2, 3, 5, 5), regions, 1.0, 2, 2, 2, False)
        yield s(vision.roi_pool.default, x(2, 3, 5, 5), regions, 1.0, 2, 2)
        for groups, shifts in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (2, 4), (4, 4)):
            for use in (False, True):
                yield s(
                    vision.deform_conv2d.default,
                    x(2, 4, 4, 4),
                    x(4, 4 // groups, 2, 2),
                    x(2, 8 * shifts, 3, 3),
                    x(2, 4 * shifts, 3, 3) if use else x(2, 1),
                    x(4),
                    1,
                    1,
                    0,
                    0,
                    1,
                    1,
                    groups,
                    shifts,
                    use,
                )

    # Fourier transforms
    wave, line = imaginary(3, 4, 5), x(3, 4, 5)
    yield s(aten._fft_c2c.default, wave, [1], 0, True)
    yield s(aten._fft_r2c.default, line, [1, 2], 0, True)
    yield s(aten._fft_c2r.default, wave, [2], 0, 8)
    for op in (aten.fft_fft, aten.fft_ifft, aten.fft_rfft, aten.fft_irfft):
        yield s(op.default, wave if op in (aten.fft_irfft, aten.fft_ifft) else line)
        yield s(op.default, wave if op in (aten.fft_irfft, aten.fft_ifft) else line, 6, 1)
    for op in (aten.fft_fft2, aten.fft_ifft2, aten.fft_rfft2, aten.fft_irfft2, aten.fft_fftn, aten.fft_ifftn,
               aten.fft_rfftn, aten.fft_irfftn):  # fmt: skip
        yield s(op.default, line)
        yield s(op.default, line, None, [0, 1])
    for op in (aten.fft_fftshift, aten.fft_ifftshift):
        yield s(op.default, line)
        yield s(op.default, line, [1])

    # reductions
    for dims, keep in [([0], False), ([1, -1], True), ([-2], True), ([], False), (None, True)]:
        yield s(aten.sum.dim_IntList, x(2, 3, 4), dims, keep)
        yield s(aten.mean.dim, x(2, 3, 4), dims, keep)
        for order in (2, 1, 3.0, 0, float("inf"), -1):
            yield s(aten.linalg_vector_norm.default, x(2, 3, 4), order, dims, keep)
        if dims:
            yield s(aten.amax.default, x(2, 3, 4), dims, keep)
            yield s(aten.amin.default, x(2, 3, 4), dims, keep)
            yield s(aten.logsumexp.default, x(2, 3, 4), dims, keep)
            yield s(aten.nansum.default, x(2, 3, 4), dims, keep)
            yield s(aten.nanmean.default, x(2, 3, 4), dims, keep)
            yield s(aten.any.dims, mask(2, 3, 4), dims, keep)
            yield s(aten.all.dims, mask(2, 3, 4), dims, keep)
            yield s(aten.count_nonzero.dim_IntList, x(2, 3, 4), dims)
            yield s(aten.norm.ScalarOpt_dim, x(2, 3, 4), 2, dims, keep)
            yield s(aten.norm.ScalarOpt_dim_dtype, x(2, 3, 4), 3, dims, keep, dtype=torch.float64)
            for op in (aten.std, aten.var, aten.std_mean, aten.var_mean):
                yield s(op.dim, x(2, 3, 4), dims, True, keep)
                yield s(op.dim, x(2, 3, 4), dims, False)
                yield s(op.correction, x(2, 3, 4), dims, correction=1, keepdim=keep)
    for op in (aten.sum, aten.mean, aten.max, aten.min, aten.median, aten.nanmedian, aten.prod, aten.count_nonzero,
               aten.std, aten.var, aten.std_mean, aten.var_mean, aten.amax, aten.amin, aten.argmax, aten.argmin,
               aten.nansum, aten.nanmean, aten.linalg_vector_norm):  # fmt: skip
        yield s(op.default, x(2, 3))
    yield s(aten.any.default, mask(2, 3))
    yield s(aten.all.default, mask(2, 3))
    yield s(aten._is_all_true.default, mask(2, 3))
    yield s(aten._is_any_true.default, mask(2, 3))
    yield s(aten.mean.default, x(2, 3), dtype=torch.float64)
    yield s(aten.norm.Scalar, x(2, 3), 2)
    yield s(aten.norm.ScalarOpt_dtype, x(2, 3), 2, dtype=torch.float64)
    for dim, keep in ((0, False), (-1, True)):
        for op in (
            aten.max.dim,
            aten.min.dim,
            aten.median.dim,
            aten.nanmedian.dim,
            aten.mode.default,
            aten.argmax.default,
            aten.argmin.default,
            aten.prod.dim_int,
        ):
            yield s(op, x(2, 3, 4), dim, keep)
        yield s(aten.any.dim, mask(2, 3, 4), dim, keep)
        yield s(aten.all.dim, mask(2, 3, 4), dim, keep)
        yield s(aten.kthvalue.default, x(2, 3, 4), 2, dim, keep)
        yield s(aten.topk.default, x(2, 3, 4), 2, dim)
        for op in (aten.cumsum, aten.cumprod, aten.logcumsumexp, aten.cummax, aten.cummin, aten.sort, aten.argsort):
            yield s(op.default, x(2, 3, 4), dim)
        yield s(aten.sort.stable, x(2, 3, 4), stable=True, dim=dim)
        yield s(aten.argsort.stable, x(2, 3, 4), stable=True, dim=dim)
        yield s(aten.flip.default, x(2, 3, 4), [dim])
    yield s(aten.var.default, x(0, 3))
    yield s(aten.var.correction, imaginary(3, 4), [1])
    yield s(aten.mode.default, x(2, 3))
    for correction in (None, 0, 2, 5):
        yield s(aten.var.correction, x(2, 3, 4), [1], correction=correction)
        yield s(aten.std.correction, x(2, 3, 4), None, correction=correction)
    yield s(aten.flip.default, x(2, 3, 4), [0, 2])
    yield s(aten.msort.default, x(2, 3))

    # shapes
    for old, new in [
        ((6, 4), (2, 3, 4)),
        ((2, 3, 4), (6, 4)),
        ((2, 3, 4), (2, 12)),
        ((4, 6), (6, 4)),
        ((4, 6), (2, 2, -1)),
        ((3, 1, 4), (3, 4)),
        ((12,), (3, 4)),
        ((2, 3, 4), (-1,)),
        ((1, 1), (1,)),
        ((8, 3), (2, 4, 1, 3)),
    ]:
        for op in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
            yield s(op, x(*old), list(new))
    yield s(aten._reshape_alias.default, x(6, 4), [2, 3, 4], [12, 4, 1])
    yield s(aten.view_as.default, x(6, 4), x(2, 3, 4))
    yield s(aten.reshape_as.default, x(2, 12), x(2, 3, 4))
    yield s(aten.flatten.using_ints, x(2, 3, 4), 1)
    yield s(aten.flatten.using_ints, x(2, 3, 4), 0, -2)
    yield s(aten.flatten.using_ints, x(2, 3, 4))
    yield s(aten.ravel.default, x(2, 3))
    yield s(aten.unflatten.int, x(2, 12, 3), 1, [3, 4])
    yield s(aten.unflatten.int, x(2, 12), -1, [2, -1, 3])
    for op in (aten.squeeze, aten.squeeze_copy):
        yield s(op.default, x(1, 3, 1, 4))
        yield s(op.default, x(3, 4))
        yield s(op.dim, x(3, 1, 4), 1)
        yield s(op.dim, x(3, 1, 4), 0)
        yield s(op.dims, x(1, 3, 1), [0, -1])
        yield s(op.dims, x(1, 3, 1), [0, 1])
    for dim in (0, 1, -1):
        yield s(aten.unsqueeze.default, x(3, 4), dim)
        yield s(aten.unsqueeze_copy.default, x(3, 4), dim)
    yield s(aten.permute.default, x(2, 3, 4), [2, 0, 1])
    yield s(aten.permute.default, x(2, 3, 4), [-1, 1, 0])
    for name in ("transpose", "swapaxes", "swapdims"):
        yield s(getattr(getattr(aten, name), "int" if name == "transpose" else "default"), x(2, 3, 4), 0, -1)
    for op in (aten.adjoint, aten.mT, aten.mH, aten.t, aten.numpy_T):
        yield s(op.default, x(3, 4))
    yield s(aten.t.default, x(3))
    for name in ("movedim", "moveaxis"):
        yield s(getattr(aten, name).int, x(2, 3, 4), 0, -1)
        yield s(getattr(aten, name).intlist, x(2, 3, 4), [0, 2], [1, 0])
    for old, new in [((3, 1), (3, 4)), ((3,), (2, 3)), ((1, 3), (-1, 3)), ((1, 3, 1), (2, 3, 4)), ((), (2, 3))]:
        yield s(aten.expand.default, x(*old), list(new))
        yield s(aten.broadcast_to.default, x(*old), list(new))
    yield s(aten.expand_as.default, x(3, 1), x(2, 3, 4))
    yield s(aten.broadcast_tensors.default, [x(3, 1), x(4), x(2, 1, 1)])
    for repeats in ([2, 3], [1, 2], [2, 1, 3]):
        yield s(aten.repeat.default, x(3, 4), repeats)
        yield s(aten.tile.default, x(3, 4), repeats)
    yield s(aten.tile.default, x(2, 3, 4), [2])
    yield s(aten.repeat_interleave.self_int, x(3, 4), 2, 0)
    yield s(aten.repeat_interleave.self_int, x(3, 4), 3, -1)
    yield s(aten.repeat_interleave.self_int, x(3, 4), 2)
    for op in (aten.cat, aten.concat, aten.concatenate):
        yield s(op.default, [x(2, 3), x(4, 3)])
        yield s(op.default, [x(2, 3), x(2, 1), x(2, 4)], -1)
        yield s(op.default, [x(0), x(2, 3), x(2, 3)], 1)
    twice = x(2, 3)
    yield s(aten.cat.default, [twice, twice], 1)
    yield s(aten.stack.default, [x(3, 4), x(3, 4)])
    yield s(aten.stack.default, [x(3, 4), x(3, 4), x(3, 4)], -1)
    for dim in (0, -1):
        yield s(aten.split.Tensor, x(6, 2, 6), 4, dim)
        yield s(aten.unsafe_split.Tensor, x(6, 2, 6), 2, dim)
        yield s(aten.split.sizes, x(6, 2, 6), [2, 3, 1], dim)
        yield s(aten.split.default, x(6, 2, 6), [2, 3, 1], dim)
        yield s(aten.split_with_sizes.default, x(6, 2, 6), [4, 2], dim)
        yield s(aten.unsafe_split_with_sizes.default, x(6, 2, 6), [3, 3], dim)
        yield s(aten.chunk.default, x(6, 2, 6), 2, dim)
        yield s(aten.unsafe_chunk.default, x(6, 2, 6), 4, dim)
        yield s(aten.tensor_split.sections, x(6, 2, 7), 3, dim)
        yield s(aten.tensor_split.indices, x(6, 2, 6), [2, 3], dim)
        yield s(aten.tensor_split.tensor_indices_or_sections, x(6, 2, 6), torch.tensor([2, 4]), dim)
        yield s(aten.unbind.int, x(3, 2, 3), dim)
        for index in (0, 2, -1, -3):
            yield s(aten.select.int, x(6, 2, 6), dim, index)
        for start, end in [(0, 3), (2, 5), (None, -2), (-4, -1), (3, 99), (None, None), (-3, None)]:
            yield s(aten.slice.Tensor, x(6, 2, 6), dim, start, end)
        yield s(aten.slice.Tensor, x(6, 2, 6), dim, 1, 6, 2)
        yield s(aten.narrow.default, x(6, 2, 6), dim, 2, 3)
        yield s(aten.narrow.default, x(6, 2, 6), dim, -3, 2)
        yield s(aten.narrow.Tensor, x(6, 2, 6), dim, torch.tensor(1), 3)
        yield s(aten.roll.default, x(3, 4, 5), [1], [dim])
    yield s(aten.roll.default, x(3, 4), [1, 2], [0, 1])
    yield s(aten.roll.default, x(3, 4), [1])
    for op in (aten.diagonal, aten.diag, aten.diag_embed, aten.tril, aten.triu, aten.rot90, aten.trace):
        yield s(op.default, x(3, 4) if op is not aten.diag_embed else x(3))
    yield s(aten.meshgrid.default, [x(2), x(3)])
    yield s(aten.meshgrid.indexing, [x(2), x(3), x(4)], indexing="xy")

    # from nowhere
    f64 = {"dtype": torch.float64}
    for name in ("zeros", "ones", "empty", "rand", "randn"):
        op = getattr(aten, name)
        yield Sample(op.memory_format if name == "empty" else op.default, ([3, 4],), f64, values=name != "empty")
    for name in ("zeros", "ones", "empty"):
        yield Sample(getattr(aten, f"new_{name}").default, (x(2), [3, 4]), values=name != "empty")
        yield Sample(getattr(aten, f"{name}_like").default, (x(3, 4),), values=name != "empty")
    yield s(aten.full.default, [3, 4], 0.5, **f64)
    yield s(aten.full.default, [3, 4], 1 / 3, **f64)
    yield s(aten.new_full.default, x(2), [3, 4], 0.5)
    yield s(aten.full_like.default, x(3, 4), 0.5)
    generator = {"generator": torch.Generator()}
    for op in (aten.rand.generator, aten.randn.generator):
        yield s(op, [3, 4], **generator)
    yield s(aten.randint.default, 5, [3, 4])
    yield s(aten.randint.low, 1, 5, [3, 4])
    yield s(aten.randint.generator, 5, [3, 4], **generator)
    yield s(aten.randint.low_generator, 1, 5, [3, 4], **generator)
    yield s(aten.randperm.default, 4)
    yield s(aten.randperm.generator, 4, **generator)
    yield s(aten.arange.default, 4)
    yield s(aten.arange.start, 1, 4)
    yield s(aten.arange.start_step, 1, 8, 2)
    yield s(aten.range.default, 0, 4)
    yield s(aten.range.step, 0, 4, 2)
    for op in (aten.linspace, aten.logspace):
        yield s(op.default, 0, 1, 4)
        yield s(op.Tensor_Tensor, x(), x(), 4)
        yield s(op.Tensor_Scalar, x(), 1, 4)
        yield s(op.Scalar_Tensor, 0, x(), 4)
    yield s(aten.eye.default, 3)
    yield s(aten.eye.m, 3, 4)
    yield s(aten.tril_indices.default, 3, 4)
    yield s(aten.triu_indices.default, 3, 4)
    for window in ("bartlett", "hann", "hamming", "blackman"):
        op = getattr(aten, f"{window}_window")
        yield s(op.default, 4)
        yield s(op.periodic, 4, False)
    yield s(aten.hamming_window.periodic_alpha, 4, False, 0.5)
    yield s(aten.hamming_window.periodic_alpha_beta, 4, False, 0.5, 0.5)


def _fixed() -> Iterator[Sample]:
    """Operators that keep all they touch."""

    def s(op: Any, *args: Any, **kwargs: Any) -> Sample:
        return Sample(op, args, kwargs)

    data, index, source = x(3, 4), whole(3, 2), x(2, 4)
    yield s(aten.nonzero.default, data)
    yield s(aten.masked_select.default, data, mask(3, 4))
    yield s(aten.unique_consecutive.default, data)
    yield s(aten._unique2.default, data)
    yield s(aten.bincount.default, whole(3, 5))
    yield s(aten.searchsorted.Tensor, x(4), data)
    yield s(aten.searchsorted.Scalar, x(4), 0.1)
    yield s(aten.bucketize.Tensor, data, x(4))
    yield s(aten.bucketize.Scalar, 0.1, x(4))
    yield s(aten.index_put.default, data, [index], source)
    yield s(aten.index_add.default, data, 0, index, source)
    yield s(aten.index_copy.default, data, 0, index, source)
    yield s(aten.index_fill.int_Tensor, data, 0, index, x())
    yield s(aten.index_fill_.int_Tensor, data, 0, index, x())
    yield s(aten.index_fill.int_Scalar, data, 0, index, 0.0)
    classes = whole(4, 3)
    for loss in (aten.nll_loss, aten.nll_loss_forward, aten.nll_loss_nd):
        yield s(loss.default, data, classes, None, 1, -100)
    for loss in (aten.nll_loss2d, aten.nll_loss2d_forward):
        yield s(loss.default, x(2, 4, 3, 2), whole(4, 2, 3, 2), None, 1, -100)
    yield s(aten.multi_margin_loss.default, data, classes)
    yield s(aten.multilabel_margin_loss.default, data, whole(4, 3, 4))
    yield s(aten.multilabel_margin_loss_forward.default, data, whole(4, 3, 4), 1)
    labels, lengths = torch.tensor([[1, 2], [2, 1]]), torch.tensor([5, 5])
    for loss in (aten.ctc_loss, aten._ctc_loss):
        yield s(loss.IntList if loss is aten.ctc_loss else loss.default, x(5, 2, 4), labels, [5, 5], [2, 2])
        yield s(loss.Tensor, x(5, 2, 4), labels, lengths, torch.tensor([2, 2]))
    places = whole(3, 2, 4)
    yield s(aten.scatter.src, data, 0, places, source)
    yield s(aten.scatter.value, data, 0, places, 0.5)
    yield s(aten.scatter.reduce, data, 0, places, source, reduce="add")
    yield s(aten.scatter.value_reduce, data, 0, places, 0.5, reduce="add")
    yield s(aten.scatter_.value_reduce, data, 0, places, 0.5, reduce="add")
    yield s(aten.scatter_add.default, data, 0, places, source)
    yield s(aten.scatter_reduce.two, data, 0, places, source, "sum")
    yield s(aten.masked_scatter.default, data, mask(3, 4), x(12))
    yield s(aten.select_scatter.default, data, x(4), 0, 1)
    yield s(aten.slice_scatter.default, data, source, 0, 0, 2)
    yield s(aten.diagonal_scatter.default, data, x(3))
    yield s(aten.take.default, data, index)
    yield s(aten.take_along_dim.default, data, places, 0)
    yield s(aten.as_strided.default, data, [2, 2], [1, 2])
    yield s(aten.as_strided_.default, data, [2, 2], [1, 2])
    generator = {"generator": torch.Generator()}
    chance = unit(3, 4)
    yield s(aten.bernoulli.default, chance)
    yield s(aten.bernoulli.p, data, 0.5)
    yield s(aten.bernoulli.Tensor, data, chance)
    yield s(aten.bernoulli_.Tensor, data, chance)
    yield s(aten.bernoulli_.float, data, 0.5)
    for op in (aten.rand_like, aten.randn_like):
        yield s(op.default, data)
        yield s(op.generator, data, **generator)
    yield s(aten.randint_like.default, data, 5)
    yield s(aten.randint_like.Tensor, data, torch.tensor(5))
    yield s(aten.randint_like.low_dtype, data, 1, 5)
    yield s(aten.randint_like.generator, data, 5, **generator)
    yield s(aten.randint_like.Tensor_generator, data, torch.tensor(5), **generator)
    yield s(aten.randint_like.low_generator_dtype, data, 1, 5, **generator)
    yield s(aten.multinomial.default, chance, 2)
    yield s(aten.normal.Tensor_float, data, 1.0)
    yield s(aten.normal.float_Tensor, 0.0, chance)
    yield s(aten.normal.Tensor_Tensor, data, chance)
    yield s(aten.normal.float_float, 0.0, 1.0, [3, 4])
    for op in (aten.normal_, aten.uniform, aten.uniform_, aten.exponential, aten.exponential_, aten.random_):
        yield s(op.default, data)
    yield s(aten.random.default, data)
    for op in (aten.random, aten.random_):
        yield s(getattr(op, "from"), data, 1, 5)
        yield s(op.to, data, 5)
    yield s(aten.native_dropout.default, data, 0.5, True)


def _indexed() -> Iterator[Sample]:
    """Writes and products by index, distances, recurrent layers."""

    def s(op: Any, *args: Any, **kwargs: Any) -> Sample:
        return Sample(op, args, kwargs)

    def borders(*ends: int) -> Tensor:
        return torch.tensor(ends, dtype=torch.int32)

    yield s(aten.index.Tensor, x(3, 4, 2), [mask(3)])
    yield s(aten.index.Tensor, x(3, 4, 2), [mask(3, 4)])
    yield s(aten.index.Tensor, x(2, 3, 4), [None, mask(3)])
    for shape, dim, index in (((3, 4), 1, (3, 2)), ((3, 4, 2), 1, (3, 5, 2)), ((4, 3), 0, (2, 2)), ((4,), 0, (3,))):
        yield s(aten.gather.default, x(*shape), dim, whole(shape[dim], *index))
    for data, dim, index, source in (
        (x(4, 3), 0, (4, 3), x(4, 3)), (x(4, 3), 0, (2, 3), x(2, 3)), (x(3, 4), -1, (3, 2), x(3, 5)),
        (x(4), 0, (2,), x(2)), (x(4, 3), 0, (2, 2), x(3, 3)),
    ):  # fmt: skip
        places = whole(data.shape[dim], *index)
        yield s(aten.scatter.src, data, dim, places, source)
        yield s(aten.scatter_.src, data, dim, places, source)
        yield s(aten.scatter.value, data, dim, places, 0.5)
        yield s(aten.scatter_.value, data, dim, places, 0.5)
        yield s(aten.scatter.value, data, dim, places, 0)
        yield s(aten.scatter.reduce, data, dim, places, source, reduce="add")
        yield s(aten.scatter_.reduce, data, dim, places, source, reduce="add")
        yield s(aten.scatter.reduce, data, dim, places, source, reduce="multiply")
        yield s(aten.scatter_add.default, data, dim, places, source)
        for how in ("sum", "prod", "mean", "amax", "amin"):
            yield s(aten.scatter_reduce.two, data, dim, places, source, how)
            yield s(aten.scatter_reduce.two, data, dim, places, source, how, include_self=False)
    for data, dim, source in ((x(4, 3), 0, x(2, 3)), (x(3, 4, 2), 1, x(3, 2, 2)), (x(4), 0, x(2))):
        index = torch.tensor([2, 0])
        yield s(aten.index_add.default, data, dim, index, source)
        yield s(aten.index_add.default, data, dim, index, source, alpha=2)
        yield s(aten.index_copy.default, data, dim, index, source)
        yield s(aten.index_fill.int_Scalar, data, dim, index, 0.5)
        yield s(aten.index_fill.int_Scalar, data, dim, index, 0)
        yield s(aten.index_fill_.int_Scalar, data, dim, index, 0.5)
    for accumulate in (False, True):
        for data, indices, source in (
            (x(4, 3), [torch.tensor([2, 0])], x(2, 3)), (x(4, 3), [torch.tensor([2, 0])], x(3)),
            (x(4, 3), [torch.tensor([2, 0])], x(1)), (x(3, 4), [None, torch.tensor([2, 0])], x(3, 2)),
            (x(3, 4, 2), [torch.tensor([2, 0]), torch.tensor([1, 3])], x(2, 2)),
            (x(3, 4, 2), [torch.tensor([2, 0]), None, torch.tensor([1, 0])], x(2, 4)),
            (x(3, 4), [torch.tensor([True, False, True])], x(2, 4)),
            (x(3, 4), [torch.tensor([True, False, True])], x()),
            (x(2, 2, 3), [torch.tensor([[True, False], [True, True]])], x(3, 3)),
        ):  # fmt: skip
            yield s(aten.index_put.default, data, indices, source, accumulate)
            yield s(aten._index_put_impl.default, data, indices, source, accumulate)
            yield s(aten._index_put_impl_.default, data, indices, source, accumulate)
    # products by group: in float32, for that is what there are kernels for, with rows of whole 16 bytes
    for a, b, offs in (
        (single(5, 4), single(2, 4, 8), borders(2, 5)), (single(2, 3, 4), single(4, 8), borders(4, 8)),
        (single(4, 8), single(8, 4), borders(4, 8)), (single(2, 3, 4), single(2, 4, 8), None),
    ):  # fmt: skip
        yield s(aten._grouped_mm.default, a, b, offs)
    for p in (1.0, 2.0, 3.0):
        yield s(aten.cdist.default, x(3, 4), x(2, 4), p)
        yield s(aten.cdist.default, x(2, 3, 4), x(2, 2, 4), p)
        yield s(aten._cdist_forward.default, x(2, 3, 4), x(2, 2, 4), p, None)
    for reduction in (0, 1, 2):
        yield s(aten.mse_loss.default, x(3, 4), x(3, 4), reduction)
        yield s(aten.smooth_l1_loss.default, x(3, 4), x(3, 4), reduction, 0.5)
        yield s(aten.huber_loss.default, x(3, 4), x(3, 4), reduction, 0.5)
        yield s(aten.soft_margin_loss.default, x(3, 4), x(3, 4), reduction)
        for weight in (None, x(3, 4), x(4)):
            yield s(aten.binary_cross_entropy.default, unit(3, 4), unit(3, 4), weight, reduction)
            yield s(aten.binary_cross_entropy_with_logits.default, x(3, 4), unit(3, 4), weight, None, reduction)
        yield s(aten.binary_cross_entropy_with_logits.default, x(3, 4), unit(3, 4), None, x(4), reduction)
    for dim in (0, 1, -1):
        yield s(aten._weight_norm.default, x(3, 4), x(*[1 if d != dim else n for d, n in enumerate((3, 4))]), dim)
    for dim in (0, 2):  # the kernel knows the first and the last dimension
        g = x(*[1 if d != dim else n for d, n in enumerate((3, 4, 2))])
        yield s(aten._weight_norm_interface.default, x(3, 4, 2), g, dim)
    yield s(aten.isin.Tensor_Tensor, whole(5, 3, 4), whole(5, 2))
    yield s(aten.bilinear.default, x(5, 3), x(5, 4), x(2, 3, 4))
    yield s(aten.bilinear.default, x(2, 5, 3), x(2, 5, 4), x(2, 3, 4), x(2))
    triangle = torch.tril(torch.rand(3, 3, dtype=torch.float64)) + torch.eye(3)
    for left, b in ((True, x(3, 2)), (False, x(2, 3)), (True, x(4, 3, 2))):
        lower = triangle if len(b.shape) == 2 else triangle.expand(4, 3, 3).clone()
        yield s(aten.linalg_solve_triangular.default, lower, b, upper=False, left=left)
    yield s(aten.histc.default, x(6), 3, 0, 1)
    yield s(aten.repeat_interleave.Tensor, whole(3, 4))
    yield s(aten.repeat_interleave.self_int, x(3, 4), 2, 1, output_size=8)
    for op, gates, states in ((aten.lstm.input, 4, 2), (aten.gru.input, 3, 1), (aten.rnn_tanh.input, 1, 1),
                              (aten.rnn_relu.input, 1, 1)):  # fmt: skip
        for layers, both, biases, first in ((1, False, True, False), (2, True, True, True), (2, False, False, True)):
            d = 1 + both
            params = []
            for layer in range(layers):
                for _ in range(d):
                    into = 3 if layer == 0 else 2 * d
                    params += [x(gates * 2, into), x(gates * 2, 2), *([x(gates * 2), x(gates * 2)] if biases else [])]
            hx = [x(layers * d, 5, 2)] * states if states == 2 else x(layers * d, 5, 2)
            data = x(5, 4, 3) if first else x(4, 5, 3)
            yield s(op, data, hx, params, biases, layers, 0.0, False, both, first)
    projected = [x(12, 3), x(12, 2), x(12), x(12), x(2, 3)]
    yield s(aten.lstm.input, x(4, 5, 3), [x(1, 5, 2), x(1, 5, 3)], projected, True, 1, 0.0, False, False, False)
    lengths = torch.tensor([2, 2, 1])
    for op, gates in ((aten.lstm.data, 4), (aten.gru.data, 3), (aten.rnn_tanh.data, 1), (aten.rnn_relu.data, 1)):
        hx = [x(1, 2, 2)] * 2 if gates == 4 else x(1, 2, 2)
        yield s(op, x(5, 3), lengths, hx, [x(gates * 2, 3), x(gates * 2, 2)], False, 1, 0.0, False, False)
        hx = [x(4, 2, 2)] * 2 if gates == 4 else x(4, 2, 2)
        params = [p for into in (3, 3, 4, 4) for p in (x(gates * 2, into), x(gates * 2, 2), x(gates * 2), x(gates * 2))]
        yield s(op, x(5, 3), lengths, hx, params, True, 2, 0.0, False, True)
    yield s(aten.lstm.data, x(5, 3), lengths, [x(1, 2, 2), x(1, 2, 3)], projected, True, 1, 0.0, False, False)
    for first in (True, False):
        yield s(aten._pack_padded_sequence.default, x(3, 3, 4), torch.tensor([3, 2, 2]), first)
        for padding in (0.0, 1.0):
            yield s(aten._pad_packed_sequence.default, x(5, 4), lengths, first, padding, 3)
    with suppress(ImportError):
        import transformers.integrations.moe  # noqa: F401  registers operators of its own

        rows = torch.ops.transformers.grouped_mm_fallback.default
        yield s(rows, x(5, 3), x(2, 3, 4), borders(2, 5))


def _runs(sample: Sample) -> bool:
    try:
        args, kwargs = sample.make()
        calls(sample.op, args, kwargs)
    except (RuntimeError, NotImplementedError, TypeError, IndexError):
        return False
    return True


def _in_place(sample: Sample) -> Iterator[Sample]:
    """The same call on the in-place twin, where it takes the same arguments."""
    name = f"{sample.op.overloadpacket.__name__}_"
    twin = getattr(aten, name, None)
    if sample.device == "cpu" and isinstance(sample.op, OpOverload) and twin in RULES:
        for overload in twin.overloads():
            op = getattr(twin, overload)
            arguments = [str(a.type) for a in op._schema.arguments]
            if arguments == [str(a.type) for a in sample.op._schema.arguments]:
                made = Sample(op, sample.args, sample.kwargs, written=False)
                if _runs(made):
                    yield made
                    return


@cache
def samples() -> tuple[Sample, ...]:
    """All of them."""
    made = [*_written(), *_fixed(), *_indexed()]
    made += [twin for sample in made for twin in _in_place(sample)]
    for op in overloads():
        if find(op) in ENTRY_BY_ENTRY:
            made += _entry_by_entry(op)
    return tuple(made)
