"""What a repair sees: the adaptation so far, the try, the divergence, and facts about the failing call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from oto.axes.call import Rewrite
from oto.axes.terms import Term, axes_of, resolve
from oto.slim.numbers import Key
from oto.slim.own_class.adaptation import Adaptation
from oto.slim.own_class.compare import Divergence
from oto.slim.own_class.trials import Trial, Trials
from oto.slim.own_class.workbench import Workbench
from oto.slim.pruned_shapes import PrunedShapes
from oto.trace.graph import Node


@dataclass(frozen=True)
class Proposal:
    """An adaptation that may get the class further.

    Attributes:
        adaptation: The complete new adaptation.
        reason: What is new, in words.
        is_guess: Whether to try the other proposals too, unless this one gets far beyond the call.
        must_pass: Whether the class must get beyond the call; more correct sizes in it are not enough.
        restates: Whether numbers now follow from other terms, so that earlier tries have to be repeated.
        counts: Numbers of atoms per group to try; the class must get beyond the call with each of them.
    """

    adaptation: Adaptation
    reason: str
    is_guess: bool = False
    must_pass: bool = False
    restates: bool = False
    counts: Sequence[Mapping[str, int]] = ()


@dataclass(frozen=True, eq=False)
class Situation:
    """A divergence, and everything that a repair may look at."""

    bench: Workbench
    trials: Trials
    adaptation: Adaptation
    trial: Trial
    divergence: Divergence

    @property
    def index(self) -> int:
        return self.divergence.index

    @property
    def node(self) -> Node:
        return self.bench.graph.nodes[self.index]

    @property
    def rewrite(self) -> Rewrite | None:
        return self.rewrite_of(self.index)

    def rewrite_of(self, index: int) -> Rewrite | None:
        return self.bench.partition.found.tape.rewrites.get(index)

    @cached_property
    def pruned(self) -> PrunedShapes:
        return self.trials.prune(self.adaptation, self.trial)

    def changes(self, index: int) -> bool:
        """Whether a size that a call depends on gets smaller in this try."""
        rewrite = self.rewrite_of(index)
        return rewrite is not None and self.pruned.changes(rewrite)

    @cached_property
    def spreads(self) -> list[list[int]]:
        """Sets of calls that one repair may cover, widest first: calls from the same line, then of repeated blocks."""
        blocks = self.bench.blocks
        found: list[list[int]] = [blocks.alike(self.index)]
        for wider in (blocks.same_line(self.index), blocks.every_turn(self.index)):
            if set(wider) - set(found[0]):
                found.insert(0, wider)
        return found

    def held(self, path: str) -> dict[Key, int | float]:
        """The numbers that a module holds."""
        return dict(self.bench.numbers(path))

    def is_width(self, term: Term) -> bool:
        """Whether a dimension is made only of axes of parameters, so it is not a batch or a sequence length."""
        axes = list(axes_of(resolve(term)))
        return bool(axes) and all(axis in self.trials.names for axis in axes)
