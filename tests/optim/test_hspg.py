"""HSPG: the paper's formulas step by step, what it proves, known minimizers, and a target that is met exactly."""

from __future__ import annotations

import pytest
import torch

from oto.errors import OptionError, TargetError
from oto.optim import HSPG
from tests.optim.series import descend, noisy, quadratic
from tests.optim.toy import count_zeros, groups, net, train, zero_atoms

PLAIN = {"variant": "sgd", "lr": 0.1, "saliency": "magnitude"}


def as_published(x, gradient, steps, lr, lmbda, epsilon, stage_2, most=None):
    """Algorithm 2, a group at a time. At most ``most`` groups go, those furthest out of their half-space first."""
    x, seen, gone = x.clone(), [], set()
    for t in range(steps):
        g = gradient(x, t)
        new, outside = x.clone(), []
        for i in range(len(x)):
            if i in gone:
                new[i] = 0
                continue
            norm = x[i].norm()
            over = most is not None and len(gone) >= most
            new[i] = x[i] - lr * (g[i] + (0 if over else lmbda) * x[i] / norm)
            inner = torch.dot(new[i], x[i])
            if t >= stage_2 and not over and inner < epsilon * norm**2:
                outside.append((float(inner / norm**2), i))
        for _, i in sorted(outside)[: None if most is None else most - len(gone)]:
            gone.add(i)
            new[i] = 0
        x = new
        seen.append(x.clone())
    return seen, gone


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("most", [11, 4], ids=["λ and ε decide", "the target ends it"])
def test_step_by_step(seed, epsilon, most):
    h, a = quadratic(seed)
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
    options = {"lmbda": 0.1, "epsilon": epsilon, "start_pruning_step": 0, "half_space_step": 10}
    # periods of ten steps; the target is such that the last one adds nothing, or is not looked at
    optimizer, ours = descend(
        HSPG,
        x,
        noisy(h, a),
        190,
        upper_group_sparsity=(most + 0.5) / 12,
        pruning_steps=200,
        pruning_periods=20,
        **options,
        **PLAIN,
    )
    theirs, gone = as_published(x, noisy(h, a), 190, 0.1, 0.1, epsilon, 10, most)
    for mine, published in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, published, rtol=0, atol=1e-12)  # float64, 190 steps
    assert optimizer.ways == {"by half-space": len(gone), "by choice": 0}
    assert len(gone) >= 4  # that there was something to compare


