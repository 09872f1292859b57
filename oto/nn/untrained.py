"""Train mode of a slim model that is not known to be right there: it is refused, and says what to do."""

from __future__ import annotations

from torch import nn

from oto.errors import TrainModeError


class Untrained:
    """It takes the place of ``module.train``. Eval mode is as ever; ``del module.train`` takes it out.

    Args:
        why: What is not known, or wrong.
    """

    def __init__(self, module: nn.Module, why: str) -> None:
        self.module, self.why = module, why

    def __call__(self, mode: bool = True) -> nn.Module:
        """Eval mode.

        Raises:
            TrainModeError: Train mode was asked for.
        """
        if mode:
            raise TrainModeError(
                f"the slim {type(self.module).__name__} does not go into train mode: {self.why}\n"
                "  effect  it stays in eval mode; it might fail in train mode, or train on something else\n"
                "  to fix  OTO(..., drop_unreached=True) leaves out what only training uses; or give OTO(...) an"
                " example with which the model runs in train mode too; del model.train allows it all the same"
            )
        return type(self.module).train(self.module, mode)
