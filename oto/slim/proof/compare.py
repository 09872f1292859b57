"""Full, slim and reloaded agree, or nothing is handed out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oto._torch import TorchDispatchMode, tree_leaves, tree_map_only
from oto.errors import VerificationError
from oto.nn import Told
from oto.nn.told import learning
from oto.slim.edits import Edits
from oto.slim.proof.float64 import WIDER, throughout, unrounded, widened, widening
from oto.trace.found import Found, as_found
from oto.trace.inputs import arguments
from oto.trace.record import Script, tensors_in

# Relative to the largest entry of the full model's output. float64 leaves room for sums in another order and nothing
# else; the others are what a deep network makes of one rounding per sum.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        what: Which models, on which input.
        dtype: In which dtype.
        error: Largest difference, relative to the largest entry of the full model's output.
        finite: How many entries of the outputs are finite, so that a difference could be seen.
        entries: How many entries the outputs have. Those that are not finite are NaN, or the same infinity, in both
            models; otherwise the error is infinite. ``None`` in artefacts of earlier versions.
    """

    what: str
    dtype: str
    error: float
    tolerance: float
    finite: int | None = None
    entries: int | None = None

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


class _Decided(TorchDispatchMode):
    """What a run decides by its values is written to a script, or taken from there."""

    supports_higher_order_operators = True

    def __init__(self, script: Script) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.script = script

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        return result if op.namespace == "prim" else self.script.take(op, result)


def run(
    module: nn.Module, dummy_input: Any, wide: bool = False, found: Found | None = None, script: Script | None = None,
    fast: bool = False,
) -> list[Tensor]:  # fmt: skip
    """The tensors that a module gives, in eval mode, on a copy of the input; a float64 module in float64 throughout.

    Args:
        wide: Compute in float64 with the parameters as they are: each is widened where it is read.
        found: As for :func:`oto.trace.found.as_found`.
        script: Where what is decided by values is written down, or taken from.
        fast: As users run a model: in inference mode, with torch's fast paths, and no mode of this package.
    """
    args, kwargs = tree_map_only(Tensor, lambda t: t.detach().clone(), arguments(dummy_input))
    decided = nullcontext() if script is None else _Decided(script)
    with ExitStack() as stack:
        stack.enter_context(as_found(module, dummy_input, found))
        stack.enter_context(unrounded())
        if fast:
            torch.backends.mha.set_fastpath_enabled(True)  # ``as_found`` puts it back
            stack.enter_context(torch.inference_mode())
            return [t.detach() for t in tensors_in(module(*args, **kwargs))]
        if wide:
            for buffer in module.buffers():  # what is written to them is not to be rounded; put back afterwards
                if buffer.dtype in WIDER and not buffer.is_meta:
                    buffer.data = widened(buffer.data)
            stack.enter_context(torch.inference_mode())  # calls arrive whole, before their operands are compared
            stack.enter_context(widening())
            stack.enter_context(decided)
            return [widened(t.detach()) for t in tensors_in(module(*args, **kwargs))]
        stack.enter_context(torch.no_grad())
        stack.enter_context(throughout(module))
        stack.enter_context(decided)
        return [t.detach() for t in tensors_in(module(*args, **kwargs))]


def learn(slim: nn.Module, edits: Edits, dummy_input: Any) -> None:
    """Write down, in a slim model and its edits, by what the calls are known that are told something."""
    told = {path: module.forward for path, module in slim.named_modules() if isinstance(module.forward, Told)}
    if told:
        with learning(slim):
            run(slim, dummy_input)
        edits.told.update({path: one.calls for path, one in told.items()})


_PIECE = 1 << 20
"""So many entries of an output are compared at a time, for logits over a vocabulary are large in float64."""


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x.reshape(-1), _PIECE)


def _apart(x: Tensor, y: Tensor) -> Tensor:
    """The largest difference, the largest finite entry of ``x``, and how many are finite; shape ``(3,)``."""
    finite = torch.isfinite(x) & torch.isfinite(y)
    alike = (x == y) | (torch.isnan(x) & torch.isnan(y))  # infinities of masked scores, too
    difference = (x - y).abs().masked_fill(alike, 0).nan_to_num(nan=float("inf"), posinf=float("inf"))
    size = x.abs().masked_fill(~torch.isfinite(x), 0)
    return torch.stack([difference.max(), size.max(), finite.sum().to(size.dtype)])


@dataclass(frozen=True)
class Comparison:
    """What two runs differ in, as :class:`Check` states it."""

    error: float
    finite: int
    entries: int


