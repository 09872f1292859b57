"""Errors that a user can fix. Each message states the place, the problem, the effect and the remedy.

Each class has one cause. Bugs of the library raise ``AssertionError``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oto.user_code import line_of

FORMER = {
    "ArtefactError": "ArtifactError",
    "ArtefactVersionError": "ArtifactVersionError",
    "DamagedArtefactError": "DamagedArtifactError",
}
"""Former names of classes in this module (:mod:`oto.renamed`)."""


def __getattr__(name: str) -> Any:
    if name not in FORMER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from oto.renamed import warn_of_former_name  # that module imports this one

    warn_of_former_name(name, FORMER[name])
    return globals()[FORMER[name]]


class OTOError(Exception):
    """Base class of every error that ``oto`` raises on purpose."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(a) if isinstance(a, str) else a for a in args))  # names may come from a file


class TraceError(OTOError):
    """The model could not be run or traced on the example input, so there is no graph to analyze."""


class DummyInputError(TraceError, TypeError):
    """The example input is empty, or not a tensor, a tuple of positional arguments or a dict of keyword arguments."""


class UnknownParameterError(OTOError, KeyError):
    """A name or pattern matches no parameter of the model, or a parameter has no name or another shape."""

    def __str__(self) -> str:  # KeyError would show the repr, with escaped newlines
        return str(self.args[0]) if self.args else ""


class UnknownNodeError(OTOError, KeyError):
    """An id or name matches no node, operator or output of the graph."""

    __str__ = UnknownParameterError.__str__


class MissingExtraError(OTOError, ImportError):
    """An optional package that a function needs is not installed."""


class GivenError(OTOError, ValueError):
    """A model, an input or a checkpoint named on a command line is not available or invalid."""


class NothingPrunableError(OTOError):
    """No node group of the model may lose an entry."""

    explanation: object = None
    """The result of ``oto.explain(search=True)``, if the analysis found that nothing can be removed; can be printed."""


class TargetError(OTOError, ValueError):
    """A target or schedule is invalid, or cannot be reached."""


class OptionError(OTOError, TypeError):
    """An option or argument is missing, unknown, invalid, or has no effect."""


class TooLateError(OTOError):
    """Groups were marked after the optimizer was made, or parameters frozen after ``OTO`` was made."""


class ShrinkError(OTOError):
    """A model cannot be made smaller during training, or a member of a family cannot be made; nothing was changed."""


class NoGradientError(OTOError, ValueError):
    """There are no gradients to score zero-invariant groups by, and the criterion needs them."""


class ModelChangedError(OTOError):
    """Parameters of the model are no longer those that its optimizer trains."""


class StaleWrapperError(OTOError, RuntimeError):
    """A wrapper that still holds parameters from before ``shrink`` was called in training."""


class SetupError(OTOError, ValueError):
    """A state dict belongs to another optimizer, or to another schedule or target under which pruning has begun."""


class NonFiniteParameterError(OTOError, ValueError):
    """A parameter, gradient, score or loss is NaN or infinite."""


class EmitterError(OTOError):
    """An emitter cannot express the slim model; the message says which part and why."""


class GraphInputError(OTOError, TypeError):
    """A slim model that is a graph was called with other arguments, or other sizes, than it was made with."""


class UnseenPathError(OTOError, RuntimeError):
    """An overridden forward takes another path than the one for which its overrides were made."""


class TrainModeError(OTOError):
    """A slim model was put into train mode, in which it is not proved equal to the full one."""


class GraphModeError(TrainModeError):
    """A slim model that is a graph of the eval forward was put into train mode."""


class ScriptError(OTOError, AttributeError):
    """``torch.jit.script`` was called with a module that it cannot compile; ``torch.jit.trace`` can.

    It is an ``AttributeError``, since scripting reads attributes of functions that such a forward does not have, and
    other code that reads them can continue without.
    """

    def __init__(self, what: str) -> None:
        super().__init__(
            f"torch.jit.script cannot compile {what}\n"
            "  effect  nothing was compiled\n"
            "  to fix  torch.jit.trace(model, example), which holds at the sizes of its example as any trace does; or"
            " torch.export.export, or subnet.export('onnx')"
        )


class VerificationError(OTOError):
    """The slim model does not compute the same as the zeroed full model, or this cannot be shown. Nothing was
    written."""


class ArtifactError(OTOError):
    """An artifact cannot be written or read."""


class DamagedArtifactError(ArtifactError):
    """A file of an artifact is missing, truncated or does not match its hash."""


class ArtifactVersionError(ArtifactError):
    """An artifact was written in an unknown version of the format."""


class ClassChangedError(ArtifactError):
    """The class given to ``load_subnet`` differs from the one that was saved."""


class OtherNumbersWarning(UserWarning):
    """The model given to ``load_subnet`` has other numbers in attributes than the saved one, and may differ from it."""


class DuplicateRuleError(OTOError):
    """An operator has two rules."""


class DummyInputWarning(UserWarning):
    """The example input holds NaN, so outputs on it may not be comparable."""


class NoGraphvizWarning(UserWarning):
    """Graphviz is not installed, so a drawing was only written as DOT."""


