"""Undo what forwards leave in a model besides its named tensors: caches, and what hooks collect.

State that a forward leaves after the analysis (a table for the last size, activations with their autograd graph, a
buffer that the first call registers) has the full size, and a slim model must not start with it. So while a slim model
is made, the model holds what it held when it was analyzed. A forward of the slim model then fills its own cache.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oto.trace.snapshot import content_of, is_of_the_user

_DEEP = 5  # the limit on steps from a module to a piece of its state
_LARGE = 1_000  # a container with more entries counts as data
_APART = ("_parameters", "_modules", "training")  # attributes of a module that are not state
_SIZES = frozenset({"kernel_size", "stride", "padding", "dilation", "output_padding", "groups", "padding_mode",
                    "ceil_mode", "output_size", "num_groups", "normalized_shape", "start_dim", "end_dim"})  # fmt: skip
"""Constants of torch's modules that determine sizes, or which entries belong together."""
# Modules that an eval forward passes by
_LEFT_OUT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout})
_GONE = object()
"""Marks a missing entry."""


@dataclass(frozen=True, eq=False)
class _Then:
    """What a container held, and the containers in it."""

    content: dict[Any, Any]
    inside: dict[Any, _Then]


_EMPTY = _Then({}, {})  # shared by the many empty containers, such as hooks


