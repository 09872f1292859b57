"""Targets: as people ask for them, met from below after training, refused with what can be reached."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

from oto import OTO
from oto.errors import TargetError
from oto.optim import Choice, Target
from tests.zoo.models import tokens
from tests.zoo.transformers_zoo import GQA, VIT, from_config, picture


class Residual(nn.Module):
    """Convolutions, a residual connection, a concatenation and a convolution with groups."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(48, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 48, 3, padding=1)
        )
        self.left, self.right = nn.Conv2d(48, 40, 1), nn.Conv2d(48, 56, 3, padding=1)
        self.grouped = nn.Conv2d(96, 96, 3, groups=12)
        self.head = nn.Linear(96, 10)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.block(x)
        x = torch.cat([self.left(x), self.right(x)], 1).relu()
        return self.head(self.grouped(x).relu().mean((2, 3)))


NETWORKS = {
    "cnn": lambda: (Residual(), torch.randn(2, 3, 8, 8)),
    "vit": from_config("ViTForImageClassification", "ViTConfig", picture, **VIT),
    "llama": from_config("LlamaForCausalLM", "LlamaConfig", tokens, **GQA),
    "moe": from_config("MixtralForCausalLM", "MixtralConfig", tokens, **GQA, num_local_experts=4),
}
ASKED = {"target_macs": 0.5, "target_params": 0.6, "target_bytes": 0.4, "target_group_sparsity": 0.3}


@pytest.fixture(scope="module", params=NETWORKS)
def analyzed(request):
    torch.manual_seed(0)
    return OTO(*NETWORKS[request.param]())


@pytest.fixture(scope="module")
def cnn():
    torch.manual_seed(0)
    return OTO(*NETWORKS["cnn"]())


def descend(oto, optimizer, steps):
    """Real steps: logits against fixed classes."""
    x = oto.dummy_input
    for _ in range(steps):
        optimizer.zero_grad()
        output = oto.model(**x) if isinstance(x, dict) else oto.model(x)
        logits = getattr(output, "logits", output)
        logits = logits.reshape(-1, logits.shape[-1])
        nn.functional.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[-1]).backward()
        optimizer.step()


# Met ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.filterwarnings("ignore::oto.errors.CollapseWarning")  # networks as small as these have little to choose
def test_a_target_is_met_within_a_hundredth_or_an_atom_from_below(analyzed, name):
    oto = copy.deepcopy(analyzed)
    optimizer = oto.hesso(
        variant="adamw", lr=1e-3, start_pruning_step=1, pruning_steps=6, pruning_periods=3, **{name: ASKED[name]}
    )
    descend(oto, optimizer, 8)
    subnet = oto.construct_subnet()
    counts = np.array([len(subnet.kept[group.name]) for group in optimizer.node_groups])
    if name == "target_group_sparsity":
        left, total = counts.sum(), optimizer.num_atoms
        goal = total - int(total * ASKED[name])
    else:
        what = name.removeprefix("target_")
        left, goal = getattr(subnet.cost_after, what), ASKED[name] * getattr(subnet.cost_before, what)
    # what goes in the last period is given back while it fits, so at most the coarsest atom is missing; in networks as
    # small as these a channel of the residual width, or a head, is more than a hundredth of the whole
    coarsest = -optimizer.choice.target.measure.marginal(counts, -np.ones_like(counts)).min()
    assert goal - max(0.01 * goal, coarsest) <= left <= goal
    assert optimizer.progress.cost == left <= optimizer.progress.goal
    assert sum(p.numel() for p in subnet.model.parameters()) == subnet.cost_after.params


@pytest.mark.parametrize("name", ["target_macs", "target_params", "target_bytes"])
def test_an_integer_is_the_number_and_a_float_the_share_of_it(analyzed, name):
    costs = analyzed.costs
    sizes, full = costs.sizes, getattr(costs, name.removeprefix("target_"))(costs.sizes)
    share, number, other = (
        Choice.of(analyzed.node_groups, {name: asked}, costs=costs)
        for asked in (0.5, int(full * 0.5), np.int64(full * 0.5))
    )
    assert share.target.goal == full * 0.5 and number.target.goal == other.target.goal == int(full * 0.5)
    scores, everything = torch.rand(int(sizes.sum())), torch.ones(int(sizes.sum()), dtype=torch.bool)
    assert torch.equal(number.select(scores, everything), share.select(scores, everything))
    assert isinstance(number.target.asked, int)


def test_everything_may_be_kept(cnn):
    for asked in ({"target_macs": 1.0}, {"target_params": 10**12}, {"target_group_sparsity": 0}):
        optimizer = copy.deepcopy(cnn).hesso(lr=0.1, total_steps=100, **asked)
        assert not optimizer.choice.target.wants_less
        assert "nothing has to go" in optimizer.plan()


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ASKED)
def test_what_cannot_be_reached_is_refused_and_what_the_message_names_is_reached(analyzed, name):
    keep, costs = {"min_kept": 0.5}, analyzed.costs
    extreme = 0.99 if name == "target_group_sparsity" else 0.01
    with pytest.raises(TargetError, match=f"{name}={extreme}") as caught:
        analyzed.hesso(lr=0.1, total_steps=100, **{name: extreme}, **keep)
    text = str(caught.value)
    number = float(re.search(r"ask for ([\d.]+) or (?:more|less)", text)[1])
    choice = Choice.of(analyzed.node_groups, {name: number}, costs=costs, **keep)
    total = int(costs.sizes.sum())
    left = ~choice.select(torch.rand(total), torch.ones(total, dtype=torch.bool))
    counts = np.array([int(own.sum()) for own in left.split_with_sizes(choice.sizes)])
    assert choice.target.measure(counts) <= choice.target.goal
    assert (counts >= costs.sizes / 2).all()
    further = number + (0.02 if name == "target_group_sparsity" else -0.0002)
    with pytest.raises(TargetError):
        Choice.of(analyzed.node_groups, {name: further}, costs=costs, **keep)


