"""Policies: how samples are prepared for training and for evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, Self

import torch
from pydantic import PositiveFloat, PositiveInt

from vitdense.data.base import DataError, Dataset, Policy
from vitdense.data.color import distort
from vitdense.data.crop import Window, is_varied, window_around_objects, window_to_canvas
from vitdense.data.geometry import Movement, resize
from vitdense.data.mixing import Quadrant, anchor, blend, draw_quadrants, join, paste
from vitdense.registry import TRANSFORMS, Fraction, Span
from vitdense.structures import Sample, Size

CANVASES = 20
"""Canvases of several scales differ by this part of the size: 32 pixels at 640."""


@TRANSFORMS.register("detection")
class DetectionPolicy(Policy):
    """For boxes and instance masks: every image comes out on a canvas of one size."""

    def __init__(
        self,
        *,
        size: PositiveInt | tuple[PositiveInt, PositiveInt] = 640,  # canvas: side, or height, width
        resize: Literal["stretch", "keep_ratio"] = "stretch",  # keep_ratio pads right or below
        flip: Fraction = 0.5,  # chance to mirror left and right
        photometric: Fraction = 0.5,  # chance of each change of brightness, contrast and color
        zoom_out: Fraction = 0.25,  # chance to lay the image, made smaller, on black
        shrink: PositiveFloat = 2.0,  # zoom_out makes images at most this many times smaller
        iou_crop: Fraction = 0.8,  # chance to crop around objects, as SSD does
        jitter: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0),  # range of a factor on the scale
        mosaic: Fraction = 0.0,  # chance to join parts of four images, instead of crop and zoom
        mosaic_scale: tuple[PositiveFloat, PositiveFloat] = (0.4, 0.8),  # factor on its images
        mixup: Fraction = 0.0,  # chance to blend with another image; not for panoptic truth
        copy_paste: Fraction = 0.0,  # chance to paste another's objects; needs masks of objects
        multi_scale: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0),  # factor on a batch's canvas
        close: Span = 0.0,  # last span of the run: of all that changes images only flip is left
    ) -> None:
        self.canvas = _size(size)
        self.keep_ratio = resize == "keep_ratio"
        self.flip = flip
        self.photometric = photometric
        self.zoom_out = zoom_out
        if shrink < 1:
            raise ValueError(f"shrink: must be at least 1, got {shrink}")
        self.shrink = shrink
        self.iou_crop = iou_crop
        self.jitter = _range("jitter", jitter)
        self.mosaic = mosaic
        self.mosaic_scale = _range("mosaic_scale", mosaic_scale)
        self.mixup = mixup
        self.copy_paste = copy_paste
        self.multi_scale = _range("multi_scale", multi_scale)
        self.close = close

    def train(self, sample: Sample) -> Sample:
        return self._move(sample)(sample, partial(distort, chance=self.photometric))

    def evaluate(self, sample: Sample) -> Sample:
        return replace(sample, image=resize(sample.image, self._fit(sample.size)))

    def compose(self, sample: Sample, draw: Callable[[], Sample]) -> Sample:
        if self.mosaic and _chance(self.mosaic):
            composed = self._join([sample, draw(), draw(), draw()])
        else:
            composed = self.train(sample)
        if self.copy_paste and _chance(self.copy_paste):
            composed = paste(composed, self.train(draw()))
        if self.mixup and _chance(self.mixup):
            composed = blend(composed, self.train(draw()))
        return composed

    def check(self, dataset: Dataset) -> None:
        named = [key for key in ("mixup", "copy_paste") if getattr(self, key)]
        if dataset.things is not None and named:
            raise DataError(
                f"{dataset.root}: has panoptic truth, in which each pixel is of one segment of "
                f"things or stuff; leave out the option {named[0]}, which mixes objects"
            )

    def for_batch(self, divisor: int, closing: bool) -> Self:
        policy = copy.copy(self)
        if closing:
            policy.photometric = policy.zoom_out = policy.iou_crop = 0.0
            policy.mosaic = policy.mixup = policy.copy_paste = 0.0
            policy.jitter = (1.0, 1.0)
        elif self.multi_scale != (1.0, 1.0):
            policy.canvas = self._draw_canvas(divisor)
        return policy

    def _fit(self, image: Size) -> Size:
        """The size on the canvas, before any augmentation."""
        assert self.canvas is not None
        if not self.keep_ratio:
            return self.canvas
        return _scaled(image, min(c / i for c, i in zip(self.canvas, image, strict=True)))

    def largest(self, divisor: int) -> Size | None:
        high = round(self.multi_scale[1] * CANVASES) / CANVASES
        return self.canvas if high <= 1 else self._canvas_at(high, divisor)

    def _draw_canvas(self, divisor: int) -> Size:
        """One of a few sizes: as RT-DETR's 480, 512, ... 800 around 640."""
        low, high = (round(factor * CANVASES) for factor in self.multi_scale)
        return self._canvas_at(int(torch.randint(low, high + 1, ())) / CANVASES, divisor)

    def _canvas_at(self, factor: float, divisor: int) -> Size:
        assert self.canvas is not None
        height, width = (max(1, round(c * factor / divisor)) * divisor for c in self.canvas)
        return height, width

    def _join(self, samples: list[Sample]) -> Sample:
        assert self.canvas is not None
        places = draw_quadrants(self.canvas)
        color = partial(distort, chance=self.photometric)
        pairs = zip(samples, places, strict=True)
        return join([self._tile(sample, place)(sample, color) for sample, place in pairs])

    def _tile(self, sample: Sample, place: Quadrant) -> Movement:
        assert self.canvas is not None
        image = sample.size
        content = _scaled(self._fit(image), _uniform(*self.mosaic_scale))
        window, content = window_to_canvas(((0, 0), image), content, place[1])
        at, mirror = anchor(place, content), _chance(self.flip)
        return Movement(*window, content, self.canvas, at, mirror)

    def _move(self, sample: Sample) -> Movement:
        assert self.canvas is not None
        image, boxes = sample.size, sample.target.boxes
        window: Window = ((0, 0), image)
        if boxes is not None and _chance(self.iou_crop):
            window = window_around_objects(boxes, image)
        scale, place_anywhere = _uniform(*self.jitter), _chance(self.zoom_out)
        if place_anywhere:
            scale /= _uniform(1, self.shrink)
        content = _scaled(self._fit(window[1]), scale)
        window, content = window_to_canvas(window, content, self.canvas)
        at = _corner(content, self.canvas) if place_anywhere else (0, 0)
        return Movement(*window, content, self.canvas, at, mirror=_chance(self.flip))


