"""What pruning 70 billion parameters takes of 64 GPUs beside FSDP2: formulas, checked against a simulation.

    python benchmarks/fsdp2_plan.py                                # the table, by the formulas: 70B on 64 GPUs
    python benchmarks/fsdp2_plan.py --simulate hesso               # one of the 64 ranks, 6 GB of memory
    python benchmarks/fsdp2_plan.py --simulate hspg                # with the copies of half-spaces, 8 GB

The simulation is one process that is rank ``--rank`` of 64 in torch's fake process group, which sends nothing and says
it did. The model is made and analyzed on ``meta`` and sharded by ``fully_shard``; the shards of this rank, and their
gradients, are zero but for one entry of each. The optimizer is ``oto``'s own, around one whose step does nothing. All
calls of ``c10d`` in a step are counted, with their bytes, and so are the tensors that the optimizer holds; where that
is not what the formulas say the run ends with an error. Groups are counted on two and three layers at full width for
the formulas, and on all layers in the simulation.

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
"""Sums over the processes for each thing that a step does, at most: those of docs/distributed.md."""


@dataclass(frozen=True)
class Plan:
    """The formulas, in bytes.

    Attributes:
        parameters: Entries of all parameters.
        prunable: Entries that may be brought to zero, counted once for each group that they belong to: a row of a
            query's weight belongs to a head and to a pair of dimensions that are rotated together.
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
        """What ``oto`` holds: a byte an atom and the numbers of those that go, and averages; for half-spaces one byte
        more, what was read back last, and a copy of the entries."""
        if method == "hesso":
            return (9 + 4 * criteria) * self.atoms
        return (10 + 4 * criteria) * self.atoms + self.entry * self.prunable / self.processes

    def sent(self, sums: int) -> float:
        """Bytes that a process sends for sums of one number an atom in float32, by a ring."""
        return sums * 4 * self.atoms * 2 * (self.processes - 1) / self.processes

    def step(self) -> float:
        """Bytes that a process sends in a step of FSDP2: two gathers and one reduction, each of all parameters."""
        return 3 * self.entry * self.parameters * (self.processes - 1) / self.processes


def formula(args: argparse.Namespace) -> Plan:
    """That of a Llama in bfloat16. Parameters are added up by hand; groups are those that an analysis finds."""
    width = args.hidden // args.heads
    attention = 2 * args.hidden * width * (args.heads + args.kv_heads)
    layer = attention + 3 * args.hidden * args.ffn + 2 * args.hidden
    parameters = 2 * args.vocab * args.hidden + args.layers * layer + args.hidden
    return Plan(parameters, *counted(args), args.processes, 2)


def counted(args: argparse.Namespace) -> tuple[int, int]:
    """Entries and groups that may go, from analyses of two and of three layers at full width, on ``meta``: seconds.

    All layers are alike, so each further one adds what the third did: its FFN, heads of keys, and their width. What
    layers share, the residual width and the pairs of dimensions that are rotated together, counts once. Heads of
    queries within one of keys may go only where the class can do with fewer, which depends on their number: hence an
    analysis and no formula.
    """
    two, three = (prunable(*analyzed(args, layers)) for layers in (2, 3))
    entries, groups = (a + (args.layers - 2) * (b - a) for a, b in zip(two, three, strict=True))
    return entries, groups


def prunable(model: Any, oto: Any) -> tuple[int, int]:
    """Entries of groups that may go, once for each of them, and the number of these groups."""
    shapes = {name: torch.empty(p.shape, device="meta") for name, p in model.named_parameters()}
    may_go = [group for group in oto.node_groups if group.prunable]
    entries = sum(piece.of(shapes[piece.parameter]).numel() for group in may_go for piece in group.zeros)
    return entries, sum(group.size for group in may_go)


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


def analyzed(args: argparse.Namespace, layers: int) -> tuple[Any, Any]:
    """A model on ``meta``, and its analysis."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from oto import OTO

    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=args.vocab,
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    return model, OTO(model, {"input_ids": torch.zeros(1, 8, dtype=torch.int64)})


def sharded(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model of this rank, of zeros, and its analysis."""
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=args.rank, world_size=args.processes)
    model, oto = analyzed(args, args.layers)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device="cpu")
    for p in model.parameters():
        own = p.to_local().detach()
        own.zero_()
        own.view(-1)[:1] = 1e-2
    return model, oto


def parts(optimizer: Any, method: str, n: int) -> list[str]:
    """What a step does of what ``SUMS`` lists; it sends the sums of all of it."""
    schedule = optimizer.schedule
    last = schedule.end if method == "hesso" else optimizer.last_period  # when half-spaces end
    choice = last if method == "hspg" else schedule.start
    averages = 0 < choice - n < optimizer.choice.average_steps  # a choice averages, too
    chooses = n == choice or n == last < schedule.end
    does = {"averaged": averages, "choice": chooses, "pruning": schedule.start <= n < last}
    return [part for part, done in does.items() if done]


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
        phase = "+".join(parts(optimizer, method, n)) or "nothing"
        begin = time.process_time()
        with Sent() as sent:
            optimizer.step()
        seconds[phase] = max(seconds.get(phase, 0), time.process_time() - begin)
        if sum(map(len, sent.calls.values())) >= sum(map(len, calls.get(phase, {}).values())):
            calls[phase] = sent.calls
        penalized = None if method == "hesso" else optimizer.penalized(n)
        copied = max(copied, 0 if penalized is None else penalized.copied.nbytes)
    entries, atoms = prunable(model, oto)
    assert atoms == optimizer.num_atoms
    here = [p.to_local() for p in model.parameters()]
    held = [t for key, t in optimizer.param_groups[0].items() if key.startswith("oto_") and isinstance(t, Tensor)]
    return {
        "method": method,
        "config": {k: v for k, v in vars(args).items() if k in ("hidden", "layers", "ffn", "vocab")},
        "plan": asdict(
            Plan(
                sum(p.numel() for p in model.parameters()),
                entries,
                atoms,
                args.processes,
                here[0].itemsize,
            )
        ),
        "shard": sum(own.nbytes for own in here),
        "held": sum(t.nbytes for t in held if t.shape[-1] == optimizer.num_atoms),
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
    codes = 1 if method == "hesso" else 2  # what an atom is, and what it was when it was read back last
    assert found["held"] == (codes + 4 * found["criteria"]) * plan.atoms <= plan.own(method, found["criteria"])
    assert found["copied"] <= plan.entry * plan.prunable / plan.processes
    for phase, calls in found["calls"].items():
        assert all("allreduce" in name for name in calls), f"{phase}: {list(calls)}"
        sizes = [size for own in calls.values() for size in own]
        most = sum(SUMS[method].get(part, 0) for part in phase.split("+"))
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
