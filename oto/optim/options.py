"""The options of sparse optimizers, each defined once, for readers, IDEs and type checkers.

An optimizer takes them as ``**options: Unpack[HESSOOptions]``; one with additional options extends
:class:`SparseOptions`::

    class MyOptions(SparseOptions, total=False):
        epsilon: float

Their meaning is documented here or in :class:`oto.optim.HESSO`; :mod:`oto.optim.setup` reads them.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack, get_args, get_origin

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from oto.errors import OptionError, some
from oto.groups.align import Align
from oto.groups.policy import MinKept
from oto.optim.saliency import Saliency, Weights
from oto.optim.schedule import Steps
from oto.optim.wrapped import VARIANTS, Base, Named


class TargetOptions(TypedDict, total=False):
    """How much may remain; exactly one is given."""

    target_macs: int | float | None
    target_params: int | float | None
    target_bytes: int | float | None
    target_latency_ms: float | None
    target_group_sparsity: float | None
    target_kept: Mapping[str, int | float] | None


class RenamedOptions(TypedDict, total=False):
    """Former names of options, which are still accepted."""

    normalise: str | None


class ChoiceOptions(RenamedOptions, total=False):
    """How the atoms to remove are chosen."""

    scope: Literal["global", "local"]
    """``"global"``: all node groups are compared; ``"local"``: all lose the same share of their atoms."""
    min_kept: MinKept | None
    """The minimum number of atoms that every node group keeps: an int; a float, as a share of its atoms; or a mapping
    from names or globs of parameters to either. By default, and for groups that the mapping does not name, one fifth,
    unless the target cannot be met otherwise."""
    group_divisible: int
    """A node group that loses atoms keeps a multiple of this many *atoms*, such as channels or heads."""
    align: Align | None
    """The *size* (heads times their width) of a weight's dimension that is pruned remains a multiple of this: one
    number for all; a mapping from names or globs of parameters to numbers; or ``"gguf"`` (rows of 32), ``"gguf-k"``
    (rows of 256), ``"marlin"`` (rows of 128, other dimensions of 64), ``"cuda"`` (8). If the head width is such a
    multiple already, the number of heads is not constrained. By default 1; ``OTO`` uses 8 if the parameters are on a
    CUDA device."""
    saliency: Weights | str | Saliency | None
    """Name of a criterion, a function (see :data:`oto.optim.Saliency`), or a mapping from these to weights.
    ``"hesso"`` selects the published choice of HESSO: five criteria of a single batch, each divided by its norm over
    all groups, regardless of costs and of the width of a layer. ``"dhspg"`` does the same with the two criteria of
    DHSPG."""
    normalize: str | None
    """What a criterion is divided by, a key of :data:`oto.optim.saliency.NORMALIZE`. By default nothing if ``saliency``
    is in the unit of the loss, as the two Taylor terms are; otherwise its mean over each node group."""
    within: str | Saliency | None
    """The criterion by which the importance of each node group is distributed among its atoms; with ``"none"``, each
    atom keeps its own score. By default ``"path_norm"`` in groups that a convolution over images reads, if ``saliency``
    is not given; otherwise ``"none"``."""
    by_cost: float | None
    """How much the cost that an atom saves counts: the exponent in its price (:mod:`oto.optim.select`). By default 1 if
    ``saliency`` is in the unit of the loss; otherwise 0, since dividing a magnitude by MACs empties parallel layers."""
    average_steps: int | None
    """Number of steps before a choice over which criteria that use gradients are averaged; by default 32, and 1 for
    ``saliency="hesso"`` and ``"dhspg"``."""


class ScheduleOptions(TypedDict, total=False):
    """When atoms are removed."""

    start_pruning_step: Steps
    pruning_steps: Steps
    pruning_periods: int | None
    pruning_exponent: float | None
    total_steps: Steps | None


class FoldOptions(TypedDict, total=False):
    """How the remaining atoms compensate for pruned ones; see :mod:`oto.optim.fold`."""

    compensate: Literal["affine", "ridge", "bias"] | None
    batches: Iterable[Any] | None
    loss: Callable[[Module, Any], Any] | None


class WrappedOptions(TypedDict, total=False):
    """Which optimizer is wrapped, and the keywords that all of them have."""

    names: Named | None
    variant: str
    base: Base | None
    base_options: Mapping[str, Any] | None
    lr: float | Tensor | None
    first_momentum: float | None
    second_momentum: float | None
    dampening: float | None
    weight_decay: float | None


class TorchOptions(TypedDict, total=False):
    """Further keywords of the optimizers in ``torch.optim``; each optimizer takes some of them."""

    adjust_lr_fn: str | None
    alpha: float
    amsgrad: bool
    beta2_decay: float
    betas: tuple[float | Tensor, float | Tensor]
    capturable: bool
    centered: bool
    d: float
    decoupled_weight_decay: bool
    differentiable: bool
    eps: float | tuple[float | None, float]
    etas: tuple[float, float]
    foreach: bool | None
    fused: bool | None
    initial_accumulator_value: float
    lambd: float
    lr_decay: float
    maximize: bool
    momentum: float
    momentum_decay: float
    nesterov: bool
    ns_coefficients: tuple[float, float, float]
    ns_steps: int
    rho: float
    step_sizes: tuple[float, float]
    t0: float


class BaseOptions(WrappedOptions, TorchOptions, total=False):
    """How to make the wrapped optimizer."""


class PreviewOptions(TargetOptions, ChoiceOptions, total=False):
    """Options of a choice without training."""


class SparseOptions(TargetOptions, ChoiceOptions, ScheduleOptions, FoldOptions, BaseOptions, total=False):
    """Options that every sparse optimizer takes."""


class HESSOOptions(SparseOptions, total=False):
    """Options of :class:`oto.optim.HESSO`."""


class CycleOptions(TypedDict, total=False):
    """How groups are scaled to zero and back before any is removed."""

    sampling_steps: Steps
    max_cycles: int
    tolerance: int
    sensitivity: float


class HESSOCRICOptions(HESSOOptions, CycleOptions, total=False):
    """Options of :class:`oto.optim.HESSOCRIC`."""


class ProjectionOptions(TypedDict, total=False):
    """When groups are projected to zero."""

    epsilon: float | Mapping[str, float] | None
    half_space_step: Steps | None


class HalfSpaceOptions(SparseOptions, ProjectionOptions, total=False):
    """Options of :class:`oto.optim.half_space.HalfSpace`."""


class PenaltyOptions(TypedDict, total=False):
    """How all groups are penalized."""

    lmbda: float | Callable[[int], float] | None
    upper_group_sparsity: float | None


class HSPGOptions(HalfSpaceOptions, PenaltyOptions, total=False):
    """Options of :class:`oto.optim.HSPG`."""


class ChosenOptions(TypedDict, total=False):
    """How the groups to remove are penalized, and from which step."""

    lmbda: float | None
    lmbda_amplify: float | None
    hat_lmbda_coeff: float | None
    partition_step: Steps | None
    warm_up_steps: Steps | None


class PartitionOptions(ChosenOptions, total=False):
    """Which groups are penalized, and how."""

    tolerance_group_sparsity: float | None


class DHSPGOptions(HalfSpaceOptions, PartitionOptions, total=False):
    """Options of :class:`oto.optim.DHSPG`."""


class SearchOptions(TypedDict, total=False):
    """The target of H2SPG as published."""

    target_segments: int | None


class H2SPGOptions(HalfSpaceOptions, ChosenOptions, SearchOptions, total=False):
    """Options of :class:`oto.optim.H2SPG`."""


class OperatorOptions(TypedDict, total=False):
    """When a weight with its adapter is projected to zero."""

    epsilon: float


class LHSPGOptions(SparseOptions, OperatorOptions, total=False):
    """Options of :class:`oto.optim.LHSPG`."""


class SandwichOptions(TypedDict, total=False):
    """How the members of a family are trained."""

    targets: Sequence[float | Mapping[str, Any]]
    total_steps: Steps | None
    freeze_step: Steps
    ramp_steps: Steps
    networks_per_step: int
    distillation: bool | Callable[[Any, Any], Tensor]
    temperature: float
    class_dim: int
    seed: int


class FamilyOptions(SandwichOptions, ChoiceOptions, BaseOptions, total=False):
    """Options of :meth:`oto.OTO.family`."""


def names_of(options: type) -> frozenset[str]:
    """The names of the options in a ``TypedDict``.

    >>> sorted(names_of(HESSOCRICOptions) - names_of(HESSOOptions))
    ['max_cycles', 'sampling_steps', 'sensitivity', 'tolerance']
    """
    found: frozenset[str] = vars(options)["__optional_keys__"]
    return found


def keywords_of(taker: Callable[..., Any]) -> set[str]:
    """The keywords of a function or class, including those of ``**options: Unpack[...]``.

    >>> sorted(keywords_of(lambda model, scope="global": None))
    ['model', 'scope']
    """
    found: set[str] = set()
    for parameter in inspect.signature(taker, eval_str=True).parameters.values():
        if get_origin(parameter.annotation) is Unpack:
            found |= names_of(*get_args(parameter.annotation))
        elif parameter.kind is not parameter.VAR_KEYWORD:
            found.add(parameter.name)
    return found


def picked(options: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The options that are in a ``TypedDict``."""
    return {name: value for name, value in options.items() if name in names_of(kind)}