def test_the_share_of_groups_that_a_message_names_is_never_rounded_up():
    sizes = np.array([30011])
    for least in range(1, 30000, 601):
        asked = Target.of({"target_group_sparsity": 0.9999}, sizes, None)
        with pytest.raises(TargetError) as caught:
            asked.require_reachable(np.array([least + 4]))
        number = float(re.search(r"ask for ([\d.]+) or less", str(caught.value))[1])
        Target.of({"target_group_sparsity": number}, sizes, None).require_reachable(np.array([least + 4]))


@pytest.mark.parametrize(
    "asked, message",
    [
        ({}, "no target is given; exactly one is needed[^$]*to fix  ask for one of target_macs="),
        ({"target_macs": 0.5, "target_params": 0.5}, "target_macs and target_params are given; exactly one"),
        ({"target_macs": 0.0}, r"target_macs is 0\.0; a float is the share to keep, in \(0, 1\]"),
        ({"target_macs": 1.5}, r"target_macs is 1\.5; a float is the share"),
        ({"target_params": 0}, "target_params is 0; it is a positive number of parameters"),
        ({"target_params": -3}, "positive number of parameters"),
        ({"target_bytes": "much"}, "target_bytes is 'much'; it is a finite number"),
        ({"target_bytes": True}, "target_bytes is True; it is a finite number"),
        ({"target_macs": float("nan")}, "finite number"),
        ({"target_macs": 1}, "1 is a number of MACs, 1.0 would be a share"),
        ({"target_group_sparsity": 1.0}, r"share of groups to remove, in \[0, 1\)"),
        ({"target_group_sparsity": -0.1}, r"share of groups to remove, in \[0, 1\)"),
        (
            {"target_group_sparsity": 1e-9},
            r"groups is less than one[^$]*nothing would be removed[^$]*ask for 0\.\d+ or",
        ),
    ],
)
def test_a_target_that_means_nothing_is_refused(cnn, asked, message):
    with pytest.raises(TargetError, match=message):
        cnn.hesso(lr=0.1, total_steps=100, **asked)


def test_costs_that_are_not_known_are_asked_for():
    with pytest.raises(TargetError, match="needs the costs of the network"):
        Target.of({"target_macs": 0.5}, np.array([4]), None)


# Seen while training --------------------------------------------------------------------------------------------------


def test_the_plan_says_what_happens_when_and_what_the_learning_rate_should_do(cnn):
    optimizer = cnn.hesso(lr=0.1, target_macs=0.5, total_steps=1000, start_pruning_step=0.1, pruning_steps=0.4)
    lines = optimizer.plan().splitlines()
    macs = cnn.compute_macs()
    assert lines[0] == f"target_macs=0.5: at most {macs / 2:,.0f} of {macs:,} MACs"
    assert lines[1:-1] == str(optimizer.schedule).splitlines() and "steps 100–499" in lines[2]
    assert lines[-1].startswith("learning rate:") and "step 500" in lines[-1]


@pytest.mark.parametrize("wrapped", [False, True])
def test_cost_and_goal_can_be_followed(cnn, wrapped):
    oto = copy.deepcopy(cnn)
    optimizer = inner = oto.hesso(lr=0.01, target_params=0.4, start_pruning_step=1, pruning_steps=6, pruning_periods=3)
    if wrapped:
        accelerate = pytest.importorskip("accelerate")
        model, optimizer = accelerate.Accelerator(cpu=True).prepare(oto.model, inner)
        assert model is oto.model
        inner = optimizer.optimizer
    seen = [inner.progress]
    for _ in range(8):
        descend(oto, optimizer, 1)
        seen.append(inner.progress)
    costs = [p.cost for p in seen]
    full = oto.compute_num_params()
    assert costs[:3] == [full] * 3 and costs == sorted(costs, reverse=True)
    assert len(set(costs)) == 4  # full, and once less after each period
    assert {p.goal for p in seen} == {0.4 * full} and {p.unit for p in seen} == {"parameters"}
    assert costs[-1] <= 0.4 * full
    assert str(seen[-1]).endswith(f"; {costs[-1]:,.0f} parameters, goal {0.4 * full:,.0f}")
    shares = [(full - cost) / (0.6 * full) for cost in sorted(set(costs), reverse=True)]
    assert shares == pytest.approx([0, 19 / 27, 26 / 27, 1], abs=0.02)  # 1 - (1 - k / 3)^3, up to an atom


class Milliseconds:
    """A second measure, linear in the counts."""

    def __call__(self, counts):
        return 2.0 + counts.sum() / 4

    def marginal(self, counts, fewer):
        return fewer / 4


def test_milliseconds_go_by_whatever_measures_them():
    sizes = np.array([4, 4])
    with pytest.raises(TargetError, match="target_latency_ms needs"):
        Target.of({"target_latency_ms": 1.0}, sizes, None)
    target = Target.of({"target_latency_ms": 2.5}, sizes, None, Milliseconds())
    assert (target.full, target.goal, target.unit) == (4.0, 2.5, "ms")
    with pytest.raises(TargetError, match=r"allows 2\.5 of 4 ms, but 3 .* are left"):
        target.require_reachable(np.array([2, 2]))


def test_a_share_of_groups_is_that_of_its_digits():
    goal = Target.of({"target_group_sparsity": 0.29}, np.array([60, 40]), None).goal
    assert goal == 71  # 0.29 * 100 is 28.999999999999996
