"""What surrounds FSDP2 in training: its policies, compilation, checkpoints written meanwhile, accelerate, the Trainer.

As in ``test_sharded``, whose network and optimizers these are, the processes are started once.
"""

from __future__ import annotations

import copy
import os
import shutil
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from oto import OTO
from oto.errors import ShrinkError, TargetError
from oto.shards import _Failure, is_sharded, sharded_names
from tests.optim import test_sharded as sharded
from tests.optim.test_distributed import GLOO, RANKS
from tests.optim.test_sharded import (
    MAKERS,
    Check,
    agreed_atoms,
    alone,
    analyzed,
    batch,
    equal,
    full,
    heard,
    loaded,
    net,
    parallel,
    require_agreement,
    require_same,
    saved,
    shard,
    spread,
    train,
)

pytestmark = [GLOO, pytest.mark.filterwarnings("default:a process was killed")]


def offloaded(rank: int) -> None:
    """Shards on the CPU; pinned memory needs an accelerator, as does the way from there."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    equal("hesso adamw", rank, offload_policy=CPUOffloadPolicy(pin_memory=False))


def compiled(rank: int, backend: str = "aot_eager", whole: bool = False) -> None:
    """Blocks are compiled before they are sharded, as torchtitan does, or all of it afterwards."""
    oto = copy.deepcopy(analyzed(net))
    for block in oto.model.blocks if not whole else ():  # type: ignore[union-attr]
        block.compile(backend=backend)
    shard(oto.model)
    optimizer = MAKERS["hesso"][2](oto)
    train(torch.compile(oto.model, backend=backend) if whole else oto.model, optimizer, range(50), rank)
    other, reference = alone("hesso")
    require_same(oto.model, other, optimizer, reference)
    subnet = oto.construct_subnet()
    assert type(subnet.model) is sharded.Net and subnet.max_error < 1e-10


def all_at_once(rank: int) -> None:
    """bfloat16, offloading, compiled and checkpointed blocks, two batches a step, clipping: zeros and choices agree."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
    from torch.utils.checkpoint import checkpoint

    model: Any = net().float()
    oto = OTO(model, sharded.X.float())
    for block in model.blocks:
        own = block.forward
        block.forward = lambda x, own=own: checkpoint(own, x, use_reentrant=False)
        block.compile(backend="eager")
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, mp_policy=half, offload_policy=CPUOffloadPolicy(pin_memory=False), reshard_after_forward=False)
    soon = {"start_pruning_step": 4, "pruning_steps": 9, "pruning_periods": 3, "average_steps": 2}
    optimizer = oto.hspg(variant="adamw", **{**sharded.SOON, **soon}, lmbda=0.5, epsilon=0.9)
    for n in range(14):
        optimizer.zero_grad()
        x, y = (t.float() for t in batch(n, rank))
        for last in (False, True):
            model.set_requires_gradient_sync(last)
            (nn.functional.mse_loss(model(x).float(), y) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    require_agreement(model, optimizer)


def saved_meanwhile(rank: int) -> None:
    """A checkpoint is written while training goes on, and holds what was there when it was asked for."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    oto, optimizer = spread("hspg adamw")
    train(oto.model, optimizer, range(12), rank)
    then, atoms = full(oto.model), optimizer.atoms.clone()
    weights, state = get_state_dict(oto.model, optimizer)
    folder = sharded.FOLDER / "meanwhile"
    # training sends by the group of all processes; two threads in one group would take each other's messages
    writing: Any = dcp.async_save(
        {"model": weights, "optimizer": state}, checkpoint_id=folder, process_group=dist.new_group(backend="gloo")
    )
    train(oto.model, optimizer, range(12, 18), rank)
    writing.result()
    train(oto.model, optimizer, range(18, 24), rank)
    end = full(oto.model)
    again, resumed = spread("hspg adamw")
    loaded(again.model, resumed, folder)
    assert resumed.clock == 12 and torch.equal(resumed.atoms, atoms)
    assert all(torch.equal(p, then[name]) for name, p in full(again.model).items())
    train(again.model, resumed, range(12, 24), rank)
    assert all(torch.equal(p, end[name]) for name, p in full(again.model).items())


def shard_on_the_cpu() -> None:
    """Let accelerate shard here, too: where there is no accelerator it leaves ``fsdp_plugin`` aside without a word."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    rank = dist.get_rank()
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{RANKS}", "LOCAL_WORLD_SIZE": f"{RANKS}"}
    made = AcceleratorState.__init__
    if getattr(made, "here", False):
        return

    def init(state: Any, *args: Any, **options: Any) -> None:
        made(state, *args, **options)
        if (plugin := options.get("fsdp_plugin")) is not None:
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    init.here = True  # type: ignore[attr-defined]
    AcceleratorState.__init__ = init


def by_accelerate(rank: int, kind: str = "SHARDED_STATE_DICT") -> None:
    """``prepare`` after the optimizer was made, ``save_state`` in a period, ``load_state``: the same bits."""
    shard_on_the_cpu()
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import FullyShardedDataParallelPlugin

    AcceleratorState._reset_state(True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Attention"],
        state_dict_type=kind,
    )
    accelerator: Any = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert accelerator.is_fsdp2

    def prepared() -> Any:
        oto = copy.deepcopy(analyzed(net))
        return oto, *accelerator.prepare(oto.model, MAKERS["hesso adamw"][2](oto))

    oto, model, optimizer = prepared()
    train(model, optimizer, range(12), rank)
    accelerator.save_state(str(sharded.FOLDER / kind))
    train(model, optimizer, range(12, 28), rank)
    end = full(model)
    other, reference = alone("hesso adamw", steps=28)
    require_same(model, other, optimizer.optimizer, reference)
    assert oto.construct_subnet().max_error < 1e-10
    accelerator.free_memory()
    _, model, optimizer = prepared()
    accelerator.load_state(str(sharded.FOLDER / kind))
    assert optimizer.optimizer.clock == 12
    train(model, optimizer, range(12, 28), rank)
    assert all(torch.equal(p, end[name]) for name, p in full(model).items())
    accelerator.free_memory()


def by_the_trainer(rank: int) -> None:
    """``fsdp_config={"version": 2}``; a run that is resumed from a checkpoint in a period ends with the same bits."""
    shard_on_the_cpu()
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainingArguments

    pairs = [batch(n) for n in range(16)]
    rows = [{"x": x, "labels": y} for xs, ys in pairs for x, y in zip(xs, ys, strict=True)]
    arguments = {
        "max_steps": 16,
        "save_steps": 7,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["Attention"],
            "state_dict_type": "SHARDED_STATE_DICT",
        },
        "remove_unused_columns": False,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }

    def trained(resume: str | None = None) -> tuple[OTO, Any]:
        AcceleratorState._reset_state(True)
        oto = copy.deepcopy(analyzed(net))
        optimizer = oto.hesso(
            variant="adamw", lr=0.01, target_params=0.7, start_pruning_step=4, pruning_steps=8, pruning_periods=2
        )
        trainer: Any = Trainer(
            oto.model,
            TrainingArguments(str(sharded.FOLDER / "trainer"), **arguments),
            train_dataset=rows,  # type: ignore[arg-type]
            compute_loss_func=lambda y, labels, num_items_in_batch=None: nn.functional.mse_loss(y, labels),
        )
        trainer.optimizer = optimizer  # with fsdp the Trainer refuses optimizers=
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.optimizer.optimizer is optimizer
        return oto, optimizer

    oto, optimizer = trained()
    assert optimizer.clock == 16 and optimizer.progress.over and optimizer.num_pruned > 0
    assert sharded_names(oto.model)
    end = full(oto.model)
    again, resumed = trained(str(sharded.FOLDER / "trainer" / "checkpoint-7"))
    assert torch.equal(resumed.atoms, optimizer.atoms) and resumed.clock == 16
    assert all(torch.equal(p, end[name]) for name, p in full(again.model).items())
    subnet = oto.construct_subnet()
    assert subnet.cost_after.params < 0.75 * subnet.cost_before.params


