"""What stays whole because somebody wants it to."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TypeAlias

import networkx as nx
from torch import nn

from oto.errors import NothingPrunableError, OptionError, TargetError, UnknownNodeError, UnknownParameterError, some
from oto.groups.node_group import NodeGroup
from oto.trace.graph import Graph


def matching(patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """The parameter names that the patterns (names or globs) stand for.

    Raises:
        UnknownParameterError: A pattern matches nothing; the message suggests the nearest name.
    """
    found: list[str] = []
    for pattern in patterns:
        hits = _hits(pattern, names)
        if not hits:
            raise UnknownParameterError(
                f"no parameter is called, or matches, {pattern!r}\n"
                f"  nearest  {_nearest(pattern, names)}\n"
                "  effect   nothing was marked\n"
                "  to fix   use a name from model.named_parameters(), or a glob such as 'layer1.*.weight'"
            )
        found += hits
    return list(dict.fromkeys(found))


Pattern: TypeAlias = str | type[nn.Module] | nn.Module
"""What names parameters of a model: a name or glob of parameters or modules, a class of modules, or a module."""


def parameters_of(patterns: Iterable[Pattern], model: nn.Module) -> list[str]:
    """The names of all parameters that the patterns stand for.

    Args:
        patterns: Names or globs of parameters or of modules (everything in them), classes of modules, or modules.

    Raises:
        UnknownParameterError: A pattern matches nothing.
        OptionError: It is none of these.
    """
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    modules = dict(model.named_modules(remove_duplicate=False))
    found: list[str] = []
    for pattern in patterns:
        if isinstance(pattern, nn.Module):
            holders = [name for name, module in modules.items() if module is pattern]
        elif isinstance(pattern, str):
            holders = _hits(pattern, list(modules))
        elif isinstance(pattern, type):
            holders = [name for name, module in modules.items() if isinstance(module, pattern)]
        else:
            raise OptionError(
                f"{pattern!r} names nothing of the model\n  effect  nothing was marked\n"
                "  to fix  give names or globs of parameters or modules, classes of modules, or modules themselves"
            )
        inside = [name for name in parameters if any(name.startswith(f"{h}." if h else "") for h in holders)]
        if inside:
            found += inside
        elif isinstance(pattern, str):
            found += matching([pattern], parameters)
        elif isinstance(pattern, nn.Module):
            raise UnknownParameterError(
                f"this {type(pattern).__name__} is no module with parameters of the model\n"
                "  effect  nothing was marked\n  to fix  take it out of the model that is given, not out of a copy"
            )
        else:
            kinds = sorted({type(module).__name__ for module in modules.values()})
            raise UnknownParameterError(
                f"no module of the model is a {pattern.__name__} with parameters\n"
                f"  it has   {some(kinds, 12)}\n  effect   nothing was marked\n  to fix   use one of these classes"
            )
    return list(dict.fromkeys(found))


def outputs_called(patterns: Iterable[str], graph: Graph) -> frozenset[str]:
    """The names of the outputs that are or match the patterns, or lie in one that does.

    Raises:
        UnknownNodeError: There is none.
    """
    found: set[str] = set()
    for pattern in patterns:
        inside = [name for name in graph.output_names if name.startswith(f"{pattern}.")]
        hits = inside or _hits(pattern, graph.output_names)
        if not hits:
            raise UnknownNodeError(
                f"no output of the model is called, or matches, {pattern!r}\n"
                f"  it has   {some(graph.output_names, 12)}\n"
                "  effect   nothing was analyzed\n  to fix   name some of these in strict_out_nodes"
            )
        found.update(hits)
    return frozenset(found)


def carried_by_nodes(ids: Iterable[str | int], flow: nx.DiGraph) -> set[str]:
    """The node groups that run through some nodes of the graph.

    Args:
        ids: As in the drawing and in ``flow``: ``"node-12"`` or ``12`` for a call, ``"parameter fc.weight"``.

    Raises:
        UnknownNodeError: There is no such node.
    """
    names = [f"node-{i}" if isinstance(i, int) else i for i in ids]
    for name in names:
        if name not in flow:
            raise UnknownNodeError(
                f"the graph has no node {name!r}\n"
                f"  nearest  {_nearest(name, list(flow))}\n"
                "  effect   nothing was marked\n"
                "  to fix   take an id from oto.visualize(out_dir) or from oto.partition.graph"
            )
    return {group for name in names for group in flow.nodes[name]["groups"]}


def carried_by_operators(operators: Iterable[str], flow: nx.DiGraph) -> set[str]:
    """The node groups that run through the calls of some operators.

    Args:
        operators: ``"conv2d"``, ``"aten.conv2d"``, ``"aten.conv2d.default"``, or globs of these.

    Raises:
        UnknownNodeError: The model calls no such operator.
    """
    calls = {node: op for node, op in flow.nodes(data="op") if op}
    carried: set[str] = set()
    for operator in operators:
        hits = [node for node, op in calls.items() if any(fnmatchcase(n, operator.lower()) for n in _spellings(op))]
        if not hits:
            names = sorted({op.rpartition(".")[0] or op for op in calls.values()})
            raise UnknownNodeError(
                f"the model calls no operator {operator!r}\n"
                f"  nearest  {_nearest(operator, names)}\n"
                "  effect   nothing was marked\n"
                "  to fix   take a name from oto.coverage(), or a glob such as 'conv*'"
            )
        carried.update(group for node in hits for group in flow.nodes[node]["groups"])
    return carried


def _spellings(op: str) -> list[str]:
    """``aten.conv2d.default`` -> itself, ``aten.conv2d``, ``conv2d``."""
    packet = op.rpartition(".")[0]
    return [op.lower(), packet.lower(), packet.rpartition(".")[2].lower()]


def _hits(pattern: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if name == pattern] or [name for name in names if fnmatchcase(name, pattern)]


def _nearest(wanted: str, names: Sequence[str]) -> str:
    return some(difflib.get_close_matches(wanted, names, n=3, cutoff=0.3) or names)


def zeroing(groups: Iterable[NodeGroup], parameters: Iterable[str]) -> set[str]:
    """The groups that would zero entries of one of ``parameters``.

    Entries that merely disappear, because what they read is gone, do not count: a layer's input shrinks with the layer
    before it.
    """
    protected = set(parameters)
    return {g.name for g in groups if any(piece.parameter in protected for piece in g.zeros)}


def keep_whole(groups: Sequence[NodeGroup], names: Iterable[str], reason: str) -> tuple[NodeGroup, ...]:
    """The groups of these names stay whole; a mapping tells the index of the call that is the reason."""
    causes = names if isinstance(names, Mapping) else dict.fromkeys(names)
    return tuple(
        replace(g, reason=reason, cause=causes[g.name]) if g.prunable and g.name in causes else g for g in groups
    )


def keep_but(groups: Sequence[NodeGroup], named: Container[str], flat: Container[str]) -> tuple[NodeGroup, ...]:
    """Groups that would zero entries of another parameter than those in ``named`` stay whole.

    Parameters of one dimension, which are in ``flat`` (biases, norms), go with the weights beside them.
    """

    def kept(group: NodeGroup) -> NodeGroup:
        zeroed = dict.fromkeys(piece.parameter for piece in group.zeros)
        others = [name for name in [n for n in zeroed if n not in flat] or zeroed if name not in named]
        if group.prunable and others:
            names = dict.fromkeys(re.sub(r"\d+", "*", name) for name in others)
            return replace(group, reason=f"only does not name {some(names, 2)}")
        return group

    return tuple(map(kept, groups))


FROZEN = "frozen"


def keep_frozen(groups: Sequence[NodeGroup], graph: Graph) -> tuple[NodeGroup, ...]:
    """Frozen parameters (``requires_grad=False``) are left as they are: groups that would zero one stay whole.

    A frozen layer whose inputs disappear still shrinks with the layer before it, but nothing is written into it on the
    way, so such a group is not quiet.
    """
    frozen = frozenset(leaf.name for leaf in graph.leaves if leaf.frozen)

    def kept(group: NodeGroup) -> NodeGroup:
        held = [piece.parameter for piece in group.zeros if piece.parameter in frozen]
        if held and group.prunable:
            names = dict.fromkeys(re.sub(r"\d+", "*", name) for name in held)  # alike for repeated blocks
            return replace(group, reason=f"{FROZEN}: it would zero {some(names, 2)}", quiet=False)
        return replace(group, quiet=group.quiet and not any(piece.parameter in frozen for piece in group.slices))

    return tuple(map(kept, groups))


def frozen_part(groups: Iterable[NodeGroup]) -> str | None:
    """How much stays whole because it is frozen, in a line for a message about a target, if anything does."""
    held = [group for group in groups if (group.reason or "").startswith(FROZEN)]
    if not held:
        return None
    names = dict.fromkeys(re.sub(r"\d+", "*", piece.parameter) for group in held for piece in group.zeros)
    return (
        f"  frozen  {sum(group.size for group in held):,} atoms of {len(held)} node groups stay whole, since they would"
        f" zero parameters without requires_grad: {some(names, 3)}\n"
        f"  to fix  {dict(REMEDIES)['^frozen|no trainable']}"
    )


def frozen_since(groups: Iterable[NodeGroup], graph: Graph, model: nn.Module) -> tuple[list[str], list[str]]:
    """Parameters that were frozen, and that were unfrozen, since the graph was traced, where it matters to a group."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    was = {leaf.name: leaf.frozen for leaf in graph.leaves if leaf.kind == "parameter"}
    zeroed = dict.fromkeys(piece.parameter for group in groups if group.prunable for piece in group.zeros)
    held = dict.fromkeys(
        piece.parameter for group in groups if (group.reason or "").startswith(FROZEN) for piece in group.zeros
    )
    return (
        [name for name in zeroed if not was[name] and not parameters[name].requires_grad],
        [name for name in held if was[name] and parameters[name].requires_grad],
    )


