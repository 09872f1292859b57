"""Other counts than half of everything: one group alone thinner, all but one, and what an optimizer leaves.

A class that branches on sizes, or states two by one number, may do for some counts and not for others. One analysis
serves all of them; the slim model is compared with the zeroed one on the example.
"""

from __future__ import annotations

import random
import traceback
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oto import OTO
from oto._torch import tree_map_only
from oto.errors import EmitterError, OTOError
from oto.slim.proof.compare import relative_error
from oto.slim.proof.run import run
from oto.trace.inputs import arguments
from oto.trace.outputs import tensors_in

ALONE = 3
"""Of so many groups one alone is thinner; of the models below, of all."""
EVERY_GROUP = {
    "models-resnet18",
    "models-densenet121",
    "models-convnext_tiny",
    "models-swin_t",
    "models-bert",
    "models-llama",
    "models-gpt2",
    "models-t5",
    "models-vit",
    "torchvision-squeezenet1_1",
    "torchvision-lraspp_mobilenet_v3_large",
    "timm-levit_128s",
    "timm-ghostnet_050",
    "timm-mixnet_s",
    "timm-poolformer_s12",
    "transformers-mixtral",
    "transformers-mamba",
    "transformers-clip",
    "transformers-whisper",
    "transformers-rt_detr",
    "transformers-gemma2",
    "transformers-deepseek_v3",
    "transformers-falcon",
    "diffusers-flux",
    "handmade-lstm",
    "handmade-yolo",
    "handmade-linear_attention",
    "papers-nano_gpt",
    "papers-perceiver",
    "papers-message_passing",
}
STEPS, SHARE = 5, 0.7
"""An optimizer prunes to so much of the MACs within so many steps, on random targets."""
TOLERANCE = 1e-9  # as for half of everything
ROUNDING = 1e-15
"""Where one group alone is thinner, a deep network of random weights may be so steep that it makes 1e-8 of this."""


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
    """What comes of one group alone thinner, and of all but one; the parameters are as before at the end.

    Args:
        name: Of the model with its zoo, such as ``"timm-mixnet_s"``.
        oto: Asked what the class can do without; it is not asked again.
    """
    for choice, gone in removals(name, oto):
        with _without(oto, gone):
            yield _outcome(choice, oto, inputs)


def trained(oto: OTO, inputs: Any, training: bool) -> Outcome | None:
    """What comes of the counts that an optimizer chooses; ``None`` if the model cannot be trained like this.

    Args:
        oto: Of a model that may be changed.
        training: Train in train mode, and not in eval mode.
    """
    return _outcome("trained", oto, inputs) if prune(oto, inputs, training) else None


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


@contextmanager
def _without(oto: OTO, gone: Mapping[str, list[int]]) -> Iterator[None]:
    """Inside, some atoms of some groups are zero."""
    parameters = dict(oto.model.named_parameters())
    pieces = [(group.name, piece) for group in oto.node_groups if group.name in gone for piece in group.zeros]
    before = {piece.parameter: parameters[piece.parameter].detach().clone() for _, piece in pieces}
    with torch.no_grad():
        for name, piece in pieces:
            entries = piece.of(parameters[piece.parameter])
            entries.index_fill_(0, torch.tensor(gone[name], device=entries.device), 0)
    yield
    with torch.no_grad():
        for name, values in before.items():
            parameters[name].copy_(values)


def prune(oto: OTO, inputs: Any, training: bool) -> bool:
    """Prune a model to the counts that an optimizer chooses; ``False`` if it cannot be trained like this."""
    args, kwargs = arguments(inputs)
    oto.model.train(training)
    try:
        optimizer = oto.hesso(
            lr=1e-4, target_macs=SHARE, start_pruning_step=1, pruning_steps=STEPS - 2, pruning_periods=1
        )
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


def _moved(inputs: Any) -> Any:
    """The inputs, other by rounding."""
    draw = torch.Generator().manual_seed(0)

    def moved(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        return x * (1 + ROUNDING * torch.randn(x.shape, generator=draw, dtype=x.dtype))

    return tree_map_only(Tensor, moved, inputs)


def _outcome(choice: str, oto: OTO, inputs: Any) -> Outcome:
    zeroed = run(oto.model, inputs)
    try:  # what is right on the example is not proved on other inputs as well: that is done for half of everything
        error = relative_error(zeroed, run(oto.construct_subnet(emitter="module", verify=False).model, inputs))
        if error > TOLERANCE:
            error /= max(relative_error(zeroed, run(oto.model, _moved(inputs))) / ROUNDING, 1)
        if error <= TOLERANCE or oto.partition.found.graph.mode != "real":
            return Outcome(choice, error)
        # it decides by values, and may decide otherwise between two that are equal but for rounding
    except Exception:
        traceback.print_exc()
    try:
        return Outcome(choice, oto.construct_subnet(emitter="module", float64=False).max_error)
    except EmitterError as refused:
        return Outcome(choice, None, str(refused).splitlines()[0])
