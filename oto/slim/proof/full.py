"""The zeroed full model and its outputs, computed once per input and dtype and used by every comparison."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oto.errors import VerificationError, first_line, out_of_memory, reraise_out_of_memory
from oto.slim.proof.compare import tolerance
from oto.slim.proof.float64 import double_input, dtype_of, in_double
from oto.slim.proof.inputs import Input
from oto.slim.proof.memory import available, size_of
from oto.slim.proof.run import run
from oto.trace.decisions import Script
from oto.trace.snapshot import Snapshot

log = logging.getLogger(__name__)

FAST_PATHS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""Modules that run differently in inference mode: with fused kernels, and with nested tensors for padding."""

Outputs = list[Tensor]


@dataclass(eq=False)
class FullModel:
    """The zeroed full model.

    Running in float64 needs no copy: parameters are widened as they are read. The model is copied only if that fails.

    Attributes:
        example: The example input, which the model is known to accept.
        left: For each output and each of its dimensions, the entries that a slim model still has; all by default.
        float64: Whether to compute in float64: ``True``, ``False``, or ``"auto"`` (if it fits in memory).
        notes: Limits of the comparison, for the user.
        own: The outputs in the model's own dtype for each input so far; ``None`` for an input that it does not accept.
        wide: The outputs in float64.
        copy64: The float64 copy, if one was needed.
    """

    model: nn.Module
    example: Input
    left: Sequence[Sequence[NDArray[np.bool_]]] | None = None
    float64: bool | str = "auto"
    notes: list[str] = field(default_factory=list)
    own: dict[Input, Outputs | None] = field(default_factory=dict)
    wide: dict[Input, Outputs | None] = field(default_factory=dict)
    copy64: nn.Module | None = None
    _found: dict[int, tuple[nn.Module, Snapshot]] = field(default_factory=dict)

    @cached_property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.model)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def note(self, text: str) -> None:
        """Add a note for the user, once."""
        log.info(text)
        if text not in self.notes:
            self.notes.append(text)

    # --- running ------------------------------------------------------------------------------------------------------

    def run(
        self, module: nn.Module, given: Input, wide: bool = False, script: Script | None = None, fast: bool = False
    ) -> Outputs:
        """Run this model or a slim one; a snapshot of the module's state is taken only once."""
        if id(module) not in self._found:
            self._found[id(module)] = module, Snapshot(module, self.example.value)
        value = double_input(given.value) if wide or module is self.copy64 else given.value
        return run(module, value, wide, self._found[id(module)][1], script, fast, given.again)

    def changes(self, slim: nn.Module) -> bool:
        """Whether a run of this model or of a slim one left state behind that the next run may read."""
        seen = [self._found[id(module)][1] for module in (self.model, slim) if id(module) in self._found]
        return any(found.changed for found in seen)

    def forget(self, module: nn.Module) -> None:
        """Drop the snapshot of a module, so that a new one is taken when it runs again."""
        self._found.pop(id(module), None)

    def is_fast(self, given: Input) -> bool:
        """Whether models run on an input as users run them, that is in inference mode."""
        return given.as_users_do or (given == self.example and not self.has_fast_paths)

    @cached_property
    def has_fast_paths(self) -> bool:
        """Whether the model may compute something different on the example in inference mode."""
        own = any(isinstance(module, FAST_PATHS) for module in self.model.modules())
        if own or self.dtype == torch.float64:  # a float64 model is otherwise computed in float64 throughout
            return True
        try:
            outputs = self.run(self.model, self.example, fast=True)
        except Exception as failure:  # inference mode has rules of its own
            reraise_out_of_memory(failure)
            log.info("the full model does not run in inference mode: %s", first_line(failure))
            return True
        self.own[self.example] = self._still_there(outputs)
        return False

    def outputs(self, given: Input) -> Outputs | None:
        """The outputs in the model's own dtype; ``None`` if it does not accept the input."""
        fast = self.is_fast(given)  # this may already have run the model on the example
        if given not in self.own:
            self.own[given] = self.expected(given, lambda: self.run(self.model, given, fast=fast))
        return self.own[given]

    def outputs64(self, given: Input) -> Outputs | None:
        """The outputs in float64; ``None`` if the model does not accept the input."""
        if given not in self.wide:
            self.wide[given] = self.expected(given, lambda: self._run64(given))
        return self.wide[given]

    def under_decisions(self, given: Input, wide: bool, script: Script) -> Outputs | None:
        """The outputs of a run that records its value-dependent decisions in a script."""
        full = self.copy64 if wide and self.copy64 is not None else self.model
        return self.expected(given, lambda: self.run(full, given, wide and full is self.model, script))

    def expected(self, given: Input, give: Callable[[], Outputs]) -> Outputs | None:
        """The outputs that a slim model should have; ``None`` if the full model does not accept the input."""
        try:
            outputs = give()
        except Exception as failure:  # inputs may have to fit together, as the number of image tokens does
            if given == self.example or out_of_memory(failure):
                raise
            log.info("the full model does not take %s: %s", given.name, failure)
            if given.as_users_do:
                self.note(f"the full model does not run in inference mode, so that was not compared: {failure}")
            return None
        return self._still_there(outputs)

    def _still_there(self, outputs: Outputs) -> Outputs:
        if self.left is None:
            return outputs
        return [_entries(x, masks) for x, masks in zip(outputs, self.left, strict=True)]

    # --- in float64 ---------------------------------------------------------------------------------------------------

    def insist(self) -> None:
        """Check that the model runs in float64 if float64 was requested.

        Raises:
            VerificationError: The model does not run in float64.
        """
        if self.float64 is True and self.dtype != torch.float64:
            self.runs_in_float64()

    def runs_in_float64(self) -> bool:
        """Whether there are float64 outputs to compare with; runs the model on the example at the first call."""
        if self.float64 is False:
            self._lacks_float64("float64=False")
        elif self.example not in self.wide:
            self._start_float64()
        return bool(self.wide.get(self.example))

    def copy_in_float64(self) -> None:
        """From now on, run a float64 copy in place of the model with widened parameters."""
        self.copy64 = in_double(self.model)
        self.wide.clear()

    def fits_twice(self, slim: nn.Module) -> bool:
        """Whether float64 copies of both models fit in memory; assumed if that is unknown or float64 was requested."""
        free = available(self.model)
        needed = 8 * sum(p.numel() for module in (self.model, slim) for p in module.parameters())
        return self.float64 is True or free is None or needed < free

    def _run64(self, given: Input) -> Outputs:
        return self.run(self.model, given, wide=True) if self.copy64 is None else self.run(self.copy64, given)

    def _start_float64(self) -> None:
        self.wide[self.example] = None
        failure: Exception | None = None
        for copied in (False, True):
            needed, free = self._memory_in_float64(copied), available(self.model)
            if self.float64 == "auto" and free is not None and needed > free:
                self._lacks_float64(f"it would take {size_of(needed)} of memory, and {size_of(free)} are free")
                return
            try:
                if copied:
                    self.copy64 = in_double(self.model)
                self.wide[self.example] = self.expected(self.example, lambda: self._run64(self.example))
                return
            except Exception as raised:
                if out_of_memory(raised) and self.float64 is True:
                    raise
                failure, self.copy64 = raised, None
        assert failure is not None
        if self.float64 is True:
            raise VerificationError(
                f"{type(self.model).__name__} does not run in float64: {first_line(failure)}\n"
                "  effect  the proof that was asked for cannot be made, and nothing was written\n"
                "  to fix  float64='auto', or see that error: some code states a dtype"
            ) from failure
        self._lacks_float64(f"the model does not run in it ({first_line(failure, 80)})")

    def _memory_in_float64(self, copied: bool) -> int:
        """Bytes that a float64 run takes; products widen matrices in blocks, other parameters are widened whole."""
        largest = max((p.numel() for p in self.model.parameters() if p.ndim != 2), default=0)
        return 8 * (sum(p.numel() for p in self.model.parameters()) + largest if copied else 2 * largest)

    def _lacks_float64(self, why: str) -> None:
        least = f"{tolerance(self.dtype):.0e}"
        self.note(f"compared in {self.dtype_name} only, which shows no less than {least}, not in float64: {why}")


def _entries(x: Tensor, masks: Sequence[NDArray[np.bool_]]) -> Tensor:
    """The entries of an output that a slim model still has."""
    for dim, mask in enumerate(masks):
        if not mask.all():  # a dimension that lost nothing, such as the batch, may have another size here
            x = x.index_select(dim, torch.from_numpy(np.flatnonzero(mask)).to(x.device))
    return x
