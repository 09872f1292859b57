"""The steps of a family: which members run on a batch, what they learn from, and how their losses are weighted.

After the ranking is frozen, each step runs the full network, the smallest member, and a chosen number of members in
between, all on the same batch (the *sandwich rule* of Yu and Huang, arXiv 1903.05134). The full network learns from the
labels, and the members from its outputs (*in-place distillation*), as in DεpS (ECCV 2024). The *ramp* is also from
DεpS: the weight of the members' losses rises from zero to one, so that the full network is not disturbed when they
join.

Example: with ``networks=4`` and members 1 to 5, a step may run the full network and members 2, 3 and 5.

Where we differ from DεpS: the members are drawn by the number of the step, so that a resumed run draws the same ones;
and their gradients are summed, while DεpS averages them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from oto._torch import tree_map_only
from oto.distill import divergence, logits_of
from oto.errors import OptionError
from oto.optim.schedule import Schedule, Steps

FREEZE, RAMP = 0.45, 0.05
"""When the ranking is frozen, and how long the weight of the members rises: shares of all steps."""


@dataclass(frozen=True)
class Sandwich:
    """How members are trained.

    Attributes:
        freeze: The step at which the ranking is frozen.
        ramp: Number of steps over which the weight of the members rises from zero to one.
        networks: Number of networks in each step after that, including the full one and the smallest member.
        distillation: ``True``: members learn from the full network's output; ``False``: from the task loss; or a
            function that computes a member's loss from its output and the full network's.
        temperature: The number by which logits are divided before the softmax.
        class_dim: The dimension of the classes in the logits.
        seed: Seed for the draw of the members between.
    """

    freeze: int
    ramp: int
    networks: int = 4
    distillation: bool | Callable[[Any, Any], Tensor] = True
    temperature: float = 1.0
    class_dim: int = -1
    seed: int = 0

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> tuple[Sandwich, Schedule]:
        """Read the options of :meth:`oto.OTO.family` that define the schedule and the training of members.

        Raises:
            OptionError: An option is invalid.
            TargetError: A share of the steps is given without ``total_steps``, or a step lies beyond ``total_steps``.
        """
        total = options.get("total_steps")
        schedule = Schedule.of(options.get("freeze_step", FREEZE), 1, 1, total)
        ramp: Steps = options.get("ramp_steps", RAMP)
        rising = Schedule.of(ramp, 1, 1, total).start
        made = cls(
            schedule.start,
            rising,
            options.get("networks_per_step", 4),
            options.get("distillation", True),
            options.get("temperature", 1.0),
            options.get("class_dim", -1),
            options.get("seed", 0),
        )
        if type(made.networks) is not int or made.networks < 2:
            raise OptionError(
                f"networks_per_step is {made.networks!r}; it counts the full network and the smallest member, so it is"
                " at least 2"
            )
        if not (isinstance(made.distillation, bool) or callable(made.distillation)):
            raise OptionError(
                f"distillation is {made.distillation!r}; it is True, False, or a function of a member's output and what"
                " the full network gave"
            )
        if type(made.seed) is not int or made.seed < 0:
            raise OptionError(f"seed is {made.seed!r}; it is an int, at least 0")
        if not made.temperature > 0:
            raise OptionError(f"temperature is {made.temperature!r}; logits are divided by it, so it is above 0")
        return made, schedule

    def describe(self) -> dict[str, Any]:
        """The options as plain values, to be compared with those in a checkpoint."""
        taught = self.distillation if isinstance(self.distillation, bool) else "a function"
        unusual = {} if self.class_dim == -1 else {"class_dim": self.class_dim}  # which older checkpoints do not name
        return {
            "ramp_steps": self.ramp,
            "networks_per_step": self.networks,
            "distillation": taught,
            "temperature": self.temperature,
            "seed": self.seed,
            **unusual,
        }

    def weight(self, step: int) -> float:
        """The weight of the members' losses at a step.

        >>> [Sandwich(freeze=10, ramp=4).weight(step) for step in (10, 11, 13, 14, 20)]
        [0.0, 0.25, 0.75, 1.0, 1.0]
        """
        return min(1.0, max(0.0, (step - self.freeze) / max(self.ramp, 1)))

    def drawn(self, step: int, members: int) -> list[int]:
        """The members that run at a step besides the full network; 0 is the largest of them.

        >>> Sandwich(10, 4, networks=2).drawn(11, 3), Sandwich(10, 4, networks=4).drawn(11, 3)
        ([2], [0, 1, 2])
        """
        between = min(self.networks - 2, members - 1)
        draw = np.random.default_rng([self.seed, step])
        return [*sorted(draw.choice(members - 1, between, replace=False).tolist()), members - 1]

    def taught(self, output: Any) -> Any:
        """What members learn from the full network's output, detached; ``None`` if they learn from the task."""
        if callable(self.distillation):
            return _detached(output)
        return logits_of(output).detach() if self.distillation else None

    def loss(self, output: Any, taught: Any, task: Callable[[Any], Tensor], mask: Tensor | None) -> Tensor:
        """The loss of a member.

        Args:
            output: The member's output.
            taught: The result of :meth:`taught`.
            task: The loss of the full network.
            mask: Which positions count, with the shape of the logits without the class dimension; all by default.
        """
        if callable(self.distillation):
            return self.distillation(output, taught)
        if not self.distillation:
            return task(output)
        logits = logits_of(output)
        if logits.shape != taught.shape:
            raise OptionError(
                f"a member gives logits of the shape {list(logits.shape)}, the full network {list(taught.shape)}\n"
                "  effect  they cannot be compared\n"
                "  to fix  distillation=False, or a function of both outputs that gives the loss"
            )
        far = divergence(logits.movedim(self.class_dim, -1), taught.movedim(self.class_dim, -1), self.temperature)
        if mask is None:
            return far.mean()
        weight = mask.to(far.dtype).expand_as(far)
        return (far * weight).sum() / weight.sum().clamp_min(1)


def _detached(output: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, output)


# Several processes ---------------------------------------------------------------------------------------------------


def processes() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def share_from_first_(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with those of the first process, as ``DistributedDataParallel`` does."""
    for tensor in tensors if processes() > 1 else ():
        dist.broadcast(tensor, 0)


@torch.no_grad()
def average_gradients_(parameters: Iterable[Tensor]) -> None:
    """Average gradients over all processes; a process without a gradient for a parameter counts as zero."""
    if processes() == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        return
    there = torch.tensor([p.grad is not None for p in trained], dtype=torch.uint8, device=trained[0].device)
    dist.all_reduce(there, dist.ReduceOp.MAX)
    for p, has in zip(trained, there.tolist(), strict=True):
        if has:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
            p.grad.div_(processes())
