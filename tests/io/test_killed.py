"""A process that saves is killed before and after each call to the file system: the old or the new one loads.

The child processes are forks that count what Python tells its audit hooks (files opened for writing, renamed, made,
deleted, locked) and what they ask the disk to hold, and end themselves with SIGKILL at one of these. What is there
before one call is what is there after the one before it.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from oto import OTO, atomic, load_subnet
from oto.errors import ArtifactError
from oto.io import export, pretrained
from oto.io.artifact import COMMIT, MANIFEST, adding, reading, writing
from oto.io.program import save_program
from tests.io.nets import Net

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")

CALLS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "fcntl.flock"}


def started(work: Callable[[], Any]) -> int:
    """Run something in a child process; its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that pytest has threads
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def child(work: Callable[[], Any]) -> int:
    """Run something in a child process, and wait for it; 0, or the signal that ended it."""
    status = os.waitpid(started(work), 0)[1]
    assert not os.WIFEXITED(status) or status == 0, "the child failed; see what it has printed"
    return status & 127


def at_call(n: int, below: Path, act: Callable[[], Any]) -> None:
    """Do something before the ``n``-th call from now on that changes a file or folder; for child processes only."""
    count = itertools.count(1)

    def called() -> None:
        if next(count) == n:
            act()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            if not isinstance(args[2], int) or not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in CALLS:
            return
        if isinstance(args[0], int) or not os.path.isabs(args[0]) or Path(os.fsdecode(args[0])).is_relative_to(below):
            called()

    real = safetensors.torch.save_file

    def save_file(*args: Any, **kwargs: Any) -> None:
        called()
        real(*args, **kwargs)

    safetensors.torch.save_file = save_file
    os.fsync = lambda handle: called()
    sys.addaudithook(hook)


def killed(n: int, below: Path, work: Callable[[], Any]) -> bool:
    """Whether a child process was killed before its ``n``-th call; if not, it has done its work."""

    def inside() -> None:
        at_call(n, below, lambda: os.kill(os.getpid(), signal.SIGKILL))
        work()

    ended = child(inside)
    assert ended in (0, signal.SIGKILL)
    return ended != 0


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# Artifacts --------------------------------------------------------------------------------------------------------


def save(out: Path, value: float, *others: str) -> None:
    with writing(out) as draft:
        draft.tensors("model.safetensors", {"w": torch.arange(100.0) * value})
        for name in others:
            draft.file(name).write_text(f"{name} of {value}")
        draft.commit({"value": value})


def held(out: Path) -> tuple[float, frozenset[str]] | None:
    """What loads: the value that it was saved with, and the files; ``None`` if there is no artifact."""
    try:
        found = reading(out)
    except ArtifactError as failure:
        assert f"holds no {MANIFEST}" in str(failure) or "there is no folder" in str(failure)
        return None
    value = found.manifest["value"]
    assert torch.equal(found.tensors("model.safetensors")["w"], torch.arange(100.0) * value)
    return value, frozenset(found.manifest["files"])


def litter(out: Path, *foreign: str) -> set[str]:
    """What is there and belongs neither to the artifact nor to the user."""
    return {p.name for p in out.iterdir()} ^ {*json.loads((out / MANIFEST).read_text())["files"], MANIFEST, *foreign}


def broken_off(out: Path, value: float, moves: int, *others: str) -> None:
    """A save that ends after so many of its files are in place."""
    count, real = itertools.count(), os.replace

    def replace(source: Any, target: Any) -> None:
        if next(count) == moves:
            raise KeyboardInterrupt
        real(source, target)

    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", replace)
        save(out, value, *others)
    assert (out / COMMIT / MANIFEST).is_file()


@dataclass
class Case:
    """What is in a folder, and what is done to it."""

    prepare: Callable[[Path], Any]
    act: Callable[[Path], Any]
    name: str = "out"
    foreign: tuple[str, ...] = ()


def add(out: Path, name: str) -> None:
    with adding(out, name) as file:
        file.write_text("a report")


def with_foreign(out: Path) -> None:
    save(out, 1.0, "model.pt2")
    (out / "mine.txt").write_text("mine")
    (out / "below").mkdir()
    (out / "below" / "model.pt2").write_text("mine")


