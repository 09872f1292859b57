"""Adapt the layers of ``torch.nn`` to thinner tensors.

Example: an ``nn.Linear`` gets smaller ``in_features`` and ``out_features``; an ``nn.LayerNorm`` that lost entries is
swapped for :class:`oto.nn.LayerNorm`, which still divides by the full count.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from oto.axes.call import Rewrite, Size
from oto.errors import EmitterError
from oto.nn import functional as full_count
from oto.nn import modules as slim_layers
from oto.nn.erased import ErasedForward, Recipe, is_erased, resized
from oto.nn.overrides import to_json
from oto.slim.edits import Edits
from oto.slim.own_class.placed import overrides_of
from oto.slim.own_class.result import OwnClass
from oto.slim.pruned_shapes import PrunedShapes
from oto.trace.graph import Graph, Leaf, Node, Value

_ZEROS = torch.ops.aten.new_zeros.default
_NORMS_OF_CHANNELS = (torch.ops.aten.instance_norm.default, torch.ops.aten.batch_norm.default)


class DeclinedError(EmitterError):
    """The thinner form of a layer cannot express the pruned shapes; ``path`` is the layer's."""

    path: str = ""


@dataclass(frozen=True, eq=False)
class Layers:
    """The layers of ``torch.nn`` in a model, and the calls that each of them makes.

    Attributes:
        found: For each path, the layer, its class in ``STOCK``, and its calls. Of one that computes nothing that class
            is ``ErasedForward``.
        leaves: The tensors of the model by name.
    """

    found: Mapping[str, tuple[nn.Module, type[Any], list[Node]]]
    leaves: Mapping[str, Leaf]

    @classmethod
    def of(cls, model: nn.Module, graph: Graph) -> Layers:
        calls: dict[str, list[Node]] = {}
        for node in graph.calls:
            calls.setdefault(node.module, []).append(node)
        named = (
            (path, module, ErasedForward if is_erased(module) else stock(module))
            for path, module in model.named_modules(remove_duplicate=False)
        )
        found = {path: (module, kind, calls.get(path, [])) for path, module, kind in named if kind is not None}
        return cls(found, {name: leaf for leaf in graph.leaves for name in leaf.names})

    def edits(self, pruned: PrunedShapes) -> Edits:
        """What changes in the layers.

        Raises:
            DeclinedError: A layer has no form for the pruned shapes.
        """
        edits = Edits()
        for path, (module, kind, calls) in self.found.items():
            try:
                STOCK[kind](_Layer(path, module, self.leaves, pruned, calls), edits)
            except EmitterError as failure:
                declined = DeclinedError(str(failure))
                declined.path = path
                raise declined from failure
        return edits

    def is_norm(self, path: str) -> bool:
        """Whether a module is a norm that has a thinner form, which divides by the full count."""
        return path in self.found and self.found[path][1] in NORMS


def edits_of(
    layers: Layers,
    pruned: PrunedShapes,
    own: OwnClass | None = None,
    sizes_only: bool = False,
    passed: Collection[int] = (),
) -> Edits:
    """The edits of layers of ``torch.nn``, and the size attributes and call overrides of the user's modules.

    Args:
        own: What the class needs, if it was searched.
        sizes_only: Leave full counts out of the overrides, so that modules make the same calls as before.
        passed: Indices of calls that are given no channels, and not made.

    Raises:
        DeclinedError: A layer of ``torch.nn`` has no form for the pruned shapes.
        EmitterError: A number that the class states would become a fraction.
    """
    edits = layers.edits(pruned)
    if own is not None:
        for place, size in own.adaptation.sizes.items():
            edits.stated.setdefault(place.module, []).append([list(place.key), size.now(pruned)])
        overrides = overrides_of(own.calls, own.adaptation, pruned, sizes_only, passed)
        edits.told.update({path: to_json(calls) for path, calls in overrides.items()})
    return edits


def plan_edits(
    model: nn.Module, pruned: PrunedShapes, own: OwnClass | None = None, passed: Collection[int] = ()
) -> Edits:
    """The edits that make the model's class compute what the thinner graph computes.

    Args:
        own: What the class needs, if it was searched.
        passed: Indices of calls that are given no channels, and not made; only where the class was searched.

    Raises:
        EmitterError: The user's own code divides by a count that changes.
    """
    graph = pruned.found.graph
    layers = Layers.of(model, graph)
    edits = edits_of(layers, pruned, own, passed=passed)
    if own is not None:  # the search has compared all calls, including those that divide by a count
        return edits
    for index, text in pruned.found.tape.counted.items():
        if index >= len(graph.nodes):  # a training-only head, which is checked by running it
            continue
        node = graph.nodes[index]
        if not layers.is_norm(node.module) and pruned.changes(pruned.found.tape.rewrites[index]):
            raise EmitterError(
                f"{text}, in the forward of {node.module or type(model).__name__} itself ({node.source})\n"
                "  effect  the original class would divide by the smaller number"
            )
    return edits


