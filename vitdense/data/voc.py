"""Pascal VOC: label maps, instances, and boxes from XML files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch

from vitdense.data.base import DataError
from vitdense.data.classes import find_classes, read_entries
from vitdense.data.images import image_size, inside, list_images, read_labels
from vitdense.data.label_maps import label_table, look_up
from vitdense.data.segments import MapDataset, check_maps, number, objects
from vitdense.data.voc_file import read_objects, read_size, read_split
from vitdense.registry import DATASETS
from vitdense.structures import IGNORE, Sample, Size, Target

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip


@DATASETS.register("voc")
class VocDataset(MapDataset):
    """A folder like VOC2012, with VOC's 20 classes or those of a file `classes.txt`.

    Difficult objects are crowds: evaluation ignores them, training drops them. The border around
    objects, label 255, is ignored in label maps and belongs to no mask.

    Raises:
        DataError: files are missing or wrong.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        task: Literal["semantic", "instance", "detection"] = "semantic",  # which truth to read
        classes: str | None = None,  # file of class names under root, without the background
    ) -> None:
        super().__init__(root, split)
        self.task = task
        self.images = self.root / "JPEGImages"
        folder = "Main" if task == "detection" else "Segmentation"
        stems = read_split(self.root, f"ImageSets/{folder}", split)
        self.names = np.array(self._images(stems))
        file = find_classes(self.root, classes, ("classes.json", "classes.txt"))
        names = list(CLASSES) if file is None else [it.name for it in read_entries(file)]
        first = 0 if task == "semantic" else 1  # objects have no class for the background, label 0
        self.classes = names if first else ["background", *names]
        self.category_ids = [first + label for label, _ in enumerate(self.classes)]
        ignored = [IGNORE, 0] if first else [IGNORE]
        self._table = label_table({label: label - first for label in self.category_ids}, ignored)
        self._check_truth(stems)

    def __getitem__(self, index: int) -> Sample:
        if self.task != "detection":
            return super().__getitem__(index)
        path = inside(self.images, str(self.names[index]))
        image = self.read_image(path, read_size(self._annotation(index)))
        size = image.shape[1], image.shape[2]
        return Sample(image, self._boxes(index, size), self.image_id(index), size, path)

    def target(self, index: int) -> Target:
        stem = self.image_id(index)
        if self.task == "detection":
            size = read_size(self._annotation(index))
            size = size or image_size(inside(self.images, str(self.names[index])))
            return self._boxes(index, size)
        path = inside(self.root / "SegmentationClass", f"{stem}.png")
        remedy = f"but classes are labels up to {self.category_ids[-1]}; name all in classes.txt"
        semantic = look_up(path, read_labels(path), self._table, remedy)
        if self.task == "semantic":
            return Target(semantic=semantic)
        return self._instances(stem, semantic.numpy())

    def _instances(self, stem: int | str, semantic: np.ndarray) -> Target:
        path = inside(self.root / "SegmentationObject", f"{stem}.png")
        raw = read_labels(path)
        if raw.shape != semantic.shape:
            raise DataError(f"{path}: is of another size than the file in SegmentationClass")
        raw = np.where(semantic == IGNORE, 0, raw)
        known, place = np.unique(raw, return_index=True)
        labels = semantic.ravel()[place[known > 0]]
        known = known[known > 0]
        return objects(number(raw, known), labels, np.zeros(len(known), dtype=bool))

    def _annotation(self, index: int) -> Path:
        return inside(self.root / "Annotations", f"{self.image_id(index)}.xml")

    def _boxes(self, index: int, size: Size) -> Target:
        path = self._annotation(index)
        found = read_objects(path, size)
        strange = [it.name for it in found if it.name not in self.classes]
        if strange:
            raise DataError(
                f"{path}: has an object '{strange[0]}', which is no class; list the names of all "
                f"classes in {self.root / 'classes.txt'}, one per line"
            )
        boxes = torch.tensor([it.box for it in found], dtype=torch.float32).reshape(-1, 4)
        return Target(
            labels=torch.tensor([self.classes.index(it.name) for it in found], dtype=torch.int64),
            boxes=boxes,
            crowd=torch.tensor([it.difficult for it in found], dtype=torch.bool),
            area=(boxes[:, 2:] - boxes[:, :2]).prod(1),
        )

    def _images(self, stems: list[str]) -> list[str]:
        there = {Path(name).stem: name for name in list_images(self.images)}
        missing = [stem for stem in stems if stem not in there]
        if missing:
            raise DataError(
                f"{self.images / missing[0]}.jpg: no such image, though the split '{self.split}' "
                f"lists it ({len(missing)} of {len(stems)} are missing)"
            )
        return [there[stem] for stem in stems]

    def _check_truth(self, stems: list[str]) -> None:
        kinds = {"semantic": ["Class"], "instance": ["Class", "Object"], "detection": []}
        for kind in kinds[self.task]:
            folder = self.root / f"Segmentation{kind}"
            check_maps(folder, set(list_images(folder)), {stem: f"{stem}.png" for stem in stems})
        if self.task == "detection":
            folder = self.root / "Annotations"
            there = {path.name for path in folder.glob("*.xml")}
            check_maps(folder, there, {stem: f"{stem}.xml" for stem in stems})
