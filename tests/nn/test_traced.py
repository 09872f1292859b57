"""What `torch.jit.trace` makes of slim models: exporters and runtimes that stand on it take them as the full ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oto import OTO
from oto.errors import ScriptError
from oto.nn import GroupNorm, LayerNorm, MultiheadAttention, OverriddenForward, RMSNorm
from oto.nn.functional import eps_of
from oto.slim.proof.compare import relative_error

# torch calls tracing deprecated; the sizes that code compares are those of the example, as in the full model
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
EXACT = 1e-12  # float64, sums of a few dozen terms


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


NORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "layer norm": (lambda: LayerNorm((5,), (8,)), lambda n: data(n, 4, 5)),
    "rms norm": (lambda: RMSNorm((5,), (8,)), lambda n: data(n, 4, 5)),
    "rms norm without weight": (lambda: RMSNorm((4, 5), (4, 8), weight=False), lambda n: data(n, 4, 5)),
    "group norm": (lambda: GroupNorm(2, 5, 8), lambda n: data(n, 10, 6)),
    "attention": (lambda: Attends(), lambda n: data(n, 4, 6)),
}


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = MultiheadAttention(6, 6, 6, 6, 2, 3, 3, 0.5, [0, 2], 4, batch_first=True)
        for p in self.parameters():
            nn.init.normal_(p)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x)[0]
        return result


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("gradients", [True, False])
def test_a_thin_layer_is_traced(name: str, gradients: bool) -> None:
    make, given = NORMS[name]
    layer = make().double().eval()
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(layer, given(2))  # it is run again, without gradients, and compared
        for batch in (2, 5):
            x = given(batch)
            assert relative_error([layer(x)], [traced(x)]) <= EXACT
    assert not any(node.kind().endswith("_") for node in traced.inlined_graph.nodes()), "nothing is written to"


SCRIPTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer norm": (lambda: LayerNorm((5,), (8,)), (2, 4, 5)),
    "layer norm without weight": (lambda: LayerNorm((5,), (8,), weight=False, bias=False), (2, 4, 5)),
    "rms norm": (lambda: RMSNorm((4, 5), (4, 8)), (2, 4, 5)),
    "rms norm without weight": (lambda: RMSNorm((5,), (8,), eps=1e-3, weight=False), (2, 4, 5)),
    "group norm": (lambda: GroupNorm(2, 5, 8), (2, 10, 6)),
    "group norm without weight": (lambda: GroupNorm(2, 5, 8, affine=False), (2, 10, 3, 4)),
}


@pytest.mark.parametrize("name", SCRIPTED)
def test_a_thin_norm_is_scripted(name: str) -> None:
    make, (_, *shape) = SCRIPTED[name]
    layer = make().double().eval()
    for p in layer.parameters():
        nn.init.normal_(p)
    scripted = torch.jit.script(nn.Sequential(layer))
    for batch in (2, 5):
        x = data(batch, *shape)
        assert relative_error([layer(x)], [scripted(x)]) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_smallest_number_of_a_dtype_is_that_of_torch(dtype: torch.dtype) -> None:
    assert eps_of(torch.ones(1, dtype=dtype)) == torch.finfo(dtype).eps


class Windows(nn.Module):
    """Attention in windows: widths are sizes of tensors, or stated; a root of one scales; the batch holds windows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(12), 3
        self.embed, self.qkv, self.out = nn.Linear(5, 12), nn.Linear(12, 36), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        x = self.norm(self.embed(x))
        windows = x.view(batch, length // 2, 2, 12).reshape(batch * (length // 2), 2, x.size(2))
        count, _, width = windows.shape
        qkv = self.qkv(windows).reshape(count, 2, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * (width // self.heads) ** -0.5, qkv[1], qkv[2]
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        y = y.transpose(1, 2).reshape(count, 2, width)
        return self.out(y.view(batch, -1, width).mean(1))


@pytest.fixture(scope="module")
def windows() -> tuple[nn.Module, nn.Module]:
    """The full model, some of it at zero, and the slim one."""
    torch.manual_seed(0)
    full = Windows().double().eval()
    oto = OTO(full, data(2, 4, 5))
    oto.random_set_zero_groups(0.4)
    slim = oto.construct_subnet(emitter="module").model
    assert any(isinstance(vars(m).get("forward"), OverriddenForward) for m in slim.modules())
    assert slim.norm.normalized_shape < (12,) and slim.qkv.out_features < 36
    return full, slim


@pytest.mark.parametrize("gradients", [True, False])
def test_a_class_that_is_told_sizes_is_traced(windows: Any, gradients: bool) -> None:
    full, slim = windows
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(slim, data(2, 4, 5))
        for batch in (2, 7):
            x = data(batch, 4, 5)
            assert relative_error([full(x)], [traced(x)]) <= EXACT


@pytest.mark.parametrize("name", NORMS)
def test_the_older_exporter_takes_a_thin_layer(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    make, given = NORMS[name]
    layer, path = make().double().eval(), tmp_path / "layer.onnx"
    torch.onnx.export(layer, (given(2),), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n"}})
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (2, 5):
        x = given(batch)
        (y,) = session.run(None, {"x": x.numpy()})
        assert relative_error([layer(x)], [torch.from_numpy(y)]) <= 1e-9  # its kernels sum in another order


def test_the_older_exporter_takes_a_class_that_is_told_sizes(windows: Any, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    full, slim = windows
    path = tmp_path / "slim.onnx"
    torch.onnx.export(slim, (data(2, 4, 5),), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n"}})
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (2, 7):
        x = data(batch, 4, 5)
        (y,) = session.run(None, {"x": x.numpy()})
        assert relative_error([full(x)], [torch.from_numpy(y)]) <= 1e-9  # its kernels sum in another order


def test_a_graph_is_traced_at_the_sizes_of_its_example(windows: Any) -> None:
    """TorchScript takes sizes that are passed to `torch.ops` for numbers; conditions on them are not its business."""
    full, _ = windows
    graph = OTO(full, data(2, 4, 5)).construct_subnet(emitter="graph").model
    assert graph.takes.conditions
    x = data(2, 4, 5)
    assert relative_error([full(x)], [torch.jit.trace(graph, x)(x)]) <= EXACT


def test_what_is_not_scripted_says_what_to_do_instead(windows: Any) -> None:
    full, slim = windows
    graph = OTO(full, data(2, 4, 5)).construct_subnet(emitter="graph").model
    for model, what in ((graph, "is a graph"), (slim, "forward of Windows"), (Attends(), "heads are stated")):
        with pytest.raises(ScriptError, match=rf"(?s){what}.*to fix  torch\.jit\.trace"):
            torch.jit.script(model)
    assert not hasattr(slim.forward, "__globals__")
