"""HESSO-CRIC: the corrective redundancy identification cycle (arXiv 2409.09085).

A score measures the importance of a zero-invariant group (ZIG) at its current value. A group may score low there and
still be indispensable, which only becomes visible on the way to zero. Therefore CRIC scales groups to zero and restores
them before anything is removed. After ``start_pruning_step`` steps:

1. *Layer sensitivity.* For each share in ``PROBES``, the least important atoms of every node group are scaled by one
   half for one step. The gradient at that point shows how much each node group contributes to the change of the loss.
2. *Cycles.* The ``violating`` set V holds the ZIGs that would be removed by the scores so far. In a *walk*, it is
   scaled to zero over ``sampling_steps`` steps, at each of which every group is scored; then its entries are restored.
   V is added to the ``historical`` set H. The next V is what would be removed by the new scores and is not in H. The
   cycles end when V has at most ``tolerance`` ZIGs, or after ``max_cycles``.
3. *Hybrid training.* HESSO's periods, in which redundant groups are chosen and shrunk to exactly zero. The score of a
   group that was walked is raised by the amount by which its score on the walk exceeded its score before.

Termination: every cycle except the last adds a new ZIG to H, so there are at most as many cycles as ZIGs.

A sample on a walk is the criterion of the entries *before* the walk with the gradient *during* it. For
``taylor_first_order`` at ``x(α) = α x`` this is ``|<x, g(α x)>|``, whose average over the walk estimates the change of
the loss from ``x`` to zero, ``∫ <x, g(α x)> dα``, whatever the curvature. Samples are divided by their mean over all
groups, since a network without V has larger gradients everywhere.

Where we differ from the released code, and why:

* Released code is off by one: it sets V to zero at the first step of a cycle, so there is no walk.
* The next V is formed once, at the end of a walk, from the averages; released code adds the lowest groups of a single
  batch at each step.
* The loss is not needed: sensitivity is a midpoint rule on gradients, so there is no closure, and one step measures all
  node groups. Released code takes two steps for each node group and share.
* Redundant groups are removed in as many portions as in HESSO, each chosen by the walks and by scores of the current
  period. As published, all are chosen at once; ``pruning_periods=1`` does that.
* Probes and walks only measure, and nothing is trained during them. Otherwise all other parameters would adapt to a
  network without groups that are about to be restored. Released code continues to train, and restores a full copy of
  the weights after each cycle. Here only the entries of V are copied: at most the share of weights to be removed.
  Probes need no copy, since halving a number and doubling it is exact. Batch-norm statistics are affected by both.
* All state is in checkpoints, also in the middle of a cycle. Only with parameters sharded over processes, a checkpoint
  can be saved between walks only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor

from oto.errors import OTOError, TargetError
from oto.groups.cost import Costs
from oto.groups.node_group import NodeGroup
from oto.optim.entries import Rows
from oto.optim.hesso import HESSO
from oto.optim.options import CycleOptions, HESSOCRICOptions, besides
from oto.optim.plan import FREE, PRUNED, REDUNDANT, rows_of
from oto.optim.saliency import Entries, importance, raw_scores
from oto.optim.schedule import Schedule, count_steps
from oto.optim.setup import schedule_of
from oto.optim.sums import put_aside
from oto.optim.target import Measure
from oto.optim.wrapped import Params
from oto.shards import any_sharded

PROBES = (0.25, 0.5, 0.75)
"""The shares of each node group's atoms that are probed."""

SAMPLING_STEPS, MAX_CYCLES = 0.02, 10

PUT_BACK = " put back; nothing is trained"
LATEST = "these are the latest steps: as soon as a walk finds nothing new, pruning begins"
_ON_A_WALK = (
    "a walk is under way, and what it put aside is spread over processes\n"
    "  effect  a checkpoint would hold a part of it; nothing was saved\n"
    "  to fix  save when the walk is over: in {} steps"
)


