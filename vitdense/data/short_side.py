"""The preparation of DETR and its successors: images keep their shape, and their size varies."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import ceil

import torch
from pydantic import PositiveFloat, PositiveInt

from vitdense.data.base import Policy
from vitdense.data.color import distort
from vitdense.data.crop import Window, window_around_objects
from vitdense.data.geometry import Movement, resize
from vitdense.registry import TRANSFORMS, Fraction
from vitdense.structures import Sample, Size


@TRANSFORMS.register("short_side")
class ShortSidePolicy(Policy):
    """The shorter side comes to `size`, the longer one to at most `longest`.

    In evaluation no image is padded beyond the model's divisor; in training those of a batch are,
    to the largest of them.
    """

    def __init__(
        self,
        *,
        size: PositiveInt = 800,  # shorter side, unless the longer one then is above `longest`
        longest: PositiveInt = 1333,  # most pixels along the longer side
        scale: tuple[PositiveFloat, PositiveFloat] = (0.6, 1.0),  # range of a factor in training
        iou_crop: Fraction = 0.5,  # chance to crop around objects, as SSD does
        flip: Fraction = 0.5,  # chance to mirror left and right
        photometric: Fraction = 0.0,  # chance of each change of brightness, contrast and color
    ) -> None:
        if longest < size:
            raise ValueError(f"longest: must be at least the shorter side {size}, got {longest}")
        if scale[0] > scale[1]:
            raise ValueError(f"scale: {list(scale)} must be [lowest, highest]")
        self.canvas = None
        self.size, self.longest, self.scale = size, longest, scale
        self.iou_crop, self.flip, self.photometric = iou_crop, flip, photometric

    def train(self, sample: Sample) -> Sample:
        boxes, image = sample.target.boxes, sample.size
        window: Window = ((0, 0), image)
        if boxes is not None and torch.rand(()) < self.iou_crop:
            window = window_around_objects(boxes, image)
        low, high = self.scale
        content = self._fit(window[1], low + (high - low) * torch.rand(()).item())
        mirror = bool(torch.rand(()) < self.flip)
        move = Movement(*window, content, canvas=content, mirror=mirror)
        return move(sample, partial(distort, chance=self.photometric))

    def largest(self, divisor: int) -> Size | None:
        side = ceil(self.longest * self.scale[1])  # of a wide image beside a tall one
        return side, side

    def evaluate(self, sample: Sample) -> Sample:
        return replace(sample, image=resize(sample.image, self._fit(sample.size)))

    def _fit(self, image: Size, factor: float = 1.0) -> Size:
        scale = factor * min(self.size / min(image), self.longest / max(image))
        return max(1, round(image[0] * scale)), max(1, round(image[1] * scale))
