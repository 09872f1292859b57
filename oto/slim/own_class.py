"""How far the model's own class can go: what it has to be told, and which groups must stay whole for it.

A copy of the model with thinner tensors, none of which holds data, is run, and the calls that it makes are laid beside
those of the full model. If each is the same call of the same tensors, with the thinner shapes and sizes that the
analysis says, then the class computes what the rewritten graph computes, and nothing needs to be tried on numbers. The
first call that differs says what is missing:

* a size that an attribute states: attributes of that value, in the module or around it, are set, and the one with which
  the class gets furthest is kept (:mod:`oto.slim.attributes`);
* a count that a norm or a mean divides by: weights and small constants take it in (:mod:`oto.slim.scaling`);
* pieces of equal size: the groups in them keep the same number of atoms, they are *tied*;
* a width that is too small for the class to run at all: the groups in it keep a part of their atoms in any case;
* else the groups that the call meets stay whole.

What was found in one of several repeated blocks is tried in all of them.
"""

from __future__ import annotations

import itertools
import logging
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from oto._torch import tree_map_only
from oto.axes.call import Size
from oto.axes.registry import known
from oto.axes.terms import Axis, Term, axes_of, resolve
from oto.axes.terms import size as size_of
from oto.errors import out_of_memory
from oto.groups import NodeGroup, Partition
from oto.groups.layout import joined
from oto.groups.policy import keep_whole
from oto.nn import functional as thinner
from oto.nn.calls import numbers_of
from oto.progress import stage
from oto.slim.alignment import Alignment, Departure, ancestors, differing
from oto.slim.attributes import Place, Stated, changed, numbers
from oto.slim.module import DeclinedError, OwnClass, adapted, attribute, stock, thin_copy, thin_tensors
from oto.slim.plan import Thinning, thinning
from oto.slim.scaling import Absorbed, Uses, absorbed, sizes_in
from oto.slim.telling import Telling
from oto.trace.found import Found
from oto.trace.graph import Value
from oto.trace.record import FunctionCall, Script, follow

log = logging.getLogger(__name__)
aten = torch.ops.aten

SEEDS = 7
"""In how many ways the model is made thinner."""
THINNEST, PART = 6, 16
"""The way in which as little as a sixteenth of each group is left."""
ROUNDS = 200
"""How often something is mended before things are only given up."""
AHEAD = 64
"""How many calls further one looks whether something was mended; the whole model is run before it counts."""
TRIES = 16
"""How many candidates are tried for one call."""
FLOORS = (64, 32, 16, 8, 4, 2)
"""Parts of a group, one of which it keeps where the class does something else when it keeps less."""
LAST, LAST_SAYS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d), "it is a dimension of an output"
_ROW = 8  # entries; of 16 bits, 16 bytes


def own_class(model: nn.Module, partition: Partition, groups: Sequence[NodeGroup], dummy_input: Any) -> OwnClass:
    """Find out what the class of ``model`` needs, and can do without.

    Args:
        groups: Node groups; only the prunable ones may get thinner.
    """
    return _Search(model, partition, groups, dummy_input).result()


CLASS = "its class cannot do without: no attribute states the size"


