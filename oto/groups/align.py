"""Sizes that kernels and quantizers take: a dimension of a weight is to be a multiple of some number.

What counts is the size of the dimension, not the number of its atoms. A dimension may be a product: 8 heads of 16
entries are 128, a multiple of 32, and so are any 2, 4 or 6 of them. So the multiple is shared out among the factors.
What the others hold in any case counts, and of the rest the innermost takes as much as divides its size: widths are
held to a multiple before the number of heads is. Every segment of a sum (fused projections, concatenated branches) is
to be a multiple by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from math import gcd, lcm

from oto.errors import OptionError
from oto.groups.layout import atoms_per_step
from oto.groups.node_group import Cut, NodeGroup, Slice
from oto.groups.policy import matching

Align = int | str | Mapping[str, int]
"""A multiple for all weights; the name of a preset; or multiples by names or globs of parameters."""

PRESETS = {"gguf": (32, 1), "gguf-k": (256, 1), "marlin": (128, 64), "cuda": (8, 8)}
"""What the last dimension of a weight, the row of a file, is to be a multiple of; and what its other dimensions are.

GGUF cuts rows into blocks of 32 (Q4_0 to Q8_0) or 256 (k-quants), and leaves rows that do not divide as wide as they
were. Marlin, the kernel of GPTQ and AWQ in vLLM, wants 128 inputs and 64 outputs at a time. Tensor cores read 16 bytes:
8 entries of two bytes."""

ON_CUDA = 8
"""What optimizers align to by default where the parameters are on a CUDA device."""

KERNEL_ROW = 8
"""Entries of 16 bytes in the narrowest dtype that is trained in. ``torch._grouped_mm`` refuses rows of another size."""

Place = tuple[str, int]
"""A parameter and one of its dimensions."""


def multiples(
    groups: Sequence[NodeGroup], align: Align, weights: Collection[str] | None = None, divisible: int = 1
) -> list[int]:
    """What the kept count of each group is to be a multiple of, so that the sizes of dimensions are.

    Args:
        groups: Node groups; those that are not prunable keep their sizes.
        align: See :data:`Align`.
        weights: Parameters that a product reads; others, such as tables and biases, are not looked at. ``None``: all of
            two and more dimensions are weights.
        divisible: What every count is a multiple of anyway.

    Raises:
        OptionError: ``align`` is no positive number, and no preset.
        UnknownParameterError: A glob of it matches no parameter.
    """
    found = {g.name: lcm(g.divisor, divisible) if g.prunable and not g.segment else g.size for g in groups}
    places: dict[Place, list[tuple[NodeGroup, Slice]]] = {}
    for group in groups:
        for piece in () if group.segment else group.slices:
            places.setdefault((piece.parameter, piece.dim), []).append((group, piece))
    needs = _needs(places, align, weights)

    def factors(place: Place) -> int:
        return sum(group.prunable for group, _ in places[place])

    for place in sorted(needs, key=factors):  # where one alone can carry it, it does, and others need less
        _share([(group, piece.cuts) for group, piece in places[place]], needs[place], found)
    ties: dict[str, int] = {}
    steps = {g.name: per for g, per in zip(groups, atoms_per_step(groups).tolist(), strict=True)}
    for group in groups:
        if group.tie is not None and group.prunable:
            own = found[group.name] // gcd(found[group.name], steps[group.name])
            ties[group.tie] = lcm(ties.get(group.tie, 1), own)

    def multiple(group: NodeGroup) -> int:
        if not group.prunable:
            return group.divisor
        return found[group.name] if group.tie is None else ties[group.tie] * steps[group.name]

    return list(map(multiple, groups))


def _needs(places: Iterable[Place], align: Align, weights: Collection[str] | None) -> dict[Place, int]:
    """For each dimension of a weight, what it is to be a multiple of, if that is more than 1."""
    last: dict[str, int] = {}
    for name, dim in places:
        last[name] = max(last.get(name, 0), dim)
    read = {name for name, dim in last.items() if (dim > 0 if weights is None else name in weights)}
    need: dict[Place, int] = {}
    if isinstance(align, Mapping):
        for pattern, number in align.items():
            hits = set(matching([pattern], list(last)))
            _require_positive(number)
            for place in places:
                if place[0] in (hits & read or hits):
                    need[place] = lcm(need.get(place, 1), number)
    else:
        rows, others = _numbers(align)
        need = {(name, dim): rows if dim == last[name] else others for name, dim in places if name in read}
    return {place: number for place, number in need.items() if number > 1}


def _numbers(align: int | str) -> tuple[int, int]:
    if isinstance(align, str):
        if align not in PRESETS:
            raise OptionError(
                f"align is {align!r}; it is a number, a mapping, or one of {', '.join(map(repr, PRESETS))}"
            )
        return PRESETS[align]
    _require_positive(align)
    return align, align


def _require_positive(number: object) -> None:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise OptionError(
            f"align is {number!r}; it is a number of entries, at least 1, or {', '.join(map(repr, PRESETS))}"
        )


_Piece = tuple[NodeGroup, Sequence[Cut]]


def _share(pieces: Sequence[_Piece], need: int, found: dict[str, int]) -> int:
    """Give the groups of one dimension, or of a segment of one, what makes its size a multiple of ``need``.

    Returns:
        What the size is a multiple of in any case, as far as ``need`` asks for it.
    """
    by_place: dict[tuple[int, int], list[_Piece]] = {}
    for group, cuts in pieces:
        by_place.setdefault((cuts[0].before, cuts[0].middle), []).append((group, cuts))
    order = [by_place[place] for place in sorted(by_place, reverse=True)]  # the innermost first
    rest, held = need, []
    for same in order:
        held.append(gcd(rest, _held(same, found)))
        rest //= held[-1]
    free = [(same, own) for same, own in zip(order, held, strict=True) if any(g.prunable for g, _ in same)]
    for same, own in free:
        if rest == 1:
            break
        if len(same[0][1]) > 1:  # a sum
            rest = own * rest // gcd(own * rest, *(_share(s, own * rest, found) for s in _segments(same)))
            continue
        ((group, _),) = same
        wanted = own * rest if same is free[-1][0] else gcd(own * rest, group.size)
        found[group.name] = lcm(found[group.name], wanted)
        rest = own * rest // wanted
    return need // rest


def _held(same: Sequence[_Piece], found: Mapping[str, int]) -> int:
    """What one factor of a dimension is a multiple of, whatever is kept."""
    if len(same[0][1]) == 1:
        ((group, _),) = same
        return gcd(found[group.name], group.size)
    held = 0
    for segment in _segments(same):
        own = 1
        for place in {(cuts[0].before, cuts[0].middle) for _, cuts in segment}:
            own *= _held([p for p in segment if (p[1][0].before, p[1][0].middle) == place], found)
        held = gcd(held, own)
    return held


def _segments(same: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """The segments of a sum, each seen from inside."""
    inside: dict[int, list[_Piece]] = {}
    for group, cuts in same:
        inside.setdefault(cuts[0].offset, []).append((group, cuts[1:]))
    yield from inside.values()
