"""Calls that are given functions to run: branches and loops over tensors. What runs inside is not looked into."""

from __future__ import annotations

import torch

from oto.axes.registry import fixed

higher_order = torch.ops.higher_order

fixed(higher_order.cond, why="a value decides which branch runs")
fixed(
    higher_order.while_loop, higher_order.scan, higher_order.map_impl,
    why="it goes through the body of a loop, which is kept as it is",
)  # fmt: skip
