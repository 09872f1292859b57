"""Find the atoms to keep from the zeros in the parameters, and derive every pruned shape from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune

from oto.axes.call import Rewrite, Size
from oto.axes.propagate import Propagation
from oto.axes.terms import Axis, Term, count, resolve, size_of, survivors
from oto.errors import NonFiniteParameterError, some
from oto.groups import Kept, NodeGroup, Partition
from oto.groups.node_group import computable, is_finite
from oto.trace.graph import Leaf, Node, Value


def read_zeros(groups: Sequence[NodeGroup], model: nn.Module) -> dict[str, NDArray[np.int64]]:
    """For each prunable group, the atoms to keep: those with a nonzero entry in their ZIG.

    Entries masked by ``torch.nn.utils.prune`` count as zero: the layer uses ``weight_orig`` times ``weight_mask``. At
    least ``min_kept`` atoms are kept, zero or not, because a layer needs at least one channel.

    Raises:
        NonFiniteParameterError: A parameter holds NaN or infinity.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    numbers = {name: p for name, p in parameters.items() if p.is_floating_point() or p.is_complex()}
    broken = [name for name, p in numbers.items() if not is_finite(p)]
    if broken:
        raise NonFiniteParameterError(
            f"parameters hold NaN or infinity: {some(broken)}\n"
            "  effect  what such a model computes cannot be compared, so no subnet is built\n"
            "  to fix  restore a checkpoint from before the divergence; a lower learning rate or clipping avoids it"
        )
    used = {name: p.detach() for name, p in parameters.items()}
    for name, mask in masks(model).items():
        used[name] = used[name] * mask.to(used[name].dtype)
    kept: dict[str, NDArray[np.int64]] = {}
    for group in groups:
        if not group.prunable:
            continue
        alive = np.zeros(group.size, dtype=bool)
        for piece in group.zeros:
            alive |= _nonzero(piece.of(used[piece.parameter])).cpu().numpy()
        missing = min(group.min_kept, group.size) - int(alive.sum())
        if missing > 0:
            alive[np.flatnonzero(~alive)[:missing]] = True
        kept[group.name] = np.flatnonzero(alive)
    return kept


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of ``torch.nn.utils.prune``, by the name of the parameter that they mask."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        masked = any(isinstance(hook, prune.BasePruningMethod) for hook in module._forward_pre_hooks.values())
        held = dict(module.named_buffers(recurse=False)) if masked else {}
        for name, _ in module.named_parameters(recurse=False) if held else ():
            mask = held.get(f"{name.removesuffix('_orig')}_mask")
            if mask is not None and name.endswith("_orig"):
                found[f"{path}.{name}".removeprefix(".")] = mask
    return found


def _nonzero(entries: Tensor) -> Tensor:
    """Which rows have a nonzero entry; all entries must be finite."""
    entries = computable(entries)
    if entries.ndim == 2 and entries.is_floating_point() and entries.numel():
        return (entries.amax(1) != 0) | (entries.amin(1) != 0)  # three times as fast as any()
    return (entries != 0).flatten(1).any(1) if entries.ndim > 1 else entries != 0


