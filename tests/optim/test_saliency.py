"""The criteria against their formulas, written out per atom in float64."""

from __future__ import annotations

import pytest
import torch

from oto.errors import TargetError
from oto.groups.node_group import Cut, NodeGroup, Slice
from oto.optim import CRITERIA, Entries
from oto.optim.saliency import NORMALIZE, importance, indistinct, raw_scores, resolve, shared_out

BY_HAND = {
    "magnitude": lambda x, g: x.norm(),
    "avg_magnitude": lambda x, g: x.norm() / x.numel(),
    "path_norm": lambda x, g: x.norm() ** 2,  # nothing reads these entries
    "cosine_similarity": lambda x, g: 1 - x @ g / (x.norm() * g.norm()),
    "taylor_first_order": lambda x, g: (x @ g).abs(),
    "taylor_second_order": lambda x, g: 0.5 * (x @ g) ** 2,
}


def entries(dtype=torch.float64):
    """Four atoms: rows of a convolution, a bias, and every second block of three columns of a linear layer."""
    shapes = [(4, 3, 2, 2), (4,), (5, 24)]
    slices = [Slice("w", 0, ()), Slice("b", 0, ()), Slice("v", 1, (Cut(2, 4, 3, 0, 4),))]
    weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
    gradients = [torch.randn(shape, dtype=dtype) for shape in shapes]
    views = [[piece.of(t) for piece, t in zip(slices, tensors, strict=True)] for tensors in (weights, gradients)]
    return Entries(*views)


def flat(views):
    return torch.cat([view.reshape(4, -1) for view in views], 1)


def test_every_criterion_is_written_out_here():
    assert BY_HAND.keys() == CRITERIA.keys()


@pytest.mark.parametrize("name", CRITERIA)
def test_criterion(name):
    own = entries()
    expected = [BY_HAND[name](x, g) for x, g in zip(flat(own.weights), flat(own.gradients), strict=True)]
    # 1e-12: float64, sums of 43 terms
    torch.testing.assert_close(CRITERIA[name](own), torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CRITERIA)
def test_half_precision_is_summed_in_float32(name):
    half = entries(torch.bfloat16)
    full = Entries([w.double() for w in half.weights], [g.double() for g in half.gradients])
    scores = CRITERIA[name](half)
    assert scores.dtype == torch.float32
    # 1e-5: float32, sums of 43 terms, squared once; bfloat16 sums would be off by 1e-2
    torch.testing.assert_close(scores.double(), CRITERIA[name](full), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CRITERIA)
def test_a_missing_gradient_counts_as_zero(name):
    own = entries()
    absent = Entries(own.weights, [None, None, own.gradients[2]])
    zero = Entries(own.weights, [torch.zeros_like(own.weights[0]), torch.zeros_like(own.weights[1]), own.gradients[2]])
    torch.testing.assert_close(CRITERIA[name](absent), CRITERIA[name](zero), rtol=0, atol=0)
    assert CRITERIA[name](Entries(own.weights, [None] * 3)).isfinite().all()


def test_path_norm_does_not_see_how_a_scale_is_shared_by_two_layers():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).double()
    rows = (Slice("0.weight", 0, ()), Slice("0.bias", 0, ()))
    group = NodeGroup("0.weight", 4, slices=(*rows, Slice("2.weight", 1, ())), zeros=rows)
    parameters = dict(model.named_parameters())
    before = CRITERIA["path_norm"](Entries.of(group, parameters))
    paths = torch.cat([model[0].weight, model[0].bias[:, None]], 1)[:, :, None] * model[2].weight.T[:, None, :]
    torch.testing.assert_close(before, paths.square().sum((1, 2)))
    with torch.no_grad():  # ReLU: the function stays as it is
        model[0].weight.mul_(torch.tensor([1.0, 2, 4, 8])[:, None])
        model[0].bias.mul_(torch.tensor([1.0, 2, 4, 8]))
        model[2].weight.div_(torch.tensor([1.0, 2, 4, 8]))
    torch.testing.assert_close(CRITERIA["path_norm"](Entries.of(group, parameters)), before)


