"""A target in milliseconds, confirmed on slim models: with models that take what a formula says, and once for real."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from oto import OTO
from oto.errors import NotPrunedWarning, TargetError
from oto.groups.cost import Polynomial, cost
from oto.previewing import latency_for, timer_of
from oto.slim import latency
from oto.slim.latency import Latency, Timer, as_promised, built, confirmed, rounds


def mlp(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


TABLE = Polynomial({(): 0.1, (0,): 0.02, (0, 1): 0.001}, 2)
SIZES = np.array([100, 100])
LEAST = np.array([10, 10])


def lowest_first(goal: float):
    """A choice: both counts alike, as many as the goal allows."""

    def choose(measure):
        return next(c for n in range(100, 9, -1) if measure(c := np.array([n, n])) <= goal)

    return choose


@pytest.mark.parametrize(
    "takes",
    [
        lambda said: said,
        lambda said: 3 * said,
        lambda said: 5 + said,  # of which no thinning frees it
        lambda said: 20 * said**0.5,
        lambda said: said**2 / 10,
    ],
    ids=["exact", "slower", "overhead", "concave", "convex"],
)
def test_it_arrives_whatever_the_table_misses(takes) -> None:
    asked = []

    def measure(counts):
        asked.append(counts)
        return takes(TABLE(counts))

    full, bottom = takes(TABLE(SIZES)), takes(TABLE(LEAST))
    for share in (0.2, 0.5, 0.8):
        asked.clear()
        goal = bottom + share * (full - bottom)
        found = confirmed(TABLE, SIZES, LEAST, goal, lowest_first(goal), measure)
        assert latency.NEAR * goal <= takes(TABLE(lowest_first(goal)(found))) <= goal
        assert found(SIZES) == pytest.approx(full)
        assert len(asked) <= 2 + latency.ROUNDS


def test_noise_may_flatten_it_but_not_turn_it() -> None:
    noise = np.random.default_rng(0)

    def measure(counts):
        return TABLE(counts) * noise.uniform(0.5, 1.5)

    for _ in range(20):
        full = TABLE(SIZES)
        try:
            with warnings.catch_warnings(action="ignore", category=NotPrunedWarning):
                found = confirmed(TABLE, SIZES, LEAST, 0.5 * full, lowest_first(0.5 * full), measure)
        except (TargetError, StopIteration):
            continue
        line = [found(np.array([n, n])) for n in range(10, 101)]
        assert (np.diff(line) > 0).all()
        assert (found.marginal(SIZES, np.ones_like(SIZES)) > 0).all()


def test_what_an_atom_saves_is_the_difference_without_it() -> None:
    found = Latency.through(TABLE, {TABLE(LEAST): 3.0, TABLE(np.array([50, 60])): 8.0, TABLE(SIZES): 11.0})
    counts, fewer = np.array([70, 55]), np.array([7, 30])
    for i, saved in enumerate(found.marginal(counts, fewer)):
        less = counts - np.where(np.arange(2) == i, fewer, 0)
        assert saved == pytest.approx(found(counts) - found(less))


def test_a_target_below_the_thinnest_model_is_refused_with_what_was_measured() -> None:
    with pytest.raises(TargetError, match=r"target_latency_ms=1 cannot be reached.*full model takes 12.1.*1.4 ms"):
        confirmed(TABLE, SIZES, LEAST, 1, lowest_first(1), lambda counts: TABLE(counts) + 0.999 * (counts[0] == 10))


def test_measurements_that_lead_nowhere_are_told() -> None:
    """Nothing but the thinnest is any faster than the full model."""
    goal = 0.5 * TABLE(SIZES)
    with pytest.warns(NotPrunedWarning, match=r"takes about that; they take 12.1, 12.1[^$]*effect[^$]*to fix"):
        confirmed(
            TABLE, SIZES, LEAST, goal, lowest_first(goal), lambda counts: TABLE(SIZES) + (counts == LEAST).all() * -12
        )


def test_what_is_fast_enough_stays_as_it_is() -> None:
    never = None
    found = confirmed(TABLE, SIZES, LEAST, 100, never, TABLE)
    assert found(SIZES) == pytest.approx(TABLE(SIZES))
    model = mlp()
    oto = OTO(model, torch.randn(1, 8))
    optimizer = oto.hesso(lr=0.1, target_latency_ms=10_000, start_pruning_step=1, pruning_steps=1, pruning_periods=1)
    assert not optimizer.choice.target.wants_less


class Formula(Timer):
    """Takes a microsecond for every multiply–add, and a millisecond on top."""

    def __call__(self, counts):
        return 1 + 1e-3 * self.costs.macs(counts)


@pytest.mark.parametrize("kind", ["hesso", "hesso_cric", "hspg", "dhspg"])
def test_what_is_trained_is_as_fast_as_was_asked(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def timed(op, args, kwargs, device):
        y = op(*args, **kwargs)
        return 0.1 + (4e-3 * args[0].numel() * y.shape[-1] if op is torch.ops.aten.linear.default else 0), [y]

    monkeypatch.setattr("oto.previewing.Timer", Formula)
    monkeypatch.setattr("oto.groups.latency.timed", timed)
    model, x = mlp(), torch.randn(16, 8)
    oto = OTO(model, x[:1])
    timer = timer_of(oto._analysis)
    options = {"total_steps": 40} if kind == "hesso_cric" else {"pruning_periods": 2}
    options |= {"lmbda": 2.0} if kind.endswith("spg") else {}
    optimizer = getattr(oto, kind)(
        lr=0.05, target_latency_ms=3, start_pruning_step=2, pruning_steps=8, min_kept=2, group_divisible=4, **options
    )
    assert optimizer.progress.unit == "ms"
    while not optimizer.progress.over:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    kept = oto.construct_subnet().kept
    counts = np.array([len(kept[name]) for name in oto.costs.names])
    assert (counts % 4 == 0).all()
    assert 0.85 * 3 < timer(counts) <= 3


def test_preview_shows_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oto.previewing.Timer", Formula)
    model = mlp()
    before = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    shown = OTO(model, torch.randn(1, 8)).preview(target_latency_ms=3)
    full, left = shown.milliseconds
    assert full == pytest.approx(1 + (8 * 64 + 64 * 64 + 64 * 4) / 1000)
    assert latency.NEAR * 3 <= left <= 3
    assert "ms, measured" in str(shown)
    assert all(torch.equal(a, b) for a, b in zip(before[1], model.parameters(), strict=True))


def test_nonsense_is_refused_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oto.previewing.Timer", None)
    oto = OTO(mlp(), torch.randn(1, 8))
    for milliseconds, macs in ((-1, None), ("fast", None), (1, 0.5)):
        with pytest.raises(TargetError):
            oto.hesso(lr=0.1, target_latency_ms=milliseconds, target_macs=macs, start_pruning_step=1, pruning_steps=2)


def test_a_model_on_meta_takes_no_time() -> None:
    with torch.device("meta"):
        model, x = mlp(), torch.randn(1, 8)
    with pytest.raises(TargetError, match="meta device"):
        OTO(model, x).preview(target_latency_ms=1.0)


class States(nn.Module):
    """States a size, so that its slim form is a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(-1, 12))


