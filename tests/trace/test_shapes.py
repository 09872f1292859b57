"""Shapes without torch's own kernels for them: the same as those give, or left to these."""

from __future__ import annotations

import itertools

import pytest
import torch

from oto._torch import FakeTensor, FakeTensorMode, TorchDispatchMode
from oto.trace.record import record
from oto.trace.shapes import _SHAPES, Remembered, result_of

aten = torch.ops.aten


def x(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


TENSORS = [
    x(2, 3, 4, 5),
    x(1, 2, 3, 4, 5),
    x(2, 3, 5),
    x(5),
    x(1, 5),
    x(3, 1),
    x(),
    x(2, 3, 5, dtype=torch.int64),
    x(2, 0, 5),
    x(2, 3, 5, dtype=torch.bfloat16),
    x(4, 5),
]
NORM = ([5], x(5), x(5))
GROUPED = (x(6, 1, 2), None, [2], [1], [2], 3)
MORE = {
    aten.linear.default: [(w, *b) for w in (x(7, 5), x(7, 4), x(5)) for b in ((), (x(7),), (x(4),))],
    aten.scaled_dot_product_attention.default: [
        (x(2, 3, 6, 5), x(2, 3, 6, 8)),
        (x(2, 3, 6, 4), x(2, 3, 6, 8)),
        (x(2, 1, 6, 5), x(2, 1, 6, 8)),
        (x(2, 3, 6, 5), x(2, 3, 6, 8), x(4, 6)),
    ],
    aten.matmul.default: [(x(2, 3, 5, 6),), (x(2, 3, 4, 6),), (x(2, 5, 7),), (x(3, 5, 7),), (x(5, 7),), (x(5),)],
    aten.conv1d.default: [(x(6, 3, 2),), (x(6, 3, 2), x(6)), (x(6, 3, 2), x(5)), (x(6, 3, 9),), GROUPED],
    aten.conv2d.default: [
        (x(6, 3, 2, 3),),
        (x(6, 3, 2, 3), x(6)),
        (x(6, 2, 2, 3),),
        (x(6, 3, 9, 9),),
        (x(6, 1, 2, 2), None, [2, 1], [1, 0], [2, 1], 3),
        (x(6, 3, 2, 3, dtype=torch.float64),),
    ],
    aten.conv3d.default: [(x(6, 3, 2, 2, 2),), (x(6, 2, 1, 1, 1),)],
    aten.adaptive_avg_pool2d.default: [([1, 1],), ([3, 2],), ([0, 1],)],
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
}
BINARY = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
CALLS = [(op, first, rest) for op, rests in MORE.items() for first in TENSORS for rest in rests]
CALLS += [(op, a, (b,)) for op in BINARY for a, b in itertools.product(TENSORS, [*TENSORS, 2, 0.5])]
JOINS = (aten.cat.default, aten.concat.default)
CALLS += [(op, [a, b, a], rest) for op in JOINS for a, b in itertools.product(TENSORS, TENSORS) for rest in ((), (-1,))]
CALLS += [(op, first, ()) for op in _SHAPES.keys() - MORE.keys() - {*BINARY, *JOINS} for first in TENSORS]


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


@pytest.mark.parametrize(
    "call",
    [
        (aten.add.Tensor, (x(2), x(3))),
        (aten.linear.default, (x(2, 3), x(4, 5))),
        (aten.mul.Tensor, (x(2), x())),
        (aten.exp.default, (x(2, dtype=torch.int64),)),
        (aten.mm.default, (x(2, 2), x(2, 2))),
    ],
)
def test_what_is_not_plain_is_left_to_torch(call):
    assert result_of(*call, {}) is None


# --- calls that are remembered ----------------------------------------------------------------------------------------


WHOLE = x(2, dtype=torch.int64)
REMEMBERED = [
    (aten.clamp.default, (x(2, 3), 0, 1)),
    (aten.roll.default, (x(2, 3), [1], [0])),
    (aten.index_select.default, (x(2, 3), 0, x(4, dtype=torch.int64))),
    (aten.native_layer_norm.default, (x(2, 5), [5], x(5), x(5), 1e-5)),
    (aten.add.Tensor, (WHOLE, 1)),
    (aten.add.Tensor, (WHOLE, 1.0)),
    (aten.permute.default, (x(2, 3), [1, 0])),
    (aten.relu_.default, (x(2),)),
    (aten.contiguous.default, (x(2, 3),)),
    (aten.contiguous.default, (x(2, 3).T,)),
    (aten.reshape.default, (x(2, 3), [6])),
    (aten.reshape.default, (x(2, 3).T, [6])),
    (aten.chunk.default, (x(4, 3), 2)),
]


@pytest.mark.parametrize("call", REMEMBERED, ids=str)
def test_a_call_that_is_remembered_gives_what_it_gave(call):
    op, args = call
    remembered = Remembered()
    for other, given in REMEMBERED:  # what is nearly the same is something else
        remembered.call(other, given, {})
    wanted, found = op(*args), remembered.call(op, args, {})
    pairs = zip(*([r] if isinstance(r, torch.Tensor) else list(r) for r in (wanted, found)), strict=True)
    for a, b in pairs:
        assert (a.shape, a.stride(), a.dtype, b.is_meta) == (b.shape, b.stride(), b.dtype, True)
        shares = [t.untyped_storage() is args[0].untyped_storage() for t in (a, b)]
        assert shares[0] == shares[1]


def test_an_equal_call_is_made_once_and_gives_a_tensor_of_its_own():
    remembered, op = Remembered(), aten.clamp.default
    made = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, called, types, args=(), kwargs=None):
            made.append(called)
            return called(*args, **(kwargs or {}))

    arguments = [x(2, 3), x(2, 3)]
    with Counting():
        first, second = (remembered.call(op, (argument, 0.0), {}) for argument in arguments)
    assert made.count(op) == 1 and first.shape == second.shape
    assert first.untyped_storage() is not second.untyped_storage()


