"""What goes: limits of the user, layers that must not collapse, gradients of many batches, every run alike."""

from __future__ import annotations

import copy
import inspect
import io
import re

import numpy as np
import pytest
import torch
from torch import nn

from oto import OTO
from oto.errors import CollapseWarning, NothingPrunableError, TargetError, UnknownParameterError
from oto.optim import HESSO, Choice
from oto.optim.choice import FLOOR
from tests.optim.toy import assert_same, hesso, net, train

SIZES = {"features.0.weight": 40, "features.2.weight": 60, "features.4.weight": 24, "head.0.weight": 100}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 60, 3), nn.ReLU(), nn.Conv2d(60, 24, 3), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Linear(24, 100), nn.ReLU(), nn.Linear(100, 4))

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


@pytest.fixture(scope="module")
def oto():
    torch.manual_seed(0)
    return OTO(Net(), torch.randn(1, 3, 8, 8))


def widths(oto, scores=None, share=1.0, **options):
    """How many atoms of each node group a choice leaves, and the choice."""
    choice = Choice.of(oto.node_groups, options_of(options), costs=oto.costs, **options)
    total = sum(choice.sizes)
    alive = torch.ones(total, dtype=torch.bool)
    scores = torch.rand(total, generator=torch.Generator().manual_seed(1)) if scores is None else scores
    left = ~choice.select(scores, alive, share)
    own = left.split_with_sizes(choice.sizes)
    return {g.name: int(part.sum()) for g, part in zip(choice.groups, own, strict=True)}, choice


def options_of(options):
    return {name: options.pop(name) for name in list(options) if name.startswith("target_")} or {"target_macs": 0.5}


def test_the_network_is_what_these_tests_take_it_for(oto):
    assert {g.name: g.size for g in oto.node_groups if g.prunable} == SIZES


# Limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "min_kept, least",
    [
        (17, dict.fromkeys(SIZES, 17)),
        (0.5, {name: size // 2 for name, size in SIZES.items()}),
        ({"features.2.weight": 0.9}, {"features.2.weight": 54}),
        ({"features.2.bias": 41}, {"features.2.weight": 41}),  # any parameter that the group would zero
        ({"features.*": 0.5}, {"features.0.weight": 20, "features.2.weight": 30, "features.4.weight": 12}),
        ({"*": 0.25, "head.0.weight": 70}, {"features.2.weight": 15, "head.0.weight": 70}),
        ({"*": 30, "head.0.weight": 1}, {"head.0.weight": 30}),  # the greater of two that match
    ],
)
@pytest.mark.filterwarnings("ignore::oto.errors.CollapseWarning")
def test_every_group_keeps_what_it_was_promised(oto, min_kept, least):
    hungry = torch.cat([torch.full((size,), 1e-6 if name in least else 1.0) for name, size in SIZES.items()])
    for scores in (None, hungry + 1e-9 * torch.rand(len(hungry))):
        left, choice = widths(oto, scores, target_macs=0.45, min_kept=min_kept)
        # a group of no more than its least is not among those that may lose any
        assert all(left.get(name, SIZES[name]) >= number for name, number in least.items())
        assert choice.target.measure(np.array(list(left.values()))) <= choice.target.goal
    assert any(left.get(name, SIZES[name]) < SIZES[name] for name in SIZES)


@pytest.mark.parametrize("min_kept", [{"features.9.weight": 3}, {"body.*": 0.5}])
def test_a_least_for_what_is_not_there_is_refused(oto, min_kept):
    with pytest.raises(UnknownParameterError, match=f"matches, '{next(iter(min_kept))}'"):
        oto.hesso(lr=0.1, total_steps=100, target_macs=0.5, min_kept=min_kept)


@pytest.mark.parametrize("min_kept", [-1, 1.5, -0.1, True, {"features.*": 2.5}])
def test_a_least_that_means_nothing_is_refused(oto, min_kept):
    with pytest.raises(TargetError, match="min_kept is"):
        oto.hesso(lr=0.1, total_steps=100, target_macs=0.5, min_kept=min_kept)


def test_where_everything_is_kept_nothing_can_be_pruned(oto):
    with pytest.raises(NothingPrunableError, match=r"target_macs=0\.5"):
        oto.hesso(lr=0.1, total_steps=100, target_macs=0.5, min_kept=1.0)


@pytest.mark.parametrize("divisible", [4, 8])
def test_widths_that_change_are_multiples(oto, divisible):
    for share in (0.4, 1.0):
        left, choice = widths(oto, share=share, target_macs=0.5, group_divisible=divisible)
        assert all(count == SIZES[name] or count % divisible == 0 for name, count in left.items())
    counts = np.array(list(left.values()))
    unit = max(-choice.target.measure.marginal(counts, np.full(len(counts), -divisible)))
    assert choice.target.goal - unit <= choice.target.measure(counts) <= choice.target.goal


@pytest.mark.parametrize("option", [{"group_divisible": 16}, {"align": 16}])
@pytest.mark.parametrize("target", [{"target_macs": 0.5}, {"target_params": 0.45}, {"target_macs": 220_000}])
def test_a_target_that_steps_are_too_coarse_for_is_refused_with_what_can_be_reached(oto, target, option):
    with pytest.raises(TargetError, match="steps are coarse") as refused:
        oto.preview(**target, **option)
    text = str(refused.value)
    assert re.search(r"\.weight keeps multiples of 16 of its \d+ atoms", text)
    assert f"{next(iter(option))}=16" in text
    (name,) = target
    values = re.findall(rf"{name}=([\d.]+)", text.splitlines()[-1])
    assert len(values) == 2
    for value in values:
        asked = {name: float(value) if "." in value else int(value)}
        choice = Choice.of(oto.node_groups, asked, costs=oto.costs, **option)
        seen = oto.preview(**asked, **option)
        missed = choice.target.goal - choice.target.measure(np.array(list(seen.kept.values())))
        assert 0 <= missed <= 0.01 * choice.target.full


def test_every_combination_is_looked_at_before_a_target_is_refused(oto):
    # lowest scores first would end at 46.3 %, where a step is 5 %
    scores = torch.arange(sum(SIZES.values())).double()
    left, choice = widths(oto, scores, target_macs=0.5, group_divisible=8, saliency="magnitude")
    assert choice.target.measure(np.array(list(left.values()))) > 0.49 * choice.target.full


@pytest.mark.parametrize("asked", [{"target_macs": 0.4}, {"target_params": 0.3}, {"target_group_sparsity": 0.5}])
def test_locally_every_group_gives_up_the_same_share(oto, asked):
    left, choice = widths(oto, scope="local", **asked)
    shares = {name: left[name] / SIZES[name] for name in SIZES}
    assert max(shares.values()) - min(shares.values()) <= 1 / min(SIZES.values())
    counts = np.array(list(left.values()))
    assert choice.target.goal * 0.95 <= choice.target.measure(counts) <= choice.target.goal
    scores = torch.rand(sum(SIZES.values()))  # inside a group the lowest scores go
    gone = choice.select(scores, torch.ones(len(scores), dtype=torch.bool))
    for own, lost in zip(scores.split_with_sizes(choice.sizes), gone.split_with_sizes(choice.sizes), strict=True):
        assert own[lost].max() < own[~lost].min()


# Collapse -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.7, 0.4, 0.2])
def test_no_layer_collapses_while_the_target_can_be_met_otherwise(oto, target):
    worthless = torch.cat([torch.full((s,), 1.0 if n.startswith("head") else 0.0) for n, s in SIZES.items()])
    for scores in (worthless, 1 - worthless):
        left, choice = widths(oto, scores, target_params=target)
        assert all(count >= FLOOR * SIZES[name] for name, count in left.items())
        assert choice.target.measure(np.array(list(left.values()))) <= choice.target.goal


def test_a_floor_for_one_layer_leaves_that_of_the_others(oto):
    scores = torch.cat([torch.full((size,), 0.0 if name.startswith("head") else 1.0) for name, size in SIZES.items()])
    left, _ = widths(oto, scores, target_params=0.6, min_kept={"features.*": 0.5})
    assert left["head.0.weight"] >= FLOOR * 100


def test_layers_that_a_target_forces_to_be_thin_are_named(oto):
    copied = copy.deepcopy(oto)
    optimizer = copied.hesso(lr=0.01, target_params=0.008, start_pruning_step=0, pruning_steps=2, pruning_periods=2)
    train(copied.model, optimizer, range(1))
    with pytest.warns(CollapseWarning, match=r"leaves less than 20% of[^$]*to fix") as caught:
        train(copied.model, optimizer, range(1, 3))
    (text,) = {str(warning.message) for warning in caught}
    left = {name: size - len(optimizer.pruned_groups.get(name, ())) for name, size in SIZES.items()}
    pruned = {name for name, size in SIZES.items() if left[name] < FLOOR * size}
    assert pruned and all((f"{name} ({left[name]} of {SIZES[name]})" in text) == (name in pruned) for name in SIZES)
    assert optimizer.progress.cost <= optimizer.progress.goal


@pytest.mark.parametrize("scheduled", [False, True])
def test_the_warning_of_a_collapse_points_at_the_line_that_took_the_step(oto, scheduled):
    copied = copy.deepcopy(oto)
    optimizer = copied.hesso(lr=0.01, target_params=0.008, start_pruning_step=0, pruning_steps=1, pruning_periods=1)
    if scheduled:  # it puts a wrapper around step
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    copied.model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    with pytest.warns(CollapseWarning) as caught:
        optimizer.step()
    here = inspect.currentframe()
    assert (caught[0].filename, caught[0].lineno) == (__file__, here.f_lineno - 2)


@pytest.mark.parametrize(
    "saliency, normalize, by_cost, within",
    [
        (None, "none", 1, "path_norm"),
        ("taylor_first_order", "none", 1, None),
        ("magnitude", "mean", 0, None),
        ({"taylor_second_order": 1.0, "magnitude": 0.1}, "mean", 0, None),
        (lambda entries: entries.weight_sq, "mean", 0, None),
    ],
)
def test_only_what_is_in_the_unit_of_the_loss_is_divided_by_a_cost(oto, saliency, normalize, by_cost, within):
    choice = Choice.of(oto.node_groups, {"target_macs": 0.5}, costs=oto.costs, saliency=saliency)
    assert (choice.normalize, choice.by_cost) == (normalize, by_cost)
    assert getattr(choice.within, "__name__", None) == within


def test_a_magnitude_empties_no_layer(oto):
    """Per MAC it does: the layers beside the one that is thinned get cheaper, and so do their neighbors."""
    copied = copy.deepcopy(oto)
    kept = copied.preview(target_macs=0.3, saliency="magnitude").kept
    assert min(kept[name] / size for name, size in SIZES.items()) > 0.3


@pytest.mark.parametrize(
    "kind, within, gone",
    [("conv", None, [0, 3]), ("linear", None, [0, 1]), ("linear", "path_norm", [0, 3]), ("conv", "none", [0, 1])],
)
def test_a_group_is_worth_what_was_measured_and_its_atoms_what_goes_through_them(kind, within, gone):
    """By default only where convolutions read them."""
    conv = kind == "conv"
    layers = (
        [nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 2, 1, bias=False)]
        if conv
        else [nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)]
    )
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    with torch.no_grad():
        layers[0].weight.copy_(torch.tensor([1.0, 2, 3, 4])[:, None].expand(4, 3).reshape(layers[0].weight.shape))
        layers[1].weight.copy_(torch.tensor([4.0, 3, 2, 0.5]).expand(2, 4).reshape(layers[1].weight.shape))
    oto = OTO(model, torch.zeros(1, 3, 2, 2) if conv else torch.zeros(1, 3))
    optimizer = oto.hesso(
        lr=0.0, target_group_sparsity=0.5, start_pruning_step=0, pruning_steps=1, pruning_periods=1, within=within
    )
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    # Fisher alone rises with the row; what goes through an atom is 1·4, 2·3, 3·2, 4·½
    assert optimizer.pruned_groups["0.weight"].tolist() == gone


