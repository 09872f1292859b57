"""Where in a user's code something happens: the nearest line outside of torch and this package."""

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


def line_of(failure: BaseException) -> str:
    """``file:line`` of the innermost frame outside torch and this package in which an exception was raised."""
    frames = [f for f in traceback.extract_tb(failure.__traceback__) if is_foreign(f.filename)]
    own = [f for f in frames if "site-packages" in f.filename or not f.filename.startswith(_PYTHON)]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""


def user_line() -> str:
    """``file:line`` of the code that called what calls this."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if is_foreign(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
