"""Lesson 9: an operator of your own. What happens without a rule, how to write one, and how to know that it is right.

    python tutorials/09_your_own_operator.py                  # digits, under a minute

Nothing is ever guessed: an operator that nobody has described costs sparsity, never correctness. Describing it takes
three lines.
"""

from __future__ import annotations

import warnings

import torch
from common import compare, parser, start
from data import load_images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

import oto
from oto import OTO
from oto.errors import UnknownOpWarning

# ---------------------------------------------------------------------------------------------- 1. an operator
# A squared ReLU with a scale for each channel, registered as one would a kernel for it: to torch it is a black box.
# (One of ``torch.library.custom_op`` whose code is made of torch calls is none: it is followed, and needs no rule.)

library = torch.library.Library("lesson", "DEF")
library.define("scaled_square(Tensor x, Tensor scale) -> Tensor")


@torch.library.impl(library, "scaled_square", "CompositeExplicitAutograd")
def _kernel(x: Tensor, scale: Tensor) -> Tensor:
    """x (N, C, H, W), scale (C,) -> (N, C, H, W)."""
    return scale[:, None, None] * x.relu().square()


@torch.library.register_fake("lesson::scaled_square")
def _fake(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


def _backward(ctx: object, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, scale = ctx.saved_tensors  # type: ignore[attr-defined]
    up = x.relu()
    return gradient * scale[:, None, None] * 2 * up, (gradient * up.square()).sum((0, 2, 3))


def _save(ctx: object, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)  # type: ignore[attr-defined]


torch.library.register_autograd("lesson::scaled_square", _backward, setup_context=_save)


class Square(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.lesson.scaled_square(x, self.scale)


def network() -> nn.Module:
    def stage(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), Square(b), nn.MaxPool2d(2)]

    return nn.Sequential(*stage(1, 32), *stage(32, 64), nn.Flatten(), nn.Linear(64 * 4, 10))


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> str:
    return f"{100 * int((model.eval()(x).argmax(1) == y).sum()) / len(y):.2f} %"


def main() -> None:
    flags = parser(__doc__, "09_your_own_operator")
    flags.add_argument("--epochs", type=int, default=15)
    flags.add_argument("--lr", type=float, default=0.02)
    flags.add_argument("--target-macs", type=float, default=0.4)
    args = start(flags, {"epochs": 3})
    images = load_images("digits").to(args.device)
    torch.manual_seed(args.seed)
    model = network().to(args.device)

    # ------------------------------------------------------------------------------------------ 2. without a rule
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            left = OTO(model, images.test_x[:1]).explain().atoms
        except oto.errors.NothingPrunableError:
            left = 0
    said = next(w.message for w in caught if issubclass(w.category, UnknownOpWarning))
    print(f"without a rule {left} groups can go, because:\n\n{said}\n")

    # ------------------------------------------------------------------------------------------ 3. the rule
    # Which dimensions are one: channel c of x, of the scale and of the result. And what a removed channel holds
    # afterwards, given what it held (a number, or None for anything): where x is 0 or the scale is 0, the result is 0.

    @oto.register_rule(torch.ops.lesson.scaled_square)
    def rule(call, x, scale):  # type: ignore[no-untyped-def]
        scale = call.view(scale, (*scale.shape, 1, 1))
        return call.map(lambda held, factor: 0.0 if 0.0 in (held, factor) else None, x, scale)

    analyzed = OTO(model, images.test_x[:1])
    print(f"with the rule {analyzed.explain().atoms} groups can go\n")

    # ------------------------------------------------------------------------------------------ 4. is it right?
    # Remove half of all groups at random and compare: the constructor does, in float64. Try it with a rule that lies,
    # such as `lambda held, factor: 0.0`, and see it refuse.
    trial = OTO(network(), images.test_x[:1].cpu())
    trial.random_set_zero_groups(target_group_sparsity=0.5)
    print(f"half of the groups removed at random: relative error {trial.construct_subnet().max_error:.1e}\n")

    # ------------------------------------------------------------------------------------------ 5. as ever
    steps = args.epochs * (len(images.train_y) // 64)
    optimizer = analyzed.hesso(lr=args.lr, first_momentum=0.9, target_macs=args.target_macs, total_steps=steps)
    schedule = CosineAnnealingLR(optimizer, steps)
    shuffle = torch.Generator().manual_seed(args.seed)
    for _ in range(args.epochs):
        model.train()
        for x, y in images.epoch(64, shuffle):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    print(optimizer.progress)
    subnet = analyzed.construct_subnet(out_dir=args.out)
    x, y = images.test_x, images.test_y
    rows = {
        "before": (network(), subnet.cost_before, [accuracy(network().to(args.device), x, y)]),
        "zeroed": (model, subnet.cost_before, [accuracy(model, x, y)]),
        "slim": (subnet.model, subnet.cost_after, [accuracy(subnet.model, x, y)]),
    }
    batch = x[:64].cpu()
    compare(rows, ["accuracy"], lambda m: m(batch), "64 images", args.passes)
    print("before: untrained\n")
    print(subnet)


if __name__ == "__main__":
    main()
