"""COCO's JSON file, checked and packed into flat arrays that worker processes share."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from vitdense.data.base import DataError
from vitdense.data.images import image_size, inside
from vitdense.structures import Size

log = logging.getLogger(__name__)


class CocoFile:
    """Images and annotations of one file; objects of image i are starts[i]:starts[i + 1].

    Attributes:
        classes, category_ids: sorted by id.
        names, image_ids: arrays of one per image.
        starts: int64 [images + 1].
        ids, labels, boxes (float32 xyxy in the image), crowd, area: arrays of one per object.

    Raises:
        DataError: the file is missing or wrong, or images are missing.
    """

    def __init__(self, path: Path, folder: Path, segmentations: bool = False) -> None:
        self.path = path
        content = read_json(path)
        self.category_ids, self.classes = self._categories(_entries(path, content, "categories"))
        self._images(_entries(path, content, "images"), folder)
        self._annotations(_entries(path, content, "annotations"), segmentations)

    def size(self, index: int) -> Size:
        """(height, width) of an image."""
        return int(self._sizes[index, 0]), int(self._sizes[index, 1])

    def segmentation(self, annotation: int) -> Any:
        """The polygons or the RLE of an object, as the file has it."""
        start, stop = self._segment_ends[annotation : annotation + 2]
        return json.loads(self._segments[start:stop])

    def _categories(self, entries: list[dict[str, Any]]) -> tuple[list[int], list[str]]:
        if not entries:
            raise DataError(f"{self.path}: `categories` is empty; list each class's id and name")
        try:
            named = {int(entry["id"]): str(entry["name"]) for entry in entries}
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{self.path}: each category needs a whole `id` and a `name`") from None
        if len(named) < len(entries):
            raise DataError(f"{self.path}: two categories have the same id; ids must be unique")
        ids = sorted(named)
        return ids, [named[key] for key in ids]

    def _images(self, entries: list[dict[str, Any]], folder: Path) -> None:
        if not entries:
            raise DataError(f"{self.path}: `images` is empty; there is nothing to read")
        try:
            names = [str(entry["file_name"]) for entry in entries]
            ids = [entry["id"] for entry in entries]
        except KeyError as key:
            raise DataError(f"{self.path}: an entry of `images` has no {key}") from None
        if not (all(isinstance(key, int) for key in ids) or all(isinstance(k, str) for k in ids)):
            raise DataError(f"{self.path}: the ids of `images` must all be numbers, or all texts")
        self._index = {key: place for place, key in enumerate(ids)}
        if len(self._index) < len(ids):
            twice = next(key for place, key in enumerate(ids) if self._index[key] != place)
            raise DataError(f"{self.path}: two images have the id {twice}; ids must be unique")
        check_names(self.path, folder, names)
        self.names, self.image_ids = np.array(names), np.array(ids)
        self._sizes = np.array([_size(entry, folder) for entry in entries], dtype=np.int32)

    def _annotations(self, entries: list[dict[str, Any]], segmentations: bool) -> None:
        if not entries:
            log.warning("%s: no annotations, every image counts as empty", self.path)
        self._label_of = {key: label for label, key in enumerate(self.category_ids)}
        owners = np.array([self._owner(entry) for entry in entries], dtype=np.int64)
        labels = np.array([self._label(entry) for entry in entries], dtype=np.int32)
        boxes = np.array([self._box(entry) for entry in entries], dtype=np.float64).reshape(-1, 4)
        areas = [_area(entry) for entry in entries]
        boxes, keep = self._cut(boxes, owners)
        order = np.flatnonzero(keep)[np.argsort(owners[keep], kind="stable")]
        self.ids = np.array([entry.get("id", -1) for entry in entries])[order]
        self.labels, self.boxes = labels[order], boxes[order].astype(np.float32)
        self.crowd = np.array([bool(e.get("iscrowd")) for e in entries], dtype=bool)[order]
        self.area = np.array(areas, dtype=np.float32)[order]
        self.starts = np.searchsorted(owners[order], np.arange(len(self.names) + 1))
        if segmentations:
            found = [entries[i].get("segmentation") for i in order]
            self._check_masks(found)
            texts = [json.dumps(each).encode() for each in found]
            self._segments = b"".join(texts)
            self._segment_ends = np.cumsum([0, *map(len, texts)])
        del self._index, self._label_of  # worker processes share the arrays alone

    def _check_masks(self, segmentations: list[Any]) -> None:
        """A file of boxes alone must not pass for one whose masks are all empty."""
        empty = sum(each == [] for each in segmentations)
        if empty and empty == len(segmentations):
            raise DataError(
                f"{self.path}: the segmentation of every annotation is empty: the file has boxes "
                "alone; leave out `masks: true`, or take a file with masks"
            )
        if empty:
            log.warning("%s: %d annotations have boxes but no mask", self.path, empty)

    def _owner(self, entry: dict[str, Any]) -> int:
        place = self._index.get(entry.get("image_id"))
        if place is None:
            raise DataError(
                f"{self._named(entry)} belongs to image {entry.get('image_id')!r}, which `images` "
                "does not list; add the image or remove the annotation"
            )
        return place

    def _label(self, entry: dict[str, Any]) -> int:
        label = self._label_of.get(entry.get("category_id", -1))
        if label is None:
            known = ", ".join(map(str, self.category_ids[:10]))
            more = ", ..." if len(self.category_ids) > 10 else ""
            raise DataError(
                f"{self._named(entry)} has category_id {entry.get('category_id')!r}, but "
                f"`categories` lists {known}{more}; add the category or correct the annotation"
            )
        return label

    def _box(self, entry: dict[str, Any]) -> list[float]:
        try:
            box = [float(value) for value in entry["bbox"]]
        except (KeyError, TypeError, ValueError):
            box = []
        if len(box) != 4 or not np.isfinite(box).all():
            raise DataError(
                f"{self._named(entry)} has the bbox {entry.get('bbox')!r}; "
                "it must be [x, y, width, height], four finite numbers of pixels"
            )
        return box

    def _named(self, entry: dict[str, Any]) -> str:
        return f"{self.path}: annotation {entry.get('id', '(without id)')}"

    def _cut(self, boxes: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """xywh to xyxy inside the image, and which of them cover anything there."""
        far = self._sizes[owners][:, ::-1]
        raw = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        flat = (boxes[:, 2:] <= 0).any(axis=1)
        outside = ~flat & ((raw[:, 2:] <= 0) | (raw[:, :2] >= far)).any(axis=1)
        cut = np.concatenate([np.clip(part, 0, far) for part in (raw[:, :2], raw[:, 2:])], axis=1)
        # float32 may close a gap that float64 still sees
        narrow = (cut[:, 2:].astype(np.float32) <= cut[:, :2].astype(np.float32)).any(axis=1)
        keep = ~(flat | outside | narrow)
        over = keep & (np.abs(cut - raw) > 1).any(axis=1)
        self._warn(flat | (narrow & ~outside), "without area left out")
        self._warn(outside, "wholly outside their images left out")
        self._warn(over, "cut at the edges of their images")
        return cut, keep

    def _warn(self, found: np.ndarray, what: str) -> None:
        if found.any():
            log.warning("%s: %d of %d boxes %s", self.path, found.sum(), len(found), what)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        DataError: it is missing, empty, no JSON (with line and column), or no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        if not text.strip():
            raise DataError(f"{path}: the file is empty; export the annotations again") from None
        where = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{path}: is not valid JSON at {where}: {error.msg}") from None
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: holds a {type(content).__name__}, not COCO's mapping of "
            "`images`, `annotations` and `categories`"
        )
    return content


def check_names(listed_in: Path, folder: Path, names: list[str]) -> None:
    """All images exist in the folder; one listing per folder, cheap on slow disks.

    Raises:
        DataError: a name leads out of the folder, or images are missing.
    """
    listings: dict[str, set[str]] = {}
    missing = []
    for name in names:
        if os.path.isabs(name) or ".." in name.split("/"):
            inside(folder, name, listed_in)
        parent, base = os.path.split(name)
        if parent not in listings:
            place = folder / parent
            listings[parent] = set(os.listdir(place)) if place.is_dir() else set()
        if base not in listings[parent]:
            missing.append(name)
    if missing:
        raise DataError(
            f"{folder / missing[0]}: no such image, though {listed_in} lists it "
            f"({len(missing)} of {len(names)} images are missing); add them or correct `file_name`"
        )


def _entries(path: Path, content: dict[str, Any], key: str) -> list[dict[str, Any]]:
    entries = content.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path}: `{key}` must be a list of mappings, as in COCO's format")
    return entries


def _size(entry: dict[str, Any], folder: Path) -> Size:
    height, width = entry.get("height"), entry.get("width")
    if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
        return height, width
    return image_size(inside(folder, entry["file_name"]))


def _area(entry: dict[str, Any]) -> float:
    area = entry.get("area")
    return float(area) if area is not None else entry["bbox"][2] * entry["bbox"][3]
