"""What is installed without the checkout: everything that is needed, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
USE = """
import importlib.resources, pathlib, sys
import torch
from torch import nn
import oto

place = pathlib.Path(oto.__file__).resolve()
assert place.is_relative_to(pathlib.Path(sys.prefix).resolve()), place
model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
analyzed = oto.OTO(model, torch.randn(2, 3))
analyzed.random_set_zero_groups(0.5)
subnet = analyzed.construct_subnet("slim", program=True, report=True)
assert oto.load_subnet("slim")(torch.randn(2, 3)).shape == (2, 2)
assert "made slim" in pathlib.Path("slim/report.html").read_text()
assert (importlib.resources.files("oto") / "py.typed").is_file()
print(oto.__version__)
"""


def run(*words: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=cwd, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return done.stdout


@pytest.mark.zoo
def test_wheel_and_sdist_run_in_a_fresh_environment(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    run(sys.executable, "-m", "hatchling", "build", "-d", tmp_path / "dist", cwd=ROOT)
    (wheel,), (sdist,) = (list((tmp_path / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))

    # In the wheel is what is in the folder, and nothing besides the metadata.
    with zipfile.ZipFile(wheel) as file:
        inside = {name for name in file.namelist() if ".dist-info/" not in name}
    folder = (p for p in (ROOT / "oto").rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    assert inside == {p.relative_to(ROOT).as_posix() for p in folder}
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    for needed in (
        "oto/report/report.html.j2",
        "oto/py.typed",
        "tests/conftest.py",
        "tutorials/README.md",
        "tutorials/common.py",
        "examples/data.py",
        "README.md",
        "LICENSE",
        "CITATION.cff",
    ):
        assert needed in packed, needed

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for number, built in enumerate((wheel, sdist)):
        place = tmp_path / f"env{number}"
        venv.create(place, with_pip=True)
        python = place / "bin" / "python"
        packages = Path(
            run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
        )
        # what oto needs comes from here; its own editable installation does not, for .pth files there are not read
        (packages / "here.pth").write_text(sysconfig.get_path("purelib"))
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", built, cwd=tmp_path)
        work = tmp_path / f"work{number}"
        work.mkdir()
        assert run(python, "-c", USE, cwd=work) == f"{version}\n"
        assert run(place / "bin" / "oto", "info", "slim", cwd=work).startswith("torch.nn.modules.container.Sequential")
        assert run(python, "-m", "oto", "--version", cwd=work).startswith(f"oto {version}, ")


def test_the_version_is_stated_alike_everywhere() -> None:
    import oto

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == oto.__version__
    assert f"version: {oto.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_citation_file_has_what_the_format_asks_for() -> None:
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["message"] and cited["title"] and cited["authors"]
    for paper in cited["references"]:
        assert paper["type"] in ("article", "conference-paper") and paper["title"] and paper["year"] >= 2021
        assert all(author["family-names"] and author["given-names"] for author in paper["authors"])
    for template in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(template.read_text()), template
