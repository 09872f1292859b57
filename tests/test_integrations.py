"""The progress of pruning, where training is logged."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from oto import OTO
from oto.errors import NotPrunedWarning, OptionError
from oto.integrations import early_stopping, log_progress, progress_dict


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
        output_dir=str(tmp_path),
        max_steps=6,
        logging_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
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


# Early stopping -------------------------------------------------------------------------------------------------------


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x, labels=None):
        said = self.net(x)
        return {"said": said} if labels is None else {"loss": (said - labels).square().mean(), "said": said}


def trainer_of(tmp_path, scores, steps=12, **more):
    """A Trainer of a model that is pruned in steps 2 to 7, and whose evaluations give these scores."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = Regression()
    optimizer = OTO(model, {"x": torch.randn(2, 3)}).hesso(
        lr=0.01, target_macs=0.5, start_pruning_step=2, pruning_steps=6, pruning_periods=2
    )
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        **(
            {
                "eval_strategy": "steps",
                "eval_steps": 1,
                "save_strategy": "steps",
                "save_steps": 1,
                "load_best_model_at_end": True,
                "metric_for_best_model": "score",
                "greater_is_better": True,
            }
            | more
        ),
    )
    data = [{"x": torch.randn(3), "labels": torch.randn(2)} for _ in range(2 * steps)]
    given = iter(scores)
    return transformers.Trainer(
        model,
        settings,
        train_dataset=data,
        eval_dataset=data[:2],
        compute_metrics=lambda _: {"score": next(given)},
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)),
    )


BEFORE = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]  # evaluations of the steps before pruning is over: it only gets worse


def test_what_was_best_before_pruning_is_not_brought_back(tmp_path):
    trainer = trainer_of(tmp_path, [*BEFORE, 1.0, 3.0, 2.0, 2.0, 2.0])
    early_stopping(trainer, patience=3)
    trainer.train()
    assert trainer.state.global_step == 12 and trainer.state.best_global_step == 9
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-9") and trainer.state.best_metric == 3.0
    weight = trainer.model.net[0].weight
    assert int((weight == 0).all(1).sum()) == 4
    assert OTO(trainer.model, {"x": torch.randn(2, 3)}).construct_subnet().model.net[0].out_features == 4


def test_it_stops_only_once_pruning_is_over(tmp_path):
    trainer = trainer_of(tmp_path, [*BEFORE, 2.0, 1.0, 1.0, 9.0])
    assert early_stopping(trainer, patience=2) in trainer.callback_handler.callbacks
    trainer.train()
    assert trainer.state.global_step == 10 and trainer.state.best_global_step == 8
    assert progress_dict(trainer.optimizer)["oto/done"] == 1


def test_without_it_the_best_model_has_no_zeros(tmp_path):
    """What the callback is for; and the warning says what to do."""
    trainer = trainer_of(tmp_path, [*BEFORE, 1.0, 1.0, 1.0, 1.0, 1.0])
    model, x = trainer.model, {"x": torch.randn(2, 3)}
    oto = OTO(model, x)
    trainer.optimizer = optimizer = oto.hesso(
        lr=0.01, target_macs=0.5, start_pruning_step=2, pruning_steps=6, pruning_periods=2
    )
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer.train()
    assert trainer.state.best_global_step == 1
    with pytest.warns(NotPrunedWarning, match=r"these are other weights[^$]*load_best_model_at_end[^$]*early_stopping"):
        oto.construct_subnet()


@pytest.mark.parametrize("steps, best", [(8, "checkpoint-8"), (7, None)])
def test_training_may_end_when_pruning_does_or_before(tmp_path, steps, best):
    trainer = trainer_of(tmp_path, BEFORE, steps=steps, eval_steps=3, save_steps=3)
    early_stopping(trainer)
    with pytest.warns(NotPrunedWarning, match="training ends after step 7") if best is None else nullcontext():
        trainer.train()
    found = trainer.state.best_model_checkpoint
    assert found is None if best is None else found.endswith(best)
    assert int((trainer.model.net[0].weight == 0).all(1).sum()) >= 2


def test_what_it_cannot_count_by_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    trainer = trainer_of(tmp_path, [], eval_strategy="no", load_best_model_at_end=False)
    with pytest.raises(OptionError, match="TrainingArguments"):
        early_stopping(trainer)
    trainer = trainer_of(tmp_path, [])
    trainer.add_callback(transformers.EarlyStoppingCallback())
    with pytest.raises(OptionError, match=r"another callback[^$]*remove_callback"):
        early_stopping(trainer)
    trainer.remove_callback(transformers.EarlyStoppingCallback)
    with pytest.raises(OptionError, match="patience is 0"):
        early_stopping(trainer, patience=0)
    with pytest.raises(OptionError, match="TrainingArguments"):
        early_stopping(trainer, monitor="val_loss")
    with pytest.raises(OptionError, match=r"a SGD is no Trainer[^$]*progress\.over"):
        early_stopping(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0))


def lit(scores):
    lightning = pytest.importorskip("lightning.pytorch")

    class Lit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.given = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), iter(scores)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            return self.net(batch[0]).square().sum()

        def on_validation_epoch_end(self):
            self.log("score", next(self.given))

        def validation_step(self, batch, _):
            pass

        def configure_optimizers(self):
            return OTO(self.net, torch.randn(2, 3)).hesso(
                lr=0.01, target_macs=0.5, start_pruning_step=2, pruning_steps=6, pruning_periods=2
            )

    return lightning, Lit()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "scores, steps, best", [([*BEFORE, 1.0, 3.0, 2.0, 2.0, 2.0], 12, 9), ([*BEFORE, 2.0, 1.0, 1.0], 10, 8)]
)
def test_lightning_stops_and_keeps_the_best_after_pruning(tmp_path, scores, steps, best):
    lightning, module = lit(scores)
    keep = lightning.callbacks.ModelCheckpoint(
        tmp_path, "{step}", monitor="score", mode="max", save_on_train_epoch_end=False
    )
    trainer = lightning.Trainer(
        max_steps=12,
        callbacks=[keep],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=1,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    early_stopping(trainer, patience=3 if steps == 12 else 2, monitor="score", mode="max")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(24, 3)), batch_size=2)
    trainer.fit(module, loader, loader)
    assert trainer.global_step == steps and keep.best_model_path.endswith(f"step={best}.ckpt")
    weight = torch.load(keep.best_model_path)["state_dict"]["net.0.weight"]
    assert int((weight == 0).all(1).sum()) == 4


@pytest.mark.filterwarnings("ignore")
def test_lightning_is_told_what_is_missing(tmp_path):
    lightning, module = lit([1.0] * 20)
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    with pytest.raises(OptionError, match="monitor is None"):
        early_stopping(lightning.Trainer(**quiet))
    with pytest.raises(OptionError, match="another callback"):
        early_stopping(lightning.Trainer(**quiet, callbacks=[lightning.callbacks.EarlyStopping("score")]), monitor="x")
    trainer = lightning.Trainer(**quiet, max_steps=12)
    early_stopping(trainer, monitor="val_loss")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(24, 3)), batch_size=2)
    with pytest.raises(OptionError, match="no metric is called 'val_loss': score"):
        trainer.fit(module, loader, loader)
