"""Prove which removals are exact, by following zeros through the network.

For each axis and each tensor that carries it, a *fact* says what every entry at a removed atom holds: a number, or
nothing known. Parameters in producing positions (rows of a linear, filters, biases, norms, embedding columns) are zero
there, whether trainable or frozen; inputs, constants and reading positions hold anything. Steps pass facts on. If a
step sums over the axis, a removal is exact only if one factor is zero there.

Example: unit 17 of ``fc2(relu(fc1(x)))`` is zero after ``fc1`` if row 17 of ``fc1.weight`` and its bias are zero; relu
keeps the zero; ``fc2`` sums over units, so unit 17 adds nothing to the sum. With a sigmoid it would hold 1/2, so column
17 of ``fc2.weight`` has to be zero instead.

If zero producers do not make an axis exact, zero readers are tried (the columns that read it), then both. If none of
these works, the axis is fixed, and the step that stood in the way is recorded as the reason. A forward may write into
parameters, as weight constraints do: zeros that are required have to be there after the forward, too.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush

from oto.axes import terms as T
from oto.axes.call import NOT_FINITE, Fact, Step, Uniform
from oto.axes.propagate import Propagation
from oto.axes.terms import Axis, Reason
from oto.trace.graph import Leaf

Place = tuple[int, int]  # (tensor, dimension)
PRODUCES, READS = 1, 2


@dataclass(frozen=True, eq=False)
class Exact:
    """The zeros that make the removal of atoms of one axis exact.

    Attributes:
        zeros: Parameter dimensions whose entries at the atom must be zero, as (leaf, dimension).
        by: ``"producers"``, ``"readers"`` or ``"both"``.
        quiet: With the readers at zero too, the gradient of every parameter entry at the atom is exactly zero.
    """

    axis: Axis
    zeros: tuple[tuple[Leaf, int], ...]
    by: str
    quiet: bool


@dataclass(slots=True, eq=False)
class Visit:
    """A step that touches an axis, with the dimensions that its facts come from."""

    step: Step
    outputs: list[tuple[int, list[list[Place]]]] = field(default_factory=list)  # (out dim, places by input)
    summed: list[list[Place]] = field(default_factory=list)


def prove(propagation: Propagation) -> dict[Axis, Exact]:
    """How atoms of each axis can be removed exactly. All other axes are fixed, each with its reason."""
    visits, carried = visits_of(propagation)
    leaves = [leaf for leaf in propagation.graph.leaves if leaf.may_be_zeroed]
    owned: dict[Axis, list[tuple[Leaf, int, Place]]] = {}
    for leaf in leaves:
        index = propagation.operands[leaf.value].index
        for dim, axes in enumerate(carried[index]):
            for axis in axes:
                owned.setdefault(axis, []).append((leaf, dim, (index, dim)))
    dynamic = dynamic_tensors(propagation)
    after = _after(propagation)
    proofs: dict[Axis, Exact] = {}
    for axis in dict.fromkeys(a for places in carried for axes in places for a in axes):
        if axis not in owned:
            axis.fixed = Reason("no parameter carries it")
            continue
        steps = visits.get(axis, [])
        roles = roles_of(steps, dynamic)
        producers = [own for own in owned[axis] if roles.get(own[2], 0) & PRODUCES]
        readers = [own for own in owned[axis] if not roles.get(own[2], 0) & PRODUCES and roles.get(own[2], 0) & READS]
        obstacle: Step | None = None
        lost: Leaf | None = None
        tries = [("producers", producers), ("readers", readers), ("both", producers + readers)]
        # a filter that is divided by its own norm must not be zero, but the factor that scales it may be
        breaking = _breaking(steps, [place for _, _, place in producers])
        brittle = [own for own in producers if own[2] in breaking]
        if brittle:
            tries.append(("producers", [own for own in producers if own not in brittle]))
        for by, zeros in tries:
            if not zeros:
                continue
            facts: dict[Place, Fact] = dict.fromkeys((place for _, _, place in zeros), 0.0)
            failed = follow(steps, facts)
            rewritten = [leaf for leaf, dim, (tensor, _) in zeros if not _is_zero(facts.get((after[tensor], dim)))]
            if failed is None and rewritten:
                lost = lost or rewritten[0]
                continue
            if failed is None:
                quiet = follow(steps, dict.fromkeys((place for _, _, place in owned[axis]), 0.0), True) is None
                proofs[axis] = Exact(axis, tuple((leaf, dim) for leaf, dim, _ in zeros), by, quiet)
                break
            obstacle = obstacle or failed
        else:
            if lost is not None:
                axis.fixed = Reason(f"the forward itself writes into {lost.name}, where zeros would not stay")
            elif obstacle is None:
                axis.fixed = Reason("no parameter could be zeroed to silence it")
            else:
                node = propagation.graph.calls[obstacle.node]
                text = propagation.tape.counted.get(obstacle.node)
                axis.fixed = Reason(
                    f"{node.op} mixes its entries, and they need not be zero there" + (f" ({text})" if text else ""),
                    obstacle.node,
                )
    return proofs


def visits_of(propagation: Propagation) -> tuple[dict[Axis, list[Visit]], list[list[tuple[Axis, ...]]]]:
    """For each axis that may be removed, the steps that touch it; and the free axes of each tensor's dimensions."""
    known: dict[int, tuple[Axis, ...]] = {}

    def free_axes(term: T.Term) -> tuple[Axis, ...]:
        resolved = T.resolve(term)
        if len(resolved) == 1 and isinstance(resolved[0], T.Sum):
            key = id(resolved[0])
            if key not in known:
                known[key] = tuple(dict.fromkeys(a for a in T.axes_of(resolved) if a.fixed is None))
            return known[key]
        return tuple(dict.fromkeys(a for a in T.axes_of(resolved) if a.fixed is None))

    carried = [[free_axes(term) for term in terms] for terms in propagation.tape.tensors]
    visits: dict[Axis, list[Visit]] = {}
    for step in propagation.tape.steps:
        here: dict[Axis, Visit] = {}

        def at(axis: Axis, here: dict[Axis, Visit] = here, step: Step = step) -> Visit:
            visit = here.get(axis)
            if visit is None:
                visit = here[axis] = Visit(step)
                visits.setdefault(axis, []).append(visit)
            return visit

        for dim, axes in enumerate(carried[step.output]):
            if not axes:
                continue
            into = [[d for d, targets in enumerate(routes) if dim in targets] for routes in step.routes]
            for axis in axes:
                places = [
                    [(tensor, d) for d in dims if axis in carried[tensor][d]]
                    for tensor, dims in zip(step.inputs, into, strict=True)
                ]
                at(axis).outputs.append((dim, places))
        for letter in step.summed:
            for axis in dict.fromkeys(a for i, d in letter for a in carried[step.inputs[i]][d]):
                at(axis).summed.append([(step.inputs[i], d) for i, d in letter if axis in carried[step.inputs[i]][d]])
    return visits, carried


