"""Where the exported graph needs more than thinner tensors."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oto import OTO
from oto import nn as oto_nn
from oto.axes.registry import known
from oto.errors import EmitterError, GraphInputError, GraphModeError
from oto.slim.proof.compare import relative_error
from oto.slim.proof.run import run
from oto.trace.export import export


class Recurrent(nn.Module):
    """Composite operators without a rule of their own are taken apart in the exported graph, too."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.cell, self.out = nn.Linear(5, 8), nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(self.into(x))[0])


class Standardized(nn.Conv2d):
    """The filters are standardized by a batch norm that has no running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class ByDeviation(nn.Conv2d):
    """The same, spelled with ``std_mean``."""

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-6), self.bias, self.stride, self.padding)


class Permuted(nn.Module):
    """A layer norm gives contiguous memory, which is then viewed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 8, 1), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return self.out(y.view(x.shape[0], -1, y.shape[-1]).mean(1))


def _stack(conv: type[nn.Conv2d]) -> nn.Module:
    return nn.Sequential(
        conv(3, 8, 3), nn.ReLU(), conv(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )


@pytest.mark.parametrize(
    ("model", "x", "least"),
    [
        (Recurrent(), torch.randn(2, 4, 5), 14),
        (_stack(Standardized), torch.randn(2, 3, 8, 8), 16),
        (_stack(ByDeviation), torch.randn(2, 3, 8, 8), 16),
        (Permuted(), torch.randn(2, 3, 4, 4), 8),
    ],
    ids=["recurrent", "standardized", "by deviation", "permuted"],
)
def test_half_of_all_groups_removed(model: nn.Module, x: Tensor, least: int) -> None:
    oto = OTO(model.double(), x.double())
    assert sum(group.size for group in oto.node_groups if group.prunable) >= least
    oto.random_set_zero_groups(0.5, seed=1)
    assert oto.construct_subnet(emitter="graph").max_error < 1e-10


def test_nothing_is_taken_apart_without_need() -> None:
    ops = {str(node.op) for node in export(_stack(Standardized), torch.randn(2, 3, 8, 8), known).graph.nodes}
    assert "aten.batch_norm.default" in ops


def test_a_model_that_cannot_be_exported_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.score(x)
            good = y[y[:, 0] > 0]
            return self.out(good) if good.numel() else self.out(y)

    with pytest.raises(EmitterError, match=r"torch\.export cannot follow"):
        export(Picks(), torch.randn(4, 4))
    assert "def forward" not in capfd.readouterr().err


class Folded(nn.Module):
    """Heads and batch in one dimension, which is then cut into pieces."""

    def __init__(self, cut: Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cut, self.q, self.out = cut, nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        h = self.q(x).view(b, t, 4, 4).transpose(1, 2).reshape(b * 4, t, 4)
        h = torch.cat([piece.tanh() for piece in self.cut(h)])
        return self.out(h.view(b, 4, t, 4).transpose(1, 2).reshape(b, t, 16))


@pytest.mark.parametrize(
    ("batch", "cut"),
    [
        (1, lambda h: h.chunk(2)),
        (2, lambda h: h.chunk(2)),
        (1, lambda h: h.tensor_split(2)),
        (1, lambda h: h.split(h.shape[0] // 2)),
        (2, lambda h: h.split(h.shape[0] // 2)),
        (2, lambda h: h.split([h.shape[0] // 2, h.shape[0] - h.shape[0] // 2])),
        (4, lambda h: h.tensor_split((h.shape[0] // 4, h.shape[0] // 2))),
        (2, lambda h: h.tensor_split((4,))),
        (3, lambda h: h.tensor_split((4, 4 + (h.shape[0] - 4) // 2))),
    ],
)
def test_pieces_of_a_dimension_that_holds_the_batch(batch: int, cut: Callable[[Tensor], Sequence[Tensor]]) -> None:
    oto = OTO(Folded(cut).double(), torch.randn(batch, 6, 8, dtype=torch.float64))
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet(emitter="graph")
    assert subnet.max_error < 1e-12 and f"slim on sizes ({max(batch, 2) + 1}, 7, 8)" in {c.what for c in subnet.checks}
    assert subnet.cost_after.params < subnet.cost_before.params


def test_a_batch_that_only_the_extra_check_tries_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oto.slim.graph.emit._cut_by_share", lambda *given: False)  # sizes as the example has them
    oto = OTO(Folded(lambda h: h.chunk(2)).double(), torch.randn(2, 6, 8, dtype=torch.float64))
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet(emitter="graph")
    (note,) = subnet.notes
    assert note.startswith("slim takes the batch size of the example only") and f"note: {note}" in str(subnet)
    assert subnet.max_error < 1e-12 and "slim on random input" in {c.what for c in subnet.checks}


class Padded(nn.Module):
    """A block whose shortcut has no channels for half of its outputs: they are padded with zeros."""

    def __init__(self):
        super().__init__()
        self.first, self.wide, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(self.wide(x) + nn.functional.pad(x, (0, 0, 0, 0, 5, 3))).mean((2, 3))


def test_channels_that_a_shortcut_pads_with_zeros_may_go():
    torch.manual_seed(0)
    model = Padded().double()
    oto = OTO(model, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert sorted(g.size for g in oto.node_groups if g.prunable) == [3, 5, 8]
    with torch.no_grad():
        for p in (model.wide.weight, model.wide.bias):
            p[torch.tensor([0, 2, 14])] = 0  # two of the five in front, one of the three behind
    subnet = oto.construct_subnet(emitter="graph")
    assert subnet.max_error < 1e-12
    assert sorted(len(atoms) for atoms in subnet.kept.values()) == [2, 3, 8]


# --- what a graph takes -----------------------------------------------------------------------------------------------


def graph_of(model: nn.Module, given: Any) -> tuple[nn.Module, Any]:
    oto = OTO(model, given, allow_graph=True)
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet(emitter="graph")
    assert subnet.max_error < 1e-10 and subnet.cost_after.params < subnet.cost_before.params
    return model.eval(), subnet


def tiny_bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=100
    )
    return transformers.BertModel(config)


def tokens(batch: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 100, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def fcn() -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3, 2, 1))
    return nn.Sequential(first, nn.Upsample(scale_factor=2), nn.GroupNorm(4, 8), nn.Dropout(0.1), nn.Conv2d(8, 4, 1))


class Attends(nn.Module):
    """Tokens with their places, a mask that is made here, and options."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.place = nn.Embedding(50, 16), nn.Embedding(64, 16)
        self.qkv, self.out, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight
        self.dropout = nn.Dropout(0.5)

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, labels: Tensor | None = None, scale: float = 1.0, **more: Any
    ) -> dict[str, Any]:
        b, t = ids.shape
        x = self.embed(ids) + self.place(torch.arange(t, device=ids.device))
        q, k, v = self.qkv(x).view(b, t, 3, 4, 4).permute(2, 0, 3, 1, 4)
        seen = torch.ones(t, t, dtype=torch.bool, device=ids.device).tril()
        if mask is not None:
            seen = seen & mask[:, None, None].bool()
        y = F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).reshape(b, t, 16)
        x = self.norm(x + self.dropout(self.out(y)))
        return {"logits": self.head(x) * scale, "labels": labels}


def attended(batch: int, length: int) -> dict[str, Tensor]:
    return {"ids": torch.randint(0, 50, (batch, length)), "mask": torch.ones(batch, length, dtype=torch.long)}


@pytest.fixture(scope="module")
def attends() -> tuple[nn.Module, Any]:
    return graph_of(Attends(), attended(2, 16))


@pytest.mark.parametrize(("make", "given"), [(tiny_bert, tokens), (Attends, attended)])
def test_a_model_seen_on_32_tokens_takes_8_and_64(make: Any, given: Any) -> None:
    full, subnet = graph_of(make(), given(1, 32))
    assert set(subnet.model.free_dims.values()) == {(0, 1)} and not subnet.notes
    tried = {c.what for c in subnet.checks}
    assert {"slim on sizes (1, 8), (1, 8)", "slim on sizes (3, 36), (3, 36)"} <= tried
    for batch, length in ((3, 8), (1, 64), (5, 33)):
        x = given(batch, length)
        with torch.no_grad():
            assert relative_error(run(full, x), run(subnet.model, x)) < 1e-5


def test_sizes_that_have_to_change_together_do() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            assert x.shape[:2] == mask.shape
            return self.b(self.a(x).relu()) * mask[..., None]

    _, subnet = graph_of(Masked(), (torch.randn(2, 8, 4), torch.ones(2, 8)))
    tried = {c.what for c in subnet.checks}
    assert {"slim on sizes (1, 2, 4), (1, 2)", "slim on sizes (3, 9, 4), (3, 9)"} <= tried


def test_a_network_seen_on_one_image_size_takes_others() -> None:
    full, subnet = graph_of(fcn(), torch.randn(1, 3, 32, 32))
    assert subnet.model.free_dims == {"input": (0, 2, 3)}
    for shape in ((2, 3, 48, 20), (1, 3, 64, 64)):
        x = torch.randn(shape)
        assert relative_error(run(full, x), run(subnet.model, x)) < 1e-5


class Even(nn.Module):
    """Odd heights are padded, which the graph of an even one does not do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.shape[2] % 2:
            x = F.pad(x, (0, 0, 0, 1), value=1.0)
        return self.last(x.relu()).mean((2, 3))


def test_sizes_that_would_take_another_path_are_refused_not_wrong() -> None:
    full, subnet = graph_of(Even(), torch.randn(2, 3, 8, 6))
    x = torch.randn(2, 3, 10, 5)
    assert relative_error(run(full, x), run(subnet.model, x)) < 1e-5
    with pytest.raises(GraphInputError, match=r"made where x\.size\(\)\[2\] % 2 == 0(.|\n)*x \(2, 3, 7, 6\)"):
        subnet.model(torch.randn(2, 3, 7, 6))
    with pytest.raises(GraphInputError, match=r"x\.size\(\)\[1\] == 3"):
        subnet.model(torch.randn(2, 4, 8, 6))


class Settled(nn.Module):
    """The length is a number in the code, the batch is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu().view(-1, 6, 8).sum(1))


def test_a_size_that_the_code_states_is_not_free() -> None:
    _, subnet = graph_of(Settled(), torch.randn(2, 6, 4))
    assert subnet.model.free_dims == {"x": (0,)}
    with pytest.raises(GraphInputError, match=r"x\.size\(\)\[1\] == 6"):
        subnet.model(torch.randn(2, 12, 4))


class Asks(nn.Module):
    """Every layer asks something else about the length."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x) if x.shape[1] % (i + 2) < i + 2 and x.shape[1] > i else x
        return x.sum(1)


def test_where_the_code_asks_too_much_about_sizes_the_batch_alone_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oto.trace.export._MOST_CONDITIONS", 3)
    _, subnet = graph_of(Asks(), torch.randn(2, 7, 4))
    assert subnet.model.free_dims == {"x": (0,)}
    (note,) = subnet.notes
    assert note.startswith("of the sizes of its inputs only the batch is free: the model's code compares its sizes")


def test_a_graph_that_is_wrong_at_other_sizes_leaves_fewer_free(monkeypatch: pytest.MonkeyPatch) -> None:
    from oto.slim import emitters

    made = emitters.emit_graph

    def wrong_elsewhere(exported: Any, *rest: Any) -> Any:
        slim = made(exported, *rest)
        if exported.level == "all":
            slim.register_forward_hook(lambda m, args, y: y * (1 if args[0].shape[2:] == (32, 32) else 2))
        return slim

    monkeypatch.setattr(emitters, "emit_graph", wrong_elsewhere)
    _, subnet = graph_of(fcn(), torch.randn(2, 3, 32, 32))
    assert subnet.model.free_dims == {"input": (0,)} and "slim on batch of 4" in {c.what for c in subnet.checks}


# --- how it is called -------------------------------------------------------------------------------------------------


def test_arguments_go_by_name_in_any_order(attends: Any) -> None:
    _, subnet = attends
    slim, x = subnet.model, attended(2, 9)
    first = slim(**x)["logits"]
    assert torch.equal(first, slim(x["ids"], x["mask"])["logits"])
    assert torch.equal(first, slim(mask=x["mask"], ids=x["ids"], labels=None, scale=1.0, further=None)["logits"])
    assert list(inspect.signature(slim.forward).parameters) == ["ids", "mask", "labels", "scale", "more"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": torch.ones(2)}, "labels was passed, and the graph was made without it"),
        ({"scale": 2.0}, "scale was passed"),
        ({"further": 1}, "further was passed"),
        ({"mask": None}, "mask is None, and the graph was made with a tensor"),
        ({"mask": ...}, "mask is missing"),
    ],
)
def test_other_arguments_are_refused_by_name(attends: Any, change: dict[str, Any], said: str) -> None:
    given = {name: value for name, value in (attended(2, 9) | change).items() if value is not ...}
    with pytest.raises(GraphInputError, match=said) as caught:
        attends[1].model(**given)
    assert "made with  ids, mask" in str(caught.value) and "to fix" in str(caught.value)
    assert isinstance(caught.value, TypeError)


def test_a_number_among_the_arguments_is_part_of_the_graph() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, by: dict[str, Any], *rest: Tensor) -> Tensor:
            return self.b(self.a(x).relu() * by["k"]) + rest[0]

    one = torch.ones(2)
    full, subnet = graph_of(Scaled(), (torch.randn(3, 4), {"k": 2.0}, one))
    x = torch.randn(5, 4)
    assert torch.allclose(subnet.model(x, {"k": 2.0}, one), full(x, {"k": 2.0}, one), atol=1e-5)
    with pytest.raises(GraphInputError, match=r"by is a dict, and the graph was made with \{'k': 2\.0\}"):
        subnet.model(x, {"k": 3.0}, one)
    with pytest.raises(GraphInputError, match="rest_0 is missing"):
        subnet.model(x, {"k": 2.0})


# --- what it is -------------------------------------------------------------------------------------------------------


def test_train_mode_is_refused_or_allowed_by_name(attends: Any) -> None:
    slim = copy.deepcopy(attends[1].model)
    for around in (slim, nn.Sequential(slim)):
        with pytest.raises(GraphModeError, match="no dropout, and its batch norms do not move") as caught:
            around.train()
        assert "train_as_eval()" in str(caught.value) and not slim.training
        around.eval()
    slim.train_as_eval()
    x = attended(2, 9)
    assert slim.training and torch.equal(slim(**x)["logits"], attends[1].model(**x)["logits"])
    slim(**x)["logits"].square().mean().backward()
    assert all(p.grad is not None for p in slim.parameters())
    assert slim.eval().train().training  # allowed for good


def test_batch_norms_of_a_graph_that_is_trained_do_not_move() -> None:
    _, subnet = graph_of(fcn(), torch.randn(2, 3, 32, 32))
    before = copy.deepcopy(subnet.model.state_dict())
    subnet.model.train_as_eval()(torch.randn(2, 3, 32, 32) + 3)
    assert all(torch.equal(value, before[name]) for name, value in subnet.model.state_dict().items())


def test_its_leaves_are_stock_modules_where_the_model_had_them(attends: Any) -> None:
    full, subnet = attends
    kinds = {name: type(module) for name, module in subnet.model.named_modules() if type(module) is not nn.Module}
    wanted = {name: type(module) for name, module in full.named_modules() if not isinstance(module, nn.Dropout)}
    counted = oto_nn.LayerNorm  # over a width of which half is gone
    assert {**kinds, "": None} == {**wanted, "norm": counted, "": None}
    assert subnet.model.head.weight is subnet.model.embed.weight and subnet.model.qkv.out_features < 48
    _, subnet = graph_of(fcn(), torch.randn(2, 3, 32, 32))
    assert [type(module).__name__ for module in subnet.model.modules()][1:] == [
        "Module",
        "Conv2d",
        "BatchNorm2d",
        "Conv2d",
        "GroupNorm",
        "Conv2d",
    ]
    left = {str(node.target) for node in subnet.model.graph.nodes if node.op == "call_function"}
    assert not left & {"aten.conv2d.default", "aten.batch_norm.default", "aten.group_norm.default"}


class Shares(nn.Module):
    """One layer is called twice; another's weight is read for something else as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.b(self.a(x)).relu()) * self.scale
        return self.c(y) + F.linear(y, self.c.weight * 2)


def test_a_layer_that_is_called_twice_is_one_module() -> None:
    full, subnet = graph_of(Shares(), torch.randn(3, 4))
    called = [node.target for node in subnet.model.graph.nodes if node.op == "call_module"]
    assert called == ["a", "b", "b", "c"] and isinstance(subnet.model.scale, nn.Parameter)
    assert {name for name, _ in subnet.model.named_parameters()} == {name for name, _ in full.named_parameters()}


def test_quantisers_find_its_layers(attends: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is on its way out
        quantized = torch.ao.quantization.quantize_dynamic(attends[1].model, {nn.Linear}, dtype=torch.qint8)
    layers = [m for m in quantized.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    x = attended(2, 9)
    error = relative_error(run(attends[1].model, x), run(quantized, x))
    assert len(layers) == 3 and 0 < error < 0.1


def test_torchao_finds_its_layers(attends: Any) -> None:
    slim, x = copy.deepcopy(attends[1].model), attended(2, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, of what it deprecates
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(slim, torchao.Int8WeightOnlyConfig())
    layers = [m for m in slim.modules() if isinstance(m, nn.Linear) and type(m.weight.data) is not Tensor]
    assert len(layers) == 3
    with torch.no_grad():
        error = (slim(**x)["logits"] - attends[1].model(**x)["logits"]).abs().max()
    assert 0 < error < 0.5


def test_it_is_where_its_inputs_are(attends: Any) -> None:
    for slim in (attends[1].model, attends[1].model.half()):
        named = [node for node in slim.graph.nodes if "cpu" in f"{node.args} {node.kwargs}"]
        assert not named
    slim = copy.deepcopy(attends[1].model).float().to("meta")
    x = {name: value.to("meta") for name, value in attended(2, 9).items()}
    assert slim(**x)["logits"].is_meta
    attends[1].model.float()


def test_it_is_copied_and_pickled(attends: Any, tmp_path: Any) -> None:
    slim, x = attends[1].model, attended(2, 9)
    torch.save(slim, tmp_path / "slim.pt")
    for again in (copy.deepcopy(slim), torch.load(tmp_path / "slim.pt", weights_only=False)):
        assert type(again).__mro__[1] is type(slim).__mro__[1] and again.head.weight is again.embed.weight
        assert again.head.weight is not slim.head.weight
        assert torch.equal(again(**x)["logits"], slim(**x)["logits"]) and again.free_dims == slim.free_dims
        with pytest.raises(GraphInputError):
            again(**x, labels=x["ids"])
        with pytest.raises(GraphModeError):
            again.train()
        with torch.no_grad():
            again.out.weight.zero_()
        assert not torch.equal(again(**x)["logits"], slim(**x)["logits"])


def test_every_kind_of_argument_of_a_call_can_be_pickled() -> None:
    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
            y = self.a(x)[:, 1:-1].to(torch.float64, memory_format=torch.contiguous_format).float()
            return self.b(y).amax(1), {"more": [y.mean((0, 2), dtype=torch.float64), torch.full((2,), float("inf"))]}

    _, subnet = graph_of(Kinds(), torch.randn(2, 6, 4))
    again, x = pickle.loads(pickle.dumps(subnet.model)), torch.randn(3, 9, 4)
    assert relative_error(run(subnet.model, x), run(again, x)) == 0


def test_it_compiles_in_one_piece(attends: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attends[1].model, backend="eager", fullgraph=True, dynamic=True)
    for length in (9, 12):
        x = attended(2, length)
        torch.testing.assert_close(compiled(**x)["logits"], attends[1].model(**x)["logits"])  # norms differ in rounding
    torch._dynamo.reset()


def test_an_adapter_finds_its_layers(attends: Any) -> None:
    peft = pytest.importorskip("peft")
    slim = copy.deepcopy(attends[1].model)
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv", "out"], r=2), slim)
    x = attended(2, 9)
    adapted(**x)["logits"].sum().backward()
    lora = {name for name, p in adapted.named_parameters() if p.requires_grad and "lora_B" in name}
    assert len(lora) == 2 and all(adapted.get_parameter(name).grad.abs().sum() > 0 for name in lora)
