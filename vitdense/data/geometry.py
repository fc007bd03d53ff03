"""One movement of an image and its truth: cut a window out, resize it, lay it on a canvas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vitdense.ops.masks import masks_to_boxes, number_masks, split_masks
from vitdense.structures import IGNORE, Sample, Size, Target

VISIBLE = 0.25
"""An object without a mask stays in the truth while this part of its box is in the window."""


@dataclass(frozen=True, slots=True)
class Movement:
    """Crop, mirror, resize and padding in one: every augmentation of place and size.

    Cropping before resizing, and resizing once, is what makes it fast.

    Attributes:
        corner: (top, left) of the window in the image.
        window: size of what is cut out.
        content: the size that the window is brought to.
        canvas: the size that comes out; what the content leaves free is padding.
        at: (top, left) of the content on the canvas.
        mirror: left becomes right.
    """

    corner: tuple[int, int]
    window: Size
    content: Size
    canvas: Size
    at: tuple[int, int] = (0, 0)
    mirror: bool = False

    def __call__(self, sample: Sample, color: Callable[[Tensor], Tensor] | None = None) -> Sample:
        """The moved sample, without crowds, objects out of sight, and areas.

        Args:
            color: changes the colors of the content, at its new size and before padding.
        """
        cropped = self.window != tuple(sample.image.shape[1:])
        content = resize(self._cut(sample.image), self.content)
        image = self._move(color(content) if color else content, fill=0)
        return replace(sample, image=image, target=self._target(sample.target, cropped))

    def _cut(self, maps: Tensor) -> Tensor:
        (top, left), (height, width) = self.corner, self.window
        return maps[:, top : top + height, left : left + width]

    def _move(self, maps: Tensor, fill: int) -> Tensor:
        """Mirror maps [N, h, w] of the content's size and lay them on the canvas."""
        maps = maps.flip(2) if self.mirror else maps
        if self.content == self.canvas:
            return maps
        (top, left), (height, width) = self.at, self.content
        canvas = maps.new_full((maps.shape[0], *self.canvas), fill)
        canvas[:, top : top + height, left : left + width] = maps
        return canvas

    def _target(self, target: Target, cropped: bool) -> Target:
        target = self._without_unseen(target)
        moved = Target(target.labels, image_labels=target.image_labels)
        if target.boxes is not None:
            moved.boxes = self._boxes(target.boxes)
        if target.semantic is not None:
            labels = _resize_labels(self._cut(target.semantic[None]), self.content)
            moved.semantic = self._move(labels, fill=IGNORE)[0]
        if target.masks is not None:
            moved.masks = self._masks(self._cut(target.masks))
            moved = _hug(moved, moved.masks, keep=not cropped)
        return moved

    def _masks(self, masks: Tensor) -> Tensor:
        """Moved masks of the window; those that do not overlap go as one map of their numbers."""
        pixels, count = masks.view(torch.uint8), len(masks)
        if 1 < count < 256 and pixels.sum(0, dtype=torch.uint8).amax() <= 1:
            numbers = number_masks(masks)[None]
            moved = self._move(_resize_labels(numbers, self.content), fill=0)
            return split_masks(moved[0], torch.arange(1, count + 1))
        return self._move(_resize_labels(pixels, self.content), fill=0).view(torch.bool)

    def _without_unseen(self, target: Target) -> Target:
        keep = None if target.crowd is None else ~target.crowd
        seen = None
        if target.masks is not None:
            # Any part counts: stuff is large, and most of it is outside of most windows.
            seen = self._cut(target.masks).view(torch.uint8).amax((1, 2)) > 0
        elif target.boxes is not None:
            inside = self._inside(target.boxes)
            sides = inside[:, 2:] - inside[:, :2]
            whole = target.boxes[:, 2:] - target.boxes[:, :2]
            seen = (sides.prod(1) >= VISIBLE * whole.prod(1)) & self._wide_enough(sides)
        if seen is not None:
            keep = seen if keep is None else keep & seen
        return target if keep is None or keep.all() else select(target, keep)

    def _wide_enough(self, sides: Tensor) -> Tensor:
        """At least one pixel wide and high after resizing."""
        return (sides * self._scale(sides) >= 1).all(1)

    def _scale(self, like: Tensor) -> Tensor:
        (height, width), (new_height, new_width) = self.window, self.content
        return like.new_tensor([new_width / width, new_height / height])

    def _inside(self, boxes: Tensor) -> Tensor:
        """xyxy relative to the window's corner, cut at its edges."""
        (top, left), (height, width) = self.corner, self.window
        low, high = boxes.new_zeros(4), boxes.new_tensor([width, height, width, height])
        return (boxes - boxes.new_tensor([left, top, left, top])).clamp(low, high)

    def _boxes(self, boxes: Tensor) -> Tensor:
        boxes = self._inside(boxes) * self._scale(boxes).repeat(2)
        if self.mirror:
            x1, y1, x2, y2 = boxes.unbind(1)
            boxes = torch.stack([self.content[1] - x2, y1, self.content[1] - x1, y2], 1)
        top, left = self.at
        return boxes + boxes.new_tensor([left, top, left, top])


def select(target: Target, keep: Tensor) -> Target:
    """The target with some of its objects; what belongs to pixels or to the image stays."""
    values = {f.name: getattr(target, f.name) for f in fields(target)}
    others = ("semantic", "image_labels", "judged", "partial")
    per_object = {name: value for name, value in values.items() if name not in others}
    return replace(target, **{k: v[keep] for k, v in per_object.items() if v is not None})


def resize(image: Tensor, size: Size) -> Tensor:
    """Bilinear with antialiasing, as Pillow does it: the one way that images are resized.

    Args:
        image: uint8 or float32 [C, H, W].
    """
    from torchvision.transforms.v2 import functional

    if tuple(image.shape[1:]) == size:
        return image
    return functional.resize(image, list(size), antialias=True)


def _resize_labels(labels: Tensor, size: Size) -> Tensor:
    """Nearest by pixel centres, which lie where `resize` puts them; uint8 or int64 [N, H, W]."""
    if tuple(labels.shape[1:]) == size:
        return labels
    if not labels.shape[0]:
        return labels.new_zeros((0, *size))
    maps = labels if labels.dtype == torch.uint8 else labels.double()
    return F.interpolate(maps[None], size, mode="nearest-exact")[0].to(labels.dtype)


def _hug(target: Target, masks: Tensor, keep: bool) -> Target:
    """The target with boxes from its masks, and without objects that no pixel is left of.

    Args:
        keep: keep the boxes that there are; after a crop it may have cut off what they were
            drawn around.
    """
    boxes = masks_to_boxes(masks)
    seen = boxes[:, 2] > boxes[:, 0]
    if target.boxes is None or not keep:
        target = replace(target, boxes=boxes)
    return target if seen.all() else select(target, seen)
