"""Changes of color that keep the truth as it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.125, 0.5, 0.5, 0.05
"""Largest changes: three fractions of 1, one of the circle of hues (SSD, Liu et al. 2016)."""

_LUMA = (0.299, 0.587, 0.114)
_TO_YIQ = (_LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def distort(image: Tensor, chance: float) -> Tensor:
    """SSD's photometric distortion as one affine map of the colors, each part with `chance`.

    Hue turns the plane of colors in YIQ instead of going through HSV: torchvision's own
    distortion spends four fifths of its time there, and one map in all is 5 to 10 times faster.

    Args:
        image: uint8, or float32 in 0..255, [C, H, W]; saturation and hue need three channels.
            Other numbers than 1 and 3 are no colors, and stay as they are.
    """
    if image.shape[0] not in (1, 3):
        return image
    parts = (torch.rand(4) < chance).tolist()
    if not any(parts):
        return image
    amounts = torch.rand(4).mul(2).sub(1).tolist()
    strength = [amount * part for amount, part in zip(amounts, parts, strict=True)]
    channels = image.shape[0]
    colors = _turned(strength[2] * SATURATION, strength[3] * HUE) if channels == 3 else None
    colors = torch.eye(channels) if colors is None else colors
    contrast = 1 + strength[1] * CONTRAST
    colors = colors * (1 + strength[0] * BRIGHTNESS) * contrast
    pixels = image.flatten(1).float()
    offset = (1 - contrast) / contrast * (colors @ pixels.mean(1, keepdim=True)).mean()
    mapped = torch.addmm(offset.expand(channels, 1), colors, pixels)
    return mapped.clamp_(0, 255).to(image.dtype).view(image.shape)


def _turned(saturation: float, hue: float) -> Tensor:
    """float [3, 3]: saturation and hue of RGB changed, the luma kept."""
    angle, scale = 2 * math.pi * hue, 1 + saturation
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    to_yiq = torch.tensor(_TO_YIQ)
    turn = torch.tensor([[1.0, 0.0, 0.0], [0.0, cos, -sin], [0.0, sin, cos]])
    return torch.linalg.solve(to_yiq, turn @ to_yiq)
