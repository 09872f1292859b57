"""Turn a traced graph into a usable model: its layers become modules, and it runs on the device of its inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from oto._torch import OpOverload
from oto.nn import GroupNorm, LayerNorm, RMSNorm
from oto.nn import functional as full_count
from oto.slim.edits import owner_of

aten = torch.ops.aten


def follow_device(graph: fx.Graph) -> None:
    """Replace every device in the graph by the first input's device, so that the module can be moved."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    checked = (node.args[0] for node in graph.nodes if node.target is aten._assert_tensor_metadata.default)
    tensors = (node for node in placeholders if isinstance(node.meta.get("val"), Tensor))
    first: Any = next(tensors, None) or next(checked, None)  # a recording has a check of each input
    here: fx.Node | None = None
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:  # dtype and device change when the module is cast
            kept = {name: value for name, value in node.kwargs.items() if name not in ("dtype", "device", "layout")}
            if len(node.args) > 1 or kept:
                node.kwargs = kept
            else:
                graph.erase_node(node)
            continue
        if node.op != "call_function" or not any(isinstance(x, torch.device) for x in _arguments(node)):
            continue
        if first is None:
            return
        if here is None:
            with graph.inserting_after(placeholders[-1] if first.op == "placeholder" else first):
                here = graph.call_function(getattr, (first, "device"))

        def followed(x: Any, here: Any = here) -> Any:
            return here if isinstance(x, torch.device) else x

        node.args, node.kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), followed)


def _arguments(node: fx.Node) -> list[Any]:
    found: list[Any] = []
    fx.node.map_aggregate((node.args, dict(node.kwargs)), lambda x: found.append(x))
    return found


Options = dict[str, Any]


def _linear(o: Options, weight: Tensor, rank: int) -> nn.Module:
    return nn.Linear(weight.shape[1], weight.shape[0], o["bias"] is not None)


def _conv(o: Options, weight: Tensor, rank: int) -> nn.Module:
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[weight.ndim - 3]
    size, groups, padding = weight.shape[2:], o["groups"], o["padding"]
    stride, dilation = ((*o[name], *o[name] * len(size))[: len(size)] for name in ("stride", "dilation"))
    padding = padding if isinstance(padding, str) else (*padding, *padding * len(size))[: len(size)]
    made: nn.Module = kind(
        weight.shape[1] * groups, weight.shape[0], size, stride, padding, dilation, groups, o["bias"] is not None
    )
    return made


def _embedding(o: Options, weight: Tensor, rank: int) -> nn.Module:
    own, by_frequency, sparse = o["padding_idx"], o["scale_grad_by_freq"], o["sparse"]
    n, width = weight.shape
    return nn.Embedding(n, width, padding_idx=None if own < 0 else own, scale_grad_by_freq=by_frequency, sparse=sparse)


def _layer_norm(o: Options, weight: Tensor, rank: int) -> nn.Module:
    return nn.LayerNorm(o["normalized_shape"], o["eps"], bias=o["bias"] is not None)


def _rms_norm(o: Options, weight: Tensor, rank: int) -> nn.Module:
    return nn.RMSNorm(o["normalized_shape"], o["eps"])


def _group_norm(o: Options, weight: Tensor, rank: int) -> nn.Module | None:
    return None if o["bias"] is None else nn.GroupNorm(o["num_groups"], weight.shape[0], o["eps"])


def _batch_norm(o: Options, weight: Tensor, rank: int) -> nn.Module | None:
    if o["training"] or o["bias"] is None or o["running_mean"] is None or not 2 <= rank <= 5:
        return None
    kind: Any = nn.BatchNorm1d if rank < 4 else nn.BatchNorm2d if rank == 4 else nn.BatchNorm3d
    made: nn.Module = kind(weight.shape[0], o["eps"], o["momentum"])
    return made


def _counted_layer_norm(o: Options, weight: Tensor, rank: int) -> nn.Module:
    return LayerNorm(o["normalized_shape"], o["full"], o["eps"], bias=o["bias"] is not None)


def _counted_rms_norm(o: Options, weight: Tensor, rank: int) -> nn.Module:
    return RMSNorm(o["normalized_shape"], o["full"], o["eps"])


def _counted_group_norm(o: Options, weight: Tensor, rank: int) -> nn.Module | None:
    return None if o["bias"] is None else GroupNorm(o["num_groups"], o["width"], o["full"], o["eps"])


