"""Numbers for predictions in files, whichever program wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch

from vitdense.data.base import DataError
from vitdense.data.classes import NAMES, read_classes
from vitdense.data.images import list_images, read_labels
from vitdense.engine import checkpoint
from vitdense.inference.report import table, to_json
from vitdense.metrics import coco_files, panoptic_files
from vitdense.metrics.backends import Backend
from vitdense.metrics.backends import score as score_objects
from vitdense.metrics.coco import limits_to, summarize
from vitdense.metrics.matching import Rules
from vitdense.metrics.miou import MeanIoU
from vitdense.structures import IGNORE, Batch, Frame, Prediction, Target

Kind = Literal["bbox", "segm", "panoptic", "semantic"]


def score(
    kind: Kind,
    truth: Path,
    predictions: Path,
    *,
    backend: Backend = "auto",
    max_detections: int = 100,
    classes: Path | None = None,
    absent: Literal["skip", "zero"] = "skip",
    json_path: Path | None = None,
) -> dict[str, float]:
    """Score files, print a table, and write the numbers as `results.json` has them.

    Args:
        kind: bbox, segm: COCO's JSON files; panoptic: COCO's JSON files, each beside its folder of
            maps; semantic: folders of label maps, 0 and 255 for ignored, else from 1.
        truth, predictions: what is compared.
        backend: for bbox and segm, who computes.
        max_detections: for bbox and segm, best detections of an image and class that count.
        classes: for semantic, the file of class names; by default one beside the folder or above.
        absent: for semantic, whether classes without pixels are left out or count as 0.
        json_path: file for the numbers.

    Raises:
        DataError: files are missing or wrong.
        ValueError: the backend is not installed.
    """
    if kind == "panoptic":
        numbers = panoptic_files.score_files(truth, predictions)
    elif kind == "semantic":
        numbers = score_label_maps(truth, predictions, classes, absent)
    else:
        numbers = score_detections(kind, truth, predictions, backend, max_detections)
    print(table(numbers))
    if json_path is not None:
        checkpoint.write_text(json_path, to_json(numbers))
    return numbers


def score_detections(
    kind: Literal["bbox", "segm"],
    truth_path: Path,
    results_path: Path,
    backend: Backend = "auto",
    max_detections: int = 100,
) -> dict[str, float]:
    """The numbers of the `coco` metric, with boxes and areas as the files have them."""
    if max_detections <= 10:
        raise ValueError("max_detections: must be above 10, beside which AR1 and AR10 stand")
    truth = coco_files.read_truth(truth_path, kind)
    found = coco_files.read_results(results_path, truth, kind)
    rules = Rules(limits=limits_to(max_detections))
    curves = score_objects(truth.objects, found, len(truth.classes), rules, backend)
    return summarize(curves, truth.classes, rules.limits)


def score_label_maps(
    truth: Path,
    predictions: Path,
    classes: Path | None = None,
    absent: Literal["skip", "zero"] = "skip",
) -> dict[str, float]:
    """The numbers of the `miou` metric for two folders of label maps of the same names."""
    names = list_images(truth)
    if not names:
        raise DataError(f"{truth}: no label maps in this folder")
    metric = MeanIoU(read_classes(classes or _find_classes(truth), 1), absent=absent)
    folder = predictions / "labels" if (predictions / "labels").is_dir() else predictions
    for number, name in enumerate(names):
        there, answer = _read(truth / name), _read(folder / f"{Path(name).stem}.png")
        size = (there.shape[0], there.shape[1])
        batch = Batch(
            images=torch.zeros(1, 3, 1, 1, dtype=torch.uint8),
            targets=[Target(semantic=there)],
            frames=[Frame(size, size, size)],
            image_ids=[number],
            paths=[folder / f"{Path(name).stem}.png"],
        )
        try:
            metric.update([Prediction(semantic=answer)], batch)
        except ValueError as error:
            raise DataError(str(error)) from None
    try:
        return metric.compute()
    except ValueError as error:
        raise DataError(f"{error} (labels in the files are one higher)") from None


def _read(path: Path) -> torch.Tensor:
    """A label map with classes from 0, and IGNORE for 0 and 255."""
    labels = torch.from_numpy(read_labels(path).astype(np.int64))
    return torch.where((labels == 0) | (labels == IGNORE), IGNORE, labels - 1)


def _find_classes(folder: Path) -> Path:
    places = [folder, *list(folder.resolve().parents)[:2]]
    for path in (place / name for place in places for name in NAMES):
        if path.is_file():
            return path
    raise DataError(
        f"{folder}: no file of class names ({', '.join(NAMES)}) there or above; give --classes FILE"
    )
