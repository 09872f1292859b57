"""Every private interface of torch that ``oto`` stands on, in one place.

``tests/test_torch_private.py`` says what each must do, so a torch release that moves one fails there first.
"""

from __future__ import annotations

import gc
import io
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch._C import DisableTorchFunction
from torch._guards import TracingContext
from torch._library.custom_ops import OPDEFS
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_is_leaf, tree_map, tree_unflatten
from torch.utils._pytree import tree_leaves as leaves_of_any_tree
from torch.utils._pytree import tree_map_only as map_any_tree

__all__ = [
    "SIZE_FUNCTIONS",
    "DisableTorchFunction",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "TorchDispatchMode",
    "codegen_state",
    "compile_package",
    "constant",
    "count_conditions",
    "data_parallel_around",
    "example_size",
    "expression",
    "fake_empty",
    "followed_lines",
    "guards_of",
    "holder",
    "is_free",
    "load_package",
    "memory_of",
    "nested_codegen",
    "python_code",
    "quiet",
    "same_sharding",
    "substituted",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "undistributed",
    "unwrapped",
]


def memory_of(t: torch.Tensor) -> tuple[Any, Any]:
    """A key of the memory that a tensor lies in, which its views share, and what keeps the key from being used again.

    The memory itself may be freed. A tensor without such memory, as a sparse one, is its own.
    """
    try:
        memory = StorageWeakRef(t.untyped_storage())
    except (RuntimeError, NotImplementedError):
        return id(t), t
    return memory.cdata, memory


_LEAVES = frozenset({type(None), bool, int, float, str, torch.Tensor, nn.Parameter, torch.dtype, torch.device})


def tree_leaves(tree: Any) -> list[Any]:
    """The leaves of nested containers.

    Arguments of calls are tuples, lists and dicts, and there are many of them: these are gone through in a tenth of
    torch's time. What else is a container, torch says.
    """
    found: list[Any] = []
    _gather(tree, found)
    return found


def _gather(x: Any, found: list[Any]) -> None:
    kind = type(x)
    if kind is tuple or kind is list:
        for item in x:
            _gather(item, found)
    elif kind is dict:
        for item in x.values():
            _gather(item, found)
    elif kind in _LEAVES or tree_is_leaf(x):
        found.append(x)
    else:
        found += leaves_of_any_tree(x)


def tree_map_only(kind: type[Any] | tuple[type[Any], ...], change: Callable[[Any], Any], tree: Any) -> Any:
    """Nested containers with something in place of each leaf of a kind; as quick as :func:`tree_leaves`."""
    own = type(tree)
    if own is tuple or own is list:
        return own([tree_map_only(kind, change, item) for item in tree])
    if own is dict:
        return {name: tree_map_only(kind, change, item) for name, item in tree.items()}
    if isinstance(tree, kind):
        return change(tree)
    return tree if own in _LEAVES or tree_is_leaf(tree) else map_any_tree(kind, change, tree)


SIZE_FUNCTIONS: dict[str, Any] = {"abs": abs, "max": max, "min": min, **SYMPY_INTERP}
"""What a text of sizes may call; torch before 2.12 takes the builtins for granted."""


@contextmanager
def quiet() -> Iterator[None]:
    """No tracebacks in the log: what fails here is tried in another way, or raised."""
    inner = logging.getLogger("torch._subclasses.fake_tensor")
    before, inner.disabled = inner.disabled, True
    try:
        yield
    finally:
        inner.disabled = before


