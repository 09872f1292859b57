"""The steps of a family: which of its members run on a batch, what they learn from, and how much they count.

After the ranking is frozen, every step runs the full network, the smallest member and, between them, as many others as
asked for, all on the same batch (the *sandwich rule* of Yu and Huang, arXiv 1903.05134). The full network learns from
the labels, the others from what it says (*in-place distillation*), as in DεpS (ECCV 2024), from which the *ramp* is
too: what the members count rises from zero to one, so that the full network is not thrown off when they join.

Here, other than in DεpS: which members run is drawn by the number of the step, so that a run that is resumed draws the
same; and the members' gradients are summed, not averaged, as there.
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
"""When the ranking is frozen, and over how many steps what members count rises: shares of all steps."""


@dataclass(frozen=True)
class Sandwich:
    """How members are trained.

    Attributes:
        freeze: Step at which the ranking is frozen.
        ramp: Over how many steps what the members count rises from zero to one.
        networks: How many networks run in each step after that, the full one and the smallest member among them.
        distillation: Whether members learn from what the full network says, or from the task's loss; or a function of
            the output of a member and of the full network's that gives the loss.
        temperature: What logits are divided by before the softmax.
        class_dim: The dimension of the classes in the logits.
        seed: Of the draw of the members between.
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
        """Read the options of :meth:`oto.OTO.family` that say when and how.

        Raises:
            OptionError: One of them means nothing.
            TargetError: A share comes without ``total_steps``, or a step lies beyond it.
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
        if not made.temperature > 0:
            raise OptionError(f"temperature is {made.temperature!r}; logits are divided by it, so it is above 0")
        return made, schedule

    def describe(self) -> dict[str, Any]:
        """As plain values, for a checkpoint to be compared by."""
        taught = self.distillation if isinstance(self.distillation, bool) else "a function"
        return {
            "ramp_steps": self.ramp,
            "networks_per_step": self.networks,
            "distillation": taught,
            "temperature": self.temperature,
            "seed": self.seed,
        }

    def weight(self, step: int) -> float:
        """What the members' losses are multiplied with at a step.

        >>> [Sandwich(freeze=10, ramp=4).weight(step) for step in (10, 11, 13, 14, 20)]
        [0.0, 0.25, 0.75, 1.0, 1.0]
        """
        return min(1.0, max(0.0, (step - self.freeze) / max(self.ramp, 1)))

    def drawn(self, step: int, members: int) -> list[int]:
        """The members that run at a step besides the full network, 0 being the largest of them.

        >>> Sandwich(10, 4, networks=2).drawn(11, 3), Sandwich(10, 4, networks=4).drawn(11, 3)
        ([2], [0, 1, 2])
        """
        between = min(self.networks - 2, members - 1)
        draw = np.random.default_rng([self.seed, step])
        return [*sorted(draw.choice(members - 1, between, replace=False).tolist()), members - 1]

    def taught(self, output: Any) -> Any:
        """What members are to learn of the full network's output, without its history."""
        if callable(self.distillation):
            return _detached(output)
        return logits_of(output).detach() if self.distillation else None

    def loss(self, output: Any, taught: Any, task: Callable[[Any], Tensor], mask: Tensor | None) -> Tensor:
        """The loss of a member.

        Args:
            output: Its output.
            taught: What :meth:`taught` gave.
            task: The loss of the largest.
            mask: Which positions count, of the shape of the logits without their classes; all by default.
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
    """How many train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def share_from_first_(tensors: Iterable[Tensor]) -> None:
    """Take the values that the first process has, as ``DistributedDataParallel`` does."""
    for tensor in tensors if processes() > 1 else ():
        dist.broadcast(tensor, 0)


@torch.no_grad()
def average_gradients_(parameters: Iterable[Tensor]) -> None:
    """Average gradients over all processes; a parameter that has one in some of them counts as zero in the others."""
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
