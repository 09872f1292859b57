"""The arguments and sizes that a traced graph accepts, and the errors for any others."""

from __future__ import annotations

import ast
import enum
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from oto._torch import SIZE_FUNCTIONS, substituted, tree_leaves, tree_map_only
from oto.errors import GraphInputError, some
from oto.nn.calls import is_tracing

_PLAIN = (bool, int, float, str, torch.dtype, torch.device)


class Stands(enum.Enum):
    """Stand-ins for arguments that are not stored."""

    TENSOR = "a tensor"
    ANYTHING = "anything"

    def __repr__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model's ``forward``.

    Attributes:
        kind: The name of its kind in ``inspect.Parameter``.
        default: Its default, if that is plain data.
    """

    name: str
    kind: str
    optional: bool
    default: Any


@dataclass(frozen=True)
class Takes:
    """The inputs that a graph was traced with.

    Attributes:
        parameters: The parameters of the model's ``forward``, if known.
        given: For each argument of the graph, in order, the value at tracing, with a stand-in for each tensor.
        conditions: Conditions on sizes that must hold for the graph to be valid: ``L['x'].size()[2] % 2 == 0``.
        free: For each tensor, by the name or path of its argument, the dimensions that may have other sizes.
        sizes: For each tensor, the size of each dimension: a number, or an expression in the free sizes.
        symbols: The values of the free sizes on the example.
    """

    parameters: tuple[Parameter, ...]
    given: Mapping[str, Any]
    conditions: tuple[str, ...] = ()
    free: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sizes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    symbols: Mapping[str, int] = field(default_factory=dict)

    def signature(self) -> inspect.Signature:
        """The signature of the model's ``forward``."""
        if not self.parameters:
            return inspect.Signature(
                [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in self.given]
            )
        return inspect.Signature(
            [
                inspect.Parameter(
                    p.name, getattr(inspect.Parameter, p.kind), **({"default": p.default} if p.optional else {})
                )
                for p in self.parameters
            ]
        )

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the graph by name.

        Raises:
            GraphInputError: An argument is missing, unknown, or different from what the graph was traced with.
        """
        named = self._named(args, kwargs)
        for name in list(named):
            if name not in self.given:
                if not self._is_default(name, named[name]):
                    raise self._refused(f"{name} was passed, and the graph was made without it", f"leave {name} out")
                del named[name]
        for name, wanted in self.given.items():
            if name not in named:
                if _holds_tensors(wanted):
                    raise self._refused(f"{name} is missing, and the graph was made with it", f"pass {name}")
                named[name] = wanted
            elif not _fits(wanted, named[name]):
                raise self._refused(
                    f"{name} is {_kind(named[name])}, and the graph was made with {wanted!r}", "pass that"
                )
        return named

    def _named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        order = [p.name for p in self.parameters if p.kind.startswith("POSITIONAL")] or list(self.given)
        rest = next((p.name for p in self.parameters if p.kind == "VAR_POSITIONAL"), None)
        known = {p.name for p in self.parameters} | set(self.given)
        named: dict[str, Any] = {}
        for i, value in enumerate(args):
            if i < len(order):
                named[order[i]] = value
            elif rest is None:
                raise self._refused(f"{len(args)} positional arguments were passed", "pass what it was made with")
            else:
                named[f"{rest}_{i - len(order)}"] = value
        for name, value in kwargs.items():
            if name in named:
                raise self._refused(f"{name} was passed twice", "pass it once")
            if name not in known and not any(p.kind == "VAR_KEYWORD" for p in self.parameters):
                raise self._refused(f"{name} was passed, which the model does not know", f"leave {name} out")
            named[name] = value
        return named

    def _is_default(self, name: str, value: Any) -> bool:
        for p in self.parameters:
            if p.name == name and p.optional:
                return value is p.default or (isinstance(value, _PLAIN) and bool(value == p.default))
        return value is None  # an unknown option counts as left out if it is None

    def _refused(self, what: str, remedy: str) -> GraphInputError:
        return GraphInputError(
            f"{what}\n  made with  {some(self.given, 12)}\n"
            "  effect     nothing was computed: a slim model that is a graph takes the arguments of the example passed"
            " to OTO(...)\n"
            f"  to fix     {remedy}, or pass OTO(...) an example as you call the model; a slim model of the model's own"
            " class takes everything that the model takes"
        )

    def require(self, named: Mapping[str, Any], conditions: Sequence[tuple[str, Callable[..., Any]]]) -> None:
        """Refuse sizes for which the graph is not valid.

        Raises:
            GraphInputError: A condition fails.
        """
        seen = self._sources(named)
        if is_tracing():  # sizes are tensors while TorchScript traces, and conditions on them would be traced too
            seen = tree_map_only(Tensor, _Sized, seen)
        for text, holds in conditions:
            if not holds(seen):
                raise self._unfit(text, named)

    def _unfit(self, text: str, named: Mapping[str, Any]) -> GraphInputError:
        shapes = [f"{name} {tuple(value.shape)}" for name, value in named.items() if isinstance(value, Tensor)]
        free = [f"{name} {list(dims)}" for name, dims in self.free.items() if dims]
        return GraphInputError(
            f"the graph does not hold for these sizes: it was made where {_shown(text)}\n"
            f"  sizes   {some(shapes)}\n  free    {some(free) or 'no dimension'}\n  effect  nothing was computed\n"
            "  to fix  pass sizes that fulfill this, or pass OTO(...) an example of the size that you need; a slim"
            " model of the model's own class takes all sizes that the model takes"
        )

    def _sources(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """The mapping by name in which conditions look up arguments."""
        seen = dict(named)
        for p in self.parameters:
            if p.kind == "VAR_POSITIONAL":
                seen[p.name] = [v for n, v in named.items() if n.startswith(f"{p.name}_")]
            elif p.kind == "VAR_KEYWORD":
                seen[p.name] = named
        return seen

    @functools.cached_property
    def compiled(self) -> tuple[tuple[str, Callable[..., Any]], ...]:
        return tuple((text, compiled(text)) for text in self.conditions)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "compiled"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def holds(self, named: Mapping[str, Any]) -> bool:
        """Whether the graph is valid for the sizes of these arguments."""
        seen = self._sources(named)
        return all(holds(seen) for _, holds in self.compiled)

    def other_sizes(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[list[tuple[int, ...]]]:
        """Two other shapes of each tensor among the arguments, smaller and larger, for which the graph is valid.

        A leading dimension, taken for a batch, is tried at one and at one more than on the example; other dimensions at
        a quarter of their size and at an eighth more, or at the nearest valid sizes.

        Returns:
            For each of the two, the shapes of the tensors in the order of the leaves; fewer if nothing is free.
        """
        tensors = [leaf for leaf in tree_leaves((list(args), dict(kwargs))) if isinstance(leaf, Tensor)]
        if len(tensors) != len(self.sizes):
            return []
        leading = {size for sizes in self.sizes.values() for size in sizes[:1] if isinstance(size, str)}
        found: list[list[tuple[int, ...]]] = []
        alike: dict[tuple[int, bool], list[str]] = {}  # for example the lengths of tokens and of their mask
        for name, n in self.symbols.items():
            alike.setdefault((n, name in leading), []).append(name)
        for larger in (False, True):
            now = dict(self.symbols)
            for (n, first), names in alike.items():
                tries: tuple[int, ...]
                if first:
                    tries = (n + 1, n + 2) if larger else (1,)
                else:
                    up = (
                        n + n // 8,
                        n + n // 4,
                        n + n // 2,
                        2 * n,
                        n + 1,
                    )  # only a little larger, because the model is run on it, also in float64
                    tries = up if larger else (n // 4, n // 2, 3 * n // 4, n - 1)
                for together in (names, *([name] for name in names if len(names) > 1)):
                    if all(now[name] == n for name in together):
                        changed = (now | dict.fromkeys(together, m) for m in tries if m not in (0, n))
                        now = next((sizes for sizes in changed if self._admits(sizes, args, kwargs)), now)
            shapes = self._shapes(now)
            if now != self.symbols and shapes not in found:
                found.append(shapes)
        return found

    def _shapes(self, symbols: Mapping[str, int]) -> list[tuple[int, ...]]:
        return [
            tuple(n if isinstance(n, int) else substituted(n, symbols) for n in sizes) for sizes in self.sizes.values()
        ]

    def _admits(self, symbols: Mapping[str, int], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        shapes = iter(self._shapes(symbols))
        try:
            meta = tree_map_only(Tensor, lambda _: torch.empty(next(shapes), device="meta"), (list(args), dict(kwargs)))
            return self.holds(self.bind(*meta))
        except (
            RuntimeError,
            NameError,
            ZeroDivisionError,
            GraphInputError,
        ):  # negative sizes, or unknown functions in a condition
            return False


class _Sized:
    """Stands for a tensor while TorchScript traces; its sizes are plain numbers."""

    def __init__(self, x: Tensor) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that a number leaves the trace
            self._shape = tuple(map(int, x.shape))

    def size(self) -> tuple[int, ...]:
        return self._shape


def compiled(text: str) -> Callable[..., Any]:
    """Compile a condition to a function of the arguments, which the condition calls ``L``."""
    made: Callable[..., Any] = eval(f"lambda L: ({text})", {"__builtins__": {}, **SIZE_FUNCTIONS})
    return made


def _shown(text: str) -> str:
    """A condition in readable form."""
    return ast.unparse(ast.parse(re.sub(r"L\['(\w+)'\]", r"\1", text), mode="eval"))


def _holds_tensors(tree: Any) -> bool:
    if isinstance(tree, Mapping):
        return any(map(_holds_tensors, tree.values()))
    if isinstance(tree, list | tuple):
        return any(map(_holds_tensors, tree))
    return tree is Stands.TENSOR or tree is Stands.ANYTHING


def _fits(wanted: Any, found: Any) -> bool:
    if wanted is Stands.TENSOR:
        return isinstance(found, Tensor)
    if wanted is Stands.ANYTHING:
        return True
    if isinstance(wanted, Mapping):
        return (
            isinstance(found, Mapping)
            and len(wanted) == len(found)
            and all(key in found and _fits(value, found[key]) for key, value in wanted.items())
        )
    if isinstance(wanted, list | tuple):
        return isinstance(found, list | tuple) and len(wanted) == len(found) and all(map(_fits, wanted, found))
    return found is wanted or (isinstance(found, _PLAIN) and bool(found == wanted))


def _kind(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, _PLAIN) else f"a {type(value).__name__}"


def traced(tree: Any) -> Any:
    """An argument in the form against which later arguments are compared."""
    if isinstance(tree, Tensor):
        return Stands.TENSOR
    if tree is None or isinstance(tree, _PLAIN):
        return tree
    if isinstance(tree, Mapping):
        return {key: traced(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return [traced(value) for value in tree]
    return Stands.ANYTHING


def parameters_of(forward: Callable[..., Any]) -> tuple[Parameter, ...]:
    """The parameters of a ``forward``."""

    def default(p: inspect.Parameter) -> Any:
        return p.default if p.default is None or isinstance(p.default, _PLAIN) else Stands.ANYTHING

    return tuple(
        Parameter(p.name, p.kind.name, p.default is not p.empty, default(p))
        for p in inspect.signature(forward).parameters.values()
    )
