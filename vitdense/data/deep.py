"""Images beyond 8 bits and four channels: arrays, many-banded TIFF, and their values in 0..255."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitdense.data.base import DataError
from vitdense.structures import Size

if TYPE_CHECKING:
    from numpy.typing import NDArray

Limits = tuple[float, float]
"""The values that become 0 and 255."""

TIFF = frozenset({".tif", ".tiff"})

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def check_range(limits: Limits | None) -> Limits | None:
    """The option `range` of a data set; raises ValueError if it is empty."""
    if limits is not None and not limits[0] < limits[1]:
        raise ValueError(f"range: {list(limits)} must be [lowest, highest]")
    return limits


def read_array(path: Path) -> NDArray[Any]:
    """The pixels of an .npy file or, by tifffile, of a TIFF file; pages are channels.

    In an array of three dimensions the channels are the shorter of the first and the last.

    Returns:
        any type [H, W, C].

    Raises:
        DataError: the file is missing or broken, or tifffile is.
    """
    if path.suffix.lower() in TIFF:
        with _tiff(path) as series:
            return _last(path, series.asarray(), series.axes)
    array = _load(path)
    return _last(path, array, _axes(path, array))


def array_size(path: Path) -> Size:
    """(height, width) of a file that `read_array` reads, from its header."""
    if path.suffix.lower() in TIFF:
        with _tiff(path) as series:
            return series.shape[series.axes.index("Y")], series.shape[series.axes.index("X")]
    array = _load(path)
    axes = _axes(path, array)
    return array.shape[axes.index("Y")], array.shape[axes.index("X")]


def read_label_array(path: Path) -> NDArray[Any]:
    """The label map of an .npy file: whole numbers [H, W]; raises DataError."""
    array = np.array(_load(path))
    if array.ndim != 2 or array.dtype.kind not in "uib":
        raise DataError(
            f"{path}: holds {array.dtype} {list(array.shape)}; a label map is a whole number per "
            "pixel, [height, width]"
        )
    return array


def take_channels(path: Path, pixels: NDArray[Any], channels: int) -> NDArray[Any]:
    """[H, W, C] with the number of channels asked for: grey is repeated, RGB weighed to grey.

    Raises:
        DataError: there is no such way.
    """
    have = pixels.shape[2]
    if have == channels:
        return pixels
    if have == 1 and channels == 3:
        return pixels.repeat(3, axis=2)
    if have == 3 and channels == 1:
        grey = (pixels @ _LUMA)[..., None]
        return grey.round().astype(np.uint8) if pixels.dtype == np.uint8 else grey
    raise DataError(
        f"{path}: has {have} channels, the model takes {channels}; "
        f"set in_chans of the backbone to {have}"
    )


def to_bytes(path: Path, pixels: NDArray[Any], limits: Limits | None) -> NDArray[Any]:
    """Values of deep pixels in 0..255 as float32, linear between the limits; uint8 stays.

    Args:
        limits: the values that become 0 and 255; None takes the least and most of 16 bits.

    Raises:
        DataError: pixels of 32 bits without limits, or values that are not finite.
    """
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * np.uint8(255)
    if limits is None and pixels.dtype.kind in "ui" and pixels.dtype.itemsize <= 2:
        limits = np.iinfo(pixels.dtype).min, np.iinfo(pixels.dtype).max
    if limits is None:
        raise DataError(
            f"{path}: holds {pixels.dtype} values from {np.nanmin(pixels):g} to "
            f"{np.nanmax(pixels):g}; say by the option `range` of the data set which of them "
            "become 0 and 255"
        )
    low, high = limits
    scaled = pixels.astype(np.float32)  # then in place: such images are large
    scaled -= low
    scaled *= 255 / (high - low)
    if not np.isfinite(scaled).all():
        raise DataError(f"{path}: has pixels that are no finite numbers; fill them")
    return scaled.clip(0, 255, out=scaled)


def _load(path: Path) -> NDArray[Any]:
    with _decoding(path):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def _axes(path: Path, array: NDArray[Any]) -> str:
    if array.ndim == 2:
        return "YX"
    if array.ndim != 3:
        raise DataError(
            f"{path}: is an array of {array.ndim} dimensions; an image is [height, width, "
            "channels] or [channels, height, width]"
        )
    return "SYX" if array.shape[0] < array.shape[2] else "YXS"


def _last(path: Path, array: NDArray[Any], axes: str) -> NDArray[Any]:
    """[H, W, C]: all but height and width together are the channels."""
    height, width = axes.find("Y"), axes.find("X")
    if min(height, width) < 0 or 0 in array.shape:
        raise DataError(f"{path}: is no image: its axes are {axes} {list(array.shape)}")
    moved = np.moveaxis(np.asarray(array), (height, width), (0, 1))
    size = moved.shape[:2]
    return np.ascontiguousarray(moved.reshape(*size, -1)).astype(moved.dtype.newbyteorder("="))


@contextmanager
def _tiff(path: Path) -> Iterator[Any]:
    """The first series of a TIFF file: its image, or its pages of one size."""
    try:
        from tifffile import TiffFile
    except ImportError:
        raise DataError(
            f"{path}: Pillow cannot read all of this TIFF file; "
            "install tifffile (pip install 'vitdense[images]'), or save it as .npy"
        ) from None
    with _decoding(path), TiffFile(path) as file:
        yield file.series[0]


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; add it, or take it out of the list") from None
    except (OSError, ValueError, EOFError, IndexError, KeyError) as error:
        remedy = "replace the file"
        if "imagecodecs" in str(error):  # what tifffile needs for some compressions
            remedy = "pip install 'vitdense[images]', or save it without compression"
        raise DataError(f"{path}: cannot be decoded ({error}); {remedy}") from None
