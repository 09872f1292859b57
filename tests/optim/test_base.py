"""What every sparse optimizer tells and checks: progress, and the setup of a checkpoint."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from oto.errors import OptionError, SetupError, SetupWarning
from tests.optim.toy import END, PERIODS, START, STEPS, assert_same, count_zeros, hesso, net, train

# Progress ------------------------------------------------------------------------------------------------------------


def test_progress_of_every_step():
    model = net()
    optimizer = hesso(model)
    seen = [optimizer.progress]
    train(model, optimizer, range(END + 1), then=lambda n: seen.append(optimizer.progress))
    assert [p.step for p in seen] == list(range(END + 2))
    assert [p.period for p in seen] == [None, None, 0, 0, 1, 1, 2, 2, None, None]
    assert [p.pruned for p in seen] == [0, 0, 0, 0, 3, 3, 5, 5, 7, 7]
    assert [p.redundant for p in seen] == [0, 0, 0, 3, 0, 2, 0, 2, 0, 0]
    assert [round(p.done, 3) for p in seen] == [0, 0, 0, 0.167, 0.333, 0.5, 0.667, 0.833, 1, 1]
    assert [p.over for p in seen] == [False] * 8 + [True] * 2
    assert seen[-1].sparsity == 0.5 and seen[0].groups == 14
    assert str(seen[1]) == "step 1 of 8: 0 of 14 groups are zero; 14 groups, goal 7"
    assert str(seen[5]) == "step 5 of 8, period 2 of 3: 3 of 14 groups are zero, 2 on their way; 11 groups, goal 7"
    assert str(seen[9]) == "step 9, pruning ended after 8 steps: 7 of 14 groups are zero; 7 groups, goal 7"
    with pytest.raises(AttributeError):
        seen[0].pruned = 3


def test_what_is_printed_of_an_optimizer_is_what_a_reader_asks_for():
    first, second, *rest = repr(hesso(net())).splitlines()
    assert first.startswith("HESSO over SGD: ")
    assert second == "step 0 of 8: 0 of 14 groups are zero; 14 groups, goal 7"
    assert (
        len(rest) == 1
        and "lr=" in rest[0]
        and "oto_" not in rest[0]
        and "weight" not in rest[0].split("weight_decay")[0]
    )


def test_progress_through_a_wrapper():
    model = net()
    wrapper = SimpleNamespace(optimizer=hesso(model))  # as the optimizers of accelerate hold theirs
    train(model, wrapper.optimizer, range(3))
    assert wrapper.optimizer.progress.redundant == 3


def test_progress_through_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model = net()
    model, wrapped = accelerate.Accelerator(cpu=True).prepare(model, hesso(model))
    train(model, wrapped, range(3))
    assert wrapped.optimizer.progress.step == 3 and wrapped.optimizer.progress.redundant == 3


def test_progress_reads_what_is_on_the_cpu(monkeypatch):
    model = net()
    optimizer = hesso(model)
    train(model, optimizer, range(START + 1))
    monkeypatch.setattr(torch.Tensor, "cpu", None)  # atoms may be on another device; their copy is here already
    assert optimizer.progress.redundant == 3


# Checkpoints of another setup -----------------------------------------------------------------------------------------


def saved_after(steps, tmp_path, **options):
    model = net()
    optimizer = hesso(model, **options)
    train(model, optimizer, range(steps))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    return torch.load(tmp_path / "checkpoint.pt", weights_only=True)


OTHER = {
    "target_group_sparsity": ({"target_group_sparsity": 0.3}, "0.5 in the checkpoint, 0.3 here"),
    "start_pruning_step": ({"start_pruning_step": 1}, "2 in the checkpoint, 1 here"),
    "pruning_steps": ({"pruning_steps": 9}, "6 in the checkpoint, 9 here"),
    "pruning_periods": ({"pruning_periods": 2}, "3 in the checkpoint, 2 here"),
    "group_divisible": ({"group_divisible": 2, "target_group_sparsity": 0.5}, "1 in the checkpoint, 2 here"),
    "saliency": ({"saliency": "magnitude"}, "{'magnitude': 1.0} here"),
}


@pytest.mark.parametrize("key", OTHER)
def test_a_resume_under_another_setup_is_refused_once_pruning_has_begun(tmp_path, key):
    options, text = OTHER[key]
    saved = saved_after(START + 1, tmp_path)
    model = net()
    optimizer = hesso(model, **options)
    with pytest.raises(SetupError, match=f"saved after 3 steps under another setup\n  {key}: ") as caught:
        optimizer.load_state_dict(saved["optimizer"])
    assert text in str(caught.value) and "to fix  make the optimizer as it was made then" in str(caught.value)
    assert optimizer.clock == 0 and not optimizer.state  # nothing was loaded
    del saved["optimizer"]["param_groups"][0]["oto_setup"]  # the way out that the message names
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.clock == 3


def test_a_resume_with_another_wrapped_optimizer_is_refused_and_nothing_loaded(tmp_path):
    saved = saved_after(START + 1, tmp_path)
    model = net()
    optimizer = hesso(model, variant="adam")
    with pytest.raises(
        SetupError, match=r"of another optimizer than Adam, with dampening, momentum, nesterov[^$]*to fix  wrap"
    ):
        optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.clock == 0 and not optimizer.state
    train(model, optimizer, range(END))  # as if nothing had been
    assert optimizer.progress.over


def test_the_history_goes_on_after_a_resume(tmp_path):
    """Saved as plain data beside the rest, so that `weights_only` loads it; numbers of one step are one record."""
    model = net()
    optimizer = hesso(model)
    optimizer.record(loss=torch.tensor(3.0))
    optimizer.record(accuracy=0.5)
    assert optimizer.history == [{"step": 0, "loss": 3.0, "accuracy": 0.5}]
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    model = net()
    again = hesso(model)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.history == optimizer.history
    train(model, again, range(END))
    costs = [(record["step"], record["groups"]) for record in again.history if "groups" in record]
    assert costs == [(2, 14), (3, 11), (4, 11), (5, 9), (6, 9), (7, 7)]  # three periods of two steps


@pytest.mark.parametrize("key", OTHER)
def test_before_pruning_another_setup_is_reported_and_counts(tmp_path, key):
    options, text = OTHER[key]
    saved = saved_after(START - 1, tmp_path)
    model = net()
    optimizer = hesso(model, **options)
    with pytest.warns(SetupWarning, match=f"saved after 1 steps under another setup\n  {key}: ") as caught:
        optimizer.load_state_dict(saved["optimizer"])
    assert text in str(caught[0].message) and caught[0].filename == __file__
    again = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(again)  # it is the setup of this optimizer now: no word
    assert json.loads(again["param_groups"][0]["oto_setup"]) == json.loads(json.dumps(optimizer.describe_setup()))


def test_a_schedule_that_should_have_begun_already_is_refused(tmp_path):
    saved = saved_after(1, tmp_path)
    with pytest.raises(
        SetupError, match=r"start_pruning_step: 2 in the checkpoint, 0 here\n  effect .*periods would be"
    ):
        hesso(net(), start_pruning_step=0).load_state_dict(saved["optimizer"])


def test_the_same_setup_is_no_matter_how_it_was_written(tmp_path):
    saved = saved_after(START + 1, tmp_path)
    model = net()
    shares = {"start_pruning_step": 0.1, "pruning_steps": 0.3, "total_steps": 20}
    assert (START, STEPS, PERIODS) == (2, 6, 3)
    hesso(model, **shares).load_state_dict(saved["optimizer"])


def test_a_checkpoint_from_before_there_were_setups_loads(tmp_path):
    through = net()
    train(through, hesso(through), range(END))
    saved = saved_after(START + 1, tmp_path)
    del saved["optimizer"]["param_groups"][0]["oto_setup"]
    model = net()
    optimizer = hesso(model)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(START + 1, END))
    assert_same(model, through)
    assert count_zeros(model) == 7


def test_a_resume_from_an_older_version_of_the_wrapped_optimizer_loads(tmp_path):
    """It has fewer options, and none that are foreign."""
    saved = saved_after(START + 1, tmp_path)["optimizer"]
    assert saved["param_groups"][0].pop("dampening") == 0
    saved["param_groups"][0]["initial_lr"] = 0.1  # by a scheduler
    optimizer = hesso(net())
    optimizer.load_state_dict(saved)
    assert optimizer.clock == START + 1


@pytest.mark.parametrize("given", [None, {}, {"0.weight": torch.ones(2)}])
def test_what_is_no_state_dict_of_an_optimizer_is_told(given):
    optimizer = hesso(net())
    with pytest.raises(SetupError, match=r"no state dict of an optimizer[^$]*nothing was loaded[^$]*that part"):
        optimizer.load_state_dict(given)


@pytest.mark.parametrize("number", [None, "a", torch.ones(3)])
def test_what_is_no_number_is_not_recorded(number):
    optimizer = hesso(net())
    with pytest.raises(OptionError, match=r"loss is no number to record[^$]*nothing was added"):
        optimizer.record(accuracy=0.5, loss=number)
    assert optimizer.history == []
