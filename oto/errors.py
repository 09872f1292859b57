"""Errors a user can put right: where, what, consequence, remedy.

Each class has one cause. Internal mistakes stay ``AssertionError``.
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
"""Names that were changed (:mod:`oto.renamed`)."""


def __getattr__(name: str) -> Any:
    if name not in FORMER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from oto.renamed import warn_of_former_name  # it reads this file

    warn_of_former_name(name, FORMER[name])
    return globals()[FORMER[name]]


class OTOError(Exception):
    """Base of every error that ``oto`` raises on purpose."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(a) if isinstance(a, str) else a for a in args))  # names may come from a file


class TraceError(OTOError):
    """The model could not be run on the example input, so there is no graph to analyze."""


class DummyInputError(TraceError, TypeError):
    """The example input is not a tensor, a tuple of positional arguments or a dict of keyword arguments."""


class UnknownParameterError(OTOError, KeyError):
    """A name or pattern matches no parameter of the model."""

    def __str__(self) -> str:  # KeyError would show the repr, with escaped newlines
        return str(self.args[0]) if self.args else ""


class UnknownNodeError(OTOError, KeyError):
    """An id or the name of an operator matches no node of the graph."""

    __str__ = UnknownParameterError.__str__


class MissingExtraError(OTOError, ImportError):
    """An optional package that a function needs is not installed."""


class GivenError(OTOError, ValueError):
    """A model, an input or a checkpoint that a command line names cannot be had."""


class NothingPrunableError(OTOError):
    """No node group of the model may lose an entry."""

    explanation: object = None
    """What ``oto.explain(search=True)`` would have said, where the analysis found that nothing may go: print it."""


class TargetError(OTOError, ValueError):
    """The asked sparsity or schedule cannot be reached."""


class OptionError(OTOError, TypeError):
    """An option, of ``OTO`` or of an optimizer, is missing, unknown, means nothing, or belongs to something else."""


class TooLateError(OTOError):
    """Something was marked or frozen after the choice that it should have influenced was made."""


class ShrinkError(OTOError):
    """A model cannot get smaller in the middle of training; nothing was changed."""


class NoGradientError(OTOError, ValueError):
    """No gradient says which zero-invariant groups matter, and the criterion needs one."""


class ModelChangedError(OTOError):
    """Parameters of the model are no longer those that its optimizer trains."""


class StaleWrapperError(OTOError, RuntimeError):
    """A wrapper that holds the parameters of before ``shrink`` was called to train."""


class SetupError(OTOError, ValueError):
    """A checkpoint was made with another schedule or target, and its pruning has begun."""


class NonFiniteParameterError(OTOError, ValueError):
    """A parameter holds NaN or infinity, so no zero can be trusted."""


class EmitterError(OTOError):
    """An emitter cannot express the slim model; the message says which part and why."""


class GraphInputError(OTOError, TypeError):
    """A slim model that is a graph was called with other arguments, or other sizes, than it was made with."""


class UnseenPathError(OTOError, RuntimeError):
    """An overridden forward takes a different path than the one that its overrides are for."""


class TrainModeError(OTOError):
    """A slim model was put into train mode, where it is not known to compute what the full one does."""


class GraphModeError(TrainModeError):
    """A slim model that is a graph of the eval forward was put into train mode."""


class ScriptError(OTOError, AttributeError):
    """``torch.jit.script`` was asked for what it cannot compile; ``torch.jit.trace`` takes it.

    An ``AttributeError``, for it asks a forward for what functions have, and whoever else does may go on without.
    """

    def __init__(self, what: str) -> None:
        super().__init__(
            f"torch.jit.script cannot compile {what}\n"
            "  effect  nothing was compiled\n"
            "  to fix  torch.jit.trace(model, example), which holds at the sizes of its example as any trace does; or"
            " torch.export.export, or subnet.export('onnx')"
        )


class VerificationError(OTOError):
    """The slim model does not compute what the zeroed model computes, or nothing shows that. Nothing was written."""


class ArtifactError(OTOError):
    """The saved artifact cannot be written or read."""


