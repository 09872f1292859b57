"""Keep the sizes of weights at the multiples that kernels and quantizers require.

The requirement concerns the size of the dimension, not its number of atoms. A dimension may be a product: 8 heads of 16
entries are 128 entries, a multiple of 32, and so are any 2, 4 or 6 of the heads. Therefore the multiple is divided
among the factors of the dimension. First it is divided by the multiple that each factor has in any case. The innermost
factor then takes the largest divisor of the rest that divides its size, so the head width is constrained before the
number of heads. Every segment of a sum (fused projections, concatenated branches) must satisfy the multiple by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from math import gcd, lcm

from oto.errors import OptionError
from oto.groups.layout import atoms_per_step
from oto.groups.node_group import Cut, NodeGroup, Slice
from oto.groups.policy import matching

Align = int | str | Mapping[str, int]
"""One multiple for all weights, the name of a preset, or a mapping from parameter names or globs to multiples."""

PRESETS = {"gguf": (32, 1), "gguf-k": (256, 1), "marlin": (128, 64), "cuda": (8, 8)}
"""For each preset, the multiples for the last dimension of a weight (a row in the file) and for its other dimensions.

GGUF divides rows into blocks of 32 (Q4_0 to Q8_0) or 256 entries (k-quants), and does not quantize rows that do not
divide evenly. Marlin, the kernel of GPTQ and AWQ in vLLM, requires multiples of 128 inputs and 64 outputs. Tensor cores
read 16 bytes: 8 entries of two bytes."""

ON_CUDA = 8
"""The default multiple of optimizers if the parameters are on a CUDA device."""

KERNEL_ROW = 8
"""Number of entries in 16 bytes of the narrowest dtype used for training. ``torch._grouped_mm`` only accepts rows whose
size in bytes is a multiple of 16."""

Place = tuple[str, int]
"""A parameter and one of its dimensions."""


def multiples(
    groups: Sequence[NodeGroup], align: Align, weights: Collection[str] | None = None, divisible: int = 1
) -> list[int]:
    """The number that each group's kept count must be a multiple of, so that dimension sizes satisfy ``align``.

    Args:
        groups: Node groups; those that are not prunable keep their sizes.
        align: See :data:`Align`.
        weights: Parameters that a product reads; others, such as tables and biases, are not considered. By default, all
            parameters with at least two dimensions.
        divisible: A number that every kept count is a multiple of anyway.

    Raises:
        OptionError: ``align`` is neither a positive integer nor a preset, or a value of the mapping is not positive.
        UnknownParameterError: A name or glob in ``align`` matches no parameter.
    """
    multiple_of = {g.name: lcm(g.divisor, divisible) if g.prunable and not g.segment else g.size for g in groups}
    places: dict[Place, list[tuple[NodeGroup, Slice]]] = {}
    for group in groups:
        for piece in () if group.segment else group.slices:
            places.setdefault((piece.parameter, piece.dim), []).append((group, piece))
    needs = _needs(places, align, weights)

    def factors(place: Place) -> int:
        return sum(group.prunable for group, _ in places[place])

    for place in sorted(needs, key=factors):  # a single free group must take the whole multiple, so it goes first
        _share([(group, piece.cuts) for group, piece in places[place]], needs[place], multiple_of)
    ties: dict[str, int] = {}
    steps = {g.name: per for g, per in zip(groups, atoms_per_step(groups).tolist(), strict=True)}
    for group in groups:
        if group.tie is not None and group.prunable:
            own = multiple_of[group.name] // gcd(multiple_of[group.name], steps[group.name])
            ties[group.tie] = lcm(ties.get(group.tie, 1), own)

    def multiple(group: NodeGroup) -> int:
        if not group.prunable:
            return group.divisor
        return multiple_of[group.name] if group.tie is None else ties[group.tie] * steps[group.name]

    return list(map(multiple, groups))


def _needs(places: Iterable[Place], align: Align, weights: Collection[str] | None) -> dict[Place, int]:
    """The multiple for each dimension of a weight, where it is above 1."""
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


def _share(pieces: Sequence[_Piece], need: int, multiple_of: dict[str, int]) -> int:
    """Divide the multiple of one dimension, or of a segment of it, among its groups; changes ``multiple_of``.

    Args:
        need: The number that the size must be a multiple of.

    Returns:
        The divisor of ``need`` that the size is now a multiple of.
    """
    by_place: dict[tuple[int, int], list[_Piece]] = {}
    for group, cuts in pieces:
        by_place.setdefault((cuts[0].before, cuts[0].middle), []).append((group, cuts))
    order = [by_place[place] for place in sorted(by_place, reverse=True)]  # the innermost first
    rest, held = need, []
    for same in order:
        held.append(gcd(rest, _held(same, multiple_of)))
        rest //= held[-1]
    free = [(same, own) for same, own in zip(order, held, strict=True) if any(g.prunable for g, _ in same)]
    for same, own in free:
        if rest == 1:
            break
        if len(same[0][1]) > 1:  # a sum
            rest = own * rest // gcd(own * rest, *(_share(s, own * rest, multiple_of) for s in _segments(same)))
            continue
        ((group, _),) = same
        wanted = own * rest if same is free[-1][0] else gcd(own * rest, group.size)
        multiple_of[group.name] = lcm(multiple_of[group.name], wanted)
        rest = own * rest // wanted
    return need // rest


def _held(same: Sequence[_Piece], multiple_of: Mapping[str, int]) -> int:
    """The number that the size of one factor of a dimension is a multiple of, whichever atoms are kept."""
    if len(same[0][1]) == 1:
        ((group, _),) = same
        return gcd(multiple_of[group.name], group.size)
    held = 0
    for segment in _segments(same):
        own = 1
        for place in {(cuts[0].before, cuts[0].middle) for _, cuts in segment}:
            own *= _held([p for p in segment if (p[1][0].before, p[1][0].middle) == place], multiple_of)
        held = gcd(held, own)
    return held


def _segments(same: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """For each segment of a sum, its groups with their cuts inside the segment."""
    inside: dict[int, list[_Piece]] = {}
    for group, cuts in same:
        inside.setdefault(cuts[0].offset, []).append((group, cuts[1:]))
    yield from inside.values()