def through_a_link(link: Path) -> None:
    save(link.parent / "real", 1.0, "model.pt2")
    link.symlink_to("real")


CASES = {
    "a new folder": Case(lambda out: None, lambda out: save(out, 2.0, "model.pt2"), "deep/out"),
    "over an older one": Case(lambda out: save(out, 1.0, "model.pt2"), lambda out: save(out, 2.0)),
    "with more files": Case(lambda out: save(out, 1.0), lambda out: save(out, 2.0, "model.pt2", "full.safetensors")),
    "beside foreign files": Case(with_foreign, lambda out: save(out, 2.0, "x"), foreign=("mine.txt", "below")),
    "through a link": Case(through_a_link, lambda out: save(out, 2.0, "x"), "link"),
    "adding": Case(lambda out: save(out, 1.0), lambda out: add(out, "report.html")),
    "adding once more": Case(lambda out: save(out, 1.0, "report.html"), lambda out: add(out, "report.html")),
    "over a commit broken off": Case(
        lambda out: (save(out, 0.0, "old"), broken_off(out, 1.0, 1, "model.pt2")), lambda out: save(out, 2.0, "x")
    ),
    "adding to a commit broken off": Case(
        lambda out: (save(out, 0.0, "old"), broken_off(out, 1.0, 1, "model.pt2")), lambda out: add(out, "report.html")
    ),
}


