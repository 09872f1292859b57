"""A folder of hashed files, written whole or not at all, and refused unless it is whole. No pickle.

The manifest ``oto.json`` is the commit point: it names every file with its size and SHA-256 and carries a digest of
itself. It is removed before the first file of an older artefact is replaced and put in place after the last, so a
write that breaks off leaves a folder that is refused, never one that is half old and half new.

The digest and the hashes tell what was damaged. They are no signature: whoever can write the folder can write them too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from oto.errors import ArtefactError, ArtefactVersionError, DamagedArtefactError, first_line, some
from oto.io.manifest import Refusal, is_plain, parse, require, require_files

FORMAT_VERSION = 1
MANIFEST = "oto.json"
LARGEST_MANIFEST = 2**27  # bytes; that of a network of billions of parameters has some millions


def check_out_dir(out_dir: str | os.PathLike[str], names: Iterable[str] = ()) -> None:
    """Refuse a folder that cannot be written, before any long work.

    Args:
        names: Files that are going to be written there.

    Raises:
        ArtefactError: It is a file, lies below a file, or may not be written; or one of the files is there, and no
            artefact has written it.
    """
    folder = Path(out_dir)
    if "\0" in str(folder):
        raise _unwritable(folder, "its name holds a zero byte")
    try:
        folder.exists()
    except OSError as failure:  # a name too long, a folder above that may not be entered
        raise _unwritable(folder, failure) from failure
    for place in (folder, *folder.absolute().parents):
        if place.is_dir():
            if not os.access(place, os.W_OK | os.X_OK):
                raise ArtefactError(
                    f"out_dir {folder}: {place} may not be written\n"
                    "  effect  nothing was saved\n  to fix  choose another folder, or change its permissions"
                )
            if place == folder or place == folder.absolute():
                _require_own(folder, names)
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
        assert is_plain(name), name
        return self.folder / name

    def tensors(self, name: str, tensors: Mapping[str, Tensor], spare: Container[str] = ()) -> list[str]:
        """Write tensors; names that share one tensor share it again after loading.

        Args:
            spare: Names that may be left out if their tensors have no plain form.

        Returns:
            The names that were left out.

        Raises:
            ArtefactError: A tensor has no plain memory to write: sparse, quantized, on ``meta``...
        """
        first: dict[Any, str] = {}
        ties: dict[str, str] = {}
        plain: dict[str, Tensor] = {}
        complexes: list[str] = []
        left_out: list[str] = []
        for key, tensor in tensors.items():
            try:
                place = _place(tensor)
                if place in first:
                    ties[key] = first[place]
                    continue
                first[place] = key
                held = tensor.detach().cpu().resolve_conj().resolve_neg()
                if held.is_complex():
                    complexes.append(key)
                    held = torch.view_as_real(held)
                # memory of its own: slices and views would drag along, or share, what they were cut from
                if not held.is_contiguous() or held.untyped_storage().nbytes() != held.nbytes:
                    held = held.clone(memory_format=torch.contiguous_format)
                if held.is_quantized:
                    raise NotImplementedError("quantized")
                plain[key] = held
            except (RuntimeError, NotImplementedError, TypeError) as failure:
                if key in spare:
                    left_out.append(key)
                    continue
                raise _unsaveable(name, f"{key} ({tensor.layout}, {tensor.dtype}, on {tensor.device})") from failure
        path = self.file(name)
        path.touch()
        mode = path.stat().st_mode
        try:
            safetensors.torch.save_file(plain, path)
        except KeyError as failure:  # a dtype that the format does not know
            raise _unsaveable(name, f"a tensor of {failure.args[0]}") from failure
        except safetensors.SafetensorError as failure:  # its own name for an OSError
            raise _unwritable(self.target, failure) from failure
        path.chmod(mode)  # safetensors leaves a file that nobody else may read
        self.notes[name] = {"ties": ties, "complex": complexes}
        self._require_written(path, plain)
        return left_out

    def _require_written(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Compare a file with what was to be written, bit by bit, one tensor at a time."""
        with safetensors.safe_open(path, "pt") as read:
            wrong = [key for key in tensors if not _same_bits(read.get_tensor(key), tensors[key])]
        if wrong:
            raise _unwritable(self.target, f"{path.name} reads otherwise than it was written ({some(wrong)})")

    def load(self, name: str) -> dict[str, Tensor]:
        """Tensors that were written, read back."""
        return _read_tensors(self.file(name), self.notes[name])

    def commit(self, manifest: Mapping[str, Any]) -> None:
        """Seal the artefact and put it in place; files of an older one go, foreign files stay.

        Args:
            manifest: Further entries for the manifest; anything that JSON takes.

        Raises:
            ArtefactError: A foreign file is in the place of one of these.
        """
        from oto import __version__

        assert not self.committed, "a draft is committed once"
        own = {"format", "versions", "tensors", "files", "digest"}
        assert own.isdisjoint(manifest), f"the manifest's own entries: {own & manifest.keys()}"
        files = {p.name: _stamp(p) for p in sorted(self.folder.iterdir())}
        content = {
            "format": FORMAT_VERSION,
            "versions": {"oto": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
            **manifest,
            "tensors": self.notes,
            "files": files,
        }
        content = json.loads(json.dumps(content))  # as it will be read: keys are strings
        sealed = {**content, "digest": _digest(content)}
        with (self.folder / MANIFEST).open("w", encoding="utf-8") as stream:
            json.dump(sealed, stream, indent=1)
        for path in self.folder.iterdir():
            _sync(path)
        self.target.mkdir(parents=True, exist_ok=True)
        for name in (*files, MANIFEST):
            if (self.target / name).is_dir():
                raise _unwritable(self.target, f"{name} is a folder there")
        _require_own(self.target, files)
        stale = _files_of(self.target) - files.keys()
        (self.target / MANIFEST).unlink(missing_ok=True)
        _sync(self.target)
        for name in files:
            os.replace(self.folder / name, self.target / name)
        for name in stale:
            (self.target / name).unlink(missing_ok=True)
        _sync(self.target)
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
    try:
        folder = Path(tempfile.mkdtemp(prefix=".oto-", dir=target if target.is_dir() else beside))
    except OSError as failure:
        raise _unwritable(target, failure) from failure
    try:
        yield Draft(folder, target)
    except OSError as failure:
        if not _concerns(failure, folder, target):
            raise  # some other file, of no concern here
        raise _unwritable(target, failure) from failure
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def adding(path: str | os.PathLike[str], name: str) -> Iterator[Path]:
    """Put one more file into an artefact, or a new one in place of one that it has.

    Yields:
        Where to write the file. The artefact is as it was until that is done, and whole again afterwards.

    Raises:
        ArtefactError: There is no artefact; a file of that name is there and belongs to none; it cannot be written.
        DamagedArtefactError: The artefact is not whole.
    """
    assert is_plain(name), name
    artefact = reading(path)
    folder, manifest = artefact.folder, dict(artefact.manifest)
    _require_own(folder, [name])
    with writing(folder) as draft:
        file = draft.file(name)
        yield file
        manifest["files"] = dict(sorted({**manifest["files"], name: _stamp(file)}.items()))
        manifest["digest"] = _digest({key: value for key, value in manifest.items() if key != "digest"})
        sealed = draft.folder / MANIFEST
        sealed.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for part in (file, sealed):
            _sync(part)
        (folder / MANIFEST).unlink()  # the commit point, as in :meth:`Draft.commit`
        os.replace(file, folder / name)
        os.replace(sealed, folder / MANIFEST)
        _sync(folder)


def _concerns(failure: OSError, *folders: Path) -> bool:
    if failure.errno in (errno.ENOSPC, errno.EROFS, errno.EFBIG, getattr(errno, "EDQUOT", None)):
        return True
    names = [os.fsdecode(n) for n in (failure.filename, failure.filename2) if isinstance(n, str | bytes | os.PathLike)]
    return any(Path(n).absolute().is_relative_to(folder.absolute()) for n in names for folder in folders)


def _unwritable(place: Path, why: object) -> ArtefactError:
    return ArtefactError(
        f"{place} cannot be written: {why}\n"
        "  effect  the artefact was not saved\n  to fix  free some space, or choose another folder"
    )


def _unsaveable(name: str, what: str) -> ArtefactError:
    return ArtefactError(
        f"{name}: {what} has no plain form in a safetensors file\n"
        "  effect  nothing was written\n  to fix  make it a dense tensor with values, or no part of the model's state"
    )


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
        path = self.path(name)
        notes = self.manifest["tensors"].get(name)
        if notes is None:
            raise ArtefactError(
                f"{path} holds no tensors\n  to fix  they are in: {', '.join(self.manifest['tensors']) or 'none'}"
            )
        try:
            return _read_tensors(path, notes)
        except (OSError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as failure:
            raise _damaged(path, f"its tensors are not what the manifest says ({failure})") from failure


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
    if (size := place.stat().st_size) > LARGEST_MANIFEST:
        raise _damaged(place, f"it has {size:,} bytes, which no manifest has")
    try:
        manifest = parse(_start(place, size))
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as failure:
        raise _damaged(place, f"it is not the JSON that was written ({first_line(failure)})") from failure
    if type(version) is not int or version != FORMAT_VERSION:
        versions = manifest.get("versions")
        writer = versions.get("oto", "unknown") if isinstance(versions, dict) else "unknown"
        raise ArtefactVersionError(
            f"{place} is of format {version!r}; this version of oto reads format {FORMAT_VERSION}\n"
            f"  to fix  load it with the version of oto that wrote it ({writer}), or write it again with this one"
        )
    try:
        if manifest.get("digest") != _digest({key: value for key, value in manifest.items() if key != "digest"}):
            raise _damaged(place, "it was changed after it was written")
        require(manifest)
    except RecursionError as failure:
        raise _damaged(place, "it is nested too deep") from failure
    except Refusal as refusal:
        raise _damaged(place, f"it says what this version of oto does not write: {refusal}") from None
    for name, stamp in manifest["files"].items():
        _require_whole(folder / name, stamp)
    return Artefact(folder, manifest)


def _start(file: Path, size: int) -> bytes:
    """What a file begins with. Nothing is read of one without a size: of what some systems show as such, for ever."""
    if not size:
        return b""
    with file.open("rb") as stream:
        return stream.read(size)


def _require_whole(file: Path, stamp: Mapping[str, Any]) -> None:
    """Refuse a file that is not what the manifest says. It is not opened before its kind and size are known.

    Raises:
        DamagedArtefactError: It is not; or it is no file, but a pipe or a device.
    """
    if not file.is_file():
        raise _damaged(file, "it is missing, or no plain file")
    try:
        size = file.stat().st_size
        if size != stamp["size"]:
            raise _damaged(file, f"it has {size} bytes, and had {stamp['size']}")
        found = _stamp(file)["sha256"] if size else hashlib.sha256().hexdigest()  # see _start
    except OSError as failure:
        raise _damaged(file, f"it cannot be read ({failure})") from failure
    if found != stamp["sha256"]:
        raise _damaged(file, "its content changed")


def _is_well_formed(manifest: Any) -> bool:
    try:
        require_files(manifest)
    except Refusal:
        return False
    return True


def _files_of(folder: Path) -> set[str]:
    """What an artefact that is in the folder, if there is one, has written there, and nobody has changed since."""
    manifest = _manifest_of(folder)
    return {name for name, stamp in manifest.items() if is_plain(name) and _is_still(folder / name, stamp)}


def _manifest_of(folder: Path) -> Mapping[str, Any]:
    """The files that an artefact in the folder names, and what they were; none if there is no artefact."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        content = {key: value for key, value in manifest.items() if key != "digest"}
        whole = manifest["digest"] == _digest(content) and _is_well_formed(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    files: Mapping[str, Any] = manifest["files"] if whole else {}
    return files


def _is_still(file: Path, stamp: Mapping[str, Any]) -> bool:
    try:
        regular = file.is_file() and not file.is_symlink() and file.stat().st_size == stamp["size"]
        return regular and _stamp(file) == stamp
    except OSError:
        return False


def _require_own(folder: Path, names: Iterable[str]) -> None:
    """Refuse to replace what no artefact has written.

    Raises:
        ArtefactError: There is such a file.
    """
    there = [name for name in (*names, MANIFEST) if os.path.lexists(folder / name) and not (folder / name).is_dir()]
    if not there:
        return
    own = _files_of(folder) | ({MANIFEST} if _manifest_of(folder) else set())
    foreign = [name for name in there if name not in own]
    if foreign:
        changed = [name for name in foreign if name in _manifest_of(folder)]
        raise ArtefactError(
            f"{folder} holds {some(foreign)}, which "
            + ("was changed since an artefact wrote it" if changed == foreign else "no artefact has written")
            + "\n  effect  nothing was saved, and nothing there was touched\n"
            "  to fix  choose another folder; or move the file away, or delete it, if it is not needed"
        )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _place(tensor: Tensor) -> Any:
    """What two names of one tensor have in common, also after ``state_dict`` made two objects of it."""
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.numel() or type(tensor.data) is not Tensor:
        return id(tensor)
    view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return (*view, tensor.dtype, tensor.device)


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
    if os.name == "nt":  # has no such thing for folders, nor for files that are open for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
