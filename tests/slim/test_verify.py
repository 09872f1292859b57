"""The proof: it takes what is right, however it rounds, and nothing that is wrong."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from oto import OTO
from oto.errors import VerificationError
from oto.slim.proof.compare import relative_error, require
from oto.slim.proof.float64 import double_input, in_double
from oto.slim.proof.reference import CheckOptions, check
from oto.slim.proof.run import run
from oto.slim.proof.train_mode import check_training

X = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))


class Tabled(nn.Module):
    """A table of positions, made in forward, is added to a stream; and a view that states a size."""

    def __init__(self, table):
        super().__init__()
        torch.manual_seed(0)
        self.table = table
        self.into, self.up, self.out = nn.Linear(5, 8), nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.up(torch.tanh(self.into(x) + self.table(x)))
        return self.out(torch.relu(h).view(-1, 16)).float()


SEVENTHS = np.linspace(0, 1, 6, dtype=np.float32) / 7

TABLES = {
    "integers divided": lambda x: (torch.arange(6) / 7).sin()[:, None],
    "a cast that casts nothing": lambda x: (torch.arange(6) / 7).to(torch.float32).sin()[:, None],
    "a cast of a cast": lambda x: torch.arange(6).float().div(7).float().cos()[:, None].to(x.dtype),
    "a factory": lambda x: torch.ones(6, 1).div(7).exp(),
    "linspace": lambda x: torch.linspace(0, 1, 6)[:, None].float().exp(),
    "a literal": lambda x: torch.tensor(0.1).exp(),
    "a literal of a dtype": lambda x: torch.tensor([0.1, 0.7], dtype=torch.float32).sin().sum(),
    "a literal that is written to": lambda x: torch.tensor([0.1] * 6).mul_(x.mean()).add_(x[0, 0, 0])[:, None],
    "numpy": lambda x: torch.from_numpy(SEVENTHS).sin().float()[:, None],
    "numbers": lambda x: torch.full((6, 1), 0.1).sin(),
    "lengths": lambda x: (torch.arange(6)[None] < x[..., 0].sum(1, keepdim=True)).float()[..., None] / 7,
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tables_of_any_dtype_are_proved_in_float64(table, dtype, tmp_path):
    found = OTO(Tabled(table).to(dtype), X.to(dtype), allow_graph=True)
    found.random_set_zero_groups(0.5)
    subnet = found.construct_subnet(tmp_path / "out", emitter="graph")
    assert subnet.max_error < 1e-12
    in_double = [c.what.rpartition(" on ")[0] for c in subnet.checks if c.dtype == "float64"]
    assert set(in_double) == {"slim", "reloaded program"}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_a_model_that_is_wrong_by_less_than_float32_shows_is_refused(table):
    model = Tabled(table)
    wrong = copy.deepcopy(model)
    wrong.out.weight.data[0] *= 1 + 1e-6
    checks = check(model, wrong, X, CheckOptions(batch=True))
    assert {c.dtype for c in checks if not c.passed} == {"float64"}
    with pytest.raises(VerificationError, match="float64: relative error"):
        require(checks)


def test_what_the_default_dtype_is_stays_so():
    with pytest.raises(RuntimeError, match="shapes"):
        run(nn.Linear(3, 2).double(), X.double())
    assert torch.get_default_dtype() is torch.float32
    assert relative_error(run(in_double(nn.ReLU()), double_input(X)), [X.double().relu()]) == 0


def test_products_are_compared_as_float32_whatever_speed_was_asked_for():
    seen = []

    class Asked(nn.Linear):
        def forward(self, x):
            seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
            return super().forward(x)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        run(Asked(3, 2), torch.ones(1, 3))
        assert seen == [(False, False)]
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_rounding_that_batch_norm_makes_much_of_is_settled_in_float64():
    class Faint(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.inner, self.out = nn.Linear(4, 64), nn.Linear(64, 8), nn.Linear(8, 2)
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x):
            return self.out(self.norm(self.inner(2e3 + torch.relu(self.up(1e-2 * x)))))

    torch.manual_seed(0)
    model, x = Faint(), torch.randn(2, 4)
    oto = OTO(model, x)
    oto.random_set_zero_groups(0.5)
    made = oto.construct_subnet()
    check = check_training(model, made.model, x, oto.partition, made.kept)
    assert made.model.up.out_features < 64
    assert check.dtype == "float64"
    assert check.passed


class Ranked(nn.Module):
    """Rows in the order of their scores, which are all one but for rounding."""

    def __init__(self):
        super().__init__()
        self.score, self.out = nn.Parameter(torch.rand(5) + 0.5), nn.Linear(5, 3)

    def forward(self, x):
        rows = x / (x @ self.score)[:, None]
        return self.out(rows[(rows @ self.score).argsort()])


def test_what_is_decided_between_equals_is_decided_as_the_full_model_does():
    full = Ranked()
    slim, x = copy.deepcopy(full), torch.rand(50, 5) + 0.1
    slim.score.data[0] += 1e-6
    assert not any(c.passed for c in check(full, slim, x, float64=False))
    made = check(full, slim, x, float64=False, decides=True)
    assert all(c.passed for c in made) and made[0].what == "slim on the example, as the full model decides"
    slim.out.weight.data[0, 0] += 0.1
    assert not any(c.passed for c in check(full, slim, x, float64=False, decides=True))


class Divided(nn.Module):
    """What it gives is divided by a whole number that it computes."""

    def __init__(self):
        super().__init__()
        self.count, self.out = nn.Parameter(torch.full((4,), 2.0)), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(x) / int(self.count.sum().round())


def test_what_is_decided_by_other_numbers_is_wrong():
    full = Divided()
    slim, x = copy.deepcopy(full), torch.rand(50, 5)
    slim.count.data[0] += 1
    assert not any(c.passed for c in check(full, slim, x, decides=True))


class Sized(nn.Module):
    """What it gives is divided by its width, a tensor for a moment."""

    def __init__(self, width):
        super().__init__()
        self.width, self.out = width, nn.Linear(5, 3)

    def forward(self, x):
        return self.out(x) / int(torch.IntTensor([self.width])[0])


def test_a_number_made_of_a_size_is_no_decision():
    full, slim, x = Sized(8), Sized(4), torch.rand(50, 5)
    slim.load_state_dict(full.state_dict())
    assert not any(c.passed for c in check(full, slim, x, decides=True))
    slim.width = 8
    assert all(c.passed for c in check(full, slim, x, decides=True))
