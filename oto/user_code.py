"""Find the line of a user's code in which something happens: the innermost one outside torch and this package."""

from __future__ import annotations

import sys
import traceback
from functools import cache
from os import sep
from pathlib import Path
from types import FrameType

import torch

_HERE = f"{Path(__file__).parent}{sep}"
_TORCH = f"{Path(torch.__file__).parent}{sep}"
_PYTHON = f"{Path(traceback.__file__).parent}{sep}"


@cache
def is_foreign(filename: str) -> bool:
    """Whether a source file belongs neither to torch nor to this package."""
    return not filename.startswith((_TORCH, _HERE, "<"))


def _is_users(filename: str) -> bool:
    """Whether a source file belongs neither to torch, nor to this package, nor to Python's standard library."""
    return is_foreign(filename) and ("site-packages" in filename or not filename.startswith(_PYTHON))


def line_of(failure: BaseException) -> str:
    """``file:line`` of the innermost frame of a user's code in the traceback of an exception; empty if none."""
    own = [f for f in traceback.extract_tb(failure.__traceback__) if _is_users(f.filename)]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""


def user_line(outside: FrameType) -> str:
    """``file:line`` of the innermost frame of a user's code that is running; empty if there is none in the model.

    Args:
        outside: The frame that runs the model; it and its callers are not code of the model.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame is not outside:
        if _is_users(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
