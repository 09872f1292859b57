"""Training after pruning: the formulas, step by step, and every loop that they are used in."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
from torch import nn

from oto.errors import OptionError
from oto.integrations import mix
from oto.recovery import FLOOR, STRONG, WARMUP, WEAK, Mixture, Rewarmed, replay, rewarmed, reweighted, source_losses

# Learning rate --------------------------------------------------------------------------------------------------------


def test_the_rate_of_every_step():
    """Up in 3 of 300 steps, down along a cosine to a tenth, and there it stays."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 0.2}, {"params": [nn.Parameter(torch.zeros(1))]}], lr=2)
    schedule = rewarmed(optimizer, 300)
    for t in range(1, 310):
        expected = t / 3 if t <= 3 else 0.1 + 0.45 * (1 + math.cos(math.pi * (min(t, 300) - 3) / 297))
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.2 * expected, 2 * expected], rel=1e-12)
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([0.02, 0.2], rel=1e-12)


def test_the_recommendations_are_the_defaults():
    """arXiv 2403.08763."""
    assert (WARMUP, FLOOR, WEAK, STRONG) == (0.01, 0.1, 0.05, 0.25)
    assert Rewarmed(100) == Rewarmed(100, 0.01, 0.1)
    assert replay(range(50), range(9)).shares == {"new": 0.95, "old": 0.05}


def test_a_run_that_is_resumed_has_the_rates_of_one_that_was_not():
    def make(steps=20):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, rewarmed(optimizer, steps, warmup=0.2)

    (first, one), (second, two) = make(), make(30)
    for _ in range(7):
        first.step()
        one.step()
    second.load_state_dict(first.state_dict())
    two.load_state_dict(one.state_dict())
    for _ in range(9):
        for optimizer, schedule in ((first, one), (second, two)):
            optimizer.step()
            schedule.step()
        assert one.get_last_lr() == two.get_last_lr()


@pytest.mark.parametrize(("warmup", "first"), [(0.0, 0.1 + 0.45 * (1 + math.cos(math.pi / 4))), (1.0, 0.25)])
def test_no_rise_and_nothing_but_a_rise(warmup, first):
    factor = Rewarmed(4, warmup)
    assert factor(0) == pytest.approx(first) and factor(3) == (1 if warmup else pytest.approx(0.1))


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 5, "warmup": 2.0}, {"steps": 5, "floor": -0.1}])
def test_there_is_no_such_schedule(options):
    with pytest.raises(OptionError, match="there is no such schedule"):
        Rewarmed(**options)


# Shares ---------------------------------------------------------------------------------------------------------------


def test_shares_follow_losses_step_by_step():
    reference = {"a": 2.0, "b": 1.0, "c": 3.0}
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    w = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    for losses in ([2.5, 0.5, 3.0], [1.0, 1.25, 3.5], [2.0, 1.0, 3.0]):
        alpha = w * (torch.tensor(losses, dtype=torch.float64) - torch.tensor([2.0, 1.0, 3.0])).clamp_min(0).exp()
        w = (1 - 1e-4) * alpha / alpha.sum() + 1e-4 / 3
        shares = reweighted(shares, dict(zip("abc", losses, strict=True)), reference)
        assert list(shares.values()) == pytest.approx(w.tolist(), rel=1e-12)
    assert sum(shares.values()) == pytest.approx(1, rel=1e-12)


def test_a_loss_that_has_exploded_leaves_some_of_each_source():
    found = reweighted({"a": 0.5, "b": 0.5}, {"a": 5000.0, "b": 1.0}, {"a": 1.0, "b": 1.0})
    assert found == pytest.approx({"a": 1 - 0.5e-4, "b": 0.5e-4}, rel=1e-12)


@pytest.mark.parametrize("losses", [{"a": 1.0}, {"a": 1.0, "b": math.nan}, {"a": 1.0, "b": math.inf}])
def test_a_source_without_a_loss_is_told(losses):
    mixture = Mixture({"a": [1], "b": [2]})
    with pytest.raises(OptionError, match="losses has no finite number for b"):
        mixture.update(losses, {"a": 1.0, "b": 1.0})
    assert mixture.shares == {"a": 0.5, "b": 0.5}


