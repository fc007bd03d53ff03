"""transformers' RT-DETR, RT-DETRv2 and D-FINE from their saved folders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    DFineConfig,
    DFineForObjectDetection,
    HGNetV2Config,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)

from vitdense.cli import main

SMALL = dict(
    d_model=32, encoder_hidden_dim=16, encoder_ffn_dim=24, decoder_ffn_dim=48,
    decoder_in_channels=[16] * 3, encoder_attention_heads=4, decoder_attention_heads=4,
    decoder_layers=2, num_queries=10, num_labels=5,
)  # fmt: skip


def resnet(layer_type: str) -> RTDetrResNetConfig:
    sizes = [8, 12, 16, 24] if layer_type == "basic" else [16, 24, 32, 48]
    return RTDetrResNetConfig(
        hidden_sizes=sizes if layer_type == "bottleneck" else [64, 12, 16, 24],
        depths=[1, 2, 1, 1],
        layer_type=layer_type,
        out_features=["stage2", "stage3", "stage4"],
    )


def make(kind: str, layer_type: str, **changes: Any) -> Any:
    config, model = {
        "rt_detr": (RTDetrConfig, RTDetrForObjectDetection),
        "rt_detr_v2": (RTDetrV2Config, RTDetrV2ForObjectDetection),
    }[kind]
    backbone = resnet(layer_type)
    channels = backbone.hidden_sizes[1:]
    options = SMALL | dict(backbone_config=backbone, encoder_in_channels=channels) | changes
    return model(config(**options))


CASES = [
    ("rt_detr", "basic", {}),
    ("rt_detr", "bottleneck", dict(hidden_expansion=0.5)),
    ("rt_detr_v2", "basic", dict(decoder_offset_scale=0.3, freeze_backbone_batch_norms=False)),
    ("rt_detr_v2", "bottleneck", dict(encoder_hidden_dim=32, decoder_in_channels=[32] * 3)),
]


@pytest.mark.parametrize("kind, layer_type, changes", CASES)
def test_logits_and_boxes(
    kind: str, layer_type: str, changes: Any, convert: Any, scatter: Any, check_parity: Any
) -> None:
    theirs = make(kind, layer_type, **changes)
    scatter(theirs)
    ours = convert(theirs)
    assert ours.backbone.mean == (0.0, 0.0, 0.0) and ours.backbone.std == (1.0, 1.0, 1.0)
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    check_parity(ours, theirs, pixels)


@pytest.mark.parametrize("changes", [{}, dict(decoder_n_points=[2, 1, 3], reg_scale=8.0)])
def test_logits_and_boxes_of_d_fine(
    changes: Any, convert: Any, scatter: Any, check_parity: Any
) -> None:
    backbone = HGNetV2Config(  # B0
        stem_channels=[3, 16, 16],
        stage_in_channels=[16, 64, 256, 512],
        stage_mid_channels=[16, 32, 64, 128],
        stage_out_channels=[64, 256, 512, 1024],
        stage_num_blocks=[1, 1, 2, 1],
        stage_numb_of_layers=[3, 3, 3, 3],
        hidden_sizes=[64, 256, 512, 1024],
        use_learnable_affine_block=True,
        out_indices=[2, 3, 4],
    )
    options = dict(backbone_config=backbone, encoder_in_channels=[256, 512, 1024], depth_mult=0.34)
    theirs = DFineForObjectDetection(DFineConfig(**SMALL, **options, **changes))
    scatter(theirs)
    for name, parameter in theirs.named_parameters():
        if "normalization" in name or name.endswith("lab.scale"):  # else little is left of images
            torch.nn.init.uniform_(parameter, 0.8, 1.6)
    theirs.model.decoder.up.data.fill_(0.5)
    theirs.model.decoder.reg_scale.data.fill_(theirs.config.reg_scale)
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    check_parity(convert(theirs), theirs, pixels)


def test_what_cannot_be_converted_is_named(tmp_path: Any, capsys: Any) -> None:
    make("rt_detr_v2", "basic", decoder_method="discrete").save_pretrained(tmp_path / "theirs")
    code = main(["convert", str(tmp_path / "theirs"), "--out", str(tmp_path / "m.safetensors")])
    assert code and "decoder_method is 'discrete'" in capsys.readouterr().err
