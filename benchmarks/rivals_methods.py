"""How a network gets smaller in `rivals.py`: by us, by torch-pruning, at random, or by being built narrow.

Every method trains with the same loop on the same batches at the same learning rates, and hands back a slim network
with what is needed to build one of its shape again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from rivals_tasks import Data, Split, Task, ZeroPad
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from oto import OTO

# ------------------------------------------------------------------------------------------------ what all share


@dataclass
class Slim:
    """A slim network, and ``rebuild``: plain values that :func:`rebuilt` makes one of the same shape from."""

    model: nn.Module
    rebuild: dict[str, Any]
    notes: dict[str, Any] = field(default_factory=dict)


Before = Callable[[int, torch.optim.Optimizer], torch.optim.Optimizer]


def macs(model: nn.Module, example: tuple[Tensor, ...]) -> int:
    """Multiply–adds of one forward pass, as torch itself counts them: every method is measured with this.

    Attention is that of two products, for torch does not count its fused kernel on the CPU.
    """
    training = model.training
    model.eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*example)
    model.train(training)
    return counter.get_total_flops() // 2


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def train(
    task: Task, model: nn.Module, data: Data, optimizer: torch.optim.Optimizer, seed: int, before: Before | None = None
) -> None:
    """``before(step, optimizer)`` may change the network and hand back another optimizer."""
    generator = torch.Generator().manual_seed(seed)
    data = Data(data.train.first(task.images), data.holdout, data.test, data.shift, data.flip)
    model.train()
    step = 0
    for _ in range(task.epochs):
        for x, y in data.epoch(task.batch, generator):
            if before is not None:
                optimizer = before(step, optimizer)
            for group in optimizer.param_groups:
                group["lr"] = task.rate(step)
            with torch.autocast(task.device, torch.bfloat16, enabled=task.half):
                loss = F.cross_entropy(model(*x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1


@torch.no_grad()
def accuracy(model: nn.Module, split: Split, size: int = 250) -> float:
    """Percent of the examples that are put in the right class."""
    model.eval()
    right = 0
    for index in torch.arange(len(split)).split(size):
        x, y = split.batch(index)
        right += int((model(*x).argmax(1) == y).sum())
    return 100 * right / len(split)


# ------------------------------------------------------------------------------------------------ dense


def dense(task: Task, data: Data, target: float, seed: int, options: dict[str, Any]) -> Slim:
    """Not pruned, trained on."""
    model = task.network(1.0, task.pretrained)
    train(task, model, data, task.optimizer(model), seed)
    return Slim(model, {"scale": 1.0})


def dense_small(task: Task, data: Data, target: float, seed: int, options: dict[str, Any]) -> Slim:
    """The same architecture, uniformly narrower, from scratch: pretrained weights of that width are not to be had."""
    scale = scale_for(task, target)
    torch.manual_seed(seed)
    model = task.network(scale, False)
    train(task, model, data, task.optimizer(model), seed)
    return Slim(model, {"scale": scale}, {"scale": scale})


def scale_for(task: Task, target: float) -> float:
    """The scale with the most MACs that are at most the target's."""
    example = task.example()
    limit = target * macs(task.network(), example)
    low, high = 0.0, 1.0
    for _ in range(12):  # 1 / 4096: finer than one channel
        middle = (low + high) / 2
        if macs(task.network(middle, False), example) <= limit:
            low = middle
        else:
            high = middle
    return low


# ------------------------------------------------------------------------------------------------ ours


