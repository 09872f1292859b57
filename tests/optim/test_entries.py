"""The door to tensors by group: sums of any layout, and rows that are read and written where they lie."""

from __future__ import annotations

import pytest
import torch

from oto.groups.node_group import Cut, NodeGroup, Slice
from oto.optim.entries import BLOCK, Rows, dot, sq_norm, taken

LAYOUTS = {
    "vector": lambda: torch.randn(7),
    "matrix": lambda: torch.randn(7, 5),
    "columns": lambda: torch.randn(5, 7).t(),
    "convolution": lambda: torch.randn(7, 5, 3, 3),
    "channels last": lambda: torch.randn(7, 5, 3, 3).to(memory_format=torch.channels_last),
    "readers": lambda: torch.randn(5, 7, 3, 3).movedim(1, 0),
    "readers, channels last": lambda: torch.randn(5, 7, 3, 3).to(memory_format=torch.channels_last).movedim(1, 0),
    "heads": lambda: torch.randn(28, 6).unflatten(0, (7, 4)),
    "width of heads": lambda: torch.randn(28, 6).unflatten(0, (4, 7)).movedim(1, 0),
    "a part": lambda: torch.randn(12, 9)[2:9, 3:],
    "none": lambda: torch.randn(7, 0),
    "several blocks": lambda: torch.randn(7, BLOCK // 3),
    "several blocks of columns": lambda: torch.randn(BLOCK // 16, 7, 5).movedim(1, 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_sums_over_the_entries_of_each_row(name, dtype):
    torch.manual_seed(0)
    made = LAYOUTS[name]()
    left = torch.empty_strided(made.shape, made.stride(), dtype=dtype).copy_(made)
    right = torch.randn(made.shape).to(dtype)  # as a gradient may lie in another order
    wide = torch.complex128 if dtype.is_complex else torch.float64
    products = (left.to(wide).conj() * right.to(wide)).real.reshape(7, -1)
    for own, other, expected in (
        (left, right, products.sum(1)),
        (left, left, left.to(wide).abs().square().reshape(7, -1).sum(1)),
    ):
        found = dot(own, other)
        assert found.shape == (7,) and found.dtype == torch.promote_types(left.real.dtype, torch.float32)
        # float32 sums of up to 43,690 products of numbers of size 1
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        sq_norm(left).double(), left.to(wide).abs().square().reshape(7, -1).sum(1), rtol=1e-4, atol=1e-4
    )


def places():
    torch.manual_seed(0)
    tensors = {"a": torch.randn(4, 3, dtype=torch.float64), "b": torch.randn(4, dtype=torch.float64)}
    tensors["c"] = torch.randn(2, 6, dtype=torch.float64)
    first = (Slice("a", 0, ()), Slice("b", 0, ()), Slice("constant", 0, ()))
    heads = (Slice("c", 1, (Cut(1, 3, 2, 0, 3),)),)  # three heads, each two wide
    return tensors, [NodeGroup("a", 4, first, first), NodeGroup("c", 3, heads, heads)]


@pytest.mark.parametrize("chosen", [(None, None), ([1, 3], [0, 2]), ([], [1]), ([2], None)])
def test_vectors_of_one_number_per_atom(chosen):
    tensors, groups = places()
    chosen = [None if own is None else torch.tensor(own, dtype=torch.int64) for own in chosen]
    rows = Rows.of(groups, chosen, tensors)
    among = torch.zeros(7, dtype=torch.bool)
    for first, size, own in ((0, 4, chosen[0]), (4, 3, chosen[1])):
        among[first : first + size] = (
            True if own is None else torch.zeros(size, dtype=torch.bool).index_fill_(0, own, True)
        )

    def matrix():  # atom by atom, what it holds
        heads = tensors["c"].view(2, 3, 2).movedim(1, 0).reshape(3, 4)
        return [torch.cat([tensors["a"][i], tensors["b"][i : i + 1]]) for i in range(4)] + list(heads)

    before = [own.clone() for own in matrix()]
    expected = torch.stack([own.square().sum() for own in before])
    torch.testing.assert_close(rows.sq_norm(), expected * among)
    held = rows.copies()
    rows.scale_(3.0)
    assert [own.allclose(3 * old) for own, old in zip(matrix(), before, strict=True)] >= among.tolist()
    rows.copy_(held)
    assert all(own.equal(old) for own, old in zip(matrix(), before, strict=True))
    pointers = [own.data_ptr() for own in held]
    assert [own.data_ptr() for own in rows.copies(held)] == pointers
    rows.zero_(torch.arange(7) % 2 == 0)
    assert [bool((own == 0).all()) for own in matrix()] == [i % 2 == 0 and bool(among[i]) for i in range(7)]
    rows.zero_()
    assert [bool((own == 0).all()) for own in matrix()] == among.tolist()


def test_every_slice_has_its_own_rate():
    tensors, groups = places()
    rows = Rows.of(groups, [None, None], tensors)
    parts = [tensors["a"].square().sum(1), tensors["b"].square()]
    expected = 2 * parts[0] + 3 * parts[1]
    torch.testing.assert_close(rows.sq_norm([2.0, torch.tensor(3.0), 5.0])[:4], expected)


def test_zeros_clear_what_is_no_number():
    tensors, groups = places()
    tensors["a"][1] = torch.nan
    tensors["c"][0, 0] = torch.inf
    Rows.of(groups, [torch.tensor([1]), torch.tensor([0])], tensors).zero_()
    assert all(own.isfinite().all() for own in tensors.values())
    assert (tensors["a"][1] == 0).all() and (tensors["c"][:, :2] == 0).all() and (tensors["c"][:, 2:] != 0).all()


def test_what_is_taken_of_every_dimension():
    import numpy as np

    x = torch.arange(24).view(2, 3, 4)
    assert taken(x, [None, np.array([0, 2]), np.array([1])]).equal(x[:, [0, 2]][:, :, [1]])
    assert taken(x, [None, None, None]) is x


def test_a_mask_that_is_wider_than_the_rows_leaves_other_atoms_alone():
    weight = torch.ones(6, 3)
    group = NodeGroup("w", 6, slices=(Slice("w", 0, ()),), zeros=(Slice("w", 0, ()),))
    Rows.of([group], [torch.tensor([1, 4])], {"w": weight}).zero_(torch.tensor([True, True, False, True, False, False]))
    assert weight.any(1).tolist() == [True, False, True, True, True, True]
