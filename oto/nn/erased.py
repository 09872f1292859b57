"""The forward of a module that no longer computes anything, because everything that it wrote was zero."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from oto.errors import ScriptError

Recipe = Mapping[str, Any]
"""What a call returns, in the form of artifacts; its arguments are referred to by the names of the parameters.

``{"given": name}``: that argument; with ``"copy": True`` a copy of it; with ``"then": [...]`` functions of :data:`THEN`
are applied to it, in order.
``{"zeros": name}``: zeros of the argument's shape; with ``"last": n`` the last dimension has size ``n``; with
``"channels": n`` and ``"window": [[kernel, stride, padding, dilation], ...]`` the shape is that of a convolution's
output; with ``"none": dim`` the (negative) dimension has size 0. An empty vector stays empty.
``{"empty": name}``: an empty vector in the argument's dtype, which ``torch.cat`` ignores.
``{"items": [...], "list": False}``: a tuple or list of recipes. ``{"value": x}``: a number, a string or ``None``.
"""


THEN: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
}
"""Functions that an erased block may still apply; none writes to its argument."""


class ErasedForward:
    """Replaces ``module.forward`` of a module that computes nothing: it only returns arguments, zeros or constants.

    The module keeps its class, signature, hooks and attributes; its tensors and children are ``None``.

    Args:
        kind: The class of the module.
        takes: The names of the positional parameters of its forward.
        gives: What a call returns.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> ErasedForward(nn.Linear, ["input"], {"given": "input"}).install(layer)
        >>> layer(torch.ones(2)), list(layer.parameters())
        (tensor([1., 1.]), [])
    """

    def __init__(self, kind: type[nn.Module], takes: Sequence[str], gives: Recipe) -> None:
        self.kind, self.takes, self.gives = kind, tuple(takes), gives

    def install(self, module: nn.Module) -> None:
        """Replace the forward of a module, and drop its tensors and children."""
        for held in (module._parameters, module._buffers, module._modules):
            held.update(dict.fromkeys(held))
        vars(module)["forward"] = self
        vars(module)["extra_repr"] = partial(str, "computes nothing")  # the class's own may read its tensors

    @property
    def __signature__(self) -> inspect.Signature:
        own = inspect.signature(self.kind.forward)
        return own.replace(parameters=list(own.parameters.values())[1:])

    @property
    def __globals__(self) -> dict[str, Any]:
        """Refuse ``torch.jit.script``, which reads this attribute and would compile the code of the class."""
        raise ScriptError(f"the forward of {self.kind.__name__}: it computes nothing any more")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return made(self.gives, {**dict(zip(self.takes, args, strict=False)), **kwargs})


def is_erased(module: nn.Module) -> bool:
    """Whether a module no longer computes anything."""
    return isinstance(vars(module).get("forward"), ErasedForward)


def made(recipe: Recipe, given: Mapping[str, Any]) -> Any:
    """Apply a recipe to the arguments of a call."""
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


def resized(recipe: Recipe, shapes: Iterator[Sequence[int]]) -> Recipe:
    """A recipe whose zeros state other sizes.

    Args:
        shapes: For each tensor that :func:`made` makes by ``new_zeros``, in order, its new shape.
    """
    if "items" in recipe:
        return {**recipe, "items": [resized(item, shapes) for item in recipe["items"]]}
    if "zeros" not in recipe or recipe.keys().isdisjoint(("none", "last", "channels")):
        return recipe
    shape = next(shapes)
    if "last" in recipe:
        return {**recipe, "last": shape[-1]}
    return {**recipe, "channels": shape[-len(recipe["window"]) - 1]} if "channels" in recipe else recipe


def convolved(x: Tensor, channels: int, window: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The output shape of a convolution of ``x``, which has shape ``(N, C, *)`` or ``(C, *)``."""
    lead = x.shape[: x.ndim - len(window) - 1]
    sizes = zip(x.shape[x.ndim - len(window) :], window, strict=True)
    return (
        *lead,
        channels,
        *((n + 2 * pad - far * (kernel - 1) - 1) // step + 1 for n, (kernel, step, pad, far) in sizes),
    )
