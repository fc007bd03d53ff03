"""LVIS's annotation file beside a result file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vitdense.data.base import DataError
from vitdense.data.coco_file import read_json
from vitdense.metrics.average_precision import accumulate
from vitdense.metrics.coco_files import Truth, read_list, results_of, truth_of
from vitdense.metrics.lvis import GROUPS, judge, summarize, with_area
from vitdense.metrics.matching import Rules, match


def score_files(
    truth_path: Path,
    results_path: Path,
    *,
    iou_type: Literal["bbox", "segm"] | None = None,
    max_detections: int = 300,
) -> dict[str, float]:
    """The numbers of the `lvis` metric, with boxes and areas as the files have them.

    Args:
        iou_type: what is compared; by default masks if the results have them.
        max_detections: best detections of an image, over all classes.

    Raises:
        DataError: files are missing or wrong.
        ValueError: no detection would count.
    """
    if max_detections < 1:
        raise ValueError("max_detections: must be 1 or more")
    entries = read_list(results_path)
    if iou_type is None:
        iou_type = "segm" if entries and "segmentation" in entries[0] else "bbox"
    content = read_json(truth_path)
    truth = truth_of(content, truth_path, iou_type)
    truth.objects = with_area(truth.objects)
    found = results_of(entries, results_path, truth, iou_type)
    frequencies, judged, partial = _rules(content, truth)
    found = judge(found, 0, judged, partial, max_detections)
    rules = Rules(limits=(max_detections,))
    curves = accumulate(match(truth.objects, found, len(truth.classes), rules), rules)
    return summarize(curves, truth.classes, frequencies, max_detections)


def _rules(content: dict[str, Any], truth: Truth) -> tuple[list[str], Tensor, Tensor]:
    """Frequencies of the classes; which are judged and which partial in each image."""
    judged = torch.zeros(len(truth.images), len(truth.classes), dtype=torch.bool)
    partial = judged.clone()
    judged[truth.objects.images, truth.objects.labels] = True
    try:
        for flags, key in ((judged, "neg_category_ids"), (partial, "not_exhaustive_category_ids")):
            for image in content["images"]:
                flags[truth.images[image["id"]], [truth.labels[its] for its in image[key]]] = True
        by_label = {truth.labels[its["id"]]: its["frequency"] for its in content["categories"]}
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{truth.path}: is no annotation file of LVIS ({error!r}); score COCO's with --kind "
            "bbox or segm"
        ) from None
    odd = next((its for its in by_label.values() if its not in GROUPS), None)
    if odd is not None:
        raise DataError(f"{truth.path}: a category has the frequency {odd!r}; LVIS's are r, c or f")
    return [by_label[label] for label in range(len(by_label))], judged, partial
