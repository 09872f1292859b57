"""Full, slim and reloaded agree, or nothing is handed out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oto._torch import TorchDispatchMode, tree_leaves, tree_map, tree_map_only
from oto.errors import VerificationError, out_of_memory
from oto.trace.found import as_found
from oto.trace.record import arguments, tensors_in

log = logging.getLogger(__name__)

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
    """

    what: str
    dtype: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


class _Wide(TorchDispatchMode):
    """Every computation in float64, for models that state a dtype in their code, or none.

    Casts to a narrower float become casts to float64; what is made or promoted without a dtype is float64; and operands
    that come from elsewhere, such as numpy, are widened as they are read. So two models that differ in where they round
    only, such as a class and its exported graph, agree to float64's own rounding. Values are as they were: a number
    that float32 cannot hold is rounded where the model rounds it (``torch.tensor(0.1)``), and nothing else is.
    """

    supports_higher_order_operators = True
    WIDER: ClassVar = {
        torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64,
        torch.complex64: torch.complex128, torch.complex32: torch.complex128,
    }  # fmt: skip

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        schema = getattr(op, "_schema", None)  # higher-order operators have none

        def widen(x: Any) -> Any:
            if isinstance(x, Tensor):
                return x.to(self.WIDER.get(x.dtype, x.dtype))
            return self.WIDER.get(x, x) if isinstance(x, torch.dtype) else x

        def of(argument: Any, x: Any) -> Any:
            shared = argument is None or argument.alias_info is not None  # a copy would not be the memory that is meant
            return tree_map_only(torch.dtype, widen, x) if shared else tree_map(widen, x)

        named = {argument.name: argument for argument in schema.arguments} if schema else {}
        args = tuple(of(argument, x) for argument, x in zip_longest(named.values(), args))[: len(args)]
        kwargs = {name: of(named.get(name), x) for name, x in (kwargs or {}).items()}
        if op is aten._assert_tensor_metadata.default:  # what torch.export saw the dtype to be
            args, kwargs = tree_map_only(torch.dtype, lambda _: None, (args, kwargs))
        if op is aten._grouped_mm.default and args[0].dtype == torch.float64:
            return _grouped_mm(*args, **kwargs)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            result = op(*args, **kwargs)
        finally:
            torch.set_default_dtype(before)
        return widen(result) if op is aten.lift_fresh.default else result  # a literal, which may be written to


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None,
                out_dtype: torch.dtype | None = None) -> Tensor:  # fmt: skip
    """``F.grouped_mm``, for which there is no kernel in float64."""
    if offs is None:
        y = a @ b
        return y if bias is None else y + bias[:, None]
    ends = offs.tolist()
    groups = list(zip([0, *ends], ends, strict=False))
    if a.ndim == b.ndim == 2:
        return torch.stack([a[:, i:j] @ b[i:j] for i, j in groups])
    if b.ndim == 3:
        y = a.new_zeros(a.shape[0], b.shape[-1])
        for e, (i, j) in enumerate(groups):
            y[i:j] = a[i:j] @ b[e] if bias is None else a[i:j] @ b[e] + bias[e]
        return y
    y = b.new_zeros(a.shape[1], b.shape[1])
    for e, (i, j) in enumerate(groups):
        y[:, i:j] = a[e] @ b[:, i:j]
    return y


def throughout(module: nn.Module) -> AbstractContextManager[Any]:
    """While inside, a module in float64 computes in float64 throughout; any other as it does."""
    wide = next((p.dtype for p in module.parameters() if p.is_floating_point()), None) == torch.float64
    return _Wide() if wide else nullcontext()  # type: ignore[no-untyped-call]


def run(module: nn.Module, dummy_input: Any) -> list[Tensor]:
    """The tensors that a module gives, in eval mode, on a copy of the input; a float64 module in float64 throughout."""
    args, kwargs = tree_map_only(Tensor, lambda t: t.detach().clone(), arguments(dummy_input))
    with as_found(module, dummy_input), torch.no_grad(), throughout(module):
        return [t.detach() for t in tensors_in(module(*args, **kwargs))]


