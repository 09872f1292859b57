"""Parameters that are spread over two processes (FSDP2, tensor parallel): trained, chosen and zeroed as on one.

The processes are started once. What each check says is put down by name, and a test asks for it.
"""

from __future__ import annotations

import copy
import faulthandler
import gc
import os
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch import distributed as dist

from oto import OTO
from oto.errors import ModelChangedError, OptionError, OTOError, ShrinkError, TargetError
from oto.groups.node_group import Cut, Slice
from oto.optim import sharded
from tests.optim.test_distributed import GLOO, RANKS, begin, in_processes

pytestmark = [GLOO, pytest.mark.filterwarnings("default:a process was killed")]

FOLDER = Path()  # of the processes

CLOSE = 1e-12
"""Float64, sums of at most some hundred terms in another order, over 50 steps of a network that does not diverge."""


class Attention(nn.Module):
    """Heads times width, a gate beside a value in one weight, and branches side by side: atoms in all forms."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        # softmax does not see a bias of keys: its gradient is rounding alone, which Adam would make a step of
        self.q, self.k, self.v = (nn.Linear(width, width, bias=name != "k") for name in "qkv")
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 26), nn.Linear(13, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        h = self.norm(x)
        q, k, v = (own(h).view(batch, length, self.heads, -1).transpose(1, 2) for own in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1)
        x = x + self.out(mixed)
        gate, value = self.up(x).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * value)


class Net(nn.Module):
    """Blocks of attention, convolutions whose outputs are joined, and a head of one row, which one process lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Attention(), Attention())
        self.left, self.right = nn.Conv1d(12, 5, 1), nn.Conv1d(12, 6, 3, padding=1)
        self.mix = nn.Conv1d(11, 7, 1)
        self.head = nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(x).transpose(1, 2)
        h = self.mix(nn.functional.gelu(torch.cat([self.left(h), self.right(h)], 1)))
        y: Tensor = self.head(nn.functional.gelu(h).mean(-1))
        return y


