"""How much a zero-invariant group (ZIG) matters: the criteria of HESSO (arXiv 2409.09085, section 3), made comparable.

A criterion maps the entries of one node group to one score per atom, vectorised over the atoms; higher is kept. The
entries are those of the group's ``zeros`` slices, which is what pruning sets to zero. The gradient is ``p.grad`` as
the optimizer finds it (with the sign turned under ``maximize``): unscaled, clipped if the user clipped it, without
weight decay and without momentum.

Where we differ from the released code:

* **Sign of the cosine.** Released HESSO scores ``cos(x, g) + 1`` and prunes the lowest, so it keeps the very groups
  that descent already shrinks (``<x, g> > 0``). OTOv2's optimizer has it the other way; so have we: ``1 - cos(x, g)``.
* **Gradient.** Released code uses the direction of its own Adam, which the wrapped optimizer does not show; the plain
  gradient works with any.
* **Norms.** Each criterion is divided by its mean over the atoms of the same node group that are still alive, so that
  layers of different size can be compared; ``normalise="all"`` divides by its L2 norm over all that are alive, as
  released code does over all there ever were.
* **Averages.** Criteria that look at gradients are averaged over the steps before a choice: one batch is noise.
* Sums are accumulated in float32 at least, also for half precision parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from oto.errors import TargetError
from oto.groups.node_group import NodeGroup


@dataclass(frozen=True)
class Entries:
    """The numbers of one node group that a criterion may look at.

    Attributes:
        weights: One view per ``zeros`` slice, shape ``(size, *rest)``; row ``a`` belongs to atom ``a``.
        gradients: The same views of the gradients; ``None`` where a parameter has none.
    """

    weights: Sequence[Tensor]
    gradients: Sequence[Tensor | None]

    @classmethod
    def of(cls, group: NodeGroup, parameters: Mapping[str, Tensor], maximized: Container[str] = ()) -> Entries:
        """The entries of a node group, with the direction of steepest ascent of the objective.

        Args:
            maximized: Parameters whose gradient is that of something to be made large.
        """
        weights, gradients = [], []
        for piece in group.zeros:
            p = parameters[piece.parameter]
            gradient = None if p.grad is None else piece.of(p.grad)
            weights.append(piece.of(p.data))
            gradients.append(-gradient if gradient is not None and piece.parameter in maximized else gradient)
        return cls(weights, gradients)

    @property
    def count(self) -> int:
        """Entries of one atom."""
        return sum(weight[0].numel() for weight in self.weights)

    @cached_property
    def weight_sq(self) -> Tensor:
        """``||x_g||^2`` of every atom, shape ``(size,)``."""
        return torch.stack([_sq_norms(weight) for weight in self.weights]).sum(0)

    @cached_property
    def gradient_sq(self) -> Tensor:
        """``||g_g||^2`` of every atom, shape ``(size,)``."""
        parts = [_sq_norms(gradient) for gradient in self.gradients if gradient is not None]
        return torch.stack(parts).sum(0) if parts else torch.zeros_like(self.weight_sq)

    @cached_property
    def dot(self) -> Tensor:
        """``<x_g, g_g>`` of every atom, shape ``(size,)``."""
        pairs = zip(self.weights, self.gradients, strict=True)
        parts = [_dots(weight, gradient) for weight, gradient in pairs if gradient is not None]
        return torch.stack(parts).sum(0) if parts else torch.zeros_like(self.weight_sq)


Saliency = Callable[[Entries], Tensor]
"""A criterion: takes the :class:`Entries` of a node group, returns one finite score per atom, shape ``(size,)``.
Higher is kept; the sign may be any."""


def magnitude(entries: Entries) -> Tensor:
    """``||x_g||``."""
    return entries.weight_sq.sqrt()


def avg_magnitude(entries: Entries) -> Tensor:
    """``||x_g|| / |g|``: fair to groups with few entries."""
    return entries.weight_sq.sqrt() / entries.count


def cosine_similarity(entries: Entries) -> Tensor:
    """``1 - cos(x_g, g_g)``, in [0, 2]: high where descent makes the group grow; 1 where the angle is not defined."""
    lengths = entries.weight_sq.sqrt() * entries.gradient_sq.sqrt()
    return 1 - (entries.dot / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)).clamp(-1, 1)


def taylor_first_order(entries: Entries) -> Tensor:
    """``|<x_g, g_g>|``: first-order change of the loss when the group goes."""
    return entries.dot.abs()


def taylor_second_order(entries: Entries) -> Tensor:
    """``<x_g, g_g>^2 / 2``: the second-order change, with ``g g^T`` in the place of the Hessian."""
    return entries.dot.square() / 2


CRITERIA: dict[str, Saliency] = {
    criterion.__name__: criterion
    for criterion in (magnitude, avg_magnitude, cosine_similarity, taylor_first_order, taylor_second_order)
}

Weights = Mapping[str | Saliency, float]
"""Criteria, by name or as functions, and how much each counts."""

PUBLISHED: Weights = dict.fromkeys(CRITERIA, 0.2)
"""The five criteria of HESSO count alike."""

FROM_WEIGHTS: tuple[Saliency, ...] = (magnitude, avg_magnitude)
"""Criteria that look at no gradient, so there is nothing to average."""

NORMALISE = {
    "mean": "its mean over the atoms of the node group",
    "max": "its greatest value in the node group",
    "norm": "its L2 norm over the atoms of the node group",
    "all": "its L2 norm over the atoms of all node groups",
    "none": "nothing",
}
"""What a criterion may be divided by; atoms at zero for good do not count."""


WITHIN_GROUPS = ("mean", "max", "norm")
"""What makes a score relative to its own node group."""


def resolve(weights: Weights | str | Saliency) -> list[tuple[Saliency, float]]:
    """The criteria as functions, in the given order; ``"hesso"`` stands for :data:`PUBLISHED`.

    Raises:
        TargetError: A name is unknown, or no criterion counts.
    """
    if not isinstance(weights, Mapping):
        weights = PUBLISHED if weights == "hesso" else {weights: 1.0}
    for name in weights:
        if isinstance(name, str) and name not in CRITERIA:
            raise TargetError(
                f"no saliency is called {name!r}; there are hesso, {', '.join(CRITERIA)}, or pass a function"
            )
    if not any(weights.values()):
        raise TargetError("every saliency has the weight 0, so no group can be told from another")
    return [(CRITERIA[name] if isinstance(name, str) else name, weight) for name, weight in weights.items()]


def raw_scores(groups: Sequence[Entries], criterion: Saliency, device: torch.device) -> Tensor:
    """A criterion for every atom, node group after node group, float32 at least, shape ``(N,)``."""
    raw = torch.cat([criterion(entries).to(device, non_blocking=True) for entries in groups])
    return raw.to(torch.promote_types(raw.dtype, torch.float32))


def importance(raw: Sequence[Tensor], weights: Sequence[float], alive: Tensor, sizes: Sequence[int], normalise: str
               ) -> Tensor:  # fmt: skip
    """Weighted sum of criteria that were made comparable.

    Args:
        raw: Each criterion for every atom, shape ``(N,)``.
        weights: How much each counts.
        alive: Whether an atom is still unpruned, bool, shape ``(N,)``: node group after node group.
        sizes: Atoms of each node group.
        normalise: A key of :data:`NORMALISE`.

    Returns:
        Shape ``(N,)``; without meaning where an atom is not alive.
    """
    total = torch.zeros_like(raw[0])
    size = torch.tensor(sizes, device=alive.device)
    group = torch.arange(len(sizes), device=alive.device).repeat_interleave(size, output_size=len(alive))

    def over_group(values: Tensor, how: str) -> Tensor:
        made = values.new_zeros(len(sizes)).scatter_reduce_(0, group, values, how, include_self=True)
        return made[group]

    for values, weight in zip(raw, weights, strict=True):
        own = torch.where(alive, values, 0).abs()
        if normalise == "mean":
            scale = over_group(own, "sum") / over_group(alive.to(own.dtype), "sum").clamp_min(1)
        elif normalise == "max":
            scale = over_group(own, "amax")
        elif normalise == "norm":
            scale = over_group(own.square(), "sum").sqrt()
        elif normalise == "all":
            scale = torch.linalg.vector_norm(own)
        else:
            scale = torch.ones_like(own)
        total = total + weight * values / scale.clamp_min(torch.finfo(own.dtype).tiny)
    return total


def _sq_norms(rows: Tensor) -> Tensor:
    if not rows.is_contiguous():  # torch's norm is several times slower along strided rows
        return _dots(rows, rows)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(rows.reshape(rows.shape[0], -1), dim=1, dtype=dtype)
    return norms.square()


def _dots(left: Tensor, right: Tensor) -> Tensor:
    dtype = torch.promote_types(left.dtype, torch.float32)
    product = left.to(dtype) * right.to(dtype)
    return product.sum(tuple(range(1, product.dim()))) if product.dim() > 1 else product
