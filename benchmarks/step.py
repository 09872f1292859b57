"""What a step of every sparse optimizer costs beside a step of the optimizer that it wraps.

    python benchmarks/step.py --threads 1
    python benchmarks/step.py --device cuda
    python benchmarks/step.py --threads 1 --training 8
    python benchmarks/step.py --memory
    python benchmarks/step.py --floor

Both optimizers run in one process on two copies of the same parameters, step by step in turns; the table shows medians
in milliseconds and their ratio. Gradients are made once; for pruned entries they are what back-propagation gives there
(zero where the node group is quiet). The phases are: before pruning; the steps before a choice whose gradients are
averaged, with the criterion ``--saliency``; the steps of a walk (CRIC); the first step of a period; the other steps of
a period, which shrink redundant groups (HESSO, CRIC) or penalize and test those that may go (HSPG all of them, DHSPG
half), and keep pruned ones at zero; and after pruning. λ is 0 here, so that no group leaves and what is measured is the
most that a step costs. LHSPG has adapters of rank 8 on all linear layers of a frozen model (so BERT alone has a row of
it), and beside it stands the wrapped step of these adapters, which is a hundredth of that of a whole model.

With ``--training N`` the table is another one: what the sparse optimizer adds to a whole training step (forward,
backward, SGD) on a batch of N, where it observes gradients, and where it penalizes. On one CPU thread seconds are those
of the process, so that other programs do not count. ``--memory`` counts the bytes of tensors that an optimizer holds
beside the state of the wrapped one: in a checkpoint, and while it penalizes.

``--floor`` shows what of a step of HSPG calls of torch cannot do without, beside fused SGD: bare calls on the matrices
of a model, block by block, without groups or atoms. They read and write 5 numbers for each entry, as many as SGD with
momentum does; a row in bold is a whole step that does no more. The least of all rounds counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from oto.groups.node_group import NodeGroup
from oto.optim import DHSPG, H2SPG, HESSO, HESSOCRIC, HSPG, LHSPG, SparseOptimizer
from oto.optim.entries import BLOCK
from oto.optim.half_space import HalfSpace

Analyze = Callable[[nn.Module, Tensor], Sequence[NodeGroup]]
PHASES = ("before", "observed", "walk", "period start", "during", "after")
METHODS: dict[str, tuple[type[SparseOptimizer], dict[str, object]]] = {
    "hesso": (HESSO, {}),
    "hesso_cric": (HESSOCRIC, {"max_cycles": 1}),
    "hspg": (HSPG, {"lmbda": 0.0, "saliency": "magnitude"}),
    "dhspg": (DHSPG, {"lmbda": 0.0}),
    "h2spg": (H2SPG, {"lmbda": 0.0}),
    "lhspg": (LHSPG, {}),
}
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-5, "weight_decay": 1e-2}),
}
MODES = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def resnet50() -> tuple[nn.Module, Tensor]:
    from torchvision.models import resnet50

    return resnet50(), torch.randn(1, 3, 64, 64)


def bert_base() -> tuple[nn.Module, Tensor]:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig()), torch.randint(1000, (1, 16))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"resnet50": resnet50, "bert_base": bert_base}
ADAPTED = ("bert_base",)
"""Those that adapters are put on, for LHSPG."""


def built(method: str, name: str) -> tuple[nn.Module, Tensor]:
    """The model; for LHSPG frozen, with adapters."""
    model, x = MODELS[name]()
    if method == "lhspg":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    return model, x


def rows_of(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Models and optimizers that are measured together."""
    for name in args.models:
        yield from ((name, method) for method in args.methods if method != "lhspg" or name in ADAPTED)


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device is done."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def gradients(model: nn.Module) -> None:
    source = torch.Generator().manual_seed(1)
    for p in (p for p in model.parameters() if p.requires_grad):
        p.grad = (torch.randn(p.shape, generator=source) * 1e-3).to(p.device)


