"""The methods of ``OTO`` that prune a model or preview that: a docstring and a call for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Unpack

from torch import Tensor, nn

from oto.analysis import Analysis
from oto.family import Family, make_family
from oto.oneshot import Settings, one_shot
from oto.optim import DHSPG, H2SPG, HESSO, HESSOCRIC, HSPG, LHSPG
from oto.optim.compensate import RIDGE
from oto.optim.options import (
    DHSPGOptions,
    FamilyOptions,
    H2SPGOptions,
    HESSOCRICOptions,
    HESSOOptions,
    HSPGOptions,
    LHSPGOptions,
    PreviewOptions,
)
from oto.optim.wrapped import Params
from oto.previewing import preview
from oto.report.one_shot import OneShot
from oto.report.preview import Preview
from oto.training import Training, make, make_for_adapters


class Pruning:
    """Methods that prune an analyzed model; the base class of :class:`oto.OTO`."""

    _analysis: Analysis
    _training: Training  # of the optimizer that was made last

    def hesso(self, *, params: Params | None = None, **options: Unpack[HESSOOptions]) -> HESSO:
        """Make a HESSO optimizer; all options are documented at :class:`oto.optim.HESSO`.

        Args:
            params: By default all parameters of the model. Parameter groups need no names.
            target_macs, target_params, target_bytes, target_latency_ms, target_group_sparsity, target_kept: The target;
                exactly one.
            scope, min_kept, group_divisible, align, saliency, normalize, within, by_cost, average_steps: How to choose.
            start_pruning_step, pruning_steps, pruning_periods, pruning_exponent, total_steps: When to prune.
            compensate, batches, loss: Whether remaining atoms compensate for pruned ones, and the data for that fit.
            variant, base, base_options, names, lr, weight_decay, first_momentum, second_momentum, dampening: The
                wrapped optimizer; further keywords of torch's optimizers (``betas``, ``foreach``...) may be passed too.
        """
        self._training, optimizer = make(self._analysis, HESSO, params, options)
        return optimizer

    def hesso_cric(self, *, params: Params | None = None, **options: Unpack[HESSOCRICOptions]) -> HESSOCRIC:
        """Make a HESSO-CRIC optimizer, which first scales groups to zero and back to score them.

        It takes all options of :meth:`hesso`, and ``sampling_steps``, ``max_cycles``, ``tolerance`` and
        ``sensitivity``, which are documented at :class:`oto.optim.HESSOCRIC`.
        """
        self._training, optimizer = make(self._analysis, HESSOCRIC, params, options)
        return optimizer

    def hspg(self, *, params: Params | None = None, **options: Unpack[HSPGOptions]) -> HSPG:
        """Make an optimizer of the first paper, HSPG, with a target.

        It takes the options of :meth:`hesso`, and ``lmbda``, ``epsilon``, ``half_space_step`` and
        ``upper_group_sparsity``, which are documented at :class:`oto.optim.HSPG`.
        """
        self._training, optimizer = make(self._analysis, HSPG, params, options)
        return optimizer

    def dhspg(self, *, params: Params | None = None, **options: Unpack[DHSPGOptions]) -> DHSPG:
        """Make an optimizer of the second paper, DHSPG, with a target.

        It takes the options of :meth:`hesso`, and ``lmbda``, ``lmbda_amplify``, ``hat_lmbda_coeff``, ``epsilon``,
        ``partition_step``, ``half_space_step``, ``warm_up_steps`` and ``tolerance_group_sparsity``, which are
        documented at :class:`oto.optim.DHSPG`.
        """
        self._training, optimizer = make(self._analysis, DHSPG, params, options)
        return optimizer

    def h2spg(self, *, params: Params | None = None, **options: Unpack[H2SPGOptions]) -> H2SPG:
        """Make an optimizer of the third paper, H2SPG, for an ``OTO(..., compress_mode="erase")`` or ``"both"``.

        It takes the options of :meth:`hesso`, and ``target_segments``, ``lmbda``, ``lmbda_amplify``,
        ``hat_lmbda_coeff``, ``epsilon``, ``partition_step``, ``half_space_step`` and ``warm_up_steps``, which are
        documented at :class:`oto.optim.H2SPG`.

        With ``target_segments=K``, segments are chosen as published, by trial removal; with any other target, by the
        exact cost of each segment and channel.
        """
        self._training, optimizer = make(self._analysis, H2SPG, params, options)
        return optimizer

    def lhspg(self, *, params: Params | None = None, **options: Unpack[LHSPGOptions]) -> LHSPG:
        """Make an optimizer of LoRAShear, LHSPG, for adapters on a frozen model, of an ``OTO(..., prune_frozen=True)``.

        It takes the options of :meth:`hesso`, and ``epsilon``, which is documented at :class:`oto.optim.LHSPG`.

        A weight and its adapter are one operator. Its redundant rows are brought to zero together, all others are
        trained through the adapter. Ranks of adapters stay whole from now on. :func:`oto.adapters.slim_adapters`
        separates the slim model's adapters from its base.
        """
        self._analysis, self._training, optimizer = make_for_adapters(self._analysis, params, options)
        return optimizer

    def family(self, *, params: Params | None = None, **options: Unpack[FamilyOptions]) -> Family:
        """Make a family, to train several sizes at once: the full network and a nested member for each target.

        Train with ``family.step(forward, loss)`` in place of forward, backward and ``optimizer.step()``; then
        ``family.construct(out_dir)``. See :class:`oto.family.Family`, and ``docs/family.md``.

        Args:
            params: By default all parameters of the model.
            targets: The sizes besides the full network, the largest first: floats are shares of the MACs, mappings
                any other target, such as ``{"target_latency_ms": 20}``. No member costs more than its target.
            total_steps: Number of steps that training takes, needed if any option is a share of it.
            freeze_step: The step at which the atoms of each member are chosen, by default .45 of all steps. Before it,
                only the full network is trained.
            ramp_steps: Number of steps after that over which the weight of the members' losses rises from zero to one,
                by default .05 of all steps.
            networks_per_step: Number of networks that run in each step after that, 4 by default: the full network, the
                smallest member, and others that are drawn for each step.
            distillation: By default, members learn from the full network's logits on the same batch. ``False``: from
                the task loss; or a function that computes a member's loss from its output and the full network's.
            temperature, class_dim: The number by which logits are divided; their class dimension.
            seed: Seed for the draw of members.
            **options: How to choose, and the wrapped optimizer, as in :meth:`hesso`.

        Raises:
            OptionError: An option is invalid; parameters are sharded over processes; or ``allow_graph=True`` was given.
            TargetError, NothingPrunableError: A target cannot be reached, or the targets do not decrease.
            ModelChangedError, TooLateError: Parameters were renamed or frozen since the analysis.
        """
        self._training, made = make_family(self._analysis, params, options)
        return made

    def preview(
        self, *, batches: Iterable[Any] = (), loss: Callable[[nn.Module, Any], Tensor] | None = None,
        **options: Unpack[PreviewOptions],
    ) -> Preview:  # fmt: skip
        """What a target would keep of each layer, before any training; can be printed.

        This is the choice that an optimizer with the same options would make now, in a single period: by the weights
        alone (their magnitude), or by gradients over ``batches``. The choice during training will differ.

        Args:
            batches: Batches to compute gradients on. Gradients, modes, buffers and the random state are restored.
            loss: A function of the model and a batch that returns the loss.
            **options: The options of :meth:`hesso` that define the target and the choice.

        Raises:
            TargetError: The target cannot be reached.
            OptionError: An option is invalid, or batches are given without a loss or for a sharded model.
        """
        return preview(self._analysis, batches, loss, options)

    def one_shot(
        self, *, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor], holdout: float = 0.25,
        compensate: Literal["affine", "ridge", "bias"] | None = "affine", ridge: float = RIDGE, portions: int = 16,
        norms: bool = True, **options: Unpack[PreviewOptions],
    ) -> OneShot:  # fmt: skip
        """Compress the model without training, in place. Call :meth:`construct_subnet` afterwards.

        Everything to remove is chosen first, on the full model, and chosen segments are set to zero. Then, in portions
        from input to output, the chosen atoms are folded into the weights that read them, by a least-squares fit over
        the batches, the atoms are set to zero, and batch norms are estimated again. A fold that does not lower the loss
        on the held-out batches is undone. Each portion takes a few forward passes over all batches; memory is needed
        for a copy of the model, and for n² numbers if a layer's input has n entries. Pass a few hundred samples similar
        to the data that the model will be used with.

        Args:
            batches, loss: Batches to calibrate and to check with. ``loss`` takes the model, in eval mode, and a batch.
            holdout: Share of the batches that is used only to check, the last ones; 0: nothing is checked.
            compensate: ``"affine"``; ``"ridge"``, without a constant; ``"bias"``, the constant alone; or ``None``.
            ridge: Damping of the fit, as a share of the mean of the diagonal of the moments.
            portions: Maximum number of portions. Statistics of each are taken after the portions before it.
            norms: Estimate batch norms again.
            **options: A target and how to choose, as in :meth:`preview`. ``saliency`` may also be ``"obs"`` (what the
                fit loses, atom after atom), ``"sensitivity"`` (how much the loss rises when a group alone gets thinner)
                or ``"fluctuation"`` (how much the read values vary); with ``compress_mode="both"`` neither ``"obs"``
                nor ``"fluctuation"``. By default, gradients of the batches are used.

        Raises:
            OptionError, TargetError: There are too few batches, an option is invalid, or there are several
                processes; the target cannot be reached. Nothing is changed.
        """
        settings = Settings(compensate, ridge, portions, norms)
        return one_shot(self._analysis, batches, loss, holdout, settings, options)
