"""Restore a model after a run, whatever its forward does.

There are two cases. State of the model (attributes of its modules, the objects and containers that they hold, tensors,
the example input) is restored completely. State that its code keeps elsewhere (globals, classes, closures, function
caches) is restored if it holds a tensor afterwards: during the analysis, tensors may have no data or a different dtype,
and must not reach a training step. The frames of a recorded run show where such state is; the places are remembered for
runs that are not recorded, such as those of ``torch.export``.
"""

from __future__ import annotations

import gc
import operator
import random
import sys
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import _lru_cache_wrapper, partial
from types import CellType, FrameType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oto._torch import FakeTensor, tree_leaves
from oto.errors import LeftBehindWarning, some
from oto.trace.inputs import Example
from oto.user_code import is_foreign

# for each class, the namespaces in which its code was seen to run, and the holders in each that may keep a table
_HOLDERS: weakref.WeakKeyDictionary[type[Any], dict[int, list[Any]]] = weakref.WeakKeyDictionary()
# classes whose forward was seen to write to parameters
_WRITERS: weakref.WeakSet[type[Any]] = weakref.WeakSet()

# how often each function cache was cleared here: its counters then restart, and may reach the same numbers again
_FORGOT: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

_LAZY = (nn.UninitializedParameter, nn.UninitializedBuffer)
_LARGE = 10_000  # a container with more entries counts as data
_NESTED = 500  # deeper nesting of modules is taken for a cycle
_DEEP = 5  # the limit on steps from a module or a namespace to an object


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model under all of their paths; ten times as fast as ``named_modules``."""
    found: dict[str, nn.Module] = {}
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        if path.count(".") > _NESTED:
            raise RecursionError(f"a {type(module).__name__} contains itself")
        found[path] = module
        inner = [(f"{path}.{name}" if path else name, m) for name, m in module._modules.items() if m is not None]
        stack += reversed(inner)
    return found


def modules_of(model: nn.Module) -> list[nn.Module]:
    """The modules of a model, each once, in order."""
    found: dict[int, nn.Module] = {}
    stack = [model]
    while stack:
        module = stack.pop()
        if id(module) not in found:
            found[id(module)] = module
            stack += [inner for inner in reversed(module._modules.values()) if inner is not None]
    return list(found.values())


def tensors_by_path(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The parameters of modules, then the buffers, under all of their paths."""
    return {
        f"{path}.{name}" if path else name: tensor
        for registered in ("_parameters", "_buffers")
        for path, module in modules.items()
        for name, tensor in getattr(module, registered).items()
        if tensor is not None
    }


@contextmanager
def preserved(model: nn.Module, given: Any = None, found: Snapshot | None = None) -> Iterator[Snapshot]:
    """Context manager in which the model is in eval mode and wrappers around forwards are removed.

    Afterwards the model, ``given`` and the state of torch are restored.

    Args:
        found: A snapshot of the model and ``given``, if there is one and nothing has changed since.
    """
    found = Snapshot(model, given) if found is None else found
    fastpath = torch.backends.mha.get_fastpath_enabled()
    dtype, python, numpy = torch.get_default_dtype(), random.getstate(), np.random.get_state()  # noqa: NPY002
    modules = modules_of(model)
    places = {p.device for module in modules for p in module._parameters.values() if p is not None}
    cuda = sorted({place.index for place in places if place.type == "cuda" and place.index is not None})
    with torch.random.fork_rng(devices=cuda), torch.set_grad_enabled(torch.is_grad_enabled()):
        try:
            # a fused kernel for a whole attention block would hide its operators
            torch.backends.mha.set_fastpath_enabled(False)
            for module in modules:
                if module.training:
                    module.training = False
            if len(places) <= 1:
                _see_through(modules)
            yield found
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            torch.set_default_dtype(dtype)
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            found.put_back()


def _see_through(modules: Iterable[nn.Module]) -> None:
    """Remove wrappers around the forwards of modules.

    Trainers leave ``module.forward = wrapper(module.forward)`` behind, for autocast, casts of outputs or a compiler.
    Such wrappers refer to the inner function by ``__wrapped__``; a replaced forward without it stays. This function is
    not called if parameters are on several devices, because wrappers then move tensors between devices.
    """
    for module in modules:
        vars(module).pop("_compiled_call_impl", None)  # set by ``module.compile()``
        forward, steps = vars(module).get("forward"), 0
        while forward is not None and steps < _LAYERS:
            if getattr(forward, "__func__", forward) is type(module).forward:
                del vars(module)["forward"]
                break
            forward, steps = getattr(forward, "__wrapped__", None), steps + 1