def silence(model: nn.Module, optimizer: SparseOptimizer) -> None:
    """Give pruned entries of quiet groups the gradient that they have: none."""
    parameters = dict(model.named_parameters())
    for group in optimizer.node_groups:
        rows = optimizer.pruned_groups.get(group.name)
        if rows is not None and getattr(group, "quiet", False):
            for piece in group.slices:
                gradient = parameters[piece.parameter].grad if piece.parameter in parameters else None
                if gradient is not None:
                    piece.of(gradient).index_fill_(0, rows.to(gradient.device), 0)


def phase_of(optimizer: SparseOptimizer, n: int, window: int) -> str:
    schedule = optimizer.schedule
    if isinstance(optimizer, HESSOCRIC) and n >= optimizer.first_step and not optimizer.walk["over"]:
        return "walk"
    if n >= schedule.end:
        return "after"
    if schedule.starts_period(n):
        return "period start"
    if isinstance(optimizer, HalfSpace):
        ahead = schedule.start - n if n <= schedule.start and isinstance(optimizer, DHSPG) else None
    else:
        ahead = schedule.until_choice(n)
    if ahead is not None and ahead < window:
        return "observed"
    return (
        "before"
        if n < schedule.start
        else "during"
        if not isinstance(optimizer, HalfSpace) or (n < optimizer.last_period)
        else "last period"
    )


def made(
    method: str,
    model: nn.Module,
    x: Tensor,
    analyze: Analyze,
    window: int,
    saliency: str | None,
    **keywords: object,
) -> SparseOptimizer:
    """One whose periods are as long as the window of its averages, so that only the last one is not observed."""
    kind, options = METHODS[method]
    if method == "hesso_cric":
        options = options | {"sampling_steps": window}
    if saliency is not None:
        options = {"saliency": saliency} | options
    options = options | {"pruning_steps": 5 * window, "pruning_periods": 5, "target_group_sparsity": 0.5}
    options = options | {"average_steps": window} | keywords
    if kind is LHSPG:
        from oto import OTO

        return OTO(model, x, prune_frozen=True).lhspg(**options)  # type: ignore[arg-type]
    return kind(model.named_parameters(), analyze(model, x), **options)  # type: ignore[call-arg]