def test_as_published_nothing_holds_a_layer(oto):
    scores = torch.cat([torch.full((size,), 0.0 if name.startswith("head") else 1.0) for name, size in SIZES.items()])
    left, choice = widths(oto, scores, target_group_sparsity=0.45, saliency="hesso")
    assert left["head.0.weight"] == 1  # one ranking of all, blind to costs and widths
    assert (choice.normalize, choice.by_cost, choice.average_steps, len(choice.criteria)) == ("all", 0, 1, 5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scope": "layer"}, "scope is 'layer'; it is 'global' or 'local'"),
        ({"group_divisible": 0}, "group_divisible is 0; it is at least 1"),
        ({"normalize": "median"}, "normalize is 'median'; it is one of mean, max"),
        ({"by_cost": -1.0}, "by_cost is -1.0"),
        ({"average_steps": 0}, "average_steps is 0; it is at least 1"),
        ({"within": "taylor_first_order"}, "within is 'taylor_first_order'; it is one of none, magnitude"),
        ({"saliency": "size"}, "no saliency is called 'size'; there are hesso, dhspg, magnitude"),
    ],
)
def test_options_that_mean_nothing_are_refused(oto, options, message):
    with pytest.raises(TargetError, match=message):
        oto.hesso(lr=0.1, total_steps=100, target_macs=0.5, **options)


# Averages -------------------------------------------------------------------------------------------------------------


def two_atoms(average_steps):
    """A layer of two units, and an optimizer that takes one of them at step 3."""
    from oto.groups.node_group import NodeGroup, Slice

    model = nn.Linear(3, 2, bias=False)
    nn.init.ones_(model.weight)
    rows = (Slice("weight", 0, ()),)
    optimizer = HESSO(
        model.named_parameters(),
        [NodeGroup("weight", 2, rows, rows)],
        lr=0.0,
        target_group_sparsity=0.5,
        start_pruning_step=3,
        pruning_steps=1,
        pruning_periods=1,
        saliency="taylor_first_order",
        average_steps=average_steps,
        min_kept=1,
    )
    return model, optimizer


