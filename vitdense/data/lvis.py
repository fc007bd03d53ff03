"""LVIS: COCO's images and format, with a word on what is annotated in which image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitdense.data.base import DataError
from vitdense.data.coco import CocoDataset
from vitdense.data.coco_file import CocoFile
from vitdense.data.layouts import Layout
from vitdense.registry import DATASETS
from vitdense.structures import Target


class LvisFile(CocoFile):
    """LVIS's annotation file.

    Attributes:
        frequencies: of each class, "r", "c" or "f".
        negative, partial: labels that images surely do not hold, and that are not annotated
            wholly; those of image i are from starts[i] to starts[i + 1] of its (labels, starts).
    """

    frequencies: list[str]

    def _categories(self, entries: list[dict[str, Any]]) -> tuple[list[int], list[str]]:
        ids, names = super()._categories(entries)
        told = {int(entry["id"]): str(entry.get("frequency")) for entry in entries}
        odd = next((key for key in ids if told[key] not in ("r", "c", "f")), None)
        if odd is not None:
            raise DataError(
                f"{self.path}: category {odd} has the frequency {told[odd]}; LVIS's files say "
                "r, c or f, others are read by the data set `coco`"
            )
        self.frequencies = [told[key] for key in ids]
        self._places = {key: place for place, key in enumerate(ids)}
        return ids, names

    def _images(self, entries: list[dict[str, Any]], folder: Path) -> None:
        super()._images([{**entry, "file_name": self._name(entry)} for entry in entries], folder)
        self.negative = self._lists(entries, "neg_category_ids")
        self.partial = self._lists(entries, "not_exhaustive_category_ids")
        del self._places  # worker processes share the arrays alone

    def _name(self, entry: dict[str, Any]) -> str:
        """Folder and file, as in train2017/000000391895.jpg."""
        url = entry.get("coco_url") or entry.get("file_name")
        if not isinstance(url, str):
            raise DataError(f"{self.path}: image {entry.get('id')!r} has no `coco_url`")
        return "/".join(url.split("/")[-2:])

    def _lists(self, entries: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
        try:
            listed = [[self._places[its] for its in entry[key]] for entry in entries]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{self.path}: an image's `{key}` is missing or names no category ({error!r})"
            ) from None
        starts = np.cumsum([0, *map(len, listed)])
        return np.array([label for its in listed for label in its], dtype=np.int64), starts


@DATASETS.register("lvis")
class LvisDataset(CocoDataset):
    """LVIS v1, with COCO's images under their folders `train2017` and `val2017`.

    The truth says of which classes it is known what an image holds (`judged`), and of which not
    all objects are annotated (`partial`); the metric `lvis` takes them into account. Boxes are
    treated as those of `coco`.

    Raises:
        DataError: files are missing or wrong.
    """

    layouts = (
        Layout("annotations/lvis_v1_{split}.json", "images"),
        Layout("annotations/lvis_v1_{split}.json", "."),
        Layout("lvis_v1_{split}.json", "."),
    )
    reader = LvisFile
    _file: LvisFile

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        masks: bool = False,  # read instance masks too
        annotations: str | None = None,  # the JSON file under root, as "labels/{split}.json"
        images: str | None = None,  # the folder under root that holds train2017 and val2017
    ) -> None:
        super().__init__(root, split, masks=masks, annotations=annotations, images=images)
        self.frequencies = self._file.frequencies

    def target(self, index: int) -> Target:
        target = super().target(index)
        assert target.labels is not None
        target.judged = self._flags(index, self._file.negative)
        target.judged[target.labels] = True
        target.partial = self._flags(index, self._file.partial)
        return target

    def _flags(self, index: int, listed: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
        labels, starts = listed
        flags = torch.zeros(len(self.classes), dtype=torch.bool)
        flags[torch.from_numpy(labels[starts[index] : starts[index + 1]])] = True
        return flags
