"""Identify an intercepted torch call by the numbers in its arguments and the lines of code that make it."""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from os import sep
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from oto._torch import constant, followed_lines, tree_leaves

# --- its arguments ----------------------------------------------------------------------------------------------------


def name_of(func: Callable[..., Any]) -> str:
    """The name of a torch function or method."""
    return getattr(func, "__name__", "")


def first_tensor(arguments: Any) -> Tensor | None:
    """The first tensor among arguments."""
    if isinstance(arguments, Tensor):
        return arguments
    if isinstance(arguments, (tuple, list)):  # torch.compile of torch 2.6 does not support unions of types
        items: Iterable[Any] = arguments
    elif isinstance(arguments, dict):
        items = arguments.values()
    else:
        return None
    for item in items:
        found = first_tensor(item)
        if found is not None:
            return found
    return None


is_tracing: Callable[[], bool] = vars(torch.jit)["is_tracing"]  # untyped in some releases
is_scripting: Callable[[], bool] = vars(torch.jit)["is_scripting"]


def numbers_of(arguments: Any, traced: TracedSizes | None = None) -> list[int | float]:
    """The numbers among arguments, in order, including tensors that ``traced`` knows to stand for sizes."""
    found: list[int | float] = []
    _walk(arguments, lambda number: found.append(number) or number, traced)  # type: ignore[func-returns-value]
    return found


def replaced(arguments: Any, new: Mapping[int, int | float], traced: TracedSizes | None = None) -> Any:
    """The arguments with new numbers at some positions."""
    place = -1

    def put(number: int | float) -> int | float:
        nonlocal place
        place += 1
        return new.get(place, number)

    return _walk(arguments, put, traced)


def _walk(x: Any, put: Callable[[Any], Any], traced: TracedSizes | None) -> Any:
    if isinstance(x, Tensor):
        return x if traced is None or x not in traced else put(x)
    if isinstance(x, bool):
        return x
    if isinstance(x, (int, float, torch.SymInt)):
        return put(x)
    if isinstance(x, torch.Size):
        return tuple(_walk(item, put, traced) for item in x)
    if isinstance(x, (tuple, list)):
        return type(x)(_walk(item, put, traced) for item in x)
    if isinstance(x, slice):
        return slice(*(_walk(part, put, traced) for part in (x.start, x.stop, x.step)))
    return {name: _walk(item, put, traced) for name, item in x.items()} if isinstance(x, dict) else x


class TracedSizes:
    """The tensors that stand for sizes, and for numbers computed from sizes, while TorchScript traces.

    ``64 ** -0.5`` is usually a plain number. If 64 is a traced size, it is a 0-dim tensor, and the power is a call of a
    torch function with a ``float32`` result.
    """

    def __init__(self) -> None:
        self._computed: dict[int, Tensor] = {}  # kept alive, so that ids are not reused

    def __contains__(self, x: Tensor) -> bool:
        return x.ndim == 0 and (x.dtype == torch.int64 or id(x) in self._computed)

    def are_all(self, arguments: Any) -> bool:
        """Whether there are tensors among the arguments and all are sizes, so that the call is only arithmetic."""
        tensors = [x for x in tree_leaves(arguments) if isinstance(x, Tensor)]
        return bool(tensors) and all(x in self for x in tensors)

    def add(self, result: Any) -> None:
        """Add the result of a call that is only arithmetic on sizes."""
        if isinstance(result, Tensor) and not result.ndim:
            self._computed[id(result)] = result


# --- the lines that make it -------------------------------------------------------------------------------------------

_TORCH = f"{Path(torch.__file__).parent}{sep}"
_HERE = f"{Path(__file__).parent.parent}{sep}"
_FORMER = (_TORCH.removesuffix(sep), _HERE.removesuffix(sep))
"""Prefixes of files left out of sites before 0.2; they also match packages such as torchvision."""
_OVERRIDDEN = str(Path(__file__).with_name("overridden.py"))
_RUNS = re.compile(r"^(torch_dynamo_resume_in_)?run_overridden(_at_\d+)?$")
_RESUMED = re.compile(r"^torch_dynamo_resume_in_(.+)_at_\d+$")


@cache
def line_of_site(file: str, number: int, name: str, former: bool = False) -> str:
    """One line of a site: the name of the function and the text of the line; empty for code that is not the user's.

    For a forward of torch or of ``oto`` it is just ``"forward"``, so that calls that it makes are never mistaken for
    calls that the user's line makes itself.

    Args:
        former: Use the form of artifacts from before 0.2.
    """
    resumed = _RESUMED.match(name)
    name = resumed[1] if resumed else name
    if file.startswith(_FORMER if former else (_TORCH, _HERE)):
        return "forward" if name in ("forward", "_oto_analyzed") else ""
    return f"{name}: {linecache.getline(file, number).strip() or number}"


def lines_of(frame: FrameType | None) -> list[tuple[str, int, str]]:
    """File, line and function of a frame and its callers, outermost first."""
    found = []
    while frame is not None:
        code = frame.f_code
        found.append((code.co_filename, frame.f_lineno, code.co_name))
        frame = frame.f_back
    return found[::-1]


def running(frame: FrameType | None, outside: FrameType | None = None) -> list[str]:
    """The lines of code that are running, outermost first; only those inside the frame ``outside``, if given."""
    found = []
    while frame is not None and frame is not outside:
        code = frame.f_code
        if line := line_of_site(code.co_filename, frame.f_lineno, code.co_name):
            found.append(line)
        frame = frame.f_back
    return found[::-1]


def nesting() -> int:
    """How many nested overridden forwards (:class:`oto.nn.overridden.OverriddenForward`) are running."""
    if torch.compiler.is_dynamo_compiling():
        return int(_compiled_depth())
    return _depth_of(lines_of(sys._getframe(1)))


def site_of_call(depth: int, former: bool = False) -> str:
    """The site of the current call in the overridden forward at this depth; ``former`` as in :func:`line_of_site`."""
    if torch.compiler.is_dynamo_compiling():
        return str(_compiled_site(depth, former))
    return _site_of(lines_of(sys._getframe(1)), depth, former)


def may_be_former(site: str) -> bool:
    """Whether a site may be from an artifact before 0.2, where a forward of, say, torchvision is just ``"forward"``."""
    return "forward" in site.split("\n")


def user_module(frame: FrameType | None) -> str | None:
    """The Python module whose code is running."""
    while frame is not None:
        if not frame.f_code.co_filename.startswith((_TORCH, _HERE)):
            return str(frame.f_globals.get("__name__"))
        frame = frame.f_back
    return None


@constant
def _compiled_depth() -> int:
    return _depth_of([*lines_of(sys._getframe(1)), *followed_lines()])


@constant
def _compiled_site(depth: int, former: bool) -> str:
    return _site_of([*lines_of(sys._getframe(1)), *followed_lines()], depth, former)


def _depth_of(places: Sequence[tuple[str, int, str]]) -> int:
    return sum(file == _OVERRIDDEN and bool(_RUNS.search(name)) for file, _, name in places)


def _site_of(places: Sequence[tuple[str, int, str]], depth: int, former: bool) -> str:
    begin = 0
    for i, (file, _, name) in enumerate(places):
        if file == _OVERRIDDEN and _RUNS.search(name):
            depth -= 1
            begin = i + 1
            if not depth:
                break
    return "\n".join(line for place in places[begin:] if (line := line_of_site(*place, former)))
