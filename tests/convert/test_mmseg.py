"""Checkpoints of UPerNet on Swin in mmsegmentation's layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

from vitdense.convert.conversion import convert
from vitdense.convert.mmseg import merge_order
from vitdense.engine.checkpoint import load_model, read_meta

NAMES = [
    (r"^backbone\.swin\.layernorm.*", ""),
    (r"^backbone\.swin\.embeddings\.patch_embeddings\.", "backbone.patch_embed."),
    (r"^backbone\.swin\.embeddings\.norm", "backbone.patch_embed.norm"),
    (r"^backbone\.swin\.encoder\.layers\.", "backbone.stages."),
    (r"hidden_states_norms\.stage(\d)", lambda m: f"norm{int(m[1]) - 1}"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.relative_position_bias\.", "attn.w_msa."),
    (r"attention\.([qkv])_proj", r"attn.w_msa.\1"),
    (r"attention\.o_proj", "attn.w_msa.proj"),
    (r"mlp\.fc1", "ffn.layers.0.0"),
    (r"mlp\.fc2", "ffn.layers.1"),
    (r"\.batch_norm\.", ".bn."),
    (r"classifier", "conv_seg"),
]
"""From transformers 5 to mmsegmentation."""


def to_mmsegmentation(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What mmsegmentation would have saved; its converter of Swin permutes what merges patches."""
    found = {}
    for name, tensor in state.items():
        for pattern, new in NAMES:
            name = re.sub(pattern, new, name)
        if re.search(r"downsample\.(norm|reduction)", name):
            four = tensor.reshape(*tensor.shape[:-1], 4, -1)[..., [0, 2, 1, 3], :]
            tensor = four.transpose(-1, -2).flatten(-2)
        found[name] = tensor
    found.pop("")
    for name in [name for name in found if ".w_msa.q." in name]:
        parts = [found.pop(name.replace(".q.", f".{letter}.")) for letter in "qkv"]
        found[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return found


def make() -> UperNetForSemanticSegmentation:
    swin = SwinConfig(
        embed_dim=8, depths=[2, 1, 2, 1], num_heads=[1, 2, 2, 4], window_size=3,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = UperNetConfig(backbone_config=swin, hidden_size=16, auxiliary_channels=8, num_labels=3)
    return UperNetForSemanticSegmentation(config).eval()


@pytest.mark.parametrize("layout", ["0.x", "1.x", "bare"])
def test_logits(layout: str, scatter: Any, tmp_path: Path) -> None:
    theirs = make()
    scatter(theirs)
    state, names = to_mmsegmentation(theirs.state_dict()), ["wall", "sky", "tree"]
    assert "backbone.stages.0.blocks.0.attn.w_msa.qkv.weight" in state
    file = {
        "0.x": {"meta": {"CLASSES": tuple(names), "iter": 1}, "state_dict": state},
        "1.x": {"meta": {"dataset_meta": {"classes": tuple(names)}}, "state_dict": state},
        "bare": state,
    }[layout]
    torch.save(file, tmp_path / "theirs.pth")
    report = convert(str(tmp_path / "theirs.pth"), tmp_path / "m.safetensors")
    assert not report.faults
    ours = load_model(tmp_path / "m.safetensors")[0].double().eval()
    known = read_meta(tmp_path / "m.safetensors").classes
    assert known == (["class 0", "class 1", "class 2"] if layout == "bare" else names)
    pixels = torch.randn(2, 3, 160, 224, dtype=torch.float64)
    with torch.no_grad():
        logits = ours.head(ours.backbone(pixels)).logits
        expected = theirs.double()(pixels).logits
    logits = F.interpolate(logits, (160, 224), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, expected, atol=1e-8, rtol=0)


def test_merging_is_that_of_the_original() -> None:
    """A linear map of unfolded patches equals one of patches joined as Swin joins them."""
    maps, matrix = torch.randn(1, 3, 4, 6), torch.randn(5, 12)
    unfolded = F.unfold(maps, 2, stride=2).transpose(1, 2) @ matrix.T
    x = maps.permute(0, 2, 3, 1)
    joined = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
    torch.testing.assert_close(joined.flatten(1, 2) @ merge_order(matrix).T, unfolded)
