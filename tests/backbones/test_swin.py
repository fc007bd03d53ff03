"""Swin's windows: equal to timm's where sizes divide, to transformers' where they do not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from vitdense.backbones import swin
from vitdense.backbones.timm import TimmBackbone
from vitdense.convert import backbones
from vitdense.convert.names import Weights

CONFIG = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
MODELS = ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"]


def backbone(
    model: str = MODELS[0], pad_before_roll: bool = True, **arguments: Any
) -> TimmBackbone:
    torch.manual_seed(0)
    built = TimmBackbone(
        model=model, options=CONFIG, pad_before_roll=pad_before_roll, **arguments
    ).eval()
    for parameter in built.parameters():  # timm's start makes blocks of V2 the identity
        nn.init.normal_(parameter, std=0.3)
    return built


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("model", "size"), [(MODELS[0], (112, 168)), (MODELS[1], (128, 192))])
def test_equals_timm_where_sizes_divide(model: str, size: tuple[int, int]) -> None:
    ours, theirs = backbone(model), backbone(model, pad_before_roll=False)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(images(*size)), theirs(images(*size)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_differs_from_timm_where_they_do_not(model: str) -> None:
    ours, theirs = backbone(model), backbone(model, pad_before_roll=False)
    theirs.load_state_dict(ours.state_dict())
    pixels = images(136, 152)
    for mine, other in zip(ours(pixels), theirs(pixels), strict=True):
        assert (mine - other).norm() / other.norm() > 1e-2


def test_a_map_within_one_window_is_not_shifted() -> None:
    ours = backbone(img_size=(56, 112))
    theirs = timm.create_model(MODELS[0], num_classes=0, img_size=(56, 112), **CONFIG).eval()
    theirs.load_state_dict(ours.model.state_dict(), strict=False)
    expected = theirs.forward_intermediates(images(56, 112), intermediates_only=True)
    torch.testing.assert_close(ours(images(56, 112)), expected)


def test_the_mask_equals_timms() -> None:
    block = timm.create_model(MODELS[0], num_classes=0, img_size=112).layers[0].blocks[1]
    like = torch.zeros(1, 28, 28, 1)
    mask = swin.shift_mask((28, 28), block.window_size, block.shift_size, like)
    torch.testing.assert_close(mask, block.attn_mask)


def test_copies_keep_the_windows() -> None:
    original = backbone()
    twin, pixels = copy.deepcopy(original), images(100, 120)
    expected = original(pixels)
    for parameter in original.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(twin(pixels), expected)


@pytest.mark.parametrize("size", [(128, 128), (120, 152)])
def test_equals_transformers_with_level_norms(size: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=7,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2"],
    )
    torch.manual_seed(0)
    reference = transformers.SwinBackbone(config).eval()
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = backbone(level_norm=True)
    weights = Weights(reference.state_dict())
    weights.drop(r"relative_position_index|swin\.layernorm", "is not ours")
    weights.rename(backbones.KINDS["swin"].rules(config.to_dict()))
    ours.load_state_dict(weights.found)
    expected = reference(images(*size)).feature_maps
    torch.testing.assert_close(ours(images(*size)), list(expected), atol=1e-4, rtol=1e-4)
