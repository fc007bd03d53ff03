"""transformers' Conditional DETR and DAB-DETR from their saved folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DabDetrConfig,
    DabDetrForObjectDetection,
    ResNetConfig,
)

from vitdense.convert.conversion import convert as convert_folder
from vitdense.convert.source import ConversionError

SMALL = dict(
    backbone_config=ResNetConfig(
        hidden_sizes=[8, 12, 16, 24],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    ),
    encoder_layers=1,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    num_queries=12,
    num_labels=5,
)


def dab(**changes: Any) -> DabDetrForObjectDetection:
    return DabDetrForObjectDetection(DabDetrConfig(**SMALL, hidden_size=32, **changes))


def test_conditional_detr(convert: Any, scatter: Any, check_parity: Any) -> None:
    theirs = ConditionalDetrForObjectDetection(ConditionalDetrConfig(**SMALL, d_model=32))
    scatter(theirs)
    ours = convert(theirs)
    assert ours.head.query_kind == "conditional"
    # transformers embeds points in float32 whatever the type of the model
    check_parity(ours, theirs, torch.randn(2, 3, 64, 96), atol64=1e-6)


def test_dab_detr(convert: Any, scatter: Any) -> None:
    theirs = dab().eval()
    scatter(theirs)
    ours = convert(theirs).eval()
    assert ours.head.query_kind == "dab"
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        # transformers' own has only float32
        outputs, expected = ours.head(ours.backbone(pixels)), theirs(pixels)
    assert expected.logits.std() > 0.01
    torch.testing.assert_close(outputs.logits[-1], expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs.boxes[-1], expected.pred_boxes, atol=1e-4, rtol=0)


@pytest.mark.parametrize("option", [dict(num_patterns=3), dict(temperature_width=10000)])
def test_what_has_no_place_is_refused(option: dict[str, Any], tmp_path: Path) -> None:
    dab(**option).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ConversionError, match=next(iter(option))):
        convert_folder(str(tmp_path / "theirs"), tmp_path / "model.safetensors")
