"""Boxes and instance masks in COCO's JSON format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from vitdense.data.base import DataError, Dataset
from vitdense.data.coco_file import CocoFile
from vitdense.data.deep import check_range
from vitdense.data.images import inside
from vitdense.data.layouts import Layout, find_layout
from vitdense.registry import DATASETS
from vitdense.structures import Sample, Size, Target

LAYOUTS = (
    Layout("annotations/instances_{split}.json", "images/{split}"),
    Layout("annotations/instances_{split}.json", "{split}"),
    Layout("{split}/_annotations.coco.json", "{split}"),
)
"""Where the files lie: this toolbox's own layout, COCO's, Roboflow's."""


@DATASETS.register("coco")
class CocoDataset(Dataset):
    """A data set in COCO's format; crowds and images without objects are kept.

    Classes are the categories sorted by id. Boxes are cut at the image's edges; boxes without
    area, or wholly outside, are left out, and both are counted in a warning.

    Raises:
        DataError: files are missing or wrong.
    """

    layouts = LAYOUTS
    reader = CocoFile
    _file: CocoFile

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        masks: bool = False,  # read instance masks too
        annotations: str | None = None,  # the JSON file under root, as "labels/{split}.json"
        images: str | None = None,  # the folder of images under root, as "photos/{split}"
        range: tuple[float, float] | None = None,  # values of deep images that become 0 and 255
    ) -> None:
        super().__init__(root, split)
        self.masks, self.range = masks, check_range(range)
        layout = find_layout(self.root, split, self.layouts, annotations, images)
        self.annotations, self.images = layout
        self._file = self.reader(self.annotations, self.images, masks)
        self.classes = self._file.classes
        self.category_ids = self._file.category_ids

    def __len__(self) -> int:
        return len(self._file.names)

    def __getitem__(self, index: int) -> Sample:
        path, size = self.image_path(index), self._file.size(index)
        image = self.read_image(path, size)
        image_id = self._file.image_ids.item(index)
        return Sample(image, self.target(index), image_id, size, path)

    def image_path(self, index: int) -> Path:
        return inside(self.images, str(self._file.names[index]), self.annotations)

    def target(self, index: int) -> Target:
        file, size = self._file, self._file.size(index)
        span = slice(file.starts[index], file.starts[index + 1])
        return Target(
            labels=torch.from_numpy(file.labels[span].astype(np.int64)),
            boxes=torch.from_numpy(file.boxes[span].copy()),
            masks=self._masks(span, size) if self.masks else None,
            crowd=torch.from_numpy(file.crowd[span].copy()),
            area=torch.from_numpy(file.area[span].copy()),
        )

    def labels(self, index: int) -> torch.Tensor:
        file = self._file
        span = slice(file.starts[index], file.starts[index + 1])
        known = file.labels[span][~file.crowd[span]]
        return torch.from_numpy(np.unique(known).astype(np.int64))

    def _masks(self, span: slice, size: Size) -> torch.Tensor:
        from vitdense.ops.masks import decode_segmentation

        masks = np.zeros((span.stop - span.start, *size), dtype=bool)
        for place, annotation in enumerate(range(span.start, span.stop)):
            try:
                masks[place] = decode_segmentation(self._file.segmentation(annotation), *size)
            except ValueError as error:
                raise DataError(
                    f"{self.annotations}: annotation {self._file.ids[annotation]}: {error}"
                ) from None
        return torch.from_numpy(masks)
