"""Detectors of torchvision as users have them: pruned in their own class, run at other sizes, trained on."""

from __future__ import annotations

import pytest
import torch

from oto import OTO, load_subnet
from oto.slim.proof.compare import relative_error
from tests.zoo.models import lively

detection = pytest.importorskip("torchvision").models.detection

EXACT = 1e-9  # float64; boxes are differences of exponentials
ROUNDED = 1e-6  # a loss in float32, whatever the model is in
BARE = {"weights": None, "weights_backbone": None, "num_classes": 5}
SMALL = {**BARE, "min_size": 96, "max_size": 128}
MAKE = {
    "ssdlite": lambda: detection.ssdlite320_mobilenet_v3_large(**BARE, score_thresh=0.0),
    "faster rcnn": lambda: detection.fasterrcnn_mobilenet_v3_large_320_fpn(**SMALL, box_score_thresh=0.0),
    "retinanet": lambda: detection.retinanet_resnet50_fpn(**SMALL, score_thresh=0.0),
}


def images(*shapes):
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.rand(3, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def assert_alike(wanted, found):
    """Equal, but for a box or two that were chosen between equals (random weights leave some, but for rounding)."""
    for one, other in zip(wanted, found, strict=True):
        assert relative_error([one["scores"], one["labels"]], [other["scores"], other["labels"]]) <= EXACT
        apart = (one["boxes"] - other["boxes"]).abs().amax(1) > EXACT * one["boxes"].max()
        assert apart.sum() <= 0.02 * len(apart)


@pytest.mark.parametrize(
    "name", ["ssdlite", *(pytest.param(name, marks=pytest.mark.zoo) for name in ("faster rcnn", "retinanet"))]
)
def test_pruned_run_and_trained_on(name, tmp_path):
    torch.manual_seed(0)
    example = images((96, 128))
    model = lively(MAKE[name](), ([x.float() for x in 2 * example],)).double()
    oto = OTO(model, (example,))
    oto.random_set_zero_groups(0.3)
    subnet = oto.construct_subnet(tmp_path)
    slim = subnet.model
    assert subnet.emitter == "module" and type(slim) is type(model)
    assert subnet.cost_after.params < 0.7 * subnet.cost_before.params
    loaded = load_subnet(tmp_path, lambda: MAKE[name]().double())
    for given in (images((150, 100), (80, 90)), images((64, 64))):
        with torch.no_grad():
            wanted = model(given)
            assert sum(len(one["boxes"]) for one in wanted) > 50
            for form in (slim, loaded):
                assert_alike(wanted, form(given))
    targets = [
        {"boxes": torch.tensor([[10.0, 10, 50, 60]], dtype=torch.float64), "labels": torch.tensor([n])} for n in (1, 3)
    ]
    losses = []
    for form in (model.train(), slim.train()):
        torch.manual_seed(1)  # which boxes are looked at is drawn
        loss = form(images((96, 128), (80, 90)), targets)
        losses.append([value.detach() for value in loss.values()])
        sum(loss.values()).backward()
    assert relative_error(*losses) <= ROUNDED and len(losses[0]) >= 2
    assert all(p.grad is not None for p in slim.parameters() if p.requires_grad)
