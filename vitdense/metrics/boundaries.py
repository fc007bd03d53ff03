"""The pixels near outlines, for boundary IoU of maps and of masks."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from vitdense.ops import run_length
from vitdense.ops.run_length import RunLengths
from vitdense.structures import Size

PART = 0.02
"""Of an image's diagonal, how far from its outline a mask's band reaches in COCO's boundary AP."""

MOST_PIXELS = 1 << 26
"""Pixels of masks whose bands are cut out at once: some 200 MB."""


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


def encode_bands(masks: Tensor, part: float = PART) -> RunLengths:
    """Of each mask the pixels within this part of the diagonal of its outline or the image's edge.

    Those are the mask less its erosion, as in Cheng et al., "Boundary IoU", arXiv 2103.16562.

    Args:
        masks: bool [N, H, W].
    """
    height, width = masks.shape[1:]
    reach = band_width((height, width), part)
    at_once = max(1, MOST_PIXELS // max(1, height * width))
    return run_length.join(
        [run_length.encode(some & ~_eroded(some, reach)) for some in masks.bool().split(at_once)]
    )


def _eroded(masks: Tensor, reach: int) -> Tensor:
    """Pixels whose square of `reach` in each direction lies in the mask and in the image."""
    padded = F.pad(masks, [reach] * 4)
    for dim in (1, 2):
        padded = _all_of(padded, 2 * reach + 1, dim)
    return padded


def _all_of(masks: Tensor, side: int, dim: int) -> Tensor:
    """Whether all of `side` pixels in a row are set; doubling takes few passes over bytes."""
    length = 1
    while length < side:
        step = min(length, side - length)
        rest = masks.shape[dim] - step
        masks = masks.narrow(dim, 0, rest) & masks.narrow(dim, step, rest)
        length += step
    return masks