def fake_empty(
    mode: FakeTensorMode, shape: Sequence[int], stride: Sequence[int] | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A fake tensor, in a quarter of the time that the mode takes for a call of ``torch.empty``."""
    with unset_fake_temporarily():
        if stride is None:
            inner = torch.empty(shape, dtype=dtype, device="meta")
        else:
            inner = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    made: torch.Tensor = FakeTensor(mode, inner, device)
    return made


def python_code(op: Any) -> Callable[..., Any] | None:
    """The Python function that an operator of ``torch.library.custom_op`` consists of; ``None`` if it is none."""
    made = OPDEFS.get(op._schema.name) if isinstance(op, OpOverload) else None
    return getattr(made, "_init_fn", None)


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


def data_parallel_around(model: nn.Module) -> list[nn.parallel.DistributedDataParallel]:
    """Every living ``DistributedDataParallel`` that holds a model, itself or in what it wraps.

    Torch keeps no list of them, so the objects of the process are gone through, where there is a process group at all.
    """
    kind = nn.parallel.DistributedDataParallel
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    found: list[Any] = [held for held in gc.get_objects() if issubclass(type(held), kind)]
    return [wrapper for wrapper in found if any(module is model for module in wrapper.modules())]


_SHARDING = (
    "_is_fsdp_managed_module",
    "_fsdp_use_orig_params",
    "_distribute_module_applied",
    "__composable_api_state_key",
)


@contextmanager
def undistributed(model: nn.Module) -> Iterator[None]:
    """While inside, modules are of the classes that they had before ``fully_shard``, and none has what that, or
    ``parallelize_module``, has put on it: hooks, and a state that neither copies nor pickles. Parameters stay."""
    kept = [(module, type(module), dict(vars(module))) for module in model.modules()]
    tables = [(held, dict(held)) for *_, own in kept for key, held in own.items() if held and key.endswith("_hooks")]
    fsdp = sys.modules.get("torch.distributed.fsdp")
    try:
        for module, kind, own in kept:
            if fsdp is not None and isinstance(module, fsdp.FSDPModule):
                module.__class__ = next(base for base in kind.__mro__ if not issubclass(base, fsdp.FSDPModule))
            for key in [key for key in own if key.startswith(_SHARDING)]:
                del vars(module)[key]
        for held, content in tables:
            for key in [key for key, hook in content.items() if _distributes(hook)]:
                del held[key]
        yield
    finally:
        for held, content in tables:
            held.clear()
            held.update(content)
        for module, kind, own in kept:
            module.__class__ = kind
            vars(module).update({key: value for key, value in own.items() if key.startswith(_SHARDING)})


def same_sharding(model: nn.Module, other: nn.Module) -> None:
    """Let torch find for ``model`` what ``fully_shard`` knows of ``other``, whose attributes it has taken over."""
    from torch.distributed import _composable_state

    known = _composable_state._module_state_mapping
    known.pop(model, None)
    if other in known:
        known[model] = known[other]


def _distributes(hook: Any) -> bool:
    """Whether a hook is one of ``torch.distributed``; some are held in a tuple or in an object around them."""
    hook = getattr(hook, "hook", hook)
    hook = getattr(hook, "func", hook)
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed")


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


def expression(size: Any) -> str:
    """A symbolic size in the symbols of its program."""
    return str(size.node.expr)


def substituted(text: str, symbols: Mapping[str, int]) -> int:
    """What an expression in symbols comes to."""
    made: Any = eval(text, {"__builtins__": {}, **SIZE_FUNCTIONS}, dict(symbols))
    return int(made)


def count_conditions(size: Any) -> int:
    """How many conditions on sizes the run that made a symbolic size has collected so far."""
    return len(size.node.shape_env.guards)


def guards_of(program: torch.export.ExportedProgram) -> list[str] | None:
    """The conditions under which an exported program holds, in Python; ``None`` where torch does not tell."""
    found: list[str] | None = getattr(program, "_guards_code", None)
    return found


def codegen_state(graph: fx.Graph) -> tuple[Any, ...] | None:
    """How a graph nests what it takes and gives, as plain data; ``None`` if it does not."""
    info = getattr(graph._codegen, "pytree_info", None)
    return None if info is None else tuple(info)


def nested_codegen(graph: fx.Graph, state: tuple[Any, ...]) -> None:
    """Nest what a graph takes and gives as another one did."""
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(*state)))


def compile_package(program: torch.export.ExportedProgram, stream: io.BytesIO) -> None:
    """Compile an exported program ahead of time, with its weights, into one file that needs no Python."""
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(program, package_path=stream)


def load_package(path: str) -> Callable[..., Any]:
    """What :func:`compile_package` wrote, to be called as the model."""
    from torch._inductor import aoti_load_package

    loaded: Callable[..., Any] = aoti_load_package(path)
    return loaded


_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant(function: _Function) -> _Function:
    """A function that ``torch.compile`` calls while it follows code that calls it, and whose result is a constant.

    ``torch.compiler.assume_constant_result`` does the same, but imports the compiler for it, which takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def followed_lines() -> list[tuple[str, int, str]]:
    """File, line and function of the code that ``torch.compile`` follows right now, the outermost first."""
    return [(f.filename, f.lineno or 0, f.name) for f in TracingContext.extract_stack()]
