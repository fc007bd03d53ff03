"""What every data set and every transform policy promises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from vitdense.registry import Span
from vitdense.structures import IGNORE, Sample, Size, Target

if TYPE_CHECKING:
    from vitdense.data.cache import ImageCache


class Dataset:
    """Images with their truth.

    Subclasses take `root` and `split` first and their options after `*`.

    Attributes:
        classes: names, in the order of the labels 0..C-1.
        category_ids: the files' own id of each class, for writing results in their format.
        things: whether each class is counted in objects, as opposed to stuff, where the truth is
            panoptic; else None.
        frequencies: whether each class is rare, common or frequent, "r", "c" or "f", where it is
            told; metrics group classes by it.
        image_classes: names of the labels of whole images; none unless it has such.
        channels: channels to decode images to; the engine sets it to what the model takes.
        range: values of images deeper than 8 bits that become 0 and 255; None = their type's.
        cache: where decoded images are kept; the engine sets it.
    """

    classes: list[str]
    category_ids: list[int]
    things: list[bool] | None = None
    frequencies: list[str] | None = None
    image_classes: Sequence[str] = ()
    channels: int = 3
    range: tuple[float, float] | None = None
    cache: ImageCache | None = None

    def __init__(self, root: Path, split: str) -> None:
        self.root = Path(root)
        self.split = split

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        """Sample with image and truth in original pixels; raises DataError naming the image."""
        raise NotImplementedError

    def read_image(self, path: Path, size: Size | None = None) -> Tensor:
        """As `data.images.read_image` with this set's channels and range, from the cache if any."""
        from vitdense.data.images import read_image

        read = read_image if self.cache is None else self.cache.read
        return read(path, self.channels, size, self.range)

    def target(self, index: int) -> Target:
        """The truth alone, in original pixels; most data sets read no image for it."""
        return self[index].target

    def labels(self, index: int) -> Tensor:
        """`shown_labels` of the truth; data sets whose file lists them read no mask for it."""
        return shown_labels(self.target(index))

    def image_path(self, index: int) -> Path:
        """The image's file; most data sets read no image for it."""
        return self[index].path


def shown_labels(target: Target) -> Tensor:
    """Classes in the label map, or among the objects, int64 [K], each once, ascending.

    Crowds do not count: training drops them.
    """
    if target.semantic is not None:
        counts = torch.bincount(target.semantic.flatten(), minlength=IGNORE)
        return counts[:IGNORE].nonzero().flatten()
    if target.labels is None:
        return torch.zeros(0, dtype=torch.int64)
    return (target.labels if target.crowd is None else target.labels[~target.crowd]).unique()


class Policy:
    """How samples are prepared, for training and for evaluation, with random numbers from torch.

    Subclasses take their options after `*`.

    Attributes:
        canvas: the size that every evaluation image comes out at, or None if sizes vary.
        close: the last span of a run, in which training samples are hardly changed.
    """

    canvas: Size | None = None
    close: Span = 0.0

    def train(self, sample: Sample) -> Sample:
        """Augment image and truth together."""
        raise NotImplementedError

    def compose(self, sample: Sample, draw: Callable[[], Sample]) -> Sample:
        """What the training loader calls: `train`, perhaps with other images mixed in.

        Args:
            draw: reads another image of the data set, drawn at random, as it is.
        """
        return self.train(sample)

    def check(self, dataset: Dataset) -> None:
        """Raise DataError if the options do not suit this data set's truth, before training."""

    def for_batch(self, divisor: int, closing: bool) -> Self:
        """The policy for the images of one batch, with what they share drawn: their canvas.

        Args:
            divisor: of the sides of a canvas.
            closing: the run is in its last span, `close`.
        """
        return self

    def largest(self, divisor: int) -> Size | None:
        """The largest canvas that a training batch can have; None where the images decide."""
        return None

    def evaluate(self, sample: Sample) -> Sample:
        """Resize the image alone: truth stays in original pixels."""
        raise NotImplementedError


class DataError(Exception):
    """A file of a data set is missing or wrong: names the file, the fault and the remedy."""
