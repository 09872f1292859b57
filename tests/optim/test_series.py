"""What every optimizer of the series owes its users, whatever the paper: one body for HSPG, DHSPG and HESSO's kin."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from oto import OTO
from oto.errors import NothingPrunableError, NotPrunedWarning, OptionError
from oto.groups.cost import Polynomial
from oto.groups.node_group import NodeGroup
from oto.optim import DHSPG, H2SPG, HESSO, HESSOCRIC, HSPG, LHSPG, Choice
from oto.optim.budget import Budget, rest, whole_counts
from oto.optim.plan import PRUNED, REDUNDANT
from tests.optim.toy import QuietGroup, assert_same, backward, count_zeros, groups, net, train, zero_atoms

START, STEPS, PERIODS = 2, 20, 4  # periods of HSPG and DHSPG: steps 2-6, 7-11, 12-16; the choice has 17-21
END = START + STEPS
WHEN = {"start_pruning_step": START, "pruning_steps": STEPS}
SERIES = {
    "hspg": (HSPG, {"lmbda": 1.0, "half_space_step": 3, "pruning_periods": PERIODS}),
    "dhspg": (DHSPG, {"lmbda": 0.6, "lmbda_amplify": 4, "pruning_periods": PERIODS}),
    "h2spg": (H2SPG, {"lmbda": 0.6, "lmbda_amplify": 4, "pruning_periods": PERIODS}),
    "dhspg as published": (DHSPG, {"lmbda": 0.6, "pruning_periods": PERIODS, "saliency": "dhspg"}),
}
ALL = SERIES | {
    "hesso": (HESSO, {"pruning_periods": PERIODS}),
    "lhspg": (LHSPG, {"pruning_periods": PERIODS}),
    "hesso-cric": (HESSOCRIC, {"pruning_periods": PERIODS, "sampling_steps": 2, "max_cycles": 2}),
}


def make(name, model, node_groups=None, **options):
    kind, own = ALL[name]
    options = {"target_group_sparsity": 0.5, "lr": 0.1} | WHEN | own | options
    return kind(model.named_parameters(), groups() if node_groups is None else node_groups, **options)


class Sign(torch.optim.Optimizer):
    """What somebody else may have written: a step that knows signs only."""

    def __init__(self, params, lr=1e-3, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    own = self.state[p].setdefault("average", torch.zeros_like(p))
                    own.lerp_(p.grad, 1 - group["beta"])
                    p.sub_(own.sign(), alpha=group["lr"])


BASES = {
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-2),
    "adam": torch.optim.Adam,
    "adamw": functools.partial(torch.optim.AdamW, weight_decay=1e-2),
    "rmsprop": functools.partial(torch.optim.RMSprop, momentum=0.9),
    "adagrad": torch.optim.Adagrad,
    "nadam": torch.optim.NAdam,
    "sign": Sign,
} | {name.lower(): getattr(torch.optim, name) for name in ("Adafactor", "Muon") if hasattr(torch.optim, name)}


OTHER = {"hspg": "adam", "dhspg": "adafactor", "h2spg": "muon"}
"""Besides SGD, the optimizer that each is tried on at once; all others with all others are for the zoo."""


def flat(dtype=torch.float32):
    """A network of matrices alone, which is all that Muon takes."""
    torch.manual_seed(0)
    layers = [
        nn.Linear(192, 8, bias=False),
        nn.GELU(),
        nn.Linear(8, 6, bias=False),
        nn.GELU(),
        nn.Linear(6, 4, bias=False),
    ]
    return nn.Sequential(nn.Flatten(), *layers).to(dtype)


def network(base):
    return flat() if base == "muon" else net()


def groups_of(model):
    return groups() if len(model) > 6 else OTO(model, torch.zeros(1, 3, 8, 8)).node_groups


def zeros_in(model):
    return (
        count_zeros(model)
        if len(model) > 6
        else int(sum((layer.weight == 0).all(1).sum() for layer in (model[1], model[3])))
    )


def among(quick, names, others):
    """All pairs; those that ``quick`` has not are for the zoo."""
    pairs = [(name, other) for name in names for other in others]
    marks = [() if quick(*pair) else pytest.mark.zoo for pair in pairs]
    ids = [f"{name}-{other}" for name, other in pairs]
    return [pytest.param(*pair, marks=own, id=i) for pair, own, i in zip(pairs, marks, ids, strict=True)]


# The wrapped optimizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "base"), among(lambda n, b: n == "hspg" or b == OTHER.get(n), SERIES, BASES))
def test_without_a_target_every_step_is_the_wrapped_one(name, base):
    ours, theirs = network(base), network(base)
    optimizer = make(name, ours, groups_of(ours), target_group_sparsity=0.0, base=BASES[base], lr=0.01)
    train(ours, optimizer, range(END + 2))
    train(theirs, BASES[base](theirs.parameters(), lr=0.01), range(END + 2))
    assert_same(ours, theirs)
    assert optimizer.ways == {"by half-space": 0, "by choice": 0}


@pytest.mark.parametrize(
    ("name", "base"),
    among(lambda n, b: b in ("sgd", OTHER.get(n)) or (n == "hspg" and b in ("sign", "muon")), SERIES, BASES),
)
def test_the_target_is_met_and_a_resumed_run_is_the_same_to_the_last_bit(name, base):
    through = network(base)
    options = {"base": BASES[base], "lr": 0.01}
    reference = make(name, through, groups_of(through), **options)
    states = {}

    def save(n):
        if n + 1 in ((START + 1, START + 7, START + 13, END - 2, END + 1) if base == "sgd" else (START + 7, END + 1)):
            buffer = io.BytesIO()
            torch.save({"model": through.state_dict(), "optimizer": reference.state_dict()}, buffer)
            states[n + 1] = buffer

    train(through, reference, range(END + 3), then=save)
    assert zeros_in(through) == reference.num_pruned == 7
    uninterrupted = network(base)
    train(uninterrupted, make(name, uninterrupted, groups_of(uninterrupted), **options), range(END + 3))
    assert_same(uninterrupted, through)  # that it was saved changed nothing
    for stop, buffer in states.items():
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        model = network(base)
        optimizer = make(name, model, groups_of(model), **options)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        train(model, optimizer, range(stop, END + 3))
        assert_same(model, through)
        assert optimizer.ways == reference.ways and optimizer.history == reference.history


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SERIES)
def test_other_dtypes(name, dtype):
    model = net(dtype)
    optimizer = make(name, model)
    train(model, optimizer, range(END))
    assert count_zeros(model) == 7


def test_an_optimizer_without_a_learning_rate_is_refused():
    class NoRate(Sign):
        def __init__(self, params):
            torch.optim.Optimizer.__init__(self, params, {"beta": 0.9})

    with pytest.raises(OptionError, match=r"NoRate has no learning rate \(lr\)"):
        make("hspg", net(), base=NoRate, lr=None)


@pytest.mark.parametrize("name", SERIES)
def test_every_slice_is_penalised_at_its_own_rate(name):
    """Norms are left alone here: of them, only what the loss says is done; a learning rate may be a tensor."""

    def split(model):
        return [
            {"params": [(n, p) for n, p in model.named_parameters() if p.dim() > 1], "lr": torch.tensor(0.1)},
            {"params": [(n, p) for n, p in model.named_parameters() if p.dim() == 1], "lr": 0.0},
        ]

    model = net()
    kind, own = SERIES[name]
    optimizer = kind(split(model), groups(), target_group_sparsity=0.5, lr=0.1, foreach=False, **WHEN, **own)
    before = {n: p.clone() for n, p in model.named_parameters()}
    train(model, optimizer, range(START + 1))
    assert optimizer.num_pruned == 0
    for n, p in model.named_parameters():
        assert p.equal(before[n]) == (p.dim() == 1), n
    train(model, optimizer, range(START + 1, END))
    assert count_zeros(model) == 7


@pytest.mark.parametrize("name", SERIES)
def test_frozen_entries_are_not_penalised_but_go_with_their_group(name):
    model = net()
    model[0].requires_grad_(False)
    optimizer = make(name, model)
    before = model[0].weight.clone()
    train(model, optimizer, range(END))
    gone = zero_atoms(model)[0]
    assert gone.any() and count_zeros(model) == 7
    assert model[0].weight[~gone].equal(before[~gone])


# How it is called ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SERIES, "lhspg"])
def test_closures_and_scalers_and_accumulation(name):
    plain, closed, scaled, summed = (net() for _ in range(4))
    optimizers = [make(name, model) for model in (plain, closed, scaled, summed)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)  # a power of two changes no bit
    for n in range(END):
        backward(plain, n)
        optimizers[0].step()
        assert optimizers[1].step(lambda n=n: backward(closed, n)) is not None
        backward(scaled, n)
        for p in scaled.parameters():
            p.grad.mul_(1024.0)
        scaler.scale(torch.ones(()))
        scaler.step(optimizers[2])
        scaler.update()
        backward(summed, n)
        half = [p.grad / 2 for p in summed.parameters()]
        for p, own in zip(summed.parameters(), half, strict=True):
            p.grad = own.clone()
            p.grad += own
        optimizers[3].step()
    for other in (closed, scaled, summed):
        assert_same(other, plain)


@pytest.mark.parametrize("name", [*SERIES, "lhspg"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_trains_the_same(name, copied):
    model = net()
    optimizer = make(name, model, variant="adamw")
    train(model, optimizer, range(START + 6))
    other, other_optimizer = copied((model, optimizer))
    train(model, optimizer, range(START + 6, END))
    train(other, other_optimizer, range(START + 6, END))
    assert_same(model, other)


@pytest.mark.parametrize("name", [*SERIES, "lhspg"])
def test_averages_of_the_weights_get_the_same_zeros(name):
    model = net()
    optimizer, average = make(name, model), torch.optim.swa_utils.AveragedModel(net())
    train(model, optimizer, range(START + 14), then=lambda n: average.update_parameters(model))
    gone = count_zeros(model)
    assert gone and count_zeros(average.module) < gone
    optimizer.zero_pruned_in(average)
    assert [own.tolist() for own in zero_atoms(average.module)] == [own.tolist() for own in zero_atoms(model)]


@pytest.mark.parametrize("name", SERIES)
def test_progress_and_history_say_which_way_groups_went(name):
    model = net()
    optimizer = make(name, model)

    def look(n):
        assert sum(optimizer.ways.values()) == optimizer.num_pruned == count_zeros(model)
        assert optimizer.progress.pruned == optimizer.num_pruned

    train(model, optimizer, range(END), then=look)
    assert "by half-space" in str(optimizer.progress) and "by choice" in str(optimizer.progress)
    noted = [record for record in optimizer.history if "by choice" in record]
    assert [record["step"] for record in noted] == [2, 7, 12, 17, 21] or name == "hspg"
    assert noted[-1] == {"step": 21, "groups": 7.0} | optimizer.ways


@pytest.mark.parametrize("name", SERIES)
def test_quiet_groups_rest(name):
    loud, quiet = net(), net()
    options = {"weight_decay": 0.01} | ({} if name == "dhspg as published" else {"saliency": "taylor_second_order"})
    train(loud, make(name, loud, **options), range(END + 4))
    train(quiet, make(name, quiet, groups(QuietGroup), **options), range(END + 4))
    assert [own.tolist() for own in zero_atoms(quiet)] == [own.tolist() for own in zero_atoms(loud)]


def test_the_plan_says_what_happens_and_whether_the_penalty_reaches_that_far():
    model = net()
    plan = make("hspg", model, half_space_step=5).plan().splitlines()
    assert plan[:5] == [
        "target_group_sparsity=0.5: at most 7 of 14 groups",
        "steps 0–1    ordinary steps",
        "steps 2–16   all groups that may go are penalized",
        "steps 5–16   those that leave their half-spaces go to zero, as many as the target allows",
        "steps 17–21  what is missing by then is chosen, and shrinks to zero",
    ]
    # 15 steps of .1 · 1
    assert "takes 1.5 of a norm in 15 steps, if no gradient holds it; the median norm is 1." in plan[5]
    assert "the groups to go are chosen at the first of them" in make("dhspg", model).plan()
    assert "every step is one of SGD" in make("hspg", model, target_group_sparsity=0.0).plan()


class Calls(TorchDispatchMode):
    """Writes down which operators ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


