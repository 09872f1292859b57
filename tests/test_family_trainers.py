"""A family in the loops of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from oto import OTO
from oto.errors import OptionError
from oto.family import Family
from oto.integrations import train_family

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.filterwarnings("ignore::oto.errors.CollapseWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
STEPS = 8


class Classifier(nn.Module):
    """With the loss of its own that models of transformers give."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 14), nn.GELU(), nn.Linear(14, 4))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        logits = self.body(x)
        found = {"logits": logits}
        return found if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), **found}


def begin() -> Family:
    torch.manual_seed(0)
    oto = OTO(Classifier(), {"x": torch.randn(2, 6)})
    family: Family = oto.family(
        targets=[0.75, 0.5],
        lr=0.05,
        first_momentum=0.9,
        total_steps=STEPS,
        freeze_step=3,
        ramp_steps=1,
        average_steps=2,
    )
    return family


def rows() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(6, generator=draw), "labels": torch.tensor(i % 4)} for i in range(8 * STEPS)]


def trainer_of(family: Family, folder: Path, accumulated: int = 1, **more: Any) -> Any:
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=8 // accumulated, gradient_accumulation_steps=accumulated,
        num_train_epochs=1, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", max_grad_norm=0.0,
        logging_strategy="no", remove_unused_columns=False, lr_scheduler_type="constant", **more,
    )  # fmt: skip

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    schedule = torch.optim.lr_scheduler.ConstantLR(family.optimizer, 1.0)
    return InOrder(family.model, args, train_dataset=rows(), optimizers=(family.optimizer, schedule))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_trainer_does_what_a_plain_loop_does(tmp_path: Path, accumulated: int) -> None:
    plain = begin()
    plain.model.train()
    for step in range(STEPS):
        part = rows()[8 * step : 8 * step + 8]
        x, y = (torch.stack([row[name] for row in part]) for name in ("x", "labels"))
        plain.step(lambda net, x=x, y=y: net(x, y), lambda output: output["loss"])
    family = begin()
    trainer = trainer_of(family, tmp_path, accumulated)
    train_family(trainer, family)
    trainer.train()
    assert family.optimizer.clock == STEPS and len(family.members) == 3
    for (name, p), q in zip(plain.model.named_parameters(), family.model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6), name


def test_a_trainer_with_another_optimizer_is_refused(tmp_path: Path) -> None:
    family, other = begin(), begin()
    with pytest.raises(OptionError, match="has another optimizer than the family"):
        train_family(trainer_of(other, tmp_path), family)
    with pytest.raises(OptionError, match="is no Trainer of transformers"):
        train_family(object(), family)


def test_lightning_needs_no_call(tmp_path: Path) -> None:
    """As the docstring of `train_family` says: manual optimization, `backward`, and the optimizer's own calls."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Task(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, family: Family) -> None:
            super().__init__()
            self.net, self.automatic_optimization = family.model, False
            self.family = family

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
            family, optimizer = self.family, self.optimizers()
            family.backward(lambda net: net(**batch), lambda output: output["loss"])
            optimizer.step()
            optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            return self.family.optimizer

    def loader(first: int = 0) -> Any:
        return torch.utils.data.DataLoader(rows()[8 * first :], batch_size=8)  # type: ignore[arg-type]

    def trainer(steps: int, **more: Any) -> Any:
        return lightning.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, **more,
        )  # fmt: skip

    plain = begin()
    plain.model.train()
    for batch in loader():
        plain.step(lambda net, batch=batch: net(**batch), lambda output: output["loss"])  # type: ignore[misc]
    whole, first = begin(), begin()
    trainer(STEPS, enable_checkpointing=False).fit(Task(whole), loader())
    keep = lightning.callbacks.ModelCheckpoint(tmp_path, "cut", every_n_train_steps=5, save_on_train_epoch_end=False)
    trainer(5, callbacks=[keep]).fit(Task(first), loader())
    resumed = begin()
    trainer(STEPS, enable_checkpointing=False).fit(Task(resumed), loader(5), ckpt_path=tmp_path / "cut.ckpt")
    for family in (whole, resumed):
        assert family.optimizer.clock == STEPS and len(family.members) == 3
        for p, q in zip(plain.model.parameters(), family.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
