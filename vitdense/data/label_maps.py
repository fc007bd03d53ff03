"""What all sets of images and label maps share: labels to classes, and their faults."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitdense.data.base import DataError
from vitdense.data.images import is_colored, read_image, read_labels
from vitdense.data.segments import number
from vitdense.structures import IGNORE

log = logging.getLogger(__name__)

UNKNOWN = -1
"""In a table of classes: a label that there is not."""

LOSSY = (".jpg", ".jpeg", ".webp")
"""Files of masks whose values are near 0 and near 255."""

LOOKED_AT = 20
"""Label images that are read to tell what a set holds."""


def label_table(classes: dict[int, int], ignored: Iterable[int]) -> np.ndarray:
    """The class of each label, for `look_up`.

    Args:
        classes: class of each label.
        ignored: more labels; a label that is also a class is not ignored.

    Returns:
        int16 [largest label + 2]: 0..C-1, IGNORE or UNKNOWN; the last stands for all above.
    """
    ignored = list(ignored)
    table = np.full(max([IGNORE, *classes, *ignored]) + 2, UNKNOWN, dtype=np.int16)
    table[ignored] = IGNORE
    table[list(classes)] = list(classes.values())
    return table


def look_up(path: Path, labels: np.ndarray, table: np.ndarray, remedy: str) -> Tensor:
    """Classes uint8 [H, W] of the labels of a file.

    Args:
        labels: whole numbers [H, W].
        remedy: the end of the message for a label that is not in the table.

    Raises:
        DataError: there is such a label.
    """
    small = labels.dtype == np.uint8 and len(table) > IGNORE
    places = labels if small else np.clip(labels, -1, len(table) - 1)
    found = table[places]
    if (found < 0).any():
        label = labels[found < 0].max()
        if label < 0:
            remedy = "but labels begin with 0; save pixels that are to be ignored as 255"
        raise DataError(f"{path}: has the label {label}, {remedy}")
    return torch.from_numpy(found.astype(np.uint8))


def labels_in(paths: list[Path]) -> list[int]:
    """All labels that some maps hold, to help to write the names of classes."""
    return sorted({int(label) for path in paths for label in np.unique(read_labels(path))})


def binary_labels(path: Path) -> Tensor:
    """uint8 [H, W], 1 where the mask in a file is set: above 0, in lossy files above 127."""
    pixels = read_image(path, 3).amax(0).numpy() if is_colored(path) else read_labels(path)
    bound = 127 if path.suffix.lower() in LOSSY else 0
    return torch.from_numpy((pixels > bound).astype(np.uint8))


def hides_masks(files: list[Path], labels: list[int]) -> bool:
    """Whether binary masks of 0 and 255 would pass for maps of one class and ignored pixels.

    Args:
        labels: of the classes; masks are two at most.
    """
    if len(labels) > 2 or IGNORE in labels:
        return False
    return first_labels(files, lambda found: bool(found - {0, IGNORE})) == {0, IGNORE}


def warn_of_no_class(folder: Path, files: list[Path], labels: list[int]) -> None:
    """Warn if nothing could be learnt from the first maps, as all in them is ignored.

    Args:
        labels: of the classes.
    """
    found = first_labels(files, lambda found: not found.isdisjoint(labels))
    if found and found <= {0, IGNORE} and found.isdisjoint(labels):
        log.warning(
            "%s: the first %d label maps hold %s alone, which is no class: nothing is learnt there",
            folder, len(files[:LOOKED_AT]), " and ".join(map(str, sorted(found))),
        )  # fmt: skip


def first_labels(files: list[Path], enough: Callable[[set[int]], bool]) -> set[int]:
    """Labels that the first maps hold; files of colors, or that cannot be read, are passed over.

    Args:
        enough: whether no more maps need be read, from the labels so far.
    """
    found: set[int] = set()
    for file in files[:LOOKED_AT]:
        with suppress(DataError):
            found.update([] if is_colored(file) else labels_in([file]))
        if enough(found):
            break
    return found


def color_labels(path: Path, classes: dict[tuple[int, int, int], int], source: str) -> Tensor:
    """Classes uint8 [H, W] of a file's colors.

    Args:
        classes: class of each color.
        source: where they are from, for the message.

    Raises:
        DataError: there is a color of no class.
    """
    red, green, blue = read_image(path, 3).to(torch.int32)
    codes = ((red << 16) + (green << 8) + blue).numpy()
    known = np.array([(r << 16) + (g << 8) + b for r, g, b in classes], dtype=np.int64)
    order = np.argsort(known)
    numbers = number(codes, known[order])
    if not numbers.all():
        strange, counts = np.unique(codes[numbers == 0], return_counts=True)
        raise DataError(
            f"{path}: has {len(strange)} colors of no class, as #{strange[counts.argmax()]:06x} in "
            f"{counts.max()} pixels; name its class in {source}, or add it to the option `ignore`"
            + ("; colors are exact in PNG only" if path.suffix.lower() != ".png" else "")
        )
    table = np.array([0, *np.array(list(classes.values()))[order]], dtype=np.uint8)
    return torch.from_numpy(table[numbers])
