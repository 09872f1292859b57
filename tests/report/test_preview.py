"""What a target would leave, before any training."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from oto import OTO
from oto.errors import CollapseWarning, NoGradientError, OptionError, TargetError
from oto.groups import cost


class Blocks(nn.Module):
    """Three blocks alike, with norms that count and dropout that draws random numbers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(20, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 20, 1))
            for _ in range(3)
        )
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(20, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.drop(x).mean((2, 3)))


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


DRAWN = torch.Generator().manual_seed(0)
BATCHES = [(torch.randn(4, 3, 8, 8, generator=DRAWN), torch.randint(4, (4,), generator=DRAWN)) for _ in range(3)]


@pytest.fixture
def oto():
    torch.manual_seed(0)
    return OTO(Blocks(), torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    "asked", [{"target_macs": 0.5}, {"target_params": 2000}, {"target_bytes": 0.3}, {"target_group_sparsity": 0.4}]
)
def test_widths_and_costs_are_those_of_a_choice_that_meets_the_target(oto, asked):
    seen = oto.preview(**asked)
    assert seen.before == cost(oto.partition) and seen.after == cost(oto.partition, seen.kept)
    assert {w.group: w.before for w in seen.widths} == {g.name: g.size for g in oto.node_groups if g.prunable}
    assert all(1 <= w.after <= w.before and w.macs_after <= w.macs_before for w in seen.widths)
    ((name, number),) = asked.items()
    if name == "target_group_sparsity":
        assert sum(seen.kept.values()) == 116 - int(116 * number)
    else:
        before, after = (getattr(c, name.removeprefix("target_")) for c in (seen.before, seen.after))
        goal = number if isinstance(number, int) else number * before
        one_more = [seen.kept | {w.group: w.after + 1} for w in seen.widths if w.after < w.before]
        coarsest = max(getattr(cost(oto.partition, k), name.removeprefix("target_")) for k in one_more) - after
        assert goal - max(0.01 * goal, coarsest) <= after <= goal


def test_criteria_are_averaged_over_batches_so_that_more_of_the_same_change_nothing(oto):
    oto.model.eval()  # dropout draws other numbers for every batch
    weighed = {"saliency": {"magnitude": 1.0, "taylor_first_order": 3.0}, "normalize": "none"}
    once, often = (oto.preview(target_macs=0.5, batches=BATCHES[:1] * n, loss=loss, **weighed).kept for n in (1, 8))
    assert once == often


def test_the_costs_of_a_width_are_those_of_all_that_has_it_as_a_factor(oto):
    seen = {w.group: w for w in oto.preview(target_macs=0.5, saliency="magnitude").widths}
    inner = seen["blocks.0.0.weight"]
    pixels = 64
    assert inner.macs_before == pixels * (20 * 9 * 32 + 32 * 20)
    width = seen["stem.weight"].after
    assert inner.macs_after == pixels * (width * 9 * inner.after + inner.after * width)


def test_repeated_blocks_are_one_row(oto):
    lines = str(oto.preview(target_macs=0.5)).splitlines()
    macs = oto.compute_macs()
    assert lines[0] == f"target_macs=0.5: at most {macs / 2:,.0f} of {macs:,} MACs"
    assert lines[1] == "chosen by the weights alone"
    (row,) = [line for line in lines if line.startswith("blocks.*.*.weight")]
    assert row.split()[1:3] == ["3", "32"]
    assert any(line.startswith("stem.weight") for line in lines) and not any("in brackets" in line for line in lines)
    assert any(line.startswith("MACs") and f"{macs:,}" in line for line in lines)


