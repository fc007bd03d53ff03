"""Plain ViTs of transformers under timm's names, windowed or not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitdense.convert.names import Rules
from vitdense.structures import Size

ATTENTION: list[tuple[str, str]] = [
    (r"attention\.((self|attention)\.query|q_proj)", "attn.qkv[0]"),
    (r"attention\.((self|attention)\.key|k_proj)", "attn.qkv[1]"),
    (r"attention\.((self|attention)\.value|v_proj)", "attn.qkv[2]"),
    (r"attention\.(output(\.dense)?|o_proj)", "attn.proj"),
]
"""transformers' attention with three matrices as timm's with one, in both layouts of names."""

DINOV2: Rules = [
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^encoder\.layer\.", "blocks."),
    *ATTENTION,
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
    *ATTENTION,
    (r"\.intermediate\.", ".mlp."),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"gamma_(\d)", r"ls\1.gamma"),
]
"""From `embeddings.` and `encoder.` on. LW-DETR has no bias for keys (`key_bias`)."""


def size_options(config: dict[str, Any], names: dict[tuple[int, int, int], str]) -> dict[str, Any]:
    """`model` for a ViT of transformers, and the `options` that make another size of it.

    Args:
        config: of the ViT, in transformers' words.
        names: timm's models by width, depth and heads; the first stands for all other sizes.
    """
    width, depth = config.get("hidden_size", 768), config.get("num_hidden_layers", 12)
    heads = config.get("num_attention_heads", 12)
    hidden = config.get("intermediate_size", config.get("mlp_ratio", 4) * width)
    name = names.get((width, depth, heads))
    if name is not None and hidden == 4 * width:
        return {"model": name}
    options = {"embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": hidden / width}
    return {"model": name or next(iter(names.values())), "options": options}


def key_bias(bias: Tensor) -> Tensor:
    """[2 C] of queries and values -> [3 C] with zeros for the keys, where a bias has no effect."""
    queries, values = bias.chunk(2)
    return torch.cat((queries, torch.zeros_like(queries), values))


def resample(positions: Tensor, grid: Size, prefix: int, mode: str = "bicubic") -> Tensor:
    """Positions of a square grid for another one, without the antialiasing that timm does.

    Args:
        positions: [1, prefix + side * side, C], those of class and register tokens first.
        mode: `bicubic` as LW-DETR and ViTDet, or `bilinear` as DPT.

    Returns:
        [1, prefix + rows * columns, C]; itself where the grid is the same.
    """
    side = int((positions.shape[1] - prefix) ** 0.5)
    if grid == (side, side):
        return positions
    exact = torch.promote_types(positions.dtype, torch.float32)
    square = positions[:, prefix:].to(exact).unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized = F.interpolate(square, grid, mode=mode)
    cells = resized.flatten(2).transpose(1, 2).to(positions.dtype)
    return torch.cat((positions[:, :prefix], cells), 1)