# Each function makes the module for a call from its arguments, its weight and the rank of its input, or returns None.
_MAKERS: dict[Any, Callable[[Options, Tensor, int], nn.Module | None]] = {
    aten.linear.default: _linear,
    aten.conv1d.default: _conv,
    aten.conv2d.default: _conv,
    aten.conv3d.default: _conv,
    aten.conv1d.padding: _conv,
    aten.conv2d.padding: _conv,
    aten.conv3d.padding: _conv,
    aten.embedding.default: _embedding,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.batch_norm.default: _batch_norm,
    full_count.layer_norm: _counted_layer_norm,
    full_count.rms_norm: _counted_rms_norm,
    full_count.group_norm: _counted_group_norm,
}
_ROLES = ("weight", "bias", "running_mean", "running_var")


def name_leaves(slim: fx.GraphModule, source: nn.Module, ranks: dict[fx.Node, int]) -> None:
    """Replace calls by stock ``torch.nn`` modules, each at the path of the module that owns the call's tensors.

    Quantizers and adapters look for modules of these classes. They make the same calls.

    Args:
        source: The module before it was pruned, which holds tied tensors under all their names.
        ranks: The number of dimensions of each node's result.
    """
    graph, made = slim.graph, dict[str, tuple[Any, Options]]()
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _MAKERS:
            continue
        options = _options(node)
        x = options.pop(next(name for name in ("input", "x", "indices") if name in options))
        tensors = {role: options[role] for role in _ROLES if isinstance(options.get(role), fx.Node)}
        plain = not any(isinstance(part, fx.Node) for part in _parts({**options, **dict.fromkeys(tensors)}))
        if not plain or "weight" not in tensors or any(t.op != "get_attr" for t in tensors.values()):
            continue
        path = _path(node, tensors, source)
        same = node.target, {**options, **{role: t.target for role, t in tensors.items()}}
        if path is None or made.get(path, same) != same:
            continue
        if path not in made:
            held = {role: _found(slim, t.target) for role, t in tensors.items()}
            module = _module(node.target, options, held, ranks.get(x, 0))
            if module is None or not _put(slim, path, module, held, source):
                continue
            made[path] = same
        with graph.inserting_before(node):
            call = graph.call_module(path, (x,))
        call.meta = node.meta
        ranks[call] = ranks.get(node, 0)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def _options(node: fx.Node) -> Options:
    """The arguments of a call by name, including defaults."""
    target: Any = node.target
    if not isinstance(target, OpOverload):
        bound = inspect.signature(target).bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)
    named = {a.name: a.default_value if a.has_default_value() else None for a in target._schema.arguments}
    return named | dict(zip(named, node.args, strict=False)) | dict(node.kwargs)


def _parts(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [part for value in tree.values() for part in _parts(value)]
    if isinstance(tree, list | tuple):
        return [part for value in tree for part in _parts(value)]
    return [tree]


def _found(module: nn.Module, target: Any) -> Any:
    try:
        return getattr(*owner_of(module, str(target)), None)
    except AttributeError:
        return None


def _path(node: fx.Node, tensors: Mapping[str, fx.Node], source: nn.Module) -> str | None:
    """The path of the calling module, if it holds the tensors under these names; else the path in their names."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    caller = stack[-1][0] if stack else ""
    if caller and all(
        (own := _found(source, f"{caller}.{role}")) is not None and own is _found(source, tensor.target)
        for role, tensor in tensors.items()
    ):
        return str(caller)
    homes = {str(tensor.target).removesuffix(f".{role}") for role, tensor in tensors.items()}
    home = homes.pop()
    return None if homes or home in {str(t.target) for t in tensors.values()} else home


def _module(target: Any, options: Options, held: Mapping[str, Any], rank: int) -> nn.Module | None:
    """Make a module that does the call and holds its tensors; ``None`` if there is none."""
    if any(isinstance(held[role], nn.Parameter) != (role in ("weight", "bias")) for role in held):
        return None
    with torch.device("meta"):
        module = _MAKERS[target](options, held["weight"], rank)
    if module is None:
        return None
    for role, tensor in held.items():
        setattr(module, role, tensor)
    return module.eval()


def _put(slim: fx.GraphModule, path: str, module: nn.Module, held: Mapping[str, Any], source: nn.Module) -> bool:
    """Put a module at a path, with the other tensors that were there; ``False`` if another module is there."""
    before = _found(slim, path)
    if before is not None:
        if not isinstance(before, nn.Module) or before._modules or type(before) is not nn.Module:
            return False
        for name, tensor in [*before._parameters.items(), *before._buffers.items()]:
            if name not in held:
                setattr(module, name, tensor)
    where = held["weight"].device
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:  # num_batches_tracked of a batch norm
            seen = _found(source, f"{path}.{name}")
            setattr(module, name, seen.clone() if isinstance(seen, Tensor) else torch.zeros_like(buffer, device=where))
    return bool(slim.add_submodule(path, module))
