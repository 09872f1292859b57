"""Exported programs on disk without pickle.

A ``.pt2`` archive is a zip of JSON (the graph) and raw bytes (the weights). ``torch`` pickles two things into it: the
example inputs, which are dropped before saving, and weights of a kind that has no raw form, such as a tensor subclass,
which are refused. Loading looks through the archive first and refuses whatever could be unpickled.
"""

from __future__ import annotations

import json
import logging
import warnings
import zipfile
from pathlib import Path

import torch

from oto.errors import ArtefactError

# an archive of torch.save starts as a zip, a bare pickle with its protocol
_PICKLED = (b"PK", b"\x80")


def save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Save a program; its example inputs are not kept.

    Raises:
        ArtefactError: Something in it could only be pickled.
    """
    given = program.example_inputs
    program.example_inputs = None
    try:
        with warnings.catch_warnings(), _quietly():
            warnings.simplefilter("ignore")
            torch.export.save(program, path)
    finally:
        program.example_inputs = given
    _refuse_pickles(path)


def load_program(path: Path) -> torch.export.ExportedProgram:
    """Load a program.

    Raises:
        ArtefactError: The file is no archive, or holds something that would be unpickled.
    """
    _refuse_pickles(path)
    with warnings.catch_warnings(), _quietly():
        warnings.simplefilter("ignore")
        return torch.export.load(path)


class _quietly:
    """torch.export logs through the root logger's handlers on perfectly good archives."""

    def __enter__(self) -> None:
        self.log = logging.getLogger("torch.export")
        self.level = self.log.level
        self.log.setLevel(logging.ERROR)

    def __exit__(self, *failure: object) -> None:
        self.log.setLevel(self.level)


def _refuse_pickles(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if "/data/weights/weight_" in member.filename or "/data/constants/tensor_" in member.filename:
                    continue  # raw bytes, read as numbers, unless a config says otherwise
                content = archive.read(member)
                if content.startswith(_PICKLED) or member.filename.endswith(".pkl"):
                    raise _refused(path, member.filename)
                config = json.loads(content)["config"] if member.filename.endswith("_config.json") else {}
                if any(item.get("use_pickle") for item in config.values()):
                    raise _refused(path, member.filename)
    except (zipfile.BadZipFile, ValueError, KeyError, AttributeError) as failure:
        raise ArtefactError(
            f"{path} is no exported program: {failure}\n  to fix  write the artefact again"
        ) from failure


def _refused(path: Path, member: str) -> ArtefactError:
    return ArtefactError(
        f"{path}: {member} is pickled\n"
        "  effect  unpickling can run any code, so the program is not used\n"
        "  to fix  use model.safetensors with your class: load_subnet(path, make_model)"
    )
