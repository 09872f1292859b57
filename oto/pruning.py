"""The methods of ``OTO`` that bring groups to zero, or say what would go: a docstring and a call each."""

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
    """What an analyzed model is pruned by; :class:`oto.OTO` has these methods."""

    _analysis: Analysis
    _training: Training  # of the optimizer that was made last

    def hesso(self, *, params: Params | None = None, **options: Unpack[HESSOOptions]) -> HESSO:
        """The HESSO optimizer; all options are explained at :class:`oto.optim.HESSO`.

        Args:
            params: By default all parameters of the model. Parameter groups need no names.
            target_macs, target_params, target_bytes, target_latency_ms, target_group_sparsity, target_kept: The target;
                exactly one.
            scope, min_kept, group_divisible, align, saliency, normalize, within, by_cost, average_steps: How to choose.
            start_pruning_step, pruning_steps, pruning_periods, pruning_exponent, total_steps: When.
            compensate, batches, loss: Whether what stays takes over what goes, and by which data that is fitted.
            variant, base, base_options, names, lr, weight_decay, first_momentum, second_momentum, dampening: The
                wrapped optimizer; further keywords of torch's optimizers (``betas``, ``foreach``...) may be passed too.
        """
        self._training, optimizer = make(self._analysis, HESSO, params, options)
        return optimizer

    def hesso_cric(self, *, params: Params | None = None, **options: Unpack[HESSOCRICOptions]) -> HESSOCRIC:
        """HESSO that walks groups to zero first. All options of :meth:`hesso`, and ``sampling_steps``, ``max_cycles``,
        ``tolerance`` and ``sensitivity``, which are explained at :class:`oto.optim.HESSOCRIC`.
        """
        self._training, optimizer = make(self._analysis, HESSOCRIC, params, options)
        return optimizer

    def hspg(self, *, params: Params | None = None, **options: Unpack[HSPGOptions]) -> HSPG:
        """HSPG of the first paper, with a target. Options of :meth:`hesso`, and ``lmbda``, ``epsilon``,
        ``half_space_step`` and ``upper_group_sparsity``, which are explained at :class:`oto.optim.HSPG`.
        """
        self._training, optimizer = make(self._analysis, HSPG, params, options)
        return optimizer

    def dhspg(self, *, params: Params | None = None, **options: Unpack[DHSPGOptions]) -> DHSPG:
        """DHSPG of the second paper, with a target. Options of :meth:`hesso`, and ``lmbda``, ``lmbda_amplify``,
        ``hat_lmbda_coeff``, ``epsilon``, ``partition_step``, ``half_space_step``, ``warm_up_steps`` and
        ``tolerance_group_sparsity``, which are explained at :class:`oto.optim.DHSPG`.
        """
        self._training, optimizer = make(self._analysis, DHSPG, params, options)
        return optimizer

    def h2spg(self, *, params: Params | None = None, **options: Unpack[H2SPGOptions]) -> H2SPG:
        """H2SPG of the third paper, of an ``OTO(..., compress_mode="erase")`` or ``"both"``. Options of :meth:`hesso`,
        and ``target_segments``, ``lmbda``, ``lmbda_amplify``, ``hat_lmbda_coeff``, ``epsilon``, ``partition_step``,
        ``half_space_step`` and ``warm_up_steps``, which are explained at :class:`oto.optim.H2SPG`.

        With ``target_segments=K`` what goes is found as published, by trial removal; with any other target, at the
        exact cost of each segment and channel.
        """
        self._training, optimizer = make(self._analysis, H2SPG, params, options)
        return optimizer

    def lhspg(self, *, params: Params | None = None, **options: Unpack[LHSPGOptions]) -> LHSPG:
        """LHSPG of LoRAShear, for adapters on a frozen model, of an ``OTO(..., prune_frozen=True)``. Options of
        :meth:`hesso`, and ``epsilon``, which is explained at :class:`oto.optim.LHSPG`.

        A weight and its adapter are one operator. Its redundant rows go to zero together, all others learn through the
        adapter. Ranks of adapters stay whole from here on. :func:`oto.adapters.slim_adapters` tells the slim model's
        adapters from its base.
        """
        self._analysis, self._training, optimizer = make_for_adapters(self._analysis, params, options)
        return optimizer

    def family(self, *, params: Params | None = None, **options: Unpack[FamilyOptions]) -> Family:
        """Several sizes from one training: the full network and a member for each target, nested in one another.

        Train with ``family.step(forward, loss)`` in place of forward, backward and ``optimizer.step()``; then
        ``family.construct(out_dir)``. See :class:`oto.family.Family`, and ``docs/family.md``.

        Args:
            params: By default all parameters of the model.
            targets: The sizes besides the full network, the largest first: floats are shares of the MACs, mappings
                any other target, such as ``{"target_latency_ms": 20}``. Each target is met from below.
            total_steps: Number of steps that training takes, needed if anything is a share of it.
            freeze_step: Step at which it is settled what each member keeps, .45 of all by default. Before it the full
                network trains alone.
            ramp_steps: Over how many steps after that what members count rises from zero to one, .05 by default.
            networks_per_step: How many networks run in each step after that: the full one, the smallest member, and as
                many others, drawn for each step, as are left of this number; 4 by default.
            distillation: By default members learn from the full network's logits on the same batch. ``False``: from the
                loss of the task; or a function of a member's output and the full network's that gives the loss.
            temperature, class_dim: Of the logits: what they are divided by, and the dimension of the classes.
            seed: Of the draw of members.
            **options: How to choose, and the wrapped optimizer, as in :meth:`hesso`.

        Raises:
            OptionError: An option is invalid; parameters are spread over processes; or ``allow_graph=True`` was given.
            TargetError, NothingPrunableError: A target cannot be reached, or they do not fall.
        """
        self._training, made = make_family(self._analysis, params, options)
        return made

    def preview(
        self, *, batches: Iterable[Any] = (), loss: Callable[[nn.Module, Any], Tensor] | None = None,
        **options: Unpack[PreviewOptions],
    ) -> Preview:  # fmt: skip
        """What a target would keep of each layer, before any training: print it.

        The choice is the one that an optimizer with the same options would make now, in one go: by the weights alone
        (their magnitude), or by gradients averaged over ``batches``. Training changes it.

        Args:
            batches: Batches to compute gradients on. Gradients, mode, buffers and the random state stay as they were.
            loss: Takes the model and a batch, and returns the loss.
            **options: Those options of :meth:`hesso` that set the target and what is pruned. A target that cannot be
                reached is a ``TargetError``.
        """
        return preview(self._analysis, batches, loss, options)

    def one_shot(
        self, *, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor], holdout: float = 0.25,
        compensate: Literal["affine", "ridge", "bias"] | None = "affine", ridge: float = RIDGE, portions: int = 16,
        norms: bool = True, **options: Unpack[PreviewOptions],
    ) -> OneShot:  # fmt: skip
        """Compress the model without training, in place: print the result, then :meth:`construct_subnet` as usual.

        What is removed is chosen at once, on the full model; segments among it are set to zero first. Then, in portions
        from input to output, the atoms that go are folded into the weights that read them, by a least-squares fit over
        the batches, batch norms are estimated again, and the atoms are set to zero. A fold that does not lower the loss
        on the held-out batches is undone. It takes a few forward passes over all batches for each portion, and memory
        for a copy of the model plus n² numbers for n entries of a layer's input. Pass a few hundred samples of the kind
        that the model is for.

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
