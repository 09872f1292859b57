"""Dense and HESSO on the same budget: what accuracy does removing half of all groups cost?

    python benchmarks/fashion_mnist.py                     # 3 seeds; 23 minutes on 2 CPU cores shared with other work

Real images (all 60,000 of Fashion-MNIST to train on, all 10,000 to test on), the ResNet of `examples/resnet_cifar10.py`
with 8 layers and 16 channels in its first stage. Both trainings of a seed have the same initial weights, batches,
optimizer settings and number of steps. Every training has one thread to itself, so the numbers do not depend on how
many run at a time.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from resnet_cifar10 import arguments, correct, load, table, train_dense, train_sparse

RECIPE = [
    "--dataset=fashion_mnist",
    "--no-augment",
    "--depth=8",
    "--width=16",
    "--epochs=4",
    "--batch-size=64",
    "--lr=0.05",
    "--group-divisible=1",
    "--start=0.1",
    "--length=0.2",
    "--periods=10",
]


def train_one(kind: str, seed: int, share: float, flags: list[str]) -> tuple[float, int, int]:
    """Test accuracy in percent, parameters and MACs of one training."""
    args = arguments([*RECIPE, f"--target-group-sparsity={share}", f"--seed={seed}", *flags])
    torch.set_num_threads(args.threads)
    images = load(args)
    if kind == "dense":
        model, params, macs = train_dense(images, args), 0, 0
    else:
        subnet = train_sparse(images, args).construct_subnet()
        model, params, macs = subnet.model, subnet.cost_after.params, subnet.cost_after.macs
    return 100 * correct(model, images.test_x, images.test_y) / len(images.test_y), params, macs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--target-group-sparsity", type=float, default=0.5)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    args, flags = parser.parse_known_args()  # the rest goes to the example: --epochs, --device, ...

    start = time.perf_counter()
    os.environ["TQDM_DISABLE"] = "1"  # bars of several processes would write over each other
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        runs = {
            pool.submit(train_one, kind, seed, args.target_group_sparsity, flags): (kind, seed)
            for seed in args.seeds
            for kind in ("dense", "slim")
        }
        done = {}
        for run in as_completed(runs):
            kind, seed = runs[run]
            done[kind, seed] = run.result()
            minutes = (time.perf_counter() - start) / 60
            print(f"seed {seed}, {kind}: {done[kind, seed][0]:.2f} %, after {minutes:.1f} minutes", flush=True)

    rows = [["seed", "dense", "slim", "gap", "slim params", "slim MACs"]]
    gaps = []
    for seed in args.seeds:
        dense, (slim, params, macs) = done["dense", seed][0], done["slim", seed]
        gaps.append(dense - slim)
        rows.append([str(seed), f"{dense:.2f} %", f"{slim:.2f} %", f"{gaps[-1]:+.2f}", f"{params:,}", f"{macs:,}"])
    print("\n" + " ".join(RECIPE + flags))
    print(f"{args.target_group_sparsity:.0%} of all groups removed, torch {torch.__version__}, {platform.machine()}\n")
    print(table(rows))
    spread = f" ± {statistics.stdev(gaps):.2f}" if len(gaps) > 1 else ""
    minutes = (time.perf_counter() - start) / 60
    print(f"\nmean gap {statistics.mean(gaps):+.2f}{spread} points over {len(gaps)} seeds; {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
