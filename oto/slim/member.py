"""A member of a family: a slim model of the model's own class that reads its parameters from the full model's.

The member's module has no parameters of its own, only buffers, such as the statistics of its batch norms. For forward
and backward, the kept entries of the full parameters are selected (``index_select`` along every dimension that gets
thinner) and passed to :func:`torch.func.functional_call`; gradients flow back into the full parameters.

Example: member ``K = {0, 2}`` of a layer of four units computes with ``weight[[0, 2]]``, and the gradient of rows 1 and
3 is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from oto.errors import ShrinkError
from oto.groups import Kept, NodeGroup, Partition
from oto.slim.edits import Edits, module_at, slim_copy, tensors_of
from oto.slim.pruned_shapes import parameter_like, pruned_shapes
from oto.slim.shrink import shrunk
from oto.slim.source import Source

Result = TypeVar("Result")


class _Held(nn.Module):
    """Runs a function on a module, so that the swapped parameters stay in place until it returns.

    That includes a backward, which may run parts of the forward again (gradient checkpointing).
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, work: Callable[[nn.Module], Any]) -> Any:
        return work(self.net)


@dataclass(frozen=True, eq=False)
class Member:
    """A slim model without parameters of its own.

    Attributes:
        net: The module, of the model's class. Its parameters are on ``meta``; its buffers are its own.
        entries: For each parameter of the full model and each dimension that gets thinner, the kept entries.
        kept: For each prunable group, the atoms that it keeps.
    """

    net: nn.Module
    entries: Mapping[str, Sequence[tuple[int, Tensor]]]
    kept: Kept

    @classmethod
    def of(cls, source: Source) -> Member:
        """Build the member that a source describes; its model is a zeroed copy of the full one.

        The member is proved to compute what the zeroed full model does, in eval mode and in train mode.

        Raises:
            ShrinkError: The class cannot express the member.
            VerificationError: The member computes something else.
        """
        made = shrunk(source)
        device = next(source.model.parameters()).device
        entries = {
            name: [(dim, torch.from_numpy(own).to(device)) for dim, own in enumerate(dims) if own is not None]
            for name, dims in made.parameters.items()
        }
        _empty_(made.model)
        return cls(made.model, entries, source.kept)

    def read(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The member's parameters, selected from the full ones, by name; parameters that stay whole are not copied."""
        found: dict[str, Tensor] = {}
        for name, dims in self.entries.items():
            tensor = parameters[name]
            for dim, own in dims:
                tensor = tensor.index_select(dim, own)
            found[name] = tensor
        return found

    def run(self, parameters: Mapping[str, Tensor], work: Callable[[nn.Module], Result]) -> Result:
        """Call ``work`` on the member's module while it has its parameters, and return the result.

        Args:
            parameters: The parameters of the full model, by name.
            work: Runs the module and, in training, also calls ``backward``.
        """
        tensors = {f"net.{name}": tensor for name, tensor in self.read(parameters).items()}
        made: Result = functional_call(_Held(self.net), tensors, (work,))
        return made

    def follow(self, model: nn.Module) -> None:
        """Copy the train or eval mode of every module of the full model, such as a frozen batch norm's."""
        modes = {path: module.training for path, module in model.named_modules(remove_duplicate=False)}
        for path, module in self.net.named_modules(remove_duplicate=False):
            module.training = modes.get(path, module.training)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The persistent buffers: the tensors themselves, not copies."""
        saved = self.net.state_dict(keep_vars=True).keys()
        return {name: buffer for name, buffer in self.net.named_buffers() if name in saved}

    @torch.no_grad()
    def put_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Load the values of buffers, for example from a checkpoint.

        Raises:
            ShrinkError: The buffers belong to another member.
        """
        own = self.buffers
        wrong = [name for name, b in own.items() if name not in buffers or buffers[name].shape != b.shape]
        if wrong:
            raise ShrinkError(
                f"the checkpoint has no buffer {wrong[0]} of the shape {list(own[wrong[0]].shape)} for a member\n"
                "  effect  its statistics would be wrong, so nothing was loaded\n"
                "  to fix  load a checkpoint of a family of this model"
            )
        for name, buffer in own.items():
            buffer.copy_(buffers[name])


def _empty_(net: nn.Module) -> None:
    """Drop the values of all parameters; ties are kept."""
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(net.named_parameters(remove_duplicate=False)):
        if id(parameter) not in made:
            empty = torch.empty_like(parameter.detach(), device="meta")
            made[id(parameter)] = parameter_like(parameter, empty)
        path, _, last = name.rpartition(".")
        setattr(module_at(net, path), last, made[id(parameter)])


@torch.no_grad()
def masked(
    model: nn.Module,
    partition: Partition,
    groups: Sequence[NodeGroup],
    kept: Kept,
    like: Member | None = None,
) -> nn.Module:
    """A copy of a model in which all atoms except those in ``kept`` are zero.

    Args:
        like: A member whose buffers (statistics of norms) the copy takes over, at the entries that the member keeps.
    """
    made: dict[int, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in tensors_of(model, partition).items():
        tensors[name] = made.setdefault(id(tensor), tensor.detach().clone())
    for group in groups:
        if group.name in kept:
            gone = np.setdiff1d(np.arange(group.size), kept[group.name])
            group.zero_(tensors, torch.from_numpy(gone))
    if like is not None:
        buffers, pruned = like.buffers, pruned_shapes(partition, like.kept)
        for leaf in partition.found.graph.leaves:
            for name in leaf.names if leaf.kind != "parameter" else ():
                if name in buffers:
                    _scatter_(tensors[name], buffers[name], pruned.entries(leaf))
    return slim_copy(model, tensors, Edits())


def _scatter_(full: Tensor, own: Tensor, entries: Sequence[NDArray[np.bool_]]) -> None:
    """Write a slim tensor to the kept entries of a full one."""
    if own.ndim == 0:
        full.copy_(own)
        return
    indices = [torch.from_numpy(np.flatnonzero(mask)).to(full.device) for mask in entries]
    full[torch.meshgrid(*indices, indexing="ij")] = own.to(full)
