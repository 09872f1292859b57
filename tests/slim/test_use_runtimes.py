"""Runtimes that trace a module, or read a folder, take a slim model as they take the full one.

They are large: `pip install 'oto[zoo]'` brings them, and what is not there is skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from oto import OTO
from oto.nn import LayerNorm, OverriddenForward
from tests.nn.test_traced import Windows

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.filterwarnings(
        "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
    ),
]
MISSING = "pip install 'oto[zoo]'"
# no extra: it brings jaxtyping, whose plugin a newer pytest refuses, and opt_einsum, which changes how torch contracts
CONVERTER = "pip install litert-torch, and PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 pytest -W ignore"
CLOSE = 1e-4  # their kernels sum in another order, in float32


class Images(nn.Module):
    """A stem, and a block with a norm of its own width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 24, 4, 4), nn.LayerNorm(24)
        self.up, self.down, self.head = nn.Linear(24, 48), nn.Linear(48, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return self.head(self.norm(x).mean(1))


def slimmed(model: nn.Module, x: Tensor, **options: Any) -> Any:
    torch.manual_seed(0)
    oto = OTO(model.eval(), x, **options)
    oto.random_set_zero_groups(0.4)
    return oto.construct_subnet()


def windows() -> tuple[nn.Module, Tensor]:
    model, x = Windows(), torch.randn(2, 4, 5)
    subnet = slimmed(model, x)
    assert any(isinstance(m.forward, OverriddenForward) for m in subnet.model.modules())
    return subnet.model, x


def images() -> tuple[nn.Module, Tensor]:
    x = torch.randn(2, 3, 16, 16)
    subnet = slimmed(Images(), x)
    assert isinstance(subnet.model.norm, LayerNorm)
    return subnet.model, x


@pytest.mark.parametrize("make", [images, windows])
def test_openvino_takes_the_module(make: Any) -> None:
    ov = pytest.importorskip("openvino", reason=MISSING)
    model, x = make()
    compiled = ov.compile_model(ov.convert_model(model, example_input=x), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for given in (x, torch.randn(5, *x.shape[1:])):
        torch.testing.assert_close(torch.from_numpy(compiled([given.numpy()])[0]), model(given), rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("make", [images, windows])
def test_litert_takes_the_module(make: Any, tmp_path: Path) -> None:
    converter = pytest.importorskip("litert_torch", reason=CONVERTER)
    interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason=MISSING)
    model, x = make()
    converter.convert(model, (x,)).export(str(tmp_path / "slim.tflite"))
    program = interpreter.Interpreter(str(tmp_path / "slim.tflite"))
    program.allocate_tensors()
    program.set_tensor(program.get_input_details()[0]["index"], x.numpy())
    program.invoke()
    found = torch.from_numpy(program.get_tensor(program.get_output_details()[0]["index"]))
    torch.testing.assert_close(found, model(x), rtol=CLOSE, atol=CLOSE)


def test_ctranslate2_takes_the_folder(tmp_path: Path) -> None:
    """It divides the hidden width by the heads, so both stay; the feed-forward width it reads."""
    ct = pytest.importorskip("ctranslate2", reason=MISSING)
    hf = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    config = hf.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    ids = torch.randint(3, 32, (1, 7))
    whole = ["model.embed_tokens", "model.layers.*.self_attn"]
    subnet = slimmed(hf.LlamaForCausalLM(config), ids, layout="uniform", skip_patterns=whole)
    assert subnet.model.config.intermediate_size < 64 and subnet.model.config.hidden_size == 32
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 32)}
    tokens = hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    subnet.save_pretrained(tmp_path / "slim", tokens)
    ct.converters.TransformersConverter(str(tmp_path / "slim")).convert(str(tmp_path / "ct2"))
    generator = ct.Generator(str(tmp_path / "ct2"))
    given = [[f"w{i}" for i in ids[0].tolist()]]
    found = torch.from_numpy(np.array(generator.forward_batch(given)))
    torch.testing.assert_close(found, subnet.model(ids).logits, rtol=CLOSE, atol=CLOSE)
