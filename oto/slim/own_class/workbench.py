"""Try adaptations on a copy of the model: change it in place, run it, compare its calls, and restore it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from oto.axes.registry import known
from oto.errors import reraise_out_of_memory
from oto.groups import Partition
from oto.slim.edits import Edits, attribute, pruned_tensor, slim_copy, tensors_of
from oto.slim.numbers import Key
from oto.slim.own_class.adaptation import Adaptation
from oto.slim.own_class.attributes import numbers
from oto.slim.own_class.blocks import Blocks, ancestors
from oto.slim.own_class.compare import Comparison, Divergence, Full, Run
from oto.slim.own_class.layers import DeclinedError, Layers, edits_of, stock
from oto.slim.own_class.overrides import FunctionCalls
from oto.slim.own_class.rescale import Uses
from oto.slim.own_class.result import OwnClass
from oto.slim.own_class.swapped import Copy
from oto.slim.own_class.traced import traced
from oto.slim.pruned_shapes import PrunedShapes
from oto.trace.decisions import Script
from oto.trace.functions import FunctionCall
from oto.trace.graph import Graph, Mode
from oto.trace.record import follow
from oto.trace.snapshot import Snapshot

AHEAD = 64
"""Number of calls beyond a divergence after which a run is stopped: enough to see that the divergence is repaired, and
few compared with a whole run."""


_KNOWN = 32
"""Number of cached runs: as many as one divergence has proposals. Exceptions in the cache keep their calls alive, so it
should not be larger."""


class Workbench:
    """Runs adapted copies of a model and compares their calls with those of the full model.

    Attributes:
        full: The calls of the full model.
        calls: The torch functions that it calls.
        blocks: Which of its calls have the same position in repeated blocks.
        is_reproducible: Whether the full model, run again, makes the recorded calls.
        is_traced: Whether the attributes are known from which numbers in the calls' arguments come.
        runs: How many times a thinner copy was run.
    """

    def __init__(self, model: nn.Module, partition: Partition, dummy_input: Any) -> None:
        self.model, self.partition, self.dummy_input = model, partition, dummy_input
        self.graph: Graph = partition.found.graph
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.runs = 0
        self._known: dict[tuple[int, int], tuple[Adaptation, PrunedShapes, Divergence | None]] = {}
        self._numbers: dict[str, list[tuple[Key, int | float]]] = {}
        self.is_traced = False
        self.mode = self.graph.mode
        self.script: Script | None = None
        self.full = Full(partition.found)
        self.calls = FunctionCalls(partition, [])
        self.is_reproducible = self._follow_full()
        self.blocks = Blocks(self.graph, self.modules, self.calls.recorded)
        self.layers = Layers.of(model, self.graph)

    # --- the full model -----------------------------------------------------------------------------------------------

    def _follow_full(self) -> bool:
        """Whether the full model, run again, makes the recorded calls; sets the mode in which it does.

        If possible, a run on data repeats the decisions of the analysis: a thinner copy must take the same path
        whatever its tensors hold, and so must the full model, which may decide differently after training or zeroing.
        """
        if self.graph.mode != "real":
            return self._follows(self.graph.mode, None)
        ways: list[tuple[Mode, Script | None]] = [("real", self.graph.script), ("autograd", self.graph.script)]
        return any(self._follows(*way) for way in (*ways, ("real", None), ("autograd", None)))

    def _follows(self, mode: Mode, script: Script | None) -> bool:
        self.is_traced = self._follow_traced(mode, script)
        return self.is_traced or self._follow(self.model, mode, script)

    def _follow_traced(self, mode: Mode, script: Script | None) -> bool:
        """:meth:`_follow` for a copy whose integers carry the attributes that they come from."""
        try:
            copy = self._copy
            with traced(copy.model, lambda module: stock(module) is not None):
                return self._follow(copy.model, mode, script, copy)
        except Exception as failure:  # the class cannot be copied, or refuses to have attributes set
            reraise_out_of_memory(failure)
            vars(self).pop("_copy", None)
            return False

    def _follow(self, model: nn.Module, mode: Mode, script: Script | None, copy: Copy | None = None) -> bool:
        functions: list[FunctionCall] = []
        literals: list[FunctionCall] = []
        if script is not None:
            script.repeat()
        elif self.graph.mode == "real":
            script = Script()
        calls, failure = follow(
            model,
            self.dummy_input,
            known,
            mode,
            functions,
            script=script,
            literals=literals,
            found=None if copy is None else copy.found,
            bare=copy is not None and copy.is_swappable,
        )
        if failure is not None or [call.op for call in calls] != [node.op for node in self.graph.nodes]:
            return False
        self.mode, self.script, self.full.literals = mode, script, literals
        self.calls = FunctionCalls(self.partition, functions)
        return True

    # --- thinner copies -----------------------------------------------------------------------------------------------

    def divergence(self, adaptation: Adaptation, pruned: PrunedShapes, beyond: int | None = None) -> Divergence | None:
        """The first call at which the adapted class differs from what is expected; ``None`` if there is none.

        Args:
            adaptation: The adaptation to run.
            pruned: The shapes of the thinner copy.
            beyond: A call at which the class diverged before; the copy is only run as far as needed to see whether it
                still does.
        """
        known_here = self._known.get((id(adaptation), id(pruned)))
        if known_here is not None:
            return known_here[2]
        self.runs += 1
        try:
            edits = edits_of(self.layers, pruned, OwnClass(adaptation, self.calls), sizes_only=True)
            run = self._run(edits, adaptation, pruned, None if beyond is None else beyond + AHEAD)
        except DeclinedError as declined:
            return Divergence(self.first_in(declined.path), declined)
        except Exception as refused:  # the class cannot be copied, or refuses to have attributes set
            reraise_out_of_memory(refused)
            return Divergence(0, refused)
        found = Comparison(self.full, run, adaptation, pruned, edits).divergence()
        if not run.is_cut:  # after a repair, the search repeats the run that showed that it helps
            if len(self._known) >= _KNOWN:
                self._known.clear()
            self._known[id(adaptation), id(pruned)] = adaptation, pruned, found
        return found

    def _run(self, edits: Edits, adaptation: Adaptation, pruned: PrunedShapes, limit: int | None) -> Run:
        literals: list[FunctionCall] = []
        if self.script is not None:
            self.script.repeat()
        if self._copy.is_swappable:
            slim, found = self._copy.edited(edits, self._thin(pruned, adaptation, changed=True)), self._copy.found
        else:
            slim, found = slim_copy(self.model, self._thin(pruned, adaptation), edits), self._held_by_model
        calls, failure = follow(
            slim,
            self.dummy_input,
            known,
            self.mode,
            script=self.script,
            limit=limit,
            literals=literals,
            found=found,
            bare=self._copy.is_swappable,
        )
        return Run(calls, failure, literals, is_cut=failure is None and len(calls) == limit)

    @cached_property
    def _copy(self) -> Copy:
        """The copy that is run: first whole, with traced integers, then thinner.

        Raises:
            EmitterError: The model cannot be copied.
        """
        return Copy.of(slim_copy(self.model, self._whole(), Edits()), self.dummy_input)

    @property
    def copy(self) -> Copy | None:
        """The copy that was run, if it can be changed and restored by others and holds no data; else ``None``."""
        made: Copy | None = vars(self).get("_copy")
        return made if made is not None and made.is_swappable and self.graph.mode != "real" else None

    def _thin(self, pruned: PrunedShapes, own: Adaptation, changed: bool = False) -> dict[str, Tensor]:
        """Thinner tensors for those of the model, by name; if the run needs no data, only constants hold data.

        Args:
            own: The adaptation, whose counts are folded into parameters.
            changed: Include only tensors that change, by their first name.
        """
        made: dict[str, Tensor] = {}
        taking = own.scales if self.script is not None else {}
        for leaf in self.graph.leaves:
            shape, scales = pruned.sizes(leaf.value), taking.get(leaf.name, ())
            if not leaf.names or (changed and shape == tuple(leaf.value.shape) and not scales):
                continue
            if self.script is not None or leaf.kind == "constant":
                new = pruned_tensor(self.model, pruned, leaf, scales)
            else:
                new = torch.empty(shape, dtype=leaf.value.dtype, device="meta")
            made.update(dict.fromkeys(leaf.names[:1] if changed else leaf.names, new))
        return made

    def _whole(self) -> dict[str, Tensor]:
        """The tensors of a copy that is not thinner: those of the model if it is run on data, else without data."""
        return tensors_of(self.model, self.partition) if self.graph.mode == "real" else self._empty()

    def _empty(self) -> dict[str, Tensor]:
        """Tensors without data for those of the model, except constants, whose numbers a forward may read."""
        made: dict[str, Tensor] = {}
        for leaf in self.graph.leaves:
            if leaf.names:
                empty = torch.empty(leaf.value.shape, dtype=leaf.value.dtype, device="meta")
                tensor = attribute(self.model, leaf.names[0]).clone() if leaf.kind == "constant" else empty
                made.update(dict.fromkeys(leaf.names, tensor))
        return made

    @cached_property
    def uses(self) -> Uses:
        """The calls that make and read each tensor."""
        return Uses.of(self.graph)

    @cached_property
    def _held_by_model(self) -> Snapshot:
        """Snapshot of the model's state; a copy that is discarded shares some of it."""
        return Snapshot(self.model, self.dummy_input)

    def numbers(self, path: str) -> list[tuple[Key, int | float]]:
        """The numbers in the attributes of a module, with their keys."""
        if path not in self._numbers:
            self._numbers[path] = list(numbers(self.modules[path]))
        return self._numbers[path]

    def first_in(self, path: str) -> int:
        """Index of the first call that a module makes; 0 if it makes none."""
        return next((n.index for n in self.graph.nodes if path in ancestors(n.module)), 0)
