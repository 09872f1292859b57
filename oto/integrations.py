"""``optimizer.progress`` where training is logged, in one line each.

    from oto.integrations import log_progress, progress_dict

    log_progress(trainer)                                                     # Hugging Face, before trainer.train()
    self.log_dict(progress_dict(self.optimizers()))                           # lightning, in training_step
    accelerator.log(progress_dict(optimizer), step=step)                      # accelerate
    writer.add_scalars("oto", progress_dict(optimizer, ""), step)             # TensorBoard

Nothing of these libraries is imported here before it is used.
"""

from __future__ import annotations

from typing import Any

from oto.errors import MissingExtraError, OptionError
from oto.optim import SparseOptimizer


def progress_dict(optimizer: Any, prefix: str = "oto/") -> dict[str, float]:
    """The progress of pruning as plain numbers.

    Args:
        optimizer: A sparse optimizer, or what wraps one and has it as ``.optimizer``.

    Returns:
        ``sparsity`` (share of zero-invariant groups at zero for good), ``redundant`` (how many are on their way),
        ``done`` (share of the pruning steps), ``cost`` and ``goal`` (in the unit of the target).

    Raises:
        OptionError: There is no sparse optimizer in it.
    """
    p = _unwrapped(optimizer).progress
    found = {"sparsity": p.sparsity, "redundant": p.redundant, "done": p.done, "cost": p.cost, "goal": p.goal}
    return {prefix + key: float(value) for key, value in found.items()}


def _unwrapped(optimizer: Any) -> SparseOptimizer:
    inner, seen = optimizer, 0
    while not isinstance(inner, SparseOptimizer) and hasattr(inner, "optimizer") and seen < 10:
        inner, seen = inner.optimizer, seen + 1
    if not isinstance(inner, SparseOptimizer):
        raise OptionError(
            f"a {type(optimizer).__name__} holds no optimizer of oto\n"
            "  to fix  pass what oto.hesso(...) made, or a wrapper that has it as .optimizer"
        )
    return inner


def log_progress(trainer: Any) -> None:
    """Let a ``transformers.Trainer`` log the progress of pruning with whatever else it logs.

    It comes before all other callbacks, so every reporter (TensorBoard, W&B, the progress bar) sees it, and so does
    ``trainer.state.log_history``. The losses and metrics go into ``optimizer.history``, for the report.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as failure:
        raise MissingExtraError("transformers is not installed\n  to fix  pip install 'oto[hf]'") from failure

    class ProgressLog(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **more: Any
        ) -> None:
            if logs is not None and optimizer is not None:
                _unwrapped(optimizer).record(**{key: logs[key] for key in filter(_is_metric, logs)})
                found = progress_dict(optimizer)
                logs.update(found)
                state.log_history[-1].update(found)

    trainer.callback_handler.callbacks.insert(0, ProgressLog())


def _is_metric(key: str) -> bool:
    """Of what a Trainer logs: its loss, and what evaluation found, but not how fast.

    >>> list(filter(_is_metric, ["loss", "epoch", "eval_loss", "eval_f1", "eval_runtime", "eval_steps_per_second"]))
    ['loss', 'eval_loss', 'eval_f1']
    """
    return key == "loss" or (key.startswith("eval_") and not key.endswith(("runtime", "per_second", "_time")))
