"""What every test starts from: the same seed, one thread, and real data if there is some."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# the same examples on every run and machine: a failure is there for everybody, until HYPOTHESIS_PROFILE=default looks
# for new ones
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """One thread: the order of floating-point sums does not depend on the machine, nor do workers fight for cores."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def oto_data() -> Path:
    """The folder of real data: `OTO_DATA`, else `../shared/data`. Tests that need it are skipped without it."""
    folder = Path(os.environ.get("OTO_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no data folder: set OTO_DATA")
    return folder
