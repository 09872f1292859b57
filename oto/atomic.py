"""Atomic writes: a file or a folder appears completely or not at all, and remains of killed processes are removed.

Files are first written to a *scratch folder* inside the target folder, which is therefore on the same file system, and
then renamed:

    out/.oto-lock                              locked while files are moved or removed; deleted afterwards
    out/.oto-<boot>-<machine>-<random>/lock    locked as long as the process that made the scratch folder lives
    out/.oto-<boot>-<machine>-<random>/files/  the files being written

Both locks are ``flock`` locks, which the kernel releases when the process ends for any reason. A process that makes a
scratch folder removes others that are not locked. ``<boot>`` and ``<machine>`` identify where the lock was taken. A
lock that was taken elsewhere (on another machine with a shared file system) may be invisible here, and some systems
have no locks (Windows, some network file systems). Scratch folders of such origin are removed if nothing in them was
written for a week.

Of ``oto``, this module only imports its errors.
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
    """Context manager for an empty scratch folder in ``folder``, which is created if necessary.

    At the end, the scratch folder is removed with everything left in it, and so is ``folder`` if it was created here
    and is empty. Scratch folders of processes that died are removed at the beginning.

    Raises:
        OSError: ``folder`` cannot be written.
    """
    made = [place for place in (folder, *folder.absolute().parents) if not place.exists()]
    place: Path | None = None
    stream: io.FileIO | None = None
    try:
        with locked(folder) as works:
            for new in made:
                with suppress(PermissionError):  # the folder may be writable but not readable
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
            with suppress(OSError):  # it is not empty
                parent.rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Context manager that locks ``folder`` against other processes that use it; the folder is created if necessary.

    Yields:
        Whether the file system supports locks.

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
                    fcntl.flock(stream, fcntl.LOCK_UN)  # a child process that was forked meanwhile has it open as well


def _take(folder: Path) -> tuple[io.FileIO, bool]:
    path = folder / LOCK
    vanished = 0
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            stream = _opened(path)
        except FileNotFoundError:  # another save failed and has removed the folder that it had created
            vanished += 1
            if vanished == 10:  # no file can be created there, as in /proc
                raise
            continue
        try:
            taken = _flock(stream)
            if taken is False:
                log.warning("another process is writing to %s; waiting for it", folder)
                fcntl.flock(stream, fcntl.LOCK_EX)
            if taken is None or _is_at(stream, path):  # otherwise its former holder has deleted the file
                return stream, taken is not None
        except BaseException:
            stream.close()
            raise
        stream.close()


def _opened(path: Path) -> io.FileIO:
    """Open a file to lock, and create it if necessary. Shared file systems only lock files opened for writing."""
    return open(path, "ab", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def _flock(stream: io.FileIO) -> bool | None:
    """Lock an open file; ``False`` if another process holds the lock, ``None`` if locks are not supported."""
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
    """Whether a name is that of a lock or scratch folder of this module."""
    return name == LOCK or bool(_SCRATCH.fullmatch(name))


def _remove_abandoned(folder: Path, locks_work: bool) -> None:
    for place in folder.iterdir():
        with suppress(FileNotFoundError):  # without locks, another process may be removing it
            if _is_abandoned(place, locks_work):
                shutil.rmtree(place, ignore_errors=True)


def _is_abandoned(place: Path, locks_work: bool) -> bool:
    origin = _SCRATCH.fullmatch(place.name)
    if origin is None or place.is_symlink() or not place.is_dir():
        return False
    if origin[1] is None:  # made by an earlier version, or a folder of the user with a similar name
        return place.stat().st_mode & 0o777 == 0o700 and (place / "model.safetensors").is_file() and _is_old(place)
    held = _held(place) if locks_work else None
    here = origin[1] == _boot() or origin[2] == _machine()
    return not held and ((held is False and here) or _is_old(place))


def _held(place: Path) -> bool | None:
    """Whether the process that made a scratch folder is alive; ``None`` if that cannot be determined."""
    try:
        with (place / "lock").open("r+b", buffering=0) as stream:
            taken = _flock(stream)
    except FileNotFoundError:  # it is created while LOCK is held, as it is now, so that process has died
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
    """An identifier of the running kernel, which all its containers share."""
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
    """Context manager to write a file that replaces ``path`` at the end.

    Yields:
        The path to write to.

    Raises:
        ArtifactError: The file cannot be written, or ``path`` is a folder.
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
    """Flush a file, or the entries of a folder, to disk."""
    if os.name == "nt":  # does not support this for folders, nor for files opened for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as failure:  # some file systems (network, FUSE) do not support it for folders
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
    """Context manager that converts an ``OSError`` about ``place`` into an :class:`ArtifactError`.

    Args:
        effect: The effect, for the message.
    """
    try:
        yield
    except OSError as failure:
        if not concerns(failure, place):
            raise
        raise unwritable(place, failure, effect) from failure


def concerns(failure: OSError, place: Path) -> bool:
    """Whether an ``OSError`` means that the disk is full or fails, or names a path in ``place``."""
    if failure.errno in _FULL:
        return True
    names = [os.fsdecode(n) for n in (failure.filename, failure.filename2) if isinstance(n, str | bytes | os.PathLike)]
    return any(Path(n).absolute().is_relative_to(place.absolute()) for n in names)


def unwritable(place: Path, why: object, effect: str) -> ArtifactError:
    return ArtifactError(
        f"{place} cannot be written: {why}\n  effect  {effect}\n  to fix  free some space, or choose another folder"
    )