_LAYERS = 100  # the limit on nested wrappers; more would be a cycle


class Snapshot:
    """The state of a model and of the surroundings of its code, to be restored after a run.

    Attributes:
        made: Weak references to the tensors that were made during the run.
        changed: Whether a run left state in the model or its inputs that another run may read.
    """

    def __init__(self, model: nn.Module, given: Any = None) -> None:
        self.made: list[weakref.ref[Tensor]] = []
        self.changed = False
        self._kind = type(model)
        self._own: dict[int, tuple[Any, dict[Any, Any]]] = {}
        self._code: dict[int, tuple[Any, dict[Any, Any]]] = {}
        self._namespaces: set[int] = set()
        self._empty: list[Any] = []
        self._caches: dict[Any, tuple[dict[Any, Any], bool]] = {}
        modules = modules_by_path(model)
        kinds = {type(module) for module in modules.values()}
        # kernels write to buffers without declaring it
        tensors = {id(t): t for t in tensors_by_path(modules).values()}
        mine = [t for t in tensors.values() if not isinstance(t, _LAZY)]
        written = [t for t in mine if not isinstance(t, nn.Parameter) or kinds & set(_WRITERS)]
        copies = {id(t): t.detach().clone() for t in written if not t.is_meta}
        self._tensors = [
            (t, t.detach(), t.requires_grad, t.grad if t.is_leaf else None, copies.get(id(t))) for t in mine
        ]
        self._spared: dict[int, tuple[Tensor, Tensor]] = {}
        self._storages = {_storage(t): t for t, *_ in self._tensors if not t.is_meta}
        held = reached([*modules_of(model), given.given if isinstance(given, Example) else given], _CODE)
        self._remember(self._own, [x for x in held if not isinstance(x, _CODE)])
        for kind in kinds:
            for index, holders in _HOLDERS.get(kind, {}).items():
                self._namespaces.add(index)
                self._remember(self._code, holders)
        code = {base for kind in kinds for base in kind.__mro__} | {x for x in held if isinstance(x, _CODE)}
        for x in filter(is_of_the_user, code):
            self._remember(self._code, reached([x], nn.Module, x.__module__))
        for space in {kind.__module__ for kind in kinds if is_of_the_user(kind)} & sys.modules.keys():
            caches = [x for x in vars(sys.modules[space]).values() if isinstance(x, _lru_cache_wrapper)]
            self._remember(self._code, caches)

    def _remember(self, where: dict[int, tuple[Any, dict[Any, Any]]], things: Iterable[Any]) -> None:
        for x in things:
            if type(x) in (dict, OrderedDict) and not x and where is self._own:
                self._empty.append(x)  # most dicts are empty: the hooks of a module
            elif isinstance(x, _HOLDS) and id(x) not in self._own and id(x) not in where:
                where[id(x)] = x, content_of(x)

    @contextmanager
    def making_anew(self) -> Iterator[None]:
        """Context manager that bypasses function caches with tensors, so that the calls that make a table are recorded.

        The caches themselves stay: what they hold may be random or learned, and a second call may not reproduce it.
        """
        held = [holder for holder, _ in self._code.values()]
        caches = [x for x in held if isinstance(x, _lru_cache_wrapper) and x.cache_info().currsize]
        caches = [x for x in caches if self._keeps_tensors(x)]
        cells = [x for x in held if isinstance(x, CellType)] if caches else []
        put: list[tuple[Any, str, Any]] = []
        for cache in caches:
            # a decorator may hold the cache in the closure of the function that has the name
            homes = [home] if (home := _home(cache)) is not None else []
            homes += [(cell, "cell_contents") for cell in cells if content_of(cell).get("") is cache]
            for place, name in homes:
                put.append((place, name, vars(place)[name] if isinstance(place, type) else getattr(place, name)))
                setattr(place, name, cache.__wrapped__)
        try:
            yield
        finally:
            for place, name, before in put:
                setattr(place, name, before)

    def _keeps_tensors(self, cache: Any) -> bool:
        """Whether a function cache holds tensors; checked again only if its content has changed, as runs are many."""
        now = content_of(cache)
        before, keeps = self._caches.get(cache, (None, False))
        if before != now:
            keeps = _keeps_tensors(cache)
            self._caches[cache] = now, keeps
        return keeps

    def look(self, frame: FrameType | None) -> None:
        """Add what the namespaces of running code hold, from a frame outwards to the frame that runs the model."""
        while frame is not None:
            space = frame.f_globals
            if id(space) not in self._namespaces:
                name = space.get("__name__", "")
                if name.startswith("oto.") and not name.startswith("oto.nn"):
                    return
                self._namespaces.add(id(space))
                if is_foreign(frame.f_code.co_filename):
                    holders = [x for x in reached([space], nn.Module, name) if isinstance(x, _HOLDS)]
                    _HOLDERS.setdefault(self._kind, {})[id(space)] = holders
                    self._remember(self._code, holders)
            frame = frame.f_back

    def spare(self, written: Iterable[Any]) -> None:
        """Copy a tensor of the model before a call writes to it, directly or through an alias."""
        for tensor in tree_leaves(written):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                mine = self._storages.get(_storage(tensor))
                if mine is not None and id(mine) not in self._spared:
                    self._spared[id(mine)] = mine, mine.detach().clone()

    def writes_parameters(self) -> None:
        """Remember that the parameters have to be copied before another run."""
        _WRITERS.add(self._kind)

    def put_back(self) -> None:
        """Restore everything."""
        self.changed |= bool(self._spared) or any(map(len, self._empty))
        with torch.inference_mode():
            for mine, spared in self._spared.values():
                mine.copy_(spared)
        for t, same, wanted, grad, copy in self._tensors:
            if not _same_memory(t, same):
                self.changed = True
                t.data = same
            if copy is not None and not _equal(copy, t):
                self.changed = True
                with torch.inference_mode():
                    t.copy_(copy)
            if t.is_leaf and t.requires_grad != wanted:
                t.requires_grad_(wanted)
            if t.is_leaf and t.grad is not grad:
                t.grad = grad
        for holder in self._empty:
            if holder:
                holder.clear()
        for holder, content in self._own.values():
            self.changed |= not _OURS.issuperset(_restore(holder, content, lambda value: False))
        for holder, content in self._code.values():
            _restore(holder, content, _no_tensor)

    def warn_of_what_is_left(self) -> None:
        """Warn of tensors without data that are still held somewhere."""
        if not any(t() is not None for t in self.made):
            return
        gc.collect()  # a reference cycle may have held them
        left = [t for ref in self.made if (t := ref()) is not None]
        if left:
            places = some(sorted({type(holder).__name__ for holder in gc.get_referrers(*left) if holder is not left}))
            warnings.warn(
                f"the forward of {self._kind.__name__} keeps tensors outside the model, held by objects of {places}\n"
                f"  shapes  {some(str(tuple(t.shape)) for t in left)}\n"
                "  effect  they were made without data to analyze the model, and the next forward may meet them\n"
                "  to fix  keep such a table in a buffer or an attribute of a module, or call the model once before",
                LeftBehindWarning,
                stacklevel=4,
            )


