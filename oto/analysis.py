"""Analyze a model before training: ``analyze(model, dummy_input, Options())`` -> ``Analysis``.

An analysis is an immutable value: marking, shrinking and copying make a new one. :func:`_analyzed` shows the order of
the policies that determine what may be removed, and :func:`_in_form` the order of the forms of the slim model.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from oto._torch import FakeTensor, holder, tree_leaves, unwrapped
from oto.adapters import makers_of_adapted
from oto.atomic import rewording_os_errors
from oto.axes.registry import known
from oto.errors import (
    DummyInputError,
    DummyInputWarning,
    NothingPrunableError,
    OptionError,
    TraceError,
    UnknownOpWarning,
    UnknownParameterError,
    UnstatedWarning,
    place_of,
    require_flags,
    rewording,
    some,
    users_level,
)
from oto.groups import Cost, Costs, NodeGroup, Partition, cost, trainable
from oto.groups.cost import Extent
from oto.groups.layout import LAYOUTS, apply_tensor_parallel, drawn, settled, tied
from oto.groups.policy import (
    ERASE,
    MinKept,
    Pattern,
    carried_by_nodes,
    carried_by_operators,
    keep_at_least,
    keep_but,
    keep_frozen,
    keep_whole,
    matching,
    outputs_called,
    parameters_of,
    require_prunable,
    zeroing,
)
from oto.groups.segments import Branches, MinDepth, require_depth, segment_groups, with_segments
from oto.optim.entries import Rows
from oto.progress import stages
from oto.report.draw import draw
from oto.report.erasable import Erasable, erasable
from oto.report.explain import Explanation, explain
from oto.shards import refuse_flattened, reshard, sharded_names, whole
from oto.slim.asked import needed
from oto.slim.called import Calls
from oto.slim.config.recipe import WRAPPED, Recipe
from oto.slim.config.trial import stated, stated_layers
from oto.slim.config.unstated import nothing_states
from oto.slim.own_class import OwnClass, limited, own_class
from oto.slim.proof.inputs import device_of, follow_model
from oto.slim.state import left_before
from oto.trace.graph import Graph
from oto.trace.inputs import Example
from oto.trace.record import record
from oto.trace.snapshot import preserved
from oto.trace.state import ModelState, undone

WRAPPED.append(makers_of_adapted)

MODES = ("prune", "erase", "both")

Layout: TypeAlias = Literal["free", "uniform", "stock"]
"""How repeated blocks are pruned together, see :class:`oto.OTO`."""

CompressMode: TypeAlias = Literal["prune", "erase", "both"]
"""Whether atoms, segments, or both are removed, see :class:`oto.OTO`."""


@dataclass(frozen=True)
class Options:
    """The options of an analysis; see :class:`oto.OTO`.

    Raises:
        OptionError: ``compress_mode``, ``layout`` or a flag has an invalid value.
    """

    skip_patterns: Iterable[Pattern] = ()
    only: Iterable[Pattern] | None = None
    strict_out_nodes: bool | Iterable[str] = False
    min_kept: MinKept = 1
    allow_graph: bool = False
    prune_frozen: bool = False
    drop_unreached: bool = False
    layout: Layout | None = None
    tensor_parallel: int = 1
    compress_mode: CompressMode = "prune"
    min_depth: MinDepth = 1

    def __post_init__(self) -> None:
        if self.compress_mode not in MODES:
            raise OptionError(f"compress_mode is {self.compress_mode!r}; it is one of {', '.join(map(repr, MODES))}")
        if self.layout not in LAYOUTS:
            raise OptionError(f"layout is {self.layout!r}; it is one of {', '.join(map(repr, LAYOUTS))}")
        require_depth(self.min_depth)
        require_flags(allow_graph=self.allow_graph, prune_frozen=self.prune_frozen, drop_unreached=self.drop_unreached)


@dataclass(frozen=True, eq=False)
class Form:
    """The form of the slim model, which limits what may be removed.

    Attributes:
        kind: ``"config"``: the class, made from a config that states every size; ``"class"``: the class, adapted by the
            result of the search; ``"graph"``: possibly a graph, since groups may be removed that the class cannot
            express.
        recipe: How the class is made from its config, for ``"config"``.
        own: What the class needs, for ``"class"``.
    """

    kind: Literal["config", "class", "graph"]
    recipe: Recipe | None = None
    own: OwnClass | None = None

    @property
    def settled(self) -> Form:
        """The form without the copy on which the class was searched."""
        return self if self.own is None else replace(self, own=replace(self.own, copy=None))

    @property
    def decisions(self) -> Iterable[object]:
        """The decisions of the search of the class, which can be printed."""
        if self.own is not None:
            return self.own.steps or ["search: the class was asked, and can do without anything as it is"]
        instead = (
            "its config states the sizes (layout)"
            if self.kind == "config"
            else "allow_graph=True takes a graph instead"
        )
        return [f"search: the class was not asked, since {instead}"]


@dataclass(frozen=True, eq=False)
class Analysis:
    """What may be removed from a model, and the form of the slim one.

    Attributes:
        model: The model itself.
        example: The example input.
        partition: The terms of every dimension, and the node groups before any policy.
        groups: The node groups after all policies.
        form: The form of the slim model.
        state: The state of the model when it was recorded.
        device: The device of its parameters at that time, if they were all on one.
        strict_out_nodes: Which outputs need not keep their size.
        allow_graph, prune_frozen, drop_unreached: As in :class:`oto.OTO`.
        first: The size of the model before it was made smaller during training; ``None`` if it was not.
        branches: The segments, and the branches that stay; ``None`` if segments may not be removed.
    """

    model: nn.Module
    example: Example
    partition: Partition
    groups: tuple[NodeGroup, ...]
    form: Form
    state: ModelState
    device: torch.device | None
    strict_out_nodes: bool | frozenset[str]
    allow_graph: bool
    prune_frozen: bool
    drop_unreached: bool
    first: Extent | None = None
    branches: Branches | None = None

    @property
    def graph(self) -> Graph:
        """The traced graph."""
        return self.partition.found.graph

    @property
    def names(self) -> list[str]:
        """The names of all parameters and buffers of the model that were found in the trace."""
        return [name for leaf in self.graph.leaves for name in leaf.names]

    @property
    def first_name(self) -> dict[str, str]:
        """For each name of a tensor, the name that node groups use; tied parameters have several names."""
        return _first_name(self.graph)

    @property
    def altered(self) -> list[str]:
        """The modules that were changed by hand since the analysis, which no longer holds for them."""
        return self.state.altered(self.model, {node.module for node in self.graph.nodes})

    @cached_property
    def costs(self) -> Costs:
        """Parameters, MACs and bytes as functions of the atoms that the prunable groups keep."""
        return Costs.of(self.partition, self.groups)

    def cost(self, kept: Mapping[str, int] | None = None) -> Cost:
        """The cost of the model; with ``kept``, if these groups keep the given numbers of atoms."""
        return cost(self.partition, kept)

    def explain(self, *, search: bool = False) -> Explanation:
        """What can be removed, and why the rest stays whole."""
        staying = () if self.branches is None else self.branches.staying
        return explain(self.groups, self.partition, self.form.decisions if search else (), staying)

    def erasable(self) -> Erasable:
        """The segments that can be removed as a whole, regardless of ``compress_mode``."""
        partition, found = (self.partition, self.branches) if self.branches else with_segments(self.partition)
        assert found is not None
        return erasable(partition, [group for group in self.groups if group.segment], found.staying)

    def coverage(self) -> dict[str, dict[str, int]]:
        """The operators of the model by the kind of rule that they have, with the number of calls."""
        return {answer: dict(calls) for answer, calls in self.partition.found.coverage.items()}

    @property
    def summary(self) -> str:
        """One line: how much may be removed, and the cost of the model."""
        free, costs = [group for group in self.groups if group.prunable], self.cost()
        return (
            f"{len(free)} of {len(self.groups)} node groups prunable, {sum(group.size for group in free):,}"
            f" zero-invariant groups; {costs.params:,} parameters, {costs.macs:,} MACs"
        )

    def draw(self, out_dir: str | os.PathLike[str], **how: bool) -> list[Path]:
        """Draw the graph to files; see :meth:`oto.OTO.visualize`."""
        require_flags(**how)
        folder = place_of("out_dir", out_dir, "nothing was drawn")
        with rewording_os_errors(folder, "nothing was drawn"):
            return draw(self.partition, self.groups, folder, type(self.model).__name__, **how)

    # Marks: keep further groups whole -----------------------------------------------------------------------------

    def without_parameters(self, patterns: Iterable[str]) -> Analysis:
        """The analysis in which the groups stay whole that would zero entries of some parameters."""
        parameters = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        names = _first_names(self.graph, matching(_listed(patterns), parameters))
        return self._without(zeroing(self.groups, names), "it was marked unprunable")

    def without_nodes(self, node_ids: Iterable[str | int]) -> Analysis:
        """The analysis in which the groups carried by some nodes of the graph stay whole."""
        return self._without(carried_by_nodes(_listed(node_ids), self.partition.graph), "it was marked unprunable")

    def without_operators(self, operators: Iterable[str]) -> Analysis:
        """The analysis in which the groups carried by the results of some operators stay whole."""
        carried = carried_by_operators(_listed(operators), self.partition.graph)
        return self._without(carried, "skip_operators names an operator that it runs through")

    def without_groups(self, groups: set[str], reason: str) -> Analysis:
        """The analysis in which the groups of these names stay whole."""
        return self._without(groups, reason)

    def _without(self, groups: set[str], reason: str) -> Analysis:
        return replace(self, groups=settled(keep_whole(self.groups, groups, reason)))

    def zero_random_(self, share: float, seed: int) -> None:
        """Set a random choice of atoms to zero, in place."""
        chosen = drawn(self.groups, share, seed)
        reshard(self.model)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        atoms = [torch.tensor(chosen.get(group.name, ()), dtype=torch.int64) for group in self.groups]
        Rows.of(self.groups, atoms, parameters).zero_()

    # The analysis of other models -------------------------------------------------------------------------------------

    def of(self, model: Any) -> Analysis:
        """The analysis for a copy of the model or a wrapper of one, or for the model itself after a cast or move.

        Raises:
            UnknownParameterError: ``model`` lacks a parameter, or has it in another shape.
        """
        shapes = {leaf.name: leaf.value.shape for leaf in self.graph.leaves if leaf.kind == "parameter"}
        inner = holder(model, shapes)
        found = {} if inner is None else dict(inner.named_parameters(remove_duplicate=False))
        bad = [name for name, shape in shapes.items() if name not in found or tuple(found[name].shape) != shape]
        if inner is None or bad:
            raise _no_copy(model, self.model, bad)
        then = {leaf.name: leaf.value.dtype for leaf in self.graph.leaves if leaf.name in found}
        return replace(self, model=inner, example=follow_model(self.example, then, self.device, found))

    def __deepcopy__(self, memo: dict[int, Any]) -> Analysis:
        model, example = copy.deepcopy((self.model, self.example), memo)
        return replace(self, model=model, example=example)  # the rest holds no tensors, so it can be shared

    def __getstate__(self) -> dict[str, Any]:
        found_anew = ("partition", "state", "costs", "branches")  # operators cannot be pickled
        kept = {k: v for k, v in vars(self).items() if k not in found_anew}
        depths = () if self.form.recipe is None else self.form.recipe.depths
        return {**kept, "form": self.form.kind, "branches": self.branches is not None, "depths": depths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: value for name, value in state.items() if name != "depths"})
        with undone(left_before(self.model, self.example)):
            vars(self)["state"] = ModelState(self.model)
            graph = record(self.model, self.example, known, dead=not self.allow_graph, training=True)
            partition = trainable(graph, self.strict_out_nodes)
            found = with_segments(partition) if state.get("branches") else (partition, None)
            vars(self)["partition"], vars(self)["branches"] = found
            kind: Any = self.form
            own = ask_the_class(self) if kind == "class" else None
            recipe = Recipe.of(self.model) if kind == "config" else None
            if recipe is not None:
                recipe.depths = tuple(state.get("depths", ()))
            vars(self)["form"] = Form(kind, recipe, own)


def analyze(model: nn.Module, dummy_input: Any, options: Options) -> Analysis:
    """Record a model, find its groups, and decide which of them may be removed in which form.

    Raises:
        As :class:`oto.OTO`.
    """
    model, example = unwrapped(_module(model)), Example.of(dummy_input)
    _refuse_quantized(model)
    refuse_flattened(model)
    _refuse_empty(example)
    _warn_of_nan(example)
    if not sharded_names(model):
        return _analyzed(model, example, options)
    with whole(model):  # with sharded parameters on meta, so that nothing is gathered
        found = _analyzed(model, example, options)
    return replace(found, device=device_of(model.parameters()))


def _analyzed(model: nn.Module, example: Example, options: Options) -> Analysis:
    with rewording(model, TraceError, "being looked through"):
        left = left_before(model, example)
    with undone(left):
        skipped = parameters_of(_listed(options.skip_patterns), model)
        only = None if options.only is None else parameters_of(_listed(options.only), model)
        calls = Calls()
        watching = nullcontext if options.compress_mode == "prune" else calls.watching
        with rewording(model, TraceError, "being followed on the dummy input"):
            graph = record(model, example, known, not options.allow_graph, training=True, watching=watching)
        state, strict = ModelState(model), options.strict_out_nodes
        strict = strict if isinstance(strict, bool) else outputs_called(_listed(strict), graph)
        with rewording(model, TraceError, "being analyzed", "it was followed on the dummy input"):
            partition = trainable(graph, strict)
        # what may be removed: first limits of each group, then those between groups, then those of the form
        groups = keep_at_least(partition.groups, options.min_kept)
        groups = groups if options.prune_frozen else keep_frozen(groups, graph)
        groups = _but_skipped(groups, skipped, graph)
        groups = groups if only is None else _only(groups, only, graph, model)
        _warn_of_unknown(partition, model)
        groups = apply_tensor_parallel(groups, options.tensor_parallel)
        groups = tied(groups, model) if options.layout in ("uniform", "stock") else groups
        if options.compress_mode == "erase":
            groups = keep_whole(groups, [group.name for group in groups], ERASE)
        found = _in_form(
            options.layout,
            Analysis(
                model,
                example,
                partition,
                groups,
                Form("graph"),
                state,
                device_of(model.parameters()),
                strict,
                options.allow_graph,
                options.prune_frozen,
                options.drop_unreached,
            ),
            keeps=options.compress_mode != "prune",
        )
        if options.compress_mode != "prune":
            found = _with_segments(found, options, skipped, only, calls)
            found = replace(found, form=found.form.settled)
        try:
            require_prunable(found.groups, graph)
        except NothingPrunableError as failure:
            failure.explanation = found.explain(search=True)
            raise
        return found


def _with_segments(
    analysis: Analysis, options: Options, skipped: list[str], only: list[str] | None, calls: Calls
) -> Analysis:
    """The analysis in which segments may also be removed, limited by the options that concern their parameters."""
    partition, found = with_segments(analysis.partition)
    groups = _layers(analysis, partition, segment_groups(partition, options.min_depth))
    groups = groups if options.prune_frozen else keep_frozen(groups, analysis.graph)
    groups = _but_skipped(groups, skipped, analysis.graph)
    groups = groups if only is None else _only(groups, only, analysis.graph, analysis.model)
    for name, why in _needed(analysis, partition, groups, calls).items():
        groups = keep_whole(groups, [name], why)
    return replace(analysis, partition=partition, branches=found, groups=(*analysis.groups, *settled(groups)))


def _needed(analysis: Analysis, partition: Partition, groups: Iterable[NodeGroup], calls: Calls) -> dict[str, str]:
    """The segments that the class cannot leave out, with the reason; empty if the slim model need not be of it."""
    free = {group.name for group in groups if group.prunable}
    segments = [segment for segment in partition.segments if segment.name in free]
    if not segments or analysis.form.kind != "class":
        return {}
    model = analysis.model
    asked = rewording(model, TraceError, "it was asked what its class can leave out", "the analysis is done")
    with asked, stages(f"OTO({type(model).__name__})"):
        return needed(model, partition, segments, analysis.example, calls.found, analysis.form.own)


def _layers(analysis: Analysis, partition: Partition, groups: tuple[NodeGroup, ...]) -> tuple[NodeGroup, ...]:
    """The groups of segments; if a config states the sizes, only whole layers whose number it states may be removed."""
    if analysis.form.recipe is None:
        return groups
    tried = rewording(analysis.model, TraceError, "its class was made of fewer layers (layout)", "the analysis is done")
    with tried, preserved(analysis.model), stages(f"OTO({type(analysis.model).__name__})"):
        return stated_layers(analysis.model, partition, groups, analysis.example, analysis.form.recipe)


def _in_form(layout: Layout | None, analysis: Analysis, keeps: bool) -> Analysis:
    """Choose the form of the slim model, and keep groups whole that it cannot express.

    The form is a config if a layout requires it and the config states any size; otherwise a graph if ``allow_graph`` is
    set; otherwise the class.
    """
    if layout in ("uniform", "stock"):
        recipe = Recipe.of(analysis.model)
        if (groups := _stated(analysis, recipe, layout)) is not None:
            return replace(analysis, groups=groups, form=Form("config", recipe=recipe))
        text = nothing_states(analysis.model, layout, recipe is not None)
        warnings.warn(text, UnstatedWarning, stacklevel=users_level())
    if analysis.allow_graph:
        return analysis
    own = ask_the_class(analysis, keeps)
    return replace(analysis, groups=limited(analysis.groups, own), form=Form("class", own=own))


def _stated(analysis: Analysis, recipe: Recipe | None, layout: Layout) -> tuple[NodeGroup, ...] | None:
    model = analysis.model
    tried = rewording(model, TraceError, "its class was made from other configs (layout)", "the analysis is done")
    with tried, preserved(model), stages(f"OTO({type(model).__name__})"):
        return stated(model, analysis.partition, analysis.groups, analysis.example, recipe, layout == "stock")


def ask_the_class(analysis: Analysis, keeps: bool = False) -> OwnClass:
    """Search for what a slim model of the model's own class needs.

    Args:
        keeps: Also return the copy on which the class was searched.
    """
    model = analysis.model
    asked = rewording(model, TraceError, "it was asked what its class can do without", "the analysis is done")
    with asked, stages(f"OTO({type(model).__name__})"):
        return own_class(model, analysis.partition, analysis.groups, analysis.example, keeps)


def _but_skipped(groups: tuple[NodeGroup, ...], skipped: list[str], graph: Graph) -> tuple[NodeGroup, ...]:
    if not skipped:
        return groups
    return settled(keep_whole(groups, zeroing(groups, _first_names(graph, skipped)), "skip_patterns names it"))


def _only(groups: tuple[NodeGroup, ...], only: list[str], graph: Graph, model: nn.Module) -> tuple[NodeGroup, ...]:
    flat = {name for name, p in model.named_parameters(remove_duplicate=False) if p.ndim < 2}
    return keep_but(groups, _first_names(graph, only), flat)


def _first_name(graph: Graph) -> dict[str, str]:
    return {alias: leaf.names[0] for leaf in graph.leaves for alias in leaf.names}


def _first_names(graph: Graph, names: Iterable[str]) -> set[str]:
    first = _first_name(graph)
    return {first.get(name, name) for name in names}


def _warn_of_unknown(partition: Partition, model: nn.Module) -> None:
    for node in partition.found.unknown:
        shapes = ", ".join(str(tuple(v.shape)) for v in node.inputs())
        place = ", ".join(filter(None, (node.module or type(model).__name__, node.source)))
        warnings.warn(
            f"no rule for {node.op}\n  at      {place}\n"
            f"  shapes  {shapes}\n  effect  all dimensions it touches stay whole\n"
            "  to fix  add a rule (CONTRIBUTING.md), or nothing if this is fine",
            UnknownOpWarning,
            stacklevel=users_level(),
        )


def _no_copy(model: Any, full: nn.Module, bad: list[str]) -> UnknownParameterError:
    if bad and model is full:
        return UnknownParameterError(
            f"{type(model).__name__} has changed since OTO(...) was made: no {some(bad)} of that shape\n"
            "  effect  its zeros cannot be read, and nothing was written\n"
            "  to fix  if a trainer shards it (FSDP, DeepSpeed), gather the state dict, load it into a copy of"
            " the model, and construct_subnet(model=copy); otherwise make a new OTO"
        )
    return UnknownParameterError(
        f"{type(model).__name__} is no copy of {type(full).__name__}: no {some(bad)} of that shape\n"
        "  effect  the groups of the one say nothing about the other\n"
        "  to fix  pass a copy of the model or a wrapper of one, or make an OTO for it"
    )


def _module(model: Any) -> nn.Module:
    """Return the model.

    Raises:
        OptionError: It is not an ``nn.Module``; the message names a module that it holds, if any.
    """
    if isinstance(model, nn.Module):
        return model
    held = [name for name, part in getattr(model, "__dict__", {}).items() if isinstance(part, nn.Module)]
    raise OptionError(
        f"the model is a {'class' if isinstance(model, type) else type(model).__name__}, no torch.nn.Module\n"
        "  effect  there is nothing to analyze\n"
        f"  to fix  pass the module {f'that it holds: OTO(model.{held[0]}, ...)' if held else 'itself'}"
    )


def _refuse_quantized(model: nn.Module) -> None:
    """Check that no parameter is quantized, such as those of torchao and bitsandbytes.

    Such a parameter has a class that overrides how torch computes with it, or that holds integers. Sharded tensors are
    not quantized.

    Raises:
        OptionError: There are some. They cannot be zeroed or sliced, and zeros in them cannot be found.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    coded = [name for name, p in parameters.items() if _holds_codes(p)]
    if coded:
        raise OptionError(
            f"{some(coded)} {'is' if len(coded) == 1 else 'are'} of the class {type(parameters[coded[0]]).__name__}:"
            " quantized weights, which compute in their own way\n"
            "  effect  rows of codes can neither be brought to zero nor taken out, so nothing was analyzed\n"
            "  to fix  load the model without quantization, or dequantize the base (model.dequantize() in"
            " transformers); prune that, and quantize the slim model"
        )


