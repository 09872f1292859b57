"""Make the optimizer to wrap, with named parameters in its groups.

build(model.named_parameters(), {"variant": "sgd", "lr": 0.1, "first_momentum": 0.9})   # a torch.optim.SGD
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from oto.errors import OptionError, UnknownParameterError, UntrainedWarning, items_of, some, users_level

Named = Iterable[tuple[str, Tensor]]
Params = Named | Iterable[dict[str, Any]]
"""``model.named_parameters()``, or parameter groups whose ``params`` are named pairs or come with ``param_names``."""

Base = Optimizer | Callable[..., Optimizer]
"""An optimizer, its class, or any function that makes one from parameter groups, such as ``functools.partial``."""

VARIANTS: dict[str, type[Optimizer]] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
}
"""Every optimizer of ``torch.optim`` by its name in lower case."""

REFUSED = {
    "lbfgs": "it evaluates the loss several times in a step, and its history mixes all entries",
    "sparseadam": "it takes sparse gradients only, and saliency needs every entry",
}


def build(params: Params, options: Mapping[str, Any]) -> Optimizer:
    """Make the optimizer to wrap. Keywords that are ``None`` have the optimizer's default.

    Args:
        options: ``names``, ``variant``, ``base``, ``base_options``, and keywords of the optimizer.

    Raises:
        OptionError: An option is missing, given twice, or not known to the optimizer; or the optimizer cannot prune.
        UnknownParameterError: A parameter has no name.
    """
    keywords = {key: value for key, value in options.items() if value is not None}
    names, variant, base, own = (keywords.pop(key, None) for key in ("names", "variant", "base", "base_options"))
    given = {key: keywords.pop(key) for key in MOMENTS if key in keywords}
    if twice := keywords.keys() & (own or {}).keys():
        raise OptionError(
            f"{some(sorted(twice))} {'is' if len(twice) == 1 else 'are'} given twice: in base_options, and beside it\n"
            "  effect  nothing was made\n  to fix  leave one of them out"
        )
    keywords |= own or {}
    if base is not None:
        return _sound(_of_base(base, params, names, given, keywords))
    variant = "sgd" if variant is None else variant
    kind = _variant(variant)
    takes = inspect.signature(kind).parameters
    keywords |= _translated(given, takes)
    unknown = [key for key in keywords if key not in takes]
    if unknown:
        raise OptionError(
            f"variant {variant!r} has no {', '.join(unknown)}\n"
            f"  to fix  leave it out; torch.optim.{kind.__name__} takes {', '.join(list(takes)[1:])}"
        )
    groups = _groups(params, names)
    if kind is torch.optim.SGD and "lr" not in keywords and any("lr" not in group for group in groups):
        raise OptionError(
            "lr is missing: SGD has no learning rate that suits every model\n"
            "  to fix  give lr=, such as lr=0.1 for a network with norms that is trained from scratch, or one per group"
        )
    return kind(groups, **keywords)


MOMENTS = ("first_momentum", "second_momentum", "dampening")
"""Options that have different names in different optimizers."""


def _of_base(
    base: Base, params: Params, names: Named | None, moments: Mapping[str, Any], keywords: Mapping[str, Any]
) -> Optimizer:
    """The optimizer ``base``, or the one that it makes."""
    if moments:
        raise OptionError(f"{', '.join(moments)} belong to variant=; with base= use the keywords of that optimizer")
    if not (isinstance(base, Optimizer) or callable(base)):
        raise OptionError(
            f"base is {base!r}, no optimizer, nor what makes one\n  effect  nothing was made\n"
            "  to fix  a class of optimizers, a function of parameter groups, or an optimizer"
        )
    if not isinstance(base, Optimizer):
        return base(_groups(params, names), **keywords)
    if keywords:
        raise OptionError(f"base is an optimizer already; {', '.join(keywords)} cannot be set any more")
    _name(base.param_groups, _names_of(names if names is not None else params))
    return base


def keeps_own_state(base: Optimizer) -> bool:
    """Whether an optimizer overrides ``state_dict()``, because some of its state is not in ``.state``."""
    return type(base).state_dict is not Optimizer.state_dict or "state_dict" in vars(base)


_OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}


def foreign_options(base: Optimizer, saved: Mapping[str, Any]) -> list[str]:
    """Unknown options in a saved parameter group, if it belongs to another optimizer; else an empty list.

    It does if it has unknown options and lacks some of this optimizer's. A group that only lacks options, or only has
    more, may be from another version of the same class.
    """
    known = {
        *_OF_SCHEDULERS,
        "params",
        "param_names",
        *base.defaults,
        *(key for own in base.param_groups for key in own),
    }
    foreign = sorted(key for key in saved if key not in known and not key.startswith("oto_"))
    return foreign if base.defaults.keys() - saved.keys() else []


def inside(base: Optimizer) -> dict[str, Optimizer]:
    """The optimizers in attributes of an optimizer, by attribute name."""
    return {name: held for name, held in vars(base).items() if isinstance(held, Optimizer)}


def _sound(base: Optimizer) -> Optimizer:
    """Check that an object is a torch optimizer that can be wrapped, and warn about state that checkpoints would lack.

    Raises:
        OptionError: It lacks attributes that every torch optimizer has, or is one that cannot prune.
    """
    kind = type(base).__name__
    why = next((REFUSED[name] for k in type(base).__mro__ if (name := k.__name__.lower()) in REFUSED), None)
    if why is not None:
        raise OptionError(
            f"base is a {kind}: {why}\n"
            "  effect  what was brought to zero would not stay zero\n"
            "  to fix  use another optimizer, such as torch.optim.AdamW, or variant="
        )
    missing = [name for name in ("param_groups", "state", "defaults") if not hasattr(base, name)]
    if missing:
        raise OptionError(
            f"base is a {kind}, which has no {', '.join(missing)}\n"
            "  effect  it cannot be stepped, saved and resumed as a torch optimizer\n"
            "  to fix  pass the optimizer that it wraps, or call Optimizer.__init__ in it"
        )
    lost = [name for name, held in inside(base).items() if held.state is not base.state]
    if lost and not keeps_own_state(base):
        warnings.warn(
            f"{kind} steps another optimizer, its {', '.join(lost)}, whose state its state_dict() does not hold\n"
            "  effect  a run that is resumed from a checkpoint starts without it\n"
            f"  to fix  give {kind} a state_dict() and a load_state_dict(), or pass the inner optimizer",
            UntrainedWarning,
            stacklevel=users_level(),
        )
    return base


def _variant(name: str) -> type[Optimizer]:
    """The optimizer of ``torch.optim`` of this name.

    Raises:
        OptionError: There is none, or it cannot prune.
    """
    kind = VARIANTS.get(name.lower())
    why = "torch.optim has none of that name" if kind is None else REFUSED.get(name.lower())
    if kind is not None and why is None:
        return kind
    usable = sorted(kind.__name__ for key, kind in VARIANTS.items() if key not in REFUSED)
    raise OptionError(
        f"variant is {name!r}: {why}\n  to fix  use one of {', '.join(usable)}, or pass an optimizer as base="
    )


def _translated(given: dict[str, float], takes: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """The moments under the names that the optimizer uses; those that it does not know keep our names."""
    own: dict[str, Any] = dict(given)
    if "betas" in takes and own.keys() & {"first_momentum", "second_momentum"}:
        first, second = takes["betas"].default
        own["betas"] = (own.pop("first_momentum", first), own.pop("second_momentum", second))
    elif "momentum" in takes and "first_momentum" in own:
        own["momentum"] = own.pop("first_momentum")
    return own


def _groups(params: Params, names: Named | None) -> list[dict[str, Any]]:
    """Parameter groups in torch's form, each with ``param_names``."""
    items = items_of("params", params)
    groups = [dict(item) for item in items] if items and isinstance(items[0], dict) else [{"params": items}]
    for number, group in enumerate(groups):
        if "params" not in group:
            raise OptionError(
                f"parameter group {number} has no 'params': {some(map(str, group))}\n  effect  nothing was made\n"
                "  to fix  {'params': [...], 'lr': ...} for each group, as torch has it"
            )
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
    """The name of each tensor; parameter groups may hold named pairs or ``param_names``."""
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
    """Add ``param_names`` to groups without them.

    Raises:
        UnknownParameterError: A parameter has no known name.
    """
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