def test_the_penalty_follows_a_schedule_and_the_learning_rate():
    h, a = quadratic(0)
    x = torch.randn(12, 5, dtype=torch.float64)
    model = descend(HSPG, x, noisy(h, a), 0, lmbda=1.0, upper_group_sparsity=0.5, total_steps=100, **PLAIN)[0]
    assert model.lmbda(7) == 1.0
    options = {
        "upper_group_sparsity": 0.5,
        "start_pruning_step": 0,
        "pruning_steps": 40,
        "half_space_step": 20,
        **PLAIN,
    }
    _, ours = descend(HSPG, x, lambda x, t: torch.zeros_like(x), 3, lmbda=lambda t: [0.3, 0.0, 0.6][t], **options)
    # without a gradient a group loses αλ of its norm: .1 · .3, nothing, .1 · .6
    lost = [before.norm(dim=1) - after.norm(dim=1) for before, after in zip([x, *ours[:-1]], ours, strict=True)]
    for own, expected in zip(lost, [0.03, 0.0, 0.06], strict=True):
        torch.testing.assert_close(own, torch.full((12,), expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_known_minimisers_are_recovered(seed):
    """``Σ |x_g - a_g|² / 2 + λ Σ |x_g|`` has its minimum at ``a_g (1 - λ / |a_g|)``, and at 0 where ``|a_g| <= λ``."""
    _, a = quadratic(seed)
    x = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    lmbda = 0.5
    expected = a * (1 - lmbda / a.norm(dim=1, keepdim=True)).clamp_min(0)
    zero = int((expected == 0).all(1).sum())
    assert 6 <= zero < 12
    optimizer, seen = descend(
        HSPG,
        x,
        lambda x, t: x - a,
        600,
        lmbda=lmbda,
        epsilon=0.0,
        upper_group_sparsity=11.5 / 12,
        start_pruning_step=0,
        pruning_steps=1200,
        half_space_step=100,
        pruning_periods=2,
        **PLAIN,
    )
    torch.testing.assert_close(seen[-1], expected, rtol=0, atol=1e-9)
    assert optimizer.ways["by half-space"] == zero
    # with the number of those that are zero as the target, the penalty ends there, and the rest finds its own minimum
    _, seen = descend(
        HSPG,
        x,
        lambda x, t: x - a,
        700,
        lmbda=lmbda,
        epsilon=0.0,
        upper_group_sparsity=(zero + 0.5) / 12,
        start_pruning_step=0,
        pruning_steps=500,
        half_space_step=100,
        **PLAIN,
    )
    kept = (expected != 0).any(1, keepdim=True)
    torch.testing.assert_close(seen[-1], a * kept, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("epsilon", [0.0, 0.4])
def test_a_step_never_increases_the_regularised_model(seed, epsilon):
    """The paper's lemma: with α <= 2 (1 - ε) / L it falls, by (1 - ε) / α - L / 2 times the squares of what goes."""
    h, a = quadratic(seed)
    lr, lmbda, bound = 0.8, 0.2, 1.0  # curvatures are at most 1
    x = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[0] = a[0] + 1e-3

    def psi(x):
        return float((h * (x - a).square() / 2).sum() + lmbda * x.norm(dim=1).sum())

    optimizer, seen = descend(
        HSPG,
        x,
        lambda x, t: h * (x - a),
        60,
        lmbda=lmbda,
        epsilon=epsilon,
        upper_group_sparsity=11.5 / 12,
        start_pruning_step=0,
        pruning_steps=200,
        half_space_step=0,
        pruning_periods=2,
        **{**PLAIN, "lr": lr},
    )
    for before, after in zip([x, *seen[:-1]], seen, strict=True):
        projected = (after == 0).all(1) & (before != 0).any(1)
        falls = ((1 - epsilon) / lr - bound / 2) * float(before[projected].square().sum())
        assert psi(after) <= psi(before) - falls + 1e-12
    assert optimizer.ways["by half-space"] > 3


def test_zeros_stay_zero():
    model = net()
    optimizer = HSPG(
        model.named_parameters(),
        groups(),
        lr=0.1,
        first_momentum=0.9,
        lmbda=0.3,
        target_group_sparsity=0.5,
        start_pruning_step=2,
        pruning_steps=60,
        half_space_step=2,
    )
    seen = [torch.zeros(14, dtype=torch.bool)]

    def look(n):
        now = torch.cat(zero_atoms(model))
        assert (now | ~seen[-1]).all(), n
        assert optimizer.num_pruned == int(now.sum())
        seen.append(now)

    train(model, optimizer, range(70), then=look)
    counts = [int(own.sum()) for own in seen]
    assert counts[-1] == 7 and len(set(counts)) > 3  # they went one after the other
    assert optimizer.ways["by half-space"] > 3


@pytest.mark.parametrize("lmbda", [0.0, 0.5], ids=["all by choice", "all by half-space"])
def test_what_is_missing_at_the_end_goes_by_the_choice(lmbda):
    model = net()
    optimizer = HSPG(
        model.named_parameters(),
        groups(),
        lr=0.1,
        lmbda=lmbda,
        target_group_sparsity=0.5,
        start_pruning_step=2,
        pruning_steps=40,
        pruning_periods=4,
    )
    counts = []
    train(model, optimizer, range(45), then=lambda n: counts.append(count_zeros(model)))
    assert counts[41:] == [7] * 4
    assert optimizer.ways == {"by half-space": 7 * bool(lmbda), "by choice": 7 * (not lmbda)}
    assert str(optimizer.progress).startswith(
        "step 45, pruning ended after 42 steps: 7 of 14 groups are zero"
        f" ({7 * bool(lmbda)} by half-space, {7 * (not lmbda)} by choice)"
    )
    assert optimizer.history[-1] == {"step": 41, "groups": 7.0} | optimizer.ways
    # it is shrunk over the last of four periods, so no group is at zero before its end
    assert lmbda or counts[:41] == [0] * 41


def test_the_kinds_of_groups_have_a_half_space_each():
    model = net()
    common = {"lr": 0.1, "target_group_sparsity": 0.5, "start_pruning_step": 0, "pruning_steps": 40}
    optimizer = HSPG(model.named_parameters(), groups(), epsilon={"linear": 0.5}, **common)
    assert optimizer.epsilon == {"conv": 0.95, "linear": 0.5, "norm": 0.95}
    assert optimizer.penalized(0).epsilon.tolist() == pytest.approx([0.95] * 14)
    # a half-space that nothing leaves: all goes by the choice
    optimizer = HSPG(model.named_parameters(), groups(), epsilon={"conv": 0.0}, lmbda=0.001, **common)
    train(model, optimizer, range(40))
    assert optimizer.ways == {"by half-space": 0, "by choice": 7}


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"epsilon": 1.0}, OptionError, r"epsilon is 1\.0"),
        ({"epsilon": {"attention": 0.5}}, OptionError, "one for some of conv, linear, norm"),
        ({"lmbda": -1.0}, OptionError, "lmbda is -1"),
        ({"upper_group_sparsity": 0.3}, OptionError, "are the same"),
        ({"pruning_exponent": 3}, OptionError, "has no effect on HSPG"),
        ({"half_space_step": 40}, TargetError, "groups leave by half-spaces in steps 2–37"),
        ({"half_space_step": 1}, TargetError, "groups leave by half-spaces in steps 2–37"),
        ({"half_space_step": 0.5}, TargetError, "half_space_step is 0.5, a share of all steps"),
        ({"pruning_periods": 1}, TargetError, "HSPG needs 2"),
    ],
)
def test_what_means_nothing_is_refused(options, error, text):
    given = {"lr": 0.1, "target_group_sparsity": 0.5, "start_pruning_step": 2, "pruning_steps": 40} | options
    with pytest.raises(error, match=text):
        HSPG(net().named_parameters(), groups(), **given)
