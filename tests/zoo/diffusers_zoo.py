"""Architectures of diffusers: random weights, tiny configs, no downloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Factory = Callable[[], tuple[nn.Module, Any]]


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _diffusers(name: str, inputs: Callable[[], Any], **options: Any) -> Factory:
    def make() -> tuple[nn.Module, Any]:
        import diffusers

        diffusers.logging.set_verbosity_error()
        return getattr(diffusers, name)(**options), inputs()

    return make


def steps() -> torch.Tensor:
    return torch.tensor([3, 700])


def noisy(channels: int = 4, size: int = 16) -> dict[str, torch.Tensor]:
    return {"sample": floats(2, channels, size, size), "timestep": steps()}


def conditioned(width: int = 24, channels: int = 4) -> dict[str, torch.Tensor]:
    return noisy(channels) | {"encoder_hidden_states": floats(2, 5, width)}


UNET = {"sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
CONDITIONED = UNET | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 24, "attention_head_dim": 8,
}  # fmt: skip
VAE = {
    "block_out_channels": (16, 32), "norm_num_groups": 8, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip


def positions(n: int) -> torch.Tensor:
    ids = torch.zeros(n, 3)
    ids[:, 1] = torch.arange(n)
    return ids


ZOO: dict[str, Factory] = {
    "autoencoder_kl": _diffusers("AutoencoderKL", lambda: floats(2, 3, 32, 32), **VAE, sample_size=32),
    "autoencoder_tiny": _diffusers("AutoencoderTiny", lambda: floats(2, 3, 32, 32), encoder_block_out_channels=(16, 16),
                                   decoder_block_out_channels=(16, 16), num_encoder_blocks=(1, 1),
                                   num_decoder_blocks=(1, 1)),
    "autoencoder_asymmetric": _diffusers(
        "AsymmetricAutoencoderKL", lambda: floats(2, 3, 32, 32), down_block_out_channels=(16, 32),
        up_block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8,
    ),
    "autoencoder_dc": _diffusers(
        "AutoencoderDC", lambda: floats(2, 3, 32, 32), encoder_block_out_channels=(16, 32), decoder_block_out_channels=(16, 32),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), latent_channels=4, attention_head_dim=8,
        encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
    ),
    "vq_model": _diffusers("VQModel", lambda: floats(2, 3, 32, 32), **VAE | {"latent_channels": 3}, num_vq_embeddings=16),
    "unet2d": _diffusers("UNet2DModel", noisy, **UNET, in_channels=4, out_channels=4, attention_head_dim=8,
                         down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                         up_block_types=("AttnUpBlock2D", "UpBlock2D")),
    "unet2d_skip": _diffusers("UNet2DModel", lambda: noisy(3), **UNET, in_channels=3, out_channels=3,
                              down_block_types=("SkipDownBlock2D", "SkipDownBlock2D"),
                              up_block_types=("SkipUpBlock2D", "SkipUpBlock2D")),
    "unet2d_condition": _diffusers("UNet2DConditionModel", conditioned, **CONDITIONED),
    "unet2d_condition_xl": _diffusers(
        "UNet2DConditionModel",
        lambda: conditioned() | {"added_cond_kwargs": {"text_embeds": floats(2, 16), "time_ids": floats(2, 6)}},
        **CONDITIONED | {"attention_head_dim": (2, 4)}, use_linear_projection=True, transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
    ),
    "unet1d": _diffusers("UNet1DModel", lambda: {"sample": floats(2, 14, 16), "timestep": steps()}, sample_size=16,
                         in_channels=14, out_channels=14, block_out_channels=(16, 32), layers_per_block=1,
                         time_embedding_type="positional", extra_in_channels=0, use_timestep_embedding=True,
                         down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"), up_block_types=("UpResnetBlock1D",),
                         mid_block_type="MidResTemporalBlock1D", out_block_type="OutConv1DBlock", act_fn="swish"),
    "unet3d_condition": _diffusers(
        "UNet3DConditionModel",
        lambda: {"sample": floats(2, 4, 3, 8, 8), "timestep": steps(), "encoder_hidden_states": floats(2, 5, 24)},
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=24,
        attention_head_dim=8, down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
    ),
    "controlnet": _diffusers(
        "ControlNetModel", lambda: conditioned() | {"controlnet_cond": floats(2, 3, 32, 32)}, block_out_channels=(16, 32),
        layers_per_block=1, norm_num_groups=8, cross_attention_dim=24, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), conditioning_embedding_out_channels=(8, 16),
    ),
    "dit": _diffusers("DiTTransformer2DModel",
                      lambda: {"hidden_states": floats(2, 4, 16, 16), "timestep": steps(), "class_labels": torch.tensor([1, 5])},
                      num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=16,
                      patch_size=4, num_embeds_ada_norm=10, norm_num_groups=8),
    "pixart": _diffusers("PixArtTransformer2DModel",
                         lambda: {"hidden_states": floats(2, 4, 16, 16), "encoder_hidden_states": floats(2, 5, 24), "timestep": steps(),
                                  "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
                         num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=16,
                         patch_size=4, cross_attention_dim=32, caption_channels=24, norm_num_groups=8),
    "sana": _diffusers("SanaTransformer2DModel",
                       lambda: {"hidden_states": floats(2, 4, 8, 8), "encoder_hidden_states": floats(2, 5, 24), "timestep": steps()},
                       in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=2,
                       num_cross_attention_heads=4, cross_attention_head_dim=8, cross_attention_dim=32,
                       caption_channels=24, sample_size=8),
    "sd3": _diffusers("SD3Transformer2DModel",
                      lambda: {"hidden_states": floats(2, 4, 8, 8), "encoder_hidden_states": floats(2, 5, 24),
                               "pooled_projections": floats(2, 16), "timestep": steps()},
                      sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
                      joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
                      pos_embed_max_size=8),
    "flux": _diffusers("FluxTransformer2DModel",
                       lambda: {"hidden_states": floats(2, 16, 8), "encoder_hidden_states": floats(2, 5, 24),
                                "pooled_projections": floats(2, 16), "timestep": torch.rand(2),
                                "img_ids": positions(16), "txt_ids": positions(5)},
                       patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16,
                       num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8)),
    "auraflow": _diffusers("AuraFlowTransformer2DModel",
                           lambda: {"hidden_states": floats(2, 4, 8, 8), "encoder_hidden_states": floats(2, 5, 24),
                                    "timestep": torch.rand(2)},
                           sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
                           attention_head_dim=8, num_attention_heads=4, joint_attention_dim=24, caption_projection_dim=32,
                           out_channels=4, pos_embed_max_size=16),
    "cogvideox": _diffusers("CogVideoXTransformer3DModel",
                            lambda: {"hidden_states": floats(2, 3, 4, 8, 8), "encoder_hidden_states": floats(2, 5, 24),
                                     "timestep": steps()},
                            num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=16,
                            text_embed_dim=24, num_layers=2, sample_width=8, sample_height=8, sample_frames=9, patch_size=2,
                            max_text_seq_length=5),
    "ltx": _diffusers("LTXVideoTransformer3DModel",
                      lambda: {"hidden_states": floats(2, 16, 4), "encoder_hidden_states": floats(2, 5, 24), "timestep": steps(),
                               "encoder_attention_mask": torch.ones(2, 5), "num_frames": 1, "height": 4, "width": 4},
                      in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
                      num_layers=2, caption_channels=24),
    "wan": _diffusers("WanTransformer3DModel",
                      lambda: {"hidden_states": floats(2, 4, 2, 8, 8), "encoder_hidden_states": floats(2, 5, 24), "timestep": steps()},
                      patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
                      text_dim=24, freq_dim=16, ffn_dim=48, num_layers=2, cross_attn_norm=True,
                      qk_norm="rms_norm_across_heads", rope_max_seq_len=32),
    "prior": _diffusers("PriorTransformer",
                        lambda: {"hidden_states": floats(2, 16), "timestep": steps(), "proj_embedding": floats(2, 16),
                                 "encoder_hidden_states": floats(2, 5, 16)},
                        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=16, num_embeddings=5,
                        additional_embeddings=4),
    "temporal_vae": _diffusers("AutoencoderKLTemporalDecoder", lambda: {"sample": floats(2, 3, 16, 16), "num_frames": 2},
                               block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2),
}  # fmt: skip
