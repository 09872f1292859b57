"""Where the search stands: what was tried, where the class diverged, and what a repair may ask about that place."""

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
        adaptation: The whole of it.
        reason: What is new, for people.
        is_guess: Whether other proposals are looked at, too, unless the class gets far beyond the call.
        must_pass: Whether it counts only if the class gets beyond the call, and not if more of its sizes are right.
        restates: Whether numbers follow from other terms than before, so that earlier tries have to be made again.
        counts: Where it shows, so many atoms of some groups; with each of these the class must get beyond the call.
    """

    adaptation: Adaptation
    reason: str
    is_guess: bool = False
    must_pass: bool = False
    restates: bool = False
    counts: Sequence[Mapping[str, int]] = ()


@dataclass(frozen=True, eq=False)
class Situation:
    """A divergence, and all that is known when a repair is looked for."""

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
        """Whether a size that a call stands on gets smaller in this try."""
        rewrite = self.rewrite_of(index)
        return rewrite is not None and self.pruned.changes(rewrite)

    @cached_property
    def spreads(self) -> list[list[int]]:
        """Calls that a repair may hold for, too, the most first: of the same line, and of blocks of the same path."""
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
        """Whether a dimension is made of such that parameters have, and is no batch or other length."""
        axes = list(axes_of(resolve(term)))
        return bool(axes) and all(axis in self.trials.names for axis in axes)
