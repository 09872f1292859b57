"""Classes whose code neither reads nor states a size that may change: one try answers for all counts.

Example: most convolutional networks. Their code passes tensors from layer to layer, so it makes the same calls with the
same arguments whatever the widths are. If it makes them on the thinner tensors of one try, it makes them on those of
any other, and the shapes follow from the operators.
"""

from __future__ import annotations

import torch

from oto._torch import OpOverload
from oto.axes.terms import axes_of, resolve
from oto.slim.own_class.adaptation import Adaptation
from oto.slim.own_class.layers import DeclinedError
from oto.slim.own_class.trials import Kind, Trial, Trials
from oto.slim.own_class.workbench import Workbench

_DROPS = (torch.ops.aten.squeeze, torch.ops.aten.squeeze_)
"""Operators that treat a dimension differently once it has one entry."""


def passes(bench: Workbench, trials: Trials, adaptation: Adaptation) -> bool:
    """Whether the class, as it is, makes the right calls with any counts, as shown by one try.

    ``False`` says only that one try does not show it.
    """
    if not _is_sizeless(bench, trials):
        return False
    try:
        # layers of torch have a form of their own for some counts, which is no code of the user's
        swaps = [bench.layers.edits(trials.prune(adaptation, Trial(kind))).swaps for kind in _TRIES]
    except DeclinedError:
        return False
    return not any(swaps) and bench.divergence(adaptation, trials.prune(adaptation, Trial(Kind.ALL))) is None


_TRIES = (Kind.ALL, Kind.HALF, Kind.THINNEST)


def _is_sizeless(bench: Workbench, trials: Trials) -> bool:
    """Whether no code of the user's reads a size, and only layers of torch state one that may change."""
    if bench.graph.reads_sizes:
        return False
    free = {axis for axis, name in trials.names.items() if name in trials.free}
    for node in bench.graph.nodes:
        plain = isinstance(node.op, OpOverload) and node.op.namespace == "aten"
        if not plain or node.op.overloadpacket in _DROPS:  # type: ignore[attr-defined]
            return False
        rewrite = bench.partition.found.tape.rewrites.get(node.index)
        if rewrite is None or node.module in bench.layers.found:
            continue
        if not free.isdisjoint(axis for term in rewrite.terms for axis in axes_of(resolve(term))):
            return False
    return True
