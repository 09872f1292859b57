"""Compensation while training, as an optimizer does it: from each choice on, the atoms that stay take over what those
that go carried.

::

    optimizer.take_over(fold)   # oto.hesso(compensate="affine", ...) does it
    optimizer.begin_fold()      # a choice was made: fit, and take over the first part
    optimizer.go_on_folding()   # each step after it: take over the next part

What is fitted, and from what, is in :mod:`oto.optim.fold`.
"""

from __future__ import annotations

from typing import Any

from oto.errors import OptionError, ShrinkError
from oto.optim.checkpointed import Checkpointed
from oto.optim.fold import Fold
from oto.optim.plan import FREE, PRUNED


class Compensating(Checkpointed):
    """A wrapping optimizer whose remaining atoms may take over what pruned ones carried.

    Attributes:
        compensate: How they do, one of :data:`oto.optim.compensate.KINDS`; ``None`` if they do not.
        fold_at_choice: Whether that begins when atoms are chosen, or later, where a paper first lets groups shrink in
            its own way.
    """

    _fold: Fold | None = None
    compensate: str | None = None
    fold_at_choice = True

    def take_over(self, fold: Fold) -> None:
        """Compensate by ``fold``, from the next choice on."""
        self._fold, self.compensate = fold, fold.kind
        self._fill_state()

    def fold(self) -> Fold | None:
        """How remaining atoms take over, if they do.

        Raises:
            OptionError: They do, and this is a copy, which does not know the model.
        """
        if self._fold is None and self.compensate is not None:
            raise OptionError(
                f"compensate={self.compensate!r} needs the model, and a copy of an optimizer does not know it\n"
                "  effect  no step was taken\n"
                "  to fix  make a new one with the same options (oto.hesso(...)), and load the state_dict() into it"
            )
        return self._fold

    def begin_fold(self) -> None:
        """Fit what the redundant atoms carry, and take over the first part; the rest follows until the period ends.

        Raises:
            OptionError: As in :meth:`fold`; or no batch reached a weight that reads what goes.
        """
        period, fold = self.schedule.period(self.clock), self.fold()
        if fold is None or period is None:
            return
        pairs = list(zip(self.node_groups, self._codes(), strict=True))
        before = {group.name: (own != PRUNED).numpy() for group, own in pairs}
        after = {group.name: (own == FREE).numpy() for group, own in pairs}
        steps = self.schedule.bounds(period)[1] - self.clock
        fold.begin(self.param_groups[0], self.node_groups, before, after, steps)

    def go_on_folding(self) -> None:
        """Take over the next part, if one is due.

        Raises:
            OptionError: As in :meth:`fold`.
        """
        if (fold := self.fold()) is not None:
            fold.go_on(self.param_groups[0])

    def refuse_shrinking(self) -> None:
        """Refuse to go on with a smaller model.

        Raises:
            ShrinkError: Atoms are compensated, and what reads them is known for the full model only.
        """
        if self.compensate is not None:
            raise ShrinkError(
                f"compensate={self.compensate!r} knows what reads the groups of the full model, not of a smaller one\n"
                "  effect  nothing was changed\n"
                "  to fix  shrink by construct_subnet at the end; or train without compensate="
            )

    def plan(self) -> str:
        """What happens at which step, what the learning rate should do, and what takes over; print it."""
        return super().plan() if self._fold is None else f"{super().plan()}\n{self._fold}"

    def describe_setup(self) -> dict[str, Any]:
        """As in :class:`Checkpointed`, with what takes over."""
        return super().describe_setup() | ({} if self.compensate is None else {"compensate": self.compensate})