@dataclass(eq=False)
class PrunedShapes:
    """A propagated graph with a choice of surviving atoms, from which every new size and tensor follows.

    Attributes:
        masks: For each axis, which atoms survive; missing axes survive whole.
    """

    found: Propagation
    masks: Mapping[Axis, NDArray[np.bool_]]
    _entries: dict[Leaf, list[NDArray[np.bool_]]] = field(default_factory=dict)
    _counted: dict[Term, int] = field(default_factory=dict)  # a cache: many tries ask for the same terms
    _sizes: dict[Value, tuple[int, ...]] = field(default_factory=dict)
    _changing: dict[Rewrite, bool] = field(default_factory=dict)

    @cached_property
    def counts(self) -> dict[Axis, int]:
        return {axis: int(mask.sum()) for axis, mask in self.masks.items()}

    def count(self, term: Term) -> int:
        """How many entries of a dimension survive."""
        if term not in self._counted:
            self._counted[term] = count(resolve(term), self.counts)
        return self._counted[term]

    def sizes(self, value: Value) -> tuple[int, ...]:
        """The pruned shape of a tensor of the graph."""
        if value not in self._sizes:
            self._sizes[value] = tuple(map(self.count, self.found.operands[value].terms))
        return self._sizes[value]

    def size(self, asked: Size) -> int:
        """The pruned value of an integer argument."""
        return self.count(asked.term)

    def changes(self, rewrite: Rewrite) -> bool:
        """Whether any size that the call depends on becomes smaller."""
        if rewrite not in self._changing:
            smaller = any(self.count(term) != size_of(term) for term in rewrite.terms)
            self._changing[rewrite] = rewrite.always or smaller
        return self._changing[rewrite]

    def filled(self, template: Any) -> Any:
        """A rewrite's arguments with the pruned number in place of every :class:`Size`."""
        if isinstance(template, Size):
            return self.size(template)
        if isinstance(template, (tuple, list)):
            items = map(self.filled, template)
            return type(template)(*items) if hasattr(template, "_fields") else type(template)(items)
        if isinstance(template, dict):
            return {name: self.filled(value) for name, value in template.items()}
        return template

    def call(self, node: Node, rewrite: Rewrite | None) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """How a call is made on thinner tensors: operator, arguments and keywords."""
        if rewrite is None:
            return node.op, node.args, dict(node.kwargs)
        args, kwargs = self.filled((rewrite.args, dict(rewrite.kwargs)))
        return rewrite.op, args, kwargs

    def entries(self, leaf: Leaf) -> list[NDArray[np.bool_]]:
        """For each dimension of a leaf, which entries survive."""
        if leaf not in self._entries:
            self._entries[leaf] = [survivors(term, self.masks) for term in self.found.terms(leaf.value)]
        return self._entries[leaf]

    def shape(self, leaf: Leaf) -> tuple[int, ...]:
        return self.sizes(leaf.value)

    def prune(self, leaf: Leaf, tensor: Tensor, known: int = 0) -> Tensor:
        """The surviving entries of a leaf's tensor, in their own memory.

        Args:
            known: The number of leading dimensions in which the tensor is already pruned.
        """
        pruned = tensor.detach()
        for dim, mask in list(enumerate(self.entries(leaf)))[known:]:
            if not mask.all():
                pruned = pruned.index_select(dim, torch.from_numpy(np.flatnonzero(mask)).to(pruned.device))
        whole = all(mask.all() for mask in self.entries(leaf))
        return pruned.clone() if whole else laid_out_like(tensor, pruned)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def laid_out_like(old: Tensor, new: Tensor) -> Tensor:
    """``new``, with channels last in memory if those of ``old`` are; a copy only if they were not."""
    layout = _CHANNELS_LAST.get(old.ndim) if old.layout == torch.strided and old.ndim == new.ndim else None
    if layout is None or old.is_contiguous() or not old.is_contiguous(memory_format=layout):
        return new
    return new.contiguous(memory_format=layout)


def parameter_like(old: Tensor, new: Tensor) -> nn.Parameter:
    """A parameter that holds ``new``, trained if ``old`` is, with the marks that code has put on it, as they are.

    Marks are flags, numbers and texts, such as ``weight._no_weight_decay = True``; other attributes stay behind. A
    subclass of ``nn.Parameter`` is kept if nothing stays behind, as its methods may need that. Its constructor is not
    called, since it may require more than a tensor.
    """
    marks = {key: value for key, value in vars(old).items() if isinstance(value, bool | int | float | str)}
    kind = type(old) if type(new) in (Tensor, nn.Parameter) and _is_only_data(old, marks) else nn.Parameter
    made: nn.Parameter = nn.Parameter.__new__(kind, new, old.requires_grad)  # type: ignore[assignment]
    vars(made).update(marks)
    return made


def _is_only_data(p: Tensor, marks: Mapping[str, Any]) -> bool:
    """Whether an instance of a subclass of ``nn.Parameter`` holds nothing but its data and the given attributes."""
    kind = type(p)
    return (
        issubclass(kind, nn.Parameter)
        and not is_lazy(p)
        and kind.__torch_function__ is nn.Parameter.__torch_function__
        and not any("__slots__" in vars(base) for base in kind.__mro__[: kind.__mro__.index(nn.Parameter)])
        and vars(p).keys() == marks.keys()
    )


def pruned_shapes(partition: Partition, kept: Kept) -> PrunedShapes:
    """The pruned shapes of the graph on which the groups were found."""
    return PrunedShapes(partition.found, partition.masks(kept))
