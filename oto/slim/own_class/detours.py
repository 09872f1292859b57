"""Where the calls of the full and of the thinner model part and meet again: whether both ways give the same.

Some classes branch on sizes: where queries and values are equally wide a kernel repeats the keys itself, else the code
does; products of three matrices go in whichever order is cheaper. Neither is wrong. Both ways are run on the same
random numbers, the full model's with the sizes of the thinner one; equal results are no divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oto._torch import tree_map_only
from oto.axes.call import Rewrite
from oto.errors import out_of_memory
from oto.slim.pruned_shapes import Thinning
from oto.trace.graph import Node, Value

_TOLERANCE = 1e-9
"""Of float64, for sums of any length that a layer has; two ways that differ in more than rounding differ by 1e-3."""
_LARGE = 1 << 24
"""Entries of a tensor from which on a comparison costs too much; such a branch is a divergence."""


@dataclass(frozen=True)
class Detour:
    """Two ways from the same tensors to the same.

    Attributes:
        full, slim: The calls of the full and of the slim model.
        results: What they give that later calls read, of each.
        stands: For tensors of the full model, those of the slim one.
        itself: For tensors of the slim model that are another one laid out anew, that one.
    """

    full: Sequence[Node]
    slim: Sequence[Node]
    results: Sequence[tuple[Value, Value]]
    stands: Mapping[Value, Value]
    itself: Mapping[Value, Value]


def agree(detour: Detour, thin: Thinning, rewrites: Mapping[int, Rewrite]) -> bool:
    """Whether both ways give the same for random numbers, in float64; ``False`` where that cannot be run."""
    given: dict[Value, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def slim_value(value: Value) -> Tensor:
        value = detour.itself.get(value, value)
        if value not in given:
            given[value] = _random(value, generator)
        return given[value]

    def full_value(value: Value) -> Tensor:
        return slim_value(detour.stands[value])

    try:
        with torch.inference_mode():
            wanted = _run([thin.call(node, rewrites.get(node.index)) for node in detour.full], detour.full, full_value)
            found = _run([(n.op, n.args, dict(n.kwargs)) for n in detour.slim], detour.slim, slim_value)
            return all(_same(wanted(old), found(new)) for old, new in detour.results)
    except Exception as failure:  # what only the user's own code could run, or an input that no number stands for
        if out_of_memory(failure):
            raise
        return False


def _run(
    calls: Sequence[tuple[Any, Any, dict[str, Any]]], nodes: Sequence[Node], given: Callable[[Value], Tensor]
) -> Callable[[Value], Tensor]:
    """Make some calls; what each tensor is then."""
    made: dict[Value, Tensor] = {}

    def value(v: Value) -> Tensor:
        return made[v] if v in made else given(v)

    for (op, args, kwargs), node in zip(calls, nodes, strict=True):
        if node.written:
            raise NotImplementedError("a call that writes to what it is given")
        args, kwargs = tree_map_only(Value, value, (args, kwargs))
        kwargs = {k: _in_double(v) for k, v in kwargs.items() if not isinstance(v, torch.device)}
        results = op(*[_in_double(a) for a in args], **kwargs)
        results = [results] if isinstance(results, Tensor) else list(results)
        made.update((v, r) for v, r in zip(node.outputs, results, strict=False) if v is not None)
    return value


def _in_double(x: Any) -> Any:
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x


def _random(value: Value, generator: torch.Generator) -> Tensor:
    """Random numbers in the place of a tensor; truth values for truth values.

    Raises:
        NotImplementedError: It holds whole numbers, which may be places or counts; or it is large.
    """
    if torch.Size(value.shape).numel() > _LARGE:
        raise NotImplementedError(value)
    if value.dtype is torch.bool:
        return torch.rand(value.shape, generator=generator) < 0.7
    if not value.dtype.is_floating_point:
        raise NotImplementedError(value)
    return torch.randn(value.shape, generator=generator, dtype=torch.float64)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or not a.numel() or not torch.isfinite(a).any():
        return False
    return torch.allclose(
        a, b, rtol=_TOLERANCE, atol=_TOLERANCE * float(a[torch.isfinite(a)].abs().max()), equal_nan=True
    )