def stock(module: nn.Module | None) -> type[Any] | None:
    """The class of ``torch.nn`` that a module is adapted as; ``None`` if there is none or ``forward`` is overridden."""
    if module is None or is_erased(module):
        return None
    kind: type[Any] | None = next((base for base in type(module).__mro__ if base in STOCK), None)
    return kind if kind is not None and kind.forward is getattr(type(module), "forward", None) else None


@dataclass
class _Layer:
    """One module, and what the analysis knows about it."""

    path: str
    module: Any
    leaves: Mapping[str, Leaf]
    pruned: PrunedShapes
    calls: list[Node]

    def shape(self, name: str) -> tuple[int, ...] | None:
        leaf = self.leaves.get(f"{self.path}.{name}" if self.path else name)
        return None if leaf is None else self.pruned.shape(leaf)

    def entries(self, name: str) -> list[np.ndarray[Any, np.dtype[np.bool_]]]:
        return self.pruned.entries(self.leaves[f"{self.path}.{name}" if self.path else name])

    def rewrite(self, *ops: Callable[..., Any]) -> Rewrite | None:
        """The rewrite of the module's own call for the pruned shapes, if that call states sizes."""
        for node in self.calls:
            found = self.pruned.found.tape.rewrites.get(node.index)
            if found is not None and (not ops or found.op in ops):
                return found
        return None

    def set(self, edits: Edits, **values: Any) -> None:
        changed = {name: value for name, value in values.items() if getattr(self.module, name) != value}
        if changed:
            edits.attributes[self.path] = changed

    def swap(self, edits: Edits, kind: str, **arguments: Any) -> None:
        edits.swaps[self.path] = {"class": kind, "arguments": arguments}


def _linear(layer: _Layer, edits: Edits) -> None:
    out_features, in_features = layer.shape("weight") or (layer.module.out_features, layer.module.in_features)
    layer.set(edits, in_features=in_features, out_features=out_features)


def _conv(layer: _Layer, edits: Edits) -> None:
    module = layer.module
    shape = layer.shape("weight")
    if shape is None:
        return
    groups = module.groups
    rewrite = layer.rewrite()
    if groups > 1 and rewrite is not None:
        groups = layer.pruned.size(next(x for x in (*rewrite.args, *rewrite.kwargs.values()) if isinstance(x, Size)))
    first, second = (shape[0], shape[1] * groups)
    into, out = (first, second) if module.transposed else (second, first)
    layer.set(edits, in_channels=into, out_channels=out, groups=groups)


def _channels(layer: _Layer, edits: Edits) -> None:
    shape = layer.shape("weight") or layer.shape("running_mean")
    if shape is not None:
        layer.set(edits, num_features=shape[0])
        return
    inputs = [node.args[0] for node in layer.calls if node.op in _NORMS_OF_CHANNELS and isinstance(node.args[0], Value)]
    if {x.shape[1] for x in inputs} == {layer.module.num_features}:  # else it states something else, or nothing
        layer.set(edits, num_features=layer.pruned.sizes(inputs[0])[1])


def _embedding(layer: _Layer, edits: Edits) -> None:
    shape = layer.shape("weight")
    if shape is not None:
        layer.set(edits, num_embeddings=shape[0], embedding_dim=shape[1])


def _prelu(layer: _Layer, edits: Edits) -> None:
    shape = layer.shape("weight")
    if shape is not None:
        layer.set(edits, num_parameters=shape[0])


def _layer_norm(layer: _Layer, edits: Edits) -> None:
    module = layer.module
    rewrite = layer.rewrite(full_count.layer_norm, full_count.rms_norm)
    if rewrite is None or not layer.pruned.changes(rewrite):
        return
    full = list(getattr(module, "full", rewrite.kwargs["full"]))  # an already thinner norm keeps its full count
    arguments = {
        "normalized_shape": layer.pruned.filled(rewrite.args[1]),
        "full": full,
        "eps": module.eps,
        "weight": module.weight is not None,
    }
    if isinstance(module, nn.LayerNorm | slim_layers.LayerNorm):
        layer.swap(edits, "LayerNorm", **arguments, bias=module.bias is not None)
    else:
        layer.swap(edits, "RMSNorm", **arguments)


def _group_norm(layer: _Layer, edits: Edits) -> None:
    module = layer.module
    rewrite = layer.rewrite(full_count.group_norm)
    if rewrite is None or not layer.pruned.changes(rewrite):
        return
    groups, width = layer.pruned.size(rewrite.args[1]), layer.pruned.size(rewrite.kwargs["width"])
    full = getattr(module, "full", rewrite.kwargs["full"])
    if width == full:
        layer.set(edits, num_groups=groups, num_channels=groups * width)
    else:
        layer.swap(
            edits,
            "GroupNorm",
            num_groups=groups,
            width=width,
            full=full,
            eps=module.eps,
            affine=module.weight is not None,
        )


