"""The forward of a module that computes nothing any more, because all that it wrote was zero."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from oto.errors import ScriptError

Recipe = Mapping[str, Any]
"""What a call gives, in the form of artifacts; tensors that it is given are called by the names of parameters.

``{"given": name}``: that tensor; a copy of it, with ``"copy": True``; with ``"then": [...]`` what functions of
:data:`THEN` make of it, one after the other.
``{"zeros": name}``: zeros of its shape; with ``"last": n`` so many in its last dimension; with ``"channels": n`` and
``"window": [[kernel, stride, padding, dilation], ...]`` what a convolution makes of its shape; with ``"none": dim``
none along a dimension, counted from the last, -1. An empty vector stays one.
``{"empty": name}``: an empty vector in its dtype, which ``torch.cat`` passes over.
``{"items": [...], "list": False}``: a tuple, or a list, of such. ``{"value": x}``: a number, a text or ``None``.
"""


THEN: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
}
"""Functions that may be left of a block that computes nothing else; none writes into what it is given."""


class ErasedForward:
    """The forward of a module that computes nothing, and gives what is left; it replaces ``module.forward``.

    The module stays of its class, and has its signature, hooks and attributes; its tensors and children are ``None``.

    Args:
        kind: The class of the module.
        takes: The names of the positional parameters of its forward.
        gives: What a call gives.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> ErasedForward(nn.Linear, ["input"], {"given": "input"}).install(layer)
        >>> layer(torch.ones(2)), list(layer.parameters())
        (tensor([1., 1.]), [])
    """

    def __init__(self, kind: type[nn.Module], takes: Sequence[str], gives: Recipe) -> None:
        self.kind, self.takes, self.gives = kind, tuple(takes), gives

    def install(self, module: nn.Module) -> None:
        """Let a module compute nothing."""
        for held in (module._parameters, module._buffers, module._modules):
            held.update(dict.fromkeys(held))
        vars(module)["forward"] = self
        vars(module)["extra_repr"] = partial(str, "computes nothing")  # that of the class may read its tensors

    @property
    def __signature__(self) -> inspect.Signature:
        own = inspect.signature(self.kind.forward)
        return own.replace(parameters=list(own.parameters.values())[1:])

    @property
    def __globals__(self) -> dict[str, Any]:
        """Read by ``torch.jit.script``, which would compile the code of the class, so it is refused."""
        raise ScriptError(f"the forward of {self.kind.__name__}: it computes nothing any more")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return made(self.gives, {**dict(zip(self.takes, args, strict=False)), **kwargs})


def is_erased(module: nn.Module) -> bool:
    """Whether a module computes nothing any more."""
    return isinstance(vars(module).get("forward"), ErasedForward)


def made(recipe: Recipe, given: Mapping[str, Any]) -> Any:
    """What a recipe makes of the arguments of a call."""
    if "items" in recipe:
        items = [made(item, given) for item in recipe["items"]]
        return items if recipe.get("list") else tuple(items)
    if "given" in recipe:
        x = given[recipe["given"]]
        for name in recipe.get("then", ()):
            x = THEN[name](x)
        return x.clone() if recipe.get("copy") else x
    if "empty" in recipe:
        return given[recipe["empty"]].new_empty(0)
    if "zeros" not in recipe:
        return recipe["value"]
    x = given[recipe["zeros"]]
    if x.shape == (0,):
        return x
    if "none" in recipe:
        dim = x.ndim + recipe["none"]
        return x.new_zeros((*x.shape[:dim], 0, *x.shape[dim + 1 :]))
    if "last" in recipe:
        return x.new_zeros((*x.shape[:-1], recipe["last"]))
    if "channels" in recipe:
        return x.new_zeros(convolved(x, recipe["channels"], recipe["window"]))
    return torch.zeros_like(x)


def convolved(x: Tensor, channels: int, window: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The shape of what a convolution makes of ``x``, shape ``(N, C, *)`` or ``(C, *)``."""
    lead = x.shape[: x.ndim - len(window) - 1]
    sizes = zip(x.shape[x.ndim - len(window) :], window, strict=True)
    return (
        *lead,
        channels,
        *((n + 2 * pad - far * (kernel - 1) - 1) // step + 1 for n, (kernel, step, pad, far) in sizes),
    )
