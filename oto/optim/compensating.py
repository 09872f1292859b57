"""Compensation during training: after each choice, the remaining atoms gradually compensate for the chosen ones.

::

    optimizer.take_over(fold)   # enable it; oto.hesso(compensate="affine", ...) does this
    optimizer.begin_fold()      # after a choice: fit, and apply the first part of the change
    optimizer.go_on_folding()   # each step after it: apply the next part

The fit is in :mod:`oto.optim.fold`.
"""

from __future__ import annotations

from typing import Any

from oto.errors import OptionError, ShrinkError
from oto.optim.checkpointed import Checkpointed
from oto.optim.fold import Fold
from oto.optim.plan import FREE, PRUNED


class Compensating(Checkpointed):
    """A wrapping optimizer that may compensate for pruned atoms.

    Attributes:
        compensate: The kind of fit, one of :data:`oto.optim.compensate.KINDS`; ``None`` for no compensation.
        fold_at_choice: Whether compensation begins when atoms are chosen. If not, a subclass begins it later, after
            groups have shrunk in another way.
    """

    _fold: Fold | None = None
    compensate: str | None = None
    fold_at_choice = True

    def take_over(self, fold: Fold) -> None:
        """Compensate with ``fold``, from the next choice on."""
        self._fold, self.compensate = fold, fold.kind
        self._fill_state()

    def fold(self) -> Fold | None:
        """The compensation, or ``None`` if there is none.

        Raises:
            OptionError: The optimizer compensates, but is a copy, which has no reference to the model.
        """
        if self._fold is None and self.compensate is not None:
            raise OptionError(
                f"compensate={self.compensate!r} needs the model, and a copy of an optimizer does not know it\n"
                "  effect  no step was taken\n"
                "  to fix  make a new one with the same options (oto.hesso(...)), and load the state_dict() into it"
            )
        return self._fold

    def begin_fold(self) -> None:
        """Fit the redundant atoms, and apply the first part of the change; the rest follows until the period ends.

        Raises:
            OptionError: As in :meth:`fold`; or no batch reached a weight that reads the redundant atoms.
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
        """Apply the next part of the change, if one is due.

        Raises:
            OptionError: As in :meth:`fold`.
        """
        if (fold := self.fold()) is not None:
            fold.go_on(self.param_groups[0])

    def refuse_shrinking(self) -> None:
        """Check that the optimizer does not compensate, before it continues with a smaller model.

        Raises:
            ShrinkError: It does. The readers of atoms are known for the full model only.
        """
        if self.compensate is not None:
            raise ShrinkError(
                f"compensate={self.compensate!r} knows what reads the groups of the full model, not of a smaller one\n"
                "  effect  nothing was changed\n"
                "  to fix  shrink by construct_subnet at the end; or train without compensate="
            )

    def plan(self) -> str:
        """As in :class:`Checkpointed`, with the readers that compensate."""
        return super().plan() if self._fold is None else f"{super().plan()}\n{self._fold}"

    def describe_setup(self) -> dict[str, Any]:
        """As in :class:`Checkpointed`, with the kind of compensation."""
        return super().describe_setup() | ({} if self.compensate is None else {"compensate": self.compensate})