def _recurrent(layer: _Layer, edits: Edits) -> None:
    into, again = layer.shape("weight_ih_l0"), layer.shape("weight_hh_l0")
    if into is not None and again is not None:
        module = layer.module
        gates = module.weight_ih_l0.shape[0] // module.hidden_size
        layer.set(
            edits, input_size=into[1], hidden_size=into[0] // gates, proj_size=again[1] if module.proj_size else 0
        )


def _cell(layer: _Layer, edits: Edits) -> None:
    into, again = layer.shape("weight_ih"), layer.shape("weight_hh")
    if into is not None and again is not None:
        layer.set(edits, input_size=into[1], hidden_size=again[1])


def _attention(layer: _Layer, edits: Edits) -> None:
    module = layer.module
    packed = module.in_proj_weight is not None
    names = ["in_proj_weight"] if packed else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    touched = [*names, "out_proj.weight"]
    if all(mask.all() for name in touched for mask in layer.entries(name)):
        return
    if module.bias_k is not None or module.add_zero_attn:
        raise EmitterError(f"{layer.path} uses bias_kv or add_zero_attn, which its thinner form does not support")
    heads, width = module.num_heads, module.head_dim
    v_width = getattr(module, "v_head_dim", width)  # set if the module is already thinner
    shapes = [(heads, width), (heads, width), (heads, v_width)]
    if packed:
        rows = np.split(layer.entries("in_proj_weight")[0], np.cumsum([h * d for h, d in shapes])[:2])
        inner = [layer.entries("in_proj_weight")[1]] * 3
    else:
        rows, inner = ([layer.entries(name)[i] for name in names] for i in range(2))
    kept, widths = _heads(layer, [own.reshape(shape) for own, shape in zip(rows, shapes, strict=True)])
    there = np.array(getattr(module, "heads", range(heads)))
    layer.swap(
        edits,
        "MultiheadAttention",
        embed_dim=int(inner[0].sum()),
        kdim=int(inner[1].sum()),
        vdim=int(inner[2].sum()),
        out_dim=int(layer.entries("out_proj.weight")[0].sum()),
        num_heads=int(kept.sum()),
        head_dim=int(widths[0].sum()),
        v_head_dim=int(widths[2].sum()),
        scale=getattr(module, "scale", width**-0.5),
        heads=there[kept].tolist(),
        full_heads=getattr(module, "full_heads", heads),
        packed=packed,
        bias=module.in_proj_bias is not None,
        out_bias=module.out_proj.bias is not None,
        dropout=module.dropout,
        batch_first=module.batch_first,
    )
    out = layer.shape("out_proj.weight")
    assert out is not None and out[1] == int(kept.sum()) * int(widths[2].sum())


def _heads(layer: _Layer, parts: Sequence[NDArray[np.bool_]]) -> tuple[NDArray[np.bool_], Sequence[NDArray[np.bool_]]]:
    """Which heads are kept, and which entries of every kept head, for queries, keys and values.

    Args:
        parts: Which rows of queries, keys and values are kept, each of shape (heads, width of a head).

    Raises:
        EmitterError: The kept rows are not the same entries of the same heads.
    """
    kept: NDArray[np.bool_] = np.any(parts[0], axis=1)
    widths: list[NDArray[np.bool_]] = [np.any(part, axis=0) for part in parts]
    whole = all(
        np.array_equal(part, np.logical_and.outer(kept, width)) and width.any()
        for part, width in zip(parts, widths, strict=True)
    )
    if not whole or not np.array_equal(widths[0], widths[1]):
        raise EmitterError(f"the heads of {layer.path} would differ in width, which its thinner form cannot express")
    return kept, widths


def _erased(layer: _Layer, edits: Edits) -> None:
    """The sizes that the zeros of a module state that computes nothing."""
    own: ErasedForward = vars(layer.module)["forward"]
    zeros = [value for node in layer.calls if node.op is _ZEROS for value in node.outputs if value is not None]
    shapes = iter([layer.pruned.sizes(value) for value in zeros])
    found: list[Recipe] = []
    while (first := next(shapes, None)) is not None:
        try:
            found.append(resized(own.gives, chain([first], shapes)))
        except StopIteration:  # it was given an empty vector, and so gave one
            found.append({})
    if any(gives != found[0] for gives in found) or {} in found:
        raise EmitterError(f"{layer.path}, which computes nothing, would have to give other sizes from call to call")
    if found and found[0] != own.gives:
        edits.erased[layer.path] = {"takes": list(own.takes), "gives": dict(found[0])}


NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, slim_layers.LayerNorm, slim_layers.RMSNorm, slim_layers.GroupNorm)

STOCK: dict[type[Any], Callable[[_Layer, Edits], None]] = {
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
    slim_layers.LayerNorm: _layer_norm,
    slim_layers.RMSNorm: _layer_norm,
    slim_layers.GroupNorm: _group_norm,
    slim_layers.MultiheadAttention: _attention,
    ErasedForward: _erased,
}
