"""What takes the place of a module that is not run any more, because all that it wrote was zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Recipe = Mapping[str, Any]
"""What a call gives, in the form of artifacts; tensors that it is given are called by the names of parameters.

``{"given": name}``: that tensor; a copy of it, with ``"copy": True``.
``{"zeros": name}``: zeros of its shape; with ``"last": n`` so many in its last dimension; with ``"channels": n`` and
``"window": [[kernel, stride, padding, dilation], ...]`` what a convolution makes of its shape.
``{"items": [...], "list": False}``: a tuple, or a list, of such. ``{"value": x}``: a number, a text or ``None``.
"""


class Erased(nn.Module):
    """A module of the same signature that computes nothing, and gives what is left.

    Args:
        takes: The names of the positional parameters of the module in whose place it is.
        gives: What a call gives.
        attributes: Numbers and texts that code around it may read.

    Example:
        >>> Erased(["x"], {"given": "x"}, {})(torch.ones(2))
        tensor([1., 1.])
    """

    def __init__(self, takes: Sequence[str], gives: Recipe, attributes: Mapping[str, Any]) -> None:
        super().__init__()
        self.takes, self.gives = tuple(takes), gives
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return made(self.gives, {**dict(zip(self.takes, args, strict=False)), **kwargs})

    def extra_repr(self) -> str:
        return "gives what it is given" if "given" in self.gives else "gives zeros"


def made(recipe: Recipe, given: Mapping[str, Any]) -> Any:
    """What a recipe makes of the arguments of a call."""
    if "items" in recipe:
        items = [made(item, given) for item in recipe["items"]]
        return items if recipe.get("list") else tuple(items)
    if "given" in recipe:
        x = given[recipe["given"]]
        return x.clone() if recipe.get("copy") else x
    if "zeros" not in recipe:
        return recipe["value"]
    x = given[recipe["zeros"]]
    if "last" in recipe:
        return x.new_zeros((*x.shape[:-1], recipe["last"]))
    if "channels" in recipe:
        return x.new_zeros(convolved(x, recipe["channels"], recipe["window"]))
    return torch.zeros_like(x)


def convolved(x: Tensor, channels: int, window: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The shape of what a convolution makes of ``x``, shape ``(N, C, *)`` or ``(C, *)``."""
    lead = x.shape[: x.ndim - len(window) - 1]
    sizes = zip(x.shape[x.ndim - len(window) :], window, strict=True)
    return (*lead, channels, *((n + 2 * pad - far * (kernel - 1) - 1) // step + 1 for n, (kernel, step, pad, far) in sizes))