def _storage(t: Tensor) -> int:
    """An id of a tensor's storage; a tensor without ordinary storage gets its own id."""
    if isinstance(t, FakeTensor):
        return id(t)
    try:
        return t.untyped_storage().data_ptr() or id(t)
    except (RuntimeError, NotImplementedError):
        return id(t)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    if a.is_meta or b.is_meta:  # raising the exception takes a tenth of a millisecond
        return a.is_meta == b.is_meta and a.shape == b.shape
    try:
        return a.is_set_to(b)
    except (RuntimeError, NotImplementedError):  # fake, sparse
        return a.shape == b.shape


def _equal(a: Tensor, b: Tensor) -> bool:
    try:
        return torch.equal(a, b)
    except (RuntimeError, NotImplementedError):  # sparse
        return False


_HOLDS = (dict, list, set, deque, CellType, type, _lru_cache_wrapper)
_CODE = (FunctionType, type, _lru_cache_wrapper)
_LINKS = (tuple, frozenset, partial, MethodType, staticmethod, classmethod, CellType, SimpleNamespace, nn.Module)


def _sort(kind: type[Any]) -> str:
    """How to treat instances of a class; instances of classes outside of Python and torch may lead to a table."""
    if issubclass(kind, Tensor):
        return "tensor"
    if issubclass(kind, _CODE):
        return "code"
    if issubclass(kind, dict | list | set | deque):
        return "sized"
    if issubclass(kind, _LINKS):
        return "link"
    return "link" if is_of_the_user(kind) else "end"


def is_of_the_user(code: Any) -> bool:
    root = code.__module__.partition(".")[0] if isinstance(code.__module__, str) else "builtins"
    return root != "torch" and root not in sys.stdlib_module_names


