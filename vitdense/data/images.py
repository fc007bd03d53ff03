"""Image files: found inside their folder, decoded to uint8 tensors, each fault one message."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vitdense.data.base import DataError
from vitdense.structures import Size

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
"""File names that count as images where a folder is listed."""

_ORIENTATION = 0x0112  # the EXIF tag
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def read_image(path: Path, channels: int = 3, size: Size | None = None) -> Tensor:
    """Decode an image file.

    Grey, palette, CMYK and 16-bit images are converted. A camera's EXIF rotation is applied only
    where `size` tells that the truth was drawn on the rotated image: COCO's tools ignore it.

    Args:
        channels: 1, 3 and 4 are grey, RGB and RGBA; any other number must be the file's own.
        size: (height, width) that the truth was made for; None takes the file as it is.

    Returns:
        uint8 [channels, H, W].

    Raises:
        DataError: the file is missing, broken, too large, or of another size.
    """
    with _opened(path) as image:
        if size is not None:
            image = _fit(path, image, size)
        pixels = np.array(_convert(path, image, channels))
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def read_labels(path: Path) -> np.ndarray:
    """Decode a label map: one whole number per pixel; a palette's colors are left aside.

    Returns:
        uint8, uint16 or int32 [H, W].

    Raises:
        DataError: the file is missing, broken, too large, or holds colors.
    """
    with _opened(path) as image:
        if image.mode not in {"1", "L", "P", "I", "I;16"}:
            raise DataError(
                f"{path}: holds colors ({image.mode}), not labels; "
                "save one class number per pixel (8 or 16 bit, one channel)"
            )
        labels = np.array(image)
    return labels.astype(np.uint8) if labels.dtype == bool else labels


def image_size(path: Path) -> Size:
    """(height, width) from the file's header, without decoding."""
    with _opened(path) as image:
        return image.height, image.width


def inside(folder: Path, name: str, listed_in: Path | None = None) -> Path:
    """`folder/name`, made sure to lie in the folder.

    The folder itself may be a link to another disk; a name or a link that leads out of it is
    refused, so that a downloaded data set cannot read other files.

    Raises:
        DataError: the name leads out of the folder.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        where = f"{listed_in}: " if listed_in else ""
        raise DataError(
            f"{where}the image '{name}' leads out of {folder}; "
            "file names must be relative and stay inside it, links too"
        )
    return path


@contextmanager
def _opened(path: Path) -> Iterator[Image]:
    """An image whose faults, when opened or decoded, become DataErrors."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; add it, or take it out of the list") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise DataError(
            f"{path}: more than {limit} million pixels, which would fill the memory; "
            "cut it into tiles"
        ) from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: not an image that Pillow can read; replace it") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: cannot be decoded ({error}); replace the file") from None


def _fit(path: Path, image: Image, size: Size) -> Image:
    from PIL import ImageOps

    if (image.height, image.width) == size:
        return image
    turned = image.getexif().get(_ORIENTATION, 1) >= 5
    if turned and (image.width, image.height) == size:
        return ImageOps.exif_transpose(image)
    raise DataError(
        f"{path}: is {image.width} x {image.height} pixels, but its annotation was made for "
        f"{size[1]} x {size[0]}; annotations must be in the pixels of the file"
    )


def _convert(path: Path, image: Image, channels: int) -> Image | np.ndarray:
    from PIL import Image

    if image.mode in {"I", "I;16", "I;16B", "I;16L", "I;16N"}:
        image = Image.fromarray(_eight_bit(np.array(image)))
    if image.mode == "F":
        raise DataError(f"{path}: holds floating-point values; save it with 8 bits per channel")
    mode = _MODES.get(channels)
    if mode is None:
        if len(image.getbands()) != channels:
            raise DataError(
                f"{path}: has {len(image.getbands())} channels, the model takes {channels}"
            )
        return image
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def _eight_bit(pixels: np.ndarray) -> np.ndarray:
    """The upper byte of 16-bit values; Pillow's own conversion cuts them off at 255."""
    return np.clip(pixels >> 8 if pixels.max(initial=0) > 255 else pixels, 0, 255).astype(np.uint8)


def list_images(folder: Path) -> list[str]:
    """Names of the image files in a folder, sorted; empty if there is no such folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if Path(e.name).suffix.lower() in SUFFIXES)