def test_the_slim_model_is_built_in_the_form_it_would_have() -> None:
    x = torch.randn(2, 8)
    for model, form in ((mlp(), nn.Sequential), (States(), torch.fx.GraphModule)):
        oto = OTO(model, x)
        kept = {name: np.arange(5) for name in oto.costs.names}
        slim = built(model, oto.partition, kept, x)
        assert isinstance(slim, form)
        assert sum(p.numel() for p in slim.parameters()) == cost(oto.partition, dict.fromkeys(kept, 5)).params


def test_models_take_turns_and_are_left_in_their_mode() -> None:
    order = []
    models = [nn.Linear(2, 2), nn.Linear(2, 2).eval()]
    for i, model in enumerate(models):
        model.register_forward_hook(lambda module, *_, i=i: order.append((i, module.training)))
    found = rounds(models, torch.randn(1, 2), least=3, seconds=0)
    assert order == [(0, False), (1, False)] * 4  # the first to warm up
    assert [len(own) for own in found] == [3, 3]
    assert [model.training for model in models] == [True, False]


def test_processes_of_a_distributed_run_share_what_the_first_measured() -> None:
    model, x = mlp(), torch.randn(1, 8)
    oto = OTO(model, x)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        target = timer_of(oto._analysis)(oto.costs.sizes) * 10
        shared = latency_for(oto._analysis, {"target_latency_ms": target})
    finally:
        dist.destroy_process_group()
    assert shared(oto.costs.sizes) > 0


