"""The artefact: what is written comes back, and what is not whole is refused."""

from __future__ import annotations

import contextlib
import json
import os
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oto.errors import ArtefactError, ArtefactVersionError, DamagedArtefactError
from oto.io import artefact
from oto.io.artefact import MANIFEST, reading, writing
from oto.io.program import load_program, save_program


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
    assert manifest["emitter"] == "module" and manifest["format"] == artefact.FORMAT_VERSION
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


def test_an_older_artefact_is_replaced_and_foreign_files_stay(tmp_path):
    out = save(tmp_path / "out")
    (out / "log.csv").write_text("mine")
    save(out, v=torch.ones(1))
    assert list(reading(out).tensors("model.safetensors")) == ["v"]
    assert (out / "log.csv").read_text() == "mine"


@pytest.mark.parametrize("break_at", range(4))
def test_a_crash_during_commit_never_leaves_a_mixture(tmp_path, monkeypatch, break_at):
    out = save(tmp_path / "out")
    count, real = iter(range(100)), os.replace

    def replace(source, target):
        if next(count) == break_at:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(artefact.os, "replace", replace)
    with contextlib.suppress(KeyboardInterrupt):
        save(out, v=torch.ones(1))
    monkeypatch.undo()
    try:
        names = list(reading(out).tensors("model.safetensors"))
    except ArtefactError as failure:
        assert "oto.json" in str(failure)  # refused: the manifest was not put in place
    else:
        assert names == ["v"]


def test_out_dir_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    for place in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(ArtefactError, match="is a file"), writing(place):
            raise AssertionError("never entered")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_without_manifest(tmp_path):
    with pytest.raises(ArtefactError, match=r"holds no oto\.json"):
        reading(tmp_path)


def test_a_format_of_the_future(tmp_path):
    out = save(tmp_path / "out")
    content = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(ArtefactVersionError, match="format 99"):
        reading(out)


def test_a_name_that_leaves_the_folder(tmp_path):
    out = save(tmp_path / "out")
    content = {k: v for k, v in json.loads((out / MANIFEST).read_text()).items() if k != "digest"}
    content["files"]["../secret"] = {"size": 0, "sha256": ""}
    (out / MANIFEST).write_text(json.dumps({**content, "digest": artefact._digest(content)}))
    with pytest.raises(DamagedArtefactError, match="outside the folder"):
        reading(out)


def test_a_missing_file(tmp_path):
    out = save(tmp_path / "out")
    (out / "note.txt").unlink()
    with pytest.raises(DamagedArtefactError, match="missing"):
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
    except ArtefactError:
        return
    # white space between the tokens of the manifest means nothing
    assert file.name == MANIFEST and torch.equal(
        found.tensors("model.safetensors")["w"], torch.arange(6.0).reshape(2, 3)
    )


def exported():
    model = torch.nn.Linear(3, 2).eval()
    return torch.export.export(model, (torch.randn(4, 3),), strict=False)


def test_a_program_is_saved_without_pickle(tmp_path):
    program = exported()
    save_program(program, tmp_path / "model.pt2")
    assert program.example_inputs is not None  # left as it was
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        for member in archive.infolist():
            assert not archive.read(member).startswith((b"PK", b"\x80")), member.filename
    x = torch.randn(4, 3)
    assert torch.equal(load_program(tmp_path / "model.pt2").module()(x), program.module()(x))


def test_a_program_with_pickles_is_refused_unread(tmp_path):
    torch.export.save(exported(), tmp_path / "model.pt2")  # torch itself pickles the example inputs
    with pytest.raises(ArtefactError, match="pickled"):
        load_program(tmp_path / "model.pt2")
    (tmp_path / "other.pt2").write_bytes(b"no zip")
    with pytest.raises(ArtefactError, match="no exported program"):
        load_program(tmp_path / "other.pt2")
