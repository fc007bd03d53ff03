"""Pictures of answers and truths: boxes, masks and label maps over their image."""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitdense.structures import IGNORE, Prediction, Target

if TYPE_CHECKING:
    from PIL import ImageDraw

Color = tuple[int, int, int]
Pixels = NDArray[np.float32]

_MASK, _SEMANTIC = 0.45, 0.55
_MARGIN = 0.01
"""A class is named in the picture of a label map if it fills this part of it."""


def draw(
    image: Tensor,
    answer: Prediction | Target,
    classes: list[str],
    threshold: float = 0.3,
    scale: int = 1,
) -> Tensor:
    """Draw what a model answered, or the truth, over an image.

    Args:
        image: uint8 [C, H, W], the answer is in its pixels.
        classes: names of the labels.
        threshold: objects of a prediction with a lower score are left out.
        scale: enlarge the picture, to have room for text in small images.

    Returns:
        uint8 [3, H * scale, W * scale].
    """
    from PIL import Image, ImageDraw

    colors = palette(len(classes))
    pixels = _enlarge(_rgb(image), scale).permute(1, 2, 0).numpy().astype(np.float32)
    semantic = None if answer.semantic is None else _enlarge(answer.semantic.cpu(), scale).numpy()
    if semantic is not None:
        pixels = _lay_semantic(pixels, semantic, colors)
    objects = _Objects(answer, classes, threshold, scale)
    for mask, label in zip(objects.masks, objects.labels, strict=False):
        pixels = _lay_mask(pixels, mask, colors[label])
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    if semantic is not None:
        _name_regions(pen, semantic, classes, colors)
    _draw_boxes(pen, objects, colors)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def palette(count: int) -> list[Color]:
    """Colors that are easy to tell apart, the same for each label whatever the count."""
    return [_color(index) for index in range(count)]


def side_by_side(*images: Tensor, gap: int = 4) -> Tensor:
    """Images in one row, top aligned, on white.

    Args:
        images: uint8 [3, H, W] of any sizes.

    Returns:
        uint8 [3, the largest H, the sum of W and gaps].
    """
    height = max(image.shape[1] for image in images)
    width = sum(image.shape[2] for image in images) + gap * (len(images) - 1)
    row = torch.full((3, height, width), 255, dtype=torch.uint8)
    left = 0
    for image in images:
        row[:, : image.shape[1], left : left + image.shape[2]] = image
        left += image.shape[2] + gap
    return row


def grid(images: list[Tensor], columns: int, gap: int = 4) -> Tensor:
    """Images in rows of `columns`, on white.

    Args:
        images: uint8 [3, H, W] of any sizes.
    """
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    turned = [side_by_side(*row, gap=gap).transpose(1, 2) for row in rows]
    return side_by_side(*turned, gap=gap).transpose(1, 2).contiguous()


class _Objects:
    """The objects to draw, weakest first so that the strongest end on top."""

    def __init__(
        self, answer: Prediction | Target, classes: list[str], threshold: float, scale: int
    ) -> None:
        labels = answer.labels if answer.labels is not None else torch.zeros(0, dtype=torch.long)
        scores = answer.scores if isinstance(answer, Prediction) else None
        order = torch.arange(len(labels))
        if scores is not None:
            order = scores.cpu().argsort()
            order = order[scores.cpu()[order] >= threshold]
        self.labels: list[int] = labels.cpu()[order].tolist()
        self.names = [classes[label] for label in self.labels]
        if scores is not None:
            kept = scores.cpu()[order].tolist()
            self.names = [f"{n} {s:.0%}" for n, s in zip(self.names, kept, strict=True)]
        boxes = None if answer.boxes is None else answer.boxes.cpu()[order] * scale
        masks = self._masks(answer, order)
        self.masks: Any = [] if masks is None else _enlarge(masks, scale).numpy()
        if boxes is None and masks is not None:
            from vitdense.ops.masks import masks_to_boxes

            boxes = masks_to_boxes(masks) * scale
        self.boxes: list[list[float]] = [] if boxes is None else boxes.tolist()
        self.framed = answer.boxes is not None

    @staticmethod
    def _masks(answer: Prediction | Target, order: Tensor) -> Tensor | None:
        if isinstance(answer, Prediction) and answer.panoptic is not None:
            return answer.panoptic.cpu() == order[:, None, None] + 1
        return None if answer.masks is None else answer.masks.cpu()[order]


