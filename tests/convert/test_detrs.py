"""transformers' DETR and Deformable DETR from their saved folders, with several backbones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    Dinov2Config,
    ResNetConfig,
    SwinConfig,
)

SMALL = dict(
    d_model=32,
    encoder_layers=1,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    num_queries=12,
    num_labels=5,
)
VARIANTS = {
    "single": dict(),
    "refined": dict(with_box_refine=True),
    "two_stage": dict(with_box_refine=True, two_stage=True, two_stage_num_proposals=12),
    "one_level": dict(num_feature_levels=1),
}


def resnet(**changes: Any) -> ResNetConfig:
    sizes = dict(hidden_sizes=[8, 12, 16, 24], depths=[1, 2, 1, 1], layer_type="basic")
    return ResNetConfig(**(sizes | changes))


def swin(**changes: Any) -> SwinConfig:
    return SwinConfig(
        embed_dim=8, depths=[1, 2, 1, 1], num_heads=[1, 2, 2, 4], window_size=4, **changes
    )


def dinov2(**changes: Any) -> Dinov2Config:
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56)
    return Dinov2Config(**sizes, **changes)


BACKBONES = {
    "timm": (
        lambda last: dict(backbone="test_resnet", use_timm_backbone=True, backbone_config=None),
        (64, 96),
    ),
    "resnet": (lambda last: dict(backbone_config=resnet(out_features=last)), (64, 96)),
    "bottleneck": (
        lambda last: dict(
            backbone_config=resnet(
                layer_type="bottleneck", hidden_sizes=[16, 24, 32, 48], out_features=last
            )
        ),
        (64, 96),
    ),
    "swin": (lambda last: dict(backbone_config=swin(out_features=last)), (64, 128)),
    "dinov2": (lambda last: dict(backbone_config=dinov2(out_features=last[-1:])), (56, 56)),
}


def pixels(size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", BACKBONES)
def test_detr(name: str, convert: Any, scatter: Any, check_parity: Any) -> None:
    options, size = BACKBONES[name]
    theirs = DetrForObjectDetection(
        DetrConfig(**SMALL, **options(["stage2" if name == "dinov2" else "stage4"]))
    )
    scatter(theirs)
    check_parity(convert(theirs), theirs, pixels(size))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["resnet", "swin"])
def test_deformable_detr(
    name: str, variant: str, convert: Any, scatter: Any, check_parity: Any
) -> None:
    options, size = BACKBONES[name]
    stages = ["stage4"] if variant == "one_level" else ["stage2", "stage3", "stage4"]
    config = DeformableDetrConfig(**SMALL, **VARIANTS[variant], **options(stages))
    theirs = DeformableDetrForObjectDetection(config)
    scatter(theirs)
    # transformers embeds proposals in float32 whatever the model's type
    check_parity(
        convert(theirs), theirs, pixels(size), atol64=1e-7 if variant == "two_stage" else 1e-8
    )
