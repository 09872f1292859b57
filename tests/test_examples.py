"""The examples run as their users run them: a new process, real images, little time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *flags: str, cwd: Path = ROOT) -> str:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "error::UserWarning",
    }
    done = subprocess.run(
        [sys.executable, ROOT / script, *flags], capture_output=True, text=True, env=environment, timeout=1800, cwd=cwd
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def numbers(line: str) -> list[float]:
    return [float(word.replace(",", "")) for word in re.findall(r"-?\d[\d,]*\.?\d*(?:e[+-]?\d+)?", line)]


def test_the_example_trains_thins_saves_and_reloads(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    out = tmp_path / "artifact"
    printed = run("examples/resnet_cifar10.py", "--width=16", "--epochs=5", "--target-macs=0.5", f"--out={out}")
    rows = {line.split("  ")[0]: numbers(line) for line in printed.splitlines()}
    accuracy, params, macs = range(3)
    dense, full, slim = rows["dense"], rows["zeroed full"], rows["slim"]
    assert slim[accuracy] == full[accuracy] > 60  # ten classes: 10 % is chance
    assert dense[params] == full[params] > 1.5 * slim[params]
    assert dense[macs] == full[macs] >= slim[macs] / 0.5
    reloaded = next(line for line in printed.splitlines() if line.startswith("reloaded"))
    assert numbers(reloaded)[0] <= 1e-6
    assert (out / "model.safetensors").is_file() and (out / "oto.json").is_file()


def test_the_readme_prints_what_it_says(tmp_path: Path) -> None:
    """All but the last digits of the numbers, which depend on the processor."""
    pytest.importorskip("sklearn")
    readme = (ROOT / "README.md").read_text()
    code, printed = re.search(r"```python\n(.*?)```.*?```\n(.*?)```", readme, re.DOTALL).groups()
    script = tmp_path / "readme.py"
    script.write_text(code)
    got, said = run(str(script), cwd=tmp_path).splitlines(), printed.splitlines()
    assert [re.sub(r"[\d.,e+-]+", "#", line.strip()) for line in got] == [
        re.sub(r"[\d.,e+-]+", "#", line.strip()) for line in said
    ]
    assert numbers(got[1])[0] == numbers(said[1])[0], "parameters before"
    assert abs(numbers(got[1])[1] / numbers(said[1])[1] - 1) < 0.3, "parameters after"
    assert numbers(got[-1])[1] > 330


def test_the_data_folder_is_read(oto_data: Path) -> None:
    """Shapes, the first labels in the official order, and ten classes."""
    pytest.importorskip("PIL")
    code = (
        "import sys; sys.path.insert(0, 'examples'); import data\n"
        "for name in ('fashion_mnist', 'cifar10'):\n"
        "    d = data.load_images(name)\n"
        "    print(name, *d.train_x.shape, *d.test_x.shape, *d.train_y[:5].tolist(), d.classes, sep=' ')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OTO_DATA": str(oto_data)},
    )
    assert done.stdout.splitlines() == [
        "fashion_mnist 60000 1 28 28 10000 1 28 28 9 0 0 3 0 10",
        "cifar10 50000 3 32 32 10000 3 32 32 6 9 9 4 1 10",
    ], done.stderr


def test_texts_and_weights_of_the_data_folder(oto_data: Path, tmp_path: Path) -> None:
    """A member is found by the end of its name; what is not there is said, and what to do."""
    code = (
        "import sys; sys.path.insert(0, 'examples'); import data\n"
        "print(len(data.from_tar('text.tar.xz', 'sst2_dev.tsv').decode().splitlines()))\n"
        "print(len(data.weights('weights.tar', 'resnet20-12fca82f.th')['state_dict']['module.conv1.weight']))\n"
        "import os; os.environ['OTO_DATA'] = sys.argv[1]\n"
        "data.weights('weights.tar', 'resnet20-12fca82f.th')\n"
    )
    environment = {**os.environ, "OTO_DATA": str(oto_data)}
    words = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stdout.splitlines() == ["873", "16"] and done.returncode == 1
    assert done.stderr == "weights.tar is needed: put it into a folder and set OTO_DATA to that folder\n"
