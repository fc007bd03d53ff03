"""COCO's average precision and recall of boxes or masks."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from vitdense.metrics.average_precision import RECALLS, Curves, accumulate
from vitdense.metrics.backends import Backend, choose, score_by_program
from vitdense.metrics.base import Metric
from vitdense.metrics.matching import Rules, match
from vitdense.metrics.objects import Objects, join
from vitdense.metrics.processes import gather, gather_matches, share
from vitdense.ops.run_length import RunLengths, encode
from vitdense.registry import METRICS
from vitdense.structures import Batch, Prediction, Target

IouType = Literal["bbox", "segm"]


@METRICS.register("coco")
class CocoMetric(Metric):
    """COCO's 12 numbers, each class's AP, best F1 and its threshold, equal to pycocotools'.

    With `boxes_too` the numbers of masks stand beside the 12 of the boxes, `box_AP` and so on.
    A number without objects of its size is NaN, pycocotools' -1; an absent class has no number.
    An image that comes twice, as padded distributed samplers send it, counts once.
    """

    headline = "AP"

    def __init__(
        self,
        classes: list[str],
        *,
        iou_type: Literal["bbox", "segm"] = "bbox",  # overlap of boxes or of masks
        boxes_too: bool = False,  # with segm: also the 12 numbers of boxes, as `box_AP`, ...
        max_detections: PositiveInt = 100,  # best detections of an image and class that count
        class_agnostic: bool = False,  # take all objects for one class, as for proposals
        backend: Literal[
            "auto", "device", "pycocotools", "hotcoco", "faster-coco-eval"
        ] = "auto",  # who computes it; `device`, which `auto` takes, stays with the predictions
    ) -> None:
        super().__init__(classes)
        if max_detections <= 10:
            raise ValueError("max_detections: must be above 10, beside which AR1 and AR10 stand")
        if boxes_too and iou_type == "bbox":
            raise ValueError("boxes_too: is for iou_type segm; bbox has no other numbers")
        self.iou_type: IouType = iou_type
        self.boxes = None
        if boxes_too:
            self.boxes = CocoMetric(
                classes,
                max_detections=max_detections,
                class_agnostic=class_agnostic,
                backend=backend,
            )
        self.rules = Rules(limits=(1, 10, max_detections), class_agnostic=class_agnostic)
        self.backend: Backend = choose(backend)
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self.image_ids: dict[int | str, int] = {}
        self.truth: list[Objects] = []
        self.detections: list[Objects] = []
        if self.boxes is not None:
            self.boxes.reset()

    def update(self, predictions: list[Prediction], batch: Batch) -> None:
        """Count one batch in; needs labels and boxes, for `segm` also masks."""
        for prediction, target, image_id in zip(
            predictions, batch.targets, batch.image_ids, strict=True
        ):
            if image_id in self.image_ids:
                continue
            image = len(self.image_ids)
            found = detected(image, prediction, self.iou_type)
            there = annotated(image, target.to(found.boxes.device), self.iou_type)
            self.image_ids[image_id] = image
            self.truth.append(there)
            self.detections.append(found)
        if self.boxes is not None:
            self.boxes.update(predictions, batch)

    def compute(self) -> dict[str, float]:
        """The numbers over all images of all processes, as fractions in 0..1."""
        classes = [] if self.rules.class_agnostic else self.classes
        numbers = summarize(self.curves(), classes, self.rules.limits[-1])
        if self.boxes is None:
            return numbers
        of_boxes = self.boxes.compute().items()
        return numbers | {f"box_{name}": value for name, value in of_boxes if "/" not in name}

    def curves(self) -> Curves:
        """Precision, recall and scores over all images of all processes.

        Each process matches its own images; where `backend` is another program, that of every
        process gets the objects of all.
        """
        places = torch.tensor(share(list(self.image_ids)), dtype=torch.int64)
        truth, detections = (_placed(join(p), places) for p in (self.truth, self.detections))
        if self.backend == "device":
            matches = match(truth, detections, len(self.classes), self.rules)
            return accumulate(gather_matches(matches), self.rules)
        everything = gather((truth.to("cpu"), detections.to("cpu")))
        truth, detections = (join(parts) for parts in zip(*everything, strict=True))
        return score_by_program(truth, detections, len(self.classes), self.rules, self.backend)


def _placed(objects: Objects, places: Tensor) -> Objects:
    """With the images' places among those of all processes, without those of place -1."""
    objects.images = places.to(objects.images.device)[objects.images]
    return objects.select((objects.images >= 0).nonzero()[:, 0])


