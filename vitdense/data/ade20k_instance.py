"""Instances of ADE20K's 100 object classes, in images of class and instance numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vitdense.data.base import DataError
from vitdense.data.classes import read_entries
from vitdense.data.images import inside, read_image
from vitdense.data.layouts import Layout, find_layout
from vitdense.data.segments import MapDataset, number, objects, paired_names
from vitdense.registry import DATASETS
from vitdense.structures import Target

LAYOUTS = (
    Layout("annotations_instance/{split}", "images/{split}"),
    Layout("annotations_instance/{long}", "images/{long}"),
)

NAMES = ("imgCatIds.json", "ade20k_instance_imgCatIds.json", "annotations_instance/imgCatIds.json")
"""Files of the 100 names; without one they are taken from ADE20K's objectInfo150."""

_STUFF = (
    1, 2, 3, 4, 5, 6, 7, 10, 12, 14, 17, 18, 22, 26, 27, 29, 30, 35, 41, 47, 49, 52, 53, 55, 60,
    61, 62, 64, 69, 78, 80, 85, 92, 95, 97, 100, 101, 102, 106, 107, 110, 114, 115, 118, 123, 129,
    132, 141, 142, 146,
)  # fmt: skip
OBJECTS = tuple(label for label in range(1, 151) if label not in _STUFF)
"""The label among ADE20K's 150 of each of its 100 object classes."""


@DATASETS.register("ade20k_instance")
class Ade20kInstanceDataset(MapDataset):
    """Images and maps (PNG) whose red is the class, 1 to 100, and whose green is the instance.

    Raises:
        DataError: files are missing or wrong.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        classes: str | None = None,  # file of class names under root, as "imgCatIds.json"
        annotations: str | None = None,  # the folder of maps, as "masks/{split}"
        images: str | None = None,  # the folder of images under root, as "photos/{split}"
    ) -> None:
        super().__init__(root, split)
        self.annotations, self.images = find_layout(self.root, split, LAYOUTS, annotations, images)
        self.names = paired_names(self.images, self.annotations)
        entries = self._entries(classes)
        self.category_ids, self.classes = list(entries), list(entries.values())

    def target(self, index: int) -> Target:
        path = inside(self.annotations, f"{self.image_id(index)}.png")
        category, instance = read_image(path, 3)[:2].numpy()
        # A pair of the two, because maps are found whose instances begin anew in each class.
        pairs = category.astype(np.int32) * 256 + instance
        known = np.flatnonzero(np.bincount(pairs.ravel(), minlength=1))
        known = known[known % 256 > 0]
        labels = np.searchsorted(self.category_ids, known // 256)
        labels = np.minimum(labels, len(self.classes) - 1)
        strange = known[np.array(self.category_ids)[labels] != known // 256]
        if len(strange):
            raise DataError(
                f"{path}: has the class {strange[0] // 256} in red; classes are "
                f"{self.category_ids[0]} to {self.category_ids[-1]}"
            )
        return objects(number(pairs, known), labels, np.zeros(len(known), dtype=bool))

    def _entries(self, name: str | None) -> dict[int, str]:
        for path in (self.root / it for it in (NAMES if name is None else (name,))):
            if path.is_file():
                return _named(path, {it.label: it.name for it in read_entries(path)})
        if name is not None:
            raise DataError(f"{self.root / name}: no such file of class names")
        for path in (self.root / f"objectInfo150.{suffix}" for suffix in ("txt", "csv")):
            if path.is_file():
                names = {it.label: it.name for it in read_entries(path)}
                found = {k: names[label] for k, label in enumerate(OBJECTS, 1) if label in names}
                return _named(path, found)
        raise DataError(
            f"{self.root}: no names of the object classes; put ADE20K's objectInfo150.txt or "
            "imgCatIds.json there, or name a file by the option `classes`"
        )


def _named(path: Path, entries: dict[int | None, str] | dict[int, str]) -> dict[int, str]:
    known: dict[Any, str] = dict(sorted(entries.items())) if None not in entries else {}
    if not known or len(set(known.values())) < len(known):
        raise DataError(f"{path}: must give each object class an id and a name of its own")
    return known
