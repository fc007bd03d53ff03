"""Semantic label maps in ADE20K's layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from pydantic import NonNegativeInt
from torch import Tensor

from vitdense.data.base import DataError, Dataset
from vitdense.data.classes import NAMES, read_classes
from vitdense.data.images import inside, list_images, read_image, read_labels
from vitdense.data.layouts import Layout, find_layout
from vitdense.registry import DATASETS
from vitdense.structures import IGNORE, Sample, Target

LAYOUTS = (
    Layout("annotations/{split}", "images/{split}"),
    Layout("labels/{split}", "images/{split}"),
    Layout("{split}/labels", "{split}/images"),
    Layout("{split}/masks", "{split}/images"),
)
"""Where the files lie: ADE20K's layout first."""


@DATASETS.register("ade20k")
class Ade20kDataset(Dataset):
    """Images and label maps (PNG, one class number per pixel) of the same names.

    Raises:
        DataError: files are missing or wrong.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        reduce_zero_label: bool = True,  # label 0 is ignored and label k is class k - 1
        ignore_label: NonNegativeInt | None = None,  # one more label to ignore, beside 255
        classes: str | None = None,  # file of class names under root: .json, .csv or .txt
        annotations: str | None = None,  # the folder of label maps, as "masks/{split}"
        images: str | None = None,  # the folder of images under root, as "photos/{split}"
    ) -> None:
        super().__init__(root, split)
        self.first = int(reduce_zero_label)
        self.ignore_label = ignore_label
        self.annotations, self.images = find_layout(self.root, split, LAYOUTS, annotations, images)
        self.names = np.array(list_images(self.images))
        if not len(self.names):
            raise DataError(f"{self.images}: no images in this folder")
        self._check_labels()
        self.classes = read_classes(self._classes_file(classes), self.first)
        self.category_ids = list(range(self.first, self.first + len(self.classes)))
        self._table = self._make_table()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        name = str(self.names[index])
        labels_path = inside(self.annotations, f"{Path(name).stem}.png")
        semantic = self._semantic(labels_path)
        path = inside(self.images, name)
        size = (semantic.shape[0], semantic.shape[1])
        image = read_image(path, self.channels, size)
        return Sample(image, Target(semantic=semantic), Path(name).stem, size, path)

    def _semantic(self, path: Path) -> Tensor:
        raw = read_labels(path)
        found = self._table[raw if raw.dtype == np.uint8 else np.clip(raw, 0, 256)]
        if (found < 0).any():
            raise DataError(
                f"{path}: has the label {raw[found < 0].max()}, but {len(self.classes)} classes "
                f"are labels {self.category_ids[0]} to {self.category_ids[-1]}; add the class, "
                "or set `ignore_label`, or look at `reduce_zero_label`"
            )
        return torch.from_numpy(found.astype(np.uint8))

    def _make_table(self) -> np.ndarray:
        """Class of each label, IGNORE, or -1 for labels that there are not; 256 stands for more."""
        table = np.full(257, -1, dtype=np.int16)
        table[IGNORE] = IGNORE
        if self.first:
            table[0] = IGNORE
        table[self.category_ids] = np.arange(len(self.classes))
        if self.ignore_label is not None:
            table[min(self.ignore_label, 256)] = IGNORE
        return table

    def _check_labels(self) -> None:
        there = set(list_images(self.annotations))
        missing = [str(n) for n in self.names if f"{Path(str(n)).stem}.png" not in there]
        if missing:
            raise DataError(
                f"{self.annotations / Path(missing[0]).stem}.png: no label map for the image "
                f"{missing[0]} ({len(missing)} of {len(self.names)} are missing)"
            )

    def _classes_file(self, name: str | None) -> Path:
        names = NAMES if name is None else (name,)
        for path in (self.root / candidate for candidate in names):
            if path.is_file():
                return path
        if name is not None:
            raise DataError(f"{self.root / name}: no such file of class names")
        raise DataError(
            f"{self.root}: no file of class names; write classes.txt there with one name per "
            f"line, in the order of the labels, beginning with label {self.first} "
            f"({self._found_labels()})"
        )

    def _found_labels(self) -> str:
        """What the first label maps hold, to help to write the names."""
        files = list_images(self.annotations)[:20]
        maps = (read_labels(self.annotations / name) for name in files)
        labels = sorted({int(label) for labels in maps for label in np.unique(labels)} - {IGNORE})
        return f"the first {len(files)} maps hold the labels {', '.join(map(str, labels))}"