def _holds_codes(p: Tensor) -> bool:
    if type(p) in (Tensor, nn.Parameter) or hasattr(p, "full_tensor") or isinstance(p, FakeTensor) or is_lazy(p):
        return False
    plain = (nn.Parameter.__torch_function__, Tensor.__torch_function__)  # a subclass inherits one of them
    own = getattr(type(p).__torch_function__, "__func__", type(p).__torch_function__)
    computes = own not in [getattr(f, "__func__", f) for f in plain]
    dispatches = type(p).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return computes or dispatches or not (p.is_floating_point() or p.is_complex())


def _refuse_empty(example: Example) -> None:
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    if not any(t.is_nested or t.numel() for t in tensors):
        raise DummyInputError(
            f"dummy_input is empty: {some([str(tuple(t.shape)) for t in tensors])}\n"
            "  effect  the model would compute nothing on it: no MACs to count, nothing to compare\n"
            "  to fix  pass an example with entries, such as a batch of one"
        )


def _warn_of_nan(example: Example) -> None:
    plain = [t for t in tree_leaves(example) if type(t) is Tensor and t.layout == torch.strided and not t.is_meta]
    if any(t.is_floating_point() and t.itemsize > 1 and bool(t.isnan().any()) for t in plain):  # float8 has no isnan
        warnings.warn(
            "dummy_input holds NaN\n"
            "  effect  the slim model is compared with the full one on this input, and NaN shows no difference\n"
            "  to fix  pass an example of finite numbers, such as random ones, unless the model expects NaN",
            DummyInputWarning,
            stacklevel=users_level(),
        )


def _listed(names: Any) -> list[Any]:
    """Several names, or a single one, as a list.

    Raises:
        OptionError: ``names`` is neither.
    """
    if isinstance(names, str | int | type | nn.Module):
        return [names]
    if not isinstance(names, Iterable):
        raise OptionError(
            f"{names!r} names nothing of the model\n  effect  nothing was marked\n"
            "  to fix  give a list of names or globs; an empty one for none"
        )
    return list(names)
