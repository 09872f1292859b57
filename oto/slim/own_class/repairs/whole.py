"""Keep groups whole where nothing else helps: those that the call meets, as few of them as suffice."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from oto.slim.own_class.blocks import family
from oto.slim.own_class.situation import Proposal, Situation

_TRIES = 16
"""Choices of groups to keep whole that are tried before all that the call meets are."""


def proposals(at: Situation) -> Iterator[Proposal]:
    """Keep one kind of groups whole, or two; at last all that the call meets, which always works."""
    names = met(at)
    families: dict[str, dict[str, int]] = {}
    for name, index in names.items():
        families.setdefault(family(name), {})[name] = index
    if len(families) > 1:
        several = [(f,) for f in families] + list(itertools.combinations(families, 2))
        for kinds in several[:_TRIES]:
            chosen = {name: index for kind in kinds for name, index in families[kind].items()}
            reason = f"stays whole: {', '.join(kinds)}"
            yield Proposal(at.adaptation.with_whole(chosen), reason, must_pass=True)
    yield Proposal(at.adaptation.with_whole(names), f"stays whole: {', '.join(families) or 'everything'}")


def met(at: Situation) -> dict[str, int]:
    """The groups that the call meets in every repeated block, each with the call that is the reason."""
    whole = at.adaptation.whole
    for meets in (_stated_by, met_by, _met_around):
        for siblings in reversed(at.spreads):
            new = {name: index for index in siblings for name in meets(at, index) if name in at.trials.free}
            new = {name: index for name, index in new.items() if name not in whole}
            if new:
                return new
    return dict.fromkeys(at.trials.free.keys() - whole.keys(), at.index)


_Meets = Callable[[Situation, int], Iterator[str]]


def _stated_by(at: Situation, index: int) -> Iterator[str]:
    """The groups whose sizes are stated by the arguments of a call."""
    rewrite = at.rewrite_of(index)
    return at.trials.changing(rewrite.terms if rewrite is not None else (), at.pruned)


def met_by(at: Situation, index: int) -> Iterator[str]:
    """The groups in the inputs and outputs of a call."""
    node, operands = at.bench.graph.nodes[index], at.bench.partition.found.operands
    values = [*node.inputs(), *(v for v in node.outputs if v is not None)]
    return at.trials.changing([t for v in values for t in operands[v].terms], at.pruned)


def _met_around(at: Situation, index: int) -> Iterator[str]:
    """The groups that the calls of the same module meet."""
    path = at.bench.graph.nodes[index].module
    for node in at.bench.graph.nodes:
        if node.module == path:
            yield from met_by(at, node.index)
