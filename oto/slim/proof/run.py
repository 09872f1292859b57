"""Run a model for a comparison: in eval mode, in its own dtype or in float64, or as users run it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from oto._torch import TorchDispatchMode, tree_map_only
from oto.nn import OverriddenForward
from oto.nn.overridden import learning
from oto.slim.edits import Edits
from oto.slim.proof.float64 import WIDER, throughout, widened, widening, without_tf32
from oto.trace.decisions import Script
from oto.trace.inputs import Arguments, arguments
from oto.trace.outputs import tensors_in
from oto.trace.snapshot import Snapshot, preserved, state_of


class _Decided(TorchDispatchMode):
    """Records the value-dependent decisions of a run in a script, or replays those of a script."""

    supports_higher_order_operators = True

    def __init__(self, script: Script) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.script = script

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        return result if op.namespace == "prim" else self.script.take(op, args, kwargs, result)


@contextmanager
def _deciding(script: Script | None, module: nn.Module, given: Any) -> Iterator[None]:
    """Context manager that records the decisions of a run in a script, or replays them; does nothing for ``None``."""
    if script is None:
        yield
        return
    with script.running([*module.parameters(), *state_of(module, given)]), _Decided(script):
        yield


def run(
    module: nn.Module,
    dummy_input: Any,
    wide: bool = False,
    found: Snapshot | None = None,
    script: Script | None = None,
    fast: bool = False,
    again: bool = False,
) -> list[Tensor]:
    """The output tensors of a module in eval mode, on a copy of the input; a float64 module computes only in float64.

    Args:
        wide: Compute in float64 without copying the parameters: each is widened as it is read.
        found: As for :func:`oto.trace.snapshot.preserved`.
        script: Records value-dependent decisions, or replays recorded ones.
        fast: Run as users do: in inference mode, with torch's fast paths, without any dispatch mode of this package.
        again: Return the outputs of a second call, which may read what the first one left in the module.
    """
    (args, kwargs), first = _own(dummy_input), _own(dummy_input) if again else None
    with ExitStack() as stack:
        stack.enter_context(preserved(module, dummy_input, found))
        stack.enter_context(without_tf32())
        if fast:
            torch.backends.mha.set_fastpath_enabled(True)  # ``preserved`` puts it back
            stack.enter_context(torch.inference_mode())
            return [t.detach() for t in tensors_in(_last(module, first, args, kwargs))]
        if wide:
            for buffer in module.buffers():  # what is written into them must not be rounded; put back afterwards
                if buffer.dtype in WIDER and not buffer.is_meta:
                    buffer.data = widened(buffer.data)
            stack.enter_context(torch.inference_mode())  # composite operators are not decomposed then
            stack.enter_context(widening())
            stack.enter_context(_deciding(script, module, (args, kwargs)))
            return [widened(t.detach()) for t in tensors_in(_last(module, first, args, kwargs))]
        stack.enter_context(torch.no_grad())
        stack.enter_context(throughout(module))
        stack.enter_context(_deciding(script, module, (args, kwargs)))
        return [t.detach() for t in tensors_in(_last(module, first, args, kwargs))]


def _own(dummy_input: Any) -> Arguments:
    copied: Arguments = tree_map_only(Tensor, lambda t: t.detach().clone(), arguments(dummy_input))
    return copied


def _last(module: nn.Module, first: Arguments | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a module, after a first call with other arguments if there are any."""
    if first is not None:
        module(*first[0], **first[1])
    return module(*args, **kwargs)


def learn(slim: nn.Module, edits: Edits, dummy_input: Any) -> None:
    """Record in a slim model and its edits what identifies the overridden calls."""
    overridden = {
        path: module.forward for path, module in slim.named_modules() if isinstance(module.forward, OverriddenForward)
    }
    if overridden:
        with learning(slim):
            run(slim, dummy_input)
        edits.told.update({path: forward.calls for path, forward in overridden.items()})
