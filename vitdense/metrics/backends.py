"""COCO's curves by each program that computes them; all give the same."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from typing import Any, Literal

import torch

from vitdense.metrics.average_precision import Curves, accumulate
from vitdense.metrics.matching import Rules, match
from vitdense.metrics.objects import Objects

Backend = Literal["auto", "device", "pycocotools", "hotcoco", "faster-coco-eval"]

PROGRAMS = {
    "pycocotools": ("pycocotools.coco", "pycocotools.cocoeval", "COCOeval"),
    "hotcoco": ("hotcoco", "hotcoco", "COCOeval"),
    "faster-coco-eval": ("faster_coco_eval", "faster_coco_eval", "COCOeval_faster"),
}
"""Where each has its index of annotations, its evaluation, and what that is called."""


def choose(backend: Backend) -> Backend:
    """The backend that is meant; `auto` is `device`, from tensors the fastest on every device.

    Raises:
        ValueError: it is not installed.
    """
    if backend in ("auto", "device"):
        return "device"
    package = PROGRAMS[backend][0].partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"backend: {backend} is not installed; `pip install {backend}`, or take `device`, "
            "which gives the same numbers"
        )
    return backend


def score(
    truth: Objects, detections: Objects, classes: int, rules: Rules, backend: Backend = "auto"
) -> Curves:
    """Match and accumulate; by masks if the objects have them.

    Raises:
        ValueError: the backend is not installed.
    """
    backend = choose(backend)
    if backend == "device":
        return accumulate(match(truth, detections, classes, rules), rules)
    return score_by_program(truth, detections, classes, rules, backend)


def score_by_program(
    truth: Objects, detections: Objects, classes: int, rules: Rules, backend: Backend
) -> Curves:
    """The same by pycocotools or one that is called like it, at COCO's thresholds and areas."""
    index_module, module, name = PROGRAMS[backend]
    iou_type = "bbox" if truth.masks is None or detections.masks is None else "segm"
    count = 1 + max((int(o.images.max()) for o in (truth, detections) if len(o)), default=-1)
    with contextlib.redirect_stdout(io.StringIO()):
        indices = [_index(index_module, objects, count, classes) for objects in (truth, detections)]
        program: Any = importlib.import_module(module)
        evaluation = getattr(program, name)(*indices, iou_type)
        evaluation.params.maxDets = list(rules.limits)
        evaluation.params.useCats = int(not rules.class_agnostic)
        evaluation.evaluate()
        evaluation.accumulate()
    names = ("precision", "recall", "scores")
    return Curves(*(torch.as_tensor(evaluation.eval[name]).double() for name in names))


def _index(module: str, objects: Objects, images: int, classes: int) -> Any:
    dataset = {
        "images": [{"id": image, "height": 1, "width": 1} for image in range(images)],
        "categories": [{"id": label, "name": str(label)} for label in range(classes)],
        "annotations": to_annotations(objects),
    }
    program: Any = importlib.import_module(module)
    index = program.COCO
    if module == "hotcoco":
        return index(dataset)
    filled = index()
    filled.dataset = dataset
    filled.createIndex()
    return filled


def to_annotations(objects: Objects) -> list[dict[str, Any]]:
    """COCO's annotations; ids count from 1, because pycocotools takes 0 for "no match"."""
    names = ("images", "labels", "boxes", "areas", "scores", "crowd", "rows")
    columns = [getattr(objects, name).tolist() for name in names]
    texts = sizes = None
    if objects.masks is not None:
        texts, sizes = objects.masks.strings(), objects.masks.sizes.tolist()
    entries: list[dict[str, Any]] = []
    for image, label, box, area, confidence, crowd, row in zip(*columns, strict=True):
        entry = {
            "id": len(entries) + 1,
            "image_id": image,
            "category_id": label,
            "bbox": box,
            "score": confidence,
            "iscrowd": int(crowd),
            "area": area,
        }
        if texts is not None and sizes is not None:
            entry["segmentation"] = {"size": sizes[row], "counts": texts[row]}
        entries.append(entry)
    return entries
