"""Plain ViTs of transformers under timm's names, windowed or not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitdense.convert.names import Rules, rename
from vitdense.structures import Size

DINOV2: Rules = [
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^encoder\.layer\.", "blocks."),
    (r"attention\.(attention\.query|q_proj)", "attn.qkv[0]"),
    (r"attention\.(attention\.key|k_proj)", "attn.qkv[1]"),
    (r"attention\.(attention\.value|v_proj)", "attn.qkv[2]"),
    (r"attention\.(output\.dense|o_proj)", "attn.proj"),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"^layernorm", "norm"),
]
"""From `embeddings.` and `encoder.` on, of transformers 5, of older ones and of RF-DETR itself."""

DPT: Rules = [
    *DINOV2,
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"\.intermediate\.dense", ".mlp.fc1"),
    (r"\.output\.dense", ".mlp.fc2"),
]
"""From `embeddings.` and `encoder.` on, of transformers' plain ViT, which DPT has."""

LW_DETR: Rules = [
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.projection", "patch_embed.proj"),
    (r"^encoder\.layer\.", "blocks."),
    (r"attention\.(attention\.query|q_proj)", "attn.qkv[0]"),
    (r"attention\.(attention\.key|k_proj)", "attn.qkv[1]"),
    (r"attention\.(attention\.value|v_proj)", "attn.qkv[2]"),
    (r"attention\.(output|o_proj)", "attn.proj"),
    (r"\.intermediate\.", ".mlp."),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"gamma_(\d)", r"ls\1.gamma"),
]
"""From `embeddings.` and `encoder.` on. `key_bias` and `resample` make up for the rest."""


def dinov2_to_timm(tensors: dict[str, Tensor], grid: Size | None = None) -> dict[str, Tensor]:
    """DINOv2, windowed as in RF-DETR or not, as timm's `vit_*_patch14_dinov2`.

    For RF-DETR build `TimmBackbone(model="vit_small_patch14_dinov2", norm="all", windows=...,
    global_blocks=...)` with the checkpoint's `patch_size`, and with `img_size` = grid * patch.

    Args:
        grid: (rows, columns) of the positions to give; by default as many as there are. timm
            resamples them in the same way when an image has another grid.

    Returns:
        timm's names; the unused mask token is left out, unknown names are kept.
    """
    found = rename(tensors, DINOV2)
    found.pop("embeddings.mask_token", None)
    if grid is not None:
        found["pos_embed"] = resample(found["pos_embed"], grid, prefix=1)
    return found


def lw_detr_to_timm(tensors: dict[str, Tensor], grid: Size | None = None) -> dict[str, Tensor]:
    """LW-DETR's ViT as a ViT of timm without a class token.

    Build `TimmBackbone(model="vit_tiny_patch16_224", norm=False, windows=..., global_blocks=...,
    options={"class_token": False, "global_pool": "avg", "init_values": 0.1, ...})` with `img_size`
    = grid * patch.

    Args:
        grid: (rows, columns) of the images that the model is for. LW-DETR resamples positions
            without antialiasing and timm with it, so they differ slightly on other grids.

    Returns:
        timm's names; the class token's position is left out, unknown names are kept.
    """
    found = rename(tensors, LW_DETR)
    for name, value in found.items():
        if name.endswith(".attn.qkv.bias"):
            found[name] = key_bias(value)
    if grid is not None:
        found["pos_embed"] = resample(found["pos_embed"], grid, prefix=1, antialias=False)
    return found | {"pos_embed": found["pos_embed"][:, 1:]}


def key_bias(bias: Tensor) -> Tensor:
    """[2 C] of queries and values -> [3 C] with zeros for the keys, where a bias has no effect."""
    queries, values = bias.chunk(2)
    return torch.cat((queries, torch.zeros_like(queries), values))


def resample(
    positions: Tensor, grid: Size, prefix: int, antialias: bool = True, mode: str = "bicubic"
) -> Tensor:
    """Positions of a square grid for another one.

    Args:
        positions: [1, prefix + side * side, C], those of class and register tokens first.
        antialias: as timm and RF-DETR; LW-DETR, ViTDet and DPT do without.
        mode: `bilinear` as DPT, otherwise all use `bicubic`.

    Returns:
        [1, prefix + rows * columns, C]; itself where the grid is the same.
    """
    side = int((positions.shape[1] - prefix) ** 0.5)
    if grid == (side, side):
        return positions
    exact = torch.promote_types(positions.dtype, torch.float32)
    square = positions[:, prefix:].to(exact).unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized = F.interpolate(square, grid, mode=mode, antialias=antialias)
    cells = resized.flatten(2).transpose(1, 2).to(positions.dtype)
    return torch.cat((positions[:, :prefix], cells), 1)
