"""Pascal VOC's average precision of boxes.

Everingham et al., "The Pascal Visual Object Classes Challenge", IJCV 2010, section 4.2, and the
evaluation of its development kits: 11 points until 2009, every point since.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from vitdense.metrics.matching import MOST_PAIRS, Matches
from vitdense.metrics.object_metric import ObjectMetric
from vitdense.metrics.objects import Objects, by_score
from vitdense.metrics.overlaps import box_overlaps
from vitdense.metrics.processes import gather_matches
from vitdense.ops.run_length import chunks, spread
from vitdense.registry import METRICS, Fraction

LEVELS = (*(0.1 * step for step in range(6)), *(1 - 0.1 * step for step in range(4, -1, -1)))
"""11 recalls, to the bit as the kit's `0:0.1:1`: 3 objects of 10 do not reach the fourth."""


@METRICS.register("voc")
class VocMetric(ObjectMetric):
    """VOC's AP of each class and their mean over the classes that have objects to be found.

    A detection is judged by the truth that it overlaps most, the first of equals: it is right if
    that is enough and no better detection has this truth. Difficult objects are the crowds; who
    finds one is neither right nor wrong, however often. An image that comes twice counts once.
    """

    headline = "mAP"

    def __init__(
        self,
        classes: list[str],
        *,
        iou: Fraction = 0.5,  # overlap from which a detection is right
        points: Literal[11, "all"] = "all",  # recalls that are averaged: 11 until VOC2009
        inclusive: bool = False,  # x2 and y2 are the last pixels: a box is x2 - x1 + 1 wide
    ) -> None:
        if iou <= 0:
            raise ValueError("iou: must be above 0, or boxes that do not touch would be right")
        super().__init__(classes)
        self.iou, self.points, self.inclusive = iou, points, inclusive

    def compute(self) -> dict[str, float]:
        """`mAP` and `AP/<class>` in 0..1; NaN where no object is to be found, or no number."""
        truth, detections = self.held()
        for objects in (truth, detections):
            objects.boxes[:, 2:] += float(self.inclusive)
        detections = by_image(detections)
        matches = gather_matches(match(truth, detections, len(self.classes), self.iou))
        return summarize(matches, self.classes, self.points)


def summarize(matches: Matches, classes: list[str], points: Literal[11, "all"]) -> dict[str, float]:
    """`mAP`, and `AP/<class>` of the classes that have objects to be found."""
    average = mean_precision(matches, points).tolist()
    pairs = zip(classes, average, strict=True)
    known = [(f"AP/{name}", value) for name, value in pairs if not math.isnan(value)]
    mean = sum(value for _, value in known) / len(known) if known else math.nan
    return {"mAP": mean} | dict(known)


def match(truth: Objects, detections: Objects, classes: int, iou: float) -> Matches:
    """What became of each detection by VOC's rule, as bit 0 of `matched` and of `ignored`.

    Detections of equal score keep their order.
    """
    truth, owner = _in_groups(truth, classes)
    group = detections.images * classes + detections.labels
    overlap, best = _best_truths(truth, owner, detections, group)
    hit = overlap >= iou
    # Who comes first takes the truth: by score, then by place.
    order = by_score(detections.scores)
    turn = torch.empty_like(order)
    turn[order] = torch.arange(len(order), device=order.device)
    first = torch.full_like(owner, len(order))
    first.scatter_reduce_(0, best[hit], turn[hit], "amin")
    spared, taken = hit.clone(), hit.clone()
    spared[hit] = truth.crowd[best[hit]]
    taken[hit] = first[best[hit]] == turn[hit]
    positives = torch.zeros(classes, 1, dtype=torch.int64, device=owner.device)
    return Matches(
        images=detections.images,
        labels=detections.labels,
        ranks=torch.zeros_like(group),
        scores=detections.scores,
        matched=(taken & ~spared).long(),
        ignored=spared.long(),
        positives=positives.index_add_(0, truth.labels, (~truth.crowd).long()[:, None]),
    )


def by_image(objects: Objects) -> Objects:
    """Sorted by image, so that the order does not depend on which process had them."""
    return objects.select(objects.images.argsort(stable=True))


def _in_groups(objects: Objects, classes: int) -> tuple[Objects, Tensor]:
    """Objects by image and class, in their order, and the number of each one's image and class."""
    group, order = (objects.images * classes + objects.labels).sort(stable=True)
    return objects.select(order), group


def _best_truths(
    truth: Objects, owner: Tensor, detections: Objects, group: Tensor
) -> tuple[Tensor, Tensor]:
    """The highest overlap of each detection, and the first truth that it has it with.

    Returns:
        float64 [N], -1 if its image has no object of its class, and int64 [N].
    """
    first = torch.searchsorted(owner, group)
    sizes = torch.searchsorted(owner, group, right=True) - first
    overlap, best = torch.full_like(detections.scores, -1.0), torch.zeros_like(group)
    busy = (sizes > 0).nonzero()[:, 0]
    first, sizes = first[busy], sizes[busy]
    for part in chunks(sizes, MOST_PAIRS):
        one = busy[part].repeat_interleave(sizes[part])
        other = spread(first[part], sizes[part])
        none = torch.zeros_like(one, dtype=torch.bool)
        its = box_overlaps(detections.boxes[one], truth.boxes[other], none)
        overlap.scatter_reduce_(0, one, its, "amax")
        top = (its == overlap[one]).nonzero()[:, 0]
        best.scatter_reduce_(0, one[top], other[top], "amin", include_self=False)
    return overlap, best


def mean_precision(matches: Matches, points: Literal[11, "all"]) -> Tensor:
    """float64 [K] on the CPU, NaN for classes without an object to be found.

    Precision at a recall is the best at this recall or beyond.
    """
    order = by_score(matches.scores)
    order = order[matches.labels[order].argsort(stable=True)]
    order = order[matches.ignored[order] == 0].cpu()
    labels, right = matches.labels.cpu()[order], matches.matched.cpu()[order]
    counts = torch.bincount(labels, minlength=len(matches.positives)).tolist()
    found = matches.positives[:, 0].tolist()
    averages = [
        _average(hits.cumsum(0).double(), positives, points) if positives else math.nan
        for hits, positives in zip(right.split(counts), found, strict=True)
    ]
    return torch.tensor(averages, dtype=torch.float64)


def _average(hits: Tensor, positives: int, points: Literal[11, "all"]) -> float:
    """Of one class: right detections up to each place, by descending score."""
    precision = hits / torch.arange(1, len(hits) + 1)
    precision = precision.flip(0).cummax(0)[0].flip(0) if len(hits) else precision
    recall = hits / positives
    if points == "all":
        return float((recall.diff(prepend=recall.new_zeros(1)) * precision).sum())
    place = torch.searchsorted(recall, recall.new_tensor(LEVELS))
    return float(torch.cat([precision, precision.new_zeros(1)])[place].mean())
