"""Other people's models, by name: how to make one and an input for it. Small inputs, tiny configs, no downloads."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from oto.slim.copying import copied
from oto.trace.inputs import arguments


def image(size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def tokens(length: int = 8, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 99, (batch, length), generator=torch.Generator().manual_seed(1))


def _torchvision(name: str, size: int = 64, **options: Any) -> Callable[[], tuple[nn.Module, Any]]:
    def make() -> tuple[nn.Module, Any]:
        import torchvision

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torchvision.models.get_model(name, weights=None, **options), image(size)

    return make


def _transformers(
    name: str, config: str, inputs: Callable[[], Any], **options: Any
) -> Callable[[], tuple[nn.Module, Any]]:
    def make() -> tuple[nn.Module, Any]:
        import transformers

        transformers.logging.set_verbosity_error()
        return getattr(transformers, name)(getattr(transformers, config)(**options)), inputs()

    return make


TINY = {
    "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100,
}  # fmt: skip

TORCHVISION: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet18": _torchvision("resnet18"),
    "resnet50": _torchvision("resnet50"),
    "vgg16_bn": _torchvision("vgg16_bn"),
    "densenet121": _torchvision("densenet121"),
    "mobilenet_v3_small": _torchvision("mobilenet_v3_small"),
    "efficientnet_b0": _torchvision("efficientnet_b0"),
    "regnet_y_400mf": _torchvision("regnet_y_400mf"),
    "resnext50_32x4d": _torchvision("resnext50_32x4d"),
    "shufflenet_v2_x1_0": _torchvision("shufflenet_v2_x1_0"),
    "googlenet": _torchvision("googlenet", init_weights=False),
    "inception_v3": _torchvision("inception_v3", 96, init_weights=False),
    "convnext_tiny": _torchvision("convnext_tiny"),
    "vit_b_16": _torchvision("vit_b_16", 64, image_size=64),
    "swin_t": _torchvision("swin_t"),
    "maxvit_t": _torchvision("maxvit_t", 224),
}  # fmt: skip

TRANSFORMERS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "bert": _transformers("BertModel", "BertConfig", tokens, **TINY),
    "gpt2": _transformers(
        "GPT2LMHeadModel", "GPT2Config", tokens, n_embd=64, n_head=4, n_layer=2, vocab_size=100, bos_token_id=0,
        eos_token_id=0,
    ),
    "llama": _transformers("LlamaForCausalLM", "LlamaConfig", tokens, **TINY, num_key_value_heads=2),
    "t5": _transformers(
        "T5ForConditionalGeneration", "T5Config",
        lambda: {"input_ids": tokens(), "decoder_input_ids": tokens(6)},
        d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=100,
    ),
    "vit": _transformers(
        "ViTForImageClassification", "ViTConfig", lambda: image(32), hidden_size=64, num_attention_heads=4,
        intermediate_size=128, num_hidden_layers=2, image_size=32, patch_size=8,
    ),
}  # fmt: skip

ZOO = TORCHVISION | TRANSFORMERS


def lively(model: nn.Module, inputs: Any) -> nn.Module:
    """Give a fresh model weights under which a mistake would show: no zero biases, no zero layers, real statistics."""
    generator = torch.Generator().manual_seed(2)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if parameter.ndim <= 1:
                parameter.add_(noise, alpha=0.1)
            elif not parameter.any():
                parameter.add_(noise, alpha=0.05)
    return settled(model, inputs)


def settled(model: nn.Module, inputs: Any) -> nn.Module:
    """Estimate the statistics of batch norms anew, on the example, as training would.

    A copy does: the model stays as its library made it, without what a forward leaves in it.
    """
    other = copied(model, {})
    pairs = [(m, o) for m, o in zip(model.modules(), other.modules(), strict=True) if isinstance(m, _BatchNorm)]
    for _, norm in pairs:
        norm.momentum = None
        norm.reset_running_stats()
        norm.train()
    if pairs:
        args, kwargs = arguments(inputs)
        with torch.no_grad():
            other(*args, **kwargs)
    for norm, measured in pairs:
        norm.eval().momentum = None
        for mine, buffer in zip(norm.buffers(), measured.buffers(), strict=True):
            mine.copy_(buffer)
    return model
