"""Find the modules of a slim model whose pickle needs ``oto`` to be loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from oto.slim.provenance import REMEMBERED


def needs_oto(model: nn.Module) -> list[str]:
    """The modules for which ``torch.load`` of a model saved by ``torch.save`` imports ``oto``, each with the reason.

    Empty for a slim model whose classes are all torch's or the user's own, as for most convolutional networks: it can
    be loaded wherever the full model can.
    """
    return [
        f"{path or 'the model'} ({', '.join(names)})"
        for path, module in model.named_modules()
        if (names := list(_ours(module)))
    ]


def _ours(module: nn.Module) -> Iterator[str]:
    kind = next((kind for kind in type(module).__mro__ if _is_ours(kind)), None)
    if kind is not None:
        yield kind.__name__
    for name, held in vars(module).items():
        if name != REMEMBERED and _is_ours(type(held)):
            yield f"{name}: {type(held).__name__}"


def _is_ours(kind: type[Any]) -> bool:
    return kind.__module__.partition(".")[0] == __name__.partition(".")[0]
