"""Search for what the model's own class needs in order to be thinner, and for the groups that must stay whole.

A copy of the model with thinner tensors, usually without data, is run, and its calls are compared with those of the
full model. If each is the same call on the same tensors, with the thinner shapes and sizes that the analysis expects,
the class computes the same as the rewritten graph, and no numbers have to be compared. The first call that differs is
the divergence. Repairs are proposed and tried, and the one with which the class runs further is kept.

Example: a ``forward`` calls ``x.view(b, t, 12, 64)``, and three heads are removed. The view is the divergence; the
repair sets the attribute that holds 12, or overrides the call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from oto.axes.terms import axes_of, resolve, size_of
from oto.errors import EmitterError
from oto.groups import Kept, NodeGroup, Partition
from oto.groups.layout import merge_ties
from oto.groups.policy import keep_whole
from oto.progress import stage
from oto.slim.own_class.adaptation import Adaptation
from oto.slim.own_class.attributes import AttributePlace, SizeAttribute
from oto.slim.own_class.blocks import ancestors
from oto.slim.own_class.compare import Divergence
from oto.slim.own_class.layers import stock
from oto.slim.own_class.repairs import (
    call_overrides,
    folded_counts,
    minimum_widths,
    size_attributes,
    ties,
    whole,
)
from oto.slim.own_class.result import Decision, OwnClass
from oto.slim.own_class.situation import Proposal, Situation
from oto.slim.own_class.trials import THIN, Kind, Trial, Trials
from oto.slim.own_class.workbench import Workbench

log = logging.getLogger(__name__)

CLASS = "its class cannot do without: no attribute states the size"
_ROUNDS = 200
"""Number of repairs after which divergences are only repaired by limits, such as keeping groups whole: several times
what the largest classes need."""
_FAR = 20
"""A proposal with which the class runs this many calls beyond the divergence is accepted at once: a wrong one fails
within a few calls."""
_LAST, _LAST_SAYS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), "it is a dimension of an output"

Repair = Callable[[Situation], Iterator[Proposal]]
COUNTS: Sequence[Repair] = (folded_counts.proposals, call_overrides.proposals)
SIZES: Sequence[Repair] = (
    ties.equal_pieces,
    ties.shared_attributes,
    size_attributes.named,
    size_attributes.proposals,
    call_overrides.proposals,
    ties.same_widths,
)
OVERRIDE_FIRST: Sequence[Repair] = (
    ties.equal_pieces,
    ties.shared_attributes,
    size_attributes.named,
    call_overrides.proposals,
    size_attributes.proposals,
    ties.same_widths,
)
LIMITS: Sequence[Repair] = (minimum_widths.proposals, whole.proposals)
AT_COUNTS: Sequence[Repair] = (
    size_attributes.named,
    size_attributes.proposals,
    call_overrides.proposals,
    minimum_widths.another_size,
)
"""The repairs to try, in order: for a call that divides by a count; for any other call; for a call whose sizes come
from no known attribute; limits of the groups, if none of these helps; and for given counts, which can only be increased
by zero atoms."""


def own_class(
    model: nn.Module, partition: Partition, groups: Sequence[NodeGroup], dummy_input: Any, keeps: bool = False
) -> OwnClass:
    """Search for what the class of ``model`` needs in order to be thinner.

    Args:
        groups: Node groups; only prunable ones may get thinner.
        keeps: Also return the copy on which the class was searched.
    """
    trials = Trials(partition, groups)
    bench = Workbench(model, partition, dummy_input)
    adaptation = Adaptation(ties=_ties_of(groups))
    if not bench.is_reproducible:
        return OwnClass(adaptation.with_whole(dict.fromkeys(trials.free, 0)), bench.calls)
    found = Search(bench, trials, adaptation.with_sizes(stated_by_code(bench, trials))).result()
    return replace(found, copy=bench.copy) if keeps else found


def at_counts(
    model: nn.Module, partition: Partition, groups: Sequence[NodeGroup], dummy_input: Any, own: OwnClass, kept: Kept
) -> tuple[OwnClass, Kept]:
    """Search for what the class needs for exactly these counts.

    Args:
        own: The result of the search for arbitrary counts.
        kept: The remaining atoms of each prunable group.

    Returns:
        What the class needs, and the atoms to keep: with some additional zero atoms if the class branches on sizes.

    Raises:
        EmitterError: No repair makes the class run with these counts, or the class makes other calls than recorded.
    """
    name = type(model).__name__
    bench = Workbench(model, partition, dummy_input)
    if not bench.is_reproducible:
        raise EmitterError(f"{name} makes other calls than those that were recorded")
    trials = Trials(partition, groups, kept)
    search = Search(bench, trials, replace(own.adaptation, whole={}, minimum={}))
    found = search.result(describes=False)
    if search.failed:
        last = found.steps[-1]
        raise EmitterError(f"{last.source or 'a line'}, in {last.module or name}: {last.operator}: {last.saw}")
    return found, trials.at_least(found.adaptation.minimum)


def limited(groups: Sequence[NodeGroup], own: OwnClass) -> tuple[NodeGroup, ...]:
    """The node groups with the limits of the class: some stay whole, are tied, or have a minimum number of atoms."""
    minimum = own.adaptation.minimum
    enough = [replace(g, min_kept=max(g.min_kept, minimum.get(g.name, 0))) for g in groups]
    return merge_ties(keep_whole(enough, own.whole, CLASS), own.ties)


@dataclass(eq=False)
class Search:
    """Repairs an adaptation until no trial diverges.

    Attributes:
        bench: Runs adapted copies.
        trials: The trials to pass.
        adaptation: The current adaptation; replaced, never modified.
        steps: The decisions so far.
        failed: Whether a divergence could not be repaired, which can happen at given counts.
    """

    bench: Workbench
    trials: Trials
    adaptation: Adaptation
    steps: list[Decision] = field(default_factory=list)
    failed: bool = False

    def result(self, describes: bool = True) -> OwnClass:
        """Run the search.

        Args:
            describes: Also update attributes that only describe the input width of the last layer.
        """
        right: set[Trial] = set()
        trial: Trial | None = Trial(Kind.ALL)
        while not self.failed and (trial := self._next(right, trial)) is not None:
            divergence = self._divergence(self.adaptation, trial)
            free = self.trials.free.keys() - self.adaptation.whole.keys()
            if divergence is None or (not free and self.trials.given is None):  # passed, or nothing is thinner
                right.add(trial)
                continue
            stage(f"asking its class, call {divergence.index:,} of {len(self.bench.graph.nodes):,}")
            log.info("own class: %s, call %d: %s", trial, divergence.index, divergence)
            right.clear()
            self._repair(Situation(self.bench, self.trials, self.adaptation, trial, divergence))
        if describes:
            self._describe()
        return OwnClass(self.adaptation, self.bench.calls, tuple(self.steps))

    def _next(self, right: set[Trial], last: Trial | None) -> Trial | None:
        """The next trial in cyclic order that has not passed, starting with the last one."""
        tries = self.trials.of(self.adaptation)
        at = tries.index(last) if last is not None and last in tries else 0
        return next((trial for trial in tries[at:] + tries[:at] if trial not in right), None)

    def _divergence(self, adaptation: Adaptation, trial: Trial, beyond: int | None = None) -> Divergence | None:
        return self.bench.divergence(adaptation, self.trials.prune(adaptation, trial), beyond)

    # --- one repair ---------------------------------------------------------------------------------------------------

    def _repair(self, at: Situation) -> None:
        """Apply the first kind of repair with which the class runs further."""
        tried: list[str] = []
        for repair in self._repairs(at):
            found = self._best(at, repair, tried)
            if found is not None:
                self.adaptation = found.adaptation
                self.steps.append(_step(at, tried, found.reason))
                return
        self.failed = True
        self.steps.append(_step(at, tried, "nothing helps"))

    def _repairs(self, at: Situation) -> Iterable[Repair]:
        counts = at.index in self.bench.partition.found.tape.counted and at.changes(at.index)
        if self.trials.given is not None:
            many = len(self.steps) > _ROUNDS
            return () if many else COUNTS if counts else AT_COUNTS
        if len(self.steps) > _ROUNDS or at.trial.kind in THIN:
            return LIMITS
        sizes = OVERRIDE_FIRST if call_overrides.is_stated_by_none(at) else SIZES
        return (*(COUNTS if counts else sizes), *LIMITS)

    def _best(self, at: Situation, repair: Repair, tried: list[str]) -> Proposal | None:
        """The proposal with which the class runs furthest, or the first with which it runs far enough.

        If proposals to keep groups whole do not make it run further, the last of them.
        """
        best: Proposal | None = None
        reached = at.divergence.progress
        last: Proposal | None = None
        for proposal in repair(at):
            tried.append(proposal.reason)
            last = proposal
            after = self._reached(at, proposal)
            if after is None or after.index > at.index + (_FAR if proposal.is_guess else 0):
                if self._holds(at, proposal):
                    return proposal
            elif not proposal.must_pass and after.progress > reached and self._holds(at, proposal):
                best, reached = proposal, after.progress
        return last if best is None and repair is whole.proposals else best

    def _reached(self, at: Situation, proposal: Proposal) -> Divergence | None:
        """The divergence with a proposal; ``None`` if there is none."""
        after: Divergence | None = None
        for counts in proposal.counts or (None,):
            pruned = self.trials.prune(proposal.adaptation, at.trial, counts)
            after = self.bench.divergence(proposal.adaptation, pruned, at.index)
            if after is not None and after.index <= at.index:
                break
        return after

    def _holds(self, at: Situation, proposal: Proposal) -> bool:
        """Whether earlier trials still pass, if the proposal changes the terms that numbers are computed from."""
        tries = self.trials.of(proposal.adaptation)
        before = tries[: tries.index(at.trial)] if proposal.restates and at.trial in tries else []
        return all(self._divergence(proposal.adaptation, trial) is None for trial in before)

    # --- attributes that no call needs --------------------------------------------------------------------------------

    def _describe(self) -> None:
        """Update attributes that hold the input width of the last layer, unless a forward then diverges.

        Methods that replace the last layer read such attributes, for example ``num_features`` in ``reset_classifier``.
        """
        adaptation = self.adaptation
        found = self.bench.partition.found
        made: dict[AttributePlace, SizeAttribute] = {}
        for leaf in self.bench.graph.leaves:
            path, _, name = leaf.name.rpartition(".")
            kind = stock(self.bench.modules.get(path))
            if name != "weight" or kind is None or not issubclass(kind, _LAST) or len(leaf.value.shape) < 2:
                continue
            out, into = (resolve(term) for term in found.terms(leaf.value)[:2])
            if not any(axis.fixed is not None and axis.fixed.text == _LAST_SAYS for axis in axes_of(out)):
                continue
            for holder in ancestors(path)[1:]:
                for key, value in self.bench.numbers(holder):
                    if len(key) == 1 and value == size_of(into) and isinstance(value, int):
                        made.setdefault(AttributePlace(holder, key), SizeAttribute(into, value))
        new = adaptation.with_sizes({place: size for place, size in made.items() if place not in adaptation.sizes})
        if new.sizes != adaptation.sizes and self._divergence(new, Trial(Kind.ALL)) is None:
            self.adaptation = new


def stated_by_code(bench: Workbench, trials: Trials) -> dict[AttributePlace, SizeAttribute]:
    """The attributes that calls take unchanged, and the sizes that they are there."""
    made: dict[AttributePlace, SizeAttribute] = {}
    for node in bench.graph.nodes:
        for place, size in bench.calls.attributes_of(node, bench.partition.found.tape.rewrites.get(node.index)).items():
            axes = {trials.names.get(axis) for axis in axes_of(resolve(size.term))}
            if not axes.isdisjoint(trials.free):
                made.setdefault(place, size)
    return made


def _ties_of(groups: Sequence[NodeGroup]) -> tuple[tuple[str, ...], ...]:
    """The ties that the groups already have."""
    tied: dict[str, list[str]] = {}
    for group in groups:
        if group.tie is not None and group.prunable:
            tied.setdefault(group.tie, []).append(group.name)
    return tuple(sorted(tuple(names) for names in tied.values() if len(names) > 1))


def _step(at: Situation, tried: Sequence[str], settled: str) -> Decision:
    node = at.node
    return Decision(str(at.trial), node.name, node.module, node.source, str(at.divergence), tuple(tried), settled)
