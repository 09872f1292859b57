"""As users run it: stock modules with fast paths give, slim, what they give full, in every mode and with every mask."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from oto import OTO
from oto.slim.proof.compare import relative_error

WIDTH, HEADS, LENGTH = 16, 4, 6
FEW = 1e-5  # float32, on kernels that round otherwise
PADDING = torch.tensor([[False] * LENGTH, [False] * 4 + [True] * 2, [False] * 3 + [True] * 3])
GAPS = torch.tensor([[False] * LENGTH, [True, *[False] * 5], [False, True, *[False] * 4]])  # not at the end
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, float("-inf"))


MASKS = {
    "none": {},
    "padding": {"padding": PADDING},
    "padding, additive": {"padding": additive(PADDING)},
    "padding with gaps": {"padding": GAPS},
    "attention": {"mask": CAUSAL},
    "attention, additive": {"mask": additive(CAUSAL)},
    "causal": {"mask": additive(CAUSAL), "is_causal": True},
    "both": {"mask": CAUSAL, "padding": PADDING},
    "both, additive": {"mask": additive(CAUSAL), "padding": additive(PADDING)},
}
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


class Net(nn.Module):
    """A module with a fast path, between two layers of which the widths go along."""

    def __init__(self, inner: nn.Module, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.into, self.inner, self.out = nn.Linear(5, WIDTH), inner, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, padding: Tensor | None = None, is_causal: bool = False):
        h = self.into(x)
        h = self.ran(h if self.batch_first else h.transpose(0, 1), mask, padding, is_causal)
        return self.out(h if self.batch_first else h.transpose(0, 1))

    def ran(self, h, mask, padding, is_causal):
        return self.inner(h, mask, src_key_padding_mask=padding, is_causal=is_causal)


class Attending(Net):
    need_weights = False

    def ran(self, h, mask, padding, is_causal):
        return self.inner(h, h, h, padding, self.need_weights, mask, is_causal=is_causal)[0]


class Weighing(Attending):
    need_weights = True


class Decoding(Net):
    def ran(self, h, mask, padding, is_causal):
        return self.inner(h, h + 1, mask, None, padding, padding, tgt_is_causal=is_causal)


class Both(Net):
    def ran(self, h, mask, padding, is_causal):
        return self.inner(h, h + 1, mask, mask, None, padding, padding, padding)


def slim_of(model: nn.Module, *given: object):
    for norm in model.modules():
        if isinstance(norm, nn.LayerNorm):
            nn.init.normal_(norm.bias)
    oto = OTO(model.eval(), given)
    oto.random_set_zero_groups(0.5)
    return oto.construct_subnet()


def agree(full: nn.Module, slim: nn.Module, masks: object = tuple(MASKS), train: bool = True) -> None:
    """Of one full model and its slim form, on every mask and in every mode."""
    x = torch.randn(3, LENGTH, 5)
    for name, mode, training in itertools.product(masks, MODES, (False, True) if train else (False,)):
        full.train(training), slim.train(training)
        with MODES[mode]():
            wanted, given = (model(x, **MASKS[name]) for model in (full, slim))
        assert relative_error([wanted.detach()], [given.detach()]) < FEW, (name, mode, training)


def layer(kind: type[nn.Module] = nn.TransformerEncoderLayer, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return kind(WIDTH, HEADS, 24, **{"dropout": 0.0, "batch_first": True} | options)


@pytest.mark.filterwarnings("ignore:.*nested tensor", "ignore:Support for mismatched")
@pytest.mark.parametrize(
    ("options", "norm", "nested"),  # of other options, torch packs nothing
    [
        ({}, True, True),
        ({}, False, True),
        ({}, True, False),
        ({"norm_first": True}, True, False),
        ({"batch_first": False}, True, False),
    ],
)
def test_encoders(options, norm, nested):
    last = nn.LayerNorm(WIDTH) if norm else None
    encoder = nn.TransformerEncoder(layer(**options), 2, last, enable_nested_tensor=nested)
    full = Net(encoder, **{k: v for k, v in options.items() if k == "batch_first"})
    subnet = slim_of(full, torch.randn(3, LENGTH, 5), None, PADDING)
    assert subnet.emitter == "module" and type(subnet.model) is Net and not subnet.notes
    assert subnet.model.into.out_features < WIDTH
    assert [c for c in subnet.checks if c.what == "slim on the example, as users run it"]
    agree(full, subnet.model)


@pytest.mark.filterwarnings("ignore:.*nested tensor", "ignore:Support for mismatched")
def test_an_encoder_of_which_one_layer_was_thinned():
    """The first layer would go on packing, and hand the second one a nested tensor."""
    torch.manual_seed(0)
    full = Net(nn.TransformerEncoder(layer(), 2)).eval()
    oto = OTO(full, (torch.randn(3, LENGTH, 5), None, PADDING))
    heads = next(
        g
        for g in oto.node_groups
        if g.prunable
        and any("layers.1.self_attn" in s.parameter for s in g.zeros)
        and not any("layers.0" in s.parameter for s in g.slices)
    )
    parameters = dict(full.named_parameters())
    with torch.no_grad():
        for piece in heads.zeros:
            piece.of(parameters[piece.parameter])[: heads.size // 2] = 0
    subnet = oto.construct_subnet()
    assert type(subnet.model.inner.layers[0].self_attn) is nn.MultiheadAttention
    assert type(subnet.model.inner.layers[1].self_attn) is not nn.MultiheadAttention
    agree(full, subnet.model)


@pytest.mark.filterwarnings("ignore:.*nested tensor", "ignore:Support for mismatched")
def test_an_encoder_of_the_users_own_is_told():
    """Its class cannot be replaced; what it gives for padding in inference mode is something else, which is said."""

    class Own(nn.TransformerEncoder):
        pass

    full = Net(Own(layer(), 1))
    subnet = slim_of(full, torch.randn(3, LENGTH, 5), None, PADDING)
    assert any("fast paths make the full model give something else" in note for note in subnet.notes)
    with torch.inference_mode():
        subnet.model(torch.randn(3, LENGTH, 5), None, PADDING)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}, {"batch_first": False}], ids=str)
def test_encoder_layers(options):
    full = Net(layer(**options), options.get("batch_first", True))
    subnet = slim_of(full, torch.randn(3, LENGTH, 5), None, PADDING)
    assert subnet.emitter == "module"
    agree(full, subnet.model)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("kind", [Attending, Weighing])
@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"bias": False}], ids=str)
def test_attention(kind, options):
    torch.manual_seed(0)
    full = kind(
        nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True} | options), options.get("batch_first", True)
    )
    subnet = slim_of(full, torch.randn(3, LENGTH, 5))
    assert subnet.emitter == "module"
    agree(full, subnet.model)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"batch_first": False}], ids=str)
def test_decoders(options):
    inner = nn.TransformerDecoder(layer(nn.TransformerDecoderLayer, **options), 1, nn.LayerNorm(WIDTH))
    full = Decoding(inner, options.get("batch_first", True))
    subnet = slim_of(full, torch.randn(3, LENGTH, 5), None, PADDING)
    assert subnet.emitter == "module"
    agree(full, subnet.model, ["none", "padding", "attention", "causal", "both"])


@pytest.mark.filterwarnings("ignore:.*nested tensor", "ignore:Support for mismatched")
def test_a_whole_transformer():
    torch.manual_seed(0)
    full = Both(nn.Transformer(WIDTH, HEADS, 1, 1, 24, 0.0, batch_first=True))
    subnet = slim_of(full, torch.randn(3, LENGTH, 5), None, PADDING)
    assert subnet.emitter == "module"
    agree(full, subnet.model, ["none", "padding", "padding, additive", "attention", "both"])


@pytest.mark.parametrize("nested", [True, False])
def test_a_padding_mask_does_not_keep_an_encoder_whole(nested):
    """Its class is asked with layers that are thinned in one try and whole in the next."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    groups = {
        g.name
        for g in OTO(model, {"src": torch.randn(2, 9, 32), "src_key_padding_mask": padding}).node_groups
        if g.prunable
    }
    assert groups == {g.name for g in OTO(model, torch.randn(2, 9, 32)).node_groups if g.prunable} and groups
