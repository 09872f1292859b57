"""Networks of nineteen packages of the Python index, by as many hands: random weights, tiny, no downloads."""

from __future__ import annotations

import importlib
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .diffusers_zoo import floats
from .models import image, tokens

Factory = Callable[[], tuple[nn.Module, Any]]


def _of(path: str, inputs: Callable[[], Any], *args: Any, **options: Any) -> Factory:
    """``module:name``, called with the arguments; those that are functions are called first."""

    def make() -> tuple[nn.Module, Any]:
        module, _, name = path.partition(":")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = operator.attrgetter(name)(importlib.import_module(module))
            return made(*args, **{k: v() if callable(v) else v for k, v in options.items()}), inputs()

    return make


def _in_double(factory: Factory) -> Factory:
    """Made in float64, for tensors that are plain attributes and stay what they are."""

    def make() -> tuple[nn.Module, Any]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return factory()
        finally:
            torch.set_default_dtype(before)

    return make


def volume(size: int = 16, channels: int = 1) -> torch.Tensor:
    return floats(2, channels, size, size, size)


def graph(**more: Any) -> dict[str, Any]:
    """Nine nodes in a ring, with some chords."""
    ring = torch.arange(9)
    ends = torch.cat([(ring + 1) % 9, (ring[:4] + 3) % 9])
    return {"x": floats(9, 8), "edge_index": torch.stack([torch.cat([ring, ring[:4]]), ends])} | more


