"""Predict the milliseconds of a forward pass from the numbers of kept atoms, by timing each call at a few widths.

The recorded calls are run one after the other on random tensors, at a few widths of all node groups, and each call is
timed. Its time is then fitted as

    milliseconds  =  a  +  b · (multiply–adds)  +  c · (entries that it reads and writes)          a, b, c ≥ 0

Multiply–adds and entries are polynomials in the counts, so the total is a :class:`~oto.groups.cost.Polynomial`, and the
saving of each atom is computed without a loop over atoms. Effects that the fit leaves out (overhead of the model's
Python code, caches, kernels that are faster at some widths) are corrected by measuring slim models; see
:mod:`oto.slim.latency`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, zip_longest
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from oto import clock
from oto._torch import tree_leaves, tree_map_only
from oto.axes.call import Size
from oto.axes.terms import Axis, Term, count, resolve, size_of
from oto.groups.cost import Costs, Polynomial, polynomial
from oto.groups.partition import Partition
from oto.trace.graph import Node, Value

log = logging.getLogger(__name__)

SHARES = (1.0, 0.75, 0.5, 0.25, 0.125)
"""The measured widths, as shares of the atoms of every node group."""

PASSES = (2, 7)
"""Minimum and maximum number of passes at each width; the shortest time of each call is used."""

SECONDS = 1.0
"""Passes at a width are repeated until this much time has passed."""

SLOPE = 1e-3
"""At least this share of a call's time is assumed to decrease with its size, even if noise or overhead hides that.
Otherwise, equal times at all widths would give no reason to prefer one choice over another."""


def latency_table(partition: Partition, costs: Costs, device: torch.device, divisible: int = 1) -> Polynomial:
    """Milliseconds of a forward pass on ``device`` as a function of the counts of ``costs``.

    Args:
        divisible: Measure only widths that are multiples of this, like those of a later choice.
    """
    axes = [partition.axes[name] for name in costs.names]
    widths = [{axis: _width(axis.size, share, divisible) for axis in axes} for share in SHARES]
    with tqdm(widths, desc="timing operators", unit="width", leave=False, delay=2) as bar, torch.no_grad():
        timed = [Replay(partition, counts, device).milliseconds() for counts in bar]
    volumes: dict[int, list[Sequence[Term]]] = {}
    for step in partition.found.tape.steps:
        if step.volume is not None:
            volumes.setdefault(step.node, []).append(step.volume)

    def products() -> Iterator[tuple[float, Sequence[Term]]]:
        for node in partition.found.graph.nodes:
            macs = volumes.get(node.index, [])
            tensors = [partition.found.terms(value) for value in (*node.inputs(), *node.outputs) if value is not None]
            work, traffic = ([sum(_size(x, counts) for x in each) for counts in widths] for each in (macs, tensors))
            a, b, c = fitted([times[node.index] for times in timed], work, traffic)
            gate = [partition.gates[node.index]] if node.index in partition.gates else []
            falls = b * work[0] + c * traffic[0]
            if (more := SLOPE * timed[0][node.index] - falls) > 0 and traffic[0]:
                a, c = a - more, c + more / traffic[0]
            yield a, gate
            yield from ((b, [*terms, *gate]) for terms in macs if b)
            yield from ((c, [*terms, *gate]) for terms in tensors if c)

    return polynomial(products(), {axis: i for i, axis in enumerate(axes)}, partition.going)


def _width(size: int, share: float, divisible: int) -> int:
    return size if share == 1 else min(max(round(size * share / divisible), 1) * divisible, size)


def _size(terms: Sequence[Term], counts: Mapping[Axis, int]) -> int:
    return prod(count(resolve(term), counts) for term in terms)


def fitted(times: Sequence[float], work: Sequence[float], traffic: Sequence[float]) -> tuple[float, float, float]:
    """Least-squares fit of the times as ``a + b * work + c * traffic`` with ``a, b, c >= 0``.

    Example:
        >>> a, b, c = fitted([7.0, 3.5, 1.8], [20.0, 5.0, 0.0], [10.0, 5.0, 2.0])
        >>> round(a, 6), round(b, 6), round(c, 6)
        (1.0, 0.1, 0.4)
    """
    columns = np.array([np.ones(len(times)), work, traffic]).T
    scale = np.maximum(columns.max(0), 1e-300)
    best, least = np.zeros(3), np.inf
    for n in range(1, 4):  # the best fit is the least-squares fit of those coefficients that are not zero
        for chosen in map(list, combinations(range(3), n)):
            solution, *_ = np.linalg.lstsq(columns[:, chosen] / scale[chosen], np.array(times), rcond=None)
            off = float(np.square(columns[:, chosen] / scale[chosen] @ solution - times).sum())
            if (solution >= 0).all() and off < least * (1 - 1e-9):
                best, least = np.zeros(3), off
                best[chosen] = solution / scale[chosen]
    a, b, c = best.tolist()
    return a, b, c


class Replay:
    """Runs the recorded calls on random tensors, at the widths given by ``counts``.

    Results are passed on to later calls, so that tensors have the same memory layout as in the model. If an operator
    fails, or returns another shape because the shape depends on values, its result is replaced by random numbers.
    """

    def __init__(self, partition: Partition, counts: Mapping[Axis, int], device: torch.device) -> None:
        self.propagation, self.counts, self.device = partition.found, counts, device
        graph = self.propagation.graph
        self.last = {value: node.index for node in graph.nodes for value in (*node.inputs(), *node.outputs) if value}
        self.tensors: dict[Value, Tensor] = {}

    def milliseconds(self) -> list[float]:
        """The shortest time of each call over several passes; 0 if it failed in one of them."""
        passes: list[list[float]] = []
        begin = clock.now()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            while len(passes) < PASSES[0] or (len(passes) < PASSES[1] and clock.now() - begin < SECONDS):
                passes.append([self._run(node) for node in self.propagation.graph.nodes])
                self.tensors.clear()
        quickest: list[float] = np.min(passes, axis=0).tolist()
        return quickest

    def _run(self, node: Node) -> float:
        op, args, kwargs = node.op, node.args, dict(node.kwargs)
        rewrite = self.propagation.tape.rewrites.get(node.index)
        if rewrite is not None and (rewrite.always or any(self._count(t) != size_of(t) for t in rewrite.terms)):
            op, args, kwargs = rewrite.op, rewrite.args, dict(rewrite.kwargs)
            args, kwargs = tree_map_only(Size, lambda size: self._count(size.term), (args, kwargs))
        args, kwargs = tree_map_only(Value, self._tensor, (args, kwargs))
        taken: float = 0.0
        results: list[Any] = []
        try:
            taken, results = timed(op, args, kwargs, self.device)
        except Exception as failure:  # an operator may raise anything on random numbers
            log.debug("%s cannot be timed: %s", node, failure)
        for value, result in zip_longest(node.outputs, results[: len(node.outputs)]):
            if value is not None and isinstance(result, Tensor) and tuple(result.shape) == self._shape(value):
                self.tensors[value] = result
        for value in (*node.inputs(), *node.outputs):
            if value is not None and self.last[value] <= node.index:
                self.tensors.pop(value, None)
        return taken

    def _count(self, term: Term) -> int:
        return count(resolve(term), self.counts)

    def _shape(self, value: Value) -> tuple[int, ...]:
        return tuple(map(self._count, self.propagation.terms(value)))

    def _tensor(self, value: Value) -> Tensor:
        if value not in self.tensors:
            shape, dtype = self._shape(value), value.dtype
            wide = dtype.is_floating_point or dtype.is_complex  # others may be indices; zero is always a valid index
            fill = torch.rand if wide else torch.zeros
            self.tensors[value] = fill(shape, dtype=dtype, device=self.device)
        return self.tensors[value]


def timed(op: Any, args: Any, kwargs: Any, device: torch.device) -> tuple[float, list[Any]]:
    """The milliseconds that a call takes, and the leaves of its result."""
    clock.synchronize(device)
    start = clock.now()
    result = op(*args, **kwargs)
    clock.synchronize(device)
    return 1e3 * (clock.now() - start), tree_leaves(result)
