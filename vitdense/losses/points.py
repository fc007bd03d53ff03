"""Losses of masks at points: where to sample, the values there, and their losses.

A mask loss on a few thousand points costs a tenth of one on all pixels and is as good (PointRend,
arXiv 1912.08193; Mask2Former, arXiv 2112.01527, section 3.3). Points are float (x, y) in 0..1 of
the canvas, so that maps of any stride and truths at full size agree on them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitdense.losses.matcher import full_precision

OVERSAMPLE, IMPORTANCE = 3, 0.75
"""Uncertain points are chosen among this many times as many candidates, and are this part of all
points; the others are uniform. Both are Mask2Former's."""

CHUNK = 2**24
"""How many points are sampled at once: takes a few hundred MiB, however many masks there are."""


def sample_maps(maps: Tensor, points: Tensor) -> Tensor:
    """Values of maps at points, bilinear, zero beyond the border; differentiable.

    Args:
        maps: float [N, C, h, w].
        points: float32 [N, P, 2].

    Returns:
        float [N, C, P], at least float32: half precision cannot tell one point from the next.
    """
    maps = full_precision(maps)
    grid = (2 * points - 1).to(maps.dtype)[:, :, None]
    return F.grid_sample(maps, grid, align_corners=False)[..., 0]


def sample_masks(masks: Tensor, rows: Tensor, points: Tensor, extend: bool = False) -> Tensor:
    """`sample_maps` of bool masks, without a float copy of them.

    300 masks of 640 x 640 pixels take 117 MiB as bool and 470 MiB as float32.

    Args:
        masks: bool [N, H, W].
        rows: int64 [R], which mask is read in each row.
        points: float [R, P, 2].
        extend: beyond the border masks go on as their last pixels; otherwise they are 0 there.

    Returns:
        float [R, P] in 0..1, the mask interpolated bilinearly.
    """
    chunk = max(1, CHUNK // points.shape[1])
    parts = zip(rows.split(chunk), points.split(chunk), strict=True)
    return torch.cat([_sample_masks(masks, part, where, extend) for part, where in parts])


def _sample_masks(masks: Tensor, rows: Tensor, points: Tensor, extend: bool) -> Tensor:
    height, width = masks.shape[-2:]
    x, y = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5
    left, top = x.floor(), y.floor()
    start = rows[:, None] * (height * width)
    share = torch.zeros_like(x)
    for column, weight_x in ((left, 1 - (x - left)), (left + 1, x - left)):
        for row, weight_y in ((top, 1 - (y - top)), (top + 1, y - top)):
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            # whole numbers: float32 cannot count the pixels of a canvas of 4096 x 4096 and more
            place = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
            hit = masks.take(start + place)
            share += weight_x * weight_y * (hit if extend else hit & inside)
    return share


def random_points(rows: int, count: int, like: Tensor) -> Tensor:
    """Uniform points, at least float32 [rows, count, 2], on the device of `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.rand(rows, count, 2, dtype=dtype, device=like.device)


@torch.no_grad()
def uncertain_points(maps: Tensor, count: int) -> Tensor:
    """Points of each map, most of them where its logits are nearest to 0 (PointRend, section 3.1).

    Args:
        maps: float [N, h, w], logits.
        count: points of each map.

    Returns:
        float [N, count, 2].
    """
    candidates = OVERSAMPLE * count
    chosen = int(IMPORTANCE * count)
    found = []
    for part in maps.split(max(1, CHUNK // candidates)):
        points = random_points(len(part), candidates, part)
        distances = sample_maps(part[:, None], points)[:, 0].abs()
        index = distances.topk(chosen, dim=1, largest=False).indices
        nearest = points.gather(1, index[..., None].expand(-1, -1, 2))
        found.append(torch.cat([nearest, random_points(len(part), count - chosen, part)], dim=1))
    return torch.cat(found)


def point_bce(logits: Tensor, truth: Tensor, weight: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, its mean over the points.

    Args:
        logits: float [..., P].
        truth: float [..., P] in 0..1.
        weight: float [..., P] in 0..1, how far each point counts; None = all do.

    Returns:
        float [...].
    """
    losses = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return losses.mean(-1) if weight is None else (losses * _shares(weight)).sum(-1)


def point_dice(logits: Tensor, truth: Tensor, weight: Tensor | None = None) -> Tensor:
    """1 - Dice over the points, smoothed by one point (V-Net, arXiv 1606.04797).

    Arguments and result are those of `point_bce`.
    """
    scores = logits.sigmoid()
    if weight is not None:
        scores = scores * weight
    overlap = (scores * truth).sum(-1)
    return 1 - (2 * overlap + 1) / (scores.sum(-1) + _total(truth, weight) + 1)


def pairwise_bce(logits: Tensor, truth: Tensor, weight: Tensor | None = None) -> Tensor:
    """`point_bce` of every truth and every query, at points that they share.

    Args:
        logits: float [..., Q, P].
        truth: float [..., T, P] in 0..1.
        weight: float [..., P] in 0..1, how far each point counts; None = all do.

    Returns:
        float [..., T, Q].
    """
    shares = torch.full_like(logits[..., :1, :], 1 / logits.shape[-1])
    if weight is not None:
        shares = _shares(weight)[..., None, :]
    outside = (F.softplus(logits) * shares).sum(-1)  # if no point belonged to the truth
    return outside[..., None, :] - (truth * shares) @ logits.transpose(-1, -2)


def pairwise_dice(logits: Tensor, truth: Tensor, weight: Tensor | None = None) -> Tensor:
    """`point_dice` of every truth and every query; as `pairwise_bce`."""
    scores = logits.sigmoid()
    if weight is not None:
        weight = weight[..., None, :]
        scores = scores * weight
    overlap = truth @ scores.transpose(-1, -2)
    total = scores.sum(-1)[..., None, :] + _total(truth, weight)[..., None]
    return 1 - (2 * overlap + 1) / (total + 1)


def _shares(weight: Tensor) -> Tensor:
    """Weights divided by their sum, or by 1 where they sum to less: no point counts for more."""
    return weight / weight.sum(-1, keepdim=True).clamp(min=1)


def _total(truth: Tensor, weight: Tensor | None) -> Tensor:
    return truth.sum(-1) if weight is None else (truth * weight).sum(-1)
