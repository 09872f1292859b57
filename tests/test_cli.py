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


# Compressing without training ----------------------------------------------------------------------------------------


def samples(n=32):
    torch.manual_seed(1)
    x = torch.randn(n, 3, 8, 8)
    return {"x": x, "y": (x.mean((1, 2, 3)) > 0).long() + 2 * (x[:, 0].mean((1, 2)) > 0).long()}


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_one_shot_is_what_the_library_does(here, suffix):
    from safetensors.torch import save_file

    from oto.given import named_model

    file, held = f"samples{suffix}", samples()
    if suffix == ".npz":
        import numpy as np

        np.savez(file, **{name: t.numpy() for name, t in held.items()})
    else:
        (torch.save if suffix == ".pt" else save_file)(held, file)
    torch.save(named_model("cli_net:make").state_dict(), "dense.pt")
    told = as_json(
        *("slim", "dense.pt", "-m", "cli_net:make", "--one-shot", "--calibrate", file, "--target-macs", "0.6"),
        *("--batch-size", "8", "--saliency", "obs", "-o", "out"),
    )
    model = named_model("cli_net:make")
    oto = OTO(model, held["x"][:1])
    done = oto.one_shot(
        batches=[{name: t[i : i + 8] for name, t in held.items()} for i in range(0, 32, 8)],
        loss=lambda m, batch: torch.nn.functional.cross_entropy(m(batch["x"]), batch["y"]),
        saliency="obs",
        target_macs=0.6,
    )
    assert told["one_shot"]["kept"] == done.kept
    assert told["one_shot"]["loss"] == pytest.approx(done.loss, rel=1e-4)
    x = held["x"]
    torch.testing.assert_close(load_subnet(here / "out")(x), oto.construct_subnet().model(x), atol=1e-4, rtol=1e-4)
    text = call(
        *("slim", "-m", "cli_net:make", "--one-shot", "--calibrate", file, "--target-kept", "2.*=0.5"),
        *("--compensate", "none", "--holdout", "0.5", "-o", "out2", "--loss", "cli_net:loss"),
    )
    assert text.exit_code == 2 and "cli_net has no loss" in text.stderr
    with (here / "cli_net.py").open("a") as f:
        f.write("\ndef loss(model, batch):\n    return (model(batch['x'])[:, 0] - batch['y']).square().mean()\n")
    sys.modules.pop("cli_net")
    importlib.invalidate_caches()
    text = call(
        *("slim", "-m", "cli_net:make", "--one-shot", "--calibrate", file, "--target-kept", "2.*=0.5"),
        *("--compensate", "none", "--batch-size", "8", "-o", "out2", "--loss", "cli_net:loss"),
    )
    assert text.exit_code == 0, text.output
    assert "no fit; 3 batches to calibrate with, 1 held out" in text.stdout and "held-out loss" in text.stdout


@pytest.fixture
def language(here):
    """A folder of a small model of the next token, and a text."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained("language")
    letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz .,;:!?'\n-")}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="."))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained("language")
    (here / "text.txt").write_text("it was the best of times, it was the worst of times.\n" * 20)
    return here


def test_one_shot_of_a_language_model_by_a_text(language):
    told = as_json(
        *("slim", "-m", "hf:language", "--one-shot", "--calibrate", "text.txt", "--target-macs", "0.8"),
        *("--context", "32", "--samples", "12", "--batch-size", "3", "--layout", "uniform", "-o", "out"),
        *("--save-pretrained", "small"),
    )
    assert told["emitter"] == "config" and (language / "small" / "config.json").is_file()
    assert "3 batches to calibrate with, 1 held out" in told["one_shot"]["how"]
    small = json.loads((language / "small" / "config.json").read_text())
    assert small["intermediate_size"] < 64


def test_mistakes_of_one_shot_are_told(language):
    import numpy as np

    np.savez("good.npz", **{name: t.numpy() for name, t in samples(8).items()})
    np.savez("bare.npz", x=samples(8)["x"].numpy())
    np.savez("odd.npz", x=samples(8)["x"].numpy(), y=np.zeros((8, 7), dtype=np.int64))
    np.savez("uneven.npz", x=np.zeros((8, 3)), y=np.zeros(7))
    np.savez("unknown.npz", a=np.zeros((8, 3)), b=np.zeros((8, 3)), y=np.zeros(8))
    np.savez("objects.npz", x=np.array([None, "a"], dtype=object))
    np.savez("twice.npz", x=np.zeros((8, 3)), y=np.zeros(8), target=np.zeros(8))
    (language / "short.txt").write_text("it was")
    (language / "data.csv").write_text("1,2")
    net = "slim -m cli_net:make -o out --one-shot"
    for words, code, said in [
        (f"{net} --target-macs 0.5", 2, "--calibrate FILE"),
        (f"{net} --calibrate good.npz", 2, "0 targets are given"),
        (f"{net} --calibrate gone.npz --target-macs 0.5", 2, "there is no file gone.npz"),
        (f"{net} --calibrate data.csv --target-macs 0.5", 2, "is of no format"),
        (f"{net} --calibrate bare.npz --target-macs 0.5", 2, "says nothing of what should come out"),
        (f"{net} --calibrate odd.npz --target-macs 0.5 --batch-size 2", 2, "no loss follows"),
        (f"{net} --calibrate uneven.npz --target-macs 0.5", 2, "equally many in each"),
        (f"{net} --calibrate unknown.npz --target-macs 0.5", 2, "has no argument a, b"),
        (f"{net} --calibrate objects.npz --target-macs 0.5", 2, "cannot be read as plain arrays"),
        (f"{net} --calibrate twice.npz --target-macs 0.5", 2, "could all be labels"),
        (f"{net} --calibrate good.npz --target-macs 0.5 --loss cli_net", 2, "is no function"),
        (f"{net} --calibrate good.npz --target-macs 0.5", 1, "at least two batches"),
        (f"{net} --calibrate good.npz --target-macs 0.5 --device nowhere", 2, "cannot be moved to nowhere"),
        (f"{net} --calibrate good.npz --target-macs 0.5 --compensate mean --batch-size 2", 1, "compensate is 'mean'"),
        (f"{net} --calibrate text.txt --target-macs 0.5", 2, "names no tokenizer"),
        ("slim -m hf:language -o out --one-shot --calibrate short.txt --target-macs 0.5", 2, "not two pieces of 512"),
        ("slim -m cli_net:make -o out", 2, "no checkpoint is given"),
        ("slim w.pt -m cli_net:make -o out --target-macs 0.5 --saliency obs", 2, "--one-shot is not given"),
    ]:
        done = call(*words.split())
        assert done.exit_code == code, (words, done.output)
        assert said in " ".join(done.stderr.split()) and "Traceback" not in done.output, words
        assert done.stdout == "" and not (language / "out").exists()
