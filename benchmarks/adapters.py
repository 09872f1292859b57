"""Perplexity of a small Llama that gets slim where memory allows for adapters only, at equal budget.

    python benchmarks/adapters.py                       # what is missing in docs/benchmarks/adapters.jsonl
    python benchmarks/adapters.py --methods lhspg --targets .8 --seeds 0
    python benchmarks/adapters.py --table               # docs/benchmarks/adapters.md anew

The Llama of lesson 5 (128 wide, 4 layers) learns Shakespeare letter by letter, and is frozen then. Adapters (rank 8,
all linear layers) learn on for the same number of batches with every method:

* ``none``: nothing is pruned.
* ``lhspg``: pruned in the first 4/10 of the steps, while adapters learn; then the slim adapters of the slim model do.
* ``taylor``: LLM-Pruner (arXiv 2305.11627): first ``|<x, g>|`` of whole weights on 8 batches, which are a gift, and all
  goes at once; then adapters on the slim model, for all of the steps.

All blocks keep equally many heads and hidden units, and the residual stream stays whole (``layout="uniform"``,
``skip_patterns``), as LLM-Pruner has it. ``holdout`` is text that no training sees, by which settings are chosen;
``test`` is only reported. Each line is written when it is done, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import rivals
import torch
from rivals_tasks import from_tar
from torch import Tensor, nn

from oto import OTO
from oto.adapters import slim_adapters

RESULTS = rivals.ROOT / "docs" / "benchmarks" / "adapters.jsonl"
METHODS = ("none", "lhspg", "taylor")
CONTEXT, BATCH, RANK, RATE = 128, 16, 8, 3e-3
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Line = dict[str, Any]


class Text:
    """Letters as numbers: 85 % to train on, 5 % held out, 10 % to test with."""

    def __init__(self) -> None:
        text = from_tar("text.tar.xz", "tinyshakespeare.txt").decode()
        self.alphabet = sorted({*text})
        number = {letter: i for i, letter in enumerate(self.alphabet)}
        ids = torch.tensor([number[letter] for letter in text])
        cuts = [len(ids) * share // 100 for share in (85, 90)]
        self.train, self.holdout, self.test = ids[: cuts[0]], ids[cuts[0] : cuts[1]], ids[cuts[1] :]

    def batch(self, draw: torch.Generator, ids: Tensor | None = None) -> Tensor:
        ids = self.train if ids is None else ids
        starts = torch.randint(len(ids) - CONTEXT, (BATCH,), generator=draw)
        return torch.stack([ids[s : s + CONTEXT] for s in starts.tolist()])


@torch.no_grad()
def perplexity(model: nn.Module, text: Text, ids: Tensor, batches: int = 10) -> float:
    """Of a letter; the same text for every model."""
    model.eval()
    draw = torch.Generator().manual_seed(1)
    held = [text.batch(draw, ids) for _ in range(batches)]
    return math.exp(statistics.mean(float(model(input_ids=x, labels=x).loss) for x in held))


def both(model: nn.Module, text: Text, when: str) -> Line:
    return {when: perplexity(model, text, text.test), f"{when}_holdout": perplexity(model, text, text.holdout)}


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, text: Text, draw: torch.Generator, steps: range, of: int
) -> None:
    """Some steps of a training of so many; the learning rate rises, then falls as a cosine to a tenth."""
    model.train()
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / max(of // 20, 1), 0.55 + 0.45 * math.cos(math.pi * step / of))
        ids = text.batch(draw)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()


def frozen_base(text: Text, steps: int, folder: Path) -> Any:
    """Trained once, and read again."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=128, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, intermediate_size=384,
            vocab_size=len(text.alphabet), max_position_embeddings=2 * CONTEXT, bos_token_id=None, eos_token_id=None,
            tie_word_embeddings=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.1)
        train(model, optimizer, text, torch.Generator().manual_seed(0), range(steps), steps)
        model.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def adapted(model: nn.Module, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEAR, task_type="CAUSAL_LM"))


def learners(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE, weight_decay=0.0)