@pytest.mark.parametrize("average_steps, gone", [(1, 0), (2, 0), (3, 1), (4, 1), (100, 1)])
def test_what_matters_on_most_batches_is_kept(average_steps, gone):
    """The first unit has the greater gradient, but not at the step of the choice nor at the one before it."""
    model, optimizer = two_atoms(average_steps)
    for gradient in ([9.0, 1.0], [9.0, 1.0], [0.5, 1.0], [0.5, 1.0]):
        model.weight.grad = torch.tensor(gradient)[:, None].expand(2, 3).clone()
        optimizer.step()
    assert optimizer.pruned_groups["weight"].tolist() == [gone]


def test_only_the_steps_before_a_choice_are_looked_at():
    model = net()
    optimizer = hesso(model, start_pruning_step=6, pruning_steps=8, pruning_periods=2, average_steps=3)
    seen = []
    train(model, optimizer, range(16), then=lambda n: seen.append(optimizer.param_groups[0]["oto_seen"]))
    # choices at steps 6 and 10 end a window each, and forget it
    assert seen == [0, 0, 0, 0, 1, 2, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0]
    assert not optimizer.param_groups[0]["oto_sums"].any()


def test_a_choice_from_weights_alone_looks_at_no_step():
    model = net()
    optimizer = hesso(model, average_steps=3, saliency="magnitude", normalize="max")
    train(model, optimizer, range(2))
    assert optimizer.param_groups[0]["oto_sums"].shape == (0, 14)
    assert optimizer.param_groups[0]["oto_seen"] == 0


@pytest.mark.parametrize("stop", [5, 6, 7, 10])  # in the middle of a window, before, after and between choices
def test_resuming_in_the_middle_of_a_window_gives_the_same_choice(stop):
    schedule = {
        "start_pruning_step": 6,
        "pruning_steps": 8,
        "pruning_periods": 2,
        "average_steps": 4,
        "pruning_exponent": 1,
    }
    schedule |= {"saliency": {"taylor_first_order": 1.0, "cosine_similarity": 0.5}, "first_momentum": 0.9}
    straight = net()
    whole = hesso(straight, **schedule)
    train(straight, whole, range(16))

    first = net()
    optimizer = hesso(first, **schedule)
    train(first, optimizer, range(stop))
    assert optimizer.param_groups[0]["oto_seen"] == {5: 2, 6: 3, 7: 0, 10: 3}[stop]
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    second = net()
    second.load_state_dict(saved["model"])
    resumed = hesso(second, **schedule)
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, range(stop, 16))
    assert_same(straight, second)
    assert {n: a.tolist() for n, a in whole.pruned_groups.items()} == {
        n: a.tolist() for n, a in resumed.pruned_groups.items()
    }


# Every run alike ------------------------------------------------------------------------------------------------------


def test_two_runs_are_alike(oto):
    runs = []
    for _ in range(2):
        copied = copy.deepcopy(oto)
        optimizer = copied.hesso(
            lr=0.05, target_macs=0.4, start_pruning_step=2, pruning_steps=6, pruning_periods=3, first_momentum=0.9
        )
        train(copied.model, optimizer, range(10))
        runs.append((copied.model, optimizer.pruned_groups))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1].keys() == runs[1][1].keys()
    assert all(torch.equal(atoms, runs[1][1][name]) for name, atoms in runs[0][1].items())


def test_equal_scores_fall_to_the_first(oto):
    """Ties must not hang on how a sort goes about them, or ranks of a distributed run would part."""
    choice = Choice.of(oto.node_groups, {"target_params": 0.5}, costs=oto.costs)
    total = sum(choice.sizes)
    gone = choice.select(torch.ones(total), torch.ones(total, dtype=torch.bool))
    for own in gone.split_with_sizes(choice.sizes):
        assert own.tolist() == sorted(own.tolist(), reverse=True)


@pytest.mark.filterwarnings("ignore::oto.errors.CollapseWarning")
@pytest.mark.parametrize("goal", [820, 1000, 1200, 1347])
def test_a_floor_between_two_multiples_keeps_no_choice_above_its_target(goal):
    # a fifth of 96 is 32 in multiples of 16, which are 1,348 parameters; half of the way down to 16 there is no width
    model = nn.Sequential(nn.Linear(4, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 4))
    seen = OTO(model, torch.randn(2, 4)).preview(target_params=goal, group_divisible=16)
    assert seen.after.params <= goal
