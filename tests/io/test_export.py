"""What is exported is read by its own runtime, at sizes that were never seen, and gives what the model gives."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oto import OTO
from oto.errors import ArtifactError, EmitterError, MissingExtraError, SetupWarning, VerificationError
from oto.io import export
from oto.io.export import export_model
from oto.slim.proof.compare import relative_error
from oto.slim.proof.run import run


class Tags(nn.Module):
    """Tokens in, a score per token out, by name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.norm, self.down = (
            nn.Embedding(20, 8),
            nn.Linear(8, 16),
            nn.LayerNorm(16),
            nn.Linear(16, 3),
        )

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.norm(self.up(self.embed(ids)).relu())
        x = x + x.cumsum(1) / torch.arange(1, ids.shape[1] + 1, device=ids.device)[:, None]
        return {"scores": self.down(x if mask is None else x * mask[..., None])}


def tagged(batch: int, length: int) -> dict[str, Tensor]:
    return {"ids": torch.randint(0, 20, (batch, length)), "mask": torch.ones(batch, length)}


def images() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 1))


def pictures(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size)


@pytest.fixture(scope="module")
def slim() -> Any:
    """Slim models of the own class and as a graph, each with what makes inputs of it."""
    made = {}
    for name, model, given in (("module", images(), pictures), ("graph", Tags(), tagged)):
        oto = OTO(model, given(2, 8), allow_graph=True)
        oto.random_set_zero_groups(0.5)
        made[name] = oto.construct_subnet(emitter=name).model, given
    return made


def in_onnxruntime(path: Path, given: Any) -> list[Tensor]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path)
    tensors = list(given.values()) if isinstance(given, dict) else [given]
    fed = {entry.name: t.numpy() for entry, t in zip(session.get_inputs(), tensors, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, fed)]


def in_torch(path: Path, given: Any) -> list[Tensor]:
    return run(torch.export.load(path).module(check_guards=False), given)


def compiled(path: Path, given: Any) -> list[Tensor]:
    loaded = torch._inductor.aoti_load_package(str(path))
    y = loaded(**given) if isinstance(given, dict) else loaded(given)
    return list(y.values()) if isinstance(y, dict) else [y]


@pytest.mark.parametrize("kind", ["module", "graph"])
@pytest.mark.parametrize(
    ("how", "name", "runtime"),
    [
        ("onnx", "slim.onnx", in_onnxruntime),
        ("pt2", "slim.pt2", in_torch),
        pytest.param("aoti", "slim.pt2", compiled, marks=pytest.mark.zoo),  # a minute of the C++ compiler
    ],
)
def test_what_is_exported_runs_elsewhere_at_other_sizes(
    slim: Any, kind: str, how: str, name: str, runtime: Any, tmp_path: Path
) -> None:
    model, given = slim[kind]
    checks = export_model(model, given(2, 8), how, tmp_path / "new" / name)
    assert len(checks) == 3 and all(c.passed and c.what.startswith(how) for c in checks)
    assert [p.name for p in (tmp_path / "new").iterdir()] == [name]
    for batch, size in ((1, 12), (5, 20)):
        x = given(batch, size)
        assert relative_error(run(model, x), runtime(tmp_path / "new" / name, x)) < 1e-5


def test_a_file_that_is_there_is_never_replaced(slim: Any, tmp_path: Path) -> None:
    (tmp_path / "slim.pt2").write_text("mine")
    with pytest.raises(ArtifactError, match=r"slim\.pt2 is there already"):
        export_model(*_given(slim), "pt2", tmp_path / "slim.pt2")
    assert (tmp_path / "slim.pt2").read_text() == "mine"


def _given(slim: Any) -> tuple[nn.Module, Any]:
    model, given = slim["module"]
    return model, given(2, 8)