class HESSOCRIC(HESSO):
    """HESSO that first scales groups to zero and back to score them; see the module docstring for the algorithm.

    Args:
        params: As in :class:`HESSO`, and so are all options that are not named here.
        node_groups: Node groups of the model.
        sampling_steps: Number of steps of each walk; a float in [0, 1] is a share of ``total_steps``.
        max_cycles: Maximum number of walks.
        tolerance: The cycles end when at most this many new ZIGs would be removed.
        sensitivity: The weight of a layer's sensitivity, relative to the importance of a ZIG; 0 skips the probes.
        start_pruning_step, pruning_steps, pruning_periods, total_steps: As in :class:`HESSO`. Pruning takes place
            after the cycles, at ``start_pruning_step`` plus at most the steps of probes and walks.

    Raises:
        TargetError: No criterion uses gradients, so a walk would have no effect; an option is invalid; or as in
            :class:`HESSO`.
    """

    def __init__(
        self,
        params: Params,
        node_groups: Iterable[NodeGroup],
        *,
        costs: Costs | None = None,
        latency: Measure | None = None,
        **options: Unpack[HESSOCRICOptions],
    ) -> None:
        steps = options.get("sampling_steps", SAMPLING_STEPS)
        self.first_step = schedule_of(options).start
        self.sampling_steps = count_steps("sampling_steps", steps, options.get("total_steps"))
        if self.sampling_steps == 0 and float(steps) > 0:  # a share of a few steps is at least one
            self.sampling_steps = 1
        self.max_cycles, self.tolerance = options.get("max_cycles", MAX_CYCLES), options.get("tolerance", 0)
        self.sensitivity = options.get("sensitivity", 1.0)
        if self.sampling_steps < 1:
            raise TargetError(f"sampling_steps is {steps}, which is less than one step; a walk needs some")
        if self.max_cycles < 1 or self.tolerance < 0 or self.sensitivity < 0:
            raise TargetError(
                f"max_cycles={self.max_cycles}, tolerance={self.tolerance}, sensitivity={self.sensitivity}: at least"
                " one cycle is walked, and the others are not negative"
            )
        super().__init__(params, node_groups, costs=costs, latency=latency, **besides(options, CycleOptions))
        if not self.choice.averaged:
            raise TargetError(
                "no criterion of saliency looks at gradients, so a walk to zero would show nothing\n"
                "  to fix  leave saliency out, or add taylor_first_order; HESSO needs no gradients"
            )

    # The clock: probes, then cycles, then the schedule of HESSO, which begins when the cycles end ---------------------

    @property
    def _probes(self) -> int:
        """Number of probing steps; the first one only scales, and the last one only reads."""
        return 1 + len(PROBES) if self.sensitivity and self.node_groups else 0

    @property
    def walk(self) -> dict[str, Any]:
        """The state of the cycles, stored in the first parameter group."""
        found: dict[str, Any] = self.param_groups[0]["oto_walk"]
        return found

    @property
    def cycle(self) -> int:
        """Number of walks that have begun."""
        cycle: int = self.walk["cycle"]
        return cycle

    def plan(self) -> str:
        """As in :class:`HESSO`, with the probes and walks before pruning."""
        if not self.choice.target.wants_less or self.walk["over"]:
            return super().plan()
        first, walks = self.first_step, self.first_step + self._probes
        probe = "probes: how much the loss depends on each layer; nothing is trained"
        walk = (
            f"at most {self.max_cycles} walks of {self.sampling_steps} steps: groups go to zero to be scored, and are"
        )
        before = [(0, first, "ordinary steps"), (first, walks, probe), (walks, self.schedule.start, walk + PUT_BACK)]
        target, *_, rate = super().plan().splitlines()
        return "\n".join([target, *self.schedule.lines(before), LATEST, rate])

    def sparse_step(self, t: int) -> None:
        """Take an ordinary step, a probe, a step of a walk, or a step of HESSO."""
        if not self.choice.target.wants_less or self.walk["over"]:
            super().sparse_step(t)
            return
        at = t - self.first_step
        if at < 0:
            self.observe(-at)
            self.descend()
        elif at < self._probes:
            self._probe(at)
        else:
            self._walk((at - self._probes) % self.sampling_steps, t)

    def _fill_state(self) -> None:
        super()._fill_state()
        if "oto_walk" not in self.param_groups[0]:
            n, criteria, device = self.num_atoms, len(self.choice.averaged), self.atoms.device
            mask = torch.zeros(n, dtype=torch.bool, device=device)
            self.param_groups[0]["oto_walk"] = {
                "cycle": 0,
                "over": False,
                "over_at": 0,
                "violating": mask,
                "historical": mask.clone(),  # its own memory: a distributed checkpoint is loaded into both
                "saved": [],
                "still": torch.zeros(criteria, n, device=device),
                "still_seen": torch.zeros(n, device=device),
                "walked": torch.zeros(criteria, n, device=device),
                "sensitivity": torch.zeros(len(self.node_groups), device=device),
            }
        self.schedule = self.schedule_in(self.param_groups[0])

    def schedule_in(self, first: Mapping[str, Any]) -> Schedule:
        """The schedule of a run, which starts when the walks end; until then, at the latest possible end of the walks.

        Raises:
            TargetError: Pruning could outlast training.
        """
        latest = self.first_step + self._probes + self.max_cycles * self.sampling_steps
        total = self.schedule.total_steps
        if total is not None and not first["oto_walk"]["over"] and latest + self.schedule.steps > total:
            raise TargetError(
                f"pruning would last from step {latest} to step {latest + self.schedule.steps - 1}, after probes and at"
                f" most {self.max_cycles} walks of {self.sampling_steps} steps, but training ends after"
                f" total_steps={total}\n"
                "  effect  groups would be left that never reach zero\n"
                f"  to fix  {_shorter(self, latest + self.schedule.steps - total)}"
            )
        return replace(self.schedule, start=first["oto_walk"]["over_at"] if first["oto_walk"]["over"] else latest)

    def describe_setup(self) -> dict[str, Any]:
        """As in :class:`HESSO`, with the options of the cycles, and the first probing step as start."""
        return super().describe_setup() | {
            "start_pruning_step": self.first_step,
            "sampling_steps": self.sampling_steps,
            "max_cycles": self.max_cycles,
            "tolerance": self.tolerance,
            "sensitivity": self.sensitivity,
        }

    def state_dict(self) -> dict[str, Any]:
        """As in :class:`HESSO`.

        Raises:
            OTOError: Parameters are sharded over processes, and a walk is under way.
        """
        if self.walk["saved"] and any_sharded(self.parameters().values()):
            at = (self.clock - self.first_step - self._probes) % self.sampling_steps
            raise OTOError(_ON_A_WALK.format(self.sampling_steps - at))
        return super().state_dict()

    def _keep_atoms(self, left: Tensor) -> None:
        super()._keep_atoms(left)
        per_atom = ("violating", "historical", "still", "still_seen", "walked")
        self._now(**{name: self.walk[name][..., left] for name in per_atom})

    def _now(self, **known: Any) -> None:
        """Replace entries of the walks' state. Tensors are never modified in place, so saved states do not change."""
        self.param_groups[0]["oto_walk"] = self.walk | known

    # Probes ----------------------------------------------------------------------------------------------------------

    def _probe(self, at: int) -> None:
        """Evaluate the probe of the previous step, and scale the atoms of the next one."""
        if at > 0:
            self._read_probe()
            self.scale_redundant_(2.0)  # restores the former values exactly, so no copy is needed
            self._redundant(None)
        if at < len(PROBES):
            self._redundant(self._lowest(self.scores(), PROBES[at]))
            self.scale_redundant_(0.5)

    def _lowest(self, scores: Tensor, share: float) -> Tensor:
        """The least important atoms of every node group, bool, shape ``(N,)``."""
        return torch.cat(
            [
                torch.zeros_like(own, dtype=torch.bool).index_fill_(
                    0, own.argsort(stable=True)[: max(round(share * len(own)), 1)], True
                )
                for own in scores.split_with_sizes(self.choice.sizes)
            ]
        )

    def _read_probe(self) -> None:
        """Add the sensitivity of each group, per atom: ``|Σ <x, g>| / atoms`` at half of ``x``."""
        probed = (self.atoms == REDUNDANT).split_with_sizes(self.choice.sizes)
        sensitivity = self.walk["sensitivity"]
        changes = [
            torch.where(own.to(entries.dot.device), 2 * entries.dot, 0).sum().abs().to(sensitivity) / own.sum()
            for own, entries in zip(probed, self.entries(), strict=True)
        ]
        self._now(sensitivity=sensitivity + torch.stack(changes) / len(PROBES))

    # Walks -----------------------------------------------------------------------------------------------------------

    def _walk(self, t: int, n: int) -> None:
        """Step ``t`` of a walk: score all groups, and scale V further towards zero; restore it at the end.

        Args:
            n: The step of training.
        """
        if t == 0:
            first = self.cycle == 0
            self._put_aside(
                self.choice.select(self.scores(), self.atoms != PRUNED) if first else self.walk["violating"]
            )
            self._now(cycle=self.cycle + 1)
        self._sample(first=t == 0)
        left = self.sampling_steps - t
        if left > 1:
            self.scale_redundant_((left - 1) / left)
        else:
            self._end_walk(n)

    def _sample(self, first: bool) -> None:
        """Score every group relative to the mean of all groups, since a walk raises all other scores alike."""
        entries = list(self._entries_before())
        seen = torch.stack([raw_scores(entries, criterion, self.atoms.device) for criterion in self.choice.averaged])
        walk, violating = self.walk, self.atoms == REDUNDANT
        seen = _relative(seen, self.atoms != PRUNED)
        whole = ~violating | first  # before the first step of a walk, nothing is scaled
        self._now(
            still=walk["still"] + torch.where(whole, seen, 0),
            still_seen=walk["still_seen"] + whole,
            walked=walk["walked"] + torch.where(violating, seen, 0),
        )

    def _end_walk(self, n: int) -> None:
        """End a walk. The next violating set is what would be removed now and was never walked."""
        self._now(historical=self.walk["historical"] | (self.atoms == REDUNDANT))
        self._put_back()
        lowest = self.choice.select(self._known(), self.atoms != PRUNED).to(self.atoms.device)
        violating = lowest & ~self.walk["historical"]
        over = self.cycle >= self.max_cycles or int(violating.sum()) <= self.tolerance
        self._now(violating=violating, over=over, over_at=n + 1)
        if over:
            self.schedule = replace(self.schedule, start=n + 1)

    def scores(self) -> Tensor:
        """Importance of every atom, shape ``(N,)``; after the walks, corrected by their samples."""
        return self._known() if self.walk["over"] else super().scores()

    def _known(self) -> Tensor:
        """Importance by current scores; for groups that were walked, plus the excess of their scores on the walk."""
        walk, alive, first, choice = self.walk, self.atoms != PRUNED, self.param_groups[0], self.choice
        still = walk["still"] / walk["still_seen"].clamp(min=1)
        now = first["oto_sums"] if walk["over"] and first["oto_seen"] else still
        entries = self.entries()
        averages = dict(zip(choice.averaged, now, strict=True))
        scores = choice.scores(entries, alive, averages)
        self.check_scores(entries, averages, scores)
        weights = torch.tensor([weight for c, weight in choice.criteria if c in choice.averaged]).to(still)
        total = sum(weight for _, weight in choice.criteria)
        beyond = (weights / total) @ (walk["walked"] / self.sampling_steps - still)
        known: Tensor = (_relative(scores, alive) + walk["historical"] * beyond).clamp(min=0)
        if not self.sensitivity:
            return known
        sizes = torch.tensor(choice.sizes, device=alive.device)
        sensitivity = walk["sensitivity"].repeat_interleave(sizes, output_size=len(alive))
        return importance([known, sensitivity], [1.0, self.sensitivity], alive, [len(alive)], "mean")

    # Atoms that are scaled to zero and restored ----------------------------------------------------------------------

    def _put_aside(self, chosen: Tensor) -> None:
        """Copy the entries of some atoms, and mark these so that they can be scaled."""
        self._redundant(chosen)
        self._now(saved=self._redundant_rows().copies())

    def _put_back(self) -> None:
        self._redundant_rows().copy_(self.walk["saved"])
        self._redundant(None)
        self._now(saved=[])

    def _redundant(self, chosen: Tensor | None) -> None:
        """Mark these atoms as redundant, and no others, so that only they are scaled."""
        none = torch.full_like(self.atoms, FREE)
        self.atoms = none if chosen is None else torch.where(chosen.to(none.device), REDUNDANT, none)

    def _redundant_rows(self) -> Rows:
        """The entries of redundant atoms."""
        return Rows.of(self.node_groups, [rows_of(own, REDUNDANT) for own in self._codes()], self.parameters())

    def _entries_before(self) -> Iterator[Entries]:
        """The entries before the walk, with the gradients at their current values."""
        parameters = self.parameters()
        if any_sharded(parameters.values()):
            chosen = [rows_of(own, REDUNDANT) for own in self._codes()]
            aside = put_aside(self.node_groups, chosen, parameters, self.walk["saved"])
            yield from replace(self.sums(parameters, self.maximized()), aside=aside).entries()
            return
        saved = iter(self.walk["saved"])
        for own, entries in zip(self._codes(), self.entries(), strict=True):
            rows = rows_of(own, REDUNDANT)
            if len(rows):
                weights = [w.index_copy(0, rows.to(w.device), next(saved).to(w.dtype)) for w in entries.weights]
                entries = replace(entries, weights=weights)
            yield entries


def _relative(scores: Tensor, alive: Tensor) -> Tensor:
    """Scores divided by their mean over the remaining atoms, shape ``(..., N)``."""
    mean = (scores * alive).sum(-1, keepdim=True) / alive.sum()
    return scores / mean.clamp(min=torch.finfo(scores.dtype).tiny)


def _shorter(optimizer: HESSOCRIC, over: int) -> str:
    """Options with which pruning ends ``over`` steps earlier, for a message."""
    cycles = optimizer.max_cycles - -(-over // optimizer.sampling_steps)
    ways = [f"max_cycles={cycles} or fewer"] if cycles >= 1 else []
    ways += [f"start_pruning_step={optimizer.first_step - over} or less"] if over <= optimizer.first_step else []
    least = optimizer.schedule.steps - over
    ways += [f"pruning_steps={least} or fewer"] if least >= optimizer.schedule.periods else []
    return ", or ".join(ways) or f"train for {over} more steps, or fewer and shorter walks (max_cycles, sampling_steps)"
