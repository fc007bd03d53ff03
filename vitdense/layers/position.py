"""Sine embeddings of positions and boxes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sine_embedding(values: Tensor, features: int, temperature: float = 10000) -> Tensor:
    """Embed each number by sines and cosines of falling frequency (Vaswani et al. 2017).

    Args:
        values: float [...], in radians.
        features: even.

    Returns:
        float [..., features]: sine and cosine of each frequency side by side.
    """
    pairs = torch.arange(features // 2, device=values.device, dtype=values.dtype)
    angles = values[..., None] / temperature ** (2 * pairs / features)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)


def sine_position(
    height: int,
    width: int,
    features: int,
    *,
    offset: float,
    like: Tensor,
    temperature: float = 10000,
) -> Tensor:
    """Embed the cells of a grid: the first half of the features tells y, the second x.

    Args:
        features: a multiple of 4.
        offset: added to the positions 1..n before they are divided by n: 0 in DETR, -0.5 (the
            centres of the cells) in Deformable DETR.
        like: a tensor of the device and the dtype that are wanted.
        temperature: by how much the frequencies fall; 20 in DAB-DETR and DINO.

    Returns:
        float [height * width, features], row by row.
    """

    def axis(size: int) -> Tensor:
        steps = torch.arange(1, size + 1, device=like.device, dtype=like.dtype)
        # 1e-6 as in DETR's code, with which the public weights were trained
        angles = (steps + offset) / (size + 1e-6) * (2 * math.pi)
        return sine_embedding(angles, features // 2, temperature)

    rows = axis(height)[:, None].expand(-1, width, -1)
    columns = axis(width)[None].expand(height, -1, -1)
    return torch.cat((rows, columns), -1).flatten(0, 1)


def box_embedding(boxes: Tensor, features: int) -> Tensor:
    """Embed each coordinate of boxes [..., 4] in 0..1, in the order given: [..., 4 * features]."""
    return sine_embedding(boxes * (2 * math.pi), features).flatten(-2)
