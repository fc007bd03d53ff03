"""Which maps a timm model gives and which sizes it takes, found by running it on the meta device.

Families differ in both. Asking the model itself needs no table of families, and serves new ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from vitdense.structures import Level, Size


@dataclass(frozen=True)
class Canvas:
    """The input sizes that a model takes.

    Attributes:
        model: its name, for messages.
        step: (height, width); sizes are multiples of it, or it alone if `fixed`.
        fixed: whether there is only one size; smaller images are padded to it.
    """

    model: str
    step: Size
    fixed: bool = False

    def fit(self, size: Size) -> Size:
        """The smallest size that the model takes and that holds an image of `size`.

        Raises:
            ValueError: the model's only size is smaller.
        """
        if not self.fixed:
            return round_up(size, self.step)
        if size[0] > self.step[0] or size[1] > self.step[1]:
            raise ValueError(
                f"img_size: {self.model} has a fixed input size of {_text(self.step)}, the canvas "
                f"is {_text(size)}; set model.backbone.img_size to the canvas size"
            )
        return self.step


@dataclass(frozen=True)
class Survey:
    """What is known of a model before it is built: its levels, by depth, and its input sizes."""

    levels: list[Level]
    canvas: Canvas

    @property
    def is_plain(self) -> bool:
        """Whether all maps have one stride, as a plain ViT's."""
        return len({level.stride for level in self.levels}) == 1


def survey(model: Any, name: str, size: Size, in_chans: int) -> Survey:
    """Try a meta-device model at several sizes.

    Args:
        model: timm's, in evaluation mode.
        size: the (height, width) it was made for.

    Raises:
        ValueError: it has no maps on a regular grid at any size; the message says why.
    """
    step = math.lcm(*stated_strides(model))
    square = (step, step)
    first = round_up(size, square)
    try:  # a rectangle of another size than the model was made for
        levels = _levels(model, (first[0] + step, first[1] + 3 * step), in_chans)
        return Survey(levels, Canvas(name, square))
    except ValueError:
        levels = _levels(model, size, in_chans)
    try:  # models of fixed windows take whole numbers of them
        if _levels(model, (size[0], 2 * size[1]), in_chans) == levels:
            return Survey(levels, Canvas(name, size))
    except ValueError:
        pass
    return Survey(levels, Canvas(name, size, fixed=True))


def stated_strides(model: Any) -> list[int]:
    """The stride of every map, as timm states it, which is wrong for some families."""
    features = model.feature_info
    entries = features if isinstance(features, list) else features.info
    return [entry["reduction"] for entry in entries]


def round_up(size: Size, step: Size) -> Size:
    """The next multiple of `step` in both axes."""
    return size[0] + -size[0] % step[0], size[1] + -size[1] % step[1]


def _levels(model: Any, size: Size, in_chans: int) -> list[Level]:
    """Levels of all maps at one input size."""
    stated = stated_strides(model)
    images = torch.empty(1, in_chans, *size, device="meta")
    try:
        with torch.no_grad():
            maps = model.forward_intermediates(
                images, indices=list(range(len(stated))), intermediates_only=True
            )
    except Exception as error:  # timm's families raise whatever their layers raise
        reason = first_line(error)[:120]
        raise ValueError(f"it does not take {_text(size)} pixels ({reason})") from error
    if len(maps) != len(stated):
        raise ValueError(f"it gives {len(maps)} maps where it states {len(stated)}")
    return [_level(m.shape, size, stride) for m, stride in zip(maps, stated, strict=True)]


def _level(shape: torch.Size, size: Size, stated: int) -> Level:
    grid = (shape[-2], shape[-1])
    for stride in (stated, max(1, size[0] // max(1, grid[0]))):
        if grid == tuple(math.ceil(side / stride) for side in size):
            return Level(shape[1], stride)
    raise ValueError(f"a map of {_text(size)} pixels is {_text(grid)}, on no regular grid")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