@pytest.mark.usefixtures("clock_of_work")
def test_whatever_is_measured_arrives() -> None:
    """Everything as it runs: operators and slim models are timed, by a clock that goes with their products."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 512))
    x = torch.randn(64, 512)
    oto = OTO(model, x)
    full = timer_of(oto._analysis)(oto.costs.sizes)
    assert full == pytest.approx(1e-6 * 2 * oto.costs.macs(oto.costs.sizes), rel=0.01)
    shown = oto.preview(target_latency_ms=0.5 * full)
    slim = built(model, oto.partition, {name: np.arange(n) for name, n in shown.kept.items()}, x)
    ratios = [b / a for a, b in zip(*rounds([model, slim], x), strict=True)]
    assert 0.5 * latency.NEAR <= np.median(ratios) <= 0.5


def test_a_latency_of_ties():
    table = Polynomial({(0, 1): 2.0, (1,): 1.0, (2,): 3.0}, 3)
    latency = Latency.through(table, {10.0: 3.0, 200.0: 40.0})
    ties = np.array([0, 1, 0])
    together = latency.tied(ties)
    for counts in ([2, 3], [7, 4]):
        assert together(np.array(counts)) == latency(np.array(counts)[ties])
    saved = together(np.array([7, 4])) - together(np.array([6, 4]))
    assert together.marginal(np.array([7, 4]), np.array([1, 0]))[0] == pytest.approx(saved)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        ways = (nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)) for _ in range(4))
        self.ways, self.head = nn.ModuleList(ways), nn.Linear(256, 8)

    def forward(self, x: Tensor) -> Tensor:
        for way in self.ways:
            x = x + way(x)
        return self.head(x)


@pytest.mark.usefixtures("clock_of_work")
@pytest.mark.parametrize("mode", ["both", "erase"])
def test_segments_take_their_time_with_them(mode) -> None:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(32, 256)
    oto = OTO(model, x, compress_mode=mode)
    full = timer_of(oto._analysis)(oto.costs.sizes)
    shown = oto.preview(target_latency_ms=0.55 * full)
    kept = {name: np.arange(n) for name, n in shown.kept.items()}
    gone = oto.partition.erased(kept)
    slim = built(model, oto.partition, kept, x)
    ratios = [b / a for a, b in zip(*rounds([model, slim], x), strict=True)]
    assert np.median(ratios) <= 0.55 and (mode == "both" or len(gone) == 2)
    names = {name for name, _ in slim.named_parameters()}
    assert not [leaf.name for segment in gone for leaf in segment.leaves if leaf.name in names]
    assert any(p.any() for n, p in model.named_parameters() if n.startswith("ways.0")), "the model is as it was"


def test_a_promise_that_is_not_kept_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(2, 2), torch.randn(1, 2)
    for share, said in ((0.5, None), (0.54, None), (0.6, "asked? ask for 4.17"), (1.2, "slower than the full one")):
        monkeypatch.setattr(latency, "rounds", lambda *_, share=share, **__: [[2.0] * 3, [2.0 * share] * 3])
        text = as_promised(model, model, x, goal=5.0, full=10.0)
        assert (text is None) == (said is None), text
        assert said is None or said.removeprefix("asked? ") in text
