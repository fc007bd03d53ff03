"""Boxes: conversions named by their format, and overlap.

`xyxy` is absolute, in pixels; `relative` is cxcywh divided by the canvas, in 0..1, which is what
DETR-style heads predict. Sizes stay python numbers: a tensor made of them would wait for the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitdense.structures import Size

EPS = 1e-9  # far below the area of a pixel in 0..1; boxes without area divide by it


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """[..., 4] centre and size -> [..., 4] corners, in the same unit."""
    half = boxes[..., 2:] / 2
    return torch.cat((boxes[..., :2] - half, boxes[..., :2] + half), -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """[..., 4] corners -> [..., 4] centre and size, in the same unit."""
    start, end = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((start + end) / 2, end - start), -1)


def xyxy_to_relative(boxes: Tensor, canvas: Size) -> Tensor:
    """[..., 4] corners in pixels -> [..., 4] cxcywh in 0..1 of the canvas."""
    return _scale(xyxy_to_cxcywh(boxes), 1 / canvas[1], 1 / canvas[0])


def relative_to_xyxy(boxes: Tensor, canvas: Size) -> Tensor:
    """[..., 4] cxcywh in 0..1 of the canvas -> [..., 4] corners in pixels."""
    return _scale(cxcywh_to_xyxy(boxes), canvas[1], canvas[0])


def _scale(boxes: Tensor, x: float, y: float) -> Tensor:
    a, b, c, d = boxes.unbind(-1)
    return torch.stack((a * x, b * y, c * x, d * y), -1)


def generalized_iou(first: Tensor, second: Tensor) -> Tensor:
    """Generalized IoU alone; arguments and shapes are those of `overlaps`."""
    return overlaps(first, second)[1]


def overlaps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalized IoU (Rezatofighi et al. 2019) of boxes that broadcast.

    Equal shapes give the overlap of matched pairs; `first[:, None]` and `second[None]` give that
    of all pairs.

    Args:
        first, second: float [..., 4], xyxy in the same unit.

    Returns:
        IoU in 0..1 and generalized IoU in -1..1, float [...]; finite for boxes without area too.
    """
    left, top, right, bottom = first.unbind(-1)
    left2, top2, right2, bottom2 = second.unbind(-1)
    width = (torch.minimum(right, right2) - torch.maximum(left, left2)).clamp(min=0)
    height = (torch.minimum(bottom, bottom2) - torch.maximum(top, top2)).clamp(min=0)
    overlap = width * height
    area = (right - left) * (bottom - top)
    area2 = (right2 - left2) * (bottom2 - top2)
    union = area + area2 - overlap
    hull_width = torch.maximum(right, right2) - torch.minimum(left, left2)
    hull_height = torch.maximum(bottom, bottom2) - torch.minimum(top, top2)
    hull = hull_width * hull_height
    iou = overlap / union.clamp(min=EPS)
    return iou, iou - (hull - union) / hull.clamp(min=EPS)
