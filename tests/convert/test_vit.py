"""Windowed ViTs: transformers' RF-DETR and LW-DETR backbones under timm's names give our maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LwDetrViTConfig, RfDetrDinov2Config
from transformers.models.lw_detr.modeling_lw_detr import LwDetrViTBackbone
from transformers.models.rf_detr.modeling_rf_detr import RfDetrDinov2Backbone

from vitdense.backbones.timm import TimmBackbone
from vitdense.convert.names import rename
from vitdense.convert.vit import DINOV2, LW_DETR, key_bias, resample

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-8}
SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 6}
OPTIONS = {"embed_dim": 32, "num_heads": 4, "depth": 6}


def randomised(model: nn.Module) -> nn.Module:
    """Weights that make every parameter matter, and activations of about one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def check(ours: nn.Module, theirs: nn.Module, pixels: Tensor, dtype: torch.dtype) -> None:
    pixels = pixels.to(dtype)
    expected = theirs.to(dtype)(pixels).feature_maps
    maps = ours.eval().to(dtype)(pixels)
    assert len(maps) == len(expected)
    for mine, other in zip(maps, expected, strict=True):
        assert other.abs().mean() > 0.1
        torch.testing.assert_close(mine, other, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def dinov2_to_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = rename(tensors, DINOV2)
    found.pop("embeddings.mask_token", None)
    return found


def rf_detr(patch: int, grid: int, windows: int) -> tuple[nn.Module, TimmBackbone]:
    """Maps after blocks 2 and 5; global are blocks 3 and, were it there, 6."""
    config = RfDetrDinov2Config(
        **SHAPE, image_size=grid * patch, patch_size=patch, num_windows=windows, out_indices=[3, 6]
    )
    theirs = randomised(RfDetrDinov2Backbone(config))
    ours = TimmBackbone(
        model="vit_small_patch14_dinov2", img_size=grid * patch, patch_size=patch, norm="all",
        windows=windows, global_blocks=[3], out_indices=[2, 5], options=OPTIONS,
    )  # fmt: skip
    ours.model.load_state_dict(dinov2_to_timm(theirs.state_dict()))
    return theirs, ours


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("patch", "windows"), [(14, 2), (16, 2), (16, 4), (14, 1)])
def test_rf_detr(patch: int, windows: int, dtype: torch.dtype) -> None:
    theirs, ours = rf_detr(patch, grid=8, windows=windows)
    check(ours, theirs, images(8 * patch, 8 * patch), dtype)


@pytest.mark.parametrize("grid", [4, 12])
def test_rf_detr_at_other_sizes_than_its_positions(grid: int) -> None:
    theirs, ours = rf_detr(16, grid=8, windows=2)
    check(ours, theirs, images(16 * grid, 16 * grid), torch.float32)


def test_rf_detr_trains_the_same() -> None:
    theirs, ours = rf_detr(14, grid=8, windows=2)
    pixels = images(112, 112)
    for model in (theirs, ours):
        maps = model(pixels)
        sum(m.square().mean() for m in getattr(maps, "feature_maps", maps)).backward()
    gradients = dinov2_to_timm(
        {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    )
    mine = {n: p.grad for n, p in ours.model.named_parameters()}
    assert mine.keys() == gradients.keys()
    torch.testing.assert_close(mine, gradients, atol=1e-5, rtol=1e-4)


def test_older_names_of_dinov2() -> None:
    state = rf_detr(14, grid=4, windows=1)[0].state_dict()
    older = {
        name.replace("attention.q_proj", "attention.attention.query")
        .replace("attention.k_proj", "attention.attention.key")
        .replace("attention.v_proj", "attention.attention.value")
        .replace("attention.o_proj", "attention.output.dense"): value
        for name, value in state.items()
    }
    assert older.keys() != state.keys()
    torch.testing.assert_close(dinov2_to_timm(older), dinov2_to_timm(state))


def lw_detr(side: int, **options: Any) -> nn.Module:
    config = LwDetrViTConfig(
        **SHAPE, num_windows=side**2, pretrain_image_size=64, image_size=256,
        window_block_indices=[0, 1, 3, 4], out_features=["stage2", "stage4", "stage6"], **options,
    )  # fmt: skip
    return randomised(LwDetrViTBackbone(config))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("side", "grid"), [(2, (4, 4)), (4, (8, 8)), (2, (6, 10)), (1, (5, 4))])
def test_lw_detr(side: int, grid: tuple[int, int], dtype: torch.dtype) -> None:
    theirs, size = lw_detr(side).to(dtype), (grid[0] * 16, grid[1] * 16)
    ours = TimmBackbone(
        model="vit_tiny_patch16_224", img_size=size, norm=False, windows=side,
        global_blocks=[2, 5], out_indices=[1, 3, 5],
        options=OPTIONS | {"class_token": False, "global_pool": "avg", "init_values": 0.1},
    )  # fmt: skip
    state = rename(theirs.state_dict(), LW_DETR)
    for name in [name for name in state if name.endswith("qkv.bias")]:
        state[name] = key_bias(state[name])
    state["pos_embed"] = resample(state["pos_embed"], grid, prefix=1)[:, 1:]
    ours.to(dtype).model.load_state_dict(state)
    check(ours, theirs, images(*size), dtype)
