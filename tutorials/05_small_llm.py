"""Lesson 5: a small Llama, trained on Shakespeare letter by letter, pruned while it learns, and asked to go on.

    python tutorials/05_small_llm.py                          # 1 M parameters, about four minutes
    python tutorials/05_small_llm.py --hidden 768 --layers 12 --heads 12 --kv-heads 4 --context 1024 --steps 20000 \
        --batch-size 64 --lr 3e-4 --device cuda

Grouped queries, rotary positions, RMS norms and a gated feed-forward need no word from you: whole groups of queries go
with their keys and values, and the residual width goes through every norm. `layout="uniform"` keeps the blocks alike,
so that the slim network is a plain Llama with smaller numbers in its config, which transformers loads without `oto`.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from typing import Any

import torch
from common import compare, parser, start
from data import from_tar
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from oto import OTO


class Letters:
    """A text as numbers, and back."""

    def __init__(self, text: str) -> None:
        self.alphabet = sorted({*text})
        self.ids = torch.tensor([self.alphabet.index(c) for c in text])
        cut = len(self.ids) * 9 // 10
        self.train, self.test = self.ids[:cut], self.ids[cut:]

    def batch(self, ids: Tensor, size: int, context: int, draw: torch.Generator) -> Tensor:
        starts = torch.randint(len(ids) - context, (size,), generator=draw)
        return torch.stack([ids[s : s + context] for s in starts.tolist()])

    def read(self, ids: Tensor) -> str:
        return "".join(self.alphabet[i] for i in ids.tolist())

    def write(self, text: str) -> Tensor:
        return torch.tensor([[self.alphabet.index(c) for c in text]])


@torch.no_grad()
def scores(model: nn.Module, text: Letters, args: Any) -> list[str]:
    """Bits per letter, and how often the next letter is the likeliest, on text that was not trained on."""
    model.to(args.device).eval()
    draw = torch.Generator().manual_seed(1)
    bits, right, count = 0.0, 0, 0
    for _ in range(args.test_batches):
        ids = text.batch(text.test, 16, args.context, draw).to(args.device)
        said = model(input_ids=ids).logits[:, :-1]
        bits += float(
            nn.functional.cross_entropy(said.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        ) / math.log(2)
        right += int((said.argmax(-1) == ids[:, 1:]).sum())
        count += ids[:, 1:].numel()
    return [f"{100 * right / count:.2f} %", f"{bits / count:.4f}"]


def main() -> None:
    flags = parser(__doc__, "05_small_llm")
    flags.add_argument("--hidden", type=int, default=128)
    flags.add_argument("--layers", type=int, default=4)
    flags.add_argument("--heads", type=int, default=8)
    flags.add_argument("--kv-heads", type=int, default=4)
    flags.add_argument("--context", type=int, default=128, help="letters that are seen at once")
    flags.add_argument("--steps", type=int, default=600)
    flags.add_argument("--batch-size", type=int, default=16)
    flags.add_argument("--test-batches", type=int, default=20)
    flags.add_argument("--lr", type=float, default=3e-3)
    flags.add_argument("--target-params", type=float, default=0.6, help="share of the parameters that is left")
    args = start(
        flags, {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "context": 32, "steps": 40, "test_batches": 2}
    )

    text = Letters(from_tar("text.tar.xz", "tinyshakespeare.txt").decode())
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
    model = LlamaForCausalLM(config).to(args.device)
    draw = torch.Generator().manual_seed(args.seed)
    before = scores(model, text, args)

    example = {"input_ids": text.batch(text.train, 2, args.context, draw).to(args.device)}
    oto = OTO(model, example, layout="uniform")
    print(oto.explain(), "\n")
    optimizer = oto.hesso(
        variant="adamw",
        lr=args.lr,
        weight_decay=0.1,
        second_momentum=0.95,
        target_params=args.target_params,
        total_steps=args.steps,
    )
    print(optimizer.plan(), "\n")
    warm = max(args.steps // 20, 1)
    schedule = LambdaLR(optimizer, lambda n: min((n + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * n / args.steps)))

    model.train()
    with tqdm(total=args.steps, unit="step", disable=None) as bar:
        for step in range(args.steps):
            ids = text.batch(text.train, args.batch_size, args.context, draw).to(args.device)
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if step % max(args.steps // 60, 1) == 0:
                optimizer.record(loss=loss)  # for the report, beside what the optimizer writes down itself
            optimizer.step()
            schedule.step()
            bar.update()
            if (step + 1) % max(args.steps // 4, 1) == 0:
                tqdm.write(f"loss {loss.item():.3f}; {optimizer.progress}")

    subnet = oto.construct_subnet(out_dir=args.out)
    rows = {
        "before": (LlamaForCausalLM(config), subnet.cost_before, before),
        "zeroed": (model, subnet.cost_before, scores(model, text, args)),
        "slim": (subnet.model, subnet.cost_after, scores(subnet.model, text, args)),
    }
    ids = text.batch(text.test, 4, args.context, draw)
    compare(rows, ["next letter", "bits"], lambda m: m(input_ids=ids), f"4 × {args.context} letters", args.passes)
    print("before: untrained; bits: per letter\n")
    print(subnet)

    # It is a Llama still, so it generates, with the same cache and the same sampling.
    asked = text.write("ROMEO:\n").to(args.device)
    said = {}
    for name, m in {"zeroed": model, "slim": subnet.model.to(args.device)}.items():
        said[name] = m.eval().generate(asked, max_new_tokens=min(60, args.context), do_sample=False, pad_token_id=0)[0]
    same = torch.equal(said["zeroed"], said["slim"])
    print(f"\n{text.read(said['slim'])}\n")
    print(f"{type(subnet.model).__name__}.generate: {'the same' if same else 'other'} letters as of the zeroed model")

    # Blocks are alike (layout="uniform"), so the config states every size, and what loads a Llama loads this one:
    # another process, that may not import oto, goes on with the same letters.
    folder = args.out.with_name(f"{args.out.name}_hf")
    shutil.rmtree(folder, ignore_errors=True)
    subnet.model.cpu()
    subnet.save_pretrained(folder)
    code = f"""
import sys
sys.modules["oto"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
asked = torch.tensor({asked.tolist()})
said = model.generate(asked, max_new_tokens={min(60, args.context)}, do_sample=False, pad_token_id=0)
print(said[0].tolist(), model.config.num_attention_heads, model.config.intermediate_size)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    same = done.startswith(str(said["slim"].tolist()))
    print(f"transformers without oto: {'the same' if same else 'other'} letters, from {folder}")

    subnet.report(args.out.with_suffix(".html"))
    print(f"report: {args.out.with_suffix('.html')}")


if __name__ == "__main__":
    main()
