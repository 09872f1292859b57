"""DHSPG: the box step by step, its interval of λ, what it recovers, and a target that is met exactly."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch

from oto.errors import OptionError, SetupError, TargetError
from oto.optim import CRITERIA, DHSPG, Entries
from oto.optim.saliency import AS_PUBLISHED
from tests.optim import test_sharded as sharded
from tests.optim.series import descend, noisy, quadratic
from tests.optim.toy import count_zeros, groups, net, train, zero_atoms

PLAIN = {"variant": "sgd", "lr": 0.1}
TOY = {"lr": 0.1, "target_group_sparsity": 0.5, "start_pruning_step": 2, "pruning_steps": 40}


def penalty_of(x, g, lmbda, amplify, coeff):
    """λ of one group, as the box has it."""
    inner, norm = torch.dot(x, g), x.norm()
    if inner >= 0:
        return lmbda
    low, high = -inner / norm, -(g.norm() ** 2) * norm / inner
    assert low <= high * (1 + 1e-12)  # Cauchy and Schwarz
    own = min(max(amplify * float(low), lmbda), coeff * lmbda)
    return float((low + high) / 2) if own >= high else own


def as_published(x, gradient, steps, lr, to_go, epsilon, half_space, warm_up, penalty=(1e-3, 2.0, 10.0), most=None):
    """The box, a group at a time."""
    x, seen, gone, used = x.clone(), [], set(), set()
    for t in range(steps):
        g = gradient(x, t)
        new, outside = x - lr * g, []
        over = most is not None and len(gone) >= most
        for i in to_go:
            if i in gone:
                new[i] = 0
                continue
            if over:
                continue
            lmbda = penalty[0] if t < warm_up else penalty_of(x[i], g[i], *penalty)
            used.add("least" if lmbda == penalty[0] else "greatest" if lmbda == penalty[0] * penalty[2] else "between")
            new[i] -= lr * lmbda * x[i] / x[i].norm()
            inner = torch.dot(new[i], x[i])
            if t >= half_space and inner < epsilon * x[i].norm() ** 2:
                outside.append((float(inner / x[i].norm() ** 2), i))
        for _, i in sorted(outside)[: None if most is None else most - len(gone)]:
            gone.add(i)
            new[i] = 0
        x = new
        seen.append(x.clone())
    return seen, gone, used


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("penalty", [(0.05, 2.0, 10.0), (0.02, 20.0, 1000.0)], ids=["as for SGD", "as for Adam"])
@pytest.mark.parametrize("warm_up", [0, 15])
def test_step_by_step(seed, penalty, warm_up):
    h, a = quadratic(seed)
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
    to_go = x.norm(dim=1).argsort()[:6].tolist()  # by magnitude, at the first step
    lmbda, amplify, coeff = penalty
    optimizer, ours = descend(
        DHSPG,
        x,
        noisy(h, a),
        180,
        target_group_sparsity=0.5,
        saliency="magnitude",
        partition_step=0,
        half_space_step=10,
        warm_up_steps=warm_up,
        pruning_steps=200,
        lmbda=lmbda,
        lmbda_amplify=amplify,
        hat_lmbda_coeff=coeff,
        epsilon=0.9,
        **PLAIN,
    )
    theirs, gone, used = as_published(x, noisy(h, a), 180, 0.1, to_go, 0.9, 10, warm_up, penalty)
    for mine, published in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, published, rtol=0, atol=1e-11)  # float64, 180 steps
    assert optimizer.ways == {"by half-space": len(gone), "by choice": 0}
    assert len(gone) >= 2 and used >= {"least", "between"}


@pytest.mark.parametrize("seed", range(2))
def test_as_published_the_first_to_leave_go(seed):
    """G_p holds a quarter more than the target asks for; once that is met, the others of it are let go."""
    h, a = quadratic(seed)
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
    penalty = (0.1, 2.0, 10.0)
    optimizer, ours = descend(
        DHSPG,
        x,
        noisy(h, a),
        190,
        target_group_sparsity=4.5 / 12,
        tolerance_group_sparsity=0.25,
        saliency="dhspg",
        partition_step=0,
        half_space_step=10,
        pruning_steps=200,
        pruning_periods=20,
        lmbda=penalty[0],
        epsilon=0.9,
        **PLAIN,
    )
    g = noisy(h, a)(x, 0)
    cosine = torch.nn.functional.cosine_similarity(-x, -g, dim=1)
    small = 1 / (x.norm(dim=1) / 5 + 1e-6)
    redundant = 0.5 * cosine / cosine.norm() + 0.5 * small / small.norm()
    to_go = redundant.argsort(descending=True)[: int(12 * (4.5 / 12 + 0.25))].tolist()
    assert len(to_go) == 7
    theirs, gone, _ = as_published(x, noisy(h, a), 190, 0.1, to_go, 0.9, 10, 0, penalty, most=4)
    for mine, published in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, published, rtol=0, atol=1e-11)
    assert len(gone) == 4 and optimizer.num_pruned == 4


def test_the_published_score_is_that_of_the_box():
    source = torch.Generator().manual_seed(0)
    x, g = (torch.randn(9, 4, generator=source, dtype=torch.float64) for _ in range(2))
    angle, small = AS_PUBLISHED["dhspg"]
    entries = Entries([x], [g])
    torch.testing.assert_close(angle(entries), -torch.nn.functional.cosine_similarity(x, g, dim=1))
    torch.testing.assert_close(small(entries), -1 / (x.norm(dim=1) / 4 + 1e-6))
    assert set(AS_PUBLISHED["hesso"]) == set(CRITERIA) - {"path_norm"}


@pytest.mark.parametrize("seed", range(2))
def test_known_minimisers_are_recovered(seed):
    """Half of the groups have their minimum next to zero: these go, and the others end at theirs."""
    h, a = quadratic(seed)
    x = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    optimizer, seen = descend(
        DHSPG,
        x,
        lambda x, t: h * (x - a),
        900,
        target_group_sparsity=0.5,
        partition_step=100,
        pruning_steps=400,
        lmbda=0.1,
        **PLAIN,
        saliency="magnitude",
    )
    expected = a.clone()
    expected[::2] = 0
    torch.testing.assert_close(seen[-1], expected, rtol=0, atol=1e-3)  # the flattest curvature is .1
    assert optimizer.ways == {"by half-space": 6, "by choice": 0}


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_what_is_to_go_shrinks_at_every_step_and_the_loss_descends(base):
    """The interval, to first order: the norm of a penalized group falls, and the direction is one of descent."""
    model = net().double()
    optimizer = DHSPG(
        model.named_parameters(),
        groups(),
        **(TOY | {"base": base, "lr": 1e-6, "lmbda": 1e-9}),
        lmbda_amplify=1.5,
        hat_lmbda_coeff=1e12,
        epsilon=0.0,
    )
    train(model, optimizer, range(3))
    x = optimizer.penalized(3)

    def norms():
        return x.rows.sq_norm().sqrt()[optimizer.atoms == 1]

    def step(n):
        now.append(norms())

    now = [norms()]
    train(model, optimizer, range(3, 12), then=step)
    assert all((after <= before).all() for before, after in pairwise(now))
    assert (now[-1] < now[0]).all()


def test_zeros_stay_zero_and_only_what_is_to_go_is_penalized():
    model = net()
    optimizer = DHSPG(model.named_parameters(), groups(), **TOY, lmbda=0.5)
    seen, chosen = [torch.zeros(14, dtype=torch.bool)], []

    def look(n):
        now = torch.cat(zero_atoms(model))
        assert (now | ~seen[-1]).all(), n
        chosen.append(optimizer.atoms != 0)
        seen.append(now)

    train(model, optimizer, range(45), then=look)
    assert not any(own.any() for own in chosen[:2])
    assert all(own.equal(chosen[2]) for own in chosen[2:])  # partitioned once
    assert seen[-1].equal(chosen[2]) and count_zeros(model) == 7
    assert len({int(own.sum()) for own in seen}) > 3


def test_what_is_left_of_the_chosen_shrinks_in_the_last_period():
    model = net()
    optimizer = DHSPG(model.named_parameters(), groups(), **TOY, lmbda=0.0, hat_lmbda_coeff=1.0, pruning_periods=4)
    counts = []
    train(model, optimizer, range(45), then=lambda n: counts.append(count_zeros(model)))
    assert counts == [0] * 41 + [7] * 4
    assert optimizer.ways == {"by half-space": 0, "by choice": 7}


def test_the_original_names_work():
    model = net()
    optimizer = DHSPG(
        model.named_parameters(),
        groups(),
        lr=0.1,
        epsilon=0.9,
        lmbda=1e-2,
        lmbda_amplify=3,
        hat_lmbda_coeff=50,
        partition_step=0.1,
        half_space_step=0.2,
        warm_up_steps=0.15,
        target_group_sparsity=0.5,
        saliency="dhspg",
        tolerance_group_sparsity=0.1,
        total_steps=100,
    )
    assert optimizer.schedule.start == 10 and optimizer.half_space_step == 20 and optimizer.warm_up_steps == 15
    assert optimizer.penalty == (1e-2, 3, 50)
    assert DHSPG(net().named_parameters(), groups(), **TOY).penalty == (1e-3, 2.0, 10.0)
    assert DHSPG(net().named_parameters(), groups(), **TOY, variant="adamw").penalty == (1e-2, 20.0, 1e3)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"tolerance_group_sparsity": 0.1}, OptionError, "has no effect: the choice says exactly what goes"),
        ({"tolerance_group_sparsity": 1.5, "saliency": "dhspg"}, OptionError, "it is a share of groups"),
        ({"partition_step": 3}, OptionError, "are the same"),
        ({"lmbda": -1.0}, OptionError, "a penalty is not negative"),
        ({"hat_lmbda_coeff": 0.5}, OptionError, "at least 1"),
        ({"half_space_step": 39}, TargetError, "groups leave by half-spaces in steps 2–37"),
    ],
)
def test_what_means_nothing_is_refused(options, error, text):
    with pytest.raises(error, match=text):
        DHSPG(net().named_parameters(), groups(), **(TOY | options))


def test_a_checkpoint_of_another_penalty_is_refused():
    model = net()
    optimizer = DHSPG(model.named_parameters(), groups(), **TOY, lmbda=0.2)
    train(model, optimizer, range(6))
    other = DHSPG(net().named_parameters(), groups(), **TOY, lmbda=0.3)
    with pytest.raises(SetupError, match="lmbda: "):
        other.load_state_dict(optimizer.state_dict())


def test_a_run_that_begins_anew_at_every_step_is_the_same_run():
    """What left is moved by no gradient that was made while it was still read, so nothing has to be known of it."""
    make, options, _ = sharded.MAKERS["hesso"]
    soon = {"start_pruning_step": 2, "pruning_steps": 6, "pruning_periods": 2, "average_steps": 2}

    def made():
        oto = copy.deepcopy(sharded.analyzed(make, **options))
        return oto.model, oto.dhspg(variant="adamw", **{**sharded.SOON, **soon})

    whole, through = made()
    sharded.train(whole, through, range(11))
    model, optimizer = made()
    for n in range(11):
        sharded.train(model, optimizer, range(n, n + 1))
        held = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        model, optimizer = made()
        model.load_state_dict(held[0])
        optimizer.load_state_dict(held[1])
    assert through.ways["by half-space"] and through.ways["by choice"] and through.history == optimizer.history
    for p, q in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_checkpoint_is_read_into_two_tensors():
    """A distributed checkpoint is read into the tensors of a state dict: what was read back is not what goes now."""
    optimizer = DHSPG(net().named_parameters(), groups(), **TOY)
    assert optimizer.settled is optimizer.atoms
    first = optimizer.state_dict()["param_groups"][0]
    first["oto_settled"].fill_(1)
    assert not first["oto_atoms"].any() and not optimizer.atoms.any()
