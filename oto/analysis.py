"""What is known of a model before any training: ``analyze(model, dummy_input, Options())`` -> ``Analysis``.

An analysis is a value: marking, shrinking and copying make another one. :func:`analyze` is where the order of all that
decides what may go is written, and :func:`_form_of` where it is settled what the slim model may be.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from oto._torch import holder, tree_leaves, unwrapped
from oto.adapters import makers_of_adapted
from oto.axes.registry import known
from oto.errors import (
    DummyInputWarning,
    EmitterError,
    NothingPrunableError,
    OptionError,
    TraceError,
    UnknownOpWarning,
    UnknownParameterError,
    UnstatedWarning,
    some,
    users_level,
)
from oto.groups import Cost, Costs, NodeGroup, Partition, cost, trainable
from oto.groups.layout import LAYOUTS, drawn, settled, shared_out, tied
from oto.groups.policy import (
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
from oto.progress import stages
from oto.report.draw import draw
from oto.report.explain import Explanation, explain
from oto.slim.config.recipe import WRAPPED, Recipe
from oto.slim.config.trial import stated
from oto.slim.config.unstated import nothing_states
from oto.slim.own_class import OwnClass, limited, own_class
from oto.slim.proof.inputs import device_of, follow_model
from oto.slim.state import left_before
from oto.trace.graph import Graph
from oto.trace.inputs import Example
from oto.trace.record import record, told
from oto.trace.snapshot import preserved
from oto.trace.state import State, undone

WRAPPED.append(makers_of_adapted)

Layout: TypeAlias = Literal["free", "uniform", "stock"]
"""How repeated blocks stand to each other, see :class:`oto.OTO`."""


@dataclass(frozen=True)
class Options:
    """What a user says of a model; each as in :class:`oto.OTO`."""

    skip_patterns: Iterable[Pattern] = ()
    only: Iterable[Pattern] | None = None
    strict_out_nodes: bool | Iterable[str] = False
    min_kept: MinKept = 1
    allow_graph: bool = False
    prune_frozen: bool = False
    drop_unreached: bool = False
    layout: Layout | None = None
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise OptionError(f"layout is {self.layout!r}; it is one of {', '.join(map(repr, LAYOUTS))}")


@dataclass(frozen=True, eq=False)
class Form:
    """What the slim model may be, which decides what may go.

    Attributes:
        kind: ``"config"``: the class, made from a config that states every size; ``"class"``: the class, with what was
            found out about it; ``"graph"``: whatever computes the same, as a class cannot express all that may go.
        recipe: How the class is made from its config, for the first.
        own: What the class needs, for the second.
    """

    kind: Literal["config", "class", "graph"]
    recipe: Recipe | None = None
    own: OwnClass | None = None

    @property
    def decisions(self) -> Iterable[object]:
        """How it was found out what the class needs, for a reader."""
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
    """What may be removed from a model, and what the slim one may be.

    Attributes:
        model: The model itself.
        example: The example input.
        partition: What every dimension is made of, and the node groups by that alone.
        groups: The node groups with all that was said of them.
        form: What the slim model may be.
        state: What the model held when it was followed.
        device: Where its parameters were then, if in one place.
        strict_out_nodes: Which outputs need not keep their size.
        allow_graph, prune_frozen, drop_unreached: As in :class:`oto.OTO`.
    """

    model: nn.Module
    example: Example
    partition: Partition
    groups: tuple[NodeGroup, ...]
    form: Form
    state: State
    device: torch.device | None
    strict_out_nodes: bool | frozenset[str]
    allow_graph: bool
    prune_frozen: bool
    drop_unreached: bool

    @property
    def graph(self) -> Graph:
        """What was traced."""
        return self.partition.found.graph

    @property
    def names(self) -> list[str]:
        """Those of all tensors of the model that it knows."""
        return [name for leaf in self.graph.leaves for name in leaf.names]

    @property
    def first_name(self) -> dict[str, str]:
        """For each name of a parameter the one that groups have for it; one that is tied has several."""
        return _first_name(self.graph)

    @cached_property
    def costs(self) -> Costs:
        """Parameters, MACs and bytes as functions of what the prunable groups keep."""
        return Costs.of(self.partition, self.groups)

    def cost(self, kept: Mapping[str, int] | None = None) -> Cost:
        """What the model costs, with some numbers of atoms in its groups."""
        return cost(self.partition, kept)

    def explain(self, *, search: bool = False) -> Explanation:
        """What can be removed, and why the rest stays whole."""
        return explain(self.groups, self.partition, self.form.decisions if search else ())

    def coverage(self) -> dict[str, dict[str, int]]:
        """Operators of the model by the answer that exists for them, with the number of calls."""
        return {answer: dict(calls) for answer, calls in self.partition.found.coverage.items()}

    @property
    def summary(self) -> str:
        """How much may go, and what the model costs, in a line."""
        free, costs = [group for group in self.groups if group.prunable], self.cost()
        return (
            f"{len(free)} of {len(self.groups)} node groups prunable, {sum(group.size for group in free):,}"
            f" zero-invariant groups; {costs.params:,} parameters, {costs.macs:,} MACs"
        )

    def draw(self, out_dir: str | os.PathLike[str], **how: bool) -> list[Path]:
        """The graph, as files; see :meth:`oto.OTO.visualize`."""
        return draw(self.partition, self.groups, Path(out_dir).expanduser(), type(self.model).__name__, **how)

    # Marks: what stays whole from now on --------------------------------------------------------------------------

    def without_parameters(self, patterns: Iterable[str]) -> Analysis:
        """No entry of some parameters is zeroed."""
        parameters = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        names = _first_names(self.graph, matching(_listed(patterns), parameters))
        return self._without(zeroing(self.groups, names), "it was marked unprunable")

    def without_nodes(self, node_ids: Iterable[str | int]) -> Analysis:
        """What runs through some nodes of the graph stays whole."""
        return self._without(carried_by_nodes(_listed(node_ids), self.partition.graph), "it was marked unprunable")

    def without_operators(self, operators: Iterable[str]) -> Analysis:
        """What runs through the results of some operators stays whole."""
        carried = carried_by_operators(_listed(operators), self.partition.graph)
        return self._without(carried, "skip_operators names an operator that it runs through")

    def without_groups(self, groups: set[str], reason: str) -> Analysis:
        """Node groups of these names stay whole."""
        return self._without(groups, reason)

    def _without(self, groups: set[str], reason: str) -> Analysis:
        return replace(self, groups=settled(keep_whole(self.groups, groups, reason)))

    def zero_random_(self, share: float, seed: int) -> None:
        """Zero a random choice of atoms of the model."""
        chosen = drawn(self.groups, share, seed)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for group in self.groups:
            group.zero_(parameters, torch.tensor(chosen.get(group.name, ()), dtype=torch.int64))

    # The same of other models -------------------------------------------------------------------------------------

    def of(self, model: Any) -> Analysis:
        """The analysis of a copy of the model, or of what wraps one; of itself, as it may have been cast or moved.

        Raises:
            UnknownParameterError: It is no copy.
            EmitterError: Its parameters are spread over processes.
        """
        shapes = {leaf.name: leaf.value.shape for leaf in self.graph.leaves if leaf.kind == "parameter"}
        inner = holder(model, shapes)
        found = {} if inner is None else dict(inner.named_parameters(remove_duplicate=False))
        bad = [name for name, shape in shapes.items() if name not in found or tuple(found[name].shape) != shape]
        if inner is None or bad:
            raise _no_copy(model, self.model, bad)
        if sharded := [name for name in shapes if hasattr(found[name], "full_tensor")]:
            raise EmitterError(
                f"parameters of {type(inner).__name__} are spread over processes: {some(sharded)}\n"
                "  effect  no process has all zeros to read, and nothing was written\n"
                "  to fix  gather the state dict (torch.distributed.checkpoint.state_dict.get_model_state_dict with"
                " full_state_dict=True), load it into a copy of the model, and construct_subnet(model=copy)"
            )
        then = {leaf.name: leaf.value.dtype for leaf in self.graph.leaves if leaf.name in found}
        return replace(self, model=inner, example=follow_model(self.example, then, self.device, found))

    def __deepcopy__(self, memo: dict[int, Any]) -> Analysis:
        model, example = copy.deepcopy((self.model, self.example), memo)
        return replace(self, model=model, example=example)  # what was found holds no tensor, so it can be shared

    def __getstate__(self) -> dict[str, Any]:
        found_anew = ("partition", "state", "costs")  # operators cannot be pickled
        return {**{k: v for k, v in vars(self).items() if k not in found_anew}, "form": self.form.kind}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        with undone(left_before(self.model, self.example)):
            vars(self)["state"] = State(self.model)
            graph = record(self.model, self.example, known, dead=not self.allow_graph, training=True)
            vars(self)["partition"] = trainable(graph, self.strict_out_nodes)
            kind: Any = self.form
            own = ask_the_class(self) if kind == "class" else None
            vars(self)["form"] = Form(kind, Recipe.of(self.model) if kind == "config" else None, own)


def analyze(model: nn.Module, dummy_input: Any, options: Options) -> Analysis:
    """Follow a model, find its groups, and what its class can do without.

    Raises:
        As :class:`oto.OTO`.
    """
    model, example = unwrapped(_module(model)), Example.of(dummy_input)
    _warn_of_nan(example)
    with told(model, TraceError, "being looked through"):
        left = left_before(model, example)
    with undone(left):
        skipped = parameters_of(_listed(options.skip_patterns), model)
        only = None if options.only is None else parameters_of(_listed(options.only), model)
        with told(model, TraceError, "being followed on the dummy input"):
            graph = record(model, example, known, dead=not options.allow_graph, training=True)
        state, strict = State(model), options.strict_out_nodes
        strict = strict if isinstance(strict, bool) else outputs_called(_listed(strict), graph)
        with told(model, TraceError, "being analyzed", "it was followed on the dummy input"):
            partition = trainable(graph, strict)
        # what may go: first what each group says, then what groups say of each other, then what form they leave
        groups = keep_at_least(partition.groups, options.min_kept)
        groups = groups if options.prune_frozen else keep_frozen(groups, graph)
        groups = _but_skipped(groups, skipped, graph)
        groups = groups if only is None else _only(groups, only, graph, model)
        _tell_of_unknown(partition, model)
        groups = shared_out(groups, options.tensor_parallel)
        groups = tied(groups, model) if options.layout in ("uniform", "stock") else groups
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
        )
        try:
            require_prunable(found.groups, graph)
        except NothingPrunableError as failure:
            failure.explanation = found.explain(search=True)
            raise
        return found


def _in_form(layout: Layout | None, analysis: Analysis) -> Analysis:
    """Settle what the slim model may be, and keep whole what that cannot do without: a config comes first, if a layout
    asks for one and it states something; then anything, if that is asked for; then the class."""
    if layout in ("uniform", "stock"):
        recipe = Recipe.of(analysis.model)
        if (groups := _stated(analysis, recipe, layout)) is not None:
            return replace(analysis, groups=groups, form=Form("config", recipe=recipe))
        text = nothing_states(analysis.model, layout, recipe is not None)
        warnings.warn(text, UnstatedWarning, stacklevel=users_level())
    if analysis.allow_graph:
        return analysis
    own = ask_the_class(analysis)
    return replace(analysis, groups=limited(analysis.groups, own), form=Form("class", own=own))


def _stated(analysis: Analysis, recipe: Recipe | None, layout: Layout) -> tuple[NodeGroup, ...] | None:
    model = analysis.model
    tried = told(model, TraceError, "its class was made from other configs (layout)", "the analysis is done")
    with tried, preserved(model), stages(f"OTO({type(model).__name__})"):
        return stated(model, analysis.partition, analysis.groups, analysis.example, recipe, layout == "stock")


def ask_the_class(analysis: Analysis) -> OwnClass:
    """What a slim model of the model's own class needs."""
    model = analysis.model
    asked = told(model, TraceError, "it was asked what its class can do without", "the analysis is done")
    with asked, stages(f"OTO({type(model).__name__})"):
        return own_class(model, analysis.partition, analysis.groups, analysis.example)


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