def compared(full: Sequence[Tensor], slim: Sequence[Tensor]) -> Comparison:
    """Compare what two models give. The error is inf if the outputs differ in kind.

    NaN equals NaN, and an infinity itself: but such entries do not count as finite.
    """
    entries = sum(x.numel() for x in full)
    different = Comparison(float("inf"), 0, entries)
    if len(full) != len(slim):
        return different
    worst, count = 0.0, 0
    for a, b in zip(full, slim, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return different
        if not a.numel():
            continue
        if not (a.is_floating_point() or a.is_complex()):
            worst, count = max(worst, 0.0 if torch.equal(a, b) else float("inf")), count + a.numel()
            continue
        wide = torch.complex128 if a.is_complex() else torch.float64
        parts = torch.stack([_apart(x.to(wide), y.to(wide)) for x, y in zip(_pieces(a), _pieces(b), strict=True)])
        error, scale = parts[:, :2].amax(0).tolist()
        worst = max(worst, error / scale if scale > 0 else error)
        count += int(parts[:, 2].sum())
    return Comparison(worst, count, entries)


def relative_error(full: Sequence[Tensor], slim: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest entry of each full output; inf if the outputs differ in kind."""
    return compared(full, slim).error


def checked(
    what: str, dtype: torch.dtype, full: Sequence[Tensor], slim: Sequence[Tensor], tolerance: float | None = None
) -> Check:
    """One comparison, with the tolerance of its dtype by default."""
    found = compared(full, slim)
    allowed = TOLERANCE.get(dtype, 1e-3) if tolerance is None else tolerance
    return Check(what, str(dtype).removeprefix("torch."), found.error, allowed, found.finite, found.entries)


def follow_model(
    dummy_input: Any, then: Mapping[str, torch.dtype], there: torch.device | None, now: Mapping[str, Tensor]
) -> Any:
    """An example for a model that was cast or moved since; what lay elsewhere than the model stays.

    Args:
        then: The dtype that each parameter had when the example fitted.
        there: Where the parameters were, if they were in one place.
        now: The parameters.
    """
    became: dict[torch.dtype, set[torch.dtype]] = {}
    for name, dtype in then.items():
        became.setdefault(dtype, set()).add(now[name].dtype)
    device = device_of(now.values())
    moves = None not in (device, there) and device != there and device != torch.device("meta")

    def moved(t: Tensor) -> Tensor:
        dtypes = became.get(t.dtype, set())
        dtype = next(iter(dtypes)) if len(dtypes) == 1 and t.is_floating_point() else t.dtype
        beside = moves and not t.is_meta and (t.device == there or there == torch.device("meta"))
        return t.to(device if beside else t.device, dtype)

    return tree_map_only(Tensor, moved, dummy_input)


def device_of(tensors: Iterable[Tensor]) -> torch.device | None:
    """Where tensors are, if they are all in one place."""
    devices = {t.device for t in tensors}
    return devices.pop() if len(devices) == 1 else None


def random_like(dummy_input: Any, seed: int, batch: int | None = None,
                shapes: Sequence[tuple[int, ...]] | None = None) -> Any:  # fmt: skip
    """Another input of the same kind: floats drawn anew, integers within the example's range, booleans as they are.

    Floats are normal, of the mean and deviation of the example; entries of it that are no numbers (NaN, infinities, the
    least number of the dtype, which masks something) stay.

    Args:
        batch: Repeat along the first dimension to this size.
        shapes: The shape of each tensor instead; booleans are repeated, or cut.
    """
    generator = torch.Generator().manual_seed(seed)
    first = next(t for t in tree_leaves(dummy_input) if isinstance(t, Tensor))
    size = first.shape[0] if first.ndim else None

    given = iter(shapes or ())

    def draw(t: Tensor) -> Tensor:
        shape = list(t.shape) if shapes is None else list(next(given))
        if batch is not None and t.ndim and t.shape[0] == size:
            shape[0] = batch
        if t.is_floating_point() or t.is_complex():
            return _draw(t, shape, generator)
        if t.dtype == torch.bool or not t.numel():
            return _repeated(t, shape)
        low, high = int(t.min()), int(t.max())
        return torch.randint(low, high + 1, shape, generator=generator).to(t.device, t.dtype)

    return tree_map_only(Tensor, draw, dummy_input)


def _draw(t: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normal numbers of the mean and deviation of ``t``; what is no number in it stays, in its place."""
    dtype = t.dtype if t.dtype in (torch.float32, torch.float64, torch.complex64) else torch.float32
    drawn = torch.randn(list(shape), generator=generator, dtype=dtype)
    if t.is_complex():
        return drawn.to(t.device, t.dtype)
    values = t.detach()
    # infinities and the least number of a dtype stand for what is masked, and NaN for what is missing
    special = ~(values.abs() < torch.finfo(t.dtype).max / 2)
    numbers = values[~special].double()
    spread = float(numbers.std()) if len(numbers) > 1 else 0.0
    middle = float(numbers.mean()) if len(numbers) else 0.0
    made = (drawn * (spread or 1.0) + middle).to(t.device, t.dtype)
    return torch.where(_repeated(special, shape), _repeated(values, shape), made) if special.any() else made


def _repeated(t: Tensor, shape: Sequence[int]) -> Tensor:
    """A copy of another shape, repeated or cut along each dimension."""
    for dim, n in enumerate(shape):
        if n != t.shape[dim]:
            t = t.index_select(dim, torch.arange(n, device=t.device) % t.shape[dim])
    return t.clone()


def require(checks: Sequence[Check]) -> float:
    """The largest float64 error (or the largest of all, without float64); NaN if nothing was compared.

    Raises:
        VerificationError: A comparison failed.
    """
    failed = [c for c in checks if not c.passed]
    if failed:
        lines = [f"  {c.what}, {c.dtype}: relative error {c.error:.2e}, tolerance {c.tolerance:.0e}" for c in failed]
        raise VerificationError(
            "\n".join(
                [
                    "the slim model does not compute what the zeroed model computes",
                    *lines,
                    "  effect  nothing was written",
                    "  to fix  report the model; until then mark the groups concerned unprunable",
                ]
            )
        )
    exact = [c.error for c in checks if c.dtype == "float64"]
    return max(exact or [c.error for c in checks], default=float("nan"))
