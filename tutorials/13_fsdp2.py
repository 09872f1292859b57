"""Lesson 13: FSDP2. A Llama of which no process has all weights is trained, pruned, saved, and trained on.

    torchrun --nproc-per-node 2 tutorials/13_fsdp2.py         # 1 M parameters, two CPU processes, about three minutes
    torchrun --nproc-per-node 8 tutorials/13_fsdp2.py --hidden 2048 --layers 16 --heads 32 --kv-heads 8 \
        --context 2048 --steps 20000 --batch-size 8 --lr 3e-4 --device cuda
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint first-node:29500 \
        tutorials/13_fsdp2.py --hidden 4096 --layers 32 --heads 32 --kv-heads 8 --context 4096 --device cuda

OTO comes first, on a model that has no weights yet (`meta`), then `fully_shard`, then the optimizer. Scores are
summed over the processes, one number for each group, so that all choose the same; no weight is gathered for it. At the
end they are, one by one, in the memory of the first process, which makes the slim model for all.
"""

from __future__ import annotations

import os
import resource
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from common import compare, parser, start
from data import from_tar
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from oto import OTO


def letters() -> tuple[Tensor, Tensor, int]:
    """A text as numbers, to train and to test on, and how many letters there are."""
    text = from_tar("text.tar.xz", "tinyshakespeare.txt").decode()
    alphabet = {c: i for i, c in enumerate(sorted({*text}))}
    ids = torch.tensor([alphabet[c] for c in text])
    return ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :], len(alphabet)


def batch(ids: Tensor, size: int, context: int, draw: torch.Generator) -> Tensor:
    starts = torch.randint(len(ids) - context, (size,), generator=draw)
    return torch.stack([ids[s : s + context] for s in starts.tolist()])


def shard(model: Any) -> None:
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)


@torch.no_grad()
def accuracy(model: nn.Module, ids: Tensor) -> str:
    said = model.eval()(input_ids=ids).logits[:, :-1].argmax(-1)
    return f"{100 * float((said == ids[:, 1:]).float().mean()):.2f} %"


def main() -> None:
    flags = parser(__doc__, "13_fsdp2")
    flags.add_argument("--hidden", type=int, default=128)
    flags.add_argument("--layers", type=int, default=4)
    flags.add_argument("--heads", type=int, default=8)
    flags.add_argument("--kv-heads", type=int, default=4)
    flags.add_argument("--context", type=int, default=64)
    flags.add_argument("--steps", type=int, default=300)
    flags.add_argument("--batch-size", type=int, default=8, help="of each process")
    flags.add_argument("--lr", type=float, default=3e-3)
    flags.add_argument("--target-params", type=float, default=0.6)
    if "RANK" not in os.environ:
        raise SystemExit("start it with: torchrun --nproc-per-node 2 tutorials/13_fsdp2.py")
    args = start(flags, {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "context": 32, "steps": 20})
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    train, test, alphabet = letters()

    config = LlamaConfig(
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        intermediate_size=3 * args.hidden,
        vocab_size=alphabet,
        max_position_embeddings=2 * args.context,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    draw = torch.Generator().manual_seed(args.seed + rank)  # every process has its own part of the text
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    oto = OTO(model, {"input_ids": batch(test, 2, args.context, draw)}, layout="uniform")
    shard(model)
    model.to_empty(device=device)
    torch.manual_seed(args.seed + rank)
    model.init_weights()
    model.model.rotary_emb.inv_freq.copy_(type(model.model.rotary_emb)(config).inv_freq)  # a buffer is no weight
    optimizer = oto.hesso(
        variant="adamw", lr=args.lr, weight_decay=0.1, target_params=args.target_params, total_steps=args.steps
    )
    if rank == 0:
        print(optimizer.plan(), "\n")

    def step() -> Tensor:
        ids = batch(train, args.batch_size, args.context, draw).to(device)
        optimizer.zero_grad()
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    # A checkpoint in the middle, as torch writes it: each process its shards. It loads on any number of processes.
    folder = args.out.with_name(f"{args.out.name}_checkpoint")
    model.train()
    for n in range(args.steps):
        loss = step()
        if n + 1 == args.steps // 2:
            weights, state = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
            dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        if rank == 0 and (n + 1) % max(args.steps // 4, 1) == 0:
            print(f"loss {loss.item():.3f}; {optimizer.progress}")

    ids = batch(test, 8, args.context, torch.Generator().manual_seed(1))
    zeroed = accuracy(model, ids.to(device))
    subnet = oto.construct_subnet(out_dir=args.out)  # on every process: weights are gathered for it
    if rank == 0:
        full = LlamaForCausalLM(config)  # to time it; untrained
        rows = {
            "zeroed": (full, subnet.cost_before, [zeroed]),
            "slim": (subnet.model, subnet.cost_after, [accuracy(subnet.model, ids)]),
        }
        compare(rows, ["next letter"], lambda m: m(input_ids=ids), f"8 × {args.context} letters", args.passes)
        print(subnet)

    # The slim model on all processes again: the others have it on meta, and get their shards from the first one.
    slim: Any = subnet.model
    whole = slim.state_dict() if rank == 0 else {}
    shard(slim)
    set_model_state_dict(slim, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    slim.to(device).train()
    plain = torch.optim.AdamW(slim.parameters(), lr=args.lr / 10)
    for _ in range(max(args.steps // 10, 2)):
        ids = batch(train, args.batch_size, args.context, draw).to(device)
        loss = slim(input_ids=ids, labels=ids).loss
        plain.zero_grad()
        loss.backward()
        plain.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if rank == 0:
        print(f"{dist.get_world_size()} processes go on with the slim model: loss {loss.item():.3f}")
        print(f"peak memory of the first process: {peak:,.0f} MB, torch and transformers included")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
