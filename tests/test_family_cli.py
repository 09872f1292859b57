"""The command line knows members of a family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
from typer.testing import CliRunner

from oto.cli import app
from oto.family import Family
from tests.families import Net, family_of, train

MODEL = ("--model", "tests.families:Net", "--input", "2x3x8x8")

pytestmark = pytest.mark.filterwarnings("ignore::oto.errors.CollapseWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Family]:
    folder = tmp_path_factory.mktemp("cli") / "family"
    torch.manual_seed(0)
    family = family_of(Net(), torch.randn(2, 3, 8, 8))
    train(family)
    family.construct(folder)
    return folder, family


def test_info_lists_the_members(made: tuple[Path, Family]) -> None:
    folder, family = made
    said = CliRunner().invoke(app, ["info", str(folder)])
    assert said.exit_code == 0, said.output
    rows = [line.split() for line in said.output.splitlines()]
    for index, member in enumerate(family.members):
        assert [str(index), str(member.target), f"{member.cost.params:,}", f"{member.cost.macs:,}"] in [
            row[:4] for row in rows
        ]


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_a_member_is_verified_and_timed(made: tuple[Path, Family], command: str) -> None:
    folder, _ = made
    more = ("--seconds", "0") if command == "bench" else ()
    for member in ("0", "1", "0.5"):
        said = CliRunner().invoke(app, [command, str(folder), *MODEL, "--member", member, *more, "--json"])
        assert said.exit_code == 0, said.output
        assert json.loads(said.stdout.splitlines()[-1])
    said = CliRunner().invoke(app, [command, str(folder), *MODEL, "--member", "0.6", *more])
    assert said.exit_code == 1 and "no member 0.6" in said.output
