"""What it costs to choose the atoms that go, in seconds of one CPU thread.

    python benchmarks/choice.py

For each network the target is half of its MACs, scores are random numbers (drawn once, from a fixed seed), and the
choice is made in one go and in five portions, as over five periods. The networks have shapes only, so a Llama of 1B
parameters takes no memory. The table also says how long it takes to spell the costs out, which happens once when an
optimizer is made, and how near the choice comes to the target. Seconds are those of the process, so that other programs
on the machine do not count.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from oto import OTO
from oto.optim import Choice


def resnet50() -> tuple[nn.Module, Tensor]:
    from torchvision.models import resnet50

    return resnet50(), torch.randn(1, 3, 224, 224)


def llama_1b() -> tuple[nn.Module, Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config), torch.zeros(1, 128, dtype=torch.int64)


def bert_base() -> tuple[nn.Module, Tensor]:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig()), torch.zeros(1, 128, dtype=torch.int64)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "resnet50": resnet50,
    "bert_base": bert_base,
    "llama_1b": llama_1b,
}


def measure(build: Callable[[], tuple[nn.Module, Tensor]], target: float, rounds: int, **options: object) -> list[str]:
    """One row of the table."""
    with torch.device("meta"):
        model, x = build()
    oto = OTO(model, x)
    begin = time.process_time()
    costs = oto.costs
    spelled = time.process_time() - begin
    choice = Choice.of(oto.node_groups, {"target_macs": target}, costs=costs, **options)  # type: ignore[arg-type]
    scores = torch.from_numpy(np.random.default_rng(0).random(sum(choice.sizes)).astype(np.float32))
    everything = torch.ones(len(scores), dtype=torch.bool)
    once, portions = [], []
    left = everything
    for _ in range(rounds):
        begin = time.process_time()
        left = ~choice.select(scores, everything)
        once.append(time.process_time() - begin)
        rest = everything
        for period in range(5):
            begin = time.process_time()
            rest = rest & ~choice.select(scores, rest, (period + 1) / 5)
            portions.append(time.process_time() - begin)
    counts = np.array([int(own.sum()) for own in left.split_with_sizes(choice.sizes)])
    macs = choice.target.measure(counts) / choice.target.full
    return [
        f"{len(choice.sizes):,}",
        f"{len(scores):,}",
        f"{spelled:.3f}",
        f"{statistics.median(once):.3f}",
        f"{max(portions):.3f}",
        f"{macs:.4f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--target-macs", default=0.5, type=float)
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--group-divisible", default=1, type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, numpy {np.__version__}, {platform.machine()}, target_macs={args.target_macs}")
    print("| model | node groups | atoms | costs, s | chosen at once, s | slowest of 5 portions, s | MACs kept |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name in args.models:
        row = measure(MODELS[name], args.target_macs, args.rounds, group_divisible=args.group_divisible)
        print(f"| {name} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
