"""What every test starts from: the same seed, one thread, and real data if there is some."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch.utils.flop_counter import FlopCounterMode

from oto import clock
from tests.zoo import part

# the same examples on every run and machine: a failure is there for everybody, until HYPOTHESIS_PROFILE=default looks
# for new ones
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--zoo-part", metavar="K/N", help="of the zoo's models only this part, and new ones (zoo/part.py)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked ``zoo`` that lie in another part are left out."""
    asked = config.getoption("--zoo-part")
    if asked is None:
        return
    k, of = part.parse(asked)
    seen = part.seen_before()

    def taken(item: Any) -> bool:
        if not item.get_closest_marker("zoo"):
            return True
        if item.originalname != "test_half_of_all_groups_removed":
            return part.takes(k, of, item.nodeid.partition("-")[0])  # what shares a fixture stays together
        model = item.callspec.id
        return part.home(model, of) == k or (seen is not None and model.partition("-")[2] not in seen)

    config.hook.pytest_deselected(items=[item for item in items if not taken(item)])
    items[:] = filter(taken, items)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What a partial run covered."""
    asked = config.getoption("--zoo-part")
    if asked is not None:
        reports = [r for some in ("passed", "failed") for r in terminalreporter.stats.get(some, [])]
        models = sum("test_half_of_all_groups_removed" in r.nodeid for r in reports)
        k, of = part.parse(asked)
        terminalreporter.write_line(
            f"zoo: part {k} of {of}, with new models: {models} models; `make zoo` runs them all"
        )


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """One thread: the order of floating-point sums does not depend on the machine, nor do workers fight for cores."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _a_clock_of_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock takes a hundredth of a second, and nothing else takes any: no test depends on how busy
    the machine is."""
    readings = itertools.count()
    monkeypatch.setattr(clock, "now", lambda: next(readings) / 100)


@pytest.fixture
def clock_of_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A nanosecond for every floating-point operation of a product, and a microsecond for every look at the clock."""
    readings = itertools.count()
    with FlopCounterMode(display=False) as work:
        monkeypatch.setattr(clock, "now", lambda: 1e-9 * work.get_total_flops() + 1e-6 * next(readings))
        yield


@pytest.fixture(scope="session")
def oto_data() -> Path:
    """The folder of real data: `OTO_DATA`, else `../shared/data`. Tests that need it are skipped without it."""
    folder = Path(os.environ.get("OTO_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no data folder: set OTO_DATA")
    return folder


@pytest.fixture(autouse=True)
def _a_fresh_accelerator() -> Iterator[None]:
    """accelerate keeps one state per process, and refuses a second precision: no test inherits that of another."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(True)
