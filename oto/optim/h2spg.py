"""H2SPG: hierarchical half-space projected gradient (OTOv3, arXiv 2312.09411).

With G the segments (:mod:`oto.groups.segments`), whose removal leaves a network, and K of them to go::

    minimize f(x)   such that   K segments of G are zero, and the network without them is valid

    stage 1, warm-up and hierarchical search, until partition_step:
        x <- x - α d                                        the wrapped optimizer's step
        score_g <- the average of g's score over the steps
        G_r <- ∅
        for g in G, the most redundant (the lowest score) first:
            G_r <- G_r ∪ {g}    if the network without G_r ∪ {g} is valid; else g is kept
            stop when |G_r| = K
    stage 2, hybrid training:
        g not in G_r:           the same step
        g in G_r:               x̂_g = x_g - α (d_g + λ_g x_g / ||x_g||)      λ_g by the rule of DHSPG
                                x_g <- 0 if <x̂_g, x_g> < ε ||x_g||², else x̂_g

Valid is what the trial removal finds after each one: every input is read, every joint has something to give
(:func:`oto.groups.segments.legal` puts nothing back), and every run of repeated blocks keeps ``min_depth`` of them.
What that asks for stands in ``among`` of the segments' node groups. Ranking alone could take the network apart.

Where we differ from the paper, and why:

* Stage 2 is that of :mod:`oto.optim.dhspg`, whose rule for λ the paper takes, so the target is met exactly: what has
  not left its half-space by the last period shrinks to zero in it.
* A target may be any of the library's, of segments alone or beside channels. Then what goes is chosen by
  :mod:`oto.optim.choice` at the exact cost of each, which keeps the same sets of segments together; the search above is
  that of ``target_segments=K``.
* Scores are the library's; ``saliency="dhspg"`` are those of the paper. What depends on the batch (gradients) is
  averaged over all steps until the search, by a mean, not one that forgets; what does not is that of the search.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor

from oto.errors import OptionError, TargetError
from oto.groups.cost import Costs
from oto.groups.node_group import NodeGroup
from oto.optim.dhspg import DHSPG
from oto.optim.options import H2SPGOptions, SearchOptions, besides
from oto.optim.target import Measure
from oto.optim.wrapped import Params


class H2SPG(DHSPG):
    """Search what may go by trial removal, penalize and project it; the module has the algorithm.

    With ``target_macs=1.0`` every step is, bit for bit, that of the wrapped optimizer.

    Args:
        params: As in :class:`HESSO`, and so are all options that are not named here. ``saliency="dhspg"`` scores as
            published.
        node_groups: Node groups of the model, of an ``OTO(..., compress_mode="erase")`` or ``"both"``.
        target_segments: How many segments go, as published, in place of the other targets; of ``"erase"``. Those that
            a layout lets go together, such as those of a layer, count as one.
        lmbda, lmbda_amplify, hat_lmbda_coeff, epsilon, partition_step, half_space_step, warm_up_steps: As in
            :class:`DHSPG`.
        average_steps: Over how many steps until the search scores are averaged; by default all of them.

    Raises:
        OptionError: An option means nothing or has no effect; or there is no segment to search.
        TargetError: Fewer than ``target_segments`` may go; or as in :class:`DHSPG`.
    """

    def __init__(
        self,
        params: Params,
        node_groups: Iterable[NodeGroup],
        *,
        costs: Costs | None = None,
        latency: Measure | None = None,
        **options: Unpack[H2SPGOptions],
    ) -> None:
        node_groups, number = tuple(node_groups), options.get("target_segments")
        own = besides(options, SearchOptions)
        if options.get("saliency") == "dhspg":
            own["tolerance_group_sparsity"] = 0.0  # the search says exactly what goes
        if number is not None:
            if all(own.get(name) is None for name in own if name.startswith("target_")):
                own["target_group_sparsity"] = _share(node_groups, number)
            else:
                raise TargetError(
                    "target_segments and another target are given; exactly one is needed\n  to fix  give one of them"
                )
        self.target_segments = number
        super().__init__(params, node_groups, costs=costs, latency=latency, **own)
        if options.get("average_steps") is None:
            self.choice = replace(self.choice, average_steps=self.schedule.start + 1)
        if number is not None:
            self._require_possible(number)

    def _require_possible(self, number: int) -> None:
        gone = self.search(torch.zeros(self.num_atoms)).tolist()
        own = [_unit(group) for group in self.node_groups]
        most = len({unit for unit, away in zip(own, gone, strict=True) if away})
        if most < number:
            raise TargetError(
                f"target_segments is {number}, and without more than {most} of {len(set(own))} segments the network"
                f" would come apart, or a run be shorter than min_depth\n  effect  nothing was made\n"
                f"  to fix  at most target_segments={most}, or a smaller min_depth"
            )

    def partition(self) -> None:
        """G_r is redundant from now on."""
        if self.target_segments is None or not self.choice.target.wants_less:
            super().partition()
            return
        self._record_cost()
        self.mark_redundant(self.search(self.scores()))

    def search(self, scores: Tensor) -> Tensor:
        """G_r by trial removal, bool, shape ``(N,)``, on the CPU.

        Args:
            scores: Importance of every segment, shape ``(N,)``; the lowest are the most redundant.
        """
        units: dict[str, list[int]] = {}
        for i, group in enumerate(self.node_groups):
            units.setdefault(_unit(group), []).append(i)
        score = torch.stack([scores.cpu()[own].mean() for own in units.values()])
        together = list(units.values())
        removed: list[list[int]] = []
        for i in score.argsort(stable=True).tolist():
            if len(removed) == self.target_segments:
                break
            if self.is_valid_without([self.node_groups[j].name for own in (*removed, together[i]) for j in own]):
                removed.append(together[i])
        chosen = torch.zeros(self.num_atoms, dtype=torch.bool)
        chosen[[i for own in removed for i in own]] = True
        return chosen

    def is_valid_without(self, names: Collection[str]) -> bool:
        """Whether of every set of segments of which some have to stay as many do without these."""
        sets = Counter[tuple[str, int]]()
        for group in self.node_groups:
            sets.update(dict.fromkeys(group.among, int(group.name not in names)))
        return all(left >= number for (_, number), left in sets.items())

    def describe_setup(self) -> dict[str, object]:
        """As in :class:`DHSPG`, with the number of segments."""
        return super().describe_setup() | {"target_segments": self.target_segments}


def _unit(group: NodeGroup) -> str:
    """What a segment goes together with: its tie, or it goes alone."""
    return group.tie or group.name


def _share(node_groups: Sequence[NodeGroup], number: int) -> float:
    """The share of the segments that a number of them is.

    Raises:
        OptionError: There are no segments, or channels that may go, too.
        TargetError: It is no number of segments.
    """
    groups = [group for group in node_groups if group.prunable and group.size]
    if not groups or not all(group.segment for group in groups):
        raise OptionError(
            f"target_segments={number} counts segments, and {'channels may go, too' if groups else 'there are none'}\n"
            "  effect  nothing was made\n"
            "  to fix  OTO(model, dummy_input, compress_mode='erase'), or a target such as target_macs=0.5"
        )
    units = len(set(map(_unit, groups)))
    if type(number) is not int or not 0 <= number < units:
        raise TargetError(
            f"target_segments is {number!r}; it is how many of the {units} segments go, and one stays\n"
            f"  to fix  a whole number from 0 to {units - 1}"
        )
    return number / units + 0.5 / len(groups) if number else 0.0
