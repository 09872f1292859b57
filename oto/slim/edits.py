"""Copy the user's module with thinner tensors, matching sizes and call overrides.

What changes is stated as plain data (:class:`Edits`), so an artifact can replay it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from oto.errors import EmitterError, reraise_out_of_memory
from oto.groups import Partition
from oto.nn import SWAPS, ErasedForward, OverriddenForward, Untrained
from oto.nn import modules as slim_layers
from oto.nn.overridden import merge_rounds
from oto.slim.copying import copied
from oto.slim.numbers import set_number
from oto.slim.pruned_shapes import PrunedShapes, parameter_like
from oto.trace.graph import Leaf


@dataclass(frozen=True)
class Edits:
    """What changes in a copy of the user's module besides its tensors; plain data, for JSON.

    Attributes:
        attributes: For each module path, integer attributes and their new values.
        swaps: For each module path, the class of ``oto.nn`` that takes its place, and its arguments.
        stated: For the path of each user-defined module, its size attributes: the key of each, and its new value.
        told: For the path of each user-defined module, its call overrides, in the form of
            :class:`oto.nn.OverriddenForward`. (The fields are the keys of an artifact, so they keep their names.)
        config: If the class is rebuilt from ``model.config`` instead, the fields that change.
        dropped: Paths of removed modules, and what takes their place: ``"none"`` or ``"identity"``.
        untrained: Why train mode is refused; empty if it is not.
        erased: For the path of each module that no longer runs, the arguments of :class:`oto.nn.ErasedForward`.
        layers: If the class is rebuilt with fewer layers, the remaining layers of each list of layers, by its path.
            Tensors keep the names that they have in the full model.
    """

    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    swaps: dict[str, dict[str, Any]] = field(default_factory=dict)
    stated: dict[str, list[list[Any]]] = field(default_factory=dict)
    told: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    untrained: str = ""
    erased: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers: dict[str, list[int]] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """The edits as plain data; fields that earlier versions do not know are left out if empty."""
        plain = asdict(self)
        return {name: value for name, value in plain.items() if value or name not in ("erased", "layers")}


def renumbered(name: str, layers: Mapping[str, Sequence[int]]) -> str | None:
    """The name of the full model's module or tensor once lists of layers are shorter; ``None`` if it was removed.

    >>> renumbered("layers.2.fc.weight", {"layers": [0, 2]}), renumbered("layers.1.fc.weight", {"layers": [0, 2]})
    ('layers.1.fc.weight', None)
    """
    for path, left in layers.items():
        number, dot, rest = name.removeprefix(f"{path}.").partition(".")
        if name.startswith(f"{path}.") and number.isdecimal():
            return f"{path}.{list(left).index(int(number))}{dot}{rest}" if int(number) in left else None
    return name


class Scale(Protocol):
    """How a parameter changes besides getting thinner."""

    def of(self, tensor: Tensor, pruned: PrunedShapes) -> Tensor: ...


def slim_copy(model: nn.Module, tensors: Mapping[str, Tensor], edits: Edits) -> nn.Module:
    """A copy of ``model``, with the same config, that holds ``tensors`` in place of those of the same names.

    The tensors of ``model`` are not copied, so it may be on ``meta`` or much larger than the result. Ties are kept.

    Raises:
        EmitterError: The model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for name, tensor in tensors.items():
        old = attribute(model, name)
        if id(old) not in memo:
            memo[id(old)] = parameter_like(old, tensor) if isinstance(old, nn.Parameter) else tensor
    try:
        slim = copied(model, memo)
    except Exception as failure:
        reraise_out_of_memory(failure)
        raise EmitterError(
            f"{type(model).__name__} cannot be copied: {type(failure).__name__}: {failure}\n"
            "  effect  the original class cannot be used for the slim model"
        ) from failure
    if isinstance(slim.train, Untrained):  # left by an earlier round
        del slim.train
    return edited(slim, edits)


def edited(slim: nn.Module, edits: Edits) -> nn.Module:
    """Edit the modules of a copy in place; returns a new module only if the model itself is a layer of torch."""
    for path, numbers in edits.stated.items():
        for key, number in numbers:
            set_number(module_at(slim, path), tuple(key), number)
    for path, values in edits.attributes.items():
        _set_sizes(path, module_at(slim, path), values)
    for path, how in edits.swaps.items():
        new = _swapped(path, module_at(slim, path), how)
        if not path:
            return new
        _put(slim, path, new)
    slim_layers.leave_nested_tensors(slim)
    before = {
        path: m.forward for path, m in slim.named_modules() if isinstance(m.forward, OverriddenForward)
    }  # in earlier rounds
    for path in {**before, **edits.told} if edits != Edits() else ():
        module, calls = module_at(slim, path), edits.told.get(path, {})
        OverriddenForward(module, merge_rounds(before[path].calls, calls) if path in before else calls).install()
    for path, how in edits.erased.items():
        module = module_at(slim, path)
        ErasedForward(type(module), how["takes"], how["gives"]).install(module)
    for path, instead in edits.dropped.items():
        module_at(slim, path)
        _put(slim, path, nn.Identity() if instead == "identity" else None)
    if edits.untrained:
        refuse_training(slim, edits.untrained)
    return slim


def module_at(model: nn.Module, path: str) -> nn.Module:
    """A registered module by its path; the path may come from a file, so anything else is refused.

    Raises:
        AttributeError: There is no module at the path.
    """
    found: nn.Module | None = model
    for name in path.split(".") if path else ():
        found = None if found is None else found._modules.get(name)
    if found is None:
        raise AttributeError(f"{type(model).__name__} has no module {path!r}")
    return found


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_OF_CHANNELS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)

SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
    **dict.fromkeys(_CONVOLUTIONS, ("in_channels", "out_channels", "groups")),
    **dict.fromkeys(_OF_CHANNELS, ("num_features",)),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.PReLU: ("num_parameters",),
    **dict.fromkeys((nn.GroupNorm, slim_layers.GroupNorm), ("num_groups", "num_channels")),
    **dict.fromkeys((nn.LSTM, nn.GRU, nn.RNN), ("input_size", "hidden_size", "proj_size")),
    **dict.fromkeys((nn.LSTMCell, nn.GRUCell, nn.RNNCell), ("input_size", "hidden_size")),
}
"""The attributes in which layers of torch state sizes; an artifact may set no others."""

SWAPPED: dict[str, tuple[type[nn.Module], ...]] = {
    "LayerNorm": (nn.LayerNorm, slim_layers.LayerNorm),
    "RMSNorm": (nn.RMSNorm, slim_layers.RMSNorm),
    "GroupNorm": (nn.GroupNorm, slim_layers.GroupNorm),
    "MultiheadAttention": (nn.MultiheadAttention, slim_layers.MultiheadAttention),
}
"""The classes that each class of ``oto.nn`` may replace."""


def _set_sizes(path: str, module: nn.Module, values: Mapping[str, int]) -> None:
    """Set the attributes in which a module of torch states its sizes; none may exceed its largest tensor's ``numel()``.

    Raises:
        EmitterError: The module has no such attributes, or a value is too large.
    """
    known = next((SIZES[kind] for kind in type(module).__mro__ if kind in SIZES), ())
    for name, value in values.items():
        held = (*module._parameters.values(), *module._buffers.values())
        most = max([t.numel() for t in held if t is not None], default=0)
        if name not in known or value > max(most, getattr(module, name)):
            raise EmitterError(f"{path}, a {type(module).__name__}, states no {name} of {value}")
        setattr(module, name, value)


def _swapped(path: str, module: nn.Module, how: Mapping[str, Any]) -> nn.Module:
    """Make the module of ``oto.nn`` that replaces one of torch, with its tensors.

    Raises:
        EmitterError: The module has no such thinner form, or its tensors do not fit that form.
    """
    if not isinstance(module, SWAPPED[how["class"]]):
        raise EmitterError(f"{path} is a {type(module).__name__}, which {how['class']} cannot replace")
    with torch.device("meta"):
        new = SWAPS[how["class"]](**how["arguments"])
    shapes = {name: t.shape for name, t in new.named_parameters()}
    for name, held in (dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())).items():
        if name in shapes and shapes[name] != held.shape:
            raise EmitterError(f"{path}.{name} is {list(held.shape)}, which the thinner {how['class']} cannot hold")
        _put(new, name, held)
    return new.train(module.training)


def _put(model: nn.Module, path: str, new: Any) -> None:
    parent, _, last = path.rpartition(".")
    setattr(module_at(model, parent), last, new)


def refuse_training(slim: nn.Module, why: str) -> None:
    """Make a slim model refuse train mode, with the reason."""
    vars(slim)["train"] = Untrained(slim, why)


def forget_idle(slim: nn.Module, edits: Edits) -> None:
    """Remove the overrides of modules whose code turned out to use the right sizes without them."""
    for path in list(edits.told):
        forward = slim.get_submodule(path).forward
        if isinstance(forward, OverriddenForward) and forward.is_idle:
            forward.remove()
            del edits.told[path]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module, each under all of its names."""
    parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def owner_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds what a dotted path names, and its name there: ``fc`` and ``"weight"`` for ``"fc.weight"``.

    Raises:
        AttributeError: There is no such module.
    """
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def attribute(model: nn.Module, path: str) -> Tensor:
    """A parameter, buffer or plain tensor attribute by its dotted path."""
    parent, _, name = path.rpartition(".")
    found = None if name.startswith("__") else getattr(module_at(model, parent), name)
    if not isinstance(found, Tensor):  # an artifact may name anything
        raise AttributeError(f"{path} is no tensor of {type(model).__name__}")
    return found


def pruned_tensors(
    model: nn.Module,
    pruned: PrunedShapes,
    scales: Mapping[str, Sequence[Scale]] | None = None,
    held: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Every parameter, buffer and named constant of ``model``, pruned; tied names share one tensor.

    Args:
        scales: For parameters that a count is folded into, how they change, by name.
        held: Pruned tensors that exist already.
    """
    tensors: dict[str, Tensor] = {}
    scales, held = scales or {}, held or {}
    for leaf in pruned.found.graph.leaves:
        if leaf.names:
            made = held.get(leaf.names[0])
            made = pruned_tensor(model, pruned, leaf, scales.get(leaf.name, ())) if made is None else made
            tensors.update(dict.fromkeys(leaf.names, made))
    return tensors


def pruned_tensor(model: nn.Module, pruned: PrunedShapes, leaf: Leaf, scales: Iterable[Scale] = ()) -> Tensor:
    """One tensor of ``model``, pruned, and rescaled if a count is folded into it."""
    made = pruned.prune(leaf, attribute(model, leaf.names[0]))
    for scale in scales:
        made = scale.of(made, pruned)
    return made


def tensors_of(model: nn.Module, partition: Partition) -> dict[str, Tensor]:
    """Every parameter, buffer and named constant of ``model``, unchanged."""
    return {name: attribute(model, leaf.names[0]) for leaf in partition.found.graph.leaves for name in leaf.names}
