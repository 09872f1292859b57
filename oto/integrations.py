"""Log the progress of pruning, and train after pruning, with the training loops of other libraries.

    from oto.integrations import distill, early_stopping, log_progress, mix, progress_dict, train_family

    log_progress(trainer)                                                     # Hugging Face, before trainer.train()
    self.log_dict(progress_dict(self.optimizers()))                           # lightning, in training_step
    accelerator.log(progress_dict(optimizer), step=step)                      # accelerate
    writer.add_scalars("oto", progress_dict(optimizer, ""), step)             # TensorBoard
    early_stopping(trainer, patience=3)                                       # Hugging Face or lightning
    distill(trainer, Distillation.of(model))                                  # Hugging Face
    mix(trainer, replay(new, old))                                            # Hugging Face or lightning
    train_family(trainer, family)                                             # Hugging Face

These libraries are not imported before they are used.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from oto.distill import Distillation, SoftTargets
from oto.errors import MissingExtraError, NotPrunedWarning, OptionError, some, users_level
from oto.family import Family
from oto.optim import SparseOptimizer
from oto.recovery import Mixture


def progress_dict(optimizer: Any, prefix: str = "oto/") -> dict[str, float]:
    """The progress of pruning as plain numbers.

    Args:
        optimizer: A sparse optimizer, or a wrapper that has one as ``.optimizer``.
        prefix: A prefix of all keys.

    Returns:
        ``sparsity`` (share of pruned zero-invariant groups), ``redundant`` (number of redundant ones), ``done`` (share
        of the pruning steps), ``cost`` and ``goal`` (in the unit of the target).

    Raises:
        OptionError: There is no sparse optimizer.
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
    """Make a ``transformers.Trainer`` log the progress of pruning with its other logs.

    This is done before all other callbacks, so every reporter (TensorBoard, W&B, the progress bar) gets it, and so does
    ``trainer.state.log_history``. Losses and metrics are added to ``optimizer.history``, for the report.

    Raises:
        MissingExtraError: transformers is not installed.
        OptionError: The trainer is not a ``transformers.Trainer``.
    """
    if not hasattr(trainer, "callback_handler"):
        raise OptionError(
            f"a {type(trainer).__name__} is no Trainer of transformers\n  effect  nothing was added to it\n"
            "  to fix  elsewhere log progress_dict(optimizer) yourself, as self.log_dict(...) of lightning does"
        )
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
    """Whether a key in a Trainer's log is the loss or a metric of the evaluation, and not a runtime.

    >>> list(filter(_is_metric, ["loss", "epoch", "eval_loss", "eval_f1", "eval_runtime", "eval_steps_per_second"]))
    ['loss', 'eval_loss', 'eval_f1']
    """
    return key == "loss" or (key.startswith("eval_") and not key.endswith(("runtime", "per_second", "_time")))


def early_stopping(
    trainer: Any, patience: int = 1, threshold: float = 0.0, *, monitor: str | None = None, mode: str = "min"
) -> Any:
    """Stop training when a metric no longer improves, counted from the end of pruning.

    While groups are driven to zero, a metric may get worse for a while, and the best model is one from before pruning,
    which ``load_best_model_at_end`` or a ``ModelCheckpoint`` would restore without any zeros. So until pruning ends,
    patience is not counted, and the best model is reset. Checkpoints are written as usual.

    Args:
        trainer: A ``transformers.Trainer`` whose arguments define the evaluation (``eval_strategy``,
            ``metric_for_best_model``, ``greater_is_better``), or a ``Trainer`` of lightning; before it trains.
        patience: Number of evaluations without improvement after which training stops.
        threshold: The minimum difference that counts as an improvement.
        monitor, mode: The logged metric, and ``"min"`` or ``"max"``; for lightning only.

    Returns:
        The callback, which was added to the trainer.

    Raises:
        OptionError: An argument is invalid; or the trainer is of another library, evaluates nothing, or has another
            callback for early stopping.
    """
    if patience < 1:
        raise OptionError(f"patience is {patience}; it is a number of evaluations, at least 1")
    if hasattr(trainer, "callback_handler"):
        return _stop_trainer(trainer, patience, threshold, monitor)
    package = type(trainer).__module__.partition(".")[0]
    if package in ("lightning", "pytorch_lightning"):
        return _stop_lightning(trainer, package, patience, threshold, monitor, mode)
    raise OptionError(
        f"a {type(trainer).__name__} is no Trainer of transformers or lightning\n  effect  nothing was added to it\n"
        "  to fix  in a loop of your own, ask optimizer.progress.over before you count or keep the best"
    )


