"""Compute the choice that would be made now, without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from oto.errors import NoGradientError, OptionError
from oto.optim.choice import Choice
from oto.optim.refusals import require_finite, require_gradients, require_loss
from oto.optim.saliency import Entries, Saliency, raw_scores
from oto.optim.sums import Sums
from oto.shards import any_sharded

Loss = Callable[[nn.Module, Any], Tensor]
"""A function of the model and a batch that returns the loss."""


def kept_now(choice: Choice, model: nn.Module, batches: Iterable[Any], loss: Loss | None) -> dict[str, int]:
    """The number of atoms of each node group that a choice would keep now; see :func:`left_now`."""
    return choice.counts(left_now(choice, model, batches, loss))


def left_now(choice: Choice, model: nn.Module, batches: Iterable[Any], loss: Loss | None) -> Tensor:
    """Which atoms a choice would keep now, if it were made in a single period: bool, shape ``(N,)``.

    Args:
        model: The model; its gradients and buffers are changed.
        batches: Data over which criteria that use gradients are averaged.
        loss: Needed if there are batches.

    Raises:
        OptionError: There are batches without a loss, or the loss is not a tensor with one element.
        NoGradientError: The loss, or all prunable parameters, have no gradient, which the choice needs.
        NonFiniteParameterError, TargetError: As in :func:`left_by`.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def entries() -> list[Entries]:
        if any_sharded(parameters.values()):
            return Sums.of(choice.groups, parameters).entries()
        return [Entries.of(group, parameters) for group in choice.groups]

    alive = torch.ones(sum(choice.sizes), dtype=torch.bool)
    sums, seen = [torch.zeros(len(alive)) for _ in choice.averaged], 0
    with torch.random.fork_rng():
        for batch in batches:
            if loss is None:
                raise OptionError(
                    "batches are given without a loss\n  to fix  pass loss=, a function of the model and a batch,"
                    " such as lambda model, batch: cross_entropy(model(batch[0]), batch[1])"
                )
            model.zero_grad()
            with torch.enable_grad():
                value = loss(model, batch)
                require_loss(value)
                if not value.requires_grad:
                    raise NoGradientError(
                        "loss(model, batch) has no gradient, and the choice goes by gradients\n"
                        "  effect  nothing was chosen\n"
                        "  to fix  no detach(), torch.no_grad() or torch.inference_mode() in or around it; or choose by"
                        " weights: saliency='magnitude'"
                    )
                value.backward()
            with torch.no_grad():
                own = entries()
                now = [raw_scores(own, criterion, alive.device) for criterion in choice.averaged]
            sums, seen = [total + one for total, one in zip(sums, now, strict=True)], seen + 1
    with torch.no_grad():
        averages, own = {c: total / max(seen, 1) for c, total in zip(choice.averaged, sums, strict=True)}, entries()
        remedy = "pass batches= and a loss= that has a gradient (a model is no teacher of itself)"
        require_gradients(choice.groups, own, alive, averages, remedy)
        return left_by(choice, own, averages)


def left_by(choice: Choice, entries: Sequence[Entries], averages: Mapping[Saliency, Tensor]) -> Tensor:
    """Which atoms a choice would keep, bool, shape ``(N,)``.

    Args:
        choice: The choice.
        entries, averages: As in :meth:`Choice.scores`.

    Raises:
        NonFiniteParameterError: A weight, or a criterion measured on batches, is NaN or infinite.
        TargetError: The target is missed by more than 1 % of the full cost because widths have to be multiples.
    """
    alive = torch.ones(sum(choice.sizes), dtype=torch.bool)
    scores = choice.scores(entries, alive, averages)
    require_finite(scores, choice.groups, entries, None)
    left = ~choice.select(scores, alive)
    choice.require_near(left, scores)
    choice.warn_of_collapse(left)
    return left
