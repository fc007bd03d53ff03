"""Pictures of answers and truths: boxes, masks and label maps over their image."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitdense.ops.plates import Color, Plates
from vitdense.structures import IGNORE, Prediction, Target

if TYPE_CHECKING:
    from PIL import ImageDraw

Pixels = NDArray[np.float32]

_MASK, _SEMANTIC = 0.45, 0.55
"""Opacity of masks and of label maps."""

_PIXELS = 1 << 18
"""How many pixels of a label map are tinted at once."""

_SIDE = 1024
"""Regions longer than this are searched for their widest place in steps of several pixels."""

_MARGIN = 0.01
"""A class of a label map is named if it covers at least this part of the picture."""


def draw(
    image: Tensor,
    answer: Prediction | Target,
    classes: list[str],
    threshold: float = 0.3,
    scale: int = 1,
    labels: Sequence[str] = (),
) -> Tensor:
    """Draw what a model answered, or the truth, over an image.

    Args:
        image: uint8, or float in 0..255, [C, H, W]; the first three channels are shown, or the
            first alone if there are only two.
        answer: in the pixels of the image.
        classes: names of the classes.
        threshold: objects of a prediction with a lower score are left out.
        scale: enlarge the picture, to have room for text in small images.
        labels: names of the image classes; the true ones, or the likeliest, stand in a corner.

    Returns:
        uint8 [3, H * scale, W * scale].
    """
    from PIL import Image, ImageDraw

    colors = palette(len(classes))
    pixels = _enlarge(_rgb(image), scale).permute(1, 2, 0).numpy().astype(np.float32)
    semantic = None if answer.semantic is None else _enlarge(answer.semantic.cpu(), scale).numpy()
    if semantic is not None:
        _lay_semantic(pixels, semantic, colors)
    objects = _Objects(answer, classes, threshold, scale)
    for index, color in enumerate(objects.colors):
        if objects.masked:
            _lay_mask(pixels, objects.mask(index), color)
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    plates = Plates(pen)
    if title := _title(answer, labels):
        plates.add(title, 0, 0, (255, 255, 255))
    if semantic is not None:
        _name_regions(semantic, classes, colors, plates)
    if objects.masked:
        _name_masks(objects, plates)
    else:
        _draw_boxes(pen, objects, plates)
    plates.write()
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def as_segments(target: Target) -> Prediction:
    """The truth of a panoptic data set as an answer, so that both are drawn alike."""
    assert target.masks is not None and target.labels is not None
    numbers = torch.arange(1, len(target.masks) + 1, device=target.masks.device)
    panoptic = (target.masks * numbers[:, None, None]).sum(0)
    return Prediction(labels=target.labels, panoptic=panoptic)


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


def stacked(*images: Tensor, gap: int = 4) -> Tensor:
    """Images in one column, left aligned, on white; otherwise as `side_by_side`."""
    row = side_by_side(*(image.transpose(1, 2) for image in images), gap=gap)
    return row.transpose(1, 2).contiguous()


def _title(answer: Prediction | Target, labels: Sequence[str]) -> str:
    if isinstance(answer, Prediction):
        if answer.image_scores is None or not labels:
            return ""
        score, best = answer.image_scores.max(0)
        return f"{labels[int(best)]} {float(score):.0%}"
    known = [] if answer.image_labels is None else answer.image_labels.tolist()
    return ", ".join(name for name, holds in zip(labels, known, strict=False) if holds)


class _Objects:
    """The objects to draw, the strongest (or the first) last, so that they end on top.

    Attributes:
        masked: whether they have masks; objects with masks are drawn without boxes.
        named: whether masks too small to hold their name get one too; panoptic segments do not.
    """

    def __init__(
        self, answer: Prediction | Target, classes: list[str], threshold: float, scale: int
    ) -> None:
        labels = answer.labels if answer.labels is not None else torch.zeros(0, dtype=torch.long)
        scores = answer.scores if isinstance(answer, Prediction) else None
        order = torch.arange(len(labels)).flip(0)
        if scores is not None:
            order = scores.cpu().argsort()
            order = order[scores.cpu()[order] >= threshold]
        self.scale, self.order = scale, order.tolist()
        self.panoptic = answer.panoptic if isinstance(answer, Prediction) else None
        self.masks = answer.masks
        self.masked = self.panoptic is not None or self.masks is not None
        self.named = self.panoptic is None
        self.labels: list[int] = labels.cpu()[order].tolist()
        self.names = [classes[label] for label in self.labels]
        if scores is not None and self.named:
            kept = scores.cpu()[order].tolist()
            self.names = [f"{n} {s:.0%}" for n, s in zip(self.names, kept, strict=True)]
        boxes = None if answer.boxes is None else answer.boxes.cpu()[order] * scale
        self.boxes: list[list[float]] = [] if boxes is None else boxes.tolist()
        self.colors = self._colors(palette(len(classes)))

    def _colors(self, colors: list[Color]) -> list[Color]:
        """Colors of the classes; objects of a class with masks get shades of it in turn."""
        if not self.masked:
            return [colors[label] for label in self.labels]
        seen: dict[int, int] = {}
        shades = []
        for label in reversed(self.labels):
            seen[label] = seen.get(label, -1) + 1
            shades.append(_shade(colors[label], seen[label]))
        return shades[::-1]

    def mask(self, index: int) -> NDArray[np.bool_]:
        """bool [H * scale, W * scale]; one at a time, because all together would be large."""
        place = self.order[index]
        if self.panoptic is not None:
            return _enlarge(self.panoptic.cpu() == place + 1, self.scale).numpy()
        assert self.masks is not None
        return _enlarge(self.masks[place].cpu(), self.scale).numpy()


def _color(index: int) -> Color:
    """Hues a golden ratio apart, in three strengths."""
    saturation, value = ((0.85, 1.0), (0.55, 0.95), (0.95, 0.7))[index // 7 % 3]
    red, green, blue = colorsys.hsv_to_rgb((0.58 + index * 0.618034) % 1, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _shade(color: Color, rank: int) -> Color:
    """The color itself for the first object of a class, then darker and lighter ones."""
    amount = (0.0, -0.35, 0.35, -0.18, 0.5)[rank % 5]
    red, green, blue = (
        round(part + amount * (255 - part if amount > 0 else part)) for part in color
    )
    return red, green, blue


def _rgb(image: Tensor) -> Tensor:
    image = image.cpu()
    return image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)


def _enlarge(maps: Tensor, scale: int) -> Tensor:
    if scale == 1:
        return maps
    return maps.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)


def _lay_semantic(pixels: Pixels, semantic: NDArray, colors: list[Color]) -> None:
    """Tint the labelled pixels in place, some rows at a time, which is faster for large images."""
    table = np.zeros((IGNORE + 1, 3), dtype=np.float32)
    table[: len(colors)] = colors
    step = max(1, _PIXELS // max(1, semantic.shape[1]))
    for start in range(0, len(pixels), step):
        some, labels = pixels[start : start + step], semantic[start : start + step]
        labelled = (labels != IGNORE)[..., None] * np.float32(_SEMANTIC)
        some += (table[labels] - some) * labelled


def _lay_mask(pixels: Pixels, mask: NDArray[np.bool_], color: Color) -> None:
    """Tint the mask and draw its contour, in place."""
    from scipy.ndimage import binary_erosion, find_objects

    width = max(1, min(mask.shape) // 300)
    for place in find_objects(mask.astype(np.uint8)):
        part = mask[place]
        contour = part & ~binary_erosion(part, iterations=width)
        alpha = (part * _MASK + contour * (1 - _MASK))[..., None].astype(np.float32)
        pixels[place] += (np.array(color, dtype=np.float32) - pixels[place]) * alpha


def _draw_boxes(pen: ImageDraw.ImageDraw, objects: _Objects, plates: Plates) -> None:
    width, height = pen.im.size
    line = max(1, round(min(width, height) / 200))
    for box, color in zip(objects.boxes, objects.colors, strict=False):
        x1, y1, x2, y2 = (round(value) for value in box)
        far = (max(x1, min(x2, width) - 1), max(y1, min(y2, height) - 1))
        pen.rectangle(((x1, y1), far), outline=color, width=line)
    named = zip(objects.boxes, objects.colors, objects.names, strict=False)
    for box, color, name in reversed(list(named)):
        plates.add(name, round(box[0]), round(box[1]), color)


def _name_masks(objects: _Objects, plates: Plates) -> None:
    """Write each name where its mask is widest, or above the mask if it would hide it."""
    named = list(enumerate(zip(objects.names, objects.colors, strict=True)))
    for index, (name, color) in reversed(named):
        mask = objects.mask(index)
        x, y, depth = _deepest(mask)
        if depth >= plates.size:
            plates.add(name, x, y, color, centered=True)
        elif depth and objects.named:
            rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
            plates.add(name, int(columns[0]), int(rows[0]), color)


def _name_regions(
    semantic: NDArray, classes: list[str], colors: list[Color], plates: Plates
) -> None:
    """Write each larger class's name where its region is widest."""
    pixels = np.bincount(semantic.ravel(), minlength=IGNORE)[:IGNORE]
    for label in np.flatnonzero(pixels >= max(1, _MARGIN * semantic.size)):
        x, y, _ = _deepest(semantic == label)
        plates.add(classes[label], x, y, colors[label], centered=True)


def _deepest(region: NDArray[np.bool_]) -> tuple[int, int, float]:
    """x and y of the pixel that is farthest from a region's border, and how far it is.

    Zeros if the region is empty. Of a large region only every few rows and columns are looked at.
    """
    from scipy.ndimage import distance_transform_edt, find_objects

    places = find_objects(region.view(np.uint8))
    if not places:
        return 0, 0, 0.0
    rows, columns = places[0]
    part = region[rows, columns]
    step = max(1, max(part.shape) // _SIDE)
    if not part[::step, ::step].any():  # it is thin
        step = 1
    depth = distance_transform_edt(np.pad(part[::step, ::step], 1))[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return int(x) * step + columns.start, int(y) * step + rows.start, step * float(depth[y, x])
