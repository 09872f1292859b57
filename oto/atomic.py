"""Atomic writes: a file or a folder appears whole or not at all, and what a killed process leaves is removed.

Whatever is to appear in a folder is written into a *scratch folder* inside of it first, on the same file system by
construction, so that a rename puts it in place:

    out/.oto-lock                              held while something is moved or removed; gone afterwards
    out/.oto-<boot>-<machine>-<random>/lock    held for as long as the process that made the scratch folder lives
    out/.oto-<boot>-<machine>-<random>/files/  what is being written

Both locks are ``flock`` locks: the kernel drops them with the process, however it ends. Whoever makes a scratch folder
removes those whose lock nobody holds. ``<boot>`` and ``<machine>`` say where the lock was taken. A lock that was taken
elsewhere (another machine on a shared file system) need not be seen here, nor is there one everywhere (Windows, some
network file systems); such a scratch folder is removed once nobody has written to it for a week.

This module reads no other part of ``oto`` but its errors.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from oto.errors import ArtifactError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

LOCK = ".oto-lock"
_SCRATCH = re.compile(r"\.oto-(?:([0-9a-f]{8})-([0-9a-f]{8})-)?[a-z0-9_]{8}")  # the short form: earlier versions
_ABANDONED = 7 * 24 * 3600  # seconds
_FULL = {errno.ENOSPC, errno.EROFS, errno.EFBIG, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC)}


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """An empty folder in ``folder``, which is made if need be, to write in and to move files out of.

    It goes at the end with all that is left in it, and so does ``folder`` if it was made here and nothing is in it.
    Scratch folders of processes that died go at once.

    Raises:
        OSError: ``folder`` cannot be written.
    """
    made = [place for place in (folder, *folder.absolute().parents) if not place.exists()]
    place: Path | None = None
    stream: io.FileIO | None = None
    try:
        with locked(folder) as works:
            for new in made:
                with suppress(PermissionError):  # it may be written, and not be read
                    sync(new.parent)
            _remove_abandoned(folder, works)
            place = Path(tempfile.mkdtemp(prefix=f".oto-{_boot()}-{_machine()}-", dir=folder))
            stream = (place / "lock").open("ab", buffering=0)
            _flock(stream)
        (place / "files").mkdir()
        yield place / "files"
    finally:
        if stream is not None:
            stream.close()
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # something is in it
                parent.rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Keep other processes out of ``folder``, which is made if need be; yields whether the file system can do that.

    Raises:
        OSError: ``folder`` cannot be written.
    """
    if fcntl is None:
        folder.mkdir(parents=True, exist_ok=True)
        yield False
        return
    stream, works = _take(folder)
    with stream:
        try:
            yield works
        finally:
            try:
                with suppress(OSError):
                    (folder / LOCK).unlink()
            finally:
                if works:
                    fcntl.flock(stream, fcntl.LOCK_UN)  # a child that was forked meanwhile has it open, too


def _take(folder: Path) -> tuple[io.FileIO, bool]:
    path = folder / LOCK
    vanished = 0
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            stream = _opened(path)
        except FileNotFoundError:  # a save that failed has removed the folder that it had made
            vanished += 1
            if vanished == 10:  # no file can be made there, as in /proc
                raise
            continue
        try:
            taken = _flock(stream)
            if taken is False:
                log.warning("another process is writing to %s; waiting for it", folder)
                fcntl.flock(stream, fcntl.LOCK_EX)
            if taken is None or _is_at(stream, path):  # else whoever held it has removed it
                return stream, taken is not None
        except BaseException:
            stream.close()
            raise
        stream.close()