def timed(rank: int) -> None:
    """A latency target: the first process measures, on a clock that the test sets, and all choose by that."""
    from oto.slim.latency import Timer

    calls: list[bool] = []

    def milliseconds(timer: Timer, counts: Any) -> float:
        calls.append(not any(map(is_sharded, timer.model.parameters())))
        return float(1 + counts.sum())

    plain = Timer.__call__
    Timer.__call__ = milliseconds  # type: ignore[method-assign, assignment]
    try:
        oto = copy.deepcopy(analyzed(net))
        shard(oto.model)
        goal = 0.7 * float(1 + oto._analysis.costs.sizes.sum())
        optimizer = oto.hesso(**MILLISECONDS, target_latency_ms=goal)
        assert (len(calls) > 1 and all(calls)) if rank == 0 else not calls
        assert sharded_names(oto.model)
        train(oto.model, optimizer, range(37), rank)
        agreed_atoms(optimizer)
        assert 0.9 * goal < optimizer.progress.cost <= goal, (goal, optimizer.progress)
        assert "ms" in str(oto.preview(target_latency_ms=goal))
        Timer.__call__ = broken  # type: ignore[method-assign, assignment]
        with pytest.raises(ZeroDivisionError if rank == 0 else TargetError):
            oto.hesso(**MILLISECONDS, target_latency_ms=1.0)
    finally:
        Timer.__call__ = plain  # type: ignore[method-assign]


