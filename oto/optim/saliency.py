"""The importance of zero-invariant groups (ZIGs): the criteria of HESSO (arXiv 2409.09085, section 3), made comparable.

A criterion maps the entries of one node group to one score per atom, vectorized over the atoms; higher is kept. The
entries are those of the group's ``zeros`` slices, which pruning sets to zero. The gradient is ``p.grad`` at the time of
the optimizer's step (with the opposite sign under ``maximize``): unscaled, clipped if the user clipped it, without
weight decay and without momentum.

Where we differ from the released code:

* **Sign of the cosine.** Released HESSO scores ``cos(x, g) + 1`` and prunes the lowest, so it keeps the groups that
  descent already shrinks (``<x, g> > 0``). OTOv2's optimizer does the opposite, and so do we: ``1 - cos(x, g)``.
* **Gradient.** Released code uses the direction of its own Adam, which a wrapped optimizer does not expose; the plain
  gradient is available with any optimizer.
* **Norms.** The divisor of a criterion is an option (:data:`NORMALIZE`), computed from unpruned atoms only. Released
  code divides by the L2 norm over all atoms, pruned ones included; ``normalize="all"`` uses that of unpruned ones.
* **Averages.** Criteria that use gradients are averaged over the steps before a choice, since one batch is too noisy.
* **Precision.** Sums are accumulated in float32 at least, also for parameters in half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from oto.errors import TargetError
from oto.groups.node_group import NodeGroup
from oto.optim.entries import dot, sent, sq_norm


@dataclass(frozen=True)
class Entries:
    """The entries of one node group that a criterion may use.

    Attributes:
        weights: One view per ``zeros`` slice, shape ``(size, *rest)``; row ``a`` belongs to atom ``a``.
        gradients: The same views of the gradients; ``None`` where a parameter has none.
        readers: One view per weight slice that reads the atoms, such as the columns of the next layer.
        convolved: Whether a convolution over two or more dimensions reads the atoms.
        segment: Whether the node group is a segment. Segments are compared with each other, atoms within their group.
    """

    weights: Sequence[Tensor]
    gradients: Sequence[Tensor | None]
    readers: Sequence[Tensor] = ()
    convolved: bool = False
    segment: bool = False

    @classmethod
    def of(cls, group: NodeGroup, parameters: Mapping[str, Tensor], maximized: Container[str] = ()) -> Entries:
        """The entries of a node group, with their gradients.

        Args:
            maximized: Names of parameters with ``maximize=True``, whose gradients change sign.
        """
        if not group.size:  # it was removed with a segment
            return cls([torch.empty(0, 1)], [None], segment=group.segment)
        weights, gradients = [], []
        for piece in group.zeros:
            p = parameters[piece.parameter]
            gradient = None if p.grad is None else piece.of(p.grad)
            weights.append(piece.of(p.data))
            gradients.append(-gradient if gradient is not None and piece.parameter in maximized else gradient)
        if group.segment:
            return cls(weights, gradients, segment=True)
        reading = [piece for piece in group.slices if piece not in group.zeros and piece.parameter in parameters]
        readers = [view for piece in reading if (view := piece.of(parameters[piece.parameter].data)).dim() > 1]
        return cls(weights, gradients, readers, any(parameters[piece.parameter].dim() > 3 for piece in reading))

    @property
    def size(self) -> int:
        """Number of atoms of the node group."""
        return len(self.weights[0])

    @property
    def has_gradient(self) -> bool:
        """Whether a gradient has a nonzero entry. Synchronizes."""
        return any(bool(own.any()) for own in self.gradients if own is not None)

    @property
    def count(self) -> int:
        """Number of entries of one atom."""
        return sum(weight[0].numel() for weight in self.weights)

    @cached_property
    def weight_sq(self) -> Tensor:
        """``||x_g||^2`` of every atom, shape ``(size,)``."""
        return torch.stack([sq_norm(weight) for weight in self.weights]).sum(0)

    @cached_property
    def reader_sq(self) -> Tensor:
        """Squared norm of the weights that read each atom, shape ``(size,)``; 1 if there are none."""
        parts = [sq_norm(reader) for reader in self.readers]
        return torch.stack(parts).sum(0) if parts else torch.ones_like(self.weight_sq)

    @cached_property
    def gradient_sq(self) -> Tensor:
        """``||g_g||^2`` of every atom, shape ``(size,)``."""
        parts = [sq_norm(gradient) for gradient in self.gradients if gradient is not None]
        return torch.stack(parts).sum(0) if parts else torch.zeros_like(self.weight_sq)

    @cached_property
    def dot(self) -> Tensor:
        """``<x_g, g_g>`` of every atom, shape ``(size,)``."""
        pairs = zip(self.weights, self.gradients, strict=True)
        parts = [dot(weight, gradient) for weight, gradient in pairs if gradient is not None]
        return torch.stack(parts).sum(0) if parts else torch.zeros_like(self.weight_sq)


def any_gradient(groups: Iterable[Entries]) -> bool:
    """Whether a gradient of any node group has a nonzero entry. Synchronizes."""
    return any(entries.has_gradient for entries in groups)


Saliency = Callable[[Entries], Tensor]
"""A criterion: takes the :class:`Entries` of a node group, returns one finite score per atom, shape ``(size,)``.
Higher is kept; the sign may be any."""


def magnitude(entries: Entries) -> Tensor:
    """``||x_g||``, the L2 norm of the atom."""
    return entries.weight_sq.sqrt()


def avg_magnitude(entries: Entries) -> Tensor:
    """``||x_g|| / |g|``, with ``|g|`` the number of entries of an atom."""
    return entries.weight_sq.sqrt() / entries.count


def path_norm(entries: Entries) -> Tensor:
    """``||x_g||^2 ||y_g||^2``, with ``y_g`` the weights that read the group: the squares of all paths through it.

    Unlike a magnitude, it does not change when the writing weights are scaled up and the reading ones down.
    """
    return entries.weight_sq * entries.reader_sq


def cosine_similarity(entries: Entries) -> Tensor:
    """``1 - cos(x_g, g_g)``, in [0, 2]: high where descent makes the group grow; 1 if the angle is undefined."""
    lengths = entries.weight_sq.sqrt() * entries.gradient_sq.sqrt()
    return 1 - (entries.dot / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)).clamp(-1, 1)


def taylor_first_order(entries: Entries) -> Tensor:
    """``|<x_g, g_g>|``: the first-order change of the loss if the group is removed."""
    return entries.dot.abs()


def taylor_second_order(entries: Entries) -> Tensor:
    """``<x_g, g_g>^2 / 2``: the second-order change, with ``g g^T`` in place of the Hessian."""
    return entries.dot.square() / 2


CRITERIA: dict[str, Saliency] = {
    criterion.__name__: criterion
    for criterion in (magnitude, avg_magnitude, path_norm, cosine_similarity, taylor_first_order, taylor_second_order)
}

Weights = Mapping[str | Saliency, float]
"""Criteria, by name or as functions, and their weights."""

PUBLISHED: Weights = {name: 0.2 for name in CRITERIA if name != "path_norm"}
"""The five criteria of HESSO, with equal weights."""


def angle(entries: Entries) -> Tensor:
    """``-cos(x_g, g_g)``, in [-1, 1]: low where descent already shrinks the group (DHSPG)."""
    return cosine_similarity(entries) - 1


def inverse_magnitude(entries: Entries) -> Tensor:
    """``-1 / (||x_g|| / |g| + 1e-6)``: low where entries are small on average (DHSPG)."""
    return -1 / (avg_magnitude(entries) + 1e-6)


AS_PUBLISHED: dict[str, Weights] = {"hesso": PUBLISHED, "dhspg": {angle: 0.5, inverse_magnitude: 0.5}}
"""The scores of a paper: criteria of one batch, each divided by its norm over all groups."""

FROM_WEIGHTS: tuple[Saliency, ...] = (magnitude, avg_magnitude, path_norm, inverse_magnitude)
"""Criteria that use no gradient, so they are not averaged over steps."""

OF_THE_LOSS: tuple[Saliency, ...] = (taylor_first_order, taylor_second_order)
"""Criteria in the unit of the loss, which can be compared between layers and divided by a cost."""

NORMALIZE = {
    "mean": "its mean over the atoms of the node group",
    "max": "its greatest value in the node group",
    "norm": "its L2 norm over the atoms of the node group",
    "all": "its L2 norm over the atoms of all node groups",
    "none": "nothing",
}
"""What a criterion may be divided by; pruned atoms do not count."""


WITHIN_GROUPS = ("mean", "max", "norm")
"""The normalizations that make a score relative to its own node group."""


def resolve(weights: Weights | str | Saliency) -> list[tuple[Saliency, float]]:
    """The criteria as functions with their weights, in the given order. The name of a paper gives its criteria.

    Raises:
        TargetError: A name is unknown, or all weights are zero.
    """
    if not isinstance(weights, Mapping):
        weights = AS_PUBLISHED[weights] if isinstance(weights, str) and weights in AS_PUBLISHED else {weights: 1.0}
    for name in weights:
        if isinstance(name, str) and name not in CRITERIA:
            raise TargetError(
                f"no saliency is called {name!r}; there are {', '.join([*AS_PUBLISHED, *CRITERIA])}, or pass a function"
            )
    if not any(weights.values()):
        raise TargetError("every saliency has the weight 0, so no group can be told from another")
    return [(CRITERIA[name] if isinstance(name, str) else name, weight) for name, weight in weights.items()]


def name_of(criterion: Saliency) -> str:
    """The name of a criterion in messages and checkpoints."""
    return getattr(criterion, "__name__", type(criterion).__name__)


def raw_scores(groups: Sequence[Entries], criterion: Saliency, device: torch.device) -> Tensor:
    """The values of a criterion for every atom, node group after node group, float32 at least, shape ``(N,)``."""
    raw = torch.cat([sent(criterion(entries), device) for entries in groups if entries.size])
    return raw.to(torch.promote_types(raw.dtype, torch.float32))


def compared(groups: Sequence[Entries]) -> list[int]:
    """The number of atoms of each node group, with neighboring segments counted as one group.

    A segment has one atom, so alone it would be normalized by itself.
    """
    sizes: list[int] = []
    for i, entries in enumerate(groups):
        if entries.segment and i and groups[i - 1].segment:
            sizes[-1] += entries.size
        else:
            sizes.append(entries.size)
    return sizes


def importance(
    raw: Sequence[Tensor], weights: Sequence[float], alive: Tensor, sizes: Sequence[int], normalize: str
) -> Tensor:
    """The weighted sum of normalized criteria.

    Args:
        raw: Each criterion for every atom, shape ``(N,)``.
        weights: Their weights.
        alive: Whether an atom is still unpruned, bool, shape ``(N,)``: node group after node group.
        sizes: Number of atoms of each node group.
        normalize: A key of :data:`NORMALIZE`.

    Returns:
        Shape ``(N,)``; the values of pruned atoms are undefined.
    """
    total = torch.zeros_like(raw[0])
    for values, weight in zip(raw, weights, strict=True):
        own = torch.where(alive, values, 0).abs()
        if normalize == "mean":
            alike = _over_group(alive.to(own.dtype), sizes, "sum").clamp_min(1)
            scale = _over_group(own, sizes, "sum") / alike
        elif normalize == "max":
            scale = _over_group(own, sizes, "amax")
        elif normalize == "norm":
            scale = _over_group(own.square(), sizes, "sum").sqrt()
        elif normalize == "all":
            scale = torch.linalg.vector_norm(own)
        else:
            scale = torch.ones_like(own)
        total = total + weight * values / scale.clamp_min(torch.finfo(own.dtype).tiny)
    return total


def indistinct(raw: Sequence[Tensor], alive: Tensor, sizes: Sequence[int]) -> Tensor:
    """Which node groups have at least two unpruned atoms that no criterion distinguishes: bool, shape ``(groups,)``.

    Args:
        raw: Each criterion for every atom, shape ``(N,)``.
        alive: Whether an atom is still unpruned, bool, shape ``(N,)``.
        sizes: Number of atoms of each node group.

    >>> indistinct([torch.tensor([0.0, 0.0, 3.0, 1.0, 2.0])], torch.tensor([True, True, False, True, True]), [3, 2])
    tensor([ True, False])
    """
    size = torch.tensor(sizes, device=alive.device)
    first = (size.cumsum(0) - size).clamp_max(max(len(alive) - 1, 0))  # a group may have no atom left
    found = _over_group(alive.float(), sizes, "sum")[first] > 1
    for values in raw:
        high = _over_group(torch.where(alive, values, -torch.inf), sizes, "amax")
        low = _over_group(torch.where(alive, values, torch.inf), sizes, "amin")
        found &= (high == low)[first]
    return found & (size > 0)


def shared_out(scores: Tensor, by: Tensor, alive: Tensor, sizes: Sequence[int]) -> Tensor:
    """The sum of ``scores`` over each node group, distributed among its atoms in proportion to ``by``.

    >>> scores, by = torch.tensor([1.0, 3.0, 5.0, 9.0]), torch.tensor([3.0, 1.0, 2.0, 9.0])
    >>> shared_out(scores, by, torch.tensor([True, True, True, False]), [2, 2])[:3]
    tensor([3., 1., 5.])
    """
    whole, parts = (_over_group(torch.where(alive, values, 0), sizes, "sum") for values in (scores, by))
    return whole * (by / parts.clamp_min(torch.finfo(by.dtype).tiny))


def _over_group(values: Tensor, sizes: Sequence[int], how: str) -> Tensor:
    """A statistic of each node group, repeated for its atoms, shape ``(N,)``."""
    size = torch.tensor(sizes, device=values.device)
    group = torch.arange(len(sizes), device=values.device).repeat_interleave(size, output_size=len(values))
    return values.new_zeros(len(sizes)).scatter_reduce_(0, group, values, how, include_self=False)[group]