def test_what_is_shared_out_keeps_the_sum_of_each_node_group():
    sizes, alive = [3, 2, 2], torch.tensor([1, 0, 1, 1, 1, 1, 1], dtype=torch.bool)
    scores, by = torch.rand(7), torch.tensor([1.0, 50, 3, 2, 2, 0, 0])
    out = shared_out(scores, by, alive, sizes)
    sums = scores[0] + scores[2], scores[3] + scores[4]
    torch.testing.assert_close(out[[0, 2, 3, 4]], torch.stack([sums[0] / 4, sums[0] * 3 / 4, sums[1] / 2, sums[1] / 2]))
    assert out[5:].tolist() == [0, 0]  # nothing goes through it


def test_cosine_keeps_what_descent_makes_grow():
    # x <- x - lr * g: the first atom shrinks, the second grows
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    g = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert CRITERIA["cosine_similarity"](Entries([x], [g])).tolist() == [0.0, 2.0]


def test_cosine_of_nothing_is_no_opinion():
    assert CRITERIA["cosine_similarity"](Entries([torch.zeros(2, 3)], [torch.zeros(2, 3)])).tolist() == [1.0, 1.0]


def score(groups, alive, criteria, normalize="mean"):
    raw = [raw_scores(groups, criterion, alive.device) for criterion, _ in criteria]
    sizes = [len(own.weights[0]) for own in groups]
    return importance(raw, [weight for _, weight in criteria], alive, sizes, normalize)


BY_GROUP = {
    "mean": [3 / 3.5, 4 / 3.5, 1.0],
    "max": [0.75, 1.0, 1.0],
    "norm": [0.6, 0.8, 1.0],
    "all": [3 / 13, 4 / 13, 12 / 13],
    "none": [3.0, 4.0, 12.0],
}


def test_every_way_to_make_criteria_comparable_is_written_out_here():
    assert BY_GROUP.keys() == NORMALIZE.keys()


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_criteria_are_made_comparable_over_what_is_alive(normalize):
    first = Entries([torch.tensor([3.0, 4.0, 1e6])], [None])  # the third atom is pruned
    second = Entries([torch.tensor([12.0])], [None])
    alive = torch.tensor([True, True, False, True])
    scores = score([first, second], alive, resolve("magnitude"), normalize)
    torch.testing.assert_close(scores[alive], torch.tensor(BY_GROUP[normalize]))


def test_a_group_without_any_magnitude_goes_first_and_nothing_is_divided_by_zero():
    groups = [Entries([torch.zeros(2)], [None]), Entries([torch.ones(2)], [None])]
    for normalize in NORMALIZE:
        scores = score(groups, torch.ones(4, dtype=torch.bool), resolve("magnitude"), normalize)
        assert scores.isfinite().all() and scores.argsort().tolist()[:2] == [0, 1]


def test_what_is_published_counts_five_criteria_alike():
    assert [weight for _, weight in resolve("hesso")] == [0.2] * 5


def test_a_function_of_the_user_joins_the_others():
    def last_first(entries):
        return torch.arange(entries.weights[0].shape[0], 0, -1.0)

    own = Entries([torch.ones(4, 2)], [None])
    scores = score([own], torch.ones(4, dtype=torch.bool), resolve({"magnitude": 0.5, last_first: 0.5}))
    assert scores.argsort().tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("weights, message", [("magnitud", "no saliency is called"), ({"magnitude": 0.0}, "weight 0")])
def test_criteria_that_mean_nothing_are_refused(weights, message):
    with pytest.raises(TargetError, match=message):
        resolve(weights)


def test_node_groups_whose_atoms_are_alike():
    """By brute force, with scores of any sign; a node group of one atom that is left tells nothing."""
    draw = torch.Generator().manual_seed(0)
    sizes = [3, 1, 4, 2]
    for _ in range(50):
        raw = [torch.randint(-1, 1, (10,), generator=draw).float() for _ in range(2)]
        alive = torch.rand(10, generator=draw) < 0.7
        expected = []
        for left, *own in zip(*(t.split(sizes) for t in (alive, *raw)), strict=True):
            found = [len(set(part[left].tolist())) == 1 for part in own]
            expected.append(int(left.sum()) > 1 and all(found))
        assert indistinct(raw, alive, sizes).tolist() == expected
