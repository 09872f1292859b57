"""Two processes under ``DistributedDataParallel``, each with its own batches, prune alike and resume as they were."""

from __future__ import annotations

import faulthandler
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.multiprocessing import ProcessExitedException

from oto import OTO
from oto.errors import StaleWrapperError
from tests.optim.toy import net

RANKS = 2
SCHEDULE = {"start_pruning_step": 3, "pruning_steps": 6, "pruning_periods": 3, "average_steps": 4, "lr": 0.05}


pytestmark = pytest.mark.filterwarnings("default:a process was killed")
GLOO = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo")


def begin(rank: int, folder: str, ranks: int = RANKS) -> dist.Store:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    return store


def work(rank: int, folder: str) -> None:
    """One of the processes; a second to start them is all that is long about it, so they do both."""
    with open(f"{folder}/{rank}.txt", "w") as said:
        os.dup2(said.fileno(), sys.stderr.fileno())
    faulthandler.enable()
    store = begin(rank, folder)
    prune(rank, folder)
    resume(rank, folder)
    # No process goes while another is in a call of gloo, and none runs destructors of what the others have left.
    store.set(f"done{rank}", "")
    store.wait([f"done{other}" for other in range(RANKS)])
    os._exit(0)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes have put what they found."""
    return in_processes(work, tmp_path_factory)


def in_processes(
    work: Callable[[int, str], None], tmp_path_factory: pytest.TempPathFactory, ranks: int = RANKS
) -> Path:
    """The folder in which the processes have put what they found.

    On fresh machines gloo has aborted a process twice, and never when somebody looked for the reason; so a process
    that is killed by a signal gets another chance. An exception never does.
    """
    heard = ""
    for _ in range(3):
        folder = tmp_path_factory.mktemp("ranks")
        try:
            torch.multiprocessing.spawn(work, (str(folder),), ranks)
        except ProcessExitedException as gone:
            if gone.signal_name is None:
                raise
            heard += "".join(f"{file.name}: {file.read_text()}" for file in sorted(folder.glob("?.txt")))
        else:
            if heard:
                warnings.warn(f"a process was killed before this went well\n{heard}", stacklevel=2)
            return folder
    pytest.fail(f"a process was killed three times running\n{heard}")


def prune(rank: int, folder: str) -> None:
    model = net()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = OTO(ddp, torch.randn(1, 3, 8, 8)).hesso(target_macs=0.4, first_momentum=0.9, **SCHEDULE)
    source = torch.Generator().manual_seed(rank)  # no two ranks see the same images
    losses = []
    for _ in range(11):
        x, y = torch.randn(5, 3, 8, 8, generator=source), torch.randint(4, (5,), generator=source)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(ddp(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.save(
        {"losses": losses, "pruned": optimizer.pruned_groups, "weights": dict(model.named_parameters())},
        f"{folder}/{rank}.pt",
    )


@GLOO
@pytest.mark.filterwarnings("ignore::oto.errors.CollapseWarning")
def test_two_ranks_choose_the_same_groups_and_have_the_same_weights(done: Path) -> None:
    ours, theirs = (torch.load(done / f"{rank}.pt") for rank in range(RANKS))
    assert all(a != b for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    assert ours["pruned"] and ours["pruned"].keys() == theirs["pruned"].keys()
    for name, atoms in ours["pruned"].items():
        assert torch.equal(atoms, theirs["pruned"][name])
    for name, weight in ours["weights"].items():
        assert torch.equal(weight, theirs["weights"][name]), name


def batches(rank: int, first: int, last: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for n in range(first, last):
        source = torch.Generator().manual_seed(100 * rank + n)
        yield torch.randn(5, 3, 8, 8, generator=source), torch.randint(4, (5,), generator=source)


def train(wrapper: nn.Module, optimizer: Any, rank: int, first: int, last: int) -> None:
    for x, y in batches(rank, first, last):
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapper(x), y).backward()
        optimizer.step()


def resume(rank: int, folder: str) -> None:
    """Each optimizer has the state of half of the parameters only."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def made() -> tuple[nn.Module, nn.Module, Any]:
        model = net()
        base = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
        options = {key: value for key, value in SCHEDULE.items() if key != "lr"}
        oto = OTO(model, torch.randn(1, 3, 8, 8))
        return model, nn.parallel.DistributedDataParallel(model), oto.hesso(base=base, target_macs=0.4, **options)

    through, wrapper, optimizer = made()
    train(wrapper, optimizer, rank, 0, 5)
    with pytest.raises(RuntimeError, match="has not been consolidated"):
        optimizer.state_dict()
    optimizer.consolidate_state_dict(to=0)
    if rank == 0:
        torch.save((through.state_dict(), optimizer.state_dict()), f"{folder}/saved.pt")
    dist.barrier()
    train(wrapper, optimizer, rank, 5, 11)
    model, wrapper, again = made()
    weights, state = torch.load(f"{folder}/saved.pt")
    model.load_state_dict(weights)
    again.load_state_dict(state)
    assert again.clock == 5 and None not in state["state"].values()
    train(wrapper, again, rank, 5, 11)
    pairs = zip(through.parameters(), model.parameters(), strict=True)
    torch.save([a.equal(b) for a, b in pairs], f"{folder}/resumed{rank}.pt")


@GLOO
@pytest.mark.filterwarnings("ignore::oto.errors.CollapseWarning")
def test_an_optimizer_that_shards_its_state_resumes_on_the_same_trajectory(done: Path) -> None:
    for rank in range(RANKS):
        assert all(torch.load(done / f"resumed{rank}.pt"))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    begin(0, str(tmp_path), ranks=1)
    yield
    dist.destroy_process_group()


@GLOO
@pytest.mark.filterwarnings("ignore::oto.errors.CollapseWarning")
def test_a_wrapper_of_before_shrinking_does_not_train(alone: None) -> None:
    class Whole(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.model(x)
            return out

    model = net()
    oto = OTO(model, torch.randn(1, 3, 8, 8))
    optimizer = oto.hesso(target_macs=0.4, **SCHEDULE)
    wrapper, outer = (nn.parallel.DistributedDataParallel(m) for m in (model, Whole(model)))
    other = nn.parallel.DistributedDataParallel(net())
    train(wrapper, optimizer, 0, 0, 9)
    oto.shrink(optimizer)
    x = torch.randn(2, 3, 8, 8)
    for stale in (wrapper, outer):
        with pytest.raises(
            StaleWrapperError, match=r"made before oto\.shrink[^$]*drift apart\n[^$]*wrap the model again"
        ):
            train(stale, optimizer, 0, 9, 10)
        with torch.no_grad():
            assert stale(x).shape == (2, 4)
    train(nn.parallel.DistributedDataParallel(model), optimizer, 0, 9, 12)
    assert other(x).requires_grad and optimizer.clock == 12
