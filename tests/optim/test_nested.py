"""Kept sets of a family's members: nested whatever the scores, each at its target, with room for more between them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oto.errors import NotPrunedWarning, TargetError
from oto.groups.cost import Costs, Polynomial
from oto.groups.node_group import NodeGroup, Slice
from oto.optim.choice import Choice
from oto.optim.nested import Nested, between
from oto.optim.target import Target

SIZES = (40, 24, 24, 60)


def groups(tie: str | None = None, divisor: int = 1) -> list[NodeGroup]:
    def made(i: int, size: int) -> NodeGroup:
        rows = (Slice(f"{i}.weight", 0, ()),)
        own = tie if i in (1, 2) else None
        return NodeGroup(f"{i}.weight", size, slices=rows, zeros=rows, tie=own, divisor=divisor)

    return [made(i, size) for i, size in enumerate(SIZES)]


def costs() -> Costs:
    """Four layers in a row, of the widths of the groups."""
    macs = Polynomial({(0,): 90, (0, 1): 9, (1, 2): 9, (2, 3): 9, (3,): 10}, 4)
    return Costs(tuple(f"{i}.weight" for i in range(4)), np.array(SIZES), macs, macs, macs)


def chosen(target: float, **options: object) -> Choice:
    tie, divisor = options.pop("tie", None), options.pop("divisor", 1)
    made = groups(tie, divisor)  # type: ignore[arg-type]
    return Choice.of(made, {"target_macs": target}, costs=costs(), **options)  # type: ignore[arg-type]


def counts(kept: Tensor) -> list[int]:
    return [int(own.sum()) for own in kept.split_with_sizes(list(SIZES))]


SCORES = st.integers(0, 2**32 - 1).map(
    lambda seed: torch.rand(sum(SIZES), generator=torch.Generator().manual_seed(seed)) ** 4
)
WAYS = st.sampled_from([{}, {"scope": "local"}, {"divisor": 4}, {"tie": "alike"}, {"by_cost": 0.0}])


@settings(max_examples=30)
@given(SCORES, WAYS)
def test_members_are_nested_and_meet_their_targets(scores: Tensor, how: dict[str, object]) -> None:
    targets = (0.8, 0.5, 0.3)
    nested = Nested.of([chosen(target, **how) for target in targets])
    levels = nested.levels(scores)
    assert levels.dtype == torch.uint8 and levels.shape == scores.shape
    before = torch.ones(len(scores), dtype=torch.bool)
    for number, choice in enumerate(nested.choices, 1):
        kept = levels >= number
        assert (kept <= before).all() and not torch.equal(kept, before)
        own = counts(kept)
        assert choice.target.measure(np.array(own)) <= choice.target.goal
        assert all(count % how.get("divisor", 1) == 0 for count in own)  # type: ignore[operator]
        assert "tie" not in how or own[1] == own[2]
        before = kept


@settings(max_examples=30)
@given(SCORES, st.sampled_from([{}, {"divisor": 2}, {"tie": "alike"}]), st.floats(0.55, 0.75))
def test_a_member_that_is_cut_between_two_is_nested_in_both(
    scores: Tensor, how: dict[str, object], target: float
) -> None:
    levels = Nested.of([chosen(t, **how) for t in (0.8, 0.5)]).levels(scores)
    choice = chosen(target, **how)
    kept = between(choice, scores, levels >= 1, levels >= 2)
    assert (kept <= (levels >= 1)).all() and (kept >= (levels >= 2)).all()
    cost = choice.target.measure(np.array(counts(kept)))
    assert cost <= choice.target.goal
    assert "tie" not in how or counts(kept)[1] == counts(kept)[2]
    # the best of what lies between: within a group nothing that went is above what stays, unless the smaller has it
    for own, score, small, large in zip(
        *(x.split_with_sizes(list(SIZES)) for x in (kept, scores, levels >= 2, levels >= 1)), strict=True
    ):
        stayed, went = score[own & ~small], score[large & ~own]
        assert not len(stayed) or not len(went) or stayed.min() >= went.max()


def test_a_member_below_the_smallest_is_cut_too() -> None:
    scores = torch.rand(sum(SIZES))
    levels = Nested.of([chosen(0.5)]).levels(scores)
    kept = between(chosen(0.3), scores, levels >= 1, torch.zeros(len(scores), dtype=torch.bool))
    assert (kept <= (levels >= 1)).all() and sum(counts(kept)) < sum(counts(levels >= 1))


def test_a_target_that_does_not_lie_between_is_refused() -> None:
    scores = torch.rand(sum(SIZES))
    levels = Nested.of([chosen(t) for t in (0.8, 0.5)]).levels(scores)
    for target in (0.9, 0.4):
        with pytest.raises(TargetError, match="not between"):
            between(chosen(target), scores, levels >= 1, levels >= 2)


def test_targets_that_do_not_fall_are_refused() -> None:
    with pytest.raises(TargetError, match=r"do not fall: .*\n  effect  members are nested"):
        Nested.of([chosen(0.5), chosen(0.75)])
    with pytest.raises(TargetError, match="do not fall"):
        Nested.of([chosen(0.5), chosen(0.5)])
    with pytest.raises(TargetError, match="no targets"):
        Nested.of([])
    with pytest.raises(TargetError, match="the full network is a member of every family"):
        Nested.of([chosen(1.0)])


def test_a_target_that_the_member_before_it_meets_gives_the_same_member_again() -> None:
    atoms, scores = Choice.of(groups(), {"target_group_sparsity": 0.1}, costs=costs()), torch.rand(sum(SIZES))
    with pytest.warns(NotPrunedWarning, match="is met already by the member before it"):
        levels = Nested.of([chosen(0.3), atoms]).levels(scores)
    assert torch.equal(levels >= 2, levels >= 1) and torch.equal(levels, 2 * Nested.of([chosen(0.3)]).levels(scores))
    assert isinstance(atoms.target, Target)