def _pruning(*optimizers: Any) -> bool:
    """Whether pruning is still to come or under way; there may be other optimizers besides the sparse one."""
    sparse = [found for one in optimizers if (found := _sparse_in(one)) is not None] or [_unwrapped(optimizers[0])]
    return any(one.choice.target.wants_less and one.clock < one.schedule.end for one in sparse)


def _sparse_in(optimizer: Any) -> SparseOptimizer | None:
    try:
        return _unwrapped(optimizer)
    except OptionError:
        return None


def _warn_if_short(optimizer: Any, steps: float) -> None:
    """Warn if training ends before pruning does.

    Args:
        steps: Number of steps that the optimizer will still take.
    """
    sparse = _sparse_in(optimizer)
    if sparse is None or not sparse.choice.target.wants_less:
        return
    end = sparse.schedule.end
    if sparse.clock + steps < end:
        warnings.warn(
            f"training ends after step {sparse.clock + int(steps):,}, and pruning after step {end:,}\n"
            "  effect  groups are left that never reach zero, and no step is left at which to stop early or to choose"
            " the best model\n"
            "  to fix  train longer (max_steps, epochs), or prune sooner: total_steps= is the number of steps of the"
            " optimizer, pruning_steps= those that prune",
            NotPrunedWarning,
            stacklevel=users_level(),
        )


def _refuse_another(callbacks: Any, remedy: str) -> None:
    kinds = [type(callback).__name__ for callback in callbacks]
    if any("EarlyStopping" in kind for kind in kinds):
        raise OptionError(
            "the trainer stops early by another callback, which counts from the first step\n"
            f"  effect  it would stop while groups go to zero, so nothing was added\n  to fix  {remedy}"
        )


def _stop_trainer(trainer: Any, patience: int, threshold: float, monitor: str | None) -> Any:
    from transformers import EarlyStoppingCallback

    _refuse_another(trainer.callback_handler.callbacks, "trainer.remove_callback(EarlyStoppingCallback) first")
    missing = trainer.args.metric_for_best_model is None
    if monitor is not None or missing or str(getattr(trainer.args.eval_strategy, "value", "")) == "no":
        raise OptionError(
            "the arguments of this Trainer do not say what is evaluated, and what is best\n"
            "  effect  there is nothing to count\n"
            "  to fix  TrainingArguments(eval_strategy='steps', metric_for_best_model='loss', greater_is_better=False,"
            " load_best_model_at_end=True)"
        )

    class AfterPruning(EarlyStoppingCallback):  # type: ignore[misc, unused-ignore]
        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **more: Any) -> None:
            if _pruning(optimizer):
                state.best_metric = state.best_model_checkpoint = state.best_global_step = None

        on_save = on_step_begin  # otherwise a checkpoint from before would be restored if there is no later one

        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **more: Any) -> None:
            # the base class would check the arguments, which were checked when this callback was made
            _warn_if_short(optimizer, state.max_steps - state.global_step)

        def on_evaluate(
            self, args: Any, state: Any, control: Any, metrics: Any = None, optimizer: Any = None, **more: Any
        ) -> None:
            if optimizer is not None and not _pruning(optimizer):
                theirs: Any = super()
                theirs.on_evaluate(args, state, control, metrics, **more)

    trainer.add_callback(made := AfterPruning(patience, threshold))
    return made


def _stop_lightning(trainer: Any, package: str, patience: int, threshold: float, monitor: str | None, mode: str) -> Any:
    _refuse_another(trainer.callbacks, "leave it out of Trainer(callbacks=[...])")
    if monitor is None or mode not in ("min", "max"):
        raise OptionError(
            f"monitor is {monitor!r} and mode {mode!r}\n  effect  there is nothing to count\n"
            "  to fix  monitor= is a metric that is logged, such as 'val_loss', mode= 'min' or 'max'"
        )
    callback: Any = importlib.import_module("lightning.pytorch" if package == "lightning" else package).Callback

    class AfterPruning(callback):  # type: ignore[misc]
        best: float | None = None
        waited = 0

        def state_dict(self) -> dict[str, Any]:
            return {"best": self.best, "waited": self.waited}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.best, self.waited = state_dict["best"], state_dict["waited"]

        def on_train_start(self, trainer: Any, *rest: Any) -> None:
            if len(trainer.optimizers) == 1:  # of several optimizers, each takes a part of the steps
                _warn_if_short(trainer.optimizers[0], trainer.estimated_stepping_batches - trainer.global_step)

        def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
            if _pruning(*trainer.optimizers):
                for checkpoint in trainer.checkpoint_callbacks:
                    if hasattr(checkpoint, "best_k_models"):
                        checkpoint.best_k_models.clear()
                        checkpoint.best_model_score, checkpoint.best_model_path = None, ""

        def on_validation_end(self, trainer: Any, *rest: Any) -> None:
            if trainer.sanity_checking or _pruning(*trainer.optimizers):
                return
            metrics = trainer.callback_metrics
            if monitor not in metrics:
                raise OptionError(
                    f"no metric is called {monitor!r}: {some(metrics) or 'none is logged'}\n"
                    "  effect  nothing is known that could get better\n"
                    "  to fix  self.log('val_loss', ...) in validation_step, and early_stopping(monitor='val_loss')"
                )
            now = float(metrics[monitor])
            better = self.best is None or (self.best - now if mode == "min" else now - self.best) > threshold
            self.best, self.waited = (now, 0) if better else (self.best, self.waited + 1)
            stop = trainer.strategy.reduce_boolean_decision(self.waited >= patience, all=False)
            trainer.should_stop = trainer.should_stop or stop

    trainer.callbacks.insert(0, made := AfterPruning())  # before callbacks that write checkpoints
    return made