# Draws ----------------------------------------------------------------------------------------------------------------


def test_sources_are_drawn_by_their_shares_and_each_without_repetition():
    mixture = Mixture({"a": range(1000), "b": range(1000, 1050)}, {"a": 3.0, "b": 1.0}, length=1200)
    drawn = [mixture.dataset[i] for i in mixture]
    old = [n for n in drawn if n >= 1000]
    assert len(drawn) == len(mixture) == 1200
    assert abs(len(old) - 300) < 3 * math.sqrt(1200 * 0.25 * 0.75)  # three standard deviations of a binomial
    assert max(Counter(n for n in drawn if n < 1000).values()) == 1
    for start in range(0, len(old) - 50, 50):
        assert sorted(old[start : start + 50]) == list(range(1000, 1050)), "a pass takes each sample once"
    assert [mixture.dataset[i] for i in mixture] != drawn, "another epoch is another draw"


def test_replay_is_taken_out_of_the_budget():
    mixture = replay(range(400), range(1000, 1100), STRONG, seed=3)
    drawn = [mixture.dataset[i] for i in mixture]
    assert len(drawn) == 400
    assert abs(sum(n >= 1000 for n in drawn) - 100) < 3 * math.sqrt(400 * 0.25 * 0.75)


def test_an_update_holds_from_the_next_draw_on():
    mixture = Mixture({"a": range(500), "b": range(500, 1000)})
    draws = iter(mixture)
    before = [next(draws) for _ in range(100)]
    mixture.update({"a": 99.0, "b": 1.0}, {"a": 1.0, "b": 1.0}, smoothing=0.0)
    after = [next(draws) for _ in range(100)]
    assert any(n >= 500 for n in before) and all(n < 500 for n in after)


def test_processes_take_parts_of_one_sequence():
    def make(**which):
        return Mixture({"a": range(30), "b": range(30, 50)}, length=25, **which)

    whole, parts = list(make()), [list(make(rank=rank, world=3)) for rank in range(3)]
    assert [len(part) for part in parts] == [8, 8, 8]
    assert [n for row in zip(*parts, strict=True) for n in row] == whole[:24]


def test_a_mixture_that_is_resumed_draws_what_one_that_was_not_does():
    one, two = (Mixture({"a": range(30), "b": range(30, 50)}, seed=seed) for seed in (1, 2))
    draws = iter(one)
    for _ in range(20):
        next(draws)
    one.update({"a": 2.0, "b": 1.0}, {"a": 1.0, "b": 1.0})
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    later = iter(two)
    assert [next(draws) for _ in range(30)] == [next(later) for _ in range(30)]
    assert one.shares == two.shares


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ({"a": []}, {}, "none may be empty"),
        ({}, {}, "none may be empty"),
        ({"a": [1]}, {"rank": 2, "world": 2}, "rank is 2 and world 2"),
        ({"a": [1]}, {"shares": {"b": 1.0}}, "do not fit the sources a"),
        ({"a": [1]}, {"shares": {"a": -1.0}}, "do not fit the sources a"),
        ({"a": [1]}, {"shares": {"a": 0.0}}, "do not fit the sources a"),
    ],
)
def test_what_cannot_be_drawn_is_refused(sources, options, message):
    with pytest.raises(OptionError, match=message):
        Mixture(sources, **options)


def test_shares_of_old_data_are_shares():
    for share in (5, "0.1", None):
        with pytest.raises(OptionError, match=f"share is {share!r}"):
            replay([1], [2], share)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replay(None, None), r"new is a NoneType, old is a NoneType, which has no length[^$]*to fix"),
        (lambda: replay([1], iter([2])), r"old is a list_iterator, which has no length[^$]*to fix"),
        (lambda: Mixture([[1]]), r"the sources are a list; they are datasets by name[^$]*to fix"),
        (lambda: Mixture({"a": [1]}, rank=None), r"rank is None and world 1"),
        (lambda: Mixture({"a": [1]}, length="3"), r"length is '3'; it is the number of samples"),
        (lambda: Rewarmed(float("nan")), r"steps is nan"),
    ],
)
def test_what_has_no_length_is_refused(make, message):
    with pytest.raises(OptionError, match=message):
        make()


