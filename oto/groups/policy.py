"""What stays whole because somebody wants it to."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from oto.errors import NothingPrunableError, UnknownParameterError, some
from oto.groups.node_group import NodeGroup


def matching(patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """The names that the patterns (names or globs) stand for.

    Raises:
        UnknownParameterError: A pattern matches nothing; the message suggests the nearest name.
    """
    found: list[str] = []
    for pattern in patterns:
        hits = [name for name in names if name == pattern] or [n for n in names if fnmatchcase(n, pattern)]
        if not hits:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise UnknownParameterError(
                f"no parameter is called, or matches, {pattern!r}\n"
                f"  nearest  {some(near) if near else some(names)}\n"
                "  effect   nothing was marked\n"
                "  to fix   use a name from model.named_parameters(), or a glob such as 'layer1.*.weight'"
            )
        found += hits
    return list(dict.fromkeys(found))


def keep_whole(groups: Sequence[NodeGroup], parameters: Iterable[str], reason: str) -> tuple[NodeGroup, ...]:
    """Groups that would zero entries of one of ``parameters`` stay whole.

    Entries that merely disappear, because what they read is gone, are not protected by this: a layer's input shrinks
    with the layer before it.
    """
    protected = set(parameters)
    return tuple(
        replace(g, reason=reason) if g.prunable and any(s.parameter in protected for s in g.zeros) else g
        for g in groups
    )


def keep_at_least(groups: Sequence[NodeGroup], minimum: int) -> tuple[NodeGroup, ...]:
    """No group loses its last ``minimum`` atoms; one that has no more stays whole."""
    return tuple(
        replace(g, min_kept=minimum)
        if g.size > minimum or not g.prunable
        else replace(g, reason=f"it has no more than {minimum} atoms to keep")
        for g in groups
    )


def require_prunable(groups: Sequence[NodeGroup]) -> None:
    """Raise unless something can be removed.

    Raises:
        NothingPrunableError: Says why, reason by reason.
    """
    if any(group.prunable for group in groups):
        return
    reasons: dict[str, list[str]] = {}
    for group in groups:
        reasons.setdefault(group.reason or "", []).append(group.name)
    lines = [f"  {text}: {some(names)}" for text, names in list(reasons.items())[:8]]
    raise NothingPrunableError(
        "\n".join(
            [
                "no node group of this model can lose an entry",
                *(lines or ["  the model has no parameter that its forward uses"]),
                "  to fix  look at the reasons above; a model whose parameters are frozen (requires_grad=False),"
                " or whose layers meet only inputs and outputs, has nothing to prune",
            ]
        )
    )
