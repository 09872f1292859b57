"""Remove modules that the forward never uses in eval mode, on request."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from oto.errors import EmitterError, first_line, reraise_out_of_memory, some
from oto.groups import Partition
from oto.slim.edits import Edits, slim_copy
from oto.slim.proof.run import run
from oto.slim.proof.train_mode import trained


def unreached(model: nn.Module, partition: Partition) -> list[str]:
    """Paths of the outermost modules whose parameters the forward never reads in eval mode."""
    graph = partition.found.graph
    reached = graph.read
    idle = {name for leaf in graph.leaves if leaf.value not in reached for name in leaf.names}
    found: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        inside = any(path.startswith(f"{outer}.") for outer in found)
        names = [f"{path}.{name}" for name, _ in module.named_parameters(remove_duplicate=False)]
        if path and not inside and names and idle.issuperset(names):
            found.append(path)
    return found


def within(names: Collection[str], paths: Collection[str]) -> list[str]:
    """The names that lie inside any of the modules at ``paths``."""
    return [name for name in names if any(name.startswith(f"{path}.") for path in paths)]


def left_out(
    model: nn.Module, partition: Partition, tensors: Mapping[str, Tensor], edits: Edits, dummy_input: Any
) -> Edits:
    """The slim model's edits with each unused module replaced by ``None``.

    If the forward does not check for ``None``, in train mode or in eval mode, ``nn.Identity`` is used instead.

    Raises:
        EmitterError: The class cannot run without these modules.
    """
    paths = unreached(model, partition)
    if not paths:
        return edits
    gone = set(within(tensors, paths))
    rest = {name: tensor for name, tensor in tensors.items() if name not in gone}
    failures: dict[str, Exception] = {}
    for train in (True, False):  # preferably in both modes
        for kind in ("none", "identity"):
            some_edits = replace(edits, dropped=dict.fromkeys(paths, kind))
            try:
                slim = slim_copy(model, rest, some_edits)
                run(slim, dummy_input)
                if train:
                    trained(slim, dummy_input)
            except Exception as failure:  # a forward may raise anything for a missing module
                reraise_out_of_memory(failure)
                failures[kind] = failure
            else:
                return some_edits
    raise EmitterError(
        f"{type(model).__name__} cannot do without {some(paths)}: {first_line(failures['identity'])}\n"
        "  effect  no slim model of this class was made\n"
        "  to fix  leave drop_unreached out"
    )
