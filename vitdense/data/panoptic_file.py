"""COCO's panoptic JSON file, checked and packed into flat arrays that worker processes share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vitdense.data.base import DataError
from vitdense.data.coco_file import CocoFile, check_names


class PanopticFile(CocoFile):
    """Images and segments of one file; segments of image i are starts[i]:starts[i + 1].

    Attributes:
        folder: of the segment maps, called as the file without `.json`.
        things: whether each class is counted in objects.
        maps: name of the segment map of each image.
        ids: of the segments, sorted for each image.
        classes, category_ids, names, image_ids, starts, labels, crowd: as in `CocoFile`.

    Raises:
        DataError: files are missing or wrong.
    """

    things: list[bool]

    def __init__(self, path: Path, folder: Path) -> None:
        self.folder = path.with_suffix("")
        super().__init__(path, folder)

    def _categories(self, entries: list[dict[str, Any]]) -> tuple[list[int], list[str]]:
        ids, names = super()._categories(entries)
        if len(ids) > 255:
            raise DataError(f"{self.path}: lists {len(ids)} categories; 255 are possible")
        flags = {int(entry["id"]): entry.get("isthing") for entry in entries}
        for key, name in zip(ids, names, strict=True):
            if flags[key] is None:
                raise DataError(
                    f"{self.path}: category '{name}' has no `isthing`: 1 for objects that are "
                    "counted, 0 for stuff"
                )
        self.things = [bool(flags[key]) for key in ids]
        return ids, names

    def _annotations(self, entries: list[dict[str, Any]], segmentations: bool) -> None:
        self._label_of = {key: label for label, key in enumerate(self.category_ids)}
        found: list[dict[str, Any] | None] = [None] * len(self.names)
        for entry in entries:
            found[self._owner(entry)] = entry
        missing = [str(name) for name, it in zip(self.names, found, strict=True) if it is None]
        if missing:
            raise DataError(
                f"{self.path}: the image {missing[0]} has no entry in `annotations` "
                f"({len(missing)} of {len(found)} have none); add it or take the image out"
            )
        segments = [self._segments_of(entry) for entry in found if entry is not None]
        self.maps = np.array([str(entry["file_name"]) for entry in found if entry is not None])
        check_names(self.path, self.folder, self.maps.tolist())
        flat = [segment for group in segments for segment in group]
        self.starts = np.cumsum([0, *map(len, segments)])
        self.ids = np.array([segment["id"] for segment in flat], dtype=np.int64)
        self.labels = np.array([self._label(segment) for segment in flat], dtype=np.int32)
        self.crowd = np.array([bool(it.get("iscrowd")) for it in flat], dtype=bool)
        del self._index, self._label_of

    def _segments_of(self, entry: dict[str, Any]) -> list[dict[str, Any]]:
        segments = entry.get("segments_info")
        if "file_name" not in entry or not isinstance(segments, list):
            raise DataError(
                f"{self.path}: the annotation of image {entry['image_id']} needs `file_name` and "
                "`segments_info`, as in COCO's panoptic format"
            )
        if not all(isinstance(it, dict) and isinstance(it.get("id"), int) for it in segments):
            raise DataError(
                f"{self.path}: a segment of image {entry['image_id']} has no whole `id`"
            )
        return sorted(segments, key=lambda segment: segment["id"])
