"""The zeroed full model, with which every slim one is compared."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oto._torch import tree_leaves
from oto.errors import EmitterError, VerificationError, first_line, out_of_memory
from oto.nn import Told
from oto.progress import stage
from oto.slim.memory import available, size_of
from oto.slim.verify import TOLERANCE, Check, random_like, relative_error, run
from oto.slim.wide import double_input, dtype_of, in_double, widened, widening
from oto.trace.found import Found
from oto.trace.record import Script, around_modules

log = logging.getLogger(__name__)

FLOAT64 = ("auto", True, False)
HALF = (torch.float16, torch.bfloat16)
Wider = Callable[[nn.Module], nn.Module]


@dataclass(eq=False)
class Reference:
    """The zeroed full model, and what it gives: computed once per input and dtype, for every comparison with it.

    Slim models are compared on the example and on a random input, in the model's dtype; where the batch is free, the
    random input is of another batch size. And in float64, where it shows whether they are equal or only alike (for
    models in half precision on the example alone). For that nothing is copied: parameters are widened as they are read.
    A model that minds it is copied in float64.

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
            wider: Makes the slim model for float64, of the full one, where weights of it are rounded; by default the
                slim one is taken as it is. It is called while everything is computed in float64.
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
        if self.dtype in HALF and not brief:  # for which a pass in float64 takes as long as ten
            wide = []
        checks: list[Check] = []
        if not brief:
            stage(f"{what}: comparing in {_name(self.dtype)}")
            sizes = {f"sizes {', '.join(map(str, shape))}": shape for shape in shapes}
            self._shapes.update(sizes)
            checks = self._compare(slim, [EXAMPLE, *drawn, *sizes], what, notes)
        if exact and self._in_float64():
            stage(f"{what}: comparing in float64")
            proofs = self._compare_wide(slim, [EXAMPLE, *wide], what, wider)
            if all(proof.passed for proof in proofs):
                checks = [self._but_for_rounding(check) for check in checks]
            checks += proofs
        return checks

    def _but_for_rounding(self, check: Check) -> Check:
        """Where two models are equal in float64, one may be as far from the other as rounding takes it from itself."""
        if check.passed:
            return check
        own, exact = self._outputs(EXAMPLE) or [], self._wide.get(EXAMPLE) or []
        rounding = relative_error(exact, [widened(x) for x in own])
        # where rounding is all there is to see, no distance would show a mistake
        return replace(check, tolerance=max(check.tolerance, 4 * rounding)) if 4 * rounding < 0.5 else check

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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checked(what: str, dtype: torch.dtype, expected: Sequence[Tensor], found: Sequence[Tensor]) -> Check:
    return Check(what, _name(dtype), relative_error(expected, found), TOLERANCE.get(dtype, 1e-3))


def check(full: nn.Module, slim: nn.Module, dummy_input: Any, what: str = "slim", **how: Any) -> list[Check]:
    """Compare a slim model with the zeroed full one; options as for :class:`Reference` and its ``check``."""
    own = {name: how.pop(name) for name in ("left", "float64", "decides") if name in how}
    return Reference(full, dummy_input, **own).check(slim, what, **how)


def _thinner(x: Tensor, masks: Sequence[NDArray[np.bool_]]) -> Tensor:
    for dim, mask in enumerate(masks):
        if not mask.all():  # a dimension of which nothing is gone may have another size, such as the batch
            x = x.index_select(dim, torch.from_numpy(np.flatnonzero(mask)).to(x.device))
    return x
