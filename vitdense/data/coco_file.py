"""COCO's JSON file, checked and packed into flat arrays that worker processes share."""

from __future__ import annotations

import gc
import json
import logging
import marshal
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from unicodedata import normalize
from urllib.parse import unquote

import numpy as np

from vitdense.data.base import DataError
from vitdense.data.images import image_size, inside
from vitdense.structures import Size

log = logging.getLogger(__name__)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Inside, Python does not look for garbage in cycles.

    While millions of entries are read it would go through all of them again and again, which takes
    three times as long as to read them.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


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

    @collector_paused()
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
        return marshal.loads(self._segments[start:stop])

    def _categories(self, entries: list[dict[str, Any]]) -> tuple[list[int], list[str]]:
        if not entries:
            raise DataError(f"{self.path}: `categories` is empty; list each class's id and name")
        for entry in entries:
            key, name = entry.get("id"), entry.get("name")
            if not isinstance(key, int | float) or key % 1 != 0 or name in (None, ""):
                raise DataError(
                    f"{self.path}: each category needs a whole `id`, as a number, and a `name`; "
                    f"one has the id {key!r} and the name {name!r}"
                )
        named = {int(entry["id"]): str(entry["name"]) for entry in entries}
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
            kinds = sorted({type(key).__name__ for key in ids})
            raise DataError(
                f"{self.path}: the ids of `images` must all be whole numbers, or all texts, not "
                f"{' and '.join(kinds)}"
            )
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
        self._label_of: dict[Any, int] = {key: label for label, key in enumerate(self.category_ids)}
        owners = np.array([self._owner(entry) for entry in entries], dtype=np.int64)
        labels = np.array([self._label(entry) for entry in entries], dtype=np.int32)
        boxes = np.array([self._box(entry) for entry in entries], dtype=np.float64).reshape(-1, 4)
        areas = np.array([self._area(entry) for entry in entries], dtype=np.float64)
        areas = np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)
        crowd = np.array([self._is_crowd(entry) for entry in entries], dtype=bool)
        self._check_crowds(crowd)
        self._check_classes(np.unique(labels).tolist())
        boxes, keep = self._cut(boxes, owners)
        order = np.flatnonzero(keep)[np.argsort(owners[keep], kind="stable")]
        self.ids = np.array([entry.get("id", -1) for entry in entries])[order]
        self.labels, self.boxes = labels[order], boxes[order].astype(np.float32)
        self.crowd, self.area = crowd[order], areas[order].astype(np.float32)
        self.starts = np.searchsorted(owners[order], np.arange(len(self.names) + 1))
        if segmentations:
            self._check_masks([entries[i] for i in order])
            # several times as fast as JSON; taken out, so that memory holds each once
            parts = [marshal.dumps(entries[i].pop("segmentation")) for i in order]
            self._segments = b"".join(parts)
            self._segment_ends = np.cumsum([0, *map(len, parts)])
        del self._index, self._label_of  # worker processes share the arrays alone

    def _check_crowds(self, crowd: np.ndarray) -> None:
        """Some tools write the flag for every mask, and then there is nothing to learn."""
        if 2 * crowd.sum() > len(crowd):
            log.warning(
                "%s: %d of %d annotations are crowds (iscrowd: 1): training drops them, evaluation "
                "ignores them; write 0 where each is one object",
                self.path, crowd.sum(), len(crowd),
            )  # fmt: skip

    def _check_classes(self, used: list[int]) -> None:
        """Roboflow may list a group of classes by the name of one: without objects it stays."""
        ids: dict[str, int] = {}
        for label in used:
            name, key = self.classes[label], self.category_ids[label]
            if name in ids:
                raise DataError(
                    f"{self.path}: categories {ids[name]} and {key} are both called '{name}' and "
                    "have objects; give them different names, or their annotations one category_id"
                )
            ids[name] = key

    def _check_masks(self, entries: list[dict[str, Any]]) -> None:
        """A file of boxes alone must not pass for one whose masks are all empty."""
        without = [it for it in entries if not isinstance(it.get("segmentation"), list | dict)]
        if without:
            raise DataError(
                f"{self._named(without[0])}: segmentation is missing: give a list of polygons or "
                f"an RLE ({len(without)} of {len(entries)} have none), or leave out `masks: true`"
            )
        empty = sum(_is_empty(entry["segmentation"]) for entry in entries)
        if empty and empty == len(entries):
            raise DataError(
                f"{self.path}: the segmentation of every annotation is empty: the file has boxes "
                "alone; leave out `masks: true`, or take a file with masks"
            )
        if empty:
            log.warning("%s: %d annotations have boxes but no mask", self.path, empty)

    def _owner(self, entry: dict[str, Any]) -> int:
        key = entry.get("image_id")
        place = self._index.get(key) if isinstance(key, int | float | str) else None
        if place is None:
            raise DataError(
                f"{self._named(entry)} belongs to image {key!r}, which `images` does not list; "
                + (_alike(key, self._index) or "add the image or remove the annotation")
            )
        return place

    def _label(self, entry: dict[str, Any]) -> int:
        key = entry.get("category_id")
        label = self._label_of.get(key) if isinstance(key, int | float | str) else None
        if label is None:
            known = ", ".join(map(str, self.category_ids[:10]))
            more = ", ..." if len(self.category_ids) > 10 else ""
            raise DataError(
                f"{self._named(entry)} has category_id {key!r}, but `categories` lists "
                f"{known}{more}; "
                + (_alike(key, self._label_of) or "add the category or correct the annotation")
            )
        return label

    def _box(self, entry: dict[str, Any]) -> list[float]:
        box: Any = entry.get("bbox")
        numbers = isinstance(box, list) and all(isinstance(side, int | float) for side in box)
        if not numbers or len(box) != 4 or not all(map(math.isfinite, box)):
            raise DataError(
                f"{self._named(entry)} has the bbox {box!r}; "
                "it must be [x, y, width, height], four finite numbers of pixels"
            )
        return box

    def _area(self, entry: dict[str, Any]) -> float:
        """As the entry tells it; NaN where it does not."""
        area = entry.get("area")
        if area is None:
            return math.nan
        if not isinstance(area, int | float) or not math.isfinite(area):
            raise DataError(
                f"{self._named(entry)} has the area {area!r}; it must be a finite number of "
                "pixels, or be left out"
            )
        return area

    def _is_crowd(self, entry: dict[str, Any]) -> bool:
        try:
            return is_crowd(entry)
        except ValueError as error:
            raise DataError(f"{self._named(entry)} has the {error}") from None

    def _named(self, entry: dict[str, Any]) -> str:
        return f"{self.path}: annotation {entry.get('id', '(without id)')}"

    def _cut(self, boxes: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """xywh to xyxy inside the image, and which of them cover anything there."""
        far = self._sizes[owners][:, ::-1]
        if len(boxes) and far.max() > 1 and 0 < np.abs(boxes).max() <= 1:
            raise DataError(
                f"{self.path}: no bbox leaves the first pixel, so they are fractions of the "
                "images; multiply them by `width` and `height`"
            )
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
        if len(boxes) and not keep.any():
            raise DataError(
                f"{self.path}: no bbox is left; they must be [x, y, width, height] in pixels of "
                "the images"
            )
        return cut, keep

    def _warn(self, found: np.ndarray, what: str) -> None:
        if found.any():
            log.warning("%s: %d of %d boxes %s", self.path, found.sum(), len(found), what)


@collector_paused()
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
            f"({len(missing)} of {len(names)} images are missing); {_remedy(folder, missing[0])}"
        )


