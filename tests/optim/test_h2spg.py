"""H2SPG: step by step as the paper has it, and a search that never takes a network apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oto import OTO
from oto.errors import OptionError, TargetError
from oto.groups.segments import legal


class Cell(nn.Module):
    """Two branches side by side, and a residual block after them: one of the two has to stay."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        x = self.left(x) + self.right(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def analyzed(**options):
    torch.manual_seed(0)
    model = Cell().double()
    return OTO(model, torch.randn(2, 4, dtype=torch.float64), compress_mode="erase", **options)


def gradients(oto, t):
    source = torch.Generator().manual_seed(t)
    x = torch.randn(16, 4, generator=source, dtype=torch.float64)
    y = torch.randint(0, 3, (16,), generator=source)
    oto.model.zero_grad()
    nn.functional.cross_entropy(oto.model(x), y).backward()


def entries(group, parameters, what=lambda p: p.detach()):
    """Of a segment everything that is zeroed, as one vector."""
    return torch.cat([what(parameters[piece.parameter]).flatten() for piece in group.zeros])


def searched(groups, scores, number):
    """G_r as the paper has it, with validity spelled out for the cell."""
    names = [group.name for group in groups]
    removed = []
    for i in np.argsort(scores, kind="stable"):
        trial = {*removed, names[i]}
        apart = {"left", "right"} <= trial or {f"blocks.{n}" for n in range(3)} <= trial
        if len(removed) < number and not apart:
            removed.append(names[i])
    return removed


START, HALF, STEPS, RATE, LMBDA, AMPLIFY, COEFF, EPSILON = 4, 6, 36, 0.05, 2.0, 2.0, 10.0, 0.9


def test_every_step_is_the_papers():
    oto = analyzed()
    optimizer = oto.h2spg(
        lr=RATE, target_segments=2, saliency="dhspg", lmbda=LMBDA, lmbda_amplify=AMPLIFY, hat_lmbda_coeff=COEFF,
        epsilon=EPSILON, partition_step=START, half_space_step=HALF, pruning_steps=STEPS,
    )  # fmt: skip
    parameters = dict(oto.model.named_parameters())
    groups = optimizer.node_groups
    redundant, zero, seen = [], set(), []
    for t in range(START + STEPS - STEPS // 10 - 1):
        gradients(oto, t)
        before = {g.name: entries(g, parameters).clone() for g in groups}
        slopes = {g.name: entries(g, parameters, lambda p: p.grad).clone() for g in groups}
        if t <= START:
            seen.append([score(before[g.name], slopes[g.name]) for g in groups])
        if t == START:
            redundant = searched(groups, scores_of(seen), 2)
        optimizer.step()
        for g in groups:
            expected = before[g.name] - RATE * slopes[g.name]
            if g.name in zero:
                expected = torch.zeros_like(expected)
            elif g.name in redundant and t >= START:
                expected = penalized(before[g.name], slopes[g.name], t)
                if not expected.any():
                    zero.add(g.name)
            torch.testing.assert_close(entries(g, parameters), expected, rtol=1e-9, atol=1e-12)
    assert len(redundant) == 2 and zero == set(redundant), "they left by themselves"


def score(x, g):
    return -float(x @ g / (x.norm() * g.norm())), -1 / (float(x.norm()) / len(x) + 1e-6)


def scores_of(seen):
    """Angles are averaged, magnitudes are those of now; half each, over the norm of all."""
    mean, last = np.array(seen).mean(0), np.array(seen[-1])
    own = np.stack([mean[:, 0], last[:, 1]])
    return 0.5 * (own / np.linalg.norm(own, axis=1, keepdims=True)).sum(0)


def penalized(x, g, t):
    lmbda, inner = LMBDA, float(x @ g)
    if inner < 0:
        low, high = -inner / float(x.norm()), -float(g @ g) * float(x.norm()) / inner
        lmbda = min(max(AMPLIFY * low, LMBDA), COEFF * LMBDA)
        lmbda = (low + high) / 2 if lmbda >= high else lmbda
    new = x - RATE * (g + lmbda * x / x.norm())
    return torch.zeros_like(x) if t >= HALF and new @ x < EPSILON * (x @ x) else new


@settings(max_examples=30, deadline=None)
@given(scores=st.lists(st.floats(-1, 1), min_size=5, max_size=5), number=st.integers(0, 3))
def test_the_search_keeps_the_network_together(scores, number):
    oto = CELL
    optimizer = oto.h2spg(lr=0.1, target_segments=number, total_steps=100)
    gone = optimizer.search(torch.tensor(scores, dtype=torch.float64))
    groups = optimizer.node_groups
    names = [g.name for g, goes in zip(groups, gone.tolist(), strict=True) if goes]
    assert sorted(names) == sorted(searched(groups, np.array(scores), number))
    kept = {g.name: np.arange(1 - int(goes)) for g, goes in zip(groups, gone.tolist(), strict=True)}
    assert not legal(oto.partition, kept)[1], "nothing is put back"


CELL = analyzed()


def test_a_slim_network_without_as_many_segments():
    oto = analyzed()
    optimizer = oto.h2spg(lr=0.05, target_segments=3, start_pruning_step=2, pruning_steps=8)
    for t in range(12):
        gradients(oto, t)
        optimizer.step()
    subnet = oto.construct_subnet()
    assert len(oto.partition.erased(subnet.kept)) == 3 and subnet.max_error <= 1e-10


def test_a_run_that_is_resumed_is_the_run_that_was_not_interrupted():
    def started():
        oto = analyzed()
        how = {"saliency": "dhspg", "start_pruning_step": 4, "pruning_steps": 8, "lmbda": 2.0}
        return oto, oto.h2spg(lr=0.05, target_segments=2, **how)

    one, optimizer = started()
    for t in range(12):
        if t in (3, 6):  # in the warm-up, and in the middle of what follows
            held = optimizer.state_dict(), one.model.state_dict()
            one, optimizer = started()
            optimizer.load_state_dict(held[0])
            one.model.load_state_dict(held[1])
        gradients(one, t)
        optimizer.step()
    whole, other = started()
    for t in range(12):
        gradients(whole, t)
        other.step()
    assert optimizer.num_pruned == other.num_pruned == 2
    for p, q in zip(one.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_what_cannot_be_asked_for():
    oto = analyzed(min_depth=2)
    with pytest.raises(TargetError, match="only 2 may go"):
        oto.h2spg(lr=0.1, target_segments=3, total_steps=100)
    with pytest.raises(TargetError, match="from 0 to 4"):
        oto.h2spg(lr=0.1, target_segments=5, total_steps=100)
    with pytest.raises(TargetError, match="exactly one"):
        oto.h2spg(lr=0.1, target_segments=1, target_macs=0.5, total_steps=100)
    both = OTO(Cell(), torch.randn(2, 4), compress_mode="both")
    with pytest.raises(OptionError, match="channels may go, too"):
        both.h2spg(lr=0.1, target_segments=1, total_steps=100)
