"""The result of the search: what a thinner model of the class needs, and the decisions of the search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from oto.slim.own_class.adaptation import Adaptation, Rescale, Tie
from oto.slim.own_class.overrides import FunctionCalls
from oto.slim.own_class.swapped import Copy


@dataclass(frozen=True)
class Decision:
    """One decision of the search.

    Attributes:
        trial: Which groups were thinner when the class diverged.
        operator, module, source: The call, the path of its module, and the line of the user's code.
        saw: What the class did there.
        tried: The proposals that were tried, in order.
        settled: The proposal that was applied.
    """

    trial: str
    operator: str
    module: str
    source: str
    saw: str
    tried: tuple[str, ...]
    settled: str

    def __str__(self) -> str:
        others = [text for text in dict.fromkeys(self.tried) if text != self.settled]
        lines = [
            f"{self.source or 'no line'}, in {self.module or 'the model'}: {self.operator}",
            f"  saw      {self.saw}",
        ]
        lines += [f"  tried    {text}" for text in others]
        return "\n".join([*lines, f"  settled  {self.settled}", f"  when     {self.trial}"])


@dataclass(frozen=True, eq=False)
class OwnClass:
    """What a slim model of the model's own class needs.

    Attributes:
        adaptation: What is set, folded, overridden, tied or kept whole.
        calls: The torch functions that the class calls, some of which may have to be overridden.
        steps: The decisions of the search, in order.
        copy: The copy on which the class was searched, if it is needed again.
    """

    adaptation: Adaptation
    calls: FunctionCalls
    steps: tuple[Decision, ...] = field(default=())
    copy: Copy | None = None

    @property
    def whole(self) -> Mapping[str, int | None]:
        """Groups that stay whole, each with the index of the call that is the reason."""
        return self.adaptation.whole

    @property
    def ties(self) -> tuple[Tie, ...]:
        """Groups that keep the same number of atoms."""
        return self.adaptation.ties

    @property
    def scales(self) -> dict[str, list[Rescale]]:
        """How each parameter is rescaled."""
        return self.adaptation.scales

    @property
    def unfolded(self) -> OwnClass:
        """The same without changing any parameter."""
        return replace(self, adaptation=self.adaptation.unfolded)