def _after(propagation: Propagation) -> dict[int, int]:
    """The tensor that each parameter holds after a forward: itself, unless the forward wrote to it."""
    graph = propagation.graph
    written = {**graph.overwritten, **(graph.trained.overwritten if graph.trained else {})}
    tensors = {leaf.value: propagation.operands[leaf.value].index for leaf in graph.leaves}
    return {tensor: propagation.operands[written.get(value, value)].index for value, tensor in tensors.items()}


def dynamic_tensors(propagation: Propagation) -> list[bool]:
    """Which tensors depend on the inputs."""
    dynamic = [False] * len(propagation.tape.tensors)
    trained = propagation.graph.trained
    for value in (*propagation.graph.inputs, *(trained.inputs if trained else ())):
        dynamic[propagation.operands[value].index] = True
    for step in propagation.tape.steps:
        dynamic[step.output] = any(dynamic[i] for i in step.inputs)
    return dynamic


def roles_of(visits: list[Visit], dynamic: list[bool]) -> dict[Place, int]:
    """Whether a tensor made of parameters alone produces the axis, reads it, or both.

    Args:
        dynamic: For each tensor, whether it depends on the inputs.
    """
    roles: dict[Place, int] = {}
    for visit in reversed(visits):
        output = visit.step.output
        for dim, places in visit.outputs:
            role = PRODUCES if dynamic[output] else roles.get((output, dim), 0)
            for place in (p for group in places for p in group):
                if not dynamic[place[0]]:
                    roles[place] = roles.get(place, 0) | role
        for group in visit.summed:
            beside_data = any(dynamic[tensor] for tensor, _ in group)
            for place in group:
                if not dynamic[place[0]]:
                    roles[place] = roles.get(place, 0) | (READS if beside_data else PRODUCES)
    return roles


def follow(
    visits: Iterable[Visit], facts: dict[Place, Fact], backwards: bool = False, onwards: bool = False
) -> Step | None:
    """Follow facts through the steps, adding to ``facts``.

    Args:
        backwards: Also require that no gradient flows back. A product passes none on if all its factors are zero; a
            sum of entries always passes one on.
        onwards: Do not stop at a step that the removal would change.

    Returns:
        The first step whose result the removal would change; ``None`` if the removal is exact.
    """
    for visit in visits:
        step = visit.step
        for group in () if onwards else visit.summed:
            if step.rest is not None:
                dim, held = step.rest
                if backwards or any(d != dim or facts.get((t, d)) is not held for t, d in group):
                    return step
                continue
            zero = [_is_zero(facts.get(place)) for place in group]
            broken = any(_is_broken(facts.get(place)) for place in group)
            if broken or not any(zero) or (backwards and not (all(zero) and len(group) > 1)):
                return step
        for dim, places in visit.outputs:
            fact = _fact(step, dim, places, facts)
            if fact is not None:
                facts[(step.output, dim)] = fact
    return None


