"""The original-class emitter: a copy of the user's module with thinner tensors and the sizes to match.

What is copied and what is changed is stated as plain data (:class:`Edits`), so the artefact can replay it.
"""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from oto.errors import EmitterError, out_of_memory
from oto.groups import Partition
from oto.nn import SWAPS, Told, Untrained
from oto.nn.told import both_told
from oto.slim.attributes import state_
from oto.slim.config import stock as stock_class
from oto.slim.plan import Thinning


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


class Scale(Protocol):
    """What happens to a parameter besides that it gets thinner."""

    def of(self, tensor: Tensor, thin: Thinning) -> Tensor: ...


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
    for module in model.modules():  # what a hook computes anew before each forward; deepcopy refuses it
        memo.update((id(t), t.detach().clone()) for t in vars(module).values() if isinstance(t, Tensor) and t.grad_fn)
    try:
        slim = _copied(model, memo)
    except Exception as failure:
        if out_of_memory(failure):
            raise
        raise EmitterError(
            f"{type(model).__name__} cannot be copied: {type(failure).__name__}: {failure}\n"
            "  effect  the original class cannot be used for the slim model"
        ) from failure
    if isinstance(slim.train, Untrained):  # in an earlier round
        del slim.train
    return edited(slim, edits)


def edited(slim: nn.Module, edits: Edits) -> nn.Module:
    """A copy with its modules changed in place; another module only where the model itself is a layer of torch."""
    for path, numbers in edits.stated.items():
        for key, number in numbers:
            state_(slim.get_submodule(path), tuple(key), number)
    for path, values in edits.attributes.items():
        module = slim.get_submodule(path)
        for name, value in values.items():
            setattr(module, name, tuple(value) if isinstance(value, list) else value)
    for path, how in edits.swaps.items():
        new = _swapped(slim.get_submodule(path), how)
        if not path:
            return new
        _put(slim, path, new)
    before = {path: m.forward for path, m in slim.named_modules() if isinstance(m.forward, Told)}  # in earlier rounds
    for path in {**before, **edits.told} if edits != Edits() else ():
        module, calls = slim.get_submodule(path), edits.told.get(path, {})
        Told(module, both_told(before[path].calls, calls) if path in before else calls).install()
    for path, instead in edits.dropped.items():
        _put(slim, path, nn.Identity() if instead == "identity" else None)
    if edits.untrained:
        refuse_training(slim, edits.untrained)
    return slim


def _swapped(layer: nn.Module, how: Mapping[str, Any]) -> nn.Module:
    """A module of ours that holds the tensors of a layer of torch."""
    with torch.device("meta"):
        new = SWAPS[how["class"]](**how["arguments"])
    for name, held in [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers()]:
        _put(new, name, held)
    return new.train(layer.training)


def _put(model: nn.Module, path: str, new: Any) -> None:
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


_ATOMS = (type(None), bool, int, float, str, type)
_TABLES = (dict, OrderedDict)
_SAYS = {"__new__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__"}
"""By any of these a class says itself how it is copied."""


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy``, in a twentieth of the time for modules that leave it to Python: the empty tables of hooks and
    the numbers, which are most of what a module holds, need not be looked up one by one."""
    kinds = {kind for kind in map(type, model.modules()) if _is_plain(kind)}
    plain = [m for m in model.modules() if type(m) in kinds]
    for module in plain:
        memo[id(module)] = object.__new__(type(module))
    for module in reversed(plain):  # the inner ones first: those of another class may ask what is in them
        held = vars(memo[id(module)])
        for name, value in vars(module).items():
            if type(value) in _ATOMS:
                held[name] = value
            elif type(value) in _TABLES and not value:
                held[name] = memo.setdefault(id(value), type(value)())
            else:
                held[name] = copy.deepcopy(value, memo)
    return copy.deepcopy(model, memo)


def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether instances of a class are copied attribute by attribute."""
    bases = [vars(base) for base in kind.__mro__ if base not in (object, nn.Module)]
    return kind not in copyreg.dispatch_table and not any(_SAYS & own.keys() or own.get("__slots__") for own in bases)


def refuse_training(slim: nn.Module, why: str) -> None:
    """Let a slim model stay in eval mode, and say why."""
    vars(slim)["train"] = Untrained(slim, why)


def forget_idle(slim: nn.Module, edits: Edits) -> None:
    """Leave modules alone that turned out to state by themselves what they were to be told."""
    for path in list(edits.told):
        forward = slim.get_submodule(path).forward
        if isinstance(forward, Told) and forward.is_idle:
            forward.remove()
            del edits.told[path]


def attribute(model: nn.Module, path: str) -> Tensor:
    """A parameter, buffer or plain tensor attribute by its dotted path."""
    parent, _, name = path.rpartition(".")
    found: Tensor = getattr(model.get_submodule(parent), name)
    return found


def thin_tensors(
    model: nn.Module,
    thin: Thinning,
    scales: Mapping[str, Sequence[Scale]] | None = None,
    held: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Every parameter, buffer and named constant of ``model``, thinned; tied names share one tensor.

    Args:
        scales: What happens to parameters that take a count in, by their names.
        held: Those that are there already.
    """
    tensors: dict[str, Tensor] = {}
    scales, held = scales or {}, held or {}
    for leaf in thin.found.graph.leaves:
        if leaf.names and leaf.names[0] in held:
            tensors.update(dict.fromkeys(leaf.names, held[leaf.names[0]]))
        elif leaf.names:
            made = thin.thin(leaf, attribute(model, leaf.names[0]))
            for scale in scales.get(leaf.name, ()):
                made = scale.of(made, thin)
            tensors.update(dict.fromkeys(leaf.names, made))
    return tensors


def tensors_of(model: nn.Module, partition: Partition) -> dict[str, Tensor]:
    """Every parameter, buffer and named constant of ``model`` as it is."""
    return {name: attribute(model, leaf.names[0]) for leaf in partition.found.graph.leaves for name in leaf.names}
