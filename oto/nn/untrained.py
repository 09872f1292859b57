"""Refuse train mode for a slim model that is not known to be correct in train mode."""

from __future__ import annotations

from torch import nn

from oto.errors import TrainModeError


class Untrained:
    """Replaces ``module.train``. Eval mode works as usual; ``del module.train`` removes it.

    Args:
        why: What is unknown or wrong in train mode.
    """

    def __init__(self, module: nn.Module, why: str) -> None:
        self.module, self.why = module, why

    def __call__(self, mode: bool = True) -> nn.Module:
        """Set eval mode.

        Raises:
            TrainModeError: Train mode was requested.
        """
        if mode:
            raise TrainModeError(
                f"the slim {type(self.module).__name__} does not go into train mode: {self.why}\n"
                "  effect  it stays in eval mode; it might fail in train mode, or train on something else\n"
                "  to fix  OTO(..., drop_unreached=True) leaves out what only training uses; or pass OTO(...) an"
                " example with which the model runs in train mode too; del model.train allows it anyway"
            )
        return type(self.module).train(self.module, mode)
