"""transformers' BEiT for semantic segmentation from its saved folders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BeitConfig, BeitForSemanticSegmentation

from vitdense.cli import main
from vitdense.structures import IGNORE, Target

SHAPE = dict(
    hidden_size=16, num_hidden_layers=6, num_attention_heads=2, intermediate_size=48,
    image_size=64, patch_size=8, out_indices=[2, 3, 4, 6], auxiliary_channels=8, num_labels=5,
    use_relative_position_bias=True,
)  # fmt: skip
AUTHORS = dict(layer_norm_eps=1e-6)
"""transformers' default is 1e-12."""


def make(**changes: Any) -> BeitForSemanticSegmentation:
    return BeitForSemanticSegmentation(BeitConfig(**(SHAPE | AUTHORS | changes))).eval()


def pixels() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_logits_and_loss(convert: Any, scatter: Any) -> None:
    theirs = make()
    scatter(theirs)
    ours = convert(theirs)
    assert ours.backbone.mean == (0.5, 0.5, 0.5)
    truth = torch.randint(5, (2, 64, 64), generator=torch.Generator().manual_seed(2))
    truth[:, :20] = IGNORE
    targets = [Target(semantic=one.to(torch.uint8)) for one in truth]
    for dtype, atol in ((torch.float32, 1e-4), (torch.float64, 1e-8)):
        mine, other = copy.deepcopy(ours).to(dtype).eval(), copy.deepcopy(theirs).to(dtype)
        with torch.no_grad():
            outputs = mine.head(mine.neck(mine.backbone(pixels().to(dtype))))
            expected = other(pixels().to(dtype), labels=truth)
        assert expected.logits.std() > 0.01
        torch.testing.assert_close(outputs.logits, expected.logits, atol=atol, rtol=0)
        loss = sum(mine.loss(outputs, targets).values())
        torch.testing.assert_close(loss, expected.loss, atol=atol, rtol=0)


def test_names_of_transformers_5s_memory(check_names_of_memory: Any) -> None:
    check_names_of_memory(make())


def test_what_cannot_be_converted_is_named(tmp_path: Path, capsys: Any) -> None:
    make(use_relative_position_bias=False).save_pretrained(tmp_path / "theirs")
    code = main(["convert", str(tmp_path / "theirs"), "--out", str(tmp_path / "m.safetensors")])
    assert code and "use_relative_position_bias is False" in capsys.readouterr().err
