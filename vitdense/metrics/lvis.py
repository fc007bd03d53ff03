"""Average precision of federated data sets, by LVIS's rules.

Gupta et al., "LVIS: A Dataset for Large Vocabulary Instance Segmentation", CVPR 2019, section 2.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from vitdense.metrics.average_precision import Curves, accumulate
from vitdense.metrics.coco import mean_of_defined
from vitdense.metrics.matching import Rules, match, places
from vitdense.metrics.object_metric import ObjectMetric
from vitdense.metrics.objects import Objects, by_score
from vitdense.metrics.processes import gather_matches
from vitdense.registry import METRICS
from vitdense.structures import Prediction, Target

GROUPS = ("r", "c", "f")
"""Rare, common and frequent classes."""


@METRICS.register("lvis")
class LvisMetric(ObjectMetric):
    """LVIS's AP, AR and each class's AP, equal to those of its own program.

    An image is judged for `Target.judged` classes only, and unmatched detections of its
    `Target.partial` classes are not wrong; without these fields it is judged for all. `APr`,
    `APc` and `APf` are there if the data set tells its classes' `frequencies`. A number without
    objects is NaN. An image that comes twice counts once.
    """

    headline = "AP"

    def __init__(
        self,
        classes: list[str],
        *,
        iou_type: Literal["bbox", "segm", "boundary"]
        | None = None,  # boxes, masks, or their outlines; by default masks if the task is instance
        max_detections: PositiveInt = 300,  # best detections of an image, over all classes
    ) -> None:
        super().__init__(classes, iou_type or "bbox")
        self.rules = Rules(limits=(max_detections,))

    def found(self, first: int, answers: list[Prediction], targets: list[Target]) -> Objects:
        """The detections that are judged."""
        found = super().found(first, answers, targets)
        self._check_labels(found, "prediction")
        judged = self._of_classes([it.judged for it in targets], True, "judged")
        partial = self._of_classes([it.partial for it in targets], False, "partial")
        return judge(found, first, judged, partial, self.rules.limits[0])

    def there(self, first: int, targets: list[Target], device: torch.device) -> Objects:
        """The truth that has an area."""
        return with_area(super().there(first, targets, device))

    def _of_classes(self, flags: list[Tensor | None], default: bool, name: str) -> Tensor:
        """bool [images, classes]."""
        every = torch.full((len(self.classes),), default)
        given = [every if its is None else its for its in flags]
        odd = next((its for its in given if len(its) != len(every)), every)
        if odd is not every:
            raise ValueError(
                f"{self}: target.{name} has {len(odd)} flags, there are {len(self.classes)} classes"
            )
        return torch.stack([its.to(given[0].device) for its in given])

    def compute(self) -> dict[str, float]:
        """The numbers over all images of all processes, as fractions in 0..1."""
        return summarize(self.curves(), self.classes, self.frequencies, self.rules.limits[0])

    def curves(self) -> Curves:
        """Precision, recall and scores over all images of all processes."""
        matches = match(*self.held(), len(self.classes), self.rules)
        return accumulate(gather_matches(matches), self.rules)


def judge(found: Objects, first: int, judged: Tensor, partial: Tensor, limit: int) -> Objects:
    """The best detections of each image that have an area, of classes for which it is judged.

    Those of partial classes become `crowd`: they are not wrong if no truth takes them.

    Args:
        first: number of the image that the first row of the flags is for.
        judged, partial: bool [images, classes].
        limit: detections of an image, over all classes.
    """
    order = by_score(found.scores)
    images, regrouped = found.images[order].sort(stable=True)
    found = found.select(order[regrouped][places(images) < limit])
    cells = (found.images - first) * judged.shape[1] + found.labels
    found = replace(found, crowd=partial.to(cells.device).flatten()[cells])
    return with_area(found.select(judged.to(cells.device).flatten()[cells].nonzero()[:, 0]))


def with_area(objects: Objects) -> Objects:
    """Without empty masks and boxes, which LVIS's program does not see."""
    return objects.select((objects.areas > 0).nonzero()[:, 0])


def summarize(
    curves: Curves, classes: list[str], frequencies: list[str] | None, limit: int
) -> dict[str, float]:
    """LVIS's numbers, and `AP/<class>` where defined."""
    everything, small, medium, large = range(4)
    precision, recall = curves.precision[..., 0], curves.recall[..., 0]
    parts = {
        "AP": precision[..., everything],
        "AP50": precision[0, ..., everything],
        "AP75": precision[5, ..., everything],
        "APs": precision[..., small],
        "APm": precision[..., medium],
        "APl": precision[..., large],
    }
    if frequencies is not None:
        for group in GROUPS:
            members = [place for place, its in enumerate(frequencies) if its == group]
            parts[f"AP{group}"] = precision[:, :, members, everything]
    parts |= {
        f"AR{limit}": recall[..., everything],
        "ARs": recall[..., small],
        "ARm": recall[..., medium],
        "ARl": recall[..., large],
    }
    numbers = {name: mean_of_defined(values) for name, values in parts.items()}
    for label, name in enumerate(classes):
        value = mean_of_defined(precision[:, :, label, everything])
        numbers |= {} if math.isnan(value) else {f"AP/{name}": value}
    return numbers