WAITS = {f"aten::{op}" for op in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")}


@pytest.mark.parametrize("name", SERIES)
def test_a_step_waits_for_the_device_where_a_period_begins_only(name, monkeypatch):
    """CPU tensors never wait, so what is asked of them at once, being here, is asked as if they were elsewhere."""
    model = net()
    optimizer = make(name, model)
    for file in ("entries", "half_space"):
        monkeypatch.setattr(f"oto.optim.{file}.is_here", lambda tensor: False)
    waited = {}
    for n in range(END + 2):
        backward(model, n)
        with Calls() as calls:
            optimizer.step()
        waited[n] = calls.names & WAITS
    starts = {n for n in waited if optimizer.schedule.starts_period(n)}
    ends = {END - 1, END}  # what is pruned is looked up, on the CPU
    assert {n for n, ops in waited.items() if ops} <= starts | ends
    assert waited[START] and optimizer.ways["by half-space"] and count_zeros(model) == 7
    there = net()  # and the trajectory is the same
    monkeypatch.undo()
    train(there, make(name, there), range(END + 2))
    assert_same(model, there)


@pytest.mark.parametrize("name", SERIES)
def test_memory_is_one_copy_of_the_penalised_entries(name):
    model = net(torch.bfloat16)
    optimizer = make(name, model)
    train(model, optimizer, range(START + 1))
    copied = optimizer.penalized(START + 1).copied
    going = (optimizer.settled != PRUNED) if name == "hspg" else (optimizer.settled == REDUNDANT)
    entries = [p[0].numel() for n, p in model.named_parameters() if not n.startswith("8")]
    first, second = (int(own.sum()) for own in going.split([8, 6]))
    assert copied.nbytes == 2 * (first * sum(entries[:4]) + second * sum(entries[4:]))  # bfloat16
    train(model, optimizer, range(START + 4, END))
    assert optimizer.penalized(END) is None


# Targets -------------------------------------------------------------------------------------------------------------


UNITS = [
    {"target_macs": 0.5},
    {"target_params": 0.6},
    {"target_bytes": 0.6},
    {"target_group_sparsity": 0.4},
    {"target_macs": 0.5, "scope": "local"},
    {"target_macs": 0.6, "group_divisible": 4},
    {"target_macs": 0.5, "min_kept": 0.4},
    {"target_kept": {"0.weight": 0.5, "3.weight": 4}},
]


OWN_UNIT = {"dhspg": 5, "h2spg": 3, "dhspg as published": 2}
"""Which of them each is tried on at once; HSPG on all but parameters, which are counted as bytes are."""


def mixed():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


@pytest.mark.parametrize(
    ("name", "target"),
    among(lambda n, t: t == UNITS[OWN_UNIT[n]] if n in OWN_UNIT else t != UNITS[1], SERIES, UNITS),
)
def test_targets_of_every_unit_are_met(name, target):
    if name == "dhspg as published" and "target_kept" in target:
        target = {"target_kept": {"0.weight": 0.5}}
    model = mixed()
    oto = OTO(model, torch.zeros(1, 3, 8, 8))
    options = ALL[name][1] | {"pruning_periods": 10, "lmbda": 0.2}
    optimizer = getattr(oto, ALL[name][0].__name__.lower())(
        lr=0.1, start_pruning_step=2, pruning_steps=60, **options, **target
    )
    costs = []
    train(model, optimizer, range(64), then=lambda n: costs.append(optimizer.progress.cost))
    goal = optimizer.choice.target.goal
    assert costs == sorted(costs, reverse=True)
    assert costs[61] == costs[-1] <= goal
    sizes, steps = np.array(optimizer.choice.sizes), optimizer.choice.multiples
    step = (
        optimizer.choice.target.measure.marginal(sizes, steps).sum()
        if "scope" in target
        else (optimizer.choice.target.measure.marginal(sizes, steps).max())
    )
    assert goal - costs[-1] < step, "nearer than the largest step"
    assert all(own % optimizer.choice.multiples[i] == 0 for i, own in enumerate(kept_counts(optimizer)))
    if "target_kept" in target:
        assert kept_counts(optimizer)[0] == 12
    subnet = oto.construct_subnet()
    assert subnet.model(torch.randn(2, 3, 8, 8)).shape == (2, 4)


def kept_counts(optimizer):
    return [group.size - len(optimizer.pruned_groups.get(group.name, ())) for group in optimizer.node_groups]


def test_a_target_that_nothing_can_meet_is_refused_as_ever():
    with pytest.raises(NothingPrunableError):
        make("hspg", net(), groups()[2:])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("hspg", "dhspg") else pytest.mark.zoo) for n in SERIES]
)
def test_shrinking_between_readings_stays_on_the_trajectory(name):
    """At a step at which some have gone that were not read back yet."""
    full, slim = mixed().double(), mixed().double()
    runs = []
    for model in (full, slim):
        oto = OTO(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
        options = ALL[name][1] | {"pruning_periods": 6, "lmbda": 1.0}
        maker = getattr(oto, ALL[name][0].__name__.lower())
        runs.append((oto, maker(lr=0.1, target_macs=0.5, start_pruning_step=2, pruning_steps=60, **options)))
    gone = []
    for n in range(66):
        losses = []
        for model, (_, optimizer) in zip((full, slim), runs, strict=True):
            losses.append(backward(model, n).item())
            optimizer.step()
        assert losses[1] == pytest.approx(losses[0], rel=1e-9)  # float64, 66 steps, sums in another order
        if n in (18, 40, 56, 63):  # the last two: in the last period, and after the end
            gone.append(runs[0][1].num_pruned)
            runs[1][0].shrink(runs[1][1])
    assert gone[0] > 0 and str(runs[0][1].progress) == str(runs[1][1].progress)
    assert runs[0][1].ways == runs[1][1].ways
    assert runs[0][0].construct_subnet().cost_after == runs[1][0].construct_subnet().cost_after


@pytest.mark.parametrize(
    ("name", "at"), among(lambda n, at: n == "hspg" or (n == "h2spg") == (at == 64), SERIES, [58, 64])
)
def test_shrinking_where_the_choice_has_the_last_word(name, at):
    """In the last period and after the end, where groups were penalized up to then: nothing of that is left."""
    model = mixed().double()
    oto = OTO(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    options = ALL[name][1] | {"pruning_periods": 6}
    maker = getattr(oto, ALL[name][0].__name__.lower())
    optimizer = maker(lr=0.1, target_macs=0.5, start_pruning_step=2, pruning_steps=60, **options)
    for n in range(68):
        backward(model, n)
        optimizer.step()
        if n == at:
            assert optimizer._penalized is None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotPrunedWarning)
                oto.shrink(optimizer)
    assert optimizer.progress.over and optimizer.progress.cost <= optimizer.progress.goal


@pytest.mark.parametrize("steps", [40, 49, 60, 400])
@pytest.mark.parametrize("name", SERIES)
def test_the_defaults_suit_short_runs(name, steps):
    optimizer = ALL[name][0](net().named_parameters(), groups(), lr=0.1, target_group_sparsity=0.5, total_steps=steps)
    assert optimizer.schedule.start <= optimizer.half_space_step < optimizer.last_period


# The budget ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("divisible", [1, 3])
def test_a_budget_is_never_overdrawn_and_gets_near_the_goal(seed, divisible):
    """Atoms in any order, some at a time: the cost, as a target counts it, stays above the goal until it is near."""
    model = mixed()
    oto = OTO(model, torch.zeros(1, 3, 8, 8))
    choice = Choice.of(oto.node_groups, {"target_macs": 0.5}, costs=oto.costs, group_divisible=divisible)
    source = torch.Generator().manual_seed(seed)
    sizes, alive = choice.sizes, torch.ones(sum(choice.sizes), dtype=torch.bool)
    measure, goal, full = choice.target.measure, choice.target.goal, choice.target.full

    def counts():
        return np.array([int(own.sum()) for own in alive.split_with_sizes(sizes)])

    for _ in range(12):  # readings
        budget = Budget.of(choice, counts(), np.zeros(len(sizes), dtype=np.int64))
        gone = torch.zeros_like(alive)
        for _ in range(6):  # steps
            candidates = (torch.rand(len(alive), generator=source) < 0.2) & alive
            going = budget.allowed(candidates, torch.rand(len(alive), generator=source), gone)
            assert not (going & ~candidates).any()
            assert not (going & ~budget.open(gone)).any()  # what may go at all
            gone |= going
            alive &= ~going
            assert measure(whole_counts(choice, counts())) >= goal - 1e-6 * full
    assert measure(whole_counts(choice, counts())) - goal <= 0.1 * full
    more = rest(choice, torch.rand(len(alive), generator=source), alive)
    alive &= ~more
    assert goal - 0.06 * full <= measure(counts()) <= goal
    assert (counts() % divisible == 0).all() or (counts() == sizes).any()


def test_those_that_go_first_are_the_first_in_order():
    choice = Choice.of(groups(), {"target_group_sparsity": 5 / 14})
    budget = Budget.of(choice, np.array([8, 6]), np.zeros(2, dtype=np.int64))
    order = torch.arange(14.0).flip(0)
    none = torch.zeros(14, dtype=torch.bool)
    going = budget.allowed(~none, order, none)
    # a fifth of each stays, so at most 4 of the second group go: atoms 13 to 10, and then 7
    assert going.nonzero()[:, 0].tolist() == [7, 10, 11, 12, 13]
    assert not budget.open(going).any() and not budget.allowed(~going, order, going).any()


def test_the_rest_begins_with_what_makes_ties_even():
    tied = [NodeGroup(name, 6, slices=(), tie="inner") for name in ("a", "b")]
    choice = Choice.of(tied, {"target_group_sparsity": 4.5 / 12})
    alive = torch.ones(12, dtype=torch.bool)
    alive[:2] = False  # a has 4 left, so the target counts 4 of b too, and is met once they are
    assert rest(choice, torch.arange(12.0), alive).nonzero()[:, 0].tolist() == [6, 7]


def test_polynomials_promise_too_much_never():
    """What several save together is at most what each would save alone: the reason why prices may be added up."""
    source = np.random.default_rng(0)
    cost = Polynomial({(0, 1): 3, (1, 2): 5, (0, 0): 2, (2,): 7, (0, 1, 2): 1}, 3)
    for _ in range(200):
        counts = source.integers(3, 20, 3)
        fewer = source.integers(0, counts)
        assert cost(counts) - cost(counts - fewer) <= cost.marginal(counts, fewer).sum() + 1e-9