QUICK = {"a new folder", "beside foreign files", "adding to a commit broken off"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.zoo) for name in CASES])
def test_killed_anywhere_the_old_or_the_new_one_loads(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    (tmp_path / "before").mkdir()
    case.prepare(tmp_path / "before" / case.name)
    before = held(tmp_path / "before" / case.name)
    seen = []
    for n in itertools.count(1):
        top = tmp_path / "now"
        shutil.copytree(tmp_path / "before", top, symlinks=True)
        out = top / case.name
        alive = not killed(n, top, lambda out=out: case.act(out))
        seen.append(held(out))
        case.act(out)  # a retry always works
        assert held(out) is not None and litter(out, *case.foreign) == set(), n
        assert {p.name for p in top.iterdir()} <= {case.name.partition("/")[0], "real"}
        assert all((top / case.name / f).exists() for f in case.foreign)
        shutil.rmtree(top)
        if alive:
            break
    after = seen[-1]
    assert after is not None and len(seen) > 25
    assert seen == [before] * seen.index(after) + [after] * (len(seen) - seen.index(after))
    if before != after:  # not the same report once more
        assert 10 < seen.index(after) < len(seen) - 3


def test_one_that_broke_off_is_read_without_writing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for moves in range(3):
        save(out, 1.0, "old")
        broken_off(out, 2.0, moves, "new")
        before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
        assert held(out) == (2.0, {"model.safetensors", "new"})
        assert reading(out).path("new").read_text() == "new of 2.0"
        assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
        shutil.rmtree(out)


def test_what_came_in_between_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    broken_off(out, 2.0, 1, "model.pt2", "note")
    (out / "note").write_text("mine")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(ArtifactError, match=r"holds note, which no artifact has written[^$]*nothing was saved"):
        save(out, 3.0)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert held(out) == (2.0, {"model.safetensors", "model.pt2", "note"})
    (out / "note").unlink()
    save(out, 3.0)
    assert held(out) == (3.0, {"model.safetensors"}) and not litter(out)


FOREIGN_COMMITS: dict[str, Callable[[Path], Any]] = {
    "a file": lambda place: place.write_text("mine"),
    "a link": lambda place: place.symlink_to(".."),
    "a folder": lambda place: (place.mkdir(), (place / "x").write_text("mine")),
}


@pytest.mark.parametrize("make", FOREIGN_COMMITS.values(), ids=FOREIGN_COMMITS)
def test_a_commit_that_is_none(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    out = tmp_path / "out"
    save(out, 1.0)
    make(out / COMMIT)
    before = sorted(out.rglob("*"))
    with pytest.raises(ArtifactError, match=r"holds \.oto-commit, which was not left[^$]*nothing was saved"):
        save(out, 2.0)
    assert sorted(out.rglob("*")) == before and held(out) == (1.0, {"model.safetensors"})


def full(n: int, top: Path, out: Path) -> None:
    """The disk is full at the ``n``-th call; for child processes."""
    refused: list[bool] = []

    def refuse() -> None:
        refused.append(True)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_call(n, top, lambda: None if saved else refuse())
    saved = False
    try:
        save(out, 2.0, "model.pt2")
    except ArtifactError as failure:
        assert "No space left" in str(failure) and "effect" in str(failure) and "to fix" in str(failure)
        new = "the new artifact is there" in str(failure)
        assert held(out) == ((2.0, {"model.safetensors", "model.pt2"}) if new else (1.0, {"model.safetensors"}))
    saved = True
    save(out, 3.0)
    assert held(out) == (3.0, {"model.safetensors"}) and not litter(out)
    if not refused:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_disk_that_is_full_at_any_call(tmp_path: Path) -> None:
    for n in itertools.count(1):
        top = tmp_path / str(n)
        save(top / "out", 1.0)
        if child(lambda n=n, top=top: full(n, top, top / "out")) == signal.SIGTERM:
            break
        shutil.rmtree(top)
    assert n > 30


# More than one process --------------------------------------------------------------------------------------------


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(out, 1.0)
    ready, go = os.pipe(), os.pipe()

    def slow() -> None:
        with writing(out) as draft:
            draft.tensors("model.safetensors", {"w": torch.arange(100.0) * 3})
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            draft.commit({"value": 3.0})

    pid = started(slow)
    try:
        os.read(ready[0], 1)
        save(out, 2.0)
        assert held(out) == (2.0, {"model.safetensors"})
        assert len(litter(out)) == 1 and (next(out.glob(".oto-*")) / "files" / "model.safetensors").is_file()
    finally:
        os.write(go[1], b"x")
        status = os.waitpid(pid, 0)[1]
    assert status == 0
    assert held(out) == (3.0, {"model.safetensors"}) and not litter(out)


def test_many_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def work(k: int) -> None:
        for i in range(8):
            save(out, 10.0 * k + i, *("abcdefgh"[: 2 * k]))

    pids = [started(lambda k=k: work(k)) for k in range(4)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0, 0]
    found = held(out)
    assert found is not None and found[0] % 10 == 7  # the last of one of them
    assert not litter(out)


def abandoned(out: Path) -> Path:
    """What a killed process leaves."""

    def half() -> None:
        with writing(out) as draft:
            draft.tensors("model.safetensors", {"w": torch.ones(9)})
            os.kill(os.getpid(), signal.SIGKILL)

    assert child(half) == signal.SIGKILL
    (place,) = out.glob(".oto-*")
    return place


def age(place: Path) -> None:
    for path in (*place.rglob("*"), place):
        os.utime(path, (0, 0))


def test_what_another_machine_may_still_write_stays_for_a_week(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(out, 1.0)
    place = abandoned(out).rename(out / ".oto-00000000-00000000-abcdefgh")
    save(out, 2.0)
    assert place.is_dir()
    age(place)
    save(out, 3.0)
    assert not place.exists() and not litter(out)


def test_without_locks_nothing_young_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    save(out, 1.0)
    place = abandoned(out)
    monkeypatch.setattr(atomic, "_flock", lambda stream: None)
    save(out, 2.0)
    assert place.is_dir() and litter(out) == {place.name}
    monkeypatch.setattr(atomic, "fcntl", None)
    save(out, 3.0)
    assert place.is_dir() and litter(out) == {place.name}
    age(place)
    save(out, 4.0)
    assert held(out) == (4.0, {"model.safetensors"}) and not litter(out)


# Earlier versions -------------------------------------------------------------------------------------------------


def of_an_earlier_version(out: Path, moved: int) -> Path:
    """What an earlier version left if it was killed: the manifest goes first, and comes last."""
    save(out, 2.0, "model.pt2")
    place = out / ".oto-abcd_123"
    place.mkdir(0o700)
    for name in ("model.safetensors", "model.pt2", MANIFEST)[moved:]:
        (out / name).rename(place / name)
    return place


@pytest.mark.parametrize("moved", range(3))
def test_what_an_earlier_version_left_does_not_stop_a_save(tmp_path: Path, moved: int) -> None:
    out = tmp_path / "out"
    place = of_an_earlier_version(out, moved)
    assert held(out) is None
    save(out, 3.0)
    assert held(out) == (3.0, {"model.safetensors"})
    assert litter(out) == {place.name}  # whose process may live
    age(place)
    save(out, 4.0)
    assert litter(out) == (set() if moved == 0 else {place.name})


def test_weights_that_an_earlier_version_was_about_to_replace_are_not_touched(tmp_path: Path) -> None:
    out = tmp_path / "out"
    of_an_earlier_version(out, 0)
    (out / "model.safetensors").write_text("of the artifact before it, or the user's")
    with pytest.raises(
        ArtifactError, match=r"no artifact has written[^$]*likely  [^$]*was interrupted, and left \.oto-abcd_123"
    ):
        save(out, 3.0)
    assert (out / "model.safetensors").read_text() == "of the artifact before it, or the user's"


# Folders of from_pretrained ---------------------------------------------------------------------------------------


class Own(nn.Linear):
    """A model that writes and reads a folder of its own."""

    config = "in 4, out 2"

    def __init__(self, value: float = 1.0) -> None:
        super().__init__(4, 2)
        nn.init.constant_(self.weight, value)
        nn.init.constant_(self.bias, value)

    def save_pretrained(self, folder: Path) -> None:
        (folder / "config.json").write_text(self.config)
        (folder / "parts").mkdir()
        for name, tensor in self.state_dict().items():
            safetensors.torch.save_file({name: tensor}, folder / "parts" / f"{name}.safetensors")

    @classmethod
    def from_pretrained(cls, folder: Path) -> Own:
        assert (folder / "config.json").read_text() == cls.config
        made = cls()
        parts = [safetensors.torch.load_file(folder / "parts" / f"{name}.safetensors") for name in made.state_dict()]
        made.load_state_dict({name: tensor for part in parts for name, tensor in part.items()})
        return made


class Words:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "words.txt").write_text("a b")


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Own:
    monkeypatch.setattr(pretrained, "_require_stated", lambda slim: None)
    return Own(2.0)


def loaded(kind: Any, folder: Path) -> nn.Module | None:
    """What ``from_pretrained`` gives; a folder without a config is none to it."""
    if not (folder / "config.json").is_file():
        return None
    model: nn.Module = kind.from_pretrained(folder)
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def killed_pretrained(
    tmp_path: Path, slim: nn.Module, names: set[str], there: bool, again: nn.Module | None
) -> list[bool]:
    """For each call that a save was killed before: whether it loads. A retry saves ``again`` where nothing does."""
    seen = []
    for n in itertools.count(1):
        top = tmp_path / str(n)
        top.mkdir()
        if there:
            (top / "out").mkdir()
        alive = not killed(n, top, lambda top=top: pretrained.save_pretrained(slim, top / "out", Words()))
        found = loaded(type(slim), top / "out")
        seen.append(found is not None)
        assert found is None or same(found, slim)
        wanted = slim if found is not None or again is None else again
        pretrained.save_pretrained(wanted, top / "out", Words())  # a retry always works
        assert same(type(slim).from_pretrained(top / "out"), wanted)
        assert {str(p.relative_to(top / "out")) for p in (top / "out").rglob("*") if p.is_file()} == names
        assert [p.name for p in top.iterdir()] == ["out"]
        shutil.rmtree(top)
        if alive:
            return seen
    raise AssertionError


@pytest.mark.parametrize("there", [False, pytest.param(True, marks=pytest.mark.zoo)], ids=["new", "empty"])
def test_a_pretrained_folder_is_all_there_or_not_at_all(tmp_path: Path, own: Own, there: bool) -> None:
    names = {"config.json", "words.txt", "parts/weight.safetensors", "parts/bias.safetensors"}
    seen = killed_pretrained(tmp_path, own, names, there, Own(3.0))
    first = seen.index(True)
    assert 15 < first < len(seen) - 2 and all(seen[first:])


def test_a_pretrained_folder_that_holds_another_model_stays(tmp_path: Path, own: Own) -> None:
    files = pretrained.save_pretrained(own, tmp_path)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}
    assert pretrained.save_pretrained(own, tmp_path) == files
    with pytest.raises(ArtifactError, match=r"holds config\.json, parts\n  effect  nothing was written"):
        pretrained.save_pretrained(Own(3.0), tmp_path)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files} == before
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == set(files)


