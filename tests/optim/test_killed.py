"""A run that is killed at random steps and resumed is the run that was not, to the last bit: every optimizer."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import torch

from tests.optim.test_series import ALL, END, START, make
from tests.optim.toy import assert_same, backward, count_zeros, net

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="a process that is killed is forked from this one"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
STEPS = END + 12  # the cycles of CRIC come before its periods
OPTIONS = {"momentum": {"first_momentum": 0.9}, "adamw": {"variant": "adamw", "lr": 0.01}, "closure": {}}


def run(folder: Path, name: str, base: str, killed_at: int | None = None) -> None:
    """Train from the newest checkpoint on, writing one after each step; die in the middle of step ``killed_at``."""
    model = net()
    optimizer = make(name, model, **OPTIONS[base])
    newest = folder / "newest.pt"
    first = 0
    if newest.exists():
        saved = torch.load(newest, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    for n in range(first, STEPS):
        if base == "closure":
            optimizer.step(lambda n=n: backward(model, n))
        else:
            backward(model, n)
            optimizer.step()
        if n == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        torch.save(
            {"step": n + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "next.pt"
        )
        os.replace(folder / "next.pt", newest)


@pytest.mark.parametrize("base", OPTIONS)
@pytest.mark.parametrize("name", ALL)
def test_killed_at_random_steps(tmp_path: Path, name: str, base: str) -> None:
    through = net()
    reference = make(name, through, **OPTIONS[base])
    for n in range(STEPS):
        backward(through, n)
        reference.step()
    assert count_zeros(through) == 7 and reference.progress.over
    source = random.Random(f"{name} {base}")
    deaths = sorted({source.randrange(START), *(source.randrange(STEPS - 1) for _ in range(5)), END - 2})
    for step in deaths:
        child = os.fork()
        if not child:
            try:
                run(tmp_path, name, base, step)
            finally:
                os._exit(1)  # it should not have come this far
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    run(tmp_path, name, base)
    saved = torch.load(tmp_path / "newest.pt", weights_only=True)
    resumed = net()
    resumed.load_state_dict(saved["model"])
    assert_same(resumed, through)
    theirs = reference.state_dict()["param_groups"][0]
    for key in ("oto_step", "oto_history", "oto_setup"):
        assert saved["optimizer"]["param_groups"][0][key] == theirs[key]
    assert saved["optimizer"]["param_groups"][0]["oto_atoms"].equal(theirs["oto_atoms"])
