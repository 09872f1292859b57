"""Thin norms: what the full norm gives where all that was removed is zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from oto.nn import functional as full_count

K, D = 5, 8


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return full_count.layer_norm(x, (K,), weight, bias, 1e-5, full=(D,))


def group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    twice = [None if t is None else t.repeat(2) for t in (weight, bias)]
    return full_count.group_norm(x, 2, *twice, 1e-5, full=D, width=K)


def with_zeros(norm, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    padded = [None if t is None else F.pad(t, (0, D - K)) for t in (weight, bias)]
    if norm is layer_norm:
        return F.layer_norm(F.pad(x, (0, D - K)), (D,), *padded)[..., :K]
    full = F.pad(x.unflatten(1, (2, K)), (0, 0, 0, D - K)).flatten(1, 2)
    y = F.group_norm(full, 2, *[None if t is None else t.repeat(2) for t in padded])
    return y.unflatten(1, (2, D))[:, :, :K].flatten(1, 2)


def example(norm) -> Tensor:
    shape = (3, 4, K) if norm is layer_norm else (3, 2 * K, 6)
    return 3 + torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", [layer_norm, group_norm])
@pytest.mark.parametrize("affine", [True, False])
def test_a_thin_norm_gives_what_the_full_one_does(norm, affine: bool) -> None:
    x = example(norm)
    own = [torch.linspace(1, 2, K, dtype=x.dtype) if affine else None for _ in range(2)]
    expected, before = with_zeros(norm, x, *own), x.clone()
    torch.testing.assert_close(norm(x, *own), expected)
    with torch.no_grad():  # in place, but not in what was given
        torch.testing.assert_close(norm(x, *own), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("norm", [layer_norm, group_norm])
def test_gradients_of_a_thin_norm(norm) -> None:
    own = [torch.linspace(1, 2, K, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(norm, (example(norm).requires_grad_(), *own))


@pytest.mark.parametrize("norm", [layer_norm, group_norm])
@pytest.mark.parametrize("affine", [True, False])
def test_a_thin_norm_gives_the_same_compiled(norm, affine: bool) -> None:
    fast = torch.compile(norm, backend="eager", fullgraph=True)
    own = [torch.linspace(1, 2, K, dtype=torch.float64, requires_grad=True) if affine else None for _ in range(2)]
    x = example(norm).requires_grad_()
    given = [t for t in (x, *own) if t is not None]
    y, expected = fast(x, *own), with_zeros(norm, x, *own)
    torch.testing.assert_close(y, expected)
    pick = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    for found, wanted in zip(
        torch.autograd.grad(y, given, pick), torch.autograd.grad(expected, given, pick), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_a_compiled_norm_takes_one_pass_for_its_statistics() -> None:
    """Two passes, as not compiled, would take half as long again as the stock norm."""
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(layer_norm, backend=look)(example(layer_norm), None, None)
    assert any("var_mean" in name for name in seen) and not any("vector_norm" in name for name in seen)


@pytest.mark.parametrize("weighted", [True, False])
def test_a_thin_rms_norm_gives_what_the_full_one_does(weighted: bool) -> None:
    x, weight = example(layer_norm), torch.linspace(1, 2, K, dtype=torch.float64) if weighted else None
    padded = None if weight is None else F.pad(weight, (0, D - K))
    expected = F.rms_norm(F.pad(x, (0, D - K)), (D,), padded, 0.1)[..., :K]
    torch.testing.assert_close(full_count.rms_norm(x, (K,), weight, 0.1, full=(D,)), expected)


def test_a_constant_row_has_a_gradient() -> None:
    x = torch.zeros(1, K, requires_grad=True)
    layer_norm(x, None, None)[0, 0].backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32])
def test_dtypes_come_out_as_they_do_with_gradients(weight: torch.dtype) -> None:
    x, own = example(layer_norm).bfloat16(), [torch.ones(K, dtype=weight)] * 2
    with torch.no_grad():
        pruned = layer_norm(x, *own)
    assert torch.equal(pruned, layer_norm(x, *own)) and pruned.dtype == weight