def limited(groups: Sequence[NodeGroup], own: OwnClass) -> tuple[NodeGroup, ...]:
    """Node groups, those of which whole, tied or not as thin that the class cannot have otherwise."""
    enough = [replace(g, min_kept=max(g.min_kept, own.least.get(g.name, 0))) for g in groups]
    return joined(keep_whole(enough, own.whole, CLASS), own.ties)


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
        self.way = self.graph.how
        self.telling = self.found.telling = Telling(self.model, self.partition, self.dummy_input, self.way)
        # a run on data is to take the path of the full model, whatever is in the thinner tensors
        self.script: Script | None = None
        self.literals: list[FunctionCall] = []
        tied: dict[str, list[str]] = {}
        for group in self.groups:
            if group.tie is not None and group.prunable:
                tied.setdefault(group.tie, []).append(group.name)
        self.found.ties = sorted(tuple(names) for names in tied.values() if len(names) > 1)
        self.free = {g.name: g for g in self.groups if g.prunable and g.size > 1}

    @cached_property
    def held(self) -> Found:
        """What the model and its code hold; a thinner copy shares some of it, and is thrown away with the rest."""
        return Found(self.model, self.dummy_input)

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
        if not self.lined_up():
            self.keep(dict.fromkeys(self.free, 0))
            return self.found
        seed = right = rounds = 0
        while right < SEEDS:
            departure = self.departure(seed)
            if departure is None or not self.free.keys() - self.found.whole.keys():  # as it should be, or as it was
                seed, right = (seed + 1) % SEEDS, right + 1
                continue
            stage(f"asking its class, call {departure.index:,} of {len(self.graph.nodes):,}")
            log.info("own class: departs at %s", departure)
            right, rounds = 0, rounds + 1
            # all ways but the thinnest are right by then, so what that lacks is no size that could be told
            if rounds > ROUNDS or seed == THINNEST or not self.mend(departure, seed):
                self.give_up(departure, seed)
        self.describe()
        return self.found

    def describe(self) -> None:
        """Let modules say how wide the input of their last layer is now, where they say it and no forward minds.

        Such as the method reads that puts another last layer there.
        """
        base = dict(self.found.stated)
        for leaf in self.graph.leaves:
            path, _, name = leaf.name.rpartition(".")
            kind = stock(self.modules.get(path))
            if name != "weight" or kind is None or not issubclass(kind, LAST) or len(leaf.value.shape) < 2:
                continue
            out, into = (resolve(term) for term in self.partition.found.terms(leaf.value)[:2])
            if not any(axis.fixed is not None and axis.fixed.text == LAST_SAYS for axis in axes_of(out)):
                continue
            for holder in ancestors(path)[1:]:
                for key, value in numbers(self.modules[holder]):
                    if len(key) == 1 and value == size_of(into) and isinstance(value, int):
                        self.found.stated.setdefault(Place(holder, key), Stated(into, value))
        new = self.found.stated.keys() - base.keys()
        if new and any(self.departure(seed) is not None for seed in (0, 1)):
            self.found.stated = base

    def lined_up(self) -> bool:
        """Whether the full model, run again, makes the calls that were recorded; how is learned on the way."""
        data = self.graph.how == "real"
        for way in ("real", "grad") if data else (self.graph.how,):
            self.way, script, self.literals = way, Script() if data else None, []
            calls, failure = follow(
                self.model, self.dummy_input, known, self.way, script=script, literals=self.literals
            )  # fmt: skip
            if failure is None and [call.op for call in calls] == [node.op for node in self.graph.nodes]:
                self.script, self.telling.way = script, self.way
                return True
        return False

    def thin(self, seed: int, counts: Mapping[str, int] | None = None) -> Thinning:
        """Groups that may get thinner do, each by another number of atoms; tied ones by the same.

        At first all of them, then some only: what the class is told must hold whatever else is whole.

        Args:
            counts: So many atoms of some groups are left instead.
        """
        counts = counts or {}
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
            least = min(max(group.min_kept, self.found.least.get(name, 0)), group.size)
            if name in self.in_rows and group.size > _ROW:
                step = int(np.lcm(_ROW, group.divisor))
                kept[name] = np.arange(step * draw.integers(1, max(1, (group.size - 1) // step), endpoint=True))
                continue
            if seed == 0:  # a size of one is broadcast and squeezed away, so it comes last
                least = max(least, 2 if group.size > 2 else 1)
                atoms = int(draw.integers(least, max(least, group.size - 1), endpoint=True))
            else:
                atoms = int(draw.integers(least, group.size, endpoint=True))
            if name in counts:
                atoms = counts[name]
            elif seed == THINNEST:
                atoms = max(least, -(-group.size // PART))
            kept[name] = np.arange(-(-atoms // group.divisor) * group.divisor)
        return thinning(self.partition, kept)

    def staying(self, seed: int) -> set[str]:
        """What stays whole in a try: nothing; what the class was told of; all but that; any half; what calls alone
        were told of, and no number states; and again what the class was told of."""
        if seed < 2:
            return set()
        if seed == 4:
            draw = np.random.default_rng(seed)
            return {name for name in self.free if draw.random() < 0.5}
        stated = self.in_terms(stated.term for stated in self.found.stated.values())
        rewrites = [self.tape.rewrites[index] for index in self.found.told if index in self.tape.rewrites]
        called = self.in_terms(term for rewrite in rewrites for term in rewrite.terms)
        if seed == 5:
            return called - stated
        return stated | called if seed in (2, THINNEST) else self.free.keys() - stated - called

    def in_terms(self, terms: Iterable[Term]) -> set[str]:
        """The groups that some terms are made of, and what is tied to them."""
        return self.with_tied(
            self.names[axis] for term in terms for axis in axes_of(resolve(term)) if axis in self.names
        )

    def with_tied(self, names: Iterable[str]) -> set[str]:
        """Some groups, and what is tied to them."""
        found = set(names)
        for tie in self.found.ties:
            if found & set(tie):
                found |= set(tie)
        return found

    def departure(
        self, seed: int, beyond: int | None = None, counts: Mapping[str, int] | None = None
    ) -> Departure | None:
        """Where the class, told what is known so far, first does something else than it should.

        Args:
            beyond: A call that it departed at before; it is followed only so far that one sees whether it does still.
            counts: As for :meth:`thin`.
        """
        thin = self.thin(seed, counts)
        if self.script is None:
            tensors = {}
            for leaf in self.graph.leaves:
                if leaf.kind == "constant" and leaf.names:
                    # no run stands anything in for what is neither parameter nor buffer: the forward may read a number
                    made = thin.thin(leaf, attribute(self.model, leaf.names[0]))
                else:
                    made = torch.empty(thin.shape(leaf), dtype=leaf.value.dtype, device="meta")
                tensors.update(dict.fromkeys(leaf.names, made))
        else:
            tensors, self.script.read = thin_tensors(self.model, thin, self.found), 0
        try:
            edits = adapted(self.model, thin, self.found, plain=True)
            slim = thin_copy(self.model, tensors, edits)
        except DeclinedError as declined:
            return Departure(self.first_in(declined.path), declined)
        except Exception as refused:  # a class that cannot be copied, or that minds what is set
            if out_of_memory(refused):
                raise
            return Departure(0, refused)
        literals: list[FunctionCall] = []
        calls, failure = follow(
            slim, self.dummy_input, known, self.way, script=self.script,
            limit=None if beyond is None else beyond + AHEAD, literals=literals, found=self.held,
        )  # fmt: skip
        said = self.literals, literals
        return Alignment(self.partition, self.found, self.last_read, thin, edits, calls, failure, said).departure()

    def first_in(self, path: str) -> int:
        """The first call that a module makes."""
        return next((n.index for n in self.graph.nodes if f"{n.module}.".startswith(f"{path}.")), 0)

    # --- what mends it ------------------------------------------------------------------------------------------------

    def mend(self, departure: Departure, seed: int) -> bool:
        """Tell the class what it lacks, in every repeated block; whether it got further."""
        if departure.index in self.tape.counted and self.changes(departure.index, seed):
            return self.absorb(departure, seed) or self.tell(departure, seed)
        if self.tie(departure.index, seed) or self.settle(departure.index, seed):
            return True
        best, base = None, self.found.stated
        for tried in itertools.islice(self.candidates(departure, seed), TRIES):
            self.found.stated = base | tried
            after = self.departure(seed, departure.index)
            if (after is None or after.far > departure.far) and self.still(tried.keys() & base.keys(), seed):
                if best is None or after is None or (best[0] is not None and after.far > best[0].far):
                    best = after, tried
                if after is None or after.index > departure.index + 20:
                    break
        self.found.stated = base if best is None else base | best[1]
        return best is not None or self.tell(departure, seed)

    def still(self, restated: Set[Place], seed: int) -> bool:
        """Whether what was settled before holds, if numbers are now stated by other terms."""
        return not restated or all(self.departure(before) is None for before in range(seed))

    def tell(self, departure: Departure, seed: int) -> bool:
        """Let a call be made as it should; whether the class gets further then."""
        before = self.found.told
        for places in self.sayings(departure, seed):
            told = dict(before)
            for index in self.siblings(departure.index):
                node, rewrite = self.graph.nodes[index], self.tape.rewrites.get(index)
                stating = tuple(sorted({*told.get(index, ()), *places}))
                mine = stock(self.modules.get(node.module)) is None
                if mine and self.telling.change(node, rewrite, None, stating) is not None:
                    told[index] = stating
            if departure.index in told and told != before:
                self.found.told = told
                after = self.departure(seed, departure.index)
                if after is None or after.far > departure.far:
                    return True
                self.found.told = before
        return False

    def sayings(self, departure: Departure, seed: int) -> Iterator[tuple[int, ...]]:
        """Which numbers of a call to state besides those that change: of sizes, such as parameters have."""
        node, rewrite = self.graph.nodes[departure.index], self.tape.rewrites.get(departure.index)
        if self.changes(departure.index, seed):
            yield ()
        if departure.call is not None and departure.call.op is node.op and rewrite is None:
            yield differing(node, departure.call)
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

    def absorb(self, departure: Departure, seed: int) -> bool:
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
                    for path in ancestors(self.graph.nodes[index].module)
                    for key, value in numbers(self.modules[path])
                    if isinstance(value, float) and value == wanted.value
                ]
                if not places:  # a number that stands in the code
                    self.found.absorbed, self.found.stated = before, stated
                    return False
                self.found.stated |= dict.fromkeys(places[:1], wanted)
        after = self.departure(seed, departure.index)
        if after is None or after.index > departure.index:
            return True
        self.found.absorbed, self.found.stated = before, stated
        return False

    def tie(self, index: int, seed: int) -> bool:
        """Where a call cuts pieces of equal size, the groups in them keep the same number of atoms."""
        rewrite, node = self.tape.rewrites.get(index), self.graph.nodes[index]
        if rewrite is None or rewrite.op is not aten.split_with_sizes.default or node.op is rewrite.op:
            return False
        cut = {at: [size.term for size in self.tape.rewrites[at].args[1]] for at in self.siblings(index)}
        if not self.tied(list(cut.values()), index, seed):
            return False
        # another method may cut by a number that this one does not read
        base, reached = self.found.stated, self.departure(seed, index)
        self.found.stated = base | {
            Place(path, key): Stated(pieces[0], value)
            for path, pieces in ((self.graph.nodes[at].module, pieces) for at, pieces in cut.items())
            for key, value in numbers(self.modules[path])
            if len(key) == 1 and type(value) is int and value == size_of(pieces[0]) and Place(path, key) not in base
        }
        after = self.departure(seed, index)
        if after is not None and (reached is None or after.far < reached.far):
            self.found.stated = base
        return True

    def settle(self, index: int, seed: int) -> bool:
        """Where one number states two sizes, the groups in both keep the same number of atoms."""
        thin = self.thin(seed)
        rewrite = self.tape.rewrites.get(index)
        for i, size in enumerate(sizes_in((rewrite.args, dict(rewrite.kwargs))) if rewrite is not None else ()):
            for path in ancestors(self.graph.nodes[index].module):
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
        after = self.departure(seed, index)
        if after is None or after.index > index:
            return True
        self.found.ties = before
        return False

    def give_up(self, departure: Departure, seed: int) -> None:
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
        if (departure.failure is None and seed != THINNEST) or not self.hold(new, departure, seed):
            self.keep(self.fewest(new, departure, seed))

    def hold(self, names: Iterable[str], departure: Departure, seed: int) -> bool:
        """Let groups keep a part of their atoms in any case; whether the class gets further then.

        It may divide by a width over a number of heads, which is nothing once there are fewer entries than heads.
        """
        before, together = self.found.least, self.with_tied(names)
        for part in FLOORS:
            floors = {
                name: max(-(-group.size // part), before.get(name, 1))
                for name, group in self.free.items()
                if name in together
            }
            # with one more, too: what only some sizes suit has no least one
            if all(self.gets_further(departure, seed, floors, more) for more in (0, 1)):
                self.found.least = before | {name: n for name, n in floors.items() if n > 1}
                break
        return self.found.least != before

    def gets_further(self, departure: Departure, seed: int, counts: Mapping[str, int], more: int) -> bool:
        """Whether the class gets beyond a call if so many atoms of some groups are left, or some more."""
        left = {name: min(n + more, self.free[name].size) for name, n in counts.items()}
        after = self.departure(seed, departure.index, left)
        return after is None or after.index > departure.index

    def fewest(self, names: Mapping[str, int], departure: Departure, seed: int) -> dict[str, int]:
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
                after = self.departure(seed, departure.index)
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

    def candidates(self, departure: Departure, seed: int) -> Iterator[dict[Place, Stated]]:
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
                for holder in (ancestors(path) if far else [path])
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
        # of what was stated by a term that happened to get as thin, by another one of that size
        mine = {place for place in self.found.stated if place.module in paths}
        anew = [
            [(place, label)]
            for label, term in self.dims(departure.index)
            for place in sorted(mine, key=repr)
            if size_of(term) == self.found.stated[place].value and self.found.stated[place].term != term
        ]
        ways = [(chosen, False) for chosen in (*combined, *single[:8], *factors[:8], *parts[:8])]
        for chosen, again in (*ways, *((chosen, True) for chosen in anew)):
            made = self.everywhere(departure.index, [o for o in chosen if o is not None], again)
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
        return primary, [(label, term) for label, term in self.dims(index) if changed(term, thin)]

    def dims(self, index: int) -> list[tuple[str, Term]]:
        """The sizes of tensors that calls near one meet, and products of two that are side by side."""
        found: list[tuple[str, Term]] = []
        for back in (0, 1, 2, 3, -1, -2):  # ahead, too: what was said wrong may have left a call out
            near = index - back
            if not 0 <= near < len(self.graph.nodes):
                continue
            calls = self.graph.nodes[near]
            values = [*calls.inputs(), *(v for v in calls.outputs if v is not None)]
            for i, value in enumerate(values):
                terms = self.partition.found.operands[value].terms
                for width in (1, 2):
                    for d in range(len(terms) - width + 1):
                        found.append((f"dim {back} {i} {d} {width}", tuple(f for t in terms[d : d + width] for f in t)))
        return found

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
        if not 0 <= index - back < len(self.graph.nodes):
            return None
        node = self.graph.nodes[index - back]
        values = [*node.inputs(), *(v for v in node.outputs if v is not None)]
        terms = self.partition.found.operands[values[i]].terms if i < len(values) else ()
        return tuple(f for t in terms[d : d + width] for f in t) if d + width <= len(terms) else None

    def everywhere(self, index: int, chosen: Sequence[tuple[Place, str]], again: bool = False) -> dict[Place, Stated]:
        """The same numbers of all repeated blocks; of those that are stated already, only if ``again``."""
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
                if held is not None and alike and other not in made and (again or other not in self.found.stated):
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
                found += sorted(alike, key=lambda path: -len(set(ancestors(path)) & set(ancestors(near))))[:1]
        return list(dict.fromkeys(found))[:2]


def _moved(holder: str, home: str, other: str) -> str | None:
    """The module that is to ``other`` what ``holder``, around ``home`` or beside it, is to that.

    >>> [_moved(holder, "layers.0.attn", "layers.3.attn") for holder in ("layers.0.attn.bias", "layers.0")]
    ['layers.3.attn.bias', 'layers.3']
    """
    for around, there in zip(ancestors(home), ancestors(other), strict=False):
        if holder == around or not around or holder.startswith(f"{around}."):
            rest = holder[len(around) :].lstrip(".")
            return ".".join(part for part in (there, rest) if part)
    return None


def _joined(ties: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Ties that share a group become one."""
    found: list[tuple[str, ...]] = []
    for tie in ties:
        touching = [other for other in found if set(other) & set(tie)]
        found = [other for other in found if other not in touching]
        found.append(tuple(dict.fromkeys(name for other in (*touching, tie) for name in other)))
    return sorted(found)
