"""An artifact that somebody made to do harm, hashes and all: it is refused, takes no memory and runs nothing."""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oto import OTO, load_subnet
from oto.errors import ArtifactError
from oto.io import artifact
from oto.io.program import load_program
from tests.io.nets import Net

from .forging import sealed

TERABYTES = 10**13
MEMORY = 300 * 2**20  # bytes that a refusal may take at most; loading the real thing takes less


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    oto = OTO(Net(), torch.randn(2, 3), allow_graph=True)
    oto.random_set_zero_groups(0.5)
    out = tmp_path_factory.mktemp("hostile") / "out"
    oto.construct_subnet(out, emitter="module", program=True, save_full=True)
    return out


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert grown < MEMORY, f"{grown / 2**20:.0f} MiB"


def loads(folder: Path, *model: Any) -> bool:
    """Whether an artifact is read; it is refused otherwise, and nothing else."""
    try:
        load_subnet(folder, *model)
    except ArtifactError:
        return False
    return True


def header(claims: dict[str, Any]) -> bytes:
    text = json.dumps(claims).encode()
    return struct.pack("<Q", len(text)) + text


HEADERS = {
    "a header of terabytes": struct.pack("<Q", TERABYTES) + b"{}",
    "a tensor of terabytes": header(
        {"a.weight": {"dtype": "F32", "shape": [TERABYTES], "data_offsets": [0, 4 * TERABYTES]}}
    ),
    "a shape that overflows": header({"a.weight": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}}),
    "data that overlaps": header(
        {n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in ("a.weight", "a.bias")}
    )
    + b"\0" * 4,
    "nothing": b"",
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_weights_that_claim_what_is_not_there(saved: Path, tmp_path: Path, content: bytes) -> None:
    folder = sealed(saved, tmp_path / "out", lambda at, m: (at / "model.safetensors").write_bytes(content))
    with little_memory(), pytest.raises(ArtifactError):
        load_subnet(folder, Net)


def _swapped(at: Path, manifest: dict[str, Any]) -> None:
    (at / "model.safetensors").rename(at / "x")
    (at / "full_group_sparse.safetensors").rename(at / "model.safetensors")
    (at / "x").rename(at / "full_group_sparse.safetensors")


MANIFESTS: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "a file of terabytes": lambda at, m: m["files"].update({"model.pt2": {"size": TERABYTES}}),
    "another class of oto.nn": lambda at, m: m["edits"]["swaps"]["norm"].update({"class": "functional"}),
    "an edit that is none": lambda at, m: m["edits"].update(code="import os"),
    "edits of no module": lambda at, m: m["edits"]["attributes"].update({"nobody.there": {"x": 1}}),
    "edits that are no edits": lambda at, m: m.update(edits=3),
    "no edits": lambda at, m: m.pop("edits"),
    "no model": lambda at, m: m.pop("model"),
    "a model that is none": lambda at, m: m.update(model=[1]),
    "no emitter": lambda at, m: m.pop("emitter"),
}


@pytest.mark.parametrize(
    "change",
    [
        _swapped,
        lambda at, m: m["edits"]["swaps"]["norm"]["arguments"].update(normalized_shape=[TERABYTES]),
        lambda at, m: m["edits"]["attributes"]["a"].update(out_features=TERABYTES),
    ],
    ids=["files swapped", "a layer of terabytes", "an attribute of terabytes"],
)
def test_what_is_read_all_the_same_takes_no_memory(saved: Path, tmp_path: Path, change: Any) -> None:
    with little_memory():
        loads(sealed(saved, tmp_path / "out", change))


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_says_what_is_not_so(saved: Path, tmp_path: Path, change: Any) -> None:
    folder = sealed(saved, tmp_path / "out", change)
    with little_memory(), pytest.raises(ArtifactError):
        load_subnet(folder, Net)


