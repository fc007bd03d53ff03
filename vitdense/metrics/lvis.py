"""Average precision of federated data sets, by LVIS's rules.

Gupta et al., "LVIS: A Dataset for Large Vocabulary Instance Segmentation", CVPR 2019, section 2.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import PositiveInt
from torch import Tensor

from vitdense.metrics.average_precision import Curves, accumulate
from vitdense.metrics.coco import mean_of_defined
from vitdense.metrics.matching import Rules, match
from vitdense.metrics.object_metric import ObjectMetric
from vitdense.metrics.objects import Objects
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
        iou_type: Literal["bbox", "segm", "boundary"] = "bbox",  # boxes, masks, or their outlines
        max_detections: PositiveInt = 300,  # best detections of an image, over all classes
    ) -> None:
        super().__init__(classes, iou_type)
        self.rules = Rules(limits=(max_detections,))

    def objects(
        self, image: int, prediction: Prediction, target: Target
    ) -> tuple[Objects, Objects]:
        """Truth, and the detections that are judged; `crowd` are those of partial classes."""
        truth, found = super().objects(image, prediction, target)
        best = (-found.scores).argsort(stable=True)[: self.rules.limits[0]]
        if target.judged is not None:
            judged = self._of_classes(target.judged, "judged", best)
            best = best[judged[found.labels[best]]]
        found = found.select(best)
        if target.partial is not None:
            found.crowd = self._of_classes(target.partial, "partial", best)[found.labels]
        return truth, found

    def _of_classes(self, flags: Tensor, name: str, like: Tensor) -> Tensor:
        if len(flags) != len(self.classes):
            raise ValueError(
                f"{self}: target.{name} has {len(flags)} flags, there are {len(self.classes)} "
                "classes"
            )
        return flags.to(like.device)

    def compute(self) -> dict[str, float]:
        """The numbers over all images of all processes, as fractions in 0..1."""
        curves = self.curves()
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
        if self.frequencies is not None:
            for group in GROUPS:
                members = [place for place, its in enumerate(self.frequencies) if its == group]
                parts[f"AP{group}"] = precision[:, :, members, everything]
        parts |= {
            f"AR{self.rules.limits[0]}": recall[..., everything],
            "ARs": recall[..., small],
            "ARm": recall[..., medium],
            "ARl": recall[..., large],
        }
        numbers = {name: mean_of_defined(values) for name, values in parts.items()}
        for label, name in enumerate(self.classes):
            value = mean_of_defined(precision[:, :, label, everything])
            numbers |= {} if math.isnan(value) else {f"AP/{name}": value}
        return numbers

    def curves(self) -> Curves:
        """Precision, recall and scores over all images of all processes."""
        matches = match(*self.held(), len(self.classes), self.rules)
        return accumulate(gather_matches(matches), self.rules)
