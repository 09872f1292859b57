"""The original-class emitter: a copy of the user's module with thinner tensors and the sizes to match.

What is copied and what is changed is stated as plain data (:class:`Edits`), so the artefact can replay it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oto.axes.call import Rewrite, Size
from oto.errors import EmitterError, out_of_memory
from oto.groups import Partition
from oto.nn import SWAPS, Told, Untrained
from oto.nn import functional as counted
from oto.nn import modules as thinner
from oto.nn.told import both_told
from oto.slim.attributes import Place, Stated, state_
from oto.slim.config import stock as stock_class
from oto.slim.copying import copied
from oto.slim.plan import Thinning
from oto.slim.scaling import Absorbed, Scale
from oto.slim.telling import Telling
from oto.trace.graph import Leaf, Node


@dataclass(frozen=True)
class Edits:
    """What changes in a copy of the user's module besides its tensors; plain data, for JSON.

    Attributes:
        attributes: For each module path, integer attributes and their new values.
        swaps: For each module path, the class of ``oto.nn`` that takes its place, and how to make it.
        stated: For each path of a module of the user's own, numbers that it holds: the way to each, and its new value.
        told: For each path of a module of the user's own, calls that it makes otherwise, as :class:`oto.nn.Told` has
            them.
        config: Where the class is made anew from ``model.config`` instead, the fields of it that change.
        dropped: Module paths that are left out, and what takes their place: ``"none"`` or ``"identity"``.
        untrained: Why train mode is refused; empty if it is not.
    """

    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    swaps: dict[str, dict[str, Any]] = field(default_factory=dict)
    stated: dict[str, list[list[Any]]] = field(default_factory=dict)
    told: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    untrained: str = ""


@dataclass(eq=False)
class OwnClass:
    """What a slim model of the model's own class needs.

    Attributes:
        stated: Numbers that modules hold, and what they are to be.
        absorbed: Norms and means whose count goes into weights, by the index of the call.
        told: Calls that are to be made otherwise, by their index; for each, places of numbers to state in any case.
        telling: How calls can be told.
        whole: Groups that have to stay whole, each with the index of the call that is the reason.
        ties: Groups that have to keep the same number of atoms.
        least: How many atoms groups have to keep for the class to run.
    """

    stated: dict[Place, Stated] = field(default_factory=dict)
    absorbed: dict[int, Absorbed] = field(default_factory=dict)
    told: dict[int, tuple[int, ...]] = field(default_factory=dict)
    telling: Telling | None = None
    whole: dict[str, int | None] = field(default_factory=dict)
    ties: list[tuple[str, ...]] = field(default_factory=list)
    least: dict[str, int] = field(default_factory=dict)

    @property
    def scales(self) -> dict[str, list[Scale]]:
        """By what each parameter is multiplied."""
        found: dict[str, list[Scale]] = {}
        for one in self.absorbed.values():
            for scale in one.scales:
                found.setdefault(scale.name, []).append(scale)
        return found

    @property
    def scalars(self) -> dict[int, Stated]:
        """Numbers among the arguments of calls that an absorbed count changes."""
        return {index: stated for one in self.absorbed.values() for index, stated in one.scalars.items()}


def thin_copy(model: nn.Module, tensors: Mapping[str, Tensor], edits: Edits) -> nn.Module:
    """A copy of ``model`` that holds ``tensors`` in place of those of the same names.

    The tensors of ``model`` are not copied, so it may be on ``meta`` or much larger than the result. Ties hold.

    Raises:
        EmitterError: The model cannot be copied.
    """
    if edits.config:
        return stock_class(model, tensors, edits.config)
    memo: dict[int, Any] = {}
    for name, tensor in tensors.items():
        old = attribute(model, name)
        if id(old) not in memo:
            memo[id(old)] = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    try:
        slim = copied(model, memo)
    except Exception as failure:
        if out_of_memory(failure):
            raise
        raise EmitterError(
            f"{type(model).__name__} cannot be copied: {type(failure).__name__}: {failure}\n"
            "  effect  the original class cannot be used for the slim model"
        ) from failure
    if isinstance(slim.train, Untrained):  # in an earlier round
        del slim.train
    for path, numbers in edits.stated.items():
        for key, number in numbers:
            state_(module_at(slim, path), tuple(key), number)
    for path, values in edits.attributes.items():
        _set_sizes(path, module_at(slim, path), values)
    for path, how in edits.swaps.items():
        new = _swapped(path, module_at(slim, path), how)
        if not path:
            return new
        parent, _, last = path.rpartition(".")
        setattr(module_at(slim, parent), last, new)
    thinner.leave_nested_tensors(slim)
    before = {path: m.forward for path, m in slim.named_modules() if isinstance(m.forward, Told)}  # in earlier rounds
    for path in {**before, **edits.told} if edits != Edits() else ():
        module, calls = module_at(slim, path), edits.told.get(path, {})
        Told(module, both_told(before[path].calls, calls) if path in before else calls).install()
    for path, instead in edits.dropped.items():
        module_at(slim, path)
        parent, _, last = path.rpartition(".")
        setattr(module_at(slim, parent), last, nn.Identity() if instead == "identity" else None)
    if edits.untrained:
        refuse_training(slim, edits.untrained)
    return slim


def module_at(model: nn.Module, path: str) -> nn.Module:
    """A module by its path, of those that are registered: a file that names something else does not get there.

    Raises:
        AttributeError: There is none.
    """
    found: nn.Module | None = model
    for name in path.split(".") if path else ():
        found = None if found is None else found._modules.get(name)
    if found is None:
        raise AttributeError(f"{type(model).__name__} has no module {path!r}")
    return found


def _set_sizes(path: str, module: nn.Module, values: Mapping[str, int]) -> None:
    """Set the attributes by which a module of torch states its sizes; none of them exceeds what its tensors hold.

    Raises:
        EmitterError: It has no such attributes.
    """
    kind = stock(module)
    known = SIZES.get(STOCK[kind], ()) if kind is not None else ()
    for name, value in values.items():
        most = max([t.numel() for t in (*module.parameters(False), *module.buffers(False))], default=0)
        if name not in known or value > max(most, getattr(module, name)):
            raise EmitterError(f"{path}, a {type(module).__name__}, states no {name} of {value}")
        setattr(module, name, value)


def _swapped(path: str, module: nn.Module, how: Mapping[str, Any]) -> nn.Module:
    """The module of ``oto.nn`` that takes the place of one of torch, with its tensors.

    Raises:
        EmitterError: It is none of which there is a thinner form, or the tensors are not those of that.
    """
    if not isinstance(module, SWAPPED[how["class"]]):
        raise EmitterError(f"{path} is a {type(module).__name__}, in the place of which no {how['class']} can be")
    with torch.device("meta"):
        new = SWAPS[how["class"]](**how["arguments"])
    shapes = {name: t.shape for name, t in new.named_parameters()}
    for name, held in (dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())).items():
        if name in shapes and shapes[name] != held.shape:
            raise EmitterError(f"{path}.{name} is {list(held.shape)}, which the thinner {how['class']} cannot hold")
        parent, _, last = name.rpartition(".")
        setattr(new.get_submodule(parent), last, held)
    return new.train(module.training)


def refuse_training(slim: nn.Module, why: str) -> None:
    """Let a slim model stay in eval mode, and say why."""
    vars(slim)["train"] = Untrained(slim, why)


def attribute(model: nn.Module, path: str) -> Tensor:
    """A parameter, buffer or plain tensor attribute by its dotted path."""
    parent, _, name = path.rpartition(".")
    found = None if name.startswith("__") else getattr(module_at(model, parent), name)
    if not isinstance(found, Tensor):  # a file may name anything
        raise AttributeError(f"{path} is no tensor of {type(model).__name__}")
    return found


def thin_tensors(
    model: nn.Module, thin: Thinning, own: OwnClass | None = None, held: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Every parameter, buffer and named constant of ``model``, thinned; tied names share one tensor.

    Args:
        own: What was found out about the class: some parameters take a count in.
        held: Those that are there already.
    """
    tensors: dict[str, Tensor] = {}
    scales = own.scales if own is not None else {}
    held = held or {}
    for leaf in thin.found.graph.leaves:
        if leaf.names:
            made = held.get(leaf.names[0])
            made = thin_tensor(model, thin, leaf, scales.get(leaf.name, ())) if made is None else made
            tensors.update(dict.fromkeys(leaf.names, made))
    return tensors


