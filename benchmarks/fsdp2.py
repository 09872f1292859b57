"""What pruning costs beside plain FSDP2 training: memory of a process, seconds a step, and what is sent for it.

    python benchmarks/fsdp2.py                                # 27 M parameters, two processes, CPU
    python benchmarks/fsdp2.py --hidden 1024 --layers 24 --heads 16 --kv-heads 16 --vocab 32000  # .37 B: 6 GB a process
    python benchmarks/fsdp2.py --hidden 1280 --layers 22 --heads 20 --kv-heads 20 --vocab 32000  # .52 B: 7 GB a process

A Llama of random weights in float32, AdamW, one batch that is used again. Each method runs in processes of its own, so
that peaks of memory (``ru_maxrss``; on CUDA, those of the allocator) are its own. The phases are: before pruning; the
steps whose gradients are averaged for a choice; those that choose; the other steps of pruning (all groups penalized,
for HSPG, or those that are to go); and after. Seconds are medians; on one CPU thread they are those of the process, so
that other programs do not count. Sums are counted where they are asked for
(``oto.shards``): how many, and of how many numbers.

With ``--results`` a line of JSON is appended for each method, and what is there with the same sizes is not run again,
so a run that was stopped goes on::

    OMP_NUM_THREADS=1 python benchmarks/fsdp2.py --hidden 1024 --layers 24 --heads 16 --kv-heads 16 --vocab 32000 \\
        --results docs/benchmarks/fsdp2.jsonl
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing as mp

PHASES = ("before", "averaged", "choice", "pruning", "after")
METHODS = ("plain", "hesso", "hspg", "dhspg")


def config(args: argparse.Namespace) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        intermediate_size=int(args.hidden * 2.75),
        vocab_size=args.vocab,
        max_position_embeddings=4 * args.context,
        tie_word_embeddings=False,
    )


class Sums:
    """Counts the sums over processes, and their numbers."""

    def __init__(self) -> None:
        from oto.shards import Sharding

        self.calls, self.numbers, summed = 0, 0, Sharding.summed

        def counted(sharding: Any, own: torch.Tensor) -> torch.Tensor:
            self.calls, self.numbers = self.calls + 1, self.numbers + own.numel()
            return summed(sharding, own)

        Sharding.summed = counted  # type: ignore[method-assign]

    def taken(self) -> tuple[int, int]:
        found, self.calls, self.numbers = (self.calls, self.numbers), 0, 0
        return found


def sizes(args: argparse.Namespace) -> dict[str, Any]:
    """What rows must agree in."""
    return {name: value for name, value in vars(args).items() if name not in ("methods", "results")}


def measure(rank: int, folder: str, method: str, args: argparse.Namespace) -> None:
    """One process."""
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaForCausalLM

    from oto import OTO

    torch.set_num_threads(args.threads)
    cuda = args.device == "cuda"
    clock = time.perf_counter if cuda or args.threads > 1 else time.process_time
    if cuda:
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store", args.processes)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=args.processes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config(args))
    ids = torch.randint(args.vocab, (args.batch_size, args.context), generator=torch.Generator().manual_seed(rank))
    begin = time.perf_counter()
    oto = None if method == "plain" else OTO(model, {"input_ids": ids})
    analysis = time.perf_counter() - begin
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device=args.device)
    model.init_weights()
    with torch.no_grad():
        model.model.rotary_emb.inv_freq.copy_(type(model.model.rotary_emb)(model.config).inv_freq)
    if oto is None:
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4)
    else:
        times = {"start_pruning_step": 6, "pruning_steps": 8, "average_steps": 4, "target_params": 0.7}
        times |= {"pruning_periods": 1} if method == "hesso" else {"pruning_periods": 2, "lmbda": 0.0}
        optimizer = getattr(oto, method)(variant="adamw", lr=1e-4, **times)
    sums, seconds, sent = Sums(), dict[str, list[float]](), dict[str, tuple[int, int]]()
    ids = ids.to(args.device)
    for n in range(18):
        phase = "before" if n < 3 or oto is None else "averaged" if n < 6 else "pruning" if n < 14 else "after"
        phase = "choice" if oto is not None and optimizer.schedule.starts_period(n) else phase
        dist.barrier()
        begin = clock()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        if n > 0:  # the first one makes the state
            seconds.setdefault(phase, []).append(clock() - begin)
        sent[phase] = max(sent.get(phase, (0, 0)), sums.taken())
    peak = (
        torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    if rank == 0:
        found = {
            "method": method,
            "sizes": sizes(args),
            "torch": torch.__version__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "processes": args.processes,
            "atoms": 0 if oto is None else optimizer.num_atoms,
            "analysis_seconds": analysis,
            "peak_mb": peak,
            "seconds": {phase: statistics.median(own) for phase, own in seconds.items()},
            "sums": sent,
        }
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def rows(found: list[Mapping[str, Any]]) -> list[str]:
    lines = ["| | peak, MB | × plain | " + " | ".join(f"{phase}, s" for phase in PHASES) + " | sums in these steps |"]
    lines.append("|---|" + "--:|" * (len(PHASES) + 2) + "---|")
    plain = next((own["peak_mb"] for own in found if own["method"] == "plain"), float("nan"))
    for own in found:
        cells = [f"{own['peak_mb']:,.0f}", f"{own['peak_mb'] / plain:.2f}"]
        cells += [*(f"{own['seconds'][p]:.3f}" if p in own["seconds"] else "" for p in PHASES)]
        sent = [f"{own['sums'][p][0]}" if p in own["sums"] else "" for p in PHASES]
        lines.append(f"| {own['method']} | {' | '.join(cells)} | {', '.join(filter(None, sent))} |")
    atoms = {own["atoms"] for own in found if own["atoms"]}
    lines.append(f"\n{found[0]['parameters']:,} parameters, {found[0]['processes']} processes; {atoms} numbers a sum")
    return lines


def main(argv: list[str] | None = None) -> None:
    flags = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, default in {"hidden": 512, "layers": 6, "heads": 8, "kv-heads": 8, "vocab": 8000}.items():
        flags.add_argument(f"--{name}", type=int, default=default)
    for name, default in {"context": 64, "batch-size": 2, "processes": 2, "threads": 1}.items():
        flags.add_argument(f"--{name}", type=int, default=default)
    flags.add_argument("--device", default="cpu")
    flags.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    flags.add_argument("--results", type=Path, help="a file of lines of JSON to go on with")
    args = flags.parse_args(argv)
    known = [] if args.results is None or not args.results.exists() else args.results.read_text().splitlines()
    found = {own["method"]: own for own in map(json.loads, known) if own["sizes"] == sizes(args)}
    for method in args.methods:
        if method not in found:
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(measure, (folder, method, args), args.processes)  # type: ignore[attr-defined]
                found[method] = json.loads(Path(folder, "found.json").read_text())
            if args.results is not None:
                with args.results.open("a") as file:
                    file.write(json.dumps(found[method]) + "\n")
    print("\n".join(rows([found[method] for method in args.methods])))


if __name__ == "__main__":
    main()
