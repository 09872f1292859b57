"""Every private interface of torch that ``oto`` stands on, in one place.

``tests/test_torch_private.py`` says what each must do, so a torch release that moves one fails there first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "TorchDispatchMode",
    "example_size",
    "holder",
    "is_free",
    "quiet",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "unwrapped",
]


@contextmanager
def quiet() -> Iterator[None]:
    """No tracebacks in the log: what fails here is tried in another way, or raised."""
    inner = logging.getLogger("torch._subclasses.fake_tensor")
    before, inner.disabled = inner.disabled, True
    try:
        yield
    finally:
        inner.disabled = before


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside ``torch.compile``, ``DistributedDataParallel`` and ``DataParallel``.

    They share its parameters, so it may be trained through the wrapper.
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # importing the class takes a second
            model = inner
        else:
            return model


def holder(model: Any, names: Iterable[str]) -> nn.Module | None:
    """The module that has parameters of these names: ``model``, or what it wraps.

    Averages of the weights hold theirs as ``.module`` (``torch.optim.swa_utils``, timm) or ``.ema`` (Ultralytics).
    """
    wanted = set(names)
    while model is not None:
        if isinstance(model, nn.Module) and wanted <= {n for n, _ in model.named_parameters(remove_duplicate=False)}:
            return model
        inner = (getattr(model, name, None) for name in ("module", "ema", "_orig_mod"))
        model = next((module for module in inner if isinstance(module, nn.Module)), None)
    return None


def example_size(size: Any) -> int:
    """What a symbolic size was on the example."""
    hint: Any = size.node.hint if isinstance(size, torch.SymInt) else size
    return int(hint)


def is_free(size: Any) -> bool:
    """Whether a size is a symbol still, not a number that tracing settled on."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None