def thin_tensor(model: nn.Module, thin: Thinning, leaf: Leaf, scales: Iterable[Scale] = ()) -> Tensor:
    """One tensor of ``model``, thinned, and scaled where it takes a count in."""
    made = thin.thin(leaf, attribute(model, leaf.names[0]))
    for scale in scales:
        made = scale.of(made, thin)
    return made


def tensors_of(model: nn.Module, partition: Partition) -> dict[str, Tensor]:
    """Every parameter, buffer and named constant of ``model`` as it is."""
    return {name: attribute(model, leaf.names[0]) for leaf in partition.found.graph.leaves for name in leaf.names}


def plan_edits(model: nn.Module, partition: Partition, thin: Thinning, own: OwnClass | None = None) -> Edits:
    """What to change in a model, so that its class computes what the thinner graph does.

    Args:
        own: What was found out about the class.

    Raises:
        EmitterError: A size changes where only the user's own code could say so.
    """
    edits = adapted(model, thin, own)
    modules = dict(model.named_modules(remove_duplicate=False))
    for index, text in thin.found.tape.counted.items():
        if index >= len(thin.found.graph.nodes):  # a head for training only: it is run to see
            continue
        node = thin.found.graph.nodes[index]
        norm = stock(modules.get(node.module)) in NORMS
        taken_in = norm or (own is not None and (index in own.absorbed or index in own.told))
        if not taken_in and thin.changes(thin.found.tape.rewrites[index]):
            raise EmitterError(
                f"{text}, in the forward of {node.module or type(model).__name__} itself ({node.source})\n"
                "  effect  the original class would divide by the smaller number"
            )
    return edits


