"""Branches and loops over tensors (``torch.cond``, ``scan``): what they run is not analyzed, so all they read stays."""

from __future__ import annotations

import torch

from oto.axes.registry import fixed

higher_order = torch.ops.higher_order

fixed(higher_order.cond, why="a value decides which branch runs")
# looked up by name, as an older torch defines some of them only when they are first used
loops = [getattr(higher_order, name) for name in ("while_loop", "scan", "map_impl") if hasattr(higher_order, name)]
fixed(*loops, why="it goes through the body of a loop, which is kept as it is")