def _remedy(folder: Path, name: str) -> str:
    """What to do about a missing image, whose name may be of Windows, a URL or another folder."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    listed = PurePosixPath(*(part for part in parts if part != ".."))
    for place in dict.fromkeys((folder / listed.parent, folder)):
        for found in sorted(place.iterdir()) if place.is_dir() else ():
            if _plain(found.name) == _plain(listed.name):
                there = found.relative_to(folder).as_posix()
                # accents look alike, whatever code points they are made of
                alike = normalize("NFC", there) == normalize("NFC", name)
                there, name = (ascii(it) if alike else repr(it) for it in (there, name))
                return (
                    f"there is {there}, not {name}: correct `file_name`, or name by the option "
                    "`images` the folder that it counts from"
                )
    return "add them or correct `file_name`"


def _plain(name: str) -> str:
    """For comparing names: accents, escapes of URLs and case may be written otherwise."""
    return normalize("NFC", unquote(name)).casefold()


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


def _is_empty(segmentation: Any) -> bool:
    """Whether all polygons have fewer than three points; one that is none is found when drawn."""
    return isinstance(segmentation, list) and all(
        isinstance(ring, list) and len(ring) < 6 and not any(isinstance(it, list) for it in ring)
        for ring in segmentation
    )


def _alike(key: Any, known: Iterable[Any]) -> str:
    """The remedy where a key is known as a number and given as a text, or the reverse."""
    if isinstance(key, int | str) and str(key) in map(str, known):
        return "one is a text and the other a number: write both as numbers"
    return ""


def is_crowd(entry: dict[str, Any]) -> bool:
    """The flag of an annotation; raises ValueError for what may mean either, as the text "0"."""
    flag = entry.get("iscrowd")
    if flag not in (None, 0, 1):
        raise ValueError(f"iscrowd {flag!r}; it must be 0 or 1, or be left out")
    return bool(flag)