def _fact(step: Step, dim: int, places: list[list[Place]], facts: Mapping[Place, Fact]) -> Fact:
    """The fact of one dimension of a step's output."""
    given: list[Fact] = []
    for group in places:
        if len(group) == 1:
            given.append(facts.get(group[0]))
        elif group:
            values = [facts.get(place) for place in group]
            given.append(values[0] if all(v is not None and v == values[0] for v in values) else None)
        elif not step.skip_absent:
            given.append(None)
    fact = NOT_FINITE if any(map(_is_broken, given)) else step.fact(*map(_number, given))
    if fact is None and dim in step.uniform:
        held, expected = step.uniform[dim]
        if all(
            not group if e is None else g is e or g == e for group, g, e in zip(places, given, expected, strict=True)
        ):
            fact = held
    return fact


class Everywhere:
    """What whole tensors hold for every input: a number in all of their entries, or nothing known.

    The facts of steps also apply here, as if every tensor had a further axis with one entry.
    """

    def __init__(self, found: Propagation) -> None:
        self.steps = found.tape.steps
        self.readers: dict[int, list[int]] = {}
        self.always: dict[int, Fact] = {}
        for i, step in enumerate(self.steps):
            for tensor in dict.fromkeys(step.inputs):
                self.readers.setdefault(tensor, []).append(i)
            fact = self._fact(step, self.always)
            if fact is not None:
                self.always[step.output] = fact

    def with_zeros(self, zeros: Iterable[int]) -> dict[int, Fact]:
        """The facts that change if only the given tensors are zero: those of these tensors and of what follows."""
        new: dict[int, Fact] = dict.fromkeys(zeros, 0.0)
        facts = ChainMap(new, self.always)
        ahead = sorted({i for tensor in new for i in self.readers.get(tensor, ())})
        waiting = set(ahead)
        while ahead:
            i = heappop(ahead)
            step = self.steps[i]
            fact, before = self._fact(step, facts), facts.get(step.output)
            if fact is not before and (type(fact) is not type(before) or fact != before):
                new[step.output] = fact
                for reader in self.readers.get(step.output, ()):
                    if reader not in waiting:
                        waiting.add(reader)
                        heappush(ahead, reader)
        return new

    @staticmethod
    def _fact(step: Step, facts: Mapping[int, Fact]) -> Fact:
        given = [facts.get(tensor) for tensor in step.inputs]
        return NOT_FINITE if any(map(_is_broken, given)) else step.fact(*given)


def is_zero(fact: Fact) -> bool:
    """Whether a fact is that of a zero."""
    return _is_zero(_number(fact))


def _breaking(visits: list[Visit], places: list[Place]) -> set[Place]:
    """The places where a zero alone makes some value not finite.

    The facts without any zero are computed once. For each zero only the few facts that it changes are recomputed:
    following each zero through all steps would take time quadratic in the number of layers.
    """
    nothing: dict[Place, Fact] = {}
    follow(visits, nothing, onwards=True)
    readers: dict[Place, list[int]] = {}
    for i, visit in enumerate(visits):
        for _, groups in visit.outputs:
            for place in (p for group in groups for p in group):
                readers.setdefault(place, []).append(i)
    broken = [place for place, fact in nothing.items() if _is_broken(fact)]
    breaking: set[Place] = set()
    for place in places:
        new: dict[Place, Fact] = {place: 0.0}
        facts = ChainMap(new, nothing)
        ahead = list(dict.fromkeys(readers.get(place, ())))
        while ahead:
            i = heappop(ahead)
            step = visits[i].step
            for dim, groups in visits[i].outputs:
                fact, output = _fact(step, dim, groups, facts), (step.output, dim)
                before = facts.get(output)
                if fact is not before and (type(fact) is not type(before) or fact != before):
                    new[output] = fact
                    for reader in readers.get(output, ()):
                        if reader not in ahead:
                            heappush(ahead, reader)
        if any(map(_is_broken, new.values())) or any(known not in new for known in broken):
            breaking.add(place)
    return breaking


def _number(fact: Fact) -> Fact:
    """The fact as rules expect it: they treat a :class:`Uniform` as unknown."""
    return None if isinstance(fact, Uniform) else fact


def _is_zero(fact: Fact) -> bool:
    return fact is not None and fact == 0


def _is_broken(fact: Fact) -> bool:
    """Whether the value is not finite; zero times such a value is not zero."""
    return fact is not None and fact != fact