def ours(make: str, reach: float | None = None, **fixed: Any) -> Callable[..., Slim]:
    """An optimizer of ``OTO`` with its defaults, but for ``fixed`` and what ``--options`` says.

    An option that is null is not passed on.

    Args:
        reach: What λ would take of a norm in all steps of a task at its highest learning rate, from which λ follows:
            that of a paper is made for hundreds of times as many steps.
    """

    def run(task: Task, data: Data, target: float, seed: int, options: dict[str, Any]) -> Slim:
        torch.manual_seed(seed)
        model = task.network(1.0, task.pretrained)
        example = task.example()
        oto = OTO(model, example)
        suited = {} if reach is None else {"lmbda": reach / (task.lr * task.steps)}
        usual = task.optimizer_options() | {"target_macs": target, "total_steps": task.steps} | suited
        chosen = usual | fixed | options
        if chosen.get("compensate"):
            drawn = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:512]
            chosen["batches"] = [data.train.batch(index)[0] for index in drawn.split(128)]
        optimizer = getattr(oto, make)(**{key: value for key, value in chosen.items() if value is not None})
        train(task, model, data, optimizer, seed)
        subnet = oto.construct_subnet()
        counted, said = macs(subnet.model, example), subnet.cost_after.macs
        if counted != said:
            raise AssertionError(f"torch counts {counted:,} MACs in the slim model, oto says {said:,}")
        kept = {name: _packed(atoms, _size(oto, name)) for name, atoms in subnet.kept.items()}
        notes: dict[str, Any] = {"emitter": subnet.emitter}
        if ways := getattr(optimizer, "ways", None):  # how many groups left their half-spaces, how many were chosen
            notes |= {"ways": ways, "lmbda": chosen.get("lmbda")}
        return Slim(subnet.model, {"kept": kept}, notes)

    return run


def with_adapters(task: Task, model: nn.Module) -> Any:
    """The model frozen, with adapters of rank 8 on all layers of matrices; the classifier is new, and learns whole."""
    from peft import LoraConfig, get_peft_model

    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    adapted = [name for name in layers if name != task.classifier]
    settings = LoraConfig(r=8, lora_alpha=16, target_modules=adapted, modules_to_save=[task.classifier])
    return get_peft_model(model, settings)


def lhspg(task: Task, data: Data, target: float, seed: int, options: dict[str, Any]) -> Slim:
    """LHSPG on a frozen model with adapters, merged in the end; its share of the MACs is that of the merged model.

    Adapters may learn faster than whole weights do: ``rate`` multiplies the learning rates of the task.
    """
    torch.manual_seed(seed)
    rate, options = options.get("rate", 1.0), {k: v for k, v in options.items() if k != "rate"}
    task = replace(task, lr=task.lr * rate)
    model = with_adapters(task, task.network(1.0, task.pretrained))
    oto = OTO(model, task.example(), prune_frozen=True)
    chosen = task.optimizer_options() | {"target_macs": target, "total_steps": task.steps} | options
    optimizer = oto.lhspg(**chosen)
    train(task, model, data, optimizer, seed)
    subnet = oto.construct_subnet()
    kept = {name: _packed(atoms, _size(oto, name)) for name, atoms in subnet.kept.items()}
    notes = {"emitter": subnet.emitter, "groups_at_zero": optimizer.num_pruned}
    return Slim(subnet.model.merge_and_unload(), {"kept": kept, "adapters": True}, notes)


def random_saliency(entries: Any) -> Tensor:
    """No criterion at all."""
    return torch.rand(len(entries.weights[0]))


def _size(oto: OTO, name: str) -> int:
    return next(group.size for group in oto.node_groups if group.name == name)


def _packed(atoms: Any, size: int) -> str:
    bits = np.zeros(size, dtype=bool)
    bits[np.asarray(atoms)] = True
    return f"{size}:{np.packbits(bits).tobytes().hex()}"


def _unpacked(text: str) -> np.ndarray:
    size, digits = text.split(":")
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), count=int(size)).astype(bool)


# ------------------------------------------------------------------------------------------------ torch-pruning

STEPS = 400  # as its own `reproduce/main.py`: small steps until the target is met
CRITERIA = ("l1", "l2", "taylor", "hessian", "bn", "lamp", "random")
SCOPES = ("global", "local", "isomorphic")
WHEN = ("oneshot", "portions")