class Attention(nn.Module):
    """Heads and their width are two groups of one dimension; the same in two blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({n: nn.Linear(24, 24) for n in "qkvo"}) for _ in range(2))
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        for block in self.blocks:
            q, k, v = (block[n](x).unflatten(-1, (4, 6)).transpose(1, 2) for n in "qkv")
            x = x + block["o"](
                nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(2)
            )
        return self.head(x)


def test_heads_and_their_width_are_told_apart_and_rows_need_not_add_up():
    oto = OTO(Attention(), torch.randn(2, 5, 24))
    names = {g.name: g.factor for g in oto.node_groups if g.prunable and ".q." in g.name}
    assert names == {f"blocks.{i}.q.weight{n}": f for i in (0, 1) for n, f in (("", "[4]×6"), ("/1", "4×[6]"))}
    printed = str(oto.preview(target_macs=0.6)).splitlines()
    rows = {line.split()[0]: line.split()[1:4] for line in printed if line.startswith("blocks")}
    assert rows["blocks.*.q.weight"] == ["[4]×6", "2", "4"] and rows["blocks.*.q.weight/1"] == ["4×[6]", "2", "6"]
    assert "MACs with it: a product counts for each group that it runs through, so rows do not add up to" in printed[-7]
    assert printed[-6].startswith("[4]×6: the group in brackets is a factor of a dimension")
    seen = oto.preview(target_macs=0.6)
    assert sum(w.macs_before for w in seen.widths) > seen.before.macs and "heads and their width" in seen._repr_html_()


def test_plain_data_for_tools(oto):
    seen = oto.preview(target_macs=0.5)
    again = json.loads(json.dumps(seen.to_dict()))
    assert again["after"]["macs"] == seen.after.macs
    assert {w["group"]: w["after"] for w in again["widths"]} == seen.kept


def test_a_preview_leaves_no_trace(oto):
    model = oto.model
    loss(model, BATCHES[0]).backward()
    state = copy.deepcopy(model.state_dict())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    random, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    seen = oto.preview(target_macs=0.5, batches=BATCHES, loss=loss)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes and model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert "gradients of 3 batches" in str(seen)
    assert oto.preview(target_macs=0.5, batches=BATCHES, loss=loss).kept == seen.kept
    oto.mark_unprunable_by_param_names(["stem.weight"])  # a preview is no optimizer: marks are not too late


def test_it_is_what_an_optimizer_would_choose_now(oto):
    """At the first step, in one go, after the same batch."""
    options = {"target_params": 0.5, "saliency": "taylor_first_order", "normalize": "mean"}
    oto.model.eval()  # so that dropout and norms do the same twice
    seen = oto.preview(batches=BATCHES[:1], loss=loss, **options)
    optimizer = oto.hesso(lr=0.1, start_pruning_step=0, pruning_steps=2, pruning_periods=1, **options)
    loss(oto.model, BATCHES[0]).backward()
    optimizer.step()
    chosen = optimizer.redundant_groups
    assert {g.name: g.size - len(chosen.get(g.name, ())) for g in optimizer.node_groups} == seen.kept


def test_batches_are_averaged(oto):
    """What one batch says is not what all say."""
    options = {"target_params": 0.5, "saliency": "taylor_first_order", "loss": loss}
    oto.model.eval()
    one_by_one = [oto.preview(batches=[batch], **options).kept for batch in BATCHES]
    together = oto.preview(batches=BATCHES, **options).kept
    assert together == oto.preview(batches=BATCHES[::-1], **options).kept
    assert any(kept != together for kept in one_by_one)


def test_no_copy_of_the_model_is_made(oto, monkeypatch):
    def refuse(self, memo):
        raise AssertionError("copied")

    model = oto.model.train()
    next(model.children()).eval()
    model(BATCHES[0][0]).sum().backward()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    grads = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    seen = []
    monkeypatch.setattr(nn.Module, "__deepcopy__", refuse, raising=False)
    for batches in ((), BATCHES):
        oto.preview(target_macs=0.5, batches=batches, loss=lambda m, b: seen.append(m.training) or loss(m, b))
    assert seen and all(seen) and [m.training for m in model.modules()] == modes
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    for name, p in model.named_parameters():
        grad, held = grads[name]
        assert p.grad is grad and (grad is None or torch.equal(grad, held))


def test_any_iterable_of_batches_will_do(oto):
    kept = oto.preview(target_macs=0.5, batches=iter(BATCHES), loss=loss).kept
    assert kept == oto.preview(target_macs=0.5, batches=BATCHES, loss=loss).kept


def test_batches_need_a_loss(oto):
    with pytest.raises(OptionError, match=r"batches are given without a loss[^$]*to fix  pass loss="):
        oto.preview(target_macs=0.5, batches=BATCHES)


def test_a_target_out_of_reach_is_refused(oto):
    with pytest.raises(TargetError, match=r"target_macs=0\.5 allows"):
        oto.preview(target_macs=0.5, min_kept=0.9)
    with pytest.raises(TargetError, match="exactly one is needed"):
        oto.preview()


def test_layers_that_would_be_too_thin_are_named(oto):
    with pytest.warns(CollapseWarning, match="blocks") as caught:
        seen = oto.preview(target_params=0.01)
    assert caught[0].filename == __file__  # the line of the user
    assert seen.after.params <= 0.01 * seen.before.params


def test_limits_are_those_of_a_choice(oto):
    seen = oto.preview(target_macs=0.6, group_divisible=4, min_kept={"blocks.*": 16})
    assert all(w.after == w.before or w.after % 4 == 0 for w in seen.widths)
    assert all(w.after >= 16 for w in seen.widths if w.group.startswith("blocks"))
    local = oto.preview(target_macs=0.5, scope="local")
    shares = np.array([w.after / w.before for w in local.widths])
    assert shares.max() - shares.min() <= 1 / 20


def test_a_loss_without_a_gradient_is_refused(oto):
    def to_itself(model, batch):
        oto.model.eval()
        return nn.functional.mse_loss(model(batch[0]), model(batch[0]).detach())

    with pytest.raises(NoGradientError, match=r"nothing was chosen\n.*a model is no teacher of itself"):
        oto.preview(target_macs=0.5, batches=BATCHES, loss=to_itself)
    with pytest.raises(NoGradientError, match="pass batches="):
        oto.preview(target_macs=0.5, saliency="taylor_second_order")
    oto.preview(target_macs=0.5)  # by the weights alone
