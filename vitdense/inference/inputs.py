"""Images in the forms that users have them, as samples without truth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from vitdense.data.deep import Limits, to_bytes
from vitdense.data.images import read_image
from vitdense.structures import Sample, Size, Target

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

    Image: TypeAlias = str | Path | PilImage | np.ndarray | Tensor

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def to_sample(
    image: Image,
    channels: int,
    index: int = 0,
    limits: Limits | None = None,
    size: Size | None = None,
) -> Sample:
    """One image as a sample whose id is `index`.

    Args:
        image: a file; a PIL image; an array [H, W] or [H, W, C]; a tensor [C, H, W]. Arrays and
            tensors are uint8, or uint16, or with `limits` any type.
        channels: what the model takes; grey images are repeated to it.
        limits: the values of deeper images than 8 bits that become 0 and 255.
        size: (height, width) of a file as its truth has it; see `data.images.read_image`.

    Raises:
        DataError: the file is missing or broken, or of another size.
        ValueError: an array or a tensor of another type or shape.
    """
    path = Path(image) if isinstance(image, str | Path) else Path(f"image {index}")
    pixels = to_tensor(image, channels, limits, size)
    return Sample(pixels, Target(), index, (pixels.shape[1], pixels.shape[2]), path)


def to_tensor(
    image: Image, channels: int, limits: Limits | None = None, size: Size | None = None
) -> Tensor:
    """uint8, or float32 in 0..255, [channels, H, W]; see `to_sample`."""
    if isinstance(image, str | Path):
        return read_image(Path(image), channels, size, limits)
    if not isinstance(image, np.ndarray | Tensor):
        image = _pil_pixels(image, channels)
    if isinstance(image, np.ndarray):
        array = image if image.ndim == 3 else image[..., None]
        image = torch.from_numpy(np.ascontiguousarray(array)).movedim(-1, 0)
    return _checked(image, channels, limits)


def _pil_pixels(image: PilImage, channels: int) -> np.ndarray:
    if not hasattr(image, "getbands"):
        raise ValueError(
            f"image: a {type(image).__name__} is none; give a path, a PIL image, an array "
            "uint8 [H, W, C], a tensor uint8 [C, H, W], or a list of them"
        )
    if channels in MODES and image.mode not in {"I", "I;16", "F"}:
        image = image.convert(MODES[channels])
    return np.array(image)


def _checked(image: Tensor, channels: int, limits: Limits | None) -> Tensor:
    deep = image.dtype == torch.uint16 or (limits is not None and image.dtype != torch.bool)
    if image.ndim != 3 or not (image.dtype == torch.uint8 or deep):
        raise ValueError(
            "image: must be uint8 in 0..255 or uint16, with three dimensions (other types take "
            f"the option `range` of the data set), not {image.dtype} {tuple(image.shape)}; "
            "arrays are [H, W, C], tensors [C, H, W]"
        )
    if image.shape[0] == 1:
        image = image.expand(channels, -1, -1)
    if image.shape[0] != channels or 0 in image.shape:
        raise ValueError(
            f"image: the model takes {channels} channels, this has the shape "
            f"{tuple(image.shape)} (channels, height, width); arrays are [H, W, C], "
            "tensors [C, H, W]"
        )
    if image.dtype == torch.uint8:
        return image.contiguous()
    return torch.from_numpy(to_bytes(Path("image"), image.cpu().numpy(), limits))