def test_files_changed_since_a_pretrained_save_broke_off_stay(
    tmp_path: Path, own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == "config.json":
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", replace)
        pretrained.save_pretrained(own, out, Words())
    assert (out / "parts").is_dir() and (out / "words.txt").is_file()
    (out / "words.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds words\.txt\n"):
        pretrained.save_pretrained(own, out)
    assert [p.name for p in out.iterdir()] == ["words.txt"] and (out / "words.txt").read_text() == "mine"


@pytest.mark.zoo  # a second or two for each of many calls
def test_a_pretrained_folder_of_a_stock_class(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    oto = OTO(transformers.BertModel(config), torch.randint(0, 50, (2, 6)), layout="uniform")
    oto.random_set_zero_groups(0.5)
    names = {"config.json", "words.txt", "model.safetensors"}
    seen = killed_pretrained(tmp_path, oto.construct_subnet().model, names, False, None)
    first = seen.index(True)
    assert 15 < first < len(seen) - 2 and all(seen[first:])


# Single files -----------------------------------------------------------------------------------------------------


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def pruned(seed: int) -> OTO:
    oto = OTO(Net(), X)
    oto.random_set_zero_groups(0.5, seed)
    return oto


def test_a_report_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    texts = []
    for n in itertools.count(1):
        (tmp_path / "r.html").write_text("old")

        def write() -> None:
            with atomic.whole_file(tmp_path / "r.html") as draft, draft.open("w") as stream:
                stream.write("new")
                stream.flush()
                os.fsync(stream.fileno())  # it may be killed here, too
                stream.write("new" * 9998)

        alive = not killed(n, tmp_path, write)
        texts.append((tmp_path / "r.html").read_text())
        write()
        assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
        if alive:
            break
    assert texts == ["old"] * texts.index("new" * 9999) + ["new" * 9999] * (len(texts) - texts.index("new" * 9999))


def test_what_an_export_puts_beside_it_comes_first_and_replaces_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with atomic.scratch(tmp_path) as folder:
            (folder / "slim.onnx").write_text("graph")
            (folder / "slim.onnx.data").write_text("weights")
            export._put(folder / "slim.onnx", tmp_path / "slim.onnx")

    for n in itertools.count(1):
        alive = not killed(n, tmp_path, write)
        if (tmp_path / "slim.onnx").exists():
            assert (tmp_path / "slim.onnx.data").read_text() == "weights"
            with pytest.raises(ArtifactError, match=r"slim\.onnx is there already"):
                write()
        else:
            write()  # a retry
        assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
            "slim.onnx": "graph",
            "slim.onnx.data": "weights",
        }
        for path in tmp_path.iterdir():
            path.unlink()
        if alive:
            break
    (tmp_path / "slim.onnx.data").write_text("mine")
    with pytest.raises(ArtifactError, match=r"slim\.onnx\.data is there already"):
        write()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"slim.onnx.data": "mine"}


