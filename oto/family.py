"""Train a family: ``oto.family(targets=[.75, .5, .25], ...)`` -> several slim models that share their weights.

The full network is trained alone until the ranking of its atoms is frozen. From then on, members of several sizes, each
nested in the next larger one, are trained with it on every batch (:mod:`oto.sandwich`). :mod:`oto.optim.nested` chooses
the atoms of each member, and :mod:`oto.slim.member` runs members.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from oto.analysis import Analysis
from oto.errors import OptionError, place_of
from oto.io.artifact import check_out_dir
from oto.io.family import files_of_family
from oto.members import FamilyMember, Maker, Sorted, estimate_norms_, found_in, has_norms, save
from oto.optim import Choice
from oto.optim.family import FamilyOptimizer, levels_kept
from oto.optim.nested import Nested, between
from oto.optim.options import (
    ChoiceOptions,
    FamilyOptions,
    SandwichOptions,
    besides,
    names_of,
    picked,
    refuse_unknown,
)
from oto.optim.wrapped import Params
from oto.previewing import by_first_names, choice_for
from oto.report.family import MemberRow, report
from oto.sandwich import Sandwich, average_gradients_, processes, share_from_first_
from oto.shards import refuse_sharded
from oto.subnet import Build, Emitter, Subnet
from oto.training import Training, compare_frozen, require_named

Forward = Callable[[nn.Module], Any]
Loss = Callable[[Any], Tensor]
Result = TypeVar("Result")

READ_OUT = "a member, whose parameters are read out of the full ones,"
KEEP_WHOLE = (
    "train the family with whole parameters in each process: call oto.family(...) on the plain model after"
    " init_process_group, and let family.step average the gradients"
)
"""Parts of the message of :func:`oto.shards.refuse_sharded`: what needs whole parameters, and the remedy."""


class FamilyTraining:
    """The methods of :class:`Family` that train a family and run its members."""

    def __init__(self, maker: Maker, optimizer: FamilyOptimizer, sandwich: Sandwich, how: Mapping[str, Any]) -> None:
        self.optimizer = optimizer
        self._maker, self._sandwich, self._how = maker, sandwich, dict(how)
        self._trained: list[FamilyMember] = []
        self._cuts: list[FamilyMember] = []
        self._made_for: tuple[Tensor, torch.device] | None = None
        self._sorted: Sorted | None = None
        share_from_first_([*self.model.parameters(), *self.model.buffers()])

    @property
    def model(self) -> nn.Module:
        """The full network, member 0."""
        return self._maker.analysis.model

    @property
    def members(self) -> list[FamilyMember]:
        """All members, largest first: the full network, and those that were trained or cut.

        Raises:
            OptionError: The ranking is not frozen yet.
        """
        if not self._settled():
            raise OptionError(
                f"the members of this family are settled at step {self.optimizer.schedule.start:,}, and"
                f" {self.optimizer.clock:,} steps were taken\n"
                "  effect  there is only the full network\n  to fix  train on; or a smaller freeze_step="
            )
        return [self._maker.full(), *sorted([*self._trained, *self._cuts], key=lambda one: -one.cost.macs)]

    def __repr__(self) -> str:
        return f"Family({type(self.model).__name__}) at step {self.optimizer.clock:,}\n{self.plan()}"

    def plan(self) -> str:
        """A printable text: the targets, and what happens at which step."""
        ramp, networks = self._sandwich.ramp, self._sandwich.networks
        count = min(networks, len(self.optimizer.nested.choices) + 1)
        return f"{self.optimizer.plan()}\n{count} networks a step; what members count rises over {ramp} steps"

    # Training --------------------------------------------------------------------------------------------------------

    def step(
        self, forward: Forward, loss: Loss, scaler: torch.amp.GradScaler | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        """Forward, backward and one step of the optimizer, on one batch.

        Args:
            forward: Runs a network on the batch and returns its output: ``lambda net: net(x)``. It is called with the
                full network and with members; open ``torch.autocast`` in it for mixed precision.
            loss: The loss of an output, for the full network: ``lambda output: cross_entropy(output, y)``.
            scaler: The gradient scaler, for float16.
            mask: If members learn from the full network's logits, the positions that count, such as ``labels != -100``,
                with the shape of the logits without the class dimension. By default all.

        Returns:
            The full network's loss, detached.

        Raises:
            OptionError: Members cannot learn from the output; see ``distillation=``.
            ShrinkError, VerificationError: A member cannot be made; the message says why.
        """
        try:
            value = self.backward(forward, loss, scaler, mask=mask)
        except Exception:
            self.optimizer.zero_grad()  # a batch that is retried must not count twice
            raise
        self.update(scaler)
        return value

    def backward(
        self, forward: Forward, loss: Loss, scaler: torch.amp.GradScaler | None = None, *, mask: Tensor | None = None,
        weight: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """Forward and backward of one micro-batch; after all of them call :meth:`update` once.

        Args:
            forward, loss, scaler, mask: As in :meth:`step`; ``loss`` itself divides by the number of micro-batches.
            weight: One over the number of micro-batches. What members learn from the full network is a mean over the
                micro-batch, and is multiplied by this.

        Returns:
            The full network's loss, detached.
        """
        if not callable(forward) or not callable(loss):
            raise OptionError(
                "forward and loss are functions: of a network, and of its output\n  effect  nothing was run\n"
                "  to fix  family.step(lambda net: net(x), lambda output: cross_entropy(output, y))"
            )
        members, step = self._settled(), self.optimizer.clock
        output = forward(self.model)
        value = loss(output)
        _scaled(value, scaler).backward()
        share = self._sandwich.weight(step)
        if members and share > 0:
            taught = self._sandwich.taught(output)
            del output  # frees the autograd graph
            parameters = dict(self.model.named_parameters())

            def learn(net: nn.Module) -> None:
                own = self._sandwich.loss(forward(net), taught, loss, mask)
                own = own if self._sandwich.distillation is False else own * weight  # a task loss is already divided
                _scaled(own * share, scaler).backward()

            for index in self._sandwich.drawn(step, len(members)):
                part = members[index].part
                assert part is not None
                part.follow(self.model)
                part.run(parameters, learn)
        return value.detach()

    def update(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """One step of the optimizer with the current gradients, which are cleared afterwards.

        With several processes the gradients are averaged first, see :meth:`reduce`.
        """
        self.reduce()
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        self.optimizer.zero_grad()
        self._sorted = None

    def reduce(self) -> None:
        """Average the gradients over all processes, and copy the buffers from the first one.

        :meth:`update` calls it. A loop that steps the optimizer itself has to call it first.
        """
        if processes() > 1:
            average_gradients_(self.optimizer.parameters().values())
            held = [member.part.buffers for member in self._trained if member.part is not None]
            share_from_first_([*self.model.buffers(), *(buffer for one in held for buffer in one.values())])

    def _settled(self) -> list[FamilyMember]:
        """The trained members, made once the ranking is frozen; empty before."""
        levels, device = self.optimizer.levels, next(self.model.parameters()).device
        if levels is None:
            return []
        if self._made_for is None or self._made_for[0] is not levels or self._made_for[1] != device:
            refuse_sharded(self.model, READ_OUT, KEEP_WHOLE)
            targets = self.targets
            wanted = [
                (target, self.optimizer.by_group(levels_kept(levels, number)))
                for number, target in enumerate(targets, 1)
            ]
            self._trained, self._cuts, self._sorted = self._maker.members(wanted), [], None
            parts = [member.part for member in self._trained if member.part is not None]
            for part, buffers in zip(parts, self.optimizer.buffers, strict=False):  # loaded from a checkpoint
                part.put_buffers(buffers)
            self.optimizer.buffers = [part.buffers for part in parts]
            self._made_for = (levels, device)
        return self._trained

    @property
    def targets(self) -> list[Any]:
        """The targets as they were given, largest first."""
        asked = [(choice.target.name, choice.target.asked) for choice in self.optimizer.nested.choices]
        return [number if name == "target_macs" else {name: number} for name, number in asked]

    def run(self, member: Any, work: Callable[[nn.Module], Result]) -> Result:
        """The result of ``work(network)`` for a member, in eval mode and without gradients; no weights are copied.

        Args:
            member: Its target as it was given, or its index; 0 is the largest.
            work: A function of the network.
        """
        members = self.members
        part, model = members[found_in(members, member)].part, self.model
        modes = [(module, module.training) for module in model.modules()]
        try:
            model.eval()
            if part is not None:
                part.follow(model)
            with torch.no_grad():
                return work(model) if part is None else part.run(dict(model.named_parameters()), work)
        finally:
            for module, training in modes:
                module.training = training


class Family(FamilyTraining):
    """Several sizes of one network, trained together: the full network and a member for each target.

    :meth:`oto.OTO.family` makes it. Train it with :meth:`step`; then :meth:`construct` gives all members as slim
    models. To resume later, save ``model.state_dict()`` and ``optimizer.state_dict()``.

    Attributes:
        optimizer: A ``torch.optim.Optimizer``, for learning-rate schedulers and checkpoints.
    """

    def evaluate(self, score: Callable[[nn.Module], float]) -> list[FamilyMember]:
        """The members with their scores; they can be printed.

        Args:
            score: A function of a network in eval mode that returns its score.
        """
        return [replace(one, score=float(self.run(i, score))) for i, one in enumerate(self.members)]

    def report(
        self, path: str | os.PathLike[str], members: Sequence[FamilyMember] | None = None, title: str | None = None
    ) -> Path:
        """Write one HTML file that needs no network: the members, and the curve of score against MACs.

        Args:
            path: The file.
            members: The result of :meth:`evaluate`; without it only members that were cut may have scores.
            title: A title instead of the name of the model's class.

        Raises:
            MissingExtraError: matplotlib is not installed (``pip install 'oto[report]'``).
        """
        rows = [
            MemberRow(str(m.target), m.cost, m.score, m.trained) for m in (self.members if members is None else members)
        ]
        return report(place_of("path", path, "nothing was written"), title or type(self.model).__name__, rows)

    def cut(
        self,
        target: Any,
        *,
        evaluate: Callable[[nn.Module], float] | None = None,
        batches: Iterable[Any] = (),
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> FamilyMember:
        """Cut one more member from a finished family, without training; it is nested between its neighbors.

        Args:
            target: A share of MACs, or a mapping, as in ``targets=``; one that no member has yet.
            evaluate: A function of the network in eval mode that returns its score.
            batches, forward: Used to estimate the member's batch-norm statistics by ``forward(net, batch)``. Without
                them it takes the statistics of the next larger member, and a note says so.

        Returns:
            The member, which can be printed. It belongs to the family from now on.

        Raises:
            OptionError, TargetError: The ranking is not frozen; the target cannot be reached, or a member has it.
        """
        made = _cut(self._maker, self.members, self.optimizer, self._how, target)
        listed = list(batches)
        if forward is not None and listed:
            estimate_norms_(made, dict(self.model.named_parameters()), listed, forward)
        elif has_norms(made):
            note = "its batch norms have the statistics of the next larger member: cut(..., batches=, forward=)"
            made = replace(made, notes=(note,))
        self._cuts, self._sorted = [*self._cuts, made], None
        if evaluate is not None:
            self._cuts[-1] = replace(made, score=float(self.run(target, evaluate)))
        return self._cuts[-1]

    def module(self, member: Any) -> nn.Module:
        """A member in eval mode whose weights are views of one sorted copy of the full weights.

        All members that this method returns share that copy. It is a snapshot: call the method again after further
        training. Weights that no view can express are copied, with a ``CopiedWarning`` that names them. For a model
        that owns its memory or is to be saved, use :meth:`construct`.

        Args:
            member: Its target as it was given, or its index; 0 is the largest.
        """
        members = self.members
        if self._sorted is None:
            self._sorted = Sorted.of(self._maker, members)
        return self._sorted.module(members[found_in(members, member)])

    def construct(
        self,
        out_dir: str | os.PathLike[str] | None = None,
        *,
        emitter: Emitter = "auto",
        float64: bool | Literal["auto"] = "auto",
        verify: bool = True,
    ) -> list[Subnet]:
        """Build all members as slim models, largest first, each verified against the masked full model.

        Args:
            out_dir: Folder for one artifact that holds the shared weights once; ``load_subnet(out_dir, factory,
                member=0.5)`` loads any member from it. With ``None`` nothing is saved.
            emitter, float64, verify: As in :meth:`oto.OTO.construct_subnet`.

        Raises:
            OptionError: The ranking is not frozen.
            VerificationError: A member computes something else than the masked full model. Nothing was written.
            ArtifactError: The folder cannot be written.
        """
        build = Build.of(None, emitter, None, False, float64, verify)
        place = None if out_dir is None else Build.of(out_dir).out_dir
        if place is not None:
            check_out_dir(place, files_of_family())
        members = self.members
        subnets = [self._maker.built(member, build) for member in members]
        if place is None:
            return subnets
        save(self._maker, members, subnets, place)
        return [replace(subnet, path=place) for subnet in subnets]


def _cut(
    maker: Maker, members: Sequence[FamilyMember], optimizer: FamilyOptimizer, how: Mapping[str, Any], target: Any
) -> FamilyMember:
    """Cut a member between two others, or below the smallest.

    Raises:
        OptionError, TargetError: The family already has such a member, or there is no width in between.
    """
    if any(one.target == target for one in members):
        raise OptionError(
            f"the family has a member {target!r}\n  effect  nothing was cut\n"
            "  to fix  ask for a target that no member has yet"
        )
    choice = choice_for(maker.analysis, {**how, **_named(target)}, "cut")
    masks = [
        torch.cat([torch.from_numpy(np.isin(np.arange(g.size), one.kept[g.name])) for g in optimizer.node_groups])
        for one in members
    ]
    outer = max(i for i, mask in enumerate(masks) if i == 0 or _costs(choice, mask) > choice.target.goal)
    inner = masks[outer + 1] if outer + 1 < len(members) else torch.zeros_like(masks[0])
    kept = between(choice, optimizer.ranking, masks[outer], inner)
    (made,) = maker.members([(target, optimizer.by_group(kept))], members[outer].part)
    return replace(made, trained=False)


def make_family(analysis: Analysis, params: Params | None, options: Mapping[str, Any]) -> tuple[Training, Family]:
    """Make a family of an analyzed model; see :meth:`oto.OTO.family`.

    Raises:
        OptionError, TargetError, NothingPrunableError: An option is invalid, or a target cannot be reached.
        ModelChangedError, TooLateError: Parameters that are thinner in members were renamed or frozen after the
            analysis.
    """
    refuse_unknown(options, names_of(FamilyOptions), "family")
    refuse_sharded(analysis.model, READ_OUT, KEEP_WHOLE)
    options = by_first_names(analysis, options)
    require_named(analysis)
    compare_frozen(analysis)
    targets = options.get("targets")
    if not isinstance(targets, Sequence) or isinstance(targets, str):
        raise OptionError(
            f"targets is {targets!r}; it lists the sizes besides the full network, the largest first\n"
            "  to fix  such as targets=[0.75, 0.5, 0.25], shares of the MACs; or [{'target_latency_ms': 20}]"
        )
    how = picked(options, ChoiceOptions)
    nested = Nested.of([choice_for(analysis, {**how, **_named(target)}, "family") for target in targets])
    sandwich, schedule = Sandwich.of(options)
    wrapped: Any = besides(options, SandwichOptions, ChoiceOptions)
    maker = Maker.of(analysis)
    optimizer = FamilyOptimizer(
        analysis.model.named_parameters() if params is None else params,
        nested,
        schedule,
        sandwich.describe(),
        **{"names": analysis.model.named_parameters(), **wrapped},
    )
    optimizer.follow(analysis.model)
    return Training(weakref.ref(optimizer), analysis.partition), Family(maker, optimizer, sandwich, how)


def _named(target: Any) -> dict[str, Any]:
    """A target with its keyword; a plain number is a share of the MACs, or a number of MACs."""
    return dict(target) if isinstance(target, Mapping) else {"target_macs": target}


def _costs(choice: Choice, mask: Tensor) -> float:
    """The cost of the atoms in a mask, in the unit of a choice's target."""
    return choice.target.measure(np.array(list(choice.counts(mask).values()), dtype=np.int64))


def _scaled(loss: Tensor, scaler: torch.amp.GradScaler | None) -> Tensor:
    return loss if scaler is None else scaler.scale(loss)
