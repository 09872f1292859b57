"""Check whether two paths from the same tensors, one of the full and one of the thinner model, compute the same.

Some classes branch on sizes. If queries and values are equally wide, a kernel repeats the keys itself, otherwise the
code does; a product of three matrices is computed in whichever order is cheaper. Neither path is wrong. Both are run on
the same random numbers, the full model's path with the sizes of the thinner one. If the results are equal for normal
numbers and for zeros and ones, there is no divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from oto._torch import tree_map_only
from oto.axes.call import Rewrite
from oto.errors import reraise_out_of_memory
from oto.slim.pruned_shapes import PrunedShapes
from oto.trace.graph import Node, Value

_TOLERANCE = 1e-9
"""Enough for float64 sums as long as in any layer; paths that differ by more than rounding differ by 1e-3."""
_LARGE = 1 << 24
"""The limit on entries of a tensor that is drawn; a branch that needs a larger one counts as a divergence."""
_SET = 0.7
"""Share of mask entries that are set, so that every row has both kinds and most rows keep several."""

Draw: TypeAlias = Callable[[Sequence[int], torch.Generator], Tensor]


@dataclass(eq=False)
class Detour:
    """Two paths from the same tensors, run as far as needed; each call is made once for each kind of numbers.

    Two kinds are drawn because either may hide a difference. Normal numbers in place of a mask's zeros and ones push
    entries so far apart that a softmax has one winner, whatever the others are scaled by. Powers and absolute values
    do not change zeros and ones.

    Attributes:
        full, slim: The calls of the full and of the slim model, from where they part.
        stands: The tensors of the slim model that correspond to those of the full one; it may grow meanwhile.
        itself: For a tensor of the slim model that is only a copy of another in a new layout, that other.
        pruned: The pruned shapes.
        rewrites: How the calls of the full model are made on thinner tensors.
    """

    full: Sequence[Node]
    slim: Sequence[Node]
    stands: Mapping[Value, Value]
    itself: Mapping[Value, Value]
    pruned: PrunedShapes
    rewrites: Mapping[int, Rewrite]

    def __post_init__(self) -> None:
        self._trials = [_Trial(self, draw) for draw in (_normal, _coins)]

    def agrees(self, full: int, slim: int, results: Sequence[tuple[Value, Value]]) -> bool:
        """Whether the first calls of each side give equal results for random numbers of each kind, in float64.

        Args:
            full, slim: How many calls of each side.
            results: Pairs of their results that later calls read.

        Returns:
            ``False`` also if the calls cannot be run.
        """
        try:
            with torch.inference_mode():
                return all(trial.agrees(full, slim, results) for trial in self._trials)
        except Exception as failure:  # only the user's code can run a call, or an input cannot be drawn at random
            reraise_out_of_memory(failure)
            return False


class _Trial:
    """Both paths of a detour on the same numbers of one kind."""

    def __init__(self, detour: Detour, draw: Draw) -> None:
        self._detour, self._draw = detour, draw
        self._given: dict[Value, Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)
        self._wanted = _Path(lambda value: self._slim_value(detour.stands[value]))
        self._found = _Path(self._slim_value)

    def agrees(self, full: int, slim: int, results: Sequence[tuple[Value, Value]]) -> bool:
        """:meth:`Detour.agrees` for these numbers; exceptions of the calls propagate."""
        at = self._detour
        for node in at.full[self._wanted.calls : full]:
            self._wanted.make(at.pruned.call(node, at.rewrites.get(node.index)), node)
        for node in at.slim[self._found.calls : slim]:
            self._found.make((node.op, node.args, dict(node.kwargs)), node)
        return all(_same(self._wanted.value(old), self._found.value(new)) for old, new in results)

    def _slim_value(self, value: Value) -> Tensor:
        value = self._detour.itself.get(value, value)
        if value not in self._given:
            self._given[value] = _random(value, self._draw, self._generator)
        return self._given[value]


class _Path:
    """The calls of one side.

    Attributes:
        calls: How many have been made.
    """

    def __init__(self, given: Callable[[Value], Tensor]) -> None:
        self.calls = 0
        self._given, self._made = given, dict[Value, Tensor]()

    def value(self, v: Value) -> Tensor:
        return self._made[v] if v in self._made else self._given(v)

    def make(self, call: tuple[Any, Any, dict[str, Any]], node: Node) -> None:
        """Make the next call.

        Raises:
            NotImplementedError: The call writes to a tensor that it does not return.
        """
        if node.written:
            raise NotImplementedError(node)
        op, args, kwargs = call
        args, kwargs = tree_map_only(Value, self.value, (args, kwargs))
        kwargs = {k: _in_double(v) for k, v in kwargs.items() if not isinstance(v, torch.device)}
        if getattr(getattr(op, "_schema", None), "is_mutable", False):  # both sides start from the same tensors
            args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
        results = op(*[_in_double(a) for a in args], **kwargs)
        results = [results] if isinstance(results, Tensor) else list(results)
        self._made.update((v, r) for v, r in zip(node.outputs, results, strict=False) if v is not None)
        self.calls += 1


def _in_double(x: Any) -> Any:
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _coins(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Zeros and ones, as in a mask."""
    return (torch.rand(shape, generator=generator) < _SET).double()


def _random(value: Value, draw: Draw, generator: torch.Generator) -> Tensor:
    """A random tensor with the shape of another; boolean if that one is.

    Raises:
        NotImplementedError: The tensor holds integers, which may be indices or counts, or it is too large.
    """
    if torch.Size(value.shape).numel() > _LARGE:
        raise NotImplementedError(value)
    if value.dtype is torch.bool:
        return torch.rand(value.shape, generator=generator) < _SET
    if not value.dtype.is_floating_point:
        raise NotImplementedError(value)
    return draw(value.shape, generator)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two results are equal up to rounding, relative to the largest of the entries that differ.

    Masks write the lowest number of the dtype; relative to that, no difference would show.
    """
    if a.shape != b.shape or a.dtype != b.dtype or not a.numel() or not torch.isfinite(a).any():
        return False
    differ = (a != b) & ~(a.isnan() & b.isnan())
    a, b = a[differ], b[differ]
    return not a.numel() or bool((a - b).abs().max() <= _TOLERANCE * a.abs().max())
