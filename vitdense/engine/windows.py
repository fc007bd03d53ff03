"""Scores over a canvas from those of windows on it, of which only a band exists at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitdense.config.schema import Inference
from vitdense.structures import Size

Compute = Callable[[Tensor], Tensor]
"""Images [B, C, H, W] -> scores of each class, float32 [B, K, h, w], on the model's device."""

Blend = Literal["flat", "gaussian", "center"]


@dataclass(frozen=True, slots=True)
class Place:
    """A window along one axis, in cells of the map.

    Attributes:
        start: where it begins.
        first, last: the part of it that counts, without the last.
    """

    start: int
    first: int
    last: int

    @property
    def inner(self) -> slice:
        """The part that counts, from where the window begins."""
        return slice(self.first - self.start, self.last - self.start)


def window_starts(length: int, window: int, overlap: float, divisor: int) -> list[int]:
    """Where windows begin along an axis; the last is moved back to stay inside.

    Args:
        length, window: in pixels, multiples of `divisor`.
        overlap: least part of a window that the next one covers too.
        divisor: windows begin at multiples of it, so that patches lie as in the whole image.
    """
    # the small number keeps 0.9 * 160 from being below 144
    step = max(1, math.floor(window * (1 - overlap) / divisor + 1e-6)) * divisor
    return [*range(0, length - window, step), max(0, length - window)]


