"""Find the parameters that no output depends on for the inputs of a proof: mistakes there would go unnoticed.

Examples are an expert that no token is routed to, a branch that is not taken, a dead unit: whatever their parameters
hold, the outputs are the same. One backward pass shows it. Where gradients are zero, the parameters are also changed,
because some functions, such as rounding, have no gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from oto._torch import tree_map_only
from oto.errors import first_line, some
from oto.slim.proof.large import WithoutLarge, has_number
from oto.slim.proof.run import run
from oto.trace.inputs import arguments
from oto.trace.outputs import tensors_in
from oto.trace.snapshot import preserved

log = logging.getLogger(__name__)


def reached_by(
    model: nn.Module, wanted: Mapping[str, nn.Parameter], inputs: Sequence[Any], free: int | None
) -> list[str]:
    """Notes on the parameters that no output depends on for any of the inputs.

    Args:
        wanted: Parameters of the model, by name.
        inputs: Tried in turn until every parameter is reached.
        free: Free bytes of memory, half of which may be used.
    """
    left = {name: p for name, p in wanted.items() if p.is_floating_point() and p.numel()}
    if left and torch.is_inference_mode_enabled():
        return [
            "whether the inputs of the proof reach all that was made thinner is not known: there are no gradients"
            " under torch.inference_mode(); call construct_subnet() outside of it"
        ]
    try:
        for given in inputs:
            reached = _with_gradient(model, left, given, free) if left else ()
            left = {name: p for name, p in left.items() if name not in reached}
        if not left:
            return []
        moved = any(_moves(model, left.values(), given) for given in inputs)
    except Exception as failure:  # kernels without a backward pass, or too little memory for one
        log.info("what the inputs reach is not known: %s", first_line(failure))
        return [f"whether the inputs of the proof reach all that was made thinner is not known: {first_line(failure)}"]
    if moved:
        return [
            f"whether the inputs of the proof reach {some(left)} is not known: no gradient arrives there, but the"
            " outputs depend on at least one of them"
        ]
    return [
        f"the proof does not reach {some(left)}: no output depends on it, on the example or a random input. What it"
        " holds was compared, what is computed with it was not; pass an example that uses it"
    ]


def _with_gradient(
    model: nn.Module, wanted: Mapping[str, nn.Parameter], given: Any, free: int | None
) -> Collection[str]:
    """The parameters that receive a nonzero gradient from the outputs on an input."""
    args, kwargs = tree_map_only(Tensor, lambda t: t.detach().clone(), arguments(given))
    reached: set[str] = set()
    names = {id(p): name for name, p in wanted.items()}

    def look(p: Tensor) -> None:  # called as each gradient arrives, so that they are never all in memory
        if p.grad is None:
            return
        if has_number(p.grad.to_dense() if p.grad.is_sparse else p.grad):
            reached.add(names[id(p)])
        p.grad = None

    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())  # cuDNN gives no gradient in eval
    kernels = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    with preserved(model, given), torch.enable_grad(), _within(free, model), kernels:
        for p in model.parameters():
            p.grad = None
            p.requires_grad_(id(p) in names)
        hooks = [p.register_post_accumulate_grad_hook(look) for p in wanted.values()]
        try:
            with WithoutLarge(wanted, reached):
                outputs = [x for x in tensors_in(model(*args, **kwargs)) if x.requires_grad]
            if outputs:
                torch.autograd.backward(outputs, [_direction(x) for x in outputs])
        finally:
            for hook in hooks:
                hook.remove()
    return reached


def _direction(x: Tensor) -> Tensor:
    """The output gradient to start the backward pass from: random, and zero where the output is not finite."""
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    return drawn.masked_fill(~torch.isfinite(x.detach()), 0)


@contextmanager
def _within(free: int | None, model: nn.Module) -> Iterator[None]:
    """Context manager that limits what is saved for a backward pass to half of the free memory."""
    seen = {t.untyped_storage().data_ptr() for t in model.parameters()}
    held = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal held
        storage = t.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            held += storage.nbytes()
        if free is not None and held > free / 2:
            raise MemoryError("a backward pass takes more memory than there is")
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield


def _moves(model: nn.Module, parameters: Collection[nn.Parameter], given: Any) -> bool:
    """Whether any output changes if noise is added to some parameters."""
    before = run(model, given)
    generator = torch.Generator().manual_seed(0)
    with preserved(model, given), torch.no_grad():
        for p in parameters:
            p.data = p + (p.abs().mean() + 0.1) * torch.randn(p.shape, generator=generator).to(p)
        after = run(model, given)
    return len(before) != len(after) or not all(map(equal, before, after))


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in every entry; NaN counts as equal to NaN."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