def test_what_depends_on_the_default_dtype_is_told_apart():
    remembered, op, args = Remembered(), aten.true_divide.Tensor, (x(2, dtype=torch.int64), x(2, dtype=torch.int64))
    first = remembered.call(op, args, {})
    torch.set_default_dtype(torch.float64)
    try:
        second = remembered.call(op, args, {})
    finally:
        torch.set_default_dtype(torch.float32)
    assert (first.dtype, second.dtype) == (torch.float32, torch.float64)


VIEWS = [
    (aten.reshape.default, ([3, 4],)),
    (aten.transpose.int, (0, 1)),
    (aten.unsqueeze.default, (1,)),
    (aten.add.Tensor, (1,)),
    (aten.to.dtype, (torch.float64,)),
    (aten.chunk.default, (2,)),
    (aten.to.dtype, (torch.float32,)),
]


@pytest.mark.parametrize(("op", "rest"), VIEWS, ids=str)
def test_fake_tensors_are_remembered_as_they_are(op, rest):
    remembered, mode = Remembered(), FakeTensorMode()
    with torch.inference_mode(), mode:
        for _ in range(2):
            given = mode.from_tensor(torch.randn(2, 6)) + 0
            wanted, found = op(given, *rest), remembered.call(op, (given, *rest), {}, mode)
            pairs = zip(*([r] if isinstance(r, torch.Tensor) else list(r) for r in (wanted, found)), strict=True)
            for a, b in pairs:
                assert type(b) is FakeTensor and b.fake_mode is mode and (a is given) == (b is given)
                assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
                assert a.is_inference() == b.is_inference() and a.storage_offset() == b.storage_offset()


def test_numbers_that_fake_tensors_know_are_not_forgotten():
    remembered, mode = Remembered(), FakeTensorMode()
    with torch.inference_mode(), mode:
        for number in (2, 3):
            assert remembered.call(aten.add.Tensor, (torch.tensor(number), 1), {}, mode).item() == number + 1


def test_a_model_that_views_its_parameters_is_carried_by_fake_tensors_again_and_again():
    class Net(torch.nn.Linear):
        def forward(self, given):
            assert not given.is_meta
            return given @ self.weight.unsqueeze(0).repeat(1, 1, 1).squeeze(0).transpose(0, 1)

    assert [record(Net(3, 4), torch.randn(2, 3)).mode for _ in range(2)] == ["fake", "fake"]
