"""What the analysis says, run call by call on thinner tensors: proof for models that neither emitter can express.

The model is recorded on its real example, so this follows the example's path and is of no use for any other input.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import nn

from oto._torch import tree_leaves, tree_map_only
from oto.axes.call import Uniform
from oto.axes.registry import known
from oto.groups import partition
from oto.slim.plan import Thinning, read_zeros
from oto.slim.verify import _Wide
from oto.trace import record as recording
from oto.trace.graph import Graph, Key, Value, write_through
from oto.trace.record import arguments, as_found


def recorded(model: nn.Module, inputs: Any) -> tuple[Graph, dict[Value, torch.Tensor]]:
    """The graph of a run on real data, and the constants that it met."""
    constants: dict[Value, torch.Tensor] = {}
    see = recording._Recorder.see

    def keep(recorder: Any, tensor: torch.Tensor) -> Key:
        new = id(tensor) not in recorder.builder.current
        key = see(recorder, tensor)
        if new:
            constants[recorder.builder.current[id(tensor)]] = tensor.clone()
        return key

    with mock.patch.object(recording._Recorder, "see", keep), as_found(model), recording._untouched(model):
        return recording._run(model, *arguments(inputs), known, "real"), constants


def replay(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    """What the slim model would give on the example, by the zeros that ``model`` (in float64) holds."""
    with _Wide():
        graph, constants = recorded(model, inputs)
    found = partition(graph)
    kept = read_zeros(found.groups, model)
    thin = Thinning(found.found, found.masks(kept))
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    env: dict[Value, torch.Tensor] = {}
    for leaf in graph.leaves:
        tensor = constants[leaf.value] if leaf.kind == "constant" else held[leaf.name]
        env[leaf.value] = thin.thin(leaf, tensor)
    given = [t.clone() for t in tree_leaves(arguments(inputs)) if isinstance(t, torch.Tensor)]
    env.update(zip(graph.inputs, given, strict=True))

    def call(op: Any, args: Any, kwargs: Any) -> torch.Tensor:
        args, kwargs = tree_map_only(Value, env.__getitem__, (args, kwargs))
        return op(*args, **kwargs)

    with as_found(model), torch.inference_mode(), _Wide():
        for node in graph.nodes:
            if node.op is write_through:  # it shares memory with what was written to
                env[node.outputs[0]] = env[node.args[0]]
                continue
            op, args, kwargs = node.op, node.args, dict(node.kwargs)
            rewrite = found.found.tape.rewrites.get(node.index)
            if rewrite is not None and thin.changes(rewrite):
                op, args, kwargs = rewrite.op, thin.filled(rewrite.args), thin.filled(dict(rewrite.kwargs))
            if op is torch.ops.aten.view.default:  # thinner tensors may lie in memory in another way
                op = torch.ops.aten.reshape.default
            rest: dict[Uniform, Any] = {}
            args, kwargs = tree_map_only(Uniform, lambda held, rest=rest: held.computed(call, rest), (args, kwargs))
            args, kwargs = tree_map_only(Value, env.__getitem__, (args, kwargs))
            result = op(*args, **kwargs)
            for value, tensor in zip(node.outputs, tree_leaves(result), strict=True):
                if value is not None:
                    env[value] = tensor
            for before, after in node.written:
                env[after] = env[before]
    return [env[value] for value in graph.outputs]