# Disks that are full ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_program_that_cannot_be_written_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    program = torch.export.export(Net(), (X,))

    def write() -> None:
        with pytest.raises(OSError, match="No space left"):
            save_program(program, Path("/dev/full"))
        save_program(program, tmp_path / "elsewhere.pt2")

    assert child(write) == 0 and (tmp_path / "elsewhere.pt2").is_file()


def mounted(folder: Path, size: int) -> None:
    """Mount a disk of some bytes, for this process and those that it starts.

    Raises:
        OSError: This process may not do that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_users, private, recursive = 0x20000, 0x10000000, 1 << 18, 1 << 14

    def do(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    do(libc.unshare(new_mounts if os.geteuid() == 0 else new_mounts | new_users))
    do(libc.mount(b"none", b"/", None, private | recursive, None))
    do(libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={size}".encode()))


def may_mount(folder: Path) -> bool:
    def attempt() -> None:
        try:
            mounted(folder, 2**16)
        except (OSError, AttributeError):
            os.kill(os.getpid(), signal.SIGTERM)

    return child(attempt) == 0


def on_a_small_disk(folder: Path, oto: OTO, wanted: list[str], free: int) -> None:
    """Save where there is too little room; for child processes."""
    mounted(folder, 2**22)
    first = pruned(1).construct_subnet(folder / "out").model
    room = folder / "room"
    disk = os.statvfs(folder)
    room.write_bytes(bytes(disk.f_bavail * disk.f_frsize - free))
    for how in wanted:
        with pytest.raises(
            ArtifactError, match=r"cannot be written: [^$]*No space left[^$]*\n  effect  [^$]*\n  to fix"
        ):
            WRITERS[how](oto, folder)
        assert {p.name for p in folder.iterdir()} == {"out", "room"}, how
        assert {p.name for p in (folder / "out").iterdir()} == {"model.safetensors", MANIFEST}, how
        assert torch.equal(load_subnet(folder / "out", Net)(X), first(X)), how
    room.unlink()  # the user frees some, or saves elsewhere: nothing was lost
    for how in wanted:
        WRITERS[how](oto, folder)
    assert torch.equal(load_subnet(folder / "out", Net)(X), oto.construct_subnet().model(X))


WRITERS: dict[str, Callable[[OTO, Path], Any]] = {
    "the artifact": lambda oto, to: oto.construct_subnet(to / "out", program=True, save_full=True),
    "pt2": lambda oto, to: oto.construct_subnet().export("pt2", to / "slim.pt2"),
    "report": lambda oto, to: oto.construct_subnet().report(to / "r.html"),
    "onnx": lambda oto, to: oto.construct_subnet().export("onnx", to / "slim.onnx"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
# where it is full: in the program; in the full weights; in the weights
@pytest.mark.parametrize(
    "free", [12288, pytest.param(4096, marks=pytest.mark.zoo), pytest.param(0, marks=pytest.mark.zoo)]
)
def test_a_full_disk_takes_nothing_and_ends_nothing(tmp_path: Path, free: int) -> None:
    if not may_mount(tmp_path):
        pytest.skip("this user may not mount a disk")
    oto = pruned(2)
    wanted = ["the artifact", "pt2"]
    assert child(lambda: on_a_small_disk(tmp_path, oto, wanted, free)) == 0


@pytest.mark.zoo  # ONNX takes seconds
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
@pytest.mark.parametrize("how", ["onnx", "report"])
def test_a_full_disk_takes_nothing_of_other_files(tmp_path: Path, how: str) -> None:
    if not may_mount(tmp_path):
        pytest.skip("this user may not mount a disk")
    pytest.importorskip({"onnx": "onnxruntime", "report": "jinja2"}[how])
    oto = pruned(2)
    assert child(lambda: on_a_small_disk(tmp_path, oto, ["the artifact", how], 0)) == 0


# All of it --------------------------------------------------------------------------------------------------------


@pytest.mark.zoo  # a second for each of many calls
@pytest.mark.parametrize("report", [False, True])
def test_construct_subnet_killed_anywhere(tmp_path: Path, report: bool) -> None:
    old, new = pruned(1), pruned(2)
    old.construct_subnet(tmp_path / "old", save_full=True)
    models = {"old": load_subnet(tmp_path / "old", Net)(X), "new": new.construct_subnet().model(X)}
    options: dict[str, Any] = {"program": True, "report": report}
    seen = []
    for n in itertools.count(1):
        top = tmp_path / "now"
        shutil.copytree(tmp_path / "old", top / "out")
        alive = not killed(n, top, lambda top=top: new.construct_subnet(top / "out", **options))
        y = load_subnet(top / "out", Net)(X)
        seen.append(next(name for name, found in models.items() if torch.equal(found, y)))
        if seen[-1] == "new":
            assert torch.allclose(load_subnet(top / "out")(X), y)
        new.construct_subnet(top / "out", **options)
        assert torch.equal(load_subnet(top / "out", Net)(X), models["new"]) and not litter(top / "out")
        shutil.rmtree(top)
        if alive:
            break
    assert seen == ["old"] * seen.count("old") + ["new"] * seen.count("new") and seen.count("old") > 20


@pytest.mark.parametrize("name", ["../victim/x", "/etc/x"])
def test_a_list_of_what_broke_off_reaches_nothing_outside(name: str, tmp_path: Path) -> None:
    """Whoever may write the folder may write that list."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / pretrained.UNFINISHED).write_text(json.dumps({name: {"size": 1, "sha256": "0"}}))
    with pytest.raises(ArtifactError, match="to fix"):
        pretrained._end_what_broke_off(tmp_path / "out")
    assert (tmp_path / "victim").is_dir()
