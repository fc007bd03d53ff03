"""Maps over a canvas brought back to original pixels, a few rows at a time.

`Frame.restore_map` for maps whose original size does not fit into memory, or into the cache. The
result does not depend on how many rows are computed together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vitdense.structures import Frame, Size

ReadRows = Callable[[int, int], Tensor]
"""Reads rows of a map: (first, last) -> float [C, last - first, w], `last` not included."""

CHUNK = {"cpu": 2**20}
"""How many numbers are resized at once. CPUs are twice as fast if their caches hold them."""

LARGE_CHUNK = 2**26
"""The same on other devices: 256 MiB of float32."""


def numbers_at_once(device: torch.device) -> int:
    """How many numbers are best worked on together on a device."""
    return CHUNK.get(device.type, LARGE_CHUNK)


def rows_at_once(classes: int, frame: Frame, device: torch.device) -> int:
    """How many original rows of a map of so many channels are best brought back together."""
    row = classes * max(frame.canvas[1], frame.original[1])
    return max(1, numbers_at_once(device) // row)


def chunks(classes: int, frame: Frame, device: torch.device) -> Iterator[tuple[int, int]]:
    """(first, last) of each group of original rows, `last` not included; see `rows_at_once`."""
    step = rows_at_once(classes, frame, device)
    for first in range(0, frame.original[0], step):
        yield first, min(first + step, frame.original[0])


def restore_rows(read: ReadRows, size: Size, frame: Frame, first: int, last: int) -> Tensor:
    """Rows of `frame.restore_map(maps)`.

    Args:
        read: rows of the map over the whole canvas.
        size: (h, w) of that map, at any stride.
        first, last: which original rows, `last` not included.

    Returns:
        float [C, last - first, W], W the original width.
    """

    def content(start: int, stop: int) -> Tensor:
        return _resized_rows(read, size, frame.canvas, start, stop)[..., : frame.content[1]]

    if frame.content == frame.canvas:
        return _resized_rows(read, size, frame.original, first, last)
    return _resized_rows(content, frame.content, frame.original, first, last)


def rows_needed(rows: int, size: Size, frame: Frame) -> int:
    """How many rows of a map of `size` are read at most for this many original rows."""
    content = math.ceil(rows * frame.content[0] / frame.original[0]) + 2
    return min(size[0], math.ceil(content * size[0] / frame.canvas[0]) + 2)


def _resized_rows(read: ReadRows, source: Size, target: Size, first: int, last: int) -> Tensor:
    """Rows of a map of size `source` that is resized to `target`: bilinear, corners not aligned."""
    if source[0] == target[0]:
        maps = read(first, last)
    else:
        upper, lower, part = _neighbours(source[0], target[0], first, last)
        start, stop = int(upper[0]), int(lower[-1]) + 1
        maps = read(start, stop)
        above, below, part = (
            it.to(maps.device, non_blocking=True) for it in (upper - start, lower - start, part)
        )
        maps = torch.lerp(maps.index_select(1, above), maps.index_select(1, below), part[:, None])
    if source[1] == target[1]:
        return maps
    return F.interpolate(maps, target[1], mode="linear", align_corners=False)


def _neighbours(source: int, target: int, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """The source rows above and below each new row, and how far it lies below the upper, 0..1.

    In float32, as torch computes them, so that rows of large maps equal torch's.
    """
    centres = torch.arange(first, last, dtype=torch.float32) + 0.5
    place = (centres * (source / target) - 0.5).clamp_(min=0)
    upper = place.long().clamp_(max=source - 1)
    lower = (upper + 1).clamp_(max=source - 1)
    return upper, lower, (place - upper).clamp_(max=1)
