"""Rows and one copy of them: what a step did to each atom, whatever the layout, dtype and choice of atoms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oto.groups.node_group import Cut, NodeGroup, Slice
from oto.optim import copied as module
from oto.optim.copied import Copied, are_alike
from oto.optim.entries import Place, Rows

SIZES = (6, 3)
CHOSEN = [(None, None), ([1, 3, 4], [0, 2]), ([], [1]), ([2], None), ([], [])]


def tensors(dtype):
    torch.manual_seed(0)
    made = {
        "a": torch.randn(6, 5),  # rows in one piece
        "conv": torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last),
        "b": torch.randn(6),
        "norm": torch.randn(12)[::2],
        "read": torch.randn(4, 6).t(),  # rows that lie in columns
        "heads": torch.randn(2, 6),
        "bias": torch.randn(3),
    }
    return {name: own.to(dtype) for name, own in made.items()}


def groups():
    first = tuple(Slice(name, 0, ()) for name in ("a", "conv", "b", "norm", "read"))
    second = (Slice("heads", 1, (Cut(1, 3, 2, 0, 3),)), Slice("bias", 0, ()))  # three heads, each two wide
    return [NodeGroup("a", 6, first, first), NodeGroup("heads", 3, second, second)]


def atoms(held):
    """Atom by atom, all that it holds, in float64."""
    held = {name: own.double() for name, own in held.items()}
    flat = [held[name].reshape(6, -1) for name in ("a", "conv", "b", "norm", "read")]
    heads = held["heads"].view(2, 3, 2).movedim(1, 0).reshape(3, 4)
    return [*torch.cat(flat, 1), *torch.cat([heads, held["bias"][:, None]], 1)]


def rows(held, chosen, in_blocks=True):
    own = [None if some is None else torch.tensor(some, dtype=torch.int64) for some in chosen]
    return Rows.of(groups(), own, held, in_blocks=in_blocks)


def among(chosen):
    both = zip(SIZES, chosen, strict=True)
    return torch.tensor([some is None or i in some for size, some in both for i in range(size)])


def moved_(held):
    """What an optimizer does, different for every entry."""
    for name, own in held.items():
        own.add_(torch.randn(own.shape, generator=torch.Generator().manual_seed(len(name))).to(own.dtype), alpha=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("in_blocks", [True, False])
def test_every_sum_is_that_of_the_atoms_entries(chosen, dtype, in_blocks):
    held = tensors(dtype)
    close = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    copied, mask = Copied(rows(held, chosen, in_blocks)), among(chosen)
    before = [own.clone() for own in atoms(held)]

    def check(found, expected):
        assert found.dtype == torch.promote_types(dtype, torch.float32) or not mask.any()
        torch.testing.assert_close(found.double(), torch.stack(expected) * mask, rtol=close, atol=close)

    for _ in range(2):  # and so it is with the memory of the last step
        before = [own.clone() for own in atoms(held)]
        check(copied.remember_(), [x.square().sum() for x in before])
        moved_(held)
        now = [own.clone() for own in atoms(held)]
        along, sq = copied.moved()
        check(along, [(y - x) @ x for x, y in zip(before, now, strict=True)])
        check(sq, [(y - x).square().sum() for x, y in zip(before, now, strict=True)])
        factors = torch.linspace(0, 0.4, 9, dtype=copied.remember_().dtype)
        copied_now = [own.clone() for own in atoms(held)]
        moved_(held)
        now = [own.clone() for own in atoms(held)]
        count = len(copied.rows.places)
        inner = copied.subtract_dot_(factors, [0.5] * count)
        after = [y - 0.5 * f * x * m for x, y, f, m in zip(copied_now, now, factors.double(), mask, strict=True)]
        for own, expected in zip(atoms(held), after, strict=True):
            torch.testing.assert_close(own, expected, rtol=close, atol=close)
        check(inner, [x @ y for x, y in zip(copied_now, atoms(held), strict=True)])
        copied.subtract_(-factors, [0.5] * count)
        for own, expected in zip(atoms(held), now, strict=True):
            torch.testing.assert_close(own, expected, rtol=2 * close, atol=2 * close)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.sets(st.integers(0, 5)), st.sets(st.integers(0, 2)))
def test_atoms_that_were_not_chosen_are_not_written(seed, first, second):
    held, chosen = tensors(torch.float32), (sorted(first), sorted(second))
    copied = Copied(rows(held, chosen))
    copied.remember_()
    before = [own.clone() for own in atoms(held)]
    factors = torch.rand(9, generator=torch.Generator().manual_seed(seed)) + 0.5
    copied.subtract_(factors, [1.0] * len(copied.rows.places))
    changed = [not own.equal(old) for own, old in zip(atoms(held), before, strict=True)]
    assert changed == among(chosen).tolist()


def test_every_slice_has_its_own_rate():
    held = tensors(torch.float64)
    copied = Copied(rows(held, (None, None)))
    copied.remember_()
    before = {name: own.clone() for name, own in held.items()}
    names = copied.rows.names
    rates = [{"a": 0.5, "b": torch.tensor(0.25), "heads": 1.0}.get(name, 0.0) for name in names]
    copied.subtract_(torch.ones(9, dtype=torch.float64), rates)
    for name, rate in {"a": 0.5, "b": 0.25, "heads": 1.0, "conv": 0.0, "norm": 0.0, "bias": 0.0}.items():
        torch.testing.assert_close(held[name], before[name] * (1 - rate))


@pytest.mark.parametrize("in_blocks", [True, False])
def test_an_entry_that_is_a_part_of_two_atoms_is_changed_for_both(in_blocks):
    """Heads and their width share a bias: of a shard each is one row after another, with the atom of every row."""
    bias = torch.arange(1.0, 13, dtype=torch.float64)
    atoms = torch.arange(12) // 4, 3 + torch.arange(12) % 4
    places = [Place(bias, None, 0, own) for own in atoms]
    places = [block for place in places for block in place.blocks()] if in_blocks else places
    copied = Copied(Rows(places, ["bias"] * len(places), 7, torch.device("cpu")))
    before, factors = bias.clone(), torch.linspace(0.1, 0.7, 7, dtype=torch.float64)
    copied.remember_()
    copied.subtract_(factors, [1.0] * len(places))
    torch.testing.assert_close(bias, before * (1 - factors[atoms[0]] - factors[atoms[1]]))


def test_rates_are_alike_without_being_read():
    rate = torch.tensor(0.1)
    assert are_alike([0.1, 0.1]) and are_alike([rate, rate]) and are_alike([])
    assert not are_alike([0.1, 0.2]) and not are_alike([rate, torch.tensor(0.1)]) and not are_alike([0.1, rate])


@pytest.mark.parametrize("chosen", CHOSEN)
def test_where_a_device_is_not_waited_for_the_numbers_are_the_same(monkeypatch, chosen):
    here, there = tensors(torch.float32), tensors(torch.float32)
    known = Copied(rows(here, chosen))
    monkeypatch.setattr(module, "is_here", lambda tensor: False)
    other = Copied(rows(there, chosen, in_blocks=False))
    for held, copied in ((here, known), (there, other)):
        copied.remember_()
        moved_(held)
    for mine, its in zip(known.moved(), other.moved(), strict=True):
        torch.testing.assert_close(mine, its)


def test_the_memory_of_a_copy_is_taken_over():
    held = tensors(torch.float32)
    first = Copied(rows(held, (None, None)))
    sq = first.remember_().clone()
    pointer = first._room.data_ptr()
    second = Copied(rows(held, ([0, 2], None)), first)
    assert second._room.data_ptr() == pointer
    torch.testing.assert_close(second.remember_(), sq * among(([0, 2], None)))
    assert second.nbytes == 4 * (2 * (5 + 36 + 1 + 1 + 4) + 3 * 5)
    assert Copied(rows(held, ([], [])), second)._room.numel() == 0  # nothing is held for nothing