class CollapseWarning(UserWarning):
    """A target can only be met by making some layers very thin."""


class SetupWarning(UserWarning):
    """A checkpoint was saved with another schedule or target before pruning began, or with another ``align``."""


class NoGradientWarning(UserWarning):
    """Node groups are chosen from although no gradient reaches them, or no parameter has a gradient."""


class UntrainedWarning(UserWarning):
    """Parameters of the model are not trained by its optimizer, or an optimizer's state is not in checkpoints."""


class UnstatedWarning(UserWarning):
    """No config states the sizes of a slim model, though a layout requires it, or a checkpoint is saved without one."""


class NotPrunedWarning(UserWarning):
    """Less is pruned than could be or was requested; the message says why."""


class NotItsClassWarning(UserWarning):
    """A slim model is a graph although its class was searched for what it needs; the message says why."""


class CopiedWarning(UserWarning):
    """A member of a family, or some of its weights, is a copy, since it cannot be a view of the full weights."""


class LeftBehindWarning(UserWarning):
    """Tensors that were made to analyze a model are still in places where the next forward may use them."""


class UnknownOpWarning(UserWarning):
    """An operator without a rule kept its channels whole."""


def printable(text: str) -> str:
    """A text in which all characters except newlines that are not printable are escaped, such as terminal controls.

    >>> printable("a" + chr(27) + "[2Jb")
    'a\\\\x1b[2Jb'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def out_of_memory(failure: BaseException) -> bool:
    """Whether memory ran out. Such a failure must not be caught, since trying something else would not help."""
    return isinstance(failure, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(failure)


def reraise_out_of_memory(failure: Exception) -> None:
    """Raise the exception again if memory ran out; to be called by code that catches all others."""
    if out_of_memory(failure):
        raise failure


def first_line(failure: BaseException, limit: int = 300) -> str:
    """The class name of an exception and the first line of its message, truncated to ``limit`` characters."""
    line = next((line.strip() for line in str(failure).splitlines() if line.strip()), "")
    return f"{type(failure).__name__}: {line[:limit]}{' …' * (len(line) > limit)}" if line else type(failure).__name__


def users_level() -> int:
    """The ``stacklevel`` with which a warning of the caller points at the user's line.

    It is not constant: ``step`` is called through hooks of torch and of learning-rate schedulers, for example.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("oto", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def require_flags(**flags: Any) -> None:
    """Check that options are booleans, and not values such as ``"no"``, which Python treats as true.

    Raises:
        OptionError: An option is neither a boolean, 0, 1 nor ``None``; the message names the first one.
    """
    for name, value in flags.items():
        if not (value is None or isinstance(value, bool | np.bool_) or (isinstance(value, int) and value in (0, 1))):
            raise OptionError(f"{name} is {value!r}; it is True or False")


def place_of(name: str, given: Any, effect: str) -> Path:
    """The place that an argument names.

    Raises:
        OptionError: It is neither a text nor a path, or names nothing.
    """
    if isinstance(given, str | os.PathLike) and os.fspath(given):
        return Path(given).expanduser()
    found = f"{given!r}, of the class {type(given).__name__}" if given != "" else "empty"
    raise OptionError(f"{name} is {found}\n  effect  {effect}\n  to fix  name a place, by a text or a path")


def items_of(name: str, given: Any) -> list[Any]:
    """The items of an argument that is gone through once.

    Raises:
        OptionError: It cannot be.
    """
    try:
        items = iter(given)
    except TypeError as failure:
        raise OptionError(
            f"{name} is of the class {type(given).__name__}, which a for loop cannot go through\n"
            "  effect  nothing was made or changed\n  to fix  a list, or model.parameters() for parameters"
        ) from failure
    return list(items)


def some(names: Iterable[str], limit: int = 5) -> str:
    """Join names for a message, cut after ``limit`` with a count.

    >>> some(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    names = list(names)
    if len(names) <= limit:
        return ", ".join(names)
    return f"{', '.join(names[:limit])} and {len(names) - limit} more"


@contextmanager
def rewording(model: object, error: type[OTOError], stage: str, proved: str = "") -> Iterator[None]:
    """Context manager that converts exceptions of a model's code, except for lack of memory.

    Args:
        error: The class to raise instead. Errors of ``oto`` are not converted.
        stage: What was being done, for the message.
        proved: What was finished before, for the message.
    """
    try:
        yield
    except Exception as failure:
        if isinstance(failure, OTOError) or out_of_memory(failure):
            raise
        line = line_of(failure)
        text = [f"{type(model).__name__} failed while {stage}: {first_line(failure)}"]
        text += [f"  at      {line}"] if line else []
        text += [f"  proved  {proved}"] if proved else []
        text += ["  effect  nothing was written; the model is as it was"]
        text += [
            "  to fix  see that line: the model is copied, and run in eval mode several times, on other values, on"
            " another batch size and in float64"
            if line
            else "  to fix  see the traceback above; if it is not about the model, it is a mistake of oto's: report it"
        ]
        raise error("\n".join(text)) from failure
