"""Lesson 3: Hugging Face Trainer, from the first step to a pipeline: bf16, a crash, evaluation, inference.

    python tutorials/03_bert_sst2_hf_trainer.py               # MiniLM-L6, 3,200 phrases of SST-2, about three minutes
    python tutorials/03_bert_sst2_hf_trainer.py --encoder bert-base-uncased --phrases 67349 --epochs 3 --lr 2e-5 \
        --device cuda

The Trainer gets the sparse optimizer as it gets any other, `optimizers=(optimizer, schedule)`, and knows no more of it.
Training is stopped in the middle of pruning and goes on in a new Trainer from the checkpoint: what was pruned stays
pruned, and what was on its way to zero goes on.
"""

from __future__ import annotations

import copy
import shutil
from typing import Any

import torch
from common import compare, parser, start
from data import from_tar, minilm
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_linear_schedule_with_warmup,
    pipeline,
)
from transformers.utils import logging as hf_logging

from oto import OTO
from oto.integrations import log_progress

hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()


class Phrases(Dataset):
    """SST-2: a phrase of a film review, and whether it is positive."""

    def __init__(self, tokenizer: Any, split: str, n: int | None, seed: int = 0) -> None:
        lines = from_tar("text.tar.xz", f"sst2_{split}.tsv").decode().splitlines()[1:]
        order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed)).tolist()[:n]
        self.y = [int(lines[i].split("\t", 1)[0]) for i in order]
        self.texts = [lines[i].split("\t", 1)[1] for i in order]
        self.x = tokenizer(self.texts, truncation=True, max_length=64)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.x["input_ids"][i], "attention_mask": self.x["attention_mask"][i], "labels": self.y[i]}


class Crash(TrainerCallback):
    """Ends training after a step, as a machine that is taken away does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def accuracy(said: Any) -> dict[str, float]:
    return {"accuracy": float((said.predictions.argmax(1) == said.label_ids).mean())}


def main() -> None:
    flags = parser(__doc__, "03_bert_sst2")
    flags.add_argument("--encoder", help="a folder or a name on the Hub; by default MiniLM-L6 out of a Python package")
    flags.add_argument("--layers", type=int, help="the encoder's first so many; by default all")
    flags.add_argument("--phrases", type=int, default=3200, help="of the 67,349 for training")
    flags.add_argument("--test-phrases", type=int, default=872)
    flags.add_argument("--epochs", type=int, default=1)
    flags.add_argument("--batch-size", type=int, default=32)
    flags.add_argument("--lr", type=float, default=1e-4)
    flags.add_argument("--float32", action="store_true", help="instead of bf16")
    flags.add_argument("--target-macs", type=float, default=0.75)
    args = start(flags, {"phrases": 112, "test_phrases": 16, "batch_size": 8, "layers": 2})

    folder = args.encoder or minilm()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train = Phrases(tokenizer, "train", args.phrases)
    test = Phrases(tokenizer, "dev", args.test_phrases)
    steps = args.epochs * (len(train) // args.batch_size)
    settings = TrainingArguments(
        output_dir=str(args.out / "checkpoints"),
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=64,
        num_train_epochs=args.epochs,
        max_steps=steps,
        bf16=not args.float32,
        use_cpu=args.device == "cpu",
        save_strategy="steps",
        save_steps=max(steps // 4, 1),
        logging_steps=max(steps // 8, 1),
        report_to=[],
        seed=args.seed,
        disable_tqdm=True,
    )

    def new_model() -> Any:
        torch.manual_seed(args.seed)  # the head is new, and must be the same one after the crash
        layers = {"num_hidden_layers": args.layers} if args.layers else {}
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, **layers)

    def trainer_for(callbacks: list[Any]) -> tuple[OTO, Any, Trainer]:
        """What a run sets up, before the crash and after it."""
        model = new_model()
        example = tokenizer(train.texts[:2], padding=True, return_tensors="pt")
        oto = OTO(model, dict(example), layout="uniform")
        optimizer = oto.hesso(
            variant="adamw", lr=args.lr, weight_decay=0.01, target_macs=args.target_macs, total_steps=steps
        )
        schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        trainer = Trainer(
            model,
            settings,
            train_dataset=train,
            eval_dataset=test,
            processing_class=tokenizer,
            optimizers=(optimizer, schedule),
            compute_metrics=accuracy,
            callbacks=callbacks,
        )
        log_progress(trainer)  # with every line that the Trainer logs
        return oto, optimizer, trainer

    _, optimizer, trainer = trainer_for([Crash(settings.save_steps)])
    print(optimizer.plan(), "\n")
    trainer.train()
    print("stopped:", optimizer.progress)

    oto, optimizer, trainer = trainer_for([])
    trainer.train(resume_from_checkpoint=True)
    print("resumed:", optimizer.progress)
    print("last logged:", {k: v for k, v in trainer.state.log_history[-2].items() if k.startswith(("oto/", "loss"))})

    # accelerate puts its autocast around `forward`; its own function takes it off again
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    oto.model.to("cpu")
    subnet = oto.construct_subnet(out_dir=args.out)

    def evaluated(model: Any) -> list[str]:
        """By a Trainer again, with its loss: the slim model takes labels as the full one does. A copy of the model,
        because bf16 stays around its `forward`, and would be timed below."""
        judge = Trainer(
            copy.deepcopy(model), settings, eval_dataset=test, processing_class=tokenizer, compute_metrics=accuracy
        )
        found = judge.evaluate()
        return [f"{100 * found['eval_accuracy']:.2f} %", f"{found['eval_loss']:.4f}"]

    # accelerate keeps a process in bf16, which rounds: the last digits of the loss need not be the same
    batch = dict(tokenizer(test.texts[:32], padding=True, return_tensors="pt"))
    rows = {
        "before": (new_model(), subnet.cost_before, evaluated(new_model())),
        "zeroed": (oto.model, subnet.cost_before, evaluated(oto.model)),
        "slim": (subnet.model, subnet.cost_after, evaluated(subnet.model)),
    }
    compare(rows, ["accuracy", "loss"], lambda m: m(**batch), "32 phrases", args.passes)
    print(subnet, "\n")

    # Blocks are alike (layout="uniform"), so the config of the class states every size; transformers alone loads it.
    folder = args.out.with_name(f"{args.out.name}_hf")
    shutil.rmtree(folder, ignore_errors=True)
    subnet.model.cpu()
    subnet.save_pretrained(folder, tokenizer)
    ask = pipeline("text-classification", model=str(folder), device="cpu")
    print(f"{folder}: {ask.model.config.intermediate_size} wide inside, and transformers knows nothing of oto")
    for said, text in zip(ask(test.texts[:3]), test.texts[:3], strict=True):
        print(f"{said['label']} {said['score']:.2f}  {text[:80]}")
    shutil.rmtree(args.out / "checkpoints")


if __name__ == "__main__":
    main()