MinKept = int | float | Mapping[str, int | float]
"""Atoms that a node group keeps: an int; a float is a share of its atoms; by name or glob of parameters or groups."""


def keep_at_least(groups: Sequence[NodeGroup], minimum: MinKept) -> tuple[NodeGroup, ...]:
    """No group loses its last ``minimum`` atoms; one that has no more stays whole.

    Raises:
        TargetError: A number is negative, or a share above 1.
        UnknownParameterError: A name or glob matches no parameter that a prunable group would zero.
    """
    if not isinstance(minimum, Mapping):
        return tuple(_keeping(group, atoms_of(minimum, group.size, "min_kept")) for group in groups)
    least: dict[str, int] = {}
    for pattern, number in minimum.items():
        for group in called(pattern, groups):
            least[group.name] = max(least.get(group.name, 0), atoms_of(number, group.size, "min_kept"))
    return tuple(_keeping(group, least[group.name]) if group.name in least else group for group in groups)


def called(pattern: str, groups: Sequence[NodeGroup]) -> list[NodeGroup]:
    """The group of that name; else those whose name, or a parameter that they would zero, is or matches it.

    Raises:
        UnknownParameterError: There is none.
    """
    if own := [group for group in groups if group.name == pattern]:
        return own
    names = {piece.parameter: None for g in groups if g.prunable for piece in g.zeros}
    hits = set(matching([pattern], [*names, *(g.name for g in groups if g.name not in names)]))
    return [g for g in groups if g.name in hits or any(piece.parameter in hits for piece in g.zeros)]


