"""`benchmarks/rivals.py` and `benchmarks/latency.py` on what takes no time: what they write, and that they resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script with a ResNet-8 on random images in the place of ResNet-20."""
    pytest.importorskip("torch_pruning")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import rivals
    import rivals_tasks

    def split(n: int) -> Any:
        return rivals_tasks.Split((torch.randn(n, 3, 32, 32),), torch.arange(n) % 10)

    data = rivals_tasks.Data(split(64), split(20), split(40), shift=4, flip=True)
    small = replace(
        rivals.TASKS["resnet20"],
        build=lambda scale, _: rivals_tasks.ResNet(8, scale),
        data=lambda: data,
        images=64,
        epochs=2,
        batch=8,
        pretrained=False,
    )
    monkeypatch.setitem(rivals.TASKS, "resnet20", small)
    return rivals


METHODS = ["dense", "dense-small", "oto", "random", "tp-taylor-global-portions", "tp-l2-local-oneshot", "hspg", "lhspg"]


@pytest.mark.filterwarnings("ignore")  # those of torch-pruning are not ours
def test_a_cell_of_every_kind_is_run_once(rivals: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "rivals.jsonl"
    flags = ["--tasks", "resnet20", "--targets", ".5", "--seeds", "0", f"--results={results}"]
    flags += ["--options", 'random:{"pruning_periods": 2}', 'hspg:{"pruning_periods": 2}', "--methods", *METHODS]
    rivals.main(flags)
    lines = rivals.read(results)
    by_method = {line["method"].partition("[")[0]: line for line in lines}
    assert list(by_method) == METHODS and len(lines) == len(METHODS)

    task = rivals.TASKS["resnet20"]
    dense = rivals.macs(task.network(), task.example())
    assert by_method["dense"]["macs"] == dense
    assert lines[3]["method"] == "random[pruning_periods=2]"
    for method in METHODS[1:]:
        least = 0.1 if method == "lhspg" else 0.4  # adapters count while they are there, and then are merged
        assert least * dense < by_method[method]["macs"] <= 0.5 * dense, method
    for line in lines:
        assert 0 <= line["accuracy"] <= 100 and 0 < line["macs_kept"] <= 1
        assert rivals.macs(rivals.rebuilt(task, line["rebuild"]), task.example()) == line["macs"], line["method"]

    capsys.readouterr()
    with results.open("a") as file:  # as a run that was cut off leaves it
        file.write('{"kind": "accu')
    before = results.read_text()
    rivals.main(flags)
    assert results.read_text() == before
    assert "resnet20" not in capsys.readouterr().out, "nothing is run again"

    rivals.main([*flags[:6], "--methods", "dense-small", "--seeds", "1", flags[6]])
    assert len(rivals.read(results)) == len(METHODS) + 1, "a line of its own after the broken one"
    text = results.with_suffix(".md").read_text()
    ways = by_method["hspg"]["ways"]
    share = round(100 * ways["by half-space"] / sum(ways.values()))
    assert f"| hspg[pruning_periods=2], {share}% by half-space | 1 |" in text
    assert "| dense-small | 2 |" in text and "| **oto** | 1 |" in text and "points over `" in text


@pytest.mark.filterwarnings("ignore")
def test_a_cell_that_another_process_has_in_hand_is_left_to_it(rivals: Any, tmp_path: Path) -> None:
    results = tmp_path / "rivals.jsonl"
    args = rivals.parsed(["--tasks", "resnet20", "--methods", "dense", "--seeds", "0", f"--results={results}"])
    (cell,) = rivals.cells(args)
    with rivals.claimed(results, cell) as mine, rivals.claimed(results, cell) as again:
        assert mine and not again
        assert rivals.accuracy_of(cell, args) is None


@pytest.mark.filterwarnings("ignore")
def test_equal_time_is_found_trained_and_timed(
    rivals: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import rivals_erase
    import rivals_tasks

    small = rivals.TASKS["resnet20"]
    deeper = replace(small, name="resnet56", build=lambda scale, _: rivals_tasks.ResNet(14, scale))
    monkeypatch.setitem(rivals.TASKS, "resnet56", deeper)
    monkeypatch.setitem(rivals_erase.DEPTHS, "resnet56", 2)
    for name, value in {"HALVINGS": 2, "ROUNDS": 3, "EXAMPLES": 32}.items():
        monkeypatch.setattr(rivals_erase, name, value)
    results = tmp_path / "erase.jsonl"
    chosen = ["dense", "both", "depth-macs", "width-half-macs", "shortgpt", "blockpruner", "narrow", "shallow"]
    flags = ["--erase", "--tasks", "resnet56", "--times", ".8", "--seeds", "0", f"--results={results}", "--methods"]
    rivals.main([*flags, *chosen])
    done = {line["method"]: line for line in rivals.read(results) if line["kind"] == "accuracy"}
    assert set(done) == set(chosen)
    segments = {f"layer{stage}.{block}.bn2" for stage in (1, 2, 3) for block in (0, 1)}
    assert set(done["shortgpt"]["gone"]) < segments and set(done["blockpruner"]["gone"]) < segments
    assert done["depth-macs"]["gone"] and done["shortgpt"]["size"] and done["shallow"]["rebuild"] == {"depth": 1}
    assert not done["width-half-macs"]["gone"] and done["width-half-macs"]["macs_kept"] <= 0.5
    sizes = [line for line in rivals.read(results) if line["kind"] == "size"]
    task = rivals.TASKS["resnet56"]
    for method, line in done.items():
        model = rivals_erase.again(task, line["rebuild"])
        assert rivals.macs(model, task.example()) == line["macs"], method
    rivals.main([*flags, *chosen])
    assert [line for line in rivals.read(results) if line["kind"] == "size"] == sizes, "they are found once"
    rivals.main([*flags, *chosen, "--latency", "--rounds", "3"])
    timed = [line for line in rivals.read(results) if line["kind"] == "time"]
    assert len(timed) == len(chosen) and len({line["dense_ms"] for line in timed}) == 1, "in one process"
    text = results.with_suffix(".md").read_text()
    assert "| **both**" in text and "points over `blockpruner`" in text and "(bar: -1)" in text


def test_blocks_are_measured_by_what_they_do(rivals: Any) -> None:
    import rivals_erase
    import rivals_tasks

    small = rivals.TASKS["resnet20"]
    task = replace(small, build=lambda scale, _: rivals_tasks.ResNet(20, scale))
    oto = rivals_erase.analyzed(task, 0, "erase")
    oto.model.eval()
    with torch.no_grad():
        for name in ("layer2.2.bn2", "layer1.1.bn2"):
            bn = oto.model.get_submodule(name)
            bn.weight.mul_(1e-4 if name == "layer2.2.bn2" else 1e-2)
    assert rivals_erase.by_influence(task, oto, task.data())[:2] == ["layer2.2.bn2", "layer1.1.bn2"]
    before = {name: p.clone() for name, p in oto.model.named_parameters()}
    order = rivals_erase.by_loss(task, oto, task.data())
    assert all(torch.equal(p, before[n]) for n, p in oto.model.named_parameters())
    kept = {group.name for group in rivals_erase.free(oto)} - set(order)
    assert kept and not any(rivals_erase.valid(rivals_erase.free(oto), [*order, name]) for name in kept)


@pytest.mark.filterwarnings("ignore")
def test_a_search_resumes_and_looks_at_what_is_held_out(
    rivals: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [{"lmbda": 5.0, "pruning_periods": 2}, {"pruning_periods": 2}]
    monkeypatch.setitem(rivals.GRIDS, "dhspg", options)
    data, seen, real = rivals.TASKS["resnet20"].data(), [], rivals.accuracy
    monkeypatch.setattr(rivals, "accuracy", lambda model, split: seen.append(split) or real(model, split))
    flags = ["--search", "--tasks", "resnet20", "--targets", ".5", "--seeds", "0", "--methods", "dhspg"]
    results = tmp_path / "search.jsonl"
    for _ in range(2):
        rivals.main([*flags, f"--results={results}"])
    lines = rivals.read(results)
    assert [line["options"] for line in lines] == options
    assert seen == [data.holdout] * 2 and all("accuracy" not in line for line in lines)
    assert capsys.readouterr().out.count("minutes of a core") == 2
    assert rivals.parsed(flags).results == rivals.SEARCHED
    with pytest.raises(SystemExit):
        rivals.parsed(["--search", "--methods", "oto"])


def test_a_search_takes_what_went_by_half_space_if_it_costs_little(rivals: Any) -> None:
    def line(options: str, holdout: float, gone: int) -> Any:
        ways = {"by half-space": gone, "by choice": 10 - gone}
        name = f"hspg[{options}]"
        return {"task": "resnet20", "target": 0.6, "method": name, "accuracy_holdout": holdout, "ways": ways}

    lines = [line("a", 90.0, 2), line("b", 89.6, 6), line("c", 85.0, 9), line("b", 89.8, 8)]
    rows = rivals.searched(lines)[2:]
    assert rows == [
        "| resnet20 | 0.6 | hspg[a] | 1 | 90.00 | 20% |",
        "| resnet20 | 0.6 | **hspg[b]** | 2 | 89.70 | 70% |",
        "| resnet20 | 0.6 | hspg[c] | 1 | 85.00 | 90% |",
    ]


def test_moments_of_what_stays_are_kept(rivals: Any) -> None:
    """What torch-pruning leaves of a parameter and of its momentum are the same entries."""
    from rivals_methods import Rival

    task = rivals.TASKS["resnet20"]
    model = task.network()
    optimizer = task.optimizer(model)
    for p in model.parameters():
        p.data = torch.randn_like(p)  # no two entries alike
        optimizer.state[p] = {"momentum_buffer": 2 * p.detach()}
    settings = {"inner": False, "batches": 1}
    after = Rival(task, model, task.data(), "l1", "global", settings, 0).prune(0.5, optimizer)
    assert rivals.macs(model, task.example()) <= 0.5 * rivals.macs(task.network(), task.example())
    for p in model.parameters():
        assert torch.equal(after.state[p]["momentum_buffer"], 2 * p)


def test_the_layer_that_pads_is_the_same_function(rivals: Any) -> None:
    from rivals_methods import select_

    model = rivals.TASKS["resnet20"].network().eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    select_(model)
    assert torch.equal(model(x), expected)


def test_the_verdict(rivals: Any) -> None:
    def lines(method: str, *values: float) -> list[dict[str, Any]]:
        return [{"method": method, "accuracy": value} for value in values]

    rival = lines("tp", 87.0, 88.0) + lines("dense-small", 80.0, 80.0)
    assert "ahead by more" in rivals.verdict(lines("oto", 89.0, 90.0) + rival)
    assert "within" in rivals.verdict(lines("oto", 87.5, 88.1) + rival)
    assert "behind" in rivals.verdict(lines("oto", 85.0, 86.0) + rival)
    assert "+2.00 points over `tp`" in rivals.verdict(lines("oto", 89.0, 90.0) + rival)
    assert "not measured" in rivals.verdict(rival)
    assert "not measured" in rivals.verdict(lines("oto", 1.0) + lines("random", 2.0))
    assert sys.modules["rivals"].OURS[0] == "oto"


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = torch.nn.Conv2d(3, 32, 3), torch.nn.GroupNorm(1, 32)
        self.second, self.head = torch.nn.Conv2d(32, 32, 3), torch.nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))


@pytest.fixture
def latency(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script with a small network in the place of all others, compiled by nothing that takes time."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import latency

    small = latency.Subject("Small", Small, lambda batch: torch.randn(batch, 3, 12, 12), convolutional=True)
    models = {"small": small, "large": replace(small, title="Large", large=True)}
    monkeypatch.setattr(latency, "MODELS", models)
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, **how: compiler(f, backend="eager", **how))
    return latency


def test_latency_of_every_mode(latency: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    results = tmp_path / "latency.jsonl"
    flags = ["--seconds=0", f"--results={results}", f"--lock={tmp_path / 'lock'}", "--batch=2"]
    latency.main([*flags, "--models", "small", "--targets", ".5"])
    latency.main([*flags, "--models", "small", "--targets", ".75", "--modes", "eager"])
    latency.main([*flags, "--models", "large", "norms", "--targets", ".5", "--modes", "eager"])
    lines = latency.read(results)
    cells = [(line["model"], line["target"], line["mode"]) for line in lines]
    assert len(cells) == len(set(cells)) == 3 + 1 + 1 + 2
    assert [line["error"] for line in lines if "error" in line] == []
    full = sum(p.numel() for p in Small().parameters())
    for line in (line for line in lines if line["model"] not in latency.NORMS):
        assert line["target"] - 0.2 < line["macs_kept"] <= line["target"], line
        assert line["emitter"] == "module" and bool(line["compared"]) == (line["model"] == "small")
        assert line["full_params"] == full and line["full_bytes"] == 4 * full
        assert line["bytes"] == 4 * line["params"] < line["full_bytes"]
        low, high = line["quartiles_ms"]
        assert 0 < low <= line["ms"] <= high and line["rounds"] >= latency.ROUNDS
        assert line["speed_up"] == line["full_ms"] / line["ms"]
    pruned = [(line["width"], line["full_width"]) for line in lines if line["model"] == "LayerNorm"]
    assert pruned == [(384, 768)]
    assert all(line["of_stock"] == line["ms"] / line["stock_ms"] for line in lines if line["model"] in latency.NORMS)

    before, text = results.read_text(), results.with_suffix(".md").read_text()
    assert "| Small | 0.00 G | 1 |" in text and "Slim models that were not compared with the full one: Large." in text
    assert "| LayerNorm | 384 of 768 |" in text
    capsys.readouterr()
    latency.main([*flags, "--models", "small", "large", "norms", "--targets", ".5", "--modes", "eager"])
    assert results.read_text() == before
    assert capsys.readouterr().out == f"wrote {results.with_suffix('.md')}\n", "nothing is measured again"


def test_a_mode_that_fails_is_written_down(latency: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*given: Any) -> Any:
        raise RuntimeError("no compiler | here\nat all")

    results = tmp_path / "latency.jsonl"
    flags = ["--seconds=0", f"--results={results}", f"--lock={tmp_path / 'lock'}", "--models", "small", "norms"]
    flags += ["--targets", ".5", "--modes", "eager", "compiled"]
    with monkeypatch.context() as patch:
        patch.setitem(latency.PREPARE, "compiled", fails)
        latency.main(flags)
    lines = latency.read(results)
    errors = {(line["model"], line["mode"]): line["error"] for line in lines if "error" in line}
    assert set(errors) == {(model, "compiled") for model in ("small", "LayerNorm", "RMSNorm")} and len(lines) == 6
    assert errors["small", "compiled"] == "full model: RuntimeError: no compiler / here"
    assert errors["small", "compiled"] in results.with_suffix(".md").read_text()

    latency.main(flags)
    assert latency.read(results) == lines, "only on request"
    monkeypatch.setitem(latency.PREPARE, "compiled", latency.eager)  # compilers have a test of their own, above
    latency.main([*flags, "--again"])
    assert len(latency.read(results)) == 9
    assert "no compiler" not in results.with_suffix(".md").read_text(), "the last line of a cell counts"


def test_a_model_that_another_process_has_in_hand_is_left_to_it(latency: Any, tmp_path: Path) -> None:
    results = tmp_path / "latency.jsonl"
    flags = ["--seconds=0", f"--results={results}", f"--lock={tmp_path / 'lock'}", "--models", "small"]
    args = latency.parsed([*flags, "--modes", "eager"])
    with latency.claimed(args, "small") as mine, latency.claimed(args, "small") as again:
        assert mine and not again
        latency.main([*flags, "--modes", "eager"])
    assert not results.exists() and latency.left(args, "small") == [(t, "eager") for t in latency.TARGETS]
    assert latency.parsed([*flags, "--device", "cuda"]).modes == ["eager", "compiled"]


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script with a small network, and clients that take no time: one of each kind."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import clients

    def takes(subject: Any, folder: Path, args: Any) -> Any:
        return clients.Taken(lambda: subject.run(subject.model), clients.held(subject.model))

    def fails(subject: Any, folder: Path, args: Any) -> Any:
        raise ValueError("heads | width\nmore")

    small = clients.Architecture(Small, lambda: {"x": torch.randn(2, 3, 12, 12)}, layout=None)
    monkeypatch.setattr(clients, "ARCHITECTURES", {"small": small})
    made = {
        "takes": clients.Client(takes, ["torch"], ["small"]),
        "fails": clients.Client(fails, ["torch"], ["small"]),
        "absent": clients.Client(takes, ["no_such_package"], ["small"]),
    }
    monkeypatch.setattr(clients, "CLIENTS", made)
    return clients


@pytest.mark.filterwarnings("ignore")  # nothing is trained
def test_what_clients_make_of_a_model(clients: Any) -> None:
    args = clients.parsed([])
    common = {"versions": {"torch": "2"}, "machine": "here"}
    lines = [line | common for name in clients.CLIENTS for line in clients.measure(name, "small", args)]
    full, slim, *others = lines
    assert (full["model"], slim["model"]) == ("full", "slim") and full["differs"] == slim["differs"] == 0
    assert slim["params"] <= 0.6 * full["params"] and slim["bytes"] == 4 * slim["params"] and slim["ms"] > 0
    assert {line["refused"] for line in others[:2]} == {"ValueError: heads | width"}
    assert {line["skipped"] for line in others[2:]} == {"no_such_package cannot be imported: ModuleNotFoundError"}
    page = clients.table(lines)
    assert "| takes | small | full |" in page and "**no**: ValueError: heads / width" in page
    assert "| absent | small | full | – | not measured: no_such_package" in page


@pytest.mark.filterwarnings("ignore")
def test_only_what_was_skipped_is_measured_again(clients: Any, tmp_path: Path) -> None:
    results = tmp_path / "clients.jsonl"
    args = clients.parsed([f"--results={results}"])
    pairs = [(name, "small") for name in clients.CLIENTS]
    assert clients.left(args) == pairs
    for name, architecture in pairs:
        for line in clients.measure(name, architecture, args):
            clients.append(results, line)
    assert clients.left(args) == [("absent", "small")]
    assert clients.left(clients.parsed([f"--results={results}", "--again"])) == pairs


def test_a_form_that_this_version_does_not_know_is_skipped(clients: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(clients.FORMS, "new", ({}, {"no_such_option": 8}))
    with pytest.raises(clients.Skipped, match="no_such_option"):
        clients.slim("small", "new")


def test_one_shot_writes_a_line_for_each_cell_and_a_table(
    rivals: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import one_shot
    import one_shot_tasks
    import rivals_tasks

    small = replace(rivals.TASKS["resnet20"], build=lambda scale, pretrained: rivals_tasks.ResNet(8, scale))
    monkeypatch.setitem(one_shot_tasks.TASKS, "resnet20", small)
    monkeypatch.setattr(one_shot, "RESULTS", tmp_path / "one_shot.jsonl")
    flags = ["--images", "16", "--batch", "4", "--targets", ".8", "--seeds", "0", "--methods", "flap", "oto, obs"]
    one_shot.main(flags)
    lines = one_shot.read()
    assert [line["method"] for line in lines] == ["dense", "flap", "oto, obs"]
    assert all(0.7 < line["macs_kept"] <= 0.8 and 0 <= line["test"] <= 100 for line in lines[1:])
    one_shot.main(flags)
    assert one_shot.read() == lines, "what is there is not run again"
    text = (tmp_path / "one_shot.md").read_text()
    assert f"| flap | {one_shot.shown(lines[1]['test'])} |" in text and "| method | 80% |" in text


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft
def test_adapters_at_equal_budget(monkeypatch: pytest.MonkeyPatch, oto_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import adapters
    import rivals

    monkeypatch.setattr(rivals, "ROOT", tmp_path)
    monkeypatch.setattr(adapters, "CONTEXT", 16)
    monkeypatch.setattr(adapters, "BATCH", 2)
    results = tmp_path / "adapters.jsonl"
    flags = ["--steps", "12", "--base-steps", "4", "--seeds", "0", "--targets", ".5", f"--results={results}"]
    for _ in range(2):  # the second finds all that there is
        adapters.main(flags)
    lines = {line["method"]: line for line in rivals.read(results)}
    assert list(lines) == ["none", "lhspg", "taylor"] and len(results.read_text().splitlines()) == 3
    assert len({line["before"] for line in lines.values()}) == 1
    assert lines["none"]["params_kept"] == 1 and lines["none"]["pruned"] == pytest.approx(lines["none"]["before"])
    for method in ("lhspg", "taylor"):
        assert 0.4 < lines[method]["params_kept"] <= 0.5
        assert 1 < lines[method]["recovered"] < 200  # 65 letters
    assert "| taylor, 12 steps after 4 | 0.5 | 1 | 0.5" in results.with_suffix(".md").read_text()


def test_the_search_of_a_class_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import class_search

    from oto.trace import record
    from oto.trace.graph import GraphBuilder

    for place, name in ((record, "run"), (GraphBuilder, "_add")):  # put back what the script wraps
        monkeypatch.setattr(place, name, getattr(place, name))
    found = class_search.measure("full/resnet18")
    assert found["runs"] > 1 and found["calls"] == found["runs"] * found["nodes"] and found["class"] == found["share"]


@pytest.fixture
def read_by_a_linear_layer() -> tuple[Any, ...]:
    """A linear layer that reads six hidden units: its reader, their moments over 50 rows, itself, the units, rows."""
    pytest.importorskip("torchvision")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import torch
    from torch import nn

    from oto import OTO
    from oto.groups.readers import readers
    from oto.optim.compensate import Moments

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.randn(50, 4, dtype=torch.float64)
    of = OTO(model, x[:1])
    (reader,) = readers(of.partition, of.node_groups).found
    rows = torch.relu(model[0](x)).detach()
    return reader, Moments.of(rows[None]), model[2].weight.detach(), torch.arange(6)[:, None], rows


def test_rivals_without_training_score_as_their_papers_say(read_by_a_linear_layer: tuple[Any, ...]) -> None:
    import numpy as np
    import one_shot_methods

    from oto.oneshot import SCORES, obs

    reader, moments, weight, units, rows = read_by_a_linear_layer
    w, x = weight.numpy(), rows.numpy()
    wanda = [sum(abs(w[i, j]) * np.linalg.norm(x[:, j]) for i in range(3)) for j in range(6)]
    found = one_shot_methods.wanda_score(reader, moments, weight, units, 0.0)
    np.testing.assert_allclose(found, wanda)
    flap = np.array([np.var(x[:, j], ddof=1) * np.linalg.norm(w[:, j]) ** 2 for j in range(6)])
    found = one_shot_methods.flap_score(reader, moments, weight, units, 0.0)
    np.testing.assert_allclose(found, (flap - flap.mean()) / flap.std())
    h = x.T @ x / len(x)
    inverse = np.linalg.inv(h + 0.01 * np.diag(h).mean() * np.eye(6))
    found = SCORES[obs](reader, moments, weight, units, 0.01)
    np.testing.assert_allclose(found, [np.sum(w[:, j] ** 2) / inverse[j, j] for j in range(6)])


def test_the_score_of_llm_pruner_is_of_the_loss_of_all_data() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import one_shot_methods
    import torch
    from torch import nn

    from oto.optim.saliency import CRITERIA, Entries

    assert {"taylor"} == one_shot_methods.AT_ONCE
    torch.manual_seed(0)
    layer = nn.Linear(4, 6)
    layer(torch.randn(9, 4)).square().mean().backward()
    entries = Entries([layer.weight.data, layer.bias.data], [layer.weight.grad, layer.bias.grad])
    by_hand = ((layer.weight * layer.weight.grad).sum(1) + layer.bias * layer.bias.grad).abs()
    found = CRITERIA[str(one_shot_methods.METHODS["taylor"]["saliency"])](entries)
    torch.testing.assert_close(found, by_hand.detach())


SMALL = {"layers": 4, "hidden": 64, "ffn": 96, "heads": 4, "kv-heads": 2, "vocab": 128, "processes": 8}


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import fsdp2_plan

    return fsdp2_plan


def test_a_plan_in_bytes(plans: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 1000 entries in bfloat16 on 4 processes, 800 of them prunable in 10 groups."""
    plan = plans.Plan(1000, 800, 10, 4, 2)
    assert (plan.shard(), plan.state(), plan.step()) == (2 * 2 * 250, 12 * 250, 3 * 2 * 1000 * 3 / 4)
    assert plan.own("hesso") == 13 * 10 and plan.own("hspg", 2) == 18 * 10 + 2 * 200
    assert plan.sent(4) == 4 * 40 * 2 * 3 / 4
    calls = {"averaged": {"c10d::allreduce_": [40]}, "choice": {"c10d::allreduce_": [40] * 4}, "pruning": {}}
    row = {"method": "hesso", "plan": vars(plan), "shard": 500, "held": 50, "criteria": 1, "copied": 0, "calls": calls}
    plans.require(row, plan)
    with pytest.raises(AssertionError):
        plans.require(row, replace(plan, atoms=11))
    for key, wrong in (("shard", 501), ("held", 90), ("copied", 401)):
        with pytest.raises(AssertionError):
            plans.require(row | {key: wrong}, plan)
    for more in ([40] * 5, [44]):
        with pytest.raises(AssertionError):
            plans.require(row | {"calls": calls | {"choice": {"c10d::allreduce_": more}}}, plan)
    with pytest.raises(AssertionError):
        plans.require(row | {"calls": calls | {"pruning": {"c10d::allgather_": [1]}}}, plan)
    pytest.importorskip("transformers")
    plans.main([])
    said = capsys.readouterr().out
    assert (
        "70,553,706,496 parameters, 2,313,536 groups, 64 processes" in said and "| hspg | 4.41 | 13.23 | 2.58 |" in said
    )


@pytest.mark.zoo
@pytest.mark.parametrize("method", ["hesso", "hspg", "dhspg"])
def test_the_plan_describes_a_simulation(method: str, tmp_path: Path) -> None:
    """In a process of its own: it is one of many in a process group that sends nothing."""
    command = [sys.executable, str(ROOT / "benchmarks/fsdp2_plan.py"), "--simulate", method]
    command += [f"--{name}={number}" for name, number in SMALL.items()]
    results = tmp_path / "plan.jsonl"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, f"--results={results}"], capture_output=True, text=True, env=env)
    assert not done.returncode, done.stderr
    row = json.loads(results.read_text())
    assert row["plan"]["processes"] == 8 and row["plan"]["atoms"] > 100
    sums = {phase: sum(map(len, calls.values())) for phase, calls in row["calls"].items()}
    steps = {  # beside a choice that finds nothing missing, and steps without sums
        "hesso": {"averaged": 1, "choice+pruning": 4},
        "hspg": {"pruning": 1, "averaged+pruning": 3, "choice": 4},
        "dhspg": {"averaged": 1, "choice+pruning": 7, "pruning": 3},
    }
    assert {phase: number for phase, number in sums.items() if number} == steps[method]
