"""The command line says what the library says, and a mistake never ends in a traceback."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
from typer.testing import CliRunner

from oto import OTO, load_subnet
from oto.cli import app

ROOT = Path(__file__).resolve().parent.parent
NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))

def other():
    return nn.Sequential(nn.Linear(3, 4))

def example():
    return torch.randn(2, 3, 8, 8)

def broken():
    raise RuntimeError("not today")

number = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a module of the user's."""
    (tmp_path / "cli_net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("cli_net", None)
    importlib.invalidate_caches()
    return tmp_path


@pytest.fixture
def artifact(here):
    """What ``oto slim`` makes of a checkpoint that was trained."""
    from oto.given import named_model

    model = named_model("cli_net:make")
    OTO(model, torch.randn(1, 3, 8, 8)).random_set_zero_groups(0.5)
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, "trained.pt")
    done = call("slim", "trained.pt", "-m", "cli_net:make", "-i", "1x3x8x8", "--out", "slim", "--save-full")
    assert done.exit_code == 0, done.output
    return here / "slim"


def call(*words: str):
    return CliRunner().invoke(app, list(words), prog_name="oto")


def as_json(*words: str):
    done = call(*words, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_explain_says_what_the_library_says(here):
    done = call("explain", "cli_net:make", "--input", "1x3x8x8")
    assert done.exit_code == 0
    assert done.stdout.startswith("2 prunable node groups with 24 zero-invariant groups")
    assert as_json("explain", "cli_net:make", "--input-fn", "cli_net:example")["atoms"] == 24
    assert as_json("explain", "cli_net:make", "-i", "1x3x8x8", "--skip", "2.weight")["atoms"] == 8
    assert as_json("explain", "cli_net:make", "-i", "1x3x8x8", "--only", "2.*")["atoms"] == 16
    nothing = call("explain", "cli_net:other", "-i", "1x3")  # is told before it is an error
    assert nothing.exit_code == 1 and "it is a dimension of an output" in nothing.stdout
    assert nothing.stderr.startswith("error: no node group of this model can lose an entry")


def test_preview_takes_every_target(here):
    given = ("cli_net:make", "-i", "1x3x8x8")
    half = as_json("preview", *given, "--target-macs", "0.5")
    assert 0.45 < half["after"]["macs"] / half["before"]["macs"] <= 0.5
    number = as_json("preview", *given, "--target-params", "1000")
    assert 900 < number["after"]["params"] <= 1000
    assert as_json("preview", *given, "--target-bytes", "0.9")["after"]["bytes"] < half["before"]["bytes"]
    groups = as_json("preview", *given, "--target-group-sparsity", "0.25", "--group-divisible", "4")
    assert sum(w["after"] for w in groups["widths"]) == 16  # of 24 at most 18, in fours
    assert {w["after"] % 4 for w in groups["widths"]} == {0}
    named = as_json("preview", *given, "--target-kept", "0.weight=0.5", "--target-kept", "2.*=5")
    assert [w["after"] for w in named["widths"]] == [4, 5]
    aligned = as_json("preview", *given, "--target-group-sparsity", "0.25", "--align", "4")
    assert aligned["widths"] == groups["widths"] and "align=4" in aligned["how"]
    named = as_json("preview", *given, "--target-params", "0.8", "--align", "0.*=4", "--align", "5.weight=1")
    assert named["widths"][0]["after"] % 4 == 0
    assert call("preview", *given, "--target-params", "0.8", "--align", "4", "--align", "8").exit_code == 2
    assert "'gguf-k'" in call("preview", *given, "--target-params", "0.8", "--align", "nf4").output
    fast = as_json("preview", *given, "--target-latency-ms", "1000")
    assert fast["after"] == fast["before"] and fast["milliseconds"][0] > 0


def test_preview_goes_by_the_checkpoint(here):
    from oto.given import named_model

    model = named_model("cli_net:make")
    with torch.no_grad():
        model[0].weight[:4] *= 100
        model[0].weight[4:] *= 0.01
    torch.save(model.state_dict(), "large.pt")
    given = ("preview", "cli_net:make", "-i", "1x3x8x8", "--target-group-sparsity", "0.2")
    plain, loaded = as_json(*given), as_json(*given, "--checkpoint", "large.pt")
    first = [next(w["after"] for w in found["widths"] if w["group"] == "0.weight") for found in (plain, loaded)]
    assert first[1] == 4 < first[0]


def test_the_drawing_is_written(here):
    pytest.importorskip("pydot")
    files = as_json("visualize", "cli_net:make", "-i", "1x3x8x8", "--out", "drawing", "--params", "--horizontal")[
        "files"
    ]
    assert any(file.endswith(".dot") for file in files) and all(Path(file).is_file() for file in files)
    assert "rankdir=LR" in next(Path(file) for file in files if file.endswith(".dot")).read_text()


def test_slim_keeps_zeros_that_make_sizes_multiples(artifact):
    given = ("slim", "trained.pt", "-m", "cli_net:make", "-i", "1x3x8x8", "--out")
    plain, aligned = as_json(*given, "plain"), as_json(*given, "aligned", "--align", "4")
    assert any(n % 4 for n in plain["kept"].values()) and not any(n % 4 for n in aligned["kept"].values())
    assert any("align=4" in note for note in aligned["notes"])


def test_slim_info_verify(artifact):
    loaded = load_subnet(artifact)
    assert loaded(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    told = call("info", "slim").stdout
    assert "parameters" in told and "verified in float64" in told and "model.safetensors" in told
    assert as_json("info", "slim")["cost"]["after"]["params"] < 1500
    alone = as_json("verify", "slim")
    assert alone["outputs"] == [[2, 5]] and alone["checks"] == []
    proved = as_json("verify", "slim", "--model", "cli_net:make")
    assert len(proved["checks"]) > 4 and all(c["error"] <= c["tolerance"] for c in proved["checks"])
    assert call("verify", "slim", "--model", "cli_net:make").stdout.endswith("all is well\n")
    alone = call("verify", "slim").stdout
    assert alone.endswith("the files are well\n") and "nothing was compared: no model is named (--model)" in alone


def test_slim_writes_a_report(artifact, here):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    given = ("trained.pt", "-m", "cli_net:make", "-i", "1x3x8x8", "--out", "told", "--report")
    assert as_json("slim", *given)["path"] == "told"
    assert "made slim" in (here / "told" / "report.html").read_text()
    assert "report.html" in as_json("info", "told")["files"] and not (artifact / "report.html").exists()


def test_verify_finds_what_is_damaged(artifact):
    file = artifact / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = call("verify", "slim")
    assert done.exit_code == 3 and "its content changed" in done.stderr and "Traceback" not in done.output
    done = call("verify", "slim", "--json")
    assert done.exit_code == 3 and json.loads(done.stderr)["error"] == "DamagedArtifactError"


def test_verify_finds_what_computes_something_else(artifact):
    """Whole files whose weights do not belong together."""
    from safetensors.torch import load_file, save_file

    from oto.io.artifact import MANIFEST, _digest, _stamp

    file = artifact / "model.safetensors"
    tensors = load_file(file)
    tensors["0.weight"] = tensors["0.weight"] + 1
    save_file(tensors, file)
    manifest = json.loads((artifact / MANIFEST).read_text())
    manifest["files"]["model.safetensors"] = _stamp(file)
    manifest["digest"] = _digest({k: v for k, v in manifest.items() if k != "digest"})
    (artifact / MANIFEST).write_text(json.dumps(manifest))
    assert call("verify", "slim").exit_code == 0  # nothing to compare with
    done = call("verify", "slim", "--model", "cli_net:make")
    assert done.exit_code == 3 and "does not compute" in done.stderr


def test_bench_times_both(artifact):
    both = as_json("bench", "slim", "--model", "cli_net:make", "--input", "4x3x8x8", "--seconds", "0")
    assert both["ms"].keys() == {"full", "slim"} and both["speedup"] > 0
    assert all(0 < ms["q1"] <= ms["median"] <= ms["q3"] for ms in both["ms"].values())
    alone = call("bench", "slim", "--seconds", "0")
    assert alone.exit_code == 0 and "slim" in alone.stdout and "full" not in alone.stdout
    assert call("bench", "slim", "--input", "4x3x9x9", "--seconds", "0").exit_code == 2


def test_export_writes_onnx_that_was_run(artifact):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    told = as_json("export", "slim", "--to", "onnx", "--out", "slim.onnx")
    assert told["error"] < 1e-5
    session = onnxruntime.InferenceSession("slim.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(5, 3, 8, 8)  # any batch
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(load_subnet(artifact)(x), torch.from_numpy(found), atol=1e-5)
    assert call("export", "slim", "--to", "tar").exit_code == 2
    again = call("export", "slim", "--out", "slim.onnx")  # a file is never replaced
    assert again.exit_code == 1 and "is there already" in again.stderr
    assert as_json("export", "slim", "--to", "pt2")["file"] == "model.pt2"


@pytest.mark.parametrize(
    "words, code, said",
    [
        ("explain", 2, "Missing argument"),
        ("explain cli_net:make --color", 2, "No such option"),
        ("explain cli_net", 2, "no model is called 'cli_net'"),
        ("explain cli_nett:make -i 1x3", 2, "no module is called cli_nett"),
        ("explain cli_net:maek -i 1x3", 2, "cli_net has no maek"),
        ("explain cli_net:number -i 1x3", 2, "cannot be made: TypeError"),
        ("explain cli_net:example -i 1x3", 2, "gives a Tensor"),
        ("explain cli_net:broken -i 1x3", 2, "not today"),
        ("explain cli_net:make --pretrained", 2, "No such option"),
        ("preview cli_net:make --pretrained --target-macs 0.5", 2, "--pretrained says nothing"),
        ("explain cli_net:make", 2, "no input is given"),
        ("explain cli_net:make -i 1x3xfour", 2, "is no shape"),
        ("explain cli_net:make -i 1x3:float33", 2, "is no shape"),
        ("explain cli_net:make -i x=1x3 -i 1x3", 2, "some have a name"),
        ("explain cli_net:make -i 1x3x8x8 --input-fn cli_net:example", 2, "both given"),
        ("explain cli_net:make -i 1x3x9x9", 1, "failed on the dummy input"),
        ("explain cli_net:make -i 1x3x8x8 --skip nothing.*", 1, "nothing.*"),
        ("preview cli_net:make -i 1x3x8x8", 2, "0 targets are given"),
        ("preview cli_net:make -i 1x3x8x8 --target-macs half", 2, "is no number"),
        ("preview cli_net:make -i 1x3x8x8 --target-macs 0.5 --target-params 0.5", 2, "2 targets are given"),
        ("preview cli_net:make -i 1x3x8x8 --target-macs 0.001", 1, "target_macs=0.001"),
        ("preview cli_net:make -i 1x3x8x8 --target-kept 0.5", 2, "name what keeps how much"),
        ("preview cli_net:make -i 1x3x8x8 --target-kept 0.weight=0.5 --target-macs .5", 2, "2 targets are given"),
        ("explain cli_net:make -i 1x3x8x8 --only nothing.*", 1, "nothing.*"),
        ("info cli_net.py", 1, "cli_net.py is not a file of an artifact"),
        ("slim nowhere.pt -m cli_net:make -i 1x3x8x8 -o out", 2, "there is no file nowhere.pt"),
        ("slim cli_net.py -m cli_net:make -i 1x3x8x8 -o out", 2, "cannot be read as plain tensors"),
        ("info nowhere", 1, "there is no folder nowhere"),
        ("verify nowhere", 1, "there is no folder nowhere"),
    ],
)
def test_mistakes_are_told_with_an_exit_code(here, words, code, said):
    done = call(*words.split())
    assert done.exit_code == code, done.output
    assert said in " ".join(done.stderr.split()) and "Traceback" not in done.output
    assert done.stdout == ""


def test_a_model_without_zeros_is_warned_about(here):
    from oto.given import named_model

    torch.save(named_model("cli_net:make").state_dict(), "dense.pt")
    done = call("slim", "dense.pt", "-m", "cli_net:make", "-i", "1x3x8x8", "-o", "out")
    assert done.exit_code == 0 and done.stderr.startswith("warning: ")
    done = call("slim", "dense.pt", "-m", "cli_net:make", "-i", "1x3x8x8", "-o", "out", "--json")
    assert json.loads(done.stderr)["warning"] == "NotPrunedWarning"


def test_the_artifact_of_another_model_is_refused(artifact):
    done = call("verify", "slim", "--model", "cli_net:other", "--input", "1x3")
    assert done.exit_code == 1 and "does not fit the artifact" in done.stderr


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_a_folder_that_needs_its_class_says_which_option_names_it(here, command):
    from oto.given import named_model

    oto = OTO(named_model("cli_net:make"), torch.randn(1, 3, 8, 8))
    oto.random_set_zero_groups(0.5)
    oto.construct_subnet("bare")
    done = call(command, "bare")
    assert done.exit_code == 2 and "holds no model.pt2: it was not asked for" in done.stderr
    assert (
        "to fix  --model package.module:function, which makes the full torch.nn.modules.container.Sequential"
        in done.stderr
    )
    done = call(command, "bare", "--model", "cli_net:make", "--input", "1x3x8x8")
    assert done.exit_code == 0, done.output


def test_models_of_libraries_by_name(here):
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    assert as_json("explain", "timm:test_resnet")["prunable"] > 3  # it knows its input
    vision = as_json("explain", "torchvision:squeezenet1_1", "-i", "1x3x64x64")
    assert vision["prunable"] > 3 and not vision["unknown"]


def test_a_folder_of_transformers_by_path(here):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=100
    )
    model = transformers.BertForSequenceClassification(config)
    model.config.save_pretrained("config_alone")
    model.save_pretrained("whole")
    for folder in ("config_alone", "whole"):
        found = as_json("explain", f"hf:{folder}", "--input", "input_ids=1x16:int64:100")
        assert found["prunable"] > 3 and not found["unreached"]  # with its head, which the config names


def test_python_dash_m_and_the_version():
    done = subprocess.run([sys.executable, "-m", "oto", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith("oto ") and torch.__version__ in done.stdout


def test_without_its_packages_it_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; import runpy; runpy.run_module('oto', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "the command line needs typer, which is not installed\n  to fix  pip install 'oto[cli]'\n"