def measure(
    method: str,
    name: str,
    analyze: Analyze,
    optimizer: str,
    mode: str,
    device: torch.device,
    rounds: int,
    saliency: str | None = None,
) -> dict[str, tuple[float, float]]:
    """Median seconds of a step in every phase that there is: of the wrapped optimizer, and of the sparse one."""
    ours, x = built(method, name)
    theirs, _ = built(method, name)
    for model in (ours, theirs):
        model.to(device)
        gradients(model)
    cls, options = OPTIMIZERS[optimizer]
    wrapped = cls([p for p in theirs.parameters() if p.requires_grad], **options, **MODES[mode])
    window = max(rounds // 2, 2)
    sparse = made(
        method,
        ours,
        x.to(device),
        analyze,
        window,
        saliency,
        base=cls,
        start_pruning_step=rounds + window + 2,
        **options,
        **MODES[mode],
    )
    times: dict[str, list[tuple[float, float]]] = {}
    n, ended = 0, 0
    while n < sparse.schedule.end + rounds + 2:
        phase = phase_of(sparse, n, window)
        pair = timed(wrapped.step, device), timed(sparse.step, device)
        if sparse.schedule.ends_period(n):
            silence(ours, sparse)
        ended += phase == "after"
        if n >= 2 and not 0 < ended < 3:  # the first steps make the state, the first after pruning what it writes
            times.setdefault(phase, []).append(pair)
        n += 1
    medians = {phase: tuple(map(statistics.median, zip(*pairs, strict=True))) for phase, pairs in times.items()}
    return medians  # type: ignore[return-value]


def training(
    method: str,
    name: str,
    analyze: Analyze,
    device: torch.device,
    batch: int,
    saliency: str | None,
    rounds: int = 3,
) -> dict[str, float]:
    """Median seconds of a training step (forward, backward, fused SGD), and what the sparse optimizer adds to it."""
    model, example = built(method, name)
    model.to(device)
    x = torch.randn(batch, 3, 224, 224) if name == "resnet50" else torch.randint(1000, (batch, 128))
    x = x.to(device)
    cls, options = OPTIMIZERS["sgd"]
    own = {"base": cls, "start_pruning_step": 1, "fused": True} | options
    optimizer = made(method, model, example.to(device), analyze, 1000, saliency, **own)
    penalizes = isinstance(optimizer, HalfSpace | LHSPG)

    def backward() -> None:
        optimizer.zero_grad()
        output = model(x)
        (output if isinstance(output, Tensor) else output.last_hidden_state).square().mean().backward()

    def added() -> object:
        return optimizer.step() if penalizes else optimizer.observe(1)

    for _ in range(3 if penalizes else 1):
        backward()
        optimizer.step()
    times: dict[str, list[float]] = {"backward": [], "step": [], "added": []}
    for _ in range(rounds):
        times["backward"].append(timed(backward, device))
        times["step"].append(timed(optimizer.descend, device))
        times["added"].append(timed(added, device))
    whole = {key: statistics.median(seconds) for key, seconds in times.items()}
    more = whole["added"] - (whole["step"] if penalizes else 0)
    return {"whole": whole["backward"] + whole["step"], "step": whole["step"], "added": more}


def memory(method: str, name: str, analyze: Analyze) -> tuple[int, int, int]:
    """Bytes of all parameters, of what a checkpoint holds of pruning, and of the copy that is held while penalizing."""
    model, x = built(method, name)
    gradients(model)
    optimizer = made(method, model, x, analyze, 8, None, start_pruning_step=1, lr=1e-3)
    held = 0
    for n in range(12):
        optimizer.step()
        if isinstance(optimizer, HalfSpace) and (x_ := optimizer.penalized(n)) is not None:
            held = max(held, x_.copied.nbytes)
        if isinstance(optimizer, LHSPG):
            held = max(held, optimizer.redundant().nbytes)
        if isinstance(optimizer, HESSOCRIC):
            held = max(held, sum(own.nbytes for own in optimizer.walk["saved"]))
    first = optimizer.param_groups[0]
    kept = sum(own.nbytes for key, own in first.items() if key.startswith("oto_") and isinstance(own, Tensor))
    kept += sum(own.nbytes for own in first.get("oto_walk", {}).values() if isinstance(own, Tensor))
    return sum(p.nbytes for p in model.parameters()), kept, held


def floor(name: str, rounds: int) -> list[tuple[str, int, float]]:
    """What is called, numbers read and written for each entry, and the least seconds of it."""
    model, _ = MODELS[name]()
    gradients(model)
    cls, options = OPTIMIZERS["sgd"]
    wrapped = cls(model.parameters(), fused=True, **options)
    wholes = [p.detach().flatten(1) for p in model.parameters() if p.dim() > 1]
    rows = [part for own in wholes for part in own.split(max(BLOCK * len(own) // own.numel(), 1))]
    copies = [
        own.view_as(part)
        for own, part in zip(
            torch.empty(sum(map(Tensor.numel, rows))).split([part.numel() for part in rows]), rows, strict=True
        )
    ]
    product, sums = torch.empty(max(map(Tensor.numel, rows))), [torch.empty(len(part)) for part in rows]
    least = [torch.full((len(part), 1), 1e-9) for part in rows]

    def copy(norms: bool) -> None:
        for x, own, total in zip(rows, copies, sums, strict=True):
            own.copy_(x)
            if norms:
                torch.linalg.vector_norm(own, dim=1, out=total)

    def subtract(inner: bool) -> None:
        for x, own, by, total in zip(rows, copies, least, sums, strict=True):
            x.addcmul_(own, by, value=-1)
            if inner:
                torch.sum(torch.mul(x, own, out=product[: x.numel()].view_as(x)), 1, out=total)

    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "fused SGD with momentum": (5, wrapped.step),
        "copy before it": (2, lambda: copy(norms=False)),
        "copy, and norms": (2, lambda: copy(norms=True)),
        "subtract after it": (3, lambda: subtract(inner=False)),
        "subtract, and inner products": (3, lambda: subtract(inner=True)),
    }
    times = [[timed(call, torch.device("cpu")) for _, call in calls.values()] for _ in range(rounds + 2)][2:]
    return [(what, calls[what][0], min(own)) for what, own in zip(calls, zip(*times, strict=True), strict=True)]


def analysis(model: nn.Module, x: Tensor) -> Sequence[NodeGroup]:
    from oto import OTO

    return OTO(model, x).node_groups  # type: ignore[no-any-return]


def main(analyze: Analyze = analysis) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", default=1, type=int)
    parser.add_argument("--rounds", default=20, type=int, help="steps measured before and after pruning")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--saliency", help="the criterion that is averaged; by default that of HESSO")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--training", type=int, metavar="N", help="beside whole training steps on batches of N")
    parser.add_argument("--floor", action="store_true", help="what a step of HSPG cannot do without; CPU")
    parser.add_argument("--memory", action="store_true", help="bytes beside the state of the wrapped optimizer")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else f"{args.threads} CPU thread(s)"
    print(
        f"torch {torch.__version__}, {device}, float32, sparsity 0.5, {args.rounds} rounds, ms: wrapped → ours (ratio)"
    )
    if args.memory:
        print("| model | optimizer | parameters, MB | in a checkpoint, MB | copy, MB |\n|---|---|--:|--:|--:|")
        for name, method in rows_of(args):
            torch.manual_seed(0)
            cells = " | ".join(f"{number / 1e6:.2f}" for number in memory(method, name, analyze))
            print(f"| {name} | {method} | {cells} |", flush=True)
        return
    if args.floor:
        print("| model | call | ms | × fused SGD | GB/s |\n|---|---|--:|--:|--:|")
        for name in args.models:
            torch.manual_seed(0)
            found = floor(name, args.rounds)
            entries = sum(p.numel() for p in MODELS[name]()[0].parameters() if p.dim() > 1)
            fused, bare, whole = found[0][2], found[1][2] + found[3][2], found[2][2] + found[4][2]
            rows = [
                *found,
                ("**SGD, copy, subtract**", 10, fused + bare),
                ("**the same with the sums**", 10, fused + whole),
            ]
            for what, numbers, seconds in rows:
                rate = 4e-9 * numbers * entries / seconds
                print(f"| {name} | {what} | {1e3 * seconds:.1f} | {seconds / fused:.2f} | {rate:.1f} |", flush=True)
        return
    if args.training:
        print(
            "| model | batch | optimizer | training step | fused SGD | added | share |\n|---|--:|---|--:|--:|--:|--:|"
        )
        for name, method in rows_of(args):
            torch.manual_seed(0)
            found = training(method, name, analyze, args.device, args.training, args.saliency)
            cells = " | ".join(f"{1e3 * seconds:.1f}" for seconds in found.values())
            share = found["added"] / found["whole"]
            print(f"| {name} | {args.training} | {method} | {cells} | {share:.1%} |", flush=True)
        return
    print("| model | optimizer | over | " + " | ".join(PHASES) + " |\n|---|---|---|" + "---|" * len(PHASES))
    for name, method in rows_of(args):
        for optimizer in args.optimizers:
            for mode in args.modes:
                torch.manual_seed(0)
                rows = measure(method, name, analyze, optimizer, mode, args.device, args.rounds, args.saliency)
                cells = " | ".join(
                    f"{1e3 * a:.2f} → {1e3 * b:.2f} ({b / a:.2f}×)" if (a := pair[0]) and (b := pair[1]) else "–"
                    for pair in (rows.get(phase, (0.0, 0.0)) for phase in PHASES)
                )
                print(f"| {name} | {method} | {optimizer} {mode} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