@TRANSFORMS.register("segmentation")
class SegmentationPolicy(Policy):
    """For label maps: random scale and crop in training, images at one scale in evaluation."""

    def __init__(
        self,
        *,
        size: PositiveInt = 512,  # shorter side of an image, before the random factor
        crop: PositiveInt | tuple[PositiveInt, PositiveInt] = 512,  # side, or height and width
        scale: tuple[PositiveFloat, PositiveFloat] = (0.5, 2.0),  # range of the random factor
        cat_max_ratio: Fraction = 0.75,  # draw again if one class fills more of the crop; 1: never
        flip: Fraction = 0.5,  # chance to mirror left and right
        photometric: Fraction = 0.5,  # chance of each change of brightness, contrast and color
        evaluation: Literal["short_side", "stretch", "keep"] = "short_side",  # stretch: to `crop`
    ) -> None:
        self.size = size
        self.crop = _size(crop)
        self.scale = _range("scale", scale)
        self.cat_max_ratio = cat_max_ratio
        self.flip = flip
        self.photometric = photometric
        self.evaluation = evaluation
        self.canvas = self.crop if evaluation == "stretch" else None

    def train(self, sample: Sample) -> Sample:
        return self._move(sample)(sample, partial(distort, chance=self.photometric))

    def largest(self, divisor: int) -> Size | None:
        return self.crop

    def evaluate(self, sample: Sample) -> Sample:
        if self.evaluation == "keep":
            return sample
        size = self.crop if self.evaluation == "stretch" else self._fit(sample.size)
        return replace(sample, image=resize(sample.image, size))

    def _fit(self, image: Size) -> Size:
        return _scaled(image, self.size / min(image))

    def _move(self, sample: Sample) -> Movement:
        image = sample.size
        scaled = _scaled(self._fit(image), _uniform(*self.scale))
        semantic = sample.target.semantic if self.cat_max_ratio < 1 else None
        for _ in range(10):
            window, content = window_to_canvas(((0, 0), image), scaled, self.crop)
            if semantic is None or is_varied(semantic, window, self.cat_max_ratio):
                break
        return Movement(*window, content, self.crop, mirror=_chance(self.flip))


@TRANSFORMS.register("none")
class NoPolicy(Policy):
    """Samples as they are; in training without crowds, and padded to the largest of a batch."""

    def __init__(self) -> None:
        self.canvas = None

    def train(self, sample: Sample) -> Sample:
        size = sample.size
        return Movement((0, 0), size, size, size)(sample)

    def evaluate(self, sample: Sample) -> Sample:
        return sample


def _size(side: int | tuple[int, int]) -> Size:
    return (side, side) if isinstance(side, int) else (side[0], side[1])


def _range(option: str, limits: tuple[float, float]) -> tuple[float, float]:
    low, high = limits
    if not 0 < low <= high:
        raise ValueError(f"{option}: {list(limits)} must be [lowest, highest], both above 0")
    return low, high


def _scaled(size: Size, scale: float) -> Size:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _chance(chance: float) -> bool:
    return bool(torch.rand(()) < chance)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def _corner(content: Size, canvas: Size) -> tuple[int, int]:
    """A random place for the content on its canvas."""
    rows, columns = (c - i for c, i in zip(canvas, content, strict=True))
    return int(torch.randint(rows + 1, ())), int(torch.randint(columns + 1, ()))
