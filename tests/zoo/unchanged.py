"""Whether a model is as it was, to whoever looks and to whoever trains it."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oto.trace.inputs import arguments
from oto.trace.outputs import tensors_in


class Seen:
    """All that a user may see of a model: tensors by identity and value, everything else by identity and order."""

    def __init__(self, model: nn.Module, keeps: bool = True) -> None:
        held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.tensors = {
            name: (
                t,
                t.data_ptr() if t.layout == torch.strided else 0,
                t.detach().clone() if keeps else t.detach(),
                t.requires_grad,
                t.grad,
            )
            for name, t in held
        }
        self.things = {name: list(_things(vars(module))) for name, module in model.named_modules()}
        self.around = (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )

    def difference(self, model: nn.Module) -> str:
        """The first thing that is not as it was; nothing if all is."""
        now = Seen(model, keeps=False)
        if now.tensors.keys() != self.tensors.keys() or now.things.keys() != self.things.keys():
            return f"other tensors or modules: {now.tensors.keys() ^ self.tensors.keys()}"
        for name, (t, pointer, value, wanted, grad) in self.tensors.items():
            if t is not now.tensors[name][0] or pointer != now.tensors[name][1]:
                return f"{name} is another tensor"
            if not same(value, now.tensors[name][2]):
                return f"{name} holds other values"
            if wanted != now.tensors[name][3] or grad is not now.tensors[name][4]:
                return f"requires_grad or grad of {name}"
        for name, things in self.things.items():
            others = now.things[name]
            if len(things) != len(others) or any(
                a[0] != b[0] or a[1] is not b[1] for a, b in zip(things, others, strict=True)
            ):
                return f"attributes of {name or 'the model'}: {[a[0] for a in things]}, now {[b[0] for b in others]}"
        return "" if now.around == self.around else "the state of torch or of a random generator"


def _things(attributes: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    for name, value in attributes.items():
        yield name, value
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", item) for key, item in value.items())
        elif isinstance(value, list | set):
            yield from ((f"{name}[]", item) for item in value)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaN to NaN."""
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != torch.strided:
        return a.shape == b.shape and a.dtype == b.dtype
    return bool(((a == b) | ((a != a) & (b != b))).all())


def step(model: nn.Module, inputs: Any) -> dict[str, Tensor] | str:
    """All parameters and buffers after one training step on a copy, or what it raises."""
    model = copy.deepcopy(model)
    args, kwargs = copy.deepcopy(arguments(inputs))
    for training in (True, False):  # detectors want targets to train
        torch.manual_seed(7), random.seed(7), np.random.seed(7)  # noqa: NPY002
        try:
            found = [t for t in tensors_in(model.train(training)(*args, **kwargs)) if t.is_floating_point()]
            sum(t.square().mean() for t in found).backward()
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=1e-3)
            return {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
        except Exception as failure:
            raised = f"{type(failure).__name__}: {failure}"
    return raised


def trains_alike(model: nn.Module, untouched: nn.Module, inputs: Any) -> str:
    """What differs in one training step, if this model trains the same way every time."""
    with torch.enable_grad():
        got, expected = step(model, inputs), step(untouched, inputs)
        if isinstance(got, str) or isinstance(expected, str):
            return "" if type(got) is type(expected) else f"training: {got if isinstance(got, str) else expected}"
        different = [name for name in expected if name not in got or not same(got[name], expected[name])]
        if different:  # twice the same model: some draw random numbers of their own
            again = step(untouched, inputs)
            different = [name for name in different if not isinstance(again, str) and same(expected[name], again[name])]
        return f"a training step changes {different[0]} otherwise" if different else ""
