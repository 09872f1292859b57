"""Full, slim and reloaded agree, or nothing is handed out."""

from __future__ import annotations

import copy
import logging
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oto._torch import TorchDispatchMode, tree_leaves, tree_map, tree_map_only
from oto.errors import EmitterError, VerificationError, first_line, out_of_memory
from oto.nn import Told
from oto.nn.told import learning
from oto.progress import stage
from oto.slim.memory import available, size_of
from oto.slim.module import Edits
from oto.trace.found import Found, as_found
from oto.trace.record import Script, arguments, tensors_in

log = logging.getLogger(__name__)
aten = torch.ops.aten

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
    that come from elsewhere, such as numpy or parameters, are widened as they are read: a model in float32 needs no
    copy in float64 for it. So two models that differ in where they round only, such as a class and its exported graph,
    agree to float64's own rounding. Values are as they were: a number that float32 cannot hold is rounded where the
    model rounds it (``torch.tensor(0.1)``), and nothing else is.
    """

    supports_higher_order_operators = True

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in _MOVES:  # a table is not widened for a few of its entries
            return _widened(op(*args, **(kwargs or {})))

        def of(shared: bool, x: Any) -> Any:  # a copy would not be the memory that is meant
            return tree_map_only(torch.dtype, _widened, x) if shared else tree_map(_widened, x)

        shares = _shares(op)
        args = tuple(of(shared, x) for shared, x in zip_longest(shares.values(), args, fillvalue=True))[: len(args)]
        kwargs = {name: of(shares.get(name, True), x) for name, x in (kwargs or {}).items()}
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
        return _widened(result) if op is aten.lift_fresh.default else result  # a literal, which may be written to


_WIDER = {
    torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128, torch.complex32: torch.complex128,
}  # fmt: skip
_MOVES = {aten.embedding.default, aten.index_select.default, aten.gather.default}


def _widened(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.to(_WIDER[x.dtype]) if x.dtype in _WIDER else x
    return _WIDER.get(x, x) if isinstance(x, torch.dtype) else x


@cache
def _shares(op: Any) -> dict[str, bool]:
    """For each argument of an operator, whether the operator uses its memory."""
    schema = getattr(op, "_schema", None)  # higher-order operators have none
    return {a.name: a.alias_info is not None for a in schema.arguments} if schema else {}


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
    wide = dtype_of(module) == torch.float64
    return widening() if wide else nullcontext()


def widening() -> AbstractContextManager[Any]:
    """While inside, everything is computed in float64."""
    return _Wide()  # type: ignore[no-untyped-call]


# Two interfaces say whether factors in float32 are rounded to TF32 (for convolutions on a GPU they are by default), or
# on some processors to bfloat16. The old one sets both, and cannot be read where the user set the new one.
_TF32 = ("cuda.matmul", "cudnn")
_PRECISION = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")


@contextmanager
def unrounded() -> Iterator[None]:
    """While inside, products in float32 are those of float32, whatever speed was asked for."""
    new = hasattr(torch.backends, "fp32_precision")  # since torch 2.9
    places = [(name, "fp32_precision") for name in _PRECISION if new] + [(name, "allow_tf32") for name in _TF32]
    before: list[tuple[Any, str, Any]] = []
    for path, name in places:
        place: Any = operator.attrgetter(path)(torch.backends)
        with suppress(RuntimeError):
            before.append((place, name, getattr(place, name)))
    try:
        for place, name, _ in before:
            setattr(place, name, "ieee" if name == "fp32_precision" else False)
        yield
    finally:
        for place, name, value in reversed(before):  # the new ones last: they are the finer
            setattr(place, name, value)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype in which a module computes: that of its first parameter with a fraction."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


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
    module: nn.Module, dummy_input: Any, wide: bool = False, found: Found | None = None, script: Script | None = None
) -> list[Tensor]:
    """The tensors that a module gives, in eval mode, on a copy of the input; a float64 module in float64 throughout.

    Args:
        wide: Compute in float64 with the parameters as they are: each is widened where it is read.
        found: As for :func:`oto.trace.found.as_found`.
        script: Where what is decided by values is written down, or taken from.
    """
    args, kwargs = tree_map_only(Tensor, lambda t: t.detach().clone(), arguments(dummy_input))
    decided = nullcontext() if script is None else _Decided(script)
    with ExitStack() as stack:
        stack.enter_context(as_found(module, dummy_input, found))
        stack.enter_context(unrounded())
        if wide:
            for buffer in module.buffers():  # what is written to them is not to be rounded; put back afterwards
                if buffer.dtype in _WIDER and not buffer.is_meta:
                    buffer.data = _widened(buffer.data)
            stack.enter_context(torch.inference_mode())  # calls arrive whole, before their operands are compared
            stack.enter_context(widening())
            stack.enter_context(decided)
            return [_widened(t.detach()) for t in tensors_in(module(*args, **kwargs))]
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
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):  # no copy in the narrow dtype on the way
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.dtype in _WIDER:
            wider = tensor.detach().to(_WIDER[tensor.dtype])
            plain = type(tensor) is Tensor
            memo[id(tensor)] = wider if plain else nn.Parameter(wider, tensor.requires_grad)
    return double_(copy.deepcopy(module, memo))


def double_(module: nn.Module) -> nn.Module:
    """The same module, in float64 and complex128 from now on."""
    module.double()
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_complex():  # ``Module.double`` leaves these
            tensor.data = tensor.data.to(torch.complex128)
    return module


def double_input(dummy_input: Any) -> Any:
    """An example in float64 and complex128."""

    def widen(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t.to(torch.complex128) if t.is_complex() else t

    return tree_map_only(Tensor, widen, dummy_input)


FLOAT64 = ("auto", True, False)
Wider = Callable[[nn.Module], nn.Module]


@dataclass(eq=False)
class Reference:
    """The zeroed full model, and what it gives: computed once per input and dtype, for every comparison with it.

    Slim models are compared on the example and on a random input, in the model's dtype; where the batch is free, the
    random input is of another batch size. And in float64, where it shows whether they are equal or only alike. For that
    nothing is copied: parameters are widened as they are read. A model that minds it is copied in float64.

    Attributes:
        left: For each output and each of its dimensions, the entries that a slim model still has; all by default.
        float64: Compare in float64: ``"auto"``, where it fits in memory; ``True`` or ``False``.
        brief: Compare in float64 alone, where that can be done.
        decides: The model decides by its values, such as which boxes are the best. Between two that are equal but for
            rounding a slim model may decide otherwise; then it is compared under the decisions of the full one.
        notes: What was not compared.
    """

    model: nn.Module
    dummy_input: Any
    left: Sequence[Sequence[NDArray[np.bool_]]] | None = None
    float64: bool | str = "auto"
    brief: bool = False
    decides: bool = False
    notes: list[str] = field(default_factory=list)
    _given: dict[str, list[Tensor] | None] = field(default_factory=dict)
    _wide: dict[str, list[Tensor] | None] = field(default_factory=dict)
    _shapes: dict[str, Sequence[tuple[int, ...]]] = field(default_factory=dict)
    _full64: nn.Module | None = None
    _found: dict[int, tuple[nn.Module, Found]] = field(default_factory=dict)

    @cached_property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.model)

    def check(
        self,
        slim: nn.Module,
        what: str = "slim",
        batch: bool = False,
        notes: list[str] | None = None,
        lacks: Callable[[Any], str | None] | None = None,
        wider: Wider | None = None,
        random: bool = True,
        exact: bool = True,
        shapes: Sequence[Sequence[tuple[int, ...]]] = (),
    ) -> list[Check]:
        """Compare a slim model with the full one.

        Args:
            batch: Try another batch size, where the full model takes it.
            notes: Where to write down what was not compared: a batch size that the slim model does not take, which is
                an error by default, and what ``lacks`` leaves out.
            lacks: Why the slim model is not meant for a random input; ``None`` if it is.
            wider: Makes the slim model in float64, of the full one; by default the slim one is widened. It is called
                while everything is computed in float64.
            random: Compare on a random input too, besides the example.
            exact: Compare in float64 too.
            shapes: Other shapes of the tensors of the example to try, in the model's own dtype, where the full model
                takes them; a slim model that does not is a note.
        """
        try:
            return self._checks(slim, what, batch, notes, lacks, wider, random, exact, shapes)
        finally:
            self._found.pop(id(slim), None)

    def _checks(
        self, slim: nn.Module, what: str, batch: bool, notes: list[str] | None, lacks: Any, wider: Wider | None,
        random: bool, exact: bool, shapes: Sequence[Sequence[tuple[int, ...]]],
    ) -> list[Check]:  # fmt: skip
        self._require_own(slim)
        exact = exact and self.dtype != torch.float64
        brief = self.brief and exact and self._in_float64()
        drawn = self._drawn(what, batch and not brief, notes, lacks) if random else []
        wide = [name for name in drawn if name != self._batch] or ([RANDOM] if drawn else [])
        checks: list[Check] = []
        if not brief:
            stage(f"{what}: comparing in {_name(self.dtype)}")
            sizes = {f"sizes {', '.join(map(str, shape))}": shape for shape in shapes}
            self._shapes.update(sizes)
            checks = self._compare(slim, [EXAMPLE, *drawn, *sizes], what, notes)
        if exact and self._in_float64():
            stage(f"{what}: comparing in float64")
            checks += self._compare_wide(slim, [EXAMPLE, *wide], what, wider)
        return checks

    def _run(self, module: nn.Module, given: Any, wide: bool = False, script: Script | None = None) -> list[Tensor]:
        """Run a module, and look only once at what it holds."""
        if id(module) not in self._found:
            self._found[id(module)] = module, Found(module, self.dummy_input)
        return run(module, given, wide, self._found[id(module)][1], script)

    def _decided(self, check: Check, slim: nn.Module, name: str, wide: bool = False) -> Check:
        """A comparison that failed, once more under the decisions of the full model, if that decides by values."""
        if check.passed or not self.decides:
            return check
        full = self._full64 if wide and self._full64 is not None else self.model
        given, script = double_input(self._input(name)) if wide else self._input(name), Script()
        try:
            expected = self._thinned(name, lambda: self._run(full, given, wide and full is self.model, script))
            script.read = 0
            found = self._run(slim, given, wide, script)
        except Exception as failure:  # it decides something that the full one does not
            if out_of_memory(failure):
                raise
            log.info("under the decisions of the full model: %s", failure)
            return check
        if expected is None or script.read != len(script.written) or not any(x.is_floating_point() for x in expected):
            return check
        again = _checked(
            f"{check.what}, as the full model decides", torch.float64 if wide else self.dtype, expected, found
        )
        if not again.passed:
            return check
        note = "left alone, the slim model decides otherwise between what is equal but for rounding, on some inputs"
        self.notes.extend([] if note in self.notes else [note])
        return again

    def _drawn(self, what: str, batch: bool, notes: list[str] | None, lacks: Any) -> list[str]:
        """The random inputs to compare on."""
        if batch and self._batch is not None and self._outputs(self._batch) is not None:
            return [self._batch]
        if lacks is None:
            return [RANDOM]
        fitting = []
        for name in (RANDOM, ANOTHER):  # one may be of another kind than the example
            missing = lacks(self._input(name))
            if missing is None:
                fitting.append(name)
            elif notes is not None:
                notes.append(f"{what} was not compared on {name}: {missing}")
        return fitting

    @cached_property
    def _batch(self) -> str | None:
        size = self._size
        return None if size is None else f"batch of {size + 2}"

    @property
    def _size(self) -> int | None:
        first = next(t for t in tree_leaves(self.dummy_input) if isinstance(t, Tensor))
        return first.shape[0] if first.ndim else None

    def _input(self, name: str) -> Any:
        if name == EXAMPLE:
            return self.dummy_input
        if name in self._shapes:
            return random_like(self.dummy_input, 1, shapes=self._shapes[name])
        if name in (RANDOM, ANOTHER):
            return random_like(self.dummy_input, int(name == ANOTHER))
        return random_like(self.dummy_input, 0, (self._size or 0) + 2)

    def _outputs(self, name: str) -> list[Tensor] | None:
        """What the full model gives; ``None`` if it does not take the input."""
        if name not in self._given:
            self._given[name] = self._thinned(name, lambda: self._run(self.model, self._input(name)))
        return self._given[name]

    def _thinned(self, name: str, give: Callable[[], list[Tensor]]) -> list[Tensor] | None:
        try:
            outputs = give()
        except Exception as failure:  # inputs may have to fit together, as the number of image tokens does
            if name == EXAMPLE or out_of_memory(failure):
                raise
            log.info("the full model does not take %s: %s", name, failure)
            return None
        if self.left is not None:
            outputs = [_thinner(x, masks) for x, masks in zip(outputs, self.left, strict=True)]
        return outputs

    def _compare(self, slim: nn.Module, tries: Sequence[str], what: str, notes: list[str] | None) -> list[Check]:
        checks = []
        for name in tries:
            expected = self._outputs(name)
            if expected is None:
                continue
            try:
                found = self._run(slim, self._input(name))
            except Exception as failure:
                if notes is None or name not in (self._batch, *self._shapes):
                    raise
                only = "takes the batch size of the example only" if name == self._batch else f"does not take {name}"
                note = f"{what} {only}: {str(failure).splitlines()[0]}"
                notes.extend([] if note in notes else [note])
                checks += self._compare(slim, [RANDOM], what, notes) if name == self._batch else []
                continue
            made = _checked(f"{what} on {name}", self.dtype, expected, found)
            checks.append(self._decided(made, slim, name))
        return checks

    # --- in float64 ---------------------------------------------------------------------------------------------------

    def insist(self) -> None:
        """Make sure of float64 where it was asked for.

        Raises:
            VerificationError: The model does not run in it.
        """
        if self.float64 is True and self.dtype != torch.float64:
            self._in_float64()

    def _in_float64(self) -> bool:
        """Whether there is something to compare with in float64: the outputs on the example are known then."""
        if self.float64 is False:
            self._lacks_float64("float64=False")
        elif EXAMPLE not in self._wide:
            self._start_wide()
        return bool(self._wide.get(EXAMPLE))

    def _start_wide(self) -> None:
        self._wide[EXAMPLE] = None
        largest = max((p.numel() for p in self.model.parameters()), default=0)
        failure: Exception | None = None
        for copied in (False, True):
            needed = 8 * (sum(p.numel() for p in self.model.parameters()) + largest if copied else 2 * largest)
            free = available(self.model)
            if self.float64 == "auto" and free is not None and needed > free:
                self._lacks_float64(f"it would take {size_of(needed)} of memory, and {size_of(free)} are free")
                return
            try:
                if copied:
                    self._full64 = in_double(self.model)
                self._wide[EXAMPLE] = self._thinned(EXAMPLE, lambda: self._run_full64(EXAMPLE))
                return
            except Exception as raised:
                if out_of_memory(raised) and self.float64 is True:
                    raise
                failure, self._full64 = raised, None
        assert failure is not None
        if self.float64 is True:
            raise VerificationError(
                f"{type(self.model).__name__} does not run in float64: {first_line(failure)}\n"
                "  effect  the proof that was asked for cannot be made, and nothing was written\n"
                "  to fix  float64='auto', or see that error: some code states a dtype"
            ) from failure
        self._lacks_float64(f"the model does not run in it ({first_line(failure, 80)})")

    def _lacks_float64(self, why: str) -> None:
        note = f"compared in {_name(self.dtype)} only, not in float64: {why}"
        log.info(note)
        if note not in self.notes:
            self.notes.append(note)

    def _run_full64(self, name: str) -> list[Tensor]:
        given = double_input(self._input(name))
        return self._run(self.model, given, wide=True) if self._full64 is None else self._run(self._full64, given)

    def _outputs_wide(self, name: str) -> list[Tensor] | None:
        if name not in self._wide:
            self._wide[name] = self._thinned(name, lambda: self._run_full64(name))
        return self._wide[name]

    def _compare_wide(self, slim: nn.Module, tries: Sequence[str], what: str, wider: Wider | None) -> list[Check]:
        checks = self._compared_wide(slim, tries, what, wider)
        if all(c.passed for c in checks) or self._full64 is not None or not self._fits(slim):
            return checks
        # what a forward writes to its parameters is rounded unless they are wide themselves
        log.info("compared once more, with copies in float64")
        self._full64 = in_double(self.model)
        self._wide.clear()
        return self._compared_wide(in_double(slim) if wider is None else slim, tries, what, wider)

    def _fits(self, slim: nn.Module) -> bool:
        free = available(self.model)
        needed = 8 * sum(p.numel() for module in (self.model, slim) for p in module.parameters())
        return self.float64 is True or free is None or needed < free

    def _compared_wide(self, slim: nn.Module, tries: Sequence[str], what: str, wider: Wider | None) -> list[Check]:
        if wider is not None:
            with torch.no_grad(), widening():
                slim = wider(self.model if self._full64 is None else self._full64)
        checks = []
        for name in tries:
            expected = self._outputs_wide(name)
            if expected is not None:
                found = self._run_wide(slim, double_input(self._input(name)))
                made = _checked(f"{what} on {name}", torch.float64, expected, found)
                checks.append(self._decided(made, slim, name, wide=True))
        return checks

    def _run_wide(self, slim: nn.Module, given: Any) -> list[Tensor]:
        try:
            return self._run(slim, given, wide=True)
        except Exception as failure:  # code that compares dtypes of its own
            if out_of_memory(failure):
                raise
            return run(in_double(slim), given)

    # --- what a comparison would not show -----------------------------------------------------------------------------

    def idle(self) -> list[int]:
        """Outputs that are the same for every input, or zero: a slim model cannot differ in them."""
        runs = [x for table in (self._given, self._wide) for x in table.values() if x is not None]
        return [i for i in self.floating if not any(t[i].any() for t in runs) or self._constant(i)]

    @property
    def floating(self) -> list[int]:
        """Outputs that hold numbers with a fraction."""
        outputs = self._given.get(EXAMPLE) or self._wide.get(EXAMPLE) or ()
        return [i for i, x in enumerate(outputs) if x.is_floating_point() and x.numel()]

    def _constant(self, i: int) -> bool:
        """Whether an output is the same for the example and for the random inputs, which differ."""
        others = [
            (table[EXAMPLE], x, name)
            for table in (self._given, self._wide)
            for name, x in table.items()
            if name != EXAMPLE and x is not None and table.get(EXAMPLE) is not None
        ]
        said = False
        for first, other, name in others:
            assert first is not None
            a, b = first[i], other[i]
            if a.ndim != b.ndim or a.shape[1:] != b.shape[1:] or not self._differs(name):
                continue
            n = min(len(a), len(b)) if a.ndim else None
            if not torch.equal(*((a, b) if n is None else (a[:n], b[:n]))):
                return False
            said = True
        return said

    def _differs(self, name: str) -> bool:
        """Whether an input is another than the example."""
        pairs = zip(tree_leaves(self._input(name)), tree_leaves(self.dummy_input), strict=True)
        tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and a.ndim]
        return any(not torch.equal(a[: len(b)], b) for a, b in tensors)

    def _require_own(self, slim: nn.Module) -> None:
        """Refuse a slim model whose forward runs the full one: a function that was put there may hold on to that.

        Raises:
            EmitterError: It does.
        """
        patched = [m for m in slim.modules() if "forward" in vars(m) and not isinstance(vars(m)["forward"], Told)]
        if not patched or slim is self.model:
            return
        own = {id(m) for m in slim.modules()}
        full = {
            id(m): name
            for name, m in self.model.named_modules()
            if id(m) not in own and any(True for _ in m.parameters())
        }
        met: list[str] = []
        with _watching(lambda module: met.extend([full[id(module)]] if id(module) in full else [])):
            run(slim, self.dummy_input)
        if met:
            raise EmitterError(
                f"a forward that was put into the model (model.forward = ...) runs {met[0] or 'the full model'} itself,"
                " in the slim copy too\n"
                "  effect  the slim model would compute with the full weights, so it is not handed out\n"
                "  to fix  take it out before (del model.forward), or put a method there: types.MethodType(f, model)"
            )


EXAMPLE, RANDOM, ANOTHER = "the example", "random input", "another random input"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checked(what: str, dtype: torch.dtype, expected: Sequence[Tensor], found: Sequence[Tensor]) -> Check:
    return Check(what, _name(dtype), relative_error(expected, found), TOLERANCE.get(dtype, 1e-3))


@contextmanager
def _watching(see: Callable[[nn.Module], object]) -> Iterator[None]:
    """While inside, every module that runs is shown."""

    def seen(module: nn.Module, _: Any) -> None:
        see(module)

    hook = nn.modules.module.register_module_forward_pre_hook(seen)
    try:
        with warnings.catch_warnings():  # compiled submodules mind the hook
            warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are global hooks")
            yield
    finally:
        hook.remove()


def check(full: nn.Module, slim: nn.Module, dummy_input: Any, what: str = "slim", **how: Any) -> list[Check]:
    """Compare a slim model with the zeroed full one; options as for :class:`Reference` and its ``check``."""
    own = {name: how.pop(name) for name in ("left", "float64", "decides") if name in how}
    return Reference(full, dummy_input, **own).check(slim, what, **how)


def _thinner(x: Tensor, masks: Sequence[NDArray[np.bool_]]) -> Tensor:
    for dim, mask in enumerate(masks):
        if not mask.all():  # a dimension of which nothing is gone may have another size, such as the batch
            x = x.index_select(dim, torch.from_numpy(np.flatnonzero(mask)).to(x.device))
    return x


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