class DamagedArtifactError(ArtifactError):
    """A file of the artifact is missing, cut short or does not match its hash."""


class ArtifactVersionError(ArtifactError):
    """The artifact was written by an unknown version of the format."""


class ClassChangedError(ArtifactError):
    """The class given to ``load_subnet`` is not the one that was saved."""


class OtherNumbersWarning(UserWarning):
    """The model given to ``load_subnet`` holds other numbers than the one that was saved, and may compute others."""


class DuplicateRuleError(OTOError):
    """An operator has two rules."""


class DummyInputWarning(UserWarning):
    """The example input holds NaN, so what a model computes of it may be compared with nothing."""


class NoGraphvizWarning(UserWarning):
    """Graphviz is not installed, so a drawing was written as DOT only."""


class CollapseWarning(UserWarning):
    """A target can only be met by making some layers very thin."""


class SetupWarning(UserWarning):
    """A checkpoint was made with another schedule or target; its pruning had not begun."""


class NoGradientWarning(UserWarning):
    """Some node groups are chosen from although no gradient reaches them."""


class UntrainedWarning(UserWarning):
    """Parameters of the model are trained by no step of its optimizer, or an optimizer's state is in no checkpoint."""


class UnstatedWarning(UserWarning):
    """No config states the sizes of a slim model, though a layout asks for it, or a checkpoint is written without."""


class NotPrunedWarning(UserWarning):
    """Less is pruned than could be or was asked for; the message says why."""


class NotItsClassWarning(UserWarning):
    """A slim model is a graph although the class was asked what it can do without; the message says why."""


class CopiedWarning(UserWarning):
    """A member of a family, or some of its weights, is a copy, since no view of the full weights can express it."""


class LeftBehindWarning(UserWarning):
    """Tensors that were made to analyze a model are still somewhere where the next forward may meet them."""


class UnknownOpWarning(UserWarning):
    """An operator without a rule kept its channels whole."""


def printable(text: str) -> str:
    """A text without characters that a terminal obeys or cannot show: they are spelled out, and only lines stay.

    >>> printable("a" + chr(27) + "[2Jb")
    'a\\\\x1b[2Jb'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def out_of_memory(failure: BaseException) -> bool:
    """Whether memory ran out, which must never be hidden: trying the same differently would not help."""
    return isinstance(failure, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(failure)


def reraise_out_of_memory(failure: Exception) -> None:
    """Raise it once more where memory ran out: what tries something else on any other failure does not swallow that."""
    if out_of_memory(failure):
        raise failure


def first_line(failure: BaseException, limit: int = 300) -> str:
    """The kind of an exception and the first line that it says, cut."""
    line = next((line.strip() for line in str(failure).splitlines() if line.strip()), "")
    return f"{type(failure).__name__}: {line[:limit]}{' …' * (len(line) > limit)}" if line else type(failure).__name__


def users_level() -> int:
    """The ``stacklevel`` with which a warning of the caller points at the user's line.

    ``step`` is called through torch's hooks, and through a learning-rate scheduler's, so it is no fixed number.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("oto", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def require_flags(**flags: Any) -> None:
    """Refuse options that are neither true nor false, such as ``"no"``, which Python takes for true.

    Raises:
        OptionError: The first of them, by its name.
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
    told = f"{given!r}, of the class {type(given).__name__}" if given != "" else "empty"
    raise OptionError(f"{name} is {told}\n  effect  {effect}\n  to fix  name a place, by a text or a path")


def items_of(name: str, given: Any) -> list[Any]:
    """The items of an argument that is gone through once.

    Raises:
        OptionError: It cannot be.
    """
    try:
        items = iter(given)
    except TypeError as failure:
        raise OptionError(
            f"{name} is {given!r}, of the class {type(given).__name__}, which cannot be gone through\n"
            "  effect  nothing was made or changed\n  to fix  a list, or whatever else a for loop takes"
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
    """Whatever a model's code raises inside comes as one of ours, with the stage; memory that ran out does not."""
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
