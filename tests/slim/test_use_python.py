"""What Python and torch do with a slim model of its own class: copies, pickles, compile, export, training on.

Of each kind of change one: a norm that is told what it lost, a norm of ours, a call that is told a size, an attribute.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oto import OTO, load_subnet
from oto.nn.overridden import OverriddenForward
from tests.zoo.models import image, lively

timm = pytest.importorskip("timm")


class Halves(nn.Module):
    """Sizes that no attribute states, a chunk, and a norm of its own code."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.mix, self.head = nn.Linear(12, 48), nn.Linear(24, 20), nn.Linear(20, 5)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.expand(x).relu().chunk(2, -1)
        x = self.mix(a * b).view(x.shape[0], -1, 4, 5).flatten(2)
        return self.head(self.drop(nn.functional.layer_norm(x, (20,))))


class PlainTensor(nn.Module):
    """A tensor that is neither parameter nor buffer, in a forward that minds the device."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.head = nn.Linear(12, 48), nn.Linear(48, 5)
        self.shift = torch.linspace(0, 1, 48)

    def forward(self, x: Tensor) -> Tensor:
        assert x.device.type == "cpu"
        return self.head((self.expand(x) + self.shift).relu() * self.shift.exp())


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=10, dynamic_img_size=True)


def convnext() -> nn.Module:
    return timm.create_model("convnext_atto", num_classes=10, depths=(1, 1, 1, 1), dims=(8, 12, 16, 24))


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        num_classes=10,
        depths=(1, 1),
        num_heads=(2, 4),
        embed_dim=32,
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, list[tuple[int, ...]]]] = {
    "halves": (Halves, torch.randn(2, 7, 12), [(5, 3, 12)]),
    "plain tensor": (PlainTensor, torch.randn(2, 12), [(5, 12)]),
    "vit": (vit, image(32), [(3, 3, 64, 48)]),
    "convnext": (convnext, image(32), [(3, 3, 64, 48)]),
    "swin": (swin, image(32), [(3, 3, 32, 32)]),
}


@pytest.fixture(scope="module", params=MODELS)
def made(request: pytest.FixtureRequest) -> tuple[OTO, nn.Module, Tensor, list[tuple[int, ...]]]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    make, x, others = MODELS[request.param]
    model = lively(make(), x)
    oto = OTO(model, x)
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet()
    assert subnet.emitter == "module" and type(subnet.model) is type(model)
    assert subnet.cost_after.params < 0.7 * subnet.cost_before.params
    return oto, subnet.model, x, others


def error(wanted: Tensor, found: Tensor) -> float:
    assert wanted.shape == found.shape
    return float((wanted - found).detach().abs().max() / wanted.detach().abs().max())


def saved_and_loaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_other_sizes(made):
    oto, slim, _, others = made
    for shape in others:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        assert error(oto.model(x), slim(x)) < 1e-5


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_a_model_of_its_own(made, copied):
    _, slim, x, _ = made
    other = copied(slim)
    wanted = slim(x)
    assert torch.equal(wanted, other(x))
    for module in other.modules():
        forward = vars(module).get("forward")
        assert forward is None or (isinstance(forward, OverriddenForward) and forward.module is module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(wanted, slim(x)) and not torch.equal(wanted, other(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(made, backend):
    _, slim, x, _ = made
    torch._dynamo.reset()
    assert error(slim(x), torch.compile(slim, backend=backend, fullgraph=True)(x)) < 1e-5


def test_exported(made):
    _, slim, x, _ = made
    assert error(slim(x), torch.export.export(slim, (x,), strict=False).module()(x)) < 1e-5


def test_names_are_those_of_the_class(made):
    oto, slim, _, _ = made
    assert slim.state_dict().keys() == oto.model.state_dict().keys()
    again = copy.deepcopy(slim)
    again.load_state_dict(slim.state_dict())


def test_it_goes_on_training(made):
    _, slim, x, _ = made
    model = copy.deepcopy(slim).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(x).square().mean().backward()
    optimizer.step()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > 0.7 * len(before)  # the scale of a layer may be too small for its gradients to tell
    if any(isinstance(m, nn.Dropout) and m.p for m in model.modules()):
        assert not torch.equal(model(x), model(x))


def test_the_artifact(made, tmp_path):
    oto, slim, x, _ = made
    if type(oto.model) not in (Halves, PlainTensor):
        pytest.skip("the zoo has the others")
    oto.construct_subnet(tmp_path)
    again = load_subnet(tmp_path, type(oto.model))
    assert type(again) is type(slim) and error(slim(x), again(x)) < 1e-5


def test_the_parts_that_timm_offers(made):
    oto, slim, x, _ = made
    if not hasattr(slim, "forward_features"):
        pytest.skip("it is not of timm")
    features = slim.forward_features(x)
    assert error(oto.model(x), slim.forward_head(features)) < 1e-5
    pooled = slim.forward_head(features, pre_logits=True)
    bare = copy.deepcopy(slim)
    bare.reset_classifier(0)
    assert torch.equal(bare(x), pooled)
    assert slim.num_features == slim.head_hidden_size == pooled.shape[-1] < oto.model.num_features
    other = copy.deepcopy(slim)
    other.reset_classifier(3)
    assert other(x).shape == (len(x), 3) and other.get_classifier().in_features == slim.num_features
