"""Pictures of predictions beside the truth."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from vitdense.data.base import DataError, Dataset
from vitdense.data.geometry import resize
from vitdense.engine.checkpoint import write_atomic
from vitdense.engine.runtime import Runtime
from vitdense.ops.draw import as_segments, draw, side_by_side, stacked
from vitdense.structures import Batch, Prediction, Sample

SIDE = 640
"""Images are drawn at about this size: small ones enlarged, to have room for names."""


def picture_path(folder: Path, step: int) -> Path:
    """Where the picture of an evaluation lies in a run's folder."""
    return folder / "pictures" / f"step_{step:06d}.jpg"


class Pictures:
    """Draws a few images of a data set, spread over it, whenever it has seen their predictions.

    It only watches: what fails here is a warning.
    """

    def __init__(self, dataset: Dataset, count: int, runtime: Runtime) -> None:
        # Only images of this process's share: every `world_size`-th.
        share = range(runtime.rank, len(dataset), runtime.world_size)
        count = min(count, len(share)) if runtime.is_main else 0
        self.dataset = dataset
        self.indices = [share[index * len(share) // count] for index in range(count)]
        self._samples: dict[int | str, Sample] = {}
        self._predictions: dict[int | str, Prediction] = {}

    def watch(self, batch: Batch, predictions: list[Prediction]) -> None:
        """Keep the predictions for the chosen images."""
        if not self._samples:
            for index in self.indices:
                with suppress(DataError):  # what becomes of it is for the loader to say
                    sample = self.dataset[index]
                    self._samples[sample.image_id] = sample
        for image_id, prediction in zip(batch.image_ids, predictions, strict=True):
            if image_id in self._samples:
                self._predictions[image_id] = prediction.to("cpu")

    def save(self, path: Path) -> None:
        """Write one picture with a row for each image: the truth left, the prediction right."""
        if not self._predictions:
            return
        try:
            rows = [self._row(key) for key in self._samples if key in self._predictions]
            _write(stacked(*rows), path)
        except Exception as error:
            warnings.warn(f"{path}: no picture could be made: {error}", stacklevel=2)

    def _row(self, image_id: int | str) -> Tensor:
        sample, classes = self._samples[image_id], self.dataset.classes
        scale = max(1, SIDE // max(sample.image.shape[1:]))
        prediction = self._predictions[image_id]
        truth = sample.target if prediction.panoptic is None else as_segments(sample.target)
        answers = (truth, prediction)
        labels = self.dataset.image_classes
        pair = (draw(sample.image, it, classes, scale=scale, labels=labels) for it in answers)
        return _shrink(side_by_side(*pair))


def _shrink(row: Tensor) -> Tensor:
    """A row of at most twice `SIDE`, for photos that are larger than any screen."""
    height, width = row.shape[1:]
    if width <= 2 * SIDE:
        return row
    return resize(row, (round(height * 2 * SIDE / width), 2 * SIDE))


def _write(picture: Tensor, path: Path) -> None:
    from PIL import Image

    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    write_atomic(path, lambda partial: image.save(partial, "JPEG", quality=92))
