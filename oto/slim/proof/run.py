"""A model run as it is compared: in eval mode, in its own dtype or in float64, or as users run it."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from oto._torch import TorchDispatchMode, tree_map_only
from oto.nn import OverriddenForward
from oto.nn.overridden import learning
from oto.slim.edits import Edits
from oto.slim.proof.float64 import WIDER, throughout, unrounded, widened, widening
from oto.trace.decisions import Script
from oto.trace.inputs import arguments
from oto.trace.outputs import tensors_in
from oto.trace.snapshot import Snapshot, preserved


class _Decided(TorchDispatchMode):
    """What a run decides by its values is written to a script, or taken from there."""

    supports_higher_order_operators = True

    def __init__(self, script: Script) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.script = script

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        return result if op.namespace == "prim" else self.script.take(op, result)


def run(
    module: nn.Module,
    dummy_input: Any,
    wide: bool = False,
    found: Snapshot | None = None,
    script: Script | None = None,
    fast: bool = False,
) -> list[Tensor]:
    """The tensors that a module gives, in eval mode, on a copy of the input; a float64 module in float64 throughout.

    Args:
        wide: Compute in float64 with the parameters as they are: each is widened where it is read.
        found: As for :func:`oto.trace.snapshot.preserved`.
        script: Where what is decided by values is written down, or taken from.
        fast: As users run a model: in inference mode, with torch's fast paths, and no mode of this package.
    """
    args, kwargs = tree_map_only(Tensor, lambda t: t.detach().clone(), arguments(dummy_input))
    decided = nullcontext() if script is None else _Decided(script)
    with ExitStack() as stack:
        stack.enter_context(preserved(module, dummy_input, found))
        stack.enter_context(unrounded())
        if fast:
            torch.backends.mha.set_fastpath_enabled(True)  # ``as_found`` puts it back
            stack.enter_context(torch.inference_mode())
            return [t.detach() for t in tensors_in(module(*args, **kwargs))]
        if wide:
            for buffer in module.buffers():  # what is written to them is not to be rounded; put back afterwards
                if buffer.dtype in WIDER and not buffer.is_meta:
                    buffer.data = widened(buffer.data)
            stack.enter_context(torch.inference_mode())  # calls arrive whole, before their operands are compared
            stack.enter_context(widening())
            stack.enter_context(decided)
            return [widened(t.detach()) for t in tensors_in(module(*args, **kwargs))]
        stack.enter_context(torch.no_grad())
        stack.enter_context(throughout(module))
        stack.enter_context(decided)
        return [t.detach() for t in tensors_in(module(*args, **kwargs))]


def learn(slim: nn.Module, edits: Edits, dummy_input: Any) -> None:
    """Write down, in a slim model and its edits, by what the calls are known that are told something."""
    told = {
        path: module.forward for path, module in slim.named_modules() if isinstance(module.forward, OverriddenForward)
    }
    if told:
        with learning(slim):
            run(slim, dummy_input)
        edits.told.update({path: one.calls for path, one in told.items()})
