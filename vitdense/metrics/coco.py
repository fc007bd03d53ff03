"""COCO's average precision and recall of boxes or masks, scored by pycocotools in memory."""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from pydantic import PositiveInt
from torch import Tensor

from vitdense.metrics.base import Metric
from vitdense.ops.masks import mask_to_rle
from vitdense.registry import METRICS
from vitdense.structures import Batch, Prediction, Size, Target

IouType = Literal["bbox", "segm"]
Rle = dict[str, Any]
"""A mask in pycocotools' compressed run lengths: `size` (height, width) and `counts`."""


@dataclass(slots=True)
class Objects:
    """Objects of one image, on the host.

    Attributes:
        labels: int64 [N].
        boxes: float64 [N, 4], xyxy in original pixels.
        scores: float64 [N]; of truth all 1.
        crowd: bool [N], regions that are ignored.
        area: float64 [N], square pixels, chooses the size range.
        rles: the masks, for `segm`.
    """

    labels: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    crowd: np.ndarray
    area: np.ndarray
    rles: list[Rle] | None = None


@dataclass(slots=True)
class Pair:
    """Truth and detections of one image with its size."""

    size: Size
    truth: Objects
    detections: Objects


@METRICS.register("coco")
class CocoMetric(Metric):
    """COCO's 12 numbers and the AP of each class, equal to pycocotools'.

    A number without objects of its size is NaN, pycocotools' -1; an absent class has no number.
    An image that comes twice, as padded distributed samplers send it, counts once.
    """

    headline = "AP"

    def __init__(
        self,
        classes: list[str],
        *,
        iou_type: Literal["bbox", "segm"] = "bbox",  # overlap of boxes or of masks
        max_detections: PositiveInt = 100,  # best detections of an image and class that count
    ) -> None:
        super().__init__(classes)
        if max_detections <= 10:
            raise ValueError("max_detections: must be above 10, beside which AR1 and AR10 stand")
        self.iou_type: IouType = iou_type
        self.max_detections = max_detections
        self.pairs: dict[int | str, Pair] = {}

    def update(self, predictions: list[Prediction], batch: Batch) -> None:
        """Count one batch in; needs labels and boxes, for `segm` also masks."""
        detections = collect_detections(predictions, self.iou_type)
        for image_id, frame, target, found in zip(
            batch.image_ids, batch.frames, batch.targets, detections, strict=True
        ):
            truth = collect_truth(target, self.iou_type)
            self.pairs.setdefault(image_id, Pair(frame.original, truth, found))

    def compute(self) -> dict[str, float]:
        """The numbers over all images of all processes, as fractions in 0..1."""
        pairs = gather(self.pairs)
        precision, recall = score(pairs, len(self.classes), self.iou_type, self.max_detections)
        return summarize(precision, recall, self.classes, self.max_detections)

    def reset(self) -> None:
        """Forget all images."""
        self.pairs = {}


def collect_detections(predictions: list[Prediction], iou_type: IouType) -> list[Objects]:
    """Detections per image on the host, copied from the device at once."""
    parts = []
    for prediction in predictions:
        scores, labels, boxes = _present(prediction, "scores", "labels", "boxes")
        parts.append(torch.cat([boxes.double(), scores[:, None], labels[:, None]], 1))
    rows = torch.cat(parts).cpu().numpy()
    ends = np.cumsum([len(part) for part in parts])[:-1]
    return [
        _detections(image, prediction, iou_type)
        for image, prediction in zip(np.split(rows, ends), predictions, strict=True)
    ]


def _detections(rows: np.ndarray, prediction: Prediction, iou_type: IouType) -> Objects:
    boxes, scores, labels = rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64)
    rles = None
    area = _box_area(boxes)
    if iou_type == "segm":
        (masks,) = _present(prediction, "masks")
        rles = encode(masks)
        area = _rle_area(rles)
    return Objects(labels, boxes, scores, np.zeros(len(labels), bool), area, rles)


def collect_truth(target: Target, iou_type: IouType) -> Objects:
    """Truth of one image on the host; the area is the mask's or the box's where none is given."""
    labels, boxes = (values.cpu().numpy() for values in _present(target, "labels", "boxes"))
    boxes = boxes.astype(np.float64)
    rles = encode(*_present(target, "masks")) if iou_type == "segm" else None
    if target.area is not None:
        area = target.area.double().cpu().numpy()
    else:
        area = _box_area(boxes) if rles is None else _rle_area(rles)
    none = np.zeros(len(labels), bool)
    crowd = none if target.crowd is None else target.crowd.cpu().numpy()
    return Objects(labels, boxes, np.ones(len(labels)), crowd, area, rles)


