"""Uniform layouts: repeated blocks keep equally many atoms, and each block keeps its own best ones.

A config holds one number for all blocks of a kind. Therefore the node groups of a *tie* keep equally many atoms, but
not the same ones. Ties are plain data of the groups (:attr:`NodeGroup.tie`), which the optimizer and the constructor
read.

Groups of different sizes may be tied as well: a residual stream of 128 channels and its 8 heads of width 16 keep the
same share. Such a tie is counted in steps, here of 16 atoms of the stream and one head; see :func:`atoms_per_step`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from math import gcd, prod
from numbers import Integral, Real

import numpy as np
from numpy.typing import NDArray
from torch import nn

from oto.errors import OptionError, TargetError
from oto.groups.node_group import NodeGroup, Slice
from oto.groups.partition import Kept

LAYOUTS = (None, "free", "uniform", "stock")


def tied(groups: Sequence[NodeGroup], model: nn.Module) -> tuple[NodeGroup, ...]:
    """Tie the groups at the same place of repeated blocks: those of equal size whose slices have the same form.

    Blocks are repeated if an ``nn.ModuleList`` or ``nn.Sequential`` holds several modules of one class.
    """
    star = _starred(model)
    alike: dict[object, list[NodeGroup]] = {}
    for group in groups:
        form = sorted((star(piece.parameter), piece.dim, str(piece.cuts)) for piece in group.slices)
        alike.setdefault((group.size, tuple(form)), []).append(group)
    ties: dict[str, str] = {}
    taken: dict[str, int] = {}
    for same in alike.values():
        if len(same) > 1 and any(group.prunable for group in same):
            base = star((same[0].zeros or same[0].slices)[0].parameter)
            taken[base] = taken.get(base, -1) + 1
            ties.update((group.name, f"{base}/{taken[base]}" if taken[base] else base) for group in same)
    return settled(replace(group, tie=ties.get(group.name)) for group in groups)


def merge_ties(groups: Sequence[NodeGroup], ties: Iterable[Sequence[str]]) -> tuple[NodeGroup, ...]:
    """Tie further groups.

    Args:
        ties: The names of the groups in each tie; ties that share a group are merged, also with existing ones.
    """
    named = {group.name: group.tie or group.name for group in groups}
    names: dict[str, str] = {}

    def root(name: str) -> str:
        while name in names:
            name = names[name]
        return name

    for tie in ties:
        first, *others = dict.fromkeys(root(named[name]) for name in tie)
        names.update(dict.fromkeys(others, first))
    tied = {root(named[name]) for tie in ties for name in tie}
    return settled(
        replace(group, tie=root(named[group.name])) if root(named[group.name]) in tied else group for group in groups
    )


def as_wide_as_heads(groups: Sequence[NodeGroup], weights: Collection[str]) -> tuple[NodeGroup, ...]:
    """Tie each residual stream to the heads with the same total width, so that head width = stream width / heads.

    They are found by weights that map heads × width to the stream, or back. The head width and the number of queries
    per key stay whole. If either the stream or the heads stay whole, both do.

    Args:
        weights: Names of the parameters that are a factor of a product (:func:`oto.groups.cost.weights`).
    """
    ties: list[tuple[str, str]] = []
    whole: dict[str, None] = {}
    for stream, heads, width in streams(groups, weights):
        free = [group for group in heads if group.prunable]
        whole |= dict.fromkeys(group.name for group in (*free[1:], *width) if group.prunable)
        if stream.prunable and free:
            ties.append((stream.name, free[0].name))
        else:
            whole |= dict.fromkeys(group.name for group in (stream, *free[:1]) if group.prunable)
    reason = "layout: readers of a config divide its width by its heads"
    return merge_ties([replace(g, reason=reason) if g.name in whole else g for g in groups], ties)


def streams(
    groups: Sequence[NodeGroup], weights: Collection[str]
) -> Iterator[tuple[NodeGroup, list[NodeGroup], list[NodeGroup]]]:
    """Each residual stream with the head groups of the same total width, outermost factor first, and the groups of the
    head width."""
    places: dict[str, dict[int, list[tuple[NodeGroup, Slice]]]] = {}
    for group in groups:
        for piece in group.slices if group.size else ():
            if piece.parameter in weights:
                places.setdefault(piece.parameter, {}).setdefault(piece.dim, []).append((group, piece))
    for dims in places.values():
        for one, other in ((0, 1), (1, 0)) if dims.keys() == {0, 1} else ():
            (stream, piece), *more = dims[one]
            if more or len(piece.cuts) > 1:
                continue
            factors = sorted(dims[other], key=lambda entry: entry[1].cuts[0].before)
            first = factors[0][1].cuts[0]
            heads = [group for group, p in factors if len(p.cuts) == 1 and p.cuts[0].after > 1]
            if heads and first.before * first.middle * first.after == stream.size:
                yield stream, heads, [group for group, p in factors if group not in heads]


def _starred(model: nn.Module) -> Callable[[str], str]:
    """A function that replaces the indices of repeated blocks in parameter names by stars."""
    modules = dict(model.named_modules(remove_duplicate=False))
    repeated: set[str] = set()
    for path, module in modules.items():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            kinds = Counter(type(child) for child in module.children())
            inside = {f"{path}.{name}" if path else name: child for name, child in module.named_children()}
            repeated.update(name for name, child in inside.items() if kinds[type(child)] > 1)

    def star(name: str) -> str:
        parts = name.split(".")
        return ".".join("*" if ".".join(parts[: i + 1]) in repeated else part for i, part in enumerate(parts))

    return star


def settled(groups: Iterable[NodeGroup]) -> tuple[NodeGroup, ...]:
    """Make the groups of each tie consistent: if one stays whole, all do; all have the largest minimum among them."""
    groups = tuple(groups)
    per = dict(zip((group.name for group in groups), atoms_per_step(groups).tolist(), strict=True))
    whole: dict[str, NodeGroup] = {}
    least: dict[str, int] = {}
    for group in groups:
        if group.tie is not None:
            least[group.tie] = max(least.get(group.tie, 0), -(-group.min_kept // per[group.name]))
            if not group.prunable:
                whole.setdefault(group.tie, group)

    def held(group: NodeGroup) -> NodeGroup:
        if group.tie is None:
            return group
        if group.prunable and group.tie in whole:
            return replace(group, reason=f"layout: {whole[group.tie].name}, which is to have equally many, stays whole")
        return replace(group, min_kept=least[group.tie] * per[group.name])

    return tuple(map(held, groups))


def atoms_per_step(groups: Sequence[NodeGroup]) -> NDArray[np.int64]:
    """The number of atoms of each group in one step of its tie, shape ``(groups,)``; 1 for groups without a tie.

    The sizes of a tie's groups are divided by their greatest common divisor. If all of them are equal, so are the
    numbers of atoms that the groups keep, and a step is one atom of each.
    """
    common: dict[str, int] = {}
    for group in groups:
        if (tie := _tie(group)) is not None:
            common[tie] = gcd(common.get(tie, 0), group.size)
    return np.array([1 if (tie := _tie(g)) is None else g.size // common[tie] for g in groups], dtype=np.int64)


def _tie(group: NodeGroup) -> str | None:
    """The tie of a node group; ``None`` for a group without atoms, such as one removed with a segment."""
    return group.tie if group.size else None


def apply_tensor_parallel(groups: Sequence[NodeGroup], devices: int) -> tuple[NodeGroup, ...]:
    """Keep sizes divisible that tensor parallelism splits into ``devices`` equal parts: heads, key/value heads, FFNs.

    A dimension that is a product (heads × width) is split along its outermost factor. If that is not a multiple of
    ``devices``, the next inner factor must provide the rest. A group whose size is not divisible stays whole.

    Raises:
        TargetError: ``devices`` is not a positive integer.
    """
    if not isinstance(devices, Integral) or devices < 1:
        raise TargetError(f"tensor_parallel is {devices!r}; it is the number of devices, at least 1")

    def divided(group: NodeGroup) -> NodeGroup:
        outer = [prod(cut.before for cut in piece.cuts) for piece in group.slices]
        divisor = max((devices // gcd(devices, size) for size in outer), default=1)
        if group.prunable and group.size % divisor:
            return replace(group, reason=f"layout: tensor_parallel={devices} does not divide its {group.size} atoms")
        return replace(group, divisor=divisor)

    return settled(map(divided, groups)) if devices > 1 else tuple(groups)


def ties_of(groups: Sequence[NodeGroup]) -> NDArray[np.int64]:
    """The index of each group's tie, shape ``(groups,)``; a group without a tie has an index of its own."""
    numbers: dict[object, int] = {}
    keys = [(i,) if _tie(group) is None else group.tie for i, group in enumerate(groups)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def equalize_ties(
    groups: Sequence[NodeGroup], kept: Kept, by: str = "the layout", idle: Collection[str] = ()
) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    """Make every group of a tie keep as many atoms as the one that keeps most, in multiples of the divisor.

    The additional atoms are zero, so the network computes the same function.

    Args:
        by: What requires equal counts, for the sentences.
        idle: Groups in segments that are not computed. They get the count of the others, and do not influence it.

    Returns:
        The kept atoms, and a sentence about each tie whose groups kept different numbers.
    """
    most: dict[str, int] = {}
    prunable = [group for group in groups if group.prunable and group.size]
    steps = atoms_per_step(prunable).tolist()
    for group, per in zip(prunable, steps, strict=True):
        n = min(-(-len(kept[group.name]) // group.divisor) * group.divisor, group.size)
        key = group.tie or group.name
        if group.name not in idle:
            most[key] = max(most.get(key, 0), -(-n // per))
    shared = {group.tie for group, per in zip(prunable, steps, strict=True) if per > 1}
    result, uneven = dict(kept), dict[str, int]()
    for group, per in zip(prunable, steps, strict=True):
        own, key = kept[group.name], group.tie or group.name
        if key not in most:  # none of them is computed
            continue
        missing = most[key] * per - len(own)
        if group.name in idle:
            rest = np.setdiff1d(np.arange(group.size), own)
            result[group.name] = np.sort(np.concatenate([own, rest])[: most[key] * per])
        elif missing:
            zero = np.setdiff1d(np.arange(group.size), own)
            result[group.name] = np.sort(np.concatenate([own, zero[:missing]]))
            uneven[group.tie or group.name] = uneven.get(group.tie or group.name, 0) + missing
    return result, [
        f"{count} zero atoms of {name} were kept, because its groups are to "
        + (f"have {most[name]} each by {by}" if name not in shared else f"keep the same share by {by}")
        for name, count in uneven.items()
    ]


def drawn(groups: Sequence[NodeGroup], share: float, seed: int) -> dict[str, list[int]]:
    """Choose ``share`` of all atoms of the prunable groups at random.

    The choice respects the minimum, divisor and tie of each group, and keeps enough segments of each set that needs
    some.

    Returns:
        The chosen (pruned) atoms of each group of which some are chosen.

    Raises:
        TargetError: ``share`` is not in [0, 1), or cannot be reached within the minimums of the groups.
        OptionError: ``seed`` is not an int, or negative.
    """
    if not isinstance(share, Real) or not 0 <= share < 1:
        raise TargetError(f"target_group_sparsity is {share!r}; it is the share of groups that goes, in [0, 1)")
    if not isinstance(seed, Integral) or seed < 0:
        raise OptionError(f"seed is {seed!r}; it is an int, at least 0\n  effect  nothing was set to zero")
    prunable = [group for group in groups if group.prunable]
    total = sum(group.size for group in prunable)
    wanted = int(total * share)
    generator = np.random.default_rng(seed)
    ties = ties_of(prunable)
    members: dict[int, list[tuple[NodeGroup, int]]] = {}
    for tie, group, per in zip(ties.tolist(), prunable, atoms_per_step(prunable).tolist(), strict=True):
        members.setdefault(tie, []).append((group, per))
    order = {group.name: generator.permutation(group.size) for group in prunable}
    # a step removes atoms of every group of a tie, in multiples of their divisor
    steps: list[tuple[int, int]] = []
    by = {tie: max(-(-group.divisor // per) for group, per in same) for tie, same in members.items()}
    for tie, same in members.items():
        spare = min((group.size - group.min_kept) // per for group, per in same)
        steps += [(tie, begin) for begin in range(0, spare - by[tie] + 1, by[tie])]
    costs = {tie: sum(per for _, per in same) * by[tie] for tie, same in members.items()}
    room = sum(costs[tie] for tie, _ in steps)
    if wanted > room:
        raise TargetError(
            f"target_group_sparsity={share} cannot be reached: every group keeps its min_kept\n"
            f"  to fix  ask for a share in [0, {room / max(total, 1):.4f}]"
        )
    chosen: dict[str, list[int]] = {}
    may_go = Counter[str]()
    for group in prunable:
        for name, number in group.among:
            may_go[name] += 1 if name in may_go else 1 - number
    for tie, begin in (steps[i] for i in generator.permutation(len(steps))):
        sets = Counter(name for group, _ in members[tie] for name, _ in group.among)
        if costs[tie] <= wanted and all(may_go[name] >= n for name, n in sets.items()):
            may_go.subtract(sets)
            wanted -= costs[tie]
            for group, per in members[tie]:
                chosen.setdefault(group.name, []).extend(order[group.name][begin * per :][: by[tie] * per].tolist())
    return chosen
