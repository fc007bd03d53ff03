"""COCO's annotation and result files as objects to match."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vitdense.data.base import DataError
from vitdense.data.coco_file import collector_paused, is_crowd, read_json
from vitdense.data.image_labels import names_of
from vitdense.metrics.objects import Objects
from vitdense.ops.masks import polygon_rings
from vitdense.ops.run_length import RunLengths, chunks, from_strings, join
from vitdense.structures import Size

log = logging.getLogger(__name__)

Kind = Literal["bbox", "segm"]

MOST_LETTERS = 1 << 20
"""Of compressed RLEs that are decoded at once: takes some 80 MB."""


@dataclass(slots=True)
class Truth:
    """An annotation file.

    Attributes:
        path: the file.
        classes: names, by category id.
        labels: the class 0..C-1 of each category id.
        images: the place of each image id in ascending order.
        sizes: (height, width) by place.
        objects: what is annotated.
        files: `file_name` of each image id that has one.
    """

    path: Path
    classes: list[str]
    labels: dict[int, int]
    images: dict[int | str, int]
    sizes: list[Size]
    objects: Objects
    files: dict[int | str, str] = field(default_factory=dict)


def read_truth(path: Path, kind: Kind) -> Truth:
    """Read an annotation file as pycocotools does: boxes and areas as they are written.

    Raises:
        DataError: the file is missing or wrong.
    """
    return truth_of(read_json(path), path, kind)


def truth_of(content: dict[str, Any], path: Path, kind: Kind) -> Truth:
    """The same from the content of the file."""
    named, listed = (by_id(content, key, path) for key in ("categories", "images"))
    truth = Truth(
        path=path,
        classes=[str(entry.get("name", key)) for key, entry in named.items()],
        labels={key: label for label, key in enumerate(named)},
        images={key: place for place, key in enumerate(listed)},
        sizes=[(entry.get("height"), entry.get("width")) for entry in listed.values()],  # type: ignore[misc]
        objects=None,  # type: ignore[arg-type]
        files={key: str(it["file_name"]) for key, it in listed.items() if "file_name" in it},
    )
    annotations = _listed(content, "annotations", path)
    for entry in annotations:
        for key, known in (("image_id", truth.images), ("category_id", truth.labels)):
            if not holds(known, entry.get(key)):
                raise DataError(
                    f"{path}: annotation {entry.get('id', '(without id)')} has the {key} "
                    f"{entry.get(key)!r}, which the file does not list; correct it or remove it"
                )
    if kind == "segm" and annotations and all(it.get("segmentation") == [] for it in annotations):
        raise DataError(f"{path}: has boxes alone, every segmentation is empty; score `bbox`")
    truth.objects = to_objects(annotations, truth, path, kind)
    return truth


def by_id(content: dict[str, Any], key: str, path: Path) -> dict[Any, dict[str, Any]]:
    """The entries of a list by their ids, in ascending order.

    Raises:
        DataError: there is no such list or it is empty, ids are missing, or two are the same.
    """
    entries = _listed(content, key, path)
    if not entries:
        raise DataError(f"{path}: `{key}` is empty; there is nothing to score")
    try:
        found = {entry["id"]: entry for entry in entries}
        ordered = sorted(found)
    except (KeyError, TypeError):
        raise DataError(
            f"{path}: each entry of `{key}` needs an `id`; all must be numbers, or all texts"
        ) from None
    if len(found) < len(entries):
        twice = next(it["id"] for it in entries if found[it["id"]] is not it)
        raise DataError(f"{path}: two entries of `{key}` have the id {twice!r}; ids must be unique")
    return {name: found[name] for name in ordered}


def _listed(content: dict[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    entries = content.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(
            f"{path}: is no annotation file of COCO; `{key}` must be a list of mappings"
        )
    return entries


def holds(known: dict[Any, int], key: Any) -> bool:
    """Whether a key that a file gives is known; it may be anything."""
    return isinstance(key, int | float | str) and key in known


def read_results(path: Path, truth: Truth, kind: Kind) -> Objects:
    """Read a result file: a list of detections, each with image_id, category_id and score.

    For `segm` the area is the mask's, also where a box is written beside it. Detections of
    categories that the truth has not are left out, and counted in a warning.

    Raises:
        DataError: the file is missing or wrong, or has an image that the truth has not.
    """
    return results_of(read_list(path), path, truth, kind)


@collector_paused()
def read_list(path: Path) -> list[dict[str, Any]]:
    """The entries of a result file.

    Raises:
        DataError: it is missing, or no list of detections.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path}: must be a list of detections, as in COCO's result format")
    return entries


