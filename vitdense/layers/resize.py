"""Resizing of feature maps and logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear [B, C, h, w] -> [B, C, *size], corners not aligned."""
    return F.interpolate(maps, list(size), mode="bilinear", align_corners=False)