class DeclinedError(EmitterError):
    """The thinner form of a module cannot express what is left; ``path`` is the module's."""

    path: str = ""


def adapted(model: nn.Module, thin: Thinning, own: OwnClass | None = None, plain: bool = False) -> Edits:
    """What to change in modules of ``torch.nn``, and in what those of the user's own state.

    Args:
        plain: Leave counts out of what modules are told, so that they make the calls that they made.

    Raises:
        DeclinedError: A module of ``torch.nn`` has no form for what is left.
    """
    edits = Edits()
    for place, stated in (own.stated if own is not None else {}).items():
        edits.stated.setdefault(place.module, []).append([list(place.key), stated.now(thin)])
    leaves = {name: leaf for leaf in thin.found.graph.leaves for name in leaf.names}
    calls: dict[str, list[Node]] = {}
    for node in thin.found.graph.calls:
        calls.setdefault(node.module, []).append(node)
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        mine = _Mine(path, module, leaves, thin, calls.get(path, []))
        kind = stock(module)
        if kind is not None:
            try:
                STOCK[kind](mine, edits)
            except EmitterError as failure:
                declined = DeclinedError(str(failure))
                declined.path = path
                raise declined from failure
    if own is not None and own.told and own.telling is not None:
        edits.told.update(own.telling.told(own.told, thin, plain))
    return edits


def stock(module: nn.Module | None) -> type[Any] | None:
    """The class of torch's own as which a module is adapted; ``None`` if it is none, or has a forward of its own."""
    for kind in STOCK:
        if isinstance(module, kind):
            return kind if type(module).forward is kind.forward else None
    return None


@dataclass
class _Mine:
    """One module, and what the analysis knows of it."""

    path: str
    module: Any
    leaves: Mapping[str, Leaf]
    thin: Thinning
    calls: list[Node]

    def shape(self, name: str) -> tuple[int, ...] | None:
        leaf = self.leaves.get(f"{self.path}.{name}" if self.path else name)
        return None if leaf is None else self.thin.shape(leaf)

    def entries(self, name: str) -> list[np.ndarray[Any, np.dtype[np.bool_]]]:
        return self.thin.entries(self.leaves[f"{self.path}.{name}" if self.path else name])

    def rewrite(self, *ops: Callable[..., Any]) -> Rewrite | None:
        """How the module's own call is to be made now, if it names sizes."""
        for node in self.calls:
            found = self.thin.found.tape.rewrites.get(node.index)
            if found is not None and (not ops or found.op in ops):
                return found
        return None

    def set(self, edits: Edits, **values: Any) -> None:
        changed = {name: value for name, value in values.items() if getattr(self.module, name) != value}
        if changed:
            edits.attributes[self.path] = changed

    def swap(self, edits: Edits, kind: str, **arguments: Any) -> None:
        edits.swaps[self.path] = {"class": kind, "arguments": arguments}


