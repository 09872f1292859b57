"""The inputs on which two models are compared: the example, and random ones of the same kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from oto._torch import tree_leaves, tree_map_only


@dataclass(frozen=True)
class Input:
    """An input that models are compared on.

    Attributes:
        name: Its name in a check, such as ``"random input"``.
        value: The arguments for the model.
        as_users_do: Whether models run on it in inference mode, with torch's fast paths.
        optional: Whether a slim model that does not take it only causes a note, not an error.
        again: Whether the second of two calls counts, which may read what the first one left in the model.
    """

    name: str
    value: Any = field(compare=False, repr=False)
    as_users_do: bool = field(default=False, compare=False)
    optional: bool = field(default=False, compare=False)
    again: bool = field(default=False, compare=False)


def batch_size(example: Any) -> int | None:
    """The first dimension of the first tensor; ``None`` if that is a scalar."""
    first = next(t for t in tree_leaves(example) if isinstance(t, Tensor))
    return first.shape[0] if first.ndim else None


def differs(one: Any, other: Any) -> bool:
    """Whether two inputs of the same kind differ in any entry that both have."""
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and a.ndim]
    return any(not torch.equal(a[: len(b)], b) for a, b in tensors)


def random_like(
    dummy_input: Any, seed: int, batch: int | None = None, shapes: Sequence[tuple[int, ...]] | None = None
) -> Any:
    """A random input of the same kind: floats and integers are drawn, the latter in the example's range; booleans stay.

    Floats are normal with the mean and deviation of the example; its entries that are no ordinary numbers (NaN,
    infinities, the lowest number of the dtype, which masks something) stay. Where the example itself was drawn with
    this seed, so that the same numbers come, the next ones are taken.

    Args:
        batch: Repeat along the first dimension to this size.
        shapes: The shape of each tensor instead; booleans are repeated or cut to it.
    """
    generator = torch.Generator().manual_seed(seed)
    first = next(t for t in tree_leaves(dummy_input) if isinstance(t, Tensor))
    size = first.shape[0] if first.ndim else None

    given = iter(shapes or ())

    def draw(t: Tensor) -> Tensor:
        shape = list(t.shape) if shapes is None else list(next(given))
        if batch is not None and t.ndim and t.shape[0] == size:
            shape[0] = batch
        if t.dtype == torch.bool or not t.numel():
            return _repeated(t, shape)
        made = once(t, shape)
        return once(t, shape) if _is_again(made, t) else made

    def once(t: Tensor, shape: Sequence[int]) -> Tensor:
        if t.is_floating_point() or t.is_complex():
            return _draw(t, shape, generator)
        low, high = int(t.min()), int(t.max())
        return torch.randint(low, high + 1, shape, generator=generator).to(t.device, t.dtype)

    return tree_map_only(Tensor, draw, dummy_input)


def _is_again(made: Tensor, t: Tensor) -> bool:
    """Whether numbers are those of an example, but for the mean and deviation."""
    if not made.is_floating_point():
        same = [torch.equal(made[: len(t)], t[: len(made)])] if t.ndim and made.shape[1:] == t.shape[1:] else []
        return any(same)
    flat = [x.reshape(-1)[: min(made.numel(), t.numel())].double() for x in (made, t)]
    ordinary = [x - x.mean() for x in flat if x.isfinite().all() and x.numel() > 2]
    if len(ordinary) < 2:
        return False
    one, other = ordinary
    return bool(one @ other > 0.99 * one.norm() * other.norm())


def _draw(t: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normal numbers with the mean and deviation of ``t``; its entries that are no ordinary numbers stay."""
    dtype = t.dtype if t.dtype in (torch.float32, torch.float64, torch.complex64) else torch.float32
    drawn = torch.randn(list(shape), generator=generator, dtype=dtype)
    if t.is_complex():
        return drawn.to(t.device, t.dtype)
    values = t.detach()
    # infinities and the least number of a dtype stand for what is masked, and NaN for what is missing
    special = ~(values.abs() < torch.finfo(t.dtype).max / 2)
    numbers = values[~special].double()
    spread = float(numbers.std()) if len(numbers) > 1 else 0.0
    middle = float(numbers.mean()) if len(numbers) else 0.0
    made = (drawn * (spread or 1.0) + middle).to(t.device, t.dtype)
    return torch.where(_repeated(special, shape), _repeated(values, shape), made) if special.any() else made


def _repeated(t: Tensor, shape: Sequence[int]) -> Tensor:
    """A copy in a given shape, repeated or cut along each dimension."""
    for dim, n in enumerate(shape):
        if n != t.shape[dim]:
            t = t.index_select(dim, torch.arange(n, device=t.device) % t.shape[dim])
    return t.clone()


def follow_model(
    dummy_input: Any, then: Mapping[str, torch.dtype], there: torch.device | None, now: Mapping[str, Tensor]
) -> Any:
    """The example for a model that was cast or moved since; tensors on other devices than the model's stay there.

    Args:
        then: The dtype that each parameter had when the example fitted.
        there: The device of the parameters then, if they were all on one.
        now: The parameters.
    """
    became: dict[torch.dtype, set[torch.dtype]] = {}
    for name, dtype in then.items():
        became.setdefault(dtype, set()).add(now[name].dtype)
    device = device_of(now.values())
    moves = None not in (device, there) and device != there and device != torch.device("meta")

    def moved(t: Tensor) -> Tensor:
        dtypes = became.get(t.dtype, set())
        dtype = next(iter(dtypes)) if len(dtypes) == 1 and t.is_floating_point() else t.dtype
        beside = moves and not t.is_meta and (t.device == there or there == torch.device("meta"))
        return t.to(device if beside else t.device, dtype)

    return tree_map_only(Tensor, moved, dummy_input)


def device_of(tensors: Iterable[Tensor]) -> torch.device | None:
    """The device of some tensors, if they are all on one."""
    devices = {t.device for t in tensors}
    return devices.pop() if len(devices) == 1 else None
