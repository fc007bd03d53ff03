"""COCO's annotation and result files as objects to match."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vitdense.data.base import DataError
from vitdense.data.coco_file import read_json
from vitdense.metrics.objects import Objects
from vitdense.ops.run_length import RunLengths, from_strings
from vitdense.structures import Size

log = logging.getLogger(__name__)

Kind = Literal["bbox", "segm"]


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
    """

    path: Path
    classes: list[str]
    labels: dict[int, int]
    images: dict[int | str, int]
    sizes: list[Size]
    objects: Objects


def read_truth(path: Path, kind: Kind) -> Truth:
    """Read an annotation file as pycocotools does: boxes and areas as they are written.

    Raises:
        DataError: the file is missing or wrong.
    """
    return truth_of(read_json(path), path, kind)


def truth_of(content: dict[str, Any], path: Path, kind: Kind) -> Truth:
    """The same from the content of the file."""
    try:
        named = sorted((entry["id"], entry["name"]) for entry in content["categories"])
        listed = sorted((e["id"], e.get("height"), e.get("width")) for e in content["images"])
        truth = Truth(
            path=path,
            classes=[name for _, name in named],
            labels={key: label for label, (key, _) in enumerate(named)},
            images={key: place for place, (key, *_) in enumerate(listed)},
            sizes=[(height, width) for _, height, width in listed],
            objects=None,  # type: ignore[arg-type]
        )
        truth.objects = to_objects(content["annotations"], truth, path, kind)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: is no annotation file of COCO ({error!r})") from None
    return truth


def read_results(path: Path, truth: Truth, kind: Kind) -> Objects:
    """Read a result file: a list of detections, each with image_id, category_id and score.

    For `segm` the area is the mask's, also where a box is written beside it. Detections of
    categories that the truth has not are left out, and counted in a warning.

    Raises:
        DataError: the file is missing or wrong, or has an image that the truth has not.
    """
    return results_of(read_list(path), path, truth, kind)


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
    known = [entry for entry in entries if entry.get("category_id") in truth.labels]
    if len(known) < len(entries):
        log.warning(
            "%s: %d of %d detections are of categories that %s has not, and do not count",
            path, len(entries) - len(known), len(entries), truth.path,
        )  # fmt: skip
    odd = next((e for e in known if e.get("image_id") not in truth.images), None)
    if odd is not None:
        raise DataError(
            f"{path}: a detection is of image {odd.get('image_id')!r}, which {truth.path} does "
            "not list; score the file with the truth of its split"
        )
    try:
        return to_objects(known, truth, path, kind, are_results=True)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: is no result file of COCO ({error!r})") from None


def to_objects(
    entries: list[dict[str, Any]], truth: Truth, path: Path, kind: Kind, are_results: bool = False
) -> Objects:
    """Annotations as the objects of a file.

    Raises:
        DataError: an entry is wrong.
    """
    places = [truth.images[entry["image_id"]] for entry in entries]
    masks = None
    if kind == "segm":
        masks = _masks(entries, [truth.sizes[place] for place in places], path)
    none = [0.0] * 4 if masks is not None else None
    boxes = _column(entry.get("bbox", none) for entry in entries).reshape(-1, 4)
    measured = boxes[:, 2] * boxes[:, 3] if masks is None else masks.areas().double()
    areas = _column(None if are_results else entry.get("area") for entry in entries)
    return Objects(
        images=torch.tensor(places, dtype=torch.int64),
        labels=torch.tensor([truth.labels[entry["category_id"]] for entry in entries]).long(),
        boxes=boxes,
        areas=torch.where(areas.isnan(), measured, areas),
        scores=_column(entry["score"] if are_results else 1.0 for entry in entries),
        crowd=torch.tensor([not are_results and bool(e.get("iscrowd")) for e in entries]).bool(),
        rows=torch.arange(len(entries)),
        masks=masks,
    )


def _column(values: Iterable[Any]) -> Tensor:
    nan = float("nan")
    return torch.tensor([nan if v is None else v for v in values], dtype=torch.float64)


def _masks(entries: list[dict[str, Any]], sizes: list[Size], path: Path) -> RunLengths:
    strings = []
    for entry, size in zip(entries, sizes, strict=True):
        try:
            strings.append(_counts(entry.get("segmentation"), size))
        except (ValueError, TypeError, IndexError, KeyError) as error:
            where = f"of image {entry['image_id']!r} (id {entry.get('id', 'not given')})"
            raise DataError(f"{path}: the segmentation {where} is wrong: {error}") from None
    try:
        return from_strings(strings, sizes)
    except ValueError as error:
        raise DataError(f"{path}: {error} (counted from 0)") from None


def _counts(segmentation: Any, size: Size) -> str | bytes:
    """The compressed counts of a segmentation; polygons are drawn by pycocotools."""
    from pycocotools import mask

    if not segmentation:
        raise ValueError("it is missing or empty: give polygons, or `size` and `counts`")
    if isinstance(segmentation, list):
        return mask.merge(mask.frPyObjects(segmentation, *size))["counts"]
    if list(segmentation["size"]) != list(size):
        raise ValueError(f"its size {segmentation['size']} is not its image's {list(size)}")
    if isinstance(segmentation["counts"], list):
        return mask.frPyObjects(segmentation, *size)["counts"]
    return segmentation["counts"]