def results_of(entries: list[dict[str, Any]], path: Path, truth: Truth, kind: Kind) -> Objects:
    """The same from the entries of the file."""
    for entry in entries:
        if not isinstance(entry.get("category_id"), int | float | str):
            raise DataError(
                f"{path}: a detection of image {entry.get('image_id')!r} has the category_id "
                f"{entry.get('category_id')!r}; give each the id of its category"
            )
    known = [entry for entry in entries if holds(truth.labels, entry["category_id"])]
    if len(known) < len(entries):
        log.warning(
            "%s: %d of %d detections are of categories that %s has not, and do not count",
            path, len(entries) - len(known), len(entries), truth.path,
        )  # fmt: skip
    known = _by_file_name(known, truth)
    odd = next((e for e in known if not holds(truth.images, e.get("image_id"))), None)
    if odd is not None:
        raise DataError(
            f"{path}: a detection is of image {odd.get('image_id')!r}, which {truth.path} does "
            "not list; score the file with the truth of its split"
        )
    return to_objects(known, truth, path, kind, are_results=True)


def _by_file_name(entries: list[dict[str, Any]], truth: Truth) -> list[dict[str, Any]]:
    """The entries with ids for the names of files that stand in their place.

    `vitdense predict` writes such where it finds no annotation file beside the images.
    """
    texts = {key for it in entries if isinstance(key := it.get("image_id"), str)}
    if texts <= truth.images.keys():
        return entries
    named = [(name, key) for key, file in truth.files.items() for name in names_of(Path(file))]
    often = Counter(name for name, _ in named)
    ids = {name: key for name, key in named if often[name] == 1 and name not in truth.images}

    def with_id(entry: dict[str, Any]) -> dict[str, Any]:
        key = entry.get("image_id")
        return {**entry, "image_id": ids[key]} if isinstance(key, str) and key in ids else entry

    return [with_id(entry) for entry in entries]


def to_objects(
    entries: list[dict[str, Any]], truth: Truth, path: Path, kind: Kind, are_results: bool = False
) -> Objects:
    """Annotations as the objects of a file.

    Boxes of results that have masks alone are the tight ones, and their areas the masks', as in
    pycocotools.

    Raises:
        DataError: an entry is wrong.
    """
    places = [truth.images[entry["image_id"]] for entry in entries]
    first = entries[0] if are_results and truth.sizes and entries else {}
    bare = kind == "bbox" and not first.get("bbox") and bool(first.get("segmentation"))
    masks = None
    if kind == "segm" or bare:
        masks = _masks(entries, [truth.sizes[place] for place in places], path, are_results)
    boxes = _boxes(entries, path, masks, are_results)
    areas = boxes[:, 2] * boxes[:, 3]
    if masks is not None:
        areas = areas.where((areas > 0) & (not are_results), masks.areas().double())
    if not are_results:
        told = _numbers(entries, "area", path, math.nan)
        areas = told.where(~told.isnan(), areas)
    return Objects(
        images=torch.tensor(places, dtype=torch.int64),
        labels=torch.tensor([truth.labels[entry["category_id"]] for entry in entries]).long(),
        boxes=boxes,
        areas=areas,
        scores=_numbers(entries, "score", path) if are_results else torch.ones_like(areas),
        crowd=torch.tensor([not are_results and _is_crowd(e, path) for e in entries]).bool(),
        rows=torch.arange(len(entries)),
        masks=None if bare else masks,
    )


def _is_crowd(entry: dict[str, Any], path: Path) -> bool:
    try:
        return is_crowd(entry)
    except ValueError as error:
        raise _fault(path, entry, f"has the {error}") from None


