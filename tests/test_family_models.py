"""Families of other people's networks: every member exact in float64, saved, loaded and viewed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oto import load_subnet
from oto.errors import CopiedWarning
from oto.slim.member import masked

pytestmark = [
    pytest.mark.filterwarnings("ignore::oto.errors.CollapseWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def resnet() -> tuple[Callable[[], nn.Module], Any]:
    models = pytest.importorskip("torchvision.models")
    small = {"block": models.resnet.BasicBlock, "layers": [2, 2, 1, 1], "num_classes": 5}
    return lambda: models.ResNet(**small), torch.randn(2, 3, 32, 32)


def mobilenet() -> tuple[Callable[[], nn.Module], Any]:
    models = pytest.importorskip("torchvision.models")
    return lambda: models.mobilenet_v2(num_classes=5, width_mult=0.25), torch.randn(2, 3, 32, 32)


def vit() -> tuple[Callable[[], nn.Module], Any]:
    models = pytest.importorskip("torchvision.models")
    small = {"image_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
    return lambda: models.VisionTransformer(**small, num_classes=5), torch.randn(2, 3, 16, 16)


def bert() -> tuple[Callable[[], nn.Module], Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=20, num_labels=5,
    )  # fmt: skip
    ids = torch.randint(50, (2, 7))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return lambda: transformers.BertForSequenceClassification(config), given


def llama() -> tuple[Callable[[], nn.Module], Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    return lambda: transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(50, (2, 7))}


def ran(net: nn.Module, given: Any) -> Tensor:
    output = net(**given) if isinstance(given, dict) else net(given)
    found: Tensor = getattr(output, "logits", output)
    return found


LONG = pytest.mark.zoo


@pytest.mark.parametrize(
    ("network", "options"),
    [
        pytest.param(resnet, {}, id="resnet", marks=LONG),
        pytest.param(mobilenet, {}, id="mobilenet", marks=LONG),
        pytest.param(vit, {}, id="vit"),
        pytest.param(vit, {"compress_mode": "both"}, id="vit-both"),
        pytest.param(resnet, {"compress_mode": "erase"}, id="resnet-erase", marks=LONG),
        pytest.param(bert, {}, id="bert", marks=LONG),
        pytest.param(llama, {}, id="llama", marks=LONG),
        pytest.param(llama, {"layout": "uniform"}, id="llama-uniform", marks=LONG),
    ],
)
def test_every_member_is_exact(network: Any, options: dict[str, Any], tmp_path: Path) -> None:
    from oto import OTO

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        make, given = network()
        model = make()
        oto = OTO(model, given, **options)
        family = oto.family(
            targets=[0.75, 0.5], variant="adamw", lr=1e-3, total_steps=7, freeze_step=3, ramp_steps=1, average_steps=2
        )
        model.train()
        for _ in range(7):

            def loss(output: Any) -> Tensor:
                logits = getattr(output, "logits", output).flatten(0, -2)
                return F.cross_entropy(logits, torch.arange(len(logits)) % 5)

            family.step(lambda net: net(**given) if isinstance(given, dict) else net(given), loss)
        subnets = family.construct(tmp_path / "family")
        for index, (member, subnet) in enumerate(zip(family.members, subnets, strict=True)):
            zeroed = masked(
                model, family._maker.analysis.partition, family._maker.analysis.groups, member.kept, member.part
            )
            with torch.no_grad():
                expected = ran(zeroed.eval(), given)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CopiedWarning)
                view = family.module(index)
            loaded = load_subnet(tmp_path / "family", make, member=index)
            for found in (
                family.run(index, lambda net: ran(net, given)),
                *(ran(n, given) for n in (subnet.model, loaded, view)),
            ):
                assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11 * float(expected.abs().max()))
            assert type(subnet.model) is type(model) is type(loaded)
        assert "compress_mode" not in options or any(
            group.segment and not len(member.kept[group.name])
            for group in family._maker.analysis.groups
            for member in family.members
        ), "no segment went"
        if "layout" in options:
            folder = tmp_path / "stock"
            subnets[1].save_pretrained(folder)
            stock = type(model).from_pretrained(folder, dtype=torch.float64).eval()
            assert torch.allclose(ran(stock, given), family.run(1, lambda net: ran(net, given)), rtol=1e-9, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)
