"""Other counts than half of everything: one group alone thinner, all but one, and what an optimizer leaves.

A class that branches on sizes, or states two by one number, may do for some counts and not for others. One analysis
serves all of them; the slim model is compared with the zeroed one on the example.
"""

from __future__ import annotations

import copy
import random
import traceback
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oto import OTO
from oto.errors import EmitterError, OTOError
from oto.slim.verify import relative_error, run
from oto.trace.record import arguments, tensors_in

ALONE = 3
"""Of so many groups one alone is thinner; of the models below, of all."""
EVERY_GROUP = {
    "models-resnet18", "models-densenet121", "models-convnext_tiny", "models-swin_t", "models-bert", "models-llama",
    "models-gpt2", "models-t5", "models-vit", "torchvision-squeezenet1_1", "torchvision-lraspp_mobilenet_v3_large",
    "timm-levit_128s", "timm-ghostnet_050", "timm-mixnet_s", "timm-poolformer_s12", "transformers-mixtral",
    "transformers-mamba", "transformers-clip", "transformers-whisper", "transformers-rt_detr", "transformers-gemma2",
    "transformers-deepseek_v3", "transformers-falcon", "diffusers-flux", "handmade-lstm", "handmade-yolo",
    "handmade-linear_attention", "papers-nano_gpt", "papers-perceiver", "papers-message_passing",
}  # fmt: skip
STEPS, SHARE = 10, 0.7
"""An optimizer prunes to so much of the MACs within so many steps, on random targets."""


TOLERANCE = 1e-9  # as for half of everything


@dataclass(frozen=True)
class Outcome:
    """What came of one choice.

    Attributes:
        choice: What was removed.
        error: Of the slim model of the class, relative; ``None`` if the class could not be had.
        reason: Why it could not.
    """

    choice: str
    error: float | None
    reason: str = ""


def outcomes(name: str, oto: OTO, inputs: Any) -> Iterator[Outcome]:
    """What comes of several choices for one model, whose parameters are as before at the end.

    Args:
        name: Of the model with its zoo, such as ``"timm-mixnet_s"``.
        oto: Asked what the class can do without; it is not asked again.
    """
    before = {n: p.detach().clone() for n, p in oto.model.named_parameters()}
    for choice, gone in removals(name, oto):
        _zero(oto, gone)
        yield _outcome(choice, oto, inputs)
        with torch.no_grad():
            for n, p in oto.model.named_parameters():
                p.copy_(before[n])
    trained = copy.deepcopy(oto)
    if prune(trained, inputs):
        yield _outcome("trained", trained, inputs)


def removals(name: str, oto: OTO) -> Iterator[tuple[str, Mapping[str, list[int]]]]:
    """For each choice, the atoms of some groups to remove; tied groups go together."""
    draw = random.Random(zlib.crc32(name.encode()))
    free = {g.name: g for g in oto.node_groups if g.prunable and g.size > max(g.min_kept, 1)}
    units: dict[str, list[str]] = {}
    for group in free.values():
        units.setdefault(group.tie or group.name, []).append(group.name)

    def half(names: list[str]) -> dict[str, list[int]]:
        least = {n: min(free[n].size // 2, free[n].size - free[n].min_kept) for n in names}
        return {n: sorted(draw.sample(range(free[n].size), least[n])) for n in names}

    each = list(units)
    for unit in each if name in EVERY_GROUP else draw.sample(each, min(ALONE, len(each))):
        yield f"{unit} alone", half(units[unit])
    if len(each) > 1:
        one = draw.choice(each)
        yield f"all but {one}", half([n for unit in each if unit != one for n in units[unit]])


def _zero(oto: OTO, gone: Mapping[str, list[int]]) -> None:
    parameters = dict(oto.model.named_parameters())
    with torch.no_grad():
        for group in oto.node_groups:
            for piece in group.zeros if group.name in gone else ():
                entries = piece.of(parameters[piece.parameter])
                entries.index_fill_(0, torch.tensor(gone[group.name], device=entries.device), 0)


def prune(oto: OTO, inputs: Any) -> bool:
    """Prune a model to the counts that an optimizer chooses; ``False`` if it cannot be trained like this."""
    args, kwargs = arguments(inputs)
    try:
        optimizer = oto.hesso(
            lr=1e-4, target_macs=SHARE, start_pruning_step=2, pruning_steps=STEPS - 4, pruning_periods=2
        )  # fmt: skip
        for _ in range(STEPS):
            optimizer.zero_grad()
            given = [t for t in tensors_in(oto.model(*args, **kwargs)) if isinstance(t, Tensor) and t.requires_grad]
            loss = sum((t - torch.randn_like(t)).square().mean() for t in given if t.is_floating_point())
            loss.backward()  # type: ignore[union-attr]
            nn.utils.clip_grad_norm_(oto.model.parameters(), 1.0)
            optimizer.step()
    except (OTOError, RuntimeError, NotImplementedError, AttributeError, TypeError):
        return False  # it gives no loss, or has too little that may go: other checks are about that
    return all(bool(p.isfinite().all()) for p in oto.model.parameters())


def _outcome(choice: str, oto: OTO, inputs: Any) -> Outcome:
    zeroed = run(oto.model, inputs)
    try:  # what is right on the example is not proved on other inputs as well: that is done for half of everything
        error = relative_error(zeroed, run(oto.construct_subnet(emitter="module", verify=False).model, inputs))
        if error <= TOLERANCE:
            return Outcome(choice, error)
    except Exception:
        traceback.print_exc()
    try:
        subnet = oto.construct_subnet(emitter="module", float64=False)
        return Outcome(choice, max(subnet.max_error, relative_error(zeroed, run(subnet.model, inputs))))
    except EmitterError as refused:
        return Outcome(choice, None, str(refused).splitlines()[0])