def _tell_of_unknown(partition: Partition, model: nn.Module) -> None:
    for node in partition.found.unknown:
        shapes = ", ".join(str(tuple(v.shape)) for v in node.inputs())
        warnings.warn(
            f"no rule for {node.op}\n  at      {node.module or type(model).__name__}, {node.source}\n"
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
            "  to fix  where a trainer shards it (FSDP, DeepSpeed), gather the state dict, load it into a copy of"
            " the model, and construct_subnet(model=copy); else make a new OTO"
        )
    return UnknownParameterError(
        f"{type(model).__name__} is no copy of {type(full).__name__}: no {some(bad)} of that shape\n"
        "  effect  the groups of the one say nothing about the other\n"
        "  to fix  pass a copy of the model or what wraps one, or make an OTO for it"
    )


def _module(model: Any) -> nn.Module:
    """The model, if it is one.

    Raises:
        OptionError: It is not; the message names what it holds.
    """
    if isinstance(model, nn.Module):
        return model
    held = [name for name, part in getattr(model, "__dict__", {}).items() if isinstance(part, nn.Module)]
    raise OptionError(
        f"the model is a {'class' if isinstance(model, type) else type(model).__name__}, no torch.nn.Module\n"
        "  effect  there is nothing to analyze\n"
        f"  to fix  give the module {f'that it holds: OTO(model.{held[0]}, ...)' if held else 'itself'}"
    )


def _warn_of_nan(example: Example) -> None:
    plain = [t for t in tree_leaves(example) if type(t) is Tensor and t.layout == torch.strided and not t.is_meta]
    if any(t.is_floating_point() and t.itemsize > 1 and bool(t.isnan().any()) for t in plain):  # float8 has no isnan
        warnings.warn(
            "dummy_input holds NaN\n"
            "  effect  what the model computes of it is compared with what the slim model does, and NaN tells nothing\n"
            "  to fix  give an example of real numbers, or of random ones, if NaN is not what the model expects",
            DummyInputWarning,
            stacklevel=users_level(),
        )


def _listed(names: Any) -> list[Any]:
    return [names] if isinstance(names, str | int | type | nn.Module) else list(names)