def _linear(mine: _Mine, edits: Edits) -> None:
    out_features, in_features = mine.shape("weight") or (mine.module.out_features, mine.module.in_features)
    mine.set(edits, in_features=in_features, out_features=out_features)


def _conv(mine: _Mine, edits: Edits) -> None:
    module = mine.module
    shape = mine.shape("weight")
    if shape is None:
        return
    groups = module.groups
    rewrite = mine.rewrite()
    if groups > 1 and rewrite is not None:
        groups = mine.thin.size(next(x for x in (*rewrite.args, *rewrite.kwargs.values()) if isinstance(x, Size)))
    first, second = (shape[0], shape[1] * groups)
    into, out = (first, second) if module.transposed else (second, first)
    mine.set(edits, in_channels=into, out_channels=out, groups=groups)


def _channels(mine: _Mine, edits: Edits) -> None:
    shape = mine.shape("weight") or mine.shape("running_mean")
    if shape is not None:
        mine.set(edits, num_features=shape[0])


def _embedding(mine: _Mine, edits: Edits) -> None:
    shape = mine.shape("weight")
    if shape is not None:
        mine.set(edits, num_embeddings=shape[0], embedding_dim=shape[1])


def _prelu(mine: _Mine, edits: Edits) -> None:
    shape = mine.shape("weight")
    if shape is not None:
        mine.set(edits, num_parameters=shape[0])


def _layer_norm(mine: _Mine, edits: Edits) -> None:
    module = mine.module
    rewrite = mine.rewrite(counted.layer_norm, counted.rms_norm)
    if rewrite is None or not mine.thin.changes(rewrite):
        return
    full = list(getattr(module, "full", rewrite.kwargs["full"]))  # a thinner norm goes on counting what it counted
    arguments = {"normalized_shape": mine.thin.filled(rewrite.args[1]), "full": full,
                 "eps": module.eps, "weight": module.weight is not None}  # fmt: skip
    if isinstance(module, nn.LayerNorm | thinner.LayerNorm):
        mine.swap(edits, "LayerNorm", **arguments, bias=module.bias is not None)
    else:
        mine.swap(edits, "RMSNorm", **arguments)


def _group_norm(mine: _Mine, edits: Edits) -> None:
    module = mine.module
    rewrite = mine.rewrite(counted.group_norm)
    if rewrite is None or not mine.thin.changes(rewrite):
        return
    groups, width = mine.thin.size(rewrite.args[1]), mine.thin.size(rewrite.kwargs["width"])
    full = getattr(module, "full", rewrite.kwargs["full"])
    if width == full:
        mine.set(edits, num_groups=groups, num_channels=groups * width)
    else:
        mine.swap(edits, "GroupNorm", num_groups=groups, width=width, full=full, eps=module.eps,
                  affine=module.weight is not None)  # fmt: skip


def _recurrent(mine: _Mine, edits: Edits) -> None:
    into, again = mine.shape("weight_ih_l0"), mine.shape("weight_hh_l0")
    if into is not None and again is not None:
        module = mine.module
        gates = module.weight_ih_l0.shape[0] // module.hidden_size
        mine.set(
            edits, input_size=into[1], hidden_size=into[0] // gates, proj_size=again[1] if module.proj_size else 0
        )  # fmt: skip


def _cell(mine: _Mine, edits: Edits) -> None:
    into, again = mine.shape("weight_ih"), mine.shape("weight_hh")
    if into is not None and again is not None:
        mine.set(edits, input_size=into[1], hidden_size=again[1])


