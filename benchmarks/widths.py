"""Which widths are fast: the speed-up of slim models against what their MACs promise, for widths of several grains.

    OMP_NUM_THREADS=1 python benchmarks/widths.py                     # about ten minutes on one core
    python benchmarks/widths.py --models resnet50 --batch 1 --threads 2

Every slim model of a network has the same MACs, those of halving every node group. `uniform` is that; `1`, `4`, ... are
random choices with `group_divisible` of that. Each is timed beside the full model, turn by turn, so that both suffer
the same noise: the speed-up is the median ratio. A figure of 1 says that time falls as MACs do.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Sequence

import numpy as np
import torch
import torchvision
from tqdm import tqdm

from oto import OTO
from oto.groups.cost import Costs
from oto.optim.select import least_kept, select
from oto.slim.latency import built, rounds

MODELS = ["resnet50", "vit_b_32", "convnext_tiny", "mobilenet_v2"]
GRAINS = [1, 4, 8, 16, 32]


def choice(costs: Costs, grain: int, goal: float, seed: int) -> dict[str, np.ndarray]:
    """Random atoms to keep, so that the MACs come down to the goal."""
    sizes = costs.sizes
    scores = np.random.default_rng(seed).random(sizes.sum())
    least = np.array([least_kept(size, size // 10, grain) for size in sizes])
    gone = select(scores, np.ones(len(scores), bool), sizes, least, costs.macs, goal, grain)
    kept = np.split(~gone, np.cumsum(sizes)[:-1])
    return {name: np.flatnonzero(own) for name, own in zip(costs.names, kept, strict=True)}


def uniform(costs: Costs) -> dict[str, np.ndarray]:
    return {name: np.arange((size + 1) // 2) for name, size in zip(costs.names, costs.sizes, strict=True)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="names of torchvision")
    parser.add_argument("--grains", nargs="+", type=int, default=GRAINS, help="values of group_divisible")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=12, help="of timing for each slim model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, float32, eager, batch {args.batch}, CPU threads: {args.threads}")
    print("speed-up of the slim model / (full MACs / slim MACs)\n")
    print("".join([f"{'':16}{'MACs kept':>10}{'uniform':>9}", *(f"{grain:>7}" for grain in args.grains)]))
    for name in args.models:
        torch.manual_seed(args.seed)
        model = torchvision.models.get_model(name, weights=None).eval()
        x = torch.randn(args.batch, 3, 224, 224)
        oto = OTO(model, x)
        costs = oto.costs
        halves = uniform(costs)
        goal = costs.macs(np.array([len(atoms) for atoms in halves.values()]))
        cells = []
        choices = [halves, *(choice(costs, grain, goal, args.seed) for grain in args.grains)]
        for kept in tqdm(choices, desc=name, leave=False):
            macs = costs.macs(np.array([len(atoms) for atoms in kept.values()]))
            full, slim = rounds([model, built(model, oto.partition, kept, x)], x, seconds=args.seconds)
            faster = statistics.median(a / b for a, b in zip(full, slim, strict=True))
            cells.append(faster * macs / costs.macs(costs.sizes))
        share = goal / costs.macs(costs.sizes)
        print("".join([f"{name:16}{share:>10.3f}{cells[0]:>9.2f}", *(f"{cell:>7.2f}" for cell in cells[1:])]))
        del model, oto
        gc.collect()


if __name__ == "__main__":
    main()
