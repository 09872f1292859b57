"""The class ``OTO`` strings the stages together and decides nothing."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oto._torch import data_parallel_around, holder, tree_leaves, unwrapped
from oto.axes.registry import known
from oto.errors import (
    ArtefactError,
    DummyInputWarning,
    EmitterError,
    NothingPrunableError,
    NotPrunedWarning,
    OptionError,
    ShrinkError,
    StaleWrapperError,
    TargetError,
    TooLateError,
    TraceError,
    UnknownOpWarning,
    UnknownParameterError,
    UnstatedWarning,
    first_line,
    some,
    users_level,
)
from oto.groups import Cost, Costs, Kept, NodeGroup, Partition, cost, thinner, trainable
from oto.groups.align import ON_CUDA, Align, multiples
from oto.groups.layout import LAYOUTS, drawn, evened, settled, shared_out, tied
from oto.groups.policy import (
    MinKept,
    Pattern,
    carried_by_nodes,
    carried_by_operators,
    frozen_since,
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
from oto.io.artefact import adding, check_out_dir
from oto.io.subnet import FULL, WEIGHTS, files, save
from oto.oneshot import COMPARABLE, MEASURED, Data, Settings, compress
from oto.optim import HESSO, HESSOCRIC, Choice, SparseOptimizer
from oto.optim.choice import FROM_MAGNITUDE
from oto.optim.compensate import RIDGE
from oto.optim.shrink import Moved
from oto.optim.target import UNITS, Target
from oto.optim.wrapped import refuse_unknown
from oto.progress import stage, stages
from oto.report.draw import draw
from oto.report.explain import Explanation, explain
from oto.report.html import Origin
from oto.report.one_shot import OneShot
from oto.report.preview import Preview, preview
from oto.slim.config.recipe import Recipe
from oto.slim.config.trial import stated
from oto.slim.config.unstated import nothing_states
from oto.slim.construct import construct, require_values
from oto.slim.latency import Latency, Timer, measured_latency
from oto.slim.own_class import OwnClass, limited, own_class
from oto.slim.proof.compare import device_of, follow_model, require
from oto.slim.proof.reference import FLOAT64
from oto.slim.pruned_shapes import masks, read_zeros
from oto.slim.removed import unreached, within
from oto.slim.shrink import analysed_again, become, parts, require_there, shrunk
from oto.slim.source import Source
from oto.slim.state import left_before, left_since
from oto.subnet import Subnet
from oto.trace.found import as_found
from oto.trace.record import record, told
from oto.trace.state import State, undone

log = logging.getLogger(__name__)

REPORT = "report.html"

Sparse = TypeVar("Sparse", bound=SparseOptimizer)


def _takes_options_of(source: Callable[..., Any]) -> Callable[[Method], Method]:
    """Show the keywords of ``source`` in the signature, where a method passes its own on to it."""

    def dressed(method: Method) -> Method:
        own, taken = (inspect.signature(f, eval_str=False) for f in (method, source))
        first = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            p.replace(kind=p.KEYWORD_ONLY) if p.name == "params" else p
            for p in taken.parameters.values()
            if p.name not in _SUPPLIED and (p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) or p.name == "params")
        ]
        method.__signature__ = own.replace(parameters=[*first, *more])  # type: ignore[attr-defined]
        return method

    return dressed


_SUPPLIED = ("self", "node_groups", "costs", "latency")
Method = TypeVar("Method", bound=Callable[..., Any])


class OTO:
    """From a model and one example input to a slim model that computes the same function.

    It can be copied and pickled where the model can; a copy does not know the optimizers that the first one made.

    Args:
        model: Any module. It is not copied: the optimizer trains it, and ``construct_subnet`` reads its zeros. One
            inside ``torch.compile``, ``DistributedDataParallel`` or ``DataParallel`` is taken out of it; go on training
            with the wrapper, whose parameters are the same.
        dummy_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments of ``model.forward``.
        skip_patterns: What must not be zeroed: names or globs of parameters or of modules, classes of modules, or
            modules.
        only: The reverse, in the same words: no weights but these are zeroed, with the biases and norms beside them. A
            group that would zero others too stays whole, as the width of a residual stream does if one kind of layer is
            named.
        strict_out_nodes: Only outputs that nothing else in the model reads keep their size; by default all do. One that
            is returned on the way, such as a hidden state, then gets as thin as the network there. Or names or globs of
            outputs that need not keep it: keys, fields or places in what ``forward`` returns, such as
            ``["state", "hidden.0"]``.
        min_kept: Atoms that every group keeps, an int; or the share of its atoms that it keeps, a float; or a mapping
            from names or globs of parameters to either. Optimizers take it too, and keep the greater of both.
        everything: Prune whatever can be removed exactly, even if the model's class cannot express the result: the slim
            model is then a ``torch.fx.GraphModule``. By default it is of the model's own class, and what that class can
            neither be told nor do without stays whole.
        prune_frozen: Zero frozen parameters like all others, as for adapters that are trained on a frozen model. By
            default a group that would zero a parameter of ``requires_grad=False`` stays whole. Freeze before ``OTO``.
        drop_unreached: Leave out of the slim model what its forward never uses in eval mode, such as heads for training
            only. By default they stay, thinner by what they read, and the slim model can be trained with them.
        layout: ``"uniform"``: repeated blocks keep equally many of everything, each its own best, so that one number
            for all blocks states it. Where the model was made from a config (``model.config``), what no field of it
            can state stays whole, and the slim model is of the stock class: see :meth:`Subnet.save_pretrained`. The
            same goes for a function that the model says it was made by (``model.pretrained_cfg``) and its keywords.
            Where neither can state anything there is an ``UnstatedWarning``. ``"stock"``: likewise, and a width that is
            heads times the width of a head stays so, for readers of a config that divide the one by the other. By
            default (``None`` or ``"free"``) every block has counts of its own.
        tensor_parallel: Number of devices that heads, key and value heads and FFNs stay divisible by.

    Raises:
        DummyInputError: ``dummy_input`` is of another type.
        TraceError: ``forward`` fails on it.
        NothingPrunableError: Nothing can be removed; the message says why, and its ``explanation`` is what
            :meth:`explain` would have said.
        OptionError: ``model`` is no module, or an option means nothing.

    Example:
        >>> import torch
        >>> from torch import Tensor, nn
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> oto = OTO(model, torch.randn(1, 3))
        >>> oto.random_set_zero_groups(target_group_sparsity=0.5)
        >>> subnet = oto.construct_subnet()
        >>> oto.compute_num_params(), subnet.cost_after.params
        (50, 26)
    """

    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,
        *,
        skip_patterns: Iterable[Pattern] = (),
        only: Iterable[Pattern] | None = None,
        strict_out_nodes: bool | Iterable[str] = False,
        min_kept: MinKept = 1,
        everything: bool = False,
        prune_frozen: bool = False,
        drop_unreached: bool = False,
        layout: str | None = None,
        tensor_parallel: int = 1,
    ) -> None:
        if layout not in LAYOUTS:
            raise OptionError(f"layout is {layout!r}; it is one of {', '.join(map(repr, LAYOUTS))}")
        self.model = model = unwrapped(_module(model))
        if isinstance(dummy_input, Mapping):  # what a tokenizer gives is no dict
            dummy_input = dict(dummy_input)
        self.dummy_input = dummy_input
        _warn_of_nan(dummy_input)
        self._everything = everything
        self._prune_frozen, self._drop_unreached = prune_frozen, drop_unreached
        with told(model, TraceError, "being looked through"):
            left = left_before(model, dummy_input)
        with undone(left):
            named = parameters_of(_listed(skip_patterns), model)
            alone = None if only is None else parameters_of(_listed(only), model)
            self._analyse(named, alone, strict_out_nodes, min_kept, layout, tensor_parallel)

    def _analyse(
        self, skipped: list[str], only: list[str] | None, out_nodes: bool | Iterable[str], min_kept: MinKept,
        layout: str | None, tensor_parallel: int,
    ) -> None:  # fmt: skip
        """Follow the model, find its groups, and what its class can do without."""
        model, dummy_input, everything = self.model, self.dummy_input, self._everything
        with told(model, TraceError, "being followed on the dummy input"):
            graph = record(model, dummy_input, known, dead=not everything, training=True)
        self._state = State(model)
        self._strict_out_nodes: bool | frozenset[str] = (
            out_nodes if isinstance(out_nodes, bool) else outputs_called(_listed(out_nodes), graph)
        )
        with told(model, TraceError, "being analysed", "it was followed on the dummy input"):
            self.partition = trainable(graph, self._strict_out_nodes)
        self._groups = keep_at_least(self.partition.groups, min_kept)
        if not self._prune_frozen:
            self._groups = keep_frozen(self._groups, self.partition.found.graph)
        self._own: OwnClass | None = None
        self._stock = False  # whether its config is to state the slim model
        self._optimizer: weakref.ref[SparseOptimizer] | None = None  # the last that was made
        self._made_for: Partition | None = None  # the analysis that it was made for, before any shrinking
        self._saved: Path | None = None
        self._there = device_of(model.parameters())
        if skipped:
            self._keep_parameters(skipped, "skip_patterns names it")
        if only is not None:
            flat = {name for name, p in model.named_parameters(remove_duplicate=False) if p.ndim < 2}
            self._groups = keep_but(self._groups, self._first_names(only), flat)
        for node in self.partition.found.unknown:
            shapes = ", ".join(str(tuple(v.shape)) for v in node.inputs())
            warnings.warn(
                f"no rule for {node.op}\n  at      {node.module or type(model).__name__}, {node.source}\n"
                f"  shapes  {shapes}\n  effect  all dimensions it touches stay whole\n"
                "  to fix  add a rule (CONTRIBUTING.md), or nothing if this is fine",
                UnknownOpWarning,
                stacklevel=3,
            )
        self._groups = shared_out(self._groups, tensor_parallel)
        if layout in ("uniform", "stock"):
            self._groups = tied(self._groups, model)
            tried = told(model, TraceError, "its class was made from other configs (layout)", "the analysis is done")
            with tried, as_found(model), stages(f"OTO({type(model).__name__})"):
                found = stated(model, self.partition, self._groups, dummy_input, self._recipe, layout == "stock")
            if found is None:
                warnings.warn(nothing_states(model, layout, self._recipe is not None), UnstatedWarning, stacklevel=3)
            self._stock, self._groups = found is not None, self._groups if found is None else found
        if not everything and not self._stock:
            self._own = self._ask_the_class()
            self._groups = limited(self._groups, self._own)
        try:
            require_prunable(self._groups, self.partition.found.graph)
        except NothingPrunableError as failure:
            failure.explanation = self.explain(search=True)
            raise

    def __repr__(self) -> str:
        free, costs = [group for group in self.node_groups if group.prunable], self._cost()
        return (
            f"OTO({type(self.model).__name__}): {len(free)} of {len(self.node_groups)} node groups prunable,"
            f" {sum(group.size for group in free):,} zero-invariant groups; {costs.params:,} parameters,"
            f" {costs.macs:,} MACs"
        )

    def __getstate__(self) -> dict[str, Any]:
        found_anew = ("partition", "_optimizer", "_made_for", "_recipe", "_own", "_state")
        return {key: value for key, value in vars(self).items() if key not in found_anew}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _optimizer=None, _made_for=None)
        # operators cannot be pickled, so the graph is found again
        with undone(left_before(self.model, self.dummy_input)):
            self._state = State(self.model)
            graph = record(self.model, self.dummy_input, known, dead=not self._everything, training=True)
            self.partition = trainable(graph, self._strict_out_nodes)
            self._own = None if self._everything or self._stock else self._ask_the_class()

    def _ask_the_class(self) -> OwnClass:
        asked = told(self.model, TraceError, "it was asked what its class can do without", "the analysis is done")
        with asked, stages(f"OTO({type(self.model).__name__})"):
            return own_class(self.model, self.partition, self._groups, self.dummy_input)

    def __deepcopy__(self, memo: dict[int, Any]) -> OTO:
        memo[id(self)] = other = object.__new__(OTO)
        # what was found holds no tensor, so it can be shared
        vars(other).update(vars(self), _optimizer=None, _made_for=None)
        other.model, other.dummy_input = copy.deepcopy((self.model, self.dummy_input), memo)
        return other

    @property
    def node_groups(self) -> tuple[NodeGroup, ...]:
        """Every node group, prunable or not."""
        return self._groups

    def mark_unprunable_by_param_names(self, names: Iterable[str]) -> None:
        """Keep all entries of some parameters: groups that would zero entries of one stay whole.

        Mark before an optimizer is made. The inputs of a marked layer still shrink with the layer before it.

        Args:
            names: Names from ``model.named_parameters()``, or globs such as ``"layer1.*.weight"``.

        Raises:
            UnknownParameterError: A name matches nothing; nothing is marked then.
            TooLateError: An optimizer was made already.
        """
        self._refuse_late_marks()
        parameters = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        self._keep_parameters(matching(_listed(names), parameters), "it was marked unprunable")

    def mark_unprunable_by_node_ids(self, node_ids: Iterable[str | int]) -> None:
        """Keep all node groups that run through some nodes of the graph.

        Args:
            node_ids: As in the drawing of :meth:`visualize`: ``"node-12"``, or ``12``.

        Raises:
            UnknownNodeError: There is no such node; nothing is marked then.
            TooLateError: An optimizer was made already.
        """
        self._refuse_late_marks()
        marked = carried_by_nodes(_listed(node_ids), self.partition.graph)
        self._groups = settled(keep_whole(self._groups, marked, "it was marked unprunable"))

    def skip_operators(self, operators: Iterable[str]) -> None:
        """Keep all node groups that run through the results of some operators.

        Args:
            operators: Names as in :meth:`coverage`, long or short (``"aten.conv2d.default"``, ``"conv2d"``), or globs.

        Raises:
            UnknownNodeError: The model calls no such operator; nothing is marked then.
            TooLateError: An optimizer was made already.
        """
        self._refuse_late_marks()
        marked = carried_by_operators(_listed(operators), self.partition.graph)
        reason = "skip_operators names an operator that it runs through"
        self._groups = settled(keep_whole(self._groups, marked, reason))

    def _refuse_late_marks(self) -> None:
        optimizer = self._trained_by
        if optimizer is not None:
            raise TooLateError(
                f"groups cannot be marked any more: {type(optimizer).__name__} chooses among those that it was given\n"
                "  effect  nothing was marked\n"
                "  to fix  mark first, then make the optimizer; here: a new OTO(...), its marks, a new optimizer"
            )

    def _keep_parameters(self, names: Iterable[str], reason: str) -> None:
        marked = zeroing(self._groups, self._first_names(names))
        self._groups = settled(keep_whole(self._groups, marked, reason))

    def _first_names(self, names: Iterable[str]) -> set[str]:
        """The names that groups have for parameters; one that is tied has several."""
        first = self._first_name
        return {first.get(name, name) for name in names}

    @property
    def _first_name(self) -> dict[str, str]:
        return {alias: leaf.names[0] for leaf in self.partition.found.graph.leaves for alias in leaf.names}

    def _by_first_names(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options, with the names that groups have for parameters where one is a mapping from names."""
        first = self._first_name
        return {
            key: {first.get(name, name): number for name, number in value.items()}
            if key in ("align", "min_kept", "target_kept") and isinstance(value, Mapping)
            else value
            for key, value in options.items()
        }

    def explain(self, *, search: bool = False) -> Explanation:
        """What can be removed, and why the rest stays whole: print it, or take ``to_dict()``.

        Args:
            search: Tell how it was found out what the model's class needs, too: for each decision the line of its code,
                what was seen there, what was tried, and what was settled.
        """
        steps: Iterable[object] = ()
        if search and self._own is None:
            steps = [
                "search: the class was not asked, since "
                + ("its config states the sizes (layout)" if self._stock else "everything=True takes a graph instead")
            ]
        elif search and self._own is not None:
            steps = self._own.steps or ["search: the class was asked, and can do without anything as it is"]
        return explain(self.node_groups, self.partition, steps)

    def coverage(self) -> dict[str, dict[str, int]]:
        """Operators of the model by the answer that exists for them, with the number of calls."""
        return {answer: dict(calls) for answer, calls in self.partition.found.coverage.items()}

    def visualize(
        self,
        out_dir: str | os.PathLike[str],
        view: bool = False,
        vertical: bool = True,
        by_node_groups: bool = True,
        display_params: bool = False,
        display_flops: bool = False,
    ) -> list[Path]:
        """Draw the graph: one colour per prunable node group, grey for what stays whole, repeated blocks once.

        Args:
            out_dir: Folder for ``<class of the model>.dot``; with graphviz, ``.svg``, ``.pdf`` and ``.png`` too.
            view: Open the SVG.
            vertical: From top to bottom, else from left to right.
            by_node_groups: Colour the node groups apart; else prunable calls are white.
            display_params: Show the shape of each parameter at the call that reads it.
            display_flops: Show the FLOPs of each call on the example input.

        Returns:
            The files that were written.

        Raises:
            MissingExtraError: pydot is not installed (``pip install 'oto[viz]'``).
        """
        return draw(
            self.partition, self.node_groups, Path(out_dir).expanduser(), type(self.model).__name__, view=view,
            vertical=vertical, by_node_groups=by_node_groups, display_params=display_params,
            display_flops=display_flops,
        )  # fmt: skip

    @_takes_options_of(HESSO)
    def hesso(self, **options: Any) -> HESSO:
        """The HESSO optimizer; options as in :class:`oto.optim.HESSO`.

        Without ``params`` it is over all parameters of the model. Parameter groups need no names.
        """
        return self._make(HESSO, options)

    @_takes_options_of(HESSOCRIC)
    def hesso_cric(self, **options: Any) -> HESSOCRIC:
        """HESSO that walks groups to zero first; options as in :class:`oto.optim.HESSOCRIC`."""
        return self._make(HESSOCRIC, options)

    @_takes_options_of(Choice.of)
    def preview(
        self,
        *,
        batches: Iterable[Any] = (),
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        **options: Any,
    ) -> Preview:
        """What a target would leave of each layer, before any training: print it.

        The choice is the one that an optimizer with the same options would make now, in one go. Without ``batches`` it
        goes by the weights alone (their magnitude); with them, by gradients averaged over these. Training changes it.

        Args:
            batches: Batches to take gradients of. The model's gradients, mode, buffers and the random state are left
                as they were.
            loss: Takes the model and a batch, and returns the loss.
            **options: A target (``target_macs=0.5``) and how to choose, as in :meth:`oto.optim.Choice.of`.

        Raises:
            TargetError: The target cannot be reached.
        """
        refuse_unknown(options, Choice.of, "preview")
        options = self._by_first_names(options)
        target = {name: options.pop(name) for name in UNITS if name in options}
        batches = list(batches)
        options["align"] = self._align(target | options)
        options = ({} if batches else FROM_MAGNITUDE) | options
        latency = self._latency(target | options)
        choice = Choice.of(self.node_groups, target, costs=self.costs, latency=latency, **options)
        modes = [(module, module.training) for module in self.model.modules()]
        with as_found(self.model) if batches else nullcontext():  # the weights alone are only read
            for module, training in modes:
                module.training = training
            kept = choice.kept_of(self.model, batches, loss)
        how = f"gradients of {len(batches)} batches" if batches else "the weights alone"
        if choice.align != 1:
            how += f"; sizes of dimensions in multiples (align={choice.align!r})"
        times = None
        if choice.target.name == "target_latency_ms":
            timer, counts = self._timer, np.array(list(kept.values()), dtype=np.int64)
            times = timer(self.costs.sizes), timer(counts)
        said, costs = (str(choice.target), f"chosen by {how}"), (self._cost(), self._cost(kept))
        return preview(*said, self.node_groups, self.costs, kept, *costs, times)

    @_takes_options_of(Choice.of)
    def one_shot(
        self,
        *,
        batches: Iterable[Any],
        loss: Callable[[nn.Module, Any], Tensor],
        holdout: float = 0.25,
        compensate: str | None = "affine",
        ridge: float = RIDGE,
        portions: int = 16,
        norms: bool = True,
        **options: Any,
    ) -> OneShot:
        """Compress the model without training, in place: print what it cost, then ``construct_subnet`` as ever.

        What is to go is chosen at once, on the full model. Then the network is gone through in portions, from its input
        to its output: the weights that read what goes take over what it carried, by a least-squares fit over the
        batches (:mod:`oto.optim.compensate`), batch norms are estimated anew, and the atoms are set to zero. A fold
        that does not lower the loss on the held-out batches is undone, and so are batch norms.

        The loss is called in eval mode; one that needs train mode sets it. It takes a few forward passes over all
        batches for each portion, and memory for one copy of the model beside the second moments of a portion (n²
        numbers for n entries of a layer's input). Give data of the kind that the model is for, a few hundred to a
        thousand samples, in several batches.

        Args:
            batches: Batches to calibrate with, and to check with.
            loss: Takes the model and a batch, and returns the loss.
            holdout: Share of the batches that is used for nothing but to check, the last ones; 0: nothing is checked.
            compensate: ``"affine"``; ``"ridge"``, without a constant; ``"bias"``, the constant alone; or ``None``.
            ridge: Damping of the fit, as a share of the mean of the diagonal of the moments.
            portions: In how many portions at most. Statistics of each are taken behind the ones before.
            norms: Estimate batch norms anew.
            **options: A target (``target_macs=0.7``) and how to choose, as in :meth:`oto.optim.Choice.of`. ``saliency``
                may also be ``"obs"`` (what the fit loses, atom after atom), ``"sensitivity"`` (how much the loss rises
                when a group alone gets thinner) or ``"fluctuation"`` (how much what is read varies). By default it goes
                by gradients of the batches; ``"magnitude"`` and ``"obs"`` need none.

        Raises:
            OptionError: There are too few batches, or an option means nothing; or there are several processes.
            TargetError: The target cannot be reached.
        """
        refuse_unknown(options, Choice.of, "one_shot")
        options = self._by_first_names(options)
        target = {name: options.pop(name) for name in UNITS if name in options}
        options["align"] = self._align(target | options)
        if isinstance(asked := options.get("saliency"), str):
            options = (
                (COMPARABLE if asked == "sensitivity" else {}) | options | {"saliency": MEASURED.get(asked, asked)}
            )
        data, settings = Data.of(batches, loss, holdout), Settings(compensate, ridge, portions, norms)
        latency = self._latency(target | options)
        choice = Choice.of(self.node_groups, target, costs=self.costs, latency=latency, **options)
        with stages("one_shot"):
            return compress(
                self.model, self.partition, self.node_groups, choice, data, settings, self._prune_frozen
            )  # fmt: skip

    @property
    def costs(self) -> Costs:
        """Parameters, MACs and bytes as functions of what the prunable groups keep."""
        return Costs.of(self.partition, self.node_groups)

    def _latency(self, options: Mapping[str, Any]) -> Latency | None:
        """Milliseconds as a function of what the prunable groups keep, if that is what a target is in.

        It is put right where a choice by the weights alone would arrive.

        Raises:
            TargetError: It cannot be measured, or not even the thinnest model is as fast.
        """
        goal = options.get("target_latency_ms")
        if goal is None:
            return None
        asked = {name: options.get(name) for name in UNITS}
        Target.of(asked, self.costs.sizes, self.costs, self.costs.macs)  # refuses nonsense before anything is timed
        limits = FROM_MAGNITUDE | {
            k: options[k] for k in ("scope", "min_kept", "group_divisible", "align") if k in options
        }
        least = Choice.of(self.node_groups, {"target_group_sparsity": 0.0}, **limits).least

        def choose(latency: Latency) -> NDArray[np.int64]:
            choice = Choice.of(self.node_groups, {"target_latency_ms": goal}, latency=latency, **limits)
            return np.array(list(choice.kept_of(self.model, (), None).values()), dtype=np.int64)

        return measured_latency(self._timer, float(goal), least, choose, options.get("group_divisible", 1))

    def _align(self, options: Mapping[str, Any]) -> Align:
        """What sizes are multiples of: as asked, else what suits where the parameters are and can meet the target."""
        asked: Align | None = options.get("align")
        if asked is not None or not any(p.is_cuda for p in self.model.parameters()):
            return 1 if asked is None else asked
        target = {name: options.get(name) for name in UNITS if name != "target_latency_ms"}
        limits = {name: options[name] for name in ("scope", "min_kept", "group_divisible") if name in options}
        try:
            if any(value is not None for value in target.values()):
                Choice.of(self.node_groups, target, costs=self.costs, align=ON_CUDA, **limits)
        except (TargetError, NothingPrunableError) as refused:
            log.warning("align=%d, the default on CUDA, is left out: %s", ON_CUDA, first_line(refused))
            return 1
        return ON_CUDA

    @property
    def _timer(self) -> Timer:
        return Timer(self.model, self.partition, self.costs, self.dummy_input)

    @cached_property
    def _recipe(self) -> Recipe | None:
        """How the model's class is made from its config, or by what function, if it is."""
        return Recipe.of(self.model)

    @property
    def _trained_by(self) -> SparseOptimizer | None:
        """The optimizer that was made last, if it is still there."""
        return None if self._optimizer is None else self._optimizer()

    def _make(self, kind: type[Sparse], options: dict[str, Any]) -> Sparse:
        """An optimizer with what the options leave out: the parameters, their names, the node groups."""
        refuse_unknown(options, kind, kind.__name__)
        options = self._by_first_names(options)
        frozen, unfrozen = frozen_since(self.node_groups, self.partition.found.graph, self.model)
        if frozen and not self._prune_frozen:
            raise TooLateError(
                f"{some(frozen)} {'was' if len(frozen) == 1 else 'were'} frozen after OTO(...) was made\n"
                "  effect  an optimizer would still bring entries of it to zero\n"
                "  to fix  freeze before OTO(...); where that may be zeroed all the same, OTO(..., prune_frozen=True)"
            )
        if unfrozen:
            warnings.warn(
                f"{some(unfrozen)} {'was' if len(unfrozen) == 1 else 'were'} frozen when OTO(...) was made\n"
                "  effect  the groups that would zero entries of it stay whole\n"
                "  to fix  a new OTO(...), now that they are trained",
                NotPrunedWarning,
                stacklevel=3,
            )
        options = {**options, "align": self._align(options)}
        given = {"params": self.model.named_parameters(), "names": self.model.named_parameters()} | options
        latency = self._latency(options)
        optimizer = kind(node_groups=self.node_groups, costs=self.costs, latency=latency, **given)
        optimizer.follow(self.model)
        self._optimizer, self._made_for = weakref.ref(optimizer), self.partition
        return optimizer

    def shrink(
        self, optimizer: Any = None, *, like: Mapping[str, Any] | None = None, averages: Iterable[Any] = ()
    ) -> nn.Module:
        """Make the model slim in the middle of training: all that is at zero for good goes.

        The rest of training is what it would have been, only cheaper, and pruning goes on if it is not over. Both the
        model and the optimizer stay the same objects. The model's parameters and submodules are replaced; the
        optimizer's are those of the slim model from then on, in the same parameter groups, and its state is sliced. So
        a learning-rate scheduler, a ``GradScaler``, accelerate and a trainer go on as they are. What holds single
        parameters does not: wrap the model in ``DistributedDataParallel`` again (the old wrapper refuses to train:
        ``StaleWrapperError``), and list parameters anew. Copy the model before if the full one
        is needed. ``construct_subnet`` saves what loads from the class of the first model. With ``layout="uniform"``
        the model's config states what is left, so the model itself may be saved as ever.

        Call it between two steps, as often as you like, such as after each period. Gradients are sliced too. The same
        trajectory, up to the order of sums, needs an optimizer that treats entries one by one (SGD, Adam, AdamW,
        RMSprop...), and no clipping by a norm over all gradients, which counts those of pruned entries too. Dropout
        draws other numbers for thinner tensors. Criteria of saliency that look at gradients choose as before;
        magnitudes no longer count weights that read what is gone.

        To resume a checkpoint that was written after shrinking, make the full model, its ``OTO`` and its optimizer as
        in the beginning, then ``oto.shrink(optimizer, like=saved_optimizer_state)``, and load both states.

        Args:
            optimizer: One that this ``OTO`` made, or what wraps it as ``.optimizer``; by default the last that it made.
            like: The ``state_dict()`` of an optimizer that was shrunk: what it lacks is set to zero and removed.
            averages: Moving averages of the weights, or what holds them as ``.module`` or ``.ema``: they get slim in
                place, too.

        Returns:
            The model. If there never was anything to remove it is as before, with a ``NotPrunedWarning``.

        Raises:
            ShrinkError: The class cannot be made thinner, or its config cannot state it (``layout="uniform"``); the
                optimizer has state that cannot be sliced, or it or an average belongs to another model. Nothing is
                changed.
            VerificationError: The slim model computes something else, in eval or in train mode. Nothing is changed.
        """
        inner = self._optimizer_of(optimizer)
        analysed = self.partition if self._made_for is None else self._made_for
        there = {name: np.flatnonzero(mask) for name, mask in inner.kept.items()}
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        foreign = [name for name, p in inner.parameters().items() if name in names.values() and names.get(p) != name]
        if foreign or [g.slices for g in thinner(analysed, inner.node_groups, there)] != [
            g.slices for g in inner.node_groups
        ]:
            raise ShrinkError(
                f"the {type(inner).__name__} is not over the parameters of this {type(self.model).__name__}\n"
                "  effect  nothing was changed\n"
                "  to fix  use the optimizer that this OTO made: optimizer = oto.hesso(...)"
            )
        left = inner.left_like(like)
        if like is None:  # groups of a tie keep equally many
            even, _ = evened(inner.node_groups, {name: np.flatnonzero(own) for name, own in left.items()})
            left = {name: np.isin(np.arange(len(own)), even[name]) for name, own in left.items()}
        if all(own.all() for own in left.values()):
            if like is None and not inner.num_removed:
                warnings.warn(
                    f"{inner.progress}\n  effect  nothing was removed\n"
                    "  to fix  shrink after a period of pruning has ended",
                    NotPrunedWarning,
                    stacklevel=2,
                )
            return self.model
        if like is not None:
            inner.zero_(left)
        made = parts(inner.node_groups, self.node_groups)
        losing = [group.name for group in inner.node_groups if not left[group.name].all()]
        kept = {part.name: np.flatnonzero(left[name]) for name in losing for part in made[name]}
        known_names = [name for leaf in self.partition.found.graph.leaves for name in leaf.names]
        later = left_since(self._state, self.model, self.dummy_input, known_names)
        built = told(self.model, ShrinkError, "its slim form was built and verified", "the analysis is done")
        with built, undone(later):
            own = self._ask_the_class() if self._stock else self._own
            recipe = self._recipe if self._stock else None
            source = Source(self.model, self.dummy_input, self.partition, own, kept, recipe)
            slim = shrunk(source, averages)
            asked = self._own is not None
            found, groups, own = analysed_again(slim.model, source, self._groups, self._everything, asked)
        now = {name: atoms[left[name]] for name, atoms in there.items()}
        thin = thinner(analysed, inner.node_groups, now)
        if not inner.progress.over:
            require_there(thin, groups)
        moved = [
            Moved(name, p, slim.model.get_parameter(name), slim.parameters[name])
            for name, p in self.model.named_parameters()
        ]
        wrappers = data_parallel_around(self.model)
        inner.shrink_(moved, thin, left)
        for wrapper in wrappers:
            wrapper.register_forward_pre_hook(_refuse_stale)
        for before, after in [(self.model, slim.model), *slim.averages]:
            become(before, after)
        self.partition, self._groups, self._own, self._made_for = found, groups, own, analysed
        self._state = State(self.model)
        if self._stock:
            self._recipe = Recipe.of(self.model)
        return self.model

    def _optimizer_of(self, optimizer: Any) -> SparseOptimizer:
        inner = self._trained_by if optimizer is None else optimizer
        while inner is not None and not isinstance(inner, SparseOptimizer):
            inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise ShrinkError(
                "there is no optimizer that knows what is at zero for good"
                + ("" if optimizer is None else f": {type(optimizer).__name__} is none, and wraps none")
                + "\n  effect  nothing was changed\n"
                "  to fix  pass the one that this OTO made: optimizer = oto.hesso(...)"
            )
        return inner

    def random_set_zero_groups(self, target_group_sparsity: float = 0.5, seed: int = 0) -> None:
        """Zero a random choice of ZIGs in place, for checks; within the layout, as far as whole steps of it allow.

        Raises:
            TargetError: The groups would have to give up their last atoms.
        """
        chosen = drawn(self.node_groups, target_group_sparsity, seed)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for group in self.node_groups:
            group.zero_(parameters, torch.tensor(chosen.get(group.name, ()), dtype=torch.int64))

    def _cost(self, kept: Mapping[str, int] | None = None) -> Cost:
        return cost(self.partition, kept)

    def compute_num_params(self) -> int:
        """Entries of all parameters of the full model; a tied one counts once."""
        return self._cost().params

    def compute_macs(self) -> int:
        """Multiply–adds of the full model on the example input."""
        return self._cost().macs

    def compute_flops(self) -> int:
        """Twice the MACs."""
        return self._cost().flops

    @property
    def compressed_model_path(self) -> Path | None:
        """The slim weights of the last ``construct_subnet(out_dir)``."""
        return self._saved and self._saved / WEIGHTS

    @property
    def full_group_sparse_model_path(self) -> Path | None:
        """The zeroed full weights of the last ``construct_subnet(out_dir, save_full=True)``."""
        return self._saved / FULL if self._saved and (self._saved / FULL).is_file() else None

    def construct_subnet(
        self,
        out_dir: str | os.PathLike[str] | None = None,
        *,
        model: Any = None,
        emitter: str = "auto",
        program: bool | None = None,
        save_full: bool = False,
        float64: bool | str = "auto",
        verify: bool = True,
        report: bool = False,
        align: Align = 1,
    ) -> Subnet:
        """Build the slim model from the zeros in the parameters, prove it equal, and save it.

        The original class is used where its code states no size that changed; else the graph that ``torch.export``
        follows; else the calls that were recorded on the example, which hold at its shapes and values only. Whichever
        it is, it is compared with the zeroed full model on the example and on a random input, of another batch size
        where that is free, in the model's dtype and in float64; on the example both run in inference mode, with torch's
        fast paths. What was saved is read back and compared. Where pruning has not finished, nothing is zero, something
        could not be compared, or no input reaches it, ``print(subnet)`` says so; of the first two there is a warning.

        The model may have been cast or moved since ``OTO(...)`` (``model.half()``, ``model.to(device)``): the example
        follows it. What trainers wrapped around a ``forward``, such as autocast, is seen through.

        Args:
            out_dir: Folder for the artefact; nothing is saved if it is ``None``.
            model: Made slim instead of the model of this ``OTO``: a copy of it with other weights, such as their moving
                average, or what wraps one (see :meth:`oto.optim.SparseOptimizer.zero_pruned_in`, to be called first).
            emitter: ``"auto"``, or one way alone: ``"config"`` (the original class, made from an edited
                ``model.config``; ``"auto"`` tries it first with ``layout="uniform"``), ``"module"`` (the original
                class), ``"graph"`` or ``"recording"``.
            program: Save the slim model as an exported program too (``model.pt2``), which loads without the class. By
                default only where nothing else could be loaded: where the slim model is a graph.
            save_full: Save the zeroed full weights beside the slim ones.
            float64: Compare in float64 too, which shows whether the slim model is equal or only alike: ``"auto"``,
                where it fits in memory; ``True`` or ``False``.
            verify: Compare at all. Without it, only what tells whether a way can be taken is looked at.
            report: Put a ``report.html`` into the artefact, see :meth:`Subnet.report`.
            align: Keep as many zero atoms as make sizes multiples, as in :meth:`oto.optim.Choice.of`: for zeros of an
                optimizer that was given no ``align``.

        Raises:
            VerificationError: The slim model differs, or the full one gives no finite number on the example. Nothing is
                written.
            EmitterError: The asked emitter cannot express the slim model, or none can; or the program that was asked
                for cannot be written.
            NonFiniteParameterError: A parameter holds NaN or infinity.
            UnknownParameterError: ``model`` is no copy of the model; or ``align`` names a parameter that is not there.
            ArtefactError: ``out_dir`` cannot be written, or holds a file of such a name that no artefact has written.
        """
        if out_dir is not None and os.fspath(out_dir):
            out_dir = Path(out_dir).expanduser()
        if float64 not in FLOAT64:
            raise OptionError(f"float64 is {float64!r}; it is one of {', '.join(map(repr, FLOAT64))}")
        if out_dir is not None:
            names = files(emitter, self._everything, program, save_full)
            check_out_dir(out_dir, [*names, *([REPORT] if report else [])])
        before = _files_in(out_dir)
        source = self._reading(self.model if model is None else model)
        with stages("construct_subnet"):
            subnet = source._subnet(out_dir, emitter, program, save_full, float64, verify, align)
        subnet = replace(subnet, origin=self._origin)
        self._saved = source._saved
        if report and subnet.path is not None:
            with adding(subnet.path, REPORT) as file:
                subnet.report(file)
        if gone := before - _files_in(out_dir):
            note = f"{some(sorted(gone))} of the artefact that was there before, and not asked for now, was removed"
            subnet = replace(subnet, notes=(*subnet.notes, note))
        return subnet

    @property
    def _origin(self) -> Origin:
        """What a report says of this model and its training."""
        optimizer, name = self._trained_by, type(self.model).__name__
        if optimizer is None:
            return Origin(name, self.partition, self.node_groups)
        history, schedule = tuple(optimizer.history), optimizer.schedule  # training may go on
        periods = [schedule.bounds(period) for period in range(schedule.periods)]
        return Origin(name, self.partition, self.node_groups, str(optimizer.choice.target), history, periods)

    def _reading(self, model: Any) -> OTO:
        """This analysis of another copy of the model."""
        shapes = {leaf.name: leaf.value.shape for leaf in self.partition.found.graph.leaves if leaf.kind == "parameter"}
        inner = holder(model, shapes)
        found = {} if inner is None else dict(inner.named_parameters(remove_duplicate=False))
        bad = [name for name, shape in shapes.items() if name not in found or tuple(found[name].shape) != shape]
        if bad and model is self.model:
            raise UnknownParameterError(
                f"{type(model).__name__} has changed since OTO(...) was made: no {some(bad)} of that shape\n"
                "  effect  its zeros cannot be read, and nothing was written\n"
                "  to fix  where a trainer shards it (FSDP, DeepSpeed), gather the state dict, load it into a copy of"
                " the model, and construct_subnet(model=copy); else make a new OTO"
            )
        if inner is None or bad:
            raise UnknownParameterError(
                f"{type(model).__name__} is no copy of {type(self.model).__name__}: no {some(bad)} of that shape\n"
                "  effect  the groups of the one say nothing about the other\n"
                "  to fix  pass a copy of the model or what wraps one, or make an OTO for it"
            )
        if sharded := [name for name in shapes if hasattr(found[name], "full_tensor")]:
            raise EmitterError(
                f"parameters of {type(inner).__name__} are spread over processes: {some(sharded)}\n"
                "  effect  no process has all zeros to read, and nothing was written\n"
                "  to fix  gather the state dict (torch.distributed.checkpoint.state_dict.get_model_state_dict with"
                " full_state_dict=True), load it into a copy of the model, and construct_subnet(model=copy)"
            )
        other = object.__new__(OTO)
        then = {leaf.name: leaf.value.dtype for leaf in self.partition.found.graph.leaves if leaf.name in found}
        given = follow_model(self.dummy_input, then, self._there, found)
        vars(other).update(vars(self), model=inner, dummy_input=given)
        return other

    def _short_of(self, kept: Kept) -> str | None:
        """Why less is zero than could be, as far as that is known."""
        total = sum(group.size for group in self.node_groups if group.prunable)
        zero = total - sum(map(len, kept.values()))
        what, optimizer = f"{zero:,} of {total:,} groups are zero", self._trained_by
        if optimizer is not None and not optimizer.progress.over:
            end = optimizer.schedule.end
            what, remedy = (
                f"step {optimizer.clock:,} of {end:,}: {what} yet",
                (
                    f"construct_subnet after {end:,} steps; what stops training early counts from there with"
                    " oto.integrations.early_stopping(trainer), or prune sooner (pruning_steps=)"
                ),
            )
        elif optimizer is not None and zero < (pruned := optimizer.num_pruned - optimizer.num_removed):
            what += f", the optimizer has pruned {pruned:,}: these are other weights than it trains"
            remedy = (
                "optimizer.zero_pruned_in(model) for a moving average; where a trainer brought back a model of before"
                " (load_best_model_at_end), train with oto.integrations.early_stopping(trainer); else load the weights"
                " that were trained"
            )
        elif not zero and (optimizer is None or not optimizer.num_removed):
            remedy = "train with oto.hesso(...) to the end of its schedule, or load weights that were trained so"
            if masked := masks(self.model):
                remedy = (
                    f"what torch.nn.utils.prune masks counts as zero ({some(masked)}), but no whole group is: mask"
                    " whole rows, and each bias with its row"
                )
        else:
            return None
        effect = "only what is zero was removed" if zero else "nothing was removed, slim is as large as full"
        return f"{what}\n  effect  {effect}\n  to fix  {remedy}"

    def _subnet(
        self, out_dir: str | os.PathLike[str] | None, emitter: str, program: bool | None, save_full: bool,
        float64: bool | str, verify: bool, align: Align = 1,
    ) -> Subnet:  # fmt: skip
        require_values(self.model)
        stage("reading the zeros")
        zeros, groups, asking = read_zeros(self.node_groups, self.model), self.node_groups, "the layout"
        if align != 1:
            by = multiples(groups, align, self.costs.weights)
            groups = tuple(replace(group, divisor=own) for group, own in zip(groups, by, strict=True))
            asking = f"the layout and align={align!r}" if self._stock else f"align={align!r}"
        kept, uneven = evened(groups, zeros, asking)
        recipe = self._recipe if self._stock or emitter == "config" else None
        source = Source(
            self.model, self.dummy_input, self.partition, self._own, kept, recipe, self._drop_unreached, float64,
            verify, self.node_groups,
        )  # fmt: skip
        names = [name for leaf in self.partition.found.graph.leaves for name in leaf.names]
        gone = within(names, unreached(self.model, self.partition)) if self._drop_unreached else ()
        before = self._cost()
        built = told(self.model, EmitterError, "its slim model was built and verified", "the analysis is done")
        later = left_since(self._state, self.model, self.dummy_input, names)
        with built, undone(later), as_found(self.model):
            made = construct(source, emitter)
        if made.kept is not kept:  # a class may want some that are zero
            source = replace(source, kept=made.kept)
        after = cost(self.partition, {name: len(atoms) for name, atoms in made.kept.items()}, gone)
        path, checks = None, made.checks
        if out_dir is not None:
            path = Path(out_dir)
            proved = f"the slim model was built, and right in {len(checks)} comparisons"
            saved = told(self.model, ArtefactError, "its slim model was saved and loaded again", proved)
            costs = {"before": vars(before), "after": vars(after)}
            with saved, undone(later), as_found(self.model):
                checks = checks + save(path, source, made, costs, save_full, program)
            self._saved = path
        if short := self._short_of(zeros):  # what the layout or align= brings back is told beside it
            warnings.warn(short, NotPrunedWarning, stacklevel=users_level())
        notes = (*([short] if short else []), *uneven, *made.notes)
        return Subnet(
            made.model, path, made.emitter, made.why, require(checks), tuple(checks), before, after, made.kept, notes,
            example=self.dummy_input,
            config={} if recipe is None or made.edits is None else recipe.as_given(made.edits.config),
        )  # fmt: skip