def _boxes(
    entries: list[dict[str, Any]], path: Path, masks: RunLengths | None, are_results: bool
) -> Tensor:
    """float64 [N, 4], xywh; where masks are compared, those of the truth say its sizes at most."""
    if masks is None or not are_results:
        return _numbers(entries, "bbox", path, None if masks is None else [0.0] * 4, width=4)
    boxes = masks.boxes().double()
    boxes[:, 2:] -= boxes[:, :2]
    return boxes


def _numbers(
    entries: list[dict[str, Any]], key: str, path: Path, default: Any = None, width: int = 0
) -> Tensor:
    """float64 [N], or [N, width], finite; where an entry has none, the default.

    Raises:
        DataError: an entry has something else.
    """
    shape = (len(entries), width) if width else (len(entries),)
    values = [default if entry.get(key) in (None, []) else entry[key] for entry in entries]
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        found = torch.tensor(values, dtype=torch.float64)
        found = found if len(entries) else found.reshape(shape)
        if found.shape == shape and (found.isfinite() | (default is math.nan)).all():
            return found
    for entry, value in zip(entries, values, strict=True):
        if not _is_finite(value, width) and (default is None or value is not default):
            raise _fault(path, entry, f"has the {key} {value!r}, not {_FORMS[width]}")
    raise AssertionError(f"{path}: {key}")


_FORMS = {0: "a finite number", 4: "[x, y, width, height], four finite numbers"}


def _is_finite(value: Any, width: int) -> bool:
    values = value if width and isinstance(value, list | tuple) else [value]
    return len(values) == max(width, 1) and all(
        isinstance(it, int | float) and abs(it) < 1e300 for it in values
    )


def _fault(path: Path, entry: dict[str, Any], text: str) -> DataError:
    number = f" (id {entry['id']!r})" if "id" in entry else ""
    return DataError(f"{path}: an object of image {entry['image_id']!r}{number} {text}")


def _masks(
    entries: list[dict[str, Any]], sizes: list[Size], path: Path, are_results: bool
) -> RunLengths:
    strings = []
    for entry, size in zip(entries, sizes, strict=True):
        try:
            strings.append(_counts(entry.get("segmentation"), size, are_results))
        except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
            raise _fault(path, entry, f"has a segmentation that is wrong: {error}") from None
    parts = [from_strings([], [])]
    for part in chunks(torch.tensor([len(text) for text in strings]), MOST_LETTERS):
        try:
            parts.append(from_strings(strings[part], sizes[part]))
        except ValueError:
            for entry, text, size in zip(entries[part], strings[part], sizes[part], strict=True):
                try:
                    from_strings([text], [size])
                except ValueError as error:
                    what = f"has a segmentation that is wrong: {error}"
                    raise _fault(path, entry, what) from None
            raise
    return join(parts)


def _counts(segmentation: Any, size: Size, are_results: bool) -> str | bytes:
    """The compressed counts of a segmentation; polygons are drawn by pycocotools."""
    from pycocotools import mask

    if not all(isinstance(side, int) for side in size):
        raise ValueError("its image is listed without `height` and `width`")
    if segmentation is None or (are_results and not segmentation):
        raise ValueError("it is missing or empty: give polygons, or `size` and `counts`")
    if isinstance(segmentation, list):  # an annotation without any is a box without a mask
        rings = polygon_rings(segmentation, *size)
        if rings:
            return mask.merge(mask.frPyObjects(rings, *size))["counts"]
        segmentation = {"size": size, "counts": [size[0] * size[1]]}
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise ValueError("give polygons, or an RLE with `size` and `counts`")
    if list(segmentation["size"]) != list(size):
        raise ValueError(f"its size {segmentation['size']} is not its image's {list(size)}")
    if isinstance(segmentation["counts"], list):
        return mask.frPyObjects(segmentation, *size)["counts"]
    if not isinstance(segmentation["counts"], str | bytes):
        raise ValueError("its `counts` must be a text or a list of runs")
    return segmentation["counts"]
