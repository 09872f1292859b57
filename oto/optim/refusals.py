"""Checks that sparse optimizers make before they continue; each message states the place, effect and remedy."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from oto.errors import (
    ModelChangedError,
    NoGradientError,
    NoGradientWarning,
    NonFiniteParameterError,
    OptionError,
    OTOError,
    UnknownParameterError,
    some,
    users_level,
)
from oto.groups.node_group import NodeGroup, is_finite
from oto.optim.saliency import Entries, Saliency, any_gradient, indistinct, name_of
from oto.shards import added_up, any_sharded, local


def require_parameters(groups: Iterable[NodeGroup], parameters: Mapping[str, Tensor]) -> None:
    """Check that an optimizer has all parameters of the node groups, and that all its parameters are finite.

    Raises:
        UnknownParameterError: A prunable node group names a parameter that is missing.
        NonFiniteParameterError: A parameter holds NaN or infinity.
    """
    for group in groups:
        missing = [piece.parameter for piece in group.zeros if piece.parameter not in parameters]
        if missing:
            raise UnknownParameterError(
                f"node group {group.name} needs {some(missing)}, which the optimizer was not given\n"
                "  effect  its entries cannot be brought to zero\n"
                "  to fix  pass every parameter, frozen ones too, or mark the group unprunable"
            )
    real = [name for name, p in parameters.items() if not p.is_meta]
    finite = [is_finite(local(parameters[name])) for name in real]
    if any_sharded(parameters.values()):
        finite = list(added_up([parameters[name] for name in real], [~own for own in finite]) == 0)
    bad = [name for name, ok in zip(real, finite, strict=True) if not ok]
    if bad:
        raise NonFiniteParameterError(
            f"NaN or infinity in {some(bad)}\n"
            "  effect  no zero of the model could be trusted\n"
            "  to fix  load sound weights before making the optimizer"
        )


def require_own_state(state: Mapping[Any, Any], parameters: Mapping[str, Tensor], kind: str) -> None:
    """Check that an optimizer has no state of tensors that are no longer its parameters.

    This happens if the state is filled before accelerate shards the model (``fsdp_version: 2``), which replaces the
    parameters in ``param_groups``.

    Args:
        kind: The class name of the wrapped optimizer.

    Raises:
        ModelChangedError: There is such state.
    """
    own = set(parameters.values())
    stale = sum(isinstance(key, Tensor) and bool(held) and key not in own for key, held in state.items())
    if stale:
        raise ModelChangedError(
            f"{kind} holds state of {stale} tensors that are no parameters of its param_groups any more\n"
            "  effect  it would fail, or begin anew; no step was taken\n"
            "  to fix  with accelerate and fsdp_version: 2, a base that makes its state in its first step (SGD, Adam,"
            " AdamW), not before; otherwise a new optimizer for the new parameters"
        )


def refuse_sparse_gradients(groups: Iterable[NodeGroup], parameters: Mapping[str, Tensor]) -> None:
    """Check that no gradient is sparse, since saliency needs all entries.

    Raises:
        OTOError: The gradient of a node group's parameter is sparse.
    """
    for name in {piece.parameter for group in groups for piece in group.zeros}:
        gradient = parameters[name].grad
        if gradient is not None and gradient.layout != torch.strided:
            raise OTOError(
                f"the gradient of {name} is sparse\n"
                "  effect  saliency and zeroing need every entry of it\n"
                "  to fix  make the layer with sparse=False, or mark its node group unprunable"
            )


def any_entry_of(gradients: Iterable[Tensor | None]) -> bool:
    """Whether any gradient has a nonzero entry. Synchronizes; communicates if gradients are sharded over processes.

    Gradients that are not sharded are read one by one until a nonzero entry is found.
    """
    there = [own for own in gradients if own is not None]
    if not any_sharded(there):
        return any(bool(own.any()) for own in there)
    return bool(added_up(there, [local(own).any() for own in there]).any())


def require_finite(scores: Tensor, groups: Iterable[NodeGroup], entries: Sequence[Entries], step: int | None) -> None:
    """Check that all scores are finite before a choice. Synchronizes.

    Args:
        step: The step of training that chooses; ``None`` if nothing is trained.

    Raises:
        NonFiniteParameterError: A score is NaN or infinite.
    """
    if bool(torch.isfinite(scores).all()):
        return
    sums = [own.weight_sq + own.gradient_sq for own in entries]
    bad = [g.name for g, own in zip(groups, sums, strict=True) if not own.isfinite().all()]
    trained = "lower the learning rate, clip gradients, or use a GradScaler, which skips such steps"
    given = "look for NaN in the weights, the batches and the loss of each batch"
    raise NonFiniteParameterError(
        f"NaN or infinity in {f'the parameters or gradients of {some(bad)}' if bad else 'a saliency'}"
        f"{'' if step is None else f', at step {step}'}\n"
        "  effect  redundant groups cannot be chosen\n"
        f"  to fix  {given if step is None else trained}"
    )


def require_loss(loss: Any) -> None:
    """Check that the result of ``loss(model, batch)`` is a tensor with one element.

    Raises:
        OptionError: It is not.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return
    what = f"a tensor of the shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
    raise OptionError(
        f"loss(model, batch) gives {what}; it has to be a tensor of one number, of which the gradient is taken\n"
        "  effect  nothing was changed\n"
        "  to fix  return the mean over the batch, without .item()"
    )


def require_gradients(
    groups: Sequence[NodeGroup],
    entries: Sequence[Entries],
    alive: Tensor,
    averages: Mapping[Saliency, Tensor],
    remedy: str,
) -> None:
    """Check that there are gradients before a choice by gradients; warn about node groups that no gradient reaches.

    Synchronizes, so only steps that choose call it.

    Args:
        entries: The entries of every node group, with the current gradients.
        alive: Whether an atom is unpruned and has a cost, bool, shape ``(N,)``.
        averages: All criteria that use gradients, shape ``(N,)`` each.
        remedy: What to do if there are no gradients at all, for the message.

    Raises:
        NoGradientError: No such criterion distinguishes any two atoms of a node group, and every gradient is zero.
    """
    if not averages:
        return
    sizes = [group.size for group in groups]
    blind = indistinct(list(averages.values()), alive, sizes).tolist()
    if not any(blind):
        return
    several = [int(own.sum()) > 1 for own in alive.cpu().split_with_sizes(sizes)]
    if blind == several and not any_gradient(entries):
        raise NoGradientError(
            "every gradient of the prunable groups is zero or missing\n"
            f"  effect  {some(map(name_of, averages))} cannot tell what matters, so nothing was chosen\n"
            f"  to fix  {remedy}"
        )
    names = [group.name for group, none in zip(groups, blind, strict=True) if none]
    warnings.warn(
        f"no gradient tells the atoms of {some(names)} apart\n"
        "  effect  all their scores are alike, so they go first, in the order of their indices\n"
        "  to fix  nothing, if all that read it left the model as segments: no output depends on it any more; otherwise"
        " keep what is not trained whole (skip_patterns), freeze it before OTO(...), or choose by weights:"
        " saliency='magnitude'",
        NoGradientWarning,
        stacklevel=users_level(),
    )


def tell_of_no_gradient(remedy: str) -> None:
    """Warn that groups are chosen by weights that are not being trained."""
    warnings.warn(
        "every gradient of the prunable groups is zero or missing\n"
        "  effect  groups are chosen by weights that no step trains\n"
        f"  to fix  {remedy}",
        NoGradientWarning,
        stacklevel=users_level(),
    )