class Adapted(nn.Linear):
    """A frozen layer with an adapter."""

    def __init__(self, given: nn.Linear) -> None:
        super().__init__(given.in_features, given.out_features)
        self.load_state_dict(given.state_dict())
        self.weight.requires_grad_(False)
        self.a, self.b = nn.Linear(given.in_features, 2, bias=False), nn.Linear(2, given.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5 * self.b(self.a(x))


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def adapted() -> Net:
    model = net()
    for block in model.blocks:
        block.up, block.down = Adapted(block.up), Adapted(block.down)
    return model.double()


def batch(n: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """The batch of a step; of a process, its half."""
    source = torch.Generator().manual_seed(n)
    x, y = (torch.randn(shape, generator=source, dtype=torch.float64) for shape in ((4, 5, 12), (4, 1)))
    return (x, y) if rank is None else (x[2 * rank : 2 * rank + 2], y[2 * rank : 2 * rank + 2])


X = batch(0)[0][:1]


def shard(model: nn.Module, **how: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, **how)
    return fully_shard(model, **how)


def train(model: nn.Module, optimizer: Any, steps: range, rank: int | None = None, clip: float | None = None) -> None:
    for n in steps:
        optimizer.zero_grad()
        x, y = batch(n, rank)
        nn.functional.mse_loss(model(x), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def full(model: nn.Module) -> dict[str, Tensor]:
    from oto.shards import gathered_tensor, reshard

    reshard(model)
    return {name: gathered_tensor(p).clone() for name, p in model.named_parameters()}


def require_same(model: nn.Module, other: nn.Module, optimizer: Any, reference: Any) -> None:
    assert optimizer.clock == reference.clock and optimizer.num_pruned == reference.num_pruned > 0
    for name, atoms in reference.pruned_groups.items():
        assert torch.equal(optimizer.pruned_groups[name], atoms), name
    mine, theirs = full(model), full(other)
    for name, p in theirs.items():
        assert (mine[name] - p).abs().max() <= CLOSE, (name, float((mine[name] - p).abs().max()))
        assert torch.equal(mine[name] == 0, p == 0), name


def agreed_atoms(optimizer: Any) -> Tensor:
    """The states of all atoms, which must be the same in every process."""
    atoms = [torch.empty_like(optimizer.atoms) for _ in range(dist.get_world_size())]
    dist.all_gather(atoms, optimizer.atoms)
    assert all(torch.equal(own, atoms[0]) for own in atoms)
    return atoms[0]


def require_agreement(model: nn.Module, optimizer: Any) -> None:
    """Pruning is over, all processes pruned the same atoms, at least one, and whatever was pruned is zero."""
    assert optimizer.progress.over and (agreed_atoms(optimizer) == 2).any()
    weights = full(model)
    for group in optimizer.node_groups:
        for piece in group.zeros if group.name in optimizer.pruned_groups else ():
            rows = piece.of(weights[piece.parameter]).index_select(0, optimizer.pruned_groups[group.name])
            assert not rows.any(), (group.name, piece.parameter)


WHEN = {"start_pruning_step": 6, "pruning_steps": 30, "pruning_periods": 3}
SOON = {**WHEN, "target_macs": 0.5, "average_steps": 4, "lr": 0.02}
MAKERS: dict[str, tuple[Callable[[], Net], dict[str, Any], Callable[[OTO], Any]]] = {
    "hesso": (net, {}, lambda oto: oto.hesso(first_momentum=0.9, **SOON)),
    "hesso adamw": (net, {}, lambda oto: oto.hesso(variant="adamw", **SOON)),
    "hesso as published": (net, {}, lambda oto: oto.hesso(
        saliency="hesso", lr=0.02, target_group_sparsity=0.4, **WHEN
    )),
    "path norm, uniform": (net, {"layout": "uniform"}, lambda oto: oto.hesso(saliency="path_norm", **SOON)),
    "parameters": (net, {}, lambda oto: oto.hesso(lr=0.02, target_params=0.6, **WHEN)),
    "hesso_cric": (net, {}, lambda oto: oto.hesso_cric(**SOON, sampling_steps=3, max_cycles=2)),
    "hspg": (net, {}, lambda oto: oto.hspg(**SOON, lmbda=0.5, epsilon=0.9)),
    "hspg adamw": (net, {}, lambda oto: oto.hspg(variant="adamw", **SOON, lmbda=0.5, epsilon=0.9)),
    "dhspg": (net, {}, lambda oto: oto.dhspg(**SOON)),
    "dhspg as published": (net, {}, lambda oto: oto.dhspg(
        saliency="dhspg", lr=0.02, target_group_sparsity=0.4, **WHEN
    )),
    "h2spg": (net, {"compress_mode": "erase"}, lambda oto: oto.h2spg(lr=0.02, target_segments=2, **WHEN)),
    "segments and channels": (net, {"compress_mode": "both"}, lambda oto: oto.hesso(**SOON)),
    "lhspg": (adapted, {"prune_frozen": True}, lambda oto: oto.lhspg(**SOON)),
    "lhspg taylor": (adapted, {"prune_frozen": True}, lambda oto: oto.lhspg(**SOON, saliency="taylor_first_order")),
}  # fmt: skip


@cache
def analyzed(make: Callable[[], Net], **options: Any) -> OTO:
    return OTO(make(), X, **options)


@cache
def alone(name: str, steps: int = 50, clip: float | None = None) -> tuple[nn.Module, Any]:
    """A model and its optimizer, trained in one process. Several checks have the same one, to compare with."""
    make, options, optimizer_of = MAKERS[name]
    oto = copy.deepcopy(analyzed(make, **options))
    optimizer = optimizer_of(oto)
    train(oto.model, optimizer, range(steps), clip=clip)
    return oto.model, optimizer


def spread(name: str, **how: Any) -> tuple[OTO, Any]:
    """A model that was analyzed and then sharded, and its optimizer."""
    make, options, optimizer_of = MAKERS[name]
    oto = copy.deepcopy(analyzed(make, **options))
    shard(oto.model, **how)
    return oto, optimizer_of(oto)


def equal(name: str, rank: int, **how: Any) -> None:
    """50 steps on two processes are 50 steps on one."""
    oto, optimizer = spread(name, **how)
    assert str(optimizer) and optimizer.plan()
    train(oto.model, optimizer, range(50), rank)
    other, reference = alone(name)
    require_same(oto.model, other, optimizer, reference)


def equal_after(name: str, rank: int, meta: bool = False) -> None:
    """The same where the model is analyzed once it is sharded, or before it has weights."""
    make, options, optimizer_of = MAKERS[name]
    weights = {name: p.detach().clone() for name, p in make().named_parameters()}
    model = make()
    before = OTO(model.to("meta"), X, **options) if meta else None
    shard(model)
    oto = OTO(model, X, **options) if before is None else before
    if meta:
        model.to_empty(device="cpu")
        fill(model, weights)
    optimizer = optimizer_of(oto)
    train(model, optimizer, range(50), rank)
    other, reference = alone(name)
    require_same(model, other, optimizer, reference)


def fill(model: nn.Module, weights: dict[str, Tensor]) -> None:
    from torch.distributed.tensor import distribute_tensor

    for name, p in model.named_parameters():
        with torch.no_grad():
            p.copy_(distribute_tensor(weights[name], p.device_mesh, p.placements))  # type: ignore[attr-defined]


def around_a_step(rank: int) -> None:
    """Parameters that stay whole after a forward, clipping by the norm of all, two batches a step, forwards between."""
    from torch.utils.checkpoint import checkpoint

    other, reference = alone("hesso", clip=0.5)
    oto, optimizer = spread("hesso", reshard_after_forward=False)
    model: Any = oto.model
    for block in model.blocks:
        own = block.forward
        block.forward = lambda x, own=own: checkpoint(own, x, use_reentrant=False)
    for n in range(50):
        optimizer.zero_grad()
        x, y = batch(n, rank)
        for last in (False, True):
            model.set_requires_gradient_sync(last)
            (nn.functional.mse_loss(model(x), y) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if n % 7 == 0:
            with torch.no_grad():
                model(x)  # after which the outermost module holds whole parameters
    require_same(model, other, optimizer, reference)


def several_rates(rank: int) -> None:
    """DHSPG with a learning rate for what one process lacks, and another for the rest: both take their mean."""

    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(nn.Linear(12, 1), nn.Linear(1, 12))
            self.up, self.down = nn.Linear(12, 8), nn.Linear(8, 1)
            self.scale = nn.Parameter(torch.ones(1, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = (x + self.blocks(x)).mean(1)
            y: Tensor = self.down(torch.relu(self.up(x)) * self.scale)
            return y

    torch.manual_seed(1)
    model = Short().double()
    made = []
    for net in (model, copy.deepcopy(model)):
        oto = OTO(net, X)
        if net is model:
            shard(net)
            assert net.scale.to_local().numel() == (8 if rank == 0 else 0)  # type: ignore[operator]
        rates = {True: 0.01, False: 0.02}
        groups = [
            {"params": [(n, p) for n, p in net.named_parameters() if (n == "scale") == own], "lr": rates[own]}
            for own in rates
        ]
        optimizer = oto.dhspg(params=groups, lr=0.02, target_macs=0.8, lmbda=0.1, warm_up_steps=0, **WHEN)
        train(net, optimizer, range(50), rank if net is model else None)
        made.append((net, optimizer))
    require_same(made[0][0], made[1][0], made[0][1], made[1][1])


def in_bfloat16(rank: int) -> None:
    """Forwards in bfloat16, shards in float32: every process chooses the same, and zeros stay zero."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    make, _, optimizer_of = MAKERS["hesso adamw"]
    model = make().float()
    oto = OTO(model, X.float())
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer = optimizer_of(oto)
    for n in range(50):
        optimizer.zero_grad()
        x, y = (t.float() for t in batch(n, rank))
        nn.functional.mse_loss(model(x).float(), y).backward()
        optimizer.step()
    require_agreement(model, optimizer)
    assert all(weight.dtype == torch.float32 for weight in full(model).values())


def hybrid(rank: int) -> None:
    """HSDP: replicas of shards. Two processes are two replicas, or two shards, of a mesh of two dimensions."""
    from torch.distributed.device_mesh import init_device_mesh

    for shape in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
        equal("hesso", rank, mesh=mesh)


def small_sums_only(rank: int) -> None:
    """What a choice and a step of a half-space send beside plain training: sums, a number per atom."""
    from oto._torch import TorchDispatchMode
    from oto._torch import tree_leaves as leaves_of

    class Sent(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[tuple[str, int]] = []

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(op)
            if "c10d" in name:
                sizes = [t.numel() for t in leaves_of((args, kwargs)) if isinstance(t, Tensor)]
                self.calls.append((name, max(sizes, default=0)))
            return op(*args, **(kwargs or {}))

    for name in ("hesso", "hspg"):
        oto, optimizer = spread(name)
        found = []
        for n in range(40):
            train_without_step(oto.model, optimizer, n, rank)
            with Sent() as sent:
                optimizer.step()
            found.append(sent.calls)
            assert all("allreduce" in call and size <= optimizer.num_atoms for call, size in sent.calls), sent.calls
        if name == "hesso":
            # <x, g> is averaged over four steps; a choice asks for norms, too, and whether there are gradients
            assert [len(calls) for calls in found[:8]] == [0, 0, 0, 1, 1, 1, 4, 0]
            assert sum(map(len, found[36:])) == 0, "once pruning is over nothing is sent"
        else:
            assert [len(calls) for calls in found[11:15]] == [1, 1, 2, 2], "norms before a step, and products after it"


def train_without_step(model: nn.Module, optimizer: Any, n: int, rank: int) -> None:
    optimizer.zero_grad()
    x, y = batch(n, rank)
    nn.functional.mse_loss(model(x), y).backward()


def made_slim(rank: int) -> None:
    """The slim model is that of one process; it is sharded again and trained."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    other, _ = alone("hesso")
    analysis = copy.deepcopy(analyzed(net))
    small = analysis.construct_subnet(model=other)
    oto, optimizer = spread("hesso")
    train(oto.model, optimizer, range(50), rank)
    with torch.no_grad():
        oto.model(X)
    before, ids = full(oto.model), [id(p) for p in oto.model.parameters()]
    train_without_step(oto.model, optimizer, 0, rank)
    kinds = [type(m) for m in oto.model.modules()]
    folder = FOLDER / "slim"
    subnet = oto.construct_subnet(folder)
    assert [type(m) for m in oto.model.modules()] == kinds and ids == [id(p) for p in oto.model.parameters()]
    assert subnet.path == folder and subnet.max_error < CLOSE and subnet.cost_after == small.cost_after
    assert type(subnet.model) is Net and str(subnet) and repr(subnet)
    for name, p in small.model.named_parameters():
        mine = subnet.model.get_parameter(name)
        assert mine.shape == p.shape and mine.is_meta == (rank > 0)
        assert rank > 0 or (mine - p).abs().max() <= CLOSE
    optimizer.step()  # training may go on: the shards are as they were, with their gradients
    assert any((full(oto.model)[name] != p).any() for name, p in before.items())
    state = subnet.model.state_dict() if rank == 0 else {}
    shard(subnet.model)
    set_model_state_dict(subnet.model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    plain = torch.optim.SGD(subnet.model.parameters(), lr=0.02)
    train(subnet.model, plain, range(50, 53), rank)
    alone_again = torch.optim.SGD(small.model.parameters(), lr=0.02)
    train(small.model, alone_again, range(50, 53))
    for name, p in full(subnet.model).items():
        assert (p - small.model.get_parameter(name)).abs().max() <= CLOSE
    loaded = oto_load(folder)
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in small.model.named_parameters()}


def oto_load(folder: Path) -> nn.Module:
    import oto

    return oto.load_subnet(folder, net())


def refused_slim(rank: int) -> None:
    """What the first process cannot make, every process says."""
    oto, _ = spread("hesso")
    with pytest.raises(OTOError) as said:
        oto.construct_subnet(emitter="config")
    assert rank == 0 or "the first process" in str(said.value)
    oto.random_set_zero_groups(0.4)
    zeros = {name: int((p == 0).sum()) for name, p in full(oto.model).items()}
    other = copy.deepcopy(analyzed(net))
    other.random_set_zero_groups(0.4)
    assert zeros == {name: int((p == 0).sum()) for name, p in other.model.named_parameters()}


def refused(rank: int) -> None:
    """Each says what to do."""
    oto, optimizer = spread("hesso")
    with pytest.raises(ShrinkError, match="shard=f"):
        oto.shrink(optimizer)
    with pytest.raises(TargetError, match="cannot be reached"):  # the first process measures, and says so to all
        oto.hesso(lr=0.1, target_latency_ms=1e-3)
    odd = oto.hesso(**SOON, saliency=lambda entries: entries.weights[0].flatten(1).sum(1))
    with pytest.raises(OptionError, match=r"spread over processes[^$]*weight_sq"):
        train(oto.model, odd, range(8), rank)
    late = copy.deepcopy(analyzed(net))
    early = late.hesso(**SOON)
    shard(late.model)
    with pytest.raises(ModelChangedError, match=r"then fully_shard[^$]*then the optimizer"):
        train(late.model, early, range(2), rank)
    assert oto.preview(target_macs=0.5)
    with pytest.raises(OptionError, match="before the model is sharded"):
        oto.preview(target_macs=0.5, batches=[batch(0)], loss=lambda model, b: model(b[0]).sum())
    unmade = copy.deepcopy(analyzed(net))
    shard(unmade.model)
    with pytest.raises(OptionError, match="before the model is sharded"):
        unmade.mark_unprunable_by_knowledge(batches=[batch(0)], loss=lambda model, b: model(b[0]).sum())
    from torch.distributed.fsdp import FullyShardedDataParallel

    for orig in (False, True):
        model = net()
        oto = copy.deepcopy(analyzed(net))
        with pytest.raises(OptionError, match=r"FSDP1[^$]*fully_shard"):
            OTO(FullyShardedDataParallel(model, use_orig_params=orig, device_id=torch.device("cpu")), X)
        FullyShardedDataParallel(oto.model.blocks, use_orig_params=orig, device_id=torch.device("cpu"))
        oto.model.blocks = FullyShardedDataParallel(
            oto.model.blocks, use_orig_params=orig, device_id=torch.device("cpu")
        )
        with pytest.raises(OptionError, match=r"FSDP1[^$]*fully_shard"):
            oto.hesso(**SOON)


def saved(model: nn.Module, optimizer: Any, folder: Path, **how: Any) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder, **how)


def loaded(model: nn.Module, optimizer: Any, folder: Path, **how: Any) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder, **how)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


def checkpoints(name: str, rank: int, steps: tuple[int, ...] = (3, 12, 38)) -> None:
    """Saved before, in and after a period, and loaded by two processes and by one: the same bits, to the end."""
    through, optimizer = spread(name)
    done, then = 0, {}
    for at in steps:
        train(through.model, optimizer, range(done, at), rank)
        done = at
        saved(through.model, optimizer, FOLDER / f"{name} {at}")
        then[at] = full(through.model), optimizer.atoms
    train(through.model, optimizer, range(done, 40), rank)
    end = full(through.model)
    for at in steps:
        again, resumed = spread(name)
        loaded(again.model, resumed, FOLDER / f"{name} {at}")
        assert resumed.clock == at and torch.equal(resumed.atoms, then[at][1])
        assert all(torch.equal(p, then[at][0][key]) for key, p in full(again.model).items())
        if at == steps[1]:
            train(again.model, resumed, range(at, 40), rank)
            assert all(torch.equal(p, end[key]) for key, p in full(again.model).items())
            assert torch.equal(resumed.atoms, optimizer.atoms)
    oto = copy.deepcopy(analyzed(net))
    alone_again = MAKERS[name][2](oto)
    loaded(oto.model, alone_again, FOLDER / f"{name} {steps[1]}", no_dist=True)
    train(oto.model, alone_again, range(steps[1], 40))
    require_same(through.model, oto.model, optimizer, alone_again)


def saved_on_a_walk(rank: int) -> None:
    oto, optimizer = spread("hesso_cric")
    train(oto.model, optimizer, range(12), rank)
    with pytest.raises(OTOError, match=r"walk is under way[^$]*in 1 steps"):
        optimizer.state_dict()
    train(oto.model, optimizer, range(12, 13), rank)
    assert optimizer.state_dict()


class Parallel(nn.Module):
    """Attention and a gated FFN whose sizes are read off the tensors, as those of models that run tensor parallel."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = (nn.Linear(6, 12, bias=False) for _ in range(2))
        self.out = nn.Linear(12, 6)
        self.gate, self.up = (nn.Linear(6, 10) for _ in range(2))
        self.down = nn.Linear(10, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, v = (own(h).view(*x.shape[:2], -1, 3).transpose(1, 2) for own in (self.q, self.v))
        mixed = torch.softmax(q @ q.transpose(-1, -2), -1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))
        x = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        y: Tensor = self.head(x.mean(1))
        return y


def parallel() -> Parallel:
    torch.manual_seed(0)
    return Parallel().double()


class Beside(nn.Module):
    """A frozen layer with an adapter beside it, as peft has them: tensor parallel plans name each of the three."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + 0.5 * self.b(self.a(x))
        return y


def adapted_parallel() -> Parallel:
    model = parallel()
    for name in ("gate", "up", "down"):
        setattr(model, name, Beside(getattr(model, name)))
    return model.double()


def train_parallel(model: nn.Module, optimizer: Any, half: int | None = None) -> None:
    for n in range(50):
        optimizer.zero_grad()
        x, y = batch(n, half)
        nn.functional.mse_loss(model(x[..., :6]), y).backward()
        optimizer.step()


def parallelize(model: nn.Module, mesh: Any) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    columns, rows = ["q", "v", "gate", "up"], ["out", "down"]
    if isinstance(model.gate, Beside):  # the narrow side of an adapter is in every process
        columns = ["q", "v", *(f"{name}.{part}" for name in ("gate", "up") for part in ("base", "b"))]
        rows = ["out", "down.base", "down.a"]
    plan: dict[str, Any] = {name: ColwiseParallel() for name in columns}
    parallelize_module(model, mesh, plan | {name: RowwiseParallel() for name in rows})


def in_parallel(rank: int, names: tuple[str, ...] = ("hesso",)) -> None:
    """Tensor parallel: whole heads and columns of the FFN in each process, analyzed before and after."""
    from torch.distributed.device_mesh import init_device_mesh

    for name in names:
        make, options = (adapted_parallel if name.startswith("lhspg") else parallel), MAKERS[name][1]
        first = OTO(make(), X[..., :6], tensor_parallel=2, **options)
        oto = copy.deepcopy(first)
        other, reference = oto.model, MAKERS[name][2](oto)
        train_parallel(other, reference)
        for after in (False, True):
            oto = copy.deepcopy(first)
            model = oto.model
            parallelize(model, init_device_mesh("cpu", (RANKS,)))
            oto = OTO(model, X[..., :6], tensor_parallel=2, **options) if after else oto
            optimizer = MAKERS[name][2](oto)
            train_parallel(model, optimizer)
            require_same(model, other, optimizer, reference)
        small, subnet = copy.deepcopy(first).construct_subnet(model=other), oto.construct_subnet()
        assert subnet.cost_after == small.cost_after
        even = [len(subnet.kept[group.name]) for group in optimizer.node_groups if group.divisor == 2]
        assert even and all(count % 2 == 0 for count in even)


def in_two_dimensions(rank: int) -> None:
    """Four processes: shards of two tensor parallel parts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    first = OTO(parallel(), X[..., :6])
    for name in ("hesso", "hspg"):
        oto, alone_too = copy.deepcopy(first), copy.deepcopy(first)
        reference = MAKERS[name][2](alone_too)
        train_parallel(alone_too.model, reference)
        parallelize(oto.model, mesh["tensor"])
        fully_shard(oto.model, mesh=mesh["data"])
        optimizer = MAKERS[name][2](oto)
        train_parallel(oto.model, optimizer, mesh.get_local_rank("data"))
        require_same(oto.model, alone_too.model, optimizer, reference)


def sharded_anew(rank: int) -> None:
    """A checkpoint in the middle of a period goes from two shards to four, to one."""
    from torch.distributed.device_mesh import init_device_mesh

    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    oto, optimizer = spread("hspg", mesh=two)
    for n in range(12):
        train_without_step(oto.model, optimizer, n, rank % 2)
        optimizer.step()
    saved(oto.model, optimizer, FOLDER / "two")
    then = full(oto.model)
    four, of_four = spread("hspg")
    loaded(four.model, of_four, FOLDER / "two")
    saved(four.model, of_four, FOLDER / "four")
    one = copy.deepcopy(analyzed(net))
    of_one = MAKERS["hspg"][2](one)
    loaded(one.model, of_one, FOLDER / "four", no_dist=True)
    for other in (four.model, one.model):
        assert all(torch.equal(p, then[name]) for name, p in full(other).items())
    for own in (of_four, of_one):
        assert own.clock == 12 and torch.equal(own.atoms, optimizer.atoms)
        state = {name: own.state[p] for name, p in own.parameters().items() if p in own.state}
        assert state.keys() == {n for n, p in optimizer.parameters().items() if p in optimizer.state}
    require_moments(optimizer, of_four)
    require_moments(optimizer, of_one)


def shrunk_in_replicas(rank: int) -> None:
    """HSDP on four processes: a model and an average that get smaller in the middle are those of one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.optim.swa_utils import AveragedModel

    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    made = []
    for mesh in (two, None):
        oto = copy.deepcopy(analyzed(net))
        average: Any = AveragedModel(oto.model)
        for model in (oto.model, average.module) if mesh is not None else ():
            shard(model, mesh=mesh)
        optimizer = MAKERS["hesso adamw"][2](oto)
        for n in range(28):
            if n == 20:
                oto.shrink(optimizer, shard=partial(shard, mesh=mesh), averages=[average])
            optimizer.zero_grad()
            x, y = batch(n) if mesh is None else (part[rank : rank + 1] for part in batch(n))
            nn.functional.mse_loss(oto.model(x), y).backward()
            optimizer.step()
            average.update_parameters(oto.model)
        made.append((oto, optimizer, average.module))
    (oto, optimizer, average), (other, reference, plain) = made
    for mine, theirs in ((full(oto.model), full(other.model)), (full(average), full(plain))):
        for name, p in theirs.items():
            assert (mine[name] - p).abs().max() <= CLOSE, name
    assert torch.equal(agreed_atoms(optimizer), reference.atoms) and optimizer.num_removed > 0
    subnet = oto.construct_subnet()
    assert subnet.cost_after == other.construct_subnet().cost_after and subnet.model.head.weight.is_meta == (rank > 0)


def require_moments(optimizer: Any, other: Any) -> None:
    from oto.shards import gathered_tensor

    theirs = other.parameters()
    for name, p in optimizer.parameters().items():
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                assert torch.equal(gathered_tensor(value), gathered_tensor(other.state[theirs[name]][key])), (name, key)


def nothing_whole_is_kept(rank: int) -> None:
    """After sharding nothing holds a whole parameter, and no step gathers one beyond what a forward does."""
    oto = copy.deepcopy(analyzed(net))
    before = [weakref.ref(p) for p in oto.model.parameters()]
    shard(oto.model)
    gc.collect()
    assert not any(p() is not None for p in before)
    optimizer = MAKERS["hspg"][2](oto)
    train(oto.model, optimizer, range(10), rank)
    penalized = optimizer.penalized(9)
    penalized.remember_()
    copied = penalized.copied.nbytes
    here = sum(p.to_local().nbytes for p in oto.model.parameters())
    assert 0 < copied <= here, "the copy of a half-space is of what this process has"


Check = Callable[[int], None]


def named(names: Iterable[str]) -> dict[str, Check]:
    return {name: partial(equal, name) for name in names}


QUICK = ("hesso adamw", "hesso_cric", "hspg", "dhspg")
CHECKS: dict[str, Check] = {
    **named(QUICK),
    "after sharding": partial(equal_after, "lhspg taylor"),
    "around a step": around_a_step,
    "several rates": several_rates,
    "small sums only": small_sums_only,
    "nothing whole is kept": nothing_whole_is_kept,
    "checkpoints": partial(checkpoints, "hspg"),
    "saved on a walk": saved_on_a_walk,
    "in parallel": in_parallel,
    "made slim": made_slim,
    "refused slim": refused_slim,
    "refused": refused,
}
LONG: dict[str, Check] = {
    **named(MAKERS.keys() - QUICK),
    "from meta": partial(equal_after, "hspg adamw", meta=True),
    "in bfloat16": in_bfloat16,
    "hybrid": hybrid,
    "checkpoints of hesso adamw": partial(checkpoints, "hesso adamw"),
    "checkpoints of hesso_cric": partial(checkpoints, "hesso_cric", steps=(8, 13, 38)),
    "in parallel": partial(in_parallel, names=("hesso", "hspg", "dhspg", "hesso_cric", "lhspg", "lhspg taylor")),
}
FOUR: dict[str, Check] = {
    "in two dimensions": in_two_dimensions,
    "sharded anew": sharded_anew,
    "shrunk in replicas": shrunk_in_replicas,
}


def work(rank: int, folder: str, checks: dict[str, Check], ranks: int) -> None:
    with open(f"{folder}/{rank}.txt", "w") as said:
        os.dup2(said.fileno(), sys.stderr.fileno())
    faulthandler.enable()
    store = begin(rank, folder, ranks)
    global FOLDER
    FOLDER = Path(folder)
    heard: dict[str, str] = {}
    for name, check in checks.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                check(rank)
                heard[name] = ""
            except BaseException:
                heard[name] = traceback.format_exc(limit=-6)
        dist.barrier()
    torch.save(heard, f"{folder}/{rank}.pt")
    store.set(f"done{rank}", "")
    store.wait([f"done{other}" for other in range(ranks)])
    os._exit(0)


def heard(
    checks: dict[str, Check], tmp_path_factory: pytest.TempPathFactory, ranks: int = RANKS
) -> dict[str, list[str]]:
    """What each process says of each check. The workers of one session of xdist start the processes once."""
    base = tmp_path_factory.getbasetemp()
    file = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"{'+'.join(checks)[:99]} {ranks}.pt"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            folder = in_processes(partial(work, checks=checks, ranks=ranks), tmp_path_factory, ranks)
            said = [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
            torch.save({name: [own[name] for own in said] for name in said[0]}, file)
        found: dict[str, list[str]] = torch.load(file)
        return found


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return heard(CHECKS, tmp_path_factory)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return heard(LONG, tmp_path_factory)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return heard(FOUR, tmp_path_factory, 4)


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name: str, quick: dict[str, list[str]]) -> None:
    assert quick[name] == ["", ""]


@pytest.mark.zoo
@pytest.mark.parametrize("name", LONG)
def test_two_processes_at_length(name: str, long: dict[str, list[str]]) -> None:
    assert long[name] == ["", ""]


@pytest.mark.zoo
@pytest.mark.parametrize("name", FOUR)
def test_four_processes(name: str, four: dict[str, list[str]]) -> None:
    assert four[name] == ["", "", "", ""]


def test_parameters_that_deepspeed_holds_elsewhere_are_refused() -> None:
    model = net()
    oto = copy.deepcopy(analyzed(net))
    for own in (model, oto.model):
        p = own.head.weight  # type: ignore[union-attr]
        p.data, p.ds_id = torch.empty(0, dtype=p.dtype), 7  # type: ignore[union-attr]
    with pytest.raises(OptionError, match=r"head.weight[^$]*DeepSpeed \(ZeRO-3\)[^$]*fully_shard"):
        OTO(model, X)
    with pytest.raises(OptionError, match=r"head.weight[^$]*DeepSpeed \(ZeRO-3\)[^$]*fully_shard"):
        oto.hesso(**SOON)


@pytest.mark.parametrize("cuts", [(), (Cut(1, 12, 1, 0, 12),), (Cut(1, 4, 3, 0, 4),), (Cut(3, 4, 1, 1, 2),)])
@pytest.mark.parametrize("part", [slice(0, 5), slice(5, 12), slice(12, 12), slice(3, 12, 4)])
def test_parts_are_the_rows_of_atoms_that_are_here(
    cuts: tuple[Cut, ...], part: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever rows a process has, all parts of an atom are found in them, by the view that one process would take."""
    piece = Slice("p", 1, cuts)
    whole = torch.arange(24.0).reshape(2, 12) + 1
    size = len(piece.of(whole))
    index = torch.arange(12)[part]
    monkeypatch.setattr(sharded, "_owners", sharded._owners.__wrapped__)
    there: Any = SimpleNamespace(index=lambda dim, dims, length: index)
    for rows in (None, torch.arange(size)[::2]):
        view, chosen, begin, atoms = sharded.parts(piece, whole[:, index], there, rows, size)
        own = torch.arange(len(view)) if chosen is None else chosen
        atom = begin + own if atoms is None else atoms[own]
        total = torch.zeros(size).index_add_(0, atom, view[own].sum(1))
        kept = torch.zeros_like(whole)
        kept[:, index] = whole[:, index]
        expected = piece.of(kept).reshape(size, -1).sum(1)
        if rows is not None:
            expected[[a for a in range(size) if a not in rows]] = 0
        assert torch.equal(total, expected)