def shrunk(rank: int, name: str = "hesso adamw", at: tuple[int, ...] = (20,), end: int = 28) -> None:
    """Pruned atoms leave in the middle of training: as in one process. Blocks and model are sharded anew."""
    oto, optimizer = spread(name)
    make, options, optimizer_of = MAKERS[name]
    other = copy.deepcopy(analyzed(make, **options))
    reference = optimizer_of(other)
    model, done = oto.model, 0
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
    with pytest.raises(ShrinkError, match=r"spread over[^$]*shard=f"):
        oto.shrink(optimizer)
    for step in (*at, end):
        train(model, optimizer, range(done, step), rank)
        train(other.model, reference, range(done, step))
        if step in at:
            with pytest.raises(ShrinkError, match="has not spread"):
                oto.shrink(optimizer, shard=lambda model: None)
            before = sum(p.numel() for p in model.parameters())
            assert oto.shrink(optimizer, shard=shard) is model and optimizer.base.state is optimizer.state
            other.shrink(reference)
            assert sum(p.numel() for p in model.parameters()) < before
        done = step
    assert schedule.optimizer is optimizer and sharded_names(model) and optimizer.num_removed > 0
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in other.model.named_parameters()}
    assert type(model).__mro__[1:] == type(shard(net())).__mro__[1:]
    require_same(model, other.model, optimizer, reference)
    subnet = oto.construct_subnet(sharded.FOLDER / f"shrunk {name}")
    assert subnet.cost_after == other.construct_subnet().cost_after


def llama_in_bfloat16(rank: int) -> None:
    """A class of transformers whose config states its sizes: half precision, smaller in between, a stock folder."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=32))
    text = torch.randint(64, (30, 2, 2, 12), generator=torch.Generator().manual_seed(0))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def spread_out(model: Any) -> None:
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=half)
        fully_shard(model, mp_policy=half)

    oto = OTO(model, {"input_ids": text[0, 0]}, layout="uniform")
    spread_out(model)
    optimizer = oto.hesso(
        variant="adamw", lr=1e-3, target_macs=0.6, start_pruning_step=2, pruning_steps=24, pruning_periods=3
    )
    for n, ids in enumerate(text[:, rank]):
        if n == 15:
            before = sum(p.numel() for p in model.parameters())
            oto.shrink(optimizer, shard=spread_out)
            assert sum(p.numel() for p in model.parameters()) < before
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    require_agreement(model, optimizer)
    subnet = oto.construct_subnet()
    assert subnet.cost_after.macs <= 0.6 * subnet.cost_before.macs and subnet.emitter == "config"
    if rank == 0:
        subnet.save_pretrained(sharded.FOLDER / "stock")
        slim = AutoModelForCausalLM.from_pretrained(sharded.FOLDER / "stock")
        ids = text[0, 0]
        assert torch.allclose(slim(ids).logits, subnet.model(ids).logits, atol=1e-6)


def averaged(rank: int) -> None:
    """Averages of weights follow the model, spread over processes as it is, and are those of one process."""
    made = []
    for own in (rank, None):
        oto = copy.deepcopy(analyzed(net))
        average: Any = AveragedModel(oto.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        for model in (oto.model, average.module) if own is not None else ():
            shard(model)
        optimizer = MAKERS["hesso adamw"][2](oto)
        for n in range(40):
            if n == 20:
                oto.shrink(optimizer, shard=shard, averages=[average])
            train(oto.model, optimizer, range(n, n + 1), own)
            average.update_parameters(oto.model)
        optimizer.zero_pruned_in(average)
        made.append((average, optimizer, oto.construct_subnet(model=average)))
    (average, optimizer, subnet), (other, reference, small) = made
    assert len(sharded_names(average.module)) == len(list(average.module.parameters()))
    require_same(average.module, other.module, optimizer, reference)
    assert torch.allclose(average(sharded.X), other(sharded.X), rtol=0, atol=sharded.CLOSE)
    assert subnet.cost_after == small.cost_after


def resumed_slim(rank: int) -> None:
    """A checkpoint of a shrunk model goes on with the same bits, in a run that begins with the full one."""
    oto, optimizer = spread("hesso adamw")
    train(oto.model, optimizer, range(20), rank)
    oto.shrink(optimizer, shard=shard)
    train(oto.model, optimizer, range(20, 24), rank)
    folder, like = sharded.FOLDER / "slim in a period", optimizer.state_dict()
    saved(oto.model, optimizer, folder)
    train(oto.model, optimizer, range(24, 40), rank)
    again, resumed = spread("hesso adamw")
    again.shrink(resumed, like=like, shard=shard)
    loaded(again.model, resumed, folder)
    assert resumed.clock == 24
    train(again.model, resumed, range(24, 40), rank)
    end = full(oto.model)
    assert all(torch.equal(p, end[name]) for name, p in full(again.model).items())
    one = copy.deepcopy(analyzed(net))
    of_one = MAKERS["hesso adamw"][2](one)
    one.shrink(of_one, like=like)
    loaded(one.model, of_one, folder, no_dist=True)
    train(one.model, of_one, range(24, 40))
    require_same(oto.model, one.model, optimizer, of_one)


def averages_in_vain(rank: int) -> None:
    """What is no average of this model, or is not spread like it, every process refuses; training goes on."""
    oto, optimizer = spread("hesso adamw")
    train(oto.model, optimizer, range(20), rank)
    from torch.distributed.fsdp import fully_shard

    whole, other, wrapped = net(), parallel(), AveragedModel(net())
    shard(wrapped.module)
    fully_shard(wrapped)
    with pytest.raises(ShrinkError, match=r"Net has blocks\.0\.[^$]*spread in another way[^$]*f\(average\.module\)"):
        oto.shrink(optimizer, shard=shard, averages=[whole])
    with pytest.raises(ShrinkError, match="Parallel holds no average of this"):
        oto.shrink(optimizer, shard=shard, averages=[other])
    with pytest.raises(ShrinkError, match="AveragedModel was given to fully_shard itself"):
        oto.shrink(optimizer, shard=shard, averages=[wrapped])
    train(oto.model, optimizer, range(20, 28), rank)
    require_same(oto.model, alone("hesso adamw", steps=28)[0], optimizer, alone("hesso adamw", steps=28)[1])


class Tied(nn.Module):
    """A language model whose embedding is its head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 12)
        self.blocks = nn.Sequential(*(sharded.Attention() for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 17, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.blocks(self.embed(tokens))))
        return y


