"""The tensors in a model's inputs or outputs, however nested."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(result: Any) -> Iterator[Tensor]:
    """The tensors of an output, in tuples, lists, mappings and dataclasses, however nested.

    Other objects, such as key-value caches, are state that the model passes to itself; they are not searched.
    """
    return (tensor for _, tensor in named_tensors_in(result))


def named_tensors_in(result: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of an output, each with its path: keys, fields and indices joined by dots."""
    return ((path, leaf) for path, leaf in named_leaves(result, name) if isinstance(leaf, Tensor))


def named_leaves(result: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All leaves of an output, whatever their type, each with its path."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(result, Mapping):
        items = result.items()
    elif isinstance(result, list | tuple):
        items = zip(getattr(result, "_fields", range(len(result))), result, strict=True)
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        items = ((field.name, getattr(result, field.name)) for field in dataclasses.fields(result))
    else:
        yield name, result
    for key, item in items:
        yield from named_leaves(item, f"{name}.{key}" if name else str(key))
