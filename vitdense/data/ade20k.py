"""Semantic label maps in ADE20K's layout."""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import NonNegativeInt

from vitdense.data.base import DataError
from vitdense.data.classes import find_classes, read_classes, read_entries
from vitdense.data.deep import check_range
from vitdense.data.images import inside, list_images, read_labels
from vitdense.data.label_maps import (
    LOOKED_AT,
    first_labels,
    hides_masks,
    label_table,
    labels_in,
    look_up,
    warn_of_no_class,
)
from vitdense.data.layouts import Layout, find_layout
from vitdense.data.segments import MapDataset, paired_names
from vitdense.registry import DATASETS
from vitdense.structures import IGNORE, Target

log = logging.getLogger(__name__)

LAYOUTS = (
    Layout("annotations/{split}", "images/{split}"),
    Layout("labels/{split}", "images/{split}"),
    Layout("masks/{split}", "images/{split}"),
    Layout("{split}/labels", "{split}/images"),
    Layout("{split}/masks", "{split}/images"),
)
"""Where the files lie: ADE20K's layout first."""


@DATASETS.register("ade20k")
class Ade20kDataset(MapDataset):
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
        range: tuple[float, float] | None = None,  # values of deep images that become 0 and 255
    ) -> None:
        super().__init__(root, split)
        self.range = check_range(range)
        self.annotations, self.images = find_layout(self.root, split, LAYOUTS, annotations, images)
        self.names = paired_names(self.images, self.annotations)
        first = int(reduce_zero_label)
        file = self._classes_file(classes, first)
        self.classes = read_classes(file, first)
        self.category_ids = [first + label for label, _ in enumerate(self.classes)]
        ignored = [IGNORE, 0][: 1 + first] + ([] if ignore_label is None else [ignore_label])
        labels = {label: label - first for label in self.category_ids if label != ignore_label}
        self._table = label_table(labels, ignored)
        self._check_labels(told=any(it.label is not None for it in read_entries(file)))

    def target(self, index: int) -> Target:
        path = inside(self.annotations, f"{self.image_id(index)}.png")
        remedy = (
            f"but {len(self.classes)} classes are labels {self.category_ids[0]} to "
            f"{self.category_ids[-1]}; add the class, or set `ignore_label`, or look at "
            "`reduce_zero_label`"
        )
        return Target(semantic=look_up(path, read_labels(path), self._table, remedy))

    def _check_labels(self, told: bool) -> None:
        """Look for the usual misunderstandings in the first maps.

        Args:
            told: the file of classes says which labels they have.
        """
        maps = [self.annotations / f"{Path(name).stem}.png" for name in self.names[:LOOKED_AT]]
        if hides_masks(maps, self.category_ids):
            raise DataError(
                f"{self.annotations}: the first {len(maps)} label maps hold 0 and 255 alone; for "
                "masks take the data set folders with binary: true"
            )
        warn_of_no_class(self.annotations, maps, self.category_ids)
        last = self.category_ids[-1]
        if told or last != len(self.classes):
            return
        found = first_labels(maps, lambda found: max(found - {IGNORE}, default=0) >= last)
        if found - {IGNORE} == set(range(last)):
            log.warning(
                "%s: the first %d label maps hold 0 to %d and not %d, which would be the last "
                "class, %s; if their labels begin with 0, set reduce_zero_label: false",
                self.annotations, len(maps), last - 1, last, self.classes[-1],
            )  # fmt: skip

    def _classes_file(self, name: str | None, first: int) -> Path:
        path = find_classes(self.root, name)
        if path is not None:
            return path
        files = [self.annotations / file for file in list_images(self.annotations)[:20]]
        found = ", ".join(str(label) for label in labels_in(files) if label != IGNORE)
        raise DataError(
            f"{self.root}: no file of class names; write classes.txt there with one name per "
            f"line, in the order of the labels, beginning with label {first} "
            f"(the first {len(files)} maps hold the labels {found})"
        )
