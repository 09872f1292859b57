"""What `one_shot.py` compresses: trained networks, their calibration data, and what they score.

ResNets come with their weights. MiniLM with a head and the small Llama are trained here first, once, by the recipe that
stands here; the weights lie in the folder that ``OTO_CACHE`` names, by default ``out/one_shot`` of the repository.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rivals_methods import train
from rivals_tasks import TASKS
from torch import Tensor, nn
from torch.nn import functional as F

CACHE = Path(os.environ.get("OTO_CACHE", Path(__file__).resolve().parent.parent / "out" / "one_shot"))

Batches = list[Any]


@dataclass(frozen=True)
class Problem:
    """A trained network, and how it is measured.

    Attributes:
        score: What ``measure`` gives, in words, and whether higher is better.
        calibration: ``(samples, batch, seed)`` to batches of the training data.
        measure: ``(model, split, most)``; splits are ``holdout``, by which settings are chosen, and ``test``.
        share: What a share of the counted part is of all MACs: of a Llama only its layers count.
    """

    title: str
    score: str
    higher: bool
    dense: Callable[[], nn.Module]
    example: Callable[[], Any]
    calibration: Callable[[int, int, int], Batches]
    loss: Callable[[nn.Module, Any], Tensor]
    measure: Callable[[nn.Module, str, int | None], float]
    skip: tuple[str, ...] = ()
    share: Callable[[float], float] = lambda target: target


def kept(name: str, make: Callable[[], nn.Module], learn: Callable[[nn.Module], None]) -> nn.Module:
    """A network with the weights of the cache; trained, if they are not there."""
    torch.manual_seed(0)
    model, file = make(), CACHE / f"{name}.pt"
    if file.is_file():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        learn(model)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    return model.eval()


def classifier(name: str, trained: bool) -> Problem:
    """A task of `rivals_tasks.py`; trained first by its own recipe, if its weights are not of this task."""
    task = TASKS[name]

    def dense() -> nn.Module:
        if trained:
            return task.network(pretrained=True).eval()
        build = lambda: task.network(pretrained=task.pretrained)  # noqa: E731
        return kept(name, build, lambda model: train(task, model, task.data(), task.optimizer(model), 0))

    def calibration(samples: int, batch: int, seed: int) -> Batches:
        drawn = torch.randperm(len(task.data().train), generator=torch.Generator().manual_seed(seed))[:samples]
        return [task.data().train.batch(index) for index in drawn.split(batch)]

    @torch.no_grad()
    def measure(model: nn.Module, split: str, most: int | None) -> float:
        held = getattr(task.data(), split)
        rows = torch.arange(min(most or len(held), len(held)))
        parts = [held.batch(index) for index in rows.split(500)]
        return 100 * sum(float((model(*x).argmax(1) == y).sum()) for x, y in parts) / len(rows)

    return Problem(
        task.title, "accuracy in %", True, dense, task.example, calibration,
        lambda model, batch: F.cross_entropy(model(*batch[0]), batch[1]), measure,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ a small Llama

CONTEXT, STEPS, LR = 128, 600, 3e-3


@cache
def letters() -> tuple[Tensor, int]:
    from data import from_tar  # of the examples, which `rivals_tasks` puts on the path

    text = from_tar("text.tar.xz", "tinyshakespeare.txt").decode()
    alphabet = {letter: i for i, letter in enumerate(sorted({*text}))}
    return torch.tensor([alphabet[letter] for letter in text]), len(alphabet)


def span(split: str) -> Tensor:
    """The first 80 % are trained on, then 10 % held out, and 10 % to test."""
    ids, _ = letters()
    cuts = {"train": (0.0, 0.8), "holdout": (0.8, 0.9), "test": (0.9, 1.0)}[split]
    return ids[int(cuts[0] * len(ids)) : int(cuts[1] * len(ids))]


def pieces(split: str, samples: int, generator: torch.Generator) -> Tensor:
    ids = span(split)
    starts = torch.randint(len(ids) - CONTEXT, (samples,), generator=generator)
    return torch.stack([ids[s : s + CONTEXT] for s in starts.tolist()])


def next_letter(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def language() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, intermediate_size=384,
            vocab_size=letters()[1], max_position_embeddings=2 * CONTEXT, bos_token_id=None, eos_token_id=None,
            tie_word_embeddings=False,
        )
    )  # fmt: skip


def taught(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    draw = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        rate = min((step + 1) / (STEPS // 20), 0.55 + 0.45 * math.cos(math.pi * step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = LR * rate
        optimizer.zero_grad()
        next_letter(model, pieces("train", 16, draw)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def perplexity(model: nn.Module, split: str, most: int | None) -> float:
    """Per letter, over all of a split in pieces."""
    whole = span(split)
    rows = whole[: len(whole) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:most]
    losses = [float(next_letter(model, part)) * len(part) for part in rows.split(32)]
    return math.exp(sum(losses) / len(rows))


def of_layers(target: float) -> float:
    """A share of the MACs of the decoder layers, as one of all: the head keeps its own."""
    from oto import OTO
    from oto.groups import cost

    model = language()
    total = cost(OTO(model, {"input_ids": torch.zeros(1, CONTEXT, dtype=torch.long)}).partition).macs
    head = CONTEXT * model.config.hidden_size * model.config.vocab_size
    return (target * (total - head) + head) / total


def llama() -> Problem:
    def calibration(samples: int, batch: int, seed: int) -> Batches:
        return list(pieces("train", samples, torch.Generator().manual_seed(seed)).split(batch))

    return Problem(
        "Llama of 0.9 M parameters, letters of Shakespeare", "perplexity of a letter", False,
        lambda: kept("llama", language, taught), lambda: {"input_ids": torch.zeros(1, CONTEXT, dtype=torch.long)},
        calibration, next_letter, perplexity, ("model.embed_tokens.*", "lm_head.*"), of_layers,
    )  # fmt: skip


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "resnet20": lambda: classifier("resnet20", trained=True),
    "resnet56": lambda: classifier("resnet56", trained=True),
    "minilm": lambda: classifier("minilm", trained=False),
    "vit": lambda: classifier("vit", trained=False),
    "llama": llama,
}