def analyzed(model: nn.Module, text: Text, **options: Any) -> OTO:
    return OTO(
        model, {"input_ids": text.train[:CONTEXT][None]}, layout="uniform", skip_patterns=["*embed_tokens*"], **options
    )


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, labels=ids).loss
    return found


def run(method: str, target: float, seed: int, steps: int, base_steps: int) -> Line:
    text, draw = Text(), torch.Generator().manual_seed(1000 + seed)
    base = frozen_base(text, base_steps, rivals.ROOT / "out" / f"adapters_base_{base_steps}")
    whole, found, used = base.num_parameters(), both(base, text, "before"), time.process_time()
    cut, notes = 0, Line()
    if method == "lhspg":
        model, cut = adapted(base, seed), steps * 4 // 10 + 1
        oto = analyzed(model, text, prune_frozen=True)
        optimizer = oto.lhspg(
            variant="adamw", lr=RATE, weight_decay=0.0, target_params=target, total_steps=steps, start_pruning_step=1,
            pruning_steps=cut - 1,
        )  # fmt: skip
        train(model, optimizer, text, draw, range(cut), steps)
        model = slim_adapters(oto.construct_subnet().model)
        notes["zero groups"] = optimizer.num_pruned
    else:
        if method == "taylor":
            oto = analyzed(base, text)
            batches = [text.batch(draw) for _ in range(8)]
            oto.one_shot(
                batches=batches, loss=loss, holdout=0, compensate=None, saliency="taylor_first_order",
                target_params=target,
            )  # fmt: skip
            base = oto.construct_subnet().model
        model = adapted(base, seed)
    found |= both(model, text, "pruned")
    train(model, learners(model), text, draw, range(cut, steps), steps)
    found |= both(model, text, "recovered")
    left = model.merge_and_unload().num_parameters()
    minutes = (time.process_time() - used) / 60
    return found | notes | {"params_kept": left / whole, "cpu_minutes": round(minutes, 2)} | rivals.where()


# ------------------------------------------------------------------------------------------------ the page


def page(lines: list[Line]) -> str:
    out = [
        "# Adapters on a frozen base",
        "",
        "Generated by `python benchmarks/adapters.py --table` from `adapters.jsonl`; its docstring says what each",
        "method does. Perplexity of a letter of Shakespeare on test text (held-out text), the mean over seeds;",
        "parameters are those of the merged model.",
        "",
        "| method | target | seeds | params kept | before | after pruning | after recovery | core minutes |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    kinds: dict[tuple[float, str, int, int], list[Line]] = {}
    for line in lines:
        kinds.setdefault((-line["target"], line["method"], line["steps"], line["base_steps"]), []).append(line)
    for (target, method, steps, base_steps), own in sorted(kinds.items()):
        whens = ("before", "pruned", "recovered")
        cells = " | ".join(f"{mean(own, when):.3f} ({mean(own, f'{when}_holdout'):.3f})" for when in whens)
        rest = f"{mean(own, 'params_kept'):.3f} | {cells} | {mean(own, 'cpu_minutes'):.1f}"
        out.append(f"| {method}, {steps} steps after {base_steps} | {-target:g} | {len(own)} | {rest} |")
    return "\n".join(out) + "\n"


def mean(own: list[Line], key: str) -> float:
    return statistics.mean(line[key] for line in own)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--targets", nargs="+", type=float, default=[0.8, 0.5], help="shares of the parameters to keep")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200, help="with adapters")
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only write the page")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keys = ("method", "target", "seed", "steps", "base_steps")
    wanted = [
        dict(zip(keys, (method, target, seed, args.steps, args.base_steps), strict=True))
        for seed in args.seeds
        for method in args.methods
        for target in ([1.0] if method == "none" else args.targets)
    ]
    for cell in [] if args.table else wanted:
        if any(all(line[key] == cell[key] for key in keys) for line in rivals.read(args.results)):
            continue
        line = cell | run(**cell)
        rivals.append(args.results, line)
        print(line, flush=True)
    if lines := rivals.read(args.results):
        args.results.with_suffix(".md").write_text(page(lines))


if __name__ == "__main__":
    main()
