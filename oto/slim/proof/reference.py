"""Compare slim models with the zeroed full one: on the example and random inputs, in its own dtype and in float64."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oto.errors import VerificationError, first_line, reraise_out_of_memory, some
from oto.progress import stage
from oto.slim.edits import attribute
from oto.slim.proof import limits
from oto.slim.proof.compare import Check, checked, relative_error, tolerance
from oto.slim.proof.float64 import double_input, in_double, widened, widening
from oto.slim.proof.full import FullModel
from oto.slim.proof.inputs import Input, batch_size, random_like
from oto.slim.proof.memory import available
from oto.slim.proof.reach import reached_by
from oto.slim.proof.run import run
from oto.trace.decisions import Script

log = logging.getLogger(__name__)

FLOAT64 = ("auto", True, False)
HALF = (torch.float16, torch.bfloat16)
Exact = Callable[[nn.Module], Mapping[str, Tensor]]
"""Computes, from a full model, the slim tensors that were rounded to its dtype, such as those with counts folded in."""


@dataclass(frozen=True)
class CheckOptions:
    """How a slim model is compared.

    Attributes:
        what: The slim model's name in a check.
        batch: Also try a different batch size, if the full model accepts it.
        shapes: Other shapes of the example's tensors to try in the model's own dtype, if the full model accepts them;
            if the slim one does not, that is only noted.
        random: Also compare on a random input, besides the example.
        exact: Also compare in float64.
        notes: Receives what was not compared: a size that the slim model does not accept, which is an error without
            this list, and inputs for which ``lacks`` gives a reason.
        lacks: Returns why the slim model is not meant for a random input; ``None`` if it is.
        rounded: Computes, from the full model, the slim tensors that were rounded. In float64 they replace the slim
            model's own. Called while everything is computed in float64.
        in_float64: Makes a second slim model, which is compared in float64 if the first is not equal there because it
            holds numbers computed in its own dtype. Called while everything is computed in float64.
    """

    what: str = "slim"
    batch: bool = False
    shapes: Sequence[Sequence[tuple[int, ...]]] = ()
    random: bool = True
    exact: bool = True
    notes: list[str] | None = None
    lacks: Callable[[Any], str | None] | None = None
    rounded: Exact | None = None
    in_float64: Callable[[], nn.Module] | None = None


class Reference:
    """The zeroed full model that slim models are compared with.

    Models are first compared in their own dtype, on the example and on a random input, which has a different batch size
    if the batch is free. On the example they run as users run them: in inference mode, with torch's fast paths; if such
    paths may exist, the models are also compared without them. Then follows float64, which shows whether the models are
    equal or only similar (for models in half precision only on the example).

    Args:
        left: For each output and each of its dimensions, the entries that a slim model still has; all by default.
        float64: Whether to compare in float64: ``True``, ``False``, or ``"auto"`` (if it fits in memory).
        decides: Whether the model branches on its values, such as which boxes are best. Where values are equal up to
            rounding, a slim model may decide differently; it is then compared under the full model's decisions.
        brief: Compare only in float64, if that is possible.

    Attributes:
        notes: Limits of the comparisons with the last slim model; ``full.notes`` apply to every slim model.
        partial: The comparisons with the last slim model in which only some entries were finite.
    """

    notes: list[str]
    partial: list[Check]

    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,
        left: Sequence[Sequence[NDArray[np.bool_]]] | None = None,
        float64: bool | str = "auto",
        decides: bool = False,
        brief: bool = False,
    ) -> None:
        self.example = Input("the example", dummy_input)
        self.again = Input("the example, called again", dummy_input, again=True)
        self.as_users_do = Input("the example, as users run it", dummy_input, as_users_do=True)
        self.full = FullModel(model, self.example, left, float64)
        self.decides, self.brief = decides, brief
        self._latest: weakref.ref[nn.Module] | None = None
        self.notes, self.partial = [], []

    @property
    def model(self) -> nn.Module:
        return self.full.model

    @property
    def dtype(self) -> torch.dtype:
        return self.full.dtype

    @cached_property
    def random(self) -> list[Input]:
        """Two random inputs with the shapes of the example."""
        names = ("random input", "another random input")
        return [Input(name, random_like(self.example.value, seed)) for seed, name in enumerate(names)]

    @cached_property
    def larger_batch(self) -> Input | None:
        """A random input with a larger batch; ``None`` if the example has no batch."""
        size = batch_size(self.example.value)
        if size is None:
            return None
        size += 1 if size == 1 else 2  # a model may pair the examples of a batch
        return Input(f"batch of {size}", random_like(self.example.value, 0, size), optional=True)

    def check(self, slim: nn.Module, options: CheckOptions = CheckOptions()) -> list[Check]:
        """Compare a slim model with the full one."""
        if self._latest is None or self._latest() is not slim:  # notes on the previous slim model no longer apply
            self._latest, self.notes, self.partial = weakref.ref(slim), [], []
        try:
            return [check for check in self._checks(slim, options) if self._shows(check)]
        finally:
            self.full.forget(slim)

    def _checks(self, slim: nn.Module, options: CheckOptions) -> list[Check]:
        limits.require_own(self.full, slim)
        exact = options.exact and self.dtype != torch.float64
        brief = self.brief and exact and self.full.runs_in_float64()
        drawn = self._drawn(options, not brief) if options.random else []
        checks: list[Check] = []
        if not brief:
            stage(f"{options.what}: comparing in {self.full.dtype_name}")
            fast = [self.as_users_do] if self.full.has_fast_paths and options.random else []
            checks = self._compare(slim, [self.example, *fast, *drawn, *self._of_other_sizes(options)], options)
        again = [self.again] if options.random and self.full.changes(slim) else []
        checks += self._compare(slim, again, options)
        if exact and self.full.runs_in_float64():
            stage(f"{options.what}: comparing in float64")
            wide = [given for given in drawn if not given.optional] or (self.random[:1] if drawn else [])
            if self.dtype in HALF and not brief:  # a pass in float64 takes as long as ten in half precision
                wide = []
            proofs = self._prove(slim, [self.example, *again, *wide], options)
            if all(proof.passed for proof in proofs):
                checks = [self._but_for_rounding(check) for check in checks]
            checks += proofs
        return checks

    def _note(self, text: str) -> None:
        """Add a note on the slim model, once."""
        log.info(text)
        if text not in self.notes:
            self.notes.append(text)

    def _shows(self, check: Check) -> bool:
        """Whether a comparison shows anything; notes a check without finite entries and collects partial ones."""
        if check.passed and not check.finite:
            why = "no entry of the outputs is finite" if check.entries else "the outputs are empty"
            self._note(f"{check.what}, {check.dtype}: {why}, so nothing was compared")
        elif check.passed and check.finite != check.entries:
            self.partial.append(check)
        return bool(check.finite) or not check.passed

    def _drawn(self, options: CheckOptions, free: bool) -> list[Input]:
        """The random inputs to compare on."""
        larger = self.larger_batch if options.batch and free else None
        if larger is not None and self.full.outputs(larger) is not None:
            return [larger]
        if options.lacks is None:
            return self.random[:1]
        fitting = []
        for given in self.random:  # either may take a different path than the example
            missing = options.lacks(given.value)
            if missing is None:
                fitting.append(given)
            elif options.notes is not None:
                options.notes.append(f"{options.what} was not compared on {given.name}: {missing}")
        return fitting

    def _of_other_sizes(self, options: CheckOptions) -> list[Input]:
        return [
            Input(
                f"sizes {', '.join(map(str, sizes))}", random_like(self.example.value, 1, shapes=sizes), optional=True
            )
            for sizes in options.shapes
        ]

    # --- in the model's own dtype -------------------------------------------------------------------------------------

    def _compare(self, slim: nn.Module, inputs: Sequence[Input], options: CheckOptions) -> list[Check]:
        checks = []
        for given in inputs:
            expected = self.full.outputs(given)
            if expected is None:
                continue
            try:
                found = self.full.run(slim, given, fast=self.full.is_fast(given))
            except Exception as failure:
                reraise_out_of_memory(failure)
                if options.notes is None or not given.optional:
                    raise
                larger = given == self.larger_batch
                only = "takes the batch size of the example only" if larger else f"does not take {given.name}"
                note = f"{options.what} {only}: {first_line(failure)}"
                options.notes.extend([] if note in options.notes else [note])
                checks += self._compare(slim, self.random[:1], options) if larger else []
                continue
            checks.append(self._compared(slim, given, expected, found, options))
        return checks

    def _compared(
        self, slim: nn.Module, given: Input, expected: Sequence[Tensor], found: Sequence[Tensor], options: CheckOptions
    ) -> Check:
        # the code of a float64 model may state a narrower dtype, which is not widened in a run as users run it
        allowed = max(tolerance(self.dtype), 1e-3) if given.as_users_do else None
        made = checked(f"{options.what} on {given.name}", self.dtype, expected, found, allowed)
        made = self._as_the_full_decides(made, slim, given)
        return self._without_fast_paths(made, found) if given.as_users_do else made

    def _as_the_full_decides(self, check: Check, slim: nn.Module, given: Input, wide: bool = False) -> Check:
        """Repeat a failed comparison under the decisions of the full model, if that branches on values."""
        if check.passed or not self.decides:
            return check
        script = Script(measure=relative_error)
        try:
            expected = self.full.under_decisions(given, wide, script)
            script.repeat()
            found = self.full.run(slim, given, wide, script)
        except Exception as failure:  # the slim model makes a decision that the full one does not make
            reraise_out_of_memory(failure)
            log.info("under the decisions of the full model: %s", failure)
            return check
        if expected is None or script.read != len(script.written) or not any(x.is_floating_point() for x in expected):
            return check
        dtype = torch.float64 if wide else self.dtype
        again = checked(f"{check.what}, as the full model decides", dtype, expected, found)
        if not again.passed or script.apart > again.tolerance:  # more than rounding differs in what it decides from
            return check
        self._note(
            "left alone, the slim model decides differently where values are equal up to rounding, on some inputs"
        )
        return again

    def _without_fast_paths(self, check: Check, found: Sequence[Tensor]) -> Check:
        """Repeat a failed comparison on fast paths with the full model's outputs without them, if these differ."""
        plain, fast = self.full.outputs(self.example), self.full.outputs(self.as_users_do)
        assert plain is not None and fast is not None
        if check.passed or relative_error(plain, fast) <= tolerance(self.dtype):
            return check
        again = checked(f"{check.what}, beside the full model without torch's fast paths", self.dtype, plain, found)
        if not again.passed:
            return check
        self._note(
            "in inference mode, torch's fast paths make the full model give something else, such as zeros for padding;"
            " the slim one gives what the full one gives without them"
        )
        return again

    def _but_for_rounding(self, check: Check) -> Check:
        """A failed comparison of models equal in float64, with a tolerance for the full model's rounding error."""
        if check.passed:
            return check
        own, exact = self.full.outputs(self.example) or [], self.full.wide.get(self.example) or []
        rounding = relative_error(exact, [widened(x) for x in own])
        # if rounding errors are that large, no tolerance could tell a mistake from them
        return replace(check, tolerance=max(check.tolerance, 4 * rounding)) if 4 * rounding < 0.5 else check

    # --- in float64 ---------------------------------------------------------------------------------------------------

    def _prove(self, slim: nn.Module, inputs: Sequence[Input], options: CheckOptions) -> list[Check]:
        proofs = self._compare64(slim, inputs, options)
        if options.in_float64 is None or all(proof.passed for proof in proofs):
            return proofs
        with torch.no_grad(), widening():
            another = options.in_float64()
        proofs = self._compare64(another, inputs, CheckOptions(f"{options.what}, made in float64,"))
        name, least = self.full.dtype_name, tolerance(self.dtype)
        self._note(
            f"{options.what} holds numbers that were computed in {name}, so one made in float64 was compared in its"
            f" place; of this one, {name} shows no difference below {least:.0e}"
        )
        return proofs

    def _compare64(self, slim: nn.Module, inputs: Sequence[Input], options: CheckOptions) -> list[Check]:
        checks = self._compared64(slim, inputs, options)
        if all(c.passed for c in checks) or self.full.copy64 is not None or not self.full.fits_twice(slim):
            return checks
        # what a forward writes into its parameters is rounded unless the parameters are float64 themselves
        log.info("compared once more, with copies in float64")
        self.full.copy_in_float64()
        return self._compared64(in_double(slim), inputs, options)

    def _compared64(self, slim: nn.Module, inputs: Sequence[Input], options: CheckOptions) -> list[Check]:
        checks = []
        with self._exact_values(slim, options.rounded):
            for given in inputs:
                expected = self.full.outputs64(given)
                if expected is not None:
                    found = self._run64(slim, given)
                    made = checked(f"{options.what} on {given.name}", torch.float64, expected, found)
                    checks.append(self._as_the_full_decides(made, slim, given, wide=True))
        return checks

    def _run64(self, slim: nn.Module, given: Input) -> list[Tensor]:
        try:
            return self.full.run(slim, given, wide=True)
        except Exception as failure:  # the model's code may compare dtypes itself
            reraise_out_of_memory(failure)
            return run(in_double(slim), double_input(given.value), again=given.again)

    @contextmanager
    def _exact_values(self, slim: nn.Module, rounded: Exact | None) -> Iterator[None]:
        """Context manager in which tensors of a slim model that had to be rounded hold the exact values.

        Raises:
            VerificationError: The tensors are not the rounded exact values.
        """
        if rounded is None:
            yield
            return
        with torch.no_grad(), widening():
            exact = rounded(self.model if self.full.copy64 is None else self.full.copy64)
        own = {name: attribute(slim, name) for name in exact}
        wrong = [name for name, tensor in own.items() if not _rounds_to(exact[name], tensor)]
        if wrong:
            raise VerificationError(
                f"the slim model holds different numbers than it should: {some(wrong)}\n"
                "  effect  nothing was written\n"
                "  to fix  report the model; until then keep it whole: OTO(..., skip_patterns=[...])"
            )
        before = {name: tensor.data for name, tensor in own.items()}
        self.full.forget(slim)  # the slim model is about to hold different tensors
        try:
            for name, tensor in own.items():
                tensor.data = exact[name]
            yield
        finally:
            for name, tensor in own.items():
                tensor.data = before[name]
            self.full.forget(slim)

    # --- what a comparison would not show -----------------------------------------------------------------------------

    def unreached(self, slim: nn.Module, wanted: Mapping[str, nn.Parameter]) -> list[str]:
        """Notes on the parameters of a slim model that no output depends on for the compared inputs."""
        stage("what the inputs reach")
        own = self.full.own
        others = [g for g in own if g not in (self.as_users_do, self.example, self.again) and own[g] is not None]
        inputs = [
            given.value for given in (self.example, *others[:1])
        ]  # the smallest batch first, which is enough if it reaches everything
        return reached_by(slim, wanted, inputs, available(self.model))


def _rounds_to(exact: Tensor, own: Tensor) -> bool:
    """Whether a tensor is the exact one rounded to a narrower dtype, up to a few units in the last place."""
    if exact.shape != own.shape or not own.is_floating_point():
        return False
    if own.dtype == exact.dtype:  # a float64 copy of a tensor that was already compared
        return True
    few = 8 * torch.finfo(own.dtype).eps
    return torch.allclose(own.detach().double(), exact.double(), few, few)


def check(
    full: nn.Module,
    slim: nn.Module,
    dummy_input: Any,
    options: CheckOptions = CheckOptions(),
    *,
    left: Sequence[Sequence[NDArray[np.bool_]]] | None = None,
    float64: bool | str = "auto",
    decides: bool = False,
) -> list[Check]:
    """Compare a slim model with the zeroed full one, once.

    Raises:
        VerificationError: The full model's outputs hold no finite number to compare.
    """
    reference = Reference(full, dummy_input, left, float64, decides)
    limits.require_numbers(reference.full)
    return reference.check(slim, options)
