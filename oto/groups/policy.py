"""Policies: keep node groups whole because a user requested it, or because their parameters are frozen.

Example: ``OTO(model, x, skip_patterns=["head.*"])`` keeps every group whole that would zero a parameter of ``head``.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any, TypeAlias

import networkx as nx
from torch import nn

from oto.errors import NothingPrunableError, OptionError, TargetError, UnknownNodeError, UnknownParameterError, some
from oto.groups.node_group import NodeGroup
from oto.trace.graph import Graph


def matching(patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """The parameter names that match the patterns, which are names or globs.

    Raises:
        UnknownParameterError: A pattern matches nothing; the message suggests the nearest names.
        OptionError: A pattern is not a string.
    """
    matches: list[str] = []
    for pattern in patterns:
        hits = _hits(_text(pattern), names)
        if not hits:
            raise UnknownParameterError(
                f"no parameter is called, or matches, {pattern!r}\n"
                f"  nearest  {_nearest(pattern, names)}\n"
                "  effect   nothing was marked\n"
                "  to fix   use a name from model.named_parameters(), or a glob such as 'layer1.*.weight'"
            )
        matches += hits
    return list(dict.fromkeys(matches))


def _text(name: Any) -> str:
    """Return a name.

    Raises:
        OptionError: It is not a string.
    """
    if isinstance(name, str):
        return name
    raise OptionError(f"{name!r} is no name\n  effect  nothing was marked\n  to fix  give names or globs, as texts")


Pattern: TypeAlias = str | type[nn.Module] | nn.Module
"""Selects parameters of a model: a name or glob of parameters or modules, a module class, or a module."""


def parameters_of(patterns: Iterable[Pattern], model: nn.Module) -> list[str]:
    """The names of all parameters that the patterns select.

    Args:
        patterns: Names or globs of parameters or modules, module classes, or modules. A module selects all parameters
            in it.

    Raises:
        UnknownParameterError: A pattern matches nothing.
        OptionError: A pattern is none of these.
    """
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    modules = dict(model.named_modules(remove_duplicate=False))
    matches: list[str] = []
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
            matches += inside
        elif isinstance(pattern, str):
            matches += matching([pattern], parameters)
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
    return list(dict.fromkeys(matches))


def outputs_called(patterns: Iterable[str], graph: Graph) -> frozenset[str]:
    """The names of the outputs that match the patterns, or are nested in an output that a pattern names.

    Raises:
        UnknownNodeError: A pattern matches no output.
    """
    matches: set[str] = set()
    for pattern in patterns:
        inside = [name for name in graph.output_names if name.startswith(f"{pattern}.")]
        hits = inside or _hits(str(pattern), graph.output_names)  # an index in a tuple is a name, too
        if not hits:
            raise UnknownNodeError(
                f"no output of the model is called, or matches, {pattern!r}\n"
                f"  it has   {some(graph.output_names, 12)}\n"
                "  effect   nothing was analyzed\n  to fix   name some of these in strict_out_nodes"
            )
        matches.update(hits)
    return frozenset(matches)


def carried_by_nodes(ids: Iterable[str | int], flow: nx.DiGraph) -> set[str]:
    """The names of the node groups that some nodes of the graph carry.

    Args:
        ids: Node names as in the drawing and in ``flow``: ``"node-12"`` or ``12`` for a call, ``"parameter fc.weight"``
            for a parameter.

    Raises:
        UnknownNodeError: There is no such node.
        OptionError: An id is neither a string nor an integer.
    """
    names = [f"node-{i}" if isinstance(i, int) else _text(i) for i in ids]
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
    """The names of the node groups that the calls of some operators carry.

    Args:
        operators: ``"conv2d"``, ``"aten.conv2d"``, ``"aten.conv2d.default"``, or globs of these.

    Raises:
        UnknownNodeError: The model calls no such operator.
        OptionError: An operator is not a string.
    """
    calls = {node: op for node, op in flow.nodes(data="op") if op}
    carried: set[str] = set()
    for operator in operators:
        pattern = _text(operator).lower()
        hits = [node for node, op in calls.items() if any(fnmatchcase(n, pattern) for n in _spellings(op))]
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


def starred(name: str) -> str:
    """A parameter name with its numbers replaced by stars, so that repeated blocks get the same name.

    A name whose module path has no letters is returned unchanged.

    >>> starred("blocks.3.fc1.weight"), starred("3.weight")
    ('blocks.*.fc*.weight', '3.weight')
    """
    return re.sub(r"\d+", "*", name) if re.search(r"[^\W\d]", name.rpartition(".")[0]) else name


def zeroing(groups: Iterable[NodeGroup], parameters: Iterable[str]) -> set[str]:
    """The names of the groups that would zero entries of one of ``parameters``.

    Entries that are removed without having to be zero, such as the columns of the next layer, do not count.
    """
    protected = set(parameters)
    return {g.name for g in groups if any(piece.parameter in protected for piece in g.zeros)}


def keep_whole(groups: Sequence[NodeGroup], names: Iterable[str], reason: str) -> tuple[NodeGroup, ...]:
    """Keep the prunable groups of these names whole.

    Args:
        names: Names of groups; a mapping also gives, for each, the index of the call that is the reason.
        reason: Why they stay whole.
    """
    causes = names if isinstance(names, Mapping) else dict.fromkeys(names)
    return tuple(
        replace(g, reason=reason, cause=causes[g.name]) if g.prunable and g.name in causes else g for g in groups
    )


def keep_but(groups: Sequence[NodeGroup], named: Container[str], flat: Container[str]) -> tuple[NodeGroup, ...]:
    """Keep groups whole that would zero entries of a parameter that is not in ``named``.

    Args:
        named: Names of parameters.
        flat: Names of parameters of one dimension (biases, norms), which need not be in ``named`` if the weights are.
    """

    def kept(group: NodeGroup) -> NodeGroup:
        zeroed = dict.fromkeys(piece.parameter for piece in group.zeros)
        others = [name for name in [n for n in zeroed if n not in flat] or zeroed if name not in named]
        if group.prunable and others:
            names = dict.fromkeys(map(starred, others))
            return replace(group, reason=f"only does not name {some(names, 2)}")
        return group

    return tuple(map(kept, groups))


FROZEN = "frozen"


def keep_frozen(groups: Sequence[NodeGroup], graph: Graph) -> tuple[NodeGroup, ...]:
    """Keep groups whole that would zero a frozen parameter (``requires_grad=False``).

    A frozen layer whose inputs are removed still shrinks with the layer before it. But its entries are not set to zero
    during training, so such a group is not quiet.
    """
    frozen = frozenset(leaf.name for leaf in graph.leaves if leaf.frozen)

    def kept(group: NodeGroup) -> NodeGroup:
        held = [piece.parameter for piece in group.zeros if piece.parameter in frozen]
        if held and group.prunable:
            names = dict.fromkeys(map(starred, held))
            return replace(group, reason=f"{FROZEN}: it would zero {some(names, 2)}", quiet=False)
        return replace(group, quiet=group.quiet and not any(piece.parameter in frozen for piece in group.slices))

    return tuple(map(kept, groups))


def held_part(groups: Iterable[NodeGroup]) -> str | None:
    """Lines for a message about a target: what stays whole because it is frozen, or because a user requested it.

    ``None`` if there is nothing to report.

    >>> from oto.groups.node_group import Slice
    >>> print(held_part([NodeGroup("fc", 8, (Slice("fc.weight", 0, ()),), reason="skip_patterns names it")]))
      asked   8 atoms of 1 node groups stay whole, since skip_patterns names it: fc.weight
      to fix  take back what was asked: skip_patterns, only, marks, layout, tensor_parallel, min_kept
    """
    lines: list[str] = []
    whole = [(group.reason, group) for group in groups if group.reason is not None]
    if frozen := [group for reason, group in whole if reason.startswith(FROZEN)]:
        since = "they would zero parameters without requires_grad"
        lines += [_held("frozen", frozen, since), f"  to fix  {dict(REMEDIES)[_FROZEN]}"]
    asked: dict[str, list[NodeGroup]] = {}
    for reason, group in whole:
        if re.search(_ASKED, reason):
            asked.setdefault(re.sub("^only does not name .*", "only does not name them", reason), []).append(group)
    lines += [_held("asked", own, reason) for reason, own in list(asked.items())[:4]]
    lines += [f"  asked   {len(asked) - 4} more reasons, see oto.explain()"] * (len(asked) > 4)
    lines += [f"  to fix  {dict(REMEDIES)[_ASKED]}"] * bool(asked)
    return "\n".join(lines) or None


def _held(word: str, groups: Sequence[NodeGroup], since: str) -> str:
    names = dict.fromkeys(starred(piece.parameter) for group in groups for piece in group.zeros or group.slices)
    atoms = sum(group.size for group in groups)
    return (
        f"  {word.ljust(6)}  {atoms:,} atoms of {len(groups)} node groups stay whole, since {since}: {some(names, 3)}"
    )


def frozen_since(groups: Iterable[NodeGroup], graph: Graph, model: nn.Module) -> tuple[list[str], list[str]]:
    """Parameters whose ``requires_grad`` has changed since the graph was traced, as two lists.

    Returns:
        The parameters that a prunable group would zero and that are frozen now; and the parameters that keep a group
        whole and are no longer frozen.
    """
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
"""The minimum number of atoms that node groups keep: an int; a float, as a share of their atoms; or a mapping from
names or globs of parameters or groups to either."""


def keep_at_least(groups: Sequence[NodeGroup], minimum: MinKept) -> tuple[NodeGroup, ...]:
    """Make every group keep at least ``minimum`` atoms; a group that has no more than that stays whole.

    Raises:
        TargetError: A number is negative, a share is above 1, or a value is neither an int nor a float.
        UnknownParameterError: A name or glob matches no group, and no parameter that a prunable group would zero.
    """
    if not isinstance(minimum, Mapping):
        return tuple(_keeping(group, atoms_of(minimum, group.size, "min_kept")) for group in groups)
    least: dict[str, int] = {}
    for pattern, number in minimum.items():
        for group in called(pattern, groups):
            least[group.name] = max(least.get(group.name, 0), atoms_of(number, group.size, "min_kept"))
    return tuple(_keeping(group, least[group.name]) if group.name in least else group for group in groups)


def called(pattern: str, groups: Sequence[NodeGroup]) -> list[NodeGroup]:
    """The group of that name; otherwise all groups whose name, or a parameter that they would zero, matches it.

    Raises:
        UnknownParameterError: There is none.
    """
    if own := [group for group in groups if group.name == pattern]:
        return own
    names = {piece.parameter: None for g in groups if g.prunable for piece in g.zeros}
    hits = set(matching([pattern], [*names, *(g.name for g in groups if g.name not in names)]))
    return [g for g in groups if g.name in hits or any(piece.parameter in hits for piece in g.zeros)]


def atoms_of(asked: int | float, size: int, option: str, what: str = "atoms") -> int:
    """The number of atoms that an option requests: an int itself, or a float as a share of ``size``, rounded up.

    Raises:
        TargetError: ``asked`` is negative, a share above 1, or no number.

    >>> atoms_of(0.55, 100, "min_kept"), atoms_of(0.3, 8, "min_kept"), atoms_of(5, 8, "min_kept")
    (55, 3, 5)
    """
    whole = isinstance(asked, Integral) and not isinstance(asked, bool)
    if isinstance(asked, bool) or not (asked >= 0 if whole else isinstance(asked, Real) and 0 <= asked <= 1):
        raise TargetError(f"{option} is {asked!r}; it is a number of {what} (an int) or a share of them (a float)")
    return int(asked) if whole else math.ceil(round(asked * size, 6))  # 0.55 * 100 is more than 55


def _keeping(group: NodeGroup, minimum: int) -> NodeGroup:
    if group.segment:  # it has one atom; min_depth sets how many segments stay
        return group
    least = max(minimum, group.min_kept)
    if group.size > least or not group.prunable:
        return replace(group, min_kept=least)
    return replace(group, reason=f"it has no more than {least} atoms to keep")


_FROZEN, _ASKED = "^frozen|no trainable", "marked|^skip_|^only|^layout|no more than"
ERASE = "marked: compress_mode='erase' lets segments go, and nothing else"

REMEDIES = (  # patterns of reasons, each with what a user can do about it, the most promising first
    ("rule for", "add a rule for the operator without one (CONTRIBUTING.md)"),
    (
        _FROZEN,
        "set requires_grad_(True) before OTO(...) on what may be pruned; with adapters on a frozen model, prune both at"
        " once: OTO(..., prune_frozen=True).lhspg(...); or prune first and adapt the slim model, or merge first"
        " (docs/adapters.md)",
    ),
    ("^marked: compress_mode", "compress_mode='both', or 'prune': nothing of this model can go as a whole"),
    (
        _ASKED,
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
    """The rank of a reason: low for reasons that a user can change, highest for those inherent to the model."""
    ours = (i for i, (text, _) in enumerate(REMEDIES) if re.search(text, reason))
    return next(ours, len(REMEDIES) + bool(re.search(_IN_THE_NATURE, reason)))


def require_prunable(groups: Sequence[NodeGroup], graph: Graph) -> None:
    """Check that at least one group is prunable.

    Raises:
        NothingPrunableError: No group is; the message lists the reasons.
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
