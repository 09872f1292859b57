"""Named parameters and a choice of optimizer -> a real ``torch.optim.Optimizer`` whose parameter groups carry names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from oto.errors import UnknownParameterError

Named = Iterable[tuple[str, Tensor]]
Params = Named | Iterable[dict[str, Any]]
"""``model.named_parameters()``, or parameter groups whose ``params`` are named pairs or come with ``param_names``."""

Base = Optimizer | Callable[..., Optimizer]
"""An optimizer, its class, or any function of parameter groups that makes one, such as ``functools.partial``."""

VARIANTS: dict[str, type[Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def build(
    params: Params,
    names: Named | None,
    *,
    variant: str,
    base: Base | None,
    first_momentum: float | None,
    second_momentum: float | None,
    dampening: float | None,
    keywords: dict[str, Any],
) -> Optimizer:
    """The optimizer to wrap. Keywords that are ``None`` are left to the defaults of torch."""
    keywords = {key: value for key, value in keywords.items() if value is not None}
    moments = {"first_momentum": first_momentum, "second_momentum": second_momentum, "dampening": dampening}
    given = [key for key, value in moments.items() if value is not None]

    if base is not None:
        if given:
            raise TypeError(f"{', '.join(given)} belong to variant=; with base= use the keywords of that optimizer")
        if isinstance(base, Optimizer):
            if keywords:
                raise TypeError(f"base is an optimizer already; {', '.join(keywords)} cannot be set any more")
            _name(base.param_groups, _names_of(names if names is not None else params))
            return base
        return base(_groups(params, names), **keywords)

    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; it is one of {', '.join(VARIANTS)}, or pass an optimizer as base=")
    if variant == "sgd":
        if second_momentum is not None:
            raise TypeError("variant 'sgd' has no second_momentum")
        renamed = {"momentum": first_momentum, "dampening": dampening}
        keywords |= {key: value for key, value in renamed.items() if value is not None}
    else:
        if dampening is not None:
            raise TypeError(f"variant {variant!r} has no dampening")
        if first_momentum is not None or second_momentum is not None:
            beta1 = 0.9 if first_momentum is None else first_momentum
            beta2 = 0.999 if second_momentum is None else second_momentum
            keywords["betas"] = (beta1, beta2)
    return VARIANTS[variant](_groups(params, names), **keywords)


def _groups(params: Params, names: Named | None) -> list[dict[str, Any]]:
    """Parameter groups in torch's form, every one with ``param_names``."""
    items: list[Any] = list(params)
    groups = [dict(item) for item in items] if items and isinstance(items[0], dict) else [{"params": items}]
    for group in groups:
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        pairs = [member for member in members if isinstance(member, tuple)]
        if pairs and len(pairs) == len(members):
            group["param_names"] = [name for name, _ in pairs]
            members = [tensor for _, tensor in pairs]
        group["params"] = members
    known = {tensor: name for name, tensor in names} if names is not None else {}
    _name(groups, known)
    return groups


def _names_of(params: Params) -> dict[Tensor, str]:
    """Which tensor has which name; parameter groups may hold named pairs or ``param_names``."""
    found: dict[Tensor, str] = {}
    for item in params:
        if isinstance(item, dict):
            bare = [member for member in item["params"] if isinstance(member, Tensor)]
            found |= {member: name for name, member in zip(item.get("param_names", ()), bare, strict=False)}
            found |= {member[1]: member[0] for member in item["params"] if isinstance(member, tuple)}
        elif isinstance(item, tuple):
            found[item[1]] = item[0]
    return found


def _name(groups: list[dict[str, Any]], known: dict[Tensor, str]) -> None:
    """Write ``param_names`` where they are missing."""
    for group in groups:
        if "param_names" in group:
            continue
        missing = sum(tensor not in known for tensor in group["params"])
        if missing:
            raise UnknownParameterError(
                f"{missing} of {len(group['params'])} parameters of a parameter group have no name, so node groups "
                "cannot be found in it\n"
                "  to fix  pass model.named_parameters(), or names=model.named_parameters() next to your groups"
            )
        group["param_names"] = [known[tensor] for tensor in group["params"]]
