"""The members of a family: make them from the frozen ranking, find them by target or index, and build them slim."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from oto.analysis import Analysis, ask_the_class
from oto.errors import (
    ArtifactError,
    CopiedWarning,
    EmitterError,
    OptionError,
    ShrinkError,
    VerificationError,
    first_line,
    rewording,
    some,
    users_level,
)
from oto.groups import Cost, Kept
from oto.io.family import ToSave, save_family
from oto.slim.emitters import without_needed
from oto.slim.member import Member, masked
from oto.slim.own_class import OwnClass
from oto.slim.proof.compare import require
from oto.slim.proof.reference import check
from oto.slim.pruned_shapes import pruned_shapes
from oto.slim.source import Source
from oto.slim.state import left_since
from oto.slim.views import sorted_copy, view_of
from oto.subnet import Build, Subnet, build_subnet
from oto.trace.snapshot import preserved
from oto.trace.state import undone

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


@dataclass(frozen=True, eq=False)
class FamilyMember:
    """One size of a family.

    Attributes:
        target: The target as it was given: a share of the MACs, or a mapping such as ``{"target_latency_ms": 20}``; 1.0
            for the full network.
        kept: For each prunable group, the atoms that it keeps.
        cost: Parameters and MACs on the example input.
        part: The slim module, whose parameters are selected from the full ones; ``None`` for the full network.
        trained: Whether it took part in the training; ``False`` if it was cut afterwards.
        score: Its score, if it was evaluated.
        notes: What a user should know about it.
    """

    target: Any
    kept: Kept
    cost: Cost
    part: Member | None = None
    trained: bool = True
    score: float | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        score = "" if self.score is None else f", score {self.score:g}"
        how = "" if self.trained else ", cut without training"
        lines = [f"{self.target}: {self.cost.macs:,} MACs, {self.cost.params:,} parameters{score}{how}"]
        return "\n".join([*lines, *(f"  note    {note}" for note in self.notes)])


@dataclass(frozen=True, eq=False)
class Maker:
    """Makes members of an analyzed model.

    Attributes:
        own: What has to change in a module of the model's class if its tensors are thinner.
    """

    analysis: Analysis
    own: OwnClass

    @classmethod
    def of(cls, analysis: Analysis) -> Maker:
        """Find out what the model's class needs, unless the analysis already knows.

        Raises:
            OptionError: The class cannot express the removal of some prunable groups.
        """
        form = analysis.form
        if form.kind == "graph":
            raise OptionError(
                "this OTO was made with allow_graph=True, and members are of the model's own class\n"
                "  effect  nothing was made\n  to fix  OTO(model, dummy_input) without allow_graph=True"
            )
        return cls(analysis, ask_the_class(analysis) if form.own is None else form.own)

    def full(self) -> FamilyMember:
        """The full network as a member."""
        kept = {group.name: np.arange(group.size) for group in self.analysis.groups if group.prunable}
        return FamilyMember(1.0, kept, self.analysis.cost())

    def members(self, wanted: Sequence[tuple[Any, Kept]], like: Member | None = None) -> list[FamilyMember]:
        """Make members, each proved to compute what the masked full model does.

        Args:
            wanted: The target of each, and the atoms that it keeps.
            like: The member from which they are cut and whose buffers they get; by default the full network.

        Raises:
            ShrinkError: The class cannot express a member.
            VerificationError: A member computes something else.
        """
        here = self.analysis.of(self.analysis.model)
        model = here.model
        later = left_since(here.state, model, here.example, here.names)
        built = rewording(model, ShrinkError, "the members of its family were built", "the analysis is done")
        found: list[FamilyMember] = []
        with built, undone(later), preserved(model):
            for target, kept in wanted:
                found.append(self._made(here, target, kept, like))
        return found

    def _made(self, here: Analysis, target: Any, kept: Kept, like: Member | None) -> FamilyMember:
        def source_of(kept: Kept) -> Source:
            copy = masked(here.model, here.partition, here.groups, kept, like)
            return Source(copy, here.example, here.partition, self.own, kept)

        source, needed = without_needed(source_of(kept))
        source = source_of(source.kept) if needed else source  # what stays is not zero
        cost = here.cost({name: len(atoms) for name, atoms in source.kept.items()})
        notes = tuple(f"{name} stays, more than its target asks for: its class cannot do without it" for name in needed)
        return FamilyMember(target, source.kept, cost, Member.of(source), notes=notes)

    def built(self, member: FamilyMember, build: Build) -> Subnet:
        """The slim model of a member, verified against the masked full model. It owns its memory."""
        analysis = self.analysis
        copy = masked(analysis.model, analysis.partition, analysis.groups, member.kept, member.part)
        subnet = build_subnet(analysis, copy.eval(), build, None, member.kept)
        return replace(subnet, notes=(*subnet.notes, *member.notes))


def found_in(members: Sequence[FamilyMember], asked: Any) -> int:
    """The index of a member that is given by its target or its index.

    Raises:
        OptionError: There is no such member.
    """
    if type(asked) is int and -len(members) <= asked < len(members):
        return asked % len(members)
    for index, member in enumerate(members):  # a target in MACs may be an int, too
        if member.target == asked and isinstance(member.target, int) == isinstance(asked, int):
            return index
    raise OptionError(
        f"this family has no member {asked!r}\n"
        f"  to fix  one of {some([repr(m.target) for m in members])}, or an index from 0, the largest, to"
        f" {len(members) - 1}"
    )


def levels_of(kepts: Iterable[Kept], full: Kept) -> dict[str, NDArray[np.int64]]:
    """For each group, how many members keep each of its atoms."""
    levels = {name: np.zeros(len(atoms), dtype=np.int64) for name, atoms in full.items()}
    for kept in kepts:
        for name, atoms in kept.items():
            levels[name][atoms] += 1
    return levels


@dataclass(frozen=True, eq=False)
class Sorted:
    """The full weights, sorted so that atoms that most members keep come first, which makes members views of them.

    Attributes:
        store: The full network with sorted weights; ``None`` if it computes something else.
        orders: For each group, the atoms in sorted order.
    """

    maker: Maker
    store: nn.Module | None
    orders: Mapping[str, NDArray[np.int64]]

    @classmethod
    def of(cls, maker: Maker, members: Sequence[FamilyMember]) -> Sorted:
        """Sort a copy of the full weights, and prove that it computes the same."""
        levels = levels_of((one.kept for one in members[1:]), members[0].kept)
        orders = {name: np.argsort(-own, kind="stable") for name, own in levels.items()}
        here, store = maker.analysis.of(maker.analysis.model), None
        try:
            with preserved(here.model):
                source = Source(here.model, here.example, here.partition, maker.own, members[0].kept)
                store = sorted_copy(here.model, source, orders).eval()
                require(check(here.model, store, here.example, left=source.left))
        except (VerificationError, ShrinkError, EmitterError):
            store = None  # a class in which the position of an atom matters
        return cls(maker, store, orders)

    def module(self, member: FamilyMember) -> nn.Module:
        """A member as views of the store; if that is impossible, a copy, with a warning."""
        here = self.maker.analysis.of(self.maker.analysis.model)
        why = "its network computes something else when its atoms are in another order"
        if self.store is not None:
            try:
                return self._view(member, here)
            except (VerificationError, EmitterError) as failure:
                why = first_line(failure)
        warnings.warn(
            f"member {member.target} is a copy: {why}\n  effect  it takes {member.cost.bytes:,} bytes of its own\n"
            "  to fix  nothing, if there is room for it; it computes the same",
            CopiedWarning,
            stacklevel=users_level(),
        )
        return self.maker.built(member, Build()).model

    def _view(self, member: FamilyMember, here: Analysis) -> nn.Module:
        assert self.store is not None
        with preserved(here.model):
            zeroed = masked(here.model, here.partition, here.groups, member.kept, member.part).eval()
            source = Source(self.store, here.example, here.partition, self.maker.own, member.kept)
            view = view_of(self.store, zeroed, source, self.orders)
        if view.copied:
            warnings.warn(
                f"of member {member.target}, {some(view.copied)} {'are' if len(view.copied) > 1 else 'is'} no view of"
                " the full weights: what is kept does not lie at the front of a dimension\n"
                f"  effect  copies take {view.copied_bytes:,} bytes of {member.cost.bytes:,}\n"
                "  to fix  nothing, if there is room for them; OTO(..., skip_patterns=[...]) keeps these whole",
                CopiedWarning,
                stacklevel=users_level(),
            )
        return view.net


def save(maker: Maker, members: Sequence[FamilyMember], subnets: Sequence[Subnet], out_dir: Path) -> None:
    """Save a family in one artifact; see :func:`oto.io.family.save_family`."""
    here = maker.analysis.of(maker.analysis.model)
    source = Source(here.model, here.example, here.partition, maker.own, members[0].kept)
    parts: list[ToSave] = []
    for member, subnet in zip(members, subnets, strict=True):
        said = {
            "target": member.target,
            "emitter": subnet.emitter,
            "notes": list(subnet.notes),
            "checks": [vars(one) for one in subnet.checks],
            "cost": {"before": vars(subnet.cost_before), "after": vars(subnet.cost_after)},
            "trained": member.trained,
            "score": member.score,
        }
        parts.append(ToSave(subnet.model, pruned_shapes(here.partition, subnet.kept), said))
    levels = levels_of((subnet.kept for subnet in subnets[1:]), members[0].kept)
    built = rewording(here.model, ArtifactError, "its family was saved and loaded again", "all members were verified")
    with built, preserved(here.model):
        save_family(out_dir, source, parts, levels)


def has_norms(member: FamilyMember) -> bool:
    """Whether a member has batch norms that keep statistics."""
    return member.part is not None and bool(_norms(member.part.net))


def _norms(net: nn.Module) -> list[Norm]:
    return [m for m in net.modules() if isinstance(m, Norm) and m.running_mean is not None]


@torch.no_grad()
def estimate_norms_(
    member: FamilyMember,
    parameters: Mapping[str, Tensor],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any],
) -> bool:
    """Average the statistics of a member's batch norms over batches; returns whether it has batch norms."""
    if member.part is None:
        raise OptionError("the full network has its statistics from training\n  to fix  name another member")
    part = member.part
    norms = _norms(part.net)
    if not norms:
        return False
    modes = [(module, module.training) for module in part.net.modules()]
    momenta = [norm.momentum for norm in norms]
    part.net.eval()
    for norm in norms:
        norm.train()
        norm.momentum = None  # the mean over all batches
        norm.reset_running_stats()
    try:
        for batch in batches:
            part.run(parameters, lambda net, given=batch: forward(net, given))  # type: ignore[misc]
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    return True
