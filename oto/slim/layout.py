"""Uniform layouts of models that were made from a config: what its fields can state, and the stock class of that size.

The thinner model is the class itself, made from an edited config (:mod:`oto.slim.config`). Two things are not sizes:

* A norm that divides by the number of its entries counts the zeros too, the stock one does not. With k of D entries
  left and the rest zero, an RMS norm is the stock one with ``weight * sqrt(D / k)`` and ``eps * D / k``. A norm that
  shares the field of that eps and has not become thinner gets its input larger by ``sqrt(D / k)``.
* An embedding may be scaled by a function of its width; the table makes up for it, and where the table is read again,
  the norm before that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oto.axes.call import Size
from oto.errors import EmitterError, VerificationError, out_of_memory
from oto.groups import Kept, NodeGroup, Partition, Slice
from oto.groups.align import KERNEL_ROW, multiples
from oto.groups.cost import weights
from oto.groups.layout import as_wide_as_heads, atoms_per_step, settled
from oto.groups.policy import keep_whole
from oto.nn import functional as counted
from oto.progress import stage
from oto.slim.config import solve, stock
from oto.slim.module import Edits, attribute, thin_tensors
from oto.slim.plan import Thinning, thinning
from oto.slim.recipe import Keywords, Recipe
from oto.slim.reference import Exact, check
from oto.slim.verify import require
from oto.slim.zeroed import Zeroed
from oto.trace.graph import Leaf, Node, Value
from oto.trace.record import on_meta

log = logging.getLogger(__name__)

SMALL = 2**28
"""A model of so many parameters is compared in float64 too, when ties are tried; one of more than a sixteenth only if
its own dtype, in which it takes a third of the time, does not show it equal."""

COARSER = 6
"""How many steps are tried."""

MANY = 16
"""Of so many steps some between an eighth and a quarter are kept where ties are tried, else any number."""

UNSTATED = "layout: no field of the config states its size"

# --- what a config can state ------------------------------------------------------------------------------------------


def stated(
    model: nn.Module, partition: Partition, groups: Sequence[NodeGroup], dummy_input: Any, recipe: Recipe | None,
    stock: bool = False,
) -> tuple[NodeGroup, ...] | None:  # fmt: skip
    """Keep whole what no field of the model's config can state; tie further what one field states for several ties.

    Found by trial, tie by tie: half of it is removed, and the class built from edited configs on ``meta``. In the end
    everything is removed at once, and the class compared with the zeroed model.

    Args:
        stock: A stream that is as wide as its heads stays so.

    Returns:
        ``None`` if the model has no config, or was made by a function whose keywords state nothing.
    """
    if recipe is None:
        return None
    groups = _in_whole_rows(partition, groups)
    if stock:
        groups = as_wide_as_heads(groups, weights(partition))
    trial = _Trial(model, partition, recipe, dummy_input, groups)
    steps = {key: step for key in trial.members() if (step := trial.step(key)) is not None}
    for path, value in recipe.fields().items():
        stage(f"layout: what {path} states")
        open_ = [key for key, same in trial.members().items() if key not in steps and same[0].size == value]
        touched = [key for key in open_ if any(trial.touches(path, group) for group in trial.members()[key])]
        if len(touched) > 1:
            alone = trial.groups
            trial.tie(touched, path)
            if (step := trial.step(path)) is None:
                trial.groups = alone
            else:
                steps[path] = step
    stage("layout: the class of fewer")
    steps = trial.fitting(steps)
    if not steps and isinstance(recipe.config, Keywords):
        return None
    whole = [g.name for key, same in trial.members().items() if key not in steps for g in same]
    found = keep_whole(trial.groups, whole, UNSTATED)
    per = atoms_per_step(found).tolist()
    return settled(replace(g, divisor=steps[_key(g)] * n) if g.prunable else g for g, n in zip(found, per, strict=True))


def _in_whole_rows(partition: Partition, groups: Sequence[NodeGroup]) -> tuple[NodeGroup, ...]:
    """Experts as ``torch._grouped_mm`` takes them in any dtype that the class may be read in, not only in this one."""
    experts = dict.fromkeys(weights(partition, "grouped_mm"), KERNEL_ROW)

    def whole(group: NodeGroup, by: int) -> NodeGroup:
        if not group.prunable or group.size % by == 0:
            return replace(group, divisor=by)
        return replace(group, reason=f"layout: its kernel reads rows of {by} entries, which do not divide {group.size}")

    own = multiples(groups, experts)
    return settled(whole(g, by) if by > g.divisor else g for g, by in zip(groups, own, strict=True))


def _key(group: NodeGroup) -> str:
    return group.tie or group.name


@dataclass(eq=False)
class _Trial:
    """Classes of fewer atoms, and what is wrong with them."""

    model: nn.Module
    partition: Partition
    recipe: Recipe
    dummy_input: Any
    groups: tuple[NodeGroup, ...]

    def members(self) -> dict[str, list[NodeGroup]]:
        """The prunable groups of each tie; one that is not tied is alone."""
        found: dict[str, list[NodeGroup]] = {}
        for group in self.groups:
            if group.prunable and group.size:
                found.setdefault(_key(group), []).append(group)
        return found

    def size(self, key: str) -> int:
        """How many steps there are in a tie; of groups of the same size each atom is one."""
        return math.gcd(*(group.size for group in self.members()[key]))

    def tie(self, keys: Sequence[str], name: str) -> None:
        self.groups = settled(replace(g, tie=name) if g.prunable and _key(g) in keys else g for g in self.groups)

    def touches(self, path: str, group: NodeGroup) -> bool:
        """Whether a field changes a dimension that a group lies in."""
        full, half = self.recipe.shapes({}) or {}, self.recipe.shapes({path: max(group.size // 2, 1)}) or {}
        return any(
            half[piece.parameter][piece.dim] != full[piece.parameter][piece.dim]
            for piece in group.slices
            if len(half.get(piece.parameter, ())) == len(full.get(piece.parameter, ()))
        )

    def step(self, key: str) -> int | None:
        """What the kept count of a tie is to be a multiple of; ``None`` if no count but the full one can be stated."""
        same, size = self.members()[key], self.size(key)
        by = math.lcm(*(-(-group.divisor * size // group.size) for group in same))
        steps = [n for n in range(by, size // 2 + 1, by) if size % n == 0]
        halves = dict.fromkeys([size // 2 // by * by, *steps[-1:]])
        if not any(n and self.solves({key: n}) for n in halves):
            return None
        return next((n for n in steps if self.solves({key: size - n})), None)

    def solves(self, counts: Mapping[str, int]) -> bool:
        try:
            solved(self.model, self.partition, self._first(counts), self.recipe)
        except EmitterError as failure:
            log.debug("%s: %s", dict(counts), failure)
            return False
        return True

    def _first(self, counts: Mapping[str, int]) -> dict[str, NDArray[np.int64]]:
        return {
            g.name: np.arange(counts[key] * g.size // self.size(key))
            for key, same in self.members().items()
            if key in counts
            for g in same
        }

    def fitting(self, steps: Mapping[str, int]) -> dict[str, int]:
        """The ties that the class can lose at once and still compute the same, and what their counts are multiples of.

        A kernel may take some sizes only; then steps get larger.
        """
        if not steps or self._failure(steps) is None:
            return dict(steps)
        good: dict[str, int] = {}
        for key, step in steps.items():
            size = self.size(key)
            for n in [n for n in range(step, size, step) if size % n == 0][:COARSER]:
                failure = self._failure(good | {key: n})
                if failure is None:
                    good[key] = n
                if failure is None or isinstance(failure, EmitterError | VerificationError):
                    break
        return good

    def _failure(self, steps: Mapping[str, int]) -> Exception | None:
        """What happens to the class when some ties keep some multiple of their steps."""
        kept = self._drawn(steps)
        try:
            if on_meta(self.model):  # there is nothing to run
                solved(self.model, self.partition, kept, self.recipe)
            else:
                self._compare(kept)
        except Exception as failure:  # anything that the user's own forward may raise at other sizes
            if out_of_memory(failure):
                raise
            log.info("the class cannot lose %s: %s", dict(steps), failure)
            return failure
        return None

    def _drawn(self, steps: Mapping[str, int]) -> dict[str, NDArray[np.int64]]:
        """For some multiple of the steps of each tie, atoms that are kept; of many a few, for the class is made."""
        draw = np.random.default_rng(0)
        kept: dict[str, NDArray[np.int64]] = {}
        for key, step in steps.items():
            same, size = self.members()[key], self.size(key)
            n = size // step
            least, most = (n // 16, n // 8) if n >= MANY else (0, n // 2)
            count = step * (1 + 2 * int(draw.integers(least, most)))  # odd, so no multiple of a coarser step
            kept |= {g.name: np.sort(draw.permutation(g.size)[: count * g.size // size]) for g in same}
        return kept

    def _compare(self, kept: Kept) -> None:
        """Compare the class with the model without what is not kept.

        Raises:
            EmitterError: No config states what is kept.
            VerificationError: They differ.
        """
        gone: dict[str, list[tuple[Slice, NDArray[np.int64]]]] = {}
        for group in self.groups:
            for piece in group.zeros if group.name in kept else ():
                entries = np.setdiff1d(np.arange(group.size), kept[group.name])
                gone.setdefault(piece.parameter, []).append((piece, entries))
        full = Zeroed(self.model, gone, self._uneven)
        with full.reading():
            made = emit_stock(self.model, self.partition, kept, self.recipe, self._whole(full, kept))
        full.read.clear()  # what the model itself reads counts
        try:
            self._check(full, made)
        except VerificationError:
            if not full.missed():
                raise
            self._check(full.written(), made)

    def _check(self, full: Zeroed, made: Restated) -> None:
        def rounded(other: nn.Module) -> Mapping[str, Tensor]:
            assert isinstance(other, Zeroed) and made.rounded is not None
            with other.reading():
                return made.rounded(other.model)

        entries = sum(p.numel() for p in self.model.parameters())
        how = None if made.rounded is None else rounded
        for exact in [True] if entries <= SMALL // 16 else [False, True] if entries <= SMALL else [False]:
            checks = check(full, made.model, self.dummy_input, random=False, exact=exact, rounded=how)
            if all(one.passed for one in checks):
                return
        require(checks)

    def _whole(self, full: Zeroed, kept: Kept) -> dict[str, Tensor]:
        """Parameters that stay as they are. The class shares them with the model for the comparison."""
        thin, names = thinning(self.partition, kept), {*full.gone, *full.instead}
        leaves = [leaf for leaf in self.partition.found.graph.leaves if leaf.kind == "parameter"]
        same = [leaf for leaf in leaves if not names & set(leaf.names) and all(m.all() for m in thin.entries(leaf))]
        return {name: attribute(self.model, leaf.name).detach() for leaf in same for name in leaf.names}

    @cached_property
    def _uneven(self) -> dict[str, Tensor]:
        """For parameters whose entries are all equal, as biases are before any training, others: they would not show a
        mistake."""
        generator, found = torch.Generator().manual_seed(0), {}
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if p.is_floating_point() and p.numel() and p.min() == p.max():
                    found[name] = p.detach().add(torch.rand(p.shape, generator=generator).to(p), alpha=0.1)
        return found


# --- the class of that size -------------------------------------------------------------------------------------------


def solved(model: nn.Module, partition: Partition, kept: Kept, recipe: Recipe) -> tuple[dict[str, Any], list[_Norm]]:
    """The fields that state what is kept, and the norms that count what is gone.

    Raises:
        EmitterError: There are none.
    """
    thin = thinning(partition, kept)
    norms = _norms(model, partition, thin)
    edits = solve(recipe, thin)
    return edits | _eps(recipe, edits, norms), norms


def restated(
    model: nn.Module, partition: Partition, kept: Kept, recipe: Recipe | None, held: Mapping[str, Tensor] | None = None
) -> tuple[nn.Module, dict[str, Any], set[str]]:
    """The model's class made from an edited config, with what is kept of its tensors.

    Args:
        held: Tensors that are there already, by the names of the model.

    Returns:
        It, the edits, and the names of the tensors that have taken something in.

    Raises:
        EmitterError: No config states what is kept.
    """
    if recipe is None:
        raise EmitterError(f"{type(model).__name__} has no config that its class can be made from")
    edits, norms = solved(model, partition, kept, recipe)
    thin = thinning(partition, kept)
    slim = stock(model, thin_tensors(model, thin, held=held), edits, recipe)
    with torch.no_grad():
        changed = _absorb(model, slim, partition, thin, norms)
    return slim, edits, changed


@dataclass(frozen=True, eq=False)
class Restated:
    """The slim model as the stock class.

    Attributes:
        edits: What makes it.
        tensors: What it holds in a file.
        changed: Names of those that have taken something in.
        rounded: Makes these, and buffers that no file holds, for the proof in float64; ``None`` if there are none.
    """

    model: nn.Module
    edits: Edits
    tensors: dict[str, Tensor]
    changed: Collection[str]
    rounded: Exact | None


def emit_stock(
    model: nn.Module, partition: Partition, kept: Kept, recipe: Recipe | None, held: Mapping[str, Tensor] | None = None
) -> Restated:
    """The slim model as the stock class, made from a config that states its sizes.

    Args:
        held: Tensors that are there already, by the names of the model. None is written to.

    Raises:
        EmitterError: No config states what is kept.
    """
    slim, edits, changed = restated(model, partition, kept, recipe, held)
    held = dict([*slim.named_parameters(remove_duplicate=False), *slim.named_buffers(remove_duplicate=False)])

    saved = slim.state_dict().keys() if edits else held.keys()  # what no file holds, the constructor makes
    made = {name for name, t in held.items() if name not in saved and t.is_floating_point()}

    def rounded(full: nn.Module) -> Mapping[str, Tensor]:  # what norms absorb, and what a constructor computes
        narrow = {name: t for name, t in held.items() if name not in changed} if full is model else None
        exact = restated(full, partition, kept, recipe, narrow)[0]
        return {name: attribute(exact, name) for name in changed | made}

    tensors = {name: t for name, t in held.items() if name in saved}
    return Restated(slim, Edits(config=edits), tensors, changed, rounded if changed | made else None)


# --- what is no size --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Norm:
    """A norm that has become thinner.

    Attributes:
        path: Its module.
        weight: The leaf that it multiplies with.
        ratio: Entries it had, by those it has.
    """

    path: str
    weight: Leaf
    ratio: float


def _norms(model: nn.Module, partition: Partition, thin: Thinning) -> list[_Norm]:
    graph, found = partition.found.graph, []
    for index, text in partition.found.tape.counted.items():
        rewrite, node = partition.found.tape.rewrites[index], graph.calls[index]
        full, left = _counts(rewrite.op, rewrite.args, rewrite.kwargs, thin)
        if full == left:
            continue
        refusal = f"{text}, and no field of a config says of how many ({node})"
        if rewrite.op not in (counted.mean, counted.rms_norm):
            raise EmitterError(refusal)
        own = {id(p) for p in model.get_submodule(node.module).parameters(recurse=False)}
        weights = [leaf for leaf in graph.leaves if leaf.kind == "parameter" and id(attribute(model, leaf.name)) in own]
        if not node.module or len(weights) != 1 or thin.shape(weights[0]) != (left,):
            raise EmitterError(refusal)
        found.append(_Norm(node.module, weights[0], full / left))
    return found


def _counts(op: Any, args: Any, kwargs: Mapping[str, Any], thin: Thinning) -> tuple[int, int]:
    """Of how many entries a call takes the mean, in the full and in the thinner model; unequal if it is not known."""
    if op is counted.group_norm:
        width = kwargs["width"]
        return kwargs["full"], thin.size(width) if isinstance(width, Size) else width
    sizes = kwargs.get("sizes") or (args[1] if op in (counted.layer_norm, counted.rms_norm) else None)
    if sizes is None or "full" not in kwargs:
        return 0, 1
    return math.prod(kwargs["full"]), math.prod(thin.filled(list(sizes)))


def _eps(recipe: Recipe, edits: Mapping[str, Any], norms: Sequence[_Norm]) -> dict[str, float]:
    """The fields that state what norms add to the mean, and what they state now."""
    if not norms:
        return {}
    ratios = {norm.ratio for norm in norms}
    if len(ratios) > 1:
        raise EmitterError("norms of several widths have become thinner, and one field of the config states their eps")
    (ratio,) = ratios
    plain = recipe.make(edits, recipe.device)
    own = {norm.path: _floats(plain.get_submodule(norm.path)) for norm in norms}
    small = {path: v for path, v in recipe.fields().items() if isinstance(v, float) and 0 < v < 0.01}
    found: dict[str, float] = {}
    for path, value in small.items():
        if any(value in held.values() for held in own.values()):
            made = recipe.make({**edits, path: value * ratio}, recipe.device)
            if any(_floats(made.get_submodule(norm.path)) != own[norm.path] for norm in norms):
                found[path] = value * ratio
    made = recipe.make({**edits, **found}, recipe.device)
    for norm in norms:
        now = _floats(made.get_submodule(norm.path))
        if not any(now[name] == value * ratio for name, value in own[norm.path].items()):
            raise EmitterError(f"no field of the config states what {norm.path} adds to the mean")
    return found


def _floats(module: nn.Module) -> dict[str, float]:
    return {name: value for name, value in vars(module).items() if isinstance(value, float)}


def _absorb(
    model: nn.Module, slim: nn.Module, partition: Partition, thin: Thinning, norms: Sequence[_Norm]
) -> set[str]:
    """Put into weights what the stock class does otherwise than the zeroed model, and tell which."""
    if not norms:
        return set()
    touched = {name for norm in norms for name in norm.weight.names}
    factors = {norm.path: math.sqrt(norm.ratio) for norm in norms}
    forms = {norm.path: _scaled(model, slim, thin, norm) for norm in norms}
    # norms that share the eps, but count the same
    changed = {pair for norm in norms for pair in _changed(model, slim, norm.path)}
    for path, _ in slim.named_modules():
        for was, now in _changed(model, slim, path) & changed if path not in factors else ():
            for leaf in _producers(partition, path):
                _times(slim, leaf.names, math.sqrt(now / was))
                touched.update(leaf.names)
    # tables that are scaled by a function of their width
    by_value = {leaf.value: leaf for leaf in partition.found.graph.leaves}
    graph = partition.found.graph
    for node in graph.nodes:
        table = by_value.get(node.args[0]) if node.op is torch.ops.aten.embedding.default else None
        if table is None or not node.module or all(mask.all() for mask in thin.entries(table)):
            continue
        ids = torch.arange(min(table.value.shape[0], 8), device=attribute(model, table.name).device)
        try:
            full, left = model.get_submodule(node.module)(ids), slim.get_submodule(node.module)(ids)
        except TypeError:  # it asks for more than places in a table
            continue
        ratio = float(full.norm() / left.norm())
        if abs(ratio - 1) < 1e-6:
            continue
        _times(slim, table.names, ratio)
        touched.update(table.names)
        for reader in graph.nodes:
            if reader is not node and table.value in reader.inputs():
                before = _norm_before(partition, reader, table.value, forms.keys())
                _scale(slim.get_submodule(before), forms[before], 1 / ratio)
    return touched


def _changed(model: nn.Module, slim: nn.Module, path: str) -> set[tuple[float, float]]:
    """Numbers that a module holds, and what they are in the stock class, where that is something else."""
    was, now = _floats(model.get_submodule(path)), _floats(slim.get_submodule(path))
    return {(was[name], now[name]) for name in was.keys() & now.keys() if was[name] != now[name]}


def _times(model: nn.Module, names: Iterable[str], factor: float) -> None:
    done: set[int] = set()
    for name in names:
        tensor = attribute(model, name)
        if id(tensor) not in done:
            tensor.data = tensor * factor  # in memory of its own: it may be shared with the full model
            done.add(id(tensor))


def _scale(module: nn.Module, plus_one: bool, factor: float) -> None:
    (weight,) = module.parameters(recurse=False)
    weight.copy_((1 + weight) * factor - 1 if plus_one else weight * factor)


def _scaled(model: nn.Module, slim: nn.Module, thin: Thinning, norm: _Norm) -> bool:
    """Scale the weight of a norm, and tell whether it multiplies with one more than that."""
    full, left = model.get_submodule(norm.path), slim.get_submodule(norm.path)
    (mask,) = thin.entries(norm.weight)
    like = attribute(model, norm.weight.name)
    keep = torch.from_numpy(np.flatnonzero(mask)).to(like.device)
    x = torch.randn(4, len(mask), generator=torch.Generator().manual_seed(0)).to(like)
    x = torch.zeros_like(x).index_copy_(1, keep, x.index_select(1, keep))
    wanted = full(x).index_select(1, keep)
    (weight,) = left.parameters(recurse=False)
    plain = weight.detach().clone()
    errors = []
    for plus_one in (False, True):
        _scale(left, plus_one, math.sqrt(norm.ratio))
        errors.append(float((left(x.index_select(1, keep)) - wanted).abs().max()))
        weight.copy_(plain)
    plus_one = errors[1] < errors[0]
    _scale(left, plus_one, math.sqrt(norm.ratio))
    return plus_one


def _producers(partition: Partition, path: str) -> list[Leaf]:
    """The parameters of the call that computed what a module is given.

    Raises:
        EmitterError: There is no such call.
    """
    graph = partition.found.graph
    leaves = {leaf.value: leaf for leaf in graph.leaves if leaf.kind == "parameter"}
    inside = [node for node in graph.nodes if node.module == path]
    inner = {value for node in inside for value in node.outputs}
    for value in (value for node in inside for value in node.inputs() if value not in inner and value not in leaves):
        for node in _back(partition, value):
            found = [leaves[v] for v in node.inputs() if v in leaves]
            if found:
                return found
    raise EmitterError(f"{path} shares its eps with thinner norms, and what it is given cannot be scaled")


def _norm_before(partition: Partition, reader: Node, table: Value, norms: Iterable[str]) -> str:
    """The norm whose result a call multiplies with a table.

    Raises:
        EmitterError: There is none.
    """
    paths = set(norms)
    for value in reader.inputs():
        for node in _back(partition, value) if value is not table else ():
            if node.module in paths:
                return node.module
    raise EmitterError(f"{reader} reads a table that is scaled by its width, behind no norm that could make up for it")


def _back(partition: Partition, value: Value) -> Iterator[Node]:
    """The calls that a value came through, from the last to the first one that puts several tensors together."""
    made = {v: node for node in partition.found.graph.nodes for v in node.outputs if v is not None}
    while value in made:
        node = made[value]
        yield node
        before = list(node.inputs())
        if len(before) != 1:
            return
        (value,) = before