def tied(rank: int) -> None:
    """Segments and channels of a model whose embedding is its head are chosen and taken out as in one process."""
    torch.manual_seed(0)
    tokens = torch.randint(17, (40, 4, 6))
    first = OTO(Tied().double(), tokens[0], compress_mode="both")
    made = []
    for own in (rank, None):
        oto = copy.deepcopy(first)
        model: Any = oto.model
        average: Any = AveragedModel(model)
        for spread_too in (model, average.module) if own is not None else ():
            shard(spread_too)
        optimizer = oto.hesso(variant="adamw", **{**sharded.SOON, "target_macs": 0.3})
        for n in range(40):
            if n == 36:  # pruning is over
                oto.shrink(optimizer, shard=shard, averages=[average])
            optimizer.zero_grad()
            x = tokens[n] if own is None else tokens[n, 2 * own : 2 * own + 2]
            nn.functional.cross_entropy(model(x[:, :-1]).mT, x[:, 1:]).backward()
            optimizer.step()
            average.update_parameters(model)
        assert all(m.embed.weight is m.head.weight for m in (model, average.module))
        made.append((oto, optimizer, average.module))
    (oto, optimizer, average), (other, reference, plain) = made
    agreed_atoms(optimizer)
    for mine, theirs in ((oto.model, other.model), (average, plain)):
        require_same(mine, theirs, optimizer, reference)
    subnet, small = oto.construct_subnet(), other.construct_subnet()
    assert len(list(small.model.parameters())) < len(list(first.model.parameters())), "a segment is gone"
    assert subnet.cost_after == small.cost_after and subnet.model.embed.weight is subnet.model.head.weight
    if rank == 0:
        for name, p in small.model.named_parameters():
            assert (subnet.model.get_parameter(name) - p).abs().max() <= sharded.CLOSE, name


class Odd(sharded.Net):
    """It holds a thing that other processes cannot have."""

    def __init__(self, thing: Any) -> None:
        super().__init__()
        self.thing = thing


