"""The pages of the site: their code runs, their messages are real, and what they name is there."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import warnings
from pathlib import Path

import pytest

from oto import errors

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks marked ``python``, one after the other; those marked ``py`` are fragments of other people's programs."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    if not blocks:
        pytest.skip("no code")
    if "sklearn" in "".join(blocks):
        pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for block in blocks:
            exec(compile(block, str(page), "exec"), names)
    if page.stem == "start":
        assert int(re.search(r"(\d+) of 397 images", out.getvalue())[1]) > 300
        assert (tmp_path / "out" / "digits" / "report.html").is_file()


def generator():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_message_of_the_page_is_real(tmp_path: Path) -> None:
    """Each example raises what it says; each class is listed."""
    made = generator()
    page = made.errors_page(tmp_path / "work")
    classes = {n for n, k in vars(errors).items() if isinstance(k, type) and k.__module__ == errors.__name__}
    assert set(re.findall(r"^## (\w+)$", page, re.MULTILINE)) == classes - {"OTOError"}
    assert made.MESSAGES.keys() <= classes
    assert "no parameter is called, or matches, '0.wieght'" in page
    assert str(tmp_path) not in page
    with pytest.raises(AssertionError, match="no TargetError was raised"):
        made.said("TargetError", "OTO(mlp(), x)", tmp_path / "work")


def test_the_command_line_page_has_every_command() -> None:
    pytest.importorskip("typer")
    page = generator().cli_page()
    for command in ("explain", "preview", "visualize", "slim", "verify", "export", "bench", "info"):
        assert f"## oto {command}\n" in page
    assert "`--target-macs`" in page and "3: " in page and "{" not in page.partition("## oto")[0]


def test_pages_name_options_that_there_are() -> None:
    """An option in a page that no function takes would be a promise."""
    import inspect

    from oto import OTO
    from oto.integrations import progress_dict

    known = set()
    for f in (OTO, OTO.hesso, OTO.hesso_cric, OTO.preview, OTO.construct_subnet, OTO.visualize, progress_dict):
        known |= set(inspect.signature(f).parameters)
    ours = "coming_from"
    for page in PAGES:
        if page.stem == ours:
            continue  # names other people's options
        text = page.read_text()
        for name in re.findall(r"`(\w+)=", text):
            assert name in known, f"{page.name} names {name}="


@pytest.mark.zoo
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("furo")
    pytest.importorskip("myst_parser")
    sphinx = pytest.importorskip("sphinx.cmd.build")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert sphinx.build_main(["-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file() and (tmp_path / "_made" / "errors.html").is_file()