def besides(options: Mapping[str, Any], *kinds: type) -> dict[str, Any]:
    """The options that are in none of these ``TypedDict`` classes."""
    return {name: value for name, value in options.items() if not any(name in names_of(kind) for kind in kinds)}


ELSEWHERE = {
    "flop": ("target_macs", "two FLOPs are one MAC, so a share of them is the same number"),
    "sparsity": ("target_group_sparsity", "the share of zero-invariant groups that go"),
    "pruning_ratio": ("target_group_sparsity", "the share of zero-invariant groups that go"),
    "latency": ("target_latency_ms", "milliseconds of a forward pass"),
    "memory": ("target_bytes", "the memory of parameters and buffers"),
    "size": ("target_bytes", "the memory of parameters and buffers"),
}
"""Names that other libraries use for our options: for each word, the option and what it measures."""


def refuse_unknown(options: Mapping[str, Any], known: Collection[str], name: str) -> None:
    """Raise an error for options that are not known; called before the values of others are checked.

    Args:
        known: The options that the callable takes. If it wraps an optimizer, the keywords of that optimizer are added,
            and those of torch's other optimizers are removed.
        name: The name of the callable, for the message.

    Raises:
        OptionError: There are unknown options; the message names them, and a similar known one.
    """
    inner = _takes(options) if "variant" in known else {}
    if inner is None:
        return
    takers, rest = f"{name} has", dict[str, Any]()
    if "variant" in known:
        known, rest = (set(known) - names_of(TorchOptions)) | inner.keys(), dict(options.get("base_options") or {})
        takers = f"{name} and {getattr(_inner(options), '__name__', 'its base')} have"
    unknown = [option for option in options if option not in known] + [key for key in rest if key not in inner]
    if unknown:
        raise OptionError(
            f"{takers} no option {some(unknown)}\n  effect  nothing was made\n  to fix  {_meant(unknown[0], known)}"
        )