@pytest.mark.parametrize("how", ["onnx", "pt2"])
def test_what_gives_something_else_is_not_left_behind(
    slim: Any, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export._WAYS[how].write

    def wrong(program: Any, path: Path) -> Any:
        runtime = real(program, path)
        return lambda given: [y + 1 for y in runtime(given)]

    monkeypatch.setattr(export._WAYS[how], "write", wrong)
    with pytest.raises(VerificationError, match=rf"{how} on \(2, 3, 8, 8\)"):
        export_model(*_given(slim), how, tmp_path / "slim.x")
    assert not any(tmp_path.iterdir())


def test_without_onnx_it_says_what_to_install(slim: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime is not installed(.|\n)*pip install 'oto\[onnx\]'"):
        export_model(*_given(slim), "onnx", tmp_path / "slim.onnx")
    assert not any(tmp_path.iterdir())


def test_without_a_compiler_it_says_so(slim: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "icpx -O2")
    with pytest.raises(EmitterError, match="there is no C\\+\\+ compiler here: icpx -O2 is not found"):
        export_model(*_given(slim), "aoti", tmp_path / "slim.pt2")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("how", "name", "said"),
    [("tflite", "a", "use 'onnx', 'pt2', 'aoti'"), ("aoti", "slim.so", r"use a name that ends in \.pt2")],
)
def test_ways_and_names_that_are_none(slim: Any, how: str, name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(EmitterError, match=said):
        export_model(*_given(slim), how, tmp_path / name)


def test_what_a_runtime_does_not_know_is_told(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    pytest.importorskip("onnxruntime")
    with pytest.raises(EmitterError, match="Odd cannot be written as onnx"):
        export_model(Odd(), torch.randn(2, 3), "onnx", tmp_path / "odd.onnx")
    assert not any(tmp_path.iterdir())


def test_what_a_runtime_does_not_know_is_named(tmp_path: Path) -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)  # three dimensions, and onnx takes four

    pytest.importorskip("onnxruntime")
    with pytest.raises(EmitterError, match=r"Flat [^\n]*: AssertionError: only 4D[^$]*  at [^\n]*scaled_dot_product"):
        export_model(Flat(), torch.randn(2, 3, 4), "onnx", tmp_path / "flat.onnx")


def test_a_class_that_cannot_be_followed_is_named(tmp_path: Path) -> None:
    class Chooser(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(EmitterError, match=r"cannot follow Chooser:"):
        export_model(Chooser(), torch.randn(2, 3), "pt2", tmp_path / "chooser.pt2")


class Edges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.up(x).relu()
        return self.down(torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))


@pytest.mark.parametrize(("how", "name"), [("onnx", "edges.onnx"), ("pt2", "edges.pt2")])
def test_sizes_that_the_model_does_not_take_are_not_compared(how: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    given = torch.randn(6, 4), torch.tensor([[0, 1, 2, 5], [1, 2, 5, 0]])
    checks = export_model(Edges(), given, how, tmp_path / name)  # indices of six nodes fit no smaller graph
    assert len(checks) == 2 and all(c.passed for c in checks) and (tmp_path / name).is_file()


def test_a_model_that_takes_no_other_size_is_compared_on_the_example_with_a_warning(tmp_path: Path) -> None:
    class Picky(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_exporting() and len(x) != 6:
                raise ValueError("six, please")
            return super().forward(x)

    with pytest.warns(SetupWarning, match=r"Picky takes no other sizes[^$]*six, please[^$]*on the example only"):
        checks = export_model(Picky(4, 2), torch.randn(6, 4), "pt2", tmp_path / "picky.pt2")
    assert len(checks) == 1


def test_a_subnet_exports_itself(tmp_path: Path) -> None:
    oto = OTO(images(), pictures(2, 8))
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet()
    assert all(c.passed for c in subnet.export("pt2", tmp_path / "slim.pt2"))
    x = pictures(3, 14)
    assert relative_error(run(subnet.model, x), in_torch(tmp_path / "slim.pt2", x)) < 1e-5
