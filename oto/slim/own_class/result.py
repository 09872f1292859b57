"""What the search of a class gives: what a thinner model of it needs, and how that was found out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from oto.slim.own_class.adaptation import Adaptation, Rescale, Tie
from oto.slim.own_class.overrides import FunctionCalls


@dataclass(frozen=True)
class Decision:
    """One decision of the search.

    Attributes:
        trial: Which groups were thinner when the class did something else than it should.
        operator, module, source: The call, the path of its module and the line of the user's code.
        saw: What the class did there.
        tried: What was tried, in order.
        settled: What was settled on, the last of these.
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
        adaptation: That itself.
        calls: The torch functions that the class calls, some of which may have to be overridden.
        steps: How it was found out.
    """

    adaptation: Adaptation
    calls: FunctionCalls
    steps: tuple[Decision, ...] = field(default=())

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
        """By what each parameter is multiplied."""
        return self.adaptation.scales

    @property
    def unfolded(self) -> OwnClass:
        """The same without a change of any parameter."""
        return replace(self, adaptation=self.adaptation.unfolded)
