"""Two processes under ``DistributedDataParallel``, each with its own batches, prune alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn

from oto import OTO
from tests.optim.toy import net

RANKS = 2
SCHEDULE = {"start_pruning_step": 3, "pruning_steps": 6, "pruning_periods": 3, "average_steps": 4, "lr": 0.05}


def work(rank: int, folder: str) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
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
    dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo")
@pytest.mark.filterwarnings("ignore::oto.errors.CollapseWarning")
def test_two_ranks_choose_the_same_groups_and_have_the_same_weights(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path),), RANKS)
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    assert all(a != b for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    assert ours["pruned"] and ours["pruned"].keys() == theirs["pruned"].keys()
    for name, atoms in ours["pruned"].items():
        assert torch.equal(atoms, theirs["pruned"][name])
    for name, weight in ours["weights"].items():
        assert torch.equal(weight, theirs["weights"][name]), name
