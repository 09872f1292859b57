"""Losses, masks, and parameters of rare kinds inside of a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from oto import OTO
from oto.errors import NothingPrunableError
from oto.optim.saliency import Entries
from oto.slim.proof.compare import relative_error
from oto.slim.proof.run import run

EXACT = 1e-12  # float64, sums of a few dozen terms


class Compared(nn.Module):
    """Two hidden layers, how far they are apart, and a result of one of them."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.out, self.loss = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 4), loss

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        return self.loss(y, self.b(x)), self.out(y)


def slimmed(model: nn.Module, x: Tensor, emitter: str = "module") -> nn.Module:
    oto = OTO(model, x)
    oto.random_set_zero_groups(0.5)
    slim = oto.construct_subnet(emitter=emitter).model
    more = torch.cat([x, 1 - x])
    assert relative_error(run(model, more), run(slim, more)) <= EXACT
    return slim


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "mse, summed": lambda x, y: F.mse_loss(x, y, reduction="sum"),
    "smooth l1": lambda x, y: F.smooth_l1_loss(x, y, beta=0.3),
    "huber": lambda x, y: F.huber_loss(x, y, delta=0.3),
    "huber, by entry": lambda x, y: F.huber_loss(x, y, reduction="none").sum(-1),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("emitter", ["module", "graph"])
def test_a_distance_goes_on_dividing_by_the_full_count(loss: str, emitter: str) -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    slim = slimmed(Compared(LOSSES[loss]).double(), x, emitter)
    assert slim.a.out_features == slim.b.out_features == 8


class Gated(nn.Module):
    """The spatial gate of gMLP: a convolution of kernel 1 over the positions, which are its channels."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down = nn.Linear(6, 32), nn.LayerNorm(16), nn.Linear(16, 4)
        self.mix = nn.Conv1d(10, 10, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.up(x).chunk(2, -1)
        return self.down(u * self.mix(self.norm(v)))


@pytest.mark.parametrize("kernel, left", [(1, 8), (3, 16)])
def test_a_kernel_of_one_entry_does_not_slide(kernel: int, left: int) -> None:
    x, model = torch.randn(2, 10, 6, dtype=torch.float64), Gated(kernel).double()
    if left == 16:
        with pytest.raises(NothingPrunableError, match="a convolution slides along it"):
            OTO(model, x)
    else:
        assert slimmed(model, x).down.in_features == left


@pytest.mark.parametrize("groups, shifts", [(1, 2), (2, 2), (4, 2), (2, 4), (16, 16)])
def test_shifts_go_with_their_channels(groups: int, shifts: int) -> None:
    ops = pytest.importorskip("torchvision.ops")

    class Deformed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.offsets = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 18 * shifts, 3, padding=1)
            self.d, self.out = ops.DeformConv2d(16, 16, 3, padding=1, groups=groups), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.d(self.a(x).relu(), self.offsets(x)).relu())

    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for emitter in ("module", "graph"):
        slim = slimmed(Deformed().double(), x, emitter)
        assert slim.a.out_channels < 16 and (shifts == 2 or slim.offsets.out_channels < 18 * shifts)


def masked(*layers: nn.Module, bias: bool = True) -> None:
    for layer in layers:
        prune.ln_structured(layer, "weight", 0.5, n=2, dim=0)
        if bias:
            prune.custom_from_mask(layer, "bias", layer.weight_mask.flatten(1).any(1))


def test_what_masks_leave_at_zero_goes() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)
    ).double()
    masked(model[0], model[2])
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    slim = OTO(model, x).construct_subnet().model
    assert slim[0].weight_orig.shape == (8, 3, 3, 3) and slim[2].weight_mask.shape == (16, 8, 3, 3)
    assert relative_error(run(model, x), run(slim, x)) <= EXACT
    prune.remove(slim[0], "weight")
    assert relative_error(run(model, x), run(slim, x)) <= EXACT


@pytest.mark.parametrize("saliency", ["default", "cosine_similarity", "taylor_second_order"])
def test_complex_parameters_are_pruned(saliency: str) -> None:
    model = nn.Sequential(nn.Linear(6, 16, dtype=torch.complex128), nn.Linear(16, 4, dtype=torch.complex128))
    x = torch.randn(3, 6, dtype=torch.complex128)
    oto = OTO(model, x)
    chosen = {} if saliency == "default" else {"saliency": saliency}
    optimizer = oto.hesso(lr=0.01, target_group_sparsity=0.5, total_steps=8, **chosen)
    for _ in range(8):
        optimizer.zero_grad()
        model(x).abs().square().mean().backward()
        optimizer.step()
    slim = oto.construct_subnet().model
    assert slim[0].out_features == 8 and relative_error(run(model, x), run(slim, x)) <= EXACT


def test_a_complex_entry_counts_with_both_its_parts() -> None:
    w, g = torch.randn(2, 3, 4, dtype=torch.complex128)
    entries = Entries([w], [g])
    torch.testing.assert_close(entries.weight_sq, w.abs().square().sum(1))
    torch.testing.assert_close(entries.dot, (w.real * g.real + w.imag * g.imag).sum(1))


class Eighth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(16, 8).to(torch.float8_e4m3fn), requires_grad=False)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(x, self.w.to(x.dtype)).relu())


def test_frozen_float8_parameters_are_cut_if_they_may_be() -> None:
    x = torch.randn(3, 8)
    oto = OTO(Eighth(), x, prune_frozen=True)
    oto.random_set_zero_groups(0.5)
    slim = oto.construct_subnet().model
    assert slim.w.shape == (8, 8) and slim.w.dtype is torch.float8_e4m3fn
