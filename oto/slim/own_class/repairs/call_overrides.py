"""Override the call: it is made with the right size, whatever the code says.

Example: ``x.view(b, 12, 64)`` with the numbers in the code is called with 9 heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from oto.slim.own_class.attributes import changed
from oto.slim.own_class.compare import differing
from oto.slim.own_class.layers import stock
from oto.slim.own_class.situation import Proposal, Situation
from oto.slim.own_class.traced import places_of


def proposals(at: Situation) -> Iterator[Proposal]:
    """Override the call of this line, in every repeated block."""
    for siblings in at.spreads:
        for places in _numbers(at):
            overrides = dict(at.adaptation.overrides)
            for index in siblings:
                node, rewrite = at.bench.graph.nodes[index], at.rewrite_of(index)
                stating = tuple(sorted({*overrides.get(index, ()), *places}))
                mine = stock(at.bench.modules.get(node.module)) is None
                if mine and at.bench.calls.can(node, rewrite, stating):
                    overrides[index] = stating
            if at.index in overrides and overrides != at.adaptation.overrides:
                more = len(overrides) - len(at.adaptation.overrides)
                reason = f"the call is overridden{f', and {more - 1} others of its line' if more > 1 else ''}"
                yield Proposal(at.adaptation.with_overrides(overrides), reason)


def is_stated_by_none(at: Situation) -> bool:
    """Whether every attribute known to state a size of the call is set already: then overriding it is likeliest."""
    at_call, rewrite = at.bench.calls.by_node.get(at.index), at.rewrite
    if at_call is None or rewrite is None or not at.bench.is_traced:
        return False
    sizes, stated = at.bench.calls.sizes_at(rewrite), at.bench.calls.recorded[at_call].numbers
    if len(sizes) != len(stated):
        return False
    changing = [places_of(n) for n, size in zip(stated, sizes, strict=True) if size and changed(size.term, at.pruned)]
    return all(places <= at.adaptation.sizes.keys() for places in changing)


def _numbers(at: Situation) -> Iterator[Sequence[int]]:
    """Which numbers of a call to state besides those that change: widths, or those that the class got wrong."""
    if at.changes(at.index):
        yield ()
    elif at.rewrite is not None and (own := tuple(at.bench.calls.widths(at.rewrite))):
        yield own  # the class would state a wrong size, by an attribute that states two
    call = at.divergence.call
    if call is not None and call.op is at.node.op and at.rewrite is None:
        yield differing(at.node, call)
    if at.rewrite is not None:
        yield from ((i,) for i in reversed(at.bench.calls.widths(at.rewrite)))
