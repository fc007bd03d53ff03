"""Masks: conversions named by their formats.

A mask is a bool array [H, W]; a polygon is a flat list x0, y0, x1, y1, ...; an RLE is COCO's
mapping of `size` (height, width) and `counts`, a list of run lengths or its compressed string.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Mask = NDArray[np.bool_]

_NMS_ROWS = 64
"""How many rows of all masks are floats at once, so that large masks need little memory."""


def masks_to_boxes(masks: Tensor) -> Tensor:
    """Tight boxes around masks, which reach to the far edges of their last pixels.

    `torchvision.ops.masks_to_boxes` returns the index of the last pixel instead, which makes a
    mask of one pixel a box without area, and fails on an empty mask.

    Args:
        masks: bool [N, H, W].

    Returns:
        float32 [N, 4], xyxy; zeros for an empty mask.
    """
    pixels = masks.view(torch.uint8)  # torch reduces bytes about 30 times faster than bools
    top, bottom = _extent(pixels.amax(2) > 0)
    left, right = _extent(pixels.amax(1) > 0)
    return torch.stack([left, top, right, bottom], dim=1).float()


def _extent(hits: Tensor) -> tuple[Tensor, Tensor]:
    first = hits.int().argmax(dim=1)
    last = hits.shape[1] - hits.flip(1).int().argmax(dim=1)
    return first, last * hits.any(dim=1)


def mask_nms(masks: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression of masks, for each label by itself.

    Args:
        masks: bool [N, H, W], best first, none empty.
        labels: int64 [N].
        threshold: 0..1; of two masks with a higher IoU the later one is dropped.

    Returns:
        int64 [K], indices of the masks that stay, rising.
    """
    common = torch.zeros(len(masks), len(masks), device=masks.device)
    for rows in masks.split(_NMS_ROWS, dim=1):
        pixels = rows.flatten(1).float()
        common += pixels @ pixels.T
    area = common.diagonal()
    overlap = common / (area[:, None] + area - common)
    rivals = ((overlap > threshold) & (labels[:, None] == labels)).cpu()
    kept = torch.ones(len(masks), dtype=torch.bool)
    for place in range(len(masks)):
        if kept[place]:
            kept[place + 1 :] &= ~rivals[place, place + 1 :]
    return kept.nonzero()[:, 0].to(masks.device)


def number_masks(masks: Tensor) -> Tensor:
    """Masks that do not overlap as one map of their numbers; the reverse of `split_masks`.

    Args:
        masks: bool [N, H, W] on the CPU, N from 1 to 255.

    Returns:
        uint8 [H, W], k = the k-th mask, from 1; 0 = none.
    """
    numbers = torch.arange(1, len(masks) + 1, dtype=torch.uint8)
    return (masks.view(torch.uint8) * numbers[:, None, None]).amax(0)


def split_masks(numbers: Tensor, places: Tensor) -> Tensor:
    """Masks from a map of their numbers.

    Args:
        numbers: whole numbers [H, W] on the CPU.
        places: whole numbers [N], which of the numbers to take.

    Returns:
        bool [N, H, W].
    """
    values = places.to(numbers.dtype).numpy()[:, None, None]
    return torch.from_numpy(numbers.numpy() == values)  # many times faster than torch's comparison


def decode_segmentation(segmentation: Any, height: int, width: int) -> Mask:
    """Mask of a COCO annotation's `segmentation`: polygons, an RLE, or a compressed RLE.

    Raises:
        ValueError: it is none of these, or does not fit the image.
    """
    if isinstance(segmentation, dict):
        return rle_to_mask(segmentation, height, width)
    if isinstance(segmentation, list):
        return polygons_to_mask(segmentation, height, width)
    raise ValueError(
        f"segmentation is {_kind(segmentation)}: "
        "give a list of polygons or a mapping of `size` and `counts`"
    )


def polygons_to_mask(polygons: list[list[float]], height: int, width: int) -> Mask:
    """Union of polygons, rasterised as COCO does; those of fewer than three points cover nothing.

    Raises:
        ValueError: a polygon is not a flat list of finite x, y pairs near the image.
    """
    from pycocotools import mask as coco

    rings = polygon_rings(polygons, height, width)
    if not rings:
        return np.zeros((height, width), dtype=bool)
    return coco.decode(coco.merge(coco.frPyObjects(rings, height, width))).astype(bool)


def polygon_rings(polygons: list[list[float]], height: int, width: int) -> list[list[float]]:
    """The polygons of three points and more, checked so that they can be rasterised safely.

    Raises:
        ValueError: a polygon is not a flat list of finite x, y pairs near the image.
    """
    rings = [_ring(polygon, 2 * max(height, width)) for polygon in polygons]
    return [ring for ring in rings if len(ring) >= 6]


def _ring(polygon: Any, reach: float) -> list[float]:
    try:
        points = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError):
        points = np.empty((0, 0))
    if points.ndim != 1 or len(points) % 2:
        raise ValueError("a polygon must be a flat list of numbers x0, y0, x1, y1, ...")
    # pycocotools needs memory in proportion to this distance
    if not (np.abs(points) <= reach).all():
        raise ValueError(f"a polygon has points not finite or more than {reach} pixels away")
    return points.tolist()


def rle_to_mask(rle: dict[str, Any], height: int, width: int) -> Mask:
    """Mask of an RLE, compressed (`counts` is a string) or not (a list).

    Not decoded by pycocotools, which returns uninitialised memory where runs end too early.

    Raises:
        ValueError: keys are missing, its size is another, or its runs do not cover the image.
    """
    if not {"size", "counts"} <= rle.keys():
        raise ValueError(f"an RLE needs `size` and `counts`, this one has {sorted(rle)}")
    size, counts = rle["size"], rle["counts"]
    if not isinstance(size, list | tuple) or list(size) != [height, width]:
        raise ValueError(f"an RLE of size {size} does not fit an image of {[height, width]}")
    if not isinstance(counts, list | str | bytes):
        raise ValueError(f"`counts` of an RLE is {_kind(counts)}: give a list of runs or a string")
    runs = np.asarray(counts) if isinstance(counts, list) else _parse_counts(counts)
    pixels = height * width
    if runs.ndim != 1 or runs.dtype.kind != "i" or ((runs < 0) | (runs > pixels)).any():
        raise ValueError(f"runs of an RLE must be whole numbers between 0 and {height} * {width}")
    if runs.sum() != pixels:
        raise ValueError(f"runs of an RLE sum to {runs.sum()}, its image has {height} * {width}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _parse_counts(text: str | bytes) -> NDArray[np.int64]:
    """Runs of a compressed string: 5 bits a character, each run relative to the one before last."""
    data = text.encode() if isinstance(text, str) else text
    codes = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 32 == 0)
    if ((codes < 0) | (codes > 63)).any() or len(ends) == 0 or ends[-1] != len(codes) - 1:
        raise ValueError("`counts` of a compressed RLE has characters that belong to no run")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    places = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * places), starts)
    runs -= ((codes[ends] & 16) != 0) << (5 * lengths)  # the highest bit is the sign
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def mask_to_rle(mask: Mask | Tensor) -> dict[str, Any]:
    """COCO's compressed RLE of a mask [H, W]; `counts` is a string, ready for JSON."""
    from pycocotools import mask as coco

    array = mask.cpu().numpy() if isinstance(mask, Tensor) else mask
    rle = coco.encode(np.asfortranarray(array, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