# Training after pruning -----------------------------------------------------------------------------------------------


def distill(trainer: Any, distillation: Distillation) -> None:
    """Make a ``transformers.Trainer`` train with distillation; evaluation does not change.

    The task loss is that of the trainer's ``compute_loss``, including custom ones, and the distillation loss is added
    with its weight. If batches are accumulated, each has the same weight in distillation. A distillation without a
    teacher takes its targets from each batch: ``{**sample, **soft_targets(logits, k)._asdict()}``. In lightning no
    such call is needed: ``return distillation(self.model, x, loss)`` in ``training_step``.

    Raises:
        OptionError: The trainer is not a ``transformers.Trainer``.
    """
    if not hasattr(trainer, "compute_loss"):
        raise OptionError(
            f"a {type(trainer).__name__} is no Trainer of transformers\n  effect  nothing was changed in it\n"
            "  to fix  elsewhere the loss is distillation(model, inputs, loss): call it in your own step"
        )
    theirs = trainer.compute_loss

    def compute_loss(
        model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs, targets = _targets_in(inputs) if distillation.teacher is None else (inputs, None)
        if return_outputs or not model.training:  # it evaluates
            return theirs(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        task: Any = None

        def run() -> Any:
            nonlocal task
            task, output = theirs(model, dict(inputs), return_outputs=True, num_items_in_batch=num_items_in_batch)
            return output

        ours, _ = distillation.compare(model, _shown(trainer, inputs), run, targets=targets)
        steps = _accumulated(trainer) if _divided_already(trainer, num_items_in_batch) else 1
        return distillation.combined(task, ours / steps)

    trainer.compute_loss = compute_loss


def _targets_in(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], SoftTargets | None]:
    """A batch without the teacher's targets, and these targets, if it has them."""
    rest = {key: value for key, value in inputs.items() if key not in SoftTargets._fields}
    if len(rest) + len(SoftTargets._fields) > len(inputs):
        return dict(inputs), None
    return rest, SoftTargets(*(inputs[name] for name in SoftTargets._fields))


def _shown(trainer: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs for the teacher: without labels if the trainer computes the loss itself."""
    own = [getattr(trainer, name, None) for name in ("compute_loss_func", "label_smoother")]
    return inputs if own == [None, None] else {key: value for key, value in inputs.items() if key != "labels"}


def _divided_already(trainer: Any, items: Any) -> bool:
    """Whether the trainer does not divide losses by the number of accumulated batches, as they already are."""
    said = getattr(trainer, "loss_is_scaled_for_ga", None)
    if said is not None:
        return bool(said)
    by_model = bool(getattr(trainer, "model_accepts_loss_kwargs", False)) and items is not None
    return by_model or getattr(trainer, "compute_loss_func", None) is not None


def _accumulated(trainer: Any) -> int:
    return int(getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps))


def train_family(trainer: Any, family: Family) -> None:
    """Make a ``transformers.Trainer`` train a family: every batch is run through the full network and members.

    The trainer must have the family's optimizer, ``Trainer(..., optimizers=(family.optimizer, scheduler))``. Losses,
    clipping, accumulation, mixed precision and checkpoints work as usual. It logs and evaluates the full network. In
    lightning no such call is needed: set ``self.automatic_optimization = False``, and in ``training_step`` call
    ``family.backward(...)``, ``self.optimizers().step()`` and ``self.optimizers().zero_grad()``.

    Raises:
        OptionError: The trainer is not a ``transformers.Trainer``, has another optimizer, or shards parameters
            (DeepSpeed, FSDP).
    """
    if not hasattr(trainer, "training_step") or not hasattr(trainer, "accelerator"):
        raise OptionError(
            f"a {type(trainer).__name__} is no Trainer of transformers\n  effect  nothing was changed in it\n"
            "  to fix  elsewhere call family.step(...) in your own loop"
        )
    sharded = getattr(trainer, "is_deepspeed_enabled", False) or getattr(trainer, "is_fsdp_enabled", False)
    held = trainer.optimizer
    if sharded or (held is not family.optimizer and getattr(held, "optimizer", None) is not family.optimizer):
        raise OptionError(
            "the Trainer "
            + ("shards parameters" if sharded else "has another optimizer than the family")
            + "\n  effect  members could not be trained by it; nothing was changed\n"
            "  to fix  without deepspeed and fsdp, Trainer(..., optimizers=(family.optimizer, None))"
        )

    def training_step(model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Any:
        model.train()
        inputs = trainer._prepare_inputs(inputs)
        losses: list[Any] = []

        def forward(net: nn.Module) -> Any:
            with trainer.accelerator.autocast():
                loss, output = trainer.compute_loss(
                    net, dict(inputs), return_outputs=True, num_items_in_batch=num_items_in_batch
                )
            losses.append(loss)
            return output

        many = _accumulated(trainer)
        steps = 1 if _divided_already(trainer, num_items_in_batch) else many
        labels = inputs.get("labels")
        positions = inputs.get("attention_mask") if getattr(labels, "ndim", 0) > 1 else None  # one label a token
        value = family.backward(
            forward, lambda _: losses.pop() / steps, trainer.accelerator.scaler, mask=positions, weight=1 / many
        )
        if trainer.accelerator.sync_gradients:
            family.reduce()
        return value

    trainer.training_step = training_step


def mix(
    trainer: Any,
    mixture: Mixture,
    measure: Callable[[nn.Module], Mapping[str, float]] | None = None,
    reference: Mapping[str, float] | None = None,
    every: int = 0,
) -> None:
    """Draw a trainer's batches from a mixture, whose shares may be updated by the losses of its sources.

    A ``transformers.Trainer`` then draws from the mixture instead of its ``train_dataset``, without removing columns
    that the model does not take. In lightning, pass ``mixture.loader(...)`` to ``fit``; this function only adds the
    update of shares.

    Args:
        trainer: A ``Trainer`` of transformers or lightning, before it trains.
        mixture: The mixture of sources.
        measure: Computes the loss of each source on held-out data, for example
            ``lambda model: source_losses(model, held, loss)``. Without it, the shares do not change.
        reference: The loss that each source should reach.
        every: Number of optimizer steps after which the losses are measured and the shares updated.

    Raises:
        OptionError: The trainer is of another library, or only some of ``measure``, ``reference`` and ``every`` are
            given.
    """
    given = (measure is not None, reference is not None, every > 0)
    if any(given) and not all(given):
        raise OptionError(
            "measure=, reference= and every= belong together\n  effect  the shares would never be updated\n"
            "  to fix  give all of them, or none"
        )

    def update(model: nn.Module, step: int) -> None:
        if measure is not None and reference is not None and step % every == 0:
            mixture.update(measure(model), reference)

    package = type(trainer).__module__.partition(".")[0]
    if hasattr(trainer, "callback_handler"):
        _mix_trainer(trainer, mixture, update)
    elif package in ("lightning", "pytorch_lightning"):
        _update_lightning(trainer, package, update)
    else:
        raise OptionError(
            f"a {type(trainer).__name__} is no Trainer of transformers or lightning\n"
            "  effect  nothing was changed in it\n"
            "  to fix  in a loop of your own, go through mixture.loader(...), and call mixture.update(...)"
        )


def _mix_trainer(trainer: Any, mixture: Mixture, update: Callable[[nn.Module, int], None]) -> None:
    from transformers import TrainerCallback

    def loader() -> Any:
        args = trainer.args
        options = {"num_workers": args.dataloader_num_workers, "pin_memory": args.dataloader_pin_memory}
        made: DataLoader[Any] = mixture.loader(
            args.train_batch_size,
            collate_fn=trainer.data_collator,
            drop_last=args.dataloader_drop_last,
            **options,
        )
        return trainer.accelerator.prepare(made)

    class Update(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
            update(model, state.global_step)

    trainer.get_train_dataloader = loader
    trainer.add_callback(Update())


def _update_lightning(trainer: Any, package: str, update: Callable[[nn.Module, int], None]) -> None:
    callback: Any = importlib.import_module("lightning.pytorch" if package == "lightning" else package).Callback

    class Update(callback):  # type: ignore[misc]
        seen = 0

        def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
            if trainer.global_step != self.seen:  # a step may accumulate several batches
                self.seen = trainer.global_step
                update(module, self.seen)

    trainer.callbacks.append(Update())
