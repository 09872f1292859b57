"""Lesson 11: a frozen Llama that gets slim while adapters learn, and recovers by them.

    python tutorials/11_lora_llm.py                           # 1 M parameters, about three minutes
    python tutorials/11_lora_llm.py --hidden 768 --layers 12 --heads 12 --kv-heads 4 --context 1024 --base-steps 20000 \
        --steps 4000 --recovery-steps 2000 --batch-size 64 --lr 1e-3 --device cuda

Whoever has memory for adapters only (LoRA) has no gradients of the weights themselves. A weight and its adapter are one
operator, so rows of both can go together: `OTO(peft_model, ..., prune_frozen=True)` lets frozen weights go,
`oto.lhspg(...)` brings them to zero while all other adapters learn. What comes out is a slim Llama, and slim adapters
beside it, that plain transformers and plain peft load.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from common import compare, parser, start
from data import from_tar
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from oto import OTO
from oto.adapters import slim_adapters

lesson5 = import_module("05_small_llm")  # its letters, and how they are scored
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def perplexity(model: nn.Module, text: Any, args: Any) -> list[str]:
    """Of a letter of text that was not trained on, and how often the next letter is the likeliest."""
    right, bits = lesson5.scores(model, text, args)
    return [right, f"{2 ** float(bits):.3f}"]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Callable[[], torch.Tensor],
    steps: int,
    what: str,
) -> None:
    """The learning rate rises over a twentieth of the steps and falls as a cosine, to a tenth."""
    warm = max(steps // 20, 1)
    schedule = LambdaLR(optimizer, lambda n: min((n + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * n / steps)))
    model.train()
    for _ in tqdm(range(steps), desc=what, unit="step", disable=None):
        ids = batch()
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        schedule.step()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def main() -> None:
    flags = parser(__doc__, "11_lora_llm")
    flags.add_argument("--hidden", type=int, default=128)
    flags.add_argument("--layers", type=int, default=4)
    flags.add_argument("--heads", type=int, default=8)
    flags.add_argument("--kv-heads", type=int, default=4)
    flags.add_argument("--context", type=int, default=128, help="letters that are seen at once")
    flags.add_argument("--rank", type=int, default=8, help="of the adapters")
    flags.add_argument("--base-steps", type=int, default=200, help="the model that is then frozen is trained so long")
    flags.add_argument("--steps", type=int, default=80, help="with adapters, while it is pruned")
    flags.add_argument("--recovery-steps", type=int, default=80, help="of the slim adapters")
    flags.add_argument("--batch-size", type=int, default=16)
    flags.add_argument("--test-batches", type=int, default=10)
    flags.add_argument("--lr", type=float, default=3e-3)
    flags.add_argument("--target-params", type=float, default=0.75, help="share of the parameters that is left")
    tiny = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "context": 32, "rank": 2, "base_steps": 30}
    args = start(flags, tiny | {"steps": 20, "recovery_steps": 10, "test_batches": 2})

    text = lesson5.Letters(from_tar("text.tar.xz", "tinyshakespeare.txt").decode())
    draw = torch.Generator().manual_seed(args.seed)

    def batch() -> torch.Tensor:
        return text.batch(text.train, args.batch_size, args.context, draw).to(args.device)

    # The model that others would download.
    config = LlamaConfig(
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        intermediate_size=3 * args.hidden,
        vocab_size=len(text.alphabet),
        max_position_embeddings=2 * args.context,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    base = LlamaForCausalLM(config).to(args.device)
    train(base, torch.optim.AdamW(base.parameters(), args.lr, weight_decay=0.1), batch, args.base_steps, "base")

    # From here on its weights are frozen, and adapters on all of its linear layers learn.
    settings = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=LINEAR, task_type="CAUSAL_LM")
    model = get_peft_model(base, settings)
    before = perplexity(model, text, args)
    example = {"input_ids": text.batch(text.train, 2, args.context, draw).to(args.device)}
    oto = OTO(model, example, prune_frozen=True, layout="uniform")
    held = [text.batch(text.train, 4, args.context, draw).to(args.device) for _ in range(2)]
    knowledge = oto.mark_unprunable_by_knowledge(  # of the four kinds of groups, what matters most stays whole
        batches=held, loss=lambda m, ids: m(input_ids=ids, labels=ids).loss, share=0.25
    )
    print(f"{knowledge}\n")
    optimizer = oto.lhspg(
        variant="adamw", lr=args.lr, weight_decay=0.0, target_params=args.target_params, total_steps=args.steps
    )
    print(optimizer.plan(), "\n")
    train(model, optimizer, batch, args.steps, "pruning")
    print(optimizer.progress)
    subnet = oto.construct_subnet(out_dir=args.out)

    # The slim model as peft has it: slim adapters on a slim base. Recovery is an ordinary run of peft.
    slim = slim_adapters(subnet.model).to(args.device)
    after = perplexity(slim, text, args)
    train(slim, torch.optim.AdamW(trained(slim), args.lr), batch, args.recovery_steps, "recovery")
    recovered = perplexity(slim, text, args)
    rows = {
        "before": (LlamaForCausalLM(config), subnet.cost_before, before),
        "zeroed": (model, subnet.cost_before, perplexity(model, text, args)),
        "slim": (subnet.model, subnet.cost_after, after),
        "recovered": (slim, subnet.cost_after, recovered),
    }
    ids = text.batch(text.test, 4, args.context, draw)
    compare(rows, ["next letter", "perplexity"], lambda m: m(input_ids=ids), f"4 × {args.context} letters", args.passes)
    print("before: the frozen model; recovered: the slim adapters learned on; all counted with their adapters\n")
    print(subnet)

    # Two folders: the adapters alone, and the slim base. Another process, that may not import oto, loads both.
    asked = text.write("ROMEO:\n").to(args.device)
    said = slim.eval().generate(input_ids=asked, max_new_tokens=min(60, args.context), do_sample=False, pad_token_id=0)
    adapters, folder = (args.out.with_name(f"{args.out.name}_{name}") for name in ("adapters", "base"))
    for old in (adapters, folder):
        shutil.rmtree(old, ignore_errors=True)
    slim.cpu().save_pretrained(adapters)
    slim.unload().save_pretrained(folder)  # this takes the adapters off
    code = f"""
import sys
sys.modules["oto"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(folder)!r}), {str(adapters)!r})
asked = torch.tensor({asked.tolist()})
said = model.generate(input_ids=asked, max_new_tokens={min(60, args.context)}, do_sample=False, pad_token_id=0)
print(said[0].tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    same = done.startswith(str(said[0].tolist()))
    print(f"\n{text.read(said[0])}\n")
    print(f"transformers and peft without oto: {'the same' if same else 'other'} letters, from {folder} and {adapters}")


if __name__ == "__main__":
    main()
