"""Which atoms go, given their scores."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from oto.optim.select import least_kept, reachable, select


def one_by_one(scores, sizes, min_kept, count):
    """The same choice, written as a loop: take the lowest score whose node group can still lose an atom."""
    group = [g for g, size in enumerate(sizes) for _ in range(size)]
    left = [size - least_kept(size, kept, 1) for size, kept in zip(sizes, min_kept, strict=True)]
    chosen = [False] * len(scores)
    for atom in sorted(range(len(scores)), key=lambda a: scores[a]):  # stable, so ties fall to the first
        if sum(chosen) < count and left[group[atom]]:
            chosen[atom] = True
            left[group[atom]] -= 1
    return chosen


cases = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=6).flatmap(
    lambda groups: st.tuples(
        st.just(groups),
        st.lists(st.integers(-3, 6), min_size=sum(s for s, _ in groups), max_size=sum(s for s, _ in groups)),
        st.floats(0, 1),
    )
)


@given(cases)
def test_the_lowest_scores_go_and_ties_fall_to_the_first(case):
    groups, scores, share = case
    sizes, min_kept = [s for s, _ in groups], [k for _, k in groups]
    count = int(share * reachable(sizes, min_kept))
    chosen = select(torch.tensor(scores, dtype=torch.float32), sizes, min_kept, count)
    assert chosen.tolist() == one_by_one(scores, sizes, min_kept, count)
    assert chosen.sum() == count


@given(cases, st.integers(2, 4))
def test_kept_counts_are_multiples_and_the_count_falls_short_by_less_than_a_unit(case, divisible):
    groups, scores, share = case
    sizes, min_kept = [s for s, _ in groups], [k for _, k in groups]
    count = int(share * reachable(sizes, min_kept, divisible))
    chosen = select(torch.tensor(scores, dtype=torch.float32), sizes, min_kept, count, divisible)
    assert count - divisible < chosen.sum() <= count
    for size, least, own in zip(sizes, min_kept, chosen.split(sizes), strict=True):
        kept = size - int(own.sum())
        assert kept == size or (kept % divisible == 0 and kept >= max(least, divisible))


@given(cases, st.integers(1, 4))
def test_what_is_pruned_stays_chosen(case, divisible):
    groups, scores, share = case
    sizes, min_kept = [s for s, _ in groups], [k for _, k in groups]
    most = reachable(sizes, min_kept, divisible)
    scores = torch.tensor(scores, dtype=torch.float32)
    before = select(scores, sizes, min_kept, int(share * most), divisible)
    after = select(torch.randn(len(scores)).masked_fill(before, -torch.inf), sizes, min_kept, most, divisible)
    assert (after | ~before).all()


def test_a_node_group_is_never_emptied():
    # every atom of the first group scores lowest, yet one stays
    scores = torch.tensor([0.0, 0.1, 0.2, 5.0, 6.0, 7.0])
    assert select(scores, [3, 3], [1, 1], 4).tolist() == [True, True, False, True, True, False]


def test_a_unit_is_as_salient_as_its_most_salient_atom():
    # groups of 4, units of 2: units score 9 and 10 in the first group, 3 and 4 in the second
    scores = torch.tensor([0.0, 9.0, 10.0, 10.0, 2.0, 3.0, 4.0, 4.0])
    assert select(scores, [4, 4], [1, 1], 2, 2).tolist() == [False, False, False, False, True, True, False, False]


def test_scores_decide_and_not_the_index():
    # released HESSO cuts by index here: two atoms of the four lowest are pruned, and of the rest the first went
    scores = torch.tensor([3.0, 2.0, -torch.inf, -torch.inf, 1.0, 9.0])
    assert select(scores, [6], [1], 3).tolist() == [False, False, True, True, True, False]