def test_what_has_no_rates_is_refused():
    with pytest.raises(OptionError, match=r"optimizer is a NoneType, no torch[^$]*effect[^$]*to fix[^$]*oto\.hesso"):
        rewarmed(None, 3)


# Losses ---------------------------------------------------------------------------------------------------------------


def test_losses_are_means_in_eval_mode_and_modes_are_as_before():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).double()
    model[1].eval()
    held = {"a": [torch.randn(5, 3).double() for _ in range(3)], "b": [torch.randn(5, 3).double()]}
    found = source_losses(model, held, lambda model, x: model(x).square().mean())
    assert [m.training for m in model] == [True, False, True] and not model[2].num_batches_tracked
    model.eval()
    expected = {name: sum(model(x).square().mean().item() for x in xs) / len(xs) for name, xs in held.items()}
    assert found == pytest.approx(expected, rel=1e-12)
    with pytest.raises(OptionError, match="no batches were held out of b"):
        source_losses(model, {"a": held["a"], "b": []}, lambda model, x: model(x).mean())


# Loops of others ------------------------------------------------------------------------------------------------------


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, x, labels=None):
        said = self.net(x)
        return {"said": said} if labels is None else {"loss": (said - labels).square().mean(), "said": said}


def sources():
    """The first number of a sample says where it is from."""
    return {
        name: [{"x": torch.tensor([kind, 1.0, 0.0]), "labels": torch.ones(2)} for _ in range(20)]
        for name, kind in (("new", 0.0), ("old", 1.0))
    }


def test_a_trainer_draws_from_the_mixture_and_updates_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False, gradient_accumulation_steps=2,
    )  # fmt: skip
    model, drawn, measured = Regression(), [], []
    mixture = Mixture(sources(), length=200)

    def collate(rows):
        drawn.extend(float(row["x"][0]) for row in rows)
        return transformers.default_data_collator(rows)

    def measure(model):
        measured.append(trainer.state.global_step)
        return {"new": 1.0, "old": 50.0}

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = transformers.Trainer(
        model,
        args,
        train_dataset=sources()["new"],
        data_collator=collate,
        optimizers=(optimizer, rewarmed(optimizer, 12)),
    )
    mix(trainer, mixture, measure, {"new": 1.0, "old": 1.0}, every=6)
    trainer.train()
    assert measured == [6, 12] and mixture.shares["old"] > 0.99
    assert {*drawn[:24]} == {0.0, 1.0} and {*drawn[-20:]} == {1.0}
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


@pytest.mark.filterwarnings("ignore")  # of lightning
def test_lightning_updates_the_mixture_once_a_step(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Regression()

        def training_step(self, batch, i):
            return self.net(**batch)["loss"]

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rewarmed(optimizer, 4), "interval": "step"}}

    mixture, measured = Mixture(sources(), length=40), []
    trainer = lightning.Trainer(
        max_steps=4, accumulate_grad_batches=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip

    def measure(module):
        measured.append(trainer.global_step)
        return {"new": 1.0, "old": 3.0}

    mix(trainer, mixture, measure, {"new": 1.0, "old": 1.0}, every=2)
    trainer.fit(Task(), mixture.loader(batch_size=2))
    assert measured == [2, 4] and trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)
    assert mixture.shares["old"] == pytest.approx(math.exp(4) / (1 + math.exp(4)), rel=1e-3)


def test_what_a_trainer_cannot_be_given_is_told():
    mixture = Mixture(sources())
    with pytest.raises(OptionError, match="belong together"):
        mix(object(), mixture, lambda model: {})
    with pytest.raises(OptionError, match="a object is no Trainer of transformers or lightning"):
        mix(object(), mixture)
