"""Shapes without torch's own kernels for them: the same as those give, or left to these."""

from __future__ import annotations

import itertools

import pytest
import torch

from oto.trace.shapes import _SHAPES, result_of

aten = torch.ops.aten


def x(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


TENSORS = [x(2, 3, 4, 5), x(2, 3, 5), x(5), x(1, 5), x(3, 1), x(), x(2, 3, 5, dtype=torch.int64), x(2, 0, 5),
           x(2, 3, 5, dtype=torch.bfloat16), x(4, 5)]  # fmt: skip
NORM = ([5], x(5), x(5))
MORE = {
    aten.linear.default: [(w, *b) for w in (x(7, 5), x(7, 4), x(5)) for b in ((), (x(7),), (x(4),))],
    aten.scaled_dot_product_attention.default: [
        (x(2, 3, 6, 5), x(2, 3, 6, 8)), (x(2, 3, 6, 4), x(2, 3, 6, 8)), (x(2, 1, 6, 5), x(2, 1, 6, 8)),
        (x(2, 3, 6, 5), x(2, 3, 6, 8), x(4, 6)),
    ],
    aten.softmax.int: [(-1,), (-1, torch.float64)],
    aten.layer_norm.default: [NORM],
    aten.mean.dim: [([-1],), ([0, 1], True), ([9],), (None,)],
    aten.sum.dim_IntList: [([-1],), ([0, 1], True), ([9],)],
    aten.linalg_vector_norm.default: [(2, [-1], True), (1, [-1]), (2, None)],
    aten.clamp_min.default: [(0.5,), (2,)],
    aten.pow.Tensor_Scalar: [(2,), (-0.5,)],
    aten.leaky_relu.default: [(0.1,)],
    aten.dropout.default: [(0.1, False)],
    aten.batch_norm.default: [(x(3), x(3), x(3), x(3), False, 0.1, 1e-5, False)],
    aten.group_norm.default: [(3, x(3), x(3))],
}  # fmt: skip
BINARY = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
CALLS = [(op, first, rest) for op, rests in MORE.items() for first in TENSORS for rest in rests]
CALLS += [(op, a, (b,)) for op in BINARY for a, b in itertools.product(TENSORS, [*TENSORS, 2, 0.5])]
CALLS += [(op, first, ()) for op in _SHAPES.keys() - MORE.keys() - set(BINARY) for first in TENSORS]


def test_shapes_and_dtypes_are_those_that_torch_gives():
    said = set()
    for op, first, rest in CALLS:
        found = result_of(op, (first, *rest), {})
        if found is None:
            continue
        try:
            wanted = op(first, *rest)
        except (RuntimeError, IndexError):  # what a norm cannot take, the comparison of arguments finds
            assert op in (aten.layer_norm.default, aten.batch_norm.default, aten.group_norm.default), (op, first, rest)
            continue
        assert (found.shape, found.dtype, found.device) == (wanted.shape, wanted.dtype, wanted.device), (
            op,
            first,
            rest,
        )
        said.add(op)
    assert said == _SHAPES.keys()


@pytest.mark.parametrize("call", [
    (aten.add.Tensor, (x(2), x(3))), (aten.linear.default, (x(2, 3), x(4, 5))), (aten.mul.Tensor, (x(2), x())),
    (aten.exp.default, (x(2, dtype=torch.int64),)), (aten.mm.default, (x(2, 2), x(2, 2))),
])  # fmt: skip
def test_what_is_not_plain_is_left_to_torch(call):
    assert result_of(*call, {}) is None
