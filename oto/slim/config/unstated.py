"""Refuse ``save_pretrained`` of a slim model whose config does not state its sizes: no class could load the folder.

``save_pretrained`` of transformers, diffusers and the hub writes the config and the weights, and ``from_pretrained``
builds the class from the config. If a slim model got its sizes in another way, the weights do not fit.
"""

from __future__ import annotations

import os
import re
import warnings
import weakref
from pathlib import Path
from typing import Any

from torch import nn

from oto.errors import EmitterError, UnstatedWarning, some, users_level
from oto.nn.erased import is_erased
from oto.slim.config.recipe import Recipe, shapes_of

_REMEDY = '  to fix  OTO(..., layout="uniform") prunes what a config can state; else load_subnet(out_dir, make_model)'
_OF_SEGMENTS = (
    '  to fix  OTO(..., layout="uniform") lets whole layers go, of which a config states the number; or'
    " construct_subnet(out_dir), then load_subnet(out_dir, make_model)"
)

CHECKPOINT = re.compile(r"checkpoint-\d+")
"""The folder name of a checkpoint of transformers' ``Trainer``, which is loaded into an existing model."""


class Unstated:
    """Replaces ``module.save_pretrained``; ``del module.save_pretrained`` removes it.

    Args:
        module: Held by a weak reference, because a cycle would keep its memory until the next garbage collection.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._kind = weakref.ref(module), type(module).__name__

    def __reduce__(self) -> tuple[Any, ...]:  # a copy of the module gets one of its own
        return Unstated, (self._module(),)

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **keywords: Any) -> Any:
        """Save as the class does, if its config states the sizes.

        A checkpoint of a ``Trainer`` is always written, with an ``UnstatedWarning``.

        Raises:
            EmitterError: The config does not state the sizes; the message names tensors. Nothing is written.
        """
        module: Any = self._module()
        if module is None:
            raise EmitterError(
                f"the slim {self._kind} no longer exists\n  effect  nothing was written\n"
                "  to fix  keep a reference while it is saved: model = subnet.model"
            )
        if Recipe.of(module) is None:
            if CHECKPOINT.fullmatch(Path(save_directory).name) is None:
                raise EmitterError(
                    f"{unlike(module)}\n  effect  nothing was written: from_pretrained would refuse it\n"
                    f"{remedy(module)}"
                )
            warnings.warn(
                f"{unlike(module)}\n  effect  {save_directory} can be resumed from, and from_pretrained refuses it\n"
                f"{remedy(module)}",
                UnstatedWarning,
                stacklevel=users_level(),
            )
        return type(module).save_pretrained(module, save_directory, *args, **keywords)


def refuse_saving(slim: nn.Module, model: nn.Module) -> None:
    """Keep the modules of a slim model from writing folders that their classes cannot load.

    Args:
        model: The model that it was made from; modules that still have its sizes are left alone.
    """
    full = dict(model.named_modules())
    for path, module in slim.named_modules():
        if not callable(getattr(type(module), "save_pretrained", None)) or path not in full:
            continue
        if shapes_of(module) != shapes_of(full[path]) or "save_pretrained" in vars(full[path]):
            vars(module)["save_pretrained"] = Unstated(module)


def nothing_states(model: nn.Module, layout: str | None, made: bool) -> str:
    """The warning if a layout was requested and no config or keyword can state a width.

    Args:
        made: Whether the model's class can be rebuilt from what the model holds.
    """
    kind = type(model).__name__
    why = "the numbers that it is made from are not widths" if made else "nothing that it holds makes its class again"
    return (
        f"layout={layout!r}: no config states the widths of {kind}: {why}\n"
        "  effect  repeated blocks keep equally many of everything, and the slim model is of the class, but no config"
        " and no keywords make one of its sizes\n"
        "  to fix  leave layout out, which is freer; save with construct_subnet(out_dir) and read with"
        " load_subnet(out_dir, make_model), or export (docs/deploy.md)"
    )


def unlike(slim: Any) -> str:
    """How a model differs from the one that its config makes."""
    kind, config = type(slim).__name__, getattr(slim, "config", None)
    if gone := outermost_erased(slim):
        return f"no config of {kind} states what is left out: {some(gone, 3)}"
    if not callable(getattr(config, "to_dict", None)):
        return f"{kind} has sizes that nothing it is made from states"
    plain, own = Recipe(type(slim), config).shapes({}) or {}, shapes_of(slim)
    wrong = [
        f"{name}: {list(own.get(name, ()))}, its config makes it {list(plain.get(name, ()))}"
        for name in {**own, **plain}
        if own.get(name) != plain.get(name)
    ]
    return f"no field of the config of {kind} states its sizes: {some(wrong, 3)}"


def remedy(slim: nn.Module) -> str:
    """What to do instead: only a layout states sizes, and for segments only the removal of whole layers."""
    return _OF_SEGMENTS if outermost_erased(slim) else _REMEDY


def outermost_erased(slim: nn.Module) -> list[str]:
    """The paths of erased modules, without those nested in other erased modules.

    >>> outermost_erased(nn.Sequential(nn.Linear(2, 2)))
    []
    """
    gone = [path for path, module in slim.named_modules() if is_erased(module)]
    return [path for path in gone if not any(path.startswith(f"{other}.") for other in gone)]
