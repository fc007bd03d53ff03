"""Windows to crop, drawn by what is in the image."""

from __future__ import annotations

import torch
from torch import Tensor

from vitdense.structures import IGNORE, Size

Window = tuple[tuple[int, int], Size]
"""(top, left) of the corner, and (height, width)."""

_OVERLAPS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
_TRIALS = 40


def window_around_objects(boxes: Tensor, image: Size) -> Window:
    """SSD's random crop (Liu et al. 2016, section 2.2): it overlaps some object by a drawn IoU.

    The same draws as torchvision's RandomIoUCrop, but all trials of one IoU at once, which is
    about 40 times faster.

    Args:
        boxes: float [N, 4], xyxy.
        image: (height, width); the window is at least 0.3 of each, or the whole image.
    """
    whole = (0, 0), image
    if not len(boxes) or min(image) < 4:
        return whole
    while True:
        overlap = _OVERLAPS[int(torch.randint(len(_OVERLAPS), ()))]
        if overlap >= 1:
            return whole
        windows = _draw_windows(image)
        found = torch.nonzero(_fits(windows, boxes, overlap))
        if len(found):
            left, top, right, bottom = windows[found[0, 0]].int().tolist()
            return (top, left), (bottom - top, right - left)


def _draw_windows(image: Size) -> Tensor:
    """float [trials, 4], xyxy in whole pixels."""
    height, width = image
    size = torch.tensor([width, height])
    sides = (size * (0.3 + 0.7 * torch.rand(_TRIALS, 2))).int()
    corners = ((size - sides) * torch.rand(_TRIALS, 2)).int()
    return torch.cat([corners, corners + sides], 1).float()


def _fits(windows: Tensor, boxes: Tensor, overlap: float) -> Tensor:
    """Which windows have a fair shape and the overlap with an object whose centre they hold."""
    from torchvision.ops import box_iou

    sides = windows[:, 2:] - windows[:, :2]
    ratio = sides[:, 0] / sides[:, 1]
    fair = (ratio >= 0.5) & (ratio <= 2)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    held = (windows[:, None, :2] < centers) & (centers < windows[:, None, 2:])
    enough = held.all(2) & (box_iou(windows, boxes) >= overlap)
    return fair & enough.any(1)


def window_to_canvas(window: Window, content: Size, canvas: Size) -> tuple[Window, Size]:
    """A random part of the window that fits the canvas, when the whole is resized to `content`.

    Returns:
        the part, and the size it is resized to.
    """
    corner, size = window
    fits = (min(content[0], canvas[0]), min(content[1], canvas[1]))
    part = [max(1, round(s * f / c)) for s, f, c in zip(size, fits, content, strict=True)]
    free = (int(torch.randint(s - p + 1, ())) for s, p in zip(size, part, strict=True))
    top, left = (c + f for c, f in zip(corner, free, strict=True))
    return ((top, left), (part[0], part[1])), fits


def is_varied(semantic: Tensor, window: Window, most: float) -> bool:
    """No class fills more than the part `most` of the window's labelled pixels."""
    (top, left), (height, width) = window
    stride = max(1, min(height, width) // 64)  # a sample of the pixels is enough to tell
    labels = semantic[top : top + height : stride, left : left + width : stride]
    counts = torch.bincount(labels.flatten().long(), minlength=IGNORE + 1)
    counts[IGNORE] = 0
    return bool(counts.max() < most * counts.sum())
