"""Cityscapes: semantic, instance and panoptic truth of city streets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np

from vitdense.data.base import DataError
from vitdense.data.images import inside, list_images, read_labels
from vitdense.data.label_maps import label_table, look_up
from vitdense.data.segments import MapDataset, check_maps, number, objects
from vitdense.registry import DATASETS
from vitdense.structures import IGNORE, Target

CLASSES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17,
    "traffic light": 19, "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23,
    "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31, "motorcycle": 32,
    "bicycle": 33,
}  # fmt: skip
"""The label of each class that counts in training and evaluation."""

THINGS = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")

LABELS = range(34)
"""Labels of the files; those of no class are ignored."""


@DATASETS.register("cityscapes")
class CityscapesDataset(MapDataset):
    """`leftImg8bit` and `gtFine` (or `gtCoarse`) as they come: 19 classes, 8 of them things.

    Groups of things, which the annotators did not part, are crowds. An image's id is its name
    without `_leftImg8bit`.

    Raises:
        DataError: files are missing or wrong.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        task: Literal["semantic", "instance", "panoptic"] = "semantic",  # which truth to read
        truth: Literal["gtFine", "gtCoarse"] = "gtFine",  # the folder of annotations
    ) -> None:
        super().__init__(root, split)
        self.task, self.truth = task, truth
        self.images, self.annotations = self.root / "leftImg8bit" / split, self.root / truth / split
        names = list(CLASSES)
        self.classes = list(THINGS) if task == "instance" else names
        self.category_ids = [CLASSES[name] for name in self.classes]
        self.things = [name in THINGS for name in names] if task == "panoptic" else None
        self.names = np.array(self._list())
        ignored = [IGNORE, *LABELS]
        self._table = label_table({k: i for i, k in enumerate(self.category_ids)}, ignored)

    def image_id(self, index: int) -> str:
        return Path(str(self.names[index])).stem.removesuffix("_leftImg8bit")

    def target(self, index: int) -> Target:
        city = Path(str(self.names[index])).parent
        path = inside(self.annotations, f"{city}/{self._map(self.image_id(index))}")
        raw = read_labels(path).astype(np.int32)
        remedy = f"but those of Cityscapes are 0 to {LABELS[-1]}; take the files {self._map('*')}"
        if self.task == "semantic":
            return Target(semantic=look_up(path, raw, self._table, remedy))
        # Below 1000 stand labels: stuff, and groups of things.
        known = np.unique(raw)
        labels = np.where(known < 1000, known, known // 1000)
        classes = look_up(path, labels, self._table, remedy).numpy()
        known, classes = known[classes != IGNORE], classes[classes != IGNORE]
        things = np.array([name in THINGS for name in self.classes])
        return objects(number(raw, known), classes, things[classes] & (known < 1000))

    def _map(self, image_id: str) -> str:
        kind = "labelIds" if self.task == "semantic" else "instanceIds"
        return f"{image_id}_{self.truth}_{kind}.png"

    def _list(self) -> list[str]:
        """Images of all cities, each with its map."""
        if not self.images.is_dir() or not self.annotations.is_dir():
            raise DataError(
                f"{self.root}: no split '{self.split}': looked for leftImg8bit/{self.split}/ with "
                f"{self.truth}/{self.split}/, Cityscapes' own folders"
            )
        found: list[str] = []
        for city in sorted(os.listdir(self.images)):
            names = [it for it in list_images(self.images / city) if "_leftImg8bit." in it]
            maps = {name: self._map(name.rpartition("_leftImg8bit.")[0]) for name in names}
            folder = self.annotations / city
            check_maps(folder, set(list_images(folder)), maps)
            found += [f"{city}/{name}" for name in names]
        if not found:
            raise DataError(f"{self.images}: no files <city>/*_leftImg8bit.png in this folder")
        return found
