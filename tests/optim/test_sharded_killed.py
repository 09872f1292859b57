"""Two processes that share a model: one is killed (``kill -9``) at any step, both start anew: the same bits in the end.

A checkpoint is written at every step by ``torch.distributed.checkpoint``; what counts as one has its ``.metadata``,
which is written last. As ``torchrun`` does, the test ends the process that is left.
"""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.optim.test_distributed import GLOO, RANKS, begin
from tests.optim.test_sharded import MAKERS, SOON, analyzed, full, loaded, saved, shard, train

pytestmark = [
    GLOO,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes that are killed are forked from this one"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
STEPS = 11
SHORT = {"start_pruning_step": 2, "pruning_steps": 6, "pruning_periods": 2, "average_steps": 2}
OF = {
    "hesso": lambda oto: oto.hesso(variant="adamw", **{**SOON, **SHORT}),
    "hspg": lambda oto: oto.hspg(first_momentum=0.9, **{**SOON, **SHORT}, lmbda=0.5),
    "dhspg": lambda oto: oto.dhspg(variant="adamw", **{**SOON, **SHORT}),
    "lhspg": lambda oto: oto.lhspg(**{**SOON, **SHORT}),
}
Death = tuple[int, int, bool]
"""The step, the rank, and whether the other one is left to save alone."""

DEATHS: tuple[Death, ...] = ((1, 0, False), (4, 1, True), (9, 0, True))


def run(rank: int, folder: Path, name: str, death: Death | None) -> None:
    """Train from the newest whole checkpoint on, writing one after each step."""
    make, options, _ = MAKERS["lhspg" if name == "lhspg" else "hesso"]
    oto = copy.deepcopy(analyzed(make, **options))
    shard(oto.model)
    optimizer: Any = OF[name](oto)
    whole = [int(file.parent.name) for file in folder.glob("*/.metadata")]
    first = max(whole, default=0)
    if first:
        loaded(oto.model, optimizer, folder / f"{first}")
        assert optimizer.clock == first
    for n in range(first, STEPS):
        train(oto.model, optimizer, range(n, n + 1), rank)
        at = death is not None and death[:2] == (n, rank)
        if at and death is not None and death[2]:
            os.kill(os.getpid(), signal.SIGKILL)
        saved(oto.model, optimizer, folder / f"{n + 1}")
        if at:
            os.kill(os.getpid(), signal.SIGKILL)
    weights = full(oto.model)
    if rank == 0:
        torch.save((weights, optimizer.atoms, optimizer.history), folder / "end.pt")


def in_forks(folder: Path, name: str, death: Death | None = None) -> None:
    """Both processes, to the end or to the death of one."""
    store = folder / f"store {len(list(folder.glob('store *')))}"
    store.mkdir()
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if not child:
            status = 1
            try:
                held = begin(rank, str(store))
                run(rank, folder, name, death)
                held.set(f"done{rank}", "")
                held.wait([f"done{other}" for other in range(RANKS)])
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    if death is None:
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * RANKS
        return
    assert os.waitstatus_to_exitcode(os.waitpid(children[death[1]], 0)[1]) == -signal.SIGKILL
    for child in children:
        if child != children[death[1]]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def resumed(tmp_path: Path, name: str, deaths: tuple[Death, ...]) -> None:
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp

    analyzed(MAKERS["lhspg" if name == "lhspg" else "hesso"][0], **MAKERS["lhspg" if name == "lhspg" else "hesso"][1])
    (through := tmp_path / "through").mkdir()
    (killed := tmp_path / "killed").mkdir()
    in_forks(through, name)
    for death in deaths:
        in_forks(killed, name, death)
        assert max((int(f.parent.name) for f in killed.glob("*/.metadata")), default=0) == death[0] + (not death[2])
    in_forks(killed, name)
    weights, atoms, history = torch.load(through / "end.pt")
    again, same, told = torch.load(killed / "end.pt")
    assert torch.equal(atoms, same) and (atoms == 2).any() and history == told
    assert all(torch.equal(p, again[key]) for key, p in weights.items())


@pytest.mark.zoo
def test_killed_before_in_and_after_a_period(tmp_path: Path) -> None:
    resumed(tmp_path, "hesso", DEATHS)


@pytest.mark.zoo
@pytest.mark.parametrize("name", OF)
def test_killed_at_every_step(tmp_path: Path, name: str) -> None:
    resumed(tmp_path, name, tuple((n, n % RANKS, n % 3 == 0) for n in range(STEPS - 1)))
