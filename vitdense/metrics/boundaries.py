"""The pixels near outlines, for boundary IoU."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from vitdense.structures import Size


def band_width(size: Size, part: float) -> int:
    """Pixels that are this part of the image's diagonal, at least 1."""
    return max(1, round(part * math.hypot(*size)))


def boundary_band(labels: Tensor, width: int) -> Tensor:
    """Pixels that are within `width` of another label or of the image's edge.

    The part of it that has one label is that label's mask less its erosion by `width` steps of
    3 x 3, as Cheng et al., "Boundary IoU", arXiv 2103.16562, define it; so one pass does for all
    labels.

    Args:
        labels: integers [H, W], no label is negative.

    Returns:
        bool [H, W].
    """
    padded = F.pad(labels[None, None].float(), [width] * 4, value=-1.0)
    return (_highest(padded, width) != -_highest(-padded, width))[0, 0]


def _highest(maps: Tensor, reach: int) -> Tensor:
    """The maximum within `reach` in each direction, rows and columns in turn."""
    side = 2 * reach + 1
    return F.max_pool2d(F.max_pool2d(maps, (1, side), stride=1), (side, 1), stride=1)
