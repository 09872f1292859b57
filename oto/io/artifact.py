"""A folder of hashed files without pickle: written completely or not at all, and refused unless it is complete.

The manifest ``oto.json`` names every file with its size and SHA-256 and carries a digest of itself. The digest and the
hashes detect damage. They are not a signature: whoever can write the folder can write them too.

How one artifact replaces another
---------------------------------

The new artifact is written completely, with its manifest, into a scratch folder (:mod:`oto.atomic`) and flushed to disk
(``fsync``). Then, while no other process may write there:

1. The scratch folder's files become ``.oto-commit/``, by one rename. **This is the commit.**
2. Each file is renamed from ``.oto-commit/`` to its place. Files that only the older artifact had are deleted.
3. ``.oto-commit/oto.json`` is renamed over ``oto.json``, and the empty ``.oto-commit/`` is deleted.

A reader takes the manifest, and each file that it names, from ``.oto-commit/`` if it is there, otherwise from its
place. So whatever a killed process leaves behind can be loaded, even from a read-only folder:

| killed | what is there | what loads |
|---|---|---|
| before 1 | the old files, untouched; the new ones in a scratch folder, which no reader looks into | old |
| in 2 | the new manifest in ``.oto-commit/``; every new file there or, once renamed, in its place | new |
| in 3 | every new file in its place; the new manifest in ``.oto-commit/`` or in its place | new |

The next save first completes steps 2 and 3 (both can be repeated safely), and removes scratch folders of dead
processes. Before 1 and again before 2, a save is refused if files are in the way that no artifact wrote. Every file is
on disk before 1, and every rename before the next step, so the same holds after a power failure.

Only one writer is in steps 1 to 3 at a time, so of two processes the later one wins. On a file system without locks,
the rename of 1 still fails while another writer's ``.oto-commit/`` is there, but nothing else separates two that write
at the same moment. Not covered: a reader during another process's save may find a file changed and refuse it (it never
mixes two artifacts); stores in which renaming a folder is not atomic (object stores mounted as a folder); Windows while
a file that is to be replaced is open elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from oto.atomic import locked, rewording_os_errors, scratch, sync, unwritable
from oto.atomic import stamp as _stamp
from oto.errors import ArtifactError, ArtifactVersionError, DamagedArtifactError, some
from oto.io.manifest import Refusal, is_plain, parse, require, require_files

FORMAT_VERSION = 1
MANIFEST = "oto.json"
COMMIT = ".oto-commit"  # the files of an artifact that replaces another, see above
LARGEST_MANIFEST = 2**27  # bytes; a network with billions of parameters needs some millions


def check_out_dir(out_dir: str | os.PathLike[str], names: Iterable[str] = ()) -> None:
    """Refuse a folder that cannot be written, before any long computation.

    Args:
        names: Files that will be written there.

    Raises:
        ArtifactError: The path is a file, lies below a file, or is not writable; or one of the files exists and was not
            written by an artifact.
    """
    if not os.fspath(out_dir):
        raise ArtifactError(
            "out_dir is empty, which would mean the working folder\n"
            "  effect  nothing was computed or saved\n  to fix  name a folder; the working folder is '.'"
        )
    folder = Path(out_dir)
    if "\0" in str(folder):
        raise unwritable(folder, "its name holds a zero byte", NOT_SAVED)
    try:
        folder.exists()
    except OSError as failure:  # for example a name too long, or a parent folder without permission
        raise unwritable(folder, failure, NOT_SAVED) from failure
    for place in (folder, *folder.absolute().parents):
        if place.is_dir():
            if not os.access(place, os.W_OK | os.X_OK):
                raise ArtifactError(
                    f"out_dir {folder}: {place} may not be written\n"
                    "  effect  nothing was saved\n  to fix  choose another folder, or change its permissions"
                )
            if place == folder or place == folder.absolute():
                _require_own(folder, names)
            return
        if place.exists() or place.is_symlink():
            raise ArtifactError(
                f"out_dir {folder}: {place} is a file\n"
                "  effect  nothing was computed or saved; the file is as it was\n  to fix  choose another folder"
            )


@dataclass
class Draft:
    """An artifact that is being written; its files are in ``folder`` until :meth:`commit` moves them to ``target``."""

    folder: Path
    target: Path
    notes: dict[str, Any] = field(default_factory=dict)
    committed: bool = False
    _plain: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def file(self, name: str) -> Path:
        """The path under which to write a further file."""
        assert is_plain(name), name
        return self.folder / name

    def tensors(self, name: str, tensors: Mapping[str, Tensor], spare: Container[str] = ()) -> list[str]:
        """Write tensors; names that share one tensor share it again after loading.

        Args:
            spare: Names that may be left out if their tensors cannot be written.

        Returns:
            The names that were left out.

        Raises:
            ArtifactError: A tensor has no plain memory to write: it is sparse, quantized, on ``meta``...
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
                # copy slices and views: their storage includes the tensor that they were cut from
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
        except KeyError as failure:  # a dtype that safetensors does not support
            raise _unsaveable(name, f"a tensor of {failure.args[0]}") from failure
        except safetensors.SafetensorError as failure:  # its own name for an OSError
            raise unwritable(self.target, failure, NOT_SAVED) from failure
        path.chmod(mode)  # safetensors makes the file unreadable for others
        self.notes[name] = {"ties": ties, "complex": complexes}
        self._require_written(path, plain)
        self._plain[name] = plain
        return left_out

    def _require_written(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Check, bit by bit, that a file holds the tensors that were to be written."""
        wrong = [key for key, tensor in tensors.items() if not _is_written(path, key, tensor)]
        if wrong:
            raise unwritable(
                self.target, f"{path.name} reads back differently than it was written ({some(wrong)})", NOT_SAVED
            )

    def load(self, name: str) -> dict[str, Tensor]:
        """Read back tensors that were written."""
        return _read_tensors(self.file(name), self.notes[name])

    def written(self, name: str) -> dict[str, Tensor]:
        """The result of :meth:`load`, but in the original memory, since the bits in the file have been compared.

        Reading a large file would map it into memory beside the model.
        """
        return _by_all_names(self._plain[name], self.notes[name])

    def commit(self, manifest: Mapping[str, Any]) -> None:
        """Seal the artifact and put it in place; files of an older one are deleted, foreign files stay.

        Args:
            manifest: Further entries for the manifest; any JSON data.

        Raises:
            ArtifactError: A foreign file has the name of one of the artifact's files.
        """
        from oto import __version__

        assert not self.committed, "a draft is committed once"
        own = {"format", "versions", "tensors", "files", "digest"}
        assert own.isdisjoint(manifest), f"the manifest's own entries: {own & manifest.keys()}"
        files = {p.name: _stamp(p) for p in sorted(self.folder.iterdir())}
        versions = {"oto": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
        self._commit(
            {"format": FORMAT_VERSION, "versions": versions, **manifest, "tensors": self.notes, "files": files}
        )

    def _commit(self, content: Mapping[str, Any], instead_of: str | None = None) -> None:
        """Put the files of the draft, and a manifest with this content, in place.

        Args:
            instead_of: The digest that the replaced manifest must have, if that matters.
        """
        content = json.loads(json.dumps(content))  # as it will be read: all keys are strings
        with (self.folder / MANIFEST).open("w", encoding="utf-8") as stream:
            json.dump({**content, "digest": _digest(content)}, stream, indent=1)
        _require_readable(self.folder / MANIFEST)
        for path in self.folder.iterdir():
            sync(path)
        sync(self.folder)
        names = [path.name for path in self.folder.iterdir()]
        with locked(self.target):
            _finish(self.target)
            for name in names:
                if (self.target / name).is_dir():
                    raise unwritable(self.target, f"{name} is a folder there", NOT_SAVED)
            _require_own(self.target, names)
            if instead_of is not None and _manifest_in(self.target).get("digest") != instead_of:
                raise unwritable(self.target, "another process has replaced the artifact meanwhile", NOT_SAVED)
            os.rename(self.folder, self.target / COMMIT)
            self.committed = True
            sync(self.target)
            _finish(self.target)


def _require_readable(manifest: Path) -> None:
    """Check a manifest before it is put in place, in the same way as when it is read.

    Raises:
        ArtifactError: A reader would refuse the manifest.
    """
    try:
        size = manifest.stat().st_size
        if size > LARGEST_MANIFEST:
            raise ValueError(f"it has {size:,} bytes")
        require(parse(_start(manifest, size)))
    except ValueError as failure:
        raise ArtifactError(
            f"the manifest holds what no reader accepts: {failure}\n"
            f"  effect  {NOT_SAVED}\n  to fix  report the model; construct_subnet() without a folder returns it"
        ) from failure


NOT_SAVED = "nothing was saved; what was there is as it was"
_UNFINISHED = "the new artifact is there and loads; the next save into the folder finishes this one"


def _finish(folder: Path) -> None:
    """Finish the renames of a commit; call only while holding the lock.

    Raises:
        ArtifactError: A file that no artifact wrote is in the way.
    """
    draft = folder / COMMIT
    if not os.path.lexists(draft):
        return
    left = [] if draft.is_symlink() or not draft.is_dir() else sorted(p.name for p in draft.iterdir())
    new = _manifest_in(draft) or _manifest_in(folder)
    if not draft.is_dir() or draft.is_symlink() or not {*left} <= {*new.get("files", ()), MANIFEST}:
        raise unwritable(folder, f"it holds {COMMIT}, which was not left by an interrupted save", NOT_SAVED)
    if left:
        own = _files_of(folder)
        _require_own(folder, left, own)
        stale = own - new["files"].keys()
        for name in left:
            if name != MANIFEST:
                os.replace(draft / name, folder / name)
        for name in stale:
            (folder / name).unlink(missing_ok=True)
        sync(folder)
        if MANIFEST in left:
            os.replace(draft / MANIFEST, folder / MANIFEST)
            sync(folder)
    draft.rmdir()


@contextmanager
def writing(out_dir: str | os.PathLike[str]) -> Iterator[Draft]:
    """Stage an artifact for ``out_dir``, which stays unchanged until :meth:`Draft.commit`.

    Raises:
        ArtifactError: ``out_dir`` cannot be written.
    """
    check_out_dir(out_dir)
    target = Path(out_dir)
    draft: Draft | None = None
    try:
        with rewording_os_errors(target, NOT_SAVED), scratch(target) as folder:
            draft = Draft(folder, target)
            yield draft
    except ArtifactError as failure:
        if draft is None or not draft.committed or not isinstance(failure.__cause__, OSError):
            raise
        raise unwritable(target, failure.__cause__, _UNFINISHED) from failure.__cause__


@contextmanager
def adding(path: str | os.PathLike[str], name: str) -> Iterator[Path]:
    """Add a file to an artifact, or replace one of its files.

    Yields:
        The path to write the file to. The artifact stays unchanged until the file is written, and is complete again
        afterwards.

    Raises:
        ArtifactError: There is no artifact, or it cannot be written, or a file of that name exists and belongs to none.
        DamagedArtifactError: The artifact is damaged.
    """
    assert is_plain(name), name
    artifact = reading(path)
    _require_own(artifact.folder, [name])
    with writing(artifact.folder) as draft:
        file = draft.file(name)
        yield file
        content = {key: value for key, value in artifact.manifest.items() if key != "digest"}
        content["files"] = dict(sorted({**content["files"], name: _stamp(file)}.items()))
        draft._commit(content, instead_of=artifact.manifest["digest"])


def _unsaveable(name: str, what: str) -> ArtifactError:
    return ArtifactError(
        f"{name}: {what} has no plain form in a safetensors file\n"
        "  effect  nothing was written\n  to fix  make it a dense tensor with values, or no part of the model's state"
    )


@dataclass(frozen=True)
class Artifact:
    """An artifact whose files have all been checked."""

    folder: Path
    manifest: Mapping[str, Any]

    def path(self, name: str) -> Path:
        """The path of a file of the artifact.

        Raises:
            ArtifactError: The artifact has no such file.
        """
        if name not in self.manifest["files"]:
            raise ArtifactError(
                f"{self.folder} holds no {name}\n  to fix  it holds {', '.join(self.manifest['files'])}"
            )
        return _where(self.folder, name)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors in a file, on the CPU; tied names share one tensor."""
        path = self.path(name)
        notes = self.manifest["tensors"].get(name)
        if notes is None:
            raise ArtifactError(
                f"{path} holds no tensors\n  to fix  they are in: {', '.join(self.manifest['tensors']) or 'none'}"
            )
        try:
            return _read_tensors(path, notes)
        except (OSError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as failure:
            raise _damaged(path, f"its tensors are not what the manifest says ({failure})") from failure


def reading(path: str | os.PathLike[str]) -> Artifact:
    """Open an artifact and check every file of it.

    Args:
        path: The folder, or a file in it.

    Raises:
        ArtifactError: There is no artifact.
        ArtifactVersionError: The artifact has a format that this version does not read.
        DamagedArtifactError: A file is missing, truncated or changed.
    """
    if not isinstance(path, str | os.PathLike):
        raise ArtifactError(
            f"{path!r} is no folder, but of the class {type(path).__name__}\n"
            "  effect  nothing is loaded\n  to fix  pass the folder given to construct_subnet"
        )
    folder = given = Path(path).expanduser()
    try:
        if folder.is_file():
            folder = folder.parent
        place = _where(folder, MANIFEST)
        there = place.is_file()
    except (OSError, ValueError) as failure:  # a name too long or with a null byte, a folder without permission
        raise ArtifactError(
            f"{folder} cannot be read: {failure}\n"
            "  effect  nothing is loaded\n  to fix  pass the folder given to construct_subnet"
        ) from failure
    if not there:
        what = f"{os.path.abspath(folder)} holds no {MANIFEST}: it is no artifact, or writing it was interrupted"
        if given is not folder:
            what = f"{given} is not a file of an artifact: there is no {MANIFEST} beside it"
        elif not folder.exists():
            what = f"there is no folder {folder} (in {Path.cwd()})"
        raise ArtifactError(f"{what}\n  to fix  pass the folder given to construct_subnet, or write it again")
    if (size := place.stat().st_size) > LARGEST_MANIFEST:
        raise _damaged(place, f"it has {size:,} bytes, which no manifest has")
    try:
        manifest = parse(_start(place, size))
        if isinstance(manifest, dict) and "format" not in manifest:
            raise ArtifactError(
                f"{place} is of another program: it is JSON, but states no format of oto\n"
                "  effect  nothing is loaded\n  to fix  pass the folder given to construct_subnet"
            )
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as failure:
        why = f" ({failure})" if type(failure) is ValueError else ""
        raise _damaged(place, f"it is not the JSON that was written{why}") from failure
    if type(version) is not int or version != FORMAT_VERSION:
        versions = manifest.get("versions")
        writer = versions.get("oto", "unknown") if isinstance(versions, dict) else "unknown"
        raise ArtifactVersionError(
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
        _require_whole(_where(folder, name), stamp)
    return Artifact(folder, manifest)


def _where(folder: Path, name: str) -> Path:
    """The path of a file of the artifact: its final place, or where an interrupted commit left it."""
    draft = folder / COMMIT / name
    return draft if draft.is_file() else folder / name


def _start(file: Path, size: int) -> bytes:
    """The first bytes of a file. A file of size zero is not read: some systems present endless files like that."""
    if not size:
        return b""
    with file.open("rb") as stream:
        return stream.read(size)


def _require_whole(file: Path, stamp: Mapping[str, Any]) -> None:
    """Refuse a file that differs from its manifest entry. It is opened only after its kind and size are checked.

    Raises:
        DamagedArtifactError: The file differs, or it is a pipe or a device.
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


def _files_of(folder: Path, among: Container[str] | None = None) -> set[str]:
    """The files in the folder that artifacts wrote and that have not changed since; all, or only those in ``among``."""
    manifests = [_manifest_in(place) for place in (folder, folder / COMMIT, *_earlier_drafts(folder))]
    stamps = [(name, stamp) for manifest in manifests for name, stamp in manifest.get("files", {}).items()]
    asked = [(name, stamp) for name, stamp in stamps if is_plain(name) and (among is None or name in among)]
    return {name for name, stamp in asked if _is_still(folder / name, stamp)}


def _earlier_drafts(folder: Path) -> list[Path]:
    """The folders in which killed processes of earlier versions left files: these versions moved the manifest last."""
    with suppress(OSError):
        return [place for place in folder.iterdir() if re.fullmatch(r"\.oto-[a-z0-9_]{8}", place.name)]
    return []


def _manifest_in(folder: Path) -> Mapping[str, Any]:
    """The manifest in a folder; empty if there is no valid one."""
    place = folder / MANIFEST
    try:
        if not (place.is_file() and (size := place.stat().st_size) <= LARGEST_MANIFEST):
            return {}
        manifest: Mapping[str, Any] = parse(_start(place, size))
        content = {key: value for key, value in manifest.items() if key != "digest"}
        whole = manifest["digest"] == _digest(content) and _is_well_formed(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return manifest if whole else {}


def _is_still(file: Path, stamp: Mapping[str, Any]) -> bool:
    try:
        regular = file.is_file() and not file.is_symlink() and file.stat().st_size == stamp["size"]
        return regular and _stamp(file) == stamp
    except OSError:
        return False


def _require_own(folder: Path, names: Iterable[str], own: Container[str] | None = None) -> None:
    """Refuse to replace files that no artifact wrote.

    Args:
        own: The files that artifacts wrote, if known.

    Raises:
        ArtifactError: A file of that name exists and no artifact wrote it.
    """
    there = {name for name in (*names, MANIFEST) if os.path.lexists(folder / name) and not (folder / name).is_dir()}
    if not there:
        return
    manifest = _manifest_in(folder)
    own = _files_of(folder, there) if own is None else own
    foreign = sorted(name for name in there if name not in own and not (name == MANIFEST and manifest))
    if not foreign:
        return
    changed = [name for name in foreign if name in manifest.get("files", ())]
    earlier = [place.name for place in _earlier_drafts(folder) if _manifest_in(place)]
    raise ArtifactError(
        f"{folder} holds {some(foreign)}, which "
        + ("was changed since an artifact wrote it" if changed == foreign else "no artifact has written")
        + "\n  effect  nothing was saved, and nothing there was touched\n"
        + (
            f"  likely  a save by an earlier version of oto was interrupted, and left {some(earlier)}\n"
            if earlier
            else ""
        )
        + "  to fix  choose another folder; or move the file away, or delete it, if it is not needed"
    )


_BLOCK = 1 << 24
"""How many bytes are compared at a time: pages of a mapped file count as memory of the process."""


def _is_written(path: Path, key: str, tensor: Tensor) -> bool:
    """Whether a file holds this tensor under a name, bit for bit."""
    if tensor.ndim == 0 or tensor.nbytes <= _BLOCK:
        with safetensors.safe_open(path, "pt") as read:
            return _same_bits(read.get_tensor(key), tensor)
    for rows in torch.arange(len(tensor)).split(max(1, _BLOCK * len(tensor) // tensor.nbytes)):
        begin, end = int(rows[0]), int(rows[-1]) + 1
        with safetensors.safe_open(path, "pt") as read:
            there = read.get_slice(key)
            if there.get_shape() != list(tensor.shape) or not _same_bits(there[begin:end], tensor[begin:end]):
                return False
    return True


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _place(tensor: Tensor) -> Any:
    """A key that all names of one tensor share, even after ``state_dict`` made several objects from it."""
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.numel() or type(tensor.data) is not Tensor:
        return id(tensor)
    view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return (*view, tensor.dtype, tensor.device)


def _damaged(file: Path, what: str) -> DamagedArtifactError:
    return DamagedArtifactError(
        f"{file}: {what}\n  effect  the artifact is not loaded\n  to fix  copy it again, or write it again"
    )


def _read_tensors(path: Path, notes: Mapping[str, Any]) -> dict[str, Tensor]:
    return _by_all_names(safetensors.torch.load_file(path), notes)


def _by_all_names(held: Mapping[str, Tensor], notes: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file under all of their names, with complex tensors restored."""
    tensors = dict(held)
    for key in notes["complex"]:
        tensors[key] = torch.view_as_complex(tensors[key])
    for key, source in notes["ties"].items():
        tensors[key] = tensors[source]
    return tensors


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
