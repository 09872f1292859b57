"""Wrap a torch optimizer, which makes the updates. Both share parameter groups, state and defaults.

So learning-rate schedulers, checkpoints, ``foreach``, ``fused`` and the like work as with the wrapped optimizer::

    optimizer = oto.hesso(variant="adamw", lr=1e-3, target_macs=0.5)
    optimizer.base   # a torch.optim.AdamW
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from oto.optim.refusals import any_entry_of
from oto.optim.wrapped import Params, build


class Wrapper(Optimizer):
    """An optimizer whose update is that of another one, its ``base``.

    Args:
        params: As in :class:`oto.optim.SparseOptimizer`.
        options: How to make the wrapped optimizer, see :class:`oto.optim.options.BaseOptions`.
    """

    def __init__(self, params: Params, options: Mapping[str, Any]) -> None:
        self.base = build(params, options)
        super().__init__(self.base.param_groups, self.base.defaults)
        self._share_base()

    def parameters(self) -> dict[str, Tensor]:
        """The current parameters in ``param_groups``, by name."""
        return {n: p for group in self.param_groups for n, p in zip(group["param_names"], group["params"], strict=True)}

    def descend(self) -> None:
        """Let the wrapped optimizer make its update."""
        if self.base.param_groups is not self.param_groups:
            self.base.param_groups = self.param_groups
        if self.base.state is not self.state:
            self.base.state = self.state
        self.base.step()

    def is_probe(self) -> bool:
        """Whether this step only fills empty state, with zero gradients and a zero learning rate.

        ``torch.distributed.checkpoint`` takes such a step when it saves or loads an optimizer without state. It must
        not count as a step.
        """
        if self.state:
            return False
        for group in self.param_groups:
            lr = group.get("lr", 1.0)
            if (isinstance(lr, Tensor) and lr.device.type != "cpu") or lr != 0:  # reading lr must not synchronize
                return False
        return not any_entry_of(p.grad for group in self.param_groups for p in group["params"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters that belong to no node group, such as adapters or unfrozen layers; names are optional."""
        if any(param_group is group for group in self.base.param_groups):  # from Optimizer.__init__
            self.param_groups.append(param_group)
            return
        members = param_group["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        named = "param_names" in param_group or any(isinstance(member, tuple) for member in members)
        if not named:
            count = sum(len(group["params"]) for group in self.param_groups)
            param_group["param_names"] = [f"added.{count + i}" for i in range(len(members))]
        param_group["params"] = members
        self.base.add_param_group(param_group)
        self._share_base()
        self._renew()

    def train(self, mode: bool = True) -> None:
        """Set the mode of wrapped optimizers that have two modes, such as schedule-free ones."""
        switch = getattr(self.base, "train" if mode else "eval", None)
        if switch is not None:
            switch()

    def eval(self) -> None:
        """As ``train(False)``."""
        self.train(False)

    def consolidate_state_dict(self, *args: Any, **keywords: Any) -> None:
        """Call the method of wrapped optimizers that shard their state (``ZeroRedundancyOptimizer``).

        Call it before ``state_dict()``, as with these.
        """
        gather = getattr(self.base, "consolidate_state_dict", None)
        if gather is not None:
            gather(*args, **keywords)

    def _share_base(self) -> None:
        self.param_groups, self.state, self.defaults = self.base.param_groups, self.base.state, self.base.defaults

    def _renew(self) -> None:
        """Discard values derived from parameters or atoms, after these were replaced."""
