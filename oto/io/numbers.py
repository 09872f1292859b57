"""The numbers, strings and constant tensors among the attributes of modules.

A class constructed with other values computes something else, and no shape shows it. So the manifest stores the values
of the saved model, and :func:`oto.load_subnet` compares them.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oto.errors import OtherNumbersWarning, some, users_level

_IDLE = ("training", "gradient_checkpointing", "grad_checkpointing", "name_or_path", "default_cfg", "pretrained_cfg")
"""Attributes that no output depends on."""

_IDLE_OF: Mapping[str, tuple[type[nn.Module], ...]] = {
    "p": (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    "momentum": (
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
        *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    ),
}
_OTHER = object()
_TENSOR = "tensor of "
_LARGE = 1 << 22
"""A tensor with more entries is not examined."""


def numbers_of(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes as JSON data: numbers, short strings, digests of tensors, and short lists and dicts of
    these.

    Of private attributes only floats and tensors are included: the rest are mostly flags set by forwards and libraries.
    """
    idle = {*_IDLE, *(name for name, kinds in _IDLE_OF.items() if isinstance(module, kinds))}
    plain = {name: _plain(value) for name, value in vars(module).items() if name not in idle}
    return {
        name: value
        for name, value in plain.items()
        if value is not _OTHER and (not name.startswith("_") or type(value) is float or _is_tensor(value))
    }


def _plain(value: Any, depth: int = 3) -> Any:
    """A value as JSON data; :data:`_OTHER` if that is impossible."""
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) in (bool, int, float, NoneType):
        return value if abs(value or 0) <= 2**53 else _OTHER
    if type(value) is str:
        return value if len(value) < 256 else _OTHER
    if isinstance(value, Tensor | np.ndarray):
        return _digest(value)
    if type(value) in (tuple, list) and depth and len(value) <= 64:
        items = [_plain(item, depth - 1) for item in value]
        return _OTHER if any(item is _OTHER for item in items) else items
    if type(value) is dict and depth and len(value) <= 64:
        known = {key: _plain(item, depth - 1) for key, item in value.items() if type(key) is str}
        return {key: item for key, item in known.items() if item is not _OTHER} or _OTHER
    return _OTHER


def _digest(value: Tensor | np.ndarray[Any, Any]) -> Any:
    """A digest of a constant tensor or array; :data:`_OTHER` if it has no ordinary memory."""
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
        if tensor.is_meta or not 0 < tensor.numel() <= _LARGE:
            return _OTHER
        content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    except (RuntimeError, NotImplementedError, TypeError):  # sparse, quantized, subclasses; arrays of objects
        return _OTHER
    digest = hashlib.sha256(content).hexdigest()[:12]
    return f"{_TENSOR}{str(tensor.dtype).removeprefix('torch.')} {list(value.shape)}, {digest}"


def _is_tensor(value: Any) -> bool:
    return type(value) is str and value.startswith(_TENSOR)


def _differ(was: Any, now: Any) -> bool:
    """Whether two values of :func:`numbers_of` differ. A tensor that only one model has, or that has another shape, is
    ignored: a forward left it."""
    if _is_tensor(was) or _is_tensor(now):
        alike = _is_tensor(was) and _is_tensor(now) and was.rpartition(",")[0] == now.rpartition(",")[0]
        return alike and was != now
    if isinstance(was, dict) and isinstance(now, dict):
        return any(_differ(value, now.get(key)) for key, value in was.items())
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        return any(map(_differ, was, now))
    return bool(was != now)


def warn_of_other_numbers(saved: Mapping[str, Mapping[str, Any]], given: nn.Module) -> None:
    """Warn about attributes that differ from the saved model's: arguments of its constructor, or what a first forward
    leaves."""
    modules = dict(given.named_modules())
    apart = [
        f"{path + '.' if path else ''}{name} was {was}, is {now[name]}"
        for path, held in saved.items()
        if path in modules
        for now in [_with_empty(modules[path])]
        for name, was in held.items()
        if name in now and _differ(was, now[name])
    ]
    if apart:
        warnings.warn(
            f"the {type(given).__name__} holds other numbers than the one that was saved: {some(apart)}\n"
            "  effect  where its forward reads them, the slim model computes something else than what was verified\n"
            "  to fix  make it with the same arguments; what a forward sets for itself, call it once for, or make it in"
            " the constructor; random tensors belong in buffers",
            OtherNumbersWarning,
            stacklevel=users_level(),
        )


def _with_empty(module: nn.Module) -> dict[str, Any]:
    """The numbers of a module, and its empty dicts, which a first forward may fill."""
    empty: dict[str, Any] = {name: {} for name, value in vars(module).items() if type(value) is dict and not value}
    return empty | numbers_of(module)
