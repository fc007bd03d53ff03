"""transformers' DPT from its saved folders."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DPTConfig, DPTForSemanticSegmentation

from vitdense.cli import main
from vitdense.structures import IGNORE, Target

SHAPE = dict(
    hidden_size=16, num_hidden_layers=5, num_attention_heads=2, intermediate_size=48,
    image_size=64, patch_size=8, backbone_out_indices=[0, 1, 2, 3], num_labels=5,
    neck_hidden_sizes=[6, 8, 10, 12], fusion_hidden_size=16,
)  # fmt: skip
AUTHORS = dict(layer_norm_eps=1e-6)
"""transformers' default is 1e-12."""


def make(**changes: Any) -> DPTForSemanticSegmentation:
    return DPTForSemanticSegmentation(DPTConfig(**(SHAPE | AUTHORS | changes))).eval()


def pixels(side: int) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def check(ours: Any, theirs: Any, side: int) -> None:
    """Logits and the whole loss, in float32 and in float64."""
    truth = torch.randint(5, (2, side, side), generator=torch.Generator().manual_seed(2))
    truth[:, : side // 4] = IGNORE
    targets = [Target(semantic=one.to(torch.uint8)) for one in truth]
    for dtype, atol in ((torch.float32, 1e-4), (torch.float64, 1e-8)):
        mine, other = copy.deepcopy(ours).to(dtype).eval(), copy.deepcopy(theirs).to(dtype)
        with torch.no_grad():
            outputs = mine.head(mine.backbone(pixels(side).to(dtype)))
            expected = other(pixels(side).to(dtype), labels=truth)
        assert expected.logits.std() > 0.01
        torch.testing.assert_close(outputs.logits, expected.logits, atol=atol, rtol=0)
        loss = sum(mine.loss(outputs, targets).values())
        torch.testing.assert_close(loss, expected.loss, atol=atol, rtol=0)


@pytest.mark.parametrize("readout", ["ignore", "add", "project"])
@pytest.mark.parametrize("normed", [False, True])
def test_logits_and_loss(readout: str, normed: bool, convert: Any, scatter: Any) -> None:
    theirs = make(readout_type=readout, use_batch_norm_in_fusion_residual=normed)
    scatter(theirs, 0.1)
    check(convert(theirs), theirs, 64)


def test_positions_are_for_the_size_of_the_preprocessor(
    convert: Any, scatter: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    preprocessor = {"size": {"height": 96, "width": 96}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    theirs = make(readout_type="ignore")
    scatter(theirs, 0.1)
    check(convert(theirs), theirs, 96)


def test_what_cannot_be_converted_is_named(tmp_path: Path, capsys: Any) -> None:
    make(reassemble_factors=[2, 1, 1, 0.5]).save_pretrained(tmp_path / "theirs")
    code = main(["convert", str(tmp_path / "theirs"), "--out", str(tmp_path / "m.safetensors")])
    assert code and "reassemble_factors is [2, 1, 1, 0.5]" in capsys.readouterr().err
