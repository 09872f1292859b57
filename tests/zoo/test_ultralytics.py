"""What users of Ultralytics do with a slim YOLO: predict at several sizes, export, save. It is of their own class.

Ultralytics is under the AGPL: it is used here, and nowhere in the package.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oto import OTO
from oto.trace.outputs import tensors_in
from tests.zoo.models import image, lively

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def yolo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The class ``YOLO``; settings, which it writes as it is imported, lie in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("settings")))
        patch.setenv("YOLO_OFFLINE", "true")
        yield pytest.importorskip("ultralytics", reason="pip install 'oto[zoo]'").YOLO


@pytest.fixture(scope="module", params=["yolov8n", "yolo11n"])
def made(request: pytest.FixtureRequest, yolo: Any) -> tuple[str, torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, x = yolo(f"{request.param}.yaml").model, image(64)
    oto = OTO(lively(model, x), x)
    assert not oto._analysis.form.own.whole, "of these nothing has to stay whole"
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet()
    assert subnet.emitter == "module" and type(subnet.model) is type(model)
    assert subnet.cost_after.params < 0.4 * subnet.cost_before.params
    return f"{request.param}.yaml", model.eval(), subnet.model


def wrapped(yolo: Any, name: str, model: torch.nn.Module) -> Any:
    made = yolo(name)
    made.model = copy.deepcopy(model)
    made.ckpt = {}
    return made


@pytest.mark.parametrize("size", [(96, 96), (64, 128)])
def test_other_sizes_of_images(made, size):
    _, full, slim = made
    x = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = list(tensors_in(full(x))), list(tensors_in(slim(x)))
    assert len(wanted) == len(found) > 1
    for a, b in zip(wanted, found, strict=True):
        assert a.shape == b.shape and float((a - b).abs().max()) < 1e-5 * float(a.abs().max())


@pytest.mark.parametrize("size", [64, 128])
def test_predict(yolo, made, size):
    name, full, slim = made
    picture = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    asked = {"imgsz": size, "conf": 1e-4, "verbose": False, "device": "cpu"}
    wanted = wrapped(yolo, name, full).predict([picture], **asked)[0].boxes.data
    found = wrapped(yolo, name, slim).predict([picture], **asked)[0].boxes.data
    assert len(wanted) and torch.allclose(wanted, found, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")  # it traces, and torch warns of every size that it sees
def test_its_own_exporter(yolo, made, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    name, full, slim = made
    monkeypatch.chdir(tmp_path)  # it writes beside where it runs
    path = Path(wrapped(yolo, name, slim).export(format="onnx", imgsz=64, device="cpu", simplify=False, verbose=False))
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.no_grad():
        wanted = next(tensors_in(full(x)))
    assert found.shape == wanted.shape and float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_saved_and_loaded_by_its_own_class(yolo, made, tmp_path):
    name, full, slim = made
    wrapped(yolo, name, slim).save(tmp_path / "slim.pt")
    again = yolo(tmp_path / "slim.pt").model.float().eval()  # the file is in half precision
    x = image(96)
    with torch.no_grad():
        wanted, found = next(tensors_in(full(x))), next(tensors_in(again(x)))
    assert type(again) is type(full)
    assert float((found - wanted).abs().max()) < 2e-2 * float(wanted.abs().max())


def test_it_goes_on_training(made):
    _, _, slim = made
    model = copy.deepcopy(slim).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sum(t.float().square().mean() for t in tensors_in(model(image(64)))).backward()
    optimizer.step()
    moved = [name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])]
    assert len(moved) > 0.9 * len(before)
