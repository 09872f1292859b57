"""Lesson 11: adapters on a frozen Llama, pruned together with it: a slim base, and slim adapters beside it.

    python tutorials/11_lora_llm.py                           # 1 M parameters, about five minutes
    python tutorials/11_lora_llm.py --hidden 768 --layers 12 --heads 12 --kv-heads 4 --context 1024 --base-steps 20000 \
        --steps 4000 --batch-size 64 --base-lr 3e-4 --lr 1e-4 --device cuda

A model too large to be trained is adapted: its weights are frozen, and beside some of them two small matrices learn,
`W x + s B (A x)`. A weight and its adapter are one operator to the analysis, so `prune_frozen=True` lets rows of both
go together. LHSPG brings the redundant ones to zero, while all others learn through the adapter to do without them.
What comes out are two folders, one that transformers loads and one that peft puts on it.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import shutil
import subprocess
import sys
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

lesson5 = importlib.import_module("05_small_llm")  # the letters of Shakespeare, and how well they are foretold


def train(model: nn.Module, optimizer: torch.optim.Optimizer, text: Any, args: Any, steps: int, after: Any) -> None:
    """Warm up, then a falling learning rate; ``after`` is called with each step."""
    warm, draw = max(steps // 20, 1), torch.Generator().manual_seed(args.seed)
    schedule = LambdaLR(optimizer, lambda n: min((n + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * n / steps)))
    model.train()
    for step in tqdm(range(steps), unit="step", disable=None):
        ids = text.batch(text.train, args.batch_size, args.context, draw).to(args.device)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        after(step)


def main() -> None:
    flags = parser(__doc__, "11_lora_llm")
    flags.add_argument("--hidden", type=int, default=128)
    flags.add_argument("--layers", type=int, default=4)
    flags.add_argument("--heads", type=int, default=8)
    flags.add_argument("--kv-heads", type=int, default=4)
    flags.add_argument("--context", type=int, default=128, help="letters that are seen at once")
    flags.add_argument("--base-steps", type=int, default=400, help="steps that train the base, before it is frozen")
    flags.add_argument("--steps", type=int, default=400, help="steps of the adapters")
    flags.add_argument("--rank", type=int, default=8)
    flags.add_argument("--batch-size", type=int, default=16)
    flags.add_argument("--test-batches", type=int, default=20)
    flags.add_argument("--base-lr", type=float, default=3e-3)
    flags.add_argument("--lr", type=float, default=3e-3)
    flags.add_argument("--target-params", type=float, default=0.7, help="share of the parameters that is left")
    sizes = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "context": 32, "test_batches": 2}
    args = start(flags, sizes | {"base_steps": 20, "steps": 40, "rank": 4})

    text = lesson5.Letters(from_tar("text.tar.xz", "tinyshakespeare.txt").decode())
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
    ordinary = torch.optim.AdamW(base.parameters(), args.base_lr, weight_decay=0.1)
    train(base, ordinary, text, args, args.base_steps, lambda step: None)

    # From here on the base is frozen. peft replaces layers, so OTO comes after it.
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=args.rank, target_modules=linear, task_type="CAUSAL_LM"))
    before = copy.deepcopy(model), lesson5.scores(model, text, args)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{learned:,} of {sum(p.numel() for p in model.parameters()):,} parameters are trained\n")

    draw = torch.Generator().manual_seed(args.seed)
    example = {"input_ids": text.batch(text.train, 2, args.context, draw).to(args.device)}
    oto = OTO(model, example, prune_frozen=True, layout="uniform")  # uniform: the config states the sizes

    # What the loss makes of each group alone. Without a layout, share=0.1 keeps the tenth whole that matters most.
    held = [text.batch(text.test, 16, args.context, draw).to(args.device) for _ in range(2)]
    print(oto.mark_unprunable_by_knowledge(batches=held, loss=lambda m, ids: m(ids, labels=ids).loss, share=0), "\n")

    optimizer = oto.lhspg(variant="adamw", lr=args.lr, target_params=args.target_params, total_steps=args.steps)
    print(optimizer.plan(), "\n")
    pruned: list[list[str]] = []

    def after(step: int) -> None:
        if optimizer.progress.over and not pruned:
            pruned.append(lesson5.scores(model, text, args))
            model.train()

    train(model, optimizer, text, args, args.steps, after)

    subnet = oto.construct_subnet(out_dir=args.out)
    full, slim = subnet.cost_before, subnet.cost_after
    rows = {
        "before": (before[0], full, before[1]),
        "pruned": (model, full, pruned[0]),  # when the last group reached zero
        "zeroed": (model, full, lesson5.scores(model, text, args)),  # and after what was left of training
        "slim": (subnet.model, slim, lesson5.scores(subnet.model, text, args)),
    }
    ids = text.batch(text.test, 4, args.context, draw)
    compare(rows, ["next letter", "bits"], lambda m: m(input_ids=ids), f"4 × {args.context} letters", args.passes)
    print("before: the frozen base; bits: per letter\n")
    print(subnet)

    # The slim model is a PeftModel of a Llama. Its parts go into two folders, as peft has it.
    folder = args.out.with_name(f"{args.out.name}_hf")
    shutil.rmtree(folder, ignore_errors=True)
    adapted = slim_adapters(subnet.model.cpu())
    adapted.save_pretrained(folder / "adapters")
    adapted.unload().save_pretrained(folder / "base")
    sized = {
        part: sum(f.stat().st_size for f in (folder / part).glob("*.safetensors")) for part in ("base", "adapters")
    }
    print("\n" + ", ".join(f"{part}: {size:,} bytes" for part, size in sized.items()))
    code = f"""
import sys
sys.modules["oto"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(folder / "base")!r})
model = PeftModel.from_pretrained(base, {str(folder / "adapters")!r}).eval()
with torch.no_grad():
    print(model(torch.tensor({ids.tolist()})).logits.double().sum((0, 1)).tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    with torch.no_grad():
        ours = subnet.model.eval()(ids).logits.double().sum((0, 1))
    same = torch.allclose(torch.tensor(json.loads(done), dtype=torch.float64), ours, rtol=0, atol=1e-2)
    print(f"transformers and peft without oto: {'the same' if same else 'other'} logits, from {folder}")


if __name__ == "__main__":
    main()
