"""How far the model's own class can go: what it has to be told, and which groups must stay whole for it.

A copy of the model with thinner tensors, none of which holds data, is run, and the calls that it makes are laid beside
those of the full model. If each is the same call of the same tensors, with the thinner shapes and sizes that the
analysis says, then the class computes what the rewritten graph computes, and nothing needs to be tried on numbers. The
first call that differs says what is missing:

* a size that an attribute states: attributes of that value, in the module or around it, are set, and the one with which
  the class gets furthest is kept (:mod:`oto.slim.attributes`);
* a count that a norm or a mean divides by: weights and small constants take it in (:mod:`oto.slim.scaling`);
* pieces of equal size: the groups in them keep the same number of atoms, they are *tied*;
* else the groups that the call meets stay whole.

What was found in one of several repeated blocks is tried in all of them.
"""

from __future__ import annotations

import itertools
import logging
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isclose
from types import FunctionType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from oto._torch import tree_leaves, tree_map_only
from oto.axes.call import Size
from oto.axes.registry import known
from oto.axes.terms import Axis, Term, axes_of, resolve
from oto.axes.terms import size as size_of
from oto.groups import NodeGroup, Partition
from oto.nn import functional as thinner
from oto.nn.told import numbers_of
from oto.slim.attributes import Place, Stated, changed, numbers
from oto.slim.module import DeclinedError, Edits, OwnClass, adapted, stock, thin_copy, thin_tensors
from oto.slim.plan import Thinning, thinning
from oto.slim.scaling import Absorbed, Uses, absorbed, sizes_in
from oto.slim.telling import Telling
from oto.trace.graph import Node, Value
from oto.trace.record import Script, follow

log = logging.getLogger(__name__)
aten = torch.ops.aten

_ROW = 8  # entries; of 16 bits, 16 bytes
SEEDS = 5
TRIES = 16
"""How many candidates are tried for one call."""


def own_class(model: nn.Module, partition: Partition, groups: Sequence[NodeGroup], dummy_input: Any) -> OwnClass:
    """Find out what the class of ``model`` needs, and can do without.

    Args:
        groups: Node groups; only the prunable ones may get thinner.
    """
    return _Search(model, partition, groups, dummy_input).result()


@dataclass(frozen=True)
class _Departure:
    """The first call in which a slim model of the class does something else than it should.

    Attributes:
        index: Of the call in the full model.
        failure: What it raised.
        right: How many of the sizes that the call states are right.
        call: What was called instead, if the class got that far.
    """

    index: int
    failure: Exception | None = None
    right: int = 0
    call: Node | None = None

    @property
    def far(self) -> tuple[int, int]:
        return self.index, self.right


