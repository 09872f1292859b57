"""What pruning 70 billion parameters takes of 64 GPUs beside FSDP2: formulas, checked against a simulation.

    python benchmarks/fsdp2_plan.py                                # the table, by the formulas: 70B on 64 GPUs
    python benchmarks/fsdp2_plan.py --simulate hesso               # one of the 64 ranks, 6 GB of memory
    python benchmarks/fsdp2_plan.py --simulate hspg --layers 10    # its copies are real memory

The simulation is one process that is rank ``--rank`` of 64 in torch's fake process group, which sends nothing and says
it did. The model is made and analyzed on ``meta`` and sharded by ``fully_shard``; the shards of this rank then lie in
memory that is not touched before something is written there, so it is of zeros, and so are its gradients, but for one
entry of each. The optimizer is ``oto``'s own, around one whose step does nothing. Counted are all calls of ``c10d`` in
a step, their bytes, and the tensors that the optimizer holds; where that is not what the formulas say the run ends
with an error.

Seconds are no measurement: bytes over ``--gigabits`` a second and GPU, the slowest link of the ring.
The fake process group is private to torch, so it is used here alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

METHODS = ("hesso", "hspg", "dhspg")
SUMS = {"hesso": {"averaged": 1, "choice": 4, "pruning": 0}, "hspg": {"averaged": 1, "choice": 4, "pruning": 2}}
SUMS["dhspg"] = {**SUMS["hspg"], "pruning": 3}
"""Sums over the processes in a step, at most: those of docs/distributed.md."""


@dataclass(frozen=True)
class Plan:
    """The formulas, in bytes.

    Attributes:
        parameters, prunable: Entries of all parameters, and of those that are brought to zero.
        atoms: Groups that may go, N.
        processes: W.
        entry: Bytes of an entry.
        master: Bytes of the wrapped optimizer's state and master weights for an entry (AdamW: 12).
    """

    parameters: int
    prunable: int
    atoms: int
    processes: int
    entry: int
    master: int = 12

    def shard(self) -> float:
        """Weights and gradients of a process."""
        return 2 * self.entry * self.parameters / self.processes

    def state(self) -> float:
        """The wrapped optimizer's."""
        return self.master * self.parameters / self.processes

    def own(self, method: str, criteria: int = 1) -> float:
        """What ``oto`` holds: a byte an atom and the numbers of those that go, averages, and a half-space's copy."""
        copied = 0 if method == "hesso" else self.entry * self.prunable / self.processes
        return (9 + 4 * criteria) * self.atoms + copied

    def sent(self, sums: int) -> float:
        """Bytes that a process sends for sums of one number an atom in float32, by a ring."""
        return sums * 4 * self.atoms * 2 * (self.processes - 1) / self.processes

    def step(self) -> float:
        """Bytes that a process sends in a step of FSDP2: two gathers and one reduction, each of all parameters."""
        return 3 * self.entry * self.parameters * (self.processes - 1) / self.processes


def formula(args: argparse.Namespace) -> Plan:
    """Of a Llama in bfloat16: residual width, and of each layer the FFN, heads of keys, of queries, and their width."""
    width = args.hidden // args.heads
    attention = 2 * args.hidden * width * (args.heads + args.kv_heads)
    layer = attention + 3 * args.hidden * args.ffn + 2 * args.hidden
    parameters = 2 * args.vocab * args.hidden + args.layers * layer + args.hidden
    atoms = args.hidden + args.layers * (args.ffn + args.kv_heads + args.heads + width)
    return Plan(parameters, parameters - args.vocab * args.hidden, atoms, args.processes, 2)