def _refuse_stale(wrapper: nn.Module, _: Any) -> None:
    """A hook on what holds the parameters of before ``shrink``; evaluation through it is as good as ever."""
    if torch.is_grad_enabled():
        raise StaleWrapperError(
            f"this {type(wrapper).__name__} was made before oto.shrink(), and reduces the gradients of parameters that "
            "are gone\n"
            "  effect  every process would train on its own batches alone, and the processes would drift apart\n"
            f"  to fix  wrap the model again after shrink: model = {type(wrapper).__name__}(oto.model, ...)"
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
        "  effect  there is nothing to analyse\n"
        f"  to fix  give the module {f'that it holds: OTO(model.{held[0]}, ...)' if held else 'itself'}"
    )


def _warn_of_nan(dummy_input: Any) -> None:
    plain = [t for t in tree_leaves(dummy_input) if type(t) is Tensor and t.layout == torch.strided and not t.is_meta]
    if any(t.is_floating_point() and t.itemsize > 1 and bool(t.isnan().any()) for t in plain):  # float8 has no isnan
        warnings.warn(
            "dummy_input holds NaN\n"
            "  effect  what the model computes of it is compared with what the slim model does, and NaN tells nothing\n"
            "  to fix  give an example of real numbers, or of random ones, if NaN is not what the model expects",
            DummyInputWarning,
            stacklevel=3,
        )


def _files_in(folder: str | os.PathLike[str] | None) -> set[str]:
    there = folder is not None and Path(folder).is_dir()
    return {path.name for path in Path(folder).iterdir() if path.is_file()} if folder and there else set()


def _listed(names: Any) -> list[Any]:
    return [names] if isinstance(names, str | int | type | nn.Module) else list(names)
