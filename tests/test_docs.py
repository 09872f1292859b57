"""The pages of the site: their code runs, their messages are real, and what they name is there."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import sys
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
    for library in ("sklearn", "transformers", "peft", "torchao"):
        if re.search(rf"^(import|from) {library}\b", "".join(blocks), re.MULTILINE):
            pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning):  # of other libraries, about each other
            warnings.simplefilter("ignore", kind)
        for block in blocks:
            exec(compile(block, str(page), "exec"), names)
    if page.stem == "start":
        assert int(re.search(r"(\d+) of 397 images", out.getvalue())[1]) > 300
        assert (tmp_path / "out" / "digits" / "report.html").is_file()


def generator():
    sys.path.insert(0, str(DOCS))
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(DOCS))
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


def test_the_page_of_a_lesson_has_all_of_its_code_and_what_it_printed() -> None:
    made = generator()
    index = made.tutorials_page()
    for script in made.record.LESSONS:
        page = made.tutorial_page(script)
        code = "\n".join(re.findall(r"```\{code-block\} python\n(.*?)\n```", page, re.DOTALL))
        for line in script.read_text().split('"""', 2)[2].splitlines():
            assert line in code or re.match("# -{20}", line), line
        head, text = made.recording(script)
        assert re.fullmatch(
            rf"\$ (python|torchrun .*) tutorials/{script.name}  # \d{{4}}-\d\d-\d\d, .*, Python [\d.]+, torch \S+,"
            r" [\d.]+ minutes of CPU time, script [0-9a-f]{12}",
            head,
        )
        assert text in page and page.startswith(f"# Lesson {int(script.name[:2])}: ") and len(made.title(script)) < 70
        assert ("has been changed" in page) == (made.record.digest(script) not in head)
        tables = made.tables(text)
        assert tables and all(table.strip() in index for table in tables)
        assert "/site-packages" not in re.sub("…/site-packages", "", text) and str(DOCS.parent) not in text


def test_pages_name_options_that_there_are() -> None:
    """An option in a page that no function takes would be a promise."""
    from oto import OTO, load_subnet
    from oto.distill import Distillation, soft_targets
    from oto.family import Family
    from oto.integrations import early_stopping, mix, progress_dict
    from oto.optim.options import keywords_of
    from oto.recovery import Mixture, replay, rewarmed

    known = set()
    makers = OTO, OTO.hesso, OTO.hesso_cric, OTO.hspg, OTO.dhspg, OTO.h2spg, OTO.lhspg, OTO.preview, OTO.one_shot
    makers += OTO.construct_subnet, OTO.visualize, OTO.shrink
    makers += OTO.family, Family.step, Family.backward, Family.cut, Family.construct, load_subnet
    makers += Distillation, Distillation.of, Distillation.forward, soft_targets, Mixture, replay, rewarmed
    for f in (*makers, progress_dict, early_stopping, mix):
        known |= keywords_of(f)
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