class Unreadable:
    """It can be pickled, and the pickle not be read."""

    def __deepcopy__(self, memo: Any) -> Unreadable:
        return self

    def __reduce__(self) -> Any:
        return int, ("seven",)


def not_sent(rank: int) -> None:
    """A slim model that holds what cannot be sent: the first process finds that before it sends anything."""
    for thing, said in ((lambda: 7, "lambda"), (Unreadable(), "invalid literal for int")):
        torch.manual_seed(0)
        oto = OTO(Odd(thing).double(), sharded.X)
        shard(oto.model)
        optimizer = oto.hesso(lr=0.02, target_params=0.7, start_pruning_step=0, pruning_steps=2, pruning_periods=1)
        train(oto.model, optimizer, range(3), rank)
        before = full(oto.model)
        with (
            mock.patch.object(dist, "broadcast_object_list", wraps=dist.broadcast_object_list) as sent,
            pytest.raises(ShrinkError, match=rf"cannot be sent[^$]*{said}[^$]*nothing was changed") as refusal,
        ):
            oto.shrink(optimizer, shard=shard)
        (call,) = sent.call_args_list
        assert isinstance(call.args[0][0], _Failure), "the refusal is all that is sent"
        assert rank == 0 or "the first process" in str(refusal.value)
        assert all(torch.equal(p, before[name]) for name, p in full(oto.model).items())
        subnet = oto.construct_subnet()
        if rank == 0:
            assert type(subnet.model) is Odd and subnet.model.thing is thing
        else:
            assert type(subnet.model) is nn.Module and any("not sent" in n and said in n for n in subnet.notes)
        train(oto.model, optimizer, range(3, 5), rank)


def shrunk_in_vain(rank: int) -> None:
    """What the first process cannot make, every process says, and training goes on."""
    from oto import shrinking

    oto, optimizer = spread("hesso adamw")
    train(oto.model, optimizer, range(20), rank)
    plain, calls = shrinking.shrunk, []

    def failing(*args: Any) -> Any:
        calls.append(1)
        raise ZeroDivisionError

    shrinking.shrunk = failing
    try:
        with pytest.raises(ShrinkError, match="the first process" if rank else "ZeroDivisionError"):
            oto.shrink(optimizer, shard=shard)
    finally:
        shrinking.shrunk = plain
    assert len(calls) == (rank == 0)
    assert sharded_names(oto.model)
    train(oto.model, optimizer, range(20, 28), rank)
    other, reference = alone("hesso adamw", steps=28)
    require_same(oto.model, other, optimizer, reference)


MILLISECONDS = {key: value for key, value in sharded.SOON.items() if key != "target_macs"}


def broken(timer: Any, counts: Any) -> float:
    raise ZeroDivisionError


CHECKS: dict[str, Check] = {
    "timed": timed,
    "segments": partial(equal, "h2spg"),
    "shrunk": shrunk,
    "tied": tied,
    "not sent": not_sent,
    "compiled": compiled,
    "all at once": all_at_once,
    "by the Trainer": by_the_trainer,
}
LONG: dict[str, Check] = {
    "offloaded": offloaded,
    "saved meanwhile": saved_meanwhile,
    "by accelerate": by_accelerate,
    "shrunk in vain": shrunk_in_vain,
    "averaged": averaged,
    "averages in vain": averages_in_vain,
    "Llama in bfloat16": llama_in_bfloat16,
    "resumed slim": resumed_slim,
    "shrunk twice": partial(shrunk, at=(20, 40), end=50),
    "shrunk, hspg": partial(shrunk, name="hspg adamw", at=(40,), end=50),
    "shrunk, dhspg": partial(shrunk, name="dhspg", at=(40,), end=50),
    "shrunk, segments": partial(shrunk, name="h2spg", at=(40,), end=50),
    "shrunk, segments and channels": partial(shrunk, name="segments and channels", at=(20, 40), end=50),
    "compiled whole": partial(compiled, whole=True),
    **({"compiled by inductor": partial(compiled, backend="inductor")} if shutil.which("g++") else {}),
    "by accelerate, full": partial(by_accelerate, kind="FULL_STATE_DICT"),
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return heard(CHECKS, tmp_path_factory)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return heard(LONG, tmp_path_factory)


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name: str, quick: dict[str, list[str]]) -> None:
    assert quick[name] == [""] * RANKS


@pytest.mark.zoo
@pytest.mark.parametrize("name", LONG)
def test_two_processes_at_length(name: str, long: dict[str, list[str]]) -> None:
    assert long[name] == [""] * RANKS