def test_a_manifest_too_large_to_be_one(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sealed(saved, tmp_path / "out", lambda at, m: None)
    monkeypatch.setattr(artifact, "LARGEST_MANIFEST", (folder / "oto.json").stat().st_size - 1)
    with pytest.raises(ArtifactError, match="bytes, which no manifest has"):
        load_subnet(folder, Net)


def program(saved: Path, folder: Path, change: Callable[[dict[str, bytes]], Any]) -> Path:
    """A copy of the program with other members."""
    with zipfile.ZipFile(saved / "model.pt2") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    change(members)
    with zipfile.ZipFile(folder / "model.pt2", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return folder / "model.pt2"


def _edited(members: dict[str, bytes], end: str, change: Callable[[Any], Any]) -> None:
    (name,) = (name for name in members if name.endswith(end))
    content = json.loads(members[name])
    change(content)
    members[name] = json.dumps(content).encode()


def _huge(tree: Any) -> Any:
    """Every size that a program states, in terabytes."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            tree[key] = TERABYTES if key == "as_int" and isinstance(value, int) and value > 1 else _huge(value)
    elif isinstance(tree, list):
        tree[:] = map(_huge, tree)
    return tree


@pytest.mark.parametrize("end", ["model_weights_config.json", "models/model.json"])
def test_a_program_that_claims_terabytes(saved: Path, tmp_path: Path, end: str) -> None:
    path = program(saved, tmp_path, lambda members: _edited(members, end, _huge))
    with little_memory(), pytest.raises(ArtifactError):
        load_program(path)


def test_members_of_a_program_that_share_their_bytes(saved: Path, tmp_path: Path) -> None:
    """A thousand weights at one place in the file would be a thousand times its size in memory."""
    content = (saved / "model.pt2").read_bytes()
    start = content.rindex(b"PK\x05\x06")
    size, offset = struct.unpack("<II", content[start + 12 : start + 20])
    directory = content[offset : offset + size]
    at = directory.index(b"data/weights/weight_0")
    head = directory.rindex(b"PK\x01\x02", 0, at)
    end = directory.find(b"PK\x01\x02", at)
    entry = directory[head : end if end > 0 else len(directory)]
    more = directory + b"".join(entry for _ in range(3))
    count = struct.unpack("<H", content[start + 10 : start + 12])[0] + 3
    tail = content[start : start + 8] + struct.pack("<HHII", count, count, len(more), offset) + content[start + 20 :]
    (tmp_path / "model.pt2").write_bytes(content[:offset] + more + tail)
    with pytest.raises(ArtifactError, match=r"there twice|hold more than the file"):
        load_program(tmp_path / "model.pt2")


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 9),
    st.just(TERABYTES),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.lists(st.integers(0, 9), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def test_a_sealed_manifest_of_junk_never_ends_in_another_error(saved: Path, tmp_path: Path) -> None:
    read = set()

    @settings(max_examples=20, deadline=None)
    @given(data=st.data())
    def junk(data: Any) -> None:
        with little_memory():
            read.add(loads(sealed(saved, tmp_path / "out", lambda at, manifest: _put_junk(manifest, data)), Net))

    junk()
    assert read == {True, False}  # junk where nothing reads is let be; the rest is refused


def _put_junk(manifest: dict[str, Any], data: Any) -> None:
    """Something else in a place of a manifest."""
    place: Any = manifest
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(sorted(keys, key=str)))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or not data.draw(st.integers(0, 3)):
            break
        place = inner
    place[key] = data.draw(JUNK)
    manifest.setdefault("digest", "")


def test_sealed_files_of_junk_never_end_in_another_error(saved: Path, tmp_path: Path) -> None:
    read = set()

    @settings(max_examples=20, deadline=None)
    @given(data=st.data())
    def junk(data: Any) -> None:
        damaged: list[str] = []
        with little_memory():
            folder = sealed(saved, tmp_path / "out", lambda at, manifest: damaged.append(_damage(at, manifest, data)))
            read.add(loads(folder, *([] if damaged == ["model.pt2"] else [Net])))

    junk()
    assert read == {True, False}  # other numbers are numbers


def _damage(folder: Path, manifest: dict[str, Any], data: Any) -> str:
    """Other bytes in a file; which it was."""
    names = sorted(manifest["files"])
    file = folder / data.draw(st.sampled_from(names))
    content = bytearray(file.read_bytes())
    how = data.draw(st.sampled_from(["cut", "flip", "swap", "repeat"]))
    place = data.draw(st.integers(0, len(content) - 1))
    if how == "cut":
        del content[place:]
    elif how == "flip":
        for i in range(place, min(place + data.draw(st.integers(1, 9)), len(content))):
            content[i] ^= data.draw(st.integers(1, 255))
    elif how == "swap":
        content[:] = (folder / data.draw(st.sampled_from(names))).read_bytes()
    else:
        content += content[place:]
    file.write_bytes(bytes(content))
    return file.name


def test_the_artifact_that_all_this_was_made_of_loads(saved: Path, tmp_path: Path) -> None:
    folder = sealed(saved, tmp_path / "out", lambda at, m: None)
    x = torch.randn(4, 3)
    assert torch.allclose(load_subnet(folder, Net)(x), load_subnet(folder)(x), atol=1e-6)
    assert copy.deepcopy(load_subnet(folder)).free_dims == {"x": (0,)}