def atoms_of(asked: int | float, size: int, option: str) -> int:
    """A number of atoms, or a share of ``size`` rounded up, as a number.

    Raises:
        TargetError: It is negative, or a share above 1.

    >>> atoms_of(0.55, 100, "min_kept"), atoms_of(0.3, 8, "min_kept"), atoms_of(5, 8, "min_kept")
    (55, 3, 5)
    """
    whole = isinstance(asked, int) and not isinstance(asked, bool)
    if not (asked >= 0 if whole else isinstance(asked, float) and 0 <= asked <= 1):
        raise TargetError(f"{option} is {asked!r}; it is a number of atoms (an int) or a share of them (a float)")
    return int(asked) if whole else math.ceil(round(asked * size, 6))  # 0.55 * 100 is more than 55


def _keeping(group: NodeGroup, minimum: int) -> NodeGroup:
    if group.segment:  # it goes as a whole; how many stay is for min_depth to say
        return group
    least = max(minimum, group.min_kept)
    if group.size > least or not group.prunable:
        return replace(group, min_kept=least)
    return replace(group, reason=f"it has no more than {least} atoms to keep")


ERASE = "marked: compress_mode='erase' lets segments go, and nothing else"

REMEDIES = (  # what a user may do about a reason, the most promising first
    ("rule for", "add a rule for the operator without one (CONTRIBUTING.md)"),
    (
        "^frozen|no trainable",
        "set requires_grad_(True) before OTO(...) on what may be pruned; with adapters on a frozen model, prune both at"
        " once: OTO(..., prune_frozen=True).lhspg(...); or prune first and adapt the slim model, or merge first"
        " (docs/adapters.md)",
    ),
    (
        "marked|^skip_|^only|^layout|no more than",
        "take back what was asked: skip_patterns, only, marks, layout, tensor_parallel, min_kept",
    ),
    ("^its class", "OTO(..., allow_graph=True) prunes this too, and may end in a graph instead of the class"),
    ("never uses it", "give an example input that reaches these layers; those of training only stay whole"),
    (
        "of an output",
        "outputs keep their size; strict_out_nodes=True frees those that the model reads itself, a list of names those",
    ),
)
_IN_THE_NATURE = "of an input|kernel of a conv|it is empty|of places|carries it"


def promise(reason: str) -> int:
    """The place of a reason among all: first what a user can do something about, last what cannot be otherwise."""
    ours = (i for i, (text, _) in enumerate(REMEDIES) if re.search(text, reason))
    return next(ours, len(REMEDIES) + bool(re.search(_IN_THE_NATURE, reason)))


def require_prunable(groups: Sequence[NodeGroup], graph: Graph) -> None:
    """Raise unless something can be removed.

    Raises:
        NothingPrunableError: Says why, reason by reason.
    """
    if any(group.prunable for group in groups):
        return
    reasons: dict[str, list[str]] = {}
    for group in groups:
        node = None if group.cause is None else graph.calls[group.cause]
        place = "" if node is None else f" ({node}{', ' * bool(node.source)}{node.source})"
        reasons.setdefault(f"{group.reason}{place}", []).append(group.name)
    order = sorted(reasons, key=promise)
    lines = [f"  {text}: {some(reasons[text])}" for text in order[:8]]
    remedies = dict(enumerate(text for _, text in REMEDIES))
    todo = [remedies[i] for i in sorted({promise(text) for text in reasons} & remedies.keys())]
    raise NothingPrunableError(
        "\n".join(
            [
                "no node group of this model can lose an entry",
                *(lines or ["  the model has no parameter that its forward uses"]),
                "  effect  there is nothing to train away",
                "  to fix  " + "\n          ".join(todo or ["look at the reasons above"]),
            ]
        )
    )
