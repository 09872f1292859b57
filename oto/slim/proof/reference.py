"""The zeroed full model, with which every slim one is compared."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oto._torch import tree_leaves
from oto.errors import EmitterError, VerificationError, first_line, out_of_memory, some
from oto.nn import Told
from oto.progress import stage
from oto.slim.edits import attribute
from oto.slim.proof.compare import TOLERANCE, Check, checked, random_like, relative_error, run
from oto.slim.proof.float64 import double_input, dtype_of, in_double, widened, widening
from oto.slim.proof.memory import available, size_of
from oto.slim.proof.reach import equal, reached_by
from oto.trace.found import Found
from oto.trace.record import Script, around_modules

log = logging.getLogger(__name__)

FLOAT64 = ("auto", True, False)
HALF = (torch.float16, torch.bfloat16)
Exact = Callable[[nn.Module], Mapping[str, Tensor]]
"""Makes, of a full model, the tensors of the slim one that its dtype rounds, such as those that take a count in."""
FAST_PATHS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""Modules that run otherwise in inference mode: with fused kernels, and with nested tensors where there is padding."""


@dataclass(eq=False)
class Reference:
    """The zeroed full model, and what it gives: computed once per input and dtype, for every comparison with it.

    Slim models are compared on the example and on a random input, in the model's dtype; where the batch is free, the
    random input is of another batch size. On the example they run as users run them: in inference mode, with torch's
    fast paths; where there may be such, they are compared without, too. And in float64, where it shows whether they are
    equal or only alike (for models in half precision on the example alone). For that nothing is copied: parameters are
    widened as they are read. A model that minds it is copied in float64.

    Attributes:
        left: For each output and each of its dimensions, the entries that a slim model still has; all by default.
        float64: Compare in float64: ``"auto"``, where it fits in memory; ``True`` or ``False``.
        brief: Compare in float64 alone, where that can be done.
        decides: The model decides by its values, such as which boxes are the best. Between two that are equal but for
            rounding a slim model may decide otherwise; then it is compared under the decisions of the full one.
        notes: What was not compared.
        partial: Comparisons in which only some entries were finite.
    """

    model: nn.Module
    dummy_input: Any
    left: Sequence[Sequence[NDArray[np.bool_]]] | None = None
    float64: bool | str = "auto"
    brief: bool = False
    decides: bool = False
    notes: list[str] = field(default_factory=list)
    partial: list[Check] = field(default_factory=list)
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
        rounded: Exact | None = None,
        in_float64: Callable[[], nn.Module] | None = None,
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
            rounded: Makes the tensors of the slim model that are rounded, of the full one. In float64 they take the
                place of its own. It is called while everything is computed in float64.
            in_float64: Makes another slim model, to compare in float64 if this one is not equal there, as it holds
                numbers that were computed in its own dtype. It is called while everything is computed in float64.
            random: Compare on a random input too, besides the example.
            exact: Compare in float64 too.
            shapes: Other shapes of the tensors of the example to try, in the model's own dtype, where the full model
                takes them; a slim model that does not is a note.
        """
        try:
            return self._checks(slim, what, batch, notes, lacks, rounded, in_float64, random, exact, shapes)
        finally:
            self._found.pop(id(slim), None)

    def _checks(
        self, slim: nn.Module, what: str, batch: bool, notes: list[str] | None, lacks: Any, rounded: Exact | None,
        in_float64: Callable[[], nn.Module] | None, random: bool, exact: bool,
        shapes: Sequence[Sequence[tuple[int, ...]]],
    ) -> list[Check]:  # fmt: skip
        self._require_own(slim)
        exact = exact and self.dtype != torch.float64
        brief = self.brief and exact and self._in_float64()
        drawn = self._drawn(what, batch and not brief, notes, lacks) if random else []
        wide = [name for name in drawn if name != self._batch] or ([RANDOM] if drawn else [])
        if self.dtype in HALF and not brief:  # for which a pass in float64 takes as long as ten
            wide = []
        checks: list[Check] = []
        if not brief:
            stage(f"{what}: comparing in {_name(self.dtype)}")
            sizes = {f"sizes {', '.join(map(str, shape))}": shape for shape in shapes}
            self._shapes.update(sizes)
            fast = [FAST] if self._has_fast_paths and random else []
            checks = self._compare(slim, [EXAMPLE, *fast, *drawn, *sizes], what, notes)
        if exact and self._in_float64():
            stage(f"{what}: comparing in float64")
            proofs = self._compare_wide(slim, [EXAMPLE, *wide], what, rounded)
            if in_float64 is not None and not all(proof.passed for proof in proofs):
                proofs = self._compare_another(in_float64, [EXAMPLE, *wide], what)
            if all(proof.passed for proof in proofs):
                checks = [self._but_for_rounding(check) for check in checks]
            checks += proofs
        return [check for check in checks if self._shows(check)]

    def _shows(self, check: Check) -> bool:
        """Whether a comparison shows anything; that it does not, or not of all entries, is noted."""
        if check.passed and not check.finite:
            why = "no entry of the outputs is finite" if check.entries else "the outputs are empty"
            self._note(f"{check.what}, {check.dtype}: {why}, so nothing was compared")
        elif check.passed and check.finite != check.entries:
            self.partial.append(check)
        return bool(check.finite) or not check.passed

    def _note(self, text: str) -> None:
        log.info(text)
        if text not in self.notes:
            self.notes.append(text)

    def _but_for_rounding(self, check: Check) -> Check:
        """Where two models are equal in float64, one may be as far from the other as rounding takes it from itself."""
        if check.passed:
            return check
        own, exact = self._outputs(EXAMPLE) or [], self._wide.get(EXAMPLE) or []
        rounding = relative_error(exact, [widened(x) for x in own])
        # where rounding is all there is to see, no distance would show a mistake
        return replace(check, tolerance=max(check.tolerance, 4 * rounding)) if 4 * rounding < 0.5 else check

    def _run(
        self, module: nn.Module, given: Any, wide: bool = False, script: Script | None = None, fast: bool = False
    ) -> list[Tensor]:
        """Run a module, and look only once at what it holds."""
        if id(module) not in self._found:
            self._found[id(module)] = module, Found(module, self.dummy_input)
        return run(module, given, wide, self._found[id(module)][1], script, fast)

    def _is_fast(self, name: str) -> bool:
        """Whether an input is one on which models run as users run them."""
        return name == FAST or (name == EXAMPLE and not self._has_fast_paths)

    @cached_property
    def _has_fast_paths(self) -> bool:
        """Whether the full model may run otherwise on the example as users run it."""
        own = any(isinstance(module, FAST_PATHS) for module in self.model.modules())
        if own or self.dtype == torch.float64:  # which is computed in float64 throughout otherwise
            return True
        try:
            outputs = self._run(self.model, self.dummy_input, fast=True)
        except Exception as failure:  # inference mode has rules of its own
            if out_of_memory(failure):
                raise
            log.info("the full model does not run in inference mode: %s", first_line(failure))
            return True
        self._given[EXAMPLE] = self._left(outputs)
        return False

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
        again = checked(
            f"{check.what}, as the full model decides", torch.float64 if wide else self.dtype, expected, found
        )
        if not again.passed:
            return check
        note = "left alone, the slim model decides otherwise between what is equal but for rounding, on some inputs"
        self._note(note)
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
        if name in (EXAMPLE, FAST):
            return self.dummy_input
        if name in self._shapes:
            return random_like(self.dummy_input, 1, shapes=self._shapes[name])
        if name in (RANDOM, ANOTHER):
            return random_like(self.dummy_input, int(name == ANOTHER))
        return random_like(self.dummy_input, 0, (self._size or 0) + 2)

    def _outputs(self, name: str) -> list[Tensor] | None:
        """What the full model gives; ``None`` if it does not take the input."""
        fast = self._is_fast(name)
        if name not in self._given:
            self._given[name] = self._thinned(name, lambda: self._run(self.model, self._input(name), fast=fast))
        return self._given[name]

    def _thinned(self, name: str, give: Callable[[], list[Tensor]]) -> list[Tensor] | None:
        try:
            outputs = give()
        except Exception as failure:  # inputs may have to fit together, as the number of image tokens does
            if name == EXAMPLE or out_of_memory(failure):
                raise
            log.info("the full model does not take %s: %s", name, failure)
            if name == FAST:
                self._note(f"the full model does not run in inference mode, so that was not compared: {failure}")
            return None
        return self._left(outputs)

    def _left(self, outputs: list[Tensor]) -> list[Tensor]:
        """What a slim model still has of outputs."""
        if self.left is None:
            return outputs
        return [_thinner(x, masks) for x, masks in zip(outputs, self.left, strict=True)]

    def _compare(self, slim: nn.Module, tries: Sequence[str], what: str, notes: list[str] | None) -> list[Check]:
        checks = []
        for name in tries:
            expected = self._outputs(name)
            if expected is None:
                continue
            try:
                found = self._run(slim, self._input(name), fast=self._is_fast(name))
            except Exception as failure:
                if notes is None or name not in (self._batch, *self._shapes):
                    raise
                only = "takes the batch size of the example only" if name == self._batch else f"does not take {name}"
                note = f"{what} {only}: {str(failure).splitlines()[0]}"
                notes.extend([] if note in notes else [note])
                checks += self._compare(slim, [RANDOM], what, notes) if name == self._batch else []
                continue
            # a model in float64 may state another dtype, which only here is not made wider
            tolerance = max(TOLERANCE.get(self.dtype, 1e-3), 1e-3) if name == FAST else None
            made = checked(f"{what} on {name}", self.dtype, expected, found, tolerance)
            made = self._decided(made, slim, name)
            checks.append(self._as_the_full(made, found) if name == FAST else made)
        return checks

    def _as_the_full(self, check: Check, found: Sequence[Tensor]) -> Check:
        """A comparison on fast paths that failed, with what the full model gives without, if that is something else."""
        plain, fast = self._outputs(EXAMPLE), self._outputs(FAST)
        assert plain is not None and fast is not None
        if check.passed or relative_error(plain, fast) <= TOLERANCE.get(self.dtype, 1e-3):
            return check
        again = checked(f"{check.what}, beside the full model without torch's fast paths", self.dtype, plain, found)
        if not again.passed:
            return check
        self._note(
            "in inference mode, torch's fast paths let the full model give something else than without them, as zeros"
            " for padding; the slim one gives what the full one gives without them"
        )
        return again

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
        largest = max((p.numel() for p in self.model.parameters() if p.ndim != 2), default=0)  # matrices go in blocks
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
        least = TOLERANCE.get(self.dtype, 1e-3)
        self._note(f"compared in {_name(self.dtype)} only, which shows no less than {least:.0e}, not in float64: {why}")

    def _run_full64(self, name: str) -> list[Tensor]:
        given = double_input(self._input(name))
        return self._run(self.model, given, wide=True) if self._full64 is None else self._run(self._full64, given)

    def _outputs_wide(self, name: str) -> list[Tensor] | None:
        if name not in self._wide:
            self._wide[name] = self._thinned(name, lambda: self._run_full64(name))
        return self._wide[name]

    def _compare_wide(self, slim: nn.Module, tries: Sequence[str], what: str, rounded: Exact | None) -> list[Check]:
        checks = self._compared_wide(slim, tries, what, rounded)
        if all(c.passed for c in checks) or self._full64 is not None or not self._fits(slim):
            return checks
        # what a forward writes to its parameters is rounded unless they are wide themselves
        log.info("compared once more, with copies in float64")
        self._full64 = in_double(self.model)
        self._wide.clear()
        return self._compared_wide(in_double(slim), tries, what, rounded)

    def _compare_another(self, made: Callable[[], nn.Module], tries: Sequence[str], what: str) -> list[Check]:
        with torch.no_grad(), widening():
            another = made()
        checks = self._compare_wide(another, tries, f"{what}, made in float64,", None)
        least = TOLERANCE.get(self.dtype, 1e-3)
        self._note(
            f"{what} holds numbers that were computed in {_name(self.dtype)}, so another one, made in float64, was"
            f" compared there; of this one {_name(self.dtype)} shows no less than {least:.0e}"
        )
        return checks

    def _fits(self, slim: nn.Module) -> bool:
        free = available(self.model)
        needed = 8 * sum(p.numel() for module in (self.model, slim) for p in module.parameters())
        return self.float64 is True or free is None or needed < free

    def _compared_wide(self, slim: nn.Module, tries: Sequence[str], what: str, rounded: Exact | None) -> list[Check]:
        checks = []
        with self._unrounded(slim, rounded):
            for name in tries:
                expected = self._outputs_wide(name)
                if expected is not None:
                    found = self._run_wide(slim, double_input(self._input(name)))
                    made = checked(f"{what} on {name}", torch.float64, expected, found)
                    checks.append(self._decided(made, slim, name, wide=True))
        return checks

    @contextmanager
    def _unrounded(self, slim: nn.Module, rounded: Exact | None) -> Iterator[None]:
        """While inside, tensors of a slim model that had to be rounded are as they were before.

        Raises:
            VerificationError: They are not what comes of rounding these.
        """
        if rounded is None:
            yield
            return
        with torch.no_grad(), widening():
            exact = rounded(self.model if self._full64 is None else self._full64)
        own = {name: attribute(slim, name) for name in exact}
        wrong = [name for name, tensor in own.items() if not _rounds_to(exact[name], tensor)]
        if wrong:
            raise VerificationError(
                f"the slim model holds other numbers than those that it was to hold: {some(wrong)}\n"
                "  effect  nothing was written\n"
                "  to fix  report the model; until then keep it whole: OTO(..., skip_patterns=[...])"
            )
        before = {name: tensor.data for name, tensor in own.items()}
        self._found.pop(id(slim), None)  # what it holds is something else now
        try:
            for name, tensor in own.items():
                tensor.data = exact[name]
            yield
        finally:
            for name, tensor in own.items():
                tensor.data = before[name]
            self._found.pop(id(slim), None)

    def _run_wide(self, slim: nn.Module, given: Any) -> list[Tensor]:
        try:
            return self._run(slim, given, wide=True)
        except Exception as failure:  # code that compares dtypes of its own
            if out_of_memory(failure):
                raise
            return run(in_double(slim), given)

    # --- what a comparison would not show -----------------------------------------------------------------------------

    def require_numbers(self) -> None:
        """Make sure that the full model gives numbers on the example, for NaN is equal to NaN.

        Raises:
            VerificationError: Not one entry of its outputs is finite, in float64 either.
        """
        own = self._outputs(EXAMPLE) or []
        if any(_is_number(x).any() for x in own) or not any(x.numel() for x in own):
            return
        wide = self.dtype != torch.float64 and self._in_float64()  # in fewer digits, there may be an overflow
        if wide and any(_is_number(x).any() for x in self._wide[EXAMPLE] or []):
            return
        broken = [name for name, held in self.model.named_buffers() if not _is_number(held).all()]
        given = [t for t in tree_leaves(self.dummy_input) if isinstance(t, Tensor) and not _is_number(t).all()]
        causes = [f"NaN or infinity in the example ({some(str(tuple(t.shape)) for t in given)})"] if given else []
        causes += [f"NaN or infinity in buffers: {some(broken)}"] if broken else []
        raise VerificationError(
            f"{type(self.model).__name__} gives no number on the example that could be compared, all is NaN or inf\n"
            f"  found   {'; '.join(causes or ['an overflow, it seems: all that goes in is finite'])}\n"
            "  effect  a wrong slim model would give the same, so no subnet is built\n"
            "  to fix  an example of finite numbers, on which the model gives finite numbers"
        )

    def numbers(self) -> list[str]:
        """Of how many entries of the outputs a comparison says nothing, if of any."""
        if not self.partial:
            return []
        least = min(self.partial, key=lambda check: (check.finite or 0) / (check.entries or 1))
        return [
            f"of the outputs {least.finite:,} of {least.entries:,} entries are finite ({least.what}, {least.dtype}): of"
            " the others it is known only that they are NaN, or the same infinity, in both models"
        ]

    def unreached(self, slim: nn.Module, wanted: Mapping[str, nn.Parameter]) -> list[str]:
        """Which parameters of a slim model no output depends on, on the inputs that were compared; as notes."""
        stage("what the inputs reach")
        names = [name for name in self._given if name not in (FAST, EXAMPLE) and self._given[name] is not None]
        inputs = [self._input(name) for name in (EXAMPLE, *names[:1])]  # a batch of one is enough, where all is reached
        return reached_by(slim, wanted, inputs, available(self.model))

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
            if not equal(*((a, b) if n is None else (a[:n], b[:n]))):
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
        with around_modules(lambda module, _: met.extend([full[id(module)]] if id(module) in full else [])):
            run(slim, self.dummy_input)
        if met:
            raise EmitterError(
                f"a forward that was put into the model (model.forward = ...) runs {met[0] or 'the full model'} itself,"
                " in the slim copy too\n"
                "  effect  the slim model would compute with the full weights, so it is not handed out\n"
                "  to fix  take it out before (del model.forward), or put a method there: types.MethodType(f, model)"
            )


EXAMPLE, RANDOM, ANOTHER = "the example", "random input", "another random input"
FAST = "the example, as users run it"


def _is_number(x: Tensor) -> Tensor:
    return torch.isfinite(x) if x.is_floating_point() or x.is_complex() else torch.ones_like(x, dtype=torch.bool)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rounds_to(exact: Tensor, own: Tensor) -> bool:
    """Whether a tensor is another one in a narrower dtype, to a few of its last digits."""
    if exact.shape != own.shape or not own.is_floating_point():
        return False
    if own.dtype == exact.dtype:  # a copy, of one that was compared
        return True
    few = 8 * torch.finfo(own.dtype).eps
    return torch.allclose(own.detach().double(), exact.double(), few, few)


def check(full: nn.Module, slim: nn.Module, dummy_input: Any, what: str = "slim", **how: Any) -> list[Check]:
    """Compare a slim model with the zeroed full one; options as for :class:`Reference` and its ``check``.

    Raises:
        VerificationError: The full model gives no number that could be compared.
    """
    own = {name: how.pop(name) for name in ("left", "float64", "decides") if name in how}
    reference = Reference(full, dummy_input, **own)
    reference.require_numbers()
    return reference.check(slim, what, **how)


def _thinner(x: Tensor, masks: Sequence[NDArray[np.bool_]]) -> Tensor:
    for dim, mask in enumerate(masks):
        if not mask.all():  # a dimension of which nothing is gone may have another size, such as the batch
            x = x.index_select(dim, torch.from_numpy(np.flatnonzero(mask)).to(x.device))
    return x
