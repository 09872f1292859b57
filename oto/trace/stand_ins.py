"""Stand-ins for the tensors of a model while it is recorded: meta tensors, fake tensors, or the real ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from oto._torch import (
    DisableTorchFunction,
    FakeTensorMode,
    fake_empty,
    quiet,
    tree_leaves,
)
from oto.trace.graph import Mode
from oto.trace.recorder import Recorder
from oto.trace.snapshot import (
    tensors_by_path,
)


def on_meta(model: nn.Module) -> bool:
    """Whether parameters have only shapes, no values."""
    return any(p.is_meta for p in model.parameters())


def empty(t: Tensor) -> Tensor:
    """A tensor like another, without data."""
    with DisableTorchFunction():
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def stand_ins(way: Mode, inputs: Any, stack: ExitStack) -> tuple[Callable[[Tensor], Tensor], FakeTensorMode | None]:
    """Enter a mode; returns the function that makes a tensor's stand-in, and the fake tensor mode, if any."""
    if way == "meta":
        stack.enter_context(torch.device("meta"))
        return empty, None
    if way == "autograd":
        return lambda t: t.detach().clone().requires_grad_(t.requires_grad), None
    if way == "real":
        return lambda t: t.detach() if isinstance(t, nn.Parameter) else t.detach().clone(), None
    stack.enter_context(quiet())
    mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
    device = next((t.device for t in tree_leaves(inputs) if isinstance(t, Tensor) and not t.is_meta), None)

    def fake(t: Tensor) -> Tensor:
        if t.is_meta and device is not None:  # meta parameters and real inputs: put both on one device
            return fake_empty(mode, t.shape, t.stride(), t.dtype, device)
        return mode.from_tensor(t)

    return fake, mode


class Held:
    """The parameters and buffers of a model, and their stand-ins in a run.

    Attributes:
        named: The tensors under all of their names.
        names: The names of each tensor, by its id.
        made: The stand-in of each tensor, by its id.
    """

    def __init__(self, modules: Mapping[str, nn.Module], bare: bool) -> None:
        self.modules, self.bare = modules, bare
        self.named = tensors_by_path(modules)
        self.names: dict[int, list[str]] = {}
        for name, tensor in self.named.items():
            self.names.setdefault(id(tensor), []).append(name)
        self.made: dict[int, Tensor] = {}

    def make(self, stand_in: Callable[[Tensor], Tensor]) -> None:
        with DisableTorchFunction():
            self.made = {key: stand_in(self.named[own[0]]) for key, own in self.names.items()}

    def write_down(self, recorder: Recorder, inputs: Any) -> None:
        """Register the tensors and the inputs with the recorder."""
        builder = recorder.builder
        for key, tensor in self.made.items():
            first = self.named[self.names[key][0]]
            parameter = isinstance(first, nn.Parameter)
            recorder.hold(tensor)
            builder.leaf(
                id(tensor),
                tensor.shape,
                tensor.dtype,
                self.names[key],
                "parameter" if parameter else "buffer",
                parameter and first.requires_grad,
            )
        for leaf in tree_leaves(inputs):
            if isinstance(leaf, Tensor):
                recorder.hold(leaf)
                builder.input(id(leaf), leaf.shape, leaf.dtype)

    def call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
        """Call a model that holds the stand-ins; returns the result, and the tensors that forward replaced them by."""
        # swap a module that the model holds twice only once, otherwise its own tensors would not be restored
        places: dict[tuple[int, str], str] = {}
        for name in self.named:
            path, _, last = name.rpartition(".")
            places.setdefault((id(self.modules[path]), last), name)
        swapped = {name: self.made[id(self.named[name])] for name in places.values()}
        if self.bare:
            for module in self.modules.values():
                tables: tuple[dict[str, Any], ...] = module._parameters, module._buffers
                for table in tables:
                    table.update({key: self.made[id(t)] for key, t in table.items() if id(t) in self.made})
            result = model(*args, **kwargs)
            now = tensors_by_path(self.modules)
            after = {name: now[name] for name in swapped if name in now}
        else:
            after = swapped
            result = torch.func.functional_call(model, swapped, args, kwargs, tie_weights=False)
        return result, {name: t for name, t in after.items() if t is not self.made[id(self.named[name])]}
