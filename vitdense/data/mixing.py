"""One training sample from several: mosaic, MixUp, Copy-Paste.

All samples that come in lie on canvases of one size and are free of crowds.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vitdense.data.base import DataError
from vitdense.data.geometry import VISIBLE, select
from vitdense.ops.masks import masks_to_boxes
from vitdense.structures import Sample, Size, Target

CENTER = (0.3, 0.7)
"""Where the four images of a mosaic meet, in heights and widths of the canvas."""

BLEND = (0.45, 0.55)
"""Weight of the first image of two that are blended: both stay visible, and all boxes count."""

Quadrant = tuple[tuple[int, int], Size]
"""(top, left) of the corner on the canvas, and (height, width)."""


def draw_quadrants(canvas: Size) -> list[Quadrant]:
    """The four parts of a canvas around a random point, the upper ones first."""
    low, high = CENTER
    shares = low + (high - low) * torch.rand(2)
    y, x = (round(side * share) for side, share in zip(canvas, shares.tolist(), strict=True))
    rows, columns = ((0, y), (y, canvas[0] - y)), ((0, x), (x, canvas[1] - x))
    return [((top, left), (height, width)) for top, height in rows for left, width in columns]


def anchor(quadrant: Quadrant, content: Size) -> tuple[int, int]:
    """(top, left) of content in a quadrant, against the point where all four meet."""
    (top, left), (height, width) = quadrant
    return (top if top else height - content[0]), (left if left else width - content[1])


def join(tiles: list[Sample]) -> Sample:
    """A mosaic (Bochkovskiy et al. 2020, YOLOv4): images that cover different parts of a canvas.

    Returns:
        a sample with the id and path of the first.
    """
    image = torch.stack([tile.image for tile in tiles]).amax(0)
    target = concatenate([tile.target for tile in tiles])
    maps = [tile.target.semantic for tile in tiles if tile.target.semantic is not None]
    if len(maps) == len(tiles):
        target.semantic = torch.stack(maps).amin(0)  # IGNORE, which pads, is the highest label
    return replace(tiles[0], image=image, target=target)


def blend(first: Sample, second: Sample) -> Sample:
    """MixUp for detection (Zhang et al. 2019, Bag of Freebies): two images, all their objects.

    Raises:
        DataError: the samples have label maps, which cannot be blended.
    """
    if first.target.semantic is not None:
        raise DataError(
            f"{first.path}: has a label map, and no pixel of a blend has one label; "
            "leave out the option mixup"
        )
    low, high = BLEND
    weight = low + (high - low) * torch.rand(()).item()
    image = first.image.float().lerp_(second.image.float(), 1 - weight)
    if first.image.dtype == second.image.dtype == torch.uint8:
        image = image.round_().to(torch.uint8)
    return replace(first, image=image, target=concatenate([first.target, second.target]))


def paste(below: Sample, above: Sample) -> Sample:
    """Simple Copy-Paste (Ghiasi et al. 2021): a random half of the objects of `above`.

    What they hide is cut from the masks below; an object that shows less than a quarter of what
    it did is dropped, and boxes are drawn anew around what is left.

    Raises:
        DataError: the samples have no masks.
    """
    if below.target.masks is None or above.target.masks is None:
        raise DataError(
            f"{below.path}: has no masks, which say what copy_paste is to copy; "
            "set the option masks of the data set, or leave out copy_paste"
        )
    copied = select(above.target, torch.rand(len(above.target.masks)) < 0.5)
    assert copied.masks is not None
    cover = copied.masks.any(0)
    target = concatenate([_behind(below.target, below.target.masks, cover), copied])
    target.image_labels = below.target.image_labels
    if below.target.semantic is not None and above.target.semantic is not None:
        target.semantic = torch.where(cover, above.target.semantic, below.target.semantic)
    return replace(below, image=torch.where(cover, above.image, below.image), target=target)


def _behind(target: Target, masks: Tensor, cover: Tensor) -> Target:
    """The target without what `cover` hides."""
    left = masks & ~cover
    area, before = left.flatten(1).sum(1), masks.flatten(1).sum(1)
    hidden = area < before
    boxes = masks_to_boxes(left)
    if target.boxes is not None:
        boxes = torch.where(hidden[:, None], boxes, target.boxes)
    return select(replace(target, masks=left, boxes=boxes), (area > 0) & (area >= VISIBLE * before))


def concatenate(targets: list[Target]) -> Target:
    """The objects of all, without label maps, and the image labels of any."""
    return Target(
        labels=_cat([target.labels for target in targets]),
        boxes=_cat([target.boxes for target in targets]),
        masks=_cat([target.masks for target in targets]),
        image_labels=_union([target.image_labels for target in targets]),
    )


def _cat(values: list[Tensor | None]) -> Tensor | None:
    known = [value for value in values if value is not None]
    return torch.cat(known) if len(known) == len(values) else None


def _union(labels: list[Tensor | None]) -> Tensor | None:
    known = [value for value in labels if value is not None]
    return torch.stack(known).any(0) if len(known) == len(labels) else None
