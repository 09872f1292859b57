"""Tie groups whose sizes must stay equal: they keep the same number of atoms.

Example: ``qkv.chunk(3)`` cuts three equal pieces, so queries, keys and values keep equally many entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from oto.axes.terms import Term, axes_of, resolve, size_of
from oto.slim.own_class.adaptation import Adaptation, Tie
from oto.slim.own_class.attributes import AttributePlace, SizeAttribute
from oto.slim.own_class.blocks import ancestors, moved
from oto.slim.own_class.candidates import StatedSize, term_of
from oto.slim.own_class.rescale import sizes_in
from oto.slim.own_class.situation import Proposal, Situation

aten = torch.ops.aten


def equal_pieces(at: Situation) -> Iterator[Proposal]:
    """Tie the groups in pieces of equal size that a call cuts."""
    rewrite = at.rewrite
    if rewrite is None or rewrite.op is not aten.split_with_sizes.default or at.node.op is rewrite.op:
        return
    for siblings in at.spreads:
        cut: dict[int, list[Term]] = {}
        for index in siblings:
            other = at.rewrite_of(index)
            if other is not None and other.op is rewrite.op:
                cut[index] = [size.term for size in other.args[1]]
        tied = _tied(at, list(cut.values()))
        if tied is None:
            continue
        # another method may cut by an attribute that this one does not read
        sizes = {
            AttributePlace(path, key): SizeAttribute(pieces[0], value)
            for path, pieces in ((at.bench.graph.nodes[index].module, pieces) for index, pieces in cut.items())
            for key, value in at.held(path).items()
            if len(key) == 1 and type(value) is int and value == size_of(pieces[0])
        }
        sizes = {place: size for place, size in sizes.items() if place not in at.adaptation.sizes}
        if sizes:
            yield Proposal(
                tied.with_sizes(sizes), "the pieces stay equal, and an attribute states their size", must_pass=True
            )
        yield Proposal(tied, "the pieces that the call cuts stay equal", must_pass=True)


def shared_attributes(at: Situation) -> Iterator[Proposal]:
    """Tie the groups in two sizes that one attribute states."""
    rewrite = at.rewrite
    for i, size in enumerate(sizes_in((rewrite.args, dict(rewrite.kwargs))) if rewrite is not None else ()):
        for path in ancestors(at.node.module):
            held = at.held(path)
            for place, stated in at.adaptation.sizes.items():
                if place.module != path or held.get(place.key) != size_of(size.term) != size_of(stated.term):
                    continue
                if size_of(stated.term) != stated.value or at.pruned.count(stated.term) == at.pruned.size(size):
                    continue
                for siblings in at.spreads:
                    tied = _tied(at, _both(at, place, i, siblings))
                    if tied is not None:
                        name = ".".join(map(str, place.key))
                        yield Proposal(
                            tied, f"the sizes that {name} of {path or 'the model'} states stay equal", must_pass=True
                        )


def same_widths(at: Situation) -> Iterator[Proposal]:
    """Tie dimensions of equal width where the class takes a different path: it may compare them."""
    operands = at.bench.partition.found.operands
    made: list[list[Term]] = []
    for index in at.spreads[-1]:
        node = at.bench.graph.nodes[index]
        last = [operands[value].terms[-1] for value in node.inputs() if operands[value].terms]
        differ = [term for term in last if at.is_width(term)]
        if len(differ) > 1 and len({size_of(term) for term in differ}) == 1:
            made.append(differ)
    tied = _tied(at, made)
    if tied is not None:
        yield Proposal(tied, "the widths that the class compares stay equal", must_pass=True)


def _both(at: Situation, place: AttributePlace, nth: int, siblings: Sequence[int]) -> list[list[Term]]:
    """For each repeated block, the term that a size attribute follows from, and that of the call's ``nth`` size."""
    pairs: list[list[Term]] = []
    for sibling in siblings:
        there = moved(place.module, at.node.module, at.bench.graph.nodes[sibling].module)
        other = at.adaptation.sizes.get(AttributePlace(there or "", place.key))
        term = term_of(at, sibling, StatedSize(nth))
        if other is not None and term is not None:
            pairs.append([other.term, term])
    return pairs


def _tied(at: Situation, alike: Sequence[Sequence[Term]]) -> Adaptation | None:
    """The adaptation with the groups tied that are in terms which must stay equal; ``None`` if nothing is new."""
    made: list[Tie] = []
    for terms in alike:
        axes = [list(axes_of(resolve(term))) for term in terms]
        for side in zip(*axes, strict=False) if len({len(own) for own in axes}) == 1 else ():
            names = [at.trials.names.get(axis, "") for axis in side]
            free = set(names) <= at.trials.free.keys() and len(set(names)) > 1
            if free and len({axis.size for axis in side}) == 1:
                made.append(tuple(dict.fromkeys(names)))
    tied = at.adaptation.with_ties(made)
    return tied if tied.ties != at.adaptation.ties else None
