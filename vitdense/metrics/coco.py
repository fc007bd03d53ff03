"""COCO's average precision and recall of boxes or masks."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import PositiveInt
from torch import Tensor

from vitdense.metrics.average_precision import RECALLS, Curves, accumulate
from vitdense.metrics.backends import Backend, choose, score_by_program
from vitdense.metrics.matching import Rules, match
from vitdense.metrics.object_metric import ObjectMetric
from vitdense.metrics.objects import join
from vitdense.metrics.processes import gather, gather_matches
from vitdense.registry import METRICS
from vitdense.structures import Batch, Prediction


@METRICS.register("coco")
class CocoMetric(ObjectMetric):
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
        iou_type: Literal["bbox", "segm", "boundary"]
        | None = None,  # boxes, masks, or their outlines; by default masks if the task is instance
        boxes_too: bool = False,  # with masks: also the 12 numbers of boxes, as `box_AP`, ...
        max_detections: PositiveInt = 100,  # best detections of an image and class that count
        class_agnostic: bool = False,  # take all objects for one class, as for proposals
        backend: Literal[
            "auto", "device", "pycocotools", "hotcoco", "faster-coco-eval"
        ] = "auto",  # who computes it; `device`, which `auto` takes, stays with the predictions
    ) -> None:
        if max_detections <= 10:
            raise ValueError("max_detections: must be above 10, beside which AR1 and AR10 stand")
        iou_type = iou_type or "bbox"
        if boxes_too and iou_type == "bbox":
            raise ValueError("boxes_too: is for iou_type segm or boundary; bbox has none beside")
        self.backend: Backend = choose(backend)
        if iou_type == "boundary" and self.backend != "device":
            raise ValueError(f"backend: {backend} knows no iou_type boundary; take `device`")
        self.boxes = None
        if boxes_too:
            self.boxes = CocoMetric(
                classes,
                max_detections=max_detections,
                class_agnostic=class_agnostic,
                backend=backend,
            )
        self.rules = Rules(limits=limits_to(max_detections), class_agnostic=class_agnostic)
        super().__init__(classes, iou_type)

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        if self.boxes is not None:
            self.boxes.reset()

    def update(self, predictions: list[Prediction], batch: Batch) -> None:
        """Count one batch in; needs labels and boxes, and masks unless `bbox` is compared."""
        super().update(predictions, batch)
        if self.boxes is not None:
            self.boxes.update(predictions, batch)

    def compute(self) -> dict[str, float]:
        """The numbers over all images of all processes, as fractions in 0..1."""
        classes = [] if self.rules.class_agnostic else self.classes
        numbers = summarize(self.curves(), classes, self.rules.limits)
        if self.boxes is None:
            return numbers
        of_boxes = self.boxes.compute().items()
        return numbers | {f"box_{name}": value for name, value in of_boxes if "/" not in name}

    def curves(self) -> Curves:
        """Precision, recall and scores over all images of all processes.

        Each process matches its own images; where `backend` is another program, that of every
        process gets the objects of all.
        """
        truth, detections = self.held()
        if self.backend == "device":
            matches = match(truth, detections, len(self.classes), self.rules)
            return accumulate(gather_matches(matches), self.rules)
        everything = gather((truth.to("cpu"), detections.to("cpu")))
        truth, detections = (join(parts) for parts in zip(*everything, strict=True))
        return score_by_program(truth, detections, len(self.classes), self.rules, self.backend)


def limits_to(max_detections: int) -> tuple[int, ...]:
    """The limits for which recall is told: 1, 10, a higher `max_detections`, and 100 below it."""
    return tuple(sorted({1, 10, min(100, max_detections), max_detections}))


def summarize(curves: Curves, classes: list[str], limits: tuple[int, ...]) -> dict[str, float]:
    """COCO's 12 numbers, and `AP/<class>`, `F1/<class>` and `threshold/<class>` where defined.

    Args:
        limits: those of the curves, each with its average recall.
    """
    everything, small, medium, large = range(4)
    precision, recall = curves.precision, curves.recall
    numbers = {
        "AP": mean_of_defined(precision[..., everything, -1]),
        "AP50": mean_of_defined(precision[0, ..., everything, -1]),
        "AP75": mean_of_defined(precision[5, ..., everything, -1]),
        "APs": mean_of_defined(precision[..., small, -1]),
        "APm": mean_of_defined(precision[..., medium, -1]),
        "APl": mean_of_defined(precision[..., large, -1]),
        **{
            f"AR{n}": mean_of_defined(recall[..., everything, place])
            for place, n in enumerate(limits)
        },
        "ARs": mean_of_defined(recall[..., small, -1]),
        "ARm": mean_of_defined(recall[..., medium, -1]),
        "ARl": mean_of_defined(recall[..., large, -1]),
    }
    each = {
        f"AP/{name}": mean_of_defined(precision[:, :, label, everything, -1])
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


def mean_of_defined(values: Tensor) -> float:
    """The mean of those above -1; NaN if there are none."""
    defined = values[values > -1]
    return float(defined.mean()) if len(defined) else math.nan
