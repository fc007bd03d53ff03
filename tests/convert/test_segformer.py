"""transformers' SegFormer from its saved folders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from vitdense.cli import main
from vitdense.structures import IGNORE, Target


def make(**changes: Any) -> SegformerForSemanticSegmentation:
    sizes = dict(
        hidden_sizes=[8, 16, 20, 24], depths=[1, 2, 1, 1], num_attention_heads=[1, 2, 5, 4],
        sr_ratios=[4, 2, 2, 1], mlp_ratios=[4, 3, 2, 4], decoder_hidden_size=16, num_labels=5,
    )  # fmt: skip
    return SegformerForSemanticSegmentation(SegformerConfig(**(sizes | changes))).eval()


def with_epsilons_of_the_authors(model: nn.Module) -> nn.Module:
    """1e-6 in the norms of blocks and of stages; transformers has 1e-5 in all."""
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and not ("embed" in name or "reduction" in name):
            module.eps = 1e-6
    return model


def test_logits_and_loss(convert: Any, scatter: Any) -> None:
    theirs = make()
    scatter(theirs)
    ours = convert(theirs)
    size = (96, 160)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    truth = torch.randint(5, (2, *size), generator=torch.Generator().manual_seed(2))
    truth[:, :20] = IGNORE
    targets = [Target(semantic=one.to(torch.uint8)) for one in truth]
    exact = with_epsilons_of_the_authors(copy.deepcopy(theirs))
    for dtype, other, atol in (
        (torch.float32, theirs, 1e-4),
        (torch.float64, exact, 1e-8),
    ):
        mine = copy.deepcopy(ours).to(dtype).eval()
        with torch.no_grad():
            outputs = mine.head(mine.backbone(pixels.to(dtype)))
            expected = other.to(dtype)(pixels.to(dtype), labels=truth)
        assert expected.logits.std() > 0.01
        torch.testing.assert_close(outputs.logits, expected.logits, atol=atol, rtol=0)
        loss = sum(mine.loss(outputs, targets).values())
        torch.testing.assert_close(loss, expected.loss, atol=atol, rtol=0)


def test_names_of_transformers_5s_memory(check_names_of_memory: Any) -> None:
    check_names_of_memory(make())


def test_what_cannot_be_converted_is_named(tmp_path: Path, capsys: Any) -> None:
    make(patch_sizes=[7, 5, 3, 3]).save_pretrained(tmp_path / "theirs")
    code = main(["convert", str(tmp_path / "theirs"), "--out", str(tmp_path / "m.safetensors")])
    assert code and "patch_sizes is [7, 5, 3, 3]" in capsys.readouterr().err