def _attention(mine: _Mine, edits: Edits) -> None:
    module = mine.module
    packed = module.in_proj_weight is not None
    names = ["in_proj_weight"] if packed else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    touched = [*names, "out_proj.weight"]
    if all(mask.all() for name in touched for mask in mine.entries(name)):
        return
    if module.bias_k is not None or module.add_zero_attn:
        raise EmitterError(f"{mine.path} uses bias_kv or add_zero_attn, which its thinner form does not")
    heads, width = module.num_heads, module.head_dim
    v_width = getattr(module, "v_head_dim", width)  # of one that is thin already
    shapes = [(heads, width), (heads, width), (heads, v_width)]
    if packed:
        rows = np.split(mine.entries("in_proj_weight")[0], np.cumsum([h * d for h, d in shapes])[:2])
        inner = [mine.entries("in_proj_weight")[1]] * 3
    else:
        rows, inner = ([mine.entries(name)[i] for name in names] for i in range(2))
    parts = [own.reshape(shape) for own, shape in zip(rows, shapes, strict=True)]
    kept = [part.any(1) for part in parts]
    widths = [part.any(0) for part in parts]
    whole = all(
        np.array_equal(part, np.logical_and.outer(h, w)) and np.array_equal(h, kept[0])
        for part, h, w in zip(parts, kept, widths, strict=True)
    )
    if not whole or not np.array_equal(widths[0], widths[1]):
        raise EmitterError(f"the heads of {mine.path} would differ in width, which its thinner form cannot express")
    there = np.array(getattr(module, "heads", range(heads)))
    mine.swap(
        edits, "MultiheadAttention", embed_dim=int(inner[0].sum()), kdim=int(inner[1].sum()), vdim=int(inner[2].sum()),
        out_dim=int(mine.entries("out_proj.weight")[0].sum()), num_heads=int(kept[0].sum()),
        head_dim=int(widths[0].sum()), v_head_dim=int(widths[2].sum()), scale=getattr(module, "scale", width**-0.5),
        heads=there[kept[0]].tolist(), full_heads=getattr(module, "full_heads", heads), packed=packed,
        bias=module.in_proj_bias is not None, out_bias=module.out_proj.bias is not None, dropout=module.dropout,
        batch_first=module.batch_first,
    )  # fmt: skip
    out = mine.shape("out_proj.weight")
    assert out is not None and out[1] == int(kept[0].sum()) * int(widths[2].sum())


NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, thinner.LayerNorm, thinner.RMSNorm, thinner.GroupNorm)

STOCK: dict[type[Any], Callable[[_Mine, Edits], None]] = {
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.ConvTranspose1d: _conv,
    nn.ConvTranspose2d: _conv,
    nn.ConvTranspose3d: _conv,
    nn.BatchNorm1d: _channels,
    nn.BatchNorm2d: _channels,
    nn.BatchNorm3d: _channels,
    nn.SyncBatchNorm: _channels,
    nn.InstanceNorm1d: _channels,
    nn.InstanceNorm2d: _channels,
    nn.InstanceNorm3d: _channels,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.Embedding: _embedding,
    nn.PReLU: _prelu,
    nn.MultiheadAttention: _attention,
    nn.LSTM: _recurrent,
    nn.GRU: _recurrent,
    nn.RNN: _recurrent,
    nn.LSTMCell: _cell,
    nn.GRUCell: _cell,
    nn.RNNCell: _cell,
    thinner.LayerNorm: _layer_norm,
    thinner.RMSNorm: _layer_norm,
    thinner.GroupNorm: _group_norm,
    thinner.MultiheadAttention: _attention,
}

SIZES: dict[Callable[[_Mine, Edits], None], tuple[str, ...]] = {
    _linear: ("in_features", "out_features"),
    _conv: ("in_channels", "out_channels", "groups"),
    _channels: ("num_features",),
    _embedding: ("num_embeddings", "embedding_dim"),
    _prelu: ("num_parameters",),
    _group_norm: ("num_groups", "num_channels"),
    _recurrent: ("input_size", "hidden_size", "proj_size"),
    _cell: ("input_size", "hidden_size"),
}
"""The attributes that each of these may set; a file may set no others."""

SWAPPED: dict[str, tuple[type[nn.Module], ...]] = {
    "LayerNorm": (nn.LayerNorm, thinner.LayerNorm),
    "RMSNorm": (nn.RMSNorm, thinner.RMSNorm),
    "GroupNorm": (nn.GroupNorm, thinner.GroupNorm),
    "MultiheadAttention": (nn.MultiheadAttention, thinner.MultiheadAttention),
}
"""What each class of ``oto.nn`` takes the place of."""
