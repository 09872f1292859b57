"""A family on two processes, each with its half of every batch: what one process does with the whole batches."""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from oto.family import Family
from tests.families import STEPS, Plain, batch, family_of
from tests.optim.test_distributed import GLOO, RANKS, begin, in_processes

pytestmark = pytest.mark.filterwarnings("default:a process was killed", "ignore::oto.errors.CollapseWarning")
WIDE = torch.float64


def train_share(family: Family, ddp: nn.Module | None, rank: int, ranks: int) -> None:
    for step in range(STEPS):
        x, y = batch(step, (8, 6), WIDE)
        x, y = x.chunk(ranks)[rank], y.chunk(ranks)[rank]
        family.step(lambda net, x=x: net(x), lambda output, y=y: F.cross_entropy(output, y))


def work(rank: int, folder: str) -> None:
    """One of the processes; the second begins with other weights, and takes those of the first."""
    with open(f"{folder}/{rank}.txt", "w") as said:
        os.dup2(said.fileno(), sys.stderr.fileno())
    faulthandler.enable()
    store = begin(rank, folder)
    torch.manual_seed(rank)
    model = Plain().double()
    ddp = nn.parallel.DistributedDataParallel(model) if os.environ.get("WRAPPED") else None
    family = family_of(model, torch.ones(2, 6, dtype=WIDE))
    train_share(family, ddp, rank, RANKS)
    kept = [{name: atoms.tolist() for name, atoms in member.kept.items()} for member in family.members]
    torch.save({"weights": model.state_dict(), "kept": kept}, f"{folder}/{rank}.pt")
    store.set(f"done{rank}", "")
    store.wait([f"done{other}" for other in range(RANKS)])
    os._exit(0)


@GLOO
@pytest.mark.parametrize("wrapped", [True, pytest.param(False, marks=pytest.mark.zoo)])
def test_two_processes_do_what_one_does(
    wrapped: bool, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrapped:  # by somebody who is used to it: its reducer is not asked, and nothing is averaged twice
        monkeypatch.setenv("WRAPPED", "1")
    folder: Path = in_processes(work, tmp_path_factory)
    ours, theirs = (torch.load(folder / f"{rank}.pt") for rank in range(RANKS))
    assert ours["kept"] == theirs["kept"] and ours["kept"][1] != ours["kept"][0]
    torch.manual_seed(0)
    alone = family_of(Plain().double(), torch.ones(2, 6, dtype=WIDE))
    train_share(alone, None, 0, 1)
    for name, weight in alone.model.state_dict().items():
        assert torch.equal(ours["weights"][name], theirs["weights"][name]), name
        assert torch.allclose(ours["weights"][name], weight, rtol=1e-9, atol=1e-12), name
