"""H2SPG: hierarchical half-space projected gradient (OTOv3, arXiv 2312.09411).

With G the segments (:mod:`oto.groups.segments`), parts of the network that can be removed, and K of them to remove::

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

The network is valid if every input is read, every joint has an argument (:func:`oto.groups.segments.legal` adds
nothing), and every run of repeated blocks keeps ``min_depth`` of them. These conditions are in ``among`` of the
segments' node groups; the search checks them after each trial removal. Removing segments by rank alone could disconnect
the network.

Where we differ from the paper, and why:

* Stage 2 is that of :mod:`oto.optim.dhspg`, whose rule for λ the paper uses, so the target is met exactly: groups that
  have not left their half-spaces by the last period are shrunk to zero in it.
* Any target of the library is accepted, for segments alone or together with channels. Then :mod:`oto.optim.choice`
  chooses by the exact cost of each segment, under the same conditions; the search above is used with
  ``target_segments=K``.
* Scores are the library's; ``saliency="dhspg"`` gives those of the paper. Criteria that depend on the batch (gradients)
  are averaged over all steps until the search, by a plain mean instead of a moving average; others are computed at the
  search.
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
    """Find segments to remove by trial removal, penalize and project them; see the module docstring.

    With ``target_macs=1.0`` every step is, bit for bit, that of the wrapped optimizer.

    Args:
        params: As in :class:`HESSO`, and so are all options that are not named here. ``saliency="dhspg"`` scores as
            published.
        node_groups: Node groups of the model, of an ``OTO(..., compress_mode="erase")`` or ``"both"``.
        target_segments: Number of segments to remove, as published, instead of another target; only with
            ``compress_mode="erase"``. Segments that a layout ties together, such as those of one layer, count as one.
        lmbda, lmbda_amplify, hat_lmbda_coeff, epsilon, partition_step, half_space_step, warm_up_steps: As in
            :class:`DHSPG`.
        average_steps: Number of steps before the search over which scores are averaged; by default all of them.

    Raises:
        OptionError: An option is invalid or has no effect; or ``target_segments`` is given, and not all prunable node
            groups are segments.
        TargetError: Fewer than ``target_segments`` can be removed; it is given with another target; or as in
            :class:`DHSPG`.
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
            own["tolerance_group_sparsity"] = 0.0  # the search determines exactly what is removed
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
        """Mark G_r as redundant."""
        if self.target_segments is None or not self.choice.target.wants_less:
            super().partition()
            return
        self._record_cost()
        self.mark_redundant(self.search(self.scores()))

    def search(self, scores: Tensor) -> Tensor:
        """Find G_r by trial removal.

        Args:
            scores: Importance of every segment, shape ``(N,)``; the lowest are the most redundant.

        Returns:
            The segments to remove, bool, shape ``(N,)``, on the CPU.
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
        """Whether every set of segments keeps as many members as it needs if these are removed."""
        sets = Counter[tuple[str, int]]()
        for group in self.node_groups:
            sets.update(dict.fromkeys(group.among, int(group.name not in names)))
        return all(left >= number for (_, number), left in sets.items())

    def describe_setup(self) -> dict[str, object]:
        """As in :class:`DHSPG`, with the number of segments."""
        return super().describe_setup() | {"target_segments": self.target_segments}


def _unit(group: NodeGroup) -> str:
    """The name of the unit in which a segment is removed: its tie, or its own name."""
    return group.tie or group.name


def _share(node_groups: Sequence[NodeGroup], number: int) -> float:
    """Convert a number of segments to ``target_group_sparsity``.

    Raises:
        OptionError: There are no segments, or prunable node groups that are not segments.
        TargetError: ``number`` is not an integer from 0 to the number of segments minus one.
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