@dataclass(eq=False)
class _Search:
    model: nn.Module
    partition: Partition
    groups: Sequence[NodeGroup]
    dummy_input: Any
    found: OwnClass = field(default_factory=OwnClass)

    def __post_init__(self) -> None:
        self.graph = self.partition.found.graph
        self.tape = self.partition.found.tape
        self.modules = dict(self.model.named_modules(remove_duplicate=False))
        self.names: dict[Axis, str] = {axis: name for name, axis in self.partition.axes.items()}
        self.found.telling = Telling(self.model, self.partition, self.dummy_input)
        # a run on data is to take the path of the full model, whatever is in the thinner tensors
        self.script = Script() if self.graph.how == "real" else None
        tied: dict[str, list[str]] = {}
        for group in self.groups:
            if group.tie is not None and group.prunable:
                tied.setdefault(group.tie, []).append(group.name)
        self.found.ties = sorted(tuple(names) for names in tied.values() if len(names) > 1)
        self.free = {g.name: g for g in self.groups if g.prunable and g.size > 1}

    @cached_property
    def uses(self) -> Uses:
        return Uses.of(self.graph)

    @cached_property
    def last_read(self) -> dict[Value, int]:
        """The last call that reads a tensor; an output of the model is read after all."""
        last = {value: node.index for node in self.graph.nodes for value in node.inputs()}
        return last | dict.fromkeys(self.graph.outputs, len(self.graph.nodes))

    @cached_property
    def in_rows(self) -> set[str]:
        """Groups in operands whose rows a kernel wants in whole 16 bytes; thinner ones are padded for it."""
        grouped = [rewrite for rewrite in self.tape.rewrites.values() if rewrite.op is thinner.grouped_mm]
        terms = [term for rewrite in grouped for term in rewrite.terms]
        return {self.names[axis] for term in terms for axis in axes_of(resolve(term)) if axis in self.names}

    # --- the search ---------------------------------------------------------------------------------------------------

    def result(self) -> OwnClass:
        if self.script is not None:
            follow(self.model, self.dummy_input, known, self.graph.how, script=self.script)
            self.script.read = 0
        for seed in range(SEEDS):
            while True:
                departure = self.departure(seed)
                if departure is None or not self.free.keys() - self.found.whole.keys():
                    break  # as it should be, or as it was
                log.info("own class: departs at %s", departure)
                if not self.mend(departure, seed):
                    self.give_up(departure, seed)
        return self.found

    def thin(self, seed: int) -> Thinning:
        """Groups that may get thinner do, each by another number of atoms; tied ones by the same.

        At first all of them, then some only: what the class is told must hold whatever else is whole.
        """
        stays = self.staying(seed)
        leader = {name: tie[0] for tie in self.found.ties for name in tie}
        kept: dict[str, NDArray[np.int64]] = {}
        for i, (name, group) in enumerate(self.free.items()):
            if name in self.found.whole or leader.get(name, name) in stays:
                continue
            if (first := leader.get(name, name)) != name and first in kept:
                kept[name] = kept[first]
                continue
            draw = np.random.default_rng((seed, i))
            least = min(group.min_kept, group.size)
            if name in self.in_rows and group.size > _ROW:
                step = int(np.lcm(_ROW, group.divisor))
                kept[name] = np.arange(step * draw.integers(1, max(1, (group.size - 1) // step), endpoint=True))
                continue
            if seed == 0:  # a size of one is broadcast and squeezed away, so it comes last
                least = max(least, 2 if group.size > 2 else 1)
                atoms = draw.integers(least, max(least, group.size - 1), endpoint=True)
            else:
                atoms = draw.integers(least, group.size, endpoint=True)
            kept[name] = np.arange(-(-atoms // group.divisor) * group.divisor)
        return thinning(self.partition, kept)

    def staying(self, seed: int) -> set[str]:
        """What stays whole in a try: nothing; what the class was told of; all but that; any half."""
        if seed < 2:
            return set()
        if seed == 4:
            draw = np.random.default_rng(seed)
            return {name for name in self.free if draw.random() < 0.5}
        terms = [stated.term for stated in self.found.stated.values()]
        rewrites = [self.tape.rewrites[index] for index in self.found.told if index in self.tape.rewrites]
        terms += [term for rewrite in rewrites for term in rewrite.terms]
        told = {self.names[axis] for term in terms for axis in axes_of(resolve(term)) if axis in self.names}
        for tie in self.found.ties:
            if told & set(tie):
                told |= set(tie)
        return told if seed == 2 else self.free.keys() - told

    def departure(self, seed: int) -> _Departure | None:
        """Where the class, told what is known so far, first does something else than it should."""
        thin = self.thin(seed)
        if self.script is None:
            tensors = {}
            for leaf in self.graph.leaves:
                empty = torch.empty(thin.shape(leaf), dtype=leaf.value.dtype, device="meta")
                tensors.update(dict.fromkeys(leaf.names, empty))
        else:
            tensors, self.script.read = thin_tensors(self.model, thin, self.found), 0
        try:
            edits = adapted(self.model, thin, self.found, plain=True)
            slim = thin_copy(self.model, tensors, edits)
        except DeclinedError as declined:
            return _Departure(self.first_in(declined.path), declined)
        except Exception as refused:  # a class that cannot be copied, or that minds what is set
            return _Departure(0, refused)
        calls, failure = follow(slim, self.dummy_input, known, self.graph.how, script=self.script)
        return _Alignment(self, thin, edits, calls, failure).departure()

    def first_in(self, path: str) -> int:
        """The first call that a module makes."""
        return next((n.index for n in self.graph.nodes if f"{n.module}.".startswith(f"{path}.")), 0)

    # --- what mends it ------------------------------------------------------------------------------------------------

    def mend(self, departure: _Departure, seed: int) -> bool:
        """Tell the class what it lacks, in every repeated block; whether it got further."""
        if departure.index in self.tape.counted and self.changes(departure.index, seed):
            return self.absorb(departure, seed) or self.tell(departure, seed)
        if self.tie(departure.index, seed) or self.settle(departure.index, seed):
            return True
        best, base = None, self.found.stated
        for tried in itertools.islice(self.candidates(departure, seed), TRIES):
            self.found.stated = base | tried
            after = self.departure(seed)
            if after is None or after.far > departure.far:
                if best is None or after is None or (best[0] is not None and after.far > best[0].far):
                    best = after, tried
                if after is None or after.index > departure.index + 20:
                    break
        self.found.stated = base if best is None else base | best[1]
        return best is not None or self.tell(departure, seed)

    def tell(self, departure: _Departure, seed: int) -> bool:
        """Let a call be made as it should; whether the class gets further then."""
        before = self.found.told
        for places in self.sayings(departure, seed):
            told = dict(before)
            for index in self.siblings(departure.index):
                node, rewrite = self.graph.nodes[index], self.tape.rewrites.get(index)
                stating = tuple(sorted({*told.get(index, ()), *places}))
                if stock(self.modules.get(node.module)) is None:
                    assert self.found.telling is not None
                    if self.found.telling.change(node, rewrite, None, stating) is not None:
                        told[index] = stating
            if departure.index in told and told != before:
                self.found.told = told
                after = self.departure(seed)
                if after is None or after.far > departure.far:
                    return True
                self.found.told = before
        return False

    def sayings(self, departure: _Departure, seed: int) -> Iterator[tuple[int, ...]]:
        """Which numbers of a call to state besides those that change: of sizes, such as parameters have."""
        node, rewrite = self.graph.nodes[departure.index], self.tape.rewrites.get(departure.index)
        if self.changes(departure.index, seed):
            yield ()
        if departure.call is not None and departure.call.op is node.op and rewrite is None:
            yield _differing(node, departure.call)
        if rewrite is not None:
            template = numbers_of(
                tree_map_only(Size, lambda size: float(self.of_parameters(size.term)),
                              tree_map_only(Value, lambda _: None, (rewrite.args, dict(rewrite.kwargs))))
            )  # fmt: skip
            yield from ((i,) for i, mine in reversed(list(enumerate(template))) if mine == 1.0)

    def of_parameters(self, term: Term) -> bool:
        """Whether a dimension is made of such that parameters have, and is no batch or other length."""
        axes = list(axes_of(resolve(term)))
        return bool(axes) and all(axis in self.names for axis in axes)

    def changes(self, index: int, seed: int) -> bool:
        rewrite = self.tape.rewrites.get(index)
        return rewrite is not None and self.thin(seed).changes(rewrite)

    def absorb(self, departure: _Departure, seed: int) -> bool:
        """Let the weights that follow take a count in."""
        found: dict[int, Absorbed] = {}
        for index in self.siblings(departure.index):
            if self.changes(index, seed) and index not in self.found.absorbed:
                one = absorbed(self.partition, index, self.uses)
                if one is not None:
                    found[index] = one
        if departure.index not in found:
            return False
        before, stated = dict(self.found.absorbed), dict(self.found.stated)
        self.found.absorbed |= found
        for one in found.values():
            for index, wanted in one.scalars.items():
                places = [
                    Place(path, key)
                    for path in _ancestors(self.graph.nodes[index].module)
                    for key, value in numbers(self.modules[path])
                    if isinstance(value, float) and value == wanted.value
                ]
                self.found.stated |= dict.fromkeys(places[:1], wanted)
        after = self.departure(seed)
        if after is None or after.index > departure.index:
            return True
        self.found.absorbed, self.found.stated = before, stated
        return False

    def tie(self, index: int, seed: int) -> bool:
        """Where a call cuts pieces of equal size, the groups in them keep the same number of atoms."""
        rewrite, node = self.tape.rewrites.get(index), self.graph.nodes[index]
        if rewrite is None or rewrite.op is not aten.split_with_sizes.default or node.op is rewrite.op:
            return False
        cut = [[size.term for size in self.tape.rewrites[sibling].args[1]] for sibling in self.siblings(index)]
        return self.tied(cut, index, seed)

    def settle(self, index: int, seed: int) -> bool:
        """Where one number states two sizes, the groups in both keep the same number of atoms."""
        thin = self.thin(seed)
        rewrite = self.tape.rewrites.get(index)
        for i, size in enumerate(sizes_in((rewrite.args, dict(rewrite.kwargs))) if rewrite is not None else ()):
            for path in _ancestors(self.graph.nodes[index].module):
                held = dict(numbers(self.modules[path]))
                for place, stated in self.found.stated.items():
                    if place.module != path or held.get(place.key) != size_of(size.term) != size_of(stated.term):
                        continue
                    if size_of(stated.term) != stated.value or thin.count(stated.term) == thin.size(size):
                        continue
                    pairs = []
                    for sibling in self.siblings(index):
                        moved = _moved(path, self.graph.nodes[index].module, self.graph.nodes[sibling].module)
                        other = self.found.stated.get(Place(moved or "", place.key))
                        term = self.term(sibling, f"size {i}")
                        if other is not None and term is not None:
                            pairs.append([other.term, term])
                    if self.tied(pairs, index, seed):
                        return True
        return False

    def tied(self, alike: Sequence[Sequence[Term]], index: int, seed: int) -> bool:
        """Tie the groups in terms that must stay alike; whether the class gets beyond a call then."""
        made: list[tuple[str, ...]] = []
        for terms in alike:
            axes = [list(axes_of(resolve(term))) for term in terms]
            for side in zip(*axes, strict=False) if len({len(own) for own in axes}) == 1 else ():
                names = [self.names.get(axis, "") for axis in side]
                if len({axis.size for axis in side}) == 1 and set(names) <= self.free.keys() and len(set(names)) > 1:
                    made.append(tuple(dict.fromkeys(names)))
        before = self.found.ties
        self.found.ties = _joined([*before, *made])
        if self.found.ties == before:
            return False
        after = self.departure(seed)
        if after is None or after.index > index:
            return True
        self.found.ties = before
        return False

    def give_up(self, departure: _Departure, seed: int) -> None:
        """Keep the groups whole that the call meets, in every repeated block."""
        thin = self.thin(seed)
        near = self.siblings(departure.index)
        for meets in (self.stated_by, self.met_by, self.met_around):
            new = {name: index for index in near for name in meets(index, thin) if name in self.free}
            new = {name: index for name, index in new.items() if name not in self.found.whole}
            if new:
                break
        else:
            new = dict.fromkeys(self.free.keys() - self.found.whole.keys(), departure.index)
        self.keep(self.fewest(new, departure, seed))

    def fewest(self, names: Mapping[str, int], departure: _Departure, seed: int) -> dict[str, int]:
        """As few of some groups as have to stay whole for the class to get further; alike ones go together."""
        families: dict[str, dict[str, int]] = {}
        for name, index in names.items():
            families.setdefault(re.sub(r"\d+", "*", name.partition("/")[0]) + name.partition("/")[1], {})[name] = index
        several = [[f] for f in families] + [list(pair) for pair in itertools.combinations(families, 2)]
        if len(families) > 1:
            whole = dict(self.found.whole)
            for some in several[:TRIES]:
                chosen = {name: index for family in some for name, index in families[family].items()}
                self.keep(chosen)
                after = self.departure(seed)
                self.found.whole = dict(whole)
                if after is None or after.index > departure.index:
                    return chosen
        return dict(names)

    def keep(self, new: Mapping[str, int]) -> None:
        """Groups that stay whole from now on, and those that are tied to them."""
        self.found.whole |= {name: index for name, index in new.items() if name not in self.found.whole}
        for tie in self.found.ties:
            cause = next((self.found.whole[name] for name in tie if name in self.found.whole), None)
            if cause is not None:
                self.found.whole |= {name: cause for name in tie if name not in self.found.whole}

    def stated_by(self, index: int, thin: Thinning) -> Iterator[str]:
        """The groups whose size the arguments of a call state."""
        rewrite = self.tape.rewrites.get(index)
        return self.groups_of(rewrite.terms if rewrite is not None else (), thin)

    def met_by(self, index: int, thin: Thinning) -> Iterator[str]:
        """The groups that a call meets."""
        node = self.graph.nodes[index]
        values = [*node.inputs(), *(v for v in node.outputs if v is not None)]
        return self.groups_of([t for v in values for t in self.partition.found.operands[v].terms], thin)

    def met_around(self, index: int, thin: Thinning) -> Iterator[str]:
        """The groups that calls of the same module meet."""
        path = self.graph.nodes[index].module
        for node in self.graph.nodes:
            if node.module == path:
                yield from self.met_by(node.index, thin)

    def groups_of(self, terms: Sequence[Term], thin: Thinning) -> Iterator[str]:
        for term in terms:
            if changed(term, thin):
                for axis in axes_of(resolve(term)):
                    if axis in self.names and axis in thin.counts and thin.counts[axis] != axis.size:
                        yield self.names[axis]

    # --- candidates ---------------------------------------------------------------------------------------------------

    def candidates(self, departure: _Departure, seed: int) -> Iterator[dict[Place, Stated]]:
        """Numbers that might state what is missing, the likeliest first, each for all repeated blocks."""
        thin, node = self.thin(seed), self.graph.nodes[departure.index]
        paths = [node.module]
        if departure.failure is not None:
            paths += [p for p in self.running(departure.failure, node.module) if p not in paths]
        primary, secondary = self.sizes(departure.index, thin)
        tried: set[tuple[tuple[Place, int | float], ...]] = set()

        def places(label: str, term: Term, far: bool, part: bool = False) -> list[tuple[Place, str]]:
            """Numbers that are the size of a term, or that it is a multiple of."""
            size, now = size_of(term), thin.count(term)
            return [
                (Place(holder, key), label)
                for path in paths
                for holder in (_ancestors(path) if far else [path])
                for key, value in numbers(self.modules[holder])
                if isinstance(value, int) and value > 1
                if (value < size and size % value == 0 and value * now % size == 0 if part else value == size)
            ]

        options = [[None, *places(label, term, False)][:4] for label, term in primary[:3]]
        combined = [c for c in itertools.product(*options) if any(c)]
        combined.sort(key=lambda c: sum(o is None for o in c))
        single = [
            [o] for far in (False, True) for label, term in (*primary, *secondary) for o in places(label, term, far)
        ]
        factors = [list(c) for label, term in primary[:3] for c in self.factors(label, term, thin, places)]
        parts = [[o] for label, term in primary for o in places(label, term, False, True)]
        for chosen in itertools.chain(combined, single[:8], factors[:8], parts[:8]):
            made = self.everywhere(departure.index, [o for o in chosen if o is not None])
            key = tuple(sorted(((p, thin.count(s.term) * s.value) for p, s in made.items()), key=repr))
            made = {p: s for p, s in made.items() if self.found.stated.get(p) != s}
            if made and key not in tried:
                tried.add(key)
                yield made

    @staticmethod
    def factors(label: str, term: Term, thin: Thinning, places: Any) -> Iterator[tuple[tuple[Place, str], ...]]:
        """Pairs of numbers whose product is the size of a term, each the size of one side of it."""
        whole = resolve(term)
        for at in range(1, len(whole)):
            sides = [(f"{label} {a} {b}", whole[a:b]) for a, b in ((0, at), (at, len(whole)))]
            gone = [side for side in sides if changed(side[1], thin)]
            yield from itertools.product(*(places(*side, False)[:3] for side in gone))

    def sizes(self, index: int, thin: Thinning) -> tuple[list[tuple[str, Term]], list[tuple[str, Term]]]:
        """The sizes that get smaller: those that a call states; those of tensors that it and calls before it meet."""
        rewrite = self.tape.rewrites.get(index)
        stated = [x.term for x in sizes_in((rewrite.args, dict(rewrite.kwargs)))] if rewrite else []
        primary = [(f"size {i}", term) for i, term in enumerate(stated) if changed(term, thin)]
        secondary: list[tuple[str, Term]] = []
        for back in range(4):
            near = index - back
            if near < 0:
                break
            calls = self.graph.nodes[near]
            values = [*calls.inputs(), *(v for v in calls.outputs if v is not None)]
            for i, value in enumerate(values):
                terms = self.partition.found.operands[value].terms
                for width in (1, 2):
                    for d in range(len(terms) - width + 1):
                        term = tuple(f for t in terms[d : d + width] for f in t)
                        if changed(term, thin):
                            secondary.append((f"dim {back} {i} {d} {width}", term))
        return primary, secondary

    def term(self, index: int, label: str) -> Term | None:
        """The term of a label of :meth:`sizes`, at another call."""
        kind, *numbers_ = label.split()
        at = list(map(int, numbers_))
        if kind == "size":
            rewrite = self.tape.rewrites.get(index)
            sizes = [x.term for x in sizes_in((rewrite.args, dict(rewrite.kwargs)))] if rewrite else []
            term = sizes[at[0]] if at[0] < len(sizes) else None
            return resolve(term)[slice(*at[1:])] if term is not None and at[1:] else term
        back, i, d, width = at
        if index < back:
            return None
        node = self.graph.nodes[index - back]
        values = [*node.inputs(), *(v for v in node.outputs if v is not None)]
        terms = self.partition.found.operands[values[i]].terms if i < len(values) else ()
        return tuple(f for t in terms[d : d + width] for f in t) if d + width <= len(terms) else None

    def everywhere(self, index: int, chosen: Sequence[tuple[Place, str]]) -> dict[Place, Stated]:
        """The same numbers of all repeated blocks."""
        made: dict[Place, Stated] = {}
        for place, label in chosen:
            here, value = self.term(index, label), dict(numbers(self.modules[place.module]))[place.key]
            assert here is not None
            made[place] = Stated(here, value)
            home = self.graph.nodes[index].module
            for sibling in self.siblings(index):
                there = _moved(place.module, home, self.graph.nodes[sibling].module)
                term = self.term(sibling, label)
                if sibling == index or there is None or there not in self.modules or term is None:
                    continue
                other = Place(there, place.key)
                held = dict(numbers(self.modules[there])).get(place.key)
                alike = held is not None and held * size_of(here) == value * size_of(term)
                if held is not None and alike and other not in made and other not in self.found.stated:
                    made[other] = Stated(term, held)
        return made

    @cached_property
    def _ordinals(self) -> tuple[list[tuple[str, int, Any]], dict[tuple[str, int, Any], list[int]]]:
        own: list[tuple[str, int, Any]] = []
        seen: dict[str, int] = {}
        alike: dict[tuple[str, int, Any], list[int]] = {}
        for node in self.graph.nodes:
            n = seen[node.module] = seen.get(node.module, -1) + 1
            key = re.sub(r"\d+", "*", node.module), n, node.op
            own.append(key)
            alike.setdefault(key, []).append(node.index)
        return own, alike

    def siblings(self, index: int) -> list[int]:
        """The calls that repeated blocks make in the place of this one, itself included."""
        own, alike = self._ordinals
        return alike[own[index]]

    def running(self, failure: Exception, near: str) -> list[str]:
        """The modules whose code ran when something was raised, the innermost first: around a call, or near it."""
        found = []
        for frame, _ in reversed(list(traceback.walk_tb(failure.__traceback__))):
            me = frame.f_locals.get("self")
            if isinstance(me, nn.Module) and stock(me) is None:
                alike = [path for path, module in self.modules.items() if type(module) is type(me)]
                found += sorted(alike, key=lambda path: -len(set(_ancestors(path)) & set(_ancestors(near))))[:1]
        return list(dict.fromkeys(found))[:2]


@dataclass(eq=False)
class _Alignment:
    """The calls of a slim model of the class beside those of the full model."""

    search: _Search
    thin: Thinning
    edits: Edits
    calls: Sequence[Node]
    failure: Exception | None

    def departure(self) -> _Departure | None:
        nodes = self.search.graph.nodes
        self.stands: dict[Value, Value] = {}
        self.itself: dict[Value, Value] = {}
        i = j = 0
        while i < len(nodes):
            # what lies in memory as it should already is not made so again
            laid = (
                nodes[i].op is aten.contiguous.default,
                j < len(self.calls) and self.calls[j].op is aten.contiguous.default,
            )
            if laid == (False, True):
                self.itself[_given(self.calls[j])] = self.real(next(self.calls[j].inputs()))
                j += 1
                continue
            if laid == (True, False) and (known_as := self.stands.get(next(nodes[i].inputs()))) is not None:
                self.stands[_given(nodes[i])] = known_as
                i += 1
                continue
            swapped = self.swapped(nodes[i].module)
            if j >= len(self.calls):
                return _Departure(i, self.failure)
            if swapped is not None:
                after, other = self.leaving(nodes, i, swapped), self.leaving(self.calls, j, swapped)
                if not self.block(i, after, j, other):
                    return _Departure(i, self.failure if other == len(self.calls) else None)
                i, j = after, other
                continue
            right = self.same(nodes[i], self.calls[j])
            if right is not None:
                return _Departure(i, self.failure if j == len(self.calls) - 1 else None, right, self.calls[j])
            i, j = i + 1, j + 1
        if self.failure is not None or j < len(self.calls):
            return _Departure(len(nodes) - 1, self.failure)
        return None

    def swapped(self, path: str) -> str | None:
        """The module around a call that a module of ours has taken the place of."""
        return next((p for p in _ancestors(path) if p in self.edits.swaps), None)

    @staticmethod
    def leaving(nodes: Sequence[Node], start: int, path: str) -> int:
        end = start
        while end < len(nodes) and f"{nodes[end].module}.".startswith(f"{path}."):
            end += 1
        return end

    def block(self, i: int, after: int, j: int, other: int) -> bool:
        """Whether a module of ours gives what the one in whose place it is gave."""
        nodes, calls = self.search.graph.nodes, self.calls
        theirs = self.given(nodes, i, after, self.search.last_read)
        ours = self.given(calls, j, other, self.last_read)
        if len(ours) < len(theirs) and j < other:  # an output of the model, or the calls end here
            last = [value for value in calls[other - 1].outputs if value is not None]
            ours += [value for value in last if value not in ours][: len(theirs) - len(ours)]
        if len(theirs) != len(ours):
            return False
        return all(self.fits(old, new) for old, new in zip(theirs, ours, strict=True))

    @cached_property
    def last_read(self) -> dict[Value, int]:
        return {value: place for place, node in enumerate(self.calls) for value in node.inputs()}

    @staticmethod
    def given(nodes: Sequence[Node], start: int, end: int, last_read: Mapping[Value, int]) -> list[Value]:
        """What some calls make that later ones read."""
        made = [value for node in nodes[start:end] for value in node.outputs if value is not None]
        return [value for value in made if last_read.get(value, -1) >= end]

    def fits(self, old: Value, new: Value) -> bool:
        """Whether a tensor has the thinner shape; from then on it stands for the full one."""
        terms = self.search.partition.found.operands[old].terms
        if tuple(map(self.thin.count, terms)) != new.shape or old.dtype != new.dtype:
            return False
        return self.stands.setdefault(old, self.real(new)) is self.real(new)

    def real(self, value: Value) -> Value:
        return self.itself.get(value, value)

    def same(self, full: Node, slim: Node) -> int | None:
        """``None`` if a call is what it should be; else how many of its sizes are."""
        tape, own = self.search.tape, self.search.found
        told = full.index in own.told
        if (
            full.module != slim.module
            or len(full.outputs) != len(slim.outputs)
            or (full.op is not slim.op and not told)
        ):
            return 0
        pairs = list(zip(full.inputs(), slim.inputs(), strict=False))
        if not all(self.fits(old, new) for old, new in pairs):
            return 0
        made = [*zip(full.outputs, slim.outputs, strict=True)]
        made += [(a[1], b[1]) for a, b in zip(full.written, slim.written, strict=False)]
        for old, new in made:
            if (old is None) != (new is None):
                return 0
            if old is not None and new is not None and not self.fits(old, new):
                return self.right(full, slim)
        rewrite = tape.rewrites.get(full.index)
        if told and rewrite is not None and self.thin.changes(rewrite) and rewrite.op is not full.op:
            return None  # a piece, whose size is in its shape, or a count
        if full.index in own.scalars:
            wanted = own.scalars[full.index]
            ratio = wanted.ratio(self.thin) ** wanted.power
            return None if _equal(full, slim, ratio) else 0
        if rewrite is None or full.index in own.absorbed or not self.thin.changes(rewrite):
            return None if _equal(full, slim) else 0
        if rewrite.op is full.op:
            asked = _plain((self.thin.filled(rewrite.args), self.thin.filled(dict(rewrite.kwargs))))
            return None if _agree(asked, _plain((slim.args, dict(slim.kwargs)))) else self.right(full, slim)
        if rewrite.op in _BY_SHAPE:
            return None
        if rewrite.op is aten.narrow.default:  # of a slice, whose length is in the shape
            begin = self.thin.filled(rewrite.args[2])
            given = slim.args[2] if len(slim.args) > 2 and slim.args[2] is not None else 0
            length = next(slim.inputs()).shape[rewrite.args[1]]
            return None if min(max(given + (length if given < 0 else 0), 0), length) == begin else 0
        return 0

    def right(self, full: Node, slim: Node) -> int:
        rewrite = self.search.tape.rewrites.get(full.index)
        if rewrite is None or rewrite.op not in (full.op, *_BY_SHAPE):
            return 0
        asked = [x for x in tree_leaves((self.thin.filled(rewrite.args), self.thin.filled(dict(rewrite.kwargs))))
                 if _is_int(x)]  # fmt: skip
        given = [x for x in tree_leaves((slim.args, dict(slim.kwargs))) if _is_int(x)]
        return sum(a == b for a, b in zip(asked, given, strict=False))


def _given(node: Node) -> Value:
    (value,) = (v for v in node.outputs if v is not None)
    return value


# calls whose meaning is in the shapes of what they give
_BY_SHAPE = {aten.reshape.default, aten.squeeze.dims, aten.split_with_sizes.default, thinner.view_as_complex}


def _plain(arguments: Any) -> list[Any]:
    named = tree_map_only(Value, lambda _: "a tensor", arguments)
    elsewhere = (
        torch.device,
        torch.layout,
        torch.Generator,
        FunctionType,
        nn.Module,
    )  # what a branch runs keeps its sizes
    return [x for x in tree_leaves(named) if not isinstance(x, elsewhere)]


def _agree(asked: Sequence[Any], given: Sequence[Any]) -> bool:
    """Whether arguments are those that were asked for; -1 is what a shape leaves open."""
    return len(asked) == len(given) and all(
        (type(b) is type(a) and (a == b or a != a)) or (_is_int(b) and b == -1)
        for a, b in zip(asked, given, strict=True)
    )


def _equal(full: Node, slim: Node, factor: float | None = None) -> bool:
    """Whether two calls have the same arguments; of one, a number may have grown by a factor."""
    a, b = _plain((full.args, dict(full.kwargs))), _plain((slim.args, dict(slim.kwargs)))
    if factor is None:
        return len(a) == len(b) and all(type(x) is type(y) and (x == y or x != x) for x, y in zip(a, b, strict=True))
    return len(a) == len(b) and all(
        isclose(x * factor, y, rel_tol=1e-6) if isinstance(x, float) and isinstance(y, float) and x != y else x == y
        for x, y in zip(a, b, strict=True)
    )


def _differing(full: Node, slim: Node) -> tuple[int, ...]:
    """The places of numbers that two calls of one operator do not share."""
    a, b = (
        numbers_of(tree_map_only(Value, lambda _: None, (node.args, dict(node.kwargs)))) for node in (full, slim)
    )  # fmt: skip
    return tuple(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y) if len(a) == len(b) else ()


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _ancestors(path: str) -> list[str]:
    """A module and all around it, from the inside outwards."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]


def _moved(holder: str, home: str, other: str) -> str | None:
    """The module that is to ``other`` what ``holder``, around ``home``, is to that."""
    up, homes = _ancestors(home), _ancestors(other)
    return homes[up.index(holder)] if holder in up and up.index(holder) < len(homes) else None


def _joined(ties: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Ties that share a group become one."""
    found: list[tuple[str, ...]] = []
    for tie in ties:
        touching = [other for other in found if set(other) & set(tie)]
        found = [other for other in found if other not in touching]
        found.append(tuple(dict.fromkeys(name for other in (*touching, tie) for name in other)))
    return sorted(found)
