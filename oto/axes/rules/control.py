"""Branches and loops over tensors (``torch.cond``, ``scan``): their bodies are not analyzed, and inputs stay whole."""

from __future__ import annotations

import torch

from oto.axes.registry import fixed

higher_order = torch.ops.higher_order

fixed(higher_order.cond, why="a value decides which branch runs")
# looked up by name, since older versions of torch define some of them only at first use
loops = [getattr(higher_order, name) for name in ("while_loop", "scan", "map_impl") if hasattr(higher_order, name)]
fixed(*loops, why="it goes through the body of a loop, which is kept as it is")