@dataclass(frozen=True, eq=False)
class Change:
    """What a container holds now, and what it held when the model was analyzed."""

    holder: Any
    now: dict[Any, Any]
    then: dict[Any, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that the container holds now."""
        items = [item for value in self.now.values() for item in (value if isinstance(value, tuple) else (value,))]
        return [item for item in items if isinstance(item, Tensor)]

    @property
    def has_tensors(self) -> bool:
        """Whether tensors were added, or tensors that the analysis knows were removed."""
        differ = [key for key in self.now | self.then if self.now.get(key, _GONE) is not self.then.get(key, _GONE)]
        return any(_has_tensors(table.get(key)) for key in differ for table in (self.now, self.then))


class ModelState:
    """What the modules of a model held at one time; no tensor is copied."""

    def __init__(self, model: nn.Module) -> None:
        self._then = {path: _snapshot(vars(module)) for path, module in model.named_modules()}
        self._kinds = {path: type(module) for path, module in model.named_modules()}

    def altered(self, model: nn.Module, called: Collection[str]) -> list[str]:
        """The modules of ``torch.nn`` that were changed by hand since then in a way that the analysis depends on.

        These are other values of constants such as a stride, and modules without parameters that were replaced by a
        module of another class, such as an activation. Nothing else is compared, since training may change it.

        Args:
            called: The paths of the modules that make calls in the graph.
        """
        found = []
        for path, module in model.named_modules():
            kind, now = self._kinds.get(path), type(module)
            if path not in called or kind is None or not _of_torch(kind):
                continue
            if kind is not now:
                bare = not any(p is not None for p in module.parameters(recurse=False))
                idle = issubclass(kind, _LEFT_OUT) and issubclass(now, _LEFT_OUT)
                if bare and not idle and _of_torch(now):
                    found.append(f"{path} is a {now.__name__}, and was a {kind.__name__}")
                continue
            for name in _SIZES.intersection(getattr(kind, "__constants__", ())):
                old, new = self._then[path].content.get(name), vars(module).get(name)
                if not _same(old, new):
                    found.append(f"{f'{path}.' if path else ''}{name} is {new!r}, and was {old!r}")
        return found

    def changes(self, model: nn.Module, known: Collection[str]) -> list[Change]:
        """The state that forwards have left since then in ``model``, which is the same model or a copy.

        If tensors appeared in a module, all of its changes are returned: numbers in it may describe the tensors.

        Args:
            known: Names of tensors that the analysis knows; they keep their present values.
        """
        found: list[Change] = []
        named: dict[str, set[str]] = {}
        for path, _, name in (name.rpartition(".") for name in known):
            named.setdefault(path, set()).add(name)
        for path, module in model.named_modules():
            then = self._then.get(path)
            if then is not None:
                changes = list(_changes(then, vars(module), named.get(path, ())))
                if any(change.has_tensors for change in changes):
                    found += changes
        return found


@contextmanager
def undone(changes: Sequence[Change]) -> Iterator[None]:
    """Context manager in which changes are undone."""
    for change in changes:
        _fill(change.holder, change.then)
    try:
        yield
    finally:
        for change in changes:
            _fill(change.holder, change.now)


def tables(model: nn.Module) -> list[Change]:
    """For each user container or object that holds unnamed tensors, the change that removes them.

    Attributes become ``None``, and so do tuples in modules; a list that also holds other things is left alone.
    """
    named = {id(t) for t in (*model.parameters(), *model.buffers())}

    def is_table(x: Any) -> bool:
        items = x if isinstance(x, tuple) else (x,)
        return any(isinstance(item, Tensor) and id(item) not in named for item in items)

    found: dict[int, Change] = {}
    for own in map(vars, model.modules()):
        tuples = {key: None for key, value in own.items() if isinstance(value, tuple) and is_table(value)}
        if tuples:
            found[id(own)] = Change(own, dict(own), own | tuples)
    level = [v for m in model.modules() for k, v in vars(m).items() if k not in (*_APART, "_buffers")]
    for _ in range(_DEEP):
        holders = [(x, inner) for x in level if (inner := _holder(x)) and id(inner) not in found]
        level = []
        for x, holder in holders:
            now = content_of(holder)
            then = {key: value for key, value in now.items() if not is_table(value)}
            if holder is not x:
                then = {key: then.get(key) for key in now}
            elif isinstance(holder, list | deque) and then:
                then = now
            found[id(holder)] = Change(holder, now, then)
            level += now.values()
    return [change for change in found.values() if change.has_tensors]


def _holder(x: Any) -> Any:
    """``x`` itself if it is a container, the ``__dict__`` of a user's object, or ``None``."""
    if type(x) in _ATOMS:  # most of what modules hold
        return None
    if isinstance(x, dict | list | deque):
        return x if len(x) <= _LARGE else None
    if isinstance(x, Tensor | nn.Module | type) or not is_of_the_user(type(x)) or not type(x).__dictoffset__:
        return None
    return object.__getattribute__(x, "__dict__")


def _snapshot(holder: Any, deep: int = 0) -> _Then:
    if not holder:
        return _EMPTY
    content = content_of(holder)
    inside = {
        key: _snapshot(inner, deep + 1)
        for key, value in content.items()
        if key not in _APART and deep < _DEEP and (inner := _holder(value)) is not None
    }
    return _Then(content, inside)


def _changes(then: _Then, holder: Any, known: Collection[str] = ()) -> Iterator[Change]:
    now, wanted = content_of(holder), dict[Any, Any]()
    for key in [*then.content, *(key for key in now if key not in then.content)]:
        old, new = then.content.get(key, _GONE), now.get(key, _GONE)
        if key in then.inside and type(new) is type(old) and (inner := _holder(new)) is not None:
            yield from _changes(then.inside[key], inner, known if key == "_buffers" else ())
            stays = True
        else:
            stays = key in _APART or (key in known and isinstance(new, Tensor)) or _stays(old, new)
        chosen = new if stays else old
        if chosen is not _GONE:
            wanted[key] = chosen
    if len(now) != len(wanted) or any(wanted.get(key, _GONE) is not value for key, value in now.items()):
        yield Change(holder, now, wanted)


def _stays(old: Any, new: Any) -> bool:
    """Whether an entry keeps its present value: it is unchanged, or neither is data nor holds any."""
    if new is old:
        return True
    if isinstance(new, Tensor):
        return isinstance(old, Tensor) and (old.shape, old.dtype) == (new.shape, new.dtype)
    if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
        return all(map(_stays, old, new))
    if type(new) in _ATOMS:
        return type(new) is type(old) and bool(new == old)
    return new is not _GONE and not isinstance(new, tuple | dict | list | deque) and not _has_tensors(new)


def _of_torch(kind: type[nn.Module]) -> bool:
    return kind.__module__.startswith("torch.nn.modules.")


def _same(one: Any, other: Any) -> bool:
    """Whether two constants are equal; a number stands for as many as there are dimensions."""
    one, other = (tuple(x) if isinstance(x, list) else x for x in (one, other))
    if isinstance(one, tuple) != isinstance(other, tuple):
        items, number = (one, other) if isinstance(one, tuple) else (other, one)
        return all(item == number for item in items)
    return bool(one == other)


def _has_tensors(x: Any, deep: int = 0) -> bool:
    if isinstance(x, Tensor):
        return True
    items = x if isinstance(x, tuple | set) else None if (inner := _holder(x)) is None else content_of(inner).values()
    return deep < _DEEP and items is not None and any(_has_tensors(item, deep + 1) for item in items)


def _fill(holder: Any, content: dict[Any, Any]) -> None:
    if isinstance(holder, dict):
        kind = OrderedDict if isinstance(holder, OrderedDict) else dict  # a subclass of the user's may forbid it
        kind.clear(holder)
        kind.update(holder, content)
    else:
        holder.clear()
        holder.extend(content.values())