class Still(torch.optim.Optimizer):
    """One that leaves everything as it is."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


class Sent(TorchDispatchMode):
    """Counts calls of c10d and the bytes of their tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[str, list[int]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in (name := str(op)):
            size = sum(t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            self.calls.setdefault(name, []).append(size)
        return op(*args, **(kwargs or {}))


def sharded(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model of this rank, of zeros, and its analysis."""
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import LlamaConfig, LlamaForCausalLM

    from oto import OTO

    dist.init_process_group("fake", store=FakeStore(), rank=args.rank, world_size=args.processes)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=args.vocab,
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    oto = OTO(model, {"input_ids": torch.zeros(1, 8, dtype=torch.int64)})
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device="cpu")
    for p in model.parameters():
        own = p.to_local().detach()
        if own.nbytes < 1 << 20:  # memory that was used before
            own.zero_()
        own.view(-1)[:1] = 1e-2
    return model, oto


def simulate(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """One rank of many; the calls of each phase, and what is held."""
    from torch.distributed.tensor import DTensor

    begin = time.process_time()
    model, oto = sharded(args)
    analysis = time.process_time() - begin
    times = {"start_pruning_step": 2, "pruning_steps": 4, "average_steps": 2, "target_params": 0.7}
    times |= {"pruning_periods": 1} if method == "hesso" else {"pruning_periods": 2, "lmbda": 0.0}
    optimizer = getattr(oto, method)(base=Still, **times)
    for p in model.parameters():
        own = torch.zeros_like(p.to_local())
        own.view(-1)[:1] = 1e-3
        p.grad = DTensor.from_local(own, p.device_mesh, p.placements, run_check=False)
    calls: dict[str, dict[str, list[int]]] = {}
    seconds: dict[str, float] = {}
    copied = 0
    for n in range(7):
        phase = "choice" if optimizer.schedule.starts_period(n) else "averaged" if n < 2 else "pruning"
        phase = "after" if n >= optimizer.schedule.end else phase
        begin = time.process_time()
        with Sent() as sent:
            optimizer.step()
        seconds[phase] = max(seconds.get(phase, 0), time.process_time() - begin)
        if sum(map(len, sent.calls.values())) >= sum(map(len, calls.get(phase, {}).values())):
            calls[phase] = sent.calls
        if method != "hesso" and hasattr(optimizer, "penalized") and phase == "pruning":
            copied = max(copied, optimizer.penalized(n).copied.nbytes)
    zeroed = {piece.parameter for group in optimizer.node_groups for piece in group.zeros}
    first, here = optimizer.param_groups[0], [p.to_local() for p in model.parameters()]
    return {
        "method": method,
        "config": {k: v for k, v in vars(args).items() if k in ("hidden", "layers", "ffn", "vocab")},
        "plan": asdict(
            Plan(
                sum(p.numel() for p in model.parameters()),
                sum(p.numel() for name, p in model.named_parameters() if name in zeroed),
                optimizer.num_atoms,
                args.processes,
                here[0].itemsize,
            )
        ),
        "shard": sum(own.nbytes for own in here),
        "held": sum(t.nbytes for key, t in first.items() if key.startswith("oto_") and isinstance(t, Tensor)),
        "criteria": len(optimizer.choice.averaged),
        "copied": copied,
        "calls": calls,
        "seconds": seconds,
        "analysis_seconds": analysis,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def require(found: dict[str, Any], expected: Plan) -> None:
    """Refuse a simulation that the formulas do not describe."""
    plan, method = Plan(**found["plan"]), found["method"]
    assert plan == expected, (plan, expected)
    assert found["shard"] * 2 == plan.shard(), (found["shard"], plan.shard())
    assert found["held"] == (1 + 4 * found["criteria"]) * plan.atoms <= plan.own(method, found["criteria"])
    assert found["copied"] <= plan.entry * plan.prunable / plan.processes
    for phase, calls in found["calls"].items():
        assert all("allreduce" in name for name in calls), f"{phase}: {list(calls)}"
        sizes = [size for own in calls.values() for size in own]
        most = SUMS[method].get(phase, 0)
        assert len(sizes) <= most, f"{phase}: {len(sizes)} calls, {most} by the table"
        assert all(size <= 4 * plan.atoms for size in sizes), f"{phase}: {sizes}, {plan.atoms} atoms"


def rows(plan: Plan, gigabits: float) -> list[str]:
    """Markdown."""
    lines = [
        "| | weights and gradients, GB | AdamW, GB | `oto`, GB | sent at a choice, MB | takes, s | in other steps of"
        " pruning, MB | FSDP2 sends in a step, GB | takes, s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for method in METHODS:
        choice, pruning = (plan.sent(SUMS[method][phase]) for phase in ("choice", "pruning"))
        lines.append(
            f"| {method} | {plan.shard() / 1e9:.2f} | {plan.state() / 1e9:.2f} | {plan.own(method) / 1e9:.2f}"
            f" | {choice / 1e6:.0f} | {choice * 8e-9 / gigabits:.4f} | {pruning / 1e6:.0f}"
            f" | {plan.step() / 1e9:.0f} | {plan.step() * 8e-9 / gigabits:.1f} |"
        )
    lines.append(f"\n{plan.parameters:,} parameters, {plan.atoms:,} groups, {plan.processes} processes")
    return lines


def main(argv: list[str] | None = None) -> None:
    flags = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    sizes = {"hidden": 8192, "ffn": 28672, "layers": 80, "heads": 64, "kv-heads": 8, "vocab": 128256}
    for name, default in {**sizes, "processes": 64, "rank": 5}.items():
        flags.add_argument(f"--{name}", type=int, default=default)
    flags.add_argument("--gigabits", type=float, default=400.0, help="of a GPU's link, a second")
    flags.add_argument("--simulate", choices=METHODS)
    flags.add_argument("--results", type=Path, help="a file that simulations add a line of JSON to")
    args = flags.parse_args(argv)
    if args.simulate is None:
        print("\n".join(rows(formula(args), args.gigabits)))
        return
    found = simulate(args.simulate, args)
    if args.results is not None:
        with args.results.open("a") as file:
            file.write(json.dumps(found) + "\n")
    require(found, formula(args))
    sums = {phase: sum(map(len, calls.values())) for phase, calls in found["calls"].items()}
    print(f"as the formulas say: {found['plan']['atoms']:,} groups, sums in a step: {sums}")


if __name__ == "__main__":
    main()
