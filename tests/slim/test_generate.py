"""``generate`` of slim models of their own class: tokens and scores of the zeroed full model, whichever the cache.

The example has two rows of eight tokens and no cache; nothing that is generated from here has.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oto import OTO
from tests.zoo import transformers_zoo as zoo
from tests.zoo.models import lively, tokens

transformers = pytest.importorskip("transformers")

GQA = zoo.GQA | {"max_position_embeddings": 64}


def ids() -> dict[str, Tensor]:
    return {"input_ids": tokens()}


def causal(kind: str, config: str | None = None, **options: Any) -> zoo.Factory:
    return zoo.from_config(f"{kind}ForCausalLM", config or f"{kind}Config", ids, **options)


MODELS: dict[str, zoo.Factory] = {
    "gpt2": zoo.from_config(
        "GPT2LMHeadModel",
        "GPT2Config",
        ids,
        n_embd=64,
        n_head=4,
        n_layer=2,
        vocab_size=100,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "opt": causal(
        "OPT",
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        ffn_dim=128,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
    "llama": causal("Llama", **GQA),
    "mistral": causal("Mistral", **GQA, sliding_window=6),
    "qwen2": causal("Qwen2", **GQA),
    "qwen3": causal("Qwen3", **GQA, head_dim=16),
    "phi3": causal("Phi3", **GQA, **zoo.PAD),
    "gemma2": causal("Gemma2", **GQA, **zoo.PAD, head_dim=16, sliding_window=6),
    "gemma3": causal("Gemma3", "Gemma3TextConfig", **GQA, **zoo.PAD, head_dim=16, sliding_window=6),
    "t5": zoo.from_config("T5ForConditionalGeneration", "T5Config", zoo.pair, **zoo.T5, decoder_start_token_id=0),
    "bart": zoo.SEQ2SEQ["bart"],
    "whisper": zoo.AUDIO["whisper"],
    "mixtral": causal("Mixtral", **GQA, num_local_experts=4),
}

SLOW = {"gemma2", "gemma3", "qwen3", "mistral", "whisper", "bart"}
OPTIONS = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@dataclass
class Made:
    full: nn.Module
    slim: nn.Module


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[pytest.mark.zoo] if n in SLOW else []) for n in MODELS])
def made(request: pytest.FixtureRequest) -> Made:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, given = MODELS[request.param]()
    lively(model, given)
    oto = OTO(model, given)
    oto.random_set_zero_groups(0.5)
    subnet = oto.construct_subnet()
    assert subnet.emitter == "module" and type(subnet.model) is type(model)
    assert sum(p.numel() for p in subnet.model.parameters()) < 0.5 * sum(p.numel() for p in model.parameters())
    return Made(model, subnet.model)


def prompt(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    """Some sound, or text of rows that are not equally long."""
    generator = torch.Generator().manual_seed(length)
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(batch, 16, 24, generator=generator)}
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :2] = 0
    if model.config.is_encoder_decoder:
        mask = mask.flip(1)
    return {"input_ids": torch.randint(3, 99, (batch, length), generator=generator), "attention_mask": mask}


def generated(model: nn.Module, given: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """The tokens, and the scores of every step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        out = model.generate(**given, **OPTIONS | options, return_dict_in_generate=True, output_logits=True)
    return out["sequences"], torch.stack(out["logits"])


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}, {"do_sample": True}],
    ids=["dynamic", "uncached", "static", "beams", "sampled"],
)
@pytest.mark.parametrize(("batch", "length"), [(1, 11), (3, 5)])
def test_the_tokens_of_the_zeroed_model(made: Made, options: dict[str, Any], batch: int, length: int):
    given = prompt(made.full, batch, length)
    wanted, scores = generated(made.full, given, **options)
    found, own = generated(made.slim, given, **options)
    assert torch.equal(found, wanted)
    assert float((own - scores).abs().max() / scores.abs().max()) < 1e-5
    if batch > 1:  # or it would say little
        assert float(scores.flatten(0, 1).std(0).max()) > 1e-3 * float(scores.abs().max())