def relative_error(full: Sequence[Tensor], slim: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest entry of each full output; inf if the outputs differ in kind."""
    if len(full) != len(slim):
        return float("inf")
    worst = 0.0
    for a, b in zip(full, slim, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if not a.numel():
            continue
        if not (a.is_floating_point() or a.is_complex()):
            worst = max(worst, 0.0 if torch.equal(a, b) else float("inf"))
            continue
        wide = torch.complex128 if a.is_complex() else torch.float64
        x, y = a.to(wide), b.to(wide)
        same = (x == y) | (torch.isnan(x) & torch.isnan(y))  # infinities of masked scores, too
        difference = torch.where(same, torch.zeros_like(x.abs()), (x - y).abs())
        finite = x.abs()[torch.isfinite(x)]
        scale = float(finite.max()) if finite.numel() else 0.0
        error = float(difference.max())
        worst = max(worst, error / scale if scale > 0 else error)
        if worst != worst:
            return float("inf")
    return worst


def random_like(dummy_input: Any, seed: int, batch: int | None = None,
                shapes: Sequence[tuple[int, ...]] | None = None) -> Any:  # fmt: skip
    """Another input of the same kind: floats drawn anew, integers within the example's range, booleans as they are.

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
            dtype = t.dtype if t.dtype in (torch.float32, torch.float64, torch.complex64) else torch.float32
            spread = float(t.detach().float().std()) if t.numel() > 1 and not t.is_complex() else 1.0
            middle = float(t.detach().float().mean()) if not t.is_complex() else 0.0
            drawn = torch.randn(shape, generator=generator, dtype=dtype)
            return (drawn * (spread or 1.0) + middle).to(t.device, t.dtype)
        if t.dtype == torch.bool or not t.numel():
            for dim, n in enumerate(shape):
                if n != t.shape[dim]:
                    t = t.index_select(dim, torch.arange(n, device=t.device) % t.shape[dim])
            return t.clone()
        low, high = int(t.min()), int(t.max())
        return torch.randint(low, high + 1, shape, generator=generator).to(t.device, t.dtype)

    return tree_map_only(Tensor, draw, dummy_input)


def in_double(module: nn.Module) -> nn.Module:
    """A copy in float64 and complex128."""
    wide = copy.deepcopy(module).double()
    for tensor in (*wide.parameters(), *wide.buffers()):
        if tensor.is_complex():  # ``Module.double`` leaves these
            tensor.data = tensor.data.to(torch.complex128)
    return wide


def double_input(dummy_input: Any) -> Any:
    """An example in float64 and complex128."""

    def widen(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t.to(torch.complex128) if t.is_complex() else t

    return tree_map_only(Tensor, widen, dummy_input)


def check(full: nn.Module, slim: nn.Module, dummy_input: Any, what: str = "slim", inputs: int = 2, batch: bool = False,
          left: Sequence[Sequence[NDArray[np.bool_]]] | None = None, notes: list[str] | None = None,
          lacks: Callable[[Any], str | None] | None = None,
          wider: Callable[[nn.Module], nn.Module] | None = None,
          shapes: Sequence[Sequence[tuple[int, ...]]] = ()) -> list[Check]:  # fmt: skip
    """Compare a slim model with the zeroed full one.

    Args:
        inputs: Random inputs besides the example.
        batch: Try another batch size too, where the full model takes it.
        left: For each output and each of its dimensions, the entries that the slim model still has; all by default.
        notes: Where to write down what was not compared: a batch size that the slim model does not take, which is an
            error by default, and what ``lacks`` leaves out.
        lacks: Why the slim model is not meant for a random input; ``None`` if it is.
        shapes: Other shapes of the tensors of the example to try, where the full model takes them; a slim model that
            does not is a note.
        wider: Makes the slim model in float64 of the full one in float64; by default the slim one is converted.
    """
    tries = [("the example", dummy_input)]
    for seed in range(inputs):
        given = random_like(dummy_input, seed)
        missing = None if lacks is None else lacks(given)
        if missing is None:
            tries.append((f"random input {seed}", given))
        elif notes is not None:
            notes.append(f"{what} was not compared on random input {seed}: {missing}")
    if batch:
        first = next(t for t in tree_leaves(dummy_input) if isinstance(t, Tensor))
        if first.ndim:
            tries.append((f"batch of {first.shape[0] + 2}", random_like(dummy_input, inputs, first.shape[0] + 2)))
    for seed, sizes in enumerate(shapes, inputs + 1):
        tries.append((f"sizes {', '.join(map(str, sizes))}", random_like(dummy_input, seed, shapes=sizes)))
    dtype = next((p.dtype for p in full.parameters() if p.is_floating_point()), torch.float32)
    checks = _compare(full, slim, tries, what, dtype, left, notes)
    if dtype != torch.float64:
        full64, wide = in_double(full), [(name, double_input(given)) for name, given in tries]
        if _runs(full64, wide[0][1]):
            slim64 = in_double(slim) if wider is None else wider(full64)
            checks += _compare(full64, slim64, wide, what, torch.float64, left, notes)
        else:
            log.info("the full model does not run in float64; compared in %s only", dtype)
    return checks


def _runs(module: nn.Module, given: Any) -> bool:
    try:
        run(module, given)
    except Exception as failure:
        if out_of_memory(failure):
            raise
        return False
    return True


def _compare(full: nn.Module, slim: nn.Module, tries: Any, what: str, dtype: torch.dtype,
             left: Sequence[Sequence[NDArray[np.bool_]]] | None, notes: list[str] | None) -> list[Check]:  # fmt: skip
    checks = []
    for name, given in tries:
        try:
            expected = run(full, given)
        except Exception as failure:  # inputs may have to fit together, as the number of image tokens does
            if name == "the example" or out_of_memory(failure):
                raise
            log.info("the full model does not take %s: %s", name, failure)
            continue
        if left is not None:
            expected = [_thinner(x, masks) for x, masks in zip(expected, left, strict=True)]
        try:
            found = run(slim, given)
        except Exception as failure:
            if notes is None or not name.startswith(("batch", "sizes")):
                raise
            only = "takes the batch size of the example only" if name.startswith("batch") else f"does not take {name}"
            note = f"{what} {only}: {str(failure).splitlines()[0]}"
            notes.extend([] if note in notes else [note])
            continue
        error = relative_error(expected, found)
        checks.append(Check(f"{what} on {name}", str(dtype).removeprefix("torch."), error, TOLERANCE.get(dtype, 1e-3)))
    return checks


def _thinner(x: Tensor, masks: Sequence[NDArray[np.bool_]]) -> Tensor:
    for dim, mask in enumerate(masks):
        if not mask.all():  # a dimension of which nothing is gone may have another size, such as the batch
            x = x.index_select(dim, torch.from_numpy(np.flatnonzero(mask)).to(x.device))
    return x


def require(checks: Sequence[Check]) -> float:
    """The largest float64 error (or the largest of all, without float64).

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
    return max(exact or [c.error for c in checks], default=0.0)
