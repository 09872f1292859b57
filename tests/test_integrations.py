"""The progress of pruning, where training is logged."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from oto import OTO
from oto.errors import OptionError
from oto.integrations import log_progress, progress_dict


def optimizer_of(model, x, **more):
    return OTO(model, x).hesso(
        lr=0.01, target_macs=0.5, start_pruning_step=1, pruning_steps=4, pruning_periods=2, **more
    )


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def test_plain_numbers():
    model, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 3)
    optimizer = optimizer_of(model, x)
    start = progress_dict(optimizer)
    assert start == {"oto/sparsity": 0, "oto/redundant": 0, "oto/done": 0, "oto/cost": 80, "oto/goal": 40}
    for _ in range(2):
        step(model, optimizer, x)
    assert progress_dict(optimizer, prefix="")["redundant"] > 0
    for _ in range(4):
        step(model, optimizer, x)
    end = progress_dict(optimizer)
    assert end["oto/done"] == 1 and end["oto/sparsity"] == 0.5 and end["oto/cost"] <= end["oto/goal"]
    assert {type(value) for value in end.values()} == {float}
    json.dumps(end)


def test_it_looks_inside_of_wrappers():
    accelerate = pytest.importorskip("accelerate")
    model, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 3)
    optimizer = optimizer_of(model, x)
    wrapped = accelerate.Accelerator(cpu=True).prepare(optimizer)
    assert wrapped is not optimizer and progress_dict(wrapped) == progress_dict(optimizer)


def test_another_optimizer_is_told():
    with pytest.raises(OptionError, match="a SGD holds no optimizer of oto"):
        progress_dict(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0))


def test_the_trainer_logs_it_for_everybody(tmp_path):
    """Also for those callbacks that were there before, as reporters are."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, x, labels=None):
            loss = None if labels is None else (self.net(x) - labels).square().mean()
            return {"loss": loss, "said": self.net(x)} if loss is not None else {"said": self.net(x)}

    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **rest):
            seen.append(dict(logs))

    model = Net()
    optimizer = optimizer_of(model, {"x": torch.randn(2, 3)})
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, logging_steps=2, per_device_train_batch_size=2, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    data = [{"x": torch.randn(3), "labels": torch.randn(2)} for _ in range(12)]
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = transformers.Trainer(
        model, settings, train_dataset=data, optimizers=(optimizer, schedule), callbacks=[Reporter()]
    )
    log_progress(trainer)
    trainer.train()
    steps = [line for line in seen if "loss" in line]
    assert [line["oto/sparsity"] for line in steps] == sorted(line["oto/sparsity"] for line in steps)
    assert steps[-1]["oto/sparsity"] == 0.5 and steps[0]["oto/redundant"] > 0
    assert [r["step"] for r in optimizer.history if "loss" in r] == [2, 4, 6]
    assert trainer.state.log_history[-1]["oto/cost"] <= trainer.state.log_history[-1]["oto/goal"]