def reached(roots: Iterable[Any], stop: type | tuple[type, ...], home: str | None = None) -> list[Any]:
    """Everything that can be reached from ``roots``, nearest first.

    Args:
        stop: Objects of these types are not entered.
        home: The only Python module whose functions and classes are entered, besides ``roots``; by default none.
    """
    seen: set[int] = set()
    found: list[Any] = []
    sorts: dict[type[Any], str] = {}
    level = list(roots)
    for depth in range(_DEEP):
        further: list[Any] = []
        for x in level:
            kind = type(x)
            sort = sorts.get(kind) or sorts.setdefault(kind, _sort(kind))
            if sort == "end" or id(x) in seen or (sort == "sized" and len(x) > _LARGE):
                continue
            if sort == "code" and depth and not is_of_the_user(x):
                continue
            seen.add(id(x))
            found.append(x)
            elsewhere = sort == "code" and getattr(x, "__module__", None) != home
            if kind is dict or kind is OrderedDict:
                further += [value for value in x.values() if type(value) not in _NOTHING]
            elif kind is tuple or kind is list:
                further += [value for value in x if type(value) not in _NOTHING]
            elif sort != "tensor" and not (depth and (elsewhere or isinstance(x, stop))):
                further += _inside(x)
        level = further
    return found


def _attributes(model: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """The attributes of modules except parameters, buffers, modules and plain values, as (holder, name, value)."""
    return [
        (own, name, value)
        for own in map(vars, modules_of(model))
        for name, value in own.items()
        if (kind := type(value)) not in _ATOMS
        and not (kind in _TABLES and (not value or name in _REGISTERED))
        and not (kind is tuple and _NOTHING.issuperset(map(type, value)))
    ]


_NOTHING = frozenset({type(None), bool, int, float, str})  # plain values, which are most of what modules hold
_ATOMS = _NOTHING | {type}
_TABLES = frozenset({dict, OrderedDict})  # most are empty: the hooks of a module
_REGISTERED = frozenset({"_parameters", "_buffers", "_modules"})


def surroundings(model: nn.Module) -> list[Any]:
    """What the modules of a model refer to besides parameters, buffers and modules: containers, objects, functions, and
    what the functions close over."""
    found = reached([value for *_, value in _attributes(model)], (nn.Module, *_CODE))
    return found + reached([x for x in found if isinstance(x, FunctionType)], nn.Module)


def state_of(model: nn.Module, *also: Any) -> list[Tensor]:
    """The tensors that a model holds besides its parameters: in buffers, attributes, containers and closures.

    Args:
        also: Further objects that may hold tensors, such as a cache that a forward takes or returns.
    """
    buffers = (t for module in modules_of(model) for t in module._buffers.values())
    return [x for x in (*buffers, *surroundings(model)) if isinstance(x, Tensor)] + tensors_reached(*also)


def tensors_reached(*things: Any) -> list[Tensor]:
    """The tensors held by objects such as a cache, except tensors of modules."""
    return [x for x in reached(things, (nn.Module, *_CODE)) if isinstance(x, Tensor)]


@contextmanager
def standing_in(model: nn.Module, stand_ins: Mapping[int, Tensor], deep: bool = True) -> Iterator[None]:
    """Context manager that puts stand-ins for tensors into the containers, objects and closures of a model.

    A forward may read a parameter from a plain list or dict, for example a tied one.

    Args:
        stand_ins: The stand-in of each tensor, by the tensor's id.
        deep: Search everything that modules refer to, not only their own lists and dicts.
    """
    places: list[tuple[Any, Any, Any]] = list(_attributes(model))
    for holder in surroundings(model) if deep else [value for *_, value in places]:
        if isinstance(holder, dict | list | deque | CellType):
            places += [(holder, key, value) for key, value in content_of(holder).items()]
    changed = []
    for holder, key, value in places:
        new = _swapped(value, stand_ins)
        if new is not value:
            changed.append((holder, key, value, new))
            _put(holder, key, new)
    try:
        yield
    finally:
        for holder, key, value, new in changed:
            if content_of(holder).get(key) is new:
                _put(holder, key, value)


def _swapped(x: Any, stand_ins: Mapping[int, Tensor]) -> Any:
    if isinstance(x, Tensor):
        return stand_ins.get(id(x), x)
    if isinstance(x, tuple) and any(isinstance(item, Tensor | tuple) for item in x):
        items = [_swapped(item, stand_ins) for item in x]
        if all(map(operator.is_, items, x)):
            return x
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    return x


def _put(holder: Any, key: Any, value: Any) -> None:
    if isinstance(holder, dict):
        dict.__setitem__(holder, key, value)
    elif isinstance(holder, CellType):
        holder.cell_contents = value
    else:
        holder[key] = value


def _inside(x: Any) -> Iterable[Any]:
    """What an object refers to directly, found without calling code of the user's classes."""
    if isinstance(x, nn.Module):
        return (object.__getattribute__(x, "__dict__"),)
    if isinstance(x, CellType):
        return content_of(x).values()
    if isinstance(x, FunctionType):
        return (*(x.__closure__ or ()), *(x.__defaults__ or ()), x.__kwdefaults__, x.__dict__)
    if isinstance(x, MethodType | staticmethod | classmethod):
        return (x.__func__, getattr(x, "__self__", None))
    if isinstance(x, partial):
        return (x.func, x.args, x.keywords)
    if isinstance(x, type):
        return vars(x).values()
    own = (object.__getattribute__(x, "__dict__"),) if type(x).__dictoffset__ else ()
    if isinstance(x, dict):
        return (*dict.values(x), *own)
    if isinstance(x, list | tuple | set | frozenset | deque):
        base = next(kind for kind in (list, tuple, set, frozenset, deque) if isinstance(x, kind))
        return (*base.__iter__(x), *own)  # type: ignore[arg-type]
    return own


def content_of(holder: Any) -> dict[Any, Any]:
    """What a container or object holds, by key, position or name."""
    if type(holder) is dict:
        return holder.copy()
    if isinstance(holder, dict):
        return dict(dict.items(holder))
    if isinstance(holder, list | deque):
        return dict(enumerate(list.__iter__(holder) if isinstance(holder, list) else deque.__iter__(holder)))
    if isinstance(holder, set):
        return {id(x): x for x in set.__iter__(holder)}
    if isinstance(holder, type):
        return dict(vars(holder))
    if isinstance(holder, CellType):
        try:
            return {"": holder.cell_contents}
        except ValueError:  # the cell is empty
            return {}
    return {"misses": holder.cache_info().misses, "forgot": _FORGOT.get(holder, 0)}


def _keeps_tensors(cache: Any) -> bool:
    """Whether a function cache holds tensors, according to the garbage collector's references."""
    return any(isinstance(x, Tensor) for x in reached(gc.get_referents(cache), nn.Module))


def _home(cache: Any) -> tuple[Any, str] | None:
    """The Python module or class that holds a function, and its name there; ``None`` if there is none."""
    *way, name = cache.__qualname__.split(".")
    place: Any = sys.modules.get(cache.__module__)
    for step in way:
        place = getattr(place, step, None)
    return (place, name) if place is not None and vars(place).get(name) is cache else None


def _forget(cache: Any) -> None:
    """Clear a function cache."""
    cache.cache_clear()
    _FORGOT[cache] = _FORGOT.get(cache, 0) + 1


_OURS = frozenset({"training", "forward", "_compiled_call_impl"})
"""Attributes of modules that :func:`preserved` itself changes."""


def _restore(holder: Any, before: dict[Any, Any], wanted: Callable[[Any], bool]) -> list[Any]:
    """Restore what a container held if it now holds anything that is not ``wanted``; returns the changed keys."""
    now = holder if isinstance(holder, dict) else content_of(holder)
    same = len(now) == len(before) and all(map(operator.is_, dict.values(now), before.values()))
    if same and (not isinstance(holder, dict) or all(map(operator.is_, holder, before))):
        return []
    now = content_of(holder)
    gone = object()
    changed = [key for key in now | before if now.get(key, gone) is not before.get(key, gone)]
    unwanted = {key for key in changed if key in now and not wanted(now[key])}
    if isinstance(holder, _lru_cache_wrapper):
        _forget(holder)  # the entries of a cache cannot be restored one by one
    elif not unwanted and wanted(gone):
        return changed
    elif isinstance(holder, list | deque | set):
        holder.clear()
        (holder.update if isinstance(holder, set) else holder.extend)(before.values())
    elif isinstance(holder, CellType):
        if before:
            holder.cell_contents = before[""]
        else:
            del holder.cell_contents
    elif isinstance(holder, type):
        for key in unwanted:
            setattr(holder, key, before[key]) if key in before else delattr(holder, key)
    else:
        kind = OrderedDict if isinstance(holder, OrderedDict) else dict  # a subclass of the user's may forbid it
        for key in changed:
            if key not in before and key in unwanted:
                kind.__delitem__(holder, key)
            elif key in before and (key in unwanted or key not in now):
                kind.__setitem__(holder, key, before[key])
        if list(holder) != list(before) and holder.keys() == before.keys():
            for key in before:
                kind.__setitem__(holder, key, kind.pop(holder, key))
    return changed


def _no_tensor(x: Any) -> bool:
    return not any(isinstance(y, Tensor) for y in reached([x], nn.Module))
