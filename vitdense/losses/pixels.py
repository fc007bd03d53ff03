"""Losses of single pixels and of outlines that torch and segmentation_models_pytorch lack."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vitdense.structures import IGNORE

SURE, KEPT = 0.7, 1 / 16
"""Pixels are hard whose true class has a lower probability; at least this part of all are."""

OUTLINE, REACH = 3, 5
"""Window in pixels that makes the outline of a region, and that in which two outlines may meet."""

SMALL = 1e-7


def pixel_weight(labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """How many pixels are not ignored, or the sum of their class weights: a scalar.

    Args:
        labels: whole numbers [...], 0..C-1 or IGNORE.
        class_weights: float [C].
    """
    valid = labels != IGNORE
    if class_weights is None:
        return valid.sum()
    return (class_weights[labels.long().where(valid, 0)] * valid).sum()


def hard_cross_entropy(
    logits: Tensor, labels: Tensor, class_weights: Tensor | None = None
) -> Tensor:
    """Mean cross entropy of the hard pixels: online hard example mining, arXiv 1604.03540.

    Hard are pixels whose true class has a probability below 0.7, and at least a sixteenth of
    those that count.

    Args:
        logits: float [B, C, H, W].
        labels: int64 [B, H, W], 0..C-1 or IGNORE.
        class_weights: float [C].
    """
    each = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none").flatten()
    valid = (labels != IGNORE).flatten()
    hardest = each.detach().where(valid, -1).sort(descending=True).values
    last = (valid.sum() * KEPT).long().clamp(min=1) - 1
    # gather, not indexing by a tensor: that makes the host wait
    bound = hardest.gather(0, last[None]).clamp(max=-math.log(SURE))
    weights = (valid & (each.detach() >= bound)).to(each.dtype)
    if class_weights is not None:
        weights = weights * class_weights.to(each.dtype)[labels.flatten().where(valid, 0)]
    total = weights.sum()
    return (each * weights).sum() / total.where(total > 0, 1)


def boundary(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - F1 of soft outlines, mean over the classes that have one in an image.

    An outline point is right if the other's outline passes within two pixels. Bokhovkin and
    Burnaev, "Boundary Loss for Remote Sensing Imagery", arXiv 1905.07852.

    Args:
        logits: float [B, C, H, W].
        labels: int64 [B, H, W], 0..C-1 or IGNORE; where ignored pixels are near, nothing counts.
    """
    valid = (labels != IGNORE)[:, None].to(logits.dtype)
    near_void = _grow(1 - valid, OUTLINE)
    truth = F.one_hot(labels.where(labels != IGNORE, 0), logits.shape[1])
    inside = truth.movedim(-1, 1).to(logits.dtype) * valid
    found, there = (
        (_grow(1 - maps, OUTLINE) - (1 - maps)) * (1 - near_void)
        for maps in (logits.softmax(1) * valid, inside)
    )
    precision = (found * _grow(there, REACH)).sum((2, 3)) / (found.sum((2, 3)) + SMALL)
    recall = (there * _grow(found, REACH)).sum((2, 3)) / (there.sum((2, 3)) + SMALL)
    f1 = 2 * precision * recall / (precision + recall + SMALL)
    outlined = (there.sum((2, 3)) > 0).to(f1.dtype)
    return ((1 - f1) * outlined).sum() / outlined.sum().clamp(min=1)


def _grow(maps: Tensor, width: int) -> Tensor:
    return F.max_pool2d(maps, width, stride=1, padding=width // 2)


def balance(pixels: Tensor, shared: Tensor, median: bool) -> Tensor:
    """Weights that make up for rare classes; absent classes get the mean weight, 1.

    Args:
        pixels: int64 [C], labelled pixels of each class in the data set.
        shared: int64 [C], labelled pixels of all the images that have the class.
        median: median frequency over the class's own, in images that have it (Eigen and Fergus,
            arXiv 1411.4734, section 6.3.2); else the inverse of its share, with a mean of 1.

    Returns:
        float32 [C].
    """
    there = pixels > 0
    if not there.any():
        return torch.ones(len(pixels))
    share = pixels.double() / (shared if median else pixels.sum()).clamp(min=1)
    weights = share[there].quantile(0.5) / share if median else 1 / share
    if not median:
        weights = weights / weights[there].mean()
    return weights.where(there, 1.0).float()