def _meant(unknown: str, known: Collection[str]) -> str:
    """A suggestion for a message about an unknown option.

    >>> _meant("target_flops", ["target_macs"])
    'target_macs= is meant: two FLOPs are one MAC, so a share of them is the same number'
    """
    for part, (option, why) in ELSEWHERE.items():
        if unknown.lower().removeprefix("target_").startswith(part) and option in known:
            return f"{option}= is meant: {why}"
    near = difflib.get_close_matches(unknown, sorted(known), n=1)
    return f"perhaps {near[0]}= is meant" if near and near[0] != unknown else "leave it out"


def _inner(options: Mapping[str, Any]) -> Any:
    """The class or function that makes the wrapped optimizer, if it is known."""
    base = options.get("base")
    return VARIANTS.get(str(options.get("variant", "sgd")).lower()) if base is None else base


def _takes(options: Mapping[str, Any]) -> Mapping[str, inspect.Parameter] | None:
    """The keywords of the wrapped optimizer; ``None`` if it takes any, or if ``build`` reports the error."""
    inner = _inner(options)
    if inner is None or isinstance(inner, Optimizer) or not callable(inner):
        return None
    takes = inspect.signature(inner).parameters
    return None if any(p.kind is p.VAR_KEYWORD for p in takes.values()) else takes
