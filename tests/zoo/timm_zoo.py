"""Architectures of timm, at least one from every family module: how to make it and an input for it.

Random weights, the smallest images that the class takes, no downloads. Large ones are made with fewer blocks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .models import image

Factory = Callable[[], tuple[nn.Module, Any]]

# module of timm: architecture: (pixels, options of create_model)
FAMILIES: dict[str, dict[str, tuple[int, dict[str, Any]]]] = {
    "beit": {
        "beit_base_patch16_224": (64, {"depth": 2, "img_size": 64}),
    },
    "byoanet": {
        "bat_resnext26ts": (256, {"img_size": 256}),
        "botnet26t_256": (64, {"img_size": 64}),
        "eca_botnext26ts_256": (64, {"img_size": 64}),
        "eca_halonext26ts": (256, {}),
        "halonet26t": (256, {}),
        "halonet_h1": (256, {}),
        "haloregnetz_b": (224, {}),
        "lambda_resnet26rpt_256": (64, {"img_size": 64}),
        "lambda_resnet26t": (64, {"img_size": 64}),
        "lamhalobotnet50ts_256": (128, {"img_size": 128}),
    },
    "byobnet": {
        "eca_resnext26ts": (64, {"img_size": 64}),
        "gcresnext26ts": (64, {"img_size": 64}),
        "gernet_s": (64, {"img_size": 64}),
        "mobileone_s1": (64, {"img_size": 64}),
        "regnetz_b16": (64, {"img_size": 64}),
        "regnetz_b16_evos": (64, {"img_size": 64}),
        "repvgg_a0": (64, {"img_size": 64}),
        "resnet50_clip": (64, {"img_size": 64}),
        "resnext26ts": (64, {"img_size": 64}),
        "test_byobnet": (64, {"img_size": 64}),
    },
    "cait": {
        "cait_xxs24_224": (64, {"img_size": 64}),
    },
    "coat": {
        "coat_lite_tiny": (64, {"img_size": 64}),
        "coat_tiny": (64, {"img_size": 64}),
    },
    "convit": {
        "convit_tiny": (64, {"img_size": 64}),
    },
    "convmixer": {
        "convmixer_768_32": (64, {}),
    },
    "convnext": {
        "convnext_zepto_rms": (64, {}),
        "convnextv2_atto": (64, {}),
        "test_convnext": (64, {}),
        "test_convnext2": (64, {}),
        "test_convnext3": (64, {}),
    },
    "cpubone": {
        "cpubone_nano": (64, {}),
    },
    "crossvit": {
        "crossvit_9_240": (64, {}),
        "crossvit_tiny_240": (64, {}),
    },
    "csatv2": {
        "csatv2": (64, {}),
    },
    "cspnet": {
        "cs3darknet_focus_s": (64, {}),
        "cspdarknet53": (64, {}),
        "cspresnet50": (64, {}),
        "cspresnext50": (64, {}),
        "darknet17": (64, {}),
        "sedarknet21": (64, {}),
    },
    "cspnext": {
        "cspnext_l": (64, {"depths": (1, 1, 2, 1)}),
        "cspnext_tiny": (64, {}),
    },
    "davit": {
        "davit_tiny": (64, {"depths": (1, 1, 2, 1)}),
    },
    "deepseek_vit": {
        "deepseek_vit_412m": (224, {"depth": 2, "img_size": 224}),
    },
    "deit": {
        "deit3_small_patch16_224": (64, {"depth": 2, "img_size": 64}),
        "deit_small_distilled_patch16_224": (64, {"depth": 2, "img_size": 64}),
        "deit_small_patch16_224": (64, {"depth": 2, "img_size": 64}),
        "deit_tiny_distilled_patch16_224": (64, {"img_size": 64}),
        "deit_tiny_patch16_224": (64, {"img_size": 64}),
    },
    "densenet": {
        "densenet121": (64, {}),
        "densenetblur121d": (64, {}),
    },
    "dla": {
        "dla46x_c": (64, {}),
    },
    "dpn": {
        "dpn48b": (64, {}),
    },
    "edgenext": {
        "edgenext_x_small": (64, {}),
        "edgenext_xx_small": (64, {}),
    },
    "efficientformer": {
        "efficientformer_l1": (224, {"depths": (1, 1, 2, 1)}),
    },
    "efficientformer_v2": {
        "efficientformerv2_s0": (64, {"img_size": 64}),
    },
    "efficientnet": {
        "efficientnet_blur_b0": (64, {}),
        "efficientnet_cc_b0_4e": (64, {}),
        "gc_efficientnetv2_rw_t": (64, {}),
        "mixnet_s": (64, {}),
        "mnasnet_small": (64, {}),
        "mobilenetv2_035": (64, {}),
        "semnasnet_050": (64, {}),
        "test_efficientnet": (64, {}),
        "test_efficientnet_evos": (64, {}),
        "test_efficientnet_gn": (64, {}),
        "test_efficientnet_ln": (64, {}),
        "tf_efficientnetv2_b0": (64, {}),
        "tinynet_e": (64, {}),
    },
    "efficientvim": {
        "efficientvim_m1": (64, {}),
    },
    "efficientvit_mit": {
        "efficientvit_b0": (64, {}),
        "efficientvit_l1": (64, {"depths": (1, 1, 2, 1)}),
    },
    "efficientvit_msra": {
        "efficientvit_m0": (64, {"img_size": 64}),
    },
    "eva": {
        "eva02_tiny_patch14_224": (64, {"img_size": 64}),
        "vit_pe_core_tiny_patch16_384": (64, {"img_size": 64}),
        "vit_pe_spatial_tiny_patch16_512": (64, {"img_size": 64}),
        "vit_small_patch16_dinov3": (64, {"depth": 2, "img_size": 64}),
        "vit_small_patch16_dinov3_qkvb": (64, {"depth": 2, "img_size": 64}),
        "vit_small_patch16_rope_ape_224": (64, {"depth": 2, "img_size": 64}),
        "vit_small_patch16_rope_mixed_224": (64, {"depth": 2, "img_size": 64}),
        "vit_tiny_patch16_dinov3_qkvb": (64, {"img_size": 64}),
    },
    "fasternet": {
        "fasternet_t0": (64, {}),
    },
    "fastvit": {
        "fastvit_t8": (64, {}),
    },
    "focalnet": {
        "focalnet_tiny_srf": (64, {}),
    },
    "gcvit": {
        "gcvit_xxtiny": (64, {"img_size": 64}),
    },
    "gemma4_vit": {
        "gemma4_vit_167m": (64, {"depth": 2, "img_size": 64}),
    },
    "ghostnet": {
        "ghostnet_050": (64, {}),
        "ghostnetv3_050": (64, {}),
    },
    "hardcorenas": {
        "hardcorenas_a": (64, {}),
        "hardcorenas_b": (64, {}),
    },
    "hgnet": {
        "hgnet_tiny": (64, {}),
        "hgnetv2_b0": (64, {}),
    },
    "hiera": {
        "hiera_tiny_224": (64, {"img_size": 64}),
    },
    "hieradet_sam2": {
        "sam2_hiera_tiny": (64, {}),
    },
    "hrnet": {
        "hrnet_w18_small": (64, {}),
    },
    "iformer": {
        "iformer_l": (64, {}),
        "iformer_t": (64, {}),
    },
    "inception_next": {
        "inception_next_atto": (64, {}),
    },
    "inception_resnet_v2": {
        "inception_resnet_v2": (96, {}),
    },
    "inception_v3": {
        "inception_v3": (96, {}),
    },
    "inception_v4": {
        "inception_v4": (96, {}),
    },
    "lcnetv2": {
        "lcnetv2_small": (64, {}),
    },
    "levit": {
        "levit_128s": (64, {"img_size": 64}),
        "levit_conv_128s": (64, {"img_size": 64}),
    },
    "lowformer": {
        "lowformer_b0": (64, {}),
        "lowformer_e1": (64, {}),
    },
    "mambaout": {
        "mambaout_femto": (64, {}),
        "test_mambaout": (64, {}),
    },
    "maxxvit": {
        "coatnet_nano_cc_224": (64, {"depths": (1, 1, 2, 1), "img_size": 64}),
        "coatnet_nano_rw_224": (64, {"depths": (1, 1, 2, 1), "img_size": 64}),
        "coatnet_pico_rw_224": (64, {"img_size": 64}),
        "coatnet_rmlp_nano_rw_224": (64, {"img_size": 64}),
        "coatnext_nano_rw_224": (64, {"depths": (1, 1, 2, 1), "img_size": 64}),
        "maxvit_pico_rw_256": (64, {"img_size": 64}),
        "maxvit_rmlp_pico_rw_256": (64, {"img_size": 64}),
        "maxxvitv2_nano_rw_256": (64, {"img_size": 64}),
        "test_coatnet": (64, {"img_size": 64}),
        "test_maxvit": (64, {"img_size": 64}),
    },
    "metaformer": {
        "caformer_s18": (64, {}),
        "convformer_s18": (64, {}),
        "poolformer_s12": (64, {}),
        "poolformerv2_s12": (64, {}),
    },
    "mlp_mixer": {
        "gmixer_12_224": (64, {"img_size": 64}),
        "gmlp_s16_224": (64, {"img_size": 64}),
        "gmlp_ti16_224": (64, {"img_size": 64}),
        "mixer_s16_224": (64, {"img_size": 64}),
        "resmlp_12_224": (64, {"img_size": 64}),
    },
    "mobilenetv3": {
        "fbnetv3_b": (64, {}),
        "lcnet_035": (64, {}),
        "mobilenetv3_small_050": (64, {}),
        "mobilenetv4_conv_small": (64, {}),
        "mobilenetv4_hybrid_medium": (64, {}),
        "tf_mobilenetv3_small_075": (64, {}),
    },
    "mobilenetv5": {
        "mobilenetv5_base": (64, {}),
    },
    "mobilevit": {
        "mobilevit_xxs": (64, {"img_size": 64}),
        "mobilevitv2_050": (64, {"img_size": 64}),
    },
    "mvitv2": {
        "mvitv2_tiny": (64, {"img_size": 64}),
    },
    "naflexvit": {
        "naflexvit_base_patch16_gap": (64, {"depth": 2, "img_size": 64}),
        "naflexvit_base_patch16_parfac_gap": (64, {"depth": 2, "img_size": 64}),
    },
    "nasnet": {
        "nasnetalarge": (64, {}),
    },
    "nest": {
        "nest_tiny": (64, {"img_size": 64}),
    },
    "nextvit": {
        "nextvit_small": (64, {}),
    },
    "nfnet": {
        "eca_nfnet_l0": (64, {}),
        "nf_ecaresnet26": (64, {"depths": (1, 1, 2, 1)}),
        "nf_regnet_b0": (64, {}),
        "nf_resnet26": (64, {"depths": (1, 1, 2, 1)}),
        "nf_seresnet26": (64, {"depths": (1, 1, 2, 1)}),
        "test_nfnet": (64, {}),
    },
    "pit": {
        "pit_ti_224": (64, {"img_size": 64}),
    },
    "pnasnet": {
        "pnasnet5large": (64, {}),
    },
    "pvt_v2": {
        "pvt_v2_b0": (64, {}),
    },
    "qwen3_vit": {
        "qwen3_vit_88m": (64, {"depth": 2, "img_size": 64}),
    },
    "rdnet": {
        "rdnet_tiny": (64, {}),
    },
    "regnet": {
        "regnetv_040": (64, {}),
        "regnetx_002": (64, {}),
        "regnety_002": (64, {}),
        "regnetz_005": (64, {}),
    },
    "repghost": {
        "repghostnet_050": (64, {}),
    },
    "repvit": {
        "repvit_m1": (64, {"img_size": 64}),
    },
    "res2net": {
        "res2next50": (64, {"layers": (1, 1, 1, 1)}),
    },
    "resnest": {
        "resnest14d": (64, {}),
        "resnest50d_1s4x24d": (64, {}),
    },
    "resnet": {
        "ecaresnet26t": (64, {"layers": (1, 1, 1, 1)}),
        "ecaresnet50d_pruned": (64, {"layers": (1, 1, 1, 1)}),
        "ecaresnext26t_32x4d": (64, {"layers": (1, 1, 1, 1)}),
        "resnet10t": (64, {}),
        "resnet18": (64, {}),
        "resnet18d": (64, {}),
        "resnetaa34d": (64, {"layers": (1, 1, 1, 1)}),
        "resnetblur18": (64, {}),
        "resnetrs50": (64, {"layers": (1, 1, 1, 1)}),
        "seresnet18": (64, {}),
        "seresnext26d_32x4d": (64, {"layers": (1, 1, 1, 1)}),
        "seresnext26t_32x4d": (64, {"layers": (1, 1, 1, 1)}),
        "test_resnet": (64, {}),
    },
    "resnetv2": {
        "resnetv2_18": (64, {}),
        "resnetv2_50x1_bit": (64, {}),
    },
    "rexnet": {
        "rexnet_100": (64, {}),
        "rexnetr_100": (64, {}),
    },
    "selecsls": {
        "selecsls42": (64, {}),
    },
    "senet": {
        "legacy_seresnet18": (64, {}),
    },
    "sequencer": {
        "sequencer2d_s": (64, {"img_size": 64, "layers": (1, 1, 1, 1)}),
    },
    "shvit": {
        "shvit_s1": (64, {}),
    },
    "sknet": {
        "skresnet18": (64, {}),
        "skresnext50_32x4d": (64, {"layers": (1, 1, 1, 1)}),
    },
    "starnet": {
        "starnet_s050": (64, {}),
    },
    "swiftformer": {
        "swiftformer_l1": (64, {"img_size": 64, "layers": (1, 1, 1, 1)}),
        "swiftformer_xs": (64, {"img_size": 64}),
    },
    "swin_transformer": {
        "swin_tiny_patch4_window7_224": (64, {"depths": (1, 1, 2, 1), "img_size": 64}),
    },
    "swin_transformer_v2": {
        "swinv2_tiny_window16_256": (64, {"depths": (1, 1, 2, 1), "img_size": 64}),
    },
    "swin_transformer_v2_cr": {
        "swinv2_cr_tiny_224": (64, {"depths": (1, 1, 2, 1), "img_size": 64}),
        "swinv2_cr_tiny_ns_224": (64, {"depths": (1, 1, 1, 1), "img_size": 64}),
    },
    "tiny_vit": {
        "tiny_vit_5m_224": (64, {"depths": (1, 1, 2, 1)}),
    },
    "tnt": {
        "tnt_s_legacy_patch16_224": (64, {"depth": 2, "img_size": 64}),
    },
    "tresnet": {
        "tresnet_m": (64, {"layers": (1, 1, 1, 1)}),
        "tresnet_v2_l": (64, {"layers": (1, 1, 1, 1)}),
    },
    "twins": {
        "twins_pcpvt_small": (64, {"depths": (1, 1, 2, 1), "img_size": 64}),
        "twins_svt_small": (64, {"depths": (1, 1, 2, 1), "img_size": 64}),
    },
    "vgg": {
        "vgg11": (64, {}),
    },
    "visformer": {
        "visformer_tiny": (64, {"img_size": 64}),
    },
    "vision_transformer": {
        "test_vit": (64, {"img_size": 64}),
        "test_vit2": (64, {"img_size": 64}),
        "test_vit3": (64, {"img_size": 64}),
        "test_vit4": (64, {"img_size": 64}),
        "vit_base_patch32_clip_224": (64, {"depth": 2, "img_size": 64}),
        "vit_small_patch16_18x2_224": (64, {"depth": 2, "img_size": 64}),
        "vit_tiny_patch16_224": (64, {"img_size": 64}),
        "vit_wee_patch16_reg1_gap_256": (64, {"depth": 2, "img_size": 64}),
    },
    "vision_transformer_hybrid": {
        "vit_small_resnet26d_224": (64, {"depth": 2, "img_size": 64}),
        "vit_tiny_r_s16_p8_224": (64, {"img_size": 64}),
    },
    "vision_transformer_relpos": {
        "test_vit_relpos": (64, {"img_size": 64}),
        "vit_relpos_base_patch16_cls_224": (64, {"depth": 2, "img_size": 64}),
        "vit_relpos_small_patch16_224": (64, {"depth": 2, "img_size": 64}),
        "vit_relpos_small_patch16_rpn_224": (64, {"depth": 2, "img_size": 64}),
        "vit_srelpos_small_patch16_224": (64, {"depth": 2, "img_size": 64}),
    },
    "vision_transformer_sam": {
        "samvit_base_patch16_224": (64, {"depth": 2, "img_size": 64}),
    },
    "vitamin": {
        "vitamin_small_224": (64, {"depth": 2, "img_size": 64}),
    },
    "volo": {
        "volo_d1_224": (64, {"img_size": 64}),
    },
    "vovnet": {
        "ese_vovnet19b_slim_dw": (64, {}),
        "vovnet39a": (64, {}),
    },
    "xception": {
        "legacy_xception": (64, {}),
    },
    "xception_aligned": {
        "xception41p": (64, {}),
    },
    "xcit": {
        "xcit_nano_12_p8_224": (64, {"img_size": 64}),
        "xcit_tiny_12_p16_224": (64, {"img_size": 64}),
    },
}


def _model(name: str, size: int, options: dict[str, Any]) -> Factory:
    def make() -> tuple[nn.Module, Any]:
        import timm

        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return timm.create_model(name, pretrained=False, **options), image(size)

    return make


ZOO: dict[str, Factory] = {
    name: _model(name, size, options) for family in FAMILIES.values() for name, (size, options) in family.items()
}
