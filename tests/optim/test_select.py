"""Which atoms go, given their scores, what the network costs, and limits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oto.groups.cost import Polynomial
from oto.optim.select import least_kept, select


def atoms(sizes):
    """The number of atoms that are left, as a cost."""
    return Polynomial({(i,): 1 for i in range(len(sizes))}, len(sizes))


def chosen(scores, sizes, min_kept, count, divisible=1, left=None):
    """The choice of at least ``count`` atoms, by score alone."""
    least = np.array([least_kept(s, k, divisible) for s, k in zip(sizes, min_kept, strict=True)])
    scores = np.array(scores, dtype=float)
    left = np.ones(len(scores), bool) if left is None else left
    goal = int(left.sum()) - count
    return select(scores, left, np.array(sizes), least, atoms(sizes), goal, divisible, by_cost=0)


def spare(sizes, min_kept, divisible=1):
    return sum(size - least_kept(size, kept, divisible) for size, kept in zip(sizes, min_kept, strict=True))


def one_by_one(scores, sizes, min_kept, count):
    """The same choice, written as a loop: take the lowest score whose node group can still lose an atom."""
    group = [g for g, size in enumerate(sizes) for _ in range(size)]
    left = [size - least_kept(size, kept, 1) for size, kept in zip(sizes, min_kept, strict=True)]
    gone = [False] * len(scores)
    for atom in sorted(range(len(scores)), key=lambda a: scores[a]):  # stable, so ties fall to the first
        if sum(gone) < count and left[group[atom]]:
            gone[atom] = True
            left[group[atom]] -= 1
    return gone


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
    count = int(share * spare(sizes, min_kept))
    assert chosen(scores, sizes, min_kept, count).tolist() == one_by_one(scores, sizes, min_kept, count)


@given(cases, st.integers(2, 4))
def test_kept_counts_are_multiples_and_no_unit_goes_without_need(case, divisible):
    groups, scores, share = case
    sizes, min_kept = [s for s, _ in groups], [k for _, k in groups]
    count = int(share * spare(sizes, min_kept, divisible))
    gone = chosen(scores, sizes, min_kept, count, divisible)
    assert count <= gone.sum() < count + divisible
    for size, least, own in zip(sizes, min_kept, np.split(gone, np.cumsum(sizes)[:-1]), strict=True):
        kept = size - int(own.sum())
        assert kept == size or (kept % divisible == 0 and kept >= max(least, divisible))


@given(cases, st.integers(1, 4))
def test_what_is_gone_is_not_chosen_again_and_widths_stay_multiples(case, divisible):
    groups, scores, share = case
    sizes, min_kept = [s for s, _ in groups], [k for _, k in groups]
    most = spare(sizes, min_kept, divisible)
    before = chosen(scores, sizes, min_kept, int(share * most), divisible)
    noise = np.random.default_rng(0).standard_normal(len(scores))
    after = chosen(noise, sizes, min_kept, most - int(before.sum()), divisible, left=~before)
    assert not (before & after).any()
    assert (before | after).sum() == most


def test_a_node_group_is_never_emptied():
    # every atom of the first group scores lowest, yet one stays
    gone = chosen([0.0, 0.1, 0.2, 5.0, 6.0, 7.0], [3, 3], [1, 1], 4)
    assert gone.tolist() == [True, True, False, True, True, False]


def test_a_unit_is_as_important_as_its_most_important_atom():
    # groups of 4, units of 2: units score 9 and 10 in the first group, 3 and 4 in the second
    gone = chosen([0.0, 9.0, 10.0, 10.0, 2.0, 3.0, 4.0, 4.0], [4, 4], [1, 1], 2, 2)
    assert gone.tolist() == [False, False, False, False, True, True, False, False]


def test_what_saves_nothing_stays():
    # the second group has no part in the cost, however low its scores
    cost = Polynomial({(0,): 10}, 2)
    gone = select(np.array([5.0, 6.0, 0.0, 0.1]), np.ones(4, bool), np.array([2, 2]), np.array([1, 1]), cost, 10)
    assert gone.tolist() == [True, False, False, False]


def test_a_goal_that_the_limits_forbid_takes_all_that_may_go():
    assert chosen([1, 2, 3, 4], [2, 2], [1, 2], 3).tolist() == [True, False, False, False]


networks = st.integers(2, 3).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 4), min_size=n, max_size=n),
        st.lists(st.integers(1, 9), min_size=n, max_size=n),  # cost alone
        st.lists(st.integers(0, 5), min_size=n - 1, max_size=n - 1),  # cost with the next one
        st.floats(0.1, 1.0),
        st.integers(0, 2**32 - 1),
    )
)


def best(scores, sizes, weights, cost, goal):
    """The least importance that must be lost, by trying every choice."""
    ranked = [np.concatenate([[0], np.cumsum(np.sort(own))]) for own in np.split(scores, np.cumsum(sizes)[:-1])]
    return min(
        sum(
            weight * lost[size - count]
            for weight, lost, size, count in zip(weights, ranked, sizes, counts, strict=True)
        )
        for counts in itertools.product(*(range(1, size + 1) for size in sizes))
        if cost(np.array(counts)) <= goal
    )


def lost_by(gone, scores, sizes, weights):
    return float((np.repeat(weights, sizes) * scores * gone).sum())


@given(networks)
def test_where_costs_add_up_the_choice_is_the_optimum_up_to_one_atom(network):
    sizes, alone, _, share, seed = network
    sizes = np.array(sizes)
    cost = Polynomial({(i,): w for i, w in enumerate(alone)}, len(sizes))
    scores = np.random.default_rng(seed).random(sizes.sum())
    bottom = cost(np.ones_like(sizes))
    goal = bottom + share * (cost(sizes) - bottom)
    gone = select(scores, np.ones(len(scores), bool), sizes, np.ones_like(sizes), cost, goal)
    weights = np.ones(len(sizes))
    counts = sizes - [own.sum() for own in np.split(gone, np.cumsum(sizes)[:-1])]
    assert cost(counts) <= goal
    # the bound of the greedy solution of a knapsack: all but the last atom that goes is in the optimum's price range
    last = float((np.repeat(weights, sizes) * scores * gone).max(initial=0.0))
    assert lost_by(gone, scores, sizes, weights) <= best(scores, sizes, weights, cost, goal) + last + 1e-9


@given(networks)
def test_where_costs_multiply_the_choice_is_near_the_optimum(network):
    sizes, alone, together, share, seed = network
    sizes = np.array(sizes)
    cost = Polynomial(
        {(i,): w for i, w in enumerate(alone)} | {(i, i + 1): w for i, w in enumerate(together)}, len(sizes)
    )
    scores = np.random.default_rng(seed).random(sizes.sum())
    bottom = cost(np.ones_like(sizes))
    goal = bottom + share * (cost(sizes) - bottom)
    gone = select(scores, np.ones(len(scores), bool), sizes, np.ones_like(sizes), cost, goal)
    weights = np.ones(len(sizes))
    counts = sizes - [own.sum() for own in np.split(gone, np.cumsum(sizes)[:-1])]
    assert cost(counts) <= goal
    last = float((np.repeat(weights, sizes) * scores * gone).max(initial=0.0))
    # products make it a harder problem, for which two atoms of slack are enough on networks as small as these
    assert lost_by(gone, scores, sizes, weights) <= best(scores, sizes, weights, cost, goal) + 2 * last + 1e-9


@pytest.mark.parametrize("by_cost", [0, 1, 2])
def test_no_atom_is_given_up_without_need(by_cost):
    rng = np.random.default_rng(0)
    sizes = np.array([300, 400, 200])
    cost = Polynomial({(0,): 7, (0, 1): 3, (1, 2): 5, (2,): 11}, 3)
    scores = rng.random(900)
    gone = select(scores, np.ones(900, bool), sizes, np.ones(3, int), cost, 0.5 * cost(sizes), by_cost=by_cost)
    counts = sizes - [own.sum() for own in np.split(gone, np.cumsum(sizes)[:-1])]
    assert 0.99 * 0.5 * cost(sizes) <= cost(counts) <= 0.5 * cost(sizes)
    assert ((-cost.marginal(counts, -np.ones(3, int)))[counts < sizes] > 0.5 * cost(sizes) - cost(counts)).all()


# Ties ----------------------------------------------------------------------------------------------------------------


def tied(scores, ties, sizes, count, **options):
    """A choice of at least ``count`` atoms by score alone, where groups of one tie lose equally many."""
    ties, sizes = np.array(ties), np.array(sizes)
    cost = atoms(sizes).tied(ties)
    goal = int(sizes.sum()) - count
    least = np.ones_like(sizes)
    options = {"by_cost": 0} | options
    return select(np.array(scores, float), np.ones(sizes.sum(), bool), sizes, least, cost, goal, ties=ties, **options)


def test_a_tie_loses_equally_many_and_each_group_its_lowest():
    gone = tied([5, 1, 3, 9, 8, 7, 4, 4, 4], [0, 0, 1], [3, 3, 3], 2)
    assert gone.tolist() == [False, True, False, False, False, True, False, False, False]  # 1 and 7: 4 on average
    gone = tied([5, 1, 3, 9, 8, 7, 3, 4, 4], [0, 0, 1], [3, 3, 3], 1)
    assert gone.tolist() == [False] * 6 + [True, False, False]


def test_what_a_tie_saves_is_what_its_groups_save_on_average():
    gone = tied([4, 9, 4, 9, 3, 9], [0, 0, 1], [2, 2, 2], 1, by_cost=1.0, fill=False)  # 3 for one atom, or 8 for two
    assert gone.tolist() == [False] * 4 + [True, False]


def test_the_least_of_a_tie_is_the_greatest_of_its_groups():
    cost = atoms([3, 3]).tied(np.array([0, 0]))
    scores = np.arange(6.0)
    gone = select(scores, np.ones(6, bool), np.array([3, 3]), np.array([1, 2]), cost, 0, ties=np.array([0, 0]))
    assert gone.tolist() == [True, False, False, True, False, False]


def test_groups_of_one_tie_have_equally_many_left():
    cost = atoms([2, 2]).tied(np.array([0, 0]))
    left = np.array([True, False, True, True])
    with pytest.raises(ValueError, match="one tie"):
        select(np.zeros(4), left, np.array([2, 2]), np.ones(2, int), cost, 1, ties=np.array([0, 0]))


layouts = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4
)  # groups of a tie, divisor, units


@given(layouts, st.randoms(use_true_random=False), st.floats(0, 1), st.booleans())
def test_counts_are_even_and_divisible_and_the_goal_is_met(ties, random, share, by_cost):
    sizes, number, divisors = [], [], []
    for i, (many, divisor, units) in enumerate(ties):
        sizes += [divisor * units] * many
        number += [i] * many
        divisors += [divisor] * many
    order = random.sample(range(len(sizes)), len(sizes))  # groups of one tie need not lie side by side
    sizes, number, divisors = (np.array([x[i] for i in order]) for x in (sizes, number, divisors))
    least = np.array([least_kept(s, 1, d) for s, d in zip(sizes, divisors, strict=True)])
    monomials = {(i,): 1 + i for i in range(len(sizes))} | {(i, i + 1): 2 for i in range(len(sizes) - 1)}
    cost = Polynomial(monomials, len(sizes))
    scores = np.array([random.random() for _ in range(sizes.sum())])
    goal = cost(sizes) - share * (cost(sizes) - cost(least))
    gone = select(
        scores, np.ones(len(scores), bool), sizes, least, cost.tied(number), goal, divisors, float(by_cost), ties=number
    )
    kept = np.array([int((~own).sum()) for own in np.split(gone, np.cumsum(sizes)[:-1])])
    assert all(len(set(kept[number == tie])) == 1 for tie in number)
    assert not (kept % divisors).any() and (kept >= least).all()
    assert cost(kept) <= goal + 1e-9
    for own, score in zip(np.split(gone, np.cumsum(sizes)[:-1]), np.split(scores, np.cumsum(sizes)[:-1]), strict=True):
        assert not own.any() or own.all() or score[own].max() <= score[~own].min()


def test_without_ties_nothing_changes():
    draw = np.random.default_rng(0)
    sizes = np.array([5, 7, 3])
    cost = Polynomial({(0, 1): 2, (1, 2): 3, (0,): 1}, 3)
    scores = draw.random(15)
    args = scores, np.ones(15, bool), sizes, np.ones(3, int), cost, 0.4 * cost(sizes)
    alone = np.arange(3)
    same = select(*args[:4], cost.tied(alone), args[5], ties=alone)
    assert select(*args).tolist() == same.tolist()


@given(st.lists(st.integers(0, 2), min_size=3, max_size=3), st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_a_tied_cost_is_the_cost(ties, counts):
    cost = Polynomial({(0, 1): 2, (1, 2): 3, (0,): 1, (1, 1): 5, (): 4}, 3)
    ties = np.unique(ties, return_inverse=True)[1]
    each = np.array(counts[: ties.max() + 1])
    together = cost.tied(ties)
    assert together(each) == cost(each[ties])
    saved = [together(each) - together(each - (np.arange(len(each)) == i)) for i in range(len(each))]
    assert together.marginal(each, np.ones_like(each)).tolist() == pytest.approx(saved)


@pytest.mark.parametrize(
    "groups, dear", [(2, 43.0), (14, 10.75)]
)  # all combinations are looked at, or moves between groups
def test_a_goal_that_a_coarse_unit_overshoots_is_met_by_others(groups, dear):
    sizes = np.array([512, *[4] * groups, *[2] * 6])
    cost = np.array([1.0, *[dear] * groups, *[0.5] * 6])  # an atom of the coarse group is not among the dearest
    measure = Polynomial({(i,): c for i, c in enumerate(cost)}, len(sizes))
    full, by = measure(sizes), np.array([256, *[1] * (len(sizes) - 1)])
    scores = np.repeat([0.0, *[1.0] * (len(sizes) - 1)], sizes)
    least = np.minimum(by, sizes)
    gone = select(scores, np.ones(len(scores), bool), sizes, least, measure, full - 172, by, by_cost=0)
    counts = np.array([part.sum() for part in np.split(~gone, np.cumsum(sizes)[:-1])])
    assert counts[0] == 512 and full - 172 - 0.01 * full <= measure(counts) <= full - 172
