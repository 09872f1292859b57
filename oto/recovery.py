"""Continue training after pruning: a re-warmed learning rate, and data chosen to recover what was lost.

    schedule = rewarmed(optimizer, steps)                              # a torch scheduler; step it after each step
    mixed = replay(new, old)                                           # 5 % of the samples are old ones
    for batch in mixed.loader(batch_size=8): ...
    mixed.update(source_losses(model, held, loss), before)             # every few hundred steps

* **Re-warming, re-decaying, replay**: Ibrahim et al., Simple and Scalable Strategies to Continually Pre-train Large
  Language Models, arXiv 2403.08763. The rate rises linearly over 1 % of the steps (0 to 2 % made no difference) to the
  largest rate of pre-training, then falls along a cosine to a tenth of it. 5 % of the samples are old data if the new
  ones are similar, 25 % if they differ much, out of the same budget; 1 % already helps. For distillation, NVIDIA takes
  a fifth of pre-training's largest rate.
* **Data by loss**: Sheared-LLaMA (Xia et al., arXiv 2310.06694) raises the shares of sources whose loss is above a
  reference. LoRAShear (Chen et al., arXiv 2310.18356) draws more from sources that pruning has hurt more, and keeps
  some of each; that is the same method with the full model's losses as the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler

from oto.errors import OptionError, some

WARMUP, FLOOR = 0.01, 0.1
"""The share of the steps over which the learning rate rises, and the share of its maximum with which it ends."""

WEAK, STRONG = 0.05, 0.25
"""The share of old data if new data are similar, and if they differ much."""

SMOOTHING = 1e-4
"""The share that is spread evenly over all sources, so that none vanishes (as in Sheared-LLaMA's released code)."""


# --- learning rate ----------------------------------------------------------------------------------------------------


@dataclass
class Rewarmed:
    """The learning rate of a step as a share of the largest: linear up, then a cosine down.

    Steps ``t`` are counted from 1, with ``W = ceil(warmup · steps)`` and ``T = steps``. Up to ``W`` it is ``t / W``,
    then ``floor + (1 - floor) / 2 · (1 + cos(π (t - W) / (T - W)))``, and beyond ``T`` it stays at ``floor``.

    >>> factor = Rewarmed(steps=6, warmup=0.3, floor=0.1)
    >>> [round(factor(step), 3) for step in range(7)]
    [0.5, 1.0, 0.868, 0.55, 0.232, 0.1, 0.1]
    """

    steps: int
    warmup: float = WARMUP
    floor: float = FLOOR

    def __post_init__(self) -> None:
        numbers = all(isinstance(given, Real) for given in (self.steps, self.warmup, self.floor))
        if not numbers or not self.steps >= 1 or not 0 <= self.warmup <= 1 or not 0 <= self.floor <= 1:
            raise OptionError(
                f"steps is {self.steps!r}, warmup {self.warmup!r} and floor {self.floor!r}\n"
                "  effect  there is no such schedule\n"
                "  to fix  at least one step; shares of the steps and of the largest learning rate, in [0, 1]"
            )

    def __call__(self, step: int) -> float:
        """The factor of a step; steps are counted from 0, as schedulers do."""
        t, up = min(step + 1, self.steps), math.ceil(self.warmup * self.steps)
        if t <= up:
            return t / up
        return self.floor + (1 - self.floor) / 2 * (1 + math.cos(math.pi * (t - up) / (self.steps - up)))


def rewarmed(optimizer: torch.optim.Optimizer, steps: int, *, warmup: float = WARMUP, floor: float = FLOOR) -> LambdaLR:
    """A scheduler for the steps after pruning; the optimizer's ``lr`` is the largest rate.

    With a Trainer: ``Trainer(optimizers=(optimizer, rewarmed(optimizer, steps)))``. In lightning
    ``configure_optimizers`` returns ``{"optimizer": optimizer, "lr_scheduler": {"scheduler": rewarmed(optimizer,
    steps), "interval": "step"}}``.

    Args:
        steps: Number of steps.
        warmup: The share of them over which the rate rises.
        floor: The rate at the end, as a share of the largest.

    Raises:
        OptionError: An argument is out of range, or ``optimizer`` is none.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptionError(
            f"optimizer is a {type(optimizer).__name__}, no torch.optim.Optimizer\n"
            "  effect  there are no learning rates to schedule\n"
            "  to fix  pass what oto.hesso(...) returned, or any optimizer of torch"
        )
    return LambdaLR(optimizer, Rewarmed(steps, warmup, floor))


# --- data -------------------------------------------------------------------------------------------------------------


def reweighted(
    shares: Mapping[str, float],
    losses: Mapping[str, float],
    reference: Mapping[str, float],
    smoothing: float = SMOOTHING,
) -> dict[str, float]:
    """Sheared-LLaMA's update: ``w ← w · exp(max(loss - reference, 0))``, divided by the sum of all shares.

    Then ``w ← (1 - smoothing) w + smoothing / n``, as in the released code. That code has no ``max``, so there a source
    with a loss below its reference loses its share faster.

    >>> found = reweighted({"web": 0.5, "books": 0.5}, {"web": 2.0, "books": 3.0}, {"web": 2.5, "books": 2.0}, 0.0)
    >>> {name: round(share, 4) for name, share in found.items()}
    {'web': 0.2689, 'books': 0.7311}

    Raises:
        OptionError: A loss or a reference is missing, or not finite.
    """
    for what, numbers in (("losses", losses), ("reference", reference)):
        if bad := [name for name in shares if not math.isfinite(numbers.get(name, math.nan))]:
            raise OptionError(
                f"{what} has no finite number for {some(bad)}\n  effect  the shares of the sources are as they were\n"
                f"  to fix  a mean loss for each source: {some(shares)}"
            )
    rise = {name: max(losses[name] - reference[name], 0.0) for name in shares}
    top = max(rise.values())  # subtracted below, so that exp does not overflow
    grown = {name: share * math.exp(rise[name] - top) for name, share in shares.items()}
    total = sum(grown.values())
    return {name: (1 - smoothing) * w / total + smoothing / len(grown) for name, w in grown.items()}


def _is_whole(number: Any) -> bool:
    return isinstance(number, Integral)


def _lengths(sources: Any) -> dict[str, int]:
    """The number of samples of each source.

    Raises:
        OptionError: The sources have no names, or one has no length, as what streams has none.
    """
    if not isinstance(sources, Mapping):
        raise OptionError(
            f"the sources are a {type(sources).__name__}; they are datasets by name\n"
            "  effect  there is nothing to draw from\n  to fix  a mapping, such as {'new': new, 'old': old}"
        )
    if without := [name for name, source in sources.items() if not hasattr(source, "__len__")]:
        kinds = some(f"{name} is a {type(sources[name]).__name__}" for name in without)
        raise OptionError(
            f"{kinds}, which has no length\n  effect  it is not known how many samples there are to draw from\n"
            "  to fix  datasets with a length, which give a sample for a number; read some of what streams into a list"
        )
    return {name: len(source) for name, source in sources.items()}


class Mixture(Sampler[int]):
    """Draw samples from several sources, by shares that may change during training.

    This is a sampler for ``mixture.dataset``, the concatenation of the sources. Each draw chooses a source by its
    share, and takes the next sample of a shuffled pass over that source; when all were taken, a new pass begins. All
    processes draw the same sequence, and each takes its part of it.

    Args:
        sources: Datasets with a length, by name.
        shares: The share of each source; they are normalized. By default in proportion to the lengths.
        length: Number of samples in an epoch, over all processes; by default the total length of the sources.
        seed: Seed of the draws.
        rank, world: Which part of the samples this process takes, and the number of processes, if nothing else splits
            the samples. The Trainer of transformers and accelerate do; with lightning, give these and pass
            ``Trainer(use_distributed_sampler=False)``.

    Raises:
        OptionError: A source is empty, or the shares do not fit the sources.

    Example:
        >>> mixed = Mixture({"new": range(100), "old": range(1000, 1010)}, {"new": 0.9, "old": 0.1}, length=8)
        >>> [mixed.dataset[i] for i in mixed]
        [94, 29, 91, 4, 46, 1000, 18, 15]
    """

    def __init__(
        self,
        sources: Mapping[str, Any],
        shares: Mapping[str, float] | None = None,
        *,
        length: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        sizes = _lengths(sources)
        shares = dict(sizes) if shares is None else shares
        if not sizes or not all(sizes.values()):
            raise OptionError(f"the sources have {sizes} samples; none may be empty")
        if not (_is_whole(rank) and _is_whole(world) and 0 <= rank < world):
            raise OptionError(f"rank is {rank!r} and world {world!r}; this is process rank of world, counted from 0")
        if length is not None and not (_is_whole(length) and length > 0):
            raise OptionError(f"length is {length!r}; it is the number of samples in an epoch, at least 1")
        self.dataset: Dataset[Any] = ConcatDataset(sources.values())
        self.sizes, self.length = sizes, sum(sizes.values()) if length is None else length
        self.rank, self.world = rank, world
        self._generator = torch.Generator().manual_seed(seed)
        self._passes: dict[str, list[int]] = {name: [] for name in sizes}
        self.shares = self._checked(shares)

    def _checked(self, shares: Mapping[str, float]) -> dict[str, float]:
        wrong = shares.keys() ^ self.sizes.keys() or [n for n, w in shares.items() if not (0 <= w < math.inf)]
        if wrong or not sum(shares.values()) > 0:
            raise OptionError(
                f"shares={dict(shares)} do not fit the sources {some(self.sizes)}\n"
                "  effect  it is not known what to draw\n  to fix  a number for each, at least 0 and not all 0"
            )
        return {name: shares[name] / sum(shares.values()) for name in self.sizes}

    def __len__(self) -> int:
        return self.length // self.world  # the same for all processes, or one would wait forever

    def __iter__(self) -> Iterator[int]:
        for n in range(len(self) * self.world):
            drawn = self._draw()
            if n % self.world == self.rank:
                yield drawn

    def _draw(self) -> int:
        names, start = list(self.sizes), 0
        weights = torch.tensor(list(self.shares.values()), dtype=torch.float64)
        name = names[int(torch.multinomial(weights, 1, generator=self._generator))]
        if not self._passes[name]:
            self._passes[name] = torch.randperm(self.sizes[name], generator=self._generator).tolist()
        for other in names[: names.index(name)]:
            start += self.sizes[other]
        return start + self._passes[name].pop()

    def update(
        self, losses: Mapping[str, float], reference: Mapping[str, float], smoothing: float = SMOOTHING
    ) -> dict[str, float]:
        """From now on draw more from sources that are worse than their reference (:func:`reweighted`).

        Args:
            losses: The loss of each source on held-out data, the same in all processes (:func:`source_losses`).
            reference: What each loss should reach, such as the full model's loss.

        Returns:
            The new shares.
        """
        self.shares = reweighted(self.shares, losses, reference, smoothing)
        return dict(self.shares)

    def loader(self, batch_size: int, **options: Any) -> DataLoader[Any]:
        """A ``DataLoader`` that draws from the mixture; with workers, prefetched batches still have the old shares."""
        return DataLoader(self.dataset, batch_size=batch_size, sampler=self, **options)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next draw depends on; a loader with workers is ahead of the training."""
        passes = {name: list(left) for name, left in self._passes.items()}
        return {"shares": dict(self.shares), "passes": passes, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict` of a mixture of the same sources."""
        self.shares = self._checked(state["shares"])
        self._passes = {name: list(state["passes"][name]) for name in self.sizes}
        self._generator.set_state(state["generator"])


def replay(new: Any, old: Any, share: float = WEAK, *, length: int | None = None, **options: Any) -> Mixture:
    """New data, of which a share is replaced by old data.

    Args:
        new, old: Datasets with a length.
        share: The share of old data: 5 % if the new data are similar; ``STRONG``, 25 %, if they differ much.
        length: Number of samples in an epoch; by default the number of new ones, so replay costs no time.
        **options: Options of :class:`Mixture`.

    Raises:
        OptionError: ``share`` is no share, or what is given has no length.
    """
    if not isinstance(share, Real) or not 0 <= share <= 1:
        raise OptionError(f"share is {share!r}; it is the share of old samples, in [0, 1]")
    length = _lengths({"new": new, "old": old})["new"] if length is None else length
    return Mixture({"new": new, "old": old}, {"new": 1 - share, "old": share}, length=length, **options)


@torch.no_grad()
def source_losses(
    model: nn.Module, held: Mapping[str, Iterable[Any]], loss: Callable[[nn.Module, Any], Tensor]
) -> dict[str, float]:
    """The mean loss of each source on held-out batches, in eval mode; over all processes, if there are several.

    Args:
        held: Batches of each source, by name; of equal size, and not used for training.
        loss: A function of the model and a batch that returns a mean loss, as for ``oto.one_shot``.

    Raises:
        OptionError: A source has no batches.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        found = {name: _total([loss(model, batch).double() for batch in batches]) for name, batches in held.items()}
    finally:
        for module in training:
            module.training = True
    if empty := [name for name, total in found.items() if not total[1]]:
        raise OptionError(
            f"no batches were held out of {some(empty)}\n  effect  there is nothing to measure its loss on"
        )
    return {name: float(total[0] / total[1]) for name, total in found.items()}


def _total(losses: Sequence[Tensor]) -> Tensor:
    """Sum and count, over all processes."""
    device = losses[0].device if losses else torch.device("cpu")
    total = torch.stack([*losses, torch.zeros((), dtype=torch.float64, device=device)]).sum()
    both = torch.stack([total, torch.full_like(total, len(losses))])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(both)
    return both