def detected(image: int, prediction: Prediction, iou_type: IouType) -> Objects:
    """The detections of one image; of masks the area is theirs."""
    scores, labels, boxes = _present(prediction, "scores", "labels", "boxes")
    masks = encode(*_present(prediction, "masks")) if iou_type == "segm" else None
    crowd = torch.zeros_like(labels, dtype=torch.bool)
    return _objects(image, labels, boxes, None, scores, crowd, masks)


def annotated(image: int, target: Target, iou_type: IouType) -> Objects:
    """The truth of one image; the area is the mask's or the box's where none is given."""
    labels, boxes = _present(target, "labels", "boxes")
    masks = encode(*_present(target, "masks")) if iou_type == "segm" else None
    crowd = torch.zeros_like(labels) if target.crowd is None else target.crowd
    return _objects(image, labels, boxes, target.area, torch.ones_like(labels), crowd, masks)


def _objects(
    image: int,
    labels: Tensor,
    boxes: Tensor,
    areas: Tensor | None,
    scores: Tensor,
    crowd: Tensor,
    masks: RunLengths | None,
) -> Objects:
    boxes = boxes.double()
    sides = boxes[:, 2:] - boxes[:, :2]
    if areas is None:
        areas = sides.prod(1) if masks is None else masks.areas()
    return Objects(
        images=torch.full_like(labels, image, dtype=torch.int64),
        labels=labels.long(),
        boxes=torch.cat([boxes[:, :2], sides], 1),
        areas=areas.double(),
        scores=scores.double(),
        crowd=crowd.bool(),
        rows=torch.arange(len(labels), device=labels.device),
        masks=masks,
    )


def _present(holder: Prediction | Target, *names: str) -> list[Tensor]:
    values = [getattr(holder, name) for name in names]
    for name, value in zip(names, values, strict=True):
        if value is None:
            kind = type(holder).__name__.lower()
            raise ValueError(f"metric coco: the {kind} has no {name}, which it compares")
    return values


def summarize(curves: Curves, classes: list[str], max_detections: int) -> dict[str, float]:
    """COCO's 12 numbers, and `AP/<class>`, `F1/<class>` and `threshold/<class>` where defined."""
    everything, small, medium, large = range(4)
    precision, recall = curves.precision, curves.recall
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
    each = {
        f"AP/{name}": _mean(precision[:, :, label, everything, -1])
        for label, name in enumerate(classes)
    }
    f1, threshold = (values.tolist() for values in best_thresholds(curves))
    for label, name in enumerate(classes):
        each |= {f"F1/{name}": f1[label], f"threshold/{name}": threshold[label]}
    return numbers | {name: value for name, value in each.items() if not math.isnan(value)}


def best_thresholds(curves: Curves) -> tuple[Tensor, Tensor]:
    """Each class's highest F1 at an IoU of 0.5, and the score from which detections reach it.

    Over the 101 recall levels; NaN for absent classes, and the threshold where nothing is found.

    Returns:
        float64 [K], float64 [K].
    """
    precision, scores = curves.precision[0, :, :, 0, -1], curves.scores[0, :, :, 0, -1]
    recall = precision.new_tensor(RECALLS)[:, None]
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    best, level = f1.max(0)
    threshold = scores.gather(0, level[None])[0]
    absent = precision[0] < 0
    return best.masked_fill(absent, math.nan), threshold.masked_fill(absent | (best <= 0), math.nan)


def _mean(values: Tensor) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if len(defined) else math.nan
