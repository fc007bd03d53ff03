"""The nouns that every room shares; the only module that everyone may import.

One convention per quantity: boxes are absolute `xyxy` float pixels, classes are `0..N-1`, ignored
pixels are `IGNORE`, images are `uint8` until the model normalises them on its own device.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255
"""Label of a pixel that neither loss nor metric counts."""

Size = tuple[int, int]
"""(height, width) in pixels."""

Task = Literal["detection", "instance", "semantic", "panoptic"]


@dataclass(frozen=True, slots=True)
class Level:
    """What a feature map promises before it runs: its channels and its stride in image pixels.

    A stride may be fractional: a pyramid on a ViT with patch 14 has a level of stride 3.5.
    """

    channels: int
    stride: float


@dataclass(frozen=True, slots=True)
class Frame:
    """Where an image lies on its padded canvas, and how to get back to its original pixels.

    The image was resized from `original` to `content` and lies top-left on `canvas`.
    """

    canvas: Size
    content: Size
    original: Size

    def restore_map(self, logits: Tensor) -> Tensor:
        """Bring a map over the canvas back to original pixels: crop the padding, then resize.

        Args:
            logits: float [C, h, w] over the whole canvas, at any stride.

        Returns:
            float [C, H, W] with (H, W) = `original`; bilinear, corners not aligned.
        """
        maps = logits[None]
        if self.content != self.canvas:
            maps = _resize(maps, self.canvas)[..., : self.content[0], : self.content[1]]
        return _resize(maps, self.original)[0]

    def restore_boxes(self, boxes: Tensor) -> Tensor:
        """Bring canvas boxes back to original pixels, clipped to the image.

        Args:
            boxes: float [N, 4], xyxy in canvas pixels.

        Returns:
            float [N, 4], xyxy in original pixels.
        """
        height, width = self.original
        # by numbers: a tensor that is made of them on a GPU makes the host wait
        x = (boxes[..., ::2] * (width / self.content[1])).clamp(0, width)
        y = (boxes[..., 1::2] * (height / self.content[0])).clamp(0, height)
        return torch.stack((x, y), -1).flatten(-2)


def _resize(maps: Tensor, size: Size) -> Tensor:
    if tuple(maps.shape[-2:]) == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


class _Record:
    """Moving and pinning for the dataclasses below that hold tensors."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same record with every tensor on `device`."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same record in page-locked memory, for asynchronous copies."""
        return self._map(lambda t: t.pin_memory())

    def _map(self, function: Any) -> Self:
        changed = {f.name: _apply(getattr(self, f.name), function) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **changed)  # type: ignore[type-var]


def _apply(value: Any, function: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, _Record):
        return value._map(function)
    if isinstance(value, list):
        return [_apply(item, function) for item in value]
    return value


@dataclass(slots=True)
class Target(_Record):
    """The truth of one image; fields that a task does not need are None.

    In training all is in canvas pixels and free of crowds; in evaluation all is in original pixels.

    Attributes:
        labels: int64 [N], classes 0..C-1 of the objects (or of the panoptic segments).
        boxes: float32 [N, 4], xyxy in pixels.
        masks: bool [N, H, W].
        semantic: int64 or uint8 [H, W], 0..C-1 or IGNORE.
        crowd: bool [N], regions that evaluation ignores.
        area: float32 [N], pixels of the annotated region, for COCO's size ranges.
        image_labels: bool [K], which of the data set's image classes hold for the whole image.
        judged: bool [C], classes of which it is known what the image holds; None = all.
        partial: bool [C], classes of which not all objects are annotated; None = none.
    """

    labels: Tensor | None = None
    boxes: Tensor | None = None
    masks: Tensor | None = None
    semantic: Tensor | None = None
    crowd: Tensor | None = None
    area: Tensor | None = None
    image_labels: Tensor | None = None
    judged: Tensor | None = None
    partial: Tensor | None = None


@dataclass(slots=True)
class Sample(_Record):
    """One image with its truth, before batching.

    Attributes:
        image: uint8 [C, H, W], or float32 in 0..255 of a file deeper than 8 bits.
        target: the truth, in the pixels of `image` unless a policy resized the image alone.
        image_id: the data set's id of the image.
        original: size of the image file.
        path: the image file, for messages.
    """

    image: Tensor
    target: Target
    image_id: int | str
    original: Size
    path: Path

    @property
    def size(self) -> Size:
        """(height, width) of `image`, which a policy may have resized."""
        return self.image.shape[1], self.image.shape[2]


@dataclass(slots=True)
class Batch(_Record):
    """Samples on one zero-padded canvas.

    Attributes:
        images: uint8 [B, C, H, W], or float32 in 0..255 of files deeper than 8 bits.
        targets, frames, image_ids, paths: one each per image.
    """

    images: Tensor
    targets: list[Target]
    frames: list[Frame]
    image_ids: list[int | str]
    paths: list[Path]


@dataclass(slots=True)
class Prediction(_Record):
    """A model's answer for one image, in the original image's pixels; unused fields are None.

    Attributes:
        scores: float [N] in 0..1, descending.
        labels: int64 [N], classes 0..C-1.
        boxes: float [N, 4], xyxy.
        masks: bool [N, H, W].
        semantic: int64 [H, W], classes 0..C-1.
        confidence: float [H, W] in 0..1, the probability of the class in `semantic`.
        panoptic: int64 [H, W], 0 = void, k = the k-th entry of `labels` and `scores`, from 1.
        image_scores: float [K] in 0..1, how likely each image class holds for the whole image.
    """

    scores: Tensor | None = None
    labels: Tensor | None = None
    boxes: Tensor | None = None
    masks: Tensor | None = None
    semantic: Tensor | None = None
    confidence: Tensor | None = None
    panoptic: Tensor | None = None
    image_scores: Tensor | None = None
