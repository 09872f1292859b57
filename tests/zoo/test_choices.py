"""What the zoo looks at besides half of everything: other counts, and the model once it was used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from oto import OTO

from .choices import outcomes
from .matrix import examine

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.mid(self.up(x).relu()).relu())


class Late(Plain):
    """Once it was trained on a batch it cannot do without any of its sixteen units."""

    seen = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        if self.seen and h.shape[1] == 16:
            h = h.tanh()
        self.seen = self.seen or self.training
        return self.down(self.mid(h).relu())


@pytest.mark.parametrize(("kind", "states"), [(Plain, ""), (Late, "used, in train mode: 1 groups such as up.weight")])
def test_a_model_is_asked_once_more_when_it_was_used(kind: type[nn.Module], states: str) -> None:
    result = examine("model", lambda: (kind(), X), kind="handmade", emitters=("module",))
    assert result.failure is None and not result.lost
    assert result.states.startswith(states) if states else not result.states
    assert result.in_class == result.choices == 4  # two groups alone, all but one, and trained


def test_other_counts_leave_the_parameters_as_they_were() -> None:
    model = Plain().double().eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = list(outcomes("handmade-model", OTO(model, X.double()), X.double()))
    assert [one.choice.split()[-1] for one in found[:2]] == ["alone", "alone"]
    assert all(one.error is not None and one.error < 1e-12 for one in found)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
