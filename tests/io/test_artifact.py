"""The artifact: what is written comes back, and what is not whole is refused."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import stat
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oto.errors import ArtifactError, ArtifactVersionError, DamagedArtifactError
from oto.io import artifact
from oto.io.artifact import MANIFEST, check_out_dir, reading, writing


def save(folder, **tensors):
    with writing(folder) as draft:
        draft.tensors("model.safetensors", tensors or {"w": torch.arange(6.0).reshape(2, 3)})
        draft.file("note.txt").write_text("a further file")
        draft.commit({"emitter": "module"})
    return folder


def test_every_kind_of_tensor_comes_back(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "slice": base[:, ::2],
        "bf16": torch.randn(3).bfloat16(),
        "half": torch.randn(3).half(),
        "bool": torch.tensor([True]),
        "int": torch.tensor([[3]]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "complex": torch.randn(3).to(torch.complex64),
    }
    found = reading(save(tmp_path / "out", **tensors)).tensors("model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
        assert found[name].untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def test_ties_are_one_tensor_again(tmp_path):
    w = torch.randn(4)
    found = reading(save(tmp_path / "out", a=w, b=w)).tensors("model.safetensors")
    assert found["a"] is found["b"] and torch.equal(found["a"], w)


def test_the_manifest_says_what_made_it(tmp_path):
    manifest = reading(save(tmp_path / "out")).manifest
    assert manifest["emitter"] == "module" and manifest["format"] == artifact.FORMAT_VERSION
    assert set(manifest["files"]) == {"model.safetensors", "note.txt"}
    assert manifest["versions"]["torch"] == str(torch.__version__)


def test_a_file_inside_stands_for_the_folder(tmp_path):
    save(tmp_path / "out")
    assert reading(tmp_path / "out" / "model.safetensors").folder == tmp_path / "out"


def test_without_commit_nothing_appears(tmp_path):
    with pytest.raises(RuntimeError, match="half way"), writing(tmp_path / "deep" / "out") as draft:
        draft.tensors("model.safetensors", {"w": torch.ones(2)})
        raise RuntimeError("half way")
    assert not any(tmp_path.iterdir())


def test_an_older_artifact_is_replaced_and_foreign_files_stay(tmp_path):
    out = save(tmp_path / "out")
    (out / "log.csv").write_text("mine")
    save(out, v=torch.ones(1))
    assert list(reading(out).tensors("model.safetensors")) == ["v"]
    assert (out / "log.csv").read_text() == "mine"


def test_out_dir_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    for place in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(ArtifactError, match="is a file"), writing(place):
            raise AssertionError("never entered")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_without_manifest(tmp_path):
    with pytest.raises(ArtifactError, match=r"holds no oto\.json"):
        reading(tmp_path)


def test_a_format_of_the_future(tmp_path):
    out = save(tmp_path / "out")
    content = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(ArtifactVersionError, match="format 99"):
        reading(out)


def test_a_name_that_leaves_the_folder(tmp_path):
    out = save(tmp_path / "out")
    content = {k: v for k, v in json.loads((out / MANIFEST).read_text()).items() if k != "digest"}
    content["files"]["../secret"] = {"size": 0, "sha256": ""}
    (out / MANIFEST).write_text(json.dumps({**content, "digest": artifact._digest(content)}))
    with pytest.raises(DamagedArtifactError, match="outside the folder"):
        reading(out)


def test_a_manifest_that_was_edited(tmp_path):
    out = save(tmp_path / "out")
    text = (out / MANIFEST).read_text()
    (out / MANIFEST).write_text(text.replace('"module"', '"graph"'))
    with pytest.raises(DamagedArtifactError, match=r"oto\.json: it was changed after it was written"):
        reading(out)


def test_a_file_that_was_cut_short(tmp_path):
    out = save(tmp_path / "out")
    (out / "note.txt").write_text("a further")
    with pytest.raises(DamagedArtifactError, match=r"note\.txt: it has 9 bytes, and had 14"):
        reading(out)


def test_a_missing_file(tmp_path):
    out = save(tmp_path / "out")
    (out / "note.txt").unlink()
    with pytest.raises(DamagedArtifactError, match="missing"):
        reading(out)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_noticed(tmp_path_factory, data):
    out = save(tmp_path_factory.mktemp("a") / "out")
    file = out / data.draw(st.sampled_from(["model.safetensors", "note.txt", MANIFEST]))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        del content[at:]
    file.write_bytes(bytes(content))
    try:
        found = reading(out)
    except ArtifactError:
        return
    # white space between the tokens of the manifest means nothing
    assert file.name == MANIFEST and torch.equal(
        found.tensors("model.safetensors")["w"], torch.arange(6.0).reshape(2, 3)
    )


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
]


@st.composite
def tensors(draw):
    """Named tensors of any dtype and shape, some of them views, some the same memory under two names."""
    made = {}
    for i in range(draw(st.integers(0, 5))):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        seed = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        value = torch.randint(-3, 4, shape, generator=seed).to(dtype)
        if draw(st.booleans()):
            value = value.mT if value.ndim > 1 else value.flip(0) if value.ndim else value
        if dtype.is_complex and draw(st.booleans()):
            value = (value * (1 + 2j)).conj()
            value = value.imag if draw(st.booleans()) else value  # a lazily negated view
        made[draw(st.sampled_from(["w", "layer.0.weight", "ü"])) + str(i)] = value
    for i, name in enumerate(sorted(made)):
        if draw(st.booleans()):
            made[f"tied{i}"] = made[name].detach()  # another object, as state_dict() gives
    return made


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(given=tensors(), extra=st.dictionaries(st.text(min_size=1).map("x".__add__), JSON, max_size=3))
def test_whatever_is_written_is_read(given, extra):
    with tempfile.TemporaryDirectory() as folder:
        with writing(folder) as draft:
            draft.tensors("model.safetensors", given)
            draft.commit(extra)
        found = reading(folder)
        for key, value in extra.items():
            assert found.manifest[key] == json.loads(json.dumps(value))
        back = found.tensors("model.safetensors")
    assert back.keys() == given.keys()
    for name, value in given.items():
        assert back[name].dtype == value.dtype and back[name].shape == value.shape
        assert torch.equal(back[name], value.resolve_conj().resolve_neg()) and back[name].is_contiguous()
    for name in given:
        for other in given:  # the same memory before, the same tensor after; and only then
            if given[name].numel() and given[other].numel():
                tied = given[name].data_ptr() == given[other].data_ptr() and given[name].dtype == given[other].dtype
                assert (back[name] is back[other]) == (name == other or tied)


def test_names_that_state_dict_tied_stay_tied(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    found = reading(save(tmp_path / "out", **model.state_dict())).tensors("model.safetensors")
    assert found["0.weight"] is found["1.weight"] and found["0.bias"] is not found["1.bias"]


def test_a_tensor_and_its_conjugate_are_two(tmp_path):
    z = torch.tensor([1 + 2j, 3 - 1j])
    found = reading(save(tmp_path / "out", a=z, b=z.conj(), c=z.imag, d=z.conj().imag)).tensors("model.safetensors")
    assert found["b"].tolist() == [1 - 2j, 3 + 1j]
    assert found["c"].tolist() == [2, -1] and found["d"].tolist() == [-2, 1]


def test_a_view_of_other_entries_is_no_tie(tmp_path):
    w = torch.arange(4.0).reshape(2, 2)
    found = reading(save(tmp_path / "out", a=w, b=w.T, c=w[:1])).tensors("model.safetensors")
    assert all(torch.equal(found[k], v) for k, v in {"a": w, "b": w.T, "c": w[:1]}.items())


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_a_tensor_without_plain_memory(tmp_path, kind):
    value = torch.eye(2).to_sparse() if kind == "sparse" else torch.empty(2, device="meta")
    with pytest.raises(ArtifactError, match=r"model\.safetensors: w .* has no plain form"):
        save(tmp_path / "out", w=value)
    assert not any(tmp_path.iterdir())


def test_what_the_new_artifact_lacks_does_not_stay_behind(tmp_path):
    out = tmp_path / "out"
    with writing(out) as draft:
        draft.file("model.pt2").write_text("of the old one")
        draft.commit({})
    (out / "model.onnx").write_text("mine")
    save(out)
    assert {p.name for p in out.iterdir()} == {"model.safetensors", "note.txt", "model.onnx", MANIFEST}


def test_a_manifest_that_was_edited_deletes_nothing(tmp_path):
    out = save(tmp_path / "out")
    (out / "mine").write_text("mine")
    content = json.loads((out / MANIFEST).read_text())
    content["files"]["mine"] = content["files"]["note.txt"]
    (out / MANIFEST).write_text(json.dumps(content))
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(ArtifactError, match=r"no artifact has written[^$]*nothing was saved[^$]*to fix"):
        save(out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


FOREIGN = {
    "beside no artifact": lambda out: (out / MANIFEST).unlink(),
    "beside an artifact that has no such file": lambda out: forge(out, lambda m: m["files"].pop("note.txt")),
    "instead of ours": lambda out: (out / "note.txt").write_text("mine, not yours"),
    "of the same size": lambda out: (out / "note.txt").write_text("a further time"),
    "a link to elsewhere": lambda out: ((out / "note.txt").rename(out / "mine"), (out / "note.txt").symlink_to("mine")),
    "a link to nowhere": lambda out: ((out / "note.txt").unlink(), (out / "note.txt").symlink_to("nowhere")),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_what_no_artifact_has_written_is_never_replaced(tmp_path, make):
    out = save(tmp_path / "out")
    make(out)
    before = {p.name: (p.is_symlink(), p.read_bytes() if p.exists() else b"") for p in out.iterdir()}
    with pytest.raises(ArtifactError, match=r"holds .*note\.txt"):
        artifact.check_out_dir(out, ["note.txt"])
    with pytest.raises(ArtifactError, match=r"holds .*note\.txt"):
        save(out)
    assert {p.name: (p.is_symlink(), p.read_bytes() if p.exists() else b"") for p in out.iterdir()} == before


def test_what_was_ours_and_was_changed_is_not_deleted(tmp_path):
    out = save(tmp_path / "out")
    (out / "note.txt").write_text("mine now")
    with writing(out) as draft:
        draft.tensors("model.safetensors", {"v": torch.ones(1)})
        draft.commit({})
    assert (out / "note.txt").read_text() == "mine now" and "note.txt" not in reading(out).manifest["files"]


def test_names_that_are_not_there_may_be_written(tmp_path):
    (tmp_path / "log.csv").write_text("mine")
    artifact.check_out_dir(tmp_path, ["model.safetensors"])
    artifact.check_out_dir(save(tmp_path / "out"), ["model.safetensors", "note.txt"])


def test_what_is_read_back_is_compared_bit_by_bit(tmp_path, monkeypatch):
    real = artifact.safetensors.torch.save_file

    def wrong(tensors, path):
        real({name: t.clone().neg_() if name == "w" else t for name, t in tensors.items()}, path)

    monkeypatch.setattr(artifact.safetensors.torch, "save_file", wrong)
    nan = torch.tensor([float("nan"), 0.0])
    save(tmp_path / "fine", v=nan)
    with pytest.raises(ArtifactError, match=r"model\.safetensors reads otherwise than it was written \(w\)"):
        save(tmp_path / "out", v=nan, w=torch.zeros(2))
    assert not (tmp_path / "out").exists()


def test_without_commit_the_old_artifact_is_as_it_was(tmp_path):
    out = save(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(RuntimeError), writing(out) as draft:
        draft.tensors("model.safetensors", {"v": torch.ones(2)})
        raise RuntimeError
    with writing(out) as draft:
        draft.file("note.txt").write_text("never mind")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize("how", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_breaking_off_anywhere_leaves_the_old_artifact_or_the_new_one(tmp_path, monkeypatch, how):
    """Each call that touches the disk during commit fails once; the next save works."""
    seen = []
    for break_at in itertools.count():
        out = save(tmp_path / str(break_at))
        count = itertools.count()

        def breaking(real, count=count, break_at=break_at):
            def call(*args, **kwargs):
                if next(count) == break_at:
                    raise how
                return real(*args, **kwargs)

            return call

        reached = False
        with contextlib.suppress(ArtifactError), writing(out) as draft:
            draft.tensors("model.safetensors", {"v": torch.ones(1)})
            draft.file("third").write_text("a new file")
            with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
                for place, name in (
                    *((os, name) for name in ("rename", "replace", "fsync", "open", "unlink", "mkdir", "rmdir")),
                    (json, "dump"),
                ):
                    patch.setattr(place, name, breaking(getattr(place, name)))
                draft.commit({"emitter": "module"})
                reached = True
        found = reading(out)
        names = set(found.tensors("model.safetensors"))
        assert set(found.manifest["files"]) == {"model.safetensors", "third" if names == {"v"} else "note.txt"}
        assert names == {"v"} or not reached
        seen += [] if reached else [names]
        save(out, u=torch.ones(1))
        assert set(reading(out).tensors("model.safetensors")) == {"u"}
        assert {p.name for p in out.iterdir()} == {"model.safetensors", "note.txt", MANIFEST}
        if reached and next(count) < break_at:
            break
    assert seen == [{"w"}] * seen.count({"w"}) + [{"v"}] * seen.count({"v"})
    assert seen.count({"w"}) > 10 and seen.count({"v"}) > 5


def test_a_folder_in_the_way_of_a_file(tmp_path):
    (tmp_path / "out" / "note.txt").mkdir(parents=True)
    with pytest.raises(ArtifactError, match=r"note\.txt is a folder there"):
        save(tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["note.txt"]


def test_a_full_disk_is_told_from_a_mistake_elsewhere(tmp_path):
    with pytest.raises(ArtifactError, match="cannot be written"), writing(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    with pytest.raises(FileNotFoundError), writing(tmp_path / "out"):
        (tmp_path / "elsewhere" / "file").read_text()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["n" * 300, "a\0b"])
def test_a_name_that_no_folder_can_have(tmp_path, name):
    with pytest.raises(ArtifactError, match="cannot be written"):
        artifact.check_out_dir(tmp_path / name)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="whoever runs this may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ArtifactError, match="may not be written"):
        artifact.check_out_dir(tmp_path / "out")


def test_access_is_asked_before_long_work(tmp_path, monkeypatch):
    monkeypatch.setattr(artifact.os, "access", lambda place, mode: False)
    with pytest.raises(ArtifactError, match="may not be written"):
        artifact.check_out_dir(tmp_path / "deep" / "out")


def test_others_may_read_what_they_could_otherwise(tmp_path):
    out = save(tmp_path / "out")
    assert (out / "model.safetensors").stat().st_mode == (out / "note.txt").stat().st_mode


def test_misuse_of_a_draft(tmp_path):
    with writing(tmp_path / "out") as draft:
        for name in ("../x", "a/b", "..", "", MANIFEST, "c:x"):
            with pytest.raises(AssertionError):
                draft.file(name)
        with pytest.raises(AssertionError, match="own entries"):
            draft.commit({"format": 2})
        draft.commit({})
        with pytest.raises(AssertionError, match="once"):
            draft.commit({})


def forge(out, change):
    """An artifact whose manifest was changed by somebody who knows how to seal it."""
    content = {k: v for k, v in json.loads((out / MANIFEST).read_text()).items() if k != "digest"}
    change(content)
    (out / MANIFEST).write_text(json.dumps({**content, "digest": artifact._digest(content)}))


FORGERIES = {
    "no files": lambda m: m.pop("files"),
    "files are a list": lambda m: m.update(files=[]),
    "no hash": lambda m: m["files"]["note.txt"].pop("sha256"),
    "a number for a stamp": lambda m: m["files"].update({"note.txt": 1}),
    "no tensors": lambda m: m.pop("tensors"),
    "tensors of no file": lambda m: m["tensors"].update(other={"ties": {}, "complex": []}),
    "parent": lambda m: m["files"].update({"..": m["files"]["note.txt"]}),
    "absolute": lambda m: m["files"].update({"/etc/passwd": m["files"]["note.txt"]}),
    "backslash": lambda m: m["files"].update({"..\\x": m["files"]["note.txt"]}),
    "tie to nothing": lambda m: m["tensors"]["model.safetensors"]["ties"].update(v="none"),
    "no such complex": lambda m: m["tensors"]["model.safetensors"]["complex"].append("none"),
    "complex of odd shape": lambda m: m["tensors"]["model.safetensors"]["complex"].append("w"),
}


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES)
def test_a_sealed_manifest_of_nonsense(tmp_path, change):
    out = save(tmp_path / "out")
    forge(out, change)
    with pytest.raises(DamagedArtifactError):
        reading(out).tensors("model.safetensors")


@pytest.mark.parametrize("version", [0, 2, True, 1.5, "1", None, [1]])
def test_versions_that_are_not_ours(tmp_path, version):
    out = save(tmp_path / "out")
    forge(out, lambda m: m.update(format=version, versions="?"))
    with pytest.raises(ArtifactVersionError, match=r"reads format 1(.|\n)*wrote it \(unknown\)"):
        reading(out)


@pytest.mark.parametrize("text", ["", "[]", "{", "3", "[" * 100_000, b"\xff\xfe"])
def test_a_manifest_that_is_none(tmp_path, text):
    out = save(tmp_path / "out")
    (out / MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DamagedArtifactError, match="not the JSON"):
        reading(out)


def test_what_another_program_wrote_is_no_damage(tmp_path, monkeypatch):
    (tmp_path / MANIFEST).write_text('{"a": 1}')
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ArtifactError, match="is of another program") as caught:
        reading(tmp_path)
    assert not isinstance(caught.value, DamagedArtifactError)
    (tmp_path / MANIFEST).unlink()
    monkeypatch.chdir(tmp_path)
    for place, says in [
        ("notes.txt", r"notes\.txt is a file of no artifact"),
        ("nowhere", rf"there is no folder nowhere \(in {tmp_path}\)"),
        (".", rf"{tmp_path} holds no"),
    ]:
        with pytest.raises(ArtifactError, match=f"{says}[^$]*to fix"):
            reading(place)


def test_safetensors_that_are_none_though_sealed(tmp_path):
    with writing(tmp_path / "out") as draft:
        draft.tensors("model.safetensors", {"w": torch.ones(1)})
        draft.file("model.safetensors").write_bytes(b"nonsense")
        draft.commit({})
    with pytest.raises(DamagedArtifactError, match="not what the manifest says"):
        reading(tmp_path / "out").tensors("model.safetensors")


def test_asking_for_what_is_not_there(tmp_path):
    found = reading(save(tmp_path / "out"))
    with pytest.raises(ArtifactError, match=r"holds no model\.pt2"):
        found.path("model.pt2")
    with pytest.raises(ArtifactError, match=r"holds no tensors\n  to fix  they are in: model\.safetensors"):
        found.tensors("note.txt")


@pytest.mark.parametrize("place", ["n" * 300, "\0", "file/below"])
def test_a_place_that_cannot_be_is_told(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(ArtifactError, match="to fix"):
        reading(place)
    with pytest.raises(ArtifactError, match="to fix"):
        check_out_dir(place)


def test_no_folder_is_not_the_working_folder() -> None:
    with pytest.raises(ArtifactError, match=r"out_dir is empty[^$]*to fix"):
        check_out_dir("")


def test_what_no_reader_would_take_is_not_put_in_place(tmp_path: Path) -> None:
    with writing(tmp_path / "out") as draft:
        draft.commit({"notes": ["as it was"]})
    with (
        pytest.raises(ArtifactError, match=r"no reader accepts[^$]*effect  nothing was saved"),
        writing(tmp_path / "out") as draft,
    ):
        draft.commit({"edits": {"attributes": {"a": {"no_such_size": 3}}}})
    assert reading(tmp_path / "out").manifest["notes"] == ["as it was"]


def test_a_file_system_without_fsync_for_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.fsync

    def none_for_folders(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}") or stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        plain(handle)

    monkeypatch.setattr(os, "fsync", none_for_folders)
    with writing(tmp_path / "out") as draft:
        draft.commit({})
    assert reading(tmp_path / "out")