def _layers(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layers: nn.Module = getattr(importlib.import_module("x_transformers"), name)(**options)
        return layers

    return make


def _clip(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module("open_clip.model"), name)(**options)


VIT = {"image_size": 32, "num_classes": 10}
HEADS = {"dim": 32, "heads": 2, "dim_head": 16}
BLOCKS = {"patch_size": 8, "depth": 2, "mlp_dim": 48}
TEXT = {"num_tokens": 100, "dim": 32, "depth": 2, "heads": 2}
STAGES = {f"s{i}_{what}": n for i, width in enumerate((16, 24, 32, 48), 1)
          for what, n in {"emb_dim": width, "local_patch_size": 2, "global_k": 2, "depth": 1}.items()}  # fmt: skip

# the module to import for each package of the index: architecture: how to make it
PACKAGES: dict[str, dict[str, Factory]] = {
    "vit_pytorch": {
        "vit_pytorch_vit": _of("vit_pytorch.vit:ViT", lambda: image(32), **VIT, **HEADS, **BLOCKS),
        "vit_pytorch_cait": _of("vit_pytorch.cait:CaiT", lambda: image(32), **VIT, **HEADS, **BLOCKS, cls_depth=1),
        "vit_pytorch_deepvit": _of("vit_pytorch.deepvit:DeepViT", lambda: image(32), **VIT, **HEADS, **BLOCKS),
        "vit_pytorch_xcit": _of("vit_pytorch.xcit:XCiT", lambda: image(32), **VIT, **HEADS, **BLOCKS, cls_depth=1),
        "vit_pytorch_rvt": _of("vit_pytorch.rvt:RvT", lambda: image(32), **VIT, **HEADS, **BLOCKS),
        "vit_pytorch_nvit": _of("vit_pytorch.normalized_vit:nViT", lambda: image(32), **VIT, **HEADS, **BLOCKS),
        "vit_pytorch_ats": _of("vit_pytorch.ats_vit:ViT", lambda: image(32), **VIT, **HEADS, **BLOCKS,
                               max_tokens_per_depth=(12, 6)),
        "vit_pytorch_t2t": _of("vit_pytorch.t2t:T2TViT", lambda: image(32), **VIT, dim=32, depth=1, heads=2, mlp_dim=48, dim_head=16,
                               t2t_layers=((3, 2), (3, 2))),
        "vit_pytorch_nest": _of("vit_pytorch.nest:NesT", lambda: image(32), **VIT, dim=16, patch_size=4, heads=2,
                                num_hierarchies=2, block_repeats=(1, 1), dim_head=8),
        "vit_pytorch_cross_vit": _of("vit_pytorch.cross_vit:CrossViT", lambda: image(32), **VIT, sm_dim=24, lg_dim=32, sm_patch_size=8,
                                     sm_enc_heads=2, sm_enc_mlp_dim=32, sm_enc_dim_head=8, lg_patch_size=16, lg_enc_depth=1,
                                     lg_enc_heads=2, lg_enc_mlp_dim=32, lg_enc_dim_head=8, cross_attn_depth=1, cross_attn_heads=2,
                                     cross_attn_dim_head=8, depth=1),
        "vit_pytorch_twins": _of("vit_pytorch.twins_svt:TwinsSVT", lambda: image(64), num_classes=10, **STAGES),
        "vit_pytorch_crossformer": _of("vit_pytorch.crossformer:CrossFormer", lambda: image(64), num_classes=10, dim=(32, 32, 64, 64),
                                       depth=(1, 1, 1, 1), global_window_size=(4, 2, 2, 1), local_window_size=2),
        "vit_pytorch_mobile_vit": _of("vit_pytorch.mobile_vit:MobileViT", lambda: image(64), (64, 64), [16, 24, 32],
                                      [8, 8, 16, 16, 24, 24, 24, 24, 32, 32, 48], 10, depths=(1, 1, 1)),
    },
    "x_transformers": {
        "x_transformers_decoder": _of(
            "x_transformers:TransformerWrapper", tokens, num_tokens=100, max_seq_len=16,
            attn_layers=_layers("Decoder", dim=32, depth=2, heads=2, attn_dim_head=16, rotary_pos_emb=True, ff_swish=True, ff_glu=True),
        ),
        "x_transformers_memory": _of(
            "x_transformers:TransformerWrapper", tokens, num_tokens=100, max_seq_len=16, num_memory_tokens=2,
            attn_layers=_layers("Encoder", dim=32, depth=2, heads=4, attn_dim_head=8, attn_kv_heads=2, rel_pos_bias=True,
                                use_scalenorm=True, attn_qk_norm=True),
        ),
        "x_transformers_macaron": _of(
            "x_transformers:TransformerWrapper", tokens, num_tokens=100, max_seq_len=16,
            attn_layers=_layers("Decoder", dim=32, depth=2, heads=2, attn_dim_head=16, macaron=True, attn_pre_talking_heads=True,
                                shift_tokens=1, sandwich_norm=True),
        ),
    },
    "facenet_pytorch": {
        "mtcnn_rnet": _of("facenet_pytorch.models.mtcnn:RNet", lambda: image(24), False),
        "mtcnn_onet": _of("facenet_pytorch.models.mtcnn:ONet", lambda: image(48), False),
    },
    "spandrel": {
        "esrgan": _of("spandrel.architectures.ESRGAN.__arch.RRDB:RRDBNet", lambda: image(16), num_filters=16, num_blocks=2),
        "span": _of("spandrel.architectures.SPAN.__arch.span:SPAN", lambda: image(16), num_in_ch=3, num_out_ch=3, feature_channels=16),
        "compact": _of("spandrel.architectures.Compact.__arch.SRVGG:SRVGGNetCompact", lambda: image(16), num_feat=16, num_conv=4),
        "rcan": _of("spandrel.architectures.RCAN.__arch.rcan_arch:RCAN", lambda: image(16), n_resgroups=2, n_resblocks=2, n_feats=32),
        "safmn": _of("spandrel.architectures.SAFMN.__arch.safmn:SAFMN", lambda: image(32), dim=16, n_blocks=2),
        "ditn": _of("spandrel.architectures.DITN.__arch.DITN_Real:DITN_Real", lambda: image(16), dim=12, ITL_blocks=2, SAL_blocks=2),
        "dncnn": _of("spandrel.architectures.DnCNN.__arch.network_dncnn:DnCNN", lambda: floats(2, 1, 16, 16), nc=16, nb=4),
    },
    "performer_pytorch": {
        "performer": _of("performer_pytorch:PerformerLM", tokens, **TEXT, max_seq_len=16, dim_head=16, nb_features=12),
    },
    "linformer": {"linformer": _of("linformer:LinformerLM", tokens, **TEXT, seq_len=8, k=4)},
    "reformer_pytorch": {
        "reformer": _of("reformer_pytorch:ReformerLM", lambda: tokens(16), **TEXT, max_seq_len=16, dim_head=16, bucket_size=4,
                        n_hashes=2, ff_chunks=2, causal=True),
    },
    "linear_attention_transformer": {
        "linear_attention_transformer": _of("linear_attention_transformer:LinearAttentionTransformerLM", lambda: tokens(16), **TEXT,
                                            max_seq_len=16, dim_head=16),
    },
    "nystrom_attention": {
        "nystromformer": _of("nystrom_attention:Nystromformer", lambda: floats(2, 16, 32), **HEADS, depth=2, num_landmarks=4,
                             attn_values_residual_conv_kernel=3),
    },
    "conformer": {
        "conformer": _of("conformer:Conformer", lambda: floats(2, 12, 32), 32, depth=2, dim_head=16, heads=2, conv_kernel_size=7),
    },
    "g_mlp_pytorch": {
        "gmlp": _of("g_mlp_pytorch:gMLPVision", lambda: image(32), **VIT, patch_size=8, dim=32, depth=2),
        "gmlp_attention": _of("g_mlp_pytorch:gMLP", tokens, num_tokens=100, dim=32, depth=2, seq_len=8, attn_dim=16, heads=2),
    },
    "perceiver_pytorch": {
        "perceiver_pytorch": _of("perceiver_pytorch:Perceiver", lambda: floats(2, 8, 8, 3), num_freq_bands=2, depth=2, max_freq=4,
                                 num_latents=6, latent_dim=24, latent_heads=2, latent_dim_head=12, cross_dim_head=12,
                                 num_classes=10, weight_tie_layers=True),
    },
    "siren_pytorch": {
        "siren": _of("siren_pytorch:SirenNet", lambda: floats(16, 2), 2, 24, 3, 3),
    },
    "denoising_diffusion_pytorch": {
        "denoising_unet_1d": _of("denoising_diffusion_pytorch:Unet1D", lambda: (floats(2, 3, 16), torch.tensor([3, 500])), 16,
                                 dim_mults=(1, 2), attn_dim_head=8, attn_heads=2),
    },
    "open_clip": {
        "open_clip": _of(
            "open_clip.model:CLIP", lambda: (image(32), tokens(8)), 16,
            vision_cfg=_clip("CLIPVisionCfg", layers=2, width=32, head_width=16, patch_size=8, image_size=32),
            text_cfg=_clip("CLIPTextCfg", context_length=8, vocab_size=100, width=32, heads=2, layers=2),
        ),
    },
    "torch_geometric": {
        "pyg_gcn": _of("torch_geometric.nn.models:GCN", graph, 8, 16, 3, 4),
        "pyg_gat": _of("torch_geometric.nn.models:GAT", graph, 8, 16, 2, 4, heads=4, add_self_loops=False),
        "pyg_gat_v2": _of("torch_geometric.nn.models:GAT", graph, 8, 16, 2, 4, heads=4, v2=True),
        "pyg_sage": _of("torch_geometric.nn.models:GraphSAGE", graph, 8, 16, 3, 4, norm="layer_norm"),
        "pyg_gin": _of("torch_geometric.nn.models:GIN", graph, 8, 16, 3, 4, jk="cat"),
        "pyg_edge_cnn": _of("torch_geometric.nn.models:EdgeCNN", graph, 8, 16, 2, 4),
        "pyg_pna": _of("torch_geometric.nn.models:PNA", graph, 8, 16, 2, 4, aggregators=["mean", "max", "std"],
                       scalers=["identity"], deg=lambda: torch.tensor([0, 5, 4])),
    },
    "pytorch_tabnet": {
        "tabnet": _in_double(_of("pytorch_tabnet.tab_network:TabNetNoEmbeddings", lambda: floats(6, 10), 10, 3, virtual_batch_size=6)),
    },
    "monai": {
        "monai_segresnet": _of("monai.networks.nets:SegResNet", volume, init_filters=8, blocks_down=(1, 1), blocks_up=(1,)),
        "monai_dynunet": _of("monai.networks.nets:DynUNet", volume, 3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 16],
                             res_block=True),
        "monai_attention_unet": _of("monai.networks.nets:AttentionUnet", volume, 3, 1, 2, (4, 8, 16), (2, 2)),
    },
    "kornia": {
        "kornia_hardnet": _of("kornia.feature:HardNet", lambda: floats(4, 1, 32, 32), False),
        "kornia_sosnet": _of("kornia.feature:SOSNet", lambda: floats(4, 1, 32, 32), False),
    },
}  # fmt: skip

ZOO = {name: factory for architectures in PACKAGES.values() for name, factory in architectures.items()}
NEEDS = {name: package for package, architectures in PACKAGES.items() for name in architectures}