def _color(index: int) -> Color:
    """Hues a golden ratio apart, in three strengths."""
    saturation, value = ((0.85, 1.0), (0.55, 0.95), (0.95, 0.7))[index // 7 % 3]
    red, green, blue = colorsys.hsv_to_rgb((0.58 + index * 0.618034) % 1, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _rgb(image: Tensor) -> Tensor:
    image = image.cpu()
    return image.expand(3, -1, -1) if image.shape[0] == 1 else image[:3]


def _enlarge(maps: Tensor, scale: int) -> Tensor:
    if scale == 1:
        return maps
    return maps.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)


def _lay_semantic(pixels: Pixels, semantic: NDArray, colors: list[Color]) -> Pixels:
    table = np.zeros((IGNORE + 1, 3), dtype=np.float32)
    table[: len(colors)] = colors
    labelled = (semantic != IGNORE)[..., None] * np.float32(_SEMANTIC)
    return pixels * (1 - labelled) + table[semantic] * labelled


def _lay_mask(pixels: Pixels, mask: NDArray[np.bool_], color: Color) -> Pixels:
    """Tint the mask and draw its contour."""
    from scipy.ndimage import binary_erosion

    width = max(1, min(mask.shape) // 300)
    contour = mask & ~binary_erosion(mask, iterations=width)
    alpha = (mask * _MASK + contour * (1 - _MASK))[..., None].astype(np.float32)
    return pixels * (1 - alpha) + np.array(color, dtype=np.float32) * alpha


def _draw_boxes(pen: ImageDraw.ImageDraw, objects: _Objects, colors: list[Color]) -> None:
    width, height = pen.im.size
    line = max(1, round(min(width, height) / 200))
    if objects.framed:
        for box, label in zip(objects.boxes, objects.labels, strict=True):
            x1, y1, x2, y2 = (round(value) for value in box)
            far = (max(x1, min(x2, width) - 1), max(y1, min(y2, height) - 1))
            pen.rectangle(((x1, y1), far), outline=colors[label], width=line)
    for box, label, name in zip(objects.boxes, objects.labels, objects.names, strict=True):
        _write(pen, name, round(box[0]), round(box[1]), colors[label])


def _name_regions(
    pen: ImageDraw.ImageDraw, semantic: NDArray, classes: list[str], colors: list[Color]
) -> None:
    """Write each larger class's name where its region is widest."""
    from scipy.ndimage import distance_transform_edt

    for label in np.unique(semantic):
        region = semantic == label
        if label == IGNORE or region.mean() < _MARGIN:
            continue
        depth = distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
        y, x = np.unravel_index(depth.argmax(), depth.shape)
        _write(pen, classes[label], int(x), int(y), colors[label], centered=True)


def _write(
    pen: ImageDraw.ImageDraw, text: str, x: int, y: int, color: Color, centered: bool = False
) -> None:
    """Text on a plate of the color: above (x, y), or around it, and always inside the image."""
    from PIL import ImageFont

    width, height = pen.im.size
    size = max(11, round(min(width, height) / 36))
    font = ImageFont.load_default(size)
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    pad = max(1, size // 6)
    wide, high = int(right - left) + 2 * pad, int(bottom - top) + 2 * pad
    x, y = (x - wide // 2, y - high // 2) if centered else (x, y - high)
    x, y = max(0, min(x, width - wide)), max(0, min(y, height - high))
    bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    pen.rectangle(((x, y), (x + wide - 1, y + high - 1)), fill=color)
    ink = (0, 0, 0) if bright else (255, 255, 255)
    pen.text((x + pad - left, y + pad - top), text, font=font, fill=ink)
