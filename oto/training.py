"""Make the optimizer that trains an analyzed model, and find it again later."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from oto.adapters import refuse_layers_alone
from oto.analysis import Analysis
from oto.calibration import Calibrated, Data, require_one_process
from oto.errors import (
    ModelChangedError,
    NoGradientWarning,
    NotPrunedWarning,
    OptionError,
    ShrinkError,
    TooLateError,
    some,
    users_level,
)
from oto.groups import Partition
from oto.groups.adapters import adapters, halves_in, ranks_in
from oto.groups.layout import settled
from oto.groups.policy import frozen_since, keep_whole, require_prunable
from oto.groups.readers import readers
from oto.optim import LHSPG, SparseOptimizer
from oto.optim.compensate import KINDS, fitted_readers
from oto.optim.fold import Fold
from oto.optim.options import FoldOptions, besides, keywords_of, picked, refuse_unknown
from oto.optim.wrapped import Params
from oto.previewing import align_for, by_first_names, latency_for
from oto.shards import refuse_flattened, reshard
from oto.trace.inputs import Example

Sparse = TypeVar("Sparse", bound=SparseOptimizer)

SUPPLIED = {"node_groups", "costs", "latency", "adapters"}
"""The values that an analysis passes to an optimizer."""


@dataclass(frozen=True)
class Training:
    """The optimizer that was made last, by a weak reference.

    Attributes:
        partition: The analysis that it was made for, before any shrinking.
    """

    ref: weakref.ref[SparseOptimizer] | None = None
    partition: Partition | None = None

    @property
    def optimizer(self) -> SparseOptimizer | None:
        """The optimizer, if it still exists."""
        return None if self.ref is None else self.ref()

    def inside(self, wrapper: Any) -> SparseOptimizer:
        """The sparse optimizer ``wrapper``, or the one in its ``.optimizer``; by default the one that was made last.

        Raises:
            ShrinkError: There is none.
        """
        inner = self.optimizer if wrapper is None else wrapper
        while inner is not None and not isinstance(inner, SparseOptimizer):
            inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise ShrinkError(
                "there is no optimizer that knows what is pruned"
                + ("" if wrapper is None else f": {type(wrapper).__name__} is not one, and wraps none")
                + "\n  effect  nothing was changed\n"
                "  to fix  pass the optimizer that this OTO made: optimizer = oto.hesso(...)"
            )
        return inner

    def markable(self, analysis: Analysis) -> Analysis:
        """The analysis, if groups may still be marked in it.

        Raises:
            TooLateError: An optimizer was made already.
        """
        if (optimizer := self.optimizer) is not None:
            raise TooLateError(
                f"groups can no longer be marked: {type(optimizer).__name__} chooses among those that it was given\n"
                "  effect  nothing was marked\n"
                "  to fix  mark first, then make the optimizer; here: a new OTO(...), its marks, a new optimizer"
            )
        return analysis


def make(
    analysis: Analysis, kind: type[Sparse], params: Params | None, options: Mapping[str, Any], **supplied: Any
) -> tuple[Training, Sparse]:
    """Make a sparse optimizer for an analyzed model.

    Args:
        kind: The class of the optimizer.
        params: Parameters or parameter groups, which need no names; by default all parameters of the model.
        options: The options of ``kind``.
        **supplied: Further values from the analysis.

    Raises:
        OptionError: ``kind`` has no such option; or as for ``kind``.
        ModelChangedError, TooLateError: Parameters that would be zeroed were renamed or frozen since the analysis, or
            some have other shapes.
    """
    refuse_unknown(options, keywords_of(kind) - SUPPLIED, kind.__name__)
    refuse_flattened(analysis.model)
    reshard(analysis.model)
    require_named(analysis)
    fold = _fold(analysis, picked(options, FoldOptions))
    options = by_first_names(analysis, besides(options, FoldOptions))
    compare_frozen(analysis)
    options = {"names": analysis.model.named_parameters(), **options, "align": align_for(analysis, options)}
    latency = latency_for(analysis, options)
    params = analysis.model.named_parameters() if params is None else params
    made: Callable[..., Sparse] = kind
    optimizer = made(params, analysis.groups, costs=analysis.costs, latency=latency, **supplied, **options)
    optimizer.follow(analysis.model)
    if not isinstance(optimizer, LHSPG) and optimizer.choice.target.wants_less:
        _warn_of_adapters(analysis, optimizer)
    if fold is not None:
        optimizer.take_over(fold)
    return Training(weakref.ref(optimizer), analysis.partition), optimizer


def _fold(analysis: Analysis, options: Mapping[str, Any]) -> Fold | None:
    """The compensation that the options define, or ``None``; it holds only a weak reference to the model.

    Raises:
        OptionError: An option is invalid or missing, or there are several processes.
        DummyInputError: There is no ``loss``, and a batch is not a valid input of the model.
    """
    kind, batches, loss = (options.get(name) for name in ("compensate", "batches", "loss"))
    if kind is None:
        if batches is None and loss is None:
            return None
        raise OptionError(
            "batches= and loss= are what a fold is fitted to, and compensate= is not given\n"
            "  effect  nothing was made\n  to fix  compensate='affine', or leave them out"
        )
    if kind not in KINDS:
        raise OptionError(f"compensate is {kind!r}; it is None or one of {', '.join(map(repr, KINDS))}")
    given = [] if batches is None else list(batches)
    if not given:
        raise OptionError(
            f"compensate={kind!r} has no batches to fit by\n  effect  nothing was made\n"
            "  to fix  batches=, a few inputs as for OTO(model, dummy_input)"
        )
    require_one_process(analysis.model, f"compensate={kind!r}")
    forward = loss
    if forward is None:
        given = [Example.of(batch) for batch in given]
        forward = lambda model, batch: model(*batch.args, **batch.kwargs)  # noqa: E731
    found = readers(analysis.partition, analysis.groups, analysis.prune_frozen)
    found, model, data = fitted_readers(found), weakref.ref(analysis.model), Data(given, (), forward)

    def calibrated() -> Calibrated:
        alive = model()
        if alive is None:
            raise OptionError(
                "compensate= needs the model, which is there no more\n  to fix  keep the OTO or the model"
            )
        return Calibrated(alive, data, reestimate=False)

    return Fold(kind, analysis.partition, found, lambda some: calibrated().moments(some), lambda: calibrated().tensors)


def make_for_adapters(
    analysis: Analysis, params: Params | None, options: Mapping[str, Any]
) -> tuple[Analysis, Training, LHSPG]:
    """Make LHSPG for an analyzed model with adapters, whose ranks stay whole from now on.

    Returns:
        The analysis in which ranks stay whole, the training, and the optimizer.

    Raises:
        OptionError: The analysis keeps frozen weights whole, or no adapter was found; or as in :func:`make`.
        NothingPrunableError: No other group is prunable.
    """
    refuse_layers_alone(analysis.model)
    if not analysis.prune_frozen:
        raise OptionError(
            "LHSPG brings rows of frozen weights to zero, and this OTO leaves those as they are\n"
            "  effect  nothing was made\n  to fix  OTO(model, dummy_input, prune_frozen=True).lhspg(...)"
        )
    found = adapters(analysis.graph)
    if not found:
        raise OptionError(
            f"{type(analysis.model).__name__} has no adapter W x + s B (A x) on a frozen weight W of its own\n"
            "  effect  there is nothing that LHSPG would do better than HESSO, and nothing was made\n"
            "  to fix  put adapters on before OTO(...), not merged and not disabled; use_dora=False, without biases;"
            " dequantize the base; for other kinds merge first, and take oto.hesso(...) (docs/adapters.md)"
        )
    groups = keep_whole(analysis.groups, ranks_in(analysis.groups, found), "it is the rank of an adapter")
    groups = keep_whole(groups, halves_in(groups, found), "with the other half of an adapted layer it is one operator")
    analysis = replace(analysis, groups=settled(groups))
    require_prunable(analysis.groups, analysis.graph)
    return analysis, *make(analysis, LHSPG, params, options, adapters=found)


def _warn_of_adapters(analysis: Analysis, optimizer: SparseOptimizer) -> None:
    """Warn if groups of frozen weights with adapters would be chosen by gradients, which these weights do not have."""
    adapted = {adapter.weight for adapter in adapters(analysis.graph)} if analysis.prune_frozen else set()
    zeroed = dict.fromkeys(piece.parameter for group in optimizer.node_groups for piece in group.zeros)
    blind = [name for name in zeroed if name in adapted]
    if blind and optimizer.choice.averaged:
        warnings.warn(
            f"{type(optimizer).__name__} chooses by gradients, and these have none, since they are frozen:"
            f" {some(blind, 3)}\n"
            "  effect  their rows go by what the gradients of the adapters beside them say, whatever they hold\n"
            "  to fix  oto.lhspg(...), which takes a weight with its adapter as one (docs/adapters.md); or"
            " saliency='magnitude'",
            NoGradientWarning,
            stacklevel=users_level(),
        )


def require_named(analysis: Analysis) -> None:
    """Check that parameters have the same names and shapes as in the analysis.

    A module that was wrapped since has other names, and a new head has other shapes.

    Raises:
        ModelChangedError: What would be zeroed is not found by its name, some parameter has another shape, or what the
            costs and the zeros of the model follow from was changed.
    """
    zeroed = dict.fromkeys(piece.parameter for group in analysis.groups if group.prunable for piece in group.zeros)
    there = dict(analysis.model.named_parameters(remove_duplicate=False))
    if gone := [name for name in zeroed if name not in there]:
        raise ModelChangedError(
            f"{type(analysis.model).__name__} has no {some(gone)} any more, as it had when OTO(...) was made\n"
            "  effect  what is to be zeroed is not found by its name; nothing was made\n"
            "  to fix  change the model first (checkpoint_wrapper, block = torch.compile(block), new layers), then"
            " OTO(...); block.compile() keeps names, and may come later"
        )
    was = {name: leaf.value.shape for leaf in analysis.graph.leaves if leaf.kind == "parameter" for name in leaf.names}
    if other := [name for name in was if name in there and tuple(there[name].shape) != was[name]]:
        raise ModelChangedError(
            f"{some(other)} of {type(analysis.model).__name__}"
            f" {'has another shape' if len(other) == 1 else 'have other shapes'} than when OTO(...) was made:"
            f" {other[0]} is {list(there[other[0]].shape)}, and was {list(was[other[0]])}\n"
            "  effect  what was found out about the model does not hold any more; nothing was made\n"
            "  to fix  change the model first (new layers, a new head, more tokens), then OTO(...)"
        )
    if altered := analysis.altered:
        raise ModelChangedError(
            f"{type(analysis.model).__name__} was changed since OTO(...) was made: {some(altered)}\n"
            "  effect  what was found out about the model does not hold any more; nothing was made\n"
            "  to fix  change the model first, then OTO(...)"
        )


def compare_frozen(analysis: Analysis) -> None:
    """Check whether parameters were frozen since the analysis, and warn about those that are no longer frozen.

    Raises:
        TooLateError: Parameters that would be zeroed were frozen, and ``prune_frozen`` is not set.
    """
    frozen, unfrozen = frozen_since(analysis.groups, analysis.graph, analysis.model)
    if frozen and not analysis.prune_frozen:
        raise TooLateError(
            f"{some(frozen)} {'was' if len(frozen) == 1 else 'were'} frozen after OTO(...) was made\n"
            "  effect  an optimizer would still bring entries of it to zero\n"
            "  to fix  freeze before OTO(...); if it may be zeroed anyway, OTO(..., prune_frozen=True)"
        )
    if unfrozen:
        warnings.warn(
            f"{some(unfrozen)} {'was' if len(unfrozen) == 1 else 'were'} frozen when OTO(...) was made\n"
            "  effect  the groups that would zero entries of it stay whole\n"
            "  to fix  make a new OTO(...) now that they are trained",
            NotPrunedWarning,
            stacklevel=users_level(),
        )
