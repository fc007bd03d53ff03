"""How often classes occur, from the truth alone: for class weights and for rare classes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from vitdense.data.base import DataError, Dataset
from vitdense.structures import IGNORE, Target

TOGETHER = 16
"""Images that a thread looks at in one go, as a call for each may take longer than the look."""


def pixels_per_image(
    dataset: Dataset, skip: bool = False, images: Sequence[int] | None = None
) -> Tensor:
    """int64 [images, C]: pixels of each class; ignored ones count nowhere. Reads no images.

    Args:
        skip: what cannot be read has no pixels, instead of raising.
        images: indices of those to count in; by default all.

    Raises:
        ValueError: the data set has no label maps.
        DataError: a file is missing or wrong.
    """

    def pixels(index: int) -> Tensor:
        return _pixels(dataset.target(index), len(dataset.classes))

    return _collect(dataset, pixels, "counting pixels", skip, images, torch.int64)


def class_frequencies(
    dataset: Dataset, skip: bool = False, images: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Pixels of each class, and labelled pixels of the images that show it, int64 [C] each."""
    pixels = pixels_per_image(dataset, skip, images)
    return pixels.sum(0), (pixels.sum(1, keepdim=True) * (pixels > 0)).sum(0)


def repeat_factors(shown: Tensor, rare: float) -> Tensor:
    """How often each image should be seen, float64 [images], at least 1.

    An image of a class that only the part f of all images shows counts sqrt(rare / f) times: repeat
    factor sampling, Gupta et al., "LVIS", arXiv 1908.03195, appendix B.2.

    Args:
        shown: bool [images, C], as `images_with_class` gives it.
        rare: 0..1, classes that a smaller part of the images shows are rare.
    """
    # a number for each flag would take 8 bytes: gigabytes for millions of images
    images, classes = shown.nonzero(as_tuple=True)
    part = torch.bincount(classes, minlength=shown.shape[1]).double() / len(shown)
    factors = (rare / part.clamp(min=1e-12)).sqrt().clamp(min=1)
    least = torch.ones(len(shown), dtype=torch.float64)
    return least.scatter_reduce(0, images, factors[classes], "amax")


def images_with_class(
    dataset: Dataset, skip: bool = False, images: Sequence[int] | None = None
) -> Tensor:
    """bool [images, C]: whether an image shows a class, by `Dataset.labels`.

    Args:
        skip: what cannot be read shows nothing, instead of raising.
        images: indices of those to look at; by default all.

    Raises:
        DataError: a file is missing or wrong.
    """

    def present(index: int) -> Tensor:
        row = torch.zeros(len(dataset.classes), dtype=torch.bool)
        row[dataset.labels(index)] = True
        return row

    return _collect(dataset, present, "looking for classes", skip, images, torch.bool)


def _collect(
    dataset: Dataset,
    read: Callable[[int], Tensor],
    what: str,
    skip: bool,
    images: Sequence[int] | None,
    dtype: torch.dtype,
) -> Tensor:
    from tqdm import tqdm

    images = range(len(dataset)) if images is None else images
    table = torch.zeros(len(images), len(dataset.classes), dtype=dtype)

    def look(start: int) -> int:
        """Fill the rows of some images; how many of them can be read."""
        found = 0
        for row, index in enumerate(images[start : start + TOGETHER], start):
            try:
                table[row] = read(index)
                found += 1
            except DataError:
                if not skip:
                    raise
        return found

    workers = min(8, os.cpu_count() or 1)  # decoding lets other threads run
    silent = None if 0 in images else True  # one bar is enough for several processes
    bar = tqdm(desc=what, total=len(images), leave=False, disable=silent)
    found = 0
    with ThreadPoolExecutor(workers) as pool, bar:
        for some in pool.map(look, range(0, len(images), TOGETHER)):
            found += some
            bar.update(min(TOGETHER, len(images) - bar.n))
    if len(images) == len(dataset) and not found:
        read(images[0])  # raises what is wrong
    return table


def _pixels(target: Target, classes: int) -> Tensor:
    if target.semantic is None:
        raise ValueError("pixels of classes are counted in label maps; this data set has none")
    return torch.bincount(target.semantic.flatten(), minlength=IGNORE + 1)[:classes]
