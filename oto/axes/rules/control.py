"""Calls that are given functions to run: branches and loops over tensors. What runs inside is not looked into."""

from __future__ import annotations

import torch

from oto.axes.registry import fixed

higher_order = torch.ops.higher_order

fixed(higher_order.cond, why="a value decides which branch runs")
# by name: an older torch knows some of them only once something asked for them
loops = [getattr(higher_order, name) for name in ("while_loop", "scan", "map_impl") if hasattr(higher_order, name)]
fixed(*loops, why="it goes through the body of a loop, which is kept as it is")
