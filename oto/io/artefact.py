"""A folder of hashed files, written whole or not at all, and refused unless it is whole. No pickle.

The manifest ``oto.json`` is the commit point: it names every file with its size and SHA-256 and carries a digest of
itself. It is removed before the first file of an older artefact is replaced and put in place after the last, so a
write that breaks off leaves a folder that is refused, never one that is half old and half new.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from oto.errors import ArtefactError, ArtefactVersionError, DamagedArtefactError

FORMAT_VERSION = 1
MANIFEST = "oto.json"


def check_out_dir(out_dir: str | os.PathLike[str]) -> None:
    """Refuse a folder that cannot be written, before any long work.

    Raises:
        ArtefactError: It is a file, lies below a file, or may not be written.
    """
    folder = Path(out_dir)
    for place in (folder, *folder.absolute().parents):
        if place.is_dir():
            if not os.access(place, os.W_OK):
                raise ArtefactError(
                    f"out_dir {folder}: {place} may not be written\n"
                    "  effect  nothing was saved\n  to fix  choose another folder, or change its permissions"
                )
            return
        if place.exists() or place.is_symlink():
            raise ArtefactError(
                f"out_dir {folder}: {place} is a file\n"
                "  effect  nothing was computed or saved; the file is as it was\n  to fix  choose another folder"
            )


@dataclass
class Draft:
    """An artefact in the making. Its files are in ``folder`` until :meth:`commit` moves them."""

    folder: Path
    target: Path
    notes: dict[str, Any] = field(default_factory=dict)
    committed: bool = False

    def file(self, name: str) -> Path:
        """Where to write a further file."""
        return self.folder / name

    def tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors; names that share one tensor share it again after loading."""
        first: dict[int, str] = {}
        ties: dict[str, str] = {}
        plain: dict[str, Tensor] = {}
        complexes: list[str] = []
        for key, tensor in tensors.items():
            if id(tensor) in first:
                ties[key] = first[id(tensor)]
                continue
            first[id(tensor)] = key
            held = tensor.detach().cpu()
            if held.is_complex():
                complexes.append(key)
                held = torch.view_as_real(held)
            # memory of its own: slices and views would drag along, or share, what they were cut from
            plain[key] = held.clone(memory_format=torch.contiguous_format)
        safetensors.torch.save_file(plain, self.file(name))
        self.notes[name] = {"ties": ties, "complex": complexes}

    def load(self, name: str) -> dict[str, Tensor]:
        """Tensors that were written, read back."""
        return _read_tensors(self.file(name), self.notes[name])

    def commit(self, manifest: Mapping[str, Any]) -> None:
        """Seal the artefact and put it in place."""
        from oto import __version__

        files = {p.name: _stamp(p) for p in sorted(self.folder.iterdir())}
        content = {
            "format": FORMAT_VERSION,
            "versions": {"oto": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
            **manifest,
            "tensors": self.notes,
            "files": files,
        }
        sealed = {**content, "digest": _digest(content)}
        with self.file(MANIFEST).open("w", encoding="utf-8") as stream:
            json.dump(sealed, stream, indent=1)
        for path in self.folder.iterdir():
            _sync(path)
        self.target.mkdir(parents=True, exist_ok=True)
        (self.target / MANIFEST).unlink(missing_ok=True)
        for name in files:
            os.replace(self.folder / name, self.target / name)
        os.replace(self.folder / MANIFEST, self.target / MANIFEST)
        _sync(self.target)
        self.committed = True


@contextmanager
def writing(out_dir: str | os.PathLike[str]) -> Iterator[Draft]:
    """Stage an artefact for ``out_dir``; nothing appears there without :meth:`Draft.commit`.

    Raises:
        ArtefactError: ``out_dir`` cannot be written.
    """
    check_out_dir(out_dir)
    target = Path(out_dir)
    beside = next(p for p in target.absolute().parents if p.is_dir())  # the same file system, so a move is atomic
    folder = Path(tempfile.mkdtemp(prefix=".oto-", dir=target if target.is_dir() else beside))
    try:
        yield Draft(folder, target)
    except OSError as failure:
        raise ArtefactError(
            f"{target} cannot be written: {failure}\n"
            "  effect  no artefact was left there\n  to fix  free some space, or choose another folder"
        ) from failure
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Artefact:
    """An artefact whose every file was found whole."""

    folder: Path
    manifest: Mapping[str, Any]

    def path(self, name: str) -> Path:
        """A file of the artefact.

        Raises:
            ArtefactError: The artefact has no such file.
        """
        if name not in self.manifest["files"]:
            raise ArtefactError(
                f"{self.folder} holds no {name}\n  to fix  it holds {', '.join(self.manifest['files'])}"
            )
        return self.folder / name

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file, on the CPU; tied names share one tensor."""
        return _read_tensors(self.path(name), self.manifest["tensors"][name])


def reading(path: str | os.PathLike[str]) -> Artefact:
    """Open an artefact and check every file of it.

    Args:
        path: The folder, or a file in it.

    Raises:
        ArtefactError: There is no artefact.
        ArtefactVersionError: It was written in a format that this version does not read.
        DamagedArtefactError: A file is missing, cut short or changed.
    """
    folder = Path(path)
    if folder.is_file():
        folder = folder.parent
    place = folder / MANIFEST
    if not place.is_file():
        raise ArtefactError(
            f"{folder} holds no {MANIFEST}: it is no artefact, or writing it broke off\n"
            "  to fix  pass the folder given to construct_subnet, or write it again"
        )
    try:
        manifest = json.loads(place.read_text(encoding="utf-8"))
        version = manifest["format"]
    except (ValueError, KeyError, TypeError) as failure:
        raise _damaged(place, "it is not the JSON that was written") from failure
    if version != FORMAT_VERSION:
        raise ArtefactVersionError(
            f"{place} is of format {version!r}; this version of oto reads format {FORMAT_VERSION}\n"
            "  to fix  load it with the version of oto that wrote it"
            f" ({manifest.get('versions', {}).get('oto', 'unknown')}), or write it again with this one"
        )
    content = {key: value for key, value in manifest.items() if key != "digest"}
    if manifest.get("digest") != _digest(content):
        raise _damaged(place, "it was changed after it was written")
    for name, stamp in manifest["files"].items():
        if Path(name).name != name:
            raise _damaged(place, f"it names a file outside the folder: {name}")
        file = folder / name
        if not file.is_file():
            raise _damaged(file, "it is missing")
        if file.stat().st_size != stamp["size"]:
            raise _damaged(file, f"it has {file.stat().st_size} bytes, and had {stamp['size']}")
        if _stamp(file) != stamp:
            raise _damaged(file, "its content changed")
    return Artefact(folder, manifest)


def _damaged(file: Path, what: str) -> DamagedArtefactError:
    return DamagedArtefactError(
        f"{file}: {what}\n  effect  the artefact is not loaded\n  to fix  copy it again, or write it again"
    )


def _read_tensors(path: Path, notes: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    for key in notes["complex"]:
        tensors[key] = torch.view_as_complex(tensors[key])
    for key, source in notes["ties"].items():
        tensors[key] = tensors[source]
    return tensors


def _stamp(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
