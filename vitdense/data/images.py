"""Image files: found inside their folder, decoded to tensors, each fault one message."""

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
from vitdense.data.deep import (
    TIFF,
    Limits,
    array_size,
    read_array,
    read_label_array,
    take_channels,
    to_bytes,
)
from vitdense.structures import Size

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".npy"}
)
"""File names that count as images where a folder is listed."""

_ORIENTATION = 0x0112  # the EXIF tag
_EXTRA_SAMPLES = 338  # the TIFF tag
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_LABELS = frozenset({"1", "L", "P", "I", "I;16", "I;16B"})


def read_image(
    path: Path, channels: int = 3, size: Size | None = None, limits: Limits | None = None
) -> Tensor:
    """Decode an image file.

    Grey, palette and CMYK images are converted. A camera's EXIF rotation is applied only where
    `size` tells that the truth was drawn on the rotated image: COCO's tools ignore it. Deeper
    images than 8 bits keep their precision.

    Args:
        channels: 1, 3 and 4 are grey, RGB and RGBA; any other number must be the file's own.
        size: (height, width) that the truth was made for; None takes the file as it is.
        limits: the values of deeper images that become 0 and 255; None takes those of 16 bits.

    Returns:
        uint8 [channels, H, W], or float32 in 0..255 for files with more than 8 bits a channel.

    Raises:
        DataError: the file is missing, broken, too large, or of another size.
    """
    pixels = read_array(path) if _is_array(path, channels) else _decode(path, channels, size)
    if size is not None and pixels.shape[:2] != size:
        raise _misfit(path, pixels.shape[1], pixels.shape[0], size)
    pixels = take_channels(path, to_bytes(path, pixels, limits), channels)
    return torch.from_numpy(pixels.transpose(2, 0, 1))


def read_labels(path: Path) -> np.ndarray:
    """Decode a label map: one whole number per pixel; a palette's colors are left aside.

    Returns:
        whole numbers [H, W].

    Raises:
        DataError: the file is missing, broken, too large, or holds colors.
    """
    if path.suffix.lower() == ".npy":
        labels = read_label_array(path)
        return labels.astype(np.uint8) if labels.dtype == bool else labels
    with _opened(path) as image:
        if image.mode not in _LABELS:
            kind = "fractions" if image.mode == "F" else "colors"
            raise DataError(
                f"{path}: holds {kind} ({image.mode}), not labels; "
                "save one class number per pixel (8 or 16 bit, one channel)"
            )
        labels = np.array(image)
    return labels.astype(np.uint8) if labels.dtype == bool else labels


def is_colored(path: Path) -> bool:
    """Whether a file holds colors, not one number per pixel, from its header."""
    if path.suffix.lower() == ".npy":
        return False
    with _opened(path) as image:
        return image.mode not in {*_LABELS, "F"}


def image_size(path: Path) -> Size:
    """(height, width) from the file's header, without decoding."""
    if path.suffix.lower() == ".npy" or not _is_plain(path):
        return array_size(path)
    with _opened(path) as image:
        return image.height, image.width


def is_turned(path: Path) -> bool:
    """Whether a camera noted that the photo is to be seen otherwise than it is stored."""
    if path.suffix.lower() not in {".jpg", ".jpeg"}:
        return False
    with _opened(path) as image:  # Pillow decodes a whole PNG for its notes
        return image.format in {"JPEG", "MPO"} and image.getexif().get(_ORIENTATION, 1) != 1


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
    raise _misfit(path, image.width, image.height, size)


def _misfit(path: Path, width: int, height: int, size: Size) -> DataError:
    return DataError(
        f"{path}: is {width} x {height} pixels, but its annotation was made for "
        f"{size[1]} x {size[0]}; annotations must be in the pixels of the file"
    )


def _is_array(path: Path, channels: int) -> bool:
    """Whether the file has more in it than Pillow can tell."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return True
    return suffix in TIFF and (channels not in _MODES or not _is_plain(path, channels))


def _is_plain(path: Path, channels: int = 3) -> bool:
    """False for a TIFF file with pages, bands or depths that Pillow leaves out."""
    from PIL import Image, UnidentifiedImageError

    if path.suffix.lower() not in TIFF:
        return True
    try:
        with Image.open(path) as image:
            whole = not (_is_deep_color(image) or (channels == 4 and _hides_band(image)))
            return whole and getattr(image, "n_frames", 1) == 1
    except UnidentifiedImageError:
        return False
    except OSError:
        return True  # decoding says what is wrong


def _is_deep_color(image: Image) -> bool:
    """Whether Pillow would cut the channels of a color image to 8 bits."""
    return len(image.getbands()) > 1 and ";16" in str(getattr(image, "tile", ""))


def _hides_band(image: Image) -> bool:
    """Whether Pillow would drop the fourth band of a TIFF file (0), or divide the others by it."""
    extra = getattr(image, "tag_v2", {}).get(_EXTRA_SAMPLES)
    return image.mode in {"RGB", "RGBA"} and extra in ((0,), (1,))


def _decode(path: Path, channels: int, size: Size | None) -> np.ndarray:
    """[H, W, C] by Pillow."""
    with _opened(path) as image:
        if image.format == "PNG" and _is_deep_color(image):
            return _deep_png(path, channels)
        if size is not None:
            image = _fit(path, image, size)
        pixels = np.array(_convert(image, channels))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _deep_png(path: Path, channels: int) -> np.ndarray:
    """16-bit colors, without transparency unless four channels are asked for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from torchvision.io import ImageReadMode, decode_image, read_file

            pixels = decode_image(read_file(str(path)), ImageReadMode.UNCHANGED)
    except ImportError:
        raise DataError(
            f"{path}: this torchvision cannot read 16-bit colors of PNG; save it as TIFF or .npy"
        ) from None
    except RuntimeError as error:
        raise DataError(f"{path}: cannot be decoded ({error}); replace the file") from None
    opaque = len(pixels) - (len(pixels) in (2, 4) and channels != 4)
    return pixels[:opaque].permute(1, 2, 0).contiguous().numpy()


def _convert(image: Image, channels: int) -> Image | np.ndarray:
    if image.mode in {"I;16", "I;16B", "I;16L", "I;16N"} or image.mode == "I":
        pixels = np.array(image)
        return pixels.astype(np.uint16) if image.format in {"PNG", "PPM"} else pixels
    mode = _MODES.get(channels)
    if mode is None or image.mode == "F":
        return image
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def list_images(folder: Path) -> list[str]:
    """Names of the image files in a folder, sorted, without hidden ones; empty if there is none."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".")]
    return sorted(name for name in names if Path(name).suffix.lower() in SUFFIXES)
