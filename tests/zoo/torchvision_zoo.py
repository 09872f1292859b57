"""Every model of torchvision, by name: how to make it and an input for it. Random weights, small inputs, no downloads.

The widest ones are made with fewer layers or narrower stages; :data:`SHRUNK` says which.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn

from .models import image

Factory = Callable[[], tuple[nn.Module, Any]]


def _model(name: str, inputs: Callable[[], Any], **options: Any) -> Factory:
    def make() -> tuple[nn.Module, Any]:
        import torchvision

        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torchvision.models.get_model(name, weights=None, **options), inputs()

    return make


def _class(build: Callable[[], nn.Module], inputs: Callable[[], Any]) -> Factory:
    def make() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        return build(), inputs()

    return make


def clip(frames: int, size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(1))


def photos(size: int = 64) -> tuple[list[torch.Tensor]]:
    """What detectors take: a list of images of their own sizes."""
    generator = torch.Generator().manual_seed(1)
    return ([torch.rand(3, size, size, generator=generator), torch.rand(3, size, size - 8, generator=generator)],)


def frames(size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(1, 3, size, size, generator=generator), torch.rand(1, 3, size, size, generator=generator)


def _vit(patch: int, layers: int, heads: int, width: int, mlp: int) -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=4 * patch, patch_size=patch, num_layers=layers, num_heads=heads, hidden_dim=width, mlp_dim=mlp
    )


def _regnet(depth: int, first: int, slope: float, factor: float, group: int, se: float | None) -> nn.Module:
    from torchvision.models.regnet import BlockParams, RegNet

    return RegNet(BlockParams.from_init_params(depth, first, slope, factor, group, se_ratio=se))


def _convnext(widths: list[int]) -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    settings = [CNBlockConfig(a, b, 2) for a, b in zip(widths, [*widths[1:], None], strict=True)]
    return ConvNeXt(settings)


def _maxvit() -> nn.Module:
    from torchvision.models.maxvit import MaxVit

    return MaxVit(
        input_size=(64, 64), stem_channels=64, partition_size=2, block_channels=[64, 128, 256, 512],
        block_layers=[2, 2, 5, 2], head_dim=32, stochastic_depth_prob=0.2,
    )  # fmt: skip


def _mvit(name: str) -> nn.Module:
    """With the positions of 4 frames of 64 pixels; the public functions state those of 16 frames of 224."""
    from torchvision.models.video import mvit

    made = mvit._mvit
    with mock.patch.object(mvit, "_mvit", lambda **o: made(**o | {"spatial_size": (64, 64), "temporal_size": 4})):
        return getattr(mvit, name)(weights=None)


small = partial(image, 64)
CLASSIFIERS = [
    "alexnet", "convnext_base", "convnext_small", "convnext_tiny", "densenet121", "densenet161", "densenet169",
    "densenet201", "efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4",
    "efficientnet_b5", "efficientnet_b6", "efficientnet_b7", "efficientnet_v2_l", "efficientnet_v2_m",
    "efficientnet_v2_s", "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3", "mobilenet_v2",
    "mobilenet_v3_large", "mobilenet_v3_small", "regnet_x_16gf", "regnet_x_1_6gf", "regnet_x_32gf", "regnet_x_3_2gf",
    "regnet_x_400mf", "regnet_x_800mf", "regnet_x_8gf", "regnet_y_16gf", "regnet_y_1_6gf", "regnet_y_3_2gf",
    "regnet_y_400mf", "regnet_y_800mf", "regnet_y_8gf", "resnet101", "resnet152", "resnet18", "resnet34", "resnet50",
    "resnext101_32x8d", "resnext101_64x4d", "resnext50_32x4d", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5", "shufflenet_v2_x2_0", "squeezenet1_0", "squeezenet1_1", "swin_b", "swin_s", "swin_t",
    "swin_v2_b", "swin_v2_s", "swin_v2_t", "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19",
    "vgg19_bn", "wide_resnet101_2", "wide_resnet50_2",
]  # fmt: skip

SHRUNK = {
    "vit_h_14": "2 of 32 layers, 56 pixels",
    "vit_l_16": "3 of 24 layers, 64 pixels",
    "vit_l_32": "3 of 24 layers, 128 pixels",
    "regnet_y_32gf": "half as wide",
    "regnet_y_128gf": "a quarter as wide",
    "convnext_large": "2 blocks in each stage",
}

ZOO: dict[str, Factory] = {name: _model(name, small) for name in CLASSIFIERS}
ZOO |= {
    "googlenet": _model("googlenet", small, init_weights=False),
    "inception_v3": _model("inception_v3", partial(image, 96), init_weights=False),
    "maxvit_t": _class(_maxvit, small),
    "vit_b_16": _model("vit_b_16", small, image_size=64),
    "vit_b_32": _model("vit_b_32", small, image_size=64),
    "vit_h_14": _class(partial(_vit, 14, 2, 16, 1280, 5120), partial(image, 56)),
    "vit_l_16": _class(partial(_vit, 16, 3, 16, 1024, 4096), small),
    "vit_l_32": _class(partial(_vit, 32, 3, 16, 1024, 4096), partial(image, 128)),
    "regnet_y_32gf": _class(partial(_regnet, 20, 120, 57.6, 2.53, 60, 0.25), small),
    "regnet_y_128gf": _class(partial(_regnet, 27, 112, 160.83 / 4, 2.52, 66, 0.25), small),
    "convnext_large": _class(partial(_convnext, [192, 384, 768, 1536]), small),
}
SEGMENTERS = [
    "deeplabv3_mobilenet_v3_large", "deeplabv3_resnet101", "deeplabv3_resnet50", "fcn_resnet101", "fcn_resnet50",
    "lraspp_mobilenet_v3_large",
]  # fmt: skip
ZOO |= {name: _model(name, small, weights_backbone=None) for name in SEGMENTERS}
ZOO["fcn_resnet50 with aux"] = _model("fcn_resnet50", small, weights_backbone=None, aux_loss=True)

# few classes and few candidates, all of which count: a fresh model is sure of nothing
SMALL = {"num_classes": 7, "min_size": 64, "max_size": 96}
RCNN = {**SMALL, "box_detections_per_img": 4, "box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 12,
        "rpn_pre_nms_top_n_test": 24}  # fmt: skip
DENSE = {"num_classes": 7, "detections_per_img": 8, "score_thresh": 0.0, "topk_candidates": 20}
DETECTORS: dict[str, dict[str, Any]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": RCNN,
    "fasterrcnn_mobilenet_v3_large_fpn": RCNN,
    "fasterrcnn_resnet50_fpn": RCNN,
    "fasterrcnn_resnet50_fpn_v2": RCNN,
    "keypointrcnn_resnet50_fpn": {**RCNN, "num_classes": 2},
    "maskrcnn_resnet50_fpn": RCNN,
    "maskrcnn_resnet50_fpn_v2": RCNN,
    "fcos_resnet50_fpn": {**DENSE, **SMALL},
    "retinanet_resnet50_fpn": {**DENSE, **SMALL},
    "retinanet_resnet50_fpn_v2": {**DENSE, **SMALL},
    "ssd300_vgg16": DENSE,
    "ssdlite320_mobilenet_v3_large": DENSE,
}
ZOO |= {name: _model(name, photos, weights_backbone=None, **options) for name, options in DETECTORS.items()}

ZOO |= {name: _model(name, partial(clip, 4, 32)) for name in ("mc3_18", "r2plus1d_18", "r3d_18")}
ZOO |= {name: _model(name, partial(clip, 4, 32)) for name in ("swin3d_b", "swin3d_s", "swin3d_t")}
ZOO |= {
    "s3d": _model("s3d", partial(clip, 14, 224, 1)),
    "mvit_v1_b": _class(partial(_mvit, "mvit_v1_b"), partial(clip, 4, 64)),
    "mvit_v2_s": _class(partial(_mvit, "mvit_v2_s"), partial(clip, 4, 64)),
    "raft_large": _model("raft_large", frames),
    "raft_small": _model("raft_small", frames),
}

# float versions of the models that torchvision can quantize
QUANTIZABLE = [
    "quantized_mobilenet_v2", "quantized_mobilenet_v3_large", "quantized_resnet18", "quantized_resnet50",
    "quantized_resnext101_32x8d", "quantized_resnext101_64x4d", "quantized_shufflenet_v2_x0_5",
    "quantized_shufflenet_v2_x1_0", "quantized_shufflenet_v2_x1_5", "quantized_shufflenet_v2_x2_0",
]  # fmt: skip
ZOO |= {name: _model(name, small, quantize=False) for name in QUANTIZABLE}
ZOO["quantized_googlenet"] = _model("quantized_googlenet", small, quantize=False, init_weights=False)
ZOO["quantized_inception_v3"] = _model("quantized_inception_v3", partial(image, 96), quantize=False, init_weights=False)
