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
    """The backend that is meant; `auto` is `device`, see docs/metrics.md for the measurement.

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
    _, module, name = PROGRAMS[backend]
    iou_type = "bbox" if truth.masks is None or detections.masks is None else "segm"
    with contextlib.redirect_stdout(io.StringIO()):
        program: Any = importlib.import_module(module)
        evaluation = getattr(program, name)(*index(truth, detections, classes, backend), iou_type)
        evaluation.params.maxDets = list(rules.limits)
        evaluation.params.useCats = int(not rules.class_agnostic)
        evaluation.evaluate()
        evaluation.accumulate()
    names = ("precision", "recall", "scores")
    return Curves(*(torch.as_tensor(evaluation.eval[name]).double() for name in names))


def index(truth: Objects, detections: Objects, classes: int, backend: Backend) -> list[Any]:
    """Truth and detections as a program's indices of annotations, which it compares."""
    count = 1 + max((int(o.images.max()) for o in (truth, detections) if len(o)), default=-1)
    listed = {
        "images": [{"id": image, "height": 1, "width": 1} for image in range(count)],
        "categories": [{"id": label, "name": str(label)} for label in range(classes)],
    }
    program: Any = importlib.import_module(PROGRAMS[backend][0])
    if backend == "hotcoco":
        return _from_arrays(program.COCO, truth.to("cpu"), detections.to("cpu"), listed)
    indices = [program.COCO(), program.COCO()]
    for one, objects in zip(indices, (truth, detections), strict=True):
        one.dataset = {**listed, "annotations": to_annotations(objects)}
        one.createIndex()
    return indices


def _from_arrays(
    program: Any, truth: Objects, detections: Objects, listed: dict[str, Any]
) -> list[Any]:
    """hotcoco takes columns, which spares a dictionary for each object."""
    there = program.from_arrays(
        **listed,
        image_ids=truth.images.numpy(),
        category_ids=truth.labels.numpy(),
        boxes=truth.boxes.numpy(),
        area=truth.areas.numpy(),
        iscrowd=truth.crowd.long().numpy(),
        segmentation=_segmentations(truth),
    )
    columns = [detections.images, *detections.boxes.unbind(1), detections.scores, detections.labels]
    table = torch.stack([column.double() for column in columns], 1).numpy()
    found = there.load_res(table, segmentation=_segmentations(detections))
    found.update_anns(
        ids=torch.arange(1, len(detections) + 1).numpy(), area=detections.areas.numpy()
    )
    return [there, found]


def _segmentations(objects: Objects) -> list[dict[str, Any]] | None:
    if objects.masks is None:
        return None
    texts, sizes = objects.masks.strings(), objects.masks.sizes.tolist()
    return [{"size": sizes[row], "counts": texts[row]} for row in objects.rows.tolist()]


def to_annotations(objects: Objects) -> list[dict[str, Any]]:
    """COCO's annotations; ids count from 1, because pycocotools takes 0 for "no match"."""
    names = ("images", "labels", "boxes", "areas", "scores", "crowd")
    columns = [getattr(objects, name).tolist() for name in names]
    masks = _segmentations(objects)
    entries: list[dict[str, Any]] = []
    for image, label, box, area, confidence, crowd in zip(*columns, strict=True):
        entry = {
            "id": len(entries) + 1,
            "image_id": image,
            "category_id": label,
            "bbox": box,
            "score": confidence,
            "iscrowd": int(crowd),
            "area": area,
        }
        if masks is not None:
            entry["segmentation"] = masks[len(entries)]
        entries.append(entry)
    return entries
