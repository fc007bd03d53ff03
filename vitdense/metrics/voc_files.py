"""Pascal VOC's annotations beside its detection files, or beside a result file of COCO's format."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from vitdense.data.base import DataError
from vitdense.data.classes import find_classes, read_entries
from vitdense.data.voc import CLASSES
from vitdense.data.voc_file import VocObject, read_objects, read_split
from vitdense.metrics.coco_files import Truth, read_results
from vitdense.metrics.objects import Objects
from vitdense.metrics.voc import by_image, match, summarize

DETECTIONS = re.compile(r"(?:.*_)?det_[^_]+_(?P<name>.+)\.txt")
"""Names of VOC's detection files, as comp4_det_val_car.txt."""

Detection = tuple[int, int, list[float], float]
"""Image, label, box and score."""


def score_files(
    truth_path: Path,
    predictions: Path,
    *,
    split: str | None = None,
    classes: Path | None = None,
    iou: float = 0.5,
    points: Literal[11, "all"] = "all",
) -> dict[str, float]:
    """The numbers of the `voc` metric.

    Args:
        truth_path: a folder like VOC2012, or one of annotations alone.
        predictions: a folder of VOC's detection files, one per class, whose boxes name their
            first and last pixels from 1 on; or a result file of COCO's format, where images are
            named without ending, categories count from 1, and boxes are x, y, width, height.
        split: in a folder like VOC2012, the list of images; `val` by default. Of a folder of
            annotations all are taken.
        classes: file of class names; by default classes.json or .txt in the folder, or VOC's 20.

    Raises:
        DataError: files are missing or wrong.
        ValueError: every overlap would do.
    """
    if not 0 < iou <= 1:
        raise ValueError("iou: must be above 0 and at most 1")
    truth = read_truth(truth_path, split, classes)
    if predictions.is_file():
        found = by_image(read_results(predictions, truth, "bbox"))
    else:
        found = read_detections(predictions, truth)
    matches = match(truth.objects, found, len(truth.classes), iou)
    return summarize(matches, truth.classes, points)


def read_truth(path: Path, split: str | None, classes: Path | None) -> Truth:
    """Annotated objects from edge to edge of their pixels; difficult ones are crowds."""
    if (path / "Annotations").is_dir():
        folder = path / "Annotations"
        stems = sorted(read_split(path, "ImageSets/Main", split or "val"))
    else:
        folder, stems = path, sorted(file.stem for file in path.glob("*.xml"))
    if not stems:
        raise DataError(f"{path}: has no XML files of VOC, and no folder Annotations")
    file = classes or find_classes(path, None, ("classes.json", "classes.txt"))
    names = list(CLASSES) if file is None else [entry.name for entry in read_entries(file)]
    truth = Truth(
        path=path,
        classes=names,
        labels={1 + label: label for label in range(len(names))},
        images={stem: place for place, stem in enumerate(stems)},
        sizes=[],
        objects=None,  # type: ignore[arg-type]
    )
    listed: list[Detection] = []
    hard: list[bool] = []
    for place, stem in enumerate(stems):
        for it in read_objects(folder / f"{stem}.xml", _ANY_SIZE):
            listed.append((place, _label(it, names, folder / f"{stem}.xml"), it.box, 1.0))
            hard.append(it.difficult)
    truth.objects = replace(_objects(listed), crowd=torch.tensor(hard, dtype=torch.bool))
    return truth


_ANY_SIZE = (2**31, 2**31)
"""Boxes are taken as they are written, whatever the image's size."""


def _label(it: VocObject, names: list[str], path: Path) -> int:
    if it.name not in names:
        raise DataError(
            f"{path}: has an object {it.name!r}, which is no class; give a file of all with "
            "--classes"
        )
    return names.index(it.name)


def read_detections(folder: Path, truth: Truth) -> Objects:
    """VOC's detection files: a line is image, score, and the first and last pixels from 1 on.

    The order of the lines decides between equal scores, as in the kit.

    Raises:
        DataError: there are none, or one is wrong, or has an unknown class or image.
    """
    files = {path: DETECTIONS.fullmatch(path.name) for path in sorted(folder.glob("*.txt"))}
    listed: list[Detection] = []
    for path, name in files.items():
        if name is None:
            continue
        if name["name"] not in truth.classes:
            raise DataError(f"{path}: {name['name']!r} is no class of {truth.path}; see --classes")
        label = truth.classes.index(name["name"])
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        listed += [
            _detection(line, label, truth, f"{path}:{number}")
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
    if not any(files.values()):
        raise DataError(
            f"{folder}: has no detection files of VOC, as comp4_det_val_{truth.classes[0]}.txt"
        )
    return _objects(listed)


def _detection(line: str, label: int, truth: Truth, where: str) -> Detection:
    stem, *rest = line.split()
    try:
        score, x1, y1, x2, y2 = map(float, rest)
    except ValueError:
        score = x1 = y1 = x2 = y2 = math.nan
    if not all(map(math.isfinite, (score, x1, y1, x2, y2))):
        raise DataError(
            f"{where}: must be an image, a score, and xmin, ymin, xmax and ymax, finite numbers"
        )
    if stem not in truth.images:
        raise DataError(f"{where}: is of image {stem!r}, which is not among those of {truth.path}")
    return truth.images[stem], label, [x1 - 1, y1 - 1, x2, y2], score


def _objects(listed: list[Detection]) -> Objects:
    """Objects with boxes of xyxy."""
    boxes = torch.tensor([box for _, _, box, _ in listed], dtype=torch.float64).reshape(-1, 4)
    sides = boxes[:, 2:] - boxes[:, :2]
    return Objects(
        images=torch.tensor([image for image, *_ in listed], dtype=torch.int64),
        labels=torch.tensor([label for _, label, *_ in listed], dtype=torch.int64),
        boxes=torch.cat([boxes[:, :2], sides], 1),
        areas=sides.prod(1),
        scores=torch.tensor([score for *_, score in listed], dtype=torch.float64),
        crowd=torch.zeros(len(listed), dtype=torch.bool),
        rows=torch.arange(len(listed)),
    )
