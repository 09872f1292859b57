"""`benchmarks/rivals.py` on a network and on images that take no time: what it writes, and that it resumes."""

from __future__ import annotations

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
        rivals.TASKS["resnet20"], build=lambda scale, _: rivals_tasks.ResNet(8, scale), data=lambda: data, images=64,
        epochs=2, batch=8, pretrained=False,
    )  # fmt: skip
    monkeypatch.setitem(rivals.TASKS, "resnet20", small)
    return rivals


METHODS = ["dense", "dense-small", "oto", "random", "tp-taylor-global-portions", "tp-l2-local-oneshot"]


@pytest.mark.filterwarnings("ignore")  # those of torch-pruning are not ours
def test_a_cell_of_every_kind_is_run_once(rivals: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "rivals.jsonl"
    flags = ["--tasks", "resnet20", "--targets", ".5", "--seeds", "0", f"--results={results}"]
    flags += ["--options", 'random:{"pruning_periods": 2}', "--methods", *METHODS]
    rivals.main(flags)
    lines = rivals.read(results)
    by_method = {line["method"].partition("[")[0]: line for line in lines}
    assert list(by_method) == METHODS and len(lines) == len(METHODS)

    task = rivals.TASKS["resnet20"]
    dense = rivals.macs(task.network(), task.example())
    assert by_method["dense"]["macs"] == dense
    assert lines[3]["method"] == "random[pruning_periods=2]"
    for method in METHODS[1:]:
        assert 0.4 * dense < by_method[method]["macs"] <= 0.5 * dense, method
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
