"""Segments of things and stuff in COCO's panoptic format."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch

from vitdense.data.base import DataError
from vitdense.data.deep import check_range
from vitdense.data.images import inside, read_image
from vitdense.data.layouts import Layout, find_layout
from vitdense.data.panoptic_file import PanopticFile
from vitdense.data.segments import MapDataset, classes_of, number, objects
from vitdense.registry import DATASETS
from vitdense.structures import Target

LAYOUTS = (
    Layout("annotations/panoptic_{split}.json", "images/{split}"),
    Layout("annotations/panoptic_{split}.json", "{split}"),
    Layout("ade20k_panoptic_{split}.json", "images/{split}"),
    Layout("ade20k_panoptic_{split}.json", "images/{long}"),
)
"""Where the files lie: this toolbox's own layout, COCO's, ADE20K's."""


@DATASETS.register("coco_panoptic")
class CocoPanopticDataset(MapDataset):
    """A JSON file and the folder of the same name, with maps (PNG) whose colors are segment ids.

    Classes are the categories sorted by id. Pixels of no segment are void; segments without a
    pixel are left out.

    Raises:
        DataError: files are missing or wrong.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        task: Literal["panoptic", "semantic"] = "panoptic",  # semantic: the class of each pixel
        annotations: str | None = None,  # the JSON file under root, as "labels/{split}.json"
        images: str | None = None,  # the folder of images under root, as "photos/{split}"
        range: tuple[float, float] | None = None,  # values of deep images that become 0 and 255
    ) -> None:
        super().__init__(root, split)
        self.task, self.range = task, check_range(range)
        places = find_layout(self.root, split, LAYOUTS, annotations, images)
        self.annotations, self.images = places
        self._file = PanopticFile(self.annotations, self.images)
        self.names = self._file.names
        self.classes, self.category_ids = self._file.classes, self._file.category_ids
        self.things = self._file.things if task == "panoptic" else None

    def image_id(self, index: int) -> int | str:
        """As in the file."""
        return self._file.image_ids.item(index)

    def target(self, index: int) -> Target:
        file = self._file
        span = slice(file.starts[index], file.starts[index + 1])
        path = inside(file.folder, str(file.maps[index]), file.path)
        colors = read_image(path, 3, file.size(index)).to(torch.int32)
        ids = (colors[0] + (colors[1] << 8) + (colors[2] << 16)).numpy()
        numbers = number(ids, file.ids[span])
        strange = ids[(numbers == 0) & (ids != 0)]
        if len(strange):
            raise DataError(
                f"{path}: has segment {strange[0]}, which {file.path} does not list; "
                "both must be of one version"
            )
        labels = file.labels[span]
        if self.task == "semantic":
            return classes_of(numbers, labels)
        return objects(numbers, labels, np.asarray(file.crowd[span]))

    def labels(self, index: int) -> torch.Tensor:
        """As the file lists them, and so also those of a segment without a pixel."""
        file = self._file
        span = slice(file.starts[index], file.starts[index + 1])
        known = file.labels[span]
        if self.task == "panoptic":  # label maps show crowds too
            known = known[~file.crowd[span]]
        return torch.from_numpy(np.unique(known).astype(np.int64))