def torch_pruning(criterion: str, scope: str, when: str) -> Callable[..., Slim]:
    """torch-pruning at its best: see :class:`Rival`.

    ``oneshot`` prunes before training; ``portions`` at five moments, the last after ``until`` of the steps.

    Options: ``portions`` and ``until``; ``inner`` leaves the residual stream alone; ``batches`` for the gradients of
    Taylor and Hessian.
    """

    def run(task: Task, data: Data, target: float, seed: int, options: dict[str, Any]) -> Slim:
        torch.manual_seed(seed)
        settings = {"portions": 5, "until": 0.4, "inner": False, "batches": 10} | options
        model = task.network(1.0, task.pretrained)
        rival = Rival(task, model, data, criterion, scope, settings, seed)
        count = settings["portions"] if when == "portions" else 1
        last = settings["until"] * task.steps if when == "portions" else 0
        due = {round(last * k / count): 1 - (1 - target) * k / count for k in range(1, count + 1)}

        def before(step: int, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
            return rival.prune(due[step], optimizer) if step in due else optimizer

        train(task, model, data, task.optimizer(model), seed, before)
        shapes = {name: list(p.shape) for name, p in model.named_parameters()}
        sources = {n: m.source.tolist() for n, m in model.named_modules() if isinstance(m, Select)}
        return Slim(model, {"shapes": shapes, "sources": sources}, {"pruner_steps": rival.taken})

    return run


class Rival:
    """A torch-pruning pruner that is asked for MACs.

    It steps in 1/400 of its ratio until the MACs are met. Taylor and Hessian see the gradients of ten fresh batches,
    in eval mode and without augmentation, before each portion: these passes are a gift, they do not count as training.
    Parameters that get thinner keep the optimizer's moments of the entries that stay. The shortcut that pads with
    zeros, which it cannot follow, becomes a layer that it can prune on both sides (:class:`Select`). The classifier's
    outputs are ignored, and it is told the heads: all heads of a layer lose the same dimensions, as is its default.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        data: Data,
        criterion: str,
        scope: str,
        settings: Mapping[str, Any],
        seed: int,
    ) -> None:
        import torch_pruning as tp

        self.task, self.model, self.data, self.criterion, self.settings = task, model, data, criterion, settings
        self.generator = torch.Generator().manual_seed(1000 + seed)
        self.taken = 0
        select_(model)
        self.example = task.example()
        self.dense = macs(model, self.example)
        heads = {layer: n for part in model.modules() for layer, n in _heads(part)}
        ignored: list[nn.Module] = [model.get_submodule(task.classifier)]
        if settings["inner"]:
            ignored += _writers(model)
        self.importance = {
            "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
            "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
            "taylor": tp.importance.GroupTaylorImportance,
            "hessian": tp.importance.GroupHessianImportance,
            "bn": tp.importance.BNScaleImportance,
            "lamp": tp.importance.LAMPImportance,
            "random": tp.importance.RandomImportance,
        }[criterion]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it guesses the dimension of parameters that are in no layer: the last
            self.pruner = tp.pruner.BasePruner(
                model,
                self.example,
                self.importance,
                global_pruning=scope != "local",
                isomorphic=scope == "isomorphic",
                pruning_ratio=1.0,
                iterative_steps=STEPS,
                ignored_layers=ignored,
                num_heads=dict(heads),
                in_channel_groups={},
                out_channel_groups={},  # its defaults are shared
                customized_pruners={Select: _select_pruner()},
            )

    def prune(self, share: float, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Prune to ``share`` of the dense MACs, and hand back an optimizer over the new parameters."""
        if self.criterion in ("taylor", "hessian"):
            self.gradients()
        named = dict(self.model.named_parameters())
        state = {name: optimizer.state[p] for name, p in named.items()}
        for name, p in named.items():
            p.moments = {k: v for k, v in state[name].items() if isinstance(v, Tensor) and v.shape == p.shape}
        with carrying_moments(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            while macs(self.model, self.example) > share * self.dense:
                if self.taken == STEPS:
                    raise AssertionError(f"torch-pruning cannot reach {share:.3f} of the MACs")
                self.pruner.step()
                self.taken += 1
                self.follow()
        renewed = self.task.optimizer(self.model.to(memory_format=torch.channels_last))
        for name, p in self.model.named_parameters():
            if state[name]:
                renewed.state[p] = {**state[name], **p.moments}
            p.grad = None
        return renewed

    def follow(self) -> None:
        """What the code of a model states about widths, as torch-pruning's examples do by hand."""
        for part in self.model.modules():
            if hasattr(part, "attention_head_size") and hasattr(part, "query"):
                part.attention_head_size = part.query.out_features // part.num_attention_heads
                part.all_head_size = part.query.out_features

    def gradients(self) -> None:
        """``p.grad``: for Taylor the sum over some batches, for Hessian the mean of the squares over examples.

        The latter is the empirical Fisher that ``GroupHessianImportance`` reads from ``p.grad``; its own
        ``accumulate_grad`` keeps only the last example.
        """
        train, single = self.data.train.first(self.task.images), self.criterion == "hessian"
        count, size = self.settings["batches"], self.task.batch
        index = torch.randperm(len(train), generator=self.generator)[: size if single else count * size]
        self.model.eval()
        self.model.zero_grad()
        squares: dict[Tensor, Tensor] = {}
        for part in index.split(1 if single else size):
            x, y = train.batch(part, whole=False)
            F.cross_entropy(self.model(*x), y).backward()
            if single:
                for p in self.model.parameters():
                    squares[p] = squares.get(p, 0) + p.grad.square() / len(index)
                self.model.zero_grad()
        for p, square in squares.items():
            p.grad = square
        self.model.train()


def _heads(part: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """Every projection of an attention with its number of heads."""
    heads = getattr(part, "heads", None) or getattr(part, "num_attention_heads", None)
    if heads and hasattr(part, "query"):
        for layer in (part.query, part.key, part.value):
            yield layer, heads


def _writers(model: nn.Module) -> list[nn.Module]:
    """The layers that write into the residual stream, by their names in `rivals_tasks.py` and in BERT."""
    ends = ("conv1", "patch", "features.0")
    inside = (".conv2", ".bn2", ".project.0", ".attention.out", ".down", ".output.dense")
    return [m for name, m in model.named_modules() if name in ends or name.endswith(inside)]


@contextmanager
def carrying_moments() -> Iterator[None]:
    """While open, ``p.moments`` of a parameter is cut together with it: torch-pruning has no hook for that."""
    from torch_pruning.pruner.function import BasePruningFunc

    original = BasePruningFunc._prune_parameter_and_grad

    def cut(self: Any, weight: nn.Parameter, keep: list[int], dim: int) -> nn.Parameter:
        pruned = original(self, weight, keep, dim)
        index = torch.tensor(keep, device=weight.device)
        pruned.moments = {k: v.index_select(dim, index) for k, v in weight.moments.items()}
        return pruned

    BasePruningFunc._prune_parameter_and_grad = cut
    try:
        yield
    finally:
        BasePruningFunc._prune_parameter_and_grad = original


class Select(nn.Module):
    """:class:`ZeroPad` as a layer whose inputs and outputs go independently.

    Output ``i`` is input ``source[i]``, or zero where that is -1.
    """

    source: Tensor

    def __init__(self, source: Tensor, inputs: int) -> None:
        super().__init__()
        self.register_buffer("source", source)
        self.inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 1))  # one channel of zeros at the end
        return x[:, torch.where(self.source < 0, x.shape[1] - 1, self.source)]


def select_(model: nn.Module) -> None:
    """Put :class:`Select` in the place of every :class:`ZeroPad`."""
    for block in model.modules():
        if isinstance(getattr(block, "shortcut", None), ZeroPad):
            pad, inputs = block.shortcut, block.conv1.in_channels
            rows = [torch.full((n,), -1) for n in (pad.before, pad.after)]
            source = torch.cat([rows[0], torch.arange(inputs), rows[1]])
            block.shortcut = Select(source.to(block.conv1.weight.device), inputs)


def _select_pruner() -> Any:
    import torch_pruning as tp

    class SelectPruner(tp.BasePruningFunc):
        TARGET_MODULES = Select

        def prune_out_channels(self, layer: Select, idxs: list[int]) -> Select:
            keep = torch.ones_like(layer.source, dtype=torch.bool)
            keep[idxs] = False
            layer.source = layer.source[keep]
            return layer

        def prune_in_channels(self, layer: Select, idxs: list[int]) -> Select:
            keep = layer.source.new_ones(layer.inputs + 1, dtype=torch.bool)  # the last is the zero
            keep[idxs] = False
            place = torch.where(keep, keep.cumsum(0) - 1, -1)
            place[-1] = -1
            layer.source = place[layer.source]
            layer.inputs -= len(idxs)
            return layer

        def get_out_channels(self, layer: Select) -> int:
            return len(layer.source)

        def get_in_channels(self, layer: Select) -> int:
            return layer.inputs

    return SelectPruner()


# ------------------------------------------------------------------------------------------------ by name

Method = Callable[[Task, Data, float, int, dict[str, Any]], Slim]

METHODS: dict[str, Method] = {
    "dense": dense,
    "dense-small": dense_small,
    "oto": ours("hesso"),
    "oto-cric": ours("hesso_cric"),
    "oto-published": ours("hesso", saliency="hesso", normalize="all"),
    # λ = .1 on ResNet-20, by the rule of `--search`; and .5, which has 92.63 held out with 59 % by half-space among the
    # cells, where the best of the search has 92.67 with 18 %
    "hspg": ours("hspg", reach=1.17, epsilon=0.995),
    "dhspg": ours("dhspg", reach=5.85, hat_lmbda_coeff=100),
    "dhspg-published": ours("dhspg", saliency="dhspg"),
    "lhspg": lhspg,
    "random": ours("hesso", saliency=random_saliency),
} | {
    f"tp-{criterion}-{scope}-{when}": torch_pruning(criterion, scope, when)
    for criterion in CRITERIA
    for scope in SCOPES
    for when in WHEN
}

GRIDS: dict[str, list[dict[str, Any]]] = {
    "hspg": [
        {"lmbda": 0.1, "epsilon": 0.99},
        {"lmbda": 0.3, "epsilon": 0.99},
        {"lmbda": 0.1, "epsilon": 0.995},
        {"lmbda": 0.05, "epsilon": 0.995},
        {"lmbda": 0.4},
    ],
    "dhspg": [
        {"lmbda": 0.5, "hat_lmbda_coeff": 100, "epsilon": 0.99},
        {"lmbda": 0.2, "hat_lmbda_coeff": 100, "epsilon": 0.99},
        {"lmbda": 1.0, "hat_lmbda_coeff": 100},
        {"lmbda": 0.1, "hat_lmbda_coeff": 100, "epsilon": 0.99},
        {"lmbda": 0.1, "hat_lmbda_coeff": 100, "epsilon": 0.995},
    ],
}
"""What `rivals.py --search` tries. A group leaves its half-space once a step takes 1 - ε of it, so a high ε lets groups
of a norm of αλ / (1 - ε) go without all others being penalized for long."""


def rebuilt(task: Task, how: Mapping[str, Any]) -> nn.Module:
    """A network of the shape of a slim one, with weights that mean nothing."""
    torch.manual_seed(0)
    if "scale" in how:
        return task.network(how["scale"], False).eval()
    model = task.network()
    if "kept" in how:
        adapted = how.get("adapters", False)
        model = with_adapters(task, model) if adapted else model
        oto = OTO(model, task.example(), prune_frozen=adapted, compress_mode=how.get("mode", "prune"))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for group in oto.node_groups:
                if group.name in how["kept"]:
                    gone = torch.from_numpy(np.flatnonzero(~_unpacked(how["kept"][group.name])))
                    for piece in group.zeros:
                        piece.of(parameters[piece.parameter]).index_fill_(0, gone, 0)
        slim = oto.construct_subnet().model
        return slim.merge_and_unload() if adapted else slim
    select_(model)
    for name, source in how["sources"].items():
        model.get_submodule(name).source = torch.tensor(source)
    for name, shape in how["shapes"].items():
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, nn.Parameter(0.02 * torch.randn(shape)))
    for part in model.modules():
        if isinstance(part, nn.Conv2d) and part.groups > 1:
            part.groups = part.weight.shape[0]
        elif isinstance(part, nn.BatchNorm2d):
            part.running_mean, part.running_var = torch.zeros_like(part.weight), torch.ones_like(part.weight)
        elif isinstance(part, nn.LayerNorm):
            part.normalized_shape = tuple(part.weight.shape)
        elif hasattr(part, "attention_head_size") and hasattr(part, "query"):
            part.attention_head_size = part.query.weight.shape[0] // part.num_attention_heads
    return model.eval().to(memory_format=torch.channels_last)