def window_places(starts: list[int], window: int, length: int, blend: Blend) -> list[Place]:
    """Which part of each window counts: all of it, or what lies nearest to it (`center`).

    Args:
        starts, window, length: of the windows and of the map, in cells.
    """
    ends = [min(start + window, length) for start in starts]
    if blend != "center":
        return [Place(start, start, end) for start, end in zip(starts, ends, strict=True)]
    middles = [(after + end) // 2 for after, end in zip(starts[1:], ends, strict=False)]
    edges = [0, *middles, length]
    return [Place(*it) for it in zip(starts, edges, edges[1:], strict=False)]


def window_weights(cells: int, blend: Blend) -> Tensor:
    """float32 [cells]: how much each cell of a window counts along one axis.

    The Gaussian has a standard deviation of an eighth of the window, as nnU-Net's (Isensee et al.,
    Nature Methods 2021).
    """
    if blend != "gaussian":
        return torch.ones(cells)
    return torch.signal.windows.gaussian(cells, std=cells / 8)


class Mosaic:
    """Scores over the canvas of some images, computed by rows of windows as they are read.

    Windows begin at multiples of the model's divisor, and are blended at the stride of the
    scores; resizing comes after. So where windows agree, the map is that of the whole image.

    Attributes:
        classes: K.
        size: (h, w) of the map of scores over the whole canvas.
        device: where the scores are.
    """

    def __init__(
        self,
        compute: Compute,
        images: Tensor,
        settings: Inference,
        divisor: int,
        keep: Callable[[int, Size], int] | None = None,
    ) -> None:
        """Compute the first row of windows.

        Args:
            images: [B, C, H, W]; padded with zeros where they are smaller than a window.
            divisor: of canvases, windows and their places.
            keep: (number of classes, size of the map) -> most rows of it that are read at once.
                Only so many, and those of a row of windows, are then kept; by default all are.
        """
        self.compute, self.keep, self.blend = compute, keep, settings.blend
        height, width = images.shape[-2:]
        self.canvas: Size = (height, width)
        self.window = window_size(settings, self.canvas)
        pairs = zip(self.canvas, self.window, strict=True)
        self.tops, self.lefts = (
            window_starts(side, window, settings.overlap, divisor) for side, window in pairs
        )
        padding = (max(0, self.window[1] - width), max(0, self.window[0] - height))
        self.images = F.pad(images, (0, padding[0], 0, padding[1])) if any(padding) else images
        self.together = max(1, settings.batch_size // len(images))
        self._row = self._end = self.done = 0
        self._advance()

    def read(self, index: int, first: int, last: int) -> Tensor:
        """Rows of one image's map, float [K, last - first, w]; must be read downwards."""
        while self.done < last:
            self._advance()
        parts = [self.ring[index, :, there] for there, _ in self._pieces(first, last)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _advance(self) -> None:
        """Compute the next row of windows."""
        top = self.tops[self._row]
        band = self.images[..., top : top + self.window[0], :]
        for start in range(0, len(self.lefts), self.together):
            lefts = self.lefts[start : start + self.together]
            scores = self.compute(torch.cat([band[..., x : x + self.window[1]] for x in lefts]))
            if self._end == 0:
                self._open(scores)
            if start == 0:
                self._enter(self.rows[self._row].last)
            scores = _resized(scores, self.cells)
            for index, part in enumerate(scores.split(len(self.images)), start):
                self._add(part, self.rows[self._row], self.columns[index])
        self._row += 1
        last = self._row == len(self.rows)
        self.done = self.size[0] if last else self.rows[self._row].first

    def _open(self, scores: Tensor) -> None:
        """Make room, now that the stride of the scores is known."""
        self.classes, self.device = scores.shape[1], scores.device
        starts = (self.tops, self.lefts)
        # Where windows do not begin at whole cells, cells are pixels.
        cells = scores.shape[2], scores.shape[3]
        self.cells = _grid(cells, self.window, self.canvas, starts)
        scale = list(zip(self.cells, self.window, strict=True))
        height, width = (s * n // w for s, (n, w) in zip(self.canvas, scale, strict=True))
        self.size: Size = (height, width)
        self.rows, self.columns = (
            window_places([x * n // w for x in places], n, side, self.blend)
            for places, (n, w), side in zip(starts, scale, self.size, strict=True)
        )
        tall, wide = (window_weights(n, self.blend).to(self.device) for n in self.cells)
        self.weights = tall[:, None] * wide
        most = max(row.last - row.first for row in self.rows)
        rows = height if self.keep is None else most + self.keep(self.classes, self.size)
        shape = (len(self.images), self.classes, min(height, rows), width)
        self.ring = torch.zeros(shape, device=self.device)
        self.seen = torch.zeros(shape[2:], device=self.device)

    def _enter(self, end: int) -> None:
        """Forget rows in whose place new ones come."""
        for there, _ in self._pieces(self._end, end):
            self.ring[:, :, there] = 0
            self.seen[there] = 0
        self._end = end

    def _add(self, scores: Tensor, row: Place, column: Place) -> None:
        """Take a window into the weighted mean, which stays bit for bit where scores are equal."""
        scores = scores[..., row.inner, column.inner]
        weights = self.weights[row.inner, column.inner]
        across = slice(column.first, column.last)
        for there, here in self._pieces(row.first, row.last):
            seen = self.seen[there, across].add_(weights[here])
            self.ring[:, :, there, across].lerp_(scores[..., here, :], weights[here] / seen)

    def _pieces(self, first: int, last: int) -> Iterator[tuple[slice, slice]]:
        """Slices of the ring for rows first..last, each with its share of them; two at a wrap."""
        room, count = self.ring.shape[2], last - first
        start = first % room
        before = min(count, room - start)
        yield slice(start, start + before), slice(0, before)
        if before < count:
            yield slice(0, count - before), slice(before, count)


def window_size(settings: Inference, canvas: Size) -> Size:
    """(height, width) of the windows; without any, of the canvas."""
    window = settings.window
    if window is None:
        return canvas
    return (window, window) if isinstance(window, int) else window


def count_windows(settings: Inference, canvas: Size, divisor: int) -> int:
    """How many windows there are on a canvas."""
    pairs = zip(canvas, window_size(settings, canvas), strict=True)
    return math.prod(len(window_starts(*pair, settings.overlap, divisor)) for pair in pairs)


def _grid(scores: Size, window: Size, canvas: Size, starts: tuple[list[int], list[int]]) -> Size:
    """Cells of a window: those of its scores where all windows begin at cells, else its pixels."""
    height, width = (
        cells if all(x * cells % side == 0 for x in (*places, whole)) else side
        for cells, side, whole, places in zip(scores, window, canvas, starts, strict=True)
    )
    return height, width


def _resized(scores: Tensor, size: Size) -> Tensor:
    if tuple(scores.shape[-2:]) == size:
        return scores
    return F.interpolate(scores, size, mode="bilinear", align_corners=False)