def _opened(path: Path) -> io.FileIO:
    """A file to lock, made if need be. A shared file system locks only what is open for writing."""
    return open(path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def _flock(stream: io.FileIO) -> bool | None:
    """Lock an open file: ``False`` if another process has it, ``None`` where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(stream: io.FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def is_scratch(name: str) -> bool:
    """Whether a file of that name is none of the user's but the means of a write that goes on or broke off."""
    return name == LOCK or bool(_SCRATCH.fullmatch(name))


def _remove_abandoned(folder: Path, locks_work: bool) -> None:
    for place in folder.iterdir():
        with suppress(FileNotFoundError):  # it is removed by another process, where there are no locks
            if _is_abandoned(place, locks_work):
                shutil.rmtree(place, ignore_errors=True)


def _is_abandoned(place: Path, locks_work: bool) -> bool:
    origin = _SCRATCH.fullmatch(place.name)
    if origin is None or place.is_symlink() or not place.is_dir():
        return False
    if origin[1] is None:  # an earlier version made it, or the user something that is called alike
        return place.stat().st_mode & 0o777 == 0o700 and (place / "model.safetensors").is_file() and _is_old(place)
    held = _held(place) if locks_work else None
    here = origin[1] == _boot() or origin[2] == _machine()
    return not held and ((held is False and here) or _is_old(place))


def _held(place: Path) -> bool | None:
    """Whether the process that made a scratch folder lives; ``None`` if that cannot be told."""
    try:
        with (place / "lock").open("r+b", buffering=0) as stream:
            taken = _flock(stream)
    except FileNotFoundError:  # it is made while LOCK is held, as it is now: that process died in between
        return False
    except OSError:
        return None
    return None if taken is None else not taken


def _is_old(place: Path) -> bool:
    touched = [place.stat().st_mtime]
    with suppress(OSError):
        touched += [path.stat(follow_symlinks=False).st_mtime for path in place.rglob("*")]
    return time.time() - max(touched) > _ABANDONED


@cache
def _boot() -> str:
    """Names the running kernel, which all containers on it share."""
    return _short(_text("/proc/sys/kernel/random/boot_id") or os.urandom(8).hex())


@cache
def _machine() -> str:
    return _short(platform.node() + _text("/etc/machine-id"))


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file that is to be at ``path``, in place of one that may be there; it gets there at the end.

    Raises:
        ArtifactError: It cannot be written, or is a folder.
    """
    if path.is_dir():
        raise ArtifactError(
            f"{path} is a folder\n  effect  nothing was written; the folder is as it was\n"
            f"  to fix  name a file in it, such as {path / 'report.html'}"
        )
    with rewording_os_errors(path.parent, f"{path.name} was not written"), scratch(path.parent) as folder:
        draft = folder / path.name
        yield draft
        sync(draft)
        os.replace(draft, path)
        sync(path.parent)


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a folder."""
    if os.name == "nt":  # has no such thing for folders, nor for files that are open for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as failure:  # some file systems have none for folders: of a network, of a program
        if not path.is_dir() or failure.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(handle)


def stamp(path: Path) -> dict[str, Any]:
    """The size in bytes and the SHA-256 of a file."""
    with path.open("rb") as stream:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


@contextmanager
def rewording_os_errors(place: Path, effect: str) -> Iterator[None]:
    """What the file system refuses about ``place`` is raised as an :class:`ArtifactError`; other failures pass."""
    try:
        yield
    except OSError as failure:
        if not concerns(failure, place):
            raise
        raise unwritable(place, failure, effect) from failure


def concerns(failure: OSError, place: Path) -> bool:
    """Whether the disk is full, or fails, or what the file system refuses is below ``place``."""
    if failure.errno in _FULL:
        return True
    names = [os.fsdecode(n) for n in (failure.filename, failure.filename2) if isinstance(n, str | bytes | os.PathLike)]
    return any(Path(n).absolute().is_relative_to(place.absolute()) for n in names)


def unwritable(place: Path, why: object, effect: str) -> ArtifactError:
    return ArtifactError(
        f"{place} cannot be written: {why}\n  effect  {effect}\n  to fix  free some space, or choose another folder"
    )