def _present(holder: Prediction | Target, *names: str) -> list[Tensor]:
    values = [getattr(holder, name) for name in names]
    for name, value in zip(names, values, strict=True):
        if value is None:
            kind = type(holder).__name__.lower()
            raise ValueError(f"metric coco: the {kind} has no {name}, which it compares")
    return values


def _box_area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _rle_area(rles: list[Rle]) -> np.ndarray:
    from pycocotools import mask

    return np.asarray(mask.area(rles), dtype=np.float64).reshape(-1)


def encode(masks: Tensor) -> list[Rle]:
    """Bool masks [N, H, W] as compressed run lengths."""
    return [mask_to_rle(mask) for mask in masks.cpu()]


def gather(pairs: dict[int | str, Pair]) -> list[Pair]:
    """The images of all processes, each once, in the order of their ids.

    The order decides between equal scores, so it must not depend on how images were spread.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, pairs)
        pairs = {image_id: pair for share in shares for image_id, pair in share.items()}
    return [pairs[key] for key in sorted(pairs, key=lambda key: (isinstance(key, str), key))]


def score(
    pairs: list[Pair], num_classes: int, iou_type: IouType, max_detections: int
) -> tuple[np.ndarray, np.ndarray]:
    """Match detections to truth and accumulate, by pycocotools.

    Returns:
        precision [T, R, K, A, M] and recall [T, K, A, M] over T IoU thresholds 0.5..0.95, R recall
        levels, K classes, A sizes (all, small, medium, large) and M limits (1, 10,
        `max_detections`); -1 where undefined.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        from pycocotools.cocoeval import COCOeval

        truth = _coco([pair.truth for pair in pairs], pairs, num_classes)
        found = _coco([pair.detections for pair in pairs], pairs, num_classes)
        evaluation = COCOeval(truth, found, iou_type)
        evaluation.params.maxDets = [1, 10, max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def _coco(images: list[Objects], pairs: list[Pair], num_classes: int) -> Any:
    """pycocotools' index over the objects; ids count from 1, as it takes 0 for "no match"."""
    from pycocotools.coco import COCO

    annotations: list[dict[str, Any]] = []
    for image_id, objects in enumerate(images):
        for index, (x1, y1, x2, y2) in enumerate(objects.boxes.tolist()):
            entry = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": int(objects.labels[index]),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": float(objects.scores[index]),
                "iscrowd": int(objects.crowd[index]),
                "area": float(objects.area[index]),
            }
            if objects.rles is not None:
                entry["segmentation"] = objects.rles[index]
            annotations.append(entry)
    index = COCO()
    index.dataset = {
        "images": [
            {"id": image_id, "height": pair.size[0], "width": pair.size[1]}
            for image_id, pair in enumerate(pairs)
        ],
        "categories": [{"id": label} for label in range(num_classes)],
        "annotations": annotations,
    }
    index.createIndex()
    return index


def summarize(
    precision: np.ndarray, recall: np.ndarray, classes: list[str], max_detections: int
) -> dict[str, float]:
    """COCO's 12 numbers and `AP/<class>` from the arrays of `score`."""
    everything, small, medium, large = range(4)
    numbers = {
        "AP": _mean(precision[..., everything, -1]),
        "AP50": _mean(precision[0, ..., everything, -1]),
        "AP75": _mean(precision[5, ..., everything, -1]),
        "APs": _mean(precision[..., small, -1]),
        "APm": _mean(precision[..., medium, -1]),
        "APl": _mean(precision[..., large, -1]),
        "AR1": _mean(recall[..., everything, 0]),
        "AR10": _mean(recall[..., everything, 1]),
        f"AR{max_detections}": _mean(recall[..., everything, -1]),
        "ARs": _mean(recall[..., small, -1]),
        "ARm": _mean(recall[..., medium, -1]),
        "ARl": _mean(recall[..., large, -1]),
    }
    per_class = {
        f"AP/{name}": _mean(precision[:, :, label, everything, -1])
        for label, name in enumerate(classes)
    }
    return numbers | {name: value for name, value in per_class.items() if not math.isnan(value)}


def _mean(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else math.nan
