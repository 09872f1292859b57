"""Record every operator call, with the calling module and line of code."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from oto._torch import (
    DisableTorchFunction,
    FakeTensorMode,
    HigherOrderOperator,
    TorchDispatchMode,
    python_code,
    tree_leaves,
    tree_map_only,
)
from oto.errors import reraise_out_of_memory
from oto.nn.calls import running
from oto.nn.functional import grouped_mm
from oto.trace.decisions import Script
from oto.trace.graph import GraphBuilder, Value, effects
from oto.trace.shapes import REMEMBERED, result_of
from oto.trace.snapshot import (
    Snapshot,
)
from oto.user_code import user_line

aten = torch.ops.aten

# operators that write to their first argument and return it; if only shapes are computed, they need not be run
_WRITES_FIRST = {
    aten.relu_.default,
    aten.silu_.default,
    aten.hardswish_.default,
    aten.hardsigmoid_.default,
    aten.hardtanh_.default,
}


# a kernel that rejects some widths; a thinner copy calls the replacement once its calls are overridden
_OF_ANY_WIDTH: dict[Any, Callable[..., Tensor]] = (
    {aten._grouped_mm.default: grouped_mm} if hasattr(aten, "_grouped_mm") else {}  # torch before 2.8 has none
)

_Place: TypeAlias = tuple[Any, ...]


@contextmanager
def around_modules(
    enter: Callable[[nn.Module, Any], None], leave: Callable[[nn.Module, Any, Any], None] | None = None
) -> Iterator[None]:
    """Context manager that calls hooks before every module runs, with its arguments, and after it even if it raises."""
    hooks = [nn.modules.module.register_module_forward_pre_hook(enter)]
    if leave is not None:
        hooks.append(nn.modules.module.register_module_forward_hook(leave, always_call=True))
    try:
        with warnings.catch_warnings():  # compiled submodules warn about the hooks
            warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global hooks")
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _place(tensor: Tensor) -> _Place | None:
    """The location of a tensor in memory; ``None`` if it has no ordinary storage."""
    try:
        return tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    except (NotImplementedError, RuntimeError):
        return None


class Recorder(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(
        self, builder: GraphBuilder, known: Callable[[Any], bool], modules: Mapping[str, nn.Module], found: Snapshot
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.builder = builder
        self.found = found
        self.known = known
        self.shapes_only = builder.mode in ("meta", "fake")
        self.constants: dict[Value, Tensor] = {}
        self.script: Script | None = None
        self.fake: FakeTensorMode | None = None
        self.alive: list[Tensor] = []  # tensors are identified by id, so none may be freed during the run
        self.places: dict[int, _Place] = {}
        self.latest: dict[_Place, int] = {}
        self.path: list[str] = [""]
        self.running: list[tuple[str, int]] = []
        self.begins: list[int] | None = None
        self.runs = 0
        self.outside: FrameType | None = None
        self.attributes = {
            id(value): f"{name}.{attribute}" if name else attribute
            for name, module in _once(modules)
            for attribute, value in vars(module).items()
            if isinstance(value, Tensor)
        }

    def hold(self, tensor: Tensor) -> None:
        self.alive.append(tensor)
        place = _place(tensor)
        if place is not None:
            self.places[id(tensor)] = place
            self.latest[place] = id(tensor)

    def see(self, tensor: Tensor) -> Value:
        """The value of a tensor; a tensor that was never seen is a constant of the model.

        Reading and setting ``.data`` are not calls: a tensor that is new or has moved in memory is identified with the
        one that was seen at its location.
        """
        place = _place(tensor)
        if id(tensor) not in self.builder.current or place != self.places.get(id(tensor)):
            name = self.attributes.get(id(tensor))
            source = None if name or place is None else self.latest.get(place)
            self.hold(tensor)
            if source is None:
                self.builder.leaf(id(tensor), tensor.shape, tensor.dtype, [name] if name else [], "constant")
                if self.builder.mode == "real":
                    self.constants[self.builder.current[id(tensor)]] = tensor.clone()  # before anything writes to it
            else:
                args, result = (self.builder.current[source],), (id(tensor), tensor.shape, tensor.dtype)
                self.builder.add(
                    aten.alias.default, args, {}, [result], self.path[-1], self._line(), shared_keys=[source]
                )
        return self.builder.current[id(tensor)]

    def _line(self) -> str:
        """The line of the model's code that is running; empty in torch modules that no user code calls."""
        return "" if self.outside is None else user_line(self.outside)

    def valued(self, x: Any) -> Any:
        """Arguments with a :class:`Value` in place of each tensor."""
        if isinstance(x, Tensor):
            return self.see(x)
        if isinstance(x, (tuple, list)):
            items = [self.valued(item) for item in x]
            return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
        return {name: self.valued(value) for name, value in x.items()} if isinstance(x, dict) else x

    @contextmanager
    def following(self, modules: Mapping[str, nn.Module], outside: FrameType) -> Iterator[None]:
        """Keep ``self.path`` at the path of the running module.

        Args:
            outside: The frame that runs the model.
        """
        self.outside = outside
        paths = {id(module): name for name, module in _once(modules)}

        def enter(module: nn.Module, _args: Any) -> None:
            self.path.append(paths.get(id(module), self.path[-1]))
            self.runs += 1
            self.running.append((self.path[-1], self.runs))
            if self.begins is not None:
                self.begins.append(len(running(sys._getframe(1), self.outside)))

        def leave(module: nn.Module, _args: Any, _output: Any) -> None:
            self.path.pop()
            self.running.pop()
            if self.begins is not None:
                self.begins.pop()

        try:
            with around_modules(enter, leave):
                yield
        finally:
            self.outside = None  # the frame holds tensors

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op.namespace == "prim":  # for example reading the device of a fake tensor
            return op(*args, **kwargs)
        whole = isinstance(op, HigherOrderOperator)  # torch.cond and the like: functions among the arguments
        if not whole and not self.known(op):
            with self:
                parts = op.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
            code = python_code(op)
            if code is not None and _runs_without_data(code, args, kwargs):
                with self:
                    return code(*args, **kwargs)
        named = kwargs
        if op is aten.einsum.default:  # the order of its products depends on sizes and does not change the result
            named = {name: value for name, value in kwargs.items() if name != "path"}
        writes = not whole and op._schema.is_mutable
        with DisableTorchFunction():  # our own inspection of tensors is not a call of the model
            values = self.valued(args), self.valued(named)
            self.found.look(sys._getframe(1))
            result = args[0] if self.shapes_only and op in _WRITES_FIRST else None
            if result is None and self.shapes_only:
                result = result_of(op, args, kwargs, self.fake)
        if self.builder.mode == "real" and (whole or writes):
            self.found.spare((args, kwargs))
        if result is None and self.shapes_only and not whole:
            result = REMEMBERED.call(op, args, kwargs, self.fake)
        elif result is None:
            result = _OF_ANY_WIDTH.get(op, op)(*args, **kwargs)
        if self.script is not None:
            result = self.script.take(op, args, kwargs, result)
        with DisableTorchFunction():
            self._write_down(op, values, (args, named), result, writes)
        return result

    def _write_down(self, op: Any, values: tuple[Any, Any], given: tuple[Any, Any], result: Any, writes: bool) -> None:
        """Add a call to the graph, or mark that a number leaves torch, on which code may branch."""
        results: list[Any] = []
        for leaf in [result] if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                if id(leaf) not in self.builder.current:
                    self.found.made.append(weakref.ref(leaf))
                self.hold(leaf)
                results.append((id(leaf), leaf.shape, leaf.dtype))
            else:
                results.append(None)
        if any(results) or writes:
            written, shared = (_keys_at(places, *given) if places else [] for places in effects(op))
            self.builder.add(op, *values, results, self.path[-1], self._line(), written, shared)
        else:
            self.builder.ends.update(x for x in tree_leaves(values) if isinstance(x, Value))


def _keys_at(places: Sequence[tuple[int, str]], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[int]:
    """The keys of the tensors at the given positions or names among the arguments."""
    found = [args[position] if position < len(args) else kwargs.get(name) for position, name in places]
    return [id(leaf) for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def _once(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Each module by the first of its paths."""
    seen: set[int] = set()
    for path, module in modules.items():
        if id(module) not in seen:
            seen.add(id(module))
            yield path, module


def _runs_without_data(code: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether an operator's Python code runs without data, so that no values leave torch."""
    try:
        given = tree_map_only(
            Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), (args, kwargs)
        )
        code(*given[0], **given[1])
    except Exception as failure:  # its code may do anything with data
        reraise_out_of_memory(failure)
        return False
    return True
